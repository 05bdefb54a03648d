"""95% intervals: the same rule for all numbers of a report. Plain NumPy: no files, no JAX.

Independent units are resampled: seeds, or groups of rows such as the responses to one prompt. The
ends of an interval are quantiles of the bootstrap distribution, widened for few values (`levels`).
With fewer than `FEW` values the interval of a mean is Student's.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from scipy import stats as distributions  # jax brings it

LEVEL = 0.95
RESAMPLES = 10_000
GROUP_RESAMPLES = 2000  # for statistics over groups of rows, of which there may be thousands
# values; a bootstrap stays within the values, and the range of three values contains the mean in
# 75% of cases
FEW = 5
NORMAL = float(distributions.norm.ppf((1 + LEVEL) / 2))  # standard errors of a half interval, 1.96


class Interval(NamedTuple):
  value: float
  low: float
  high: float
  count: int  # of independent values: seeds or groups


@functools.lru_cache(maxsize=4)
def resampled(count: int, seed: int = 0, draws: int = RESAMPLES) -> np.ndarray:
  """Bootstrap draws as weights: how often each of `count` values is in each resample.   ->
  f64[draws, count].

  The first draws do not depend on `draws`.
  """
  drawn = np.random.default_rng(seed).integers(0, count, (draws, count))
  place = drawn + np.arange(draws)[:, None] * count
  return np.bincount(place.ravel(), minlength=draws * count).reshape(draws, count).astype(float)


def levels(count: int) -> tuple[float, float]:
  """The quantiles of the bootstrap distribution that are the ends of a 95% interval.

  With few values the plain percentile interval is too short. The levels are widened so that for
  Normal data it has the same length as the t interval: Hesterberg, What Teachers Should Know About
  the Bootstrap (2015), section 5.2.
  """
  tail = (1 - LEVEL) / 2
  widened = distributions.norm.cdf(
    np.sqrt(count / (count - 1)) * distributions.t.ppf(tail, count - 1)
  )
  return float(widened), float(1 - widened)


def ends(values, count: int) -> tuple[float, float]:
  """Ends of the interval of bootstrapped values f64[R], each over `count` independent values.

  NaN for fewer than two values, or if more bootstrapped values than the tail are NaN.
  """
  values = np.asarray(values, float)
  if count < 2 or np.isnan(values).mean() > (1 - LEVEL) / 2:
    return np.nan, np.nan
  low, high = np.nanquantile(values, levels(count))
  return float(low), float(high)


# ---- means of independent values ----


def bounds(values: np.ndarray, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
  """The ends of the 95% interval of the mean over the first axis of f64[S, ...], S >= 2.

  A bootstrap interval from `FEW` values on; with fewer, Student's interval, which assumes Normal
  values.
  """
  count = len(values)
  if count < FEW:
    mean, spread = np.mean(values, axis=0), np.std(values, axis=0, ddof=1)
    half = distributions.t.ppf((1 + LEVEL) / 2, count - 1) * spread / np.sqrt(count)
    return mean - half, mean + half
  low, high = np.quantile(resampled(count, seed) @ values / count, levels(count), axis=0)
  return low, high


def interval(values, seed: int = 0) -> Interval:
  """The mean of f64[S] values, one for each seed, with its 95% interval (`bounds`); its ends are
  NaN for fewer than two values.
  """
  values = np.asarray(values, float)
  values = values[np.isfinite(values)]
  count = len(values)
  if count < 2:
    return Interval(float(values.mean()) if count else np.nan, np.nan, np.nan, count)
  return Interval(float(values.mean()), *map(float, bounds(values, seed)), count)


def paired(values, baseline, seed: int = 0) -> Interval:
  """The mean difference of f64[S] values of the same seeds, over the seeds that have both."""
  return interval(np.asarray(values, float) - np.asarray(baseline, float), seed)


# ---- statistics over groups of rows ----


def weights(count: int, seed: int = 0) -> np.ndarray:
  """How often each of `count` groups is in each resample; row 0 has each group once.   -> f64[1 +
  GROUP_RESAMPLES, count].
  """
  return np.concatenate([np.ones((1, count)), resampled(count, seed, GROUP_RESAMPLES)])


def with_ends(values: np.ndarray, count: int) -> Interval:
  """The first of f64[1 + GROUP_RESAMPLES] values, with the interval from the other values, over
  `count` groups.
  """
  return Interval(float(values[0]), *ends(values[1:], count), count)


def estimate(statistic: Callable[..., np.ndarray], *parts: np.ndarray, seed: int = 0) -> Interval:
  """A statistic of sums over groups, with a cluster bootstrap: rows of one group are not independent.

  Efron and Tibshirani, An Introduction to the Bootstrap, chapter 13; Field and Welsh (2007) for
  clusters.

  Args:
    statistic: maps sums f64[R, ...], one for each of `parts`, to f64[R].
    parts: f64[P, ...] each, the contributions of the groups.
  """
  drawn = weights(len(parts[0]), seed)
  with np.errstate(
    divide="ignore", invalid="ignore"
  ):  # a resample without such rows gives NaN, which `ends` counts
    return with_ends(statistic(*(np.tensordot(drawn, part, 1) for part in parts)), len(parts[0]))


def by_group(group: np.ndarray, values: np.ndarray) -> np.ndarray:
  """Sums of f64[N, ...] values over the rows of each group, i64[N] from 0.   -> f64[P, ...]."""
  sums = np.zeros((group.max() + 1, *np.shape(values)[1:]))
  np.add.at(sums, group, values)
  return sums


def group_mean(
  values: np.ndarray, group: np.ndarray, counted: np.ndarray | None = None, seed: int = 0
) -> Interval:
  """The mean of f64[N] values over all rows, or over the `counted` rows, bool[N].

  The interval is over the groups i64[N] of the rows, numbered from 0.
  """
  counted = np.ones(len(values), bool) if counted is None else counted
  sums = np.stack([np.where(counted, values, 0), counted], -1).astype(float)
  return estimate(lambda s: s[:, 0] / s[:, 1], by_group(group, sums), seed=seed)
