"""Scalars that depend on the step: the time-step weight omega and learning rates."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax

OMEGA_SCHEDULES = ("cosine", "linear", "constant", "kl")


def omega(progress: jax.Array, omega_min: float, kind: str = "cosine") -> jax.Array:
  """Weight of the reward model's own embedding (eq. 4).   f32[] in [0, 1] -> f32[].

    w = max(cos(pi u) / 2 + 1/2, Omega), with u = t / T

  It starts at 1 (only the reward model's own embedding) and falls to the floor Omega. "linear"
  falls along 1 - u to the same floor. "constant" is the floor from the start. "kl" is the cosine
  with u = KL / target, the share of the allowed KL that the policy has used. It needs no T, and
  rises again if the KL falls.
  """
  if kind == "constant":
    return jnp.full_like(progress, omega_min)
  progress = jnp.minimum(progress, 1.0)
  fall = 1 - progress if kind == "linear" else 0.5 * jnp.cos(jnp.pi * progress) + 0.5
  return jnp.maximum(fall, omega_min)


def make_omega(config) -> Callable[[jax.Array, jax.Array], jax.Array]:
  """Builds `w(step, kl)` (eq. 4), driven by the step or by the KL of its samples in nats a
  sequence.   i32[], f32[] -> f32[].
  """
  kind, floor = config.r2m.omega_schedule, config.r2m.omega_min
  total, target = config.steps, config.r2m.omega_kl

  def progress(step, kl):
    return kl / target if kind == "kl" else step.astype(kl.dtype) / total

  return lambda step, kl: omega(progress(step, kl), floor, kind)


KL_CONTROLLERS = ("fixed", "adaptive", "hold", "held")
HELD_RATE = 0.1  # largest change of log beta in one step
HELD_BETA = (1e-3, 3.0)  # limits of beta


def kl_weight(
  kind: str,
  beta: jax.Array,
  kl: jax.Array,
  *,
  target: float,
  horizon: int,
  damping: float = 0.0,
) -> tuple[jax.Array, jax.Array]:
  """The weight of the KL in this step, and the next step's beta. All are f32[].

    fixed      beta, beta
    adaptive   beta, then beta * (1 + clip(KL / target - 1, -0.2, 0.2) / horizon): drifts until KL is at the target
               (arXiv 1909.08593)
    hold       beta * max(1, KL / target)^2, from the same beta in each step: a wall that recedes when the KL falls
    held       beta * exp(damping * e), then beta * exp(0.1 e) within [1e-3, 3], with
               e = clip(KL / target - 1, -1, 1): dual ascent on log beta until the KL stays at the
               target, from above and from below. The KL follows the weight some steps late, and
               dual ascent alone swings around the target; a part that is proportional to the error
               damps that (arXiv 2007.03964)

  Args:
    kl: measured KL(policy || reference) of the step's samples, nats a sequence.
    target: nats a sequence.
    horizon: steps.
    damping: of "held".
  """
  if kind == "adaptive":
    return beta, beta * (1 + jnp.clip(kl / target - 1, -0.2, 0.2) / horizon)
  if kind == "hold":
    return beta * jnp.maximum(1.0, kl / target) ** 2, beta
  if kind == "held":
    error = jnp.clip(kl / target - 1, -1.0, 1.0)
    return beta * jnp.exp(damping * error), jnp.clip(beta * jnp.exp(HELD_RATE * error), *HELD_BETA)
  return beta, beta


def learning_rate(kind: str, peak: float, total_steps: int, warmup_steps: int) -> optax.Schedule:
  """ "constant", "linear" or "cosine" to zero, after a linear warm-up from zero."""
  decay_steps = max(total_steps - warmup_steps, 1)
  after = {
    "constant": optax.constant_schedule(peak),
    "linear": optax.linear_schedule(peak, 0.0, decay_steps),
    "cosine": optax.cosine_decay_schedule(peak, decay_steps),
  }[kind]
  if not warmup_steps:
    return after
  return optax.join_schedules(
    [optax.linear_schedule(0.0, peak, warmup_steps), after], [warmup_steps]
  )
