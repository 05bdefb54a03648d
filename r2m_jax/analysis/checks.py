"""Manipulation checks: whether a run can be evidence for or against the method.

A reward that reads the policy (arXiv 2601.22664, eqs. 3 and 4) can be tested only if its attention
carries part of the reward, if training moves it about as far as in the paper, and if hidden states
have the properties from which the paper starts. Definitions: docs/analyse.md. Plain NumPy: no
files, no JAX.
"""

from typing import NamedTuple

import numpy as np

from r2m_jax.analysis.evidence import Row
from r2m_jax.analysis.probes import correlation, orders, pairs_of_prompts
from r2m_jax.report.intervals import Interval, by_group, estimate, group_mean

# the paper's premise holds in a run if one of its two properties reaches this
LEAST_CORRELATION = (
  0.3  # |correlation| of similarity and difference of reward (fig. 2; paper: 0.68)
)
LEAST_GAP = 0.1  # similarity among hacking and sound responses minus across (table 5; paper: 0.26)
INERT = 0.01  # share of the reward's variance below which the attention does nothing
LOGGED = (  # (metric, its meaning) of a step, logged by every run of the gold-reward task
  ("reward/growth", "deviation, used / frozen"),
  ("reward/frozen_corr", "correlation of used and frozen"),
  ("r2m/pair_disagreement", "self-labels against gold"),
  ("r2m/frozen_disagreement", "the same pairs by the frozen reward"),
)
SHARE = "attention's share of the variance"
ONE_TOKEN = 0.5  # mean weight on one state above which the attention reads almost only this state


class Attended(NamedTuple):
  """Attention of each response over the states that its reward reads; row p * K + k is response k
  to prompt p.
  """

  weights: np.ndarray  # f64[N, S], mean over heads; 0 on padding
  mask: np.ndarray  # bool[N, S], True on real tokens
  template: np.ndarray  # bool[N, S], True on tokens of the template: special tokens, roles


class Scored(NamedTuple):
  """Rewards of the same responses, f64[N] each."""

  used: np.ndarray
  own: np.ndarray  # the part without attention: omega * (the score at omega = 1)
  frozen: np.ndarray


class Seen(NamedTuple):
  """One reward model's results for responses; row p * K + k is response k to prompt p."""

  scored: Scored
  gold: np.ndarray  # f64[N], or 1 for the better reply of a pair and 0 for the worse
  attended: Attended | None  # None: it reads no states of the policy


class Checked(NamedTuple):
  """One arm before RL, reading the initial policy, and at its end."""

  arm: str
  prompt: np.ndarray  # i64[N] from 0, of both
  before: Seen
  after: Seen
  # of attention and phi by name, before and after
  weights: tuple[dict[str, np.ndarray], dict[str, np.ndarray]]
  # step -> `self_labels` for samples of that step's policy; {}: none
  labels: dict[int, tuple[Interval, ...]] = {}


def products(x: np.ndarray, y: np.ndarray, prompt: np.ndarray) -> np.ndarray:
  """Sum over each prompt's responses of (x - mean x)(y - mean y).   f64[N] each -> f64[P]."""
  n, sx, sy, sxy = by_group(prompt, np.stack([np.ones(len(x)), x, y, x * y], -1)).T
  return sxy - sx * sy / n


def attention_share(scored: Scored, prompt: np.ndarray) -> Interval:
  """Share of the used reward's variance within prompts that comes from the attention.

  With r = a + e and a the attention's part: cov(a, r) / var(r). The shares of a and of e add up to
  one.
  """
  part = scored.used - scored.own
  sums = products(part, scored.used, prompt), products(scored.used, scored.used, prompt)
  return estimate(lambda a, r: a / np.where(r > 0, r, np.nan), *sums)


def growth(scored: Scored, prompt: np.ndarray) -> Interval:
  """Standard deviation of the used reward within prompts, divided by the frozen reward's."""
  sums = (products(x, x, prompt) for x in (scored.used, scored.frozen))
  return estimate(lambda u, f: np.sqrt(u / np.where(f > 0, f, np.nan)), *sums)


def attention_rows(name: str, found: Attended, prompt: np.ndarray) -> list[Row]:
  """What the attention reads, averaged over responses."""
  weights, count = found.weights, found.mask.sum(1)
  entropy = -(weights * np.log(np.where(weights > 0, weights, 1))).sum(1)
  first = found.mask.argmax(1)
  measures = {
    "states that it can read": count,
    "states that it reads (exp of the entropy)": np.exp(entropy),
    "largest weight": weights.max(1),
    "weight of the first token": weights[np.arange(len(weights)), first],
    "weight of the template's tokens": np.where(found.template, weights, 0).sum(1),
    "share of the template's tokens": (found.template & found.mask).sum(1) / count,
  }
  return [Row((what,), name, group_mean(x, prompt)) for what, x in measures.items()]


def percent(found: Interval) -> Interval:
  return Interval(*(100 * x for x in found[:3]), found.count)


def self_labels(
  scored: Scored, gold: np.ndarray, prompt: np.ndarray
) -> tuple[Interval, Interval, Interval]:
  """For the pairs that the reward labels itself (each prompt's best and worst response by the used
  reward): the percentage that gold confirms, the percentage that the frozen reward orders as gold
  does, and the difference.
  """
  rows = [np.flatnonzero(prompt == p) for p in range(prompt.max() + 1)]
  i = np.array([own[scored.used[own].argmax()] for own in rows])
  j = np.array([own[scored.used[own].argmin()] for own in rows])
  gap = gold[i] - gold[j]
  used, frozen = (orders(x, i, j, gap) for x in (scored.used, scored.frozen))
  group = np.arange(len(rows))
  found = (group_mean(x, group, gap != 0) for x in (used, frozen, used - frozen))
  return tuple(map(percent, found))  # type: ignore[return-value]


def dose(first: dict[str, np.ndarray], last: dict[str, np.ndarray]) -> dict[str, float]:
  """|W - W_0| / |W_0| of each weight, by name."""
  return {
    name: float(np.linalg.norm(last[name] - x) / np.linalg.norm(x))
    for name, x in first.items()
    if np.linalg.norm(x) > 0
  }


def dose_rows(name: str, first: dict[str, np.ndarray], last: dict[str, np.ndarray]) -> list[Row]:
  """`dose` in percent."""
  return [
    Row((f"change of {weight}, %",), name, Interval(100 * x, np.nan, np.nan, 1))
    for weight, x in dose(first, last).items()
  ]


def scale_rows(name: str, scored: Scored, prompt: np.ndarray) -> list[Row]:
  """How far the used reward has moved from the frozen one, on the same responses."""
  together = correlation(scored.used, scored.frozen, prompt, within=True)
  return [
    Row(("deviation, used / frozen",), name, growth(scored, prompt)),
    Row(("correlation of used and frozen",), name, together),
  ]


def accuracy_gap(seen: Seen, prompt: np.ndarray) -> Interval:
  """Accuracy of the used reward minus the frozen reward's, in points, on pairs of responses to one
  prompt.
  """
  pairs = pairs_of_prompts(np.ones((len(prompt), 1)), prompt)
  gap = seen.gold[pairs.i] - seen.gold[pairs.j]
  used, frozen = (orders(x, pairs.i, pairs.j, gap) for x in (seen.scored.used, seen.scored.frozen))
  return percent(group_mean(used - frozen, pairs.prompt, gap != 0))


def label_rows(name: str, labels: dict[int, tuple[Interval, ...]]) -> list[Row]:
  """`self_labels` by step, in percent."""
  measures = "self-labels right", "frozen reward right on them", "the difference"
  return [
    Row((f"{measure}, step {step}, %",), name, found)
    for step, each in labels.items()
    for measure, found in zip(measures, each)
  ]


def rows_of(checked: list[Checked]) -> list[Row]:
  """Every number: labels are (check,), the measure is the arm before or after RL."""
  rows = []
  for one in checked:
    for when, seen in (("before", one.before), ("after", one.after)):
      name = f"{one.arm}, {when}"
      if seen.attended is not None:
        share = attention_share(seen.scored, one.prompt)
        rows.append(Row((SHARE,), name, share))
      rows.append(Row(("accuracy minus frozen, points",), name, accuracy_gap(seen, one.prompt)))
      rows += scale_rows(name, seen.scored, one.prompt)
      if seen.attended is not None:
        rows += attention_rows(name, seen.attended, one.prompt)
    rows += dose_rows(f"{one.arm}, after", *one.weights)
    rows += label_rows(f"{one.arm}, after", one.labels)
  return rows


# ---- sentences ----


def premise(correlations: list[float], gaps: list[float]) -> str:
  """Whether the states have the properties from which the paper starts.

  Args:
    correlations: of similarity and difference of reward, fig. 2.
    gaps: similarity within the labels of table 5 minus across; NaN if unknown.
  """
  known = [abs(x) for x in correlations if np.isfinite(x)]
  most, gap = max(known, default=np.nan), max([x for x in gaps if np.isfinite(x)], default=np.nan)
  holds = most >= LEAST_CORRELATION or gap >= LEAST_GAP
  figures = f"|correlation| of fig. 2 at most {most:.2f} (the paper: 0.68)"
  if np.isfinite(gap):
    figures += f", gap of table 5 at most {gap:.2f} (the paper: 0.26)"
  if holds:
    return f"The paper's premise holds here: {figures}."
  return (
    f"The paper's premise does not hold here: {figures}; it would be {LEAST_CORRELATION} or "
    f"{LEAST_GAP}. The run is little evidence about cases in which it holds."
  )


def words(rows: list[Row]) -> list[str]:
  """A sentence on each remarkable number; empty if there is none."""
  by = {(row.labels[0], row.measure): row.found.value for row in rows}
  found = []
  for name in dict.fromkeys(row.measure for row in rows):
    largest = by.get(("largest weight", name), np.nan)
    if largest > ONE_TOKEN:
      first = by["weight of the first token", name]
      template = by["weight of the template's tokens", name]
      found.append(
        f"{name}: one state has {largest:.0%} of the attention (the first token {first:.0%}, the "
        f"template {template:.0%}). The reward reads almost only this state."
      )
    share = by.get((SHARE, name), np.nan)
    if abs(share) < INERT:
      found.append(
        f"{name}: the attention gives {share:.1%} of the reward's variance within a prompt. It "
        "does nothing yet: the reward is the frozen one, scaled."
      )
  return found
