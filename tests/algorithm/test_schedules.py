"""The weight omega against a loop, and learning rates at the boundaries of their schedules."""

import jax
import jax.numpy as jnp
import numpy as np
import oracles
import pytest
from ml_collections import ConfigDict

from r2m_jax.algorithm.optim import make_optimizer
from r2m_jax.algorithm.schedules import learning_rate, omega

omegas = jax.jit(jax.vmap(lambda t, total, floor: omega(1.0 * t / total, floor), (0, None, None)))


@pytest.mark.parametrize("omega_min", [0.0, 0.6, 1.0])
def test_omega_matches_loop(omega_min):
  steps = np.arange(0, 121, dtype=np.int32)
  with jax.enable_x64(True):
    found = omegas(steps, 120, omega_min)
  np.testing.assert_allclose(
    found, [oracles.omega_loop(t, 120, omega_min) for t in steps], rtol=1e-12, atol=1e-15
  )


def test_omega_starts_at_one_and_falls_to_its_floor():
  found = np.asarray(omegas(jnp.arange(121), 120, 0.6))
  assert found.dtype == np.float32
  assert found[0] == 1
  assert (np.diff(found) <= 0).all()
  floor = np.float32(0.6)
  assert found.min() == floor and found[-1] == floor
  assert found[52] > floor and found[53] == floor  # cos(pi t / 120) / 2 + 1/2 = 0.6 at t = 52.3


def test_omega_without_a_floor_is_half_in_the_middle_and_zero_at_the_end():
  np.testing.assert_allclose(omegas(jnp.array([60, 120]), 120, 0.0), [0.5, 0.0], atol=1e-6)


@pytest.mark.parametrize(
  "kind, middle, end", [("constant", 0.2, 0.2), ("linear", 0.1, 0.0), ("cosine", 0.1, 0.0)]
)
@pytest.mark.parametrize("warmup", [0, 10])
def test_learning_rate_corners(kind, middle, end, warmup):
  rate = learning_rate(kind, 0.2, 110, warmup)
  if warmup:
    np.testing.assert_allclose([rate(0), rate(5)], [0.0, 0.1], rtol=1e-6)
  half = warmup + (110 - warmup) // 2
  np.testing.assert_allclose(
    [rate(warmup), rate(half), rate(110)], [0.2, middle, end], rtol=1e-5, atol=1e-8
  )


def test_cosine_is_not_linear():
  quarter = 0.5 * (1 + np.cos(np.pi / 4))
  np.testing.assert_allclose(learning_rate("cosine", 1.0, 100, 0)(25), quarter, rtol=1e-6)
  np.testing.assert_allclose(learning_rate("linear", 1.0, 100, 0)(25), 0.75, rtol=1e-6)


def test_warmup_as_long_as_the_run():
  rate = learning_rate("cosine", 1.0, 10, 10)
  np.testing.assert_allclose([rate(5), rate(10)], [0.5, 1.0], rtol=1e-6)


def section(**changes):
  return ConfigDict(
    {
      "optimizer": "sgd",
      "lr": 0.1,
      "lr_schedule": "linear",
      "warmup_steps": 0,
      "b1": 0.9,
      "b2": 0.99,
      "adam_eps": 1e-8,
      "weight_decay": 0.0,
      "max_grad_norm": 0.0,
      "moment_dtype": "float32",
      **changes,
    }
  )


def updates(config, gradients, parameter):
  tx = make_optimizer(config, 4)
  state, found = tx.init(parameter), []
  for gradient in gradients:
    update, state = tx.update(gradient, state, parameter)
    found.append(np.asarray(update))
  return found


def test_sgd_follows_the_schedule_and_the_clip():
  gradient, parameter = jnp.array([3.0, 4.0]), jnp.zeros(2)
  free = updates(section(), [gradient] * 2, parameter)
  np.testing.assert_allclose(free, [[-0.3, -0.4], [-0.225, -0.3]], rtol=1e-6)  # 0.1, then 3/4 of it
  clipped = updates(section(max_grad_norm=1.0), [gradient, 0.1 * gradient], parameter)
  np.testing.assert_allclose(
    clipped, [[-0.06, -0.08], [-0.0225, -0.03]], rtol=1e-6
  )  # norm 5 -> 1; norm 0.5 stays


def test_adamw_first_update_is_minus_the_rate_and_decays_weights():
  config = section(optimizer="adamw", lr_schedule="constant", weight_decay=0.5)
  (found,) = updates(config, [jnp.array([3.0, -4.0])], jnp.array([2.0, 0.0]))
  np.testing.assert_allclose(found, [-0.1 * (1 + 0.5 * 2.0), 0.1], rtol=1e-5)


def test_adamw_uses_both_decay_rates():
  config = section(optimizer="adamw", lr_schedule="constant", b1=0.5, b2=0.75)
  _, found = updates(config, [jnp.array([1.0]), jnp.array([2.0])], jnp.zeros(1))
  m = (0.5 * 0.5 * 1 + 0.5 * 2) / (1 - 0.5**2)
  v = (0.75 * 0.25 * 1 + 0.25 * 4) / (1 - 0.75**2)
  np.testing.assert_allclose(found, [-0.1 * m / np.sqrt(v)], rtol=1e-5)
