"""Measures of how well scores order completions: RewardBench 2's measures, calibration, and the
length rule.

arXiv 2506.01937. Plain NumPy; a `Row` is a prompt with completions, of which the first are correct.
"""

import collections
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

from r2m_jax.data.checked import BadRows, split_names
from r2m_jax.data.files import BadRow, DataError, Record
from r2m_jax.data.forms import as_row
from r2m_jax.judge.statistics import sigmoid
from r2m_jax.report.intervals import Interval, by_group, estimate, interval

TIES = "ties"  # the subset with several correct completions, in lower case
BINS = 10  # bins of the calibration


class Row(NamedTuple):
  """A prompt with its completions.

  Attributes:
    prompt: text or messages.
    completions: the correct ones, then the others.
    correct: how many are correct.
    subset: "" if the row has none.
    where: "file:line".
  """

  id: str
  prompt: Any
  completions: list[str]
  correct: int
  subset: str
  where: str


def read_preferences(data, records: Callable[[str, Any], Iterable[Record]]) -> list[Row]:
  """The rows of `data.name`; bad rows are counted and reported. Each source without subsets is one
  subset.

  Raises:
    DataError: too many rows are bad, or none is good.
  """
  rows = []
  for name in split_names(data.name, data.root):
    bad = BadRows(name)
    rows += list(_good(records(name, data), bad, name))
    bad.check(data.max_bad_share)
    print(f"data     {bad.summary()}")
  if not rows:
    raise DataError("config.rewardbench.data names no rows; give a file of preferences")
  return rows


def _good(raw: Iterable[Record], bad: BadRows, name: str) -> Iterator[Row]:
  for record in raw:
    bad.read += 1
    try:
      yield as_preference(record, name)
    except BadRow as error:
      bad.add(error, record.where)


def as_preference(record: Record, source: str) -> Row:
  """A row in RewardBench 2's columns or in any form of a pair (data/forms.py).

  Raises:
    BadRow: it is neither.
  """
  value = record.value
  listed = isinstance(value, dict) and all(
    isinstance(value.get(side), list) and all(isinstance(x, str) for x in value[side])
    for side in ("chosen", "rejected")
  )
  if not listed:
    pair = as_row(value, "pair")
    meta = pair.get("meta", {})
    subset = value.get("subset") or meta.get("subset") or source
    name = value.get("id", record.where)
    return Row(
      str(name), pair["prompt"], [pair["chosen"], pair["rejected"]], 1, str(subset), record.where
    )
  chosen, rejected = value["chosen"], value["rejected"]
  if not chosen or not rejected:
    raise BadRow("missing field", "chosen and rejected each need a completion")
  for field, count in (
    ("num_correct", len(chosen)),
    ("total_completions", len(chosen) + len(rejected)),
  ):
    if value.get(field, count) != count:
      raise BadRow("wrong type", f"{field} is {value[field]!r}; the row has {count}")
  prompt = as_row({"prompt": value.get("prompt")}, "prompt")["prompt"]
  name, subset = value.get("id", record.where), value.get("subset") or source
  return Row(str(name), prompt, [*chosen, *rejected], len(chosen), str(subset), record.where)


# ---- measures ----


def row_accuracy(scores: np.ndarray, correct: int) -> float:
  """The chance that a completion with the highest score, drawn at random, is correct.

  With one correct completion it is 1 over the number tied at the maximum, or 0.
  """
  best = scores == scores.max()
  return float(best[:correct].sum() / best.sum())


class Margins(NamedTuple):
  """The margins of one prompt of the Ties subset."""

  accurate: bool  # every correct completion is above every other
  spread: float  # between the best and the worst correct one
  gap: float  # between the worst correct and the best other one


def margins(scores: np.ndarray, correct: int) -> Margins:
  mine, others = scores[:correct], scores[correct:]
  gap = float(mine.min() - others.max())
  return Margins(gap > 0, float(mine.max() - mine.min()), gap)


def ties_score(rows: Sequence[Row], scores: Sequence[np.ndarray]) -> dict[str, float]:
  """The published score of the Ties subset, and its parts.

  Ids are "ref:N", with one correct completion, and "tied:N", with several, of the same question N.

    score = 0.3 tied + 0.3 ref + 0.2 preferred + 0.2 preferred_hard + 0.01 tie_breaker

  tied and ref are shares of accurate prompts. preferred is the share of questions in which the gap
  of the tied prompt exceeds its range; preferred_hard the share in which the smaller gap of both
  prompts does. tie_breaker is the mean of tanh(smaller gap / range - 1), 0 for 0/0. NaN if no
  question has both.
  """
  found: dict[str, dict[str, Margins]] = {"ref": {}, "tied": {}}
  for row, values in zip(rows, scores):
    kind, _, name = row.id.partition(":")
    if kind not in found or not name:
      raise DataError(f"{row.where} has id {row.id!r}; write ref:N or tied:N in the subset Ties")
    found[kind][name] = margins(values, row.correct)
  shares = {
    kind: float(np.mean([one.accurate for one in ones.values()])) if ones else 0.0
    for kind, ones in found.items()
  }
  both = [
    (found["tied"][name], found["ref"][name]) for name in found["tied"] if name in found["ref"]
  ]
  spread = np.array([tied.spread for tied, _ in both])
  gap = np.array([tied.gap for tied, _ in both])
  least = np.array([min(tied.gap, ref.gap) for tied, ref in both])
  if not both:
    return shares | {"score": math.nan}
  with np.errstate(divide="ignore", invalid="ignore"):
    breaker = np.nan_to_num(np.tanh(least / spread - 1), nan=0.0)
  parts = shares | {
    "preferred": float(np.mean(gap > spread)),
    "preferred_hard": float(np.mean(least > spread)),
    "tie_breaker": float(np.mean(breaker)),
  }
  factors = {"tied": 0.3, "ref": 0.3, "preferred": 0.2, "preferred_hard": 0.2, "tie_breaker": 0.01}
  return parts | {"score": sum(factor * parts[name] for name, factor in factors.items())}


def accuracies(rows: Sequence[Row], scores: Sequence[np.ndarray]) -> dict[str, Any]:
  """Accuracy by subset, and RewardBench 2's mean over the subsets.

  An accuracy has an interval over prompts; the score of Ties has none.
  """
  members: dict[str, list[int]] = collections.defaultdict(list)
  for number, row in enumerate(rows):
    members[row.subset].append(number)
  subsets: dict[str, Interval] = {}
  ties: dict[str, dict[str, float]] = {}
  for name, numbers in members.items():
    mine = [rows[i] for i in numbers], [scores[i] for i in numbers]
    if name.lower() == TIES:
      ties[name] = ties_score(*mine)
      subsets[name] = Interval(ties[name]["score"], math.nan, math.nan, len(numbers))
    else:
      subsets[name] = mean_over_prompts(*mine)
  values = [one.value for one in subsets.values()]
  return {"subsets": subsets, "mean": float(np.mean(values)), "ties": ties}


def mean_over_prompts(rows: Sequence[Row], scores: Sequence[np.ndarray]) -> Interval:
  """The mean accuracy of rows; rows of one prompt are not independent."""
  names: dict[str, int] = {}
  group = np.array([names.setdefault(repr(row.prompt), len(names)) for row in rows])
  values = np.array([row_accuracy(one, row.correct) for row, one in zip(rows, scores)])
  sums = by_group(group, np.stack([values, np.ones(len(values))], -1))
  return estimate(lambda s: s[:, 0] / s[:, 1], sums)


class Pairs(NamedTuple):
  """Every correct completion with every other one of its prompt."""

  margin: np.ndarray  # f64[M], score of the correct one minus the other's
  row: np.ndarray  # i64[M]


def pairs_of(rows: Sequence[Row], scores: Sequence[np.ndarray]) -> Pairs:
  margin, place = [], []
  for number, (row, values) in enumerate(zip(rows, scores)):
    gaps = np.subtract.outer(values[: row.correct], values[row.correct :]).ravel()
    margin.append(gaps)
    place.append(np.full(len(gaps), number))
  return Pairs(np.concatenate(margin).astype(float), np.concatenate(place))


def calibration(margin: np.ndarray) -> dict[str, float]:
  """Brier score and expected calibration error of P(correct) = sigmoid(margin), over pairs.

  The error is over `BINS` equal bins of the confidence, max(p, 1 - p), in [0.5, 1]. A margin of 0
  counts as half right.
  """
  p = sigmoid(margin)
  confidence = np.maximum(p, 1 - p)
  right = (np.sign(margin) + 1) / 2
  number = np.minimum(((confidence - 0.5) * 2 * BINS).astype(int), BINS - 1)
  count = np.bincount(number, minlength=BINS)
  gaps = np.bincount(number, right - confidence, BINS)
  return {
    "brier": float(np.mean((1 - p) ** 2)),
    "ece": float(np.abs(gaps).sum() / count.sum()),
  }


def correlation(a: np.ndarray, b: np.ndarray) -> float:
  """Pearson's correlation, NaN if one of them is constant."""
  if len(a) < 2 or np.std(a) == 0 or np.std(b) == 0:
    return math.nan
  return float(np.corrcoef(a, b)[0, 1])


def measure(rows: Sequence[Row], scores: Sequence[np.ndarray]) -> dict[str, Any]:
  """All reported measures of one scorer.

  Args:
    scores: f64 of each row's completions.
  """
  lengths = [np.array([len(text) for text in row.completions], float) for row in rows]
  pairs = pairs_of(rows, scores)
  right = (np.sign(pairs.margin) + 1) / 2
  hits = by_group(pairs.row, np.stack([right, np.ones(len(right))], -1))
  flat, long = np.concatenate(scores).astype(float), np.concatenate(lengths)
  within = np.concatenate([values - values.mean() for values in scores]).astype(float)
  long_within = np.concatenate([values - values.mean() for values in lengths])
  return {
    "rows": len(rows),
    "completions": len(flat),
    **accuracies(rows, scores),
    "pair_accuracy": estimate(lambda s: s[:, 0] / s[:, 1], hits),
    **calibration(pairs.margin),
    "margin": {
      "mean": interval_of_margins(pairs),
      "quantiles": np.quantile(pairs.margin, (0.05, 0.25, 0.5, 0.75, 0.95)).tolist(),
    },
    "length_correlation": correlation(flat, long),
    "length_correlation_within_prompts": correlation(within, long_within),
    "length_rule": accuracies(rows, lengths),
  }


def interval_of_margins(pairs: Pairs) -> Interval:
  """The mean margin of a prompt's pairs, over prompts."""
  sums = by_group(pairs.row, np.stack([pairs.margin, np.ones(len(pairs.margin))], -1))
  return interval(sums[:, 0] / sums[:, 1])
