"""Decoding: token after token over a cache, in a loop.

If a loop over tokens reads stacked arrays, it copies a layer's slice of the weights and the cache
before each matmul. A `Decoder` has separate arrays for each layer's weights and cache, and reads
them in place. The price is one extra copy of the layers' weights, and compiling every layer
separately. A TPU's compiler reads the slices in place, so a `ScannedDecoder` runs the model
unchanged there.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx, struct

from r2m_jax.models.arch import LayerKind
from r2m_jax.models.cache import Cache, lay_cache, padded, padded_mask, write
from r2m_jax.models.kernels.slots import Slots
from r2m_jax.models.transformer import (
  MLP,
  Attention,
  Block,
  Table,
  Transformer,
  Visible,
  as_rows,
  by_kind,
  check_length,
  lay_states,
)
from r2m_jax.parallel.rows import take_shares
from r2m_jax.parallel.sharding import lay_rows, mesh_around, path_name


class LayerCache(struct.PyTreeNode):
  """Keys and values by slot, in one array for each layer. All rows write the same slot."""

  k: tuple[jax.Array, ...]  # of a layer [B, KV, S, Dh]; if `turned`, [B, KV, Dh, S]
  v: tuple[jax.Array, ...]  # of a layer [B, KV, S, Dh]
  mask: jax.Array  # bool[B, S]   True where a real token was written, slots of `prompt` included
  prompt: tuple = ()  # (k, v) of the slots before, shared by runs of rows; see `shared`
  turned: bool = struct.field(
    pytree_node=False, default=False
  )  # transposed for the matmul with queries

  @classmethod
  def of(cls, cache: Cache, turned: bool) -> "LayerCache":
    """The layers of a prefilled cache. Keys are `turned` (transposed) for `attend`, and not for
    `attend_slots`.
    """
    k = (k.swapaxes(-1, -2) if turned else k for k in cache.k)
    return cls(k=tuple(k), v=tuple(cache.v), mask=cache.mask, turned=turned)

  @property
  def key_slots(self) -> int:
    """The slot axis of k; the slot axis of v is -2."""
    return -1 if self.turned else -2

  def shared(self, copies: int) -> "LayerCache":
    """A cache for `copies` rows instead of each row, which share the present slots."""

    def none(x, axis):
      return lay_cache(jnp.repeat(jax.lax.slice_in_dim(x, 0, 0, axis=axis), copies, 0))

    k = tuple(none(x, self.key_slots) for x in self.k)
    v = tuple(none(x, -2) for x in self.v)
    mask = lay_rows(jnp.repeat(self.mask, copies, 0))
    return self.replace(k=k, v=v, mask=mask, prompt=(self.k, self.v))

  def repeated(self, repeat: Callable) -> "LayerCache":
    """A copy with `repeat(x, axis)` applied to every array, along the rows."""
    k = tuple(lay_cache(repeat(x, 0)) for x in self.k)
    v = tuple(lay_cache(repeat(x, 0)) for x in self.v)
    return self.replace(k=k, v=v, mask=lay_rows(repeat(self.mask, 0)))

  def taken(self, order: jax.Array) -> "LayerCache":
    """Some of the rows, each with all of its slots; see `parallel.rows.take_shares`."""

    def rows(own, prompt, axis):
      own = take_shares(own, order)
      if prompt is not None:
        copies = len(self.mask) // len(prompt)
        own = jnp.concatenate([take_shares(prompt, order // copies), own], axis)
      return lay_cache(own)

    keys, values = self.prompt or ((None,) * len(self.k),) * 2
    k = tuple(rows(own, prompt, self.key_slots) for own, prompt in zip(self.k, keys))
    v = tuple(rows(own, prompt, -2) for own, prompt in zip(self.v, values))
    return self.replace(k=k, v=v, mask=lay_rows(take_shares(self.mask, order)), prompt=())

  def grown(self, slots: int) -> "LayerCache":
    """A copy with empty slots at the end, `slots` in total."""
    more = slots - self.mask.shape[1]
    k = tuple(padded(x, more, self.key_slots) for x in self.k)
    v = tuple(padded(x, more, -2) for x in self.v)
    return self.replace(k=k, v=v, mask=padded_mask(self.mask, more))

  def written(self, mask: jax.Array, slot: jax.Array) -> "LayerCache":
    """A copy with mask bool[B, 1] in `slot`, which is about to be written."""
    return self.replace(mask=jax.lax.dynamic_update_slice_in_dim(self.mask, mask, slot, 1))

  def store(self, layer: int, slot: jax.Array, k: jax.Array, v: jax.Array):
    """Writes a token's k and v [B, KV, 1, Dh] and returns (keys and values to attend over, the
    prompt's keys and values before them or (), the layer's new (k, v)). `attend_slots` writes by
    itself.
    """
    keys, values = self.k[layer], self.v[layer]
    prompt = tuple(x[layer] for x in self.prompt)
    if not self.turned:
      return k, v, prompt, (keys, values)
    at = slot - (prompt[1].shape[2] if prompt else 0)
    keys = write(keys, k.swapaxes(-1, -2), 0, 0, 0, at)
    values = write(values, v, 0, 0, at, 0)
    read = keys.swapaxes(-1, -2)
    if prompt:
      prompt = (prompt[0].swapaxes(-1, -2), prompt[1])
    return read, values, prompt, (keys, values)


class Columns:
  """A linear layer on columns, W^T x: [in, N] -> [out, N]. For few rows XLA on CPU needs 4 to 15%
  less time for it than for x W, because it repacks all weights for x W.
  """

  def __init__(self, linear: nnx.Linear):
    self.kernel = linear.kernel[...].T
    self.bias = linear.bias

  def __call__(self, x: jax.Array) -> jax.Array:
    y = jnp.matmul(self.kernel, x)
    return y if self.bias is None else y + self.bias[...][:, None].astype(y.dtype)


def join(*linears: nnx.Linear) -> nnx.Linear:
  """One linear layer with the columns of all the given ones, which read the same input."""
  one = nnx.clone(linears[0])
  one.kernel = nnx.Param(jnp.concatenate([linear.kernel[...] for linear in linears], 1))
  biases = [linear.bias[...] for linear in linears if linear.bias is not None]
  if biases:
    one.bias = nnx.Param(jnp.concatenate(biases))
  return one


class JoinedAttention:
  """An `Attention` that computes q, k and v in one matmul."""

  def __init__(self, attention: Attention):
    linears = (attention.q, attention.k, attention.v)
    self.attention = attention
    self.qkv = join(*linears)
    self.ends = np.cumsum([linear.out_features for linear in linears])[:-1]

  def __call__(self, x, table, store):
    projected = jnp.split(self.qkv(as_rows(x)), self.ends, -1)
    return self.attention.attend(projected, x.shape, table, store)


class JoinedMLP:
  """An `MLP` with a gate that computes gate and up in one matmul."""

  def __init__(self, mlp: MLP):
    self.mlp = mlp
    self.wide = join(mlp.gate, mlp.up)

  def __call__(self, x: jax.Array) -> jax.Array:
    """[B, L, D] -> [B, L, D]."""
    gate, up = jnp.split(self.wide(as_rows(x)), [self.mlp.gate.out_features], -1)
    return self.mlp.down(self.mlp.inside(gate, up)).reshape(x.shape)


class ColumnsMLP:
  """An `MLP` as `Columns`, gate and up joined."""

  def __init__(self, mlp: MLP):
    self.mlp = mlp
    self.wide = Columns(join(mlp.gate, mlp.up) if mlp.gated else mlp.up)
    self.down = Columns(mlp.down)

  def __call__(self, x: jax.Array) -> jax.Array:
    """[B, L, D] -> [B, L, D]."""
    wide = jnp.split(self.wide(as_rows(x).T), 2 if self.mlp.gated else 1)
    y = self.down(self.mlp.inside(*wide))
    return jax.lax.optimization_barrier(y).T.reshape(x.shape)  # otherwise XLA rewrites it as x W


def joined(block: Block, in_columns: bool) -> Callable:
  """The block with one matmul for linear layers of one input."""
  attn = JoinedAttention(block.attn)
  mlp: Callable = block.mlp
  if in_columns:
    mlp = ColumnsMLP(block.mlp)
  elif block.mlp.gated:
    mlp = JoinedMLP(block.mlp)
  return functools.partial(block.around, attn, mlp)


class ScannedDecoder:
  """A model that decodes unchanged, by a scan over its layers."""

  grows = False  # whether its cache should grow in stages

  def __init__(self, model: Transformer):
    self.model = model

  def cache(self, prefilled: Cache, repeat: Callable, copies: int | None) -> Cache:
    """The cache to decode with, from that of the prompts; see `Decoder.cache`."""
    return prefilled.repeated(repeat) if copies is None else prefilled.shared(copies)

  def __call__(self, tokens, live, cache: Cache, slot) -> tuple[jax.Array, Cache]:
    """See `Decoder.__call__`."""
    out = self.model(tokens, live, cache=cache, cache_index=slot)
    return out.hidden[:, 0], out.cache


class Decoder:
  """A model with separate arrays for each layer's parameters, in the compute dtype, and cache.

  On a single device, linear layers of one input are joined, because with few rows a GPU is bound by
  launches. On a CPU, few rows go through the MLP as `Columns`.
  """

  def __init__(self, model: Transformer, slots: int):
    """slots: the maximum size of its cache."""
    check_length(model.arch, slots)
    self.model = model
    self.in_slots = model.decodes_in_slots
    self.grows = not self.in_slots  # whether its cache should grow in stages
    stacked, blocks = layers_of(model)
    # cos and sin of all positions are computed once: XLA on CPU would recompute those of a token in
    # each head of each layer
    self.rotations: dict[LayerKind, tuple[jax.Array, jax.Array]] = {}
    if not self.in_slots:
      for kind in model.arch.kinds:
        self.rotations[kind] = model.rotation(kind, jnp.arange(slots))
    self.layers: list[Callable] = list(blocks)
    if mesh_around() is None and not has_adapters(stacked):
      self.layers = [joined(block, model.decodes_in_columns) for block in blocks]

  def cache(self, prefilled: Cache, repeat: Callable, copies: int | None) -> LayerCache:
    """The cache for decoding, from the prompts' cache.

    Args:
      repeat: repeat(x, axis) turns the prompts' rows into the rows to decode.
      copies: the number of rows of each prompt, if they are neighbours on one device. They then
        share the prompt's keys and values. None: each row gets a copy.
    """
    cache = LayerCache.of(prefilled, turned=not self.in_slots)
    return cache.repeated(repeat) if copies is None else cache.shared(copies)

  def __call__(self, tokens, live, cache: LayerCache, slot) -> tuple[jax.Array, LayerCache]:
    """One token a row: tokens i32[B, 1], live bool[B, 1] (False if the row has ended), slot i32[]
    to write -> (hidden [B, D] that the language-model head reads, cache).
    """
    cache = cache.written(live, slot)
    tables, kinds = self._tables(cache, slot)
    x = self.model.embedded(tokens)
    found = []
    for layer, block in enumerate(self.layers):
      table = tables
      if kinds is not None:
        arch = self.model.arch
        kind = arch.kinds.index(arch.kind_of_layers[layer])
        table = jax.tree.map(lambda t, kind=kind: t[kind], tables)
      x, own = block(x, table, functools.partial(cache.store, layer, slot))
      x = lay_states(x)
      found.append(own)
    k, v = zip(*found)
    return self.model.final_norm(x)[:, 0], cache.replace(k=k, v=v)

  def _tables(self, cache: LayerCache, slot) -> tuple[Any, Any]:
    """What layers read in addition to x, as in `Transformer`; for `attend_slots` a `Slots` replaces
    the mask.
    """
    visible = Visible.of(cache.mask, slot, 1)

    def table(kind):
      rotation = self._rotation(kind, visible.here[:, None])
      mask = visible.mask(self.model.arch.sliding_window if kind.slides else None)
      if self.in_slots:
        slots = Slots(mask[:, 0].argmax(-1).astype(jnp.int32), jnp.int32(slot))
        return Table(*rotation, slots)
      return Table(*rotation, mask[:, None])

    return by_kind(self.model.arch, table)

  def _rotation(self, kind: LayerKind, positions: jax.Array) -> tuple[jax.Array, ...]:
    if not self.rotations:
      return self.model.rotation(kind, positions)
    return tuple(jnp.take(x, positions, 0, mode="clip") for x in self.rotations[kind])


def layers_of(model: Transformer) -> tuple[nnx.State, list[Block]]:
  """(the stacked parameters of all layers, kernels in the compute dtype; a `Block` for each)."""
  blocks, stacked = nnx.split(model.layers)

  def in_dtype(path, x):
    return x.astype(model.compute_dtype) if "kernel" in path_name(path) else x

  stacked = jax.tree_util.tree_map_with_path(in_dtype, stacked)

  def one(i):
    return nnx.merge(blocks, jax.tree.map(lambda x: x[i], stacked))

  return stacked, [one(i) for i in range(model.arch.num_layers)]


def has_adapters(stacked: nnx.State) -> bool:
  """Whether these are the parameters of a model with adapters; see `models.lora`."""
  paths = jax.tree_util.tree_flatten_with_path(stacked)[0]
  return any("lora" in path_name(path) for path, _ in paths)


def decoder_of(model: Transformer, slots: int) -> Decoder | ScannedDecoder:
  """The decoder for this model, with at most this number of cache slots for prompt and response."""
  return Decoder(model, slots) if model.decodes_apart else ScannedDecoder(model)
