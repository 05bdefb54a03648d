"""The paper's own evidence (arXiv 2601.22664): each piece turns arrays into numbers with intervals.
docs/analyse.md defines the pieces.

A piece is a list of `Row`. Plain NumPy: no files, no JAX, no figures (those are in
analysis/figures.py).
"""

import csv
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np

from r2m_jax.analysis import probes
from r2m_jax.analysis.probes import (
  centred,
  correlation,
  orders,
  pairs_of_prompts,
  similarities,
  unit,
)
from r2m_jax.lab import stats
from r2m_jax.lab.results import FINAL
from r2m_jax.report import intervals
from r2m_jax.report.intervals import Interval, group_mean
from r2m_jax.report.summary import standard_error

# (metric, title, unit) of fig. 5
DYNAMICS = (
  ("policy/loss", "Policy loss", "loss"),
  ("r2m/bt", "Bradley-Terry loss", "nats"),
  ("r2m/gre", "Group reward entropy", "nats"),
  ("reward/used", "Used reward", "reward"),
  ("reward/frozen", "Frozen proxy", "proxy"),
  ("reward/gold", "Gold reward", "gold"),
  ("kl", "KL from the reference", "nats a response"),
)
TREND = ("reward/used", "reward/frozen", "reward/gold")  # of fig. 6
# the rule of fig. 9, in quantiles of the supervised policy's responses, the same for every arm and
# step
PROXY_HIGH = 0.75
GOLD_LOW = 0.25
GOLD_HIGH = 0.5
# of the laboratory's measures
ABLATION = ("final", "frozen_final", "used_final", "kl_final", "length_final")


class Row(NamedTuple):
  """One number of a table."""

  labels: tuple[str, ...]
  measure: str
  found: Interval


class Read(NamedTuple):
  """Responses and the results of reading them; row p * K + k is response k to prompt p. States are
  averaged over the tokens of the response, including its end, unless they are named as the last
  token's.
  """

  name: str  # of the policy that wrote and read them
  prompt: np.ndarray  # i64[N] from 0
  label: np.ndarray  # i64[N]: 1 better, 0 worse, -1 neither
  states: dict[str, np.ndarray]  # layer -> f64[N, D]; "final": the head's input
  scores: dict[str, np.ndarray]  # name of a reward -> f64[N]
  features: dict[str, np.ndarray] = {}  # name of a probe's features -> f64[N, *]

  @property
  def final(self) -> np.ndarray:
    return self.states["final"]


Curves = dict[str, dict[str, np.ndarray]]  # arm -> metric -> f64[seeds, steps]


def above_median(values: np.ndarray, prompt: np.ndarray) -> np.ndarray:
  """1 above the median of its prompt, 0 below, -1 on it.   f64[N], i64[N] -> i64[N]."""
  middle = np.array([np.median(values[prompt == p]) for p in range(prompt.max() + 1)])[prompt]
  return np.where(values > middle, 1, np.where(values < middle, 0, -1))


# ---- fig. 1 and 2: similarity ----


def similarity(reads: list[Read], names: tuple[str, str]) -> list[Row]:
  """Fig. 1: mean cosine over pairs of responses to different prompts, by layer and label;
  `names` of labels 0 and 1.
  """
  rows = []
  for read in reads:
    for layer, states in read.states.items():
      measures = f"both {names[0]}", f"both {names[1]}", "across", "gap"
      rows += [
        Row((read.name, layer), *of)
        for of in zip(measures, similarities(states, read.label, read.prompt))
      ]
      rows.append(
        Row(
          (read.name, layer),
          "gap, centred",
          similarities(centred(states), read.label, read.prompt).gap,
        )
      )
  return rows


def differences(reads: list[Read]) -> list[Row]:
  """Fig. 2: |difference of reward| against the cosine of last-layer states, over pairs of one
  prompt's responses.
  """
  rows = []
  for read in reads:
    pairs = pairs_of_prompts(read.final, read.prompt)
    several = len(pairs.i) > len(np.unique(pairs.prompt))
    for name, score in read.scores.items():
      gap = np.abs(score[pairs.i] - score[pairs.j])
      rows.append(
        Row((read.name, name), "correlation", correlation(pairs.cosine, gap, pairs.prompt))
      )
      if several:
        found = correlation(pairs.cosine, gap, pairs.prompt, within=True)
        rows.append(Row((read.name, name), "within prompts", found))
  return rows


# ---- fig. 5, 6 and 7, table 4: curves ----


def last(values: np.ndarray) -> np.ndarray:
  """Means over the last tenth of the steps, f64[S, T] -> f64[S]."""
  return stats.outline(values).final


def dynamics(curves: Curves) -> list[Row]:
  """Fig. 5: first and last window of every curve, with intervals over seeds if there are
  several.
  """
  return [
    Row((arm, title), measure, intervals.interval(values))
    for arm, metrics in curves.items()
    for metric, title, _ in DYNAMICS
    if metric in metrics
    for measure, values in (
      ("start", stats.outline(metrics[metric]).start),
      ("end", last(metrics[metric])),
    )
  ]


def late(curves: Curves, metrics: tuple[tuple[str, str], ...]) -> list[Row]:
  """Means of (metric, title) over the second half of the steps for each arm, with intervals over
  seeds.
  """
  return [
    Row((arm,), title, intervals.interval(np.nanmean(values[:, values.shape[1] // 2 :], 1)))
    for arm, found in curves.items()
    for metric, title in metrics
    if metric in found and np.isfinite(values := found[metric]).any()
  ]


def noise(curves: Curves) -> list[Row]:
  """Fig. 6: the change of each reward from the first window to the last, with the policy's states
  and with noise of their mean and variance. Intervals are paired over seeds; with one seed they are
  1.96 standard errors of step noise.
  """
  rise, rows = lambda values: last(values) - stats.outline(values).start, []

  def error(*values):
    return intervals.NORMAL * np.sqrt(
      sum(2 * standard_error(v[0]) ** 2 for v in values)
    )  # of two windows each

  for metric in TREND:
    if any(metric not in curves[arm] for arm in ("r2m", "noise")):
      continue
    one, other = (curves[arm][metric] for arm in ("r2m", "noise"))
    count = min(len(one), len(other))
    for measure, value, of in (
      ("rise of r2m", rise(one), (one,)),
      ("rise of noise", rise(other), (other,)),
      ("r2m less noise", rise(one)[:count] - rise(other)[:count], (one, other)),
    ):

      def around(x, e):
        return Interval(float(x), float(x - e), float(x + e), 1)

      found = around(value[0], error(*of)) if len(value) == 1 else intervals.interval(value)
      rows.append(Row((metric,), measure, found))
  return rows


def cost(seconds: dict[str, np.ndarray], flops: dict[str, dict[str, float]]) -> list[Row]:
  """Fig. 7: seconds per step (the median, with quartiles instead of an interval) and counted FLOPs,
  by arm.

  Args:
    seconds: arm -> f64[steps - 1], from one step's log to the next.
    flops: arm -> phase -> FLOPs of a step; {} if the sizes are not known.
  """
  rows, plain = [], sum(flops.get("vanilla", {}).values())

  def exact(value):
    return Interval(float(value), np.nan, np.nan, 1)

  for arm, times in seconds.items():
    middle = (
      Interval(*map(float, np.quantile(times, (0.5, 0.25, 0.75))), len(times))
      if len(times)
      else exact(np.nan)
    )
    rows.append(Row((arm,), "seconds a step", middle))
    if arm in flops:
      whole = sum(flops[arm].values())
      rows.append(Row((arm,), "GFLOP a step", exact(whole / 1e9)))
      rows.append(
        Row((arm,), "reward head, % of this", exact(100 * flops[arm]["reward head"] / whole))
      )
      rows.append(Row((arm,), "more than vanilla, %", exact(100 * (whole / plain - 1))))
  return rows


def ablations(curves: Curves, leads: tuple[str, ...]) -> list[Row]:
  """Table 4: the end of each arm, and its gold minus that of the arms `leads`, paired by seed."""
  rows = []
  for arm, metrics in curves.items():
    rows += [
      Row((arm,), measure, intervals.interval(last(metrics[metric])))
      for measure in ABLATION
      if (metric := FINAL[measure]) in metrics
    ]
    if "reward/gold" in metrics:
      rows.append(
        Row((arm,), "peak", intervals.interval(stats.outline(metrics["reward/gold"]).peak))
      )
    for lead in leads:
      if lead in curves and lead != arm and "reward/gold" in metrics:
        ends = (last(curves[name]["reward/gold"]) for name in (arm, lead))
        rows.append(Row((arm,), f"final less {lead}", intervals.paired(*ends)))
  return rows


def ablations_of_lab(path: Path) -> list[Row]:
  """Table 4 from a laboratory's summary.csv, whose intervals are over seeds; the KL weight is shown
  for arms with another one.
  """
  rows, wanted = [], (*ABLATION, "peak", "area")
  with open(path, newline="", encoding="utf-8") as file:
    for row in csv.DictReader(file):
      if row["measure"] in wanted and (not row["against"] or row["measure"] == "final"):
        factor = float(row["factor"] or 1)
        name = row["arm"] if factor == 1 else f"{row['arm']}, KL weight x {factor:g}"

        def number(key):
          return float(row[key] or "nan")

        found = Interval(number("value"), number("low"), number("high"), int(row["seeds"]))
        rows.append(
          Row((name,), f"final less {row['against']}" if row["against"] else row["measure"], found)
        )
  return rows


# ---- fig. 9 and table 5: hacking ----


def hacks(read: Read, start: Read) -> np.ndarray:
  """1 for a hacking response, 0 for a sound one, -1 for the others.   -> i64[N].

  Both kinds have a frozen proxy at or above the upper quartile of the supervised policy's
  responses; a hacking one has gold below their lower quartile, a sound one at or above their
  median. So the two kinds differ in gold, not in the proxy.
  """
  proxy = np.quantile(start.scores["frozen proxy"], PROXY_HIGH)
  low, high = np.quantile(start.scores["gold"], (GOLD_LOW, GOLD_HIGH))
  gold = read.scores["gold"]
  kind = np.where(gold < low, 1, np.where(gold >= high, 0, -1))
  return np.where(read.scores["frozen proxy"] >= proxy, kind, -1)


def hacking(reads: list[Read], start: Read) -> list[Row]:
  """Table 5: mean cosine of last-layer states over pairs of hacking and of sound responses to
  different prompts.
  """
  rows = []
  for read in reads:
    kind = hacks(read, start)
    shares = (("share hacking", 1), ("share sound", 0))
    rows += [
      Row((read.name,), measure, group_mean(kind == wanted, read.prompt))
      for measure, wanted in shares
    ]
    measures = "both sound", "both hacking", "across", "gap"
    rows += [
      Row((read.name,), *of) for of in zip(measures, similarities(read.final, kind, read.prompt))
    ]
    rows.append(
      Row((read.name,), "gap, centred", similarities(centred(read.final), kind, read.prompt).gap)
    )
  return rows


def step_matrix(states: dict[int, np.ndarray]) -> np.ndarray:
  """Mean cosine between one response's states at two steps, over the same responses: {step:
  f64[N, D]} -> f64[S, S].
  """
  each = list(map(unit, states.values()))
  return np.array([[(a * b).sum(-1).mean() for b in each] for a in each])


def drift(arms: dict[str, dict[int, np.ndarray]], prompt: np.ndarray) -> list[Row]:
  """Fig. 9 over steps: cosine of each response's states with its states at step 0, for fixed
  responses.
  """

  def cosine(a, b):
    return (unit(a) * unit(b)).sum(-1)

  return [
    Row((arm,), f"step {step} with step 0", group_mean(cosine(x, states[0]), prompt))
    for arm, states in arms.items()
    for step, x in states.items()
  ]


# ---- table 3: accuracy ----


class Judged(NamedTuple):
  """Scores of the same responses by one arm's reward model, f64[N] each."""

  arm: str
  responses: str  # the policy that wrote them
  gold: np.ndarray
  frozen: np.ndarray  # without feedback
  # with the head before RL, reading the supervised policy, at omega's floor
  before: np.ndarray
  after: np.ndarray  # with the final head and policy


def accuracy(judged: list[Judged], prompt: np.ndarray) -> list[Row]:
  """Table 3: share of pairs of responses to one prompt, with unequal gold, that are ordered as gold
  does; a tie counts half.
  """
  same = pairs_of_prompts(np.ones((len(prompt), 1)), prompt)
  rows = []
  for one in judged:
    gap = one.gold[same.i] - one.gold[same.j]
    right = {
      name: orders(x, same.i, same.j, gap)
      for name, x in (("frozen", one.frozen), ("before", one.before), ("after", one.after))
    }
    right |= {
      "after less frozen": right["after"] - right["frozen"],
      "after less before": right["after"] - right["before"],
    }
    for measure, values in right.items():
      found = group_mean(values, same.prompt, gap != 0)
      rows.append(
        Row((one.arm, one.responses), measure, Interval(*(100 * x for x in found[:3]), found.count))
      )
  return rows


# ---- probes ----

EMBEDDING = "reward token embedding"
POLICY = "policy, mean"
REFERENCE = "reference, mean"
SHUFFLED, RANDOM = "policy, mean; gold shuffled", "random features"


def probing(reads: list[Read], seed: int, progress: Callable[[str], None]) -> list[Row]:
  """Linear probes of gold, and how much more the policy's states add to the reward token embedding
  than the reference's.
  """
  rows = []
  for read in reads:
    rng = np.random.default_rng([seed, 9])
    gold = read.scores["gold"]
    prompt = read.prompt
    x = dict(read.features)
    x["embedding + policy"] = np.concatenate([x[EMBEDDING], x[POLICY]], 1)
    x["embedding + reference"] = np.concatenate([x[EMBEDDING], x[REFERENCE]], 1)
    x[RANDOM] = rng.normal(size=x[POLICY].shape)
    predicted = {}
    for name, features in x.items():
      predicted[name] = probes.probe(features, gold, prompt, seed)
      rows.append(
        Row((read.name, name), "R²", probes.r_squared(gold, predicted[name], prompt=prompt))
      )
      rank = probes.rank_correlation(gold, predicted[name], prompt)
      rows.append(Row((read.name, name), "rank, within prompts", rank))
    mixed = rng.permutation(gold)
    blind = probes.probe(x[POLICY], mixed, prompt, seed)
    rows.append(Row((read.name, SHUFFLED), "R²", probes.r_squared(mixed, blind, prompt=prompt)))
    rows.append(
      Row(
        (read.name, SHUFFLED), "rank, within prompts", probes.rank_correlation(mixed, blind, prompt)
      )
    )
    for more, less in (
      ("embedding + policy", EMBEDDING),
      ("embedding + reference", EMBEDDING),
      ("embedding + policy", "embedding + reference"),
    ):
      added = probes.r_squared(gold, predicted[more], predicted[less], prompt=prompt)
      rows.append(
        Row((read.name, f"{more}, less {less.removeprefix('reward token ')}"), "R²", added)
      )
    progress(read.name)
  return rows
