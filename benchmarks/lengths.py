"""The cost of padding: a whole step on responses of all lengths, packed and padded, in turn.

  python -m benchmarks.lengths --size=tiny|small [--steps=5] [--share=0.4] [--full]

The work is that of `workload`, but some tokens end a row. Their number is chosen so that the mean
length of the random policy's responses is `share` of the limit (a geometric length, truncated at
the limit). `packed` has the config.packing and config.rollout.halvings of PACKED, `padded` has
neither; their tokens are the same. With --full no row ends before its last token, which shows the
cost of packing if there is nothing to pack.
"""

import math

import jax
import numpy as np
from absl import app, flags

from benchmarks import machine, workload
from r2m_jax.models.generate import decoded_places

STEPS = flags.DEFINE_integer("steps", 5, "Timed steps, not disturbed by other processes")
SHARE = flags.DEFINE_float("share", 0.4, "Mean length of a response, as a share of the limit")
FULL = flags.DEFINE_bool("full", False, "All responses have the length of the limit")
PACKED = ("packing=[0.35,0.5,0.7,1.0]", "rollout.halvings=3")


def ending(share: float, limit: int, vocabulary: int) -> tuple[int, ...]:
  """The number of end tokens for which rows of uniformly random tokens have a mean length of
  `share` of the limit.
  """

  def mean(chance):
    return (1 - (1 - chance) ** limit) / chance / limit

  low, high = 1e-6, 1.0
  for _ in range(100):
    middle = math.sqrt(low * high)
    low, high = (middle, high) if mean(middle) > share else (low, middle)
  return tuple(range(max(1, round(low * vocabulary))))


def work_of(settings) -> workload.Work:
  size = workload.SIZE.value
  config = workload.get_config(size, "vanilla", [*settings, *workload.SETTING.value])
  sizes = workload.sizes_of(config, workload.POLICIES[size], workload.REWARDS[size])
  eos_ids = None
  if not FULL.value:
    eos_ids = ending(SHARE.value, sizes.response_length, sizes.arch.vocab_size)
  return workload.Work(config, sizes, eos_ids=eos_ids)


def main(_):
  machine.set_up()
  works = {"padded": work_of(()), "packed": work_of(PACKED)}
  for work in works.values():
    work.step()  # compiles
  first = {name: jax.device_get(work.output.sequences.tokens) for name, work in works.items()}
  same = np.mean(first["padded"] == first["packed"])
  limits = machine.limits()
  times = machine.take_turns({name: work.step for name, work in works.items()}, STEPS.value)

  lengths = jax.device_get(works["packed"].output.sequences.response_mask).sum(-1)
  sizes = works["packed"].sizes
  halvings = works["packed"].config.rollout.halvings
  places = decoded_places(lengths, sizes.response_length, halvings)
  print(machine.show_limits(limits))
  print(
    f"responses of {lengths.mean() / sizes.response_length:.0%} of the limit on average; tokens of "
    f"the first step alike: {same:.1%}; decoded places that are real: {lengths.sum() / places:.0%}, "
    f"padded {lengths.sum() / decoded_places(lengths, sizes.response_length, 0):.0%}"
  )
  print(f"{'':8}  {machine.HEADER}")
  for name, found in times.items():
    print(f"{name:8}  {found}")
  print(f"packed is {times['padded'].median / times['packed'].median:.2f} times as fast")


if __name__ == "__main__":
  app.run(main)
