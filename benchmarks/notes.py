"""Prints the results so far of a run of configs/smollm2_notes.py, finished or not: a line for each
arm, and paired differences.

  python -m benchmarks.notes WORKDIR [--steps=N] [--read=ARM/SEED/STEP]

All arms are compared at equal steps: the first N steps, by default the number of steps of the
longest run. Runs with fewer steps are left out. If finished runs have arms whose KL is held, the
registered contrasts follow. --read prints all samples of one step with their gold, used and frozen
rewards.
"""

import argparse
import csv
import io
from pathlib import Path

import numpy as np

from r2m_jax.configs import smollm2_notes
from r2m_jax.lab import contrasts
from r2m_jax.lab.notes import COLUMNS, SAMPLES, steps_csv
from r2m_jax.lab.realtext import run_of
from r2m_jax.lab.table import read_arms
from r2m_jax.report import intervals
from r2m_jax.run.files import read_jsonl

SHOWN = ("gold", "frozen", "used", "kl", "length", "cut_off", "coverage", "invented", "marks")
# comparisons: the first arm minus the second; NAME.kl2 is compared with NAME.kl2
PAIRS = (
  ("r2m", "scaled"),
  ("r2m", "shuffled"),
  ("r2m", "vanilla"),
  ("scaled", "vanilla"),
  ("shuffled", "scaled"),
)

Runs = dict[str, dict[int, dict[str, np.ndarray]]]  # arm -> seed -> column of steps.csv -> f64[T]


def runs_of(workdir: Path) -> Runs:
  """All runs with at least one step."""
  found: dict = {}
  for row in csv.DictReader(io.StringIO(steps_csv(workdir))):
    columns = found.setdefault(row["arm"], {}).setdefault(int(row["seed"]), {})
    for name in COLUMNS:
      columns.setdefault(name, []).append(float(row[name]) if row[name] else np.nan)
  return {
    arm: {
      seed: {name: np.array(values) for name, values in columns.items()}
      for seed, columns in seeds.items()
    }
    for arm, seeds in found.items()
  }


def at_least(runs: Runs, steps: int) -> Runs:
  """The runs with at least this many steps."""
  found = {
    arm: {seed: one for seed, one in seeds.items() if len(one["gold"]) >= steps}
    for arm, seeds in runs.items()
  }
  return {arm: seeds for arm, seeds in found.items() if seeds}


def window(steps: int) -> int:
  """The number of steps over which a value is averaged."""
  return max(1, steps // 8)


def start_peak_end(values: np.ndarray) -> tuple[float, float, float]:
  """Means over a window: the first, the highest and the last."""
  width = window(len(values))
  means = np.convolve(values, np.ones(width) / width, "valid")
  return means[0], means.max(), means[-1]


def arm_lines(runs: Runs, steps: int) -> list[str]:
  """A line for each arm: means over its seeds."""
  head = f"{'arm':<18} n  {'gold start':>10} {'peak':>6} {'end':>6}   at the end: "
  lines = [head + " ".join(f"{name:>9}" for name in SHOWN[1:])]
  for arm, seeds in runs.items():
    gold = np.mean([start_peak_end(one["gold"][:steps]) for one in seeds.values()], 0)
    ends = [
      np.mean([start_peak_end(one[name][:steps])[2] for one in seeds.values()])
      for name in SHOWN[1:]
    ]
    cells = " ".join(f"{value:9.2f}" for value in ends)
    lines.append(
      f"{arm:<18} {len(seeds)}  {gold[0]:10.2f} {gold[1]:6.2f} {gold[2]:6.2f}{'':15}" + cells
    )
  return lines


def pairs_of(arms) -> list[tuple[str, str]]:
  """`PAIRS` of the plain arms, then of the arms with each name after a dot."""
  endings = dict.fromkeys("".join(arm.partition(".")[1:]) for arm in arms)
  return [(first + end, second + end) for end in endings for first, second in PAIRS]


def difference_lines(runs: Runs, steps: int) -> list[str]:
  """Paired differences by seed, with 95% intervals from two seeds on."""
  lines = [f"{'gold':<22} {'at the end':>26} {'mean of all steps':>26}"]
  for first, second in pairs_of(runs):
    both = sorted(set(runs.get(first, {})) & set(runs.get(second, {})))
    if not both:
      continue
    cells = []
    for measure in (lambda x: start_peak_end(x)[2], np.mean):
      values = [
        np.array([measure(runs[arm][seed]["gold"][:steps]) for seed in both])
        for arm in (first, second)
      ]
      found = intervals.paired(*values)
      cells.append(f"{found.value:6.2f} [{found.low:6.2f}, {found.high:6.2f}]")
    lines.append(f"{first + ' - ' + second:<22} " + " ".join(f"{cell:>26}" for cell in cells))
  return lines


def held_text(workdir: Path) -> str:
  """The registered contrasts of the finished arms whose KL is held; "" without any."""
  curves = read_arms(workdir, ())
  options = "gpu,held" if any(name.endswith(".kl4") for name in curves) else "held"
  return contrasts.text(smollm2_notes.get_config(options), curves)


def read_step(workdir: Path, where: str) -> str:
  """The samples of "ARM/SEED/STEP"."""
  arm, seed, step = where.split("/")
  path = run_of(workdir, arm, int(seed)) / SAMPLES / f"step_{int(step):04d}.jsonl"
  lines, prompt = [], None
  for row in read_jsonl(path):
    if row["prompt"] != prompt:
      prompt = row["prompt"]
      lines.append(f"\n{prompt}")
    cut = " [cut off]" if row["truncated"] else ""
    scores = " ".join(f"{name} {row[name]:5.2f}" for name in ("gold", "frozen", "used"))
    lines.append(f"  {scores}  {row['response']!r}{cut}")
  return "\n".join(lines)


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
  parser.add_argument("workdir", type=Path)
  parser.add_argument("--steps", type=int, default=0)
  parser.add_argument("--read", default="", metavar="ARM/SEED/STEP")
  given = parser.parse_args()
  if given.read:
    print(read_step(given.workdir, given.read))
    return
  runs = runs_of(given.workdir)
  if not runs:
    parser.error(f"{given.workdir} has no step of RL yet")
  have = {len(one["gold"]) for seeds in runs.values() for one in seeds.values()}
  steps = given.steps or max(have)
  print(
    f"the first {steps} steps of every run that has them; runs have {min(have)} to {max(have)}\n"
  )
  long = at_least(runs, steps)
  print("\n".join(arm_lines(long, steps)), end="\n\n")
  print("\n".join(difference_lines(long, steps)))
  if held := held_text(given.workdir):
    print("\n" + held)


if __name__ == "__main__":
  main()
