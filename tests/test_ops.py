"""Array helpers against NumPy loops."""

import jax
import jax.numpy as jnp
import numpy as np
import oracles
import pytest

from r2m_jax import ops


def masked(seed=0):
  x = np.random.default_rng(seed).normal(size=(4, 5)) + 3
  return x, np.arange(5) < np.array([5, 2, 0, 1])[:, None]


@pytest.mark.parametrize("how", ops.AGGREGATIONS)
def test_aggregate_matches_loop(how):
  x, mask = masked()
  with jax.enable_x64(True):
    np.testing.assert_allclose(
      ops.aggregate(jnp.asarray(x), jnp.asarray(mask), how),
      oracles.aggregate_loop(x, mask, how),
      rtol=1e-12,
    )
    dirty = jnp.where(mask, x, jnp.nan)
    np.testing.assert_allclose(
      ops.aggregate(dirty, jnp.asarray(mask), how), oracles.aggregate_loop(x, mask, how), rtol=1e-12
    )


def test_aggregations_differ_by_hand():
  x, mask = (
    jnp.array([[1.0, 2.0, 3.0], [10.0, 99.0, 99.0]]),
    jnp.array([[True, True, True], [True, False, False]]),
  )
  found = {how: float(ops.aggregate(x, mask, how)) for how in ops.AGGREGATIONS}
  assert found == {
    "sequence_sum": 8.0,
    "sequence_mean": 6.0,
    "token_mean": 4.0,
    "constant": pytest.approx(16 / 6),
  }


def test_aggregate_refuses_an_unknown_name_and_wrong_arrays():
  x, mask = map(jnp.asarray, masked())
  with pytest.raises(ValueError, match="'mean'.*sequence_sum.*sequence_mean.*token_mean.*constant"):
    ops.aggregate(x, mask, "mean")
  with pytest.raises(TypeError, match="bool"):
    ops.aggregate(x, mask.astype(jnp.int32), "token_mean")
  with pytest.raises(TypeError, match=r"\[B T\]"):
    ops.aggregate(x[0], mask[0], "token_mean")


def test_masked_sum_and_mean():
  x, mask = masked()
  dirty = jnp.where(mask, x, jnp.inf)
  np.testing.assert_allclose(ops.masked_sum(dirty, mask), x[mask].sum(), rtol=1e-6)
  np.testing.assert_allclose(ops.masked_mean(dirty, mask), x[mask].mean(), rtol=1e-6)
  rows = [x[0].mean(), x[1, :2].mean(), 0.0, x[3, 0]]  # nothing kept: 0, not NaN
  np.testing.assert_allclose(ops.masked_mean(dirty, mask, -1), rows, rtol=1e-6)


def test_masked_whiten_matches_loop():
  x, mask = masked()
  with jax.enable_x64(True):
    found = ops.masked_whiten(jnp.where(mask, x, jnp.nan), jnp.asarray(mask), eps=1e-3)
  np.testing.assert_allclose(
    found, oracles.masked_whiten_loop(x, mask, 1e-3), rtol=1e-10, atol=1e-13
  )


def test_masked_whiten_of_equal_values_is_zero_and_has_a_finite_gradient():
  _, mask = masked()
  run = jax.jit(jax.value_and_grad(lambda x: (ops.masked_whiten(x, mask) * jnp.arange(5.0)).sum()))
  value, grad = run(jnp.full((4, 5), 0.5))
  assert value == 0 and np.isfinite(grad).all() and not grad[~mask].any()


# ---- shapes and dtypes ----


def test_check_passes_what_fits():
  x = jnp.zeros((2, 3))
  assert ops.check(x, "B T") is x
  assert ops.check(jnp.zeros((2, 3), jnp.bfloat16), "B T").dtype == jnp.bfloat16
  ops.check(jnp.zeros(2, jnp.int32), "B", jnp.integer)
  ops.check(jnp.zeros(2, bool), "B", jnp.bool_)


@pytest.mark.parametrize(
  "array, axes, kind, message",
  [
    (np.zeros((2, 3), np.float32), "B", jnp.floating, r"\[B\], got shape \(2, 3\)"),
    (np.zeros((2,), np.float32), "B T", jnp.floating, r"\[B T\], got shape \(2,\)"),
    (
      np.zeros((2, 3), np.int32),
      "B T",
      jnp.floating,
      r"floating array with axes \[B T\], got int32",
    ),
    (
      np.zeros((2, 3), np.float32),
      "B T",
      jnp.bool_,
      r"bool.* array with axes \[B T\], got float32",
    ),
    (np.zeros((2, 3), bool), "B T", jnp.integer, r"integer array with axes \[B T\], got bool"),
  ],
)
def test_check_refuses_the_rest(array, axes, kind, message):
  with pytest.raises(TypeError, match=message):
    ops.check(jnp.asarray(array), axes, kind)


@pytest.mark.parametrize(
  "given, result",
  [("bfloat16", "float32"), ("float16", "float32"), ("float32", "float32"), ("float64", "float64")],
)
def test_at_least_f32(given, result):
  # not computed: XLA cannot convert float16 on a processor without F16C, and no model computes in it
  with jax.enable_x64(True):
    array = jax.ShapeDtypeStruct((2,), given)
    assert jax.eval_shape(ops.at_least_f32, array).dtype == result


def test_predicts_response_is_one_column_early():
  columns = jnp.broadcast_to(jnp.arange(6), (2, 6))  # 4 prompt columns, then a response of 2 tokens
  np.testing.assert_array_equal(ops.predicts_response(columns, 2), [[3, 4], [3, 4]])
  assert ops.predicts_response(jnp.zeros((2, 6, 5)), 2).shape == (2, 2, 5)
