"""A plan as text."""

from r2m_jax.parallel.chips import GIB, Topology
from r2m_jax.plan.work import ROLLOUT, Phase

KINDS = (
  "parameters",
  "optimizer",
  "reference",
  "reward model",
  "reward head",
  "KV cache",
  "feedback",
  "temporaries",
)
BINDING = {"compute": "arithmetic", "memory": "memory traffic", "links": "links between chips"}


def gib(size: float) -> str:
  return f"{size / GIB:.2f}"


def scaled(value: float, unit: str) -> str:
  for power, prefix in ((15, "P"), (12, "T"), (9, "G"), (6, "M")):
    if value >= 10**power:
      return f"{value / 10**power:.1f} {prefix}{unit}"
  return f"{value:.0f} {unit}"


def table(rows: list[tuple], widths: tuple[int, ...]) -> list[str]:
  """Left-aligned first column, the others right-aligned."""
  return [
    f"  {row[0]:<{widths[0]}}"
    + "".join(f"{cell:>{width}}" for cell, width in zip(row[1:], widths[1:]))
    for row in rows
  ]


def total(kinds: dict[str, float]) -> float:
  return sum(kinds.values())


def times(
  phases: list[Phase], collectives: dict[str, float], topology: Topology
) -> dict[str, tuple[float, str]]:
  """{program: (least seconds, the limiting resource)}: phases run one after another, and links at
  the same time.
  """
  result = {}
  for program in ("rollout", "learn"):
    own = [phase for phase in phases if (phase.name in ROLLOUT) == (program == "rollout")]
    parts = [phase.seconds(topology.chip, topology.count) for phase in own]
    inside = sum(seconds for seconds, _ in parts)
    by = max(
      ("compute", "memory"),
      key=lambda kind: sum(seconds for seconds, bound in parts if bound == kind),
    )
    result[program] = max((inside, by), (collectives[program] / topology.chip.link_rate, "links"))
  return result


def memory_lines(programs: dict[str, dict[str, float]], topology: Topology) -> list[str]:
  """Bytes per chip by kind while each program runs."""
  rows = [("GiB per chip", *programs)]
  rows += [(kind, *(gib(programs[p].get(kind, 0.0)) for p in programs)) for kind in KINDS]
  rows.append(("in all", *(gib(total(programs[p])) for p in programs)))
  rows.append(
    (
      f"of {gib(topology.chip.memory)}",
      *(f"{100 * total(programs[p]) / topology.chip.memory:.0f}%" for p in programs),
    )
  )
  return table(rows, (16,) + (12,) * len(programs))


def phase_lines(phases: list[Phase], topology: Topology) -> list[str]:
  rows = [("phase", "FLOPs", "moved / chip", "least time", "bound by")]
  for phase in phases:
    seconds, bound = phase.seconds(topology.chip, topology.count)
    rows.append(
      (phase.name, scaled(phase.flops, "FLOP"), scaled(phase.moved, "B"), f"{seconds:.2f} s", bound)
    )
  return table(rows, (24, 14, 14, 12, 10))


def link_lines(collectives: dict[str, dict[str, float]], topology: Topology) -> list[str]:
  """Bytes sent by a chip, by kind of collective."""
  kinds = list(next(iter(collectives.values())))
  rows = [("GiB sent per chip", *collectives)]
  rows += [(kind, *(gib(collectives[p][kind]) for p in collectives)) for kind in kinds]
  seconds = {p: sum(collectives[p].values()) / topology.chip.link_rate for p in collectives}
  rows.append(("least time", *(f"{seconds[p]:.2f} s" for p in collectives)))
  return table(rows, (20,) + (12,) * len(collectives))


def share_lines(
  ours: dict[str, float], plain: dict[str, float], variant: str, base: str
) -> list[str]:
  """The cost of a variant compared with another, for each quantity."""
  rows = [("", base, variant, "more")]
  for name, value in ours.items():
    show = gib if name.startswith("GiB") else lambda x: f"{x / 1e15:.3f}"
    more = "-" if not plain[name] else f"{100 * (value / plain[name] - 1):+.2f}%"
    rows.append((name, show(plain[name]), show(value), more))
  return table(rows, (34, 12, 12, 10))
