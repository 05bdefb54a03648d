"""Attention of a full pass three ways: plain XLA, `jax.nn.dot_product_attention`, and the Pallas splash kernel of TPUs.

`attend` is the reference: any dtype, any mask, the logits [B, H, L, S] in memory. It is also what decodes. The other
two compute the same for a pass over whole rows, but for padding, whose states nothing reads and which differ.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from r2m_jax.logprobs import softcap
from r2m_jax.models.arch import ArchConfig
from r2m_jax.sharding import ROWS, fitted, mesh_around

ATTENTION = ("auto", "xla", "dot_product", "splash")
BLOCK = 128  # tokens; what the splash kernel takes at least, and rounds lengths up to
LARGEST_BLOCK = 512


class Seen(NamedTuple):
  """Which keys a query may see, without a mask of all pairs: those of its row's real tokens before it and itself."""

  keys: jax.Array  # bool[B, S], True on real tokens, which lie side by side in each row
  slides: bool | jax.Array  # whether the layer is one with a sliding window


def choose(how: str, platform: str, arch: ArchConfig, dtype) -> str:
  """The implementation that config.attention stands for: "xla", "dot_product", "cudnn", "splash" or "interpreted".

  "auto" is splash on a TPU, cuDNN's on a GPU and XLA on a CPU, and XLA where the model is not for them. "interpreted"
  is the splash kernel without a TPU, slow, for tests.

  Args:
    platform: of the devices it will run on, "cpu", "tpu" or "gpu".
    dtype: of the computation.

  Raises ValueError with the reason where what is asked for cannot be.
  """
  if how not in ATTENTION:
    raise ValueError(f"config.attention is {how!r}: choose one of {', '.join(map(repr, ATTENTION))}")
  dtype = jnp.dtype(dtype)
  fast = dtype == jnp.bfloat16 and arch.head_dim % 8 == 0 and arch.head_dim <= 128  # what cuDNN has kernels for
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


def attend(q, k, v, mask, *, scale: float, cap: float | None) -> jax.Array:
  """softmax(cap(scale q k^T)) v, the softmax in at least float32; a query that may see nothing gives a finite mean.

  q [B, H, L, Dh], k and v [B, KV, S, Dh], mask bool[B, 1, L, S] -> [B, H, L, Dh]. Query head h reads key head
  h // (H / KV).
  """
  batch, heads, length, dim = q.shape
  wide = jnp.promote_types(q.dtype, jnp.float32)
  q = q.reshape(batch, k.shape[1], -1, dim)  # the queries that share a key head, heads before tokens
  logits = softcap(jnp.matmul(q, k.swapaxes(-1, -2), preferred_element_type=wide) * scale, cap)
  logits = jnp.where(mask, logits.reshape(batch, heads, length, -1), -0.5 * jnp.finfo(wide).max)
  weights = jax.nn.softmax(logits, -1).astype(v.dtype).reshape(*q.shape[:3], -1)
  return jnp.matmul(weights, v).reshape(batch, heads, length, dim)


def dot_product(q, k, v, mask, *, scale: float, implementation: str) -> jax.Array:
  """`attend` without a cap by `jax.nn.dot_product_attention`, "xla" or "cudnn"; the latter in bfloat16 or float16."""
  length = q.shape[2]
  odd = length % 2 if implementation == "cudnn" else 0  # cuDNN's backward pass wants even lengths
  tokens_first = lambda x: jnp.pad(x.swapaxes(1, 2), ((0, 0), (0, odd), (0, 0), (0, 0)))
  mask = jnp.pad(mask, ((0, 0), (0, 0), (0, odd), (0, odd)))
  out = jax.nn.dot_product_attention(
    *map(tokens_first, (q, k, v)), mask=mask, scale=scale, implementation=implementation
  )
  return out.swapaxes(1, 2)[:, :, :length]


def splash_attend(
  q, k, v, seen: Seen, *, scale: float, cap: float | None, window: int | None, interpret: bool
) -> jax.Array:
  """`attend` by the splash kernel, each device its own rows and heads.

  q [B, H, L, Dh], k and v [B, KV, L, Dh] in float32 or bfloat16. Lengths are rounded up to whole blocks.
  """
  from jax.experimental.pallas.ops.tpu.splash_attention import SegmentIds  # half a second: where it is used alone

  length = q.shape[2]
  fill = -length % BLOCK
  padded = lambda x: jnp.pad(x, ((0, 0), (0, 0), (0, fill), (0, 0)))
  segments = jnp.pad(seen.keys, ((0, 0), (0, fill))).astype(jnp.int32)  # padding sees padding alone
  mesh = mesh_around()
  if mesh is not None and k.shape[1] % mesh.shape["tensor"] and q.shape[1] % mesh.shape["tensor"] == 0:
    k, v = (jnp.repeat(x, q.shape[1] // x.shape[1], 1) for x in (k, v))  # fewer key heads than devices for heads

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
  return local(jnp.asarray(seen.slides), padded(q * scale), padded(k), padded(v), segments)[:, :, :length]


def splash_kernel(heads: int, length: int, window: int | None, cap: float | None, interpret: bool):
  """The kernel for [heads, length, Dh] of one row."""
  from jax.experimental.pallas.ops.tpu import splash_attention as splash

  shape, block = (length, length), next(b for b in (LARGEST_BLOCK, 384, 256, BLOCK) if length % b == 0)
  mask = splash.CausalMask(shape) if window is None else splash.LocalMask(shape, (window - 1, 0), 0)
  names = "q kv kv_compute q_dkv kv_dkv kv_dkv_compute q_dq kv_dq"
  sizes = splash.BlockSizes(**{f"block_{name}": block for name in names.split()})
  return splash.make_splash_mha(
    splash.MultiHeadMask([mask] * heads), head_shards=1, q_seq_shards=1, block_sizes=sizes, attn_logits_soft_cap=cap,
    interpret=interpret,
  )  # fmt: skip
