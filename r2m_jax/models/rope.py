"""Rotary positions: how frequencies are scaled beyond the pretraining length, and how Hugging
Face's config.json describes this, in rope_parameters (transformers 5) and in older fields.
"""

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np


@dataclasses.dataclass(frozen=True)
class RopeScaling:
  """How rotary frequencies are scaled beyond the pretraining length.

  kind "linear": every frequency / factor (arXiv 2306.15595). kind "llama3": long wavelengths /
  factor, short ones unchanged, smooth in between (Llama 3.1). kind "yarn": like llama3, between two
  numbers of turns over the pretraining length (arXiv
    2309.00071).
  kind "longrope": every frequency has its own factor (arXiv 2402.13753). Up to the pretraining
  length the short factors apply. The long factors, for longer texts, are stored and not used.
  """

  kind: str
  factor: float
  low_freq_factor: float = 1.0  # llama3 only
  high_freq_factor: float = 4.0  # llama3 only
  original_length: int = 8192  # all but linear: the pretraining length in tokens
  beta_fast: float = 32.0  # yarn only: number of turns above which a frequency is unchanged
  beta_slow: float = 1.0  # yarn only: turns below which a frequency is divided by it
  truncate: bool = True  # yarn only: the ramp between the two starts and ends at whole pairs
  magnitude: float = 1.0  # yarn and longrope: cosines and sines are multiplied by it
  query_growth: float = 0.0  # yarn only: scales queries beyond the pretraining length (Ministral 3)
  short_factors: tuple[float, ...] = ()  # longrope only: one for each rotated pair
  long_factors: tuple[float, ...] = ()  # longrope only

  def __post_init__(self):
    for field in ("short_factors", "long_factors"):
      object.__setattr__(self, field, tuple(self._factors(field)))
    if self.kind not in KINDS:
      raise ValueError(
        f"RopeScaling.kind={self.kind!r} is not supported; use one of {', '.join(KINDS)}"
      )
    for field in ("factor", "magnitude", "original_length", "beta_fast", "beta_slow"):
      if getattr(self, field) <= 0:
        hint = "; 1.0 leaves the frequencies alone" if field == "factor" else ""
        raise ValueError(f"RopeScaling.{field}={getattr(self, field)} must be positive{hint}")
    if self.kind in RANGES:
      high, low, usual = RANGES[self.kind]
      if getattr(self, high) <= getattr(self, low):
        raise ValueError(
          f"RopeScaling.{high}={getattr(self, high)} must exceed {low}={getattr(self, low)}; {usual}"
        )

  def _factors(self, field: str):
    factors = getattr(self, field)
    if not isinstance(factors, list | tuple):
      raise ValueError(f"RopeScaling.{field}={factors!r}: give a list of numbers")
    if self.kind == "longrope" and not (factors and all(f > 0 for f in factors)):
      raise ValueError(f"RopeScaling.{field}={list(factors)}: give one positive factor a pair")
    return factors

  @property
  def longest(self) -> int | None:
    """The maximum number of tokens for which the rotation is supported; None: any number."""
    limited = self.kind == "longrope" or self.query_growth
    return self.original_length if limited else None


def frequencies(dim: int, theta: float, scaling: RopeScaling | None) -> np.ndarray:
  """Radians per token for each rotated pair: theta^(-2i/dim), scaled by `scaling`. float64[dim /
  2].
  """
  freq = theta ** (-np.arange(0, dim, 2, dtype=np.float64) / dim)
  return freq if scaling is None else KINDS[scaling.kind](freq, theta, scaling)


def _linear(freq, theta, scaling):
  return freq / scaling.factor


def _llama3(freq, theta, scaling):
  low, high = scaling.low_freq_factor, scaling.high_freq_factor
  turns = scaling.original_length * freq / (2 * math.pi)  # over the pretraining length
  keep = np.clip((turns - low) / (high - low), 0.0, 1.0)
  return keep * freq + (1 - keep) * freq / scaling.factor


def _yarn(freq, theta, scaling):
  def pair(turns):  # the (fractional) pair that makes this many turns over the pretraining length
    return len(freq) * math.log(scaling.original_length / (turns * 2 * math.pi), theta)

  first, last = pair(scaling.beta_fast), pair(scaling.beta_slow)
  if scaling.truncate:
    first, last = math.floor(first), math.ceil(last)
  first, last = max(first, 0), min(last, 2 * len(freq) - 1)
  ramp = np.clip((np.arange(len(freq)) - first) / max(last - first, 0.001), 0.0, 1.0)
  return (1 - ramp) * freq + ramp * freq / scaling.factor


def _longrope(freq, theta, scaling):
  return freq / np.asarray(scaling.short_factors)


KINDS: dict[str, Callable] = {
  "linear": _linear,
  "llama3": _llama3,
  "yarn": _yarn,
  "longrope": _longrope,
}

# kind -> the ends of its range of turns, which must be in this order
RANGES = {
  "llama3": ("high_freq_factor", "low_freq_factor", "Llama 3.1 uses 4.0 and 1.0"),
  "yarn": ("beta_fast", "beta_slow", "the paper uses 32 and 1"),
}

# RopeScaling field -> its name in config.json, for the kinds that have it. If a name is missing,
# transformers' value applies; see `_scaling_of`.
LENGTH = {"original_length": "original_max_position_embeddings"}
NAMES: dict[str, dict[str, str]] = {
  "linear": {"factor": "factor"},
  "llama3": {
    "factor": "factor",
    "low_freq_factor": "low_freq_factor",
    "high_freq_factor": "high_freq_factor",
    **LENGTH,
  },
  "yarn": {
    "factor": "factor",
    "beta_fast": "beta_fast",
    "beta_slow": "beta_slow",
    "truncate": "truncate",
    "magnitude": "attention_factor",
    "query_growth": "llama_4_scaling_beta",
    **LENGTH,
  },
  "longrope": {
    "factor": "factor",
    "short_factors": "short_factor",
    "long_factors": "long_factor",
    "magnitude": "attention_factor",
    **LENGTH,
  },
}


def _kind(rope: Mapping) -> str:
  return rope.get("rope_type", rope.get("type", "default"))


def agree(given: Mapping[str, Any], new: dict, *, partial: bool) -> None:
  """Raises ValueError if rope_parameters and the older fields disagree.

  Args:
    given: the unchanged config.json, without defaults.
    partial: whether the family may rotate only a part of a head.
  """
  old = given.get("rope_scaling") or {}
  both = {name for names in NAMES.values() for name in names.values()} & old.keys() & new.keys()
  if old and new and (_kind(old) != _kind(new) or any(old[name] != new[name] for name in both)):
    raise ValueError(
      f"config.json has rope_parameters {new} and rope_scaling {old}, which disagree; keep one of "
      "them"
    )
  pairs = {
    "rope_theta": "rope_theta",
    "rotary_emb_base": "rope_theta",
    "rotary_pct": "partial_rotary_factor",
  }
  for name, other in pairs.items():
    if given.get(name) is not None and other in new and given[name] != new[other]:
      raise ValueError(
        f"config.json has {name} = {given[name]} and rope_parameters with {other} = {new[other]}, "
        "which disagree; keep "
        "one of them"
      )
  own = given.get("partial_rotary_factor")
  if not partial and {"partial_rotary_factor": own, **old, **new}["partial_rotary_factor"] not in (
    None,
    1.0,
  ):
    raise ValueError(
      "config.json has a partial_rotary_factor, which transformers ignores for this model_type; "
      "take it out, or name "
      "the model_type that it belongs to"
    )


def spelling(defaults: Mapping[str, Any]) -> tuple[str, str | None]:
  """The names that a family with these defaults uses for theta and for the rotated fraction of a
  head.
  """
  theta = "rotary_emb_base" if "rotary_emb_base" in defaults else "rope_theta"
  parts = [name for name in ("rotary_pct", "partial_rotary_factor") if name in defaults]
  return theta, parts[0] if parts else None


def read(
  config: dict, given: Mapping[str, Any], defaults: Mapping[str, Any], nested: bool
) -> dict[str, Any]:
  """The four rotary fields of ArchConfig from rope_parameters (transformers 5), or else from the
  older fields.

  Args:
    config: config.json with the family's defaults.
    given: the unchanged config.json.
    defaults: of the family.
    nested: whether sliding layers have a separate theta.
  """
  theta, part = spelling(defaults)
  new = config.get("rope_parameters") or {}
  local = config.get("rope_local_base_freq", config[theta]) if nested else None
  if "full_attention" in new:
    own = new["sliding_attention"]
    if _kind(own) != "default":
      raise ValueError(
        f"config.json gives sliding layers the rope type {_kind(own)!r}: only 'default' is supported; "
        "give a model that has it"
      )
    local = own["rope_theta"]
    new = new["full_attention"]
  agree(given, new, partial=part is not None)
  rope = {
    "rope_theta": config[theta],
    "partial_rotary_factor": config[part] if part else 1.0,
    **(config["rope_scaling"] or {}),
    **new,
  }
  return {
    "rope_theta": rope["rope_theta"],
    "rotary_fraction": rope["partial_rotary_factor"],
    "rope_scaling": _scaling_of(rope, config),
    "rope_local_theta": local,
  }


def _scaling_of(rope: dict, config: dict) -> RopeScaling | None:
  """The scaling of a rope_scaling or rope_parameters, with transformers' values for missing
  fields.
  """
  kind = _kind(rope)
  if config["model_type"] == "phi3" and kind in ("su", "yarn"):
    kind = "longrope"  # the name in older files of this family
  if kind == "default":
    return None
  if kind not in KINDS:
    raise ValueError(
      f"rope type {kind!r} in config.json is not supported; 'default', "
      f"{', '.join(map(repr, KINDS))} are: give a model that has one of these"
    )
  names = NAMES[kind]
  found = {ours: rope[name] for ours, name in names.items() if rope.get(name) is not None}
  if kind in ("yarn", "longrope") and config.get(LENGTH["original_length"]) is not None:
    found["original_length"] = config[LENGTH["original_length"]]
  if "original_length" in names:
    found.setdefault("original_length", config["max_position_embeddings"])
  if kind in ("yarn", "longrope"):
    found.setdefault("factor", config["max_position_embeddings"] / found["original_length"])
    found.setdefault("magnitude", _magnitude(kind, rope, found))
  needed = [field.name for field in dataclasses.fields(RopeScaling)][1:4]
  needed += ["short_factors", "long_factors"]
  if missing := [names[n] for n in needed if n in names and n not in found]:
    raise ValueError(
      f"config.json has rope type {kind!r} without {', '.join(missing)}: add them, or copy it again"
    )
  return RopeScaling(kind, **found)


def _magnitude(kind: str, rope: Mapping, found: Mapping) -> float:
  """The attention_factor that transformers assumes if the file gives none."""
  factor = found["factor"]
  if factor <= 1:
    return 1.0
  if kind == "longrope":
    return math.sqrt(1 + math.log(factor) / math.log(found["original_length"]))

  def growth(scale):
    return 0.1 * scale * math.log(factor) + 1.0

  scale, every = rope.get("mscale"), rope.get("mscale_all_dim")
  return growth(scale) / growth(every) if scale and every else growth(1.0)


def write(arch, defaults: Mapping[str, Any], nested: bool) -> dict[str, Any]:
  """Both spellings of an ArchConfig's rotary fields, for a family with these defaults."""
  scaling = arch.rope_scaling
  kind: dict[str, Any] = {"rope_type": "default"}
  if scaling is not None:
    kind = {"rope_type": scaling.kind}
    unused = {"truncate": True, "query_growth": 0.0}  # omitted, because files seldom have them
    for ours, name in NAMES[scaling.kind].items():
      value = getattr(scaling, ours)
      if ours not in unused or value != unused[ours]:
        kind[name] = list(value) if isinstance(value, tuple) else value
  theta, part = spelling(defaults)
  old: dict[str, Any] = {"rope_scaling": scaling and kind, theta: arch.rope_theta}
  new: dict[str, Any] = {**kind, "rope_theta": arch.rope_theta}
  if part:
    old[part] = new["partial_rotary_factor"] = arch.rotary_fraction
  if nested:
    old["rope_local_base_freq"] = local = arch.rope_local_theta or arch.rope_theta
    own = {"rope_type": "default", "rope_theta": local}
    new = {"full_attention": new, "sliding_attention": own}
  if scaling and LENGTH["original_length"] in defaults:
    old[LENGTH["original_length"]] = scaling.original_length
  return old | {"rope_parameters": new}
