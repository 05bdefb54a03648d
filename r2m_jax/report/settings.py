"""What was run: the settings that differ from their defaults, or between runs."""

import json

from r2m_jax.config import defaults, flat

ABSENT = "–"  # shown for a setting that one of the configs does not have


def as_dict(config) -> dict:
  """A ConfigDict or dict in the form of config.json."""
  nested = config.to_dict() if hasattr(config, "to_dict") else config
  return json.loads(json.dumps(nested, default=str))


def changed(config) -> list[list[str]]:
  """[field, value, default] of each setting of a config that is not at its default."""
  default = defaults()
  return [
    [field, shown(value), shown(default[field]) if field in default else ABSENT]
    for field, value in flat(as_dict(config)).items()
    if field not in default or default[field] != value
  ]


def differing(configs: list) -> list[list[str]]:
  """[field, value in each config] of each setting that differs between configs."""
  several = [flat(as_dict(config)) for config in configs]
  fields = dict.fromkeys(field for one in several for field in one)
  rows = []
  for field in fields:
    values = [shown(one[field]) if field in one else ABSENT for one in several]
    if len(set(values)) > 1:
      rows.append([field, *values])
  return rows


def shown(value) -> str:
  """A value of config.json in command-line form."""
  if isinstance(value, list):
    inner = ", ".join(map(repr, value))
    return f"({inner},)" if len(value) == 1 else f"({inner})"
  return value if isinstance(value, str) and value else repr(value)
