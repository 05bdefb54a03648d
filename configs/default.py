"""The default of every knob. r2m_jax/knobs.py declares them, docs/config.md lists them.

Experiment configs override these; nothing else adds keys (the config is locked).
"""

from ml_collections import ConfigDict

from r2m_jax.knobs import KNOBS, make_config


def get_config() -> ConfigDict:
  return make_config(KNOBS.parts)
