"""task = plan: one topology, or the smallest slice of each generation of TPU on which the run
fits.
"""

import dataclasses
import json
import pathlib
import signal
import tempfile

from r2m_jax.config import ConfigError
from r2m_jax.parallel import sharding
from r2m_jax.parallel.chips import GIB, TPUS, Topology, parse_topology, slices_of
from r2m_jax.plan import knobs, memory, programs, report
from r2m_jax.plan.sizes import Sizes, sizes_of
from r2m_jax.plan.work import ROLLOUT, Layout, phases_of
from r2m_jax.run.files import write_atomic

ROOM = 0.9  # share of a chip's memory, by the count


@dataclasses.dataclass(frozen=True)
class Plan:
  """The plan for one topology. Bytes are per chip."""

  topology: str
  mesh: tuple[int, int, int]
  compiled: bool  # False: only counted
  fits: bool
  memory: dict[str, dict[str, float]]  # {program: {kind: bytes}}
  collectives: dict[str, dict[str, float]]  # {program: {kind: bytes sent by a chip}}
  seconds: dict[str, float]  # least time of each program
  refused: str = ""  # the compiler's message if it refused to compile the program

  @property
  def peak(self) -> float:
    return max(map(report.total, self.memory.values()))


def run(config, workdir: pathlib.Path) -> bool:
  """Prints the plan, writes WORKDIR/plan.json and plan.txt; returns whether the run fits."""
  for number in (
    signal.SIGINT,
    signal.SIGTERM,
  ):  # a compiler cannot be interrupted; finished results are kept
    signal.signal(number, signal.SIG_DFL)
  lines: list[str] = []

  def say(*more: str):
    lines.extend(more)
    print(*more, sep="\n", flush=True)

  name = config.plan.topology
  topology = None if name == "auto" else topology_of(name)
  programs.prepare_environment(topology or slices_of(TPUS[0])[0])
  if not config.variant:  # the arms are run one after another
    config = knobs.changed(config, {"variant": config.arms[-1]})
  sizes = sizes_of(config)
  require_writable(workdir)
  say(describe(config, sizes))
  if topology is None:
    plans = find_smallest(config, sizes, say)
    fits = any(plan.fits for plan in plans)
  else:
    plan = make_plan(config, sizes, topology, layout_for(config, sizes, topology))
    plans, fits = [plan], plan.fits
    say(*show(config, sizes, topology, plan))
  write_atomic(
    workdir / "plan.json", json.dumps([dataclasses.asdict(plan) for plan in plans], indent=2)
  )
  write_atomic(workdir / "plan.txt", "\n".join(lines) + "\n")
  return fits


def require_writable(workdir: pathlib.Path) -> None:
  """Raises ConfigError if the workdir cannot be written, before the minutes that a plan takes."""
  try:
    workdir.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryFile(dir=workdir):
      pass
  except OSError as error:
    raise ConfigError(
      f"--workdir={workdir} cannot be used: {error}; give one that can be written"
    ) from None


def topology_of(name: str) -> Topology:
  try:
    return parse_topology(name)
  except ValueError as error:
    raise ConfigError(f"config.plan.topology is {name!r}: {error}") from None


def describe(config, sizes: Sizes) -> str:
  arch, reward = sizes.arch, sizes.reward_arch

  def shape(a):
    return f"{a.family} {a.num_layers} x {a.hidden_size}"

  return (
    f"plan     {config.algorithm}, variant {config.variant}: {sizes.prompts} prompts x "
    f"{config.rollout.group_size} responses; {sizes.prompt_length} + {sizes.response_length} "
    "tokens, "
    f"{sizes.reward_length} for the reward model\n"
    f"models   policy {shape(arch)}, reward {shape(reward)}; {config.dtype}, parameters "
    f"{config.param_dtype}; "
    f"remat {config.remat}, accumulation {config.ppo.accumulation}, waves {config.rollout.waves}, "
    f"logits_chunk {config.logits_chunk}"
  )


# ---- meshes ----


def layouts(config, sizes: Sizes, chips: int) -> list[Layout]:
  """The meshes over this number of chips on which the run's rows and heads divide."""
  given = tuple(config.mesh)
  if -1 not in given and given[0] * given[1] * given[2] == chips:
    return [Layout(*given)]
  parts = config.ppo.minibatches * config.ppo.accumulation
  heads = (sizes.arch.num_kv_heads, sizes.reward_arch.num_kv_heads)
  rows = sizes.prompts * config.rollout.group_size
  found = []
  for tensor in (
    n for n in range(1, chips + 1) if chips % n == 0 and all(h % n == 0 for h in heads)
  ):
    shards = chips // tensor
    if sizes.prompts % (shards * config.rollout.waves) == 0 and rows % (shards * parts) == 0:
      found += [
        Layout(shards // fsdp, fsdp, tensor) for fsdp in range(1, shards + 1) if shards % fsdp == 0
      ]
  return found


def layout_for(config, sizes: Sizes, topology: Topology, shapes=None) -> Layout:
  """The fastest mesh among those that fit by the count with a tenth to spare, or else the one that
  needs least memory.

  The count is not exact, and copies of the weights along data need spare memory. Raises ConfigError
  if no mesh divides the run.
  """
  found = layouts(config, sizes, topology.count)
  if not found:
    raise ConfigError(
      f"config.plan.topology is {topology.name!r}: {sizes.prompts} prompts in "
      f"{config.rollout.waves} waves and "
      f"{config.ppo.minibatches * config.ppo.accumulation} parts do not split over "
      f"{topology.count} chips; change "
      "rollout.prompts, rollout.waves or ppo.accumulation, or give config.mesh"
    )
  shapes = shapes or memory.state_shapes(config, sizes)
  peak = {layout: counted_peak(config, sizes, shapes, layout, topology) for layout in found}
  fitting = [layout for layout in found if peak[layout] <= ROOM * topology.chip.memory]
  if not fitting:
    return min(found, key=peak.get)
  return min(
    fitting, key=lambda layout: sum(expected_seconds(config, sizes, topology, layout).values())
  )


def counted_peak(config, sizes: Sizes, shapes, layout: Layout, topology: Topology) -> float:
  """Counted bytes per chip, for the program that needs more."""
  return max(
    map(report.total, memory.estimate(config, sizes, shapes, layout, topology.platform).values())
  )


def expected_links(config, sizes: Sizes, topology: Topology, layout: Layout) -> dict[str, float]:
  """Counted {program: bytes out of a chip}."""
  links = {"rollout": 0.0, "learn": 0.0}
  for phase in phases_of(config, sizes, layout, topology.platform):
    links["rollout" if phase.name in ROLLOUT else "learn"] += phase.links
  return links


def expected_seconds(config, sizes: Sizes, topology: Topology, layout: Layout) -> dict[str, float]:
  phases = phases_of(config, sizes, layout, topology.platform)
  links = expected_links(config, sizes, topology, layout)
  return {
    program: seconds for program, (seconds, _) in report.times(phases, links, topology).items()
  }


# ---- one topology ----


def make_plan(config, sizes: Sizes, topology: Topology, layout: Layout) -> Plan:
  """Compiles both programs, or counts them if there is no compiler."""
  mesh_sizes = layout.data, layout.fsdp, layout.tensor
  phases = phases_of(config, sizes, layout, topology.platform)
  shapes = memory.state_shapes(config, sizes)
  counted = memory.estimate(config, sizes, shapes, layout, topology.platform)
  if not (topology.compiles and config.plan.compile):
    links = {
      program: {"all": size}
      for program, size in expected_links(config, sizes, topology, layout).items()
    }
    seconds = expected_seconds(config, sizes, topology, layout)
    fits = max(map(report.total, counted.values())) <= topology.chip.memory
    return Plan(topology.name, mesh_sizes, False, fits, counted, links, seconds)
  mesh = sharding.make_mesh(mesh_sizes, programs.devices_of(topology))
  found, refused = {}, ""
  for which in ("learn", "rollout"):  # the larger one first
    found[which] = result = programs.compile_program(which, config, sizes, topology, mesh)
    if "exceeded" in result:
      refused = f"{which}: {result['exceeded']}"
  found = {which: found[which] for which in ("rollout", "learn")}
  kinds = {
    which: by_kind(result, counted[which], shapes, layout) for which, result in found.items()
  }
  collectives = {which: result["collectives"] for which, result in found.items()}
  sums = {which: sum(value.values()) for which, value in collectives.items()}
  seconds = {p: t for p, (t, _) in report.times(phases, sums, topology).items()}
  fits = not refused and max(map(report.total, kinds.values())) <= topology.chip.memory
  return Plan(topology.name, mesh_sizes, True, fits, kinds, collectives, seconds, refused)


def by_kind(result: dict, counted: dict[str, float], shapes, layout: Layout) -> dict[str, float]:
  """Bytes of one program on a chip: the state by kind, the identified temporaries of the compiler,
  and the rest.
  """
  state = {kind: float(size) for kind, size in memory.state_on(shapes, layout).items()}
  rest = sum(result[part] for part in ("arguments", "temporaries", "results", "code")) - sum(
    state.values()
  )
  named = {}
  for kind in ("KV cache", "feedback"):
    named[kind] = min(counted[kind], max(0.0, rest))
    rest -= named[kind]
  return state | named | {"temporaries": max(0.0, rest)}


def how_found(plan: Plan) -> str:
  return "compiled" if plan.compiled else "counted, not compiled"


def show(config, sizes: Sizes, topology: Topology, plan: Plan) -> list[str]:
  """The whole plan as lines."""
  layout, chip = Layout(*plan.mesh), topology.chip
  phases = phases_of(config, sizes, layout, topology.platform)
  rates = f"{chip.flops / 1e12:.0f} TFLOP/s, {chip.memory_rate / 1e9:.0f} GB/s, links {chip.link_rate / 1e9:.0f} GB/s"
  lines = [
    f"topology {topology.name}: {topology.count} chips of {chip.memory / GIB:.2f} GiB, {rates}; "
    f"{how_found(plan)}",
    f"mesh     (data, fsdp, tensor) = {plan.mesh}: --config.mesh='{plan.mesh}'",
    "",
    *report.memory_lines(plan.memory, topology),
    "",
    *report.phase_lines(phases, topology),
    "",
  ]
  if all(plan.collectives.values()):
    sums = {p: sum(kinds.values()) for p, kinds in plan.collectives.items()}
    lines += [*report.link_lines(plan.collectives, topology), ""]
    for program, (seconds, bound) in report.times(phases, sums, topology).items():
      lines.append(f"{program:8} at least {seconds:.2f} s, bound by {report.BINDING[bound]}")
    lines.append(
      f"step     at least {sum(plan.seconds.values()):.2f} s; {config.steps} steps at least "
      f"{config.steps * sum(plan.seconds.values()) / 3600:.2f} h"
    )
  if (
    config.plan.compare
    and config.variant != config.plan.compare
    and plan.compiled
    and not plan.refused
  ):
    lines += ["", *share(config, sizes, topology, plan)]
  return lines + ["", *verdict(config, sizes, topology, plan)]


def share(config, sizes: Sizes, topology: Topology, plan: Plan) -> list[str]:
  """The cost of the variant compared with config.plan.compare."""
  base, layout = config.plan.compare, Layout(*plan.mesh)
  plain_config = knobs.changed(config, {"variant": base})
  plain = make_plan(plain_config, sizes, topology, layout)
  if plain.refused:
    return [f"share    {base} does not compile either: {plain.refused}"]

  def quantities(config, plan):
    return {
      "PFLOPs of a step": sum(
        phase.flops for phase in phases_of(config, sizes, layout, topology.platform)
      ),
      "GiB per chip at the peak": plan.peak,
      "GiB per chip without reward model": plan.peak - plan.memory["learn"]["reward model"],
      "GiB sent per chip in a step": sum(
        sum(kinds.values()) for kinds in plan.collectives.values()
      ),
    }

  return report.share_lines(
    quantities(config, plan), quantities(plain_config, plain), config.variant, base
  )


def verdict(config, sizes: Sizes, topology: Topology, plan: Plan) -> list[str]:
  limit = topology.chip.memory
  if plan.fits:
    return [f"fits     {report.gib(plan.peak)} of {report.gib(limit)} GiB per chip at the peak"]
  over = (plan.peak - limit) / GIB
  lines = [
    f"DOES NOT FIT: {report.gib(plan.peak)} GiB per chip at the peak, {over:.2f} more than there "
    "are"
  ]
  if plan.refused:
    lines.append(f"  the compiler refused {plan.refused}")
  for knob, saved in knobs.suggestions(config, sizes, Layout(*plan.mesh), topology.platform):
    lines.append(f"  {knob} saves about {saved:.2f} GiB" + (": enough" if saved > over else ""))
  return lines


# ---- the smallest slices ----


def find_smallest(config, sizes: Sizes, say) -> list[Plan]:
  """For each generation, compiles the smallest slice that fits by the count; if it does not fit,
  the next larger one.
  """
  shapes, found = memory.state_shapes(config, sizes), []
  say("")
  for chip in (chip for chip in TPUS if chip.name in config.plan.generations):
    best = None
    for topology in slices_of(chip):
      if not layouts(config, sizes, topology.count):
        continue
      layout = layout_for(config, sizes, topology, shapes)
      counted = counted_peak(config, sizes, shapes, layout, topology)
      if counted > chip.memory:
        continue
      plan = make_plan(config, sizes, topology, layout)
      found.append(plan)
      if plan.fits:
        best = plan
        break
      why = plan.refused or f"it needs {report.gib(plan.peak)} of {report.gib(chip.memory)} GiB"
      say(
        f"  {topology.name}: the count gave {report.gib(counted)} GiB, the compiler refused "
        f"it: {why}; going on"
      )
    if best is None:
      say(f"  {chip.name:4} no slice up to {chip.slices[-1]} fits")
    else:
      say(
        f"  {best.topology:10} mesh {best.mesh!s:12} {report.gib(best.peak):>6} of "
        f"{report.gib(chip.memory)} GiB per "
        f"chip, a step at least {sum(best.seconds.values()):.1f} s; {how_found(best)}"
      )
  return found
