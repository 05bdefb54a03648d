"""One file for each config.task."""

import importlib
from types import ModuleType


def training(config) -> ModuleType:
  """What trains by this config: `tasks.folders` if it names a Hugging Face folder, else
  `tasks.gold`, the gold-reward task.
  """
  name = "folders" if config.policy.path or config.reward.path else "gold"
  return importlib.import_module(f"r2m_jax.tasks.{name}")
