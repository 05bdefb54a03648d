"""The offline table: its posterior, weights, evidence and scores against loops and scipy, and the
tables of the page against the stored rows.
"""

import itertools
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from scipy import optimize

from configs import quickstart
from r2m_jax.algorithm.posterior import (
  Evidence,
  effective_size,
  fit_head,
  relative_ratio,
  tempered_weights,
  terms,
)
from r2m_jax.goldtask import task as goldtask
from r2m_jax.lab import offline, offline_page
from r2m_jax.lab import offline_table as table
from r2m_jax.models.reward import RewardHead
from r2m_jax.types import Sequences

DOCS = pathlib.Path(__file__).parents[2] / "docs"


def pairs(count=80, width=5, seed=0):
  rng = np.random.default_rng(seed)
  dx = rng.normal(size=(count, width)) + 0.3
  flip = np.where(rng.uniform(size=count) < 0.5, 0.2, 0.02)
  return Evidence(dx, rng.uniform(0, 2, count), flip), rng.normal(size=width)


def objective(w, evidence, prior_mean, tau):
  """J(w), one pair at a time."""
  total = sum((a - b) ** 2 for a, b in zip(w, prior_mean)) / (2 * tau**2)
  for dx, weight, flip in zip(*evidence):
    z = sum(a * b for a, b in zip(w, dx))
    total -= weight * np.log((1 - 2 * flip) / (1 + np.exp(-z)) + flip)
  return total


@pytest.mark.parametrize("tau", [0.1, 1.0])
def test_the_head_is_the_one_that_scipy_finds(tau):
  evidence, prior_mean = pairs()
  found = fit_head(evidence, prior_mean, tau)
  best = optimize.minimize(
    objective, prior_mean, (evidence, prior_mean, tau), method="BFGS", options={"gtol": 1e-7}
  )
  # J is within 1e-8 of its minimum, and its curvature is at least 1 / tau^2
  np.testing.assert_allclose(found.mean, best.x, atol=3e-4 * tau)
  assert objective(found.mean, evidence, prior_mean, tau) <= best.fun + 2e-8
  assert 0 < found.steps < 50


def test_the_head_of_labels_that_contradict_the_prior_is_a_minimum_too():
  """Far from the prior, l is not convex. Each step must still decrease it."""
  evidence, prior_mean = pairs(40, 3, 1)
  evidence = evidence._replace(dx=-np.abs(evidence.dx), flip=np.full(40, 0.2))
  prior_mean = np.full(3, 1.0)
  assert (terms(evidence.dx @ prior_mean, evidence.flip).curvature < 0).mean() > 0.5
  found = fit_head(evidence, prior_mean, 10.0)
  at = objective(found.mean, evidence, prior_mean, 10.0)
  assert at < objective(prior_mean, evidence, prior_mean, 10.0)
  slope = optimize.approx_fprime(found.mean, objective, 1e-6, evidence, prior_mean, 10.0)
  assert np.abs(slope).max() < 1e-3


def test_a_pair_of_weight_two_counts_as_two_pairs():
  evidence, prior_mean = pairs(30, 4, 2)
  once = evidence._replace(weight=np.full(30, 2.0))
  twice = Evidence(*(np.concatenate([x, x]) for x in evidence._replace(weight=np.ones(30))))
  found, same = (fit_head(given, prior_mean, 0.5) for given in (once, twice))
  np.testing.assert_allclose(found.mean, same.mean, atol=1e-6)
  np.testing.assert_allclose(found.precision, same.precision, rtol=1e-6)


def test_slope_and_information_of_a_label():
  """By central differences; the information is the expected curvature over both labels."""
  z, h = np.linspace(-6, 6, 41), 1e-4
  for flip in (0.02, 0.2):

    def value(z, sign=1.0, flip=flip):
      return terms(sign * z, np.full(z.shape, flip)).value

    found = terms(z, np.full(z.shape, flip))
    np.testing.assert_allclose(found.slope, (value(z + h) - value(z - h)) / (2 * h), atol=1e-7)
    chance = np.exp(-value(z))
    curvature = [(value(z + h, s) + value(z - h, s) - 2 * value(z, s)) / h**2 for s in (1.0, -1.0)]
    expected = chance * curvature[0] + (1 - chance) * curvature[1]
    np.testing.assert_allclose(found.information, expected, atol=1e-6)


def test_far_scores_stay_finite():
  found = terms(np.array([-800.0, 0.0, 800.0]), np.full(3, 0.02))
  assert all(np.isfinite(x).all() for x in found)
  np.testing.assert_allclose(found.value[[0, 2]], [-np.log(0.02), -np.log(0.98)])


def test_weights_have_the_largest_exponent_that_leaves_enough_pairs():
  rng = np.random.default_rng(3)
  for spread in (0.1, 1.0, 4.0):
    log_weight = spread * rng.normal(size=200)
    weight, exponent = tempered_weights(log_weight, 0.3)

    def share(m, log_weight=log_weight):
      u = [np.exp(m * x) for x in log_weight]
      return sum(u) ** 2 / sum(x * x for x in u) / len(u)

    allowed = [m for m in np.linspace(0, 1, 2001) if share(m) >= 0.3]
    assert abs(exponent - max(allowed)) <= 1 / 2000
    expected = np.exp(exponent * log_weight)
    np.testing.assert_allclose(weight, expected / expected.mean(), rtol=1e-9)
    assert effective_size(weight) >= 0.3 * 200 - 1e-9


def test_relative_ratio_is_that_of_the_densities():
  p, q = np.array([0.5, 1e-3, 0.2]), np.array([0.1, 0.3, 0.2])
  np.testing.assert_allclose(
    np.exp(relative_ratio(np.log(p / q))), p / (0.1 * p + 0.9 * q), rtol=1e-12
  )
  assert relative_ratio(np.array([900.0]))[0] == pytest.approx(np.log(10))


def test_accuracy_counts_pairs_of_one_prompt():
  rng = np.random.default_rng(4)
  gold, score = rng.integers(0, 4, (6, 5)).astype(float), rng.integers(0, 3, (6, 5)).astype(float)
  right = []
  for p, (i, j) in itertools.product(range(6), itertools.combinations(range(5), 2)):
    if gold[p, i] != gold[p, j]:
      better, worse = (i, j) if gold[p, i] > gold[p, j] else (j, i)
      gap = score[p, better] - score[p, worse]
      right.append(1.0 if gap > 0 else 0.5 if gap == 0 else 0.0)
  assert table.pair_accuracy(score, gold) == pytest.approx(np.mean(right))


def stored_rows(seed=0, width=3):
  """A file in the format of lab/offline.py with random numbers: 6 old pairs, 130 fresh prompts, 4
  scored prompts.
  """
  rng = np.random.default_rng(seed)
  counts = {"old": 12, "old_other": 6, "fresh": 260, "fresh_other": 130, "scored": 32}
  stored = {"phi": rng.normal(size=width), "old/a_wins": rng.uniform(size=6) < 0.5}
  for name, count in counts.items():
    for state in ("rte", "flat", "attended", "weighted", "shuffled", "live", "counts"):
      stored[f"{name}/{state}"] = rng.normal(size=(count, width)).astype(np.float32)
    stored[f"{name}/gold"] = rng.integers(0, 5, count).astype(np.float32)
    stored[f"{name}/log_ratio"] = rng.normal(size=count).astype(np.float32)
    stored[f"{name}/frozen"] = stored[f"{name}/rte"] @ stored["phi"].astype(np.float32)
  return stored


def test_without_evidence_the_head_is_the_frozen_reward():
  stored = stored_rows()
  stored["old/flat"][:, 1] = 2.0  # constant
  s = table.sets_of(stored, "flat", 0, 4.0)
  head = fit_head(Evidence(np.zeros((0, 6)), np.zeros(0), np.zeros(0)), s.prior_mean, 1.0).mean
  for name in ("old", "scored"):
    np.testing.assert_allclose(s.x[name] @ head, stored[f"{name}/frozen"], atol=1e-5)
  np.testing.assert_array_equal(s.x["scored"][:, 4], 0)
  np.testing.assert_allclose(np.delete(s.x["old"], 4, 1).std(0), 1)


def test_each_sort_of_evidence_has_the_pairs_that_it_says():
  stored = stored_rows(1)
  s = table.sets_of(stored, "live", 3, 2.0)
  x, wins = s.x, stored["old/a_wins"]
  better = [2 * i if wins[i] else 2 * i + 1 for i in range(6)]
  worse = [2 * i + 1 if wins[i] else 2 * i for i in range(6)]
  np.testing.assert_allclose(
    table.old(s).dx, [x["old"][a] - x["old"][b] for a, b in zip(better, worse)]
  )
  other = [x["old"][better[i]] - x["old_other"][i] for i in range(6)]
  np.testing.assert_allclose(table.offline(s).dx, other)
  fresh = [x["fresh"][2 * i] - x["fresh_other"][i] for i in range(130)]
  np.testing.assert_allclose(table.contrast(s).dx, fresh)
  same = [x["fresh"][2 * i] - x["fresh"][2 * i + 1] for i in range(130)]
  np.testing.assert_allclose(table.contrast_same(s).dx, same)
  gold = stored["fresh/gold"]
  for budget, count in (("0.5%", 32), ("1%", 64), ("2%", 128)):
    given, guessed = (table.bought(budget, guess)(s) for guess in (False, True))
    assert len(given.dx) == count
    for i in range(count):
      sign = 1 if gold[2 * i] > gold[2 * i + 1] else -1
      if gold[2 * i] == gold[2 * i + 1]:
        assert given.weight[i] == 0
      else:
        np.testing.assert_allclose(given.dx[i], sign * (x["fresh"][2 * i] - x["fresh"][2 * i + 1]))
    np.testing.assert_allclose(np.abs(guessed.dx), np.abs(given.dx))
    assert 0.2 < (guessed.dx == given.dx).all(1).mean() < 0.8
  permuted, weighted = table.old_permuted(s).weight, table.old_weighted(s).weight
  assert sorted(permuted) == sorted(weighted) and (permuted != weighted).any()
  assert all(set(parts) for parts in table.EVIDENCE.values())


def sequences(rng, rows, prompts=None):
  notes = goldtask.prompts(5, 9, 0, rows) if prompts is None else prompts
  lengths = rng.integers(1, 8, rows)
  mask = np.arange(8) < lengths[:, None]
  response = np.where(mask, rng.integers(4, 64, (rows, 8)), goldtask.PAD)
  response[np.arange(rows), lengths - 1] = goldtask.EOS
  tokens = np.concatenate([notes.tokens, response], 1).astype(np.int32)
  return Sequences(tokens, np.concatenate([notes.mask, mask], 1), mask, np.ones(rows, bool))


def test_a_mismatched_row_has_its_prompt_and_the_response_to_the_next():
  rows = sequences(np.random.default_rng(6), 5)
  other = offline.mismatched(rows)
  for i in range(5):
    j = (i + 1) % 5
    np.testing.assert_array_equal(other.tokens[i], [*rows.tokens[i, :14], *rows.tokens[j, 14:]])
    np.testing.assert_array_equal(other.token_mask[i], rows.token_mask[j])
    np.testing.assert_array_equal(other.response_mask[i], rows.response_mask[j])
  # an answer to another note has few of this note's facts
  assert goldtask.gold(other).gold.shape == (5,)


def test_stored_pairs_are_rows():
  rows = sequences(np.random.default_rng(7), 8)
  shape = (4, 2, rows.tokens.shape[1])
  stored = {"tokens": rows.tokens.reshape(shape), "mask": rows.token_mask.reshape(shape)}
  back = offline.rows_of(stored)
  for name in ("tokens", "token_mask", "response_mask", "has_eos"):
    np.testing.assert_array_equal(getattr(back, name), getattr(rows, name))


def test_attention_is_that_of_the_reward_head_and_reads_the_log_ratios():
  rng = np.random.default_rng(8)
  head = RewardHead(6, 5, 4, rngs=nnx.Rngs(0))
  rte, h = rng.normal(size=(3, 5)).astype(np.float32), rng.normal(size=(3, 7, 6)).astype(np.float32)
  shown = np.arange(7) < np.array([[7], [2], [4]])
  logits = np.asarray(offline.attention_logits(nnx.state(head), jnp.asarray(rte), jnp.asarray(h)))
  weights = head.attention_weights(jnp.asarray(rte), jnp.asarray(h), jnp.asarray(shown))[:, 0]
  plain = offline.attended(jnp.asarray(h), jnp.asarray(logits), jnp.asarray(shown))
  np.testing.assert_allclose(plain, np.einsum("bt,btd->bd", weights, h), atol=1e-5)
  live = rng.normal(size=(3, 7)).astype(np.float32)
  moved = offline.attended(jnp.asarray(h), jnp.asarray(logits + live), jnp.asarray(shown))
  for b in range(3):
    n = int(shown[b].sum())
    a = [np.exp(float(logits[b, s] + live[b, s])) for s in range(n)]
    expected = sum(a[s] * h[b, s].astype(float) for s in range(n)) / sum(a)
    np.testing.assert_allclose(moved[b], expected, atol=1e-5)


def test_rows_are_read_in_parts_of_one_shape(monkeypatch):
  monkeypatch.setattr(offline, "ROWS", 4)
  rows, shapes = sequences(np.random.default_rng(9), 10), []

  def read(part):
    shapes.append(part.tokens.shape)
    return {"sum": jnp.asarray(part.tokens.sum(1))}

  found = offline.read_all(read, rows)
  np.testing.assert_array_equal(found["sum"], rows.tokens.sum(1))
  assert shapes == [(4, rows.tokens.shape[1])] * 3


def test_a_policy_is_read_as_it_was_saved(tmp_path):
  policy = {"a": jnp.arange(6.0).reshape(2, 3), "b": {"c": jnp.float32(2.5)}}
  offline.save_policy(tmp_path / "p.npz", policy, step=3, kl=0.75)
  like = jax.tree.map(jnp.zeros_like, policy)
  back, facts = offline.load_policy(tmp_path / "p.npz", like)
  jax.tree.map(np.testing.assert_array_equal, back, policy)
  assert facts == {"step": 3.0, "kl": 0.75}


def test_widths_are_chosen_by_held_out_accuracy_and_the_smaller_on_a_tie():
  found = {"rte": {0.03: 0.6, 0.1: 0.7, 0.3: 0.7}, "flat": {0.03: 0.5, 0.1: 0.5, 0.3: 0.6}}
  assert table.chosen_taus(found) == {"rte": 0.1, "flat": 0.3}


# ---- the page ----


@pytest.fixture(scope="module")
def columns():
  return offline_page.read(DOCS / "holds.parquet")


def test_the_page_has_the_tables_that_its_rows_give(columns):
  page = (DOCS / "holds.md").read_text(encoding="utf-8")
  tables = [offline_page.facts(columns)]
  tables += [offline_page.against_frozen(columns, kl) for kl in offline.TARGETS]
  tables += [offline_page.pieces(columns, 4.0), offline_page.states(columns, 4.0)]
  tables += [make(columns) for make in (offline_page.levels, offline_page.added, offline_page.wide)]
  for printed in tables:
    assert printed in page


def test_a_cell_is_the_mean_of_the_differences_of_its_seeds(columns):
  """By a loop over the rows. Student's interval is compared with the bootstrap's."""
  value = {
    tuple(columns[name][i] for name in ("seed", "kl", "features", "evidence")): columns["value"][i]
    for i in range(len(columns["seed"]))
    if columns["measure"][i] == "accuracy"
  }
  for kl, features, evidence in ((4.0, "rte", "contrast"), (0.5, "words", "2%")):
    gaps = [
      float(value[seed, kl, features, evidence]) - float(value[seed, kl, "frozen", ""])
      for seed in range(100)
      if (seed, kl, "frozen", "") in value
    ]
    found = table.difference(columns, kl, (features, evidence), ("frozen", ""))
    assert found.count == len(gaps) and found.value == pytest.approx(np.mean(gaps))
    half = 2.2 * np.std(gaps, ddof=1) / np.sqrt(len(gaps))
    assert (found.high - found.low) / 2 == pytest.approx(half, rel=0.25)


# ---- samples ----


@pytest.mark.long
def test_a_killed_run_leaves_the_rows_of_an_unbroken_one(tmp_path, monkeypatch):
  config = offline.settings(quickstart.get_config("test"))
  config.steps, config.policy.lr, config.log.checkpoint_every = 6, 3e-3, 2
  # no seed passes the last limit: all steps are run
  targets, whole, broken = (0.001, 0.2, 100.0), tmp_path / "whole", tmp_path / "broken"
  monkeypatch.setattr(offline, "FRESH_PROMPTS", 8)
  monkeypatch.setattr(offline, "SCORED_PROMPTS", 4)
  monkeypatch.setattr(offline, "ROWS", 64)
  offline.sample_all(config, [0, 1], targets, whole)
  names = sorted(path.name for path in (whole / "rows").iterdir())
  assert "seed_0_kl_0.001.npz" in names

  measured = offline.keeping

  def dies(run, seeds, targets, workdir):
    steps = measured(run, seeds, targets, workdir)

    def of(state):
      made = steps(state)

      def measure(t, *rest):
        if t == 3:
          raise KeyboardInterrupt
        return made.measure(t, *rest)

      return made._replace(measure=measure)

    return of

  with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
    patch.setattr(offline, "keeping", dies)
    offline.sample_all(config, [0, 1], targets, broken)
  offline.sample_all(config, [0, 1], targets, broken)
  assert sorted(path.name for path in (broken / "rows").iterdir()) == names
  for name in names:
    one, other = (offline.load_arrays(folder / "rows" / name) for folder in (whole, broken))
    assert one.keys() == other.keys()
    for key in one:
      np.testing.assert_array_equal(one[key], other[key], err_msg=f"{name}: {key}")
