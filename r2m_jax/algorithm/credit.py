"""Credit (algorithm 1): from annotation scores to the data of the policy's minibatches."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx

from r2m_jax.algorithm.advantages import ESTIMATORS
from r2m_jax.algorithm.certify import make_certify
from r2m_jax.algorithm.objective import (
  KL_OF_LOGPROBS,
  kl_estimator,
  make_advantages,
  shape_scores,
)
from r2m_jax.algorithm.read import (
  Defs,
  all_rows,
  deal_of,
  parts_of,
  sampling,
  shared_prompts,
  split_rows,
)
from r2m_jax.models.attention import Shared
from r2m_jax.models.critic import read_values
from r2m_jax.models.logprobs import token_stats
from r2m_jax.parallel.rows import map_rows
from r2m_jax.types import Experience, Feedback, Judged, Rollout, Sequences, TrainState


def make_credit(defs: Defs, config) -> Callable[..., tuple[Experience, dict[str, jax.Array]]]:
  """Builds `credit(state, rollout, scores, judged, old, ref, beta) -> (Experience, metrics)`: scores
  to advantages (eq. 1, or the estimator's own).

  Of the built function:
    scores: f32[B (+ P)], the annotation scores of `all_rows` of the rollout.
    judged: `Judged`, of the samples only.
    old, ref: `Feedback` of policy and reference, of the samples only.
    beta: f32[], weight of the KL.
  """
  estimator, shaping = ESTIMATORS[config.algorithm], config.shaping
  K, parts = config.rollout.group_size, parts_of(config)
  advantages_of, token_kl_of = make_advantages(config), make_token_kl(defs, config)
  certify = make_certify(config)

  def credit(
    state: TrainState, rollout: Rollout, scores, judged: Judged, old: Feedback, ref: Feedback, beta
  ):
    rows, sequences = all_rows(rollout), rollout.samples
    all_shaped = shape_scores(scores, rows.response_mask.sum(-1), rows.has_eos, shaping)
    shaped = split_rows(all_shaped, len(sequences.tokens))
    token_kl = token_kl_of(state, sequences, old, ref)

    def values_of(part):
      shared = shared_prompts(K, sequences, part.tokens)
      return open_values(defs, state.critic, part, shared)

    values = None
    if estimator.baseline == "critic":
      values = map_rows(values_of, parts, sequences, deal=deal_of(sequences, K, defs.share))
    targets = advantages_of(
      shaped.samples,
      token_kl,
      sequences.response_mask,
      beta,
      greedy_scores=shaped.greedy,
      values=values,
    )
    experience = Experience(
      sequences=sequences,
      old_logprobs=old.logprobs,
      ref_logprobs=ref.logprobs,
      ref_hidden=ref.last_hidden,
      advantages=targets.advantages,
      old_values=values,
      returns=targets.returns,
    )
    return certify(state.certificate, judged, experience)

  return credit


def make_token_kl(defs: Defs, config) -> Callable[..., jax.Array]:
  """Builds `token_kl(state, sequences, old, ref) -> f32[B, T]`: the KL of each token that enters
  the reward, by the config's estimator; zeros if the KL is in the loss.
  """
  estimator, in_reward = kl_estimator(config, defs.vocab_size), config.kl.placement == "reward"
  draw, parts = sampling(config) | dict(chunk=config.logits_chunk), parts_of(config)
  K = config.rollout.group_size

  def token_kl(state: TrainState, sequences: Sequences, old: Feedback, ref: Feedback):
    zeros = jnp.zeros_like(old.logprobs)
    if not in_reward:
      return zeros
    if estimator != "exact":
      return KL_OF_LOGPROBS[estimator](old.logprobs, ref.logprobs)
    T = sequences.response_mask.shape[1]
    head = defs.open_policy(state.policy, state.ref).head
    ref_head = defs.open_ref(state.ref).head

    def exact(h, ref_h, tokens, mask):
      ref = ref_head, ref_h
      return token_stats(head, h, tokens, ref=ref, mask=mask, share=defs.share, **draw).kl

    rows = old.last_hidden, ref.last_hidden, sequences.tokens[:, -T:], sequences.response_mask
    return map_rows(exact, parts, *rows, deal=deal_of(sequences, K, defs.share))

  return token_kl


def open_values(defs: Defs, critic, sequences: Sequences, shared: Shared) -> jax.Array:
  """The critic's value V before each response token, f32[B, T]."""
  assert defs.critic_backbone is not None and defs.critic_head is not None
  backbone = nnx.merge(defs.critic_backbone, critic["backbone"])
  head = nnx.merge(defs.critic_head, critic["head"])
  return read_values(backbone, head, sequences, shared, defs.share)
