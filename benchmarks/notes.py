"""Prints the results so far of a run of configs/smollm2_notes.py, finished or not: a line for each
arm, paired differences, how often the reward orders samples as gold does, gold on held-out prompts.

  python -m benchmarks.notes WORKDIR [WORKDIR ...] [--steps=N] [--read=ARM/SEED/STEP] [--keep=NAME]
  python -m benchmarks.notes docs/lab_notes          # the kept rows of docs/notes.md

Arms are compared at equal steps: the first N steps of every run that has them. By default N is that
of the longest run whose arm has the same ending, such as .kl2. If there are runs whose KL is held,
the registered contrasts follow. --read prints all samples of one step with their gold, used and frozen rewards.
--keep writes NAME.csv and NAME.parquet, which this command reads like a workdir.
"""

import argparse
from pathlib import Path
from typing import NamedTuple

import numpy as np

from benchmarks import notes_rows
from benchmarks.notes_rows import HELD_OUT, SFT, Rows, Runs
from r2m_jax.analysis.probes import orders, pairs_of_prompts
from r2m_jax.configs import smollm2_notes
from r2m_jax.lab import contrasts
from r2m_jax.lab.notes import SAMPLES
from r2m_jax.lab.realtext import run_of
from r2m_jax.report import intervals
from r2m_jax.report.intervals import Interval
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
QUARTERS = 4
KLS = (0.0, 1.0, 2.0, 4.0, np.inf)  # nats; accuracy is shown between each two


def ending(arm: str) -> str:
  """What follows the first dot of an arm's name, with the dot: "" or one such as ".kl2"."""
  return "".join(arm.partition(".")[1:])


def at_equal_steps(runs: Runs, steps: int = 0) -> Runs:
  """The first steps of every run that has as many as the longest run of an arm with its ending.

  Args:
    steps: take this number instead.
  """
  longest: dict[str, int] = {}
  for arm, seeds in runs.items():
    most = max(len(one["gold"]) for one in seeds.values())
    longest[ending(arm)] = steps or max(longest.get(ending(arm), 0), most)
  cut = {}
  for arm, seeds in runs.items():
    count = longest[ending(arm)]
    cut[arm] = {
      seed: {name: values[:count] for name, values in one.items()}
      for seed, one in seeds.items()
      if len(one["gold"]) >= count
    }
  return {arm: seeds for arm, seeds in cut.items() if seeds}


def steps_of(seeds) -> int:
  """The number of steps of an arm's runs, which is the same for all."""
  return len(next(iter(seeds.values()))["gold"])


def window(steps: int) -> int:
  """The number of steps over which a value is averaged."""
  return max(1, steps // 8)


def start_peak_end(values: np.ndarray) -> tuple[float, float, float]:
  """Means over a window: the first, the highest and the last."""
  width = window(len(values))
  means = np.convolve(values, np.ones(width) / width, "valid")
  return means[0], means.max(), means[-1]


def arm_lines(runs: Runs) -> list[str]:
  """A line for each arm: means over its seeds."""
  head = f"{'arm':<18} n  steps {'gold start':>10} {'peak':>6} {'end':>6}   at the end: "
  lines = [head + " ".join(f"{name:>9}" for name in SHOWN[1:])]
  for arm, seeds in runs.items():
    gold = np.mean([start_peak_end(one["gold"]) for one in seeds.values()], 0)
    ends = [np.mean([start_peak_end(one[name])[2] for one in seeds.values()]) for name in SHOWN[1:]]
    cells = " ".join(f"{value:9.2f}" for value in ends)
    lines.append(
      f"{arm:<18} {len(seeds)}  {steps_of(seeds):5d} {gold[0]:10.2f} {gold[1]:6.2f} {gold[2]:6.2f}{'':15}"
      + cells
    )
  return lines


def pairs_of(arms) -> list[tuple[str, str]]:
  """`PAIRS` of the plain arms, then of the arms with each name after a dot."""
  endings = dict.fromkeys(map(ending, arms))
  return [(first + end, second + end) for end in endings for first, second in PAIRS]


def difference_lines(runs: Runs) -> list[str]:
  """Paired differences by seed, with 95% intervals from two seeds on."""
  lines = [f"{'gold':<22} {'at the end':>26} {'mean of all steps':>26}"]
  for first, second in pairs_of(runs):
    both = sorted(set(runs.get(first, {})) & set(runs.get(second, {})))
    if not both:
      continue
    cells = []
    for measure in (lambda x: start_peak_end(x)[2], np.mean):
      values = [
        np.array([measure(runs[arm][seed]["gold"]) for seed in both]) for arm in (first, second)
      ]
      found = intervals.paired(*values)
      cells.append(f"{found.value:6.2f} [{found.low:6.2f}, {found.high:6.2f}]")
    lines.append(f"{first + ' - ' + second:<22} " + " ".join(f"{cell:>26}" for cell in cells))
  return lines


def shown(found: Interval, scale: float = 1, digits: int = 2) -> str:
  value, low, high = (scale * x for x in found[:3])
  return f"{value:.{digits}f} [{low:.{digits}f}, {high:.{digits}f}]"


def curve_lines(runs: Runs) -> list[str]:
  """Gold and proxy over the run: means of each quarter of the steps, with intervals over seeds."""
  lines = [f"{'over the run':<18} {'steps':<9} {'KL':>6} {'gold':>20} {'frozen proxy':>21}"]
  for arm, seeds in runs.items():
    ends = np.unique(np.linspace(0, steps_of(seeds), QUARTERS + 1).astype(int))
    for low, high in zip(ends, ends[1:]):
      kl, *both = (
        np.array([one[name][low:high].mean() for one in seeds.values()])
        for name in ("kl", "gold", "frozen")
      )
      cells = [shown(intervals.interval(values)) for values in both]
      name = f"{low + 1} to {high}"
      lines.append(f"{arm:<18} {name:<9} {kl.mean():6.2f} {cells[0]:>20} {cells[1]:>21}")
  return lines


class Pairs(NamedTuple):
  """All pairs of samples of one prompt with unequal gold, f64[N] each."""

  kl: np.ndarray  # of their step
  prompt: np.ndarray  # i64[N], its number
  used_right: np.ndarray  # 1 if the used reward orders the pair as gold does, 0.5 on a tie
  frozen_right: np.ndarray
  used: np.ndarray  # difference of the two samples
  frozen: np.ndarray

  def between(self, low: float, high: float) -> "Pairs":
    """Those with a KL in [low, high), their prompts numbered from 0."""
    kept = [x[(self.kl >= low) & (self.kl < high)] for x in self]
    kept[1] = np.unique(kept[1], return_inverse=True)[1].reshape(-1)
    return Pairs(*kept)


def sample_pairs(rows: Rows, arm: str) -> Pairs:
  kl = {(r["seed"], r["step"]): float(r["kl"]) for r in rows.steps if r["arm"] == arm}
  mine = (rows.samples["arm"] == arm) & (rows.samples["step"] != HELD_OUT)
  table = {name: values[mine] for name, values in rows.samples.items()}
  keys = np.stack([table[name] for name in ("seed", "step", "prompt")], -1)
  prompts, prompt = np.unique(keys, axis=0, return_inverse=True)
  prompt = prompt.reshape(-1)
  kls = np.array([kl[str(seed), str(step)] for seed, step, _ in prompts])
  gold, used, frozen = (table[name].astype(float) for name in ("gold", "used", "frozen"))
  i, j = pairs_of_prompts(np.ones((len(prompt), 1)), prompt)[:2]
  i, j = (x[gold[i] != gold[j]] for x in (i, j))
  right = (orders(x, i, j, gold[i] - gold[j]) for x in (used, frozen))
  return Pairs(kls[prompt[i]], prompt[i], *right, used[i] - used[j], frozen[i] - frozen[j])


def growth(pairs: Pairs) -> Interval:
  """The root mean square difference of the used reward in a pair, divided by the frozen one's."""
  squares = np.stack([pairs.used**2, pairs.frozen**2], -1)
  sums = intervals.by_group(pairs.prompt, squares)
  return intervals.estimate(lambda s: np.sqrt(s[:, 0] / s[:, 1]), sums)


def accuracy_lines(rows: Rows, arms) -> list[str]:
  """How often used and frozen reward order two samples of one prompt as gold does, in percent, and
  how much more the used one differs, by the KL of their step. Intervals are over prompts.
  """
  head = f"{'KL':<8} {'pairs':>6} {'used':>14} {'frozen':>14} {'used - frozen':>14} {'growth':>19}"
  lines = [f"{'right, % of pairs':<18} {head}"]
  for arm in arms:
    every = sample_pairs(rows, arm)
    for low, high in zip(KLS, KLS[1:]):
      some = every.between(low, high)
      if not len(some.kl):
        continue
      used, frozen = some.used_right, some.frozen_right
      means = (intervals.group_mean(x, some.prompt) for x in (used, frozen, used - frozen))
      cells = " ".join(f"{shown(x, 100, 0):>14}" for x in means)
      name = f"{low:g} to {high:g}"
      lines.append(f"{arm:<18} {name:<8} {len(some.kl):6d} {cells} {shown(growth(some)):>19}")
  return lines


def held_out_lines(rows: Rows, arms) -> list[str]:
  """Gold on the held-out prompts after RL, and how it differs from the policy before RL. Each
  prompt's value is its mean over the arm's runs. Intervals are over prompts.
  """
  table = rows.samples
  after = table["step"] == HELD_OUT

  def gold(arm):
    mine = after & (table["arm"] == arm)
    seeds = np.unique(table["seed"][mine])
    return len(seeds), [table["gold"][mine & (table["seed"] == seed)] for seed in seeds]

  lines = [f"{'held-out prompts':<18} n {'gold':>20} {'minus before RL':>22}"]
  _, (start,) = gold(SFT)
  for arm in (SFT, *arms):
    count, values = gold(arm)
    if count:
      mean = np.mean(values, 0)
      cells = [shown(intervals.interval(mean))]
      cells += [shown(intervals.paired(mean, start))] if arm != SFT else []
      lines.append(f"{arm:<18} {count} {' '.join(f'{cell:>20}' for cell in cells)}")
  return lines


def held_text(runs: Runs) -> str:
  """The registered contrasts of the arms whose KL is held; "" without any."""
  options = "gpu,held" if any(name.startswith("vanilla.kl") for name in runs) else "held"
  return contrasts.text(smollm2_notes.get_config(options), notes_rows.curves_of(runs))


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


def text(rows: Rows, steps: int = 0) -> str:
  """Everything that is printed for these rows; steps: as in `at_equal_steps`."""
  runs = notes_rows.runs_of(rows)
  long = at_equal_steps(runs, steps)
  parts = [
    arm_lines(long),
    difference_lines(long),
    curve_lines(long),
    accuracy_lines(rows, runs),
    held_out_lines(rows, runs),
    held_text(long).splitlines(),
  ]
  return "\n\n".join("\n".join(part) for part in parts if part)


def parsed() -> argparse.Namespace:
  parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
  parser.add_argument("workdir", type=Path, nargs="+")
  parser.add_argument("--steps", type=int, default=0)
  parser.add_argument("--read", default="", metavar="ARM/SEED/STEP")
  parser.add_argument("--keep", type=Path, metavar="NAME")
  return parser.parse_args()


def main() -> None:
  given = parsed()
  if given.read:
    print(read_step(given.workdir[0], given.read))
    return
  rows = notes_rows.joined([notes_rows.read(path) for path in given.workdir])
  if not rows.steps:
    raise SystemExit(f"{given.workdir[0]} has no step of RL yet")
  if given.keep:
    notes_rows.keep(rows, given.keep)
  print(text(rows, given.steps))


if __name__ == "__main__":
  main()
