"""What a run leaves on disk while it trains: metrics.jsonl, samples.jsonl and TensorBoard events.

A row of metrics.jsonl is {"stage", "arm", "step", "seconds", **scalars}, one JSON object a line.
This file knows no model and no config. Of the processes of a run the first alone writes: here, not
where something is written.
"""

import json
import math
import time
import warnings
from pathlib import Path

from r2m_jax.parallel import hosts
from r2m_jax.run.files import DamagedFile, plain, read_jsonl, write_atomic

ROW_KEYS = ("stage", "arm", "step", "seconds")
EVAL = "eval"  # stage of the rows that evaluations of an RL run make
_NONFINITE = {
  "nan": math.nan,
  "inf": math.inf,
  "-inf": -math.inf,
}  # JSON has no such numbers: kept as strings


# ---- files ----


def read_metrics(workdir):
  """The rows of metrics.jsonl, with "nan", "inf" and "-inf" as floats again."""
  rows = _rows(workdir)
  return [
    {k: v if k in ROW_KEYS or not isinstance(v, str) else _NONFINITE[v] for k, v in row.items()}
    for row in rows
  ]


def _rows(workdir):
  """The rows of metrics.jsonl as they are stored, each with the types that `Metrics` writes."""
  path = Path(workdir) / "metrics.jsonl"

  def number(x):
    return isinstance(x, (int, float)) and not isinstance(x, bool)

  def scalar(x):
    return number(x) or isinstance(x, str) and x in _NONFINITE

  for row in (rows := read_jsonl(path)):
    good = isinstance(row, dict) and all(isinstance(row.get(key), str) for key in ("stage", "arm"))
    good = good and isinstance(row.get("step"), int) and number(row.get("seconds"))
    if not good or not all(key in ROW_KEYS or scalar(x) for key, x in row.items()):
      raise DamagedFile(
        f"{path} has a row that no run writes: {str(row)[:120]}; take it out, or bring the file "
        "back"
      )
  return rows


def _dump(row):
  return json.dumps(row, ensure_ascii=False, allow_nan=False) + "\n"


def truncate(workdir, stage, arm, from_step):
  """Drops the rows of this stage and arm with step >= from_step, and a cut last line.

  Returns the seconds that the last row left had, so that a resumed stage counts on from there.
  """
  path = Path(workdir) / "metrics.jsonl"
  rows = _rows(workdir)
  ours = [row for row in rows if (row["stage"], row["arm"]) == (stage, arm)]
  dropped = {id(row) for row in ours if row["step"] >= from_step}
  if path.exists():
    write_atomic(path, "".join(_dump(row) for row in rows if id(row) not in dropped))
  return max((row["seconds"] for row in ours if row["step"] < from_step), default=0.0)


def append_samples(workdir, rows):
  """Adds rows to samples.jsonl; they replace earlier ones of the same (arm, when, prompt), so a
  rerun lists each once.

  Keys: arm, when ("before", "after" or a step), prompt, response, reward, frozen, gold, length,
  truncated. A key that the run does not have (gold, outside the laboratory) is left out.
  """
  path = Path(workdir) / "samples.jsonl"
  rows = [{key: plain(value) for key, value in row.items()} for row in rows]
  new = {(row["arm"], row["when"], row["prompt"]) for row in rows}
  kept = [row for row in read_jsonl(path) if (row["arm"], row["when"], row["prompt"]) not in new]
  write_atomic(path, "".join(map(_dump, kept + rows)))


# ---- scalars ----


class Metrics:
  """The log of one stage of one arm: metrics.jsonl, and the same scalars under tensorboard/.

  from_step is 0 for a fresh start, or the step a resumed run does next: older rows at or past it
  are dropped, so every step appears once. `also` names a second stage whose rows are logged here.
  """

  def __init__(self, workdir, stage, arm="", *, from_step, also=""):
    self.stage, self.arm, self.enabled = stage, arm, hosts.first()
    self._file = self._events = None
    if not self.enabled:
      return
    workdir = Path(workdir)
    workdir.mkdir(parents=True, exist_ok=True)
    if also:
      truncate(workdir, also, arm, from_step)
    self._start = time.monotonic() - truncate(workdir, stage, arm, from_step)
    self._file = open(workdir / "metrics.jsonl", "a", encoding="utf-8")
    self._guarded(
      self._open_events, workdir / "tensorboard" / (f"{stage}-{arm}" if arm else stage), from_step
    )

  def log(self, step, scalars, stage=""):
    """Writes one row. scalars: name -> number or 0-d array; a None is left out.

    stage: of the row if it is not the log's own. In TensorBoard its scalars are named STAGE/NAME.
    """
    if not self.enabled:
      return
    if taken := set(scalars) & set(ROW_KEYS):
      raise ValueError(f"{sorted(taken)} name the row itself; rename the scalars")
    values = {name: float(value) for name, value in scalars.items() if value is not None}
    row = {
      "stage": stage or self.stage,
      "arm": self.arm,
      "step": int(step),
      "seconds": round(time.monotonic() - self._start, 3),
    }
    self._file.write(_dump(row | {name: plain(value) for name, value in values.items()}))
    self._file.flush()
    if self._events:
      prefix = f"{stage}/" if stage else ""
      tagged = {prefix + name: value for name, value in values.items()}
      self._guarded(self._write_events, int(step), tagged)

  def close(self):
    if self._file:
      self._file.close()
    if self._events:
      self._guarded(self._events.close)
    self._file = self._events = None
    self.enabled = False

  def __enter__(self):
    return self

  def __exit__(self, *_):
    self.close()

  def _open_events(self, folder, from_step):
    # The synchronous writer: SummaryWriter's thread dies on a full disk, and its full queue then
    # blocks the caller.
    from tensorboardX.event_file_writer import EventsWriter
    from tensorboardX.proto.event_pb2 import Event, SessionLog

    folder.mkdir(parents=True, exist_ok=True)
    self._events = EventsWriter(str(folder / "events"), filename_suffix=f".{from_step}")
    # A session's start makes TensorBoard forget what earlier files hold at or past this step.
    start = SessionLog(status=SessionLog.START)
    self._events.write_event(Event(step=from_step, wall_time=time.time(), session_log=start))
    self._events.flush()

  def _write_events(self, step, values):
    from tensorboardX.proto.event_pb2 import Event
    from tensorboardX.proto.summary_pb2 import Summary

    summary = Summary(
      value=[Summary.Value(tag=name, simple_value=value) for name, value in values.items()]
    )
    self._events.write_event(Event(step=step, wall_time=time.time(), summary=summary))
    self._events.flush()

  def _guarded(self, call, *args):
    """TensorBoard is a convenience: its first failure warns and ends it, and training goes on."""
    try:
      call(*args)
    except Exception as error:  # noqa: BLE001  whatever it is, training must not stop for it
      self._events = None
      warnings.warn(
        f"TensorBoard is off for {self.stage} {self.arm}: {error!r}; metrics.jsonl goes on",
        stacklevel=3,
      )
