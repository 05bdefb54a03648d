"""Does a killed run lose anything? SIGKILL at every step, inside steps and inside saves, or SIGTERM
at random moments.

  python -m benchmarks.kill_resume [--kills=50] [--seed=0] [--folder=/tmp/kills]
  python -m benchmarks.kill_resume --signal=TERM --kills=20

The run is the smallest quickstart with 6 R2M steps. SIGKILL: every step is saved. A run is killed
again and again, each time one step later, until it ends; then every array of its last checkpoint is
compared byte by byte with those of an uninterrupted run. SIGTERM: only the signal makes the run
save. The table has the exit status, the time from signal to exit, and the number of logged steps
that the newest intact checkpoint lacks.
"""

import collections
import json
import os
import pathlib
import random
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time

import jax
import numpy as np
from absl import app, flags, logging

from r2m_jax.run import checkpoint
from r2m_jax.run.loop import RESUME
from r2m_jax.run.metrics import read_metrics, without_clock

KILLS = flags.DEFINE_integer("kills", 50, "Number of kills")
SEED = flags.DEFINE_integer("seed", 0, "Seed of the random moments")
SIGNAL = flags.DEFINE_enum("signal", "KILL", ["KILL", "TERM"], "Which signal")
FOLDER = flags.DEFINE_string("folder", None, "Folder for the runs; a temporary folder if not given")

ROOT = pathlib.Path(__file__).parents[1]
STEPS = 6
MOMENTS = ("after the step is logged", "inside the save", "inside the step")


def start(workdir: pathlib.Path, *args: str) -> subprocess.Popen:
  """Starts the run in a separate process. Its output goes to WORKDIR.log."""
  command = [
    sys.executable,
    "-m",
    "r2m_jax.main",
    "--config=configs/quickstart.py:test",
    f"--workdir={workdir}",
    "--config.variant=r2m",
    f"--config.steps={STEPS}",
    "--config.log.checkpoint_every=1",
    *args,
  ]
  with open(f"{workdir}.log", "a") as log:
    return subprocess.Popen(command, cwd=ROOT, stdout=log, stderr=log)


def steps_logged(workdir: pathlib.Path) -> int:
  """The number of RL rows in metrics.jsonl so far."""
  try:
    return (workdir / "metrics.jsonl").read_bytes().count(b'"stage": "rl"')
  except FileNotFoundError:
    return 0


def kill_at(workdir: pathlib.Path, step: int, moment: str, rng: random.Random, *args: str) -> bool:
  """Starts the run and kills it around `step`; False if it ended before."""
  run, arm = start(workdir, *args), workdir / "checkpoints" / "r2m"
  if moment == "inside the step":  # a step takes tens of milliseconds
    ready, delay = lambda: steps_logged(workdir) >= step, rng.uniform(0, 0.1)
  elif moment == "inside the save":
    ready, delay = lambda: any(arm.glob(f"{step + 1}.*")), rng.uniform(0, 0.05)
  else:
    ready, delay = lambda: steps_logged(workdir) > step, 0.0
  while run.poll() is None and not ready():
    time.sleep(0.001)
  time.sleep(delay)
  run.kill()
  return run.wait() == -signal.SIGKILL


def arrays(workdir: pathlib.Path, step: int = STEPS) -> list[bytes]:
  """Every array of a checkpoint, as bytes."""
  saved = checkpoint.open_checkpoints(workdir / "checkpoints" / "r2m")
  if problem := checkpoint.damage(saved.folder / str(step)):
    raise AssertionError(f"{saved.folder / str(step)}: {problem}")

  def plain(x):
    return jax.random.key_data(x) if jax.dtypes.issubdtype(x.dtype, jax.dtypes.prng_key) else x

  tree = jax.tree_util.tree_leaves_with_path(saved.restore(step))
  return [str(path).encode() + np.asarray(plain(leaf)).tobytes() for path, leaf in tree]


def rows(workdir: pathlib.Path) -> list[dict]:
  """The RL stage in metrics.jsonl, without times."""
  return [without_clock(row) for row in read_metrics(workdir) if row["stage"] == "rl"]


def kill_chain(workdir: pathlib.Path, kills: int, rng: random.Random) -> collections.Counter:
  """Kills a run at each of its steps, at most `kills` times, then lets it end."""
  done = collections.Counter()
  for step in range(STEPS):
    if done.total() < kills:
      moment = rng.choice(MOMENTS)
      done[moment] += kill_at(workdir, step, moment, rng)
  if start(workdir).wait() != 0:
    raise AssertionError(f"{workdir} did not end: see {workdir}.log")
  return done


def sigkill(folder: pathlib.Path, kills: int, rng: random.Random) -> dict:
  unbroken = folder / "unbroken"
  if start(unbroken).wait() != 0:
    raise AssertionError(pathlib.Path(f"{unbroken}.log").read_text()[-2000:])
  want, want_rows = arrays(unbroken), rows(unbroken)
  done = collections.Counter()
  equal = 0
  chains = 0
  while done.total() < kills:
    workdir = folder / f"run{chains}"
    shutil.copytree(
      unbroken / "stages", workdir / "stages"
    )  # the supervised stage is not tested here
    done += kill_chain(workdir, kills - done.total(), rng)
    equal, chains = equal + (arrays(workdir) == want and rows(workdir) == want_rows), chains + 1
    print(
      f"{chains} runs ended, {equal} with every array and metric equal; killed {dict(done)}",
      flush=True,
    )
    shutil.rmtree(workdir)
  return {
    "kills": done.total(),
    "moments": dict(done),
    "runs": chains,
    "byte_equal": equal,
    "arrays": len(want),
  }


def sigterm(folder: pathlib.Path, kills: int, rng: random.Random) -> dict:
  first = folder / "first"
  assert start(first).wait() == 0
  codes = collections.Counter()
  times = []
  lost = []
  for i in range(kills):
    workdir = folder / f"run{i}"
    shutil.copytree(first / "stages", workdir / "stages")
    run = start(workdir, "--config.steps=100000", "--config.log.checkpoint_every=100000")
    after = rng.randrange(1, 40)  # steps, and a part of one
    while run.poll() is None and steps_logged(workdir) < after:
      time.sleep(0.005)
    time.sleep(rng.uniform(0, 0.2))
    began = time.monotonic()
    run.send_signal(signal.SIGTERM)
    codes[run.wait()] += 1
    times.append(time.monotonic() - began)
    saved = checkpoint.newest(checkpoint.open_checkpoints(workdir / "checkpoints" / "r2m"))
    lost.append(steps_logged(workdir) - (saved or 0))
    print(
      f"{i}: {after} steps, {times[-1]:.2f} s to exit, {lost[-1]} logged steps not saved",
      flush=True,
    )
    shutil.rmtree(workdir)
  return {
    "signals": kills,
    "exit": dict(codes),
    "resume_status": RESUME,
    "most_steps_lost": max(lost),
    "seconds_median": round(statistics.median(times), 2),
    "seconds_max": round(max(times), 2),
  }


def main(argv):
  del argv
  logging.set_verbosity(logging.ERROR)
  jax.config.update("jax_platforms", os.environ.get("JAX_PLATFORMS", "cpu"))
  folder = pathlib.Path(FOLDER.value or tempfile.mkdtemp(prefix="kill_resume_"))
  folder.mkdir(parents=True, exist_ok=True)
  print(
    json.dumps(
      (sigkill if SIGNAL.value == "KILL" else sigterm)(
        folder, KILLS.value, random.Random(SEED.value)
      )
    )
  )


if __name__ == "__main__":
  app.run(main)
