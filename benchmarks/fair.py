"""The contrasts of configs/fair.py and the KL of each arm, from a laboratory's folder or from rows
that were kept from one.

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
from r2m_jax.lab.table import KEYS, curves_of, joined, read_table, write_table

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


def main(argv) -> None:
  if len(argv) != 2:
    sys.exit(
      "give a laboratory's folder or a file of kept rows: python -m benchmarks.fair runs/fair"
    )
  source = Path(argv[1])
  columns = rows_of(source) if source.is_dir() else read_table(source)[0]
  if OUT.value:
    write_table(Path(OUT.value), columns)
    print(
      f"{OUT.value}: {len(columns['arm'])} rows, {Path(OUT.value).stat().st_size / 2**20:.1f} MiB"
    )
  print(contrasts.text(fair.get_config(), curves_by_arm(columns)) or "no arm with a held KL")


if __name__ == "__main__":
  app.run(main)
