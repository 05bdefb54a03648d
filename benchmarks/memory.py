"""Is a plan's memory right? Compares the peak resident memory of a real step on this host's CPU
with task=plan.

  python -m benchmarks.memory [--setting=FIELD=VALUE,...]

The step runs in a separate process, from random weights: both programs are compiled, the state is
created, the peak is reset, and rollout and learn run once. The measured value is the peak minus the
resident memory just before the step. The predicted value is the plan for cpu:1, minus the state and
the arguments that are already resident. The two are independent: one is the kernel's count of
pages, the other the compiler's assignment of buffers.
"""

import json
import sys

import jax
from absl import app, flags

from benchmarks import machine, workload
from r2m_jax.configs import default
from r2m_jax.plan.sizes import sizes_of

CHILD = flags.DEFINE_bool("child", False, "Run the step in this process")


def get_config():
  """A step whose temporaries are above 2 GB."""
  config = default.get_config()
  arch = config.policy.arch
  arch.hidden_size = 256
  arch.num_layers = 4
  arch.num_heads = 8
  arch.num_kv_heads = 8
  arch.intermediate_size = 1024
  config.rollout.prompts = 16
  config.rollout.group_size = 8
  config.rollout.max_new_tokens = 64
  config.plan.prompt_length = 240
  config.remat = "none"  # keeps most in memory
  config.plan.compare = ""
  config.plan.topology = "cpu:1"
  config.r2m.attention_dim = 256
  config.log.checkpoint_every = 1
  return config


def measure(config) -> dict[str, int]:
  """Runs one step: {"before", "peak"}, resident bytes."""
  sizes = sizes_of(config)
  work = workload.Work(config, sizes)
  prompts, rollout = work.prompts(), work.programs["rollout"]
  work.programs["rollout"] = rollout = rollout.lower(work.state, prompts).compile()
  like = jax.tree.map(
    lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=work.built.rows), rollout.out_info
  )
  learn = work.programs["learn"].lower(work.state, like, like.tokens, like.token_mask)
  work.programs["learn"] = learn.compile()
  machine.reset_peak()
  before = machine.status("VmRSS")
  work.rollout()
  work.learn()
  return {"before": before, "peak": machine.status("VmHWM")}


def predicted(plan: dict) -> float:
  """Bytes of the plan in addition to the state: temporaries, caches, feedback, results."""
  rest = ("KV cache", "feedback", "temporaries")
  return max(sum(kinds.get(kind, 0) for kind in rest) for kinds in plan["memory"].values())


def main(argv):
  del argv
  settings = workload.SETTING.value
  if CHILD.value:
    config = get_config()
    workload.change(config, settings)
    print(json.dumps(measure(config)))
    return
  found = machine.child("benchmarks.memory", "--child", f"--setting={','.join(settings)}")
  measured = found["peak"] - found["before"]
  plan = machine.plans("benchmarks/memory.py", *settings)[0]
  if not plan["fits"]:
    sys.exit("by the plan it does not fit this host")
  expected = predicted(plan)
  print(
    f"resident before the step {found['before'] / 1e9:.2f} GB, peak {found['peak'] / 1e9:.2f} GB"
  )
  print(
    f"step: measured {measured / 1e9:.2f} GB, predicted {expected / 1e9:.2f} GB, "
    f"{100 * (expected / measured - 1):+.1f}%"
  )
  print(json.dumps({"measured": measured, "predicted": expected, "before": found["before"]}))


if __name__ == "__main__":
  app.run(main)
