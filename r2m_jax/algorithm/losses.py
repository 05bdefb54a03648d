"""Losses of the policy and of the reward head: arrays in, (scalar, metrics) out.

Equation numbers are those of R2M (arXiv 2601.22664).
"""

import jax
import jax.numpy as jnp

from r2m_jax.ops import aggregate, check, masked_mean, share_mean

RATIOS = ("token", "sequence")


def ppo_clip(
  new_logprobs: jax.Array,
  old_logprobs: jax.Array,
  advantages: jax.Array,
  mask: jax.Array,
  *,
  clip_eps: float,
  aggregation: str,
  clip_eps_high: float = 0.0,
  dual_clip: float = 0.0,
  ratio: str = "token",
  whole: jax.Array | None = None,
) -> tuple[jax.Array, dict[str, jax.Array]]:
  """Clipped importance-ratio objective, negated (eq. 2, first term).

    rho = exp(new - old);   L = -(A >= 0 ? min(rho, 1 + eps_high) : min(max(rho, 1 - eps), c)) * A

  The textbook min(rho * A, clip(rho) * A) has a tie at rho = 1, the value in every first minibatch,
  and automatic differentiation may split the gradient at a tie. This form has no tie.

  Args:
    new_logprobs, old_logprobs, advantages: f32[B, T].
    mask: bool[B, T], True on response tokens.
    clip_eps: half-width of the trust region.
    aggregation: see `ops.aggregate`.
    clip_eps_high: its upper half-width, if it differs (DAPO's asymmetric clip); 0: clip_eps.
    dual_clip: largest ratio c > 1 that multiplies a negative advantage (dual-clip PPO); 0: no
      limit.
    ratio: "token", or "sequence" for one ratio a row, exp(mean over its tokens of new - old)
      (GSPO).
    whole: mask of the minibatch of which these rows are a micro-batch. The loss is then their
      contribution to the minibatch's loss, and the metrics cover only these rows. None: these rows
      are the whole minibatch.
  """
  check(new_logprobs, "B T")
  check(old_logprobs, "B T")
  check(advantages, "B T")
  check(mask, "B T", jnp.bool_)
  log_ratio = jnp.where(mask, new_logprobs - old_logprobs, 0)
  if ratio == "sequence":
    log_ratio = jnp.where(mask, masked_mean(log_ratio, mask, -1)[:, None], 0)
  rho = jnp.exp(log_ratio)
  low = jnp.maximum(rho, 1 - clip_eps)
  low = jnp.minimum(low, dual_clip) if dual_clip else low
  clipped = jnp.where(advantages >= 0, jnp.minimum(rho, 1 + (clip_eps_high or clip_eps)), low)
  loss = aggregate(-clipped * advantages, mask, aggregation, whole)
  metrics = {
    "policy/clip_fraction": masked_mean((clipped != rho).astype(rho.dtype), mask),
    "policy/ratio_deviation": jnp.abs(jnp.where(mask, rho - 1, 0)).max(),
    "policy/mean_ratio_deviation": masked_mean(jnp.abs(rho - 1), mask),
    "policy/approx_kl": masked_mean(rho - 1 - log_ratio, mask),
  }
  return loss, metrics


def value_clip(
  values: jax.Array,
  old_values: jax.Array,
  returns: jax.Array,
  mask: jax.Array,
  *,
  clip: float,
  whole: jax.Array | None = None,
) -> tuple[jax.Array, dict[str, jax.Array]]:
  """The critic's squared error, clipped around its old values as in PPO: the larger of the two
  errors counts.

    L = 1/2 mean max((v - R)^2, (clip(v, v_old - c, v_old + c) - R)^2)

  All f32[B, T], mask bool[B, T]; mean over all response tokens. `whole`: see `ppo_clip`.
  """
  check(values, "B T")
  check(old_values, "B T")
  check(returns, "B T")
  check(mask, "B T", jnp.bool_)
  near = jnp.clip(values, old_values - clip, old_values + clip)
  free, held = (values - returns) ** 2, (near - returns) ** 2
  loss = 0.5 * share_mean(
    jnp.where(held > free, held, free), mask, whole
  )  # a tie takes the unclipped branch, so its gradient is not split
  metrics = {
    "critic/loss": loss,
    "critic/clip_fraction": masked_mean((held > free).astype(values.dtype), mask),
    "critic/value": masked_mean(values, mask),
    "critic/error": jnp.sqrt(masked_mean((old_values - returns) ** 2, mask)),
  }
  return loss, metrics


def kl_k1(new_logprobs: jax.Array, ref_logprobs: jax.Array) -> jax.Array:
  """Per-token log-ratio [B, T]: an unbiased value. Only for rewards, because as a loss its expected
  gradient is zero.
  """
  return new_logprobs - ref_logprobs


def kl_k2(new_logprobs: jax.Array, ref_logprobs: jax.Array) -> jax.Array:
  """Per-token half squared log-ratio [B, T]. On-policy its gradient is the gradient of KL(policy ||
  reference).
  """
  return 0.5 * (new_logprobs - ref_logprobs) ** 2


def kl_k3(new_logprobs: jax.Array, ref_logprobs: jax.Array) -> jax.Array:
  """Per-token exp(-d) - 1 + d with d = new - ref [B, T]: unbiased and non-negative as a value.

  As a loss its on-policy gradient is the gradient of KL(reference || policy), the other direction.
  It is therefore best for reporting.
  """
  d = new_logprobs - ref_logprobs
  return jnp.exp(-d) - 1 + d


def bradley_terry(
  winner: jax.Array, loser: jax.Array, weight: jax.Array | None = None
) -> jax.Array:
  """-log sigmoid(r_w - r_l), mean over pairs, weighted if weights are given (eq. 5). f32[P] each ->
  f32[].

  If all weights are 0, the loss is 0.
  """
  loss = -jax.nn.log_sigmoid(winner - loser)
  if weight is None:
    return loss.mean()
  total = weight.sum()
  return (weight * loss).sum() / jnp.where(total > 0, total, 1)


def group_reward_entropy(rewards: jax.Array, *, eps: float) -> jax.Array:
  """Entropy of p = softmax((r - mean r) / std r) within each group, averaged over groups, in nats
  (eq. 6).

  A small entropy means that the rewards of a group are well separated. std uses 1/K, and eps is
  added to the variance, so that a group of nearly equal rewards has bounded gradients; a group of
  exactly equal rewards has gradient zero.

  Args:
    rewards: f32[P, K].
    eps: added to the variance.
  """
  check(rewards, "P K")
  tied = rewards.max(-1, keepdims=True) == rewards.min(-1, keepdims=True)
  centred = jnp.where(tied, 0, rewards - rewards.mean(-1, keepdims=True))
  z = centred * jax.lax.rsqrt((centred**2).mean(-1, keepdims=True) + eps)
  logp = jax.nn.log_softmax(z)
  return -(jnp.exp(logp) * logp).sum(-1).mean()


def trusted_pairs(
  annotations: jax.Array, frozen: jax.Array, *, confidence: float, temperature: float
) -> jax.Array:
  """The weight of each group's own pair as a label: f32[P], 1 or 0.

  The winner and the loser of a group are its highest and lowest annotation. Their order is trusted
  if sigmoid(gap / temperature) > confidence, with `gap` the difference of their annotations, and if
  the frozen reward has them in the same order.

  Args:
    annotations, frozen: f32[P, K], scores by the reward in use and by the frozen reward model.
    confidence: in [0, 1).
    temperature: of the gap, chosen so that the sigmoid is the probability of a correct label.
  """
  check(annotations, "P K")
  check(frozen, "P K")

  def gap(scores):
    ends = (annotations.argmax(-1), annotations.argmin(-1))
    high, low = (jnp.take_along_axis(scores, i[:, None], -1)[:, 0] for i in ends)
    return high - low

  sure = jax.nn.sigmoid(gap(annotations) / temperature) > confidence
  return (sure & (gap(frozen) > 0)).astype(annotations.dtype)


def grebt(
  rewards: jax.Array,
  annotations: jax.Array,
  *,
  alpha: float,
  eps: float,
  pairs: tuple[jax.Array, jax.Array, jax.Array] | None = None,
  trusted: jax.Array | None = None,
) -> tuple[jax.Array, dict[str, jax.Array]]:
  """(1 - alpha) * L_BT + alpha * L_GRE (eq. 7).

  Only the annotation scores choose each group's winner and loser (algorithm 1). They are data, not
  a function of the head. If all scores of a group are equal, winner and loser are the same row and
  the pair has gradient zero.

  Args:
    rewards: f32[P, K], from the refreshed policy feedback; gradients flow through these.
    annotations: f32[P, K], the scores on which the policy was trained in this step.
    alpha: weight of the entropy, 0 to 1.
    eps: see `group_reward_entropy`.
    pairs: rewards of labelled winners and losers and their weight, f32[m] each, instead of the
      groups' own pairs.
    trusted: f32[P], the weight of each group's own pair; see `trusted_pairs`. None: all are 1.
  """
  check(rewards, "P K")
  check(annotations, "P K")
  if pairs is None:
    winner, loser = annotations.argmax(-1), annotations.argmin(-1)
    r_w, r_l = (jnp.take_along_axis(rewards, i[:, None], -1)[:, 0] for i in (winner, loser))
    bt = bradley_terry(r_w, r_l, trusted)
    accuracy = jnp.where(winner == loser, 0.5, (r_w > r_l).astype(rewards.dtype)).mean()
  else:
    r_w, r_l, weight = pairs
    bt, right = bradley_terry(r_w, r_l, weight), (r_w > r_l) + 0.5 * (r_w == r_l)
    accuracy = (weight * right).sum() / jnp.maximum(weight.sum(), 1)
  gre = group_reward_entropy(rewards, eps=eps)
  loss = (1 - alpha) * bt + alpha * gre
  metrics = {"r2m/loss": loss, "r2m/bt": bt, "r2m/gre": gre, "r2m/pair_accuracy": accuracy}
  return loss, metrics if trusted is None else metrics | {"r2m/trusted": trusted.mean()}
