"""Real preferences for the reward update: whether a step uses them, and how many it gets."""

import math
from collections.abc import Callable

from r2m_jax.algorithm.variants import VARIANTS
from r2m_jax.types import Pairs, Sequences


def uses_labels(config) -> bool:
  """Whether the step uses real preferences."""
  return config.r2m.labels == "preference" and VARIANTS[config.variant].trained


def pairs_per_step(config) -> int:
  """The most labelled pairs that one step can have: rows of `Pairs`."""
  trajectories = config.rollout.prompts * config.rollout.group_size
  return math.ceil(config.r2m.label_budget * trajectories / 2)


def pairs_at(config, step: int) -> int:
  """The number of labelled pairs in this step, such that the steps so far have used their share of
  the budget.
  """
  rate = config.r2m.label_budget * config.rollout.prompts * config.rollout.group_size / 2
  return math.floor((step + 1) * rate + 1e-9) - math.floor(step * rate + 1e-9)


Labeller = Callable[[Sequences, int], Pairs]
