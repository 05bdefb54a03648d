"""Attention of one token per row over a cache, as a Pallas kernel for GPUs.

It reads only slots that a row sees, and writes the token's own key and value into the cache.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from r2m_jax.models.arch import ArchConfig
from r2m_jax.parallel.sharding import ROWS, fitted, mesh_around

SLOTS = 64  # slots of a cache that a step reads
WARPS = 4  # of a program
STAGES = 2  # steps that are loaded in advance


class Slots(NamedTuple):
  """Which slots of a cache each row's token sees: from the row's first slot to its own."""

  first: jax.Array  # i32[B]
  own: jax.Array  # i32[], where the token's key and value are written


def slots_fit(how: str, arch: ArchConfig) -> bool:
  """Whether a model decodes with `attend_slots` if its full passes use `how`; see
  `attention.choose`.
  """
  return how == "cudnn" and arch.head_dim in (16, 32, 64, 128)


def attend_slots(
  q, k, v, cache: tuple, prompt: tuple, slots: Slots, *, scale: float, interpret: bool = False
) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
  """`attention.attend` of one token per row over its cache, to which the token's key and value are
  added, in one kernel.

  Each program handles one row and one key head, with the queries that read it. Each slot is read
  once, in blocks, from the row's first slot to the newest. The maximum and the sum of the softmax
  are carried along in float32. Each device computes its own rows and heads.

  q [B, H, 1, Dh], k and v [B, KV, 1, Dh], keys and values of `cache` [B, KV, S, Dh] -> [B, H, 1,
  Dh], cache, in place. Keys and values of `prompt` [n, KV, Sp, Dh], or (), are the slots before,
  shared by B / n neighbouring rows.
  """
  local = functools.partial(_attend_local, scale=scale, interpret=interpret)
  mesh = mesh_around()
  if mesh is not None:
    rows, heads = fitted(cache[0].shape, (ROWS, "tensor"), mesh)
    layout = P(rows, heads)
    local = jax.shard_map(
      local, in_specs=(P(rows), P(), *[layout] * 5), out_specs=layout, check_vma=False
    )
  return local(slots.first, slots.own, q, k, v, cache, prompt)


def _attend_local(first, own, q, k, v, cache, prompt, *, scale: float, interpret: bool):
  """`attend_slots` of one device's rows and heads."""
  # imported here, so that only users of the kernel need them
  from jax.experimental import pallas as pl
  from jax.experimental.pallas import triton

  # one array, so that a single kernel before this one rotates and splits the heads
  heads = jnp.concatenate([q, k, v], 1)[:, :, 0]

  def one(index):
    return pl.BlockSpec((1,), index)

  def of_row(x):
    return pl.BlockSpec((None, *x.shape[1:]), lambda row, _: (row, 0, 0))

  def of_head(x):
    copies = len(q) // len(x)
    return pl.BlockSpec((None, None, *x.shape[2:]), lambda row, head: (row // copies, head, 0, 0))

  def shape(x):
    return jax.ShapeDtypeStruct(x.shape, x.dtype)

  given = (*prompt, *cache)
  result = q[:, :, 0]
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
    compiler_params=(
      None if interpret else triton.CompilerParams(num_warps=WARPS, num_stages=STAGES)
    ),
    interpret=interpret,
    name="attend_slots",
  )(first, own[None], heads, *given)
  return y[:, :, None], tuple(cache)


def product(a: jax.Array, b: jax.Array) -> jax.Array:
  """a @ b of two matrices, summed in float32."""
  return jax.lax.dot(a, b, preferred_element_type=jnp.float32)


def slots_kernel(first, own, heads, *refs, scale: float):
  """A row and a key head: first and own i32[1], heads [H + 2 KV, Dh], then keys and values of a
  prompt [Sp, Dh], if there is one, keys and values of the row before the write [S, Dh], y [H, Dh],
  and keys and values of the row after the write.
  """
  from jax.experimental import pallas as pl
  from jax.experimental.pallas import triton

  *prompt, _, _, y, keys, values = refs  # before and after are the same memory
  common = prompt[0].shape[0] if prompt else 0
  head = pl.program_id(1)
  kv = pl.num_programs(1)
  first = first[0]
  own = own[0] - common
  group = y.shape[0] // kv
  most = max(16, 1 << (group - 1).bit_length())  # queries: the minimum for a tensor core
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

      logits = product(q, part(keys).T) * scale
      logits = jnp.where(((at >= low) & (at < high))[None], logits, -jnp.inf)
      new = jnp.maximum(top, logits.max(-1))
      shrink, weights = jnp.exp(top - new), jnp.exp(logits - new[:, None])
      of_part = product(weights.astype(v.dtype), part(values))
      return new, shrink * mass + weights.sum(-1), shrink[:, None] * mean + of_part

    return jax.lax.fori_loop(low // SLOTS, pl.cdiv(high, SLOTS), add, carry)

  # the token sees itself
  top = (q.astype(jnp.float32) * k.astype(jnp.float32)).sum(-1) * scale
  carry = (top, jnp.ones_like(top), jnp.broadcast_to(v.astype(jnp.float32), q.shape))
  if prompt:
    prompt_keys, prompt_values = prompt
    carry = over(prompt_keys, prompt_values, first, common, carry)
  _, mass, mean = over(keys, values, jnp.maximum(first - common, 0), own, carry)
  triton.store(y.at[mine, :], (mean / mass[:, None]).astype(y.dtype), mask=there)
