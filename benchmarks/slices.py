"""The table of README: the smallest slice of each generation of TPU on which each of the paper's runs fits.

  python -m benchmarks.slices [--generations=v5e,v5p,v6e] [--nocompile]

Each is task=plan with plan.topology=auto, at full size: about ten compilations of a few minutes each, kept as they
come, so that an interrupted table goes on; with --nocompile they are counted, in seconds. Prints Markdown; what the
plans print goes to standard error.
"""

import json
import pathlib
import subprocess
import sys
import tempfile

from absl import app, flags

from r2m_jax.plan.chips import GIB, parse_topology

ROOT = pathlib.Path(__file__).parents[1]
CONFIGS = ("ultrafeedback_qwen2_5_3b", "ultrafeedback_llama3_8b", "tldr_pythia_2_8b")
COMPILE = flags.DEFINE_bool("compile", True, "Ask the compiler; else the count alone")
GENERATIONS = flags.DEFINE_list("generations", ["v4", "v5e", "v5p", "v6e"], "Which TPUs")


def plans(config: str, generation: str) -> list[dict]:
  with tempfile.TemporaryDirectory() as workdir:
    command = [sys.executable, "-m", "r2m_jax.main", f"--config=configs/{config}.py", f"--workdir={workdir}",
               "--config.task=plan", "--config.plan.topology=auto", f"--config.plan.compile={COMPILE.value}",
               f"--config.plan.generations=('{generation}',)"]  # fmt: skip
    done = subprocess.run(command, cwd=ROOT, stdout=sys.stderr, check=False)
    found = pathlib.Path(workdir) / "plan.json"
    if not found.exists():
      sys.exit(f"{config} on {generation}: the plan failed with status {done.returncode}")
    return json.loads(found.read_text(encoding="utf-8"))


def cell(found: list[dict]) -> str:
  """The slice that fits, GiB per chip of what there are, and the least seconds of a step."""
  for plan in found:
    if plan["fits"]:
      peak = max(sum(kinds.values()) for kinds in plan["memory"].values())
      limit, seconds = parse_topology(plan["topology"]).chip.memory, sum(plan["seconds"].values())
      return f"{plan['topology'].split(':')[1]}: {peak / GIB:.1f} of {limit / GIB:.1f} ({seconds:.0f} s)"
  return "none"


def main(argv):
  del argv
  print(f"| config | {' | '.join(GENERATIONS.value)} |\n|---|{'---|' * len(GENERATIONS.value)}")
  for config in CONFIGS:
    cells = [cell(plans(config, generation)) for generation in GENERATIONS.value]
    print(f"| `{config}` | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
  app.run(main)
