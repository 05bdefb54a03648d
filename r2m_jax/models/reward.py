"""The reward model that reads the policy: frozen backbone -> reward token embedding ->
cross-attention -> score.

Equation numbers are those of R2M (arXiv 2601.22664). The backbone is a `Transformer` like the
policy's; it may have another family, size and tokenizer, because its tokens need not align with the
policy's.
"""

import jax
import jax.numpy as jnp
from flax import nnx

from r2m_jax.models.attention import Shared
from r2m_jax.models.transformer import Transformer
from r2m_jax.ops import all_bits, at_least_f32, check, combine


def last_token(hidden: jax.Array, mask: jax.Array) -> jax.Array:
  """[B, L, D] -> [B, D] at the last True column of each row's mask bool[B, L]."""
  last = mask.shape[1] - 1 - mask[:, ::-1].argmax(-1)
  return jnp.take_along_axis(hidden, last[:, None, None], 1)[:, 0]


def read_reward_states(
  backbone: Transformer,
  tokens: jax.Array,
  mask: jax.Array,
  keep: bool = True,
  shared: Shared | None = None,
  share: float = 1.0,
) -> tuple[jax.Array, jax.Array]:
  """The backbone's single pass: (reward token embedding H_last, last-layer states over all tokens).

  H_last is the last-layer state at the last real token or, if the score head has two layers, the
  output of its first layer for that state.

  Args:
    tokens: i32[B, L] in the reward model's own vocabulary.
    mask: bool[B, L], True on real tokens.
    keep: False: leave out the states over all tokens, which are as large as the policy feedback.
    shared: which rows have the same beginning, if any.
    share: as in `Transformer.__call__`.

  Returns:
    At least float32 [B, Dr], and [B, L, Dr], or [B, L, 0] if they are not kept.
  """
  hidden = backbone(tokens, mask, shared=shared, share=share).hidden
  rte = backbone.embedding(last_token(hidden, mask))
  return rte, hidden if keep else hidden[..., :0]


def read_rte(backbone: Transformer, tokens: jax.Array, mask: jax.Array) -> jax.Array:
  """Reward token embedding H_last, at least f32[B, Dr]; see `read_reward_states`."""
  return read_reward_states(backbone, tokens, mask, keep=False)[0]


def member_scores(phi: nnx.Linear, h: jax.Array) -> jax.Array:
  """r = phi(h) of each of the M heads that phi holds (one, unless it is an ensemble).   f32[B, Dr] -> f32[B, M].

  No gradient reaches the bias: Bradley-Terry and the group entropy do not change when all rewards
  shift, so the true gradient of the bias is zero. Adam would turn the rounding noise around zero
  into full-sized steps.
  """
  assert phi.bias is not None  # score heads are created with a bias
  with all_bits():
    return h @ phi.kernel[...] + jax.lax.stop_gradient(phi.bias[...])


def score(phi: nnx.Linear, h: jax.Array) -> jax.Array:
  """r = phi(h), the mean of its heads.   f32[B, Dr] -> f32[B]."""
  return combine(member_scores(phi, h))


class RewardHead(nnx.Module):
  """Sequence-to-token cross-attention and the score head phi: all that R2M trains during RL."""

  def __init__(
    self,
    policy_dim: int,
    reward_dim: int,
    attention_dim: int,
    num_heads: int = 1,
    *,
    ensemble: int = 1,
    attention_scale: float = 1.0,
    rngs: nnx.Rngs,
    param_dtype=jnp.float32,
  ):
    def linear(fan_in, fan_out, use_bias=False, scale=1.0):
      init = nnx.initializers.normal(scale * fan_in**-0.5)  # variance 1 / fan_in
      # the dtype follows the input, promoted: scores never run below float32
      return nnx.Linear(
        fan_in, fan_out, use_bias=use_bias, kernel_init=init, param_dtype=param_dtype, rngs=rngs
      )

    self.num_heads = num_heads
    self.wq = linear(reward_dim, attention_dim)
    self.wk = linear(policy_dim, attention_dim)
    self.wv = linear(policy_dim, attention_dim)
    self.wo = linear(attention_dim, reward_dim, scale=attention_scale)
    self.phi = linear(reward_dim, ensemble, use_bias=True)

  def attention_weights(self, rte: jax.Array, h: jax.Array, mask: jax.Array) -> jax.Array:
    """softmax(q k^T / sqrt(d)) of eq. 3, one query per trajectory.

    With a single query, q (h W_k)^T = (q W_k^T) h^T, so keys [B, S, d] are never computed, and
    neither are values in `cross_attend`.

    Args:
      rte: f32[B, Dr].
      h: [B, S, Dp] policy feedback.
      mask: bool[B, S], False on padding.

    Returns:
      f32[B, heads, S].
    """
    check(rte, "B D")
    check(h, "B S D")
    check(mask, "B S", jnp.bool_)
    with all_bits():
      q = self._heads(self.wq(rte))
      q = jnp.einsum("bnd,pnd->bnp", q, self._heads(self.wk.kernel[...]))
      logits = jnp.einsum("bnp,bsp->bns", q, at_least_f32(h))
    logits *= (self.wk.kernel.shape[1] // self.num_heads) ** -0.5
    return jax.nn.softmax(jnp.where(mask[:, None], logits, jnp.finfo(logits.dtype).min))

  def cross_attend(self, rte: jax.Array, h: jax.Array, mask: jax.Array) -> jax.Array:
    """H_hat = softmax(q k^T / sqrt(d)) v W_o with q = H_last W_q, k = h W_k, v = h W_v (eq. 3).

    Shapes as in `attention_weights`; returns f32[B, Dr].
    """
    weights = self.attention_weights(rte, h, mask)
    with all_bits():
      read = jnp.einsum("bns,bsp->bnp", weights, at_least_f32(h))
      read = jnp.einsum("bnp,pnd->bnd", read, self._heads(self.wv.kernel[...]))
      return self.wo(read.reshape(*read.shape[:-2], -1))

  def fuse(self, rte: jax.Array, h_hat: jax.Array, omega: jax.Array) -> jax.Array:
    """H_fin = (1 - w(t)) H_hat + w(t) H_last (eq. 4). All f32[B, Dr]."""
    return (1 - omega) * h_hat + omega * rte

  def score(self, h_fin: jax.Array) -> jax.Array:
    """r = phi(H_fin).   f32[B, Dr] -> f32[B]."""
    return score(self.phi, h_fin)

  def members(self, rte: jax.Array, h: jax.Array, mask: jax.Array, omega: jax.Array) -> jax.Array:
    """r = phi(H_fin) of each head of phi: cross_attend, fuse, score.   -> f32[B, M]."""
    return member_scores(self.phi, self.fuse(rte, self.cross_attend(rte, h, mask), omega))

  def __call__(self, rte: jax.Array, h: jax.Array, mask: jax.Array, omega: jax.Array) -> jax.Array:
    """The fused reward f32[B]: cross_attend, fuse, score."""
    return combine(self.members(rte, h, mask, omega))

  def _heads(self, x: jax.Array) -> jax.Array:
    return x.reshape(*x.shape[:-1], self.num_heads, -1)
