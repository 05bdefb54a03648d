"""Optimizers: an optax chain from a config section, and one update that refuses numbers that are not finite."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax

from r2m_jax.minibatch import join_rows, split_rows
from r2m_jax.ops import at_least_f32
from r2m_jax.schedules import learning_rate
from r2m_jax.sharding import lay_parameters, lay_rows


def make_optimizer(config, total_updates: int) -> optax.GradientTransformation:
  """Clip by global norm, then AdamW or plain SGD with the section's schedule.

  Args:
    config: a section with `optimizer`, `lr`, `lr_schedule`, `warmup_steps`, `b1`, `b2`, `adam_eps`, `weight_decay`,
      `max_grad_norm` (0 does not clip).
    total_updates: length of the schedule, in optimizer updates.
  """
  lr = learning_rate(config.lr_schedule, config.lr, total_updates, config.warmup_steps)
  if config.optimizer == "sgd":
    update = optax.sgd(lr)
  else:
    update = optax.adamw(lr, b1=config.b1, b2=config.b2, eps=config.adam_eps, weight_decay=config.weight_decay)
  return optax.chain(optax.clip_by_global_norm(config.max_grad_norm), update) if config.max_grad_norm else update


def gradient(loss: Callable, params, *args, parts: int = 1):
  """(value, aux, gradient) of loss(params, *args) -> (value, aux), from `parts` micro-batches one after another.

  With more than one, the first of args is a tree of rows, `loss` gives the share that the rows it sees have in the
  value of all (what it divides by, it counts over all), and every leaf of aux has these rows as its leading axis.
  Shares and gradients are summed in at least float32, so any number of parts gives the same numbers up to rounding.
  """
  compute = jax.value_and_grad(loss, has_aux=True)
  if parts == 1:
    (value, aux), grads = compute(params, *args)
    return value, aux, lay_parameters(grads)

  def add(total, rows):
    (value, aux), grads = compute(params, jax.tree.map(lay_rows, rows), *args[1:])
    value, grads = jax.tree.map(lambda old, new: old + new.astype(old.dtype), total, (value, grads))
    return (value, lay_parameters(grads)), aux

  micro = split_rows(args[0], parts)
  first = jax.tree.map(lambda x: x[0], micro)
  value = jax.eval_shape(lambda *args: loss(*args)[0], params, first, *args[1:])
  zeros = jax.tree.map(lambda x: at_least_f32(jnp.zeros(x.shape, x.dtype)), (value, params))
  (value, grads), aux = jax.lax.scan(add, (zeros[0], lay_parameters(zeros[1])), micro)
  return value, join_rows(aux), grads


def descend(tx: optax.GradientTransformation, loss: Callable, params, opt, *args, parts: int = 1):
  """One update of params on loss(params, *args) -> (loss, aux), unless a number is not finite.

  The gradient comes from `parts` micro-batches; see `gradient`.

  Where the loss or the gradient's norm is NaN or infinite, params and opt stay bit for bit what they were. The branch
  is in the same program and needs no memory of its own: choosing element by element would keep what it chooses from.

  Returns:
    params', opt', loss f32[], aux, {"grad_norm": f32[] before clipping, "skipped": f32[] 1 where nothing was changed}.
  """
  value, aux, grads = gradient(loss, params, *args, parts=parts)
  norm = optax.tree.norm(grads)
  good = jnp.isfinite(value) & jnp.isfinite(norm)

  def update(params, opt, grads):
    grads = jax.tree.map(lambda g, p: g.astype(p.dtype), grads, params)
    updates, opt = tx.update(grads, opt, params)
    return optax.apply_updates(params, updates), opt

  params, opt = jax.lax.cond(good, update, lambda params, opt, grads: (params, opt), params, opt, grads)
  return params, opt, value, aux, {"grad_norm": norm, "skipped": 1 - good.astype(norm.dtype)}
