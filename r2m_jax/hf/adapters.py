"""Reads a PEFT folder and merges its adapters into the weights of the base.

W + s B A                          LoRA, s = alpha / rank (arXiv 2106.09685)
W + s B A                          rsLoRA, s = alpha / sqrt(rank) (arXiv 2312.03732)
m (W + s B A) / |W + s B A|        DoRA, m and the norm one number an output (arXiv 2402.09353)
"""

import dataclasses
import json
import math
import pathlib
import re
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, NoReturn

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load_file

from r2m_jax.run.files import RepeatedKey, unique_keys

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
# leaf of a tensor's name -> field of LowRank; the second is peft's spelling within a model
LEAVES = {
  "lora_A.weight": "down",
  "lora_B.weight": "up",
  "lora_magnitude_vector": "magnitude",
  "lora_magnitude_vector.weight": "magnitude",
  "base_layer.weight": "base",
}
# field of adapter_config.json -> the supported values
PLAIN: dict[str, tuple] = {
  "peft_type": ("LORA",),
  "bias": ("none", None),
  "fan_in_fan_out": (False, None),
  "megatron_config": (None,),
  "alora_invocation_tokens": (None,),
  "layer_replication": (None, [], {}),
  "trainable_token_indices": (None, [], {}),
  "target_parameters": (None, []),
  "arrow_config": (None,),
  "lora_bias": (False, None),
  # others, such as "pissa" and "olora", also take their start out of the base's weights
  "init_lora_weights": (True, False, "gaussian", "eva", "orthogonal"),
  "kasa_config": (None,),
}


class LowRank(NamedTuple):
  """The adapter of one weight [out, in]."""

  down: np.ndarray  # A [rank, in]
  up: np.ndarray  # B [out, rank]
  scale: float  # s
  magnitude: np.ndarray | None  # m [out], of DoRA
  # the adapter's own copy of W [out, in]; peft saves that of lm_head
  base: np.ndarray | None = None

  def merged(self, weight: np.ndarray) -> np.ndarray:
    """The weight with its adapter, float32[out, in]."""
    wide: np.ndarray = (weight if self.base is None else self.base).astype(np.float32)
    wide += self.scale * (self.up.astype(np.float32) @ self.down.astype(np.float32))
    if self.magnitude is None:
      return wide
    norm = np.sqrt(np.square(wide, dtype=np.float64).sum(1, keepdims=True))
    return (self.magnitude.reshape(-1, 1) / norm * wide).astype(np.float32)


@dataclasses.dataclass(frozen=True)
class Adapter:
  """A PEFT folder."""

  folder: pathlib.Path
  base: str  # folder or hub name of the base model
  revision: str  # branch, tag or commit of a hub name; "": main
  low: Mapping[str, LowRank]  # name of a weight of the base -> its adapter
  whole: Mapping[str, np.ndarray]  # name of a weight -> its replacement (modules_to_save)

  def refuse(self, reason: str) -> NoReturn:
    refuse(self.folder, reason)

  def renamed(self, rename: Callable[[str], str | None]) -> "Adapter":
    """A copy with `rename(name)` as each weight's name, or the old name if that is None."""
    low = {rename(name) or name: x for name, x in self.low.items()}
    whole = {rename(name) or name: x for name, x in self.whole.items()}
    return dataclasses.replace(self, low=low, whole=whole)

  def check(self, shapes: Mapping[str, tuple[int, ...]]) -> None:
    """Raises ValueError unless every adapter fits a weight of the base, whose shapes are given."""
    if absent := sorted(self.low.keys() - shapes.keys()):
      self.refuse(f"with adapters of {absent[0]}, which its base {self.base} does not have")
    for name, low in self.low.items():
      found = (low.up.shape[0], low.down.shape[1])
      if low.up.shape[1:] != low.down.shape[:1] or shapes[name] != found:
        self.refuse(
          f"whose adapter of {name} is {low.up.shape} x {low.down.shape}; the base has "
          f"{shapes[name]}"
        )
      if low.base is not None and low.base.shape != found:
        self.refuse(f"whose own copy of {name} is {low.base.shape}; the base has {shapes[name]}")


def refuse(folder: pathlib.Path, reason: str) -> NoReturn:
  raise ValueError(
    f"{folder} is an adapter folder (PEFT) {reason}; merge it into its base (peft: "
    "merge_and_unload, then save_pretrained) and give that folder"
  )


def refuse_tied(folder: pathlib.Path, head: str, field: str, embed: str) -> NoReturn:
  """For a changed head whose base ties it to its embedding: merged, there would be two tensors in
  place of one.

  Args:
    head, embed: names of the weights.
    field: of adapter_config.json, the one that names the head.
  """
  module = head.removesuffix(".weight")
  raise ValueError(
    f"{folder / CONFIG} has {module!r} in {field}, and the base ties {head} to {embed} "
    f"(tie_word_embeddings in its config.json); train the adapters without {module}, or on a base "
    "that does not tie it"
  )


def is_adapter(folder: pathlib.Path) -> bool:
  """Whether a folder has adapters and no model."""
  return (folder / CONFIG).exists() and not (folder / "config.json").exists()


def base_of(folder: pathlib.Path) -> tuple[str, str]:
  """The base model of a PEFT folder: its folder or hub name, and its branch, tag or commit ("":
  main).
  """
  config = _config(folder)
  return config["base_model_name_or_path"], config.get("revision") or ""


def read_adapter(folder: pathlib.Path) -> Adapter:
  """The adapters in a PEFT folder. Raises ValueError if they are missing or of an unsupported
  kind.
  """
  config = _config(folder)
  try:
    tensors = load_file(folder / WEIGHTS)
  except (SafetensorError, OSError, ValueError, KeyError) as error:
    refuse(folder, f"with no {WEIGHTS} that can be read: {error}")
  parts: dict[str, dict[str, np.ndarray]] = {}
  whole = {}
  for name, x in tensors.items():
    own = name.removeprefix("base_model.model.").replace(".modules_to_save.", ".")
    module, leaf = next(
      (
        (own.removesuffix(f".{leaf}"), field)
        for leaf, field in LEAVES.items()
        if own.endswith(leaf)
      ),
      (own, ""),
    )
    if leaf:
      parts.setdefault(f"{module}.weight", {})[leaf] = x
    elif "lora_" in own:
      refuse(folder, f"with {name}, which is not an adapter of a linear layer")
    else:
      whole[own] = x
  scale = _scales(config)
  low = {}
  for name, found in parts.items():
    if not {"down", "up"} <= found.keys() or config.get("use_dora") and "magnitude" not in found:
      refuse(folder, f"whose {WEIGHTS} has only {', '.join(found)} of {name}")
    rank = found["down"].shape[0]
    low[name] = LowRank(
      found["down"],
      found["up"],
      scale(name.removesuffix(".weight"), rank),
      found.get("magnitude"),
      found.get("base"),
    )
  return Adapter(folder, *base_of(folder), low, whole)


def _config(folder: pathlib.Path) -> dict[str, Any]:
  """adapter_config.json, checked to be mergeable."""
  try:
    config = json.loads((folder / CONFIG).read_text("utf-8"), object_pairs_hook=unique_keys)
  except RepeatedKey as error:
    raise ValueError(f"{folder / CONFIG} is ambiguous: {error}; leave one of its values") from None
  except (ValueError, RecursionError) as error:
    refuse(folder, f"whose {CONFIG} is not JSON: {error}")
  if not isinstance(config, dict) or not isinstance(config.get("base_model_name_or_path"), str):
    refuse(folder, f"whose {CONFIG} names no base_model_name_or_path")
  for field, plain in PLAIN.items():
    if config.get(field, plain[0]) not in plain:
      refuse(folder, f"with {field} = {config[field]!r}, which is not supported")
  return config


def _scales(config: Mapping[str, Any]) -> Callable[[str, int], float]:
  """Builds `scale(module, rank)`: s of the adapter of a base module."""
  patterns = config.get("alpha_pattern") or {}

  def scale(module: str, rank: int) -> float:
    named = [key for key in patterns if re.match(rf"(.*\.)?({key})$", module)]
    alpha = patterns[named[0]] if named else config.get("lora_alpha", 8)
    return alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)

  return scale
