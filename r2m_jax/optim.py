"""Optimizers: an optax chain from a config section, and one update that refuses numbers that are not finite."""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax

from r2m_jax.schedules import learning_rate


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


def descend(tx: optax.GradientTransformation, loss: Callable, params, opt, *args):
  """One update of params on loss(params, *args) -> (loss, aux), unless a number is not finite.

  Where the loss, the gradient's norm or an updated parameter is NaN or infinite, params and opt stay bit for bit what
  they were. (Moments of finite gradients with a finite norm are finite.) The branch is in the same program and needs no
  memory of its own: choosing element by element would keep what it chooses from, so the new parameters are first made
  to be looked at alone, which is fused into one number, and made again if all are good.

  Returns:
    params', opt', loss f32[], aux, {"grad_norm": f32[] before clipping, "skipped": f32[] 1 where nothing was changed}.
  """
  (value, aux), grads = jax.value_and_grad(loss, has_aux=True)(params, *args)
  norm = optax.tree.norm(grads)

  def update(params, opt, grads):
    updates, opt = tx.update(grads, opt, params)
    return optax.apply_updates(params, updates), opt

  numbers = (value, norm, *jax.tree.leaves(update(params, opt, grads)[0]))
  good = functools.reduce(jnp.logical_and, [jnp.isfinite(x).all() for x in numbers])
  params, opt = jax.lax.cond(good, update, lambda params, opt, grads: (params, opt), params, opt, grads)
  return params, opt, value, aux, {"grad_norm": norm, "skipped": 1 - good.astype(norm.dtype)}
