"""Scores to advantages. Rows are p * K + k: sample k of prompt p. Everything here is at least
float32.
"""

import jax
import jax.numpy as jnp

from r2m_jax.ops import check


def centred_groups(scores: jax.Array, group_size: int) -> jax.Array:
  """r_i - mean of its group.   f32[B] -> f32[P, K].

  Exactly 0 where a group ties: the mean of equal numbers may be rounded, so the first one is
  subtracted before.
  """
  groups = scores.reshape(-1, group_size)
  groups = groups - groups[:, :1]
  return groups - groups.mean(-1, keepdims=True)


def rloo(scores: jax.Array, group_size: int) -> jax.Array:
  """Leave-one-out baseline (eq. 1): A_i = r_i - mean over j != i of r_j.   f32[B] -> f32[B].

  Written as K / (K - 1) * (r_i - mean r), the same number with one reduction.
  """
  check(scores, "B")
  return (centred_groups(scores, group_size) * (group_size / (group_size - 1))).reshape(-1)


NORMS = ("group", "batch", "none")


def grpo(scores: jax.Array, group_size: int, *, eps: float, norm: str = "group") -> jax.Array:
  """Scores centred in their group and standardised: A_i = (r_i - mean r) / sqrt(var + eps).   f32[B] -> f32[B].

  var, with 1/K, is that of the group (GRPO), or with norm="batch" the mean of all groups';
  norm="none" does not divide (Dr. GRPO). A group whose scores all tie has advantage zero.
  """
  check(scores, "B")
  centred = centred_groups(scores, group_size)
  if norm == "none":
    return centred.reshape(-1)
  variance = (centred**2).mean(-1, keepdims=True)
  variance = variance.mean() if norm == "batch" else variance
  return (centred * jax.lax.rsqrt(variance + eps)).reshape(-1)


def remax(scores: jax.Array, greedy_scores: jax.Array, group_size: int) -> jax.Array:
  """Greedy baseline: A_i = r_i - r of the prompt's greedy response (ReMax, arXiv 2310.10505).

  f32[B], f32[P] -> f32[B]. The baseline does not depend on the sample, so the gradient stays
  unbiased.
  """
  check(scores, "B")
  check(greedy_scores, "P")
  return scores - jnp.repeat(greedy_scores, group_size)


def returns_to_go(token_rewards: jax.Array, mask: jax.Array) -> jax.Array:
  """Sum of the rewards from each token on, undiscounted.   f32[B, T], bool[B, T] -> f32[B, T]."""
  check(token_rewards, "B T")
  check(mask, "B T", jnp.bool_)
  rewards = jnp.where(mask, token_rewards, 0)
  return jnp.where(mask, jnp.cumsum(rewards[:, ::-1], -1)[:, ::-1], 0)


def gae(
  token_rewards: jax.Array, values: jax.Array, mask: jax.Array, *, gamma: float, lam: float
) -> tuple[jax.Array, jax.Array]:
  """Generalised advantage estimation (arXiv 1506.02438).

    delta_t = r_t + gamma V_{t+1} - V_t;   A_t = delta_t + gamma lam A_{t+1};   V after the last token is 0

  Args:
    token_rewards, values: f32[B, T]; masks are runs from the first column on, so T runs backwards
      over them.

  Returns:
    (advantages, returns A + V), f32[B, T] each, zero off the mask.
  """
  check(token_rewards, "B T")
  check(values, "B T")
  check(mask, "B T", jnp.bool_)
  rewards, values = jnp.where(mask, token_rewards, 0), jnp.where(mask, values, 0)
  next_values = jnp.concatenate([values[:, 1:], jnp.zeros_like(values[:, :1])], 1)
  delta = rewards + gamma * next_values - values

  def backwards(later, delta):
    advantage = delta + gamma * lam * later
    return advantage, advantage

  _, found = jax.lax.scan(backwards, jnp.zeros_like(delta[:, 0]), delta.T, reverse=True)
  advantages = jnp.where(mask, found.T, 0)
  return advantages, jnp.where(mask, advantages + values, 0)


def per_token(advantages: jax.Array, response_mask: jax.Array) -> jax.Array:
  """One advantage per row to every token of its response.   f32[B], bool[B, T] -> f32[B, T]."""
  check(advantages, "B")
  check(response_mask, "B T", jnp.bool_)
  return jnp.where(response_mask, advantages[:, None], 0)
