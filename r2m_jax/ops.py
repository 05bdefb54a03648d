"""Array helpers shared by losses, models and the step: shape checks, masked reductions,
truncation.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np


def check(x: jax.Array, axes: str, kind: type = jnp.floating) -> jax.Array:
  """Raises TypeError unless x has one axis per name in `axes` and a dtype of `kind`; returns x."""
  if x.ndim != len(axes.split()):
    raise TypeError(f"expected axes [{axes}], got shape {x.shape}")
  if not jnp.issubdtype(x.dtype, kind):
    raise TypeError(f"expected a {kind.__name__} array with axes [{axes}], got {x.dtype}")
  return x


def at_least_f32(x: jax.Array) -> jax.Array:
  """Promotes to float32; float64 stays float64, so that tests can use it."""
  return x.astype(jnp.promote_types(x.dtype, jnp.float32))


def all_bits():
  """Inside this context, float32 products keep all bits. By default a TPU rounds their factors to
  bfloat16 and a GPU to TF32, 8 and 11 bits, and an update of R2M changes a weight by less.
  """
  return jax.default_matmul_precision("highest")


def masked_sum(x: jax.Array, mask: jax.Array, axis=None) -> jax.Array:
  return jnp.where(mask, x, 0).sum(axis)


def masked_mean(x: jax.Array, mask: jax.Array, axis=None) -> jax.Array:
  """Sum over True, divided by the number of True (0 if nothing is True)."""
  return masked_sum(x, mask, axis) / jnp.maximum(mask.sum(axis), 1)


def masked_whiten(x: jax.Array, mask: jax.Array, eps: float = 1e-8) -> jax.Array:
  """Zero mean and unit variance over True, zero elsewhere; eps inside the root."""
  centred = jnp.where(mask, x - masked_mean(x, mask), 0)
  return centred * jax.lax.rsqrt(masked_mean(centred**2, mask) + eps)


AGGREGATIONS = ("sequence_sum", "sequence_mean", "token_mean", "constant")


def share_mean(x: jax.Array, mask: jax.Array, whole: jax.Array | None = None) -> jax.Array:
  """The contribution of these rows to the mean over all True tokens of a minibatch.

  Sum over True, divided by the number of True in `whole`, the minibatch's mask. None: these rows
  are the whole minibatch.
  """
  return masked_sum(x, mask) / jnp.maximum((mask if whole is None else whole).sum(), 1)


def aggregate(x: jax.Array, mask: jax.Array, how: str, whole: jax.Array | None = None) -> jax.Array:
  """Reduces a per-token loss [B, T] to a scalar, or to these rows' contribution to it.

  sequence_sum   mean over rows of the sum over tokens (the sequence-level objective of RLOO)
  sequence_mean  mean over rows of the mean over tokens (GRPO)
  token_mean     sum over all tokens / number of all tokens
  constant       sum over all tokens / (B * T) (Dr. GRPO)

  `whole` is the mask of the minibatch to which these rows belong; its rows and tokens are counted.
  None: these rows are the whole minibatch. The contributions add up to the minibatch's value.
  """
  check(x, "B T")
  check(mask, "B T", jnp.bool_)
  whole = mask if whole is None else whole
  if how == "sequence_sum":
    return masked_sum(x, mask, -1).sum() / len(whole)
  if how == "sequence_mean":
    return masked_mean(x, mask, -1).sum() / len(whole)
  if how == "token_mean":
    return share_mean(x, mask, whole)
  if how == "constant":
    return masked_sum(x, mask) / whole.size
  raise ValueError(f"loss aggregation is {how!r}; choose one of {AGGREGATIONS}")


COMBINE = ("mean", "min", "mean_minus_variance")


def combine(scores: jax.Array, how: str = "mean", variance_weight: float = 0.0) -> jax.Array:
  """One reward from those of an ensemble (arXiv 2310.02743).   f32[..., M] -> f32[...].

  "mean", "min" (the worst case), or "mean_minus_variance": mean - variance_weight * variance (with
  1/M).
  """
  if how == "min":
    return scores.min(-1)
  mean = scores.mean(-1)
  return mean - variance_weight * scores.var(-1) if how == "mean_minus_variance" else mean


def predicts_response(x: jax.Array, response_length: int) -> jax.Array:
  """[B, L, ...] -> [B, T, ...]: column t - 1 predicts token t, so the columns start one before the
  response.
  """
  return x[:, -response_length - 1 : -1]


def response_part(mask: jax.Array, response_length: int) -> jax.Array:
  """bool[B, L] -> bool[B, L]: the mask of whole rows, False in the columns of the prompt."""
  columns = np.arange(mask.shape[1])
  return mask & (columns >= len(columns) - response_length)


class Truncation(NamedTuple):
  """Which tokens of a distribution may be sampled; the defaults allow all."""

  top_k: int = 0  # the k most likely; 0: no limit
  top_p: float = 1.0  # the most likely ones whose probabilities first sum to p
  min_p: float = 0.0  # tokens at least this fraction as likely as the most likely one


def kept(logits: jax.Array, truncation: Truncation) -> jax.Array:
  """The tokens that may be drawn from softmax(logits), bool[..., V]; ties at a limit are all kept.

  top_k is applied first, then top_p to the remaining distribution, then min_p. None of them has a
  gradient.
  """
  logits = jax.lax.stop_gradient(logits)
  floor, vocab = jnp.finfo(logits.dtype).min, logits.shape[-1]
  keep = jnp.ones(logits.shape, bool)
  if 0 < truncation.top_k < vocab:
    keep = logits >= jax.lax.top_k(logits, truncation.top_k)[0][..., -1:]
  if truncation.top_p < 1:
    p = jax.nn.softmax(jnp.where(keep, logits, floor))
    descending = -jnp.sort(-p)
    before = jnp.cumsum(descending, -1) - descending  # probability of all more likely tokens
    smallest = jnp.where(before < truncation.top_p, descending, 1).min(-1, keepdims=True)
    keep &= p >= smallest
  if truncation.min_p > 0:
    keep &= logits >= logits.max(-1, keepdims=True) + jnp.log(truncation.min_p)
  return keep
