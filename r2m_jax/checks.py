"""Identities that must hold before the first update; each fresh run checks and prints them."""

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from r2m_jax import hosts
from r2m_jax.models.transformer import Transformer
from r2m_jax.logprobs import token_stats
from r2m_jax.step import read_feedback
from r2m_jax.types import Sequences

# |importance ratio - 1| before any update: gradient and forward programs round differently
RATIO_BOUND = {"float64": 1e-12, "float32": 2e-5, "bfloat16": 2e-2}
# max |log-probability - that of the same row with more padding, or decoded with a cache|, nats
LOGPROB_BOUND = {"float64": 1e-11, "float32": 1e-4, "bfloat16": 0.25}


class IdentityError(RuntimeError):
  """An identity is broken: the numbers that the loss compares do not mean the same thing."""


def check_model(graphdef, state, *, vocab_size: int, dtype: str, temperature: float) -> dict[str, float]:
  """Padding must change no log-probability, and decoding with the cache must agree with the full forward pass.

  Random tokens and lengths, 4 rows. Prints the largest deviations and returns them.

  Raises:
    IdentityError: where one exceeds its bound for `dtype`.
  """
  rng = np.random.default_rng(0)
  rows, prompt, response, pad = 4, 6, 5, 3
  tokens = rng.integers(0, vocab_size, (rows, prompt + response), dtype=np.int32)
  mask = np.arange(prompt) >= rng.integers(0, prompt - 1, (rows, 1))  # left-padded prompts of several lengths
  mask = np.concatenate([mask, np.ones((rows, response), bool)], 1)
  padded_tokens = np.concatenate([np.zeros((rows, pad), np.int32), tokens], 1)
  padded_mask = np.concatenate([np.zeros((rows, pad), bool), mask], 1)

  def full(state, tokens, mask):
    response_mask = jnp.ones((rows, response), bool)
    sequences = Sequences(tokens=tokens, token_mask=mask, response_mask=response_mask, has_eos=response_mask[:, 0])
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

    _, hidden = jax.lax.scan(decode, out.cache, jnp.arange(prompt, prompt + response - 1, dtype=jnp.int32))
    hidden = jnp.concatenate([out.hidden[:, -1:], jnp.moveaxis(hidden, 0, 1)], 1)
    return token_stats(model.head, hidden, tokens[:, prompt:], temperature=temperature).logprobs

  programs = jax.jit(lambda s: (full(s, tokens, mask), full(s, padded_tokens, padded_mask), cached(s, tokens, mask)))
  plain, padded, decoded = (np.asarray(x, np.float64) for x in hosts.fetch(programs(state)))
  found = {"padding": np.abs(padded - plain).max(), "cached decoding": np.abs(decoded - plain).max()}
  bound = LOGPROB_BOUND[dtype]
  deviations = ", ".join(f"{name} {value:.1e}" for name, value in found.items())
  print(f"start    max |log-prob deviation|: {deviations} (bound {bound:.0e})")
  for name, value in found.items():
    if not value <= bound:
      raise IdentityError(f"{name} changes a log-probability by {value:.2e} nats, more than {bound:.0e} in {dtype}")
  return found


def check_step_zero(metrics: dict, dtype: str, *, truncated: bool = False) -> None:
  """Before any update the policy is its own past (ratio 1) and its own reference (KL exactly 0).

  In float32 no token may be off. Where rounding alone moves single tokens far, the mean over tokens is held to the
  bound instead: in bfloat16, and with truncated sampling, where a token at the edge of the kept ones may fall on
  either side and takes its probability along.

  Args:
    metrics: of the first step.
    truncated: whether sampling was.

  Raises:
    IdentityError: where either is off.
  """
  what, name = "max |ratio - 1|", "policy/first_ratio_deviation"
  if truncated or dtype == "bfloat16":
    what, name = "mean |ratio - 1|", "policy/first_mean_ratio_deviation"
  ratio, kl, bound = metrics[name], metrics["policy/old_ref_deviation"], RATIO_BOUND[dtype]
  print(f"step 0   {what} {ratio:.1e} (bound {bound:.0e}), max |old - reference log-prob| {kl:.1e} (bound 0)")
  if not ratio <= bound:
    raise IdentityError(f"the ratio is off before any update: {what} is {ratio:.2e}, more than {bound:.0e} in {dtype}")
  if kl != 0:
    raise IdentityError(f"old and reference log-probabilities differ by {kl:.2e} nats, yet their weights are the same")
