"""One decoder for every supported family: stacked blocks under a scan, a KV cache, feedback from
any layer.

The `ArchConfig` is evaluated during tracing, so the compiled program contains only what the family
needs. Parameters:

  embed/embedding [V, D]           layers/attn_norm/scale [N, D]      final_norm/scale [D]
  layers/attn/{q,k,v,o}/kernel     layers/mlp_norm/scale [N, D]       lm_head/kernel [D, V]  (absent when tied)
  layers/mlp/{gate,up,down}/kernel [N, in, out]

and, if the family has them, `bias` next to any kernel or layer-norm scale,
layers/attn/{q_norm,k_norm}/scale and layers/{attn_post_norm,mlp_post_norm}/scale. OLMo has no
layers/{attn_norm,mlp_norm}. N layers, S key slots, H query heads, KV key heads, Dh numbers a head.
"""

import functools
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx, struct

from r2m_jax.models import rope
from r2m_jax.models.arch import ArchConfig, LayerKind
from r2m_jax.models.attention import (
  Shared,
  SharedMask,
  attend,
  attend_shared,
  choose,
  dot_product,
)
from r2m_jax.models.cache import Cache, lay_cache, write
from r2m_jax.models.kernels.slots import Slots, attend_slots, slots_fit
from r2m_jax.models.kernels.splash import BLOCK, Seen, splash_attend
from r2m_jax.models.logprobs import Head, tempered
from r2m_jax.models.packing import Packing
from r2m_jax.ops import all_bits, at_least_f32
from r2m_jax.parallel.errors import UserError
from r2m_jax.parallel.sharding import ROWS, lay, lay_rows, row_shards

ACTIVATIONS: dict[str, Callable[[jax.Array], jax.Array]] = {
  "silu": jax.nn.silu,
  "gelu": functools.partial(jax.nn.gelu, approximate=False),
  "gelu_tanh": functools.partial(jax.nn.gelu, approximate=True),
}
SCORE_ACTIVATION: dict[str, Callable[[jax.Array], jax.Array]] = {
  "relu": jax.nn.relu,
  "silu": jax.nn.silu,
  "gelu": lambda x: jax.nn.gelu(x, approximate=False),
  "tanh": jnp.tanh,
}
REMAT: dict[str, Callable[[Callable], Callable]] = {
  "none": lambda f: f,
  "full": lambda f: jax.checkpoint(f, prevent_cse=False),
  "dots": lambda f: jax.checkpoint(
    f, prevent_cse=False, policy=jax.checkpoint_policies.dots_with_no_batch_dims_saveable
  ),
}


@struct.dataclass
class Output:
  """The results of a forward pass."""

  hidden: jax.Array  # [B, L, D]    after the final norm: what the language-model head reads
  feedback: jax.Array  # [B, L, D]  `hidden`, or the residual stream after `feedback_layer`
  cache: Any  # a Cache, None without one


def lay_states(x: jax.Array) -> jax.Array:
  """The residual stream [B, L, D], distributed over the mesh.

  Rows are split over data and fsdp: a pass over many tokens moves the weights of one layer at a
  time to the rows. During decoding a row is a single token and smaller than the weights. The
  weights then stay in place, and fsdp splits D in the same way as the weights.
  """
  return lay_rows(x) if x.shape[1] > 1 else lay(x, "data", None, "fsdp")


def at_least_float32(dtype) -> jnp.dtype:
  """For values that need more than bfloat16: norms, softmax, rotations, logits. float64 stays
  float64.
  """
  return jnp.promote_types(dtype, jnp.float32)


class Norm(nnx.Module):
  """RMS norm, or layer norm with a bias, over the last axis."""

  def __init__(self, size: int, arch: ArchConfig, *, param_dtype, kind: str | None = None):
    self.kind = kind or arch.norm
    self.eps = arch.norm_eps
    self.offset = arch.norm_offset
    self.scale = nnx.Param(jnp.full((size,), 1.0 - self.offset, param_dtype))
    if self.kind == "layer":
      self.bias = nnx.Param(jnp.zeros((size,), param_dtype))

  def __call__(self, x: jax.Array) -> jax.Array:
    """[..., size] -> [..., size], same dtype."""
    wide = at_least_float32(x.dtype)
    y = x.astype(wide)
    if self.kind == "layer":
      y = y - y.mean(-1, keepdims=True)
    y = y * jax.lax.rsqrt((y * y).mean(-1, keepdims=True) + self.eps)
    y = y * (self.scale[...].astype(wide) + self.offset)
    if self.kind == "layer":
      y = y + self.bias[...].astype(wide)
    return y.astype(x.dtype)


def rotate(x: jax.Array, cos: jax.Array, sin: jax.Array) -> jax.Array:
  """Rotates the leading 2R elements of each head. x [B, heads, L, Dh], cos and sin [B, 1, L, R], at
  least float32.
  """
  r = cos.shape[-1]
  a = x[..., :r].astype(cos.dtype)
  b = x[..., r : 2 * r].astype(cos.dtype)
  rest = x[..., 2 * r :]
  turned = jnp.concatenate([a * cos - b * sin, b * cos + a * sin], -1).astype(x.dtype)
  return turned if rest.shape[-1] == 0 else jnp.concatenate([turned, rest], -1)


class Table(NamedTuple):
  """What attention reads in addition to the tokens."""

  cos: jax.Array  # [B, 1, L, R]
  sin: jax.Array
  seen: Any  # mask bool[B, 1, L, S], or a SharedMask, Seen or Slots that represents it
  packing: Packing | None = None  # of the input tokens; attention itself reads padded rows


class Attention(nnx.Module):
  """Grouped-query attention with rotary positions."""

  def __init__(self, arch: ArchConfig, *, rngs: nnx.Rngs, dtype, param_dtype, attention="xla"):
    self.arch, self.attention = arch, attention
    linear = functools.partial(nnx.Linear, dtype=dtype, param_dtype=param_dtype, rngs=rngs)
    d = arch.hidden_size
    q = arch.num_heads * arch.head_dim
    kv = arch.num_kv_heads * arch.head_dim
    self.q = linear(d, q, use_bias=arch.qkv_bias)
    self.k = linear(d, kv, use_bias=arch.qkv_bias)
    self.v = linear(d, kv, use_bias=arch.qkv_bias)
    self.o = linear(q, d, use_bias=arch.out_bias, kernel_init=residual_init(arch))
    if arch.qk_norm:
      own = (q, kv) if arch.qk_norm_joint else (arch.head_dim, arch.head_dim)
      self.q_norm = Norm(own[0], arch, param_dtype=param_dtype, kind="rms")
      self.k_norm = Norm(own[1], arch, param_dtype=param_dtype, kind="rms")

  def __call__(self, x, table, store):
    """x [B, L, D]; the `Table` of this layer; store(k, v) -> (keys and values to attend over, the
    prompt's keys and values before them or (), cache).
    """
    rows = as_rows(x)
    return self.attend((self.q(rows), self.k(rows), self.v(rows)), x.shape, table, store)

  def attend(self, projected, shape, table, store):
    """`__call__` from queries, keys and values [B * L, heads * Dh] of an x of `shape` [B, L, D]."""
    arch = self.arch
    cos, sin, seen, packing = table
    padded = shape[:2] if packing is None else packing.shape

    def heads(y):
      if packing is not None:
        y = packing.unpack(y.reshape(*shape[:2], -1))
      return lay(y.reshape(*padded, -1, arch.head_dim).swapaxes(1, 2), ROWS, "tensor")

    q, k, v = projected
    if arch.qk_norm_joint:
      q, k = self.q_norm(q), self.k_norm(k)
    q = heads(q)
    k = heads(k)
    v = heads(v)
    if arch.qk_norm and not arch.qk_norm_joint:
      q, k = self.q_norm(q), self.k_norm(k)
    k, v, prompt, cache = store(rotate(k, cos, sin), v)
    q = rotate(q, cos, sin)
    if isinstance(seen, Slots):
      interpret = self.attention != "cudnn"
      y, cache = attend_slots(
        q, k, v, cache, prompt, seen, scale=arch.query_scale, interpret=interpret
      )
    elif isinstance(seen, SharedMask):
      y = attend_shared(self.mix, q, k, v, seen)
    else:
      y = self.mix(q, k, v, seen, prompt)
    rows = y.swapaxes(1, 2).reshape(padded[0] * padded[1], -1)
    if packing is not None:
      rows = as_rows(packing.pack(rows.reshape(*padded, -1)))
    return self.o(rows).reshape(shape), cache

  def mix(self, q, k, v, seen, prompt=()):
    """q [B, H, L, Dh], k and v [B, KV, S, Dh] -> [B, H, L, Dh], by the implementation that fits
    the call.
    """
    scale = self.arch.query_scale
    cap = self.arch.attn_softcap
    window = self.arch.sliding_window
    if isinstance(seen, Seen):
      interpret = self.attention == "interpreted"
      return splash_attend(q, k, v, seen, scale=scale, cap=cap, window=window, interpret=interpret)
    if self.attention in ("dot_product", "cudnn") and q.shape[2] > 1:
      implementation: Literal["xla", "cudnn"] = "cudnn" if self.attention == "cudnn" else "xla"
      return dot_product(q, k, v, seen, scale=scale, implementation=implementation)
    return attend(q, k, v, seen, scale=scale, cap=cap, prompt=prompt)


class MLP(nnx.Module):
  """down(act(gate(x)) * up(x)), or down(act(up(x))) without a gate."""

  def __init__(self, arch: ArchConfig, *, rngs: nnx.Rngs, dtype, param_dtype):
    self.activation = arch.activation
    linear = functools.partial(
      nnx.Linear, use_bias=arch.mlp_bias, dtype=dtype, param_dtype=param_dtype, rngs=rngs
    )
    self.gated = arch.gated_mlp
    if self.gated:
      self.gate = linear(arch.hidden_size, arch.intermediate_size)
    self.up = linear(arch.hidden_size, arch.intermediate_size)
    self.down = linear(arch.intermediate_size, arch.hidden_size, kernel_init=residual_init(arch))

  def __call__(self, x: jax.Array) -> jax.Array:
    """[B, L, D] -> [B, L, D]."""
    rows = as_rows(x)
    wide = (self.gate(rows), self.up(rows)) if self.gated else (self.up(rows),)
    return self.down(self.inside(*wide)).reshape(x.shape)

  def inside(self, first: jax.Array, *up: jax.Array) -> jax.Array:
    """The input of `down`: act(gate) * up, or act(up) if the MLP has no gate and `first` is up."""
    activated = ACTIVATIONS[self.activation](first)
    return activated * up[0] if up else activated


class Block(nnx.Module):
  """Attention and MLP, each added to the residual stream."""

  def __init__(self, arch: ArchConfig, *, rngs: nnx.Rngs, dtype, param_dtype, attention="xla"):
    self.arch = arch

    def norm(there: bool) -> Callable[[jax.Array], jax.Array]:
      return Norm(arch.hidden_size, arch, param_dtype=param_dtype) if there else same

    self.attn_norm, self.mlp_norm = norm(arch.pre_norms), norm(arch.pre_norms)
    self.attn = Attention(
      arch, rngs=rngs, dtype=dtype, param_dtype=param_dtype, attention=attention
    )
    self.mlp = MLP(arch, rngs=rngs, dtype=dtype, param_dtype=param_dtype)
    self.attn_post_norm, self.mlp_post_norm = norm(arch.post_norms), norm(arch.post_norms)

  def __call__(self, x, table, store):
    """x [B, L, D] -> (x [B, L, D], cache)."""
    return self.around(self.attn, self.mlp, x, table, store)

  def around(self, attn: Callable, mlp: Callable, x, table, store):
    """`__call__` with `attn` and `mlp` instead of the block's own modules."""
    y, cache = attn(self.attn_norm(x), table, store)
    if self.arch.parallel_residual:
      return x + y + mlp(self.mlp_norm(x)), cache
    x = x + scaled(self.attn_post_norm(y), self.arch.residual_scale)
    y = self.mlp_post_norm(mlp(self.mlp_norm(x)))
    return x + scaled(y, self.arch.residual_scale), cache


def same(x: jax.Array) -> jax.Array:
  """Replaces the norm in families that have none at this place."""
  return x


def scaled(x: jax.Array, scale: float) -> jax.Array:
  """x * scale in the dtype of x."""
  return x if scale == 1.0 else x * jnp.asarray(scale, x.dtype)


def as_rows(x: jax.Array) -> jax.Array:
  """[..., D] -> [N, D]: the gradient of a linear layer is then one plain matmul. With two leading
  axes, XLA on CPU first transposes the widest operand, which took a quarter of an update.
  """
  return x.reshape(-1, x.shape[-1])


def splits_in_runs(shared: Shared | None, rows: int) -> bool:
  """Whether the part that runs of rows share can be computed once: there are such runs, and each is
  on one device of the mesh.
  """
  return shared is not None and shared.copies > 1 and rows % (shared.copies * row_shards()) == 0


class Visible(NamedTuple):
  """Which keys the tokens of a call see: the real tokens up to themselves."""

  seen: jax.Array  # bool[B, L, S]
  here: jax.Array  # i32[B, L]   position of each token
  there: jax.Array  # i32[B, S]  position of each key

  @classmethod
  def of(cls, keys: jax.Array, slot: int | jax.Array, length: int) -> "Visible":
    """For `length` tokens in slots from `slot` on; keys bool[B, S], True on real tokens."""
    there = jnp.maximum(jnp.cumsum(keys, 1, dtype=jnp.int32) - 1, 0)
    causal = jnp.arange(keys.shape[1])[None, :] <= slot + jnp.arange(length)[:, None]
    seen = causal[None] & keys[:, None, :]
    if keys.shape[1] == length:
      return cls(seen, there, there)
    return cls(seen, jnp.maximum(seen.sum(-1, dtype=jnp.int32) - 1, 0), there)

  def mask(self, window: int | None) -> jax.Array:
    """bool[B, L, S]; with a window a token sees itself and the window - 1 tokens before it."""
    if window is None:
      return self.seen
    return self.seen & (self.here[:, :, None] - self.there[:, None, :] < window)


def by_kind(arch: ArchConfig, table: Callable[[LayerKind], tuple]) -> tuple[Any, jax.Array | None]:
  """The results of `table(kind)` for the model's kinds of layers.

  If all layers are of one kind: (its table, None). Otherwise: (the tables stacked, in the order of
  `arch.kinds`; i32[N], the kind of each layer).
  """
  tables = [table(kind) for kind in arch.kinds]
  if len(tables) == 1:
    return tables[0], None
  stacked = jax.tree.map(lambda *kinds: jnp.stack(kinds), *tables)
  return stacked, jnp.asarray([arch.kinds.index(kind) for kind in arch.kind_of_layers], jnp.int32)


def residual_init(arch: ArchConfig):
  """1/sqrt(fan_in), divided by sqrt(2N): the sum of 2N branches then has the initial variance of
  one branch.
  """
  return nnx.initializers.variance_scaling(
    1.0 / (2 * arch.num_layers), "fan_in", "truncated_normal"
  )


class Transformer(nnx.Module):
  """The decoder that `arch` describes. `dtype` is the dtype of the computation (None: the
  parameters' dtype), `param_dtype` the dtype of stored parameters.

  `attention` is (config.attention, platform), the arguments of `models.attention.choose`.
  `adapt(block, rngs)` may add parameters to a block before the layers are stacked; see models.lora.
  """

  def __init__(
    self,
    arch: ArchConfig,
    *,
    rngs: nnx.Rngs,
    dtype=jnp.float32,
    param_dtype=jnp.float32,
    remat="none",
    adapt=None,
    attention: tuple[str, str] = ("auto", "cpu"),
  ):
    if remat not in REMAT:
      raise ValueError(f"{remat=} is unknown; use one of {sorted(REMAT)}")
    self.arch = arch
    self.dtype = dtype
    self.remat = remat
    # how `models.decode` runs the model
    self.decodes_apart = attention[1] != "tpu"
    self.decodes_in_columns = attention[1] == "cpu"
    self.attention = choose(*attention, arch, param_dtype if dtype is None else dtype)
    self.decodes_in_slots = slots_fit(self.attention, arch)
    d = arch.hidden_size
    vocab = arch.vocab_size
    small = nnx.initializers.normal(0.02)
    self.embed = nnx.Embed(
      vocab, d, embedding_init=small, dtype=dtype, param_dtype=param_dtype, rngs=rngs
    )

    @nnx.split_rngs(splits=arch.num_layers)
    @nnx.vmap(in_axes=0, out_axes=0)
    def stack(rngs):
      block = Block(arch, rngs=rngs, dtype=dtype, param_dtype=param_dtype, attention=self.attention)
      return block if adapt is None else adapt(block, rngs)

    self.layers = stack(rngs)
    self.final_norm = Norm(d, arch, param_dtype=param_dtype)
    if arch.untied_head:
      self.lm_head = nnx.Linear(
        d, vocab, use_bias=False, kernel_init=small, dtype=dtype, param_dtype=param_dtype, rngs=rngs
      )

    if arch.score_width:
      self.score_first = nnx.Linear(
        d, arch.score_width, kernel_init=small, param_dtype=param_dtype, rngs=rngs
      )

  @property
  def compute_dtype(self):
    return self.embed.embedding.dtype if self.dtype is None else self.dtype

  def __call__(
    self,
    tokens: jax.Array,
    mask: jax.Array,
    *,
    cache: Cache | None = None,
    cache_index: int | jax.Array | None = None,
    feedback_layer: int = -1,
    shared: Shared | None = None,
    share: float = 1.0,
  ) -> Output:
    """tokens i32[B, L], mask bool[B, L] -> Output.

    A token's position is the number of real tokens before it, so padding on either side changes
    nothing. With a cache, tokens are written to slots cache_index .. cache_index + L - 1 and see
    every real token in slots up to their own. (For a prefill pass the Python int 0; then no empty
    slot is read.) `feedback_layer` -1 returns `hidden`; i >= 0, or negative from the end, returns
    the residual stream after layer i. `shared` defines which rows have the same beginning. The
    beginning is computed once if there is no cache, the kernel supports masks and the runs divide
    over the mesh. The results are the same. `share` below 1 is an upper limit for the share of
    places (of `lines_of`) that hold a real token, and only this share is computed. The results are
    the same at real tokens and zero at padding; they are NaN if there are more real tokens.
    """
    arch, length = self.arch, tokens.shape[1]
    if not -arch.num_layers <= feedback_layer < arch.num_layers:
      raise ValueError(
        f"{feedback_layer=} is not a layer of {arch.num_layers}; -1 is the output of the final norm"
      )
    if (cache is None) != (cache_index is None):
      raise ValueError(
        f"cache and cache_index come together; got {cache_index=} and cache={cache and 'a cache'}"
      )
    tap = None if feedback_layer == -1 else feedback_layer % arch.num_layers
    slot = 0 if cache_index is None else cache_index
    fresh = isinstance(slot, int) and slot == 0  # attend only over the tokens of this call
    if cache is not None:
      cache = cache.written(mask, slot)
    keys = mask if fresh or cache is None else cache.mask  # bool[B, S]
    in_blocks = self._in_blocks(length) and fresh
    shared = None if cache is not None else self.lines_of(shared, len(tokens), length)
    tables, kinds = self._tables(keys, slot, length, in_blocks, shared)
    lines = tokens if shared is None else shared.pack(tokens)
    packing = None
    if share < 1 and cache is None:
      packing = Packing.of(mask if shared is None else shared.pack(mask), share)
      lines = packing.pack(lines)
    x = self.embedded(lines)
    kv = None if cache is None else (cache.k, cache.v)
    prompt = () if cache is None else cache.prompt
    x, kv, tapped = self._scan(x, kv, prompt, tables, kinds, slot, fresh, tap, packing)
    hidden = self.final_norm(x)
    if cache is not None:
      cache = cache.replace(k=kv[0], v=kv[1])

    def rows(x):
      x = x if packing is None else packing.unpack(x)
      return x if shared is None else lay_states(shared.unpack(x))

    hidden = rows(hidden)
    return Output(hidden=hidden, feedback=hidden if tap is None else rows(tapped), cache=cache)

  def _in_blocks(self, length: int) -> bool:
    return self.attention in ("splash", "interpreted") and length >= BLOCK

  def lines_of(self, shared: Shared | None, rows: int, length: int) -> Shared | None:
    """`shared` if a pass over this many whole rows of this length computes the shared part once."""
    apart = self._in_blocks(length) or not splits_in_runs(shared, rows)
    return None if apart else shared

  def _scan(self, x, kv, prompt, tables, kinds, slot, fresh, tap, packing):
    """Runs all layers, one after another: (x, kv, x after layer `tap` or None).

    x [B, L, D]; kv (keys, values) of a cache or None; prompt (keys, values) of the slots before it
    or (); tables and kinds of `_tables`; slot i32[]; `fresh`: attend over the tokens of this call
    instead of the cache; packing: of x, or None.
    """
    blocks, stacked = nnx.split(self.layers)

    def body(carry, xs):
      x, kv, tapped = carry
      state, layer, kind = xs
      table = tables if kind is None else jax.tree.map(lambda t: t[kind], tables)
      table = table._replace(packing=packing)

      def store(k, v):
        if kv is None:
          return k, v, (), None
        at = slot - (prompt[0].shape[-2] if prompt else 0)
        new = tuple(write(all_, one[None], layer, 0, 0, at, 0) for all_, one in zip(kv, (k, v)))
        before = tuple(x[layer] for x in prompt)
        return (k, v, (), new) if fresh else (new[0][layer], new[1][layer], before, new)

      x, kv = nnx.merge(blocks, state)(x, table, store)
      x = lay_states(x)
      if tap is not None:
        tapped = jnp.where(layer == tap, x, tapped)
      return (x, kv, tapped), None

    xs = (stacked, jnp.arange(self.arch.num_layers), kinds)
    carry = (x, kv, None if tap is None else x)
    carry, _ = jax.lax.scan(REMAT[self.remat](body), carry, xs)
    return carry

  def embedded(self, tokens: jax.Array) -> jax.Array:
    """i32[B, L] -> [B, L, D], with the family's scale. Devices that split the embedding's columns
    look up their own columns and exchange the results, so the embedding itself does not move.
    """
    x = jnp.take(self.embed.embedding[...], lay(tokens, "data"), axis=0).astype(self.compute_dtype)
    x = lay_states(lay(x, "data", None, "fsdp"))
    return scaled(x, self.arch.embed_scale)

  def _tables(self, keys, slot, length, in_blocks, shared):
    """What layers read in addition to x, for each of the model's kinds of layers; see `by_kind`.

    keys bool[B, S] -> (`Table`, kinds). With `in_blocks` a `Seen` replaces the mask; with `shared`
    a `SharedMask` does, and the rotations are for the positions of the lines.
    """
    check_length(self.arch, keys.shape[1])
    visible = Visible.of(keys, slot, length)

    def table(kind):
      here = visible.here if shared is None else shared.pack(visible.here)
      rotation = self.rotation(kind, here[:, None])
      if in_blocks:
        return Table(*rotation, Seen(keys, kind.slides))
      mask = visible.mask(self.arch.sliding_window if kind.slides else None)[:, None]
      return Table(*rotation, mask if shared is None else shared.masks(mask))

    return by_kind(self.arch, table)

  def rotation(self, kind: LayerKind, positions: jax.Array) -> tuple[jax.Array, jax.Array]:
    """cos and sin [..., R] of the angles at positions i32[...], for layers of this kind."""
    arch = self.arch
    theta, scaling = arch.rope_theta, arch.rope_scaling
    if kind.slides and arch.rope_local_theta is not None:
      theta, scaling = arch.rope_local_theta, None
    frequencies = rope.frequencies(arch.rotary_dim, theta, scaling)
    magnitude = 1.0 if scaling is None else scaling.magnitude
    if kind.unrotated:
      frequencies, magnitude = 0 * frequencies, 1.0
    angle = positions[..., None] * frequencies.astype(at_least_float32(self.compute_dtype))
    return scaled(jnp.cos(angle), magnitude), scaled(jnp.sin(angle), magnitude)

  def init_cache(self, batch: int, length: int) -> Cache:
    """An empty cache of `length` slots for `batch` rows, in the compute dtype."""
    arch = self.arch
    shape = (arch.num_layers, batch, arch.num_kv_heads, length, arch.head_dim)

    def empty():
      return lay_cache(jnp.zeros(shape, self.compute_dtype))

    return Cache(k=empty(), v=empty(), mask=lay_rows(jnp.zeros((batch, length), bool)))

  def unembedding(self) -> jax.Array:
    """The vocabulary head as one array [D, V], in the compute dtype. It includes `logit_divisor`
    but not `final_softcap`.
    """
    if not self.arch.lm_head:
      raise ValueError(
        "this model has no vocabulary head (ArchConfig.lm_head=False): it is a reward model's "
        "backbone"
      )
    kernel = self.lm_head.kernel[...] if self.arch.untied_head else self.embed.embedding[...].T
    return scaled(kernel, 1 / self.arch.logit_divisor).astype(self.compute_dtype)

  def embedding(self, state: jax.Array) -> jax.Array:
    """[..., D] last-layer states -> [..., Dr], the input of a score head's last layer, at least
    float32: the states themselves, or the output of the first layer if the score head has two
    layers.
    """
    state = at_least_f32(state)
    if not self.arch.score_width:
      return state
    with all_bits():
      first = self.score_first(state)
    return SCORE_ACTIVATION[self.arch.score_activation](first)

  @property
  def head(self) -> Head:
    """The head that predicts tokens from `Output.hidden`, with the family's soft cap."""
    return Head(self.unembedding(), self.arch.final_softcap)

  def logits(self, hidden: jax.Array, temperature: float = 1.0) -> jax.Array:
    """hidden [..., D] -> logits / temperature [..., V], at least float32."""
    return tempered(self.head, hidden, temperature)


def check_length(arch: ArchConfig, length: int) -> None:
  """Raises TooLong if the model's rotation does not support this number of tokens."""
  scaling = arch.rope_scaling
  if scaling is None or scaling.longest is None or length <= scaling.longest:
    return
  raise TooLong(
    f"{length} tokens are more than the {scaling.longest} for which a model of model_type "
    f"{arch.family!r} with rope type {scaling.kind!r} is supported; shorten "
    "config.data.max_prompt_length, config.rollout.max_new_tokens or config.reward.max_length"
  )


class TooLong(UserError, ValueError):
  """There are more tokens than a model's rotation supports."""


def init(arch: ArchConfig, key: jax.Array, **kwargs) -> tuple[Any, nnx.State]:
  """A randomly initialized Transformer as (graphdef, state), made by one compiled program."""
  graphdef, _ = abstract(arch, **kwargs)
  return graphdef, jax.jit(lambda key: nnx.state(Transformer(arch, rngs=nnx.Rngs(key), **kwargs)))(
    key
  )


def abstract(arch: ArchConfig, **kwargs) -> tuple[Any, nnx.State]:
  """(graphdef, state of ShapeDtypeStructs): the shape of a Transformer, without allocating
  anything.
  """
  return nnx.split(nnx.eval_shape(lambda: Transformer(arch, rngs=nnx.Rngs(0), **kwargs)))
