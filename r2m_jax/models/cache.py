"""The KV cache of a pass: one array for all layers, which a scan over the layers writes.

N layers, S key slots, KV key heads, Dh numbers a head. Decoding uses other caches; see
`models.decode`.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import struct

from r2m_jax.parallel.rows import take_shares
from r2m_jax.parallel.sharding import ROWS, lay, lay_rows


class Cache(struct.PyTreeNode):
  """Keys and values of every layer, by slot. All rows write the same slot: prompts are padded on
  the left.
  """

  k: jax.Array  # [N, B, KV, S, Dh]   after norm and rotation
  v: jax.Array  # [N, B, KV, S, Dh]
  mask: jax.Array  # bool[B, S]   True where a real token was written, slots of `prompt` included
  prompt: tuple = ()  # (k, v) of the slots before, in common to runs of rows; see `shared`

  def written(self, mask: jax.Array, slot: int | jax.Array) -> "Cache":
    """A copy with mask bool[B, L] in the slots from `slot` on, which are about to be written."""
    return self.replace(mask=jax.lax.dynamic_update_slice_in_dim(self.mask, mask, slot, 1))

  def grown(self, slots: int) -> "Cache":
    """A copy with empty slots at the end, `slots` in total."""
    more = slots - self.mask.shape[1]
    k, v = padded(self.k, more, -2), padded(self.v, more, -2)
    return self.replace(k=k, v=v, mask=padded_mask(self.mask, more))

  def shared(self, copies: int) -> "Cache":
    """A copy for `copies` rows in place of each, which have its slots in common."""
    k, v = (lay_cache(jnp.repeat(x[..., :0, :], copies, 1)) for x in (self.k, self.v))
    mask = lay_rows(jnp.repeat(self.mask, copies, 0))
    return self.replace(k=k, v=v, mask=mask, prompt=(self.k, self.v))

  def repeated(self, repeat: Callable) -> "Cache":
    """A copy with `repeat(x, axis)` applied to every array, along the rows."""
    k, v = lay_cache(repeat(self.k, 1)), lay_cache(repeat(self.v, 1))
    return self.replace(k=k, v=v, mask=lay_rows(repeat(self.mask, 0)))

  def taken(self, order: jax.Array) -> "Cache":
    """Some of the rows, each with all of its slots; see `parallel.rows.take_shares`."""
    k, v = (take_shares(x, order, 1) for x in (self.k, self.v))
    if self.prompt:
      copies = len(self.mask) // self.prompt[0].shape[1]
      before = (take_shares(x, order // copies, 1) for x in self.prompt)
      k, v = (jnp.concatenate(both, -2) for both in zip(before, (k, v)))
    mask = lay_rows(take_shares(self.mask, order))
    return self.replace(k=lay_cache(k), v=lay_cache(v), mask=mask, prompt=())


def lay_cache(x: jax.Array) -> jax.Array:
  """Keys or values [..., B, KV, S, Dh], distributed over the mesh: rows over data and fsdp, heads
  over tensor if they divide.
  """
  return lay(x, *[None] * (x.ndim - 4), ROWS, "tensor")


def padded(x: jax.Array, more: int, axis: int) -> jax.Array:
  """Keys or values with `more` empty slots at the end of `axis`, which counts from the end."""
  return lay_cache(_pad(x, more, axis))


def padded_mask(mask: jax.Array, more: int) -> jax.Array:
  """bool[B, S] -> bool[B, S + more], False in the new slots."""
  return lay_rows(_pad(mask, more, -1))


def _pad(x: jax.Array, more: int, axis: int) -> jax.Array:
  return jnp.pad(x, [(0, more if i == axis else 0) for i in range(-x.ndim, 0)])


def write(all_: jax.Array, new: jax.Array, *at) -> jax.Array:
  """`all_` with `new` at these indices; in place if nothing else reads `all_`."""
  starts = [jnp.asarray(i, jnp.int32) for i in at]  # one dtype, also under x64
  return lay_cache(jax.lax.dynamic_update_slice(all_, new.astype(all_.dtype), starts))
