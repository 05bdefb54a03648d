"""One file for each config.task."""

import importlib
from types import ModuleType


def training(config, gold: str = "tasks.gold") -> ModuleType:
  """The module that trains this config: `tasks.folders` if it names a Hugging Face folder,
  otherwise `gold`, a module of the gold-reward task.
  """
  named = config.policy.path or config.reward.path
  return importlib.import_module(f"r2m_jax.{'tasks.folders' if named else gold}")
