"""Measurements on hidden states: similarities of pairs, ridge probes, correlations. Plain NumPy, no
files, no JAX.

Rows are responses. All intervals are by bootstrap over prompts, because responses to one prompt are
not independent. A statistic is computed from sums over prompts, and a resample weights the prompts
by how often it drew them.
"""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from scipy import stats as distributions  # jax brings it

from r2m_jax.report.intervals import (
  Interval,
  by_group,
  estimate,
  interval,
  weights,
  with_ends,
)

# of the prompts: to predict rows that no fit has seen, and to choose the penalty without them
FOLDS = 5
INNER = 4
PENALTIES = 10.0 ** np.arange(-4, 4.5, 0.5)


# ---- similarity of pairs ----


def unit(states: np.ndarray) -> np.ndarray:
  """Each row scaled to length 1, so that products are cosines; a row of zeros stays zero.   f64[N,
  D] -> f64[N, D].
  """
  return states / np.maximum(np.linalg.norm(states, axis=-1, keepdims=True), 1e-12)


class Similarities(NamedTuple):
  """Mean cosine similarity over pairs of responses to different prompts."""

  first: Interval  # both have label 0
  second: Interval  # both have label 1
  cross: Interval  # one has label 0, the other label 1
  gap: Interval  # mean of the first two, minus cross


def similarities(states: np.ndarray, label: np.ndarray, prompt: np.ndarray) -> Similarities:
  """Mean cosine of pairs by label. Pairs of one prompt are left out, because both would share its
  words.

  With unit vectors u, the sum over pairs of prompts p != q is |sum_p u_p|^2 - sum_p |u_p|^2: no
  pair is computed explicitly.

  Args:
    states: f64[N, D].
    label: i64[N], 0 or 1; rows with other labels are left out.
    prompt: i64[N].
  """
  member = label[:, None] == np.arange(2)  # [N, 2]
  u = by_group(prompt, member[..., None] * unit(states)[:, None])  # [P, 2, D]
  n = by_group(prompt, member)  # [P, 2]
  drawn = weights(len(n))
  total, count = np.tensordot(drawn, u, 1), drawn @ n
  sums = np.einsum("rad,rbd->rab", total, total) - np.tensordot(
    drawn**2, np.einsum("pad,pbd->pab", u, u), 1
  )
  counts = np.einsum("ra,rb->rab", count, count) - np.tensordot(
    drawn**2, np.einsum("pa,pb->pab", n, n), 1
  )
  mean = np.divide(sums, counts, out=np.full(sums.shape, np.nan), where=counts > 0.5)
  first = mean[:, 0, 0]
  second = mean[:, 1, 1]
  cross = mean[:, 0, 1]
  return Similarities(
    *(with_ends(x, len(n)) for x in (first, second, cross, (first + second) / 2 - cross))
  )


def centred(states: np.ndarray) -> np.ndarray:
  """The states minus their mean: they share a large common vector, which by itself puts every
  cosine near 1.
  """
  return states - states.mean(0)


class PairsOfPrompt(NamedTuple):
  """All pairs of responses to the same prompt, f64 or i64[M] each."""

  i: np.ndarray
  j: np.ndarray
  prompt: np.ndarray
  cosine: np.ndarray


def pairs_of_prompts(states: np.ndarray, prompt: np.ndarray) -> PairsOfPrompt:
  """Rows i < j of one prompt and the cosine of their states f64[N, D]."""
  states = unit(states)
  found = [
    (a, b)
    for p in range(prompt.max() + 1)
    for rows in [np.flatnonzero(prompt == p)]
    for x, a in enumerate(rows)
    for b in rows[x + 1 :]
  ]
  i, j = np.array(found, int).reshape(-1, 2).T
  return PairsOfPrompt(i, j, prompt[i], (states[i] * states[j]).sum(-1))


def orders(scores: np.ndarray, i: np.ndarray, j: np.ndarray, gap: np.ndarray) -> np.ndarray:
  """How each pair (i, j) of rows is ordered: 1 as gold orders it, 0 the other way, 0.5 if scores or
  gold are equal.   f64[N]; i64[M], i64[M]; f64[M], gold of i minus gold of j -> f64[M].
  """
  return 0.5 + 0.5 * np.sign(gap) * np.sign(scores[i] - scores[j])


def correlation(
  x: np.ndarray, y: np.ndarray, prompt: np.ndarray, *, within: bool = False
) -> Interval:
  """Pearson's correlation of f64[M] values. `within`: after subtracting each prompt's mean from
  both.
  """
  if within:

    def mean(v):
      return (by_group(prompt, v) / np.maximum(by_group(prompt, np.ones(len(v))), 1))[prompt]

    x, y = x - mean(x), y - mean(y)
  x, y = x - x.mean(), y - y.mean()
  sums = by_group(prompt, np.stack([np.ones(len(x)), x, y, x * x, y * y, x * y], -1))

  def pearson(s):
    n, sx, sy, sxx, syy, sxy = np.moveaxis(s, -1, 0)
    spread = (sxx - sx**2 / n) * (syy - sy**2 / n)
    return (sxy - sx * sy / n) / np.sqrt(np.where(spread > 1e-18, spread, np.nan))

  return estimate(pearson, sums)


# ---- linear probes ----


def ridge(
  x: np.ndarray, y: np.ndarray, penalties: np.ndarray
) -> Callable[[np.ndarray], np.ndarray]:
  """Fits mean (y - a - z·b)^2 + penalty |b|^2, z the standardised features; constant columns are
  ignored.

  Args:
    x: f64[N, D]. y: f64[N]. penalties: f64[A].

  Returns:
    predict(x f64[M, D]) -> f64[M, A].
  """
  mean, scale = x.mean(0), x.std(0)
  scale = np.where(scale > 1e-9 * np.maximum(np.abs(mean), 1), scale, np.inf)
  z, level = (x - mean) / scale, y.mean()
  values, vectors = np.linalg.eigh(z.T @ z / len(z))
  rotated = vectors.T @ (z.T @ (y - level)) / len(z)
  coefficients = vectors @ (rotated[:, None] / (np.maximum(values, 0)[:, None] + penalties))
  return lambda x: level + (x - mean) / scale @ coefficients


def folds_of(prompt: np.ndarray, count: int, seed: int) -> np.ndarray:
  """The fold of each row's prompt, assigned at random.   i64[N] -> i64[N]."""
  names, place = np.unique(prompt, return_inverse=True)
  return (np.random.default_rng(seed).permutation(len(names)) % count)[place]


def probe(x: np.ndarray, y: np.ndarray, prompt: np.ndarray, seed: int = 0) -> np.ndarray:
  """A linear probe's prediction for every row, from a fit that saw no response to its prompt.   ->
  f64[N].

  The penalty has the least squared error in an inner cross-validation over only the prompts of the
  fit. The fit then uses all of these. So the predicted rows influence no choice. x f64[N, D], y
  f64[N], prompt i64[N].
  """
  fold, predicted = folds_of(prompt, FOLDS, seed), np.zeros(len(y))
  for k in range(FOLDS):
    train, test = np.flatnonzero(fold != k), np.flatnonzero(fold == k)
    inner, error = folds_of(prompt[train], INNER, seed + 1), np.zeros(len(PENALTIES))
    for m in range(INNER):
      fit, held = train[inner != m], train[inner == m]
      error += ((ridge(x[fit], y[fit], PENALTIES)(x[held]) - y[held, None]) ** 2).sum(0)
    best = PENALTIES[[error.argmin()]]
    predicted[test] = ridge(x[train], y[train], best)(x[test])[:, 0]
  return predicted


def r_squared(y: np.ndarray, *predicted: np.ndarray, prompt: np.ndarray) -> Interval:
  """1 - sum (y - predicted)^2 / sum (y - mean y)^2 of held-out predictions; below 0: worse than the
  mean.

  With two predictions: the first one's minus the second one's on the same rows, a paired
  difference.
  """
  errors = [by_group(prompt, (y - p) ** 2) for p in predicted]
  y = y - y.mean()  # better conditioned, with the same variance

  def spread(n, s, q):
    return q - s**2 / n

  rows = [by_group(prompt, v) for v in (np.ones(len(y)), y, y * y)]
  if len(predicted) == 1:
    return estimate(lambda e, *s: 1 - e / spread(*s), *errors, *rows)
  return estimate(lambda a, b, *s: (b - a) / spread(*s), *errors, *rows)


def rank_correlation(y: np.ndarray, predicted: np.ndarray, prompt: np.ndarray) -> Interval:
  """Spearman's correlation within a prompt, averaged over prompts: what a group-relative advantage
  can use. Ties have mean ranks; prompts with all values equal are left out.
  """
  found = []
  for p in range(prompt.max() + 1):
    a, b = (distributions.rankdata(v[prompt == p]) for v in (y, predicted))
    spread = a.std() * b.std() if len(a) else 0.0
    found.append(((a - a.mean()) * (b - b.mean())).mean() / spread if spread > 0 else np.nan)
  return interval(found)
