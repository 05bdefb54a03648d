"""The laboratory's statistics against loops, closed forms and enumeration."""

import itertools

import numpy as np
import pytest

from configs import lab as lab_config
from r2m_jax.goldtask import task as goldtask
from r2m_jax.goldtask.rl import against_frozen, gold_metrics
from r2m_jax.lab import results, stats
from r2m_jax.lab.table import arm_columns, curves_of, joined, read_table, write_table
from r2m_jax.report import intervals
from r2m_jax.types import Judged, Sequences

# two-sided 95% points of Student's t, from published tables, by degrees of freedom
STUDENT = {1: 12.706, 2: 4.303, 3: 3.182, 4: 2.776, 9: 2.262, 29: 2.045}


@pytest.mark.parametrize("n", [1, 2, 3, 7, 8])
@pytest.mark.parametrize("kinds", [3, 1000])
def test_best_of_equals_the_mean_over_all_subsets(n, kinds):
  """With 3 distinct proxy values there are many ties. Tied responses are equally likely to be
  chosen.
  """
  rng, count = np.random.default_rng(n), 8
  proxy, values = rng.integers(0, kinds, count).astype(float), rng.normal(size=count)
  picked = []
  for subset in itertools.combinations(range(count), n):
    best = max(proxy[i] for i in subset)
    picked.append(np.mean([values[i] for i in subset if proxy[i] == best]))
  assert stats.best_of(proxy, values, n) == pytest.approx(np.mean(picked), abs=1e-12)


def test_best_of_is_exact_for_large_counts():
  """If n of the numbers 1 .. N are drawn without replacement, the largest has the mean n (N + 1) /
  (n + 1).
  """
  values = np.random.default_rng(0).permutation(np.arange(1.0, 4097))
  for n in (1, 16, 1000, 4096):
    assert stats.best_of(values, values, n) == pytest.approx(n * 4097 / (n + 1), rel=1e-9)


def test_best_of_kl_is_that_of_the_distribution():
  """The KL of best of n over M equally likely responses without ties, from its definition, for a
  large M.
  """
  for n in (1, 2, 4, 16):
    edges = np.linspace(0, 1, 200_001)
    mass = np.diff(edges**n)  # of the largest of n
    mass = mass[mass > 0]
    assert stats.best_of_kl(n) == pytest.approx(
      float((mass * np.log(mass * 200_000)).sum()), abs=2e-3
    )


@pytest.mark.parametrize("count", [2, 3, 4, 5, 10, 30])
def test_interval_has_the_length_of_the_t_interval(count):
  """If values are evenly spaced, the bootstrap of the mean is nearly Normal, and the widened
  percentiles have the length of Student's interval.
  """
  values = np.random.default_rng(count).permutation(np.linspace(-1, 1, count))
  found = intervals.interval(values + 3)
  assert found.value == pytest.approx(3) and found.count == count
  half = STUDENT[count - 1] * values.std(ddof=1) / np.sqrt(count)
  # for fewer than five values a bootstrap cannot leave the range of the data, so Student's interval
  # is used
  assert (found.high - found.low) / 2 == pytest.approx(half, rel=0.12 if count >= 5 else 1e-3)


@pytest.mark.parametrize("count", [2, 3, 4, 10])
def test_interval_covers_the_mean_of_few_seeds(count):
  rng, hits = np.random.default_rng(0), 0
  for values in rng.normal(size=(1000, count)):
    found = intervals.interval(values)
    hits += found.low <= 0 <= found.high
  assert 0.925 <= hits / 1000 <= 0.97  # standard error 0.007; the plain percentile interval: 0.90


def test_interval_leaves_out_what_a_seed_does_not_have():
  assert intervals.interval([1.0, np.nan, 3.0]) == intervals.interval([1.0, 3.0])
  single = intervals.interval([np.nan, 2.0])
  assert single[0] == 2 and np.isnan(single[1]) and single.count == 1
  assert intervals.interval([np.nan]).count == 0 and np.isnan(intervals.interval([])[0])


def test_pairing_takes_the_seeds_variance_out():
  rng = np.random.default_rng(1)
  seed_effect = rng.normal(size=10) * 5
  first, second = seed_effect + 1.0 + 0.01 * rng.normal(size=10), seed_effect
  found = intervals.paired(first, second)
  assert found.value == pytest.approx((first - second).mean()) and found.high - found.low < 0.05
  assert intervals.paired([1.0, 2.0, np.nan], [0.0, np.nan, 1.0]).count == 1


def test_resamples_are_draws_with_replacement():
  weights = intervals.resampled(4)
  assert weights.shape == (intervals.RESAMPLES, 4) and (weights.sum(1) == 4).all()
  np.testing.assert_allclose(weights.mean(0), 1, atol=0.05)
  assert weights.var(0) == pytest.approx(4 * 0.25 * 0.75, rel=0.05)  # of a binomial


def test_outline_against_a_loop():
  gold = np.random.default_rng(2).normal(size=(3, 40)).cumsum(1)
  found = stats.outline(gold)
  for i, row in enumerate(gold):
    means = [np.mean(row[j : j + 4]) for j in range(37)]
    top = max(range(37), key=lambda j: means[j])
    want = (means[0], means[top], np.mean(range(top, top + 4)), means[-1], np.mean(row))
    np.testing.assert_allclose([x[i] for x in found], want, rtol=1e-12)


def test_matched_by_hand():
  """Three steps have windows of one step. Between KL 1 and 3 gold rises from 2 to 4."""
  kl = np.array([[0.0, 1.0, 3.0], [0.0, 0.5, 0.9], [0.0, 3.0, 1.0]])
  gold = np.array([[0.0, 2.0, 4.0], [0.0, 1.0, 2.0], [0.0, 6.0, 9.0]])
  np.testing.assert_allclose(stats.matched(kl, gold, 2.0), [3.0, np.nan, 4.0])


def test_stopped_reads_the_step_after_the_one_that_passes():
  kl = np.array([[0, 1, 2, 3], [0, 1, 1, 1], [0, 0, 0, 5], [3, 0, 0, 0.0]])
  gold = np.arange(16.0).reshape(4, 4)
  value, step = stats.stopped(kl, gold, 2.0)
  np.testing.assert_array_equal(step, [3, 3, 3, 1])
  np.testing.assert_array_equal(value, [3, 7, 11, 13])


@pytest.mark.parametrize(
  "kind, curve, turn",
  [
    ("bon", lambda d: d * (1.5 - 0.3 * d), 2.5),
    ("rl", lambda d: d * (1.5 - 0.6 * np.log(d)), np.exp(1.5)),
  ],
)
def test_turnover_fit_finds_the_curve_it_was_given(kind, curve, turn):
  kl = np.random.default_rng(3).uniform(0.01, 12, (6, 80))
  found = stats.fit_turnover(kl, curve(np.sqrt(kl)), kind)
  assert found.a.value == pytest.approx(1.5) and found.b.value == pytest.approx(
    0.3 if kind == "bon" else 0.6
  )
  assert found.turn.value == pytest.approx(turn) and found.r2 == pytest.approx(1)
  assert found.a.low == pytest.approx(found.a.high)


def test_turnover_fit_is_least_squares_over_all_points_and_resamples_seeds():
  rng = np.random.default_rng(4)
  kl = rng.uniform(0, 9, (5, 30))
  kl[:, 0] = 0  # left out
  d = np.sqrt(kl)
  gain = d * (1.2 - 0.25 * d) + 0.3 * rng.normal(size=(5, 1)) * d + 0.1 * rng.normal(size=d.shape)
  found, keep = stats.fit_turnover(kl, gain, "bon"), kl > 0
  columns = np.stack([d[keep], -(d[keep] ** 2)], 1)
  (a, b), residual, *_ = np.linalg.lstsq(columns, gain[keep])
  assert found.a.value == pytest.approx(a) and found.b.value == pytest.approx(b)
  assert found.r2 == pytest.approx(1 - residual[0] / ((gain[keep] - gain[keep].mean()) ** 2).sum())
  alone = [stats.fit_turnover(kl[[i]], gain[[i]], "bon").a.value for i in range(5)]
  assert found.a.low < found.a.value < found.a.high
  t_half = STUDENT[4] * np.std(alone, ddof=1) / np.sqrt(5)  # seeds have nearly equal weights here
  assert (found.a.high - found.a.low) / 2 == pytest.approx(t_half, rel=0.3)


def test_a_curve_that_never_turns_says_so():
  kl = np.random.default_rng(5).uniform(0.1, 4, (4, 20))
  found = stats.fit_turnover(kl, np.sqrt(kl), "bon")
  assert np.isnan(stats.turn(1.0, -0.1, "bon")) and np.isnan(stats.turn(-1.0, 0.1, "bon"))
  assert found.b.value == pytest.approx(0, abs=1e-9)


def test_gold_metrics_against_loops():
  """Within-prompt correlation, and the share of top-against-bottom pairs that contradict gold."""
  rng, prompts, K, T = np.random.default_rng(6), 12, 4, 6
  tokens = np.concatenate(
    [
      np.repeat(goldtask.prompts(0, 9, 0, prompts).tokens, K, 0),
      rng.integers(2, 64, (prompts * K, T)).astype(np.int32),
    ],
    1,
  )
  mask = np.ones((prompts * K, T), bool)
  sequences = Sequences(
    tokens=tokens,
    token_mask=np.ones(tokens.shape, bool),
    response_mask=mask,
    has_eos=np.zeros(len(mask), bool),
  )
  scores = rng.normal(size=prompts * K)
  gold = goldtask.gold(sequences).gold
  out = type(
    "Out",
    (),
    dict(sequences=sequences, judged=Judged(rte=None, scores=scores, scores_frozen=scores)),
  )
  found = gold_metrics(out, K)
  top = first = second = 0.0
  wrong = []
  for p in range(prompts):
    g, s = gold[p * K : p * K + K], scores[p * K : p * K + K]
    for a, b in zip(g - g.mean(), s - s.mean()):
      top, first, second = top + a * b, first + a * a, second + b * b
    winner, loser = max(range(K), key=lambda i: s[i]), min(range(K), key=lambda i: s[i])
    wrong.append(0.5 if g[winner] == g[loser] else float(g[winner] < g[loser]))
  assert found["reward/within_corr"] == pytest.approx(top / np.sqrt(first * second))
  assert found["r2m/pair_disagreement"] == pytest.approx(np.mean(wrong))
  assert 0 < found["r2m/pair_disagreement"] < 1


def test_a_table_comes_back_as_curves(tmp_path):
  log = (
    np.random.default_rng(7).normal(size=(5, 4, 2)).astype(np.float32)
  )  # steps, replicas, metrics
  replicas = [(3, 1.0, 0.02), (1, 1.0, 0.02), (3, 2.0, 0.04), (1, 2.0, 0.04)]
  columns = arm_columns("r2m", replicas, ["reward/gold", "kl"], log)
  more = arm_columns("r2m", [(2, 1.0, 0.02)], ["reward/gold"], log[:, :1, :1])
  write_table(tmp_path / "r2m.parquet", joined(columns, more), "who")
  columns, identity = read_table(tmp_path / "r2m.parquet")
  assert identity == "who" and len(columns["seed"]) == 25
  curves = curves_of(columns)
  assert list(curves) == [1.0, 2.0] and curves[1.0].seeds == [1, 2, 3] and curves[2.0].beta == 0.04
  np.testing.assert_array_equal(curves[1.0].metrics["kl"][[0, 2]], log[:, [1, 0], 1].T)
  assert np.isnan(curves[1.0].metrics["kl"][1]).all()
  np.testing.assert_array_equal(curves[2.0].metrics["reward/gold"], log[:, [3, 2], 0].T)


def test_arms_are_paired_with_those_of_their_own_kind():
  known = ("vanilla", "scaled", "r2m", "vanilla.hold", "r2m.hold", "r2m.mine")
  assert results.rival("r2m.hold", "vanilla", known) == "vanilla.hold"
  assert results.rival("r2m.hold", "scaled", known) == "scaled"
  assert results.rival("r2m.mine", "vanilla", known) == "vanilla"
  assert results.rival("vanilla.hold", "vanilla", known) == "vanilla"
  assert (
    results.rival("vanilla", "vanilla", known) is None and results.rival("r2m", "", known) is None
  )


def candidates(**changes):
  """Results with four candidates of one arm. `changes` maps a measure to its values for candidates
  0 to 3.
  """
  usual = {
    "skipped": 0,
    "length_start": 8,
    "length_final": 6,
    "frozen_at_kl_2": 1,
    "frozen_final": 1,
    "final": 0,
  }
  found = {}
  for i in range(4):
    for measure, value in usual.items():
      count, value = changes.get(measure, {}).get(i, (4, value))
      found[f"r2m.candidate_{i}", 1.0, measure, ""] = intervals.Interval(value, value, value, count)
  curves = {f"r2m.candidate_{i}": {} for i in range(4)} | {"vanilla": {}}
  return results.Results(curves, {}, {}, {}, [], found, {})


@pytest.mark.parametrize(
  "changes, taken",
  [
    ({}, 0),
    ({"frozen_at_kl_2": {2: (4, 1.5)}}, 2),
    ({"frozen_at_kl_2": {2: (4, 1.5)}, "final": {0: (4, 9.0)}}, 2),  # gold is not used
    ({"frozen_at_kl_2": {2: (4, 1.5)}, "skipped": {2: (4, 0.25)}}, 0),
    ({"frozen_at_kl_2": {2: (4, 1.5)}, "length_final": {2: (4, 3.9)}}, 0),
    (
      {"frozen_at_kl_2": {2: (4, 1.5), 1: (3, 1.0)}, "frozen_final": {3: (4, 2.0)}},
      3,
    ),  # one seed of setting 1 never reaches it
    ({"skipped": {i: (4, 1.0) for i in range(4)}}, None),
  ],
)
def test_settings_are_chosen_by_the_rule_of_the_protocol(changes, taken):
  config = lab_config.get_config("tune")
  chosen = results.choose(config, candidates(**changes))
  assert chosen == ({} if taken is None else {"r2m": f"r2m.candidate_{taken}"})


def test_against_frozen_equals_loops():
  rng, K = np.random.default_rng(8), 5
  gold, used = rng.integers(0, 3, 40).astype(float), rng.normal(size=40)
  frozen = 0.5 * used + rng.normal(size=40) + np.repeat(rng.normal(size=8), K)
  found = against_frozen(gold, used, frozen, K)
  rows = [np.arange(p * K, p * K + K) for p in range(8)]
  u, f = (np.concatenate([x[own] - x[own].mean() for own in rows]) for x in (used, frozen))
  assert found["reward/growth"] == pytest.approx(u.std() / f.std())
  assert found["reward/frozen_corr"] == pytest.approx(np.corrcoef(u, f)[0, 1])
  wrong = []
  for own in rows:
    best, worst = max(own, key=lambda i: used[i]), min(own, key=lambda i: used[i])
    tied = gold[best] == gold[worst]
    high = frozen[best] > frozen[worst]
    wrong.append(0.5 if tied else float(high != (gold[best] > gold[worst])))
  assert found["r2m/frozen_disagreement"] == pytest.approx(np.mean(wrong))
  same = against_frozen(gold, used, used, K)
  assert same["reward/growth"] == same["reward/frozen_corr"] == pytest.approx(1)
  none = against_frozen(gold, used, np.zeros(40), K)
  assert none["reward/growth"] is None and none["reward/frozen_corr"] is None
