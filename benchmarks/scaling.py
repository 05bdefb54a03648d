"""Weak scaling on paper: the bytes that one chip sends in a step as the slice and the batch grow
together, from compiled programs.

  python -m benchmarks.scaling --config=configs/ultrafeedback_qwen2_5_3b.py [--fsdp=8] [--tensor=2]

Each line is a separate plan (task=plan) at full size, with prompts in proportion to the chips;
nothing runs. Plans are cached, so an interrupted table resumes.
"""

import json

from absl import app, flags

from benchmarks import machine
from r2m_jax.parallel.chips import GIB, parse_topology

CONFIG = flags.DEFINE_string("config", "configs/ultrafeedback_qwen2_5_3b.py", "What is scaled")
SLICES = ["v5e:4x4", "v5e:4x8", "v5e:8x8", "v5e:8x16", "v5e:16x16"]
TOPOLOGIES = flags.DEFINE_list("topologies", SLICES, "Smallest first")
TENSOR = flags.DEFINE_integer("tensor", 2, "Chips along tensor")
FSDP = flags.DEFINE_integer(
  "fsdp", 8, "Chips along fsdp; the others are along data. 0: all others are along fsdp"
)
PROMPTS = flags.DEFINE_integer("prompts", 64, "Prompts of a step on the first topology")
SETTING = flags.DEFINE_list(
  "setting", [], "Further --config.FIELD=VALUE of every plan, separated by commas"
)


def plan(topology, prompts: int) -> dict:
  """plan.json of one topology; the run need not fit."""
  shards = topology.count // TENSOR.value
  fsdp = FSDP.value or shards
  mesh = (shards // fsdp, fsdp, TENSOR.value)
  return machine.plans(
    CONFIG.value,
    f"plan.topology={topology.name}",
    "plan.compare=",
    f"mesh={mesh}",
    f"rollout.prompts={prompts}",
    f"sft.batch_size={prompts}",
    f"sft.examples={max(prompts, 16384)}",
    f"reward.batch_size={prompts}",
    *SETTING.value,
  )[0]


def main(argv):
  del argv
  rows, first = [], parse_topology(TOPOLOGIES.value[0]).count
  print(
    f"{'topology':12} {'chips':>5} {'prompts':>7} {'mesh':>14} {'rollout':>9} {'learn':>9} "
    f"{'in all':>9}  "
    "GiB sent per chip and step"
  )
  for name in TOPOLOGIES.value:
    topology = parse_topology(name)
    prompts = PROMPTS.value * topology.count // first
    found = plan(topology, prompts)
    sent = {program: sum(kinds.values()) for program, kinds in found["collectives"].items()}
    rows.append(
      {"topology": name, "chips": topology.count, "prompts": prompts, "sent": found["collectives"]}
    )
    mesh = "x".join(map(str, found["mesh"]))
    line = f"{name:12} {topology.count:5} {prompts:7} {mesh:>14} "
    print(
      line + f"{sent['rollout'] / GIB:9.1f} {sent['learn'] / GIB:9.1f} "
      f"{sum(sent.values()) / GIB:9.1f}",
      flush=True,
    )
  print(json.dumps(rows))


if __name__ == "__main__":
  app.run(main)
