"""Does the plan's memory hold? A real step on this host's CPU: peak resident memory against what task=plan says.

  python -m benchmarks.memory [--config=benchmarks/memory.py:rows=128,layers=4] ...

The step runs in a process of its own, from random weights: both programs are compiled, the state is made, the peak is
reset, then rollout and learn run once. Measured is the peak minus what was resident just before the step. Predicted is
the plan for cpu:1, minus the state and the arguments that are resident by then. The two come from different places: the
kernel's count of pages, and the compiler's assignment of buffers.
"""

import json
import pathlib
import subprocess
import sys
import tempfile

from absl import app, flags

from benchmarks import machine

ROOT = pathlib.Path(__file__).parents[1]
SETTING = flags.DEFINE_list("setting", [], "--config.FIELD=VALUE of both sides, with commas")
CHILD = flags.DEFINE_bool("child", False, "Run the step in this process")


def get_config():
  """A step whose temporaries are above 2 GB."""
  from configs import default

  config = default.get_config()
  arch = config.policy.arch
  arch.hidden_size, arch.num_layers, arch.num_heads, arch.num_kv_heads, arch.intermediate_size = 256, 4, 8, 8, 1024
  config.rollout.prompts, config.rollout.group_size, config.rollout.max_new_tokens = 16, 8, 16
  config.plan.prompt_length = 240
  config.plan.compare = ""
  config.plan.topology = "cpu:1"
  config.r2m.attention_dim = 256
  config.log.checkpoint_every = 1
  return config


def measure(config) -> dict[str, int]:
  """Runs one step: {"before", "peak"}, resident bytes."""
  import jax
  import numpy as np

  from r2m_jax import build, sharding
  from r2m_jax.plan.sizes import sizes_of
  from r2m_jax.step import make_learn, make_rollout
  from r2m_jax.types import Prompts

  sizes, mesh = sizes_of(config), sharding.make_mesh((1, 1, 1))
  built = build.build(config, mesh, arch=sizes.arch, reward_arch=sizes.reward_arch)
  policy = build.init_policy(config, built, jax.random.key(1))
  reward = build.init_reward_model(config, built, policy, jax.random.key(2))
  state = build.initial_state(config, built, policy, reward["backbone"], reward["phi"])
  del policy, reward
  layout, vocab = sharding.shardings(state, mesh), sizes.arch.vocab_size
  rollout = jax.jit(make_rollout(built.defs, config, mesh, (vocab - 1,), vocab - 1), out_shardings=built.rows)
  learn = jax.jit(
    make_learn(built.defs, config, mesh), donate_argnums=0, in_shardings=(layout,) + (None,) * 3,
    out_shardings=(layout, None),
  )  # fmt: skip
  shape = (sizes.prompts, sizes.prompt_length)
  tokens = np.random.default_rng(0).integers(0, vocab, shape).astype(np.int32)
  prompts = jax.device_put(Prompts(tokens, np.ones(shape, bool), np.arange(shape[0], dtype=np.int32)), built.rows)
  rollout = rollout.lower(state, prompts).compile()
  like = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=built.rows), rollout.out_info)
  learn = learn.lower(state, like, like.tokens, like.token_mask).compile()
  jax.block_until_ready(state)
  machine.reset_peak()
  before = machine.status("VmRSS")
  sequences = rollout(state, prompts)
  state, output = learn(state, sequences, sequences.tokens, sequences.token_mask)
  jax.block_until_ready((state, output))
  return {"before": before, "peak": machine.status("VmHWM")}


def predicted(plan: dict) -> float:
  """Bytes that the plan has beyond the state: temporaries, caches, feedback, results."""
  rest = ("KV cache", "feedback", "temporaries")
  return max(sum(kinds.get(kind, 0) for kind in rest) for kinds in plan["memory"].values())


def settings() -> list[str]:
  return [f"--config.{setting}" for setting in SETTING.value]


def main(argv):
  del argv
  if CHILD.value:
    config = get_config()
    for setting in SETTING.value:
      field, value = setting.split("=", 1)
      old = config
      for name in field.split("."):
        old = old[name]
      config.update_from_flattened_dict({field: type(old)(json.loads(value)) if not isinstance(old, str) else value})
    print(json.dumps(measure(config)))
    return
  child = [sys.executable, "-m", "benchmarks.memory", "--child", f"--setting={','.join(SETTING.value)}"]
  done = subprocess.run(child, cwd=ROOT, capture_output=True, text=True, check=False)
  if done.returncode:
    sys.exit(done.stderr)
  found = json.loads(done.stdout.splitlines()[-1])
  measured = found["peak"] - found["before"]
  with tempfile.TemporaryDirectory() as workdir:
    command = [sys.executable, "-m", "r2m_jax.main", "--config=benchmarks/memory.py", f"--workdir={workdir}",
               "--config.task=plan", *settings()]  # fmt: skip
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    if done.returncode:
      sys.exit(done.stdout + done.stderr)
    plan = json.loads((pathlib.Path(workdir) / "plan.json").read_text(encoding="utf-8"))[0]
  expected = predicted(plan)
  print(f"resident before the step {found['before'] / 1e9:.2f} GB, peak {found['peak'] / 1e9:.2f} GB")
  print(f"step: measured {measured / 1e9:.2f} GB, predicted {expected / 1e9:.2f} GB, "
        f"{100 * (expected / measured - 1):+.1f}%")  # fmt: skip
  print(json.dumps({"measured": measured, "predicted": expected, "before": found["before"]}))


if __name__ == "__main__":
  app.run(main)
