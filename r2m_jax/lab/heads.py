"""A proxy reward model without training its backbone: a linear score head, fitted to the last states
of chosen and rejected replies.

It takes one forward pass of each reply and a convex problem of the model's width: a quarter of the
time of an epoch of the whole model.
"""

from pathlib import Path

import numpy as np
from flax import nnx
from scipy import optimize, special  # jax brings it

from r2m_jax.data.datasets import SHORTER_INPUTS, sides_of
from r2m_jax.data.text import pad_left
from r2m_jax.hf import export
from r2m_jax.hf.folders import RewardModel, load_reward, reward_start
from r2m_jax.models.reward import read_rte
from r2m_jax.parallel import hosts, sharding
from r2m_jax.run.progress import progress
from r2m_jax.tasks.serve import batch_size, batches, spread

PENALTIES = tuple(10.0**power for power in range(-4, 3))
FOLDS = 5


def fit(config, rows: list[dict], workdir: Path, mesh, out: Path) -> dict[str, float]:
  """Writes to `out` the backbone of config.policy.path with a head fitted to `rows`, pairs with
  prompt, chosen and rejected. Returns the penalty and the cross-validated accuracy on the labels.
  """
  model = load_reward(config.policy.path, config, mesh, from_policy=True, workdir=workdir)
  print(model.renderer.describe(rows[0]["prompt"], rows[0]["chosen"]))
  sides = [side for row in rows for side in sides_of(config, model.renderer.tokenizer, row)]
  states = last_states(config, model, sides, mesh).astype(float)
  spread_of = np.maximum(states.std(0), 1e-6)
  gaps = (states[0::2] - states[1::2]) / spread_of
  penalty, accuracy = choose_penalty(gaps, config.seed)
  weights = logistic(gaps, penalty) / spread_of
  phi = reward_start(model, mesh)["phi"]
  phi["kernel"][...] = np.asarray(weights[:, None], phi["kernel"][...].dtype)
  print(
    f"head     {len(rows)} pairs, {len(weights)} weights: penalty {penalty:g}, "
    f"{accuracy:.1%} of the labels in {FOLDS}-fold cross-validation"
  )
  export.write_reward(out, config, model, model.state, phi, workdir)
  return {"penalty": penalty, "labels_ordered": accuracy}


def last_states(config, model: RewardModel, rows: list[dict], mesh) -> np.ndarray:
  """H_last, the input of phi, of rows with prompt, response and truncated, f32[N, D]."""

  @sharding.jit_on(mesh)
  def read(backbone, tokens, mask):
    return read_rte(nnx.merge(model.graphdef, backbone), tokens, mask)

  renderer = model.renderer
  ids = [renderer.ids(r["prompt"], r["response"], truncated=r["truncated"]) for r in rows]
  lengths = [len(row) for row in ids]
  renderer.tokenizer.warn_beyond(lengths, "responses of pairs", SHORTER_INPUTS)
  found = np.zeros((len(rows), model.arch.hidden_size), np.float32)
  size = batch_size(config, config.score, len(rows), mesh)
  with progress(-(-len(rows) // size), "states", unit="batch") as bar:
    for index in batches(lengths, size):
      tokens, mask = pad_left([ids[i] for i in index], renderer.tokenizer.pad_id)
      states = read(model.state, *spread((tokens, mask), mesh))
      bar.dispatched()
      found[index] = hosts.fetch(states)
      bar.update()
  return found


def logistic(gaps: np.ndarray, penalty: float) -> np.ndarray:
  """The minimum over w of mean log(1 + exp(-gaps w)) + penalty |w|^2 / 2: Bradley-Terry (eq. 5) with
  a quadratic penalty.

  gaps: f64[N, D], chosen minus rejected.   -> f64[D].
  """

  def loss(w):
    margins = gaps @ w
    value = np.logaddexp(0, -margins).mean() + penalty * (w @ w) / 2
    return value, penalty * w - gaps.T @ special.expit(-margins) / len(gaps)

  options = {"maxiter": 2000, "ftol": 1e-14, "gtol": 1e-9}
  start = np.zeros(gaps.shape[1])
  return optimize.minimize(loss, start, jac=True, method="L-BFGS-B", options=options).x


def choose_penalty(gaps: np.ndarray, seed: int) -> tuple[float, float]:
  """(the penalty with the lowest cross-validated loss, the share of labels that it orders
  correctly), from only the noisy labels.
  """
  order = np.random.default_rng([seed, 31]).permutation(len(gaps))
  folds = [order[i::FOLDS] for i in range(FOLDS)]
  best = (np.inf, PENALTIES[-1], 0.5)
  for penalty in PENALTIES:
    margins = np.zeros(len(gaps))
    for held in folds:
      rest = np.setdiff1d(order, held)
      margins[held] = gaps[held] @ logistic(gaps[rest], penalty)
    loss = np.logaddexp(0, -margins).mean()
    best = min(best, (loss, penalty, float((margins > 0).mean())))
  return best[1], best[2]
