"""Splits the rows of a batch into minibatches, micro-batches and parts, such that no row leaves its
device.

Rows are split over devices in blocks, so any subset of rows takes an equal share from every block.
A part has neighbouring rows of every device, so that responses to one prompt stay together. A
minibatch has one row of every run of M neighbours. The rows in a part depend on the mesh, so
results must not depend on the parts. The rows in a minibatch do not depend on the mesh.
"""

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp

from r2m_jax.parallel.sharding import lay_rows, row_shards


def runs_of(x: jax.Array, length: int) -> jax.Array:
  """[B, ...] -> [B / length, length, ...]: neighbouring rows together."""
  return x.reshape(len(x) // length, length, *x.shape[1:])


def dealt(group: int, minibatches: int) -> int:
  """How many of `group` neighbouring rows are neighbours in a minibatch."""
  return group // minibatches if group % minibatches == 0 else 1


def neighbours(group: int, rows: int) -> int:
  """How many of `group` neighbouring rows are always neighbours in a part of this many rows; see
  `scan_rows`.
  """
  shards = row_shards()
  return math.gcd(group, rows // shards if rows % shards == 0 else rows)


def shards_of(rows: int) -> int:
  """The number of devices over which this many rows are split; 1 if they do not split evenly."""
  return row_shards() if rows % row_shards() == 0 else 1


def blocks_of(rows: int, parts: int) -> tuple[int, int]:
  """(devices, rows of each device in a part): how `scan_rows` splits this many rows."""
  shards = row_shards() if rows % (row_shards() * parts) == 0 else 1
  return shards, rows // (shards * parts)


def parts_of_rows(rows: int, parts: int) -> int:
  """The number of parts, at least `parts`, into which `map_rows` splits so many rows."""
  whole = rows // shards_of(rows)
  return next(n for n in range(min(parts, whole), whole + 1) if whole % n == 0)


def scan_rows(f: Callable, carry, parts: int, *trees):
  """`jax.lax.scan` of f(carry, *part) -> (carry, out) over `parts` parts of the rows of `trees`.

  Every leaf of `trees` and of out has rows as its leading axis; a part has the same number of
  neighbouring rows of each device. Returns (carry, outs of all rows, in their order); the outs are
  written in place, one part after another.
  """
  rows = len(jax.tree.leaves(trees)[0])
  shards, each = blocks_of(rows, parts)
  blocks = jax.tree.map(lambda x: lay_rows(x.reshape(shards, parts, each, *x.shape[1:])), trees)

  def flat(x):
    return lay_rows(x.reshape(shards * each, *x.shape[2:]))

  def part(i):
    return jax.tree.map(
      lambda x: flat(jax.lax.dynamic_index_in_dim(x, i, 1, keepdims=False)), blocks
    )

  def empty(x):
    return lay_rows(jnp.zeros((shards, parts, each, *x.shape[1:]), x.dtype))

  def step(state, i):
    carry, outs = state
    carry, out = f(carry, *part(i))

    def put(x, new):
      return lay_rows(jax.lax.dynamic_update_index_in_dim(x, new.reshape(x[:, 0].shape), i, 1))

    return (carry, jax.tree.map(put, outs, out)), None

  outs = jax.tree.map(empty, jax.eval_shape(lambda: f(carry, *part(0))[1]))
  (carry, outs), _ = jax.lax.scan(step, (carry, outs), jnp.arange(parts))
  return carry, jax.tree.map(lambda x: lay_rows(x.reshape(rows, *x.shape[3:])), outs)


def map_rows(f: Callable, parts: int, *trees):
  """f(*trees) over parts of the rows, one after another, so that temporaries exist for only one
  part at a time.

  Every leaf of the arguments and of the result has the rows as its leading axis. If the rows do not
  split into `parts` equal parts over the mesh, the next larger number that works is used.
  """
  parts = parts_of_rows(len(jax.tree.leaves(trees)[0]), parts)
  if parts == 1:
    return f(*trees)
  return scan_rows(lambda _, *part: (None, f(*part)), None, parts, *trees)[1]


def deal_orders(key: jax.Array, rows: int, minibatches: int) -> jax.Array:
  """Deals every run of `minibatches` neighbouring rows out at random, one to each minibatch.

  So the responses to one prompt are distributed evenly over the minibatches.

  Returns:
    i32[minibatches, rows / minibatches]: which row of each run belongs to a minibatch.
  """
  runs = jnp.broadcast_to(jnp.arange(minibatches), (rows // minibatches, minibatches))
  return jax.random.permutation(key, runs, axis=1, independent=True).T


def take_rows(tree, order: jax.Array, minibatches: int):
  """The rows of one minibatch; `order` is a row of `deal_orders`.   [B, ...] -> [B /
  minibatches, ...].
  """
  take = jax.vmap(lambda run, i: run[i])
  return jax.tree.map(lambda x: lay_rows(take(runs_of(x, minibatches), order)), tree)


def take_shares(x: jax.Array, order: jax.Array, axis: int = 0) -> jax.Array:
  """Some rows of each device, along the row axis of x.   [..., B, ...] -> [..., S * n, ...].

  order: i32[S, n], the rows to take, counted on each of S devices.
  """
  shards, count = order.shape
  x = jnp.moveaxis(x, axis, 0)
  taken = jax.vmap(lambda x, i: x[i])(x.reshape(shards, -1, *x.shape[1:]), order)
  return jnp.moveaxis(taken.reshape(shards * count, *x.shape[1:]), 0, axis)


def put_rows(x: jax.Array, order: jax.Array, minibatches: int, new: jax.Array) -> jax.Array:
  """x [B, ...] with the rows of one minibatch replaced by new [B / minibatches, ...]; see
  `take_rows`.
  """
  put = jax.vmap(lambda run, i, row: run.at[i].set(row))
  return lay_rows(put(runs_of(x, minibatches), order, new).reshape(x.shape))
