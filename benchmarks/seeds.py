"""Many seeds in one program against one after another: the laboratory's step at the quickstart's
size.

  python -m benchmarks.seeds [--seeds=10] [--steps=5] [--variant=r2m]

Weights are random, so responses have the maximum length. It compares the laboratory's step, with
its seeds distributed over the devices (on a CPU each core is one), with a run's own program for one
seed, on one device that uses all cores.
"""

import os

import jax
from absl import app, flags

from benchmarks import machine
from r2m_jax.configs import quickstart
from r2m_jax.goldtask import task as goldtask
from r2m_jax.goldtask.rl import rl_prompts
from r2m_jax.lab.grid import first_states, make_together_step, with_seed
from r2m_jax.lab.together import seeds_mesh, stack
from r2m_jax.parallel import sharding
from r2m_jax.run import build
from r2m_jax.step import make_step

SEEDS = flags.DEFINE_integer("seeds", 10, "In one program", 1)
STEPS = flags.DEFINE_integer("steps", 5, "Timed steps of each, not disturbed by other processes", 1)
VARIANT = flags.DEFINE_string("variant", "r2m", "See variants.VARIANTS")


def main(_):
  machine.set_up()
  jax.config.update(
    "jax_num_cpu_devices", os.cpu_count() or 1
  )  # as r2m_jax.main sets it for the laboratory
  config, seeds = quickstart.get_config(), range(SEEDS.value)
  config.variant = VARIANT.value
  built = build.build(
    config, sharding.make_mesh((1, 1, 1), jax.devices()[:1]), vocab_size=goldtask.VOCAB_SIZE
  )
  policies = {seed: build.init_policy(config, built, jax.random.key(seed)) for seed in seeds}
  rewards = {
    seed: build.init_reward_model(config, built, policies[seed], jax.random.key(seed))
    for seed in seeds
  }
  configs, mesh = [with_seed(config, seed) for seed in seeds], seeds_mesh(SEEDS.value)
  together = make_together_step(config, built, mesh, configs)
  states = first_states(
    config, built, mesh, [(seed, 1.0) for seed in seeds], policies, rewards, None
  )
  one = build.initial_state(config, built, policies[0], rewards[0]["backbone"], rewards[0]["phi"])
  layout = sharding.shardings(one, built.mesh)
  alone = make_step(built.defs, config, built.mesh, (goldtask.EOS,), goldtask.PAD, layout)
  number = 0

  def all_at_once():
    nonlocal states, number
    states, out = together(states, stack([rl_prompts(c, number) for c in configs]), number)
    number += 1
    jax.block_until_ready((states, out))

  def one_seed():
    nonlocal one
    one, out = alone(one, rl_prompts(config, number))
    jax.block_until_ready((one, out))

  all_at_once()
  one_seed()
  all_at_once()
  one_seed()
  times = machine.take_turns(
    {f"{SEEDS.value} together": all_at_once, "one alone": one_seed}, STEPS.value
  )
  print(
    f"{len(mesh.devices)} of {len(jax.devices())} devices ({jax.devices()[0].device_kind}) for the "
    "seeds"
  )
  print(f"{'':12}  {machine.HEADER}")
  for name, found in times.items():
    print(f"{name:12}  {found}")
  many, single = (found.median for found in times.values())
  ratio = SEEDS.value * single / many
  print(
    f"a step of a seed: {many / SEEDS.value:.4f} s together, {single:.4f} s by itself; "
    f"{ratio:.2f} times faster"
  )
  asked = 1.0 if jax.devices()[0].platform == "cpu" else 3.0
  result = {
    "benchmark": "seeds",
    "seeds": SEEDS.value,
    "together": many,
    "alone": single,
    "ratio": ratio,
  }
  machine.conclude(
    result,
    [(f"{ratio:.2f} times as fast as one after another, target {asked:.0f}", ratio >= asked)],
    all(found.quiet for found in times.values()),
  )


if __name__ == "__main__":
  app.run(main)
