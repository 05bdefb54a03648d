"""A full RL step and its phases: time, shares of the machine's matmul rate and bandwidth, peak
memory.

  python -m benchmarks.step --size=small [--steps=5] [--variant=vanilla] [--setting=FIELD=VALUE,...]

`step` is the fused program that a run executes. `rollout` and `learn` are separate programs of the
same functions, and their sum is shown too. `read` (old and reference log-probs) and `judge` (the
reward model's pass) are separate programs of parts of learn; `updates` is the rest of learn. All
take turns. The peak is that of the fused step, from the start of the process, before anything else
has run. With --steps=0 only the peak is measured.
"""

import json

import jax
from absl import app, flags

from benchmarks import machine, workload

STEPS = flags.DEFINE_integer("steps", 5, "Timed steps, not disturbed by other processes")
VARIANT = flags.DEFINE_string("variant", "vanilla", "Plain RLOO, or r2m; see variants.VARIANTS")


def main(_):
  machine.set_up()
  size = workload.SIZE.value
  work = workload.of_size(size, VARIANT.value, workload.SETTING.value)
  for _ in range(2):
    work.step()
  peak = machine.peak_memory()
  result = {"benchmark": "step", "size": size, "variant": VARIANT.value, "peak": peak}
  if not STEPS.value:
    print(json.dumps(result))
    return
  names = ("rollout", "read", "judge", "learn", "step")
  for name in names:
    getattr(work, name)()  # compiles
  limits = machine.limits()
  times = machine.take_turns({name: getattr(work, name) for name in names}, STEPS.value)
  flops, moved = map(
    workload.by_program, workload.counts(work.config, work.sizes, jax.devices()[0].platform)
  )
  seconds = {name: found.median for name, found in times.items()}
  seconds["updates"] = seconds["learn"] - seconds["read"] - seconds["judge"]
  rate = limits[work.config.dtype]

  print(machine.show_limits(limits))
  print(f"{'':16}  {machine.HEADER}  {'GFLOP':>9}  {'of rate':>7}  {'GB':>7}  {'of copy':>7}")
  for name in ("step", "rollout", "learn", "read", "judge", "updates"):
    spread = times[name] if name in times else f"{seconds[name]:9.4f}{'':30}"
    shares = flops[name] / seconds[name] / rate, moved[name] / seconds[name] / limits["copy"]
    print(
      f"{name:16}  {spread}  {flops[name] / 1e9:9.2f}  {shares[0]:7.1%}  "
      f"{moved[name] / 1e9:7.2f}  {shares[1]:7.1%}"
    )
  both = seconds["rollout"] + seconds["learn"]
  print(
    f"{'rollout + learn':16}  {both:9.4f}   {both / seconds['step'] - 1:+.1%} of the fused step"
  )
  print(
    f"peak {peak / 1e9:.2f} GB; {times['step'].dropped} rounds dropped because others were busy"
  )
  share = flops["learn"] / seconds["learn"] / rate
  bound = workload.BOUNDS.get(size, {}).get("learn")
  result |= {
    "seconds": times["step"].seconds,
    "busy": times["step"].busy,
    "limits": limits,
    "phases": {
      name: {"seconds": seconds[name], "flops": flops[name], "bytes": moved[name]}
      for name in seconds
    },
    "learn_share": share,
  }
  machine.conclude(
    result,
    [
      (
        f"learning runs at {share:.1%} of the {work.config.dtype} matmul rate, target {bound:.0%}",
        share >= bound,
      )
    ]
    if bound
    else [],
    times["step"].quiet,
  )


if __name__ == "__main__":
  app.run(main)
