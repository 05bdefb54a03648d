"""The KV cache: one array for all layers, as a prefill writes it, or an array a layer, as a loop
over tokens reads it.

N layers, S key slots, KV key heads, Dh numbers a head.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct

from r2m_jax.parallel.sharding import ROWS, lay, lay_rows


@struct.dataclass
class Cache:
  """Keys and values of every layer, by slot. All rows write the same slot: prompts are padded on
  the left.
  """

  # [N, B, KV, S, Dh], or for a model `apart` a tuple of [B, KV, S, Dh]; after norm and rotation
  k: Any
  v: Any  # likewise
  mask: jax.Array  # bool[B, S]   True where a real token was written
  # (k, v) of the slots before those of k and v, in common to runs of rows; see `shared`
  prompt: tuple = ()
  turned: bool = struct.field(pytree_node=False, default=False)  # whether k is [B, KV, Dh, S]

  @property
  def key_slots(self) -> int:
    """The axis of k that is slots; of v it is -2."""
    return -1 if self.turned else -2

  def apart(self, turned: bool) -> "Cache":
    """One array a layer in place of one for all; keys `turned` for a product with queries, else
    for `attend_slots`.
    """
    k = (k.swapaxes(-1, -2) if turned else k for k in self.k)
    return self.replace(k=tuple(k), v=tuple(self.v), turned=turned)

  def shared(self, copies: int) -> "Cache":
    """Of a cache `apart`: for `copies` rows in place of each, which keep what is there in
    common.
    """

    def none(x, axis):
      return lay_cache(jnp.repeat(jax.lax.slice_in_dim(x, 0, 0, axis=axis), copies, 0))

    k, v = tuple(none(x, self.key_slots) for x in self.k), tuple(none(x, -2) for x in self.v)
    return self.replace(
      k=k, v=v, mask=lay_rows(jnp.repeat(self.mask, copies, 0)), prompt=(self.k, self.v)
    )

  def grown(self, slots: int) -> "Cache":
    """With empty slots behind its own, `slots` in all."""
    more = slots - self.mask.shape[1]

    def wider(x, axis):
      return jnp.pad(x, [(0, more if i == axis else 0) for i in range(-x.ndim, 0)])

    k = jax.tree.map(lambda x: lay_cache(wider(x, self.key_slots)), self.k)
    v = jax.tree.map(lambda x: lay_cache(wider(x, -2)), self.v)
    return self.replace(k=k, v=v, mask=lay_rows(wider(self.mask, -1)))

  def repeated(self, repeat: Callable) -> "Cache":
    """`repeat(x, axis)` of everything, along the rows."""
    k, v = jax.tree.map(lambda x: lay_cache(repeat(x, x.ndim - 4)), (self.k, self.v))
    return self.replace(k=k, v=v, mask=lay_rows(repeat(self.mask, 0)))


def lay_cache(x: jax.Array) -> jax.Array:
  """Keys or values [..., B, KV, S, Dh] over the mesh: rows over data and fsdp, heads over tensor
  where they split.
  """
  return lay(x, *[None] * (x.ndim - 4), ROWS, "tensor")


def write(all_: jax.Array, new: jax.Array, *at) -> jax.Array:
  """`all_` with `new` at these indices, in place where nothing else reads `all_`."""
  at = [jnp.asarray(i, jnp.int32) for i in at]  # one type, under x64 too
  return lay_cache(jax.lax.dynamic_update_slice(all_, new.astype(all_.dtype), at))
