"""Summary numbers from the laboratory's table: one value per seed for each measure, then means and
paired differences.

A row of summary.csv is a measure of an arm at one KL weight, with its 95% interval over seeds. If
`against` names another arm, it is the mean difference over the seeds that both have, at the
settings chosen for each. "ARM at BETA" is that arm at the KL weight of the row.
"""

import csv
import io
from pathlib import Path
from typing import NamedTuple

import numpy as np

from r2m_jax.algorithm.variants import VARIANTS
from r2m_jax.lab import stats
from r2m_jax.lab.table import Curves, read_arms, read_table, write_table
from r2m_jax.report import intervals
from r2m_jax.report.summary import window_of
from r2m_jax.run.files import write_atomic

FIELDS = ("arm", "beta", "factor", "measure", "against", "value", "low", "high", "seeds")
# measure -> metric of which it is the last window
FINAL = {
  "final": "reward/gold",
  "frozen_final": "reward/frozen",
  "used_final": "reward/used",
  "kl_final": "kl",
  "length_final": "length",
  "truncated_final": "truncated",
  "repetition_final": "repetition",
  "entropy_final": "entropy",
  "coverage_final": "gold/coverage",
  "hallucinated_final": "gold/hallucinated",
}
# measure -> metric of which it is the mean over the second half of the steps, where there are
# values
LATE = {
  "within_corr": "reward/within_corr",
  "used_std": "reward/used_std",
  "pair_disagreement": "r2m/pair_disagreement",
  "frozen_disagreement": "r2m/frozen_disagreement",
  "growth": "reward/growth",
  "frozen_corr": "reward/frozen_corr",
  "fixed_states": "drift/fixed_states",
  "fixed_states_std": "drift/fixed_states_std",
  "fixed_score": "drift/fixed_score",
  "own_states": "drift/own_states",
}


class Results(NamedTuple):
  """All finished results."""

  curves: dict[str, dict[float, Curves]]  # arm -> factor of the KL weight -> curves
  values: dict[tuple[str, float], dict[str, np.ndarray]]  # (arm, factor) -> measure -> f64[S]
  fits: dict[tuple[str, float], dict[str, stats.Fit]]  # -> kind of curve -> fit
  best: dict[str, np.ndarray]  # columns of best_of_n.parquet; {} if it does not exist
  rows: list[dict]
  found: dict[tuple, intervals.Interval]  # (arm, factor, measure, against) -> the numbers of a row
  sft_gold: dict[int, float]  # gold of each seed's supervised policy


def gold_measures(config) -> list[str]:
  """The measures that are compared between arms."""
  return ["final", "peak", "area", *(at_kl("gold", target) for target in config.lab.kls)]


def at_kl(name: str, target: float) -> str:
  return f"{name}_at_kl_{target:g}"


def at_weight(arm: str, beta: float) -> str:
  """`against` of a row that compares with `arm` at the same KL weight, whatever their chosen
  settings.
  """
  return f"{arm} at {beta:g}"


def stop_name(config, target: float) -> str:
  return f"{config.lab.baseline}.stopped_at_kl_{target:g}"


def measures(config, curves: Curves) -> dict[str, np.ndarray]:
  """Every measure of one arm at one KL weight, f64[S] each."""
  metrics, gold = curves.metrics, curves.metrics["reward/gold"]
  steps = gold.shape[1]
  found = stats.outline(gold)._asdict() | {
    "lost": stats.outline(gold).peak - stats.outline(gold).final
  }
  found |= {
    name: stats.outline(metrics[key]).final for name, key in FINAL.items() if key in metrics
  }
  for name, key in LATE.items():
    if key in metrics and np.isfinite(half := metrics[key][:, steps // 2 :]).any():
      found[name] = np.array(
        [row[np.isfinite(row)].mean() if np.isfinite(row).any() else np.nan for row in half]
      )
  for target in config.lab.kls:
    for name in ("gold", "frozen"):
      found[at_kl(name, target)] = stats.matched(metrics["kl"], metrics[f"reward/{name}"], target)
  found["length_start"] = stats.outline(metrics["length"]).start
  frozen, width = metrics["reward/frozen"], window_of(steps)
  peak = np.round(found["peak_step"] - (width - 1) / 2).astype(int)
  found["frozen_rise"] = found["frozen_final"] - [
    row[i : i + width].mean() for row, i in zip(frozen, peak)
  ]
  return found | {"skipped": metrics["skipped"].sum(1)}


def stopped_measures(config, curves: Curves, target: float) -> dict[str, np.ndarray]:
  """The measures of a run that is stopped early at a KL."""
  kl = curves.metrics["kl"]
  has = [(name, key) for name, key in FINAL.items() if key in curves.metrics]
  found = {name: stats.stopped(kl, curves.metrics[key], target)[0] for name, key in has}
  return found | {"stop_step": stats.stopped(kl, kl, target)[1].astype(float)}


def rival(name: str, lead: str, known) -> str | None:
  """The arm with which `name` is paired: LEAD with the same suffix if it exists, otherwise LEAD;
  None: no arm.
  """
  suffix = name.partition(".")[2]
  return next(
    (arm for arm in (f"{lead}.{suffix}", lead) if lead and arm in known and arm != name), None
  )


Key = tuple[str, float]  # arm and factor of its KL weight


def results_of(config, arms, workdir: Path, sft_gold: dict[int, float]) -> Results:
  """Reads the table.

  Args:
    arms: names, in display order.
    sft_gold: gold of each seed's supervised policy on held-out prompts, at which the fitted curves
      start.
  """
  curves = read_arms(Path(workdir), arms)
  values, fits, of = values_of(config, curves, sft_gold)
  rows = []
  for key, found in values.items():
    rows += own_rows(key, of[key], found, fits.get(key, {}))
    rows += difference_rows(config, key, curves, values, of)
  best = read_best(Path(workdir) / "best_of_n.parquet")
  if best:
    rows += best_rows(best)
    gain = best["gold"] - best["gold"][:, :1]
    fits["best_of_n", 1.0] = {
      kind: stats.fit_turnover(best["kl"], gain, kind) for kind in stats.KINDS
    }

  def place(row):
    return (row["arm"], row["factor"], row["measure"], row["against"])

  found = {place(row): intervals.Interval(*(row[name] for name in FIELDS[5:])) for row in rows}
  return Results(curves, values, fits, best, rows, found, sft_gold)


def values_of(config, curves: dict[str, dict[float, Curves]], sft_gold: dict[int, float]):
  """(measures, fits, curves) of every arm at every KL weight by `Key`; the baseline stopped early
  counts as separate arms, without a fit.
  """
  values: dict[Key, dict[str, np.ndarray]] = {}
  fits: dict[Key, dict[str, stats.Fit]] = {}
  of: dict[Key, Curves] = {}
  for name, by_factor in curves.items():
    for factor, mine in by_factor.items():
      key = (name, factor)
      values[key], of[key] = measures(config, mine), mine
      gain = mine.metrics["reward/gold"] - np.array([[sft_gold[seed]] for seed in mine.seeds])
      fits[key] = {kind: stats.fit_turnover(mine.metrics["kl"], gain, kind) for kind in stats.KINDS}
      for target in config.lab.stops if name == config.lab.baseline else ():
        key = (stop_name(config, target), factor)
        values[key], of[key] = stopped_measures(config, mine, target), mine
  return values, fits, of


def row_of(key: Key, beta: float, measure: str, against: str, x) -> dict:
  """A row of summary.csv; `x` is an Interval or similar."""
  return dict(zip(FIELDS, (key[0], beta, key[1], measure, against, *x)))


def own_rows(key: Key, curves: Curves, found: dict[str, np.ndarray], fits: dict) -> list[dict]:
  """The rows of an arm by itself: its measures, then its fitted curves."""
  rows = [
    row_of(key, curves.beta, measure, "", intervals.interval(per_seed))
    for measure, per_seed in found.items()
  ]
  for kind, fit in fits.items():
    for part in ("a", "b", "turn"):
      rows.append(row_of(key, curves.beta, f"fit_{kind}_{part}", "", getattr(fit, part)))
    exact = (fit.r2, np.nan, np.nan, len(curves.seeds))
    rows.append(row_of(key, curves.beta, f"fit_{kind}_r2", "", exact))
  return rows


def difference_rows(config, key: Key, curves, values, of: dict[Key, Curves]) -> list[dict]:
  """The rows of an arm minus the arms with which it is paired, over their common seeds."""
  rows, mine = [], of[key]
  for lead in dict.fromkeys((config.lab.baseline, config.lab.control)):
    for against, other in paired_with(config, key, lead, curves, values, of).items():
      both = [seed for seed in mine.seeds if seed in of[other].seeds] if other in values else []
      for measure in gold_measures(config) if both else ():
        if measure in values[key]:
          pair = (
            values[k][measure][[of[k].seeds.index(seed) for seed in both]] for k in (key, other)
          )
          rows.append(row_of(key, mine.beta, measure, against, intervals.paired(*pair)))
  return rows


def paired_with(config, key: Key, lead: str, curves, values, of: dict[Key, Curves]) -> dict:
  """`against` -> key of the arms with which an arm is paired because of `lead`; the arm of a key
  may not exist.
  """
  name = rival(key[0], lead, curves)
  others = {name: (name, key[1] if (name, key[1]) in values else 1.0)}
  others |= {
    at_weight(name, of[k].beta): k
    for k in values
    if k[0] == name and np.isclose(of[k].beta, of[key].beta)
  }
  if key == ("r2m", 1.0) and lead == config.lab.baseline:
    # the method minus each ablation, placebo and control
    names = [variant for variant in VARIANTS if variant not in ("r2m", config.lab.control)]
    others |= {variant: (variant, 1.0) for variant in names}
  return others


def read_best(path: Path) -> dict[str, np.ndarray]:
  """Columns of best_of_n.parquet, f64[seeds, n] each; {} if it does not exist."""
  if not path.exists():
    return {}
  best = read_table(path)[0]
  return {name: column.reshape(-1, len(np.unique(best["n"]))) for name, column in best.items()}


def best_rows(best: dict[str, np.ndarray]) -> list[dict]:
  """The rows of best of n."""
  return [
    row_of(("best_of_n", ""), "", f"{name}_n_{n}", "", intervals.interval(best[name][:, i]))
    for i, n in enumerate(best["n"][0])
    for name in ("gold", "proxy")
  ]


def write_summary(path: Path, results: Results) -> None:
  """The rows as CSV, five digits each: small enough to be committed."""
  text = io.StringIO()
  writer = csv.DictWriter(text, FIELDS, lineterminator="\n")
  writer.writeheader()

  def short(x):
    return f"{x:.5g}" if isinstance(x, float) else x

  writer.writerows({name: short(value) for name, value in row.items()} for row in results.rows)
  write_atomic(path, text.getvalue())


def write_seeds(path: Path, results: Results) -> None:
  """Writes every measure of every seed as parquet, from which summary.csv can be recomputed.

  One row for each arm, KL weight and seed, one column for each measure, NaN if it has none.
  """
  names = list(dict.fromkeys(name for found in results.values.values() for name in found))
  columns: dict[str, list] = {name: [] for name in ("arm", "beta", "factor", "seed", *names)}
  for (arm, factor), found in results.values.items():
    # early stopping has the seeds of the stopped arm
    curves = results.curves.get(arm) or results.curves[arm.partition(".")[0]]
    beta, seeds = curves[factor].beta, curves[factor].seeds
    for i, seed in enumerate(seeds):
      place = dict(arm=arm, beta=beta, factor=factor, seed=seed)
      values = {name: float(found[name][i]) if name in found else np.nan for name in names}
      for name, value in (place | values).items():
        columns[name].append(value)
  write_table(path, columns)


def find(
  results: Results, arm: str, measure: str, factor: float = 1.0, against: str = ""
) -> intervals.Interval | None:
  """The interval of a row; None if there is none."""
  return results.found.get((arm, factor, measure, against))


CANDIDATE = ".candidate_"


def choose(config, results: Results) -> dict[str, str]:
  """The candidate of each arm (named ARM.candidate_N) that the protocol chooses; gold is not read.

  A candidate is rejected if an update was skipped or if its final length is below half its initial
  length. Among the others, the one with the highest frozen proxy at the first of config.lab.kls is
  chosen, if all seeds of all candidates reach this KL; otherwise the one with the highest final
  frozen proxy. On a tie it is the first. An arm without a remaining candidate is not in the result.
  """
  chosen, target = {}, at_kl("frozen", config.lab.kls[0])
  names = [name for name in results.curves if CANDIDATE in name]

  def value(name, measure):
    return find(results, name, measure)

  for arm in dict.fromkeys(name.partition(CANDIDATE)[0] for name in names):
    sound = [
      name
      for name in names
      if name.partition(CANDIDATE)[0] == arm
      and value(name, "skipped").value == 0
      and value(name, "length_final").value >= 0.5 * value(name, "length_start").value
    ]
    whole = all(value(name, target).count == value(name, "final").count for name in sound)
    if sound:
      chosen[arm] = max(
        sound, key=lambda name: value(name, target if whole else "frozen_final").value
      )
  return chosen
