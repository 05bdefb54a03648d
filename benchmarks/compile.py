"""The compilation of the quickstart: its time with an empty cache and with a warm one, and its
programs.

  python -m benchmarks.compile [--which=configs/quickstart.py]

The run has one seed and is shortened (2 RL steps of each arm, few steps of the other stages). This
changes no program, because the shapes are those of the full run. It is started twice with the same
cache folder, which is empty at first. Time is the union of all spans in which JAX traces, lowers,
compiles or reads its cache, so that parallel work counts once. A program counts if its compilation
by itself takes over half a second.
"""

import json
import os
import pathlib
import subprocess
import sys
import tempfile

from absl import app, flags

from benchmarks import machine

CONFIG = flags.DEFINE_string("which", "configs/quickstart.py", "The config to measure")
RUN = "R2M_BENCHMARK_COMPILE"  # in the child's environment: the file for its events
SHORT = ("seeds=1", "steps=2", "sft.steps=4", "sft.warmup_steps=1", "reward.epochs=1")
LONG = 0.5  # seconds
BOUNDS = {"cold": 45, "warm": 10, "programs": 8}
COMPILE = "/jax/core/compile/backend_compile_duration"


def watch(out: str) -> None:
  """A run of r2m_jax.main with its command line; writes [event, start, end, program] of all events
  that JAX reports.
  """
  import jax.monitoring

  from r2m_jax import main

  spans = []
  jax.monitoring.register_event_time_span_listener(
    lambda event, start, end, fun_name="", **_: spans.append((event, start, end, str(fun_name)))
  )
  try:
    app.run(main.main, flags_parser=main.parse_flags)
  finally:
    pathlib.Path(out).write_text(json.dumps(spans), encoding="utf-8")


def union(spans: list[tuple[float, float]]) -> float:
  """The seconds covered by at least one of the spans."""
  total, until = 0.0, -float("inf")
  for start, end in sorted(spans):
    total += max(0.0, end - max(start, until))
    until = max(until, end)
  return total


def run(folder: pathlib.Path, name: str) -> dict:
  """{"seconds", "by": {event: seconds}, "programs": [[seconds, name]], longest first} of one
  run.
  """
  command = [
    sys.executable,
    "-m",
    "benchmarks.compile",
    f"--config={CONFIG.value}",
    f"--workdir={folder / name}",
    *(f"--config.{setting}" for setting in SHORT),
  ]
  spans = folder / f"{name}.json"
  env = os.environ | {RUN: str(spans), "JAX_COMPILATION_CACHE_DIR": str(folder / "cache")}
  done = subprocess.run(
    command, cwd=machine.ROOT, capture_output=True, text=True, check=False, env=env
  )
  if done.returncode:
    sys.exit(done.stdout + done.stderr)
  seen = json.loads(spans.read_text(encoding="utf-8"))
  found = [span for span in seen if span[0].startswith("/jax/core/compile/")]
  by = {}
  for event in sorted({span[0] for span in found}):
    by[event.split("/")[-1].removesuffix("_duration")] = union(
      [span[1:3] for span in found if span[0] == event]
    )
  programs = sorted(
    ([end - start, program] for event, start, end, program in found if event == COMPILE),
    reverse=True,
  )
  return {"seconds": union([span[1:3] for span in found]), "by": by, "programs": programs}


def main(_):
  before = machine.Ticks.now()
  with tempfile.TemporaryDirectory() as folder:
    found = {name: run(pathlib.Path(folder), name) for name in ("cold", "warm")}
  busy = machine.others_share(before, machine.Ticks.now(), os.cpu_count() or 1)
  for name, one in found.items():
    parts = ", ".join(f"{event} {seconds:.1f}" for event, seconds in one["by"].items())
    print(f"{name}: {one['seconds']:.1f} s in {len(one['programs'])} programs ({parts})")
  long = [program for program in found["cold"]["programs"] if program[0] > LONG]
  print(f"{'seconds':>8}  program, compiled")
  for seconds, program in long:
    print(f"{seconds:8.2f}  {program}")
  values = {
    "cold": found["cold"]["seconds"],
    "warm": found["warm"]["seconds"],
    "programs": len(long),
  }
  sentences = {
    "cold": "{:.1f} s of compiling with an empty cache, target at most {}",
    "warm": "{:.1f} s with a warm one, target at most {}",
    "programs": f"{{:.0f}} programs take over {LONG} s, target at most {{}}",
  }
  result = {
    "benchmark": "compile",
    **values,
    "busy": busy,
    "by": {name: one["by"] for name, one in found.items()},
    "longest": long,
  }
  bounds = [
    (text.format(values[name], BOUNDS[name]), values[name] <= BOUNDS[name])
    for name, text in sentences.items()
  ]
  machine.conclude(result, bounds, busy <= machine.QUIET)


if __name__ == "__main__":
  watch(os.environ[RUN]) if RUN in os.environ else app.run(main)
