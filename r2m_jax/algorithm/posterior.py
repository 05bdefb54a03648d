"""The posterior of a linear reward head given preference pairs, in float64 NumPy.

  J(w) = |w - w0|^2 / (2 tau^2) + sum_p u_p l(w.dx_p),    l(z) = -log((1 - 2 e_p) sigma(z) + e_p)

dx_p are the features of the preferred response minus those of the other one. e_p is the probability
that a label was flipped, so one wrong label costs at most log(1 / e_p). u_p is the weight of a
pair.
"""

from typing import NamedTuple

import numpy as np

MOST_STEPS, SMALLEST = 100, 1e-6  # maximum steps, and the smallest fraction of a step
TOLERANCE = 1e-8  # expected gain of another step, in nats


class Evidence(NamedTuple):
  """Preference pairs."""

  dx: np.ndarray  # f64[N, D], features of the preferred response minus those of the other
  weight: np.ndarray  # f64[N], u
  flip: np.ndarray  # f64[N], e, between 0 and 1/2


class Posterior(NamedTuple):
  """Laplace's approximation around the most likely head."""

  mean: np.ndarray  # f64[D], the w that minimises J
  precision: np.ndarray  # f64[D, D], the Hessian of J there
  steps: int


class Terms(NamedTuple):
  """l of each pair and its derivatives by z, f64[N] each."""

  value: np.ndarray
  slope: np.ndarray
  curvature: np.ndarray  # below 0 if a pair strongly contradicts w
  information: np.ndarray  # the curvature expected over labels, never below 0


def sigmoid(z: np.ndarray) -> np.ndarray:
  return 0.5 * (1 + np.tanh(0.5 * z))


def terms(z: np.ndarray, flip: np.ndarray) -> Terms:
  """l(z) of labels that are flipped with probability `flip` > 0."""
  right, wrong = sigmoid(z), sigmoid(-z)
  p = flip + (1 - 2 * flip) * right
  q = flip + (1 - 2 * flip) * wrong  # 1 - p
  dp = (1 - 2 * flip) * right * wrong
  curvature = (dp / p) ** 2 - dp * (wrong - right) / p
  return Terms(-np.log(p), -dp / p, curvature, dp**2 / (p * q))


def fit_head(evidence: Evidence, prior_mean: np.ndarray, tau: float, start=None) -> Posterior:
  """Minimises J by Newton's method with step halving (iteratively reweighted least squares).

  With flips J is not convex. If the Hessian is not positive definite, a step uses the expected
  information instead. Every step decreases J. The result is a local minimum near `start`.

  Args:
    prior_mean: f64[D], w0.
    tau: standard deviation of each weight around its prior mean.
    start: f64[D]; None: the prior mean.
  """
  dx, weight, flip = evidence
  w = np.array(prior_mean if start is None else start, float)

  def objective(w):
    value = terms(dx @ w, flip).value
    return ((w - prior_mean) ** 2).sum() / (2 * tau**2) + weight @ value

  for done in range(MOST_STEPS):
    found = terms(dx @ w, flip)
    gradient = dx.T @ (weight * found.slope) + (w - prior_mean) / tau**2
    precision = hessian(dx, weight * found.curvature, tau)
    if not positive(precision):
      precision = hessian(dx, weight * found.information, tau)
    step = np.linalg.solve(precision, gradient)
    gain = gradient @ step
    if gain < TOLERANCE:
      break
    here, size = objective(w), 1.0
    while objective(w - size * step) > here - 1e-4 * size * gain and size > SMALLEST:
      size /= 2
    w = w - size * step
  return Posterior(w, precision, done)


def hessian(dx: np.ndarray, curvature: np.ndarray, tau: float) -> np.ndarray:
  """tau^-2 I + sum_p curvature_p dx_p dx_p^T."""
  return (dx.T * curvature) @ dx + np.eye(dx.shape[1]) / tau**2


def positive(matrix: np.ndarray) -> bool:
  try:
    np.linalg.cholesky(matrix)
  except np.linalg.LinAlgError:
    return False
  return True


# ---- weights of old pairs by the policy's likelihood ----


def relative_ratio(log_ratio: np.ndarray, alpha: float = 0.1) -> np.ndarray:
  """log(pi / (alpha pi + (1 - alpha) pi_ref)) from log(pi / pi_ref); at most log(1 / alpha).

  The relative density ratio of OCRM (arXiv 2507.15507).
  """
  return log_ratio - np.logaddexp(np.log(alpha) + log_ratio, np.log1p(-alpha))


def effective_size(weight: np.ndarray) -> float:
  """(sum u)^2 / sum u^2, between 1 and N."""
  return float(weight.sum() ** 2 / (weight**2).sum())


def tempered_weights(log_weight: np.ndarray, share: float) -> tuple[np.ndarray, float]:
  """u_p = exp(m log_weight_p) with mean 1, and the largest m <= 1 whose effective size is at least
  `share` of the pairs.

  The effective size never grows with m, because log-sum-exp is convex, so m is found by bisection.
  """

  def at(m):
    return np.exp(m * (log_weight - log_weight.max()))

  def enough(m):
    return effective_size(at(m)) >= share * len(log_weight)

  low, high = 0.0, 1.0
  if enough(high):
    low = high
  else:
    for _ in range(50):
      middle = (low + high) / 2
      low, high = (middle, high) if enough(middle) else (low, middle)
  weight = at(low)
  return weight / weight.mean(), low
