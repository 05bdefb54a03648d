"""Decoding against its own limit: the larger of the FLOPs at the matmul rate and the bytes at the
copy bandwidth.

  python -m benchmarks.decode --size=small [--steps=5] [--kernels=20] [--setting=FIELD=VALUE,...]

The time is that of a rollout of all tokens minus a rollout of one token (the prefill and the first
token). FLOPs count every row's layers, its logits, and attention over the existing tokens. Bytes
count the weights once per token, the cache of each row's response, and each prompt's cache once for
its K rows. Both are what the work needs, whatever else the program does. Only the policy is in
memory. --kernels=N lists, from a profile, the N kernels in which an accelerator spends most of a
rollout.
"""

import jax
import jax.numpy as jnp
from absl import app, flags

from benchmarks import machine, workload

KERNELS = flags.DEFINE_integer("kernels", 0, "Number of an accelerator's kernels to list", 0)
STEPS = flags.DEFINE_integer(
  "steps", 5, "Timed rollouts of each length, not disturbed by other processes"
)


def main(_):
  machine.set_up()
  size, settings = workload.SIZE.value, workload.SETTING.value
  work = workload.of_size(size, settings=settings, policy_alone=True)
  program = work.rollout_program(
    workload.get_config(size, settings=[*settings, "rollout.max_new_tokens=1"])
  )

  def first():
    return jax.block_until_ready(program(work.state, work.prompts()))

  compiled = machine.timed(lambda: (work.rollout(), first()))[0]
  limits, host = machine.limits(), jax.devices()[0].platform == "cpu"
  quiet = machine.QUIET if host else 1.0  # other users of the cores matter little to an accelerator
  times = machine.take_turns({"all tokens": work.rollout, "one token": first}, STEPS.value, quiet)
  sizes, dtype = work.sizes, work.config.dtype
  tokens = sizes.response_length - 1
  seconds = times["all tokens"].median - times["one token"].median
  flops = workload.decode_flops(sizes)
  moved = workload.decode_bytes(sizes, jnp.dtype(dtype).itemsize)
  by = workload.decode_limits(sizes, dtype, limits)
  bound_by = max(by, key=by.get)
  share = by[bound_by] / seconds

  print(
    machine.show_limits(limits),
    f"{jax.devices()[0].device_kind}; first calls {compiled:.1f} s",
    sep="; ",
  )
  print(f"{'':10}  {machine.HEADER}")
  for name, found in times.items():
    print(f"{name:10}  {found}")
  print(
    f"decoding: {1e3 * seconds / tokens:.2f} ms for a token of {sizes.rows} rows, "
    f"{sizes.rows * tokens / seconds:,.0f} tokens/s"
  )
  for name, least in by.items():
    print(f"limit by {name}: {1e3 * least / tokens:.2f} ms, {least / seconds:.1%}")
  if KERNELS.value and not host:
    print(f"{'ms':>9}  {'calls':>7}  kernels of one rollout")
    for name, (spent, calls) in machine.kernels(work.rollout)[: KERNELS.value]:
      print(f"{1e3 * spent:9.2f}  {calls:7}  {name[:100]}")
  result = {
    "benchmark": "decode",
    "size": size,
    "seconds": seconds,
    "flops": flops,
    "bytes": moved,
    "limits": limits,
    "share": share,
    "bound_by": bound_by,
    "busy": times["all tokens"].busy,
  }
  bound = workload.BOUNDS.get(size, {}).get("decode")
  machine.conclude(
    result,
    [
      (
        f"decoding runs at {share:.1%} of its limit by {bound_by}, target {bound:.0%}",
        share >= bound,
      )
    ]
    if bound
    else [],
    times["all tokens"].quiet,
  )


if __name__ == "__main__":
  app.run(main)
