"""Optimizers: an optax chain from a config section."""

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
