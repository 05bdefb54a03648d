"""Whether a proxy with contrast pairs, or certified advantages, holds a reward: the contrasts of
configs/holds.py and the bars of docs/lab.md, from a laboratory's folder or from kept rows.

  python -m benchmarks.holds runs/holds                                # prints the tables
  python -m benchmarks.holds runs/holds --out=docs/lab_holds.parquet   # and keeps the rows
  python -m benchmarks.holds docs/lab_holds.parquet
  python -m benchmarks.holds docs/lab_certified.parquet --tried=certified
"""

import numpy as np
from absl import app, flags

from benchmarks.fair import curves_given
from r2m_jax.configs import holds
from r2m_jax.lab import contrasts
from r2m_jax.lab.table import Curves
from r2m_jax.report.summary import number

TRIED = flags.DEFINE_enum("tried", "", list(holds.TRIED), "of configs/holds.py")
SMOOTH = 10  # steps of the moving mean whose maximum is the peak
BAR_HEAD = ["arm", "end / peak", "length / vanilla's", "coverage - vanilla's", "frozen proxy"]
BAR_NOTE = (
  "Means over seeds. The end is the mean of the last lab.tail steps, the peak the maximum of a moving "
  f"mean over {SMOOTH} steps. The bars: at least 0.9, within 0.75 and 1.25, and not below 0."
)


def bars(config, curves: dict) -> str:
  """What an arm must also keep, beside `vanilla` at the same held KL."""
  rows = []
  for name, found in curves.items():
    usual = curves.get(f"vanilla.{name.rpartition('.')[2]}")
    if usual is not None:
      rows.append([name, *bar_cells(found[1.0], usual[1.0], config.lab.tail)])
  return contrasts.aligned("Bars", BAR_HEAD, rows, BAR_NOTE)


def bar_cells(mine: Curves, usual: Curves, tail: int) -> list[str]:
  """The cells of an arm, under `BAR_HEAD`, over the seeds that both arms have."""
  both = [seed for seed in mine.seeds if seed in usual.seeds]

  def mean(curves: Curves, key: str) -> np.ndarray:
    return curves.metrics[key][[curves.seeds.index(seed) for seed in both]].mean(0)

  def end(curves: Curves, key: str) -> float:
    return float(mean(curves, key)[-tail:].mean())

  peak = np.convolve(mean(mine, "reward/gold"), np.full(SMOOTH, 1 / SMOOTH), "valid").max()
  coverage = end(mine, "gold/coverage") - end(usual, "gold/coverage")
  return [
    number(end(mine, "reward/gold") / peak, 2),
    number(end(mine, "length") / end(usual, "length"), 2),
    number(coverage, 3),
    number(end(mine, "reward/frozen"), 2),
  ]


def main(argv) -> None:
  config, curves = holds.get_config(TRIED.value), curves_given(argv)
  print(contrasts.text(config, curves) or "no arm with a held KL")
  print("\n" + bars(config, curves))


if __name__ == "__main__":
  app.run(main)
