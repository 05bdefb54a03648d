"""The progress of a job: a live line on a terminal, and occasional plain lines elsewhere.

Only finished steps count. JAX dispatches work to a device and returns at once, so
`Progress.dispatched` waits for the step before the one just dispatched. The device always has a
next step, and the count is correct. There is no rate until two steps are finished. Until then the
line shows the current activity and its duration; a small thread updates it while XLA compiles.
"""

import contextlib
import sys
import threading
import time
from collections.abc import Iterator

import jax
from tqdm import tqdm

from r2m_jax.parallel import hosts

TICK = 1.0  # seconds between two looks at the clock
# seconds of waiting after which a line is printed without a terminal, then every PATIENCE
WAITS = (10, 30, 60, 120, 300)
PATIENCE = 300
LAYOUT = "{desc} {percentage:3.0f}%|{bar:16}| {n_fmt}/{total_fmt}{postfix}"


class Live:
  """An activity that takes a while. A subclass defines what is shown.

  Args:
    label: its name.
    enabled: whether to show anything; only the first process does.
    out: a stream; None: stderr.
    clock: returns seconds. If it is given, no thread runs and `tick` must be called by hand.
  """

  def __init__(self, label: str, *, enabled: bool = True, out=None, clock=None):
    self.label = label
    self._out = out or sys.stderr
    self._clock = clock or time.monotonic
    self.began = self._clock()
    enabled = enabled and hosts.first()
    self._lines = enabled and not self._out.isatty()
    self._bar = None
    if enabled and not self._lines:
      with contextlib.suppress(OSError, ValueError):
        self._bar = self.make_bar()
    self._printed = self.began
    self._waits = 0  # lines printed while waiting
    self._lock = threading.RLock()
    self._stop = threading.Event()
    self._thread = None
    if clock is None and (self._bar is not None or self._lines):
      self._thread = threading.Thread(target=self._run, daemon=True)
      self._thread.start()

  def make_bar(self):
    """The bar of a terminal."""
    raise NotImplementedError

  def draw(self) -> None:
    """Shows the state on the bar."""
    raise NotImplementedError

  def line(self) -> str:
    """The state as a line."""
    raise NotImplementedError

  def seconds(self) -> float:
    """Seconds since the beginning."""
    return self._clock() - self.began

  def tick(self) -> None:
    """Shows the state if it is time to."""
    with self._lock, self._alive():
      if self._bar is not None:
        self.draw()
      elif self._lines and self._clock() - self._printed >= self._patience():
        self._waits += 1
        self._print()

  def _patience(self) -> float:
    """Seconds until the next line if nothing happens."""
    waits = (0, *WAITS)
    return waits[self._waits + 1] - waits[self._waits] if self._waits < len(WAITS) else PATIENCE

  def _print(self) -> None:
    self._printed = self._clock()
    print(self.line(), file=self._out, flush=True)

  @contextlib.contextmanager
  def _alive(self) -> Iterator[None]:
    """Inside this context, errors of a lost terminal or pipe are ignored, so that the run does not
    stop.
    """
    try:
      yield
    except (OSError, ValueError):
      self._bar, self._lines = None, False

  def _run(self) -> None:
    while not self._stop.wait(TICK):
      self.tick()

  def close(self) -> None:
    self._stop.set()
    if self._thread is not None:
      self._thread.join()
    if self._bar is not None:
      with contextlib.suppress(OSError, ValueError):
        self._bar.close()

  def __enter__(self):
    return self

  def __exit__(self, *_):
    self.close()


class Progress(Live):
  """The progress of a job's steps.

  Args:
    total: steps in all.
    initial: number of steps done before.
    unit: the name of a step.
    doing: the activity before the first step is dispatched.
  """

  def __init__(self, total, label, initial=0, *, unit="step", doing="compiling", **kwargs):
    self.total = total
    self.n = initial
    self.unit = unit
    self.doing = doing
    self._initial = initial
    self._first = None  # (n, seconds) when the first step, which compiles, was finished
    self._last = None  # the same for the last step
    self._waiting = None  # results of a dispatched step
    self._values = {}
    self._paced = False  # whether a line with a rate was printed
    super().__init__(label, **kwargs)
    self._tenths = self._tenth()

  def dispatched(self, result=None) -> None:
    """Notes that a step was dispatched. Waits for the step before it, which then counts.

    Args:
      result: arrays that the step returns and does not donate; None: `update` will count it.
    """
    self.doing = f"first {self.unit}"
    before, self._waiting = self._waiting, result
    if before is not None:
      jax.block_until_ready(before)
      self.update()

  def settle(self, **live) -> None:
    """Waits for the last dispatched step, which then counts."""
    before, self._waiting = self._waiting, None
    if before is not None:
      jax.block_until_ready(before)
      self.update(**live)

  def update(self, n=1, **live) -> None:
    """Notes that n more steps are finished; live values are shown next to the speed."""
    with self._lock, self._alive():
      self.n += n
      self._last = (self.n, self.seconds())
      self._first = self._first or self._last
      self._values = live or self._values
      if self._bar is not None:
        self._bar.n = self.n
        self._bar.set_postfix_str(self.state(), refresh=False)
        self._bar.update(0) if self.n < self.total else self._bar.refresh()
        return
      tenth = self._tenth()
      awaited = self._waits and self.pace() and not self._paced  # the first rate of a slow job
      if self._lines and (tenth > self._tenths or awaited or self._overdue()):
        self._tenths, self._paced = tenth, bool(self.pace())
        self._print()

  def pace(self) -> str:
    """Speed and remaining time, from finished steps after the first; "" until two are finished."""
    if not self._first or self._last[0] == self._first[0]:
      return ""
    done, seconds = self._last[0] - self._first[0], max(self._last[1] - self._first[1], 1e-9)
    left = tqdm.format_interval((self.total - self.n) * seconds / done)
    fast = done >= seconds
    rate = f"{done / seconds:.3g} {self.unit}/s" if fast else f"{seconds / done:.3g} s/{self.unit}"
    return f"{rate}, {left} left"

  def state(self) -> str:
    """The speed, or the current activity until there is a speed, and the live values."""
    going = self.doing if self._first is None else f"second {self.unit}"
    if self.n >= self.total:
      going = "done"
    pace = self.pace() or f"{going}, {tqdm.format_interval(self.seconds())} so far"
    return "  ".join([pace, *(f"{name} {_short(value)}" for name, value in self._values.items())])

  def make_bar(self):
    return tqdm(
      total=self.total,
      desc=self.label,
      initial=self.n,
      file=self._out,
      dynamic_ncols=True,
      bar_format=LAYOUT,
      postfix=self.state(),
    )

  def draw(self) -> None:
    self._bar.set_postfix_str(self.state())

  def line(self) -> str:
    width = len(str(self.total))
    return f"{self.label}  {self.n:{width}d}/{self.total}  {self.state()}"

  def _patience(self) -> float:
    return PATIENCE if self.pace() else super()._patience()

  def _tenth(self) -> int:
    return self.n * 10 // max(self.total, 1)

  def _overdue(self) -> bool:
    return self._clock() - self._printed >= PATIENCE


class Doing(Live):
  """A single activity that takes a while, such as loading weights. Its line disappears from a
  terminal.

  Args:
    total: total bytes; 0: the activity has no size.
  """

  def __init__(self, label: str, total: int = 0, **kwargs):
    self.total, self.n = total, 0
    super().__init__(label, **kwargs)

  def add(self, done: int) -> None:
    """Notes that this many more bytes are done."""
    self.n += done

  def line(self) -> str:
    size = f"  {self.n / 1e9:.2f}/{self.total / 1e9:.2f} GB" if self.total else ""
    return f"{self.label}{size}  {tqdm.format_interval(self.seconds())} so far"

  def make_bar(self):
    return tqdm(file=self._out, bar_format="{desc}", leave=False, desc=self.line())

  def draw(self) -> None:
    self._bar.set_description_str(self.line())


def progress(total, label, initial=0, *, enabled=True, unit="step", doing="compiling"):
  """`with progress(120, "vanilla") as bar: bar.update(gold=1.1, kl=2.0)` after every step."""
  return Progress(total, label, initial, enabled=enabled, unit=unit, doing=doing)


def doing(label: str, total: int = 0) -> Doing:
  """`with doing("loading weights", total_bytes) as bar: bar.add(read_bytes)`."""
  return Doing(label, total)


def _short(value):
  return value if isinstance(value, str) else f"{float(value):.3g}"
