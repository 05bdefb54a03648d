"""Measurements on held-out data: log-probabilities, the accuracy of scores on pairs, means with
95% intervals.
"""

from collections.abc import Hashable, Sequence
from typing import NamedTuple

import numpy as np
from flax import nnx

from r2m_jax.data.text import pad_left
from r2m_jax.hf.folders import Policy
from r2m_jax.models.logprobs import token_stats
from r2m_jax.ops import predicts_response
from r2m_jax.parallel import hosts
from r2m_jax.parallel.sharding import jit_on
from r2m_jax.report.intervals import group_mean
from r2m_jax.tasks.serve import batch_size, batches, spread


class Mean(NamedTuple):
  """A mean with its 95% interval over `groups` independent groups of `count` values."""

  value: float
  low: float
  high: float
  count: int
  groups: int


def mean_of(values: Sequence[float], groups: Sequence[Hashable], seed: int = 0) -> Mean:
  """The mean of f64[N] values, with an interval over groups (`intervals.group_mean`), because rows
  of one prompt are not independent. The ends are NaN if there is one group.
  """
  values = np.asarray(values, float)
  numbers = {group: i for i, group in enumerate(dict.fromkeys(groups))}
  index = np.asarray([numbers[group] for group in groups])
  found = group_mean(values, index, seed=seed)
  return Mean(float(values.mean()), found.low, found.high, len(values), len(numbers))


def wins(chosen: Sequence[float], rejected: Sequence[float]) -> np.ndarray:
  """1 if the chosen response scores higher, 0 if lower, 0.5 for a tie.   -> f64[N]."""
  return (np.sign(np.subtract(chosen, rejected, dtype=float)) + 1) / 2


def response_logprobs(
  config, policy: Policy, rows: Sequence[tuple[list[int], list[int]]], mesh
) -> list[np.ndarray]:
  """Log-probability of every response token at temperature 1, for rows of (prompt ids, response
  ids). f32[n] each.
  """

  @jit_on(mesh)
  def read(state, tokens, mask):
    model, T = nnx.merge(policy.graphdef, state), tokens.shape[1] - 1
    hidden = predicts_response(model(tokens, mask).hidden, T)
    return token_stats(
      model.head, hidden, tokens[:, 1:], temperature=1.0, chunk=config.logits_chunk
    ).logprobs

  results: list[np.ndarray] = [np.zeros(0)] * len(rows)
  for index in batches(
    [len(p) + len(r) for p, r in rows], batch_size(config, config.score, len(rows), mesh)
  ):
    tokens, mask = pad_left([[*rows[i][0], *rows[i][1]] for i in index], policy.tokenizer.pad_id)
    logprobs = hosts.fetch(read(policy.state, *spread((tokens, mask), mesh)))
    for row, i in enumerate(index):
      results[i] = logprobs[row, logprobs.shape[1] - len(rows[i][1]) :]
  return results


def perplexity(logprobs: Sequence[np.ndarray], groups: Sequence[Hashable]) -> Mean:
  """exp of the mean negative log-likelihood over all tokens; the interval is over groups of
  rows.
  """
  nll = mean_of(
    -np.concatenate(logprobs), [group for group, row in zip(groups, logprobs) for _ in row]
  )
  return Mean(*np.exp(nll[:3]).tolist(), nll.count, nll.groups)
