"""What XLA makes of the two programs of a step for a GPU that is not here: kernels, bytes and memory,
padded and packed.

  python -m benchmarks.gpu_kernels --target=h200.txtpb --size=0.5b|3b [--share=0.5]

It needs jax[cuda13] and JAX_PLATFORMS=cpu, and no GPU. --target is a file with the card's
GpuTargetConfigProto as text; XLA's repository has those of common cards in
xla/backends/gpu/target_config/specs. Nothing runs and no kernel is tuned, so no time is given.

The work is that of gpu.py. Learning is compiled for all places and for a --share of them (a mean
length of 40% needs 0.5), and decoding as if every response had the maximum length.
"""

import json
import pathlib
import re
import time

import jax
import numpy as np
from absl import app, flags
from jax.experimental import topologies

from benchmarks import workload
from r2m_jax.parallel import sharding
from r2m_jax.plan import hlo, programs

TARGET = flags.DEFINE_string("target", "", "The card, a GpuTargetConfigProto as text")
SHARE = flags.DEFINE_float("share", 0.5, "Share of the places that packed learning computes")
OPERATION = re.compile(r"(?:^|[ }\])])([a-z][a-z\-]*)\(")
# operations that launch nothing
FREE = {
  *("parameter", "constant", "tuple", "get-tuple-element", "bitcast", "after-all"),
  *("while", "conditional", "call", "opt-barrier", "partition-id", "replica-id"),
}
SLICES = ("dynamic-slice", "slice")
ENTERED = re.compile(
  r"(?:body|condition|(?:true|false)_computation|branch_computations)=(?:\{([^}]*)\}|(%?[\w.\-]+))"
)


def launched(text: str) -> tuple[float, float]:
  """(kernels, bytes that they read and write) of one run of a compiled program. A loop counts with
  its maximum length, and a kernel that reads a slice of an array counts the slice.
  """
  computations, entry = hlo.parse(text)
  times = hlo.executions(computations, entry)
  kernels = moved = 0.0
  for name in entered(computations, entry):
    shapes = {instruction: size_of(rest) for instruction, rest in computations[name]}
    for instruction, rest in computations[name]:
      if operation_of(rest) not in FREE:
        kernels += times[name]
        moved += times[name] * bytes_of(instruction, rest, shapes, computations)
  return kernels, moved


def entered(computations, entry: str) -> list[str]:
  """The computations whose instructions are launched: the entry, and the bodies of loops and
  branches in them.
  """
  found, waiting = [], [entry]
  while waiting:
    name = waiting.pop()
    if name in found:
      continue
    found.append(name)
    for _, rest in computations[name]:
      for called in ENTERED.finditer(rest):
        waiting += (called[1] or called[2]).replace("%", "").split(", ")
      if operation_of(rest) == "call":
        waiting.append(re.search(r"to_apply=%?([\w.\-]+)", rest)[1])
  return found


def operation_of(rest: str) -> str:
  found = OPERATION.search(rest)
  return found[1] if found else ""


def size_of(rest: str) -> float:
  """Bytes of an instruction's result."""
  at = OPERATION.search(rest)
  shapes = hlo.SHAPE.findall(rest[: at.start() + 1] if at else rest)
  return sum(
    hlo.BYTES[kind] * np.prod([int(n) for n in dims.split(",") if n]) for kind, dims in shapes
  )


def bytes_of(instruction: str, rest: str, shapes: dict[str, float], computations) -> float:
  """Bytes that one kernel reads and writes. A fusion reads the slices that it takes of an operand, and
  writes the part of an operand that it updates in place. A custom kernel reads its whole operands,
  and its writes to them do not count.
  """
  operands, result = operands_of(rest), shapes[instruction]
  called = re.search(r"calls=%?([\w.\-]+)", rest)
  if called is None:
    inputs = [shapes.get(name, 0) for name in operands]
    in_place = re.search(r"output_to_operand_aliasing=\{(.*?\})\}", rest)
    written = re.findall(r"\((\d+),", in_place[1]) if in_place else []
    return sum(inputs) + max(0.0, result - sum(inputs[int(number)] for number in written))
  inner = dict(computations[called[1]])
  total = 0.0
  for name, line in inner.items():
    if operation_of(line) != "parameter":
      continue
    number = int(re.search(r"parameter\((\d+)\)", line)[1])
    # (operation, its instruction, whether the parameter is its first operand)
    uses = [
      (operation_of(other), use, operands_of(other)[0] == name)
      for use, other in inner.items()
      if name in operands_of(other)
    ]
    if uses and all(first and kind in SLICES for kind, _, first in uses):
      total += sum(size_of(inner[use]) for _, use, _ in uses)
    elif [(kind, first) for kind, _, first in uses] == [("dynamic-update-slice", True)]:
      update = operands_of(inner[uses[0][1]])[1]
      result -= shapes[operands[number]] - size_of(inner[update])
    else:
      total += shapes.get(operands[number], 0)
  return total + result


def operands_of(rest: str) -> list[str]:
  """The names of an instruction's operands."""
  at = OPERATION.search(rest)
  return re.findall(r"%([\w.\-]+)", rest[at.end() :].split(")")[0]) if at else []


def main(_):
  jax.config.update("jax_enable_compilation_cache", False)  # nothing can be loaded without a card
  target = pathlib.Path(TARGET.value).read_text(encoding="utf-8")
  described = dict(topology="1x1x1", target_config=target)
  devices = topologies.get_topology_desc(platform="cuda", topology_name="", **described).devices
  mesh = sharding.make_mesh((1, 1, 1), devices[:1])
  size = workload.SIZE.value
  config = workload.get_config(size, "vanilla", workload.SETTING.value)
  sizes = workload.sizes_of(config, workload.POLICIES[size], workload.REWARDS[size])
  print(f"{devices[0].device_kind}; {size}")
  print(f"{'':14}  {'kernels':>9}  {'GB moved':>9}  {'GiB temporaries':>15}  {'compiled in s':>13}")
  result = {"benchmark": "gpu_kernels", "size": size, "programs": {}}
  asked = {"rollout": 1.0, "learn": 1.0, f"learn at {SHARE.value}": SHARE.value}
  for name, share in asked.items():
    jitted, given = programs.program_of(name.split()[0], config, sizes, mesh, share)
    lowered = jitted.trace(*given).lower(lowering_platforms=("cuda",))
    began = time.perf_counter()
    compiled = lowered.compile(compiler_options={"xla_gpu_autotune_level": 0})
    took = time.perf_counter() - began
    kernels, moved = launched(compiled.as_text())
    memory = compiled.memory_analysis().temp_size_in_bytes
    print(f"{name:14}  {kernels:9,.0f}  {moved / 1e9:9,.0f}  {memory / 2**30:15.2f}  {took:13.0f}")
    result["programs"][name] = {"kernels": kernels, "moved": moved, "temporaries": memory}
  print(json.dumps(result))


if __name__ == "__main__":
  app.run(main)
