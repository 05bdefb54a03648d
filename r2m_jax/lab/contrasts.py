"""The contrasts of config.lab.contrasts, from the curves of arms with a held KL: tables for the
report, lines for the terminal.

A seed's value is its mean gold over the last config.lab.tail steps, each of which has fresh
prompts, minus the slope of gold times the remaining KL - target. All contrasts use the seeds that
all of their arms have. An arm is accepted if its mean KL over these steps is within `ACCEPTED` of
its target. docs/lab.md registers the rules.
"""

from typing import NamedTuple

import numpy as np

from r2m_jax.config import arms_of
from r2m_jax.lab import inference
from r2m_jax.lab.inference import Contrast
from r2m_jax.lab.table import Curves
from r2m_jax.report import intervals
from r2m_jax.report.summary import number

ACCEPTED = 0.1  # largest |KL / target - 1| of an arm that is compared
NOT_HELD = "KL not held"  # instead of a decision


class HeldArm(NamedTuple):
  """An arm whose KL is held; f64[S] over its seeds."""

  target: float  # nats per sequence
  seeds: list[int]
  gold: np.ndarray  # mean of the last steps
  kl: np.ndarray
  start: np.ndarray  # gold, mean of the first tenth of the steps

  @property
  def off(self) -> float:
    """KL / target - 1, of the mean KL over seeds."""
    return float(self.kl.mean() / self.target - 1)

  @property
  def collapsed(self) -> float:
    """Share of the seeds whose gold ends below its start."""
    return float((self.gold < self.start).mean())


class Row(NamedTuple):
  """A contrast of two arms, `left` - `right`."""

  left: str
  right: str
  found: Contrast  # of the values adjusted for the KL
  raw: float  # mean difference without the adjustment
  p_holm: float
  decision: str


def held_arms(config, curves: dict[str, dict[float, Curves]]) -> dict[str, HeldArm]:
  """The arms of the config with kl.controller "held" that have rows, at their own KL weight."""
  found, tail = {}, config.lab.tail
  for name, arm in arms_of(config).items():
    if arm.kl.controller == "held" and 1.0 in curves.get(name, {}):
      mine = curves[name][1.0]
      gold, kl = mine.metrics["reward/gold"], mine.metrics["kl"]
      first = max(1, gold.shape[1] // 10)
      ends = (x[:, -tail:].mean(1) for x in (gold, kl))
      found[name] = HeldArm(arm.kl.target, mine.seeds, *ends, gold[:, :first].mean(1))
  return found


def with_common_seeds(pairs, arms: dict[str, HeldArm]) -> dict[str, HeldArm]:
  """The arms of the contrasts that have rows, each with their common seeds."""
  names = [name for name in dict.fromkeys(name for pair in pairs for name in pair) if name in arms]
  if not names:
    return {}
  seeds = sorted(set.intersection(*(set(arms[name].seeds) for name in names)))
  found = {}
  for name in names:
    arm = arms[name]
    place = [arm.seeds.index(seed) for seed in seeds]
    found[name] = HeldArm(arm.target, seeds, arm.gold[place], arm.kl[place], arm.start[place])
  return found


def contrasts(config, arms: dict[str, HeldArm]) -> list[Row]:
  """Every contrast of the config, in order; a contrast without two held arms has NaN and n = 0."""
  pairs = [tuple(text.split(" - ")) for text in config.lab.contrasts]
  arms = with_common_seeds(pairs, arms)
  slopes = slopes_of(arms)
  found = [difference(*pair, arms, slopes, config.lab.margin) for pair in pairs]
  adjusted = inference.holm([one.p_difference for one, _ in found])
  rows = []
  for pair, (one, raw), p in zip(pairs, found, adjusted):
    missing = [name for name in pair if name not in arms]
    held = not missing and all(abs(arms[name].off) < ACCEPTED for name in pair)
    decision = inference.decide(one, p) if held else "not run" if missing else NOT_HELD
    rows.append(Row(*pair, one, raw, float(p), decision))
  return rows


def slopes_of(arms: dict[str, HeldArm]) -> dict[float, float]:
  """{target: gold per nat}, each over the arms at that target, which have the same seeds."""
  slopes = {}
  for target in dict.fromkeys(arm.target for arm in arms.values()):
    mine = [arm for arm in arms.values() if arm.target == target]
    gold, kl = np.stack([arm.gold for arm in mine]), np.stack([arm.kl for arm in mine])
    slopes[target] = inference.residual_slope(gold, kl - target)
  return slopes


def difference(left: str, right: str, arms, slopes, margin: float) -> tuple[Contrast, float]:
  """(tests of the adjusted difference, the unadjusted mean difference) of two arms with the same
  seeds.
  """
  if left not in arms or right not in arms:
    return inference.contrast([], margin), np.nan
  a, b = arms[left], arms[right]
  raw = a.gold - b.gold
  moved = slopes[a.target] * (a.kl - a.target) - slopes[b.target] * (b.kl - b.target)
  return inference.contrast(raw - moved, margin), float(raw.mean()) if len(raw) else np.nan


# ---- display ----

CONTRAST_HEAD = ("contrast", "n", "difference", "95%", "90%", "not adjusted", "p, Holm")
CONTRAST_HEAD = (*CONTRAST_HEAD, "p, equivalence", "decision")
ARM_HEAD = ("arm", "n", "target", "KL", "KL/target - 1", "accepted", "gold", "median", "collapsed")


def contrast_cells(row: Row) -> list[str]:
  """The cells of a contrast, under `CONTRAST_HEAD`."""
  one = row.found
  return [
    f"{row.left} - {row.right}",
    str(one.count),
    number(one.value, 3),
    f"[{number(one.low, 3)}, {number(one.high, 3)}]",
    f"[{number(one.inner_low, 3)}, {number(one.inner_high, 3)}]",
    number(row.raw, 3),
    number(row.p_holm, 4),
    number(one.p_equivalence, 4),
    row.decision,
  ]


def arm_cells(name: str, arm: HeldArm) -> list[str]:
  """The cells of an arm, under `ARM_HEAD`."""
  gold = intervals.interval(arm.gold)
  return [
    name,
    str(len(arm.seeds)),
    f"{arm.target:g}",
    number(arm.kl.mean(), 2),
    f"{arm.off:+.3f}",
    "yes" if abs(arm.off) < ACCEPTED else "no",
    f"{number(gold.value, 3)} [{number(gold.low, 3)}, {number(gold.high, 3)}]",
    number(float(np.median(arm.gold)), 3),
    f"{arm.collapsed:.0%}",
  ]


def tables(config, curves: dict[str, dict[float, Curves]]) -> list[dict]:
  """Sections for `page.table_section`; [] without contrasts or an arm with a held KL."""
  arms = held_arms(config, curves)
  if not arms or not config.lab.contrasts:
    return []
  margin, tail = config.lab.margin, config.lab.tail
  about = (
    f"Mean gold of the last {tail} steps, adjusted for what is left of KL - target. Equivalent: "
    f"two one-sided tests at 5% place the difference within {margin:g}. Superior, inferior: "
    "Holm's p over all contrasts is below 5%."
  )
  of_arms = (
    "Of the last steps. A seed has collapsed if its gold ends below its mean over the first tenth."
  )
  rows = [contrast_cells(row) for row in contrasts(config, arms)]
  shown = [arm_cells(name, arm) for name, arm in arms.items()]
  return [
    {"title": "Registered contrasts", "head": list(CONTRAST_HEAD), "rows": rows, "note": about},
    {"title": "Arms whose KL is held", "head": list(ARM_HEAD), "rows": shown, "note": of_arms},
  ]


def text(config, curves: dict[str, dict[float, Curves]]) -> str:
  """The same tables as aligned columns; "" if there are none."""
  return "\n\n".join(aligned(**section) for section in tables(config, curves))


def aligned(title: str, head: list[str], rows: list[list[str]], note: str) -> str:
  """A section as lines of a terminal."""
  cells = [head, *rows]
  widths = [max(map(len, column)) for column in zip(*cells)]
  lines = ["  ".join(map(str.ljust, row, widths)).rstrip() for row in cells]
  return "\n".join([title, *lines, note])
