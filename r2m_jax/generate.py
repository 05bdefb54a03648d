"""Sampling: prefill the prompts once, then decode with a KV cache until every row has ended."""

import jax
import jax.numpy as jnp

from r2m_jax.models.transformer import Transformer
from r2m_jax.ops import at_least_f32
from r2m_jax.types import Prompts, Sequences


def sample_keys(key: jax.Array, step: jax.Array, example_id: jax.Array, group_size: int) -> jax.Array:
  """One key per trajectory, a function of (run key, step, prompt id, sample index) and of nothing else.

  So any row can be drawn again alone, on any mesh and in any batch.   i32[P] -> key[B].
  """
  prompt_keys = jax.vmap(jax.random.fold_in, (None, 0))(jax.random.fold_in(key, step), example_id)
  fold = jax.vmap(jax.vmap(jax.random.fold_in, (None, 0)), (0, None))
  return fold(prompt_keys, jnp.arange(group_size)).reshape(-1)


def sample_token(keys: jax.Array, logits: jax.Array, temperature: float) -> jax.Array:
  """Draws from softmax(logits / temperature) with one key per row; temperature 0 takes the most likely token.

  key[B], [B, V] -> i32[B].
  """
  logits = at_least_f32(logits)
  if temperature == 0:
    return logits.argmax(-1).astype(jnp.int32)
  # float32 noise whatever the model's dtype, so that float64 tests draw the same tokens
  noise = jax.vmap(lambda k: jax.random.gumbel(k, logits.shape[-1:], jnp.float32))(keys)
  return (logits / temperature + noise).argmax(-1).astype(jnp.int32)


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
  constrain=lambda x: x,
) -> Sequences:
  """Samples `group_size` responses for each prompt.

  Each prompt is prefilled once and its cache repeated for its samples. The loop stops when all rows have ended.

  Args:
    key: the run's key; see `sample_keys`.
    step: i32[], the step the samples belong to.
    max_new_tokens: T. A row without an end-of-sequence token by then is cut off (`has_eos` False).
    temperature: 0 is greedy.
    eos_ids: any of these ends a row; the ending token belongs to the response.
    pad_id: fills finished rows. Masks never look at it, so it may equal an end-of-sequence id.
    constrain: sharding constraint for arrays with a leading batch axis.
  """
  prompt_length = prompts.tokens.shape[1]
  keys = sample_keys(key, step, prompts.example_id, group_size)
  repeat = lambda x, axis=0: jnp.repeat(x, group_size, axis)

  cache = model.init_cache(prompts.tokens.shape[0], prompt_length + max_new_tokens)
  out = model(prompts.tokens, prompts.mask, cache=cache, cache_index=0)
  cache = out.cache.replace(
    k=repeat(out.cache.k, 1), v=repeat(out.cache.v, 1), mask=constrain(repeat(out.cache.mask))
  )
  hidden = constrain(repeat(out.hidden[:, -1]))

  def draw(t, hidden, ended):
    token = sample_token(jax.vmap(jax.random.fold_in, (0, None))(keys, t), model.logits(hidden), temperature)
    token = jnp.where(ended, pad_id, token)
    return token, ended | jnp.isin(token, jnp.asarray(eos_ids, jnp.int32))

  rows = hidden.shape[0]
  token, ended = draw(0, hidden, jnp.zeros(rows, bool))
  tokens = jnp.full((rows, max_new_tokens), pad_id, jnp.int32).at[:, 0].set(token)
  lengths = jnp.ones(rows, jnp.int32)

  def unfinished(carry):
    t, _, _, _, ended, _ = carry
    return (t < max_new_tokens) & ~ended.all()

  def decode(carry):
    t, tokens, last, cache, ended, lengths = carry
    out = model(last[:, None], ~ended[:, None], cache=cache, cache_index=prompt_length + t - 1)
    token, now_ended = draw(t, out.hidden[:, 0], ended)
    lengths = lengths + ~ended
    return t + 1, tokens.at[:, t].set(token), token, out.cache, now_ended, lengths

  carry = (jnp.int32(1), tokens, token, cache, ended, lengths)
  _, tokens, _, _, ended, lengths = jax.lax.while_loop(unfinished, decode, carry)

  response_mask = jnp.arange(max_new_tokens) < lengths[:, None]
  return Sequences(
    tokens=constrain(jnp.concatenate([repeat(prompts.tokens), tokens], 1)),
    token_mask=constrain(jnp.concatenate([repeat(prompts.mask), response_mask], 1)),
    response_mask=constrain(response_mask),
    has_eos=ended,
  )
