"""Attention of a full pass three ways: plain XLA, `jax.nn.dot_product_attention`, and the Pallas
splash kernel of TPUs.

`attend` is the reference: any dtype, any mask, the logits [B, H, L, S] in memory. The other two
compute the same for a pass over whole rows, but for padding, whose states nothing reads and which
differ. What decodes is `attend` too, or on a GPU, in bfloat16, `attend_slots`, a Pallas kernel that
reads no slot that a row does not see.

Rows that begin alike, the responses to one prompt, can share that beginning: see `Shared`.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from r2m_jax.models.arch import ArchConfig
from r2m_jax.models.logprobs import softcap
from r2m_jax.parallel.sharding import ROWS, fitted, lay, mesh_around

ATTENTION = ("auto", "xla", "dot_product", "splash")
BLOCK = 128  # tokens; what the splash kernel takes at least, and rounds lengths up to
LARGEST_BLOCK = 512
SLOTS, WARPS, STAGES = (
  64,
  4,
  2,
)  # of `attend_slots`: of a cache in a step, of a program, steps that are loaded ahead


class Seen(NamedTuple):
  """Which keys a query may see, without a mask of all pairs: those of its row's real tokens
  before it and itself.
  """

  keys: jax.Array  # bool[B, S], True on real tokens, which lie side by side in each row
  slides: bool | jax.Array  # whether the layer is one with a sliding window


class Slots(NamedTuple):
  """Which slots of a cache the one token of each row sees: those from its row's first up to its
  own.
  """

  first: jax.Array  # i32[B]
  own: jax.Array  # i32[], where the token's key and value are written


class Shared(NamedTuple):
  """Rows in runs of `copies` neighbours whose first `length` columns are the same, padding
  included: one prompt and its responses. A run is one line: its prompt once, then the rest of each
  row. G runs, N = length + copies * rest."""

  length: int
  copies: int

  def pack(self, x: jax.Array) -> jax.Array:
    """[B, L, ...] -> [G, N, ...]."""
    runs = x.reshape(len(x) // self.copies, self.copies, *x.shape[1:])
    rest = runs[:, :, self.length :]
    return jnp.concatenate(
      [runs[:, 0, : self.length], rest.reshape(len(runs), -1, *x.shape[2:])], 1
    )

  def unpack(self, x: jax.Array) -> jax.Array:
    """[G, N, ...] -> [B, L, ...]."""
    prompt, rest = x[:, : self.length], x[:, self.length :]
    rest = rest.reshape(len(x) * self.copies, -1, *x.shape[2:])
    return jnp.concatenate([jnp.repeat(prompt, self.copies, 0), rest], 1)

  def masks(self, visible: jax.Array) -> "SharedMask":
    """bool[B, 1, L, L] of the rows -> what a prompt's and what a response's tokens see."""
    return SharedMask(
      visible[:: self.copies, :, : self.length, : self.length], visible[:, :, self.length :]
    )


class SharedMask(NamedTuple):
  """The mask of rows that share a prompt."""

  prompt: jax.Array  # bool[G, 1, length, length]
  rest: jax.Array  # bool[B, 1, L - length, L]


def attend_shared(attend: Callable, q, k, v, seen: SharedMask) -> jax.Array:
  """`attend(q, k, v, mask)` of runs packed by `Shared`: the prompts among themselves, then the
  responses over both.

  q [G, H, N, Dh], k and v [G, KV, N, Dh] -> [G, H, N, Dh].
  """
  length, copies = seen.prompt.shape[2], len(seen.rest) // len(q)

  def prompt(x):
    return x[:, :, :length]

  def rows(x):
    return lay(x.reshape(-1, *x.shape[2:]), ROWS, "tensor")  # [G, copies, ...] -> [B, ...]

  def rest(x):
    return from_runs(x[:, :, length:], len(seen.rest))

  def whole(x):
    return jnp.concatenate([rows(jnp.stack([prompt(x)] * copies, 1)), rest(x)], 2)

  of_prompt = attend(prompt(q), prompt(k), prompt(v), seen.prompt)
  of_rest = attend(rest(q), whole(k), whole(v), seen.rest)
  return jnp.concatenate([of_prompt, as_runs(of_rest, len(q))], 2)


def choose(how: str, platform: str, arch: ArchConfig, dtype) -> str:
  """The implementation that config.attention stands for: "xla", "dot_product", "cudnn", "splash" or
  "interpreted".

  "auto" is splash on a TPU, cuDNN's on a GPU and XLA on a CPU, and XLA where the model is not for
  them. "interpreted" is the splash kernel without a TPU, slow, for tests.

  Args:
    platform: of the devices it will run on, "cpu", "tpu" or "gpu".
    dtype: of the computation.

  Raises ValueError with the reason where what is asked for cannot be.
  """
  if how not in ATTENTION:
    raise ValueError(
      f"config.attention is {how!r}: choose one of {', '.join(map(repr, ATTENTION))}"
    )
  dtype = jnp.dtype(dtype)
  fast = (
    dtype == jnp.bfloat16 and arch.head_dim % 8 == 0 and arch.head_dim <= 128
  )  # what cuDNN has kernels for
  why_not = {}
  if dtype == jnp.float64:
    why_not["splash"] = "the kernel has no float64; use 'xla'"
  if arch.attn_softcap is not None:
    why_not["dot_product"] = "it has no soft cap of the logits, which this model needs; use 'xla'"
  if how == "auto":
    how = {"tpu": "splash", "gpu": "dot_product" if fast else "xla"}.get(platform, "xla")
    how = "xla" if how in why_not else how
  if how in why_not:
    raise ValueError(f"config.attention is {how!r}: {why_not[how]}")
  if how == "splash":
    return "splash" if platform == "tpu" else "interpreted"
  return "cudnn" if how == "dot_product" and platform == "gpu" and fast else how


def attend(q, k, v, mask, *, scale: float, cap: float | None, prompt: tuple = ()) -> jax.Array:
  """softmax(cap(scale q k^T)) v, the softmax in at least float32; a query that may see nothing
  gives a finite mean.

  q [B, H, L, Dh], k and v [B, KV, S, Dh], mask bool[B, 1, L, S] -> [B, H, L, Dh]. Query head h
  reads key head h // (H / KV). Keys and values of `prompt` [n, KV, Sp, Dh], or (), come before k
  and v, in common to B / n neighbouring rows, whose queries are multiplied with them together; the
  mask is then over Sp + S.
  """
  batch, heads, length, dim = q.shape
  wide = jnp.promote_types(q.dtype, jnp.float32)
  q = q.reshape(
    batch, k.shape[1], -1, dim
  )  # the queries that share a key head, heads before tokens
  logits = jnp.matmul(q, k.swapaxes(-1, -2), preferred_element_type=wide)
  if prompt:
    keys, values = prompt
    before = jnp.matmul(as_runs(q, len(keys)), keys.swapaxes(-1, -2), preferred_element_type=wide)
    logits = jnp.concatenate([from_runs(before, batch), logits], -1)
  logits = softcap(logits * scale, cap)
  logits = jnp.where(mask, logits.reshape(batch, heads, length, -1), -0.5 * jnp.finfo(wide).max)
  weights = jax.nn.softmax(logits, -1).astype(v.dtype).reshape(*q.shape[:3], -1)
  if not prompt:
    return jnp.matmul(weights, v).reshape(batch, heads, length, dim)
  before, weights = jnp.split(weights, [keys.shape[2]], -1)
  mean = from_runs(jnp.matmul(as_runs(before, len(keys)), values), batch) + jnp.matmul(weights, v)
  return mean.reshape(batch, heads, length, dim)


def as_runs(x: jax.Array, runs: int) -> jax.Array:
  """[B, heads, N, ...] -> [runs, heads, B / runs * N, ...]: those of neighbouring rows together,
  by head.
  """
  x = x.reshape(runs, -1, *x.shape[1:]).swapaxes(1, 2)
  return x.reshape(runs, x.shape[1], -1, *x.shape[4:])


def from_runs(x: jax.Array, rows: int) -> jax.Array:
  """The inverse of `as_runs` for so many rows."""
  x = x.reshape(*x.shape[:2], rows // len(x), -1, *x.shape[3:]).swapaxes(1, 2)
  return lay(x.reshape(rows, *x.shape[2:]), ROWS, "tensor")


def dot_product(q, k, v, mask, *, scale: float, implementation: str) -> jax.Array:
  """`attend` without a cap by `jax.nn.dot_product_attention`, "xla" or "cudnn"; the latter in
  bfloat16 or float16.
  """
  length = q.shape[2]
  # cuDNN's backward pass wants even lengths
  odd = [x.shape[2] % 2 if implementation == "cudnn" else 0 for x in (q, k, v)]
  q, k, v = (
    jnp.pad(x.swapaxes(1, 2), ((0, 0), (0, n), (0, 0), (0, 0))) for x, n in zip((q, k, v), odd)
  )
  mask = jnp.pad(mask, ((0, 0), (0, 0), (0, odd[0]), (0, odd[1])))
  out = jax.nn.dot_product_attention(q, k, v, mask=mask, scale=scale, implementation=implementation)
  return out.swapaxes(1, 2)[:, :, :length]


def splash_attend(
  q, k, v, seen: Seen, *, scale: float, cap: float | None, window: int | None, interpret: bool
) -> jax.Array:
  """`attend` by the splash kernel, each device its own rows and heads.

  q [B, H, L, Dh], k and v [B, KV, L, Dh] in float32 or bfloat16. Lengths are rounded up to whole
  blocks.
  """
  from jax.experimental.pallas.ops.tpu.splash_attention import (
    SegmentIds,  # half a second: where it is used alone
  )

  length = q.shape[2]
  fill = -length % BLOCK

  def padded(x):
    return jnp.pad(x, ((0, 0), (0, 0), (0, fill), (0, 0)))

  segments = jnp.pad(seen.keys, ((0, 0), (0, fill))).astype(jnp.int32)  # padding sees padding alone
  mesh = mesh_around()
  if (
    mesh is not None
    and k.shape[1] % mesh.shape["tensor"]
    and q.shape[1] % mesh.shape["tensor"] == 0
  ):
    k, v = (
      jnp.repeat(x, q.shape[1] // x.shape[1], 1) for x in (k, v)
    )  # fewer key heads than devices for heads

  def local(slides, q, k, v, segments):
    def run(slides):
      kernel = splash_kernel(q.shape[1], q.shape[2], window if slides else None, cap, interpret)
      return jax.vmap(kernel)(q, k, v, SegmentIds(segments, segments))

    if isinstance(seen.slides, bool):
      return run(seen.slides)
    return jax.lax.cond(slides, lambda: run(True), lambda: run(False))

  if mesh is not None:
    rows, heads = fitted(k.shape, (ROWS, "tensor"), mesh)
    layout = P(rows, heads)
    local = jax.shard_map(
      local, in_specs=(P(), layout, layout, layout, P(rows)), out_specs=layout, check_vma=False
    )
  return local(jnp.asarray(seen.slides), padded(q * scale), padded(k), padded(v), segments)[
    :, :, :length
  ]


def splash_kernel(heads: int, length: int, window: int | None, cap: float | None, interpret: bool):
  """The kernel for [heads, length, Dh] of one row."""
  from jax.experimental.pallas.ops.tpu import splash_attention as splash

  shape, block = (
    (length, length),
    next(b for b in (LARGEST_BLOCK, 384, 256, BLOCK) if length % b == 0),
  )
  mask = splash.CausalMask(shape) if window is None else splash.LocalMask(shape, (window - 1, 0), 0)
  names = "q kv kv_compute q_dkv kv_dkv kv_dkv_compute q_dq kv_dq"
  sizes = splash.BlockSizes(**{f"block_{name}": block for name in names.split()})
  return splash.make_splash_mha(
    splash.MultiHeadMask([mask] * heads),
    head_shards=1,
    q_seq_shards=1,
    block_sizes=sizes,
    attn_logits_soft_cap=cap,
    interpret=interpret,
  )


def slots_fit(how: str, arch: ArchConfig) -> bool:
  """Whether what decodes beside passes by `how`, see `choose`, is `attend_slots`."""
  return how == "cudnn" and arch.head_dim in (16, 32, 64, 128)


def attend_slots(
  q, k, v, cache: tuple, prompt: tuple, slots: Slots, *, scale: float, interpret: bool = False
) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
  """`attend` of one token a row over its cache, which gets the token's own key and value, in one
  kernel.

  A program has a row and a key head, and the queries that read it. Each slot is read once, in
  blocks, from the row's first to the newest, while maximum and sum of the softmax are carried along
  in float32. Each device does its own rows and heads.

  q [B, H, 1, Dh], k and v [B, KV, 1, Dh], keys and values of `cache` [B, KV, S, Dh] -> [B, H, 1,
  Dh], cache, in place. Keys and values of `prompt` [n, KV, Sp, Dh], or (), are the slots before, in
  common to B / n neighbouring rows.
  """
  from jax.experimental import pallas as pl  # where it is used alone
  from jax.experimental.pallas import triton

  def local(first, own, q, k, v, cache, prompt):
    heads = jnp.concatenate([q, k, v], 1)[
      :, :, 0
    ]  # one array: what rotates and splits is one kernel before this one

    def one(index):
      return pl.BlockSpec((1,), index)

    def of_row(x):
      return pl.BlockSpec((None, *x.shape[1:]), lambda row, _: (row, 0, 0))

    def of_head(x):
      copies = len(q) // len(x)
      return pl.BlockSpec((None, None, *x.shape[2:]), lambda row, head: (row // copies, head, 0, 0))

    def shape(x):
      return jax.ShapeDtypeStruct(x.shape, x.dtype)

    given, result = (*prompt, *cache), q[:, :, 0]
    y, *cache = pl.pallas_call(
      functools.partial(slots_kernel, scale=scale),
      grid=cache[0].shape[:2],
      in_specs=[
        one(lambda row, _: (row,)),
        one(lambda *_: (0,)),
        of_row(heads),
        *map(of_head, given),
      ],
      out_specs=[of_row(result), *map(of_head, cache)],
      out_shape=[shape(result), *map(shape, cache)],
      input_output_aliases={1 + len(given): 1, 2 + len(given): 2},
      compiler_params=None
      if interpret
      else triton.CompilerParams(num_warps=WARPS, num_stages=STAGES),
      interpret=interpret,
      name="attend_slots",
    )(first, own[None], heads, *given)
    return y[:, :, None], tuple(cache)

  mesh = mesh_around()
  if mesh is not None:
    rows, heads = fitted(cache[0].shape, (ROWS, "tensor"), mesh)
    layout = P(rows, heads)
    local = jax.shard_map(
      local, in_specs=(P(rows), P(), *[layout] * 5), out_specs=layout, check_vma=False
    )
  return local(slots.first, slots.own, q, k, v, cache, prompt)


def slots_kernel(first, own, heads, *refs, scale: float):
  """A row and a key head: first and own i32[1], heads [H + 2 KV, Dh], then keys and values of a
  prompt [Sp, Dh], where there is one, those of the row before [S, Dh], y [H, Dh], and those of the
  row after."""
  from jax.experimental import pallas as pl
  from jax.experimental.pallas import triton

  *prompt, _, _, y, keys, values = refs  # before and after are the same memory
  common = prompt[0].shape[0] if prompt else 0
  head, kv, first, own = pl.program_id(1), pl.num_programs(1), first[0], own[0] - common
  group = y.shape[0] // kv
  most = max(16, 1 << (group - 1).bit_length())  # queries: the fewest that a tensor core takes
  mine, there = pl.ds(head * group, most), (jnp.arange(most) < group)[:, None]
  q = triton.load(heads.at[mine, :], mask=there, other=0.0)
  k, v = heads[y.shape[0] + head, :], heads[y.shape[0] + kv + head, :]
  keys[own, :], values[own, :] = k, v

  def over(keys, values, low, high, carry):
    """`carry` with slots low .. high - 1 of keys and values."""

    def add(i, carry):
      top, mass, mean = carry
      at = i * SLOTS + jnp.arange(SLOTS)

      def part(x):
        return triton.load(x.at[pl.ds(i * SLOTS, SLOTS), :], mask=(at < len(x))[:, None], other=0.0)

      logits = triton.dot(q, part(keys).T) * scale
      logits = jnp.where(((at >= low) & (at < high))[None], logits, -jnp.inf)
      new = jnp.maximum(top, logits.max(-1))
      shrink, weights = jnp.exp(top - new), jnp.exp(logits - new[:, None])
      of_part = triton.dot(weights.astype(v.dtype), part(values))
      return new, shrink * mass + weights.sum(-1), shrink[:, None] * mean + of_part

    return jax.lax.fori_loop(low // SLOTS, pl.cdiv(high, SLOTS), add, carry)

  top = (q.astype(jnp.float32) * k.astype(jnp.float32)).sum(-1) * scale
  carry = (
    top,
    jnp.ones_like(top),
    jnp.broadcast_to(v.astype(jnp.float32), q.shape),
  )  # the token sees itself
  if prompt:
    carry = over(*prompt, first, common, carry)
  _, mass, mean = over(keys, values, jnp.maximum(first - common, 0), own, carry)
  triton.store(y.at[mine, :], (mean / mass[:, None]).astype(y.dtype), mask=there)
