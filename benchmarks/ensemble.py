"""The cost of an ensemble of score heads: the time of a whole RL step with M heads, divided by the
time with one.

  python -m benchmarks.ensemble [--heads=5] [--steps=15]

The heads share one backbone pass, so only phi grows: Dr x M elements instead of Dr x 1. The
predicted share of the step's FLOPs is far below a thousandth; the target is 1.2. Settings take
turns, so that a slow period of the machine affects both.
"""

import json
import statistics
import time

import jax
from absl import app, flags

from r2m_jax.configs import quickstart
from r2m_jax.goldtask import task as goldtask
from r2m_jax.parallel import sharding
from r2m_jax.run import build
from r2m_jax.step import make_step

HEADS = flags.DEFINE_integer("heads", 5, "Heads of the ensemble")
STEPS = flags.DEFINE_integer("steps", 15, "Timed steps of each setting")


def stepper(heads: int):
  """() -> seconds of one step of the quickstart with `heads` heads, combined by mean minus
  variance.
  """
  config = quickstart.get_config()
  config.variant, config.reward.ensemble = "r2m", heads
  config.reward.combine = "mean_minus_variance" if heads > 1 else "mean"
  mesh = sharding.make_mesh((1, 1, 1))
  built = build.build(config, mesh, vocab_size=goldtask.VOCAB_SIZE)
  policy = build.init_policy(config, built, jax.random.key(0))
  reward = build.init_reward_model(config, built, policy, jax.random.key(1))
  state = build.initial_state(config, built, policy, reward["backbone"], reward["phi"])
  step = make_step(
    built.defs, config, mesh, (goldtask.EOS,), goldtask.PAD, sharding.shardings(state, mesh)
  )
  count = 0

  def once() -> float:
    nonlocal state, count
    prompts = goldtask.prompts(0, 1, count, config.rollout.prompts)
    count += 1
    start = time.perf_counter()
    state, out = step(state, prompts)
    jax.block_until_ready((state, out))
    return time.perf_counter() - start

  return once


def main(_):
  settings = {1: stepper(1), HEADS.value: stepper(HEADS.value)}
  for once in settings.values():
    once()
    once()
  times = {heads: [] for heads in settings}
  for _ in range(STEPS.value):
    for heads, once in settings.items():
      times[heads].append(once())
  print(f"{'heads':>5}  {'ms/step':>8}  {'fastest':>8}  {'slowest':>8}")
  for heads, found in times.items():
    print(
      f"{heads:>5}  {1e3 * statistics.median(found):8.1f}  {1e3 * min(found):8.1f}  "
      f"{1e3 * max(found):8.1f}"
    )
  ratio = statistics.median(times[HEADS.value]) / statistics.median(times[1])
  print(f"{HEADS.value} heads cost {ratio:.3f} times one head's step (bound 1.2)")
  print(
    json.dumps(
      {
        "benchmark": "ensemble",
        "heads": HEADS.value,
        "ratio": round(ratio, 4),
        "steps": STEPS.value,
      }
    )
  )


if __name__ == "__main__":
  app.run(main)
