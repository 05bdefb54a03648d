"""Update (algorithm 1): policy and critic over epochs and minibatches (eq. 2), then the reward head
(eqs. 5 to 7).

Equation numbers are those of R2M (arXiv 2601.22664).
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from r2m_jax.algorithm import losses
from r2m_jax.algorithm.advantages import ESTIMATORS
from r2m_jax.algorithm.annotate import Reward
from r2m_jax.algorithm.credit import open_values
from r2m_jax.algorithm.objective import kl_estimator, make_objective
from r2m_jax.algorithm.optim import descend
from r2m_jax.algorithm.read import (
  KEY_PAIR_NOISE,
  KEY_REFRESHED_NOISE,
  KEY_SHUFFLE,
  Defs,
  deal_of,
  sampling,
  shared_prompts,
  step_key,
)
from r2m_jax.algorithm.variants import VARIANTS, States, feed_back, other_rows
from r2m_jax.models.attention import Shared
from r2m_jax.models.logprobs import token_stats
from r2m_jax.models.reward import read_reward_states
from r2m_jax.ops import predicts_response
from r2m_jax.parallel.rows import deal_orders, dealt, put_rows, take_rows
from r2m_jax.types import Experience, Feedback, Judged, Pairs, Sequences, TrainState


class Trained(NamedTuple):
  """The states that the updates of a step change."""

  policy: Any
  policy_opt: Any
  critic: Any
  critic_opt: Any
  feedback: jax.Array  # [B, L, Dp], h', from the last epoch


class TrainedReward(NamedTuple):
  head: Any
  opt: Any
  metrics: dict[str, jax.Array]  # f32[] each


def shared_group(config) -> int:
  """How many neighbouring rows of a minibatch have one prompt."""
  return dealt(config.rollout.group_size, config.ppo.minibatches)


def shared_in(config, batch: Experience, whole: Experience) -> Shared:
  """How the rows of a micro-batch share prompts; `whole` is its minibatch."""
  return shared_prompts(shared_group(config), whole.sequences, batch.advantages)


def shuffles(config, state: TrainState, rows: int) -> jax.Array:
  """Which rows each update of a step sees: i32[updates, rows / minibatches]; see `take_rows`."""
  epochs, minibatches = config.ppo.epochs, config.ppo.minibatches
  keys = jax.random.split(step_key(state, KEY_SHUFFLE), epochs)
  orders = jax.vmap(lambda key: deal_orders(key, rows, minibatches))(keys)
  return orders.reshape(epochs * minibatches, -1)


def make_policy_loss(defs: Defs, config, objective: Callable) -> Callable:
  """Builds `policy_loss(policy, batch, ref, beta, whole) -> (f32[], (TokenStats, h'))`: eq. 2, the
  clipped objective minus beta * KL(policy || reference).

  batch is a micro-batch of the minibatch `whole`, and the loss is its contribution to the
  minibatch's loss. h', [rows, L, Dp], are the refreshed states of these rows, with width 0 if the
  variant reads none.
  """
  draw, layer = sampling(config) | dict(chunk=config.logits_chunk), config.r2m.feedback_layer
  exact = kl_estimator(config, defs.vocab_size) == "exact"
  reads_policy = VARIANTS[config.variant].reads == "policy"

  def policy_loss(policy_state, batch: Experience, ref_state, beta, whole: Experience):
    policy, sequences = defs.open_policy(policy_state, ref_state), batch.sequences
    T = sequences.response_mask.shape[1]
    out = policy(
      sequences.tokens,
      sequences.token_mask,
      feedback_layer=layer,
      shared=shared_in(config, batch, whole),
      share=defs.share,
    )
    ref = (defs.open_ref(ref_state).head, batch.ref_hidden) if exact else None
    last_hidden, tokens = predicts_response(out.hidden, T), sequences.tokens[:, -T:]
    mask = sequences.response_mask
    stats = token_stats(
      policy.head, last_hidden, tokens, ref=ref, mask=mask, share=defs.share, **draw
    )
    h = out.feedback if reads_policy else out.feedback[..., :0]
    return objective(stats, batch, beta, whole)[0], (stats, h)

  return policy_loss


def make_critic_loss(defs: Defs, config) -> tuple[Callable, Callable]:
  """Builds `critic_loss(critic, batch, whole) -> (f32[], values f32[rows, T])`, and its part
  `squared_error(values, batch, whole=None) -> (f32[], metrics)`.
  """
  clip = config.critic.value_clip

  def squared_error(values, batch: Experience, whole=None):
    mask = batch.sequences.response_mask
    return losses.value_clip(values, batch.old_values, batch.returns, mask, clip=clip, whole=whole)

  def critic_loss(critic, batch: Experience, whole: Experience):
    values = open_values(defs, critic, batch.sequences, shared_in(config, batch, whole))
    return squared_error(values, batch, whole.sequences.response_mask)[0], values

  return critic_loss, squared_error


def make_update_policy(defs: Defs, config) -> Callable[..., tuple[Trained, dict[str, jax.Array]]]:
  """Builds `update_policy(state, experience, hidden, beta) -> (Trained, metrics)`: a scan over
  epochs x minibatches of policy and critic.

  hidden, [B, L, Dp], is h of the old policy. Each update replaces the rows that it read, so hidden
  is h' after the last epoch. Metrics are f32[updates] each.
  """
  objective = make_objective(config, defs.vocab_size)
  policy_loss = make_policy_loss(defs, config, objective)
  critic_loss, squared_error = make_critic_loss(defs, config)
  has_critic = ESTIMATORS[config.algorithm].baseline == "critic"
  minibatches = config.ppo.minibatches
  descent = functools.partial(descend, parts=config.ppo.accumulation)

  def dealt_out(batch: Experience):
    return deal_of(batch.sequences, shared_group(config), defs.share)

  def update_critic(critic, opt, batch: Experience):
    loss = functools.partial(critic_loss, whole=batch)
    critic, opt, _, values, done = descent(
      defs.critic_tx, loss, critic, opt, batch, deal=dealt_out(batch)
    )
    return critic, opt, squared_error(values, batch)[1] | named("critic", done)

  def update_policy(state: TrainState, experience: Experience, hidden, beta):
    def update(carry: Trained, order):
      policy, opt, critic, critic_opt, hidden = carry
      batch = take_rows(experience, order, minibatches) if minibatches > 1 else experience
      loss = functools.partial(policy_loss, whole=batch)
      policy, opt, _, (stats, h), done = descent(
        defs.policy_tx, loss, policy, opt, batch, state.ref, beta, deal=dealt_out(batch)
      )
      hidden = put_rows(hidden, order, minibatches, h) if minibatches > 1 else h
      metrics = objective(stats, batch, beta)[1] | named("policy", done)
      if has_critic:
        critic, critic_opt, found = update_critic(critic, critic_opt, batch)
        metrics |= found
      return Trained(policy, opt, critic, critic_opt, hidden), metrics

    orders = shuffles(config, state, len(experience.advantages))
    carry = Trained(state.policy, state.policy_opt, state.critic, state.critic_opt, hidden)
    return jax.lax.scan(update, carry, orders)

  return update_policy


def make_update_reward(defs: Defs, config, reward: Reward) -> Callable[..., TrainedReward]:
  """Builds `update_reward(state, sequences, judged, own, ref, trained, w, pairs)`: one step on
  GREBT (eq. 7) for cross-attention and phi, with rte and h' as data. The policy and the backbone do
  not change, and the head changes only if the variant trains it.

  Arguments of the built function, all for the samples only:
    own: the reward backbone's `States`.
    ref: `Feedback` of the reference.
    trained: the `Trained` of this step.
    pairs: the step's labels; None: the annotation scores choose the winner and the loser of each
      group.
  """
  variant = VARIANTS[config.variant]
  loss_of, labelled_of = make_reward_loss(config, reward), make_read_labelled(defs, config)

  def update_reward(
    state: TrainState,
    sequences: Sequences,
    judged: Judged,
    own: States,
    ref: Feedback,
    trained: Trained,
    w,
    pairs: Pairs | None,
  ) -> TrainedReward:
    if not variant.trained:
      return TrainedReward(state.reward_head, state.reward_opt, {})
    rows = len(sequences.tokens)
    states = feed_back(
      variant.feedback,
      States.of(trained.feedback, sequences),
      States.of(ref.hidden, sequences),
      own,
      step_key(state, KEY_REFRESHED_NOISE),
      others=other_rows(rows, rows),
    )
    labelled = None if pairs is None else labelled_of(state, trained.policy, pairs)
    loss = loss_of(judged, states, w, labelled)
    head, opt, _, metrics, done = descend(defs.reward_tx, loss, state.reward_head, state.reward_opt)
    if reward.keep is not None:
      before = state.reward_head, state.reward_opt, jax.tree.map(jnp.zeros_like, done)
      head, opt, done = reward.keep((head, opt, done), before)
    return TrainedReward(head, opt, metrics | named("r2m", done))

  return update_reward


def make_reward_loss(config, reward: Reward) -> Callable[..., Callable]:
  """Builds `loss_of(judged, states, w, labelled)`, which gives `loss(head state) -> (f32[],
  metrics)`: GREBT (eq. 7), averaged over the heads of an ensemble.

  labelled: (rte, states, weight) of the labelled pairs, or None.
  """
  variant = VARIANTS[config.variant]
  K = config.rollout.group_size
  score = reward.score
  alpha = config.r2m.alpha if variant.alpha is None else variant.alpha
  grebt = functools.partial(losses.grebt, alpha=alpha, eps=config.r2m.gre_eps)
  sure = dict(confidence=config.r2m.label_confidence, temperature=config.r2m.label_temperature)

  def loss_of(judged: Judged, states: States, w, labelled):
    rte, states, labelled = jax.lax.stop_gradient((judged.rte, states, labelled))
    annotations, trusted = judged.scores.reshape(-1, K), None
    if sure["confidence"]:
      trusted = losses.trusted_pairs(annotations, judged.scores_frozen.reshape(-1, K), **sure)

    def loss(head_state):
      rewards = score(head_state, rte, states, w)  # [B, M]
      pairs = None
      if labelled is not None:
        winner, loser = jnp.split(score(head_state, *labelled[:2], w), 2)
        pairs = winner.T, loser.T

      def member(rewards, pairs):
        known = None if pairs is None else (*pairs, labelled[2])
        return grebt(rewards.reshape(-1, K), annotations, pairs=known, trusted=trusted)

      value, metrics = jax.vmap(member)(rewards.T, pairs)
      return value.mean(), {name: value.mean() for name, value in metrics.items()}

    return loss

  return loss_of


def make_read_labelled(defs: Defs, config) -> Callable:
  """Builds `read_labelled(state, policy_state, pairs)`: (rte f32[2m, Dr], the `States` that the
  variant reads, by the updated policy, weight f32[m]) of labelled pairs.
  """
  feedback, layer = VARIANTS[config.variant].feedback, config.r2m.feedback_layer

  def read_labelled(state: TrainState, policy_state, pairs: Pairs):
    def states(model):
      hidden = model(pairs.tokens, pairs.token_mask, feedback_layer=layer).feedback
      return States(hidden, pairs.token_mask, pairs.response_mask)

    backbone = nnx.merge(defs.reward_backbone, state.reward_backbone)
    rte, own = read_reward_states(backbone, pairs.reward_tokens, pairs.reward_mask)
    fed = feed_back(
      feedback,
      states(defs.open_policy(policy_state, state.ref)),
      states(defs.open_ref(state.ref)),
      States(own, pairs.reward_mask),
      step_key(state, KEY_PAIR_NOISE),
      others=np.roll(np.arange(len(rte)), 1),
    )
    return rte, fed, pairs.weight

  return read_labelled


def named(part: str, metrics: dict) -> dict:
  """Metrics with the name of their part as a prefix."""
  return {f"{part}/{name}": value for name, value in metrics.items()}
