"""Optimizers: an optax chain from a config section, and one update that rejects non-finite numbers.

Every update is computed in at least float32, whatever the dtype of stored parameters and moments.
Values that are stored in bfloat16 are rounded stochastically, so that the rounding is correct on
average: bfloat16 keeps 8 bits, and rounding to nearest would always lose an update of 1e-6 to a
weight of 1e-2. For exact master weights, use `param_dtype` float32 with `dtype` bfloat16, at twice
the memory.
"""

import functools
import zlib
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from r2m_jax.algorithm.schedules import learning_rate
from r2m_jax.ops import at_least_f32
from r2m_jax.parallel.rows import Deal, scan_rows
from r2m_jax.parallel.sharding import lay_parameters, path_name


def make_optimizer(config, total_updates: int) -> optax.GradientTransformation:
  """Clip by global norm, then AdamW or plain SGD with the section's schedule.

  Args:
    config: a section with `optimizer`, `lr`, `lr_schedule`, `warmup_steps`, `b1`, `b2`, `adam_eps`,
      `weight_decay`, `max_grad_norm` (0 does not clip), `moment_dtype`.
    total_updates: length of the schedule, in optimizer updates.
  """
  lr = learning_rate(config.lr_schedule, config.lr, total_updates, config.warmup_steps)
  if config.optimizer == "sgd":
    update = optax.sgd(lr)
  else:
    update = optax.adamw(
      lr, b1=config.b1, b2=config.b2, eps=config.adam_eps, weight_decay=config.weight_decay
    )
  tx = (
    optax.chain(optax.clip_by_global_norm(config.max_grad_norm), update)
    if config.max_grad_norm
    else update
  )
  return keep_moments(tx, jnp.dtype(config.moment_dtype))


class Kept(NamedTuple):
  """State of `keep_moments`."""

  count: jax.Array  # type: ignore[assignment]  # i32[], updates so far; seeds the rounding
  inner: Any


def wide(tree):
  """Floating-point leaves in at least float32."""
  return jax.tree.map(
    lambda x: at_least_f32(x) if jnp.issubdtype(x.dtype, jnp.floating) else x, tree
  )


def keep_moments(tx: optax.GradientTransformation, dtype) -> optax.GradientTransformation:
  """`tx`, computed in at least float32, with moments stored in `dtype`; "float32" means at least
  float32.
  """
  narrow = dtype == jnp.bfloat16

  def init(params):
    return Kept(jnp.zeros((), jnp.int32), stored(tx.init(wide(params)), jnp.int32(0)))

  def stored(state, count):
    return (
      round_tree(state, jax.tree.map(lambda x: dtype if x.ndim else x.dtype, state), count)
      if narrow
      else state
    )

  def update(grads, state, params):
    updates, inner = tx.update(
      wide(grads), wide(state.inner) if narrow else state.inner, wide(params)
    )
    return updates, Kept(state.count + 1, stored(inner, state.count))

  return optax.GradientTransformation(init, update)


def round_tree(tree, dtypes, count: jax.Array):
  """Leaves in their `dtypes`. Leaves that go from float32 to bfloat16 are rounded stochastically,
  with a seed that depends on leaf and `count`.
  """

  def rounded(path, x, dtype):
    if (x.dtype, dtype) == (jnp.float32, jnp.bfloat16):
      return round_at_random(
        x, count.astype(jnp.uint32) ^ jnp.uint32(zlib.crc32(path_name(path).encode()))
      )
    return x.astype(dtype)

  return jax.tree_util.tree_map_with_path(rounded, tree, dtypes)


def round_at_random(x: jax.Array, seed: jax.Array) -> jax.Array:
  """f32 -> bf16: one of the two neighbours, with expectation x. A number that bfloat16 can
  represent does not change.

  The noise is a hash of the element's position and `seed`, u32[]. It is computed element by
  element, so it needs no memory and is the same on every mesh.
  """
  place = jnp.zeros(x.shape, jnp.uint32)
  for axis in range(x.ndim):
    stride = int(np.prod(x.shape[axis + 1 :])) % 2**32
    place += jax.lax.broadcasted_iota(jnp.uint32, x.shape, axis) * jnp.uint32(stride)
  noise = _hash(place ^ _hash(seed)) >> 16
  # carries into the upper half with the probability given by the lower half
  bits = jax.lax.bitcast_convert_type(x, jnp.uint32) + noise
  rounded = jax.lax.bitcast_convert_type(bits & jnp.uint32(0xFFFF0000), jnp.float32)
  return jnp.where(jnp.isfinite(x), rounded, x).astype(jnp.bfloat16)


def _hash(x: jax.Array) -> jax.Array:
  """An invertible mixing of 32 bits (the finaliser of MurmurHash3)."""
  x = (x ^ (x >> 16)) * jnp.uint32(0x85EBCA6B)
  x = (x ^ (x >> 13)) * jnp.uint32(0xC2B2AE35)
  return x ^ (x >> 16)


def apply_updates(params, updates, count: jax.Array):
  """params + updates, summed in at least float32 and stored in the dtype of params; see
  `round_at_random`.
  """
  summed = jax.tree.map(lambda p, u: at_least_f32(p) + u, params, updates)
  return round_tree(summed, jax.tree.map(lambda p: p.dtype, params), count)


def gradient(loss: Callable, params, *args, parts: int = 1, deal: Deal | None = None):
  """(value, aux, gradient) of loss(params, *args) -> (value, aux), from `parts` micro-batches one
  after another.

  With more than one part, the first of args is a tree of rows. `loss` then gives the contribution
  of the rows that it sees to the value for all rows (its denominators count all rows), and every
  leaf of aux has these rows as its leading axis. Contributions and gradients are summed in at least
  float32, so the number of parts changes only rounding. `deal`: which rows a part has; see
  `scan_rows`.
  """
  compute = jax.value_and_grad(loss, has_aux=True)
  if parts == 1:
    (value, aux), grads = compute(params, *args)
    return value, aux, lay_parameters(grads)

  def add(total, rows):
    (value, aux), grads = compute(params, rows, *args[1:])
    value, grads = jax.tree.map(lambda old, new: old + new.astype(old.dtype), total, (value, grads))
    return (value, lay_parameters(grads)), aux

  value = jax.eval_shape(lambda *args: loss(*args)[0], params, *args)
  zeros = jax.tree.map(lambda x: at_least_f32(jnp.zeros(x.shape, x.dtype)), (value, params))
  carry = zeros[0], lay_parameters(zeros[1])
  (value, grads), aux = scan_rows(add, carry, parts, args[0], deal=deal)
  return value, aux, grads


def descend(
  tx: optax.GradientTransformation,
  loss: Callable,
  params,
  opt,
  *args,
  parts: int = 1,
  deal: Deal | None = None,
):
  """One update of params on loss(params, *args) -> (loss, aux), unless a number is not finite.

  The gradient comes from `parts` micro-batches, whose rows `deal` determines; see `gradient`.

  If the loss, the gradient norm or an updated parameter is NaN or infinite, params and opt stay bit
  for bit as they were. (Moments of finite gradients with a finite norm are finite.) The branch is
  in the same program and needs no extra memory. Choosing element by element would keep both choices
  in memory. Instead, the new parameters are first computed only for the check, which is fused into
  one number, and computed again if all are finite.

  Returns:
    params', opt', loss f32[], aux, {"grad_norm": f32[] before clipping, "skipped": f32[] 1 if
    nothing was changed}.
  """
  value, aux, grads = gradient(loss, params, *args, parts=parts, deal=deal)
  norm = optax.tree.norm(wide(grads))

  def update(params, opt, grads):
    updates, new = tx.update(grads, opt, params)
    return apply_updates(params, updates, opt.count if isinstance(opt, Kept) else jnp.int32(0)), new

  numbers = (value, norm, *jax.tree.leaves(update(params, opt, grads)[0]))
  good = functools.reduce(jnp.logical_and, [jnp.isfinite(x).all() for x in numbers])
  params, opt = jax.lax.cond(
    good, update, lambda params, opt, grads: (params, opt), params, opt, grads
  )
  return params, opt, value, aux, {"grad_norm": norm, "skipped": 1 - good.astype(norm.dtype)}
