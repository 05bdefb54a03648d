"""The cost of saving: the time of a quickstart RL step without a save, with a save in the
background, and with a save that it waits for.

  python -m benchmarks.checkpoint_cost [--steps=5] [--blocks=5]

Every step saves, which is far more often than a run does (config.log.checkpoint_every is 40). The
whole state, including frozen models, is written and hashed, and all but the last two checkpoints
are deleted. Settings take turns, one block of steps each; a block ends when its last checkpoint is
on disk.
"""

import json
import pathlib
import statistics
import tempfile
import time

import jax
from absl import app, flags, logging

from r2m_jax.algorithm.variants import arm_of
from r2m_jax.configs import quickstart
from r2m_jax.goldtask import task as goldtask
from r2m_jax.goldtask.rl import make_gold_step, rl_prompts
from r2m_jax.parallel import sharding
from r2m_jax.run import build, checkpoint

STEPS = flags.DEFINE_integer("steps", 5, "Steps of a block")
BLOCKS = flags.DEFINE_integer("blocks", 5, "Timed blocks of each setting")
SETTINGS = ("nothing", "background", "waits")


def main(argv):
  del argv
  logging.set_verbosity(logging.ERROR)
  config = quickstart.get_config()
  config.variant = "r2m"
  mesh = sharding.make_mesh((1, 1, 1))
  built = build.build(config, mesh, vocab_size=goldtask.VOCAB_SIZE)
  policy = build.init_policy(config, built, jax.random.key(0))
  reward = build.init_reward_model(config, built, policy, jax.random.key(1))
  state = build.initial_state(config, built, policy, reward["backbone"], reward["phi"])
  step = make_gold_step(config, built, sharding.shardings(state, mesh))
  size = sum(
    x.nbytes
    for x in jax.tree.leaves(state)
    if not jax.dtypes.issubdtype(x.dtype, jax.dtypes.prng_key)
  )

  seconds, number = {name: [] for name in SETTINGS}, 0
  with tempfile.TemporaryDirectory() as folder:
    kept = {
      name: checkpoint.Checkpoints(
        pathlib.Path(folder) / name, last=2, background=name == "background"
      )
      for name in SETTINGS[1:]
    }
    for block in range(1 + BLOCKS.value):  # the first one warms up
      for name in SETTINGS:
        began = time.perf_counter()
        for _ in range(STEPS.value):
          state, out = step(state, rl_prompts(config, number), arm_of(config.variant))
          jax.device_get(out)  # like a run, which logs every step
          number += 1
          if name in kept:
            checkpoint.save(kept[name], number, state)
        if name in kept:
          checkpoint.wait(kept[name])
        if block:
          seconds[name].append((time.perf_counter() - began) / STEPS.value)

  base = statistics.median(seconds["nothing"])
  arrays = len(jax.tree.leaves(state))
  print(
    f"state {size / 2**20:.1f} MiB in {arrays} arrays; {BLOCKS.value} x {STEPS.value} steps each"
  )
  for name in SETTINGS:
    value = statistics.median(seconds[name])
    print(f"{name:10} {1e3 * value:7.1f} ms a step   {100 * (value / base - 1):+6.1f} %")
  print(
    json.dumps(
      {"state_bytes": size} | {name: round(statistics.median(x), 4) for name, x in seconds.items()}
    )
  )


if __name__ == "__main__":
  app.run(main)
