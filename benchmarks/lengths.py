"""The cost of padding: a whole step on responses of all lengths, packed and padded, in turn.

  python -m benchmarks.lengths --size=tiny|small|0.5b|3b [--steps=5] [--share=0.4] [--full] [--peer=trl --peer=tunix]

The work is that of `workload`, but some tokens end a row. Their number is chosen so that the mean
length of the random policy's responses is `share` of the limit (a geometric length, truncated at
the limit). `packed` has the config.packing and config.rollout.halvings of PACKED, `padded` has
neither; their tokens are the same. With --full no row ends before its last token, which shows the
cost of packing if there is nothing to pack. Programs are compiled first; that time counts only
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
ONLY = flags.DEFINE_multi_enum(
  "only", ["padded", "packed"], ["padded", "packed"], "Which of ours; one if memory holds one state"
)
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


def show_peers(ends: int, ours: str, seconds: float) -> None:
  """Runs the peers and prints a line of each. seconds: of `ours`, our step."""
  print(f"{'':8}  {peer_figures.HEADER}")
  for name in PEERS.value:
    found = run_peer(name, ends)
    run = peer_figures.Run.of([found])
    print(f"{name:8}  {run}")
    print(
      f"{name} {found['version']} takes {run.median / seconds:.2f} times as long as {ours}; "
      f"responses of {np.mean(found['lengths']) / peer_task.RESPONSE:.0%} of the limit; "
      f"{found['dropped']} steps dropped; {'' if run.quiet else 'NOT '}quiet",
      flush=True,
    )


def show_lengths(works: dict[str, workload.Work]) -> None:
  """Prints the mean length of the last step's responses, and the share of decoded places that is
  real. The responses of all works are alike.
  """
  last = list(works.values())[-1]
  lengths = jax.device_get(last.output.sequences.response_mask).sum(-1)
  limit = last.sizes.response_length
  shares = [
    f"{name} {lengths.sum() / decoded_places(lengths, limit, work.config.rollout.halvings):.0%}"
    for name, work in works.items()
  ]
  print(
    f"responses of {lengths.mean() / limit:.0%} of the limit on average; decoded places that are "
    f"real: {', '.join(shares)}"
  )


def main(_):
  machine.set_up()
  settings = {"padded": (), "packed": PACKED}
  works = {name: work_of(settings[name]) for name in ONLY.value}
  for name, work in works.items():
    print(f"{name:8}  {compiled(work)}", flush=True)
    work.step()
  first = [jax.device_get(work.output.sequences.tokens) for work in works.values()]
  same = np.mean(first[0] == first[-1])
  limits = machine.limits()
  times = machine.take_turns({name: work.step for name, work in works.items()}, STEPS.value)

  print(machine.show_limits(limits))
  show_lengths(works)
  print(f"{'':8}  {machine.HEADER}")
  for name, found in times.items():
    print(f"{name:8}  {found}")
  if len(works) > 1:
    ratio = times["padded"].median / times["packed"].median
    print(f"packed is {ratio:.2f} times as fast; tokens of the first step alike: {same:.1%}")
  if PEERS.value:
    name, work = list(works.items())[-1]
    show_peers(0 if FULL.value else len(work.eos_ids), name, times[name].median)


if __name__ == "__main__":
  app.run(main)
