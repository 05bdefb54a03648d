"""Step time against size, as fitted exponents: trajectories, response length, parameters, K.

  python -m benchmarks.cost [--size=tiny] [--steps=5] [--axes=prompts,length,parameters,K]
  [--setting=FIELD=VALUE,...]

Each axis grows by itself, from the given size. log time is fitted on log size by least squares.
Next to it are the exponent between the two largest sizes, and the exponent of the counted FLOPs,
which is above one if attention's share grows. Apart from attention, no growth may be worse than
linear: the lower end of the exponent's interval must be at most one, or at most the FLOPs' exponent
if that is larger.
"""

import jax
from absl import app, flags

from benchmarks import machine, workload

STEPS = flags.DEFINE_integer(
  "steps", 5, "Timed steps of each point, not disturbed by other processes"
)
AXES = flags.DEFINE_list("axes", ["prompts", "length", "parameters", "K"], "Which")
TIMES = (1, 2, 4, 8)


def points(axis: str, config, arch) -> list[tuple[float, object, object]]:
  """[(size, config, arch)] of an axis, smallest first. Parameters grow by layers."""
  found = []
  for factor in TIMES:
    changed, shape = config.copy_and_resolve_references(), arch
    if axis == "prompts":
      changed.rollout.prompts = 4 * factor
      size = changed.rollout.prompts * config.rollout.group_size
    elif axis == "K":
      changed.rollout.group_size = size = 2 * factor
    elif axis == "length":
      changed.rollout.max_new_tokens = size = 16 * factor
    elif axis == "parameters":
      shape = arch.replace(num_layers=arch.num_layers * factor)
      size = workload.parameters(shape)
    else:
      raise ValueError(f"--axes has {axis!r}; choose among {', '.join(AXES.default)}")
    found.append((size, changed, shape))
  return found


def main(_):
  machine.set_up()
  size = workload.SIZE.value
  rows = {}
  bounds = []
  quiet = True
  config, arch = workload.get_config(size, settings=workload.SETTING.value), workload.POLICIES[size]
  platform = jax.devices()[0].platform
  for axis in AXES.value:
    works = {}
    sizes = []
    flops = []
    for number, changed, shape in points(axis, config, arch):
      work = workload.Work(changed, workload.sizes_of(changed, shape, shape))
      work.step()
      work.step()
      works[number] = work
      flops.append(sum(workload.counts(changed, work.sizes, platform)[0].values()))
      sizes.append(number)
    times = machine.take_turns({number: work.step for number, work in works.items()}, STEPS.value)
    seconds = [times[number].median for number in sizes]
    slope, half = machine.exponent(sizes, seconds)
    last, _ = machine.exponent(sizes[-2:], seconds[-2:])
    counted, _ = machine.exponent(sizes, flops)
    print(
      f"{axis}: time grows as size to the {slope:.2f} ± {half:.2f}, at the end to the {last:.2f}; "
      f"FLOPs to the {counted:.2f}"
    )
    for number in sizes:
      print(f"{number:>12,}  {times[number]}")
    rows[axis] = {
      "sizes": sizes,
      "seconds": seconds,
      "exponent": slope,
      "half_width": half,
      "last": last,
      "flops": counted,
    }
    allowed = max(1.0, counted)
    bounds.append(
      (
        f"{axis}: exponent {slope:.2f} ± {half:.2f}, target at most {allowed:.2f}",
        slope - half <= allowed,
      )
    )
    quiet &= all(found.quiet for found in times.values())
  machine.conclude({"benchmark": "cost", "size": size, "axes": rows}, bounds, quiet)


if __name__ == "__main__":
  app.run(main)
