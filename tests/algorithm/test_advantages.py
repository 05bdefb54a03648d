"""Advantages against NumPy loops, and properties that hold for any scores."""

import jax
import jax.numpy as jnp
import numpy as np
import oracles
import pytest

from r2m_jax.algorithm import advantages

pytestmark = pytest.mark.numerics

EPS = 1e-4
ESTIMATORS = {
  "rloo": (advantages.rloo, oracles.rloo_loop),
  "grpo": (
    lambda scores, K: advantages.grpo(scores, K, eps=EPS),
    lambda scores, K: oracles.grpo_loop(scores, K, EPS),
  ),
}
FUNCTIONS = {
  name: jax.jit(function, static_argnums=1) for name, (function, _) in ESTIMATORS.items()
}
both = pytest.mark.parametrize("name", ESTIMATORS)


def random_scores(group_size, groups=5, seed=0):
  rng = np.random.default_rng(seed)
  return (rng.normal(size=(groups, group_size)) + 10 * rng.normal(size=(groups, 1))).reshape(-1)


@both
@pytest.mark.parametrize("group_size", [2, 3, 8])
def test_matches_loop(name, group_size):
  scores = random_scores(group_size)
  with jax.enable_x64(True):
    np.testing.assert_allclose(
      FUNCTIONS[name](scores, group_size),
      ESTIMATORS[name][1](scores, group_size),
      rtol=1e-10,
      atol=1e-13,
    )


@both
def test_float32_stays_float32_and_matches_loop(name):
  scores = random_scores(8).astype(np.float32)
  found = FUNCTIONS[name](scores, 8)
  assert found.dtype == jnp.float32
  np.testing.assert_allclose(found, ESTIMATORS[name][1](scores, 8), rtol=1e-5, atol=1e-5)


def test_rloo_of_a_pair_is_the_difference():
  np.testing.assert_array_equal(
    FUNCTIONS["rloo"](jnp.array([3.0, 1.0, -2.0, 5.0]), 2), [2.0, -2.0, -7.0, 7.0]
  )


def test_grpo_of_a_pair_is_a_sign():
  np.testing.assert_allclose(
    FUNCTIONS["grpo"](jnp.array([30.0, 10.0, -20.0, 50.0]), 2), [1, -1, -1, 1], rtol=1e-5
  )


@both
@pytest.mark.parametrize("group_size", [2, 3, 6, 8])
def test_a_tied_group_gives_exactly_zero(name, group_size):
  """In float32 the mean of K equal numbers is not always that number; GRPO would divide the rest
  by a small root.
  """
  scores = np.repeat(np.random.default_rng(0).normal(size=(64, 1)) * 100, group_size, 1).astype(
    np.float32
  )
  np.testing.assert_array_equal(
    FUNCTIONS[name](scores.reshape(-1), group_size), np.zeros(scores.size)
  )


@both
def test_groups_do_not_see_each_other(name):
  scores = random_scores(8)
  with jax.enable_x64(True):
    before = np.asarray(FUNCTIONS[name](scores, 8))
    scores[8:] *= 3
    np.testing.assert_array_equal(FUNCTIONS[name](scores, 8)[:8], before[:8])


@both
def test_a_shift_of_a_group_changes_nothing_and_advantages_sum_to_zero(name):
  scores = random_scores(8)
  with jax.enable_x64(True):
    before = np.asarray(FUNCTIONS[name](scores, 8))
    shifted = FUNCTIONS[name](scores + np.repeat(np.arange(5.0) * 100, 8), 8)
  np.testing.assert_allclose(shifted, before, atol=1e-10)
  np.testing.assert_allclose(before.reshape(-1, 8).sum(1), np.zeros(5), atol=1e-10)


@both
def test_follows_a_permutation_inside_a_group(name):
  scores, order = random_scores(8), np.random.default_rng(1).permutation(8)
  with jax.enable_x64(True):
    before = np.asarray(FUNCTIONS[name](scores, 8)).reshape(-1, 8)
    moved = FUNCTIONS[name](scores.reshape(-1, 8)[:, order].reshape(-1), 8)
  np.testing.assert_allclose(moved.reshape(-1, 8), before[:, order], atol=1e-12)


def test_grpo_ignores_the_scale_and_rloo_follows_it():
  scores = random_scores(8)
  with jax.enable_x64(True):
    np.testing.assert_allclose(
      FUNCTIONS["grpo"](scores * 7, 8), FUNCTIONS["grpo"](scores, 8), rtol=1e-3
    )
    np.testing.assert_allclose(
      FUNCTIONS["rloo"](scores * 7, 8), 7 * FUNCTIONS["rloo"](scores, 8), rtol=1e-10
    )


def test_per_token_repeats_along_the_response_only():
  mask = jnp.array([[True, True, False], [True, False, False]])
  found = advantages.per_token(jnp.array([0.5, -2.0]), mask)
  np.testing.assert_array_equal(found, [[0.5, 0.5, 0.0], [-2.0, 0.0, 0.0]])


@pytest.mark.parametrize("name", ESTIMATORS)
def test_integer_or_grouped_scores_are_refused(name):
  """Fractions would be lost silently in integer scores."""
  with pytest.raises(TypeError, match="floating.*int32"):
    ESTIMATORS[name][0](jnp.arange(8), 4)
  with pytest.raises(TypeError, match=r"\[B\].*\(2, 4\)"):
    ESTIMATORS[name][0](jnp.zeros((2, 4)), 4)
