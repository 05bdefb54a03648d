"""Turns scores into advantages. Row p * K + k is sample k of prompt p. Everything is at least
float32.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import struct

from r2m_jax.ops import check, masked_whiten


def centred_groups(scores: jax.Array, group_size: int) -> jax.Array:
  """r_i - mean of its group.   f32[B] -> f32[P, K].

  Exactly 0 if all scores of a group are equal: the mean of equal numbers may be rounded, so the
  first score is subtracted before.
  """
  groups = scores.reshape(-1, group_size)
  groups = groups - groups[:, :1]
  return groups - groups.mean(-1, keepdims=True)


def rloo(scores: jax.Array, group_size: int) -> jax.Array:
  """Leave-one-out baseline (eq. 1): A_i = r_i - mean over j != i of r_j.   f32[B] -> f32[B].

  Computed as K / (K - 1) * (r_i - mean r), which is equal and needs only one reduction.
  """
  check(scores, "B")
  return (centred_groups(scores, group_size) * (group_size / (group_size - 1))).reshape(-1)


NORMS = ("group", "batch", "none")


def grpo(scores: jax.Array, group_size: int, *, eps: float, norm: str = "group") -> jax.Array:
  """Scores that are centred in their group and standardised: A_i = (r_i - mean r) / sqrt(var +
  eps).   f32[B] -> f32[B].

  var, with 1/K, is the variance of the group (GRPO). With norm="batch" it is the mean variance of
  all groups; norm="none" does not divide (Dr. GRPO). If all scores of a group are equal, its
  advantages are zero.
  """
  check(scores, "B")
  centred = centred_groups(scores, group_size)
  if norm == "none":
    return centred.reshape(-1)
  variance = (centred**2).mean(-1, keepdims=True)
  variance = variance.mean() if norm == "batch" else variance
  return (centred * jax.lax.rsqrt(variance + eps)).reshape(-1)


def remax(scores: jax.Array, greedy_scores: jax.Array, group_size: int) -> jax.Array:
  """Greedy baseline: A_i = r_i - r of the prompt's greedy response (ReMax, arXiv 2310.10505).

  f32[B], f32[P] -> f32[B]. The baseline does not depend on the sample, so the gradient stays
  unbiased.
  """
  check(scores, "B")
  check(greedy_scores, "P")
  return scores - jnp.repeat(greedy_scores, group_size)


def returns_to_go(token_rewards: jax.Array, mask: jax.Array) -> jax.Array:
  """Sum of the rewards from each token on, undiscounted.   f32[B, T], bool[B, T] -> f32[B, T]."""
  check(token_rewards, "B T")
  check(mask, "B T", jnp.bool_)
  rewards = jnp.where(mask, token_rewards, 0)
  return jnp.where(mask, jnp.cumsum(rewards[:, ::-1], -1)[:, ::-1], 0)


def gae(
  token_rewards: jax.Array, values: jax.Array, mask: jax.Array, *, gamma: float, lam: float
) -> tuple[jax.Array, jax.Array]:
  """Generalised advantage estimation (arXiv 1506.02438).

    delta_t = r_t + gamma V_{t+1} - V_t;   A_t = delta_t + gamma lam A_{t+1};   V after the last token is 0

  Args:
    token_rewards, values: f32[B, T]; masks are contiguous from the first column, so the recursion
      runs backwards over T.

  Returns:
    (advantages, returns A + V), f32[B, T] each, zero off the mask.
  """
  check(token_rewards, "B T")
  check(values, "B T")
  check(mask, "B T", jnp.bool_)
  rewards, values = jnp.where(mask, token_rewards, 0), jnp.where(mask, values, 0)
  next_values = jnp.concatenate([values[:, 1:], jnp.zeros_like(values[:, :1])], 1)
  delta = rewards + gamma * next_values - values

  def backwards(later, delta):
    advantage = delta + gamma * lam * later
    return advantage, advantage

  _, found = jax.lax.scan(backwards, jnp.zeros_like(delta[:, 0]), delta.T, reverse=True)
  advantages = jnp.where(mask, found.T, 0)
  return advantages, jnp.where(mask, advantages + values, 0)


def per_token(advantages: jax.Array, response_mask: jax.Array) -> jax.Array:
  """Copies one advantage per row to every token of its response.   f32[B], bool[B, T] -> f32[B,
  T].
  """
  check(advantages, "B")
  check(response_mask, "B T", jnp.bool_)
  return jnp.where(response_mask, advantages[:, None], 0)


@struct.dataclass
class Targets:
  advantages: jax.Array  # f32[B, T]
  returns: Any = None  # f32[B, T], the critic's targets; None without a critic


class Scored(NamedTuple):
  """Scores, KL and baselines of a step's samples."""

  scores: jax.Array  # f32[B], shaped, of whole responses
  penalty: jax.Array  # f32[B, T], subtracted from each token's reward; 0 off the mask
  mask: jax.Array  # bool[B, T]
  greedy_scores: jax.Array | None  # f32[P]; None if the baseline is not "greedy"
  values: jax.Array | None  # f32[B, T], the critic's; None if the baseline is not "critic"

  def of_responses(self) -> jax.Array:
    """One reward for the whole response, f32[B]."""
    return self.scores - self.penalty.sum(-1)

  def of_tokens(self) -> jax.Array:
    """A reward for each token, f32[B, T]; the score is added to the last token."""
    last = jnp.arange(self.mask.shape[1]) == self.mask.sum(-1, keepdims=True) - 1
    return jnp.where(last, self.scores[:, None], 0) - self.penalty


class Estimator(NamedTuple):
  """A rule that turns scores into advantages."""

  # (Scored, group size, config) -> Targets. The config is read while it is traced.
  advantage: Callable[..., Targets]
  # the baseline: "group" the other samples of the prompt, "batch" all samples, "greedy" the
  # prompt's greedy response, "critic" a critic's values
  baseline: str


def _rloo(scored: Scored, group_size: int, config) -> Targets:
  return Targets(per_token(rloo(scored.of_responses(), group_size), scored.mask))


def _grpo(scored: Scored, group_size: int, config) -> Targets:
  settings = dict(eps=config.ppo.advantage_eps, norm=config.ppo.advantage_norm)
  return Targets(per_token(grpo(scored.of_responses(), group_size, **settings), scored.mask))


def _remax(scored: Scored, group_size: int, config) -> Targets:
  assert scored.greedy_scores is not None  # the estimator's baseline
  found = remax(scored.of_responses(), scored.greedy_scores, group_size)
  return Targets(per_token(found, scored.mask))


def _reinforce(scored: Scored, group_size: int, config) -> Targets:
  returns = returns_to_go(scored.of_tokens(), scored.mask)
  return Targets(masked_whiten(returns, scored.mask))


def _ppo(scored: Scored, group_size: int, config) -> Targets:
  assert scored.values is not None  # the estimator's baseline
  settings = dict(gamma=config.critic.gamma, lam=config.critic.lam)
  return Targets(*gae(scored.of_tokens(), scored.values, scored.mask, **settings))


ESTIMATORS = {
  "rloo": Estimator(_rloo, "group"),
  "grpo": Estimator(_grpo, "group"),
  "reinforce++": Estimator(_reinforce, "batch"),
  "remax": Estimator(_remax, "greedy"),
  "ppo": Estimator(_ppo, "critic"),
}
