"""Inference for a registered contrast: a paired test of difference, two one-sided tests of
equivalence, and a decision. NumPy and SciPy on one value per seed; no files, no JAX.

The tests are Student's. docs/lab.md gives their coverage if a share of the seeds collapses.
"""

from typing import NamedTuple

import numpy as np
from scipy import stats as distributions  # jax brings it

ALPHA = 0.05  # level of each test; tests of a difference are corrected over the family (`holm`)
DECISIONS = ("superior", "equivalent", "inferior", "undecided")


class Contrast(NamedTuple):
  """The mean paired difference of two arms and its tests; NaN for fewer than two seeds."""

  value: float
  low: float  # ends of the 95% interval
  high: float
  inner_low: float  # ends of the 90% interval: within the margin if `p_equivalence` is below 5%
  inner_high: float
  p_difference: float  # two-sided, for a mean difference of zero
  p_equivalence: float  # the larger p of two one-sided tests, for a mean beyond the margin
  count: int  # seeds


def contrast(differences, margin: float) -> Contrast:
  """Paired t tests of f64[S] differences, one for each seed; NaN values are left out.

  Equivalence is by two one-sided tests (Schuirmann, 1987): the mean difference is above -margin and
  below margin. If all differences are equal, p is 0 or 1.
  """
  values = np.asarray(differences, float)
  values = values[np.isfinite(values)]
  count = len(values)
  if count < 2:
    mean = float(values.mean()) if count else np.nan
    return Contrast(mean, *[np.nan] * 6, count)
  mean, error = values.mean(), values.std(ddof=1) / np.sqrt(count)
  half, inner = (error * distributions.t.ppf(1 - tail, count - 1) for tail in (0.025, 0.05))

  def beyond(distance):  # P(T > distance / error)
    if error == 0:
      return float(distance <= 0)
    return float(distributions.t.sf(distance / error, count - 1))

  return Contrast(
    float(mean),
    float(mean - half),
    float(mean + half),
    float(mean - inner),
    float(mean + inner),
    min(1.0, 2 * beyond(abs(mean))),
    max(beyond(margin - mean), beyond(margin + mean)),
    count,
  )


def holm(p) -> np.ndarray:
  """Holm's adjusted p of a family, f64[M]: below alpha, the hypothesis is rejected at alpha.

  A p that is NaN counts as 1: a contrast without data stays in the family.
  """
  p = np.nan_to_num(np.asarray(p, float), nan=1.0)
  order = np.argsort(p, kind="stable")
  stepped = np.maximum.accumulate(p[order] * (len(p) - np.arange(len(p))))
  adjusted = np.empty(len(p))
  adjusted[order] = np.minimum(stepped, 1.0)
  return adjusted


def decide(found: Contrast, p_holm: float) -> str:
  """One of `DECISIONS`: "equivalent" if the difference is within the margin; otherwise "superior"
  or "inferior", by its sign, if Holm's p is below 5%; otherwise "undecided".
  """
  if found.p_equivalence < ALPHA:
    return "equivalent"
  if p_holm < ALPHA:
    return "superior" if found.value > 0 else "inferior"
  return "undecided"


def residual_slope(values: np.ndarray, residual: np.ndarray) -> float:
  """Least-squares slope of values on residual, f64[A, S] each, with a constant for each arm and for
  each seed; 0 if these constants explain the residual completely.

  A seed that is NaN in any arm is left out.
  """
  whole = np.isfinite(values).all(0) & np.isfinite(residual).all(0)

  def within(x):
    x = x[:, whole]
    return x - x.mean(0) - x.mean(1, keepdims=True) + x.mean()

  if not whole.any():
    return 0.0
  x, y = within(residual), within(values)
  total = float((x**2).sum())
  return float((x * y).sum()) / total if total > 1e-12 else 0.0
