"""Writes trained adapters as a PEFT folder that the library `peft` loads, and reads them for
further training. `hf.adapters` reads such folders to merge them.
"""

import json
import pathlib

import jax
import numpy as np
from flax import nnx
from safetensors.numpy import save_file

from r2m_jax.hf.adapters import Adapter
from r2m_jax.hf.weights import Fused, fused_rows, gather, name_of, rows_of
from r2m_jax.models.arch import ArchConfig
from r2m_jax.models.lora import LoraConfig
from r2m_jax.parallel import hosts, sharding


def save_peft(
  folder: pathlib.Path,
  arch: ArchConfig,
  adapters: nnx.State,
  lora: LoraConfig,
  base: str,
  revision: str = "",
) -> None:
  """Writes the adapters of a causal language model. With several processes all must call it; the
  first one writes.

  A linear layer that is fused on disk (such as Phi's qkv_proj) gets one adapter whose rank is the
  sum of its parts' ranks: their A stacked, and their B in the rows of each part.

  Args:
    base: folder or hub name of the base model.
    revision: commit of a hub name.
  """
  found = {
    sharding.path_name(path): x for path, x in jax.tree_util.tree_flatten_with_path(adapters)[0]
  }
  groups: dict[str, list[tuple[int, str, Fused | None]]] = {}  # name on disk -> its parts, in order
  for linear in sorted(name.removesuffix("_lora_a") for name in found if name.endswith("_lora_a")):
    template, fused = name_of(arch, linear)
    part = (0 if fused is None else fused.part, linear, fused)
    groups.setdefault(template.removesuffix(".weight"), []).append(part)
  tensors, ranks = {}, {}
  for template, parts in groups.items():
    parts.sort(key=lambda part: part[0])
    a = [gather(found[f"{linear}_lora_a"], None) for _, linear, _ in parts]  # [N, in, r]
    b = [gather(found[f"{linear}_lora_b"], None) for _, linear, _ in parts]  # [N, r, out]
    ranks[template] = lora.rank * len(parts)
    for layer in range(arch.num_layers):
      name = f"base_model.model.{template.format(layer)}"
      down = np.concatenate([x[layer].T for x in a])  # [r, in]
      up = b[0][layer].T  # [out, r]
      for i, ((_, _, fused), x) in enumerate(zip(parts, b)):
        if fused is not None:
          if i == 0:
            up = np.zeros((fused_rows(arch, fused), ranks[template]), x.dtype)
          up[rows_of(arch, fused), i * lora.rank : (i + 1) * lora.rank] = x[layer].T
      tensors[f"{name}.lora_A.weight"], tensors[f"{name}.lora_B.weight"] = map(
        np.ascontiguousarray, (down, up)
      )
  short = {template: template.split("{}.", 1)[1] for template in groups}
  other = {short[t]: rank for t, rank in ranks.items() if rank != lora.rank}
  config = adapter_config(lora, base, revision, sorted(short.values()), other)
  if jax.process_index() != 0:
    return
  folder.mkdir(parents=True, exist_ok=True)
  (folder / "adapter_config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
  save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})


def adapter_config(
  lora: LoraConfig, base: str, revision: str, targets: list[str], ranks: dict[str, int]
) -> dict:
  """adapter_config.json of PEFT. `ranks`: of the linear layers whose adapters have a different
  rank.
  """
  return {
    "peft_type": "LORA",
    "task_type": "CAUSAL_LM",
    "base_model_name_or_path": base,
    "revision": revision or None,
    "inference_mode": True,
    "r": lora.rank,
    "lora_alpha": lora.alpha,
    "lora_dropout": 0.0,
    "bias": "none",
    "fan_in_fan_out": False,
    "target_modules": targets,
    "rank_pattern": ranks,
    "alpha_pattern": {name: rank * lora.scale for name, rank in ranks.items()},
  }


def load_peft(adapter: Adapter, arch: ArchConfig, lora: LoraConfig, fresh: nnx.State) -> nnx.State:
  """The adapters of a PEFT folder as a model's adapters, for further training.

  Args:
    adapter: accepted by `check_trainable`.
    fresh: new adapters of `lora`, which are kept where the folder has none, because they change
      nothing.
  """

  def put(path, x):
    linear, half = sharding.path_name(path).rsplit("_lora_", 1)
    template, fused = name_of(arch, linear)
    rows = slice(None) if fused is None else rows_of(arch, fused)
    value = np.array(gather(x, None))  # [N, in, r] or [N, r, out]
    for layer in range(arch.num_layers):
      if (low := adapter.low.get(template.format(layer))) is not None:
        value[layer] = low.down.T if half == "a" else low.scale / lora.scale * low.up[rows].T
    return hosts.put(value.astype(x.dtype), x.sharding)

  return jax.tree_util.tree_map_with_path(put, fresh)


def check_trainable(adapter: Adapter, arch: ArchConfig, lora: LoraConfig | None) -> None:
  """Raises ValueError unless adapters of `lora` can start from those of a PEFT folder."""
  assert lora is not None  # config.lora.rank is above 0
  linears = [name_of(arch, f"layers/{linear}/kernel")[0] for linear in lora.linears(arch)]
  places = {name.format(layer) for name in linears for layer in range(arch.num_layers)}
  if other := sorted({*adapter.low, *adapter.whole} - places):
    adapter.refuse(f"that trains {other[0]}, which config.lora.targets = {lora.targets!r} does not")
  for name, low in adapter.low.items():
    rank = low.down.shape[0]
    if low.magnitude is not None:
      adapter.refuse("with DoRA, which is not trained here")
    if rank != lora.rank:
      adapter.refuse(f"with {name} of rank {rank}: set config.lora.rank to it, not to {lora.rank}")
