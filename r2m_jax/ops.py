"""Array helpers shared by losses, models and the step: shape checks, masked reductions, token log-probabilities."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import struct


def check(x: jax.Array, axes: str, kind: type = jnp.floating) -> jax.Array:
  """Raises TypeError unless x has one axis per name in `axes` and a dtype of `kind`; returns x."""
  if x.ndim != len(axes.split()):
    raise TypeError(f"expected axes [{axes}], got shape {x.shape}")
  if not jnp.issubdtype(x.dtype, kind):
    raise TypeError(f"expected a {kind.__name__} array with axes [{axes}], got {x.dtype}")
  return x


def at_least_f32(x: jax.Array) -> jax.Array:
  """Promotes to float32, and leaves float64 alone so that tests can run in it."""
  return x.astype(jnp.promote_types(x.dtype, jnp.float32))


def masked_sum(x: jax.Array, mask: jax.Array, axis=None) -> jax.Array:
  return jnp.where(mask, x, 0).sum(axis)


def masked_mean(x: jax.Array, mask: jax.Array, axis=None) -> jax.Array:
  """Sum over True, divided by the count of True (0 where nothing is True)."""
  return masked_sum(x, mask, axis) / jnp.maximum(mask.sum(axis), 1)


def masked_whiten(x: jax.Array, mask: jax.Array, eps: float = 1e-8) -> jax.Array:
  """Zero mean and unit variance over True, zero elsewhere; eps inside the root."""
  centred = jnp.where(mask, x - masked_mean(x, mask), 0)
  return centred * jax.lax.rsqrt(masked_mean(centred**2, mask) + eps)


AGGREGATIONS = ("sequence_sum", "sequence_mean", "token_mean", "constant")


def share_mean(x: jax.Array, mask: jax.Array, whole: jax.Array | None = None) -> jax.Array:
  """The share that these rows have in the mean over all True tokens of a minibatch.

  Sum over True, divided by the count of True in `whole`, the minibatch's mask; None: these rows are all of it.
  """
  return masked_sum(x, mask) / jnp.maximum((mask if whole is None else whole).sum(), 1)


def aggregate(x: jax.Array, mask: jax.Array, how: str, whole: jax.Array | None = None) -> jax.Array:
  """Reduces a per-token loss [B, T] to a scalar, or to the share that these rows have in it.

  sequence_sum   mean over rows of the sum over tokens (the sequence-level objective of RLOO)
  sequence_mean  mean over rows of the mean over tokens (GRPO)
  token_mean     sum over all tokens / number of all tokens
  constant       sum over all tokens / (B * T) (Dr. GRPO)

  `whole` is the mask of the minibatch that these rows are a part of, whose rows and tokens are counted; None: they are
  all of it. Shares add up to the minibatch's value.
  """
  check(x, "B T"), check(mask, "B T", jnp.bool_)
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
  """One reward from an ensemble's (arXiv 2310.02743).   f32[..., M] -> f32[...].

  "mean", "min" (the worst case), or "mean_minus_variance": mean - variance_weight * variance (with 1/M).
  """
  if how == "min":
    return scores.min(-1)
  mean = scores.mean(-1)
  return mean - variance_weight * scores.var(-1) if how == "mean_minus_variance" else mean


def predicts_response(x: jax.Array, response_length: int) -> jax.Array:
  """[B, L, ...] -> [B, T, ...]: column t - 1 predicts token t, so the response is predicted one column early."""
  return x[:, -response_length - 1 : -1]


class Truncation(NamedTuple):
  """Which tokens of a distribution may be sampled at all; the defaults allow every one."""

  top_k: int = 0  # the k most likely; 0: no limit
  top_p: float = 1.0  # the most likely ones whose probabilities first sum to p
  min_p: float = 0.0  # those at least this share as likely as the most likely one


def kept(logits: jax.Array, truncation: Truncation) -> jax.Array:
  """The tokens that may be drawn from softmax(logits), bool[..., V]; ties at a limit are all kept.

  top_k first, then top_p of the distribution that is left, then min_p. Nothing of this has a gradient.
  """
  logits = jax.lax.stop_gradient(logits)
  floor, vocab = jnp.finfo(logits.dtype).min, logits.shape[-1]
  keep = jnp.ones(logits.shape, bool)
  if 0 < truncation.top_k < vocab:
    keep = logits >= jax.lax.top_k(logits, truncation.top_k)[0][..., -1:]
  if truncation.top_p < 1:
    p = jax.nn.softmax(jnp.where(keep, logits, floor))
    descending = -jnp.sort(-p)
    before = jnp.cumsum(descending, -1) - descending  # probability of all that is more likely
    smallest = jnp.where(before < truncation.top_p, descending, 1).min(-1, keepdims=True)
    keep &= p >= smallest
  if truncation.min_p > 0:
    keep &= logits >= logits.max(-1, keepdims=True) + jnp.log(truncation.min_p)
  return keep


@struct.dataclass
class TokenStats:
  """Of the distribution each token was drawn from, at the rollout temperature. All [B, T], at least float32."""

  logprobs: jax.Array
  entropy: jax.Array  # nats
  kl: jax.Array  # exact KL(policy || reference) over the vocabulary, nats; zero where there is no reference


def token_stats(
  logits_fn: Callable[[jax.Array], jax.Array],
  hidden: jax.Array,
  tokens: jax.Array,
  *,
  temperature: float,
  truncation: Truncation = Truncation(),
  ref: tuple[Callable[[jax.Array], jax.Array], jax.Array] | None = None,
  support: tuple[Callable[[jax.Array], jax.Array], jax.Array] | None = None,
  chunk: int = 0,
) -> TokenStats:
  """Log-probability and entropy of each token, and the exact KL to a reference where one is given.

  The one function behind old, new and reference log-probabilities: called with the same weights it gives the same
  numbers, which is what makes the importance ratio 1 before the first update.

  Args:
    logits_fn: hidden [..., D] -> logits [..., V].
    hidden: [B, T, D], what the language-model head reads to predict each token.
    tokens: i32[B, T].
    temperature: divides the logits, as in sampling.
    truncation: as in sampling; probabilities are those among the kept tokens. The given token is always one of them,
      so that a policy that has moved since the sampling has a finite log-probability for it.
    ref: the reference's logits_fn and its hidden [B, T, Dref]; it is normalised over the same kept tokens.
    support: logits_fn and hidden of the model whose distribution decides which tokens are kept; None: this one.
    chunk: tokens of each row per slice, so that logits are [B, chunk, V] and are made again in the backward pass;
      0 takes all of T at once.
  """
  check(hidden, "B T D"), check(tokens, "B T", jnp.integer)
  other = ref or support  # the reference is never read together with another model's support
  if ref is not None and support is not None:
    raise ValueError("token_stats takes a reference or another model's support, not both")

  def scaled(logits_fn, hidden):
    return at_least_f32(logits_fn(hidden)) / temperature

  def slice_stats(hidden, tokens, other_hidden):
    logits = scaled(logits_fn, hidden)
    inside = lambda x: x
    if truncation != Truncation():
      keep = kept(scaled(support[0], other_hidden) if support else logits, truncation)
      keep |= jnp.arange(logits.shape[-1]) == tokens[..., None]
      inside = lambda x: jnp.where(keep, x, jnp.finfo(x.dtype).min)
    logp = jax.nn.log_softmax(inside(logits))
    p = jnp.exp(logp)
    kl = jnp.zeros(tokens.shape, logp.dtype)
    if ref is not None:
      ref_logp = jax.nn.log_softmax(inside(scaled(ref[0], other_hidden)))
      kl = (p * (logp - ref_logp)).sum(-1)
    logprobs = jnp.take_along_axis(logp, tokens[..., None], -1)[..., 0]
    return TokenStats(logprobs=logprobs, entropy=-(p * logp).sum(-1), kl=kl)

  length = tokens.shape[1]
  other_hidden = hidden[:, :, :0] if other is None else other[1]
  if not 0 < chunk < length:
    return slice_stats(hidden, tokens, other_hidden)
  count = -(-length // chunk)

  def split(x):  # [B, T, ...] -> [count, B, chunk, ...], the last slice padded
    x = jnp.pad(x, ((0, 0), (0, count * chunk - length)) + ((0, 0),) * (x.ndim - 2))
    return jnp.moveaxis(x.reshape(x.shape[0], count, chunk, *x.shape[2:]), 1, 0)

  body = jax.checkpoint(lambda xs: slice_stats(*xs), prevent_cse=False)
  stats = jax.lax.map(body, (split(hidden), split(tokens), split(other_hidden)))
  return jax.tree.map(lambda x: jnp.moveaxis(x, 0, 1).reshape(x.shape[1], -1)[:, :length], stats)
