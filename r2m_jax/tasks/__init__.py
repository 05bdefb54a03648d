"""One file for each config.task."""

import importlib
from types import ModuleType


def training(config, gold: str = "tasks.gold") -> ModuleType:
  """What trains by this config: `tasks.folders` if it names a Hugging Face folder, else the module
  `gold`, of the gold-reward task.
  """
  named = config.policy.path or config.reward.path
  return importlib.import_module(f"r2m_jax.{'tasks.folders' if named else gold}")
