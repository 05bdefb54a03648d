"""What R2M costs on top of plain RLOO: time and peak memory of a whole step, and the count that says why.

  python -m benchmarks.r2m_overhead --size=small [--steps=5] [--setting=FIELD=VALUE,...]

The two steps take turns in one process, so that a slow spell of the machine falls on both; a round is a ratio. Each peak
is that of a process of its own, which runs two steps and nothing else.
"""

import statistics

import jax
from absl import app, flags

from benchmarks import machine, workload
from r2m_jax.plan.work import Layout, phases_of

STEPS = flags.DEFINE_integer("steps", 5, "Timed steps of each that others did not disturb")
VARIANTS = ("vanilla", "r2m")


def counts(size: str, variant: str) -> tuple[float, float]:
  """(FLOPs, bytes moved) of a step, as plan.work has them."""
  config = workload.get_config(size, variant, workload.SETTING.value)
  sizes = workload.sizes_of(config, workload.POLICIES[size], workload.REWARDS[size])
  phases = phases_of(config, sizes, Layout(1, 1, 1), jax.devices()[0].platform)
  return sum(phase.flops for phase in phases), sum(phase.moved for phase in phases)


def main(_):
  machine.set_up()
  size, settings = workload.SIZE.value, workload.SETTING.value
  given = (f"--size={size}", f"--setting={','.join(settings)}", "--steps=0")
  peaks = {name: machine.child("benchmarks.step", f"--variant={name}", *given)["peak"] for name in VARIANTS}
  works = {name: workload.of_size(size, name, settings) for name in VARIANTS}
  for work in works.values():
    work.step(), work.step()  # compile, and one more
  times = machine.take_turns({name: work.step for name, work in works.items()}, STEPS.value)
  (flops, moved), (r2m_flops, r2m_moved) = (counts(size, name) for name in VARIANTS)

  print(f"{'':8}  {machine.HEADER}  {'peak GB':>8}  {'GFLOP':>9}  {'GB moved':>9}")
  for name in VARIANTS:
    needs, bytes_ = counts(size, name)
    print(f"{name:8}  {times[name]}  {peaks[name] / 1e9:8.3f}  {needs / 1e9:9.2f}  {bytes_ / 1e9:9.2f}")
  plain, r2m = times.values()
  ratios = [b / a for a, b in zip(plain.seconds, r2m.seconds, strict=True)]
  time, memory = statistics.median(ratios) - 1, peaks["r2m"] / peaks["vanilla"] - 1
  print(f"R2M over plain RLOO: time {time:+.1%} ({min(ratios) - 1:+.1%} to {max(ratios) - 1:+.1%}), "
        f"memory {memory:+.1%}; counted FLOPs {r2m_flops / flops - 1:+.2%}, bytes {r2m_moved / moved - 1:+.2%}")  # fmt: skip
  result = {"benchmark": "r2m_overhead", "size": size, "ratios": ratios, "peaks": peaks,
            "flops": r2m_flops / flops, "moved": r2m_moved / moved}  # fmt: skip
  bound = workload.BOUNDS.get(size, {}).get("r2m")
  machine.conclude(result, [
    (f"R2M takes {more:+.1%} {of}, at most {bound:.0%} asked", more <= bound)
    for of, more in (("step time", time), ("memory", memory))
  ] if bound else [], plain.quiet)  # fmt: skip


if __name__ == "__main__":
  app.run(main)
