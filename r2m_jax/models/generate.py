"""Sampling: prefill the prompts once, then decode with a KV cache until every row has ended."""

import functools
import math

import jax
import jax.numpy as jnp

from r2m_jax.models.transformer import Transformer, lay_states
from r2m_jax.ops import Truncation, at_least_f32, kept
from r2m_jax.parallel.rows import map_rows
from r2m_jax.parallel.sharding import ROWS, lay, lay_rows, row_shards
from r2m_jax.types import Prompts, Sequences

GROUPED = 2048  # entries; from here on a vocabulary is drawn from in two parts
STAGES, SHORTEST = (
  4,
  32,
)  # parts of a response, each at least so many tokens, between which the cache grows


def sample_keys(
  key: jax.Array, step: jax.Array, example_id: jax.Array, group_size: int
) -> jax.Array:
  """One key per trajectory, a function of (run key, step, prompt id, sample index) and of nothing
  else.

  So any row can be drawn again alone, on any mesh and in any batch.   i32[P] -> key[B].
  """
  prompt_keys = jax.vmap(jax.random.fold_in, (None, 0))(jax.random.fold_in(key, step), example_id)
  fold = jax.vmap(jax.vmap(jax.random.fold_in, (None, 0)), (0, None))
  return fold(prompt_keys, jnp.arange(group_size)).reshape(-1)


def most_likely(logits: jax.Array) -> jax.Array:
  """[B, V] -> i32[B]."""
  return logits.argmax(-1).astype(jnp.int32)


def sample_token(
  keys: jax.Array, logits: jax.Array, truncation: Truncation = Truncation()
) -> jax.Array:
  """Draws from softmax(logits), truncated, with one key per row.

  Noise for every entry of a large vocabulary costs as much as its logits. There a group of entries
  is drawn first, by the sum of its probabilities, and then one of its entries: the same
  distribution from 64 + V / 64 random numbers. Group g of 64 is entries g, g + 64, ..., so that a
  head that is split over devices is split alike in every group.

  key[B], [B, V] -> i32[B].
  """
  logits = at_least_f32(logits)
  if truncation != Truncation():
    logits = jnp.where(kept(logits, truncation), logits, -jnp.inf)
  rows, vocab = logits.shape
  groups = math.gcd(vocab, 64) if vocab >= GROUPED else 1
  if groups == 1:
    return gumbel_argmax(keys, logits)
  logits = logits.reshape(rows, -1, groups)
  group = gumbel_argmax(
    jax.vmap(jax.random.fold_in, (0, None))(keys, 1), jax.nn.logsumexp(logits, 1)
  )
  inside = jnp.take_along_axis(logits, group[:, None, None], 2)[..., 0]
  return gumbel_argmax(keys, inside) * groups + group


def gumbel_argmax(keys: jax.Array, logits: jax.Array) -> jax.Array:
  """A draw from softmax(logits): the largest of logits + Gumbel noise.   key[B], [B, N] -> i32[B].

  The noise is float32 whatever the model's dtype, so that float64 tests draw the same tokens.
  """
  noise = jax.vmap(lambda k: jax.random.gumbel(k, logits.shape[-1:], jnp.float32))(keys)
  return (logits + noise).argmax(-1).astype(jnp.int32)


def loops(tokens: jax.Array, t: jax.Array, length: int) -> jax.Array:
  """Whether the last `length` tokens up to column t repeat the `length` before them.   i32[B, T]
  -> bool[B].
  """
  start = jnp.maximum(t + 1 - 2 * length, 0)
  first, second = (
    jax.lax.dynamic_slice_in_dim(tokens, start + i * length, length, 1) for i in (0, 1)
  )
  return (first == second).all(-1) & (t + 1 >= 2 * length)


def stages(max_new_tokens: int, growing: bool = True) -> list[tuple[int, int]]:
  """(first token, end) of each loop that decodes tokens 1 .. T - 1. In each the cache has the slots
  that its tokens need, where attention reads all there are. `growing` False: one loop."""
  count = max(1, min(STAGES, max_new_tokens // SHORTEST)) if growing else 1
  ends = [max_new_tokens * (i + 1) // count for i in range(count)]
  return list(zip([1, *ends], ends))


def generate(
  model: Transformer,
  prompts: Prompts,
  key: jax.Array,
  step: jax.Array,
  *,
  group_size: int,
  max_new_tokens: int,
  temperature: float,
  eos_ids: tuple[int, ...],
  pad_id: int,
  truncation: Truncation = Truncation(),
  repetition_stop: int = 0,
  greedy_rows: bool = False,
  waves: int = 1,
) -> Sequences:
  """Samples `group_size` responses for each prompt.

  Each prompt is prefilled once; its samples read its cache, on a TPU and beside greedy rows a copy
  each. The loop stops when all rows have ended.

  Args:
    key: the run's key; see `sample_keys`.
    step: i32[], the step the samples belong to.
    max_new_tokens: T. A row without an end-of-sequence token by then is cut off (`has_eos` False).
    temperature: 0 is greedy.
    eos_ids: any of these ends a row; the ending token belongs to the response.
    pad_id: fills finished rows. Masks never look at it, so it may equal an end-of-sequence id.
    truncation: which tokens may be drawn; the log-probabilities of the update use the same.
    repetition_stop: N: a row whose last N tokens repeat the N before them is cut off there; 0:
      never.
    greedy_rows: P more rows follow, the most likely token at each step for each prompt.
    waves: sample the prompts in that many equal groups one after another, so that the cache of one
      group exists at a time. The tokens are the same.
  """
  settings = dict(
    group_size=group_size,
    max_new_tokens=max_new_tokens,
    temperature=temperature,
    eos_ids=eos_ids,
    pad_id=pad_id,
    truncation=truncation,
    repetition_stop=repetition_stop,
    greedy_rows=greedy_rows,
  )

  def wave(prompts):
    """(rows of each prompt [P / waves, K, ...], its greedy row [P / waves, 1, ...] or none)."""
    drawn, sampled = sample(model, prompts, key, step, **settings), len(prompts.tokens) * group_size
    count = len(prompts.tokens)

    def rows(x):
      return x.reshape(count, len(x) // count, *x.shape[1:])

    return jax.tree.map(lambda x: rows(x[:sampled]), drawn), jax.tree.map(
      lambda x: rows(x[sampled:]), drawn
    )

  if waves == 1:
    return sample(model, prompts, key, step, **settings)

  def flat(x):
    return x.reshape(x.shape[0] * x.shape[1], *x.shape[2:])

  return jax.tree.map(
    lambda s, g: jnp.concatenate([flat(s), flat(g)]), *map_rows(wave, waves, prompts)
  )


def sample(
  model: Transformer,
  prompts: Prompts,
  key,
  step,
  *,
  group_size,
  max_new_tokens,
  temperature,
  eos_ids,
  pad_id,
  truncation,
  repetition_stop,
  greedy_rows,
) -> Sequences:
  """One wave of `generate`."""
  prompts, prompt_length = jax.tree.map(lay_rows, prompts), prompts.tokens.shape[1]
  loop_fits = 2 * repetition_stop <= max_new_tokens
  keys = sample_keys(key, step, prompts.example_id, group_size)

  def repeat(x, axis=0):
    return jnp.repeat(x, group_size, axis)

  if greedy_rows:

    def repeat(x, axis=0):
      return jnp.concatenate([jnp.repeat(x, group_size, axis), x], axis)

  out = model(
    prompts.tokens,
    prompts.mask,
    cache=model.init_cache(len(prompts.tokens), prompt_length),
    cache_index=0,
  )
  decoder, cache = model.apart(prompt_length + max_new_tokens), out.cache
  is_apart = decoder is not model
  in_slots = is_apart and decoder.decodes_in_slots
  if is_apart:
    cache = cache.apart(turned=not in_slots)
  in_runs = (
    not greedy_rows and len(prompts.tokens) % row_shards() == 0
  )  # the rows of a prompt are on one device
  cache = cache.shared(group_size) if is_apart and in_runs else cache.repeated(repeat)
  hidden = lay_states(repeat(out.hidden[:, -1:]))[:, 0]

  def draw(t, hidden, stopped):
    logits = lay(model.logits(hidden, temperature or 1.0), ROWS, "tensor")
    sampled, at = logits[: len(keys)], jax.vmap(jax.random.fold_in, (0, None))(keys, t)
    token = sample_token(at, sampled, truncation) if temperature else most_likely(sampled)
    if greedy_rows:
      token = jnp.concatenate([token, most_likely(logits[len(keys) :])])
    token = jnp.where(stopped, pad_id, token)
    return token, ~stopped & jnp.isin(token, jnp.asarray(eos_ids, jnp.int32))

  rows = hidden.shape[0]
  token, has_eos = draw(0, hidden, jnp.zeros(rows, bool))
  tokens = jnp.full((rows, max_new_tokens), pad_id, jnp.int32).at[:, 0].set(token)
  lengths = jnp.ones(rows, jnp.int32)

  def decode(start, carry):
    i, tokens, last, cache, stopped, has_eos, lengths = carry
    t = start + i
    out = decoder(last[:, None], ~stopped[:, None], cache=cache, cache_index=prompt_length + t - 1)
    token, ends = draw(t, out.hidden[:, 0], stopped)
    tokens, lengths = tokens.at[:, t].set(token), lengths + ~stopped
    stopped |= ends
    if repetition_stop and loop_fits:
      stopped |= loops(tokens, t, repetition_stop)
    return i + 1, tokens, token, out.cache, stopped, has_eos | ends, lengths

  carry = (tokens, token, cache, has_eos, has_eos, lengths)
  for start, end in stages(max_new_tokens, growing=is_apart and not in_slots):
    tokens, last, cache, *rest = carry
    carry = (jnp.int32(0), tokens, last, cache.grown(prompt_length + end), *rest)

    def unfinished(carry, count=end - start):
      return (carry[0] < count) & ~carry[4].all()

    _, *carry = jax.lax.while_loop(unfinished, functools.partial(decode, start), carry)
  tokens, _, _, _, has_eos, lengths = carry

  response_mask = jnp.arange(max_new_tokens) < lengths[:, None]
  return Sequences(
    tokens=lay_rows(jnp.concatenate([repeat(prompts.tokens), tokens], 1)),
    token_mask=lay_rows(jnp.concatenate([repeat(prompts.mask), response_mask], 1)),
    response_mask=lay_rows(response_mask),
    has_eos=has_eos,
  )
