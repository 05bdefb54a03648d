"""The contrasts of configs/fair.py and the KL of each arm, then the arms at equal steps, from a
laboratory's folder or from rows that were kept from one.

  python -m benchmarks.fair runs/fair                              # prints both tables
  python -m benchmarks.fair runs/fair --out=docs/lab_fair.parquet  # and keeps the rows
  python -m benchmarks.fair docs/lab_fair.parquet

The kept file has one row per arm, seed and step, and the columns in `KEPT`.
"""

import sys
from pathlib import Path

import numpy as np
from absl import app, flags

from r2m_jax.configs import fair
from r2m_jax.lab import contrasts
from r2m_jax.lab.table import KEYS, Curves, curves_of, joined, read_table, write_table
from r2m_jax.report import intervals
from r2m_jax.report.summary import number

OUT = flags.DEFINE_string("out", "", "file for the kept rows")
KEPT = (
  "reward/gold",
  "reward/frozen",
  "reward/used_std",
  "reward/within_corr",
  "r2m/pair_disagreement",
  "kl",
  "kl_weight",
  "length",
  "truncated",
  "gold/coverage",
  "certify/kept",
)


def rows_of(folder: Path) -> dict[str, np.ndarray]:
  """The kept columns of all arms in the table of a laboratory's folder."""
  columns = None
  for path in sorted((folder / "table").glob("*.parquet")):
    mine = read_table(path)[0]
    names = [name for name in (*KEYS, *KEPT) if name in mine]
    small = {name: mine[name] for name in names}
    columns = small if columns is None else joined(columns, small)
  if columns is None:
    raise SystemExit(f"{folder} has no table/*.parquet: run configs/fair.py into it first")
  return columns


def curves_by_arm(columns: dict[str, np.ndarray]) -> dict:
  """arm -> factor -> curves, from kept rows."""
  arms = columns["arm"].astype(str)
  found = {}
  for arm in dict.fromkeys(arms):
    mine = arms == arm
    found[arm] = curves_of({name: values[mine] for name, values in columns.items()})
  return found


EQUAL_HEAD = [
  "arm",
  "n",
  "gold in the end",
  "median",
  "collapsed",
  "KL",
  "minus scaled: in the end",
]
EQUAL_HEAD += ["over all steps"]
EQUAL_NOTE = (
  "The end is the mean of the last eighth of the steps. Intervals are 95% over seeds. Differences are "
  "paired by seed, with `scaled` of as many steps and the same learning rate. Descriptive: nothing "
  "corrects for the number of comparisons."
)


def at_equal_steps(curves: dict) -> str:
  """The arms of E2 and E3, whose KL weight is fixed, beside their `scaled`; "" without any."""
  rows = []
  for name, found in curves.items():
    if ".kl" in name:
      continue
    mine, speed = found[1.0], name.partition(".")[2].partition("_")[0]
    control = curves.get(f"scaled.{speed}" if speed in ("short", "slow") else "scaled")
    rows.append(equal_cells(name, mine, control and control[1.0]))
  if not rows:
    return ""
  return contrasts.aligned("Arms at equal steps", EQUAL_HEAD, rows, EQUAL_NOTE)


def equal_cells(name: str, mine: Curves, control: Curves | None) -> list[str]:
  """The cells of an arm, under `EQUAL_HEAD`."""
  gold = mine.metrics["reward/gold"]
  steps = gold.shape[1]
  last = slice(steps - max(1, steps // 8), None)
  start, end = gold[:, : max(1, steps // 10)].mean(1), gold[:, last].mean(1)
  cells = [name, str(len(end)), shown(end), number(float(np.median(end)), 2)]
  cells += [f"{(end < start).mean():.0%}", shown(mine.metrics["kl"][:, last].mean(1), 1)]
  if control is None or name.partition(".")[0] == "scaled":
    return [*cells, "", ""]
  both = [seed for seed in mine.seeds if seed in control.seeds]
  left, right = (
    curves.metrics["reward/gold"][[curves.seeds.index(seed) for seed in both]]
    for curves in (mine, control)
  )
  return [*cells, shown((left - right)[:, last].mean(1)), shown((left - right).mean(1))]


def shown(values: np.ndarray, digits: int = 2) -> str:
  found = intervals.interval(values)
  return (
    f"{number(found.value, digits)} [{number(found.low, digits)}, {number(found.high, digits)}]"
  )


def curves_given(argv: list[str]) -> dict:
  """The curves of the folder or file in the command's one argument. They are kept in --out, if it is
  given.
  """
  if len(argv) != 2:
    sys.exit(f"give a laboratory's folder or a file of kept rows: {argv[0]} runs/mine")
  source = Path(argv[1])
  columns = rows_of(source) if source.is_dir() else read_table(source)[0]
  if OUT.value:
    out = Path(OUT.value)
    write_table(out, columns)
    print(f"{out}: {len(columns['arm'])} rows, {out.stat().st_size / 2**20:.1f} MiB")
  return curves_by_arm(columns)


def main(argv) -> None:
  curves = curves_given(argv)
  print(contrasts.text(fair.get_config(), curves) or "no arm with a held KL")
  if equal := at_equal_steps(curves):
    print("\n" + equal)


if __name__ == "__main__":
  app.run(main)
