"""Did a run over-optimise? Means of the gold reward over consecutive bins of steps: start, peak,
last.
"""

from typing import NamedTuple

import numpy as np

BIN = 12  # steps


class Turnover(NamedTuple):
  """Gold reward of one arm and seed, as means over bins of `BIN` steps."""

  start: float  # of the first bin
  peak: float  # of the highest bin
  last: float  # of the last whole bin
  proxy_rises: bool  # the frozen proxy ends above where it stood in the bin of the gold peak
  over_optimised: bool  # gold rose, then lost at least half of its gain while the proxy kept rising


def turnover(gold, proxy) -> Turnover:
  """Per-step series of gold and frozen proxy reward, one entry a step, at least `BIN` of them
  (else one bin).
  """
  size = min(BIN, len(gold))
  gold, proxy = (
    np.asarray(x, float)[: len(x) // size * size].reshape(-1, size).mean(1) for x in (gold, proxy)
  )
  start, peak, last = gold[0], gold.max(), gold[-1]
  rises = bool(proxy[-1] > proxy[gold.argmax()])
  return Turnover(
    start, peak, last, rises, bool(peak > start and peak - last >= 0.5 * (peak - start) and rises)
  )


def turnover_table(rows: list[dict]) -> str:
  """A text table with one line for each (arm, seed) of `rows`, each row a dict with arm, seed
  and turnover.
  """
  lines = [
    f"{'arm':<14} {'seed':>4}  {'start':>6} {'peak':>6} {'last':>6}  proxy rises  over-optimised"
  ]
  for row in rows:
    t = row["turnover"]

    def yes(x):
      return "yes" if x else "no"

    numbers = f"{t.start:6.2f} {t.peak:6.2f} {t.last:6.2f}"
    lines.append(
      f"{row['arm']:<14} {row['seed']:>4}  {numbers}  {yes(t.proxy_rises):<11}  "
      f"{yes(t.over_optimised)}"
    )
  for arm in dict.fromkeys(row["arm"] for row in rows):
    mine = [row["turnover"] for row in rows if row["arm"] == arm]
    last = np.array([t.last for t in mine])
    over = sum(t.over_optimised for t in mine)
    mean = (
      f"last gold {last.mean():.2f}, standard deviation {last.std(ddof=min(1, len(mine) - 1)):.2f}"
    )
    lines.append(f"{arm}: over-optimised on {over} of {len(mine)} seeds; {mean}")
  return "\n".join(lines)
