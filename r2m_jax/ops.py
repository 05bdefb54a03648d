"""Array helpers shared by losses, models and the step: shape checks, masked reductions, token log-probabilities."""

from collections.abc import Callable

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


def aggregate(x: jax.Array, mask: jax.Array, how: str) -> jax.Array:
  """Reduces a per-token loss [B, T] to a scalar.

  sequence_sum   mean over rows of the sum over tokens (the sequence-level objective of RLOO)
  sequence_mean  mean over rows of the mean over tokens (GRPO)
  token_mean     sum over all tokens / number of all tokens
  constant       sum over all tokens / (B * T) (Dr. GRPO)
  """
  check(x, "B T"), check(mask, "B T", jnp.bool_)
  if how == "sequence_sum":
    return masked_sum(x, mask, -1).mean()
  if how == "sequence_mean":
    return masked_mean(x, mask, -1).mean()
  if how == "token_mean":
    return masked_mean(x, mask)
  if how == "constant":
    return masked_sum(x, mask) / x.size
  raise ValueError(f"loss aggregation is {how!r}; choose one of {AGGREGATIONS}")


def predicts_response(x: jax.Array, response_length: int) -> jax.Array:
  """[B, L, ...] -> [B, T, ...]: column t - 1 predicts token t, so the response is predicted one column early."""
  return x[:, -response_length - 1 : -1]


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
  ref: tuple[Callable[[jax.Array], jax.Array], jax.Array] | None = None,
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
    ref: the reference's logits_fn and its hidden [B, T, Dref].
    chunk: tokens of each row per slice, so that logits are [B, chunk, V] and are made again in the backward pass;
      0 takes all of T at once.
  """
  check(hidden, "B T D"), check(tokens, "B T", jnp.integer)

  def slice_stats(hidden, tokens, ref_hidden):
    logp = jax.nn.log_softmax(at_least_f32(logits_fn(hidden)) / temperature)
    p = jnp.exp(logp)
    kl = jnp.zeros(tokens.shape, logp.dtype)
    if ref is not None:
      ref_logp = jax.nn.log_softmax(at_least_f32(ref[0](ref_hidden)) / temperature)
      kl = (p * (logp - ref_logp)).sum(-1)
    logprobs = jnp.take_along_axis(logp, tokens[..., None], -1)[..., 0]
    return TokenStats(logprobs=logprobs, entropy=-(p * logp).sum(-1), kl=kl)

  length = tokens.shape[1]
  ref_hidden = hidden[:, :, :0] if ref is None else ref[1]
  if not 0 < chunk < length:
    return slice_stats(hidden, tokens, ref_hidden)
  count = -(-length // chunk)

  def split(x):  # [B, T, ...] -> [count, B, chunk, ...], the last slice padded
    x = jnp.pad(x, ((0, 0), (0, count * chunk - length)) + ((0, 0),) * (x.ndim - 2))
    return jnp.moveaxis(x.reshape(x.shape[0], count, chunk, *x.shape[2:]), 1, 0)

  body = jax.checkpoint(lambda xs: slice_stats(*xs), prevent_cse=False)
  stats = jax.lax.map(body, (split(hidden), split(tokens), split(ref_hidden)))
  return jax.tree.map(lambda x: jnp.moveaxis(x, 0, 1).reshape(x.shape[1], -1)[:, :length], stats)
