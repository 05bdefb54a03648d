"""The cost of R2M compared with plain RLOO: time and peak memory of a whole step, and the counts
that explain it.

  python -m benchmarks.r2m_overhead --size=small [--steps=5] [--setting=FIELD=VALUE,...]

The two steps take turns in one process, so that a slow period of the machine affects both; each
round gives a ratio. Each peak is the median of three separate processes, in turn, which run only
two steps, because resident memory differs by a few percent between two runs of one program.
"""

import statistics

import jax
from absl import app, flags

from benchmarks import machine, workload

STEPS = flags.DEFINE_integer("steps", 5, "Timed steps of each, not disturbed by other processes")
VARIANTS = ("vanilla", "r2m")
PROCESSES = 3  # processes whose peaks are measured, for each


def main(_):
  machine.set_up()
  size, settings = workload.SIZE.value, workload.SETTING.value
  given = (f"--size={size}", f"--setting={','.join(settings)}", "--steps=0")

  def child(name):
    return machine.child("benchmarks.step", f"--variant={name}", *given)["peak"]

  found = [[child(name) for name in VARIANTS] for _ in range(PROCESSES)]
  peaks = {
    name: statistics.median(column) for name, column in zip(VARIANTS, zip(*found), strict=True)
  }
  works = {name: workload.of_size(size, name, settings) for name in VARIANTS}
  for work in works.values():
    work.step()
    work.step()
  times = machine.take_turns({name: work.step for name, work in works.items()}, STEPS.value)
  platform, needs = jax.devices()[0].platform, {}

  print(f"{'':8}  {machine.HEADER}  {'peak GB':>8}  {'GFLOP':>9}  {'GB moved':>9}")
  for name, work in works.items():
    flops, moved = needs[name] = [
      sum(x.values()) for x in workload.counts(work.config, work.sizes, platform)
    ]
    print(
      f"{name:8}  {times[name]}  {peaks[name] / 1e9:8.3f}  {flops / 1e9:9.2f}  {moved / 1e9:9.2f}"
    )
  plain, r2m = times.values()
  ratios = [b / a for a, b in zip(plain.seconds, r2m.seconds, strict=True)]
  flops, moved = (b / a for a, b in zip(*needs.values(), strict=True))
  time, memory = statistics.median(ratios) - 1, peaks["r2m"] / peaks["vanilla"] - 1
  print(
    f"R2M over plain RLOO: time {time:+.1%} ({min(ratios) - 1:+.1%} to {max(ratios) - 1:+.1%}), "
    f"memory {memory:+.1%}; counted FLOPs {flops - 1:+.2%}, bytes {moved - 1:+.2%}"
  )
  result = {
    "benchmark": "r2m_overhead",
    "size": size,
    "ratios": ratios,
    "peaks": peaks,
    "found": found,
    "flops": flops,
    "moved": moved,
  }
  bound = workload.BOUNDS.get(size, {}).get("r2m")
  machine.conclude(
    result,
    [
      (f"R2M takes {more:+.1%} {of}, target at most {bound:.0%}", more <= bound)
      for of, more in (("step time", time), ("memory", memory))
    ]
    if bound
    else [],
    plain.quiet,
  )


if __name__ == "__main__":
  app.run(main)
