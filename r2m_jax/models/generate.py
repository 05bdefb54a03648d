"""Sampling: prefill the prompts once, then decode with a KV cache until every row has ended."""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from r2m_jax.models.decode import Decoder, ScannedDecoder, decoder_of
from r2m_jax.models.transformer import Transformer, lay_states
from r2m_jax.ops import Truncation, at_least_f32, kept
from r2m_jax.parallel.rows import map_rows, shards_of, take_shares
from r2m_jax.parallel.sharding import ROWS, lay, lay_rows, row_shards
from r2m_jax.types import Prompts, Sequences

GROUPED = 2048  # entries; larger vocabularies are drawn from in two parts
STAGES = 4  # parts of a response, between which the cache grows
SHORTEST = 32  # minimum tokens of such a part


def sample_keys(
  key: jax.Array, step: jax.Array, example_id: jax.Array, first: jax.Array, group_size: int
) -> jax.Array:
  """One key per trajectory, a function of only (run key, step, prompt id, sample index). The indices
  of a prompt's samples start at `first`.

  So any row can be recomputed by itself, on any mesh and in any batch.   i32[P], i32[P] -> key[B].
  """
  prompt_keys = jax.vmap(jax.random.fold_in, (None, 0))(jax.random.fold_in(key, step), example_id)
  fold = jax.vmap(jax.vmap(jax.random.fold_in, (None, 0)))
  return fold(prompt_keys, first[:, None] + jnp.arange(group_size)).reshape(-1)


def first_samples(example_id: jax.Array, group_size: int) -> jax.Array:
  """The index of each prompt's first sample: 0, unless the prompt is in the step for a second time,
  as at the border of two epochs. Its samples are then further ones.   i32[P] -> i32[P].
  """
  before = jnp.tril(example_id[:, None] == example_id, -1)
  return group_size * before.sum(1, dtype=jnp.int32)


def most_likely(logits: jax.Array) -> jax.Array:
  """[B, V] -> i32[B]."""
  return logits.argmax(-1).astype(jnp.int32)


def sample_token(
  keys: jax.Array, logits: jax.Array, truncation: Truncation = Truncation()
) -> jax.Array:
  """Draws from softmax(logits), truncated, with one key per row.

  Noise for every entry of a large vocabulary costs as much as its logits. For large vocabularies a
  group of entries is therefore drawn first, by the sum of its probabilities, and then one of its
  entries. The distribution is the same, from 64 + V / 64 random numbers. Group g of 64 has the
  entries g, g + 64, ..., so that a head that is split over devices is split equally in every group.

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

  The noise is always float32, so that float64 tests draw the same tokens.
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
  """(first token, end) of each loop that decodes tokens 1 .. T - 1. Attention reads all slots, so
  in each loop the cache has only the slots that its tokens need. If `growing` is False, there is
  only one loop.
  """
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
  halvings: int = 0,
) -> Sequences:
  """Samples `group_size` responses for each prompt.

  Each prompt is prefilled once, and its samples read its cache. Together with greedy rows, each
  sample has a copy. The loop stops when all rows have ended.

  Args:
    key: the run's key; see `sample_keys`.
    step: i32[], the step the samples belong to.
    max_new_tokens: T. A row without an end-of-sequence token within T tokens is cut off (`has_eos`
      False).
    temperature: 0 is greedy.
    eos_ids: any of these ends a row; the end token belongs to the response.
    pad_id: fills finished rows. Masks do not depend on it, so it may equal an end-of-sequence id.
    truncation: which tokens may be drawn; log-probabilities in the update use the same rule.
    repetition_stop: N: a row whose last N tokens repeat the N before them is cut off there; 0:
      never.
    greedy_rows: P more rows follow, one greedy response to each prompt.
    waves: number of equal groups of prompts that are sampled one after another, so that only one
      group's cache exists at a time. The tokens are the same.
    halvings: how often decoding continues with half of the rows once at most half are unfinished.
      The tokens are the same.
  """
  how = Sampler(
    key=key,
    step=step,
    group_size=group_size,
    max_new_tokens=max_new_tokens,
    temperature=temperature,
    eos_ids=eos_ids,
    pad_id=pad_id,
    truncation=truncation,
    repetition_stop=repetition_stop,
    greedy_rows=greedy_rows,
    halvings=halvings,
  )
  first = first_samples(prompts.example_id, group_size)
  if waves == 1:
    return sample(model, prompts, first, how)
  return in_waves(functools.partial(sample, model, how=how), prompts, first, group_size, waves)


def in_waves(
  draw: Callable, prompts: Prompts, first: jax.Array, group_size: int, waves: int
) -> Sequences:
  """`draw(prompts, first)` in `waves` groups of prompts. The order is that of a single call: the samples
  of all prompts, then their greedy rows.
  """

  def wave(prompts, first):
    """(rows of each prompt [P / waves, K, ...], its greedy row [P / waves, 1, ...] or none)."""
    drawn = draw(prompts, first)
    count = len(prompts.tokens)
    sampled = count * group_size

    def rows(x):
      return x.reshape(count, len(x) // count, *x.shape[1:])

    samples = jax.tree.map(lambda x: rows(x[:sampled]), drawn)
    return samples, jax.tree.map(lambda x: rows(x[sampled:]), drawn)

  def flat(x):
    return x.reshape(x.shape[0] * x.shape[1], *x.shape[2:])

  samples, greedy = map_rows(wave, waves, prompts, first)
  return jax.tree.map(lambda s, g: jnp.concatenate([flat(s), flat(g)]), samples, greedy)


@dataclasses.dataclass(frozen=True)
class Sampler:
  """The settings of `generate`; see its arguments."""

  key: jax.Array
  step: jax.Array
  group_size: int
  max_new_tokens: int
  temperature: float
  eos_ids: tuple[int, ...]
  pad_id: int
  truncation: Truncation
  repetition_stop: int
  greedy_rows: bool
  halvings: int

  def repeat(self, x: jax.Array, axis: int = 0) -> jax.Array:
    """The rows to decode, from the prompts' rows along `axis`: K copies of each, then the greedy
    rows.
    """
    samples = jnp.repeat(x, self.group_size, axis)
    return jnp.concatenate([samples, x], axis) if self.greedy_rows else samples

  def copies(self, prompts: int) -> int | None:
    """The number of rows of each prompt if they are neighbours on one device, otherwise None."""
    in_runs = not self.greedy_rows and prompts % row_shards() == 0
    return self.group_size if in_runs else None

  def sizes(self, rows: int) -> list[int]:
    """How many rows are decoded together: first all, then half as many each time, with an equal
    share on each device. Rows are not halved if there are greedy rows, which have no keys.
    """
    sizes = [rows]
    while (
      len(sizes) <= self.halvings and not self.greedy_rows and sizes[-1] % (2 * row_shards()) == 0
    ):
      sizes.append(sizes[-1] // 2)
    return sizes

  def draw(self, model: Transformer, keys: jax.Array, t, hidden, stopped):
    """Draws token t of each row from the head's input, hidden [B, D]. Returns (token i32[B],
    `pad_id` in rows that have stopped; bool[B], whether it ends its row). keys: one for each
    sampled row.
    """
    logits = lay(model.logits(hidden, self.temperature or 1.0), ROWS, "tensor")
    sampled = logits[: len(keys)]
    at = jax.vmap(jax.random.fold_in, (0, None))(keys, t)
    if self.temperature:
      token = sample_token(at, sampled, self.truncation)
    else:
      token = most_likely(sampled)
    if self.greedy_rows:
      token = jnp.concatenate([token, most_likely(logits[len(keys) :])])
    token = jnp.where(stopped, self.pad_id, token)
    return token, ~stopped & jnp.isin(token, jnp.asarray(self.eos_ids, jnp.int32))

  @property
  def stops_loops(self) -> bool:
    """Whether repeating rows are cut off; a loop must fit into the response."""
    return 0 < 2 * self.repetition_stop <= self.max_new_tokens


RESULTS = ("tokens", "stopped", "has_eos", "lengths")


class Decoding(NamedTuple):
  """The state of the rows during decoding."""

  t: jax.Array  # i32[]; the next token to decode
  tokens: jax.Array  # i32[B, T]
  last: jax.Array  # i32[B], the newest token
  cache: Any
  stopped: jax.Array  # bool[B]
  has_eos: jax.Array  # bool[B]
  lengths: jax.Array  # i32[B]

  def taken(self, order: jax.Array) -> "Decoding":
    """The rows of `unfinished_first`, as a smaller state."""
    mine = {name: take_shares(getattr(self, name), order) for name in (*RESULTS, "last")}
    return self._replace(cache=self.cache.taken(order), **mine)

  def with_results(self, order: jax.Array, part: "Decoding") -> "Decoding":
    """A copy with the results of the rows of `taken`; the cache does not change."""

    def put(x, new):
      shards = x.reshape(len(order), -1, *x.shape[1:])
      new = new.reshape(len(order), -1, *x.shape[1:])
      both = jax.vmap(lambda x, i, new: x.at[i].set(new, unique_indices=True))(shards, order, new)
      return lay_rows(both.reshape(x.shape))

    return self._replace(
      **{name: put(getattr(self, name), getattr(part, name)) for name in RESULTS}
    )


def sample(model: Transformer, prompts: Prompts, first: jax.Array, how: Sampler) -> Sequences:
  """One wave of `generate`; `first` is that of `sample_keys`."""
  prompts = jax.tree.map(lay_rows, prompts)
  count, prompt_length = prompts.tokens.shape
  keys = sample_keys(how.key, how.step, prompts.example_id, first, how.group_size)
  empty = model.init_cache(count, prompt_length)
  out = model(prompts.tokens, prompts.mask, cache=empty, cache_index=0)
  decoder = decoder_of(model, prompt_length + how.max_new_tokens)
  cache = decoder.cache(out.cache, how.repeat, how.copies(count))
  hidden = lay_states(how.repeat(out.hidden[:, -1:]))[:, 0]
  draw = functools.partial(how.draw, model)
  rows = first_tokens(hidden, cache, how, functools.partial(draw, keys))
  rows = decode(decoder, rows, prompt_length, how, draw, keys)
  response_mask = jnp.arange(how.max_new_tokens) < rows.lengths[:, None]
  return Sequences(
    tokens=lay_rows(jnp.concatenate([how.repeat(prompts.tokens), rows.tokens], 1)),
    token_mask=lay_rows(jnp.concatenate([how.repeat(prompts.mask), response_mask], 1)),
    response_mask=lay_rows(response_mask),
    has_eos=rows.has_eos,
  )


def first_tokens(hidden: jax.Array, cache: Any, how: Sampler, draw: Callable) -> Decoding:
  """The rows with their first token, which is drawn from the prefill's hidden [B, D]."""
  count = hidden.shape[0]
  token, has_eos = draw(0, hidden, jnp.zeros(count, bool))
  tokens = jnp.full((count, how.max_new_tokens), how.pad_id, jnp.int32).at[:, 0].set(token)
  lengths = jnp.ones(count, jnp.int32)
  return Decoding(jnp.int32(1), tokens, token, cache, has_eos, has_eos, lengths)


def decode(
  decoder: Decoder | ScannedDecoder,
  rows: Decoding,
  prompt_length: int,
  how: Sampler,
  draw: Callable,
  keys: jax.Array,
) -> Decoding:
  """The rows with tokens 1 .. T - 1, until all have stopped; draw(keys, t, hidden, stopped) ->
  (token, whether it ends its row).

  Once at most half of the rows are unfinished, they continue without the others; see
  `Sampler.sizes`.
  """

  def one_token(keys, rows: Decoding) -> Decoding:
    t = rows.t
    last, live = rows.last[:, None], ~rows.stopped[:, None]
    hidden, cache = decoder(last, live, rows.cache, prompt_length + t - 1)
    token, ends = draw(keys, t, hidden, rows.stopped)
    tokens = rows.tokens.at[:, t].set(token)
    lengths = rows.lengths + ~rows.stopped
    stopped = rows.stopped | ends
    if how.stops_loops:
      stopped |= loops(tokens, t, how.repetition_stop)
    return Decoding(t + 1, tokens, token, cache, stopped, rows.has_eos | ends, lengths)

  def until(end: int, enough: int, keys, rows: Decoding) -> Decoding:
    """Decodes tokens before `end` while some device has more than `enough` unfinished rows."""

    def goes_on(rows: Decoding):
      return (rows.t < end) & (unfinished(rows.stopped) > enough)

    return jax.lax.while_loop(goes_on, functools.partial(one_token, keys), rows)

  def finish(keys, rows: Decoding, sizes: list[int]) -> Decoding:
    """Decodes the remaining tokens with fewer and fewer rows, starting with sizes[0]."""
    rows = until(how.max_new_tokens, enough_of(sizes), keys, rows)
    return go_on_with_half(keys, rows, sizes[1:])

  def go_on_with_half(keys, rows: Decoding, sizes: list[int]) -> Decoding:
    if not sizes:
      return rows
    order = unfinished_first(rows.stopped, sizes[0])
    return rows.with_results(order, finish(take_shares(keys, order), rows.taken(order), sizes))

  sizes = how.sizes(len(keys))
  for _, end in stages(how.max_new_tokens, decoder.grows):
    rows = rows._replace(cache=rows.cache.grown(prompt_length + end))
    rows = until(end, enough_of(sizes), keys, rows)
  return go_on_with_half(keys, rows, sizes[1:])


def decoded_places(lengths: np.ndarray, limit: int, halvings: int) -> int:
  """The number of tokens that `generate` computes for rows of these lengths i32[B] on one device,
  including first tokens: every row that is still decoded counts, finished or not.
  """
  size, places = len(lengths), len(lengths)
  for t in range(1, limit):
    left = int((lengths > t).sum())
    while halvings and size % 2 == 0 and left <= size // 2:
      size, halvings = size // 2, halvings - 1
    if not left:
      break
    places += size
  return places


def enough_of(sizes: list[int]) -> int:
  """How many of a device's rows may be unfinished when decoding switches from sizes[0] to the next
  of the `sizes`; 0 if there is none.
  """
  return sizes[1] // row_shards() if len(sizes) > 1 else 0


def unfinished(stopped: jax.Array) -> jax.Array:
  """bool[B] -> i32[], the largest number of unfinished rows on a device."""
  return (~stopped).reshape(shards_of(len(stopped)), -1).sum(1).max()


def unfinished_first(stopped: jax.Array, size: int) -> jax.Array:
  """The `size` rows that continue: on each device the unfinished rows and then others, in their
  order.   bool[B] -> i32[S, size / S], counted on the device.
  """
  shards = row_shards()
  order = jnp.argsort(stopped.reshape(shards, -1), 1, stable=True)
  return order[:, : size // shards].astype(jnp.int32)
