"""The table of docs/premise.md: the paper's figures next to those of SmolLM2 and of the toy, from the
rows of docs/checks.csv.

  python -m benchmarks.premise_page                                 # prints the table
  # first keeps these numbers:
  python -m benchmarks.premise_page --add FILE.csv ... --toy RUN ... --notes RUN ...

FILE.csv is from benchmarks.premise or benchmarks.premise_notes. RUN has been read by task=analyse:
a workdir of configs/quickstart.py named toy_SEED, or WORKDIR/runs/r2m/seed_SEED of
configs/smollm2_notes.py. Numbers of the same name are replaced. Intervals of SmolLM2 before RL are
over prompts, all others over runs.
"""

import argparse
import csv
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np

from benchmarks import premise
from r2m_jax.report import intervals
from r2m_jax.report.intervals import Interval
from r2m_jax.report.summary import number

CHECKS = Path(__file__).parents[1] / "docs" / "checks.csv"
TOY, RUN = "toy_", "notes_r2m_"  # start of the names of the toy's runs, of the notes task's
MODELS = {  # column -> name in checks.csv
  "SmolLM2, HH": "hh_helpful_base_train",
  "SmolLM2, UltraFeedback": "ultrafeedback_train",
  "SmolLM2, notes": "notes",  # and `RUN` for what is measured at the end of R2M
}

Key = tuple[str, str, str, str]  # check, reading, layer, measure
Rows = dict[str, dict[Key, Interval]]  # by name


class Line(NamedTuple):
  """A check. `model`, `toy` and `run` find its value in the rows of one name; None: it has none."""

  what: str
  paper: str
  model: Key | Callable | None
  toy: Key | None
  digits: int = 2
  scale: int = 1  # of the printed value
  run: Key | None = None  # in the runs of the notes task; None: as in those of the toy


def largest_gap(rows: dict[Key, Interval]) -> Interval:
  """The largest gap of fig. 1 over all layers and readings but those along a probe's direction."""
  found = [
    x
    for (check, reading, _, measure), x in rows.items()
    if check == "fig. 1" and measure == "gap" and "probe" not in reading
  ]
  return max(found, key=lambda x: x.value)


def both(what: str, measure: str, digits: int = 0, scale: int = 1) -> Line:
  """What the attention reads before training, under one name for SmolLM2 and the toy."""
  toy = ("checks", measure, "", "r2m, before")
  return Line(what, "", ("attention", "none", "", measure), toy, digits, scale)


def table_5(what: str, paper: str, measure: str, digits: int = 2) -> Line:
  model = ("table 5", "samples", "last", measure)
  return Line(what, paper, model, ("hacking", "r2m", "", measure), digits)


def after(what: str, paper: str, check: str, digits: int = 0, scale: int = 1) -> Line:
  """A check at the end of R2M."""
  return Line(what, paper, None, ("checks", check, "", "r2m, after"), digits, scale)


def before(what: str, paper: str, model: str, check: str, digits: int, scale: int = 1) -> Line:
  """A check before training; `model` is the measure of SmolLM2's random attention."""
  key = ("attention", "none", "", model) if model else None
  return Line(what, paper, key, ("checks", check, "", "r2m, before"), digits, scale)


REPLIES = ("fig. 2", "replies to one prompt, linear reward", "last", "correlation")
MARGIN = ("fig. 2", "replies to one prompt, margin", "last", "correlation")
SHARE = "attention's share of the variance"
POINTS = "right minus no attention, points"
ACCURACY = "accuracy minus frozen, points"
GROWTH = "deviation, used / frozen"

LINES = (
  Line(
    "fig. 1: cosine of states, same label minus across",
    "0.21 to 0.23",
    ("fig. 1", "raw, mean", "30", "gap"),
    ("similarity", "start", "final", "gap"),
    4,
  ),
  Line(
    "the same, states centred",
    "",
    ("fig. 1", "centred, mean", "30", "gap"),
    ("similarity", "start", "final", "gap, centred"),
    4,
  ),
  Line("the largest of all layers and readings", "", largest_gap, None, 3),
  Line(
    "pairs that a linear probe of the states orders right, %",
    "",
    ("probe", "last", "30", "right, %"),
    None,
    0,
  ),
  Line(
    "fig. 2: correlation of cosine and difference of reward, one prompt",
    "-0.68",
    REPLIES,
    ("differences", "start, frozen proxy", "", "correlation"),
  ),
  Line(
    "the same with gold, or the data's margin, for the reward",
    "",
    MARGIN,
    ("differences", "start, gold", "", "correlation"),
  ),
  Line(
    "fig. 2 after R2M, used reward",
    "",
    None,
    ("differences", "r2m, used reward", "", "correlation"),
    run=("differences", "r2m, r2m reward", "", "correlation"),
  ),
  table_5("table 5: cosine among sound replies", "0.75", "both sound"),
  table_5("table 5: among hacking replies", "0.67", "both hacking"),
  table_5("table 5: across", "0.45", "across"),
  table_5("table 5: within minus across", "0.26", "gap", 3),
  before(
    "attention's share of the reward's variance, untrained, %",
    "",
    "share of the variance",
    SHARE,
    0,
    100,
  ),
  after("the same at the end of R2M, %", "", SHARE, 0, 100),
  Line(
    "table 3: accuracy of the reward without attention, %",
    "72.3",
    ("attention", "no attention", "", "right, %"),
    ("accuracy", "r2m, start", "", "frozen"),
    0,
  ),
  before("table 3: points from the untrained attention", "-4.0, -3.1", POINTS, ACCURACY, 1),
  after("the same at the end of R2M", "5.1, 6.3", ACCURACY, 1),
  after("dose: change of phi, %", "about 1", "change of phi, %", 2),
  after("dose: change of W_o, %", "about 1", "change of wo, %", 2),
  before("growth: deviation of the reward, used / frozen, untrained", "", "", GROWTH, 2),
  after("the same at the end of R2M", "", GROWTH, 2),
  after("self-labels that gold confirms, at the end, %", "", "self-labels right, step 100, %"),
  after("the frozen reward on these pairs, %", "", "frozen reward right on them, step 100, %"),
  both("states that the untrained attention can read", "states that it can read"),
  both("states that it reads: exp of the entropy", "states that it reads (exp of the entropy)"),
  both("its largest weight, %", "largest weight", 0, 100),
  both("its weight on the first token, %", "weight of the first token", 1, 100),
  both("its weight on the template's tokens, %", "weight of the template's tokens", 0, 100),
  both("the template's share of the tokens, %", "share of the template's tokens", 0, 100),
)


def read(path: Path = CHECKS) -> Rows:
  found: Rows = {}
  with open(path, newline="", encoding="utf-8") as file:
    for row in csv.DictReader(file):
      key = row["check"], row["reading"], row["layer"], row["measure"]
      numbers = (float(row[name]) for name in ("value", "low", "high"))
      found.setdefault(row["data"], {})[key] = Interval(*numbers, int(row["count"]))
  return found


def keep(files: list[Path], runs: list[Path], notes: list[Path]) -> None:
  """Puts the rows of all into `CHECKS`, instead of those with the same names.

  Args:
    notes: runs of the notes task, .../r2m/seed_S each.
  """
  rows = [row for file in files for row in lines_of(file)]
  for run in runs:
    if not run.name.startswith(TOY):
      raise SystemExit(f"--toy has {run}: name the workdir {TOY}SEED, such as {TOY}0")
    rows += premise.written(premise.of_run(run))
  for run in notes:
    rows += premise.written(premise.of_run(run, RUN + run.name.removeprefix("seed_")))
  names = {row[0] for row in rows}
  kept = [row for row in lines_of(CHECKS) if row[0] not in names]
  with open(CHECKS, "w", newline="", encoding="utf-8") as file:
    csv.writer(file, lineterminator="\n").writerows([premise.HEAD, *kept, *rows])


def lines_of(path: Path) -> list[list[str]]:
  """The rows of a file without its head."""
  with open(path, newline="", encoding="utf-8") as file:
    return list(csv.reader(file))[1:]


def of_model(line: Line, rows: dict[Key, Interval]) -> Interval | None:
  """The value of SmolLM2 on one data set."""
  if line.model is None or not rows:
    return None
  return line.model(rows) if callable(line.model) else rows.get(line.model)


def of_runs(key: Key | None, rows: Rows, start: str) -> Interval | None:
  """The mean over the runs whose names have this start."""
  runs = [mine for name, mine in rows.items() if name.startswith(start)]
  found = [mine[key].value for mine in runs if key in mine]
  return intervals.interval(np.array(found)) if found else None


def cell(found: Interval | None, line: Line) -> str:
  if found is None:
    return "–"
  value, low, high = (number(line.scale * x, line.digits) for x in found[:3])
  return f"{value} [{low}, {high}]" if np.isfinite(found.low) else value


def table(rows: Rows) -> str:
  """The table in Markdown."""
  count = sum(name.startswith(TOY) for name in rows)
  lines = [["", "the paper", *MODELS, f"the toy, {count} seeds"]]
  lines.append(["---"] * len(lines[0]))
  for line in LINES:
    found = [of_model(line, rows.get(name, {})) for name in MODELS.values()]
    if line.model is None:
      found[-1] = of_runs(line.run or line.toy, rows, RUN)
    cells = [cell(one, line) for one in (*found, of_runs(line.toy, rows, TOY))]
    lines.append([line.what, line.paper or "–", *cells])
  return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def main() -> int:
  parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
  parser.add_argument("--add", type=Path, default=[], nargs="*", help="CSVs of benchmarks.premise")
  parser.add_argument("--toy", type=Path, default=[], nargs="*", help="analysed runs of the toy")
  parser.add_argument(
    "--notes", type=Path, default=[], nargs="*", help="of the notes task, r2m/seed_S"
  )
  args = parser.parse_args()
  if args.add or args.toy or args.notes:
    keep(args.add, args.toy, args.notes)
  print(table(read()))
  return 0


if __name__ == "__main__":
  sys.exit(main())
