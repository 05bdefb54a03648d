"""Identities that must hold before the first update. Each fresh run measures and prints them.

Two programs that compute the same log-probability round differently. By how much depends on the
model's depth, width and dtype, on the length of a row and on the processor. No constant fits all of
these, so each bound comes from the run itself: `Rounding` says how far the same log-probabilities
move if every weight moves by one rounding error, or if the same rows are computed in another order
or in smaller batches. A deviation of some `WARN` times that is odd and gets a warning. Above `FAIL`
times it is no rounding any more.
"""

import sys
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from r2m_jax.algorithm.read import Defs, read_feedback, sampling, truncated
from r2m_jax.models.logprobs import token_stats
from r2m_jax.models.transformer import Transformer
from r2m_jax.parallel import hosts
from r2m_jax.parallel.errors import UserError
from r2m_jax.types import Sequences

# times the rounding that the run itself measures, for the largest of many deviations
WARN = 5.0
FAIL = 30.0
MEAN = 3.0  # a mean has no outliers: there both are that many times smaller
EDGE = 1e-3  # share of tokens that rounding may move across the edge of a truncated distribution
ROWS = 4  # of the first step's rows, the longest are read again
DRAWS = 2  # times that the weights are moved


class IdentityError(UserError, RuntimeError):
  """An identity is broken: the numbers that the loss compares do not mean the same thing."""

  status = 1


class Rounding(NamedTuple):
  """How far rounding alone moves a log-probability, in nats."""

  largest: float  # over tokens
  mean: float  # over tokens


# ---- what rounding does ----


def product_eps(dtype) -> float:
  """Relative error of a matrix product in `dtype` on this device, at least half a unit in the last
  place.

  Accelerators may multiply float32 numbers with fewer bits. The device is asked, not a table.
  """
  rng = np.random.default_rng(0)
  x, w = (jnp.asarray(rng.standard_normal(shape), dtype) for shape in ((64, 256), (256, 64)))
  exact = np.asarray(x, np.float64) @ np.asarray(w, np.float64)
  error = np.asarray(jax.jit(jnp.matmul)(x, w), np.float64) - exact
  return max(float(jnp.finfo(dtype).eps) / 2, float(np.sqrt((error**2).mean() / (exact**2).mean())))


def move_weights(weights, key: jax.Array, eps: float):
  """Every weight times 1 + eps * u, with u uniform in [-1, 1]."""
  leaves, tree = jax.tree.flatten(weights)

  def moved(x, key):
    wide = jnp.promote_types(x.dtype, jnp.float32)
    noise = jax.random.uniform(key, x.shape, jnp.float32, -1, 1).astype(wide)
    return (x.astype(wide) * (1 + eps * noise)).astype(x.dtype)

  keys = jax.random.split(key, len(leaves))
  return jax.tree.unflatten(tree, [moved(x, key) for x, key in zip(leaves, keys)])


def measure_rounding(
  logprobs: Callable, weights, tokens, token_mask, response_mask, dtype
) -> Rounding:
  """How far the log-probabilities of some rows move though nothing that matters changed.

  Args:
    logprobs: (weights, tokens i32[B, L], token_mask bool[B, L]) -> nats [B, T]; jitted.
    response_mask: bool[B, T], which of them count.

  Raises:
    IdentityError: a log-probability is not finite.
  """

  def read(*args):
    return np.asarray(hosts.fetch(logprobs(*args)), np.float64)

  plain, eps = read(weights, tokens, token_mask), product_eps(dtype)
  mask = np.asarray(response_mask)
  if not np.isfinite(plain[mask]).all():
    raise IdentityError(
      "the model gives log-probabilities that are not finite, before any update. Its weights may "
      "hold NaN or infinity, or a token id may lie beyond its embedding: check the folder with another "
      "program"
    )
  move = jax.jit(move_weights)
  again = [read(move(weights, jax.random.key(i), eps), tokens, token_mask) for i in range(DRAWS)]
  again.append(read(weights, tokens[::-1], token_mask[::-1])[::-1])
  half = max(1, len(tokens) // 2)
  parts = [slice(i, i + half) for i in range(0, len(tokens), half)]
  again.append(np.concatenate([read(weights, tokens[part], token_mask[part]) for part in parts]))
  deviations = np.stack([np.abs(x - plain)[mask] for x in again])
  last_place = (
    float(jnp.finfo(jnp.promote_types(dtype, jnp.float32)).eps) * np.abs(plain[mask]).max()
  )
  return Rounding(max(deviations.max(), last_place), max(deviations.mean(1).max(), last_place))


def hold(
  name: str,
  value: float,
  rounding: float,
  *,
  stricter: float = 1.0,
  slack: float = 0.0,
  explain: str,
) -> None:
  """Warns or raises if `value` is more than rounding can explain.

  Raises:
    IdentityError: above FAIL / stricter * rounding + slack, or not a number.
  """
  warn, fail = WARN / stricter, FAIL / stricter
  if value <= warn * rounding + slack:
    return
  what = f"{name} is {value:.2e} before any update; rounding alone gives {rounding:.1e} on this model and device"
  if value <= fail * rounding + slack:
    print(
      f"warning: {what}. Up to {fail:.0f} times that is still taken for rounding", file=sys.stderr
    )
    return
  raise IdentityError(
    f"{what}, and more than {fail:.0f} times that is a bug. {explain} Nothing was trained. Compare "
    "the model with "
    "transformers (task=export prints the difference), try --config.dtype=float32 or "
    "--config.attention=xla, and "
    "report it with the versions of jax and r2m_jax if it stays"
  )


# ---- the identities ----


def check_model(
  graphdef, state, *, vocab_size: int, dtype: str, temperature: float
) -> dict[str, float]:
  """Padding must change no log-probability, and decoding with the cache must agree with the full
  forward pass.

  Random tokens and lengths, 4 rows. Prints the largest deviations and returns them, in nats.

  Raises:
    IdentityError: one is more than rounding explains.
  """
  rng = np.random.default_rng(0)
  rows, prompt, response, pad = 4, 6, 5, 3
  tokens = rng.integers(0, vocab_size, (rows, prompt + response), dtype=np.int32)
  mask = np.arange(prompt) >= rng.integers(
    0, prompt - 1, (rows, 1)
  )  # left-padded prompts of several lengths
  mask = np.concatenate([mask, np.ones((rows, response), bool)], 1)
  padded_tokens = np.concatenate([np.zeros((rows, pad), np.int32), tokens], 1)
  padded_mask = np.concatenate([np.zeros((rows, pad), bool), mask], 1)

  def full(state, tokens, mask):
    response_mask = jnp.ones((len(tokens), response), bool)
    sequences = Sequences(
      tokens=tokens, token_mask=mask, response_mask=response_mask, has_eos=response_mask[:, 0]
    )
    model = nnx.merge(graphdef, state)
    return read_feedback(model, sequences, temperature=temperature, layer=-1, chunk=0).logprobs

  def cached(state, tokens, mask):
    model: Transformer = nnx.merge(graphdef, state)
    cache = model.init_cache(rows, prompt + response)
    out = model(tokens[:, :prompt], mask[:, :prompt], cache=cache, cache_index=0)

    def decode(cache, t):
      token = jax.lax.dynamic_slice_in_dim(tokens, t, 1, 1)
      step = model(token, jnp.ones((rows, 1), bool), cache=cache, cache_index=t)
      return step.cache, step.hidden[:, 0]

    _, hidden = jax.lax.scan(
      decode, out.cache, jnp.arange(prompt, prompt + response - 1, dtype=jnp.int32)
    )
    hidden = jnp.concatenate([out.hidden[:, -1:], jnp.moveaxis(hidden, 0, 1)], 1)
    return token_stats(model.head, hidden, tokens[:, prompt:], temperature=temperature).logprobs

  plain_of = jax.jit(full)
  rounding = measure_rounding(plain_of, state, tokens, mask, np.ones((rows, response), bool), dtype)
  programs = jax.jit(lambda s: (full(s, padded_tokens, padded_mask), cached(s, tokens, mask)))
  plain, (padded, decoded) = hosts.fetch((plain_of(state, tokens, mask), programs(state)))

  def distance(x):
    return float(np.abs(np.asarray(x, np.float64) - np.asarray(plain, np.float64)).max())

  found = {"padding": distance(padded), "cached decoding": distance(decoded)}
  deviations = ", ".join(f"{name} {value:.1e}" for name, value in found.items())
  print(f"start    max |log-prob deviation|: {deviations} nats (rounding {rounding.largest:.1e})")
  for name, value in found.items():
    explain = f"With {name} a log-probability must stay what it is."
    hold(f"max |log-prob deviation| by {name}", value, rounding.largest, explain=explain)
  return found


def sample_rounding(defs: Defs, config, ref, sequences: Sequences) -> Rounding:
  """The rounding of the log-probabilities of a step's own samples, by the reference: the policy
  before any update.

  Args:
    ref: weights of the reference.
    sequences: the first step's samples, on the host; its ROWS longest are read.
  """
  longest = np.argsort(sequences.response_mask.sum(-1), kind="stable")[-ROWS:]
  rows = jax.tree.map(lambda x: x[longest], sequences)
  settings = sampling(config) | dict(layer=-1, chunk=config.logits_chunk)

  def logprobs(ref, tokens, token_mask):
    mask = jnp.ones((len(tokens), rows.response_mask.shape[1]), bool)
    part = Sequences(tokens=tokens, token_mask=token_mask, response_mask=mask, has_eos=mask[:, 0])
    return read_feedback(defs.open_ref(ref), part, **settings).logprobs

  return measure_rounding(
    jax.jit(logprobs), ref, rows.tokens, rows.token_mask, rows.response_mask, config.dtype
  )


def check_step_zero(metrics: dict, rounding: Rounding, config, *, continued: bool = False) -> None:
  """Before any update the policy is its own past (ratio 1) and its own reference (KL 0), but for
  rounding.

  No token may be off by more than rounding explains. Single tokens are off by much in bfloat16, and
  with truncated sampling, if a token lies at the edge of those that are kept and rounding moves it
  across. There the mean over tokens is held instead.

  Args:
    metrics: of the first step.
    rounding: of its samples; see `sample_rounding`.
    continued: the policy starts from adapters on top of its reference, so the KL is not 0.

  Raises:
    IdentityError: one is more than rounding explains.
  """
  over_tokens = truncated(config) or config.dtype == "bfloat16"
  what, name = "max |ratio - 1|", "policy/first_ratio_deviation"
  if over_tokens:
    what, name = "mean |ratio - 1|", "policy/first_mean_ratio_deviation"
  ratio, kl = metrics[name], metrics["policy/old_ref_deviation"]
  print(
    f"step 0   {what} {ratio:.1e}, max |old - reference log-prob| {kl:.1e} nats "
    f"(rounding {rounding.largest:.1e}, mean {rounding.mean:.1e})"
  )
  hold(
    what,
    ratio,
    rounding.mean if over_tokens else rounding.largest,
    stricter=MEAN if over_tokens else 1.0,
    slack=EDGE if truncated(config) else 0.0,
    explain="Old and new log-probabilities must be the same function of the same weights.",
  )
  if continued:
    return
  hold(
    "max |old - reference log-prob|",
    kl,
    rounding.largest,
    explain="Policy and reference must have the same weights at the start.",
  )
