"""Adapters as a PEFT folder: adapter_config.json and adapter_model.safetensors, as the library
`peft` loads them.
"""

import json
import pathlib

import jax
import numpy as np
from flax import nnx
from safetensors.numpy import save_file

from r2m_jax.hf.weights import gather, name_of
from r2m_jax.models.arch import ArchConfig
from r2m_jax.models.lora import LoraConfig
from r2m_jax.parallel import sharding


def save_peft(
  folder: pathlib.Path,
  arch: ArchConfig,
  adapters: nnx.State,
  lora: LoraConfig,
  base: str,
  revision: str = "",
) -> None:
  """Writes the adapters of a causal language model. With several processes all must call; the first
  one writes.

  A linear that is fused on disk (GPT-NeoX's query_key_value) gets one adapter of the ranks of its
  parts together: their A stacked, their B in the rows that belong to each part.

  Args:
    base: folder or hub name of the model they sit on.
    revision: commit of a hub name.
  """
  found = {
    sharding.path_name(path): x for path, x in jax.tree_util.tree_flatten_with_path(adapters)[0]
  }
  groups: dict[str, list[tuple[int | None, str]]] = {}  # name on disk -> its parts, in order
  for linear in sorted(name.removesuffix("_lora_a") for name in found if name.endswith("_lora_a")):
    template, part = name_of(arch, linear)
    groups.setdefault(template.removesuffix(".weight"), []).append((part, linear))
  tensors, ranks = {}, {}
  for template, parts in groups.items():
    a = [gather(found[f"{linear}_lora_a"], None) for _, linear in sorted(parts)]  # [N, in, r]
    b = [gather(found[f"{linear}_lora_b"], None) for _, linear in sorted(parts)]  # [N, r, out]
    ranks[template] = lora.rank * len(parts)
    for layer in range(arch.num_layers):
      name = f"base_model.model.{template.format(layer)}"
      down = np.concatenate([x[layer].T for x in a])  # [r, in]
      if parts[0][0] is None:
        up = b[0][layer].T  # [out, r]
      else:
        up = np.zeros((arch.num_heads, 3, arch.head_dim, ranks[template]), b[0].dtype)
        for i, ((part, _), x) in enumerate(zip(sorted(parts), b)):
          columns = slice(i * lora.rank, (i + 1) * lora.rank)
          up[:, part, :, columns] = x[layer].T.reshape(arch.num_heads, arch.head_dim, lora.rank)
        up = up.reshape(-1, ranks[template])
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
  """adapter_config.json of PEFT. `ranks`: of the linears whose adapters have another one."""
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
