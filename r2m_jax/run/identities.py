"""Identities that must hold before the first update. Each fresh run measures and prints them.

Two programs that compute the same log-probability round differently. By how much depends on the
model's depth, width and dtype, on the length of a row and on the processor. No constant fits all of
these, so each bound comes from the run itself: `Rounding` says how far the same log-probabilities
move if every weight moves by one rounding error. A deviation of some `WARN` times that is odd and
gets a warning. Above `FAIL` times it is no rounding any more.
"""

import functools
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
from r2m_jax.ops import Truncation
from r2m_jax.parallel import hosts
from r2m_jax.parallel.errors import UserError
from r2m_jax.types import Sequences

# times the rounding that the run itself measures, for the largest of many deviations
WARN = 5.0
FAIL = 30.0
MEAN = 3.0  # a mean has no outliers: there both are that many times smaller
EDGE = 1e-3  # share of tokens that rounding may move across the edge of a truncated distribution
ROWS = 4  # rows that are read: random ones, and the longest of the first step
DRAWS = 2  # times that the weights are moved
NOISE = 4093  # random numbers of a draw; prime, so that the rows of an array take different ones


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


def move_weights(weights, noise: jax.Array, eps: float):
  """Every weight times 1 + eps * u, with u from `noise`, f32[NOISE] in [-1, 1].

  The weights take its numbers in turn, each array from another one on. To draw a number for each
  weight would take longer to compile than the model.
  """
  leaves, tree = jax.tree.flatten(weights)

  def moved(x, first):
    place = jnp.uint32(0)
    for axis, size in enumerate(x.shape):
      place = place * size + jax.lax.broadcasted_iota(jnp.uint32, x.shape, axis)
    wide = jnp.promote_types(x.dtype, jnp.float32)
    u = noise[(place + first) % NOISE].astype(wide)
    return (x.astype(wide) * (1 + eps * u)).astype(x.dtype)

  firsts = np.arange(len(leaves), dtype=np.uint32) * 97
  return jax.tree.unflatten(tree, [moved(x, first) for x, first in zip(leaves, firsts)])


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

  def read(weights):
    return np.asarray(hosts.fetch(logprobs(weights, tokens, token_mask)), np.float64)

  plain, eps = read(weights), product_eps(dtype)
  mask = np.asarray(response_mask)
  if not np.isfinite(plain[mask]).all():
    raise IdentityError(
      "the model gives log-probabilities that are not finite, before any update. Its weights may "
      "hold NaN or infinity, or a token id may lie beyond its embedding: check the folder with another "
      "program"
    )
  move, rng = jax.jit(move_weights), np.random.default_rng(0)
  noise = rng.uniform(-1, 1, (DRAWS, NOISE)).astype(np.float32)
  deviations = np.stack([np.abs(read(move(weights, u, eps)) - plain)[mask] for u in noise])
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


@functools.cache
def make_readings(
  graphdef, prompt_length: int, T: int, *, temperature: float, truncation: Truncation, chunk: int
) -> Callable:
  """Builds the jitted `readings(weights, tokens i32[B, L], token_mask bool[B, L])`, the one program
  of all that is checked at the start; L is prompt_length + T.

  It returns three log-probabilities, in nats: f32[B, T] by the full forward pass, and f32[B, n]
  twice for the `window` of the rows alone: by the full forward pass, and by decoding with the cache.
  """
  prompt, response = window(prompt_length, T)
  inner = slice(prompt_length - prompt, prompt_length + response)
  settings = dict(temperature=temperature, truncation=truncation, chunk=chunk)

  def full(model: Transformer, tokens, mask, T: int):
    every = jnp.ones((len(tokens), T), bool)
    rows = Sequences(tokens=tokens, token_mask=mask, response_mask=every, has_eos=every[:, 0])
    return read_feedback(model, rows, layer=-1, **settings).logprobs

  def cached(model: Transformer, tokens, mask):
    cache = model.init_cache(*tokens.shape)
    out = model(tokens[:, :prompt], mask[:, :prompt], cache=cache, cache_index=0)

    def decode(cache, t):
      token = jax.lax.dynamic_slice_in_dim(tokens, t, 1, 1)
      step = model(token, jnp.ones(token.shape, bool), cache=cache, cache_index=t)
      return step.cache, step.hidden[:, 0]

    steps = jnp.arange(prompt, prompt + response - 1, dtype=jnp.int32)
    _, hidden = jax.lax.scan(decode, out.cache, steps)
    hidden = jnp.concatenate([out.hidden[:, -1:], jnp.moveaxis(hidden, 0, 1)], 1)
    return token_stats(model.head, hidden, tokens[:, prompt:], **settings).logprobs

  @jax.jit
  def readings(weights, tokens, mask):
    model = nnx.merge(graphdef, weights)
    rows = tokens[:, inner], mask[:, inner]
    return full(model, tokens, mask, T), full(model, *rows, response), cached(model, *rows)

  return readings


def window(prompt_length: int, T: int) -> tuple[int, int]:
  """How many tokens of prompt and response the random rows of `check_model` have at most: few, and
  fewer than the rows of a run, which pad them.
  """
  return min(6, max(1, prompt_length - 3)), min(5, T)


def check_model(
  graphdef, state, config, *, vocab_size: int, prompt_length: int
) -> dict[str, float]:
  """Padding must change no log-probability, and decoding with the cache must agree with the full
  forward pass.

  Random tokens and lengths, 4 rows, padded to the length of the run's: prompt_length +
  config.rollout.max_new_tokens. Prints the largest deviations and returns them, in nats.

  Raises:
    IdentityError: one is more than rounding explains.
  """
  rng, T = np.random.default_rng(0), config.rollout.max_new_tokens
  prompt, response = window(prompt_length, T)
  tokens = rng.integers(0, vocab_size, (ROWS, prompt_length + T), dtype=np.int32)
  begins = prompt_length - rng.integers(min(2, prompt), prompt + 1, (ROWS, 1))
  columns = np.arange(prompt_length + T)
  mask = (columns >= begins) & (columns < prompt_length + response)
  readings = make_readings(
    graphdef,
    prompt_length,
    T,
    temperature=config.rollout.temperature,
    truncation=Truncation(),
    chunk=config.logits_chunk,
  )

  def alone(*args):
    return readings(*args)[0]

  counted = np.broadcast_to(np.arange(T) < response, (ROWS, T))
  rounding = measure_rounding(alone, state, tokens, mask, counted, config.dtype)
  padded, plain, decoded = (
    np.asarray(x, np.float64) for x in hosts.fetch(readings(state, tokens, mask))
  )
  found = {
    "padding": float(np.abs(padded[:, :response] - plain).max()),
    "cached decoding": float(np.abs(decoded - plain).max()),
  }
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
  T = rows.response_mask.shape[1]
  readings = make_readings(
    defs.base or defs.policy,
    rows.tokens.shape[1] - T,
    T,
    **sampling(config),
    chunk=config.logits_chunk,
  )

  def logprobs(*args):
    return readings(*args)[0]

  return measure_rounding(
    logprobs, ref, rows.tokens, rows.token_mask, rows.response_mask, config.dtype
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
