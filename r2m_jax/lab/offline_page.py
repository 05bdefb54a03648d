"""The tables of docs/holds.md, printed from the rows in the same folder."""

from pathlib import Path

import numpy as np

from r2m_jax.lab.offline import TARGETS
from r2m_jax.lab.offline_table import (
  DECIDES,
  EVIDENCE,
  EXTRA,
  FEATURES,
  PLACEBO_OF,
  WIDE_MEASURE,
  Columns,
  by_seed,
  difference,
  passes,
  shown,
)
from r2m_jax.lab.table import read_table
from r2m_jax.report import intervals

FROZEN = ("frozen", "")
CONTROLS = ("attended", "shuffled")  # features of the placebo table
SHOWN = tuple(name for name in FEATURES if name not in CONTROLS)
MAIN = tuple(name for name in EVIDENCE if name not in PLACEBO_OF)
FACTS = (
  ("step", "step", "{:.0f}"),
  ("kl_samples", "KL of the samples", "{:.2f}"),
  ("gold", "gold", "{:.2f}"),
  ("frozen", "frozen reward", "{:.2f}"),
  ("coverage", "coverage", "{:.2f}"),
  ("length", "length", "{:.1f}"),
  ("exponent", "exponent m", "{:.2f}"),
  ("ess", "effective share", "{:.2f}"),
  ("contrast_right", "contrast pairs right by gold", "{:.2f}"),
)


def columns_of(rows: list[dict]) -> Columns:
  """Rows as columns, values in float32."""
  kinds = {"seed": np.int64, "kl": float, "value": np.float32}
  return {
    name: np.array([row[name] for row in rows], kinds.get(name, object))
    for name in ("seed", "kl", "features", "evidence", "measure", "value")
  }


def read(path: Path) -> Columns:
  return read_table(path)[0]


def lines(head: list[str], body: list[list[str]]) -> str:
  """A table in Markdown."""
  rows = [head, ["---"] * len(head), *body]
  return "\n".join("| " + " | ".join(row) + " |" for row in rows)


def facts(columns: Columns) -> str:
  """Facts about the samples at each KL."""

  def values(kl, measure):
    mine = (columns["kl"] == kl) & (columns["measure"] == measure) & (columns["features"] == "")
    return columns["value"][mine].astype(float)

  body = []
  for kl in TARGETS:
    accuracy = intervals.interval(list(by_seed(columns, kl, *FROZEN).values()))
    row = [f"{kl:g}", str(accuracy.count)]
    row += [form.format(values(kl, name).mean()) for name, _, form in FACTS]
    level = f"{100 * accuracy.value:.1f} [{100 * accuracy.low:.1f}, {100 * accuracy.high:.1f}]"
    body.append([*row, level])
  head = ["KL", "seeds", *(title for _, title, _ in FACTS), "accuracy of the frozen reward, %"]
  return lines(head, body)


def against_frozen(columns: Columns, kl: float, names=MAIN, measure: str = "accuracy") -> str:
  """A table of points over the frozen reward; bold if the rule is met."""

  def cell(features, evidence):
    found = difference(columns, kl, (features, evidence, measure), FROZEN)
    return f"**{shown(found)}**" if passes(found) else shown(found)

  body = [[name, *(cell(features, name) for features in SHOWN)] for name in names]
  return lines(["evidence", *SHOWN], body)


def added(columns: Columns) -> str:
  """Cells that were not registered, with the chosen widths."""
  return against_frozen(columns, DECIDES, tuple(EXTRA))


def wide(columns: Columns) -> str:
  """All sorts of evidence with one wider prior, not registered."""
  return against_frozen(columns, DECIDES, MAIN + tuple(EXTRA), WIDE_MEASURE)


def levels(columns: Columns) -> str:
  """The accuracy itself at the KL of the rule, %."""

  def cell(features, evidence):
    values = by_seed(columns, DECIDES, features, evidence).values()
    return f"{100 * np.mean(list(values)):.1f}"

  body = [[name, *(cell(features, name) for features in SHOWN)] for name in MAIN]
  return lines(["evidence", *SHOWN], body)


def pieces(columns: Columns, kl: float) -> str:
  """The gain of each piece over its placebo."""

  def cell(features, name, placebo):
    return shown(difference(columns, kl, (features, name), (features, placebo)))

  body = [
    [f"{name} - {placebo}", *(cell(features, name, placebo) for features in SHOWN)]
    for placebo, name in (PLACEBO_OF | {"offline, same prompt": "offline"}).items()
  ]
  return lines(["difference", *SHOWN], body)


def states(columns: Columns, kl: float) -> str:
  """The gain of live states over frozen ones."""
  pairs = (("flat", "rte"), ("weighted", "flat"), ("weighted", "attended"))
  pairs += (("weighted", "shuffled"), ("live", "flat"), ("words", "flat"))
  body = [
    [name, *(shown(difference(columns, kl, (a, name), (b, name))) for a, b in pairs)]
    for name in MAIN
  ]
  return lines(["evidence", *(f"{a} - {b}" for a, b in pairs)], body)


def verdict(columns: Columns) -> list[tuple[str, str]]:
  """(features, evidence) of the cells that the registered rule keeps."""
  return [
    (features, name)
    for features in SHOWN
    for name in MAIN
    if passes(difference(columns, DECIDES, (features, name), FROZEN))
  ]


def text(columns: Columns) -> str:
  """All tables of the page."""
  parts = [facts(columns)]
  for kl in TARGETS:
    parts.append(f"KL {kl:g}, points over the frozen reward:\n\n{against_frozen(columns, kl)}")
  parts.append(f"KL {DECIDES:g}, points over the placebo:\n\n{pieces(columns, DECIDES)}")
  parts.append(f"KL {DECIDES:g}, points over other features:\n\n{states(columns, DECIDES)}")
  parts.append(f"KL {DECIDES:g}, the accuracy itself, %:\n\n{levels(columns)}")
  parts.append(f"KL {DECIDES:g}, not registered:\n\n{added(columns)}")
  parts.append(f"KL {DECIDES:g}, not registered, prior width 0.3:\n\n{wide(columns)}")
  return "\n\n".join(parts)
