"""The laboratory's statistics: plain NumPy on arrays of shape [seeds, steps], no files, no JAX.

Intervals are over seeds, because seeds are independent: each has its own supervised policy,
preferences, reward model, prompts and samples. A value that a seed does not have is NaN; it is left
out, which the count shows.
"""

from typing import NamedTuple

import numpy as np

from r2m_jax.report.intervals import GROUP_RESAMPLES, Interval, ends, resampled
from r2m_jax.report.summary import value_at, window_means, window_of

# ---- curves of gold ----


class Outline(NamedTuple):
  """The outline of each seed's curve, f64[S]; means over windows of a tenth of the steps, as in
  summary.summary_table.
  """

  start: np.ndarray  # first window
  peak: np.ndarray  # highest window
  peak_step: np.ndarray  # the middle of the highest window
  final: np.ndarray  # last window
  area: np.ndarray  # mean over all steps


def outline(gold: np.ndarray) -> Outline:
  """The `Outline` of f64[S, T]."""
  means = np.stack([window_means(row) for row in gold])
  width = window_of(gold.shape[1])
  return Outline(
    means[:, 0], means.max(1), means.argmax(1) + (width - 1) / 2, means[:, -1], gold.mean(1)
  )


def matched(kl: np.ndarray, values: np.ndarray, target: float) -> np.ndarray:
  """`values` at the point at which each seed's KL first reaches the target, nats; NaN if it never
  does. f64[S, T] -> f64[S].
  """
  found = [value_at(*pair, target) for pair in zip(kl, values)]
  return np.array([np.nan if value is None else value for value in found])


def stopped(kl: np.ndarray, values: np.ndarray, target: float) -> tuple[np.ndarray, np.ndarray]:
  """Early stopping: a run ends after its first step whose measured KL is at the target or above.

  The policy that is kept draws the next step's samples, so its value is read there; these samples
  did not influence the decision. A run that is never stopped keeps its last step.   f64[S, T] ->
  (value f64[S], step i64[S]).
  """
  over, last = kl >= target, kl.shape[1] - 1
  step = np.where(over.any(1), np.minimum(over.argmax(1) + 1, last), last)
  return values[np.arange(len(values)), step], step


# ---- turn-over, Gao, Schulman and Hilton (arXiv 2210.10760) ----

KINDS = {
  "bon": lambda d: d,
  "rl": np.log,
}  # gold - gold at the start = d (a - b f(d)), d = sqrt(KL)


class Fit(NamedTuple):
  a: Interval
  b: Interval
  turn: Interval  # sqrt(KL) at which the fitted curve peaks; NaN if it never does
  r2: float


def fit_turnover(kl: np.ndarray, gain: np.ndarray, kind: str, seed: int = 0) -> Fit:
  """Least squares of gain = d (a - b f(d)) over all points of all seeds, with intervals over seeds.

  Args:
    kl: f64[S, T], nats; points at 0 carry no information and are left out.
    gain: f64[S, T], gold minus the initial policy's gold.
    kind: "bon", f(d) = d, or "rl", f(d) = log d.
  """
  products = []
  targets = []
  squares = []
  for row, values in zip(kl, gain):
    keep = (row > 0) & np.isfinite(values)
    d = np.sqrt(row[keep])
    columns = np.stack([d, -d * KINDS[kind](d)], 1)
    products.append(columns.T @ columns)
    targets.append(columns.T @ values[keep])
    squares.append([keep.sum(), values[keep].sum(), (values[keep] ** 2).sum()])
  products, targets, squares = map(np.array, (products, targets, squares))

  def solve(weight):  # f64[..., S] -> the two coefficients, f64[..., 2]: Cramer's rule
    matrix, right = np.tensordot(weight, products, 1), weight @ targets
    (p, q), (_, r) = np.moveaxis(matrix, (-2, -1), (0, 1))
    numerators = r * right[..., 0] - q * right[..., 1], p * right[..., 1] - q * right[..., 0]
    with np.errstate(
      divide="ignore", invalid="ignore"
    ):  # if all points have one KL, there is nothing to fit: NaN
      return np.stack(numerators, -1) / (p * r - q * q)[..., None]

  best = solve(np.ones(len(kl)))
  number, total, square = squares.sum(0)
  residual = square - 2 * best @ targets.sum(0) + best @ products.sum(0) @ best
  several = len(kl) > 1
  drawn = solve(resampled(len(kl), seed, GROUP_RESAMPLES)) if several else np.zeros((0, 2))

  def of(value, values):
    return Interval(float(value), *ends(values, len(kl)), len(kl))

  return Fit(
    of(best[0], drawn[:, 0]),
    of(best[1], drawn[:, 1]),
    of(turn(*best, kind), turn(*drawn.T, kind)),
    float(1 - residual / max(square - total**2 / number, 1e-300)),
  )


def turn(a, b, kind: str) -> np.ndarray:
  """sqrt(KL) of the peak of d (a - b f(d)): a / 2b, or exp(a / b - 1); NaN if the curve has none.
  Also for arrays.
  """
  ratio = np.divide(a, b, out=np.full(np.shape(b), np.nan), where=np.greater(b, 0))
  if kind == "bon":
    return np.where(ratio > 0, ratio / 2, np.nan)
  return np.exp(np.minimum(ratio - 1, 700))


# ---- best of n ----


def best_of(proxy: np.ndarray, values: np.ndarray, n: int) -> float:
  """Expected value of the response with the highest proxy among n of N drawn without replacement:
  an unbiased estimate for n fresh samples, from all subsets of the N.

    sum_i C(i - 1, n - 1) / C(N, n) * value_(i), i = 1 .. N in ascending order of the proxy

  Tied responses are equally likely to be chosen.   f64[N], f64[N], 1 <= n <= N.
  """
  order = np.argsort(proxy, kind="stable")
  proxy, values, count = np.asarray(proxy)[order], np.asarray(values, float)[order], len(proxy)
  weight = np.zeros(count)
  weight[-1] = n / count
  for i in range(count - 1, n - 1, -1):  # C(i - 1, n - 1) from C(i, n - 1)
    weight[i - 1] = weight[i] * (i - n + 1) / i
  _, tie = np.unique(proxy, return_inverse=True)
  return float((np.bincount(tie, weight) * np.bincount(tie, values) / np.bincount(tie)).sum())


def best_of_kl(n) -> np.ndarray:
  """KL of best-of-n from the policy, nats: log n - (n - 1) / n (exact without ties)."""
  n = np.asarray(n, float)
  return np.log(n) - (n - 1) / n
