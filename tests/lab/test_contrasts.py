"""The inference of registered contrasts against SciPy, a loop and published examples, its coverage,
and contrasts from curves.
"""

import numpy as np
import pytest
from scipy import stats as scipy_stats

from benchmarks import fair as fair_rows
from benchmarks import holds as holds_rows
from configs import fair, holds
from r2m_jax.config import ConfigError, arms_of, check_config
from r2m_jax.lab import contrasts, inference
from r2m_jax.lab.table import Curves, arm_columns, read_table, write_table


@pytest.mark.parametrize("count, shift", [(2, 0.0), (12, 0.03), (24, -0.2)])
def test_tests_of_a_contrast_are_scipys(count, shift):
  rng = np.random.default_rng(count)
  left, right = rng.normal(shift, 0.1, count), rng.normal(0, 0.1, count)
  found = inference.contrast(np.append(left - right, np.nan), 0.05)
  wanted = scipy_stats.ttest_rel(left, right)
  assert found.count == count and found.value == pytest.approx((left - right).mean())
  assert found.p_difference == pytest.approx(wanted.pvalue)
  for level, ends in ((0.95, found[1:3]), (0.9, found[3:5])):
    assert ends == pytest.approx(tuple(wanted.confidence_interval(level)))
  above = scipy_stats.ttest_1samp(left - right, -0.05, alternative="greater").pvalue
  below = scipy_stats.ttest_1samp(left - right, 0.05, alternative="less").pvalue
  assert found.p_equivalence == pytest.approx(max(above, below))
  inside = -0.05 < found.inner_low and found.inner_high < 0.05
  assert inside == (found.p_equivalence < 0.05)


def test_contrasts_without_spread_or_without_seeds():
  alike = inference.contrast([0.02, 0.02, 0.02], 0.05)
  assert (alike.p_difference, alike.p_equivalence) == (0.0, 0.0)
  assert inference.contrast([0.0, 0.0], 0.05).p_difference == 1.0
  assert inference.contrast([0.1, 0.1], 0.05).p_equivalence == 1.0
  assert inference.contrast([0.3], 0.05)[:1] == (0.3,)
  assert np.isnan(inference.contrast([], 0.05).p_difference)


def test_holm_rejects_what_the_step_down_loop_rejects():
  """The loop of Holm (1979): from the smallest p up, p <= alpha / (number of tests left), until one
  fails.
  """
  rng = np.random.default_rng(0)
  for p in [*rng.uniform(0, 0.06, (50, 6)), np.array([0.01, 0.01, 0.04, 0.03, 1.0, 0.005])]:
    adjusted = inference.holm(p)
    for alpha in (0.01, 0.05, 0.1):
      rejected = set()
      for left, i in zip(range(len(p), 0, -1), np.argsort(p)):
        if p[i] > alpha / left:
          break
        rejected.add(i)
      assert set(np.flatnonzero(adjusted <= alpha)) == rejected
  np.testing.assert_allclose(inference.holm([0.01, 0.04, np.nan]), [0.03, 0.08, 1.0])


@pytest.mark.parametrize(
  "mean, spread, decision",
  [
    (0.0, 0.02, "equivalent"),
    (0.2, 0.1, "superior"),
    (-0.2, 0.1, "inferior"),
    (0.0, 1.0, "undecided"),
  ],
)
def test_decisions(mean, spread, decision):
  values = np.linspace(-1, 1, 24) * spread + mean
  found = inference.contrast(values, 0.05)
  assert inference.decide(found, float(inference.holm([found.p_difference] * 6)[0])) == decision
  assert inference.decide(inference.contrast([], 0.05), 1.0) == "undecided"


def test_slope_on_the_residual_kl_is_that_of_least_squares():
  """Against lstsq with a column for each arm and each seed. A seed that one arm lacks is
  excluded.
  """
  rng = np.random.default_rng(0)
  residual = rng.normal(size=(3, 9))
  gold = rng.normal(size=(3, 1)) + rng.normal(size=9) - 0.3 * residual
  gold += 0.01 * rng.normal(size=gold.shape)
  arm, seed = (x.ravel() for x in np.indices(gold.shape))
  columns = np.column_stack([residual.ravel(), np.eye(3)[arm], np.eye(9)[seed]])
  wanted = np.linalg.lstsq(columns, gold.ravel(), rcond=None)[0][0]
  assert inference.residual_slope(gold, residual) == pytest.approx(wanted)
  with_gap = np.column_stack([gold, [np.nan, 5.0, 1.0]])
  assert inference.residual_slope(
    with_gap, np.column_stack([residual, [1, 2, 9]])
  ) == pytest.approx(wanted)
  assert inference.residual_slope(gold, np.ones_like(gold)) == 0


def bimodal(rng, trials, count, share, depth=3.0):
  """Differences, a share of which are in a far tail, and their mean: f64[trials, count], float."""
  tail = rng.uniform(size=(trials, count)) < share
  return rng.normal(0, 0.08, (trials, count)) - depth * tail, -depth * share


@pytest.mark.parametrize("count", [12, 24])
@pytest.mark.parametrize("share, least", [(0.0, 0.93), (0.1, 0.65), (0.25, 0.9)])
def test_coverage_of_the_interval_on_bimodal_ends(count, share, least):
  """docs/lab.md has the numbers. With 12 seeds, a tail of probability 0.1 is often not sampled at
  all.
  """
  values, mean = bimodal(np.random.default_rng(0), 1500, count, share)
  found = [inference.contrast(row, 0.05) for row in values]
  covered = np.mean([one.low <= mean <= one.high for one in found])
  print(f"n {count}, {share:.0%} in the tail: 95% interval covers {covered:.1%}")
  assert covered >= least
  if share == 0:  # each test keeps its level, at the edge of the margin and at zero
    edge = np.mean([inference.contrast(row + 0.05, 0.05).p_equivalence < 0.05 for row in values])
    assert 0.03 < edge < 0.07
    assert 0.03 < np.mean([one.p_difference < 0.05 for one in found]) < 0.07


def made_up(config, seeds=12, steps=40, kls=None):
  """{arm: {1.0: Curves}} whose gold is a value of the arm plus a value of the seed, minus 0.5 per
  nat of KL.
  """
  rng, found = np.random.default_rng(0), {}
  base = rng.normal(0, 0.3, seeds)
  for i, (name, arm) in enumerate(arms_of(config).items()):
    target = (kls or {}).get(name, arm.kl.target)
    kl = target * (1 + rng.normal(0, 0.02, (seeds, 1)) + rng.normal(0, 0.001, (seeds, steps)))
    gold = 0.1 * i + base[:, None] - 0.5 * (kl - arm.kl.target)
    gold[:, : steps // 10] = -1
    found[name] = {1.0: Curves(0.3, list(range(seeds)), {"reward/gold": gold, "kl": kl})}
  return found


def test_contrasts_of_curves():
  """Arms differ by 0.1 gold, and only the KL adds noise. The adjustment recovers exactly 0.1."""
  config = fair.get_config("test")
  config.lab.tail, names = 20, list(arms_of(config))
  curves = made_up(config)
  arms = contrasts.held_arms(config, curves)
  rows = contrasts.contrasts(config, arms)
  assert [(row.left, row.right) for row in rows] == [(names[0], name) for name in names[1:]]
  for i, row in enumerate(rows, 1):
    assert row.found.value == pytest.approx(-0.1 * i, abs=1e-3)
    tail = [
      curves[name][1.0].metrics["reward/gold"][:, -20:].mean() for name in (row.left, row.right)
    ]
    assert row.raw == pytest.approx(tail[0] - tail[1])
    assert row.decision == "inferior" and row.found.count == 12
  shown = contrasts.text(config, curves)
  assert all(f"{names[0]} - {name}" in shown for name in names[1:]) and "inferior" in shown
  assert arms[names[0]].collapsed == 0 and "0%" in shown


def test_contrasts_are_read_on_the_seeds_that_all_arms_have():
  config = fair.get_config("test")
  config.lab.tail = 20
  whole, fewer = made_up(config), {}
  for i, (name, by_factor) in enumerate(whole.items()):
    one, keep = by_factor[1.0], slice(i, 12 - (i == 3))  # 3 to 10 in all of them
    metrics = {key: value[keep] for key, value in one.metrics.items()}
    fewer[name] = {1.0: Curves(one.beta, one.seeds[keep], metrics)}
  for by_factor in whole.values():
    one = by_factor[1.0]
    for key in one.metrics:
      one.metrics[key] = one.metrics[key][3:11]
    one.seeds[:] = one.seeds[3:11]
  rows, wanted = (
    contrasts.contrasts(config, contrasts.held_arms(config, curves)) for curves in (fewer, whole)
  )
  assert rows == wanted and {row.found.count for row in rows} == {8}


def test_a_kl_that_is_not_held_decides_nothing():
  config = fair.get_config("test")
  config.lab.tail, names = 20, list(arms_of(config))
  curves = made_up(config, kls={names[1]: 0.03})
  del curves[names[3]]
  rows = contrasts.contrasts(config, contrasts.held_arms(config, curves))
  assert [row.decision for row in rows] == ["KL not held", "inferior", "not run"]
  assert np.isnan(rows[2].found.value) and rows[2].p_holm == 1
  assert contrasts.tables(config, {}) == []


def test_kept_rows_give_the_same_contrasts(tmp_path):
  config, folder = fair.get_config("test"), tmp_path / "lab"
  curves = made_up(config)
  for name, by_factor in curves.items():
    metrics = by_factor[1.0].metrics
    names, seeds = list(metrics), by_factor[1.0].seeds
    log = np.stack([metrics[key].T for key in names], -1)
    columns = arm_columns(name, [(seed, 1.0, 0.3) for seed in seeds], names, log)
    (folder / "table").mkdir(parents=True, exist_ok=True)
    write_table(folder / "table" / f"{name}.parquet", columns | {"unused": columns["step"]})
  write_table(tmp_path / "rows.parquet", fair_rows.rows_of(folder))
  columns = read_table(tmp_path / "rows.parquet")[0]
  assert "unused" not in columns and "reward/gold" in columns
  kept = contrasts.text(config, fair_rows.curves_by_arm(columns))
  assert kept == contrasts.text(config, curves)
  with pytest.raises(SystemExit, match="run configs/fair.py into it first"):
    fair_rows.rows_of(tmp_path / "nothing")


def test_bars_of_an_arm_beside_vanilla():
  """Against a loop, on the seeds that both arms have."""
  rng = np.random.default_rng(0)
  keys = ("reward/gold", "length", "gold/coverage", "reward/frozen")
  usual, mine = (
    Curves(0.3, seeds, {key: rng.uniform(1, 2, (len(seeds), 40)) for key in keys})
    for seeds in ([3, 4, 5], [4, 5, 6])
  )
  config = holds.get_config()
  config.lab.tail = 8
  shown = holds_rows.bars(
    config, {"vanilla.kl2": {1.0: usual}, "vanilla.contrast.kl2": {1.0: mine}}
  )
  line = next(line for line in shown.splitlines() if line.startswith("vanilla.contrast.kl2"))
  gold = [sum(mine.metrics["reward/gold"][i][t] for i in (0, 1)) / 2 for t in range(40)]
  peak = max(sum(gold[t : t + 10]) / 10 for t in range(31))
  length = [
    sum(curves.metrics["length"][i][-8:].sum() for i in rows)
    for curves, rows in ((mine, (0, 1)), (usual, (1, 2)))
  ]
  assert float(line.split()[1]) == pytest.approx(sum(gold[-8:]) / 8 / peak, abs=0.006)
  assert float(line.split()[2]) == pytest.approx(length[0] / length[1], abs=0.006)


def test_arms_at_equal_steps_are_paired_by_seed_with_scaled_of_their_speed():
  rng = np.random.default_rng(1)
  names = ("scaled", "r2m.high", "renormed.high", "scaled.short", "r2m.short_grpo", "r2m.kl2")
  curves = {}
  for i, name in enumerate(names):
    keys = ("reward/gold", "kl", "reward/used_std")
    metrics = {key: rng.normal(0, 1, (8, 16)) for key in keys}
    curves[name] = {1.0: Curves(0.02, list(range(i % 2, 8 + i % 2)), metrics)}
  shown = "\n".join(fair_rows.at_equal_steps(curves, of) for of in ("E2", "E3"))
  lines = {line.split("  ")[0]: line for line in shown.splitlines() if line}
  assert "r2m.kl2" not in shown and lines["scaled"].count("[") == 4
  pairs = {name for name in lines if " - " in name}
  assert pairs == {
    "r2m.high - scaled",
    "r2m.high - renormed.high",
    "renormed.high - scaled",
    "r2m.short_grpo - scaled.short",
  }
  for pair in pairs:
    (a, b) = (curves[name][1.0] for name in pair.split(" - "))
    both = [seed for seed in a.seeds if seed in b.seeds]
    rows = [
      a.metrics["reward/gold"][a.seeds.index(seed)] - b.metrics["reward/gold"][b.seeds.index(seed)]
      for seed in both
    ]
    end = [row[-2:].mean() for row in rows]
    more = sum(x > 0 for x in end)
    means = [f" {round(np.mean(x), 2) + 0.0:.2f} [" for x in (end, rows)]  # 0.00, not -0.00
    for text in (*means, f"{more} of {len(both)}"):
      assert text in lines[pair]


@pytest.mark.parametrize(
  "get_config, size",
  [(fair.get_config, size) for size in ("", "test", *fair.SIZES)]
  + [(holds.get_config, size) for size in ("", "test")],
)
def test_the_registered_experiments_can_run(get_config, size):
  config = get_config(size)
  check_config(config)
  arms = arms_of(config)
  assert not set(config.lab.seeds) & {100, 101, 102, 103}
  named = {name for text in config.lab.contrasts for name in text.split(" - ")}
  assert named <= set(arms)
  if size == "":
    expected = {fair.get_config: (6, 24), holds.get_config: (4, 14)}[get_config]
    assert (len(config.lab.contrasts), len(config.lab.seeds)) == expected
    budgets = {(arm.steps, arm.kl.beta, arm.policy.lr, arm.algorithm) for arm in arms.values()}
    assert len(budgets) == 1  # the same for every arm, including the first KL weight
    assert {arm.kl.target for arm in arms.values()} == {2.0, 4.0}


@pytest.mark.parametrize("contrast", ["r2m", "r2m - r2m", "r2m - scaled - shuffled", 3])
def test_contrasts_that_cannot_be_read_are_refused(contrast):
  config = fair.get_config("test")
  config.lab.contrasts = (contrast,)
  with pytest.raises(ConfigError, match=r"config\.lab\.contrasts is .*give pairs of arms"):
    check_config(config)
