"""The share of a step's padded places that remains with packing and halvings, for a distribution of
lengths.

The lengths of responses are known only from a run. `config.plan.lengths` replaces them: lengths as
shares of the limit, all equally likely. A few steps are drawn with a fixed seed, and the rules of
the step are applied to them: `algorithm.packed` for learning, `models.generate` for decoding.
"""

from typing import NamedTuple

import numpy as np

from r2m_jax.algorithm.packed import smallest
from r2m_jax.models.generate import decoded_places
from r2m_jax.parallel.rows import turns
from r2m_jax.plan.sizes import Sizes

STEPS = 32  # drawn


class Work(NamedTuple):
  """Means over steps. The default is a step whose responses all have the maximum length."""

  share: float = 1.0  # share of the padded places that learning computes
  longest: float = 1.0  # tokens until the last row has ended, as a share of the limit
  alive: float = 1.0  # share of the rows that are decoded, until then


def expected(config, sizes: Sizes, shards: int, parts: int, copies: int) -> Work:
  """The work of a step if its rows are packed in `parts` on each of `shards` devices, with `copies`
  rows after each prompt. Prompts have the maximum length.
  """
  if not config.plan.lengths:
    return Work()
  rng = np.random.default_rng(0)
  limit, rows = sizes.response_length, sizes.rows
  shares = np.asarray(config.plan.lengths, float)
  found = []
  for _ in range(STEPS):
    lengths = np.maximum(1, np.rint(limit * rng.choice(shares, rows))).astype(int)
    longest = int(lengths.max())
    device = lengths[: rows // shards]
    decoded = decoded_places(device, limit, config.rollout.halvings) / (len(device) * longest)
    by_device = lengths.reshape(shards if rows % shards == 0 else 1, -1)
    share = learned(config, sizes, by_device, parts, copies)
    found.append((share, longest / limit, decoded))
  return Work(*map(float, np.mean(found, 0)))


def learned(config, sizes: Sizes, lengths: np.ndarray, parts: int, copies: int) -> float:
  """The share of config.packing that the fullest of the parts needs. lengths: [devices, rows]."""
  devices, rows = lengths.shape
  runs = -np.sort(-lengths.reshape(devices, rows // copies, copies).mean(-1), 1)
  parts = parts if runs.shape[1] % parts == 0 else 1
  dealt = runs[:, turns(runs.shape[1], parts)].reshape(devices, parts, -1)
  prompts, response = sizes.prompt_length / copies, sizes.response_length
  full = dealt.mean(-1).max()
  need = max(full / response, (prompts + full) / (prompts + response))
  return config.packing[smallest(config.packing, need)]
