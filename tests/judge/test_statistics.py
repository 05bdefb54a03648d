"""Win rates and related statistics. Oracles: loops, numbers worked by hand, and a slow optimiser
for the fit.
"""

import math

import numpy as np
import pytest

from r2m_jax.judge import statistics
from r2m_jax.judge.statistics import RIDGE, Verdict


def slow_fit(difference, preference):
  """The same objective by coordinate-wise bisection of its derivative, in Python's floats.

  Minimises over b the minimum over a: both derivatives grow with their variable.
  """
  spread = math.sqrt(
    sum((d - sum(difference) / len(difference)) ** 2 for d in difference) / (len(difference) - 1)
  )
  x = [math.tanh(d / spread) if spread else 0.0 for d in difference]

  def residuals(a, b):
    return [1 / (1 + math.exp(-(a + b * xi))) - yi for xi, yi in zip(x, preference)]

  def root(f):
    low, high = -30.0, 30.0
    for _ in range(60):
      middle = (low + high) / 2
      low, high = (middle, high) if f(middle) < 0 else (low, middle)
    return (low + high) / 2

  def best_a(b):
    return root(lambda a: sum(residuals(a, b)) + RIDGE * a)

  def slope(b):
    return sum(r * xi for r, xi in zip(residuals(best_a(b), b), x)) + RIDGE * b

  return 1 / (1 + math.exp(-best_a(root(slope))))


def synthetic(kind, rng, count=60):
  """(length differences, preferences) of a set with a known property."""
  difference = rng.normal(30, 200, count).round()
  if kind == "no spread":
    return np.full(count, 12.0), (rng.random(count) < 0.7).astype(float)
  if kind == "separable":
    return difference, (difference > 40).astype(float)
  push = {"strong length bias": 2.5, "no length bias": 0.0}[kind]
  p = 1 / (1 + np.exp(-(0.4 + push * np.tanh(difference / 200))))
  return difference, np.where(rng.random(count) < 0.1, 0.5, rng.random(count) < p)


@pytest.mark.parametrize("kind", ["no spread", "separable", "strong length bias", "no length bias"])
def test_length_controlled_win_rate_is_that_of_a_slow_fit(kind):
  difference, preference = synthetic(kind, np.random.default_rng(3))
  found = statistics.length_controlled(preference, difference)
  want = slow_fit(difference.tolist(), preference.tolist())
  assert abs(found.value - want) < 1e-6  # well within 0.1 points
  assert found.low <= found.value <= found.high and found.count == len(difference)
  if kind == "no spread":
    assert abs(found.value - preference.mean()) < 1e-3
  assert statistics.separable(preference, difference) == (kind == "separable")


def test_length_control_takes_the_bias_away():
  """Two equal models, a judge that prefers length, and a longer candidate: only the raw win rate is
  biased.
  """
  rng = np.random.default_rng(0)
  difference = rng.normal(300, 200, 1000)
  liked = 1 / (1 + np.exp(-3 * np.tanh(difference / difference.std(ddof=1))))
  preference = (rng.random(1000) < liked).astype(float)
  assert preference.mean() > 0.8
  assert abs(statistics.length_controlled(preference, difference).value - 0.5) < 0.1


@pytest.mark.parametrize("preference", [np.ones(20), np.zeros(20), np.full(20, 0.5), np.ones(1)])
def test_the_fit_stands_any_outcome(preference):
  found = statistics.length_controlled(preference, np.arange(len(preference)) * 10.0)
  assert math.isfinite(found.value) and abs(found.value - preference.mean()) < 0.05
  assert statistics.length_controlled(np.zeros(0), np.zeros(0)).count == 0


def both_orders(preferences, turn=0, repeat=0, weight=1.0):
  """Verdicts from (preference with the candidate first, with the baseline first) for each prompt."""
  return [
    Verdict(item, turn, repeat, first, value, weight)
    for item, pair in enumerate(preferences)
    for first, value in zip((True, False), pair)
  ]


def test_numbers_by_hand():
  # won in both orders; first shown always wins; lost in both; a tie and a win; one unread
  verdicts = both_orders([(1, 1), (1, 0), (0, 0), (0.5, 1), (1, None)])
  used = statistics.usable(verdicts)
  assert len(used) == 8  # the other order of the unread one is excluded
  won, weight = statistics.by_prompt(used, 5)
  assert won.tolist() == [2, 1, 0, 1.5, 0] and weight.tolist() == [2, 2, 2, 2, 0]
  rate = statistics.win_rate(won, weight)
  assert rate.value == 4.5 / 8 and rate.count == 4 and 0 <= rate.low < rate.value < rate.high <= 1
  assert statistics.outcomes(used) == {"wins": 1, "ties": 2, "losses": 1}
  assert statistics.position_consistency(used).value == 2 / 4
  assert statistics.first_shown(used).value == (1 + 0 + 1 + 1 + 0 + 1 + 0.5 + 0) / 8
  assert statistics.repeat_agreement(used).count == 0
  again = used + both_orders([(1, 0), (1, 0)], repeat=1)
  # three of the four questions that were asked twice have the same winner
  assert statistics.repeat_agreement(again).value == 3 / 4


def test_a_strong_verdict_counts_three_times():
  """The label weights of Arena-Hard: one strong loss against two slight wins."""
  verdicts = [
    Verdict(0, 0, 0, True, 0.0, 3.0),
    Verdict(0, 0, 0, False, 1.0, 1.0),
    Verdict(1, 0, 0, True, 1.0, 1.0),
    Verdict(1, 0, 0, False, 0.5, 1.0),
  ]
  assert statistics.win_rate(*statistics.by_prompt(verdicts, 2)).value == 2.5 / 6


def test_length_buckets():
  found = statistics.buckets(np.array([99.0, 100, 130, 70]), np.array([99.0, 110, 100, 100]))
  assert {name: np.flatnonzero(mask).tolist() for name, mask in found.items()} == {
    "shorter": [3],
    "similar": [0, 1],
    "longer": [2],
  }


def test_agreement_with_votes_is_that_of_a_loop():
  rng = np.random.default_rng(5)
  judged = {(q, t): float(rng.choice([0, 0.5, 1])) for q in range(40) for t in range(2)}
  votes = [
    ((q, t), q, float(rng.choice([0, 0.5, 1])))
    for q in range(44)
    for t in range(2)
    for _ in range(3)
  ]
  found = statistics.agreement(votes, judged)
  same = clear = kept = decided = 0
  for what, _, value in votes:
    if what in judged:
      kept += 1
      same += value == judged[what]
      if 0.5 not in (value, judged[what]):
        decided += 1
        clear += value == judged[what]
  assert (found.votes, found.decided) == (kept, decided) == (240, decided)
  np.testing.assert_allclose(
    (found.with_ties.value, found.without_ties.value), (same / kept, clear / decided)
  )
  assert found.with_ties.low < found.with_ties.value < found.with_ties.high


def test_ratings_leave_out_what_is_missing():
  values = np.array([[1.0, 2.0], [5.0, np.nan], [np.nan, np.nan]])
  found = statistics.ratings(values, np.isfinite(values))
  assert found.value == 8 / 3 and found.count == 2
