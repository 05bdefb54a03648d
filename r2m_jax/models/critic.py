"""The critic of PPO: a separate backbone and a linear head that predicts the return from a
state.
"""

import jax
from flax import nnx

from r2m_jax.models.attention import Shared
from r2m_jax.models.transformer import Transformer
from r2m_jax.ops import all_bits, at_least_f32, predicts_response
from r2m_jax.types import Sequences


def read_values(
  backbone: Transformer,
  head: nnx.Linear,
  sequences: Sequences,
  shared: Shared | None = None,
  share: float = 1.0,
) -> jax.Array:
  """V(s_t) before each response token, from the state that predicts it: at least f32[B, T].

  shared, share: as in `Transformer.__call__`.
  """
  hidden = backbone(sequences.tokens, sequences.token_mask, shared=shared, share=share).hidden
  hidden = at_least_f32(predicts_response(hidden, sequences.response_mask.shape[1]))
  with all_bits():
    return head(hidden)[..., 0]
