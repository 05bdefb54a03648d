"""Real preference labels for the reward update on the gold-reward task: the gold reward orders
pairs of samples.
"""

import numpy as np

from r2m_jax.algorithm.labels import Labeller, pairs_at, pairs_per_step
from r2m_jax.goldtask import task as goldtask
from r2m_jax.ops import response_part
from r2m_jax.types import Pairs, Sequences

STREAM_LABELS = 5


def gold_labeller(config) -> Labeller:
  """Builds `label(sequences, step) -> Pairs`, a function of only the samples, the seed and the
  step.

  It labels as many pairs as the budget allows at this step. A pair has two random samples of one
  random prompt, chosen independently of the reward model. A pair with equal gold rewards counts
  against the budget and gives no label.
  """
  K, most = config.rollout.group_size, pairs_per_step(config)

  def label(sequences: Sequences, step: int) -> Pairs:
    rng = np.random.default_rng([config.seed, STREAM_LABELS, step])
    groups = rng.permutation(np.arange(most) % config.rollout.prompts)
    a, b = np.stack([g * K + rng.choice(K, 2, replace=False) for g in groups]).T
    gold = goldtask.gold(sequences, config.gold.formula).gold
    rows = np.where(gold[a] >= gold[b], [a, b], [b, a]).reshape(-1)  # winners, then losers
    weight = (np.arange(most) < pairs_at(config, step)) & (gold[a] != gold[b])
    tokens, mask = sequences.tokens[rows], sequences.token_mask[rows]
    return Pairs(
      tokens=tokens,
      token_mask=mask,
      response_mask=response_part(mask, sequences.response_mask.shape[1]),
      reward_tokens=tokens,
      reward_mask=mask,
      weight=weight.astype(np.float32),
    )

  return label
