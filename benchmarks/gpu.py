"""One GPU in one session: learning, decoding and the cost of R2M, each relative to the card's
limits.

  python -m benchmarks.gpu --size=0.5b [--steps=5] [--r2m_steps=5] [--setting=FIELD=VALUE,...]

The work is workload.py's for a GPU: bfloat16, 32 prompts x 8, 512 new tokens. The figures are those
of step.py, decode.py and r2m_overhead.py, from five programs in one process, because time on such a
card is expensive. R2M's step runs after plain RLOO's state is freed, so that each peak belongs to
one of them. --steps=0 and --r2m_steps=0 each skip one half.
"""

import os

os.environ.setdefault(
  "XLA_PYTHON_CLIENT_MEM_FRACTION", "0.94"
)  # of the card, on which nothing else runs

import time

import jax
from absl import app, flags

from benchmarks import machine, workload

STEPS = flags.DEFINE_integer("steps", 5, "Timed calls of rollout and learn", 0)
R2M_STEPS = flags.DEFINE_integer("r2m_steps", 5, "Timed steps of each variant", 0)


def timed(what: str, once, steps: int) -> machine.Times:
  """Times `steps` calls after the one that compiles."""
  before = time.perf_counter()
  once()
  compiled = time.perf_counter()
  found = machine.take_turns({what: once}, steps, quiet=1.0)[what]
  print(f"{what:16}  {found}  first call {compiled - before:5.1f} s", flush=True)
  return found


def phases(work: workload.Work, settings: list[str], limits: dict[str, float]) -> dict:
  """Rollout and learn as separate programs, as shares of the card's limits."""
  sizes = work.sizes
  dtype = work.config.dtype
  tokens = work.sizes.response_length - 1
  rollout = timed("rollout", work.rollout, STEPS.value)
  of_one = [*settings, "rollout.max_new_tokens=1"]
  program = work.rollout_program(workload.get_config(workload.SIZE.value, settings=of_one))
  first = timed(
    "one token", lambda: jax.block_until_ready(program(work.state, work.prompts())), STEPS.value
  )
  learn = timed("learn", work.learn, STEPS.value)
  needed = workload.by_program(workload.counts(work.config, sizes, "gpu")[0])["learn"]
  decode, least = rollout.median - first.median, workload.decode_limits(sizes, dtype, limits)
  bound_by = max(least, key=least.get)
  found = {
    "rollout": rollout.seconds,
    "first": first.seconds,
    "learn": learn.seconds,
    "learn_flops": needed,
    "learn_share": needed / learn.median / limits[dtype],
    "decode": decode,
    "decode_share": least[bound_by] / decode,
    "decode_bound_by": bound_by,
  }
  print(
    f"learning: {needed / 1e12:.0f} TFLOP, {found['learn_share']:.1%} of the {dtype} matrix rate"
  )
  print(
    f"decoding: {1e3 * decode / tokens:.2f} ms for a token of {sizes.rows} rows, "
    f"{sizes.rows * tokens / decode:,.0f} tokens/s, {found['decode_share']:.1%} of its limit by "
    f"{bound_by}",
    flush=True,
  )
  return found


def main(_):
  machine.set_up()
  size, settings = workload.SIZE.value, workload.SETTING.value
  limits = machine.limits()
  asked = workload.BOUNDS[size]
  bounds = []
  print(jax.devices()[0].device_kind, machine.show_limits(limits), sep="; ", flush=True)
  print(f"{'':16}  {machine.HEADER}")
  result = {
    "benchmark": "gpu",
    "size": size,
    "device": jax.devices()[0].device_kind,
    "limits": limits,
  }
  work = workload.of_size(size, settings=settings)
  if STEPS.value:
    result |= phases(work, settings, limits)
    bounds += [
      (
        f"{name} runs at {result[f'{key}_share']:.1%} of its limit, target {asked[key]:.0%}",
        result[f"{key}_share"] >= asked[key],
      )
      for name, key in (("learning", "learn"), ("decoding", "decode"))
    ]
  if R2M_STEPS.value:
    plain, peak = timed("step", work.step, R2M_STEPS.value), machine.peak_memory()
    del work
    jax.clear_caches()
    r2m = timed("step of R2M", workload.of_size(size, "r2m", settings).step, R2M_STEPS.value)
    more, memory = r2m.median / plain.median - 1, machine.peak_memory() / peak - 1
    print(
      f"R2M over plain RLOO: time {more:+.1%}, peak memory {memory:+.1%} of {peak / 2**30:.1f} GiB"
    )
    result |= {"step": plain.seconds, "r2m_step": r2m.seconds, "peak": peak, "r2m_memory": memory}
    bounds += [
      (f"R2M takes {value:+.1%} {what}, target at most {asked['r2m']:.0%}", value <= asked["r2m"])
      for what, value in (("step time", more), ("memory", memory))
    ]
  machine.conclude(result, bounds)


if __name__ == "__main__":
  app.run(main)
