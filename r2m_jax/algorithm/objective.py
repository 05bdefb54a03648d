"""The policy's training objective: advantages per token from scores, and the loss of a minibatch
(eq. 2).

The functions are built once from a config. They see only arrays, no model and no tokenizer. The KL
to the reference can enter through the reward (without a gradient, credited like any reward),
through the loss, or both:

  loss, any estimator     the states visited are held fixed:  E_s[grad KL(policy(.|s) || reference(.|s))]
  reward, k1              the sampled log-ratio of each token; its score-function gradient is that of the sequence's KL
  reward, exact           the exact KL of each token. The reward can only credit what a token leads to, so the direct
                          derivative is in the loss too; the two together are the gradient of the
                          sequence's KL, with less variance than k1 (for RLOO, ReMax and PPO with
                          gamma = lambda = 1; what divides the advantage scales the first part
                          alone)
  reward, k2 and k3       as any other reward: penalties, and not the gradient of a KL
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from r2m_jax.algorithm import losses
from r2m_jax.algorithm.advantages import ESTIMATORS, Scored, Targets
from r2m_jax.models.logprobs import TokenStats
from r2m_jax.ops import aggregate, masked_mean, masked_sum, masked_whiten
from r2m_jax.types import Experience, Sequences

KL_OF_LOGPROBS = {"k1": losses.kl_k1, "k2": losses.kl_k2, "k3": losses.kl_k3}


def shape_scores(scores: jax.Array, length: jax.Array, has_eos: jax.Array, settings) -> jax.Array:
  """Changes to the reward of whole responses, in this order: centring, clipping, missing end,
  length.

  Args:
    scores: f32[B], the annotation scores.
    length: i32[B], number of response tokens, including the end token.
    has_eos: bool[B].
    settings: config.shaping.
  """
  if settings.centre:
    scores = scores - scores.mean()
  if settings.clip:
    scores = jnp.clip(scores, -settings.clip, settings.clip)
  if settings.missing_eos == "subtract":
    scores = jnp.where(has_eos, scores, scores - settings.missing_eos_penalty)
  elif settings.missing_eos == "replace":
    scores = jnp.where(has_eos, scores, -settings.missing_eos_penalty)
  return scores - settings.length_penalty * length if settings.length_penalty else scores


def make_advantages(config) -> Callable[..., Targets]:
  """Builds `advantages(scores, token_kl, mask, beta, *, greedy_scores, values) -> Targets`.

  scores f32[B] are shaped, token_kl f32[B, T] is the old policy's KL of each token by the config's
  estimator (used only if the KL is in the reward), mask bool[B, T], beta f32[]; greedy_scores
  f32[P] and values f32[B, T] are the baselines "greedy" and "critic".
  """
  estimator, K = ESTIMATORS[config.algorithm], config.rollout.group_size
  in_reward, whiten = config.kl.placement == "reward", config.ppo.whiten_advantages

  def make(scores, token_kl, mask, beta, *, greedy_scores=None, values=None) -> Targets:
    penalty = (
      beta * jnp.where(mask, token_kl, 0) if in_reward else jnp.zeros(mask.shape, scores.dtype)
    )
    targets = estimator.advantage(Scored(scores, penalty, mask, greedy_scores, values), K, config)
    if whiten:
      return Targets(masked_whiten(targets.advantages, mask), targets.returns)
    return targets

  return make


def make_objective(
  config, vocab_size: int
) -> Callable[..., tuple[jax.Array, dict[str, jax.Array]]]:
  """Builds `objective(stats, batch, beta, whole=None) -> (loss, metrics)`: eq. 2 for one minibatch.

  stats are the policy's `TokenStats`, with the exact KL if the estimator is exact. batch is an
  `Experience`. If it is a micro-batch of the minibatch `whole`, the loss is its contribution to the
  minibatch's loss.
  """
  estimator = kl_estimator(config, vocab_size)
  kl_in_loss = config.kl.placement == "loss" or estimator == "exact"
  aggregation, mask_truncated = config.ppo.aggregation, config.shaping.mask_truncated
  settings = dict(
    clip_eps=config.ppo.clip_eps,
    clip_eps_high=config.ppo.clip_eps_high,
    dual_clip=config.ppo.dual_clip,
    ratio=config.ppo.ratio,
    aggregation=aggregation,
  )

  def counts(sequences: Sequences):  # bool[B, T]: the tokens in the loss
    ended = sequences.has_eos[:, None] if mask_truncated else True
    return sequences.response_mask & ended

  def objective(stats: TokenStats, batch: Experience, beta, whole: Experience | None = None):
    sampled, mask = batch.sequences.response_mask, counts(batch.sequences)
    counted = mask if whole is None else counts(whole.sequences)
    loss, metrics = losses.ppo_clip(
      stats.logprobs, batch.old_logprobs, batch.advantages, mask, whole=counted, **settings
    )
    metrics["policy/objective"] = loss
    if kl_in_loss:
      # off the mask a difference may be so large that its exponential has no finite gradient
      near = jnp.where(mask, stats.logprobs, batch.ref_logprobs)
      exact = estimator == "exact"
      kl = stats.kl if exact else KL_OF_LOGPROBS[estimator](near, batch.ref_logprobs)
      metrics["policy/kl_loss"] = aggregate(kl, mask, aggregation, counted)
      loss = loss + beta * metrics["policy/kl_loss"]
    metrics["policy/loss"] = loss
    reported = (
      stats.kl if estimator == "exact" else losses.kl_k3(stats.logprobs, batch.ref_logprobs)
    )
    metrics["kl"] = masked_sum(reported, sampled, -1).mean()
    metrics["policy/entropy"] = masked_mean(stats.entropy, sampled)
    return loss, metrics

  return objective


def kl_estimator(config: ConfigDict, vocab_size: int) -> str:
  """The estimator, with "auto" resolved: k1 in the reward; in the loss, exact for vocabularies of
  up to 1,024 entries, and otherwise k2, whose on-policy gradient is correct.
  """
  if config.kl.estimator != "auto":
    return config.kl.estimator
  if config.kl.placement == "reward":
    return "k1"
  return "exact" if vocab_size <= 1024 else "k2"
