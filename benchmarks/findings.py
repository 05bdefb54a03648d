"""Checks the numbers of docs/findings.md, docs/findings_text.md and docs/premise.md, and prints the
differences.

  python -m benchmarks.findings      # exit status 1 if there is one

A number is right if it is the rounded value of a row. docs/findings_rows.csv connects the numbers
of the text with rows of docs/lab.csv, docs/lab_text.csv or docs/checks.csv; the cells of the tables
named in `TABLES` are connected by row and column. A number from another source, such as the paper,
has a line with its source instead of a row. A number without a row or a source is a difference too.
The table of docs/premise.md must be the one that benchmarks.premise_page prints.
"""

import csv
import re
import sys
from pathlib import Path
from typing import NamedTuple

from benchmarks import premise_page

DOCS = Path(__file__).parents[1] / "docs"
PAGES = ("findings", "findings_text", "premise")
FILES = ("lab", "lab_text", "checks")
NUMBER = re.compile(r"-?\d+\.?\d*")
FEWEST = 8  # with fewer seeds a cell has no value, because only seeds that move far reach it

KEYS = ("arm", "beta", "measure", "against")
Key = tuple[str, str, str, str]  # of `KEYS`; of checks.csv: data, layer, measure, reading


class Table(NamedTuple):
  """A table whose cells are rows. `columns` are (measure, against) of the cells after the labels,
  which are an arm and, if `beta` is "", its KL weight."""

  page: str
  start: str  # of its head
  file: str
  beta: str
  seeds: int
  columns: tuple[tuple[str, str], ...]


TABLES = (
  Table(
    "findings",
    "| arm | KL weight |",
    "lab",
    "",
    10,
    (
      ("final", ""),
      ("kl_final", ""),
      ("final", "scaled"),
      ("gold_at_kl_2", "scaled"),
      ("gold_at_kl_4", "scaled"),
    ),
  ),
  Table(
    "findings_text",
    "| arm | gold, end |",
    "lab_text",
    "0.02",
    3,
    (
      ("final", ""),
      ("peak", ""),
      ("area", ""),
      ("gold_at_kl_4", ""),
      ("gold_at_kl_12", ""),
      ("frozen_final", ""),
      ("kl_final", ""),
      ("length_final", ""),
      ("truncated_final", ""),
    ),
  ),
  Table(
    "findings_text",
    "| minus `scaled` |",
    "lab_text",
    "0.02",
    3,
    (
      ("final", "scaled"),
      ("area", "scaled"),
      ("gold_at_kl_2", "scaled"),
      ("gold_at_kl_4", "scaled"),
      ("gold_at_kl_12", "scaled"),
    ),
  ),
)


class Claim(NamedTuple):
  """A printed number: from a row of `file`, or, if `file` is not one of `FILES`, from that
  source.
  """

  page: str
  text: str
  file: str
  key: Key
  seeds: int | None = None  # number of seeds that the page gives


def rows_of(file: Path) -> list[dict[str, str]]:
  with open(file, newline="", encoding="utf-8") as stream:
    return list(csv.DictReader(stream))


def read(page: str) -> str:
  return (DOCS / f"{page}.md").read_text(encoding="utf-8")


def matches(text: str, row: dict[str, str]) -> bool:
  """Whether `text`, a value with or without its interval, equals the row's value, rounded as
  printed.
  """
  scale = 100 if "%" in text else 1
  printed = NUMBER.findall(text)
  names = ("value", "low", "high")[: len(printed)]
  for shown, name in zip(printed, names):
    digits = len(shown.partition(".")[2])
    if not abs(scale * float(row[name]) - float(shown)) <= 0.5 * 10**-digits + 1e-9:
      return False
  return True


def lines_of(table: Table) -> list[str]:
  """The body of a table on its page."""
  lines = read(table.page).splitlines()
  start = next(i for i, line in enumerate(lines) if line.startswith(table.start)) + 2
  stop = next(i for i, line in enumerate([*lines[start:], ""]) if not line.startswith("|"))
  return lines[start : start + stop]


def cells_of(table: Table) -> list[Claim]:
  """The cells with a number, and the cells that only give the number of seeds."""
  found = []
  for line in lines_of(table):
    arm, *cells = [cell.strip(" `†") for cell in line.strip("|").split("|")]
    beta = table.beta or cells.pop(0)
    for cell, (measure, against) in zip(cells, table.columns, strict=True):
      against = f"{against} at {beta}" if against else ""
      text, _, counted = cell.partition("(n ")
      if not NUMBER.search(cell):
        continue
      seeds = int(counted.rstrip(")")) if counted else table.seeds
      found.append(
        Claim(table.page, text.strip(), table.file, (arm, beta, measure, against), seeds)
      )
  return found


def claims() -> list[Claim]:
  """Everything that is checked."""
  found = [claim for table in TABLES for claim in cells_of(table)]
  for row in rows_of(DOCS / "findings_rows.csv"):
    key = (row["arm"], row["beta"], row["measure"], row["against"])
    found.append(Claim(row["page"], row["text"], row["source"], key))
  return found


def plain(page: str) -> str:
  """The page's text on one line, without code, links and the tables that are rows."""
  text = read(page).replace(premise_table(), "")
  for table in TABLES:
    if table.page == page:
      text = text.replace("\n".join(lines_of(table)), "")
  text = re.sub(r"```.*?```|`[^`]*`|\]\([^)]*\)", " ", text, flags=re.S)
  return " ".join(re.sub(r"\d+(\.\d+)?e-?\d+", " ", text).split())


def premise_table() -> str:
  return premise_page.table(premise_page.read(DOCS / "checks.csv"))


def whole(text: str) -> re.Pattern:
  """Finds `text` where it is not part of a longer number."""
  return re.compile(rf"(?<![\d.-]){re.escape(text)}(?![\d%]|\.\d)")


def without_source(page: str, held: list[Claim]) -> list[str]:
  """Numbers of a page with a decimal point, a percent sign or an interval that no claim covers."""
  text = plain(page)
  for claim in sorted(held, key=lambda claim: -len(claim.text)):
    text = whole(claim.text).sub(" ", text) if claim.page == page and claim.text else text
  left = re.findall(r"-?\d+\.\d+|\d+%|\[-?\d[^\]]*\]", text)
  return [f"{page}.md: {number} has no row and no source" for number in left]


def wrong_with(claim: Claim, row: dict[str, str] | None, there: str) -> str:
  """What is wrong with a claim, "" if it is right; `there` is the text of its page."""
  shown = f"{claim.text} ({', '.join(filter(None, claim.key)) or claim.file})"
  if claim.text and not whole(claim.text).search(there):
    return f"{shown} is not in {claim.page}.md"
  if claim.file not in FILES:
    return ""
  if row is None:
    return f"{shown}: {claim.file}.csv has no such row"
  if claim.text and not matches(claim.text, row):
    return f"{shown}: the row has {dict(row)}"
  if claim.seeds is not None and claim.seeds != int(row["seeds"]):
    return f"{shown}: the row has {row['seeds']} seeds and not {claim.seeds}"
  if claim.text and claim.file == "lab" and int(row["seeds"]) < FEWEST:
    return f"{shown}: {row['seeds']} seeds are too few for a value"
  return ""


def differences() -> tuple[int, int, list[str]]:
  """The number of values compared with rows, the number with another source, and a line for each
  wrong one.
  """
  table: dict[tuple[str, Key], dict[str, str]] = {}
  for file in FILES:
    names = ("data", "layer", "measure", "reading") if file == "checks" else KEYS
    for row in rows_of(DOCS / f"{file}.csv"):
      first, second, third, last = (row[name] for name in names)
      table[file, (first, second, third, last)] = row
  texts = {page: " ".join(read(page).split()) for page in PAGES}
  held = claims()
  found = [wrong_with(c, table.get((c.file, c.key)), texts[c.page]) for c in held]
  wrong = [line for line in found if line]
  if premise_table() not in read("premise"):
    wrong.append("premise.md: its table is not the one that benchmarks.premise_page prints")
  wrong += [line for page in PAGES for line in without_source(page, held)]
  of_rows = sum(claim.file in FILES for claim in held)
  return of_rows, len(held) - of_rows, wrong


def main() -> int:
  of_rows, named, wrong = differences()
  counts = f"{of_rows} numbers compared with rows, {named} from a named source"
  print("\n".join([*wrong, f"{counts}, {len(wrong)} differences"]))
  return int(bool(wrong))


if __name__ == "__main__":
  sys.exit(main())
