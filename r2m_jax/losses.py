"""Losses of the policy and of the reward head: arrays in, (scalar, metrics) out.

Equation numbers are those of R2M (arXiv 2601.22664).
"""

import jax
import jax.numpy as jnp

from r2m_jax.ops import aggregate, check, masked_mean


def ppo_clip(
  new_logprobs: jax.Array,
  old_logprobs: jax.Array,
  advantages: jax.Array,
  mask: jax.Array,
  *,
  clip_eps: float,
  aggregation: str,
) -> tuple[jax.Array, dict[str, jax.Array]]:
  """Clipped importance-ratio objective, negated (eq. 2, first term).

    rho = exp(new - old);   L = -(A >= 0 ? min(rho, 1 + eps) : max(rho, 1 - eps)) * A

  The textbook min(rho * A, clip(rho) * A) has a tie at rho = 1, where every first minibatch sits, and automatic
  differentiation may split the gradient there. This form has none.

  Args:
    new_logprobs, old_logprobs, advantages: f32[B, T].
    mask: bool[B, T], True on response tokens.
    clip_eps: half-width of the trust region.
    aggregation: see `ops.aggregate`.
  """
  check(new_logprobs, "B T"), check(old_logprobs, "B T"), check(advantages, "B T"), check(mask, "B T", jnp.bool_)
  log_ratio = jnp.where(mask, new_logprobs - old_logprobs, 0)
  ratio = jnp.exp(log_ratio)
  clipped = jnp.where(advantages >= 0, jnp.minimum(ratio, 1 + clip_eps), jnp.maximum(ratio, 1 - clip_eps))
  loss = aggregate(-clipped * advantages, mask, aggregation)
  metrics = {
    "policy/clip_fraction": masked_mean((clipped != ratio).astype(ratio.dtype), mask),
    "policy/ratio_deviation": jnp.abs(jnp.where(mask, ratio - 1, 0)).max(),
    "policy/approx_kl": masked_mean(ratio - 1 - log_ratio, mask),
  }
  return loss, metrics


def kl_k2(new_logprobs: jax.Array, ref_logprobs: jax.Array) -> jax.Array:
  """Per-token half squared log-ratio [B, T]. On-policy its gradient is that of KL(policy || reference)."""
  return 0.5 * (new_logprobs - ref_logprobs) ** 2


def kl_k3(new_logprobs: jax.Array, ref_logprobs: jax.Array) -> jax.Array:
  """Per-token exp(-d) - 1 + d with d = new - ref [B, T]: unbiased and non-negative as a value.

  As a loss its on-policy gradient is that of KL(reference || policy), the other direction: use it to report.
  """
  d = new_logprobs - ref_logprobs
  return jnp.exp(-d) - 1 + d


def bradley_terry(winner: jax.Array, loser: jax.Array) -> jax.Array:
  """-log sigmoid(r_w - r_l), mean over pairs (eq. 5). f32[P], f32[P] -> f32[]."""
  return -jax.nn.log_sigmoid(winner - loser).mean()


def group_reward_entropy(rewards: jax.Array, *, eps: float) -> jax.Array:
  """Entropy of p = softmax((r - mean r) / std r) inside each group, mean over groups, nats (eq. 6).

  A small entropy means that the rewards of a group are told apart. std uses 1/K, and eps is added to the variance, so
  that a group of nearly equal rewards has bounded gradients; a group of exactly equal rewards has gradient zero.

  Args:
    rewards: f32[P, K].
    eps: added to the variance.
  """
  check(rewards, "P K")
  tied = rewards.max(-1, keepdims=True) == rewards.min(-1, keepdims=True)
  rewards = jnp.where(tied, jax.lax.stop_gradient(rewards), rewards)
  centred = rewards - rewards.mean(-1, keepdims=True)
  z = centred * jax.lax.rsqrt((centred**2).mean(-1, keepdims=True) + eps)
  logp = jax.nn.log_softmax(z)
  return -(jnp.exp(logp) * logp).sum(-1).mean()


def grebt(
  rewards: jax.Array, annotations: jax.Array, *, alpha: float, eps: float
) -> tuple[jax.Array, dict[str, jax.Array]]:
  """(1 - alpha) * L_BT + alpha * L_GRE (eq. 7).

  The annotation scores alone pick each group's winner and loser (algorithm 1): they are data, not a function of the
  head. Where a whole group ties, winner and loser are the same row and the pair has gradient zero.

  Args:
    rewards: f32[P, K], from the refreshed policy feedback; gradients flow through these.
    annotations: f32[P, K], the scores that the policy was trained on in this step.
    alpha: weight of the entropy, 0 to 1.
    eps: see `group_reward_entropy`.
  """
  check(rewards, "P K"), check(annotations, "P K")
  winner, loser = annotations.argmax(-1), annotations.argmin(-1)
  r_w, r_l = (jnp.take_along_axis(rewards, i[:, None], -1)[:, 0] for i in (winner, loser))
  bt, gre = bradley_terry(r_w, r_l), group_reward_entropy(rewards, eps=eps)
  loss = (1 - alpha) * bt + alpha * gre
  agreement = jnp.where(winner == loser, 0.5, (r_w > r_l).astype(rewards.dtype)).mean()
  return loss, {"r2m/loss": loss, "r2m/bt": bt, "r2m/gre": gre, "r2m/pair_accuracy": agreement}
