"""Splits the rows of a batch into minibatches, micro-batches and parts, such that no row leaves its
device.

Rows are split over devices in blocks, so any subset of rows takes an equal share from every block.
A part has neighbouring rows of every device, so that responses to one prompt stay together; a
`Deal` chooses which runs of neighbours, so that all parts have about as many tokens. A minibatch
has one row of every run of M neighbours. The rows in a part depend on the mesh, so results must not
depend on the parts. The rows in a minibatch do not depend on the mesh.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from r2m_jax.parallel.sharding import lay_leading, lay_rows, row_shards


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


class Deal(NamedTuple):
  """Which rows go into a part: not neighbours, but rows that make all parts weigh about the same."""

  weights: jax.Array | np.ndarray  # f32[R], of each row
  group: int  # neighbours that stay together, if a part has room for all of them


def balanced(deal: Deal, parts: int) -> jax.Array:
  """The rows of each of `parts` parts on each device, i32[S, parts, R / (S * parts)], counted on the
  device. On the host if the weights are there, without a program.
  """
  rows = len(deal.weights)
  shards, each = blocks_of(rows, parts)
  run = math.gcd(deal.group, each)
  count = parts * each // run  # runs of a device
  weights = deal.weights.reshape(shards, count, run)
  if isinstance(weights, np.ndarray):
    heaviest = np.argsort(-weights.sum(-1), 1, kind="stable")
  else:
    heaviest = jnp.argsort(-lay_leading(weights).sum(-1), 1)
  order = run * heaviest[:, turns(count, parts), None] + np.arange(run)
  return order.reshape(shards, parts, each).astype(np.int32)


def turns(count: int, parts: int) -> np.ndarray:
  """Which of `count` runs, from the heaviest on, each part has: i64[count], part after part.

  The heaviest ones are dealt out first, one to each part, then the next ones in the opposite order
  of the parts, and so on.
  """
  turn, place = np.divmod(np.arange(count), parts)
  return np.argsort(np.where(turn % 2, parts - 1 - place, place), kind="stable")


def scan_rows(f: Callable, carry, parts: int, *trees, deal: Deal | None = None):
  """`jax.lax.scan` of f(carry, *part) -> (carry, out) over `parts` parts of the rows of `trees`.

  Every leaf of `trees` and of out has rows as its leading axis; a part has the same number of rows
  of each device, which are neighbours if there is no `deal`. Returns (carry, outs of all rows, in
  their order); the outs are written in place, one part after another.
  """
  rows = len(jax.tree.leaves(trees)[0])
  shards, each = blocks_of(rows, parts)
  order = None if deal is None else jnp.asarray(balanced(deal, parts))
  by_part = (shards, parts, each) if order is None else (shards, parts * each)
  blocks = jax.tree.map(lambda x: lay_rows(x.reshape(*by_part, *x.shape[1:])), trees)

  def take(x, i):
    """[S, R / S, ...] -> [S * each, ...], the rows of part i."""
    if order is None:
      taken = jax.lax.dynamic_index_in_dim(x, i, 1, keepdims=False)
    else:
      taken = jax.vmap(lambda x, rows: x[rows])(x, order[:, i])
    return lay_rows(taken.reshape(shards * each, *taken.shape[2:]))

  def put(x, new, i):
    """x with the rows of part i replaced by new [S * each, ...]."""
    new = new.reshape(shards, each, *new.shape[1:])
    if order is None:
      return lay_rows(jax.lax.dynamic_update_index_in_dim(x, new, i, 1))
    return lay_rows(jax.vmap(lambda x, rows, new: x.at[rows].set(new))(x, order[:, i], new))

  def part(i):
    return jax.tree.map(lambda x: take(x, i), blocks)

  def step(state, i):
    carry, outs = state
    carry, out = f(carry, *part(i))
    return (carry, jax.tree.map(lambda x, new: put(x, new, i), outs, out)), None

  def empty(x):
    return lay_rows(jnp.zeros((*by_part, *x.shape[1:]), x.dtype))

  outs = jax.tree.map(empty, jax.eval_shape(lambda: f(carry, *part(0))[1]))
  (carry, outs), _ = jax.lax.scan(step, (carry, outs), jnp.arange(parts))
  return carry, jax.tree.map(lambda x: lay_rows(x.reshape(rows, *x.shape[len(by_part) :])), outs)


def map_rows(f: Callable, parts: int, *trees, deal: Deal | None = None):
  """f(*trees) over parts of the rows, one after another, so that temporaries exist for only one
  part at a time.

  Every leaf of the arguments and of the result has the rows as its leading axis. If the rows do not
  split into `parts` equal parts over the mesh, the next larger number that works is used. A part
  has neighbouring rows, or those that `deal` gives it.
  """
  parts = parts_of_rows(len(jax.tree.leaves(trees)[0]), parts)
  if parts == 1:
    return f(*trees)
  return scan_rows(lambda _, *part: (None, f(*part)), None, parts, *trees, deal=deal)[1]


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
