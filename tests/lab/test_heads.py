"""The score head of a proxy: its fit against torch and against known labels."""

import numpy as np
import pytest
import torch

from r2m_jax.lab import heads


def pairs(count, width, seed=0, flip=0.0):
  """Differences whose sign along a direction is the label. A share of the labels is exchanged."""
  rng = np.random.default_rng(seed)
  gaps, direction = rng.normal(size=(count, width)), rng.normal(size=width)
  gaps *= np.sign(gaps @ direction)[:, None]
  return gaps * np.where(rng.uniform(size=count) < flip, -1, 1)[:, None], direction


@pytest.mark.parametrize("penalty", [1e-2, 1.0])
def test_the_fit_is_the_minimum(penalty):
  """Oracle: torch's own optimizer and softplus on the same loss in float64."""
  gaps, _ = pairs(60, 12, flip=0.2)
  found = heads.logistic(gaps, penalty)
  w = torch.zeros(12, dtype=torch.float64, requires_grad=True)
  x = torch.tensor(gaps)
  options = dict(
    max_iter=500, tolerance_grad=1e-12, tolerance_change=1e-16, line_search_fn="strong_wolfe"
  )
  optimizer = torch.optim.LBFGS([w], **options)

  def closure():
    optimizer.zero_grad()
    loss = torch.nn.functional.softplus(-(x @ w)).mean() + penalty * (w @ w) / 2
    loss.backward()
    return loss

  optimizer.step(closure)
  np.testing.assert_allclose(found, w.detach().numpy(), atol=1e-6)


def test_more_noise_takes_a_larger_penalty_and_orders_less():
  clean, noisy = (heads.choose_penalty(pairs(300, 40, flip=flip)[0], 0) for flip in (0.0, 0.3))
  assert clean[0] < noisy[0] and clean[1] > 0.85 and 0.5 < noisy[1] < 0.75
  gaps, direction = pairs(300, 40, flip=0.3)
  found = heads.logistic(gaps, noisy[0])
  cosine = found @ direction / np.linalg.norm(found) / np.linalg.norm(direction)
  assert cosine > 0.7
  assert heads.choose_penalty(gaps, 0) == noisy
