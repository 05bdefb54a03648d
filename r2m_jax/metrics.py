"""What a run leaves on disk while it trains: metrics.jsonl, samples.jsonl, TensorBoard events and a progress line.

A row of metrics.jsonl is {"stage", "arm", "step", "seconds", **scalars}, one JSON object a line. This file knows no
model and no config. Of the processes of a run the first alone writes: here, not where something is written.
"""

import contextlib
import json
import math
import os
import sys
import time
import warnings
from pathlib import Path

from tqdm import tqdm

from r2m_jax import hosts

ROW_KEYS = ("stage", "arm", "step", "seconds")
_NONFINITE = {"nan": math.nan, "inf": math.inf, "-inf": -math.inf}  # JSON has no such numbers: kept as strings


# ---- files ----


def write_atomic(path, data):
  """Writes str or bytes so that a reader sees the old file or the new one, never a part."""
  if not hosts.first():
    return
  path = Path(path)
  path.parent.mkdir(parents=True, exist_ok=True)
  temp = path.with_name(f".{path.name}.{os.getpid()}.tmp")
  try:
    temp.write_bytes(data.encode("utf-8") if isinstance(data, str) else data)
    os.replace(temp, path)
  except OSError:  # a full disk: what was there stays, and the part takes no room
    with contextlib.suppress(OSError):
      temp.unlink()
    raise


class DamagedFile(ValueError):
  """A file of a workdir that is not what a run writes; the message says which and what to do."""


def read_json(path):
  """The object in a JSON file of a workdir. Raises DamagedFile where there is none in it."""
  try:
    found = json.loads(Path(path).read_text(encoding="utf-8"))
  except (ValueError, RecursionError) as error:
    raise DamagedFile(f"{path} is damaged: {error}; bring it back from a copy, or choose another --workdir") from None
  if not isinstance(found, dict):
    raise DamagedFile(f"{path} is damaged: it holds no object; bring it back from a copy, or choose another --workdir")
  return found


def read_jsonl(path):
  """The rows of a JSON-lines file; [] where there is none. A last line cut by a crash is left out."""
  path = Path(path)
  if not path.exists():
    return []
  lines = path.read_bytes().split(b"\n")  # bytes: a cut may fall inside a character
  rows = []
  for number, line in enumerate(lines, 1):
    if not line.strip():
      continue
    try:
      rows.append(json.loads(line))
    except ValueError as error:
      if number == len(lines):  # no newline after it: the write was cut
        break
      raise DamagedFile(
        f"{path}:{number} is not JSON: {line[:80]!r}; take the line out, or bring the file back from a copy"
      ) from error
  return rows


def read_metrics(workdir):
  """The rows of metrics.jsonl, with "nan", "inf" and "-inf" as floats again."""
  rows = _rows(workdir)
  return [{k: v if k in ROW_KEYS or not isinstance(v, str) else _NONFINITE[v] for k, v in row.items()} for row in rows]


def _rows(workdir):
  """The rows of metrics.jsonl as they are stored, each with the types that `Metrics` writes."""
  path = Path(workdir) / "metrics.jsonl"
  number = lambda x: isinstance(x, (int, float)) and not isinstance(x, bool)
  scalar = lambda x: number(x) or isinstance(x, str) and x in _NONFINITE
  for row in (rows := read_jsonl(path)):
    good = isinstance(row, dict) and all(isinstance(row.get(key), str) for key in ("stage", "arm"))
    good = good and isinstance(row.get("step"), int) and number(row.get("seconds"))
    if not good or not all(key in ROW_KEYS or scalar(x) for key, x in row.items()):
      raise DamagedFile(f"{path} has a row that no run writes: {str(row)[:120]}; take it out, or bring the file back")
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
  """Adds rows to samples.jsonl; they replace earlier ones of the same (arm, when, prompt), so a rerun lists each once.

  Keys: arm, when ("before", "after" or a step), prompt, response, reward, frozen, gold, length, truncated. A key that
  the run does not have (gold, outside the laboratory) is left out.
  """
  path = Path(workdir) / "samples.jsonl"
  rows = [{key: plain(value) for key, value in row.items()} for row in rows]
  new = {(row["arm"], row["when"], row["prompt"]) for row in rows}
  kept = [row for row in read_jsonl(path) if (row["arm"], row["when"], row["prompt"]) not in new]
  write_atomic(path, "".join(map(_dump, kept + rows)))


def plain(value):
  """A value JSON can hold: array scalars become Python's, non-finite floats strings."""
  value = value.item() if hasattr(value, "item") else value
  if isinstance(value, float) and not math.isfinite(value):
    return str(value)  # "nan", "inf" or "-inf"
  return float(f"{value:.9g}") if isinstance(value, float) else value  # 9 digits give every float32 back exactly


# ---- scalars ----


class Metrics:
  """The log of one stage of one arm: metrics.jsonl, and the same scalars under tensorboard/.

  from_step is 0 for a fresh start, or the step a resumed run does next: older rows at or past it are dropped, so every
  step appears once.
  """

  def __init__(self, workdir, stage, arm="", *, from_step, enabled=True):
    self.stage, self.arm, self.enabled = stage, arm, enabled and hosts.first()
    self._file = self._events = None
    if not self.enabled:
      return
    workdir = Path(workdir)
    workdir.mkdir(parents=True, exist_ok=True)
    self._start = time.monotonic() - truncate(workdir, stage, arm, from_step)
    self._file = open(workdir / "metrics.jsonl", "a", encoding="utf-8")
    self._guarded(self._open_events, workdir / "tensorboard" / (f"{stage}-{arm}" if arm else stage), from_step)

  def log(self, step, scalars):
    """Writes one row. scalars: name -> number or 0-d array; a None is left out."""
    if not self.enabled:
      return
    if taken := set(scalars) & set(ROW_KEYS):
      raise ValueError(f"{sorted(taken)} name the row itself; rename the scalars")
    values = {name: float(value) for name, value in scalars.items() if value is not None}
    row = {"stage": self.stage, "arm": self.arm, "step": int(step), "seconds": round(time.monotonic() - self._start, 3)}
    self._file.write(_dump(row | {name: plain(value) for name, value in values.items()}))
    self._file.flush()
    if self._events:
      self._guarded(self._write_events, int(step), values)

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
    # The synchronous writer: SummaryWriter's thread dies on a full disk, and its full queue then blocks the caller.
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

    summary = Summary(value=[Summary.Value(tag=name, simple_value=value) for name, value in values.items()])
    self._events.write_event(Event(step=step, wall_time=time.time(), summary=summary))
    self._events.flush()

  def _guarded(self, call, *args):
    """TensorBoard is a convenience: its first failure warns and ends it, and training goes on."""
    try:
      call(*args)
    except Exception as error:  # noqa: BLE001  whatever it is, training must not stop for it
      self._events = None
      warnings.warn(f"TensorBoard is off for {self.stage} {self.arm}: {error!r}; metrics.jsonl goes on", stacklevel=3)


# ---- progress ----


class Progress:
  """A bar on a terminal, or a plain line about every tenth of the way (and every five minutes) anywhere else."""

  def __init__(self, total, label, unit="step", initial=0, *, enabled=True, out=None):
    self.total, self.label, self.unit, self.n = total, label, unit, initial
    self._out = out or sys.stderr
    self._bar = None
    enabled = enabled and hosts.first()
    self._lines = enabled and not self._out.isatty()
    if enabled and not self._lines:
      with contextlib.suppress(OSError, ValueError):
        self._bar = tqdm(total=total, desc=label, unit=unit, initial=initial, file=self._out, dynamic_ncols=True)
    self._first = None  # (n, time) after the first update: the speed leaves out compilation
    self._printed = (initial, time.monotonic())

  def update(self, n=1, **live):
    """n more units are done; live values are shown beside the speed."""
    self.n += n
    try:
      if self._bar is not None:
        self._bar.set_postfix({name: _short(value) for name, value in live.items()}, refresh=False)
        self._bar.update(n)
      elif self._lines:
        self._line(live)
    except (OSError, ValueError):  # the terminal is gone, the pipe closed: a run does not stop for that
      self._bar, self._lines = None, False

  def _line(self, live):
    now = time.monotonic()
    self._first = self._first or (self.n, now)
    last_n, last_time = self._printed
    tenth = self.n * 10 // max(self.total, 1) > last_n * 10 // max(self.total, 1)
    if not tenth and now - last_time < 300:
      return
    self._printed = (self.n, now)
    done, seconds = self.n - self._first[0], now - self._first[1]
    pace = ""
    if done and seconds:
      left = tqdm.format_interval((self.total - self.n) * seconds / done)
      fast = done >= seconds
      pace = f"{done / seconds:.3g} {self.unit}/s" if fast else f"{seconds / done:.3g} s/{self.unit}"
      pace = f"  {pace}, {left} left"
    values = "".join(f"  {name} {_short(value)}" for name, value in live.items())
    width = len(str(self.total))
    print(f"{self.label}  {self.n:{width}d}/{self.total}{pace}{values}", file=self._out, flush=True)

  def close(self):
    if self._bar is not None:
      with contextlib.suppress(OSError, ValueError):
        self._bar.close()

  def __enter__(self):
    return self

  def __exit__(self, *_):
    self.close()


def progress(total, label, unit="step", initial=0, *, enabled=True):
  """`with progress(120, "vanilla") as bar: bar.update(gold=1.1, kl=2.0)` after every step."""
  return Progress(total, label, unit, initial, enabled=enabled)


def _short(value):
  return value if isinstance(value, str) else f"{float(value):.3g}"
