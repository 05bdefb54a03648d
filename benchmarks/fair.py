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


EQUAL_HEAD = ["arm", "n", "gold in the end", "median", "over all steps", "collapsed", "KL"]
EQUAL_HEAD += ["spread of the reward"]
PAIRS_HEAD = ["difference", "n", "in the end", "over all steps", "more gold in the end"]
EQUAL_NOTE = (
  "The end is the mean of the last eighth of the steps. The spread is the standard deviation of the "
  "used reward within a prompt, in the end. Intervals are 95% over seeds, and differences are paired by "
  "seed. Descriptive: nothing corrects for the number of comparisons."
)


def at_equal_steps(curves: dict, of: str) -> str:
  """The arms of "E2" or "E3", whose KL weight is fixed, and R2M minus its controls; "" without any."""
  names = [name for name in curves if ".kl" not in name and (speed_of(name) == "") == (of == "E2")]
  if not names:
    return ""
  mine = {name: curves[name][1.0] for name in names}
  rows = [equal_cells(name, found) for name, found in mine.items()]
  table = contrasts.aligned(f"{of}: arms at equal steps", EQUAL_HEAD, rows, "").rstrip()
  pairs = [pair_cells(a, b, mine) for a in mine for b in rivals_of(a) if b in mine]
  return f"{table}\n\n" + contrasts.aligned("Differences", PAIRS_HEAD, pairs, EQUAL_NOTE)


def speed_of(name: str) -> str:
  """How an arm of E3 stays before the peak, "short" or "slow"; "" for the others."""
  speed = name.partition(".")[2].partition("_")[0]
  return speed if speed in ("short", "slow") else ""


def rivals_of(name: str) -> list[str]:
  """The arms that an arm of E2 or E3 is compared with: `scaled` of as many steps; for R2M also its
  scale alone and its direction alone at the same dose; for its direction `vanilla`, whose reward has
  that scale.
  """
  variant, _, suffix = name.partition(".")
  own = f".{suffix}" if suffix else ""
  speed = speed_of(name)
  found = ["scaled" + (f".{speed}" if speed else "")]
  if variant == "r2m":
    found += [f"matched_scale{own}", f"renormed{own}"]
  if variant == "renormed":
    found.append("vanilla")
  return [rival for rival in found if rival != name]


def last_steps(gold: np.ndarray) -> slice:
  steps = gold.shape[1]
  return slice(steps - max(1, steps // 8), None)


def equal_cells(name: str, mine: Curves) -> list[str]:
  """The cells of an arm, under `EQUAL_HEAD`."""
  gold = mine.metrics["reward/gold"]
  last = last_steps(gold)
  start, end = gold[:, : max(1, gold.shape[1] // 10)].mean(1), gold[:, last].mean(1)
  cells = [name, str(len(end)), shown(end), number(float(np.median(end)), 2), shown(gold.mean(1))]
  cells += [f"{(end < start).mean():.0%}", shown(mine.metrics["kl"][:, last].mean(1), 1)]
  return [*cells, shown(mine.metrics["reward/used_std"][:, last].mean(1))]


def pair_cells(left: str, right: str, arms: dict[str, Curves]) -> list[str]:
  """The cells of the difference of two arms, under `PAIRS_HEAD`."""
  both = [seed for seed in arms[left].seeds if seed in arms[right].seeds]
  a, b = (
    arms[name].metrics["reward/gold"][[arms[name].seeds.index(seed) for seed in both]]
    for name in (left, right)
  )
  end = (a - b)[:, last_steps(a)].mean(1)
  cells = [f"{left} - {right}", str(len(both)), shown(end), shown((a - b).mean(1))]
  return [*cells, f"{(end > 0).sum()} of {len(both)}"]


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
  for of in ("E2", "E3"):
    if equal := at_equal_steps(curves, of):
      print("\n" + equal)


if __name__ == "__main__":
  app.run(main)
