"""Scores to advantages. Rows are p * K + k: sample k of prompt p. Everything here is at least float32."""

import jax
import jax.numpy as jnp

from r2m_jax.ops import check


def centred_groups(scores: jax.Array, group_size: int) -> jax.Array:
  """r_i - mean of its group.   f32[B] -> f32[P, K].

  Exactly 0 where a group ties: the mean of equal numbers may be rounded, so the first one is subtracted before.
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


def grpo(scores: jax.Array, group_size: int, *, eps: float) -> jax.Array:
  """Group-standardised scores: A_i = (r_i - mean r) / sqrt(var r + eps), var with 1/K.   f32[B] -> f32[B].

  A group whose scores all tie has advantage zero.
  """
  check(scores, "B")
  centred = centred_groups(scores, group_size)
  return (centred * jax.lax.rsqrt((centred**2).mean(-1, keepdims=True) + eps)).reshape(-1)


def per_token(advantages: jax.Array, response_mask: jax.Array) -> jax.Array:
  """One advantage per row to every token of its response.   f32[B], bool[B, T] -> f32[B, T]."""
  check(advantages, "B"), check(response_mask, "B T", jnp.bool_)
  return jnp.where(response_mask, advantages[:, None], 0)
