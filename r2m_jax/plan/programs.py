"""rollout and learn, compiled from abstract arguments: nothing is allocated, and no chip of that
kind is needed.

The two programs are those of a run from folders (tasks.folders.make_two_part_step): sampling, and
everything after it. While one of them runs, a chip holds the whole TrainState, the program's other
arguments, its temporaries, and the results that do not reuse an argument's memory.
"""

import hashlib
import importlib.util
import json
import os
import pathlib
import re
import sys
import tempfile
import threading
import time
from importlib import metadata
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from r2m_jax.algorithm.labels import pairs_per_step, uses_labels
from r2m_jax.config import ConfigError
from r2m_jax.models import transformer
from r2m_jax.parallel import sharding
from r2m_jax.parallel.chips import Topology
from r2m_jax.plan import hlo
from r2m_jax.plan.sizes import Sizes
from r2m_jax.run import build
from r2m_jax.run.files import write_atomic
from r2m_jax.step import make_learn_at, make_rollout
from r2m_jax.types import Pairs, Prompts, Rollout, Rows, Sequences

# version of the cache's files; it changes with the facts that are read from a compiled program
KEPT_FORMAT = "2"
STATE_KINDS = {  # fields of TrainState; the step number and key have no size
  "policy": "parameters",
  "policy_opt": "optimizer",
  "critic": "parameters",
  "critic_opt": "optimizer",
  "ref": "reference",
  "reward_backbone": "reward model",
  "reward_frozen": "reward model",
  "reward_head": "reward head",
  "reward_opt": "reward head",
  "reward_average": "reward head",
}


def prepare_environment(topology: Topology) -> None:
  """Makes jax use the host's processor, with as many devices as a CPU topology needs, before jax
  looks for devices.
  """
  os.environ |= {"TPU_SKIP_MDS_QUERY": "1", "TF_CPP_MIN_LOG_LEVEL": "3", "TPU_MIN_LOG_LEVEL": "3"}
  os.environ |= {
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    "TPU_STDERR_LOG_LEVEL": "3",
  }  # several plans may run at once, because no chip is held
  if topology.chip.name == "cpu" and "host_platform_device_count" not in os.environ.get(
    "XLA_FLAGS", ""
  ):
    count = f"--xla_force_host_platform_device_count={topology.count}"
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {count}".strip()
  jax.config.update("jax_platforms", "cpu")


def devices_of(topology: Topology) -> list:
  """The devices to compile for. Raises ConfigError if there is no compiler for them."""
  if topology.chip.name == "cpu":
    found = jax.devices("cpu")
    if len(found) < topology.count:
      raise ConfigError(
        f"config.plan.topology is {topology.name!r}: this process has {len(found)} CPU devices; "
        f"choose cpu:{len(found)} at most, or remove xla_force_host_platform_device_count from "
        "XLA_FLAGS"
      )
    return found[: topology.count]
  if importlib.util.find_spec("libtpu") is None:
    raise ConfigError(
      f"config.plan.topology is {topology.name!r}: the TPU's compiler is not installed; pip "
      "install 'r2m_jax[plan]' "
      "(package libtpu), no TPU is needed"
    )
  from jax.experimental import topologies

  try:
    with quiet():
      return list(
        topologies.get_topology_desc(
          platform="tpu", topology_name=topology.name, **dict(topology.chip.options)
        ).devices
      )
  except Exception as error:  # of several kinds, from the compiler's own library
    raise ConfigError(
      f"config.plan.topology is {topology.name!r}: {str(error).splitlines()[0][:200]}; choose "
      "another slice"
    ) from None


class quiet:
  """Hides what the compiler's library writes directly to standard error at its start."""

  def __enter__(self):
    sys.stderr.flush()
    self.saved, sink = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    os.dup2(sink, 2)
    os.close(sink)

  def __exit__(self, *error):
    os.dup2(self.saved, 2)
    os.close(self.saved)


# ---- arguments ----


def abstract_state(config, built: build.Build):
  """The run's first TrainState as shapes, dtypes and shardings."""
  kwargs = build.model_kwargs(config, built.mesh)
  key = jax.eval_shape(lambda: jax.random.key(0))

  def model(arch):
    return jax.eval_shape(lambda key: transformer.init(arch, key, **kwargs)[1], key)

  phi = jax.eval_shape(
    lambda key: nnx.state(build.make_head(config, built.arch, built.reward_arch, key).phi), key
  )
  make = build.make_first_state(config, built)
  return build.abstract(make, built.mesh, key, model(built.arch), model(built.reward_arch), phi)


def arguments(config, sizes: Sizes, built: build.Build) -> tuple[Prompts, tuple]:
  """(prompts of rollout, arguments of learn after the state): shapes and shardings."""

  def make(shape, dtype):
    return jax.ShapeDtypeStruct(shape, dtype, sharding=built.rows)

  P = sizes.prompts
  B = sizes.rows
  Lp = sizes.prompt_length
  T = sizes.response_length
  L = sizes.length
  prompts = Prompts(make((P, Lp), jnp.int32), make((P, Lp), bool), make((P,), jnp.int32))
  samples = P * config.rollout.group_size

  def drawn(rows):
    return Sequences(
      make((rows, L), jnp.int32), make((rows, L), bool), make((rows, T), bool), make((rows,), bool)
    )

  def read(rows):
    shape = rows, sizes.reward_length
    return Rows(make(shape, jnp.int32), make(shape, bool))

  def of_each(make_rows):
    return Rollout(make_rows(samples), make_rows(B - samples) if B > samples else None)

  rollout, reward = of_each(drawn), None if sizes.same_tokens else of_each(read)
  if not uses_labels(config):
    return prompts, (rollout, reward)
  whole = NamedSharding(built.mesh, PartitionSpec())
  m = pairs_per_step(config)
  own = sizes.reward_length

  def make(shape, dtype):
    return jax.ShapeDtypeStruct(shape, dtype, sharding=whole)

  pairs = Pairs(
    make((2 * m, L), jnp.int32),
    make((2 * m, L), bool),
    make((2 * m, own), jnp.int32),
    make((2 * m, own), bool),
    make((m,), jnp.float32),
    make((2 * m, L), bool),
  )
  return prompts, (rollout, reward, pairs)


def bytes_on_chip(tree) -> int:
  """Bytes of a tree of abstract arrays on one chip."""
  return sum(
    int(np.prod(x.sharding.shard_shape(x.shape))) * x.dtype.itemsize
    for x in jax.tree.leaves(tree)
    if not jax.dtypes.issubdtype(x.dtype, jax.dtypes.prng_key)
  )


# ---- compiling ----


def compile_program(
  which: str, config, sizes: Sizes, topology: Topology, mesh: Mesh
) -> dict[str, Any]:
  """The compiler's facts about "rollout" or "learn" on a mesh of the topology's devices, as plain
  numbers.

  Earlier results for the same program (the same StableHLO), topology and compiler are read from the
  user's cache.

  Returns:
    Bytes on a chip: `arguments` (all, including the state), `temporaries`, `results` (in separate
    memory), `code`; `collectives`, bytes that a chip sends by kind; `seconds` of compilation; and
    `exceeded`, the compiler's message if the program by itself needs more memory than the chip has.
    In that case only the first two are known.
  """
  jitted, given = program_of(which, config, sizes, mesh)
  lowered = jitted.trace(*given).lower(lowering_platforms=(topology.platform,))
  path = kept_at(lowered.as_text(), topology)
  if path.exists():
    return json.loads(path.read_text(encoding="utf-8"))
  resident, began = bytes_on_chip(given), time.perf_counter()
  with progress(f"{which} for {topology.name}"):
    found = told_by_compiler(lowered, resident)
  found |= {"arguments": resident, "seconds": time.perf_counter() - began}
  try:
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(path, json.dumps(found))
  except OSError as error:
    print(
      f"warning: {path} cannot be written ({error}): the next plan compiles again; set "
      "XDG_CACHE_HOME to a folder that can be written",
      file=sys.stderr,
    )
  return found


def program_of(
  which: str, config, sizes: Sizes, mesh: Mesh, share: float = 1.0
) -> tuple[Any, tuple]:
  """(jitted function, abstract arguments) of "rollout" or "learn" on a mesh. Learning computes a
  share of the places; with a share of 1 every response may have the maximum length.
  """
  built = build.build(config, mesh, arch=sizes.arch, reward_arch=sizes.reward_arch)
  state = abstract_state(config, built)
  prompts, judged = arguments(config, sizes, built)
  if which == "rollout":
    last = sizes.arch.vocab_size - 1
    rollout = make_rollout(built.defs, config, mesh, (last,), last)
    return jax.jit(rollout, out_shardings=built.rows), (state, prompts)
  layout = sharding.shardings(state, mesh)
  jitted = jax.jit(
    sharding.on_mesh(mesh, make_learn_at(share, built.defs, config)),
    donate_argnums=0,
    in_shardings=(layout,) + (None,) * len(judged),
    out_shardings=(layout, None),
  )
  return jitted, (state, *judged)


def told_by_compiler(lowered, resident: int) -> dict[str, Any]:
  """Compiles a lowered program; returns the result of `compile_program` without `arguments` and
  `seconds`.

  Args:
    resident: bytes of the arguments on a chip.
  """
  try:
    with quiet():
      compiled = lowered.compile()
  except jax.errors.JaxRuntimeError as error:
    if "RESOURCE_EXHAUSTED" not in str(error):
      raise
    return {
      "exceeded": str(error).splitlines()[0],
      "temporaries": refused_temporaries(str(error), resident),
      "results": 0,
      "code": 0,
      "collectives": {},
    }
  memory = compiled.memory_analysis()
  return {
    "temporaries": memory.temp_size_in_bytes,
    "results": max(0, memory.output_size_in_bytes - memory.alias_size_in_bytes),
    "code": memory.generated_code_size_in_bytes,
    "collectives": hlo.collective_bytes(compiled.as_text()),
  }


def kept_at(program: str, topology: Topology) -> pathlib.Path:
  """The file of a program's plan in the user's cache."""
  versions = []
  for package in ("jax", "jaxlib", "libtpu"):
    try:
      versions.append(f"{package} {metadata.version(package)}")
    except metadata.PackageNotFoundError:
      versions.append(f"{package} none")
  key = hashlib.sha256(
    "\n".join([program, topology.name, KEPT_FORMAT, *versions]).encode()
  ).hexdigest()[:32]
  try:
    folder = pathlib.Path(os.environ.get("XDG_CACHE_HOME") or pathlib.Path.home() / ".cache")
  except RuntimeError:  # there is no home folder
    folder = pathlib.Path(tempfile.gettempdir())
  return folder / "r2m_jax" / "plans" / f"{key}.json"


def refused_temporaries(message: str, arguments: int) -> float:
  """The temporaries in a compiler's refusal, which names them or the program's total memory."""
  units = {"K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}

  def size(found):
    return float(found[1]) * units[found[2]]

  if found := re.search(r"temporaries \((\d+(?:\.\d+)?)([KMGT])\)", message):
    return size(found)
  found = re.search(r"Used (\d+(?:\.\d+)?)([KMGT]) of", message)
  return max(0.0, size(found) - arguments) if found else 0.0


class progress:
  """Shows a line on standard error with the program that is being compiled and the elapsed time."""

  def __init__(self, what: str):
    self.what, self.done = what, threading.Event()

  def __enter__(self):
    out = os.fdopen(os.dup(2), "w")  # not the stream that `quiet` closes
    live, began = out.isatty(), time.perf_counter()

    def show():
      while not self.done.wait(1 if live else 30):
        line = f"compiling {self.what}: {time.perf_counter() - began:.0f} s"
        print(f"\r{line}" if live else line, end="" if live else "\n", file=out, flush=True)
      took = f"compiled {self.what} in {time.perf_counter() - began:.0f} s"
      print(f"\r{took}" if live else took, file=out, flush=True)
      out.close()

    self.thread = threading.Thread(target=show, daemon=True)
    self.thread.start()

  def __exit__(self, *error):
    self.done.set()
    self.thread.join()
