"""Does the alarm "proxy up, gold down" distinguish runs that over-optimise from runs that do not?

  python -m benchmarks.alarm [--workdir=/tmp/alarm] [--seeds=10] [--kl=2]

The laboratory trains `vanilla` on the gold-reward task, all seeds in one program; the same command
with the same workdir resumes. Each run is then read twice: to its end, at which the proxy is
over-optimised, and to its first step whose KL is at least --kl, at which an early stop would have
ended it. The samples of every --every-th step serve as an evaluation. They are at least as many
responses as in the default evaluation, but to different prompts each time, so they are noisier than
a real evaluation.

True positive: an alarm before the end of a run that is over-optimised by the same rule on all of
its steps. False positive: an alarm before the early stop.
"""

import json
from pathlib import Path

import numpy as np
from absl import app, flags

from configs import lab
from r2m_jax.lab import grid
from r2m_jax.lab.table import read_table
from r2m_jax.report.summary import MIN_ROWS, first_alarm, over_optimised, rise_and_fall

WORKDIR = flags.DEFINE_string("workdir", "/tmp/alarm", "Of the laboratory")
SEEDS = flags.DEFINE_integer("seeds", 10, "How many", 2)
KL = flags.DEFINE_float("kl", 2.0, "KL at which the second reading stops, nats per sequence")
EVERY = flags.DEFINE_multi_integer("every", [1, 2, 4, 10], "Steps between two evaluations")


def curves(workdir: Path, seeds: int) -> dict[str, np.ndarray]:
  """gold, frozen and kl of `vanilla`, f64[seeds, steps] each; trained if they do not exist."""
  path = workdir / "table" / "vanilla.parquet"
  if not path.exists():
    config = lab.get_config()
    config.lab.arms, config.lab.seeds = ("vanilla",), tuple(range(seeds))
    config.lab.best_prompts, config.lab.best_samples = 16, 32  # they are not needed here
    workdir.mkdir(parents=True, exist_ok=True)
    grid.run(config, workdir)
  columns, _ = read_table(path)
  order = np.lexsort((columns["step"], columns["seed"]))
  names = {"gold": "reward/gold", "frozen": "reward/frozen", "kl": "kl"}
  return {
    name: np.asarray(columns[column], float)[order].reshape(seeds, -1)
    for name, column in names.items()
  }


def evaluated(found: dict[str, np.ndarray], seed: int, every: int, end: int) -> list[dict]:
  """The evaluations of a run up to step `end`, as rows for `first_alarm`."""
  return [
    {"step": step, "gold": found["gold"][seed, step], "frozen": found["frozen"][seed, step]}
    for step in range(0, end, every)
  ]


def stop_of(kl: np.ndarray, limit: float) -> int:
  """The number of steps of a run with an early stop at this KL: it ends after the first step that
  reaches it.
  """
  reached = np.flatnonzero(kl >= limit)
  return int(reached[0]) + 1 if len(reached) else len(kl)


def main(_):
  found = curves(Path(WORKDIR.value), SEEDS.value)
  count, steps = found["gold"].shape
  axis = np.arange(steps, dtype=float)
  truly = [
    over_optimised(rise_and_fall((axis, gold), (axis, frozen)))
    for gold, frozen in zip(found["gold"], found["frozen"])
  ]
  stops = [stop_of(kl, KL.value) for kl in found["kl"]]
  print(
    f"vanilla, {count} seeds, {steps} steps: {sum(truly)} runs are over-optimised by all of their "
    f"steps; KL {KL.value:g} is reached after {min(stops)} to {max(stops)} steps"
  )
  results = {}
  for every in EVERY.value:
    ends = [first_alarm(evaluated(found, seed, every, steps)) for seed in range(count)]
    early = [first_alarm(evaluated(found, seed, every, stops[seed])) for seed in range(count)]
    right = sum(bool(raised) for raised, true in zip(ends, truly) if true)
    false = sum(map(bool, early))
    enough = sum(len(range(0, stop, every)) >= MIN_ROWS for stop in stops)
    raised = [alarm[0] for alarm, true in zip(ends, truly) if alarm and true]
    median = f"{np.median(raised):.0f}" if raised else "–"
    print(
      f"every {every:2d} steps: true positives {right} of {sum(truly)}, raised at step {median} "
      f"(median); false positives {false} of {count}, of which {enough} have the {MIN_ROWS} "
      "evaluations that an alarm needs"
    )
    results[every] = {"true_positives": right, "false_positives": false, "with_enough": enough}
  print(json.dumps({"runs": count, "over_optimised": sum(truly), "every": results}))


if __name__ == "__main__":
  app.run(main)
