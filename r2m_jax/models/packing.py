"""Packing: only real tokens are multiplied with weights.

Rows and lines are padded to one width, and much of that is padding: a response may have any length
up to the limit. Everything that reads one token at a time (linears, norms, the vocabulary head) can
read the real tokens of all rows end to end. Only attention needs the rows, so queries, keys and
values are unpacked for it and its result is packed again.

The packed array has the same number of narrower rows, so it is distributed over a mesh in the same
way. Its tokens do not belong to the row in which they are stored.
"""

import math

import jax
import jax.numpy as jnp
from flax import struct

from r2m_jax.parallel.rows import shards_of
from r2m_jax.parallel.sharding import lay_leading


def packed_width(width: int, share: float) -> int:
  """The number of columns of a packed array with a `share` of a padded array's columns."""
  return max(1, math.ceil(share * width))


@struct.dataclass
class Packing:
  """The positions of the real tokens of padded rows [R, W] in packed rows [R, w], and the inverse.

  The rows of each of S devices are packed separately. Indices count the tokens of a device.
  """

  place: jax.Array  # i32[S, R / S * w], the padded place of each packed place
  live: jax.Array  # bool[S, R / S * w], whether it holds a token
  slot: jax.Array  # i32[S, R / S * W], the packed place of each padded place
  real: jax.Array  # bool[S, R / S * W]
  lost: jax.Array  # bool[S, R / S * W], real tokens that did not fit
  shape: tuple[int, int] = struct.field(pytree_node=False)  # (R, W)
  width: int = struct.field(pytree_node=False)  # w

  @classmethod
  def of(cls, mask: jax.Array, share: float) -> "Packing":
    """The packing of rows with mask bool[R, W], True on real tokens, into a `share` of their
    places.
    """
    rows, width = mask.shape
    packed = packed_width(width, share)
    shards = shards_of(rows)
    real = lay_leading(mask.reshape(shards, -1))
    count = rows // shards * packed
    slot = jnp.cumsum(real, 1, dtype=jnp.int32) - 1
    lost = real & (slot >= count)
    place = jnp.argsort(~real, 1, stable=True)[:, :count].astype(jnp.int32)
    live = jnp.arange(count) < real.sum(1, keepdims=True)
    slot = jnp.clip(slot, 0, count - 1)
    return cls(place, live, slot, real & ~lost, lost, shape=(rows, width), width=packed)

  def pack(self, x: jax.Array) -> jax.Array:
    """[R, W, ...] -> [R, w, ...], zero at places without a token."""
    x = self._by_device(x)
    packed = select(x, self.place, self.live, self.slot, self.real)
    return lay_leading(packed.reshape(self.shape[0], self.width, *x.shape[2:]))

  def unpack(self, x: jax.Array) -> jax.Array:
    """[R, w, ...] -> [R, W, ...], zero at padding. Tokens that did not fit become NaN, so that the
    update is skipped.
    """
    x = self._by_device(x)
    spread = select(x, self.slot, self.real, self.place, self.live)
    lost = self.lost.reshape(*self.lost.shape, *(1,) * (x.ndim - 2))
    spread = jnp.where(lost, jnp.nan, spread)
    return lay_leading(spread.reshape(*self.shape, *x.shape[2:]))

  def _by_device(self, x: jax.Array) -> jax.Array:
    return lay_leading(x.reshape(len(self.place), -1, *x.shape[2:]))


@jax.custom_vjp
def select(x, index, real, inverse, inverse_real) -> jax.Array:
  """x [S, A, ...] at index i32[S, C] -> [S, C, ...], zero if not `real` bool[S, C].

  `inverse` i32[S, A] and `inverse_real` are the inverse selection. The gradient is a selection by
  the inverse, whereas the gradient of a gather is a scatter.
  """
  return _select(x, index, real)


def _select(x, index, real):
  taken = jax.vmap(lambda x, i: x.at[i].get(mode="promise_in_bounds"))(x, index)
  return jnp.where(real.reshape(*real.shape, *(1,) * (x.ndim - 2)), taken, 0)


def _select_forward(x, index, real, inverse, inverse_real):
  return _select(x, index, real), (inverse, inverse_real)


def _select_backward(saved, gradient):
  return _select(gradient, *saved), None, None, None, None


select.defvjp(_select_forward, _select_backward)
