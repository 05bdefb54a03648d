"""Storage in bfloat16: rounding against float64 sums, moments against optax in float32."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from ml_collections import ConfigDict

from r2m_jax.algorithm.optim import (
  apply_updates,
  descend,
  keep_moments,
  make_optimizer,
  round_at_random,
)
from r2m_jax.knobs import make_config, optimizer
from r2m_jax.parallel.sharding import make_mesh

ROUND = jax.jit(jax.vmap(round_at_random, (None, 0)))


def section(**changes):
  config = make_config(optimizer(lr=1e-3))
  return ConfigDict(config.to_dict() | changes)


def test_rounding_takes_a_neighbour_and_is_right_on_average():
  rng = np.random.default_rng(0)
  x = jnp.asarray(rng.normal(size=(64, 3)) * 10.0 ** rng.integers(-6, 6, (64, 3)), jnp.float32)
  found = np.asarray(ROUND(x, jnp.arange(4096, dtype=jnp.uint32)), np.float64)
  exact = np.asarray(x, np.float64)
  low = np.asarray(
    jax.lax.bitcast_convert_type(
      jax.lax.bitcast_convert_type(x, jnp.uint32) & jnp.uint32(0xFFFF0000), jnp.float32
    ),
    np.float64,
  )
  step = 2.0 ** (np.floor(np.log2(np.abs(low))) - 7) * np.sign(exact)
  assert (
    np.isclose(found, low, rtol=0, atol=0) | np.isclose(found, low + step, rtol=1e-12, atol=0)
  ).all()
  assert (found.min(0) < found.max(0)).all()
  share = (exact - low) / step  # the share of times that it must be rounded away from zero
  error = np.abs((found != low).mean(0) - share)
  assert (error < 5 * np.sqrt(share * (1 - share) / 4096) + 2**-16).all(), error.max()


def test_rounding_leaves_what_bfloat16_has_and_what_is_not_finite():
  x = jnp.asarray([0.0, 1.0, -1.5, 2.0**-100, jnp.inf, -jnp.inf, jnp.nan, 3.0e38], jnp.float32)
  x = x.astype(jnp.bfloat16).astype(jnp.float32)
  found = ROUND(x, jnp.arange(100, dtype=jnp.uint32))
  assert found.dtype == jnp.bfloat16
  np.testing.assert_array_equal(found.astype(jnp.float32), np.broadcast_to(x, found.shape))


def test_rounding_errors_of_places_and_updates_are_unrelated():
  x = jnp.full((64, 64), 1 + 2**-8, jnp.float32)  # half way
  up = np.asarray(ROUND(x, jnp.arange(64, dtype=jnp.uint32)) > 1, float).reshape(64, -1)
  assert (
    np.abs(np.corrcoef(up)[np.triu_indices(64, 1)]).max() < 6 / 64
  )  # between updates, 4096 places each
  assert (
    np.abs(np.corrcoef(up.T[:128])[np.triu_indices(128, 1)]).max() < 6 / 8
  )  # between places, 64 updates each
  runs = up[:, 1:] == up[:, :-1]
  assert abs(runs.mean() - 0.5) < 5 * 0.5 / np.sqrt(runs.size)


@pytest.mark.skipif(jax.device_count() < 8, reason="needs eight devices")
def test_rounding_is_the_same_on_every_mesh():
  x = jnp.asarray(np.random.default_rng(0).normal(size=(16, 8)), jnp.float32)
  one = jax.jit(round_at_random)(x, jnp.uint32(7))
  split = jax.device_put(x, NamedSharding(make_mesh((1, 4, 2)), P("fsdp", "tensor")))
  np.testing.assert_array_equal(jax.jit(round_at_random)(split, jnp.uint32(7)), one)


def test_small_updates_of_bfloat16_parameters_are_not_lost():
  """1,000 steps of 1e-6 each on weights near 0.02, where neighbouring numbers differ by 6e-5 or
  1.2e-4.
  """
  start = jnp.asarray(np.random.default_rng(0).uniform(0.016, 0.03, 4096), jnp.bfloat16)
  tx = make_optimizer(section(optimizer="sgd", lr=1e-6, max_grad_norm=0.0), 1000)

  def loss(p):
    return (p.astype(jnp.float32).sum(), None)

  def update(carry, _):
    params, opt, nearest = carry
    params, opt, *_ = descend(tx, loss, params, opt)
    return (params, opt, (nearest.astype(jnp.float32) - 1e-6).astype(jnp.bfloat16)), None

  (params, _, nearest), _ = jax.jit(lambda c: jax.lax.scan(update, c, None, 1000))(
    (start, tx.init(start), start)
  )
  assert params.dtype == jnp.bfloat16
  moved = np.asarray(params, np.float64) - np.asarray(start, np.float64)
  spread = np.sqrt(
    1000 * 1e-6 * 1.3e-4 / 4096
  )  # of the mean: each step is a coin of weight 1e-6 / spacing
  assert abs(moved.mean() + 1e-3) < 5 * spread
  np.testing.assert_array_equal(nearest, start)  # the result of rounding to the nearest


def adam(moment_dtype, params, steps, noise=0.3):
  """Parameters and state after `steps` of Adam on a noisy quadratic, the same gradients for all."""
  tx = make_optimizer(
    section(moment_dtype=moment_dtype, b2=0.999, adam_eps=1e-8, max_grad_norm=0.0), steps
  )

  def update(carry, key):
    params, opt = carry
    grads = params - 1 + noise * jax.random.normal(key, params.shape)
    updates, new = tx.update(grads, opt, params)
    return (apply_updates(params, updates, opt.count), new), None

  keys = jax.random.split(jax.random.key(0), steps)
  return jax.jit(lambda c: jax.lax.scan(update, c, keys))((params, tx.init(params)))[0]


def test_bfloat16_moments_follow_float32_ones():
  """With b2 = 0.999 a step changes the second moment by a thousandth, which is a quarter of the
  resolution of bfloat16.
  """
  params = jnp.zeros(2048)
  (exact, state), (low, low_state) = adam("float32", params, 1500), adam("bfloat16", params, 1500)

  def size(tree):
    return sum(x.nbytes for x in jax.tree.leaves(tree) if x.ndim)

  assert size(low_state) == size(state) / 2
  nu, low_nu = (np.asarray(s.inner[0].nu, np.float64) for s in (state, low_state))
  assert abs(low_nu.mean() / nu.mean() - 1) < 0.01
  assert abs(low.mean() - exact.mean()) < 0.01 * abs(exact.mean())
  # rounding to the nearest stops short: half the spacing is 2**-9 of a moment, and its changes are
  # below
  nearest = jnp.bfloat16(0.0)
  for _ in range(1500):
    nearest = (0.999 * nearest.astype(jnp.float32) + 0.001).astype(jnp.bfloat16)
  assert nearest < 0.7 < 1 - 0.999**1500


def test_float32_moments_are_those_of_optax():
  """In float32 they are equal bit for bit. The moments and updates of bfloat16 parameters equal
  those in float32.
  """
  rng = np.random.default_rng(0)
  params, grads = (
    jnp.asarray(rng.normal(size=(8, 4)), jnp.float32).astype(jnp.bfloat16) for _ in range(2)
  )
  plain = optax.adamw(1e-3, b1=0.9, b2=0.99, eps=1e-5, weight_decay=0.01)

  def wide(x):
    return x.astype(jnp.float32)

  want, want_state = plain.update(wide(grads), plain.init(wide(params)), wide(params))
  for cast in (lambda x: x, wide):
    tx = keep_moments(plain, jnp.dtype("float32"))
    got, state = tx.update(cast(grads), tx.init(cast(params)), cast(params))
    np.testing.assert_array_equal(got, want)
    for found, expected in zip(jax.tree.leaves(state.inner), jax.tree.leaves(want_state)):
      assert found.dtype == expected.dtype
      np.testing.assert_array_equal(found, expected)
