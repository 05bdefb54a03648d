"""Statistics of verdicts: win rates, the effects of length and position, and the agreement of
judges.

Plain NumPy. Prompts are independent, so every interval is over prompts (report.intervals).
"""

import collections
from collections.abc import Hashable, Iterable, Sequence
from typing import NamedTuple

import numpy as np

from r2m_jax.report.intervals import Interval, by_group, estimate, interval, weights, with_ends

RIDGE = 0.01  # weight of the squared coefficients, which would be infinite for separable data
STEPS = 200  # maximum steps of Newton's method; about ten are needed
BLOCK = 256  # number of bootstrap draws that are fitted at a time
SIMILAR = 1.25  # lengths within this factor of each other count as similar


class Verdict(NamedTuple):
  """A judge's verdict on one pair of answers."""

  item: int  # index of the prompt
  turn: int
  repeat: int
  candidate_first: bool | None  # which answer was shown first; None: the judge saw no order
  preference: float | None  # for the candidate, in [0, 1]; None if the answer was unreadable
  weight: float = 1.0


def usable(verdicts: Sequence[Verdict]) -> list[Verdict]:
  """The readable verdicts, without those whose other order is unreadable.

  A verdict without its partner would count one position more often than the other.
  """
  bad = {(v.item, v.turn, v.repeat) for v in verdicts if v.preference is None}
  return [v for v in verdicts if (v.item, v.turn, v.repeat) not in bad]


def by_prompt(verdicts: Sequence[Verdict], count: int) -> tuple[np.ndarray, np.ndarray]:
  """Weighted preferences and weights, summed over the verdicts of each prompt.   -> f64[P] twice."""
  item = np.array([v.item for v in verdicts], int)
  weight = np.array([v.weight for v in verdicts], float)
  preference = np.array([v.preference for v in verdicts], float)
  sums = np.zeros((count, 2))
  np.add.at(sums, item, np.stack([weight * preference, weight], -1))
  return sums[:, 0], sums[:, 1]


def win_rate(won: np.ndarray, weight: np.ndarray) -> Interval:
  """The mean preference for the candidate, with ties as half, over prompts with a verdict.

  Args:
    won, weight: f64[P], from `by_prompt`.
  """
  judged = weight > 0
  if not judged.any():
    return Interval(np.nan, np.nan, np.nan, 0)
  return estimate(lambda won, weight: won / weight, won[judged], weight[judged])


def outcomes(verdicts: Sequence[Verdict]) -> dict[str, int]:
  """How many comparisons were won, tied and lost, by the rule of MT-bench.

  A comparison is a prompt's turn. It is won or lost if all its verdicts are; otherwise it is a tie.
  """
  found = collections.defaultdict(set)
  for v in verdicts:
    found[v.item, v.turn].add(np.sign(v.preference - 0.5))
  named = {1.0: "wins", -1.0: "losses"}
  counts = dict.fromkeys(("wins", "ties", "losses"), 0)
  for signs in found.values():
    counts[named.get(next(iter(signs)), "ties") if len(signs) == 1 else "ties"] += 1
  return counts


# ---- length ----


def tanh_of_lengths(difference: np.ndarray) -> np.ndarray:
  """tanh of the length difference in standard deviations; zeros if it is constant.   f64[P]."""
  spread = np.std(difference, ddof=1) if len(difference) > 1 else 0.0
  return np.tanh(difference / spread) if spread > 0 else np.zeros(len(difference))


def length_controlled(preference: np.ndarray, difference: np.ndarray) -> Interval:
  """The win rate that a logistic regression predicts for answers of equal length.

  logit P(candidate preferred) = a + b tanh((l_candidate - l_baseline) / s), with s the standard
  deviation of the difference: arXiv 2404.04475, without its terms for the instructions' difficulty
  and for other models. The value is sigmoid(a). `RIDGE` keeps a and b finite for separable data.

  Args:
    preference: f64[P] in [0, 1], of each prompt.
    difference: f64[P], the candidate's length minus the baseline's.
  """
  if not len(preference):
    return Interval(np.nan, np.nan, np.nan, 0)
  x = tanh_of_lengths(np.asarray(difference, float))
  drawn = weights(len(preference))
  fitted = [
    logistic(x, preference, part) for part in np.array_split(drawn, len(drawn) // BLOCK + 1)
  ]
  return with_ends(sigmoid(np.concatenate(fitted)[:, 0]), len(preference))


def logistic(x: np.ndarray, y: np.ndarray, weight: np.ndarray) -> np.ndarray:
  """Intercepts and slopes that minimise, by Newton's method, for each row of `weight`,

    sum_i w_i (log(1 + exp(z_i)) - y_i z_i) + RIDGE / 2 (a^2 + b^2),   z_i = a + b x_i

  Args:
    x, y: f64[P].
    weight: f64[R, P].

  Returns:
    f64[R, 2].
  """
  design = np.stack([np.ones_like(x), x], -1)
  products = np.einsum("pi,pj->pij", design, design).reshape(len(x), 4)
  theta = np.zeros((len(weight), 2))
  for _ in range(STEPS):
    q = sigmoid(theta @ design.T)
    gradient = (weight * (q - y)) @ design + RIDGE * theta
    hessian = ((weight * q * (1 - q)) @ products).reshape(-1, 2, 2) + RIDGE * np.eye(2)
    step = np.linalg.solve(hessian, gradient[..., None])[..., 0]
    size = np.abs(step).max(1, keepdims=True)
    theta -= step / np.maximum(size, 1.0)  # a longer step may overshoot
    if size.max() < 1e-9:
      break
  return theta


def sigmoid(z: np.ndarray) -> np.ndarray:
  return np.exp(-np.logaddexp(0.0, -z))


def separable(preference: np.ndarray, difference: np.ndarray) -> bool:
  """Whether the lengths by themselves separate all wins from all losses, or there is only one of
  the two.
  """
  won, lost = difference[preference > 0.5], difference[preference < 0.5]
  if not len(won) or not len(lost):
    return True
  clear = len(won) + len(lost) == len(preference)
  return clear and bool(won.min() > lost.max() or won.max() < lost.min())


def buckets(candidate: np.ndarray, baseline: np.ndarray) -> dict[str, np.ndarray]:
  """Which prompts, bool[P], have an answer that is shorter than the baseline's, similar or
  longer.
  """
  ratio = (candidate + 1.0) / (baseline + 1.0)
  return {
    "shorter": ratio < 1 / SIMILAR,
    "similar": (ratio >= 1 / SIMILAR) & (ratio <= SIMILAR),
    "longer": ratio > SIMILAR,
  }


# ---- position and repeats ----


def same(a: float, b: float) -> bool:
  """Whether two preferences name the same winner, or both name none."""
  return np.sign(a - 0.5) == np.sign(b - 0.5)


def share(groups: dict[int, list[bool]]) -> Interval:
  """The share of True over all values of all prompts, with an interval over prompts."""
  if not groups:
    return Interval(np.nan, np.nan, np.nan, 0)
  hits = np.array([sum(values) for values in groups.values()], float)
  return estimate(
    lambda hit, all_: hit / all_, hits, np.array([len(v) for v in groups.values()], float)
  )


def position_consistency(verdicts: Sequence[Verdict]) -> Interval:
  """How often both orders of a pair name the same winner."""
  orders: dict[tuple, dict[bool | None, float | None]] = collections.defaultdict(dict)
  for v in verdicts:
    orders[v.item, v.turn, v.repeat][v.candidate_first] = v.preference
  found = collections.defaultdict(list)
  for (item, *_), one in orders.items():
    if True in one and False in one:
      found[item].append(same(one[True], one[False]))
  return share(found)


def first_shown(verdicts: Sequence[Verdict]) -> Interval:
  """The preference for the answer that was shown first; 0.5 for a judge without a position bias.

  Only pairs that were shown in both orders count.
  """
  orders = collections.defaultdict(set)
  for v in verdicts:
    orders[v.item, v.turn, v.repeat].add(v.candidate_first)
  both = [v for v in verdicts if {True, False} <= orders[v.item, v.turn, v.repeat]]
  if not both:
    return Interval(np.nan, np.nan, np.nan, 0)
  group = np.unique([v.item for v in both], return_inverse=True)[1]
  values = np.array([v.preference if v.candidate_first else 1 - v.preference for v in both])
  sums = by_group(group, np.stack([values, np.ones(len(values))], -1))
  return estimate(lambda s: s[:, 0] / s[:, 1], sums)


def repeat_agreement(verdicts: Sequence[Verdict]) -> Interval:
  """How often two repeats of the same question name the same winner."""
  repeats = collections.defaultdict(list)
  for v in verdicts:
    repeats[v.item, v.turn, v.candidate_first].append(v.preference)
  found = collections.defaultdict(list)
  for (item, *_), values in repeats.items():
    for i, a in enumerate(values):
      found[item] += [same(a, b) for b in values[i + 1 :]]
  return share({item: values for item, values in found.items() if values})


# ---- judges against each other ----


class Agreement(NamedTuple):
  with_ties: Interval  # over all votes on comparisons that the judge has judged
  without_ties: Interval  # over the votes for which neither vote nor judge is a tie
  votes: int
  decided: int


def agreement(
  votes: Iterable[tuple[Hashable, Hashable, float]], judged: dict[Hashable, float]
) -> Agreement:
  """How often single votes name the winner that a judge names (arXiv 2306.05685, table 5).

  Args:
    votes: (comparison, its prompt, preference).
    judged: comparison -> preference of the judge.
  """
  every = collections.defaultdict(list)
  clear = collections.defaultdict(list)
  for what, prompt, preference in votes:
    if what in judged:
      found = same(preference, judged[what])
      every[prompt].append(found)
      if preference != 0.5 and judged[what] != 0.5:
        clear[prompt].append(found)
  return Agreement(
    share(every), share(clear), sum(map(len, every.values())), sum(map(len, clear.values()))
  )


# ---- ratings ----


def ratings(values: np.ndarray, counted: np.ndarray) -> Interval:
  """The mean of ratings f64[P, T] over the turns that are `counted`, bool[P, T], and over prompts."""
  kept = counted.any(1)
  if not kept.any():
    return Interval(np.nan, np.nan, np.nan, 0)
  sums = np.where(counted, values, 0.0).sum(1)[kept]
  return estimate(lambda s, n: s / n, sums, counted.sum(1)[kept].astype(float))


def mean_difference(a: np.ndarray, b: np.ndarray) -> Interval:
  """The mean of a - b over prompts, f64[P] with NaN for missing values."""
  return interval(np.asarray(a, float) - np.asarray(b, float))
