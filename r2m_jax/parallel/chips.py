"""The specification of each chip, from its vendor's public documents, and the available slices.

TPUs: the system architecture pages of Google Cloud's TPU documentation (v4, v5e, v5p, v6e). GPUs:
NVIDIA's data sheets of A100 SXM4 80GB, H100 SXM5 and H200 SXM5, dense bfloat16, with NVLink inside
a server. Rates are peaks, so times computed from them are lower bounds of a step's time.
"""

import dataclasses
import math
import re

GIB = 2**30


@dataclasses.dataclass(frozen=True)
class Chip:
  name: str
  flops: float  # bfloat16 FLOP/s
  memory: float  # bytes that a program may use
  memory_rate: float  # bytes/s to and from its memory
  link_rate: float  # bytes/s out of the chip, over all its links together
  slices: tuple[str, ...] = ()  # smallest first; (): any number of chips
  options: tuple[tuple[str, str], ...] = ()  # of the topology, for jax.experimental.topologies


SQUARE = ("2x2", "2x4", "4x4", "4x8", "8x8", "8x16", "16x16")
CUBE = ("2x2x1", "2x2x2", "2x2x4", "2x4x4", "4x4x4", "4x4x8", "4x8x8")
# memory of a TPU: what its compiler allows a program, slightly less than the chip's memory (32, 16,
# 95, 32 GiB)
TPUS = (
  Chip("v4", 275e12, 30.75 * GIB, 1228e9, 300e9, CUBE, (("chip_config_name", "megacore"),)),
  Chip("v5e", 197e12, 15.75 * GIB, 819e9, 200e9, SQUARE),
  Chip("v5p", 459e12, 95.74 * GIB, 2765e9, 600e9, CUBE),
  Chip("v6e", 918e12, 31.25 * GIB, 1638e9, 448e9, SQUARE),
)
# memory of a GPU: 95% of what it reports as free; the rest goes to libraries and fragments
GPUS = (
  Chip("a100", 312e12, 0.95 * 79 * GIB, 2039e9, 300e9),
  Chip("h100", 989e12, 0.95 * 79 * GIB, 3350e9, 450e9),
  Chip("h200", 989e12, 0.95 * 140 * GIB, 4800e9, 450e9),
)
# a host's processor, only to compare a plan for it with a real run
CPU = Chip("cpu", 4e11, math.inf, 40e9, 10e9)


@dataclasses.dataclass(frozen=True)
class Topology:
  name: str  # as jax.experimental.topologies reads it, or gpu:NAMExCOUNT, or cpu:COUNT
  chip: Chip
  count: int  # chips

  @property
  def platform(self) -> str:
    """As jax names it."""
    return "tpu" if self.chip in TPUS else "gpu" if self.chip in GPUS else "cpu"

  @property
  def compiles(self) -> bool:
    """Whether we have a compiler for it; otherwise its plan is counted, not compiled."""
    return self.platform != "gpu"


def peak_flops(device_kind: str) -> float:
  """bfloat16 FLOP/s of a device, by JAX's name of its kind; 0.0 if it is not in the table.

  A JAX device is a whole chip of every TPU here: v4 and v5p run their two cores as one.
  """
  names = {"v5litepod": "v5e", "v5lite": "v5e", "v5": "v5p", "v6lite": "v6e"}
  kind = device_kind.lower().replace(" ", "").removeprefix("tpu").removeprefix("nvidia")
  kind = names.get(kind, kind)
  return next((chip.flops for chip in (*TPUS, *GPUS) if kind.startswith(chip.name)), 0.0)


def parse_topology(name: str) -> Topology:
  """`v5p:2x2x4`, `gpu:h100x8` or `cpu:8`. Raises ValueError with the valid names."""
  for chip in TPUS:
    if match := re.fullmatch(rf"{chip.name}:(\d+(?:x\d+)+)", name):
      sizes = [int(size) for size in match[1].split("x")]
      if len(sizes) == len(chip.slices[0].split("x")):
        return Topology(name, chip, math.prod(sizes))
  for chip in GPUS:
    if match := re.fullmatch(rf"gpu:{chip.name}x([1-9]\d*)", name):
      return Topology(name, chip, int(match[1]))
  if match := re.fullmatch(r"cpu:([1-9]\d*)", name):
    return Topology(name, CPU, int(match[1]))
  shown = ", ".join(f"{chip.name}:{chip.slices[2]}" for chip in TPUS)
  raise ValueError(
    f"choose such as {shown}, gpu:{'x8, gpu:'.join(chip.name for chip in GPUS)}x8, cpu:1, or auto"
  )


def slices_of(chip: Chip) -> list[Topology]:
  """The chip's slices, smallest first."""
  return [parse_topology(f"{chip.name}:{size}") for size in chip.slices]
