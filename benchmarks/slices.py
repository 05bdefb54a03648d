"""README's table: the smallest slice of each TPU generation on which each of the paper's runs fits.

  python -m benchmarks.slices [--generations=v5e,v5p,v6e] [--nocompile] [--policies=qwen3-4b,olmo3-7b]

With --policies it is the table of docs/plan.md: the first of the runs, with other policies. Each
cell is task=plan with plan.topology=auto, at full size: about ten compilations of a few minutes
each. They are cached, so that an interrupted table resumes. With --nocompile they are counted, in
seconds. Prints Markdown; the output of the plans goes to standard error.
"""

from absl import app, flags

from benchmarks import machine
from r2m_jax.parallel.chips import GIB, parse_topology

CONFIGS = ("ultrafeedback_qwen2_5_3b", "ultrafeedback_llama3_8b", "tldr_pythia_2_8b")
COMPILE = flags.DEFINE_bool("compile", True, "Compile; otherwise only count")
GENERATIONS = flags.DEFINE_list("generations", ["v4", "v5e", "v5p", "v6e"], "Which TPUs")
POLICIES = flags.DEFINE_list(
  "policies", [], "Shapes of plan/sizes.py instead of the first config's policy; empty: the configs"
)


def cell(found: list[dict]) -> str:
  """The slice that fits, the GiB per chip of those available, and the least seconds of a step."""
  for plan in found:
    if plan["fits"]:
      peak = max(sum(kinds.values()) for kinds in plan["memory"].values())
      limit, seconds = parse_topology(plan["topology"]).chip.memory, sum(plan["seconds"].values())
      return (
        f"{plan['topology'].split(':')[1]}: {peak / GIB:.1f} of {limit / GIB:.1f} ({seconds:.0f} s)"
      )
  return "none"


def main(argv):
  del argv
  print(f"| config | {' | '.join(GENERATIONS.value)} |\n|---|{'---|' * len(GENERATIONS.value)}")
  runs = [(config, config, ()) for config in CONFIGS]
  if POLICIES.value:
    runs = [(name, CONFIGS[0], (f"plan.policy={name}",)) for name in POLICIES.value]
  for title, config, changes in runs:
    file = f"configs/{config}.py"
    settings = ("plan.topology=auto", f"plan.compile={COMPILE.value}", *changes)
    cells = [
      cell(machine.plans(file, *settings, f"plan.generations=('{name}',)"))
      for name in GENERATIONS.value
    ]
    print(f"| `{title}` | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
  app.run(main)
