"""Weak scaling on paper: what one chip sends in a step as the slice and the batch grow alike, from compiled programs.

  python -m benchmarks.scaling --config=configs/ultrafeedback_qwen2_5_3b.py [--topologies=v5e:4x4,...] [--tensor=2]

Each line is a plan (task=plan) of its own, at full size, with prompts in proportion to the chips; nothing runs. Plans
are kept, so an interrupted table goes on.
"""

import json
import pathlib
import subprocess
import sys
import tempfile

from absl import app, flags

from r2m_jax.plan.chips import GIB, parse_topology

ROOT = pathlib.Path(__file__).parents[1]
CONFIG = flags.DEFINE_string("config", "configs/ultrafeedback_qwen2_5_3b.py", "What is scaled")
SLICES = ["v5e:4x4", "v5e:4x8", "v5e:8x8", "v5e:8x16", "v5e:16x16"]
TOPOLOGIES = flags.DEFINE_list("topologies", SLICES, "Smallest first")
TENSOR = flags.DEFINE_integer("tensor", 2, "Chips along tensor; the others lie along fsdp")
PROMPTS = flags.DEFINE_integer("prompts", 64, "Prompts of a step on the first topology")
SETTING = flags.DEFINE_list("setting", [], "Further --config.FIELD=VALUE of every plan, with commas")


def plan(topology, prompts: int) -> dict:
  """plan.json of one topology; it need not fit."""
  mesh = (1, topology.count // TENSOR.value, TENSOR.value)
  with tempfile.TemporaryDirectory() as workdir:
    command = [sys.executable, "-m", "r2m_jax.main", f"--config={CONFIG.value}", f"--workdir={workdir}",
               "--config.task=plan", f"--config.plan.topology={topology.name}", "--config.plan.compare=",
               f"--config.mesh={mesh}", f"--config.rollout.prompts={prompts}", f"--config.sft.batch_size={prompts}",
               f"--config.sft.examples={max(prompts, 16384)}", f"--config.reward.batch_size={prompts}",
               *(f"--config.{setting}" for setting in SETTING.value)]  # fmt: skip
    done = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, text=True, check=False)
    found = pathlib.Path(workdir) / "plan.json"
    if not found.exists():
      sys.exit(f"{topology.name}: the plan failed with status {done.returncode}")
    return json.loads(found.read_text(encoding="utf-8"))[0]


def main(argv):
  del argv
  rows, first = [], parse_topology(TOPOLOGIES.value[0]).count
  print(f"{'topology':12} {'chips':>5} {'prompts':>7} {'mesh':>14} {'rollout':>9} {'learn':>9} {'in all':>9}  "
        "GiB sent per chip and step")  # fmt: skip
  for name in TOPOLOGIES.value:
    topology = parse_topology(name)
    prompts = PROMPTS.value * topology.count // first
    found = plan(topology, prompts)
    sent = {program: sum(kinds.values()) for program, kinds in found["collectives"].items()}
    rows.append({"topology": name, "chips": topology.count, "prompts": prompts, "sent": found["collectives"]})
    mesh = "x".join(map(str, found["mesh"]))
    line = f"{name:12} {topology.count:5} {prompts:7} {mesh:>14} "
    print(line + f"{sent['rollout'] / GIB:9.1f} {sent['learn'] / GIB:9.1f} "
          f"{sum(sent.values()) / GIB:9.1f}", flush=True)  # fmt: skip
  print(json.dumps(rows))


if __name__ == "__main__":
  app.run(main)
