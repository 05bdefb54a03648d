"""Progress counts finished steps, and shows the current activity from the first second."""

import fcntl
import io
import os
import pty
import re
import struct
import subprocess
import sys
import termios
import time

import jax
import jax.numpy as jnp
import numpy as np
import optax

from r2m_jax.parallel import sharding
from r2m_jax.run import fit, progress


class Clock:
  """A clock that the test advances."""

  def __init__(self):
    self.now = 0.0

  def __call__(self):
    return self.now


class Later:
  """The result of a step that a device is still computing. Waiting for it takes `seconds`."""

  def __init__(self, clock, seconds):
    self.clock, self.seconds, self.waited = clock, seconds, False

  def block_until_ready(self):
    self.clock.now += self.seconds
    self.waited = True
    return self


class Terminal(io.StringIO):
  def isatty(self):
    return True


def made(total, out=None, **kwargs):
  clock, out = Clock(), out or io.StringIO()
  return progress.Progress(total, "sft", out=out, clock=clock, **kwargs), clock, out


def wait(bar, clock, seconds):
  """Advances the clock; the thread reads it once a second."""
  for _ in range(seconds):
    clock.now += 1
    bar.tick()


def test_a_slow_first_step_is_told_and_then_left_out_of_the_rate():
  bar, clock, out = made(16, unit="update")
  wait(bar, clock, 65)  # compiles
  bar.dispatched(Later(clock, 20))
  wait(bar, clock, 60)
  assert bar.n == 0 and "left" not in out.getvalue()
  bar.dispatched(Later(clock, 30))  # waits for the first one
  assert bar.n == 1 and bar.pace() == ""
  bar.dispatched(Later(clock, 30))
  assert bar.n == 2
  lines = out.getvalue().splitlines()
  assert lines[:4] == [
    "sft   0/16  compiling, 00:10 so far",
    "sft   0/16  compiling, 00:30 so far",
    "sft   0/16  compiling, 01:00 so far",
    "sft   0/16  first update, 02:00 so far",
  ]
  assert lines[4:] == ["sft   2/16  30 s/update, 07:00 left"]  # not 148 s of 2
  bar.settle(loss=2.0)
  assert bar.n == 3 and bar.state() == "30 s/update, 06:30 left  loss 2"


def test_steps_count_when_they_are_finished_one_behind():
  """The last dispatched step is never waited for, so that the device always has a next step."""
  bar, clock, _ = made(4)
  steps = [Later(clock, 5) for _ in range(4)]
  for i, step in enumerate(steps):
    bar.dispatched(step)
    assert [s.waited for s in steps] == [j < i for j in range(4)]
    assert bar.n == i
  bar.settle()
  assert bar.n == 4 and all(step.waited for step in steps)
  bar.settle()
  assert bar.n == 4


def test_arrays_of_jax_are_waited_for():
  bar, _, _ = made(2)
  for _ in range(2):
    bar.dispatched({"loss": jnp.ones(3).sum()})
  bar.settle(loss=1)
  assert bar.n == 2 and bar.state().endswith("left  loss 1")


def test_a_resumed_job_has_a_rate_of_its_own_steps():
  bar, clock, _ = made(100, initial=90)
  for _ in range(3):
    clock.now += 10
    bar.update()
  assert bar.n == 93 and bar.state() == "10 s/step, 01:10 left"


def test_a_step_that_never_comes_is_told_every_five_minutes():
  bar, clock, out = made(100)
  for _ in range(2):
    clock.now += 1
    bar.update()
  wait(bar, clock, 1000)
  assert out.getvalue().count("1 step/s") == 3


def test_a_terminal_shows_seconds_while_nothing_is_finished():
  bar, clock, out = made(3, Terminal())
  wait(bar, clock, 2)
  assert "0/3, compiling, 00:02 so far" in out.getvalue()
  bar.dispatched(Later(clock, 4))
  wait(bar, clock, 1)
  assert "0/3, first step, 00:03 so far" in out.getvalue()
  bar.dispatched(Later(clock, 2))
  bar.tick()
  assert "1/3, second step, 00:07 so far" in out.getvalue() and "left" not in out.getvalue()
  bar.settle(loss=0.5)
  bar.tick()
  assert "2/3, 2 s/step, 00:02 left  loss 0.5" in out.getvalue()


def test_what_has_a_size_shows_gigabytes_and_short_work_shows_nothing():
  clock, out = Clock(), io.StringIO()
  bar = progress.Doing("loading weights", 4 * 10**9, out=out, clock=clock)
  wait(bar, clock, 9)
  assert out.getvalue() == ""
  bar.add(10**9)
  wait(bar, clock, 1)
  bar.add(10**9)
  wait(bar, clock, 20)
  assert out.getvalue().splitlines() == [
    "loading weights  1.00/4.00 GB  00:10 so far",
    "loading weights  2.00/4.00 GB  00:30 so far",
  ]


def test_the_thread_ends_with_the_job(monkeypatch):
  monkeypatch.setattr(progress, "TICK", 0.01)
  monkeypatch.setattr(progress, "WAITS", (0.02, 1000))
  monkeypatch.setattr(progress, "PATIENCE", 1000)
  out = io.StringIO()
  with progress.Progress(2, "r2m", out=out) as bar:
    while not out.getvalue():
      time.sleep(0.01)
  assert not bar._thread.is_alive()
  assert re.fullmatch(r"r2m  0/2  compiling, 00:00 so far\n", out.getvalue())
  off = progress.Progress(2, "r2m", out=out, enabled=False)
  assert off._thread is None


def test_a_fit_counts_what_its_device_has_done(tmp_path, monkeypatch):
  """This includes the updates between two logged ones, whose results are not fetched."""
  seen, results = [], []

  class Recording(progress.Progress):
    def dispatched(self, result=None):
      super().dispatched(result)
      done = sum(r["loss"].is_ready() for r in results)
      results.append(result)
      seen.append((self.n, done))

  def recorded(total, label, initial, unit):
    return Recording(total, label, initial, unit=unit, out=io.StringIO())

  def loss(state, batch):
    slow = jax.lax.fori_loop(0, 10**5, lambda i, x: jnp.sin(x), jax.lax.stop_gradient(state["w"]))
    return ((state["w"] + slow - batch["x"]) ** 2).sum(), {}

  monkeypatch.setattr(fit, "progress", recorded)
  mesh = sharding.make_mesh((1, 1, 1))
  state = jax.device_put({"w": jnp.zeros(3)}, sharding.shardings({"w": jnp.zeros(3)}, mesh))
  fit.fit(
    loss,
    state,
    optax.sgd(0.1),
    [{"x": np.ones((1, 3), np.float32)}] * 6,
    total=6,
    stage="sft",
    workdir=tmp_path,
    state_shardings=sharding.shardings(state, mesh),
    batch_sharding=jax.NamedSharding(mesh, sharding.BATCH),
  )
  # the first update is logged, so it is finished before the second one begins
  assert [n for n, _ in seen] == [0, 1, 2, 3, 4, 5]
  assert all(n <= done for n, done in seen)


SLOW = """
import time
from r2m_jax.run import progress
progress.TICK = 0.05
with progress.doing("loading weights", 10**9) as bar:
  bar.add(5 * 10**8)
  time.sleep(0.4)
with progress.progress(3, "sft") as bar:
  time.sleep(0.4)  # compiles
  for _ in range(3):
    bar.dispatched()
    time.sleep(0.2)
    bar.update(loss=1.0)
"""


def test_on_a_real_terminal():
  """The counter advances while no step is finished, and a rate appears with the second step."""
  ours, theirs = pty.openpty()
  fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("4H", 24, 80, 0, 0))
  job = subprocess.Popen([sys.executable, "-c", SLOW], stdin=theirs, stdout=theirs, stderr=theirs)
  os.close(theirs)
  shown = b""
  try:
    while chunk := os.read(ours, 4096):
      shown += chunk
  except OSError:  # Linux: the other end is closed
    pass
  os.close(ours)
  assert job.wait() == 0, shown
  states = [state for state in shown.decode().split("\r") if state.strip()]
  loading = [i for i, state in enumerate(states) if "loading weights  0.50/1.00 GB" in state]
  compiling, first, second, rate = (
    [i for i, state in enumerate(states) if text in state]
    for text in ("0/3, compiling", "0/3, first step", "1/3, second step", "3/3, ")
  )
  assert loading and len(compiling) > 2 and first and second
  assert loading[-1] < compiling[0] <= compiling[-1] < first[0] < second[0]
  assert re.search(r"step.*left  loss 1", states[rate[-1]])
