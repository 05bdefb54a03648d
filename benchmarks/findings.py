"""Holds the numbers of docs/findings.md against the rows of docs/lab.csv, and prints the differences.

  python -m benchmarks.findings      # exit status 1 if there is one

Two kinds of numbers are held: those of the verdict, each of which docs/findings_rows.csv connects
with a row, and the cells of the table of arms.
"""

import csv
import re
import sys
from pathlib import Path

DOCS = Path(__file__).parents[1] / "docs"
NUMBER = re.compile(r"-?\d+\.?\d*")
# columns of the table of arms, from the third: (measure, what it is compared with)
COLUMNS = [
  ("final", ""),
  ("kl_final", ""),
  ("gold_at_kl_2", ""),
  ("gold_at_kl_4", ""),
  ("final", "scaled"),
  ("gold_at_kl_2", "scaled"),
]


def rows_of(file: Path) -> list[dict[str, str]]:
  with open(file, newline="", encoding="utf-8") as stream:
    return list(csv.DictReader(stream))


def matches(text: str, row: dict[str, str]) -> bool:
  """Whether `text`, a value with or without its interval, is the row's, rounded as it is printed."""
  scale = 100 if "%" in text else 1
  printed = NUMBER.findall(text)
  names = ("value", "low", "high")[: len(printed)]
  for shown, name in zip(printed, names):
    digits = len(shown.partition(".")[2])
    if abs(scale * float(row[name]) - float(shown)) > 0.5 * 10**-digits + 1e-9:
      return False
  return True


def claims(text: str) -> list[tuple[str, tuple[str, str, str, str]]]:
  """(printed number, (arm, KL weight, measure, against)) of everything that is held."""
  found = []
  for row in rows_of(DOCS / "findings_rows.csv"):
    key = (row["arm"], row["beta"], row["measure"], row["against"])
    found.append((row["text"], key))
  for line in re.findall(r"^\| `[^`]+` \| \d.*\|$", text, re.M):
    arm, beta, *cells = [cell.strip(" `") for cell in line.strip("|").split("|")]
    for cell, (measure, against) in zip(cells, COLUMNS):
      if value := re.sub(r"\(n \d+\)|–", "", cell).strip():
        found.append((value, (arm, beta, measure, against)))
  return found


def differences() -> tuple[int, list[str]]:
  """How many numbers were held, and a line for each that is not in the text or not the row's."""
  text = " ".join((DOCS / "findings.md").read_text(encoding="utf-8").split())
  raw = (DOCS / "findings.md").read_text(encoding="utf-8")
  table = {}
  for row in rows_of(DOCS / "lab.csv"):
    table[row["arm"], row["beta"], row["measure"], row["against"]] = row
  held = claims(raw)
  wrong = []
  for printed, key in held:
    if printed not in text:
      wrong.append(f"{printed} ({', '.join(key)}) does not stand in findings.md")
    elif key not in table:
      wrong.append(f"{printed}: lab.csv has no row {', '.join(key)}")
    elif not matches(printed, table[key]):
      wrong.append(f"{printed}: the row {', '.join(key)} has {dict(table[key])}")
  return len(held), wrong


def main() -> int:
  count, wrong = differences()
  print("\n".join([*wrong, f"{count} numbers held, {len(wrong)} differences"]))
  return int(bool(wrong))


if __name__ == "__main__":
  sys.exit(main())
