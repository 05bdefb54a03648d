"""Losses against NumPy loops, finite differences, and a policy so small that all its sequences can
be enumerated.
"""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import oracles
import pytest

from r2m_jax import ops
from r2m_jax.algorithm import advantages, losses
from r2m_jax.models.logprobs import token_stats

pytestmark = pytest.mark.numerics

EPS = 1e-4  # inside the root of eq. 6
ROOT_EPS = EPS**0.5


@pytest.fixture(autouse=True)
def float64():
  with jax.enable_x64(True):
    yield


def batch(seed=0, rows=4, columns=6):
  """new and old log-probabilities, advantages, each [B, T], and a ragged mask. Ratios lie on both
  sides of the clip range.
  """
  rng = np.random.default_rng(seed)
  old = -rng.exponential(size=(rows, columns))
  new = old + rng.normal(size=old.shape) * 0.4
  adv = rng.normal(size=old.shape)
  mask = (
    np.arange(columns) < np.array([columns, 1, 0, 3])[:rows, None]
  )  # a full row, a single token, an empty row
  return new, old, adv, mask


def clip(new, old, adv, mask, how="sequence_sum"):
  return losses.ppo_clip(new, old, adv, mask, clip_eps=0.2, aggregation=how)


clip_grad = jax.jit(jax.grad(lambda *args: clip(*args)[0]))
gre_and_grad = jax.jit(
  jax.value_and_grad(lambda rewards: losses.group_reward_entropy(rewards, eps=EPS))
)
bt_grad = jax.jit(
  jax.grad(lambda rewards, notes: losses.grebt(rewards, notes, alpha=0.0, eps=EPS)[0])
)
bt_and_grads = jax.jit(jax.value_and_grad(losses.bradley_terry, argnums=(0, 1)))


@jax.jit
def grebt_and_grads(rewards, annotations):
  """(loss, metrics), gradients of the loss to both arguments."""

  def loss(r, a):
    return losses.grebt(r, a, alpha=0.3, eps=EPS)

  return jax.value_and_grad(loss, argnums=(0, 1), has_aux=True)(rewards, annotations)


def groups(seed=0, shape=(5, 4)):
  rng = np.random.default_rng(seed)
  return rng.normal(size=shape), rng.normal(size=shape)


# ---- the clipped objective ----


@pytest.mark.parametrize("how", ops.AGGREGATIONS)
def test_ppo_clip_matches_loop(how):
  args = batch()
  loss, metrics = jax.jit(clip, static_argnums=4)(*args, how)
  value, clipped, deviation, kl = oracles.ppo_clip_loop(*args, 0.2, how)
  np.testing.assert_allclose(loss, value, rtol=1e-12)
  np.testing.assert_allclose(metrics["policy/clip_fraction"], clipped, rtol=1e-12)
  np.testing.assert_allclose(metrics["policy/ratio_deviation"], deviation, rtol=1e-12)
  np.testing.assert_allclose(metrics["policy/approx_kl"], kl, rtol=1e-12)
  assert 0 < clipped < 1


def test_ppo_clip_gradient_matches_finite_differences():
  new, old, adv, mask = batch()
  numeric = oracles.central_difference(
    lambda x: oracles.ppo_clip_loop(x, old, adv, mask, 0.2, "sequence_sum")[0], new
  )
  np.testing.assert_allclose(clip_grad(new, old, adv, mask), numeric, atol=1e-9)


def test_ppo_clip_gradient_at_ratio_one_is_minus_the_advantage():
  """Every first minibatch has this ratio, at which the textbook form min(rho A, clip(rho) A) has a
  tie.
  """
  _, old, adv, _ = batch()
  adv[0, 0] = 0.0
  mask = np.ones(old.shape, bool)
  assert (adv > 0).any() and (adv < 0).any()
  np.testing.assert_array_equal(
    clip_grad(old, old, adv, mask) * len(old), -adv
  )  # 4 rows: the mean is exact

  loss = jax.jit(lambda *args: clip(*args)[0])
  for i in [
    (0, 0),
    tuple(np.argwhere(adv > 0)[0]),
    tuple(np.argwhere(adv < 0)[0]),
  ]:  # one-sided, both sides
    for step in (1e-6, -1e-6):
      moved = old.copy()
      moved[i] += step
      slope = (float(loss(moved, old, adv, mask)) - float(loss(old, old, adv, mask))) / step
      np.testing.assert_allclose(slope * len(old), -adv[i], atol=1e-5)


def test_ppo_clip_gradient_is_zero_where_clipped_and_only_there():
  old = np.full((1, 4), -1.0)
  new = old + np.log([[1.3, 1.3, 0.7, 0.7]])
  adv = np.array([[2.0, -2.0, 2.0, -2.0]])
  grad = clip_grad(new, old, adv, np.ones(old.shape, bool))
  np.testing.assert_allclose(grad, [[0.0, 2.0 * 1.3, -2.0 * 0.7, 0.0]], rtol=1e-12)
  assert grad[0, 0] == 0 and grad[0, 3] == 0


@pytest.mark.parametrize("how", ops.AGGREGATIONS)
def test_ppo_clip_never_reads_masked_tokens(how):
  new, old, adv, mask = batch()
  run = jax.jit(jax.value_and_grad(lambda *args: clip(*args, how), has_aux=True, argnums=(0, 1, 2)))
  (loss, metrics), grads = run(new, old, adv, mask)
  for garbage in (np.nan, np.inf, -np.inf, 1e300):
    dirty = [np.where(mask, x, garbage) for x in (new, old, adv)]
    (dirty_loss, dirty_metrics), dirty_grads = run(*dirty, mask)
    np.testing.assert_array_equal(dirty_loss, loss)
    jax.tree.map(np.testing.assert_array_equal, dirty_metrics, metrics)
    np.testing.assert_array_equal(dirty_grads[0], grads[0])
    assert not dirty_grads[0][~mask].any()


# ---- per-token KL ----


def test_kl_terms_match_hand_worked_numbers():
  new, ref = np.log([[0.5, 0.2]]), np.log([[0.25, 0.2]])
  np.testing.assert_allclose(
    losses.kl_k2(new, ref), [[0.5 * np.log(2.0) ** 2, 0.0]], rtol=1e-12, atol=1e-15
  )
  np.testing.assert_allclose(
    losses.kl_k3(new, ref), [[0.5 - 1 + np.log(2.0), 0.0]], rtol=1e-12, atol=1e-15
  )


@pytest.mark.parametrize("kl", [losses.kl_k2, losses.kl_k3])
def test_kl_terms_give_masked_tokens_no_gradient(kl):
  new, old, _, mask = batch()
  grad = jax.jit(jax.grad(lambda x: ops.aggregate(kl(x, old), mask, "sequence_sum")))(new)
  assert not grad[~mask].any() and grad[mask].all()


# ---- a policy whose sequences can all be enumerated ----

VOCAB, LENGTH, TAU = 5, 2, 0.7
SEQUENCES = np.array(list(itertools.product(range(VOCAB), repeat=LENGTH)))  # all 25
ALL = np.ones(SEQUENCES.shape, bool)


def tables():
  """Logits of policy and reference. Row 0 is for the first token, row 1 + a for the second token
  after token a.
  """
  rng = np.random.default_rng(3)
  return rng.normal(size=(1 + VOCAB, VOCAB)), rng.normal(size=(1 + VOCAB, VOCAB))


def log_probs(table):
  """Float64[25, 2] of each token of each sequence, in NumPy."""
  logp = table / TAU - np.log(np.exp(table / TAU).sum(-1, keepdims=True))
  return np.array([[logp[0, a], logp[1 + a, b]] for a, b in SEQUENCES])


def sequence_kl(table, other):
  """KL over whole sequences."""
  mine, theirs = log_probs(table).sum(1), log_probs(other).sum(1)
  return sum(np.exp(m) * (m - o) for m, o in zip(mine, theirs))


def token_kl(table, other, visits):
  """Sum over prefixes of the probability of the prefix times KL(`table` || `other`) of the next
  token.
  """
  total = 0.0
  for row in range(1 + VOCAB):
    p, q = (np.exp(t[row] / TAU) / np.exp(t[row] / TAU).sum() for t in (table, other))
    total += visits[row] * sum(p[v] * np.log(p[v] / q[v]) for v in range(VOCAB))
  return total


def visits(table):
  """The probability that each row of the table is used: 1 for row 0, p(a) for row 1 + a."""
  return np.concatenate([[1.0], np.exp(table[0] / TAU) / np.exp(table[0] / TAU).sum()])


def stats(table, reference):
  """The library's numbers for all 25 sequences."""
  at = np.stack([np.zeros(len(SEQUENCES), int), 1 + SEQUENCES[:, 0]], 1)

  def own(x):
    return x

  return token_stats(
    own, jnp.asarray(table)[at], SEQUENCES, temperature=TAU, ref=(own, jnp.asarray(reference)[at])
  )


def expected(per_token, probabilities):
  """Expectation over sequences of the sum over tokens, computed as in the step: the mean over 25
  weighted rows.
  """
  return ops.aggregate(per_token * (len(SEQUENCES) * probabilities)[:, None], ALL, "sequence_sum")


def test_policy_gradient_is_that_of_the_expected_return():
  table, reference = tables()
  returns = np.random.default_rng(4).normal(size=len(SEQUENCES))
  p = np.exp(log_probs(table).sum(1))

  @jax.jit
  @jax.grad
  def gradient(table):
    new = stats(table, reference).logprobs  # old and new in one program, as in the step
    adv = jnp.broadcast_to((len(SEQUENCES) * p * returns)[:, None], ALL.shape)
    return clip(new, jax.lax.stop_gradient(new), adv, ALL)[0]

  exact = oracles.central_difference(
    lambda t: -(np.exp(log_probs(t).sum(1)) * returns).sum(), table
  )
  np.testing.assert_allclose(gradient(table), exact, atol=1e-9)


def test_rloo_gradient_has_no_bias():
  """The average over all pairs of sequences that K = 2 samples can form."""
  table, reference = tables()
  returns = np.random.default_rng(4).normal(size=len(SEQUENCES))
  p = np.exp(log_probs(table).sum(1))
  pairs = np.array(list(itertools.product(range(len(SEQUENCES)), repeat=2)))
  rows, weights = pairs.reshape(-1), np.repeat(p[pairs[:, 0]] * p[pairs[:, 1]], 2) * len(pairs)
  mask = np.ones((len(rows), LENGTH), bool)

  @jax.jit
  @jax.grad
  def gradient(table):
    new = stats(table, reference).logprobs[rows]
    adv = advantages.per_token(advantages.rloo(jnp.asarray(returns[rows]), 2) * weights, mask)
    return clip(new, jax.lax.stop_gradient(new), adv, mask)[0]

  exact = oracles.central_difference(
    lambda t: -(np.exp(log_probs(t).sum(1)) * returns).sum(), table
  )
  np.testing.assert_allclose(gradient(table), exact, atol=1e-9)


def test_exact_kl_and_its_gradient_match_the_enumeration():
  table, reference = tables()

  def value(
    table,
  ):  # probabilities depend on the table: the whole gradient, with that of visited prefixes
    out = stats(table, reference)
    return expected(out.kl, jnp.exp(out.logprobs.sum(-1)))

  kl, gradient = jax.jit(jax.value_and_grad(value))(table)
  np.testing.assert_allclose(kl, sequence_kl(table, reference), rtol=1e-12)
  numeric = oracles.central_difference(lambda t: sequence_kl(t, reference), table)
  np.testing.assert_allclose(gradient, numeric, atol=1e-9)


def test_entropy_and_its_gradient_match_the_enumeration():
  table, reference = tables()

  def value(table):
    out = stats(table, reference)
    return expected(out.entropy, jnp.exp(out.logprobs.sum(-1)))

  def exact(table):
    logp = log_probs(table).sum(1)
    return -sum(np.exp(x) * x for x in logp)

  entropy, gradient = jax.jit(jax.value_and_grad(value))(table)
  np.testing.assert_allclose(entropy, exact(table), rtol=1e-12)
  np.testing.assert_allclose(gradient, oracles.central_difference(exact, table), atol=1e-9)


def kl_gradients(estimator):
  """On-policy gradients of an estimator as a loss: per token, and on the log-probability of
  sequences.
  """
  table, reference = tables()
  p, ref = np.exp(log_probs(table).sum(1)), log_probs(reference)

  def by_token(table):
    return expected(estimator(stats(table, reference).logprobs, ref), p)

  def by_sequence(table):
    new = stats(table, reference).logprobs.sum(-1, keepdims=True)
    return ops.aggregate(
      estimator(new, ref.sum(-1, keepdims=True)) * (len(p) * p)[:, None], ALL[:, :1], "sequence_sum"
    )

  return jax.jit(lambda table: (jax.grad(by_token)(table), jax.grad(by_sequence)(table)))(table)


def test_gradient_of_k2_is_that_of_kl_to_the_reference():
  table, reference = tables()
  by_token, by_sequence = kl_gradients(losses.kl_k2)
  at = visits(
    table
  )  # a per-token loss has no gradient of the visits to prefixes, for k2 and for the exact KL
  numeric = oracles.central_difference(lambda t: token_kl(t, reference, at), table)
  np.testing.assert_allclose(by_token, numeric, atol=1e-9)
  p = np.exp(log_probs(table).sum(1))
  exact_estimator = jax.jit(jax.grad(lambda t: expected(stats(t, reference).kl, p)))(table)
  np.testing.assert_allclose(by_token, exact_estimator, atol=1e-12)
  numeric = oracles.central_difference(lambda t: sequence_kl(t, reference), table)
  np.testing.assert_allclose(by_sequence, numeric, atol=1e-9)


def test_gradient_of_k3_is_that_of_kl_from_the_reference():
  table, reference = tables()
  by_token, by_sequence = kl_gradients(losses.kl_k3)
  at = visits(table)
  numeric = oracles.central_difference(lambda t: token_kl(reference, t, at), table)
  np.testing.assert_allclose(by_token, numeric, atol=1e-9)
  numeric = oracles.central_difference(lambda t: sequence_kl(reference, t), table)
  np.testing.assert_allclose(by_sequence, numeric, atol=1e-9)


def test_k3_is_unbiased_and_never_negative():
  table, reference = tables()
  p, new, ref = np.exp(log_probs(table).sum(1)), log_probs(table), log_probs(reference)
  k3 = np.asarray(losses.kl_k3(new, ref))
  assert (k3 >= 0).all()
  np.testing.assert_allclose((k3.sum(1) * p).sum(), sequence_kl(table, reference), rtol=1e-12)


# ---- losses of the reward head ----


def test_bradley_terry_matches_loop_and_finite_differences():
  winner, loser = groups(shape=(6,))
  value, grads = bt_and_grads(winner, loser)
  np.testing.assert_allclose(value, oracles.bradley_terry_loop(winner, loser), rtol=1e-12)
  numeric = oracles.central_difference(lambda x: oracles.bradley_terry_loop(x, loser), winner)
  np.testing.assert_allclose(grads[0], numeric, atol=1e-9)
  np.testing.assert_allclose(grads[1], -numeric, atol=1e-9)


def test_bradley_terry_stays_finite_far_out():
  value, (grad, _) = bt_and_grads(np.array([1000.0, -1000.0] * 3), np.zeros(6))
  np.testing.assert_allclose(value, 500.0)  # pairs cost 0 and 1000
  np.testing.assert_allclose(grad, np.array([0.0, -1.0] * 3) / 6)


@pytest.mark.parametrize("group_size", [2, 8])
def test_gre_matches_loop_and_finite_differences(group_size):
  rewards, _ = groups(shape=(3, group_size))
  rewards *= np.array([[1e-2], [1.0], [30.0]])  # spreads below, near and above the root of eps
  value, grad = gre_and_grad(rewards)
  np.testing.assert_allclose(value, oracles.gre_loop(rewards, EPS), rtol=1e-12)
  numeric = oracles.central_difference(lambda r: oracles.gre_loop(r, EPS), rewards)
  np.testing.assert_allclose(grad, numeric, atol=1e-7)


def test_grebt_matches_loop_and_finite_differences():
  rewards, annotations = groups()
  (loss, metrics), (grad, to_annotations) = grebt_and_grads(rewards, annotations)
  value, bt, gre, right = oracles.grebt_loop(rewards, annotations, 0.3, EPS)
  for name, number in {
    "r2m/loss": value,
    "r2m/bt": bt,
    "r2m/gre": gre,
    "r2m/pair_accuracy": right,
  }.items():
    np.testing.assert_allclose(metrics[name], number, rtol=1e-12, err_msg=name)
  np.testing.assert_allclose(loss, value, rtol=1e-12)
  numeric = oracles.central_difference(
    lambda r: oracles.grebt_loop(r, annotations, 0.3, EPS)[0], rewards
  )
  np.testing.assert_allclose(grad, numeric, atol=1e-8)
  assert not to_annotations.any()  # they choose the pair and have no gradient
  assert 0 < right < 1


def test_only_trusted_pairs_are_learnt_from():
  """Against loops over the groups; an untrusted pair has no gradient by Bradley-Terry."""
  rewards, annotations = groups(shape=(40, 4))
  frozen = annotations + np.random.default_rng(1).normal(size=annotations.shape)
  with jax.enable_x64(True):
    trusted = np.asarray(
      losses.trusted_pairs(
        jnp.asarray(annotations), jnp.asarray(frozen), confidence=0.8, temperature=1.5
      )
    )
  wanted, terms = [], []
  for reward, notes, first in zip(rewards, annotations, frozen):
    w, l = (pick(range(4), key=lambda k: notes[k]) for pick in (max, min))
    sure = 1 / (1 + np.exp(-(notes[w] - notes[l]) / 1.5)) > 0.8
    wanted.append(float(sure and first[w] > first[l]))
    terms.append(np.log1p(np.exp(reward[l] - reward[w])))
  np.testing.assert_array_equal(trusted, wanted)
  assert 5 < trusted.sum() < 35

  def bt(rewards, trusted):
    loss, metrics = losses.grebt(rewards, annotations, alpha=0.0, eps=EPS, trusted=trusted)
    return loss, metrics["r2m/trusted"]

  with jax.enable_x64(True):
    (loss, share), grad = jax.value_and_grad(bt, has_aux=True)(rewards, trusted)
    nothing = jax.grad(bt, has_aux=True)(rewards, np.zeros(40))[0]
  np.testing.assert_allclose(loss, np.dot(terms, wanted) / sum(wanted), rtol=1e-12)
  assert share == np.mean(wanted) and not np.asarray(nothing).any()
  np.testing.assert_array_equal(np.abs(grad).any(1), np.array(wanted, bool))


@pytest.mark.parametrize("alpha, index", [(0.0, 1), (1.0, 2)])
def test_grebt_ends(alpha, index):
  """alpha = 0 is only Bradley-Terry, and alpha = 1 is only the entropy."""
  rewards, annotations = groups()
  loss, _ = jax.jit(lambda *args: losses.grebt(*args, alpha=alpha, eps=EPS))(rewards, annotations)
  np.testing.assert_allclose(
    loss, oracles.grebt_loop(rewards, annotations, alpha, EPS)[index], rtol=1e-12
  )


def test_the_annotations_choose_the_pair_even_against_the_rewards():
  rewards, annotations = (
    np.tile([3.0, 1.0, 2.0, 2.0], (5, 1)),
    np.tile([0.0, 9.0, 5.0, 5.0], (5, 1)),
  )
  (_, metrics), _ = grebt_and_grads(rewards, annotations)
  np.testing.assert_allclose(
    metrics["r2m/bt"], np.log1p(np.exp(2.0)), rtol=1e-12
  )  # winner: the 1, loser: the 3
  assert metrics["r2m/pair_accuracy"] == 0
  slope = 1 / (1 + np.exp(-2.0)) / 5
  np.testing.assert_allclose(
    bt_grad(rewards, annotations), np.tile([slope, -slope, 0, 0], (5, 1)), rtol=1e-12
  )


@pytest.mark.parametrize(
  "group_size, dtype", [(2, np.float32), (5, np.float32), (9, np.float32), (8, np.float64)]
)
def test_gre_of_equal_rewards_has_gradient_zero(group_size, dtype):
  """If only std were used, the gradient would be NaN in every parameter of the head. If only eps
  were used, it could be rounding noise, from which Adam makes steps of full size: in float32 the
  mean of 5 or 9 equal numbers is not always that number.
  """
  rewards = np.repeat(np.random.default_rng(0).normal(size=(256, 1)) * 1e4, group_size, 1).astype(
    dtype
  )
  value, grad = gre_and_grad(rewards)
  np.testing.assert_array_equal(grad, np.zeros_like(rewards))
  np.testing.assert_allclose(value, np.log(group_size), rtol=1e-5)


def test_one_tied_group_leaves_the_others_alone():
  rewards, _ = groups()
  before = np.array(gre_and_grad(rewards)[1])
  rewards[1], before[1] = 0.7, 0.0
  np.testing.assert_array_equal(gre_and_grad(rewards)[1], before)


def test_grebt_of_equal_annotations_and_rewards_has_gradient_zero():
  tied = np.full((5, 4), 0.3)
  (loss, metrics), grads = grebt_and_grads(tied, tied)
  assert np.isfinite(loss) and metrics["r2m/pair_accuracy"] == 0.5
  for grad in grads:
    np.testing.assert_array_equal(grad, np.zeros_like(tied))


def test_equal_annotations_alone_switch_the_pair_off():
  rewards, _ = groups()
  (_, metrics), _ = grebt_and_grads(rewards, np.full_like(rewards, 0.3))
  np.testing.assert_allclose(metrics["r2m/bt"], np.log(2.0), rtol=1e-12)
  np.testing.assert_array_equal(
    bt_grad(rewards, np.full_like(rewards, 0.3)), np.zeros_like(rewards)
  )


def test_gradient_near_a_tie_is_bounded_by_one_over_root_eps():
  rewards, _ = groups()
  largest = 0.0
  for scale in 10.0 ** np.arange(-300, 3, 0.5):
    grad = gre_and_grad(1.0 + rewards * scale)[1] * len(rewards)  # only of the group's own entropy
    assert np.isfinite(grad).all(), scale
    largest = max(largest, np.abs(grad).max())
  assert 0.05 / ROOT_EPS < largest < 1 / ROOT_EPS


def test_grebt_follows_a_permutation_of_samples_and_of_groups():
  rewards, annotations = groups()
  (loss, _), (grad, _) = grebt_and_grads(rewards, annotations)
  rng = np.random.default_rng(1)
  order = np.stack([rng.permutation(4) for _ in range(5)])[rng.permutation(5)]
  rows = rng.permutation(5)

  def pick(x):
    return np.take_along_axis(np.asarray(x)[rows], order, 1)

  (moved_loss, _), (moved_grad, _) = grebt_and_grads(pick(rewards), pick(annotations))
  np.testing.assert_allclose(moved_loss, loss, rtol=1e-12)
  np.testing.assert_allclose(moved_grad, pick(grad), rtol=1e-9, atol=1e-12)


def test_grebt_ignores_a_shift_of_a_groups_rewards():
  rewards, annotations = groups()
  (loss, _), (grad, _) = grebt_and_grads(rewards, annotations)
  shift = np.arange(5.0)[:, None] * 10
  (moved_loss, _), (moved_grad, _) = grebt_and_grads(rewards + shift, annotations - shift)
  np.testing.assert_allclose(moved_loss, loss, rtol=1e-10)
  np.testing.assert_allclose(moved_grad, grad, atol=1e-10)
  np.testing.assert_allclose(
    grad.sum(1), np.zeros(5), atol=1e-12
  )  # so a gradient cannot move a whole group


def test_float32_in_float32_out():
  new, old, adv, mask = batch()
  rewards, annotations = groups()
  run = jax.jit(lambda *xs: (clip(*xs[:3], mask), losses.grebt(*xs[3:], alpha=0.3, eps=EPS)))
  out = run(*(jnp.asarray(x, jnp.float32) for x in (new, old, adv, rewards, annotations)))
  for x in jax.tree.leaves(out):
    assert x.dtype == jnp.float32 and x.shape == ()
  np.testing.assert_allclose(
    out[0][0], oracles.ppo_clip_loop(new, old, adv, mask, 0.2, "sequence_sum")[0], rtol=1e-5
  )


def test_wrong_shapes_and_dtypes_are_refused():
  new, old, adv, mask = map(jnp.asarray, batch())
  with pytest.raises(TypeError, match=r"\[B T\].*\(24,\)"):
    clip(new.reshape(-1), old, adv, mask)
  with pytest.raises(TypeError, match="bool"):
    clip(new, old, adv, mask.astype(jnp.float32))
  with pytest.raises(TypeError, match=r"\[P K\].*\(4,\)"):
    losses.grebt(jnp.zeros(4), jnp.zeros(4), alpha=0.3, eps=EPS)
