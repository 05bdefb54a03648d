"""Sign-certified advantages: an advantage is shortened by the uncertainty of the score head, so that
its sign is one that the reward model's own pairs support.

  A~_j = A_j max(0, 1 - kappa c_j / |d_j|),    d_j = s_j - mean s,    c_j = |L^-1 (x_j - mean x)|

Means are over the samples of a prompt. s is the frozen reward phi.x and x its reward token
embedding. L L^T is the precision of the head given the pairs that it was fitted to (`root`). If
|d_j| <= kappa c_j, some head in the ellipsoid of radius kappa gives the sample the other sign, and
its advantage is 0. kappa is such that this holds for a share `certify.share` of the step's samples.

Certified signs are from arXiv 2604.02986, whose ball is `certify.width` "constant" in the scores.
The ellipsoid is from AdvPO (arXiv 2403.05171). The expected gradient is not that of a mean reward:
see docs/concepts.md.
"""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from r2m_jax.algorithm.advantages import centred_groups
from r2m_jax.algorithm.posterior import Evidence, fit_head, hessian, sigmoid
from r2m_jax.ops import all_bits, check
from r2m_jax.types import Experience, Judged

# what shortens an advantage: the head's uncertainty c_j; the controls: that of another sample of the
# prompt; the same for every sample
WIDTHS = ("posterior", "permuted", "constant")
FLIP = 1e-6  # probability of a flipped label in the fit of the scale: almost none
SCALE_TAU = 1e3  # standard deviation of the scale before any pair


def root(dx: np.ndarray, gaps: np.ndarray, spread: np.ndarray, tau: float) -> np.ndarray:
  """The matrix M = L^-1 diag(1 / spread) for which |M (x_j - mean x)| is c_j, f64[D, D].

    L L^T = Lambda = I / tau^2 + sum_p s_p (1 - s_p) dz_p dz_p^T,    dz = dx / spread,    s_p = sigmoid(a gap_p)

  Lambda is the Hessian of Bradley-Terry's loss with a Gaussian prior. The scale a turns the gaps of
  the standardised reward into the log odds of the labels, and is fitted to them.

  Args:
    dx: f64[N, D], embedding of the preferred response minus that of the other, of the head's pairs.
    gaps: f64[N], the same difference of the rewards.
    spread: f64[D], standard deviation of each feature over the responses.
    tau: prior standard deviation of each weight of a standardised feature.
  """
  pairs = Evidence(gaps[:, None], np.ones(len(gaps)), np.full(len(gaps), FLIP))
  scale = fit_head(pairs, np.zeros(1), SCALE_TAU).mean[0]
  right = sigmoid(scale * gaps)
  precision = hessian(dx / spread, right * (1 - right), tau)
  return np.linalg.inv(np.linalg.cholesky(precision)) / spread


def widths(certificate: jax.Array, rte: jax.Array, group_size: int) -> jax.Array:
  """c_j = |M (x_j - mean x)|, the head's uncertainty about d_j.   f32[D, D], f32[B, D] -> f32[P, K]."""
  check(rte, "B D")
  x = rte.reshape(-1, group_size, rte.shape[-1])
  with all_bits():
    moved = (x - x.mean(1, keepdims=True)) @ certificate.T
  return jnp.sqrt((moved**2).sum(-1))


def signal(deviation: jax.Array, width: jax.Array) -> jax.Array:
  """|d| / c, the radius up to which the sign of d is certain; 0 where d is 0.   f32[P, K] -> f32[P, K]."""
  size, varied = jnp.abs(deviation), width > 0
  certain = jnp.where(size > 0, jnp.inf, 0)  # without uncertainty, if not 0
  return jnp.where(varied, size / jnp.where(varied, width, 1), certain)


def certified(ratio: jax.Array, kappa: jax.Array) -> jax.Array:
  """max(0, 1 - kappa c / |d|), the share of an advantage that stays.   f32[P, K], f32[] -> f32[P, K]."""
  kept = ratio > kappa
  return jnp.where(kept, 1 - kappa / jnp.where(kept, ratio, 1), 0)


def make_certify(config) -> Callable[..., tuple[Experience, dict[str, jax.Array]]]:
  """Builds `certify(certificate, judged, experience) -> (Experience, metrics)`, which shortens the
  advantages. If certify.share is 0, it changes nothing.

  Of the built function:
    certificate: f32[D, D], M of `root`.
    judged: `Judged` of the samples; its scores are those of the frozen reward, times a constant.
  With certify.rescale, advantages keep their mean square over all tokens.
  """
  settings, K = config.certify, config.rollout.group_size

  def certify(certificate, judged: Judged, experience: Experience):
    if not settings.share:
      return experience, {}
    deviation = centred_groups(judged.scores, K)
    width = widths(certificate, judged.rte, K)
    if settings.width == "permuted":
      width = jnp.roll(width, 1, -1)
    elif settings.width == "constant":
      width = jnp.ones_like(width)
    ratio = signal(deviation, width)
    kept = certified(ratio, jnp.quantile(ratio, settings.share, method="lower"))
    before = experience.advantages
    after = before * kept.reshape(-1, 1)
    if settings.rescale:
      after = after * jnp.sqrt((before**2).mean() / jnp.maximum((after**2).mean(), 1e-30))
    metrics = {"certify/zero": (kept == 0).mean(dtype=kept.dtype), "certify/kept": kept.mean()}
    return dataclasses.replace(experience, advantages=after), metrics

  return certify
