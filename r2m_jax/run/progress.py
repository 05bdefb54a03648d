"""How far a job is: a bar on a terminal, plain lines anywhere else."""

import contextlib
import sys
import time

from tqdm import tqdm

from r2m_jax.parallel import hosts


class Progress:
  """A bar on a terminal, or a plain line about every tenth of the way (and every five minutes)
  anywhere else.
  """

  def __init__(self, total, label, initial=0, *, enabled=True, out=None):
    self.total, self.label, self.n = total, label, initial
    self._out = out or sys.stderr
    self._bar = None
    enabled = enabled and hosts.first()
    self._lines = enabled and not self._out.isatty()
    if enabled and not self._lines:
      with contextlib.suppress(OSError, ValueError):
        self._bar = tqdm(
          total=total, desc=label, unit="step", initial=initial, file=self._out, dynamic_ncols=True
        )
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
    except (
      OSError,
      ValueError,
    ):  # the terminal is gone, the pipe closed: a run does not stop for that
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
      pace = f"{done / seconds:.3g} step/s" if fast else f"{seconds / done:.3g} s/step"
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


def progress(total, label, initial=0, *, enabled=True):
  """`with progress(120, "vanilla") as bar: bar.update(gold=1.1, kl=2.0)` after every step."""
  return Progress(total, label, initial, enabled=enabled)


def _short(value):
  return value if isinstance(value, str) else f"{float(value):.3g}"
