"""Scalars that depend on the step: the time-step weight omega and learning rates."""

import jax
import jax.numpy as jnp
import optax


def omega(step: jax.Array, total_steps: int, omega_min: float) -> jax.Array:
  """Weight of the reward model's own embedding (eq. 4).   i32[] -> f32[].

    w(t) = max(cos(pi t / T) / 2 + 1/2, Omega)

  It starts at 1 (only the reward model's own embedding) and falls to the floor Omega.
  """
  return jnp.maximum(0.5 * jnp.cos(jnp.pi * step / total_steps) + 0.5, omega_min)


def learning_rate(kind: str, peak: float, total_steps: int, warmup_steps: int) -> optax.Schedule:
  """"constant", "linear" or "cosine" to zero, after a linear warm-up from zero."""
  decay_steps = max(total_steps - warmup_steps, 1)
  after = {
    "constant": optax.constant_schedule(peak),
    "linear": optax.linear_schedule(peak, 0.0, decay_steps),
    "cosine": optax.cosine_decay_schedule(peak, decay_steps),
  }[kind]
  if not warmup_steps:
    return after
  return optax.join_schedules([optax.linear_schedule(0.0, peak, warmup_steps), after], [warmup_steps])
