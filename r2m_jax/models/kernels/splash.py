"""Attention of whole rows by the Pallas splash kernel of TPUs, which comes with JAX."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from r2m_jax.parallel.sharding import ROWS, fitted, mesh_around

BLOCK = 128  # tokens: the kernel's minimum; lengths are rounded up to a multiple
LARGEST_BLOCK = 512


class Seen(NamedTuple):
  """Which keys a query may see, without a mask of all pairs: the real tokens of its row up to
  itself.
  """

  keys: jax.Array  # bool[B, S], True on real tokens, which are contiguous in each row
  slides: bool | jax.Array  # whether the layer has a sliding window


def splash_attend(
  q, k, v, seen: Seen, *, scale: float, cap: float | None, window: int | None, interpret: bool
) -> jax.Array:
  """`attention.attend` by the splash kernel; each device computes its own rows and heads.

  q [B, H, L, Dh], k and v [B, KV, L, Dh] in float32 or bfloat16 -> [B, H, L, Dh]. Lengths are
  rounded up to whole blocks.
  """
  # the import takes half a second, so it is done only if the kernel is used
  from jax.experimental.pallas.ops.tpu.splash_attention import SegmentIds

  length = q.shape[2]
  fill = -length % BLOCK

  def padded(x):
    return jnp.pad(x, ((0, 0), (0, 0), (0, fill), (0, 0)))

  segments = jnp.pad(seen.keys, ((0, 0), (0, fill))).astype(jnp.int32)  # padding sees only padding
  mesh = mesh_around()
  if mesh is not None:
    k, v = _heads_for_devices(q, k, v, mesh.shape["tensor"])

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
  out = local(jnp.asarray(seen.slides), padded(q * scale), padded(k), padded(v), segments)
  return out[:, :, :length]


def _heads_for_devices(q, k, v, devices: int):
  """k and v, with a copy for each query head if there are fewer key heads than devices to split
  the query heads over.
  """
  if k.shape[1] % devices == 0 or q.shape[1] % devices:
    return k, v
  copies = q.shape[1] // k.shape[1]
  return jnp.repeat(k, copies, 1), jnp.repeat(v, copies, 1)


def splash_kernel(heads: int, length: int, window: int | None, cap: float | None, interpret: bool):
  """The kernel for [heads, length, Dh] of one row."""
  from jax.experimental.pallas.ops.tpu import splash_attention as splash

  shape = (length, length)
  block = next(b for b in (LARGEST_BLOCK, 384, 256, BLOCK) if length % b == 0)
  mask = splash.CausalMask(shape) if window is None else splash.LocalMask(shape, (window - 1, 0), 0)
  sizes = splash.BlockSizes(
    block_q=block,
    block_kv=block,
    block_kv_compute=block,
    block_q_dkv=block,
    block_kv_dkv=block,
    block_kv_dkv_compute=block,
    block_q_dq=block,
    block_kv_dq=block,
  )
  return splash.make_splash_mha(
    splash.MultiHeadMask([mask] * heads),
    head_shards=1,
    q_seq_shards=1,
    block_sizes=sizes,
    attn_logits_soft_cap=cap,
    interpret=interpret,
  )
