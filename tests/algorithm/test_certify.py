"""Sign-certified advantages against loops, finite differences and sums over all responses."""

import enumeration
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from enumeration import Sampling, Space
from ml_collections import ConfigDict

from r2m_jax.algorithm.advantages import per_token, rloo
from r2m_jax.algorithm.certify import certified, make_certify, root, signal, widths
from r2m_jax.types import Experience, Judged

pytestmark = pytest.mark.numerics

P, K, D, T = 5, 4, 6, 3


@pytest.fixture(autouse=True)
def float64():
  with jax.enable_x64(True):
    yield


def preferences(seed=0, count=200):
  """(dx, gaps, spread) of pairs whose labels follow a head at 1.7 times the scale of the gaps."""
  rng = np.random.default_rng(seed)
  spread = rng.uniform(0.5, 3, D)
  x = rng.normal(size=(count, 2, D)) * spread
  phi = rng.normal(size=D) / spread
  dx = x[:, 0] - x[:, 1]
  right = rng.uniform(size=count) < 1 / (1 + np.exp(-1.7 * dx @ phi))
  dx = np.where(right[:, None], dx, -dx)
  return dx, dx @ phi, spread, phi


def loss(w, dx, spread, tau):
  """Bradley-Terry's loss of standardised weights w, with the prior, one pair at a time."""
  total = (w**2).sum() / (2 * tau**2)
  for pair in dx:
    total += np.log1p(np.exp(-(pair / spread) @ w))
  return total


@pytest.mark.parametrize("tau", [0.3, 1.0])
def test_the_root_is_that_of_the_losses_hessian(tau):
  dx, gaps, spread, phi = preferences()
  scales = np.linspace(0.05, 5, 2000)
  fits = np.log1p(np.exp(-scales[:, None] * gaps)).sum(-1)
  scale = scales[fits.argmin()]
  assert 1 < scale < 3
  w, step = scale * phi * spread, 1e-3
  hessian, unit = np.zeros((D, D)), np.eye(D) * step
  for i in range(D):
    for j in range(D):
      ends = [
        loss(w + a * unit[i] + b * unit[j], dx, spread, tau) * a * b
        for a in (1, -1)
        for b in (1, -1)
      ]
      hessian[i, j] = sum(ends) / (4 * step**2)
  found = root(dx, gaps, spread, tau)
  # the grid leaves the scale 1e-3 wide
  np.testing.assert_allclose(
    np.linalg.inv(found.T @ found),
    np.diag(spread) @ hessian @ np.diag(spread),
    rtol=5e-3,
    atol=0.05,
  )


def step_data(seed=1):
  """A head, its certificate, and the samples of a step. Of the first prompt, all responses are equal;
  of the second, two are.
  """
  rng = np.random.default_rng(seed)
  dx, gaps, spread, phi = preferences()
  rte = rng.normal(size=(P, K, D)) * spread
  rte[0], rte[1, 1] = rte[0, 0], rte[1, 0]
  return phi, root(dx, gaps, spread, 1.0), rte.reshape(P * K, D)


def kept_loop(phi, certificate, rte, share, width):
  """The share of each advantage that stays, one sample at a time; and the radius."""
  rte = rte.reshape(P, K, D)
  d, c = np.zeros((P, K)), np.zeros((P, K))
  for p in range(P):
    for k in range(K):
      gap = rte[p, k] - sum(rte[p]) / K
      d[p, k] = 0 if p == 0 else phi @ gap
      precision = np.linalg.inv(certificate.T @ certificate)
      c[p, k] = np.sqrt(gap @ np.linalg.solve(precision, gap))
  if width == "permuted":
    c = np.stack([[c[p, k - 1] for k in range(K)] for p in range(P)])
  if width == "constant":
    c = np.ones((P, K))
  ratio = [abs(d[p, k]) / c[p, k] if d[p, k] else 0 for p in range(P) for k in range(K)]
  kappa = sorted(ratio)[int(share * (P * K - 1))]
  return np.array([max(0, 1 - kappa / one) if one else 0 for one in ratio]), kappa


@pytest.mark.parametrize("rescale", [False, True])
@pytest.mark.parametrize("width", ["posterior", "permuted", "constant"])
@pytest.mark.parametrize("share", [0.3, 0.6])
def test_an_advantage_is_shortened_as_in_a_loop(share, width, rescale):
  phi, certificate, rte = step_data()
  scores = rte @ phi
  scores[:K] = scores[0]
  rng = np.random.default_rng(2)
  mask = np.arange(T) < rng.integers(1, T + 1, P * K)[:, None]
  config = ConfigDict({"rollout": {"group_size": K}})
  config.certify = ConfigDict({"share": share, "width": width, "rescale": rescale})
  before = per_token(rloo(jnp.asarray(scores), K), jnp.asarray(mask))
  experience = Experience(None, None, None, None, before)
  judged = Judged(jnp.asarray(rte), jnp.asarray(scores), jnp.asarray(scores))
  found, metrics = make_certify(config)(jnp.asarray(certificate), judged, experience)
  kept, _ = kept_loop(phi, certificate, rte, share, width)
  expected = np.asarray(before) * kept[:, None]
  if rescale:
    expected *= np.sqrt((np.asarray(before) ** 2).sum() / (expected**2).sum())
  np.testing.assert_allclose(found.advantages, expected, rtol=1e-9, atol=1e-12)
  assert np.abs(expected).max() > 0.1
  zero = (kept == 0).mean()
  assert share <= zero <= share + 0.25  # at least one prompt's responses are equal
  np.testing.assert_allclose(metrics["certify/zero"], zero)
  np.testing.assert_allclose(metrics["certify/kept"], kept.mean(), rtol=1e-9)


@pytest.mark.parametrize("K", [3, 5, 6, 8])
def test_equal_rewards_count_as_uncertain_in_float32(K):
  """The mean of K equal float32 numbers may be rounded. All the same, a prompt whose responses are
  equal has d = 0: its samples are the share that is zero, and the others stay whole.
  """
  rng = np.random.default_rng(K)
  rte, equal = rng.normal(size=(40, K, D)).astype(np.float32), 24
  rte[:equal] = rte[:equal, :1]
  scores = rte @ rng.normal(size=D).astype(np.float32)
  scores[:equal] = scores[:equal, :1]
  scores, rte = jnp.asarray(scores.reshape(-1)), jnp.asarray(rte.reshape(-1, D))
  config = ConfigDict({"rollout": {"group_size": K}})
  config.certify = ConfigDict({"share": 0.5, "width": "posterior", "rescale": False})
  before = per_token(rloo(scores, K), jnp.ones((40 * K, T), bool))
  experience = Experience(None, None, None, None, before)
  found, metrics = make_certify(config)(
    jnp.eye(D, dtype=jnp.float32), Judged(rte, scores, scores), experience
  )
  np.testing.assert_array_equal(found.advantages, before)
  np.testing.assert_allclose(metrics["certify/zero"], equal / 40, rtol=1e-6)


def test_a_sign_is_certified_if_every_head_in_the_ellipsoid_has_it():
  """The worst head within the radius, found on its surface, against the share that stays."""
  phi, certificate, rte = step_data()
  kept, kappa = kept_loop(phi, certificate, rte, 0.4, "posterior")
  gaps = rte.reshape(P, K, D) - rte.reshape(P, K, D).mean(1, keepdims=True)
  c = np.asarray(widths(jnp.asarray(certificate), jnp.asarray(rte), K))
  rng = np.random.default_rng(3)
  around = rng.normal(size=(4000, D))
  around *= kappa / np.linalg.norm(around, axis=1, keepdims=True)
  heads = phi + around @ certificate  # (w - phi)^T Lambda (w - phi) = kappa^2
  for p in range(1, P):
    for k in range(K):
      d = gaps[p, k] @ phi
      some = (heads @ gaps[p, k]) * np.sign(d)
      worst = (
        phi - np.sign(d) * kappa * certificate.T @ certificate @ gaps[p, k] / c[p, k]
      ) @ gaps[p, k]
      np.testing.assert_allclose(abs(d) * kept[p * K + k], max(0, worst * np.sign(d)), atol=1e-9)
      assert some.min() >= worst * np.sign(d) - 1e-9
      assert (some.min() > 0) or kept[p * K + k] < 0.4


# ---- which gradient it has ----


def margin(space, logits, other, tables, sampling, kappa, uncertainty):
  """E over y of the policy and y' of `other` of the certified margin of y over y': r - r', moved
  towards 0 by kappa times its uncertainty.
  """

  def chances(table):
    keep = enumeration.kept(table, sampling)
    return enumeration.probabilities(space, enumeration.log_distribution(table, sampling, keep))[0]

  gap = tables.reward[0][:, None] - tables.reward[0]
  moved = np.sign(gap) * np.maximum(0, np.abs(gap) - kappa * uncertainty)
  return chances(logits) @ moved @ chances(other)


@pytest.mark.parametrize("kappa", [0.0, 0.6])
def test_the_expected_gradient_is_that_of_the_certified_margin_over_itself(kappa):
  """With two samples a prompt, certified RLOO climbs the margin by which new responses beat those of
  the present policy, as far as the head is sure of it. Without uncertainty that is the mean reward.
  """
  space, sampling = Space(3, 3), Sampling(0.7)
  tables, rng = space.random_tables(4), np.random.default_rng(5)
  x = rng.normal(size=(len(space.tokens), 3))
  certificate = rng.normal(size=(3, 3))
  scores, rte = (
    jnp.asarray(of[space.batches]) for of in (tables.reward[0], x)
  )  # [N, 2], [N, 2, 3]

  def shortened(scores, rte):
    deviation = scores.reshape(-1, 2) - scores.mean()
    ratio = signal(deviation, widths(jnp.asarray(certificate), rte, 2))
    return rloo(scores, 2) * certified(ratio, kappa).reshape(-1)

  advantages = np.asarray(jax.vmap(shortened)(scores, rte))
  keep = enumeration.kept(tables.policy, sampling)
  log_p = enumeration.log_distribution(tables.policy, sampling, keep)
  each = enumeration.probabilities(space, log_p)[0]
  score_functions = enumeration.grad_logprobs(space, tables.policy, sampling)[0].sum(1)
  found = np.zeros(tables.policy.shape)
  for batch, A in zip(space.batches, advantages):
    chance = each[batch].prod()
    found += chance * sum(a * score_functions[y] for a, y in zip(A, batch)) / 2

  gaps = (x[:, None] - x) @ certificate.T
  settings = (tables.policy, tables, sampling, kappa, np.linalg.norm(gaps, axis=-1))
  expected, step = np.zeros(found.shape), 1e-5
  for i in np.ndindex(found.shape):
    ends = []
    for sign in (1, -1):
      moved = tables.policy.copy()
      moved[i] += sign * step
      ends.append(margin(space, moved, *settings))
    expected[i] = (ends[0] - ends[1]) / (2 * step)
  np.testing.assert_allclose(found, expected, atol=1e-9)
  of_mean = enumeration.true_gradient(space, tables, sampling, 0.0)
  distance = np.abs(found - of_mean).max()
  assert distance < 1e-12 if kappa == 0 else distance > 1e-2
