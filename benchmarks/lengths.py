"""The cost of padding: a whole step on responses of all lengths, packed and padded, in turn.

  python -m benchmarks.lengths --size=tiny|small [--steps=5] [--share=0.4] [--full] [--peer=trl --peer=tunix]

The work is that of `workload`, but some tokens end a row. Their number is chosen so that the mean
length of the random policy's responses is `share` of the limit (a geometric length, truncated at
the limit). `packed` has the config.packing and config.rollout.halvings of PACKED, `padded` has
neither; their tokens are the same. With --full no row ends before its last token, which shows the
cost of packing if there is nothing to pack. A step's program is compiled first; its time counts only
with an empty cache (JAX_ENABLE_COMPILATION_CACHE=false).

With --peer, TRL and tunix do the same work afterwards, each in an environment of its own. As many
tokens end a row, so the lengths of their responses have the same distribution; the mean of each is
printed. TRL has no packing in RL. tunix packs the rows of its updates into lines of --line tokens,
with an update for each line.
"""

import math
import pathlib
import time

import jax
import numpy as np
from absl import app, flags

from benchmarks import machine, peer_figures, peer_process, peer_task, workload
from r2m_jax.models.generate import decoded_places

STEPS = flags.DEFINE_integer("steps", 5, "Timed steps, not disturbed by other processes")
SHARE = flags.DEFINE_float("share", 0.4, "Mean length of a response, as a share of the limit")
FULL = flags.DEFINE_bool("full", False, "All responses have the length of the limit")
PEERS = flags.DEFINE_multi_enum("peer", [], list(peer_figures.PEERS), "Peers to run as well")
LINE = flags.DEFINE_integer("line", 1024, "Tokens of a packed line of tunix; 0: it packs nothing")
ENVIRONMENTS = flags.DEFINE_string(
  "environments", peer_process.FOLDER, "Where the peers' are, or are made"
)
MOST = 3  # times as many steps a peer takes at most, to find quiet ones
PACKED = ("packing=[0.5,0.7,1.0]", "rollout.halvings=3")


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


def compiled(work: workload.Work) -> str:
  """Compiles the step, and returns a line with the time and the memory that it takes."""
  began = time.perf_counter()
  lowered = work.programs["step"].lower(work.state, work.prompts())
  traced = time.perf_counter()
  step = work.programs["step"] = lowered.compile()
  took = time.perf_counter() - traced
  memory = step.memory_analysis().temp_size_in_bytes
  return (
    f"traced in {traced - began:.1f} s, compiled in {took:.1f} s; {memory / 1e9:.3f} GB of "
    "temporaries"
  )


def run_peer(name: str, ends: int) -> dict:
  """What a peer measured on rows that so many tokens end."""
  python = peer_process.environment(name, pathlib.Path(ENVIRONMENTS.value).expanduser())
  line = (LINE.value,) if name == "tunix" else ()
  return peer_process.run(name, python, workload.SIZE.value, STEPS.value, MOST, ends, *line)


def show_peers(ends: int, packed: float) -> None:
  """Runs the peers and prints a line of each. packed: seconds of our packed step."""
  print(f"{'':8}  {peer_figures.HEADER}")
  for name in PEERS.value:
    found = run_peer(name, ends)
    run = peer_figures.Run.of([found])
    print(f"{name:8}  {run}")
    print(
      f"{name} {found['version']} takes {run.median / packed:.2f} times as long as packed; "
      f"responses of {np.mean(found['lengths']) / peer_task.RESPONSE:.0%} of the limit; "
      f"{found['dropped']} steps dropped; {'' if run.quiet else 'NOT '}quiet",
      flush=True,
    )


def main(_):
  machine.set_up()
  works = {"padded": work_of(()), "packed": work_of(PACKED)}
  for name, work in works.items():
    print(f"{name:8}  {compiled(work)}", flush=True)
    work.step()
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
  if PEERS.value:
    show_peers(0 if FULL.value else len(works["packed"].eos_ids), times["packed"].median)


if __name__ == "__main__":
  app.run(main)
