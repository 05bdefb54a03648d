"""The files of a run during training: metrics.jsonl, samples.jsonl, and scalars in trackers.

A row of metrics.jsonl is {"stage", "arm", "step", "seconds", **scalars}, one JSON object a line.
This file knows no model and no config. Only process 0 writes. That is decided here, so callers need
not check.
"""

import json
import math
import time
import warnings
from pathlib import Path

from r2m_jax.config import redact
from r2m_jax.parallel import hosts
from r2m_jax.run.files import DamagedFile, plain, read_jsonl, write_atomic
from r2m_jax.run.trackers import TRACKERS, Tracked, wanted

ROW_KEYS = ("stage", "arm", "step", "seconds")
# Keys that depend on the clock or the machine, so that repeated runs differ in them. A name that
# ends with a slash stands for all keys that begin with it.
CLOCKED = ("seconds", "data/wait", "seconds/", "speed/", "memory/")
EVAL = "eval"  # stage of the rows of an RL run's evaluations
_NONFINITE = {
  "nan": math.nan,
  "inf": math.inf,
  "-inf": -math.inf,
}  # JSON has no such numbers, so they are stored as strings


def without_clock(row: dict) -> dict:
  """A row without the keys in `CLOCKED`, which is the same for every run of one config."""
  ends = tuple(name for name in CLOCKED if name.endswith("/"))
  return {k: v for k, v in row.items() if k not in CLOCKED and not k.startswith(ends)}


# ---- files ----


def read_metrics(workdir):
  """The rows of metrics.jsonl, with "nan", "inf" and "-inf" as floats again."""
  rows = _rows(workdir)
  return [
    {k: v if k in ROW_KEYS or not isinstance(v, str) else _NONFINITE[v] for k, v in row.items()}
    for row in rows
  ]


def _rows(workdir):
  """The rows of metrics.jsonl as stored, checked for the types that `Metrics` writes."""
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
  """Drops the rows of this stage and arm with step >= from_step, and an incomplete last line.

  Returns the seconds of the last remaining row, from which a resumed stage continues to count.
  """
  path = Path(workdir) / "metrics.jsonl"
  rows = _rows(workdir)
  ours = [row for row in rows if (row["stage"], row["arm"]) == (stage, arm)]
  dropped = {id(row) for row in ours if row["step"] >= from_step}
  if path.exists():
    write_atomic(path, "".join(_dump(row) for row in rows if id(row) not in dropped))
  return max((row["seconds"] for row in ours if row["step"] < from_step), default=0.0)


def append_samples(workdir, rows):
  """Adds rows to samples.jsonl; they replace earlier ones of the same (arm, when, prompt), so that
  a rerun lists each of them once.

  Keys: arm, when ("before", "after" or a step), prompt, response, reward, frozen, gold, length,
  truncated. Keys that the run does not have (such as gold, outside the laboratory) are omitted.
  """
  path = Path(workdir) / "samples.jsonl"
  rows = [{key: plain(value) for key, value in row.items()} for row in rows]
  new = {(row["arm"], row["when"], row["prompt"]) for row in rows}
  kept = [row for row in read_jsonl(path) if (row["arm"], row["when"], row["prompt"]) not in new]
  write_atomic(path, "".join(map(_dump, kept + rows)))


# ---- scalars ----


class Metrics:
  """The log of one stage of one arm: metrics.jsonl, and the same scalars in the trackers that the
  workdir's config names in `log.to`.

  from_step is 0 for a new run, or the next step of a resumed run. Earlier rows at or after it are
  dropped, so every step appears once. `also` names a second stage whose rows are logged here.
  """

  def __init__(self, workdir, stage, arm="", *, from_step, also=""):
    self.stage = stage
    self.arm = arm
    self.enabled = hosts.first()
    self._file, self._trackers = None, {}
    if not self.enabled:
      return
    workdir = Path(workdir)
    workdir.mkdir(parents=True, exist_ok=True)
    if also:
      truncate(workdir, also, arm, from_step)
    self._start = time.monotonic() - truncate(workdir, stage, arm, from_step)
    self._file = open(workdir / "metrics.jsonl", "a", encoding="utf-8")
    config, names = wanted(workdir)
    run = Tracked(f"{stage}-{arm}" if arm else stage, workdir, config, from_step)
    self._trackers = {name: TRACKERS[name][1]() for name in names}
    self._tell("start", run)

  def log(self, step, scalars, stage=""):
    """Writes one row. scalars: name -> number or 0-d array; None values are omitted.

    stage: of the row, if it differs from the log's stage. In TensorBoard its scalars are named
      STAGE/NAME.
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
    prefix = f"{stage}/" if stage else ""
    self._tell("log", int(step), {prefix + name: value for name, value in values.items()})

  def close(self, status="finished"):
    """Ends the log. status: of `trackers.Tracker.finish`."""
    if self._file:
      self._file.close()
    self._tell("finish", status)
    self._file, self._trackers = None, {}
    self.enabled = False

  def __enter__(self):
    return self

  def __exit__(self, kind, *_):
    failed = kind is not None and issubclass(kind, Exception)
    self.close("failed" if failed else "finished" if kind is None else "stopped")

  def _tell(self, what, *args):
    """Calls start, log or finish of every tracker. Trackers are a convenience: at its first failure
    a tracker prints a warning and ends, and training continues.
    """
    for name, tracker in list(self._trackers.items()):
      try:
        getattr(tracker, what)(*args)
      except Exception as error:  # noqa: BLE001  no error of a tracker may stop training
        del self._trackers[name]
        warnings.warn(
          f"{TRACKERS[name][0]} is off for {self.stage} {self.arm}: {redact(repr(error))}; "
          "metrics.jsonl is still written",
          stacklevel=3,
        )
