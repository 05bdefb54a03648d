"""One R2M training step (algorithm 1), top to bottom: the file to read first.

  generate -> read_feedback -> read_reward_states -> RewardHead -> advantages -> update_policy ->
  update_reward

Everything after `generate` is one jitted, donated program, `learn`. Where policy and reward model
share a tokenizer, sampling joins it and the whole step is one program. Equation numbers are those
of R2M (arXiv 2601.22664).

What differs between estimators is in `objective`, what differs between variants in `variants`.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx, struct
from jax.sharding import Mesh

from r2m_jax.algorithm import losses
from r2m_jax.algorithm.labels import Labeller, uses_labels
from r2m_jax.algorithm.objective import (
  KL_OF_LOGPROBS,
  kl_estimator,
  make_advantages,
  make_objective,
  shape_scores,
)
from r2m_jax.algorithm.optim import descend
from r2m_jax.algorithm.schedules import kl_weight, omega
from r2m_jax.algorithm.variants import READS_POLICY, VARIANTS, Arm, States, feed_back, other_rows
from r2m_jax.models.attention import Shared
from r2m_jax.models.critic import read_values
from r2m_jax.models.generate import generate
from r2m_jax.models.logprobs import token_stats
from r2m_jax.models.reward import member_scores, read_reward_states
from r2m_jax.models.transformer import Transformer
from r2m_jax.ops import Truncation, combine, masked_mean, masked_sum, predicts_response
from r2m_jax.parallel import hosts
from r2m_jax.parallel.rows import deal_orders, dealt, map_rows, neighbours, put_rows, take_rows
from r2m_jax.parallel.sharding import lay_rows, on_mesh
from r2m_jax.types import Experience, Feedback, Judged, Pairs, Prompts, Sequences, TrainState

# what a step's key is for
KEY_SHUFFLE, KEY_NOISE, KEY_REFRESHED_NOISE, KEY_PAIR_NOISE = range(2**31 - 1, 2**31 - 5, -1)


@dataclasses.dataclass(frozen=True)
class Defs:
  """The static halves of the modules whose states live in TrainState, and their optimizers."""

  vocab_size: int  # the policy's
  policy: nnx.GraphDef
  reward_backbone: nnx.GraphDef
  reward_head: nnx.GraphDef
  phi: nnx.GraphDef
  policy_tx: optax.GradientTransformation
  reward_tx: optax.GradientTransformation
  base: nnx.GraphDef | None = None  # of the reference, where the policy is adapters on top of it
  critic_backbone: nnx.GraphDef | None = None  # of PPO's critic
  critic_head: nnx.GraphDef | None = None
  critic_tx: optax.GradientTransformation | None = None

  def open_policy(self, policy, ref) -> Transformer:
    """The policy's module. With adapters `policy` holds these alone, and `ref` the weights below
    them.
    """
    return (
      nnx.merge(self.policy, policy) if self.base is None else nnx.merge(self.policy, policy, ref)
    )

  def open_ref(self, ref) -> Transformer:
    """The reference's module; with adapters that is the base without them."""
    return nnx.merge(self.policy if self.base is None else self.base, ref)


@struct.dataclass
class StepOutput:
  metrics: dict[str, jax.Array]  # f32[] each
  sequences: Sequences
  judged: Judged


def read_feedback(
  model: Transformer,
  sequences: Sequences,
  *,
  temperature: float,
  layer: int,
  chunk: int,
  truncation: Truncation = Truncation(),
  support=None,
  shared: Shared | None = None,
) -> Feedback:
  """One forward pass: log-probabilities of the sampled tokens, and the hidden states that the
  reward model reads.
  """
  T = sequences.response_mask.shape[1]
  out = model(sequences.tokens, sequences.token_mask, feedback_layer=layer, shared=shared)
  last_hidden = predicts_response(out.hidden, T)
  stats = token_stats(
    model.head,
    last_hidden,
    sequences.tokens[:, -T:],
    temperature=temperature,
    truncation=truncation,
    support=support,
    chunk=chunk,
  )
  return Feedback(
    logprobs=stats.logprobs, entropy=stats.entropy, hidden=out.feedback, last_hidden=last_hidden
  )


def make_read(config) -> Callable[..., tuple[Feedback, Feedback]]:
  """Builds `read(policy, ref, sequences, group=1)`: `read_feedback` of both models with the
  config's settings.

  `group` neighbouring rows have one prompt, which is computed once for as many as go through a
  model together. Where sampling is truncated, the reference is normalised over the tokens that the
  policy may sample. States that the config's variant and KL do not read have width 0: nothing is as
  large as they are.
  """
  settings = sampling(config) | dict(layer=config.r2m.feedback_layer, chunk=config.logits_chunk)
  needs_support, parts, kind = (
    truncated(config),
    parts_of(config),
    VARIANTS[config.variant].feedback,
  )

  def read_rows(policy, ref, shared_of, sequences: Sequences) -> tuple[Feedback, Feedback]:
    shared = shared_of(sequences.tokens)
    old = read_feedback(policy, sequences, **settings, shared=shared)
    support = (policy.head, old.last_hidden) if needs_support else None
    reference = read_feedback(ref, sequences, **settings, support=support, shared=shared)
    exact = kl_estimator(config, policy.arch.vocab_size) == "exact"
    return old.keep(kind in READS_POLICY, exact), reference.keep(kind == "reference", exact)

  def read(
    policy: Transformer, ref: Transformer, sequences: Sequences, group=1
  ) -> tuple[Feedback, Feedback]:
    shared_of = functools.partial(shared_prompts, group, sequences)
    return map_rows(functools.partial(read_rows, policy, ref, shared_of), parts, sequences)

  return read


def shared_prompts(group: int, whole: Sequences, tokens: jax.Array) -> Shared:
  """What rows of `tokens`, a part of `whole`, have in common: `group` neighbours of `whole` have
  one prompt.
  """
  return Shared(
    whole.tokens.shape[1] - whole.response_mask.shape[1], neighbours(group, len(tokens))
  )


def parts_of(config) -> int:
  """Into how many parts passes without a gradient take the rows of a step: as many rows at a
  time as an update does.
  """
  return config.ppo.minibatches * config.ppo.accumulation


def measured_kl(old: Feedback, ref: Feedback, sequences: Sequences) -> jax.Array:
  """KL(policy || reference) of the samples, nats a sequence: k3 summed over tokens, mean over
  rows. f32[].
  """
  return masked_sum(losses.kl_k3(old.logprobs, ref.logprobs), sequences.response_mask, -1).mean()


def make_omega(config) -> Callable[[jax.Array, jax.Array], jax.Array]:
  """Builds `w(step, kl)` (eq. 4), driven by the step or by the KL of its samples in nats a
  sequence.
  """
  kind, total, target, floor = (
    config.r2m.omega_schedule,
    config.steps,
    config.r2m.omega_kl,
    config.r2m.omega_min,
  )

  def progress(step, kl):
    return kl / target if kind == "kl" else step.astype(kl.dtype) / total

  return lambda step, kl: omega(progress(step, kl), floor, kind)


def make_score(defs: Defs, config) -> Callable[..., jax.Array]:
  """Builds `score(head_state, rte, states, w, arm=None)`: the variant's reward or an arm's, by
  each head, f32[B, M].
  """
  variant = VARIANTS[config.variant]

  def score(head_state, rte, states: States, w, arm: Arm | None = None):
    head = nnx.merge(defs.reward_head, head_state)
    if arm is not None:
      return head.members(rte, states.hidden, states.mask, jnp.where(arm.fused, w, 1)) * jnp.where(
        arm.scaled, w, 1
      )
    if variant.feedback:
      return head.members(rte, states.hidden, states.mask, w)
    return member_scores(head.phi, rte) * (w if variant.scaled else 1.0)

  return score


def make_judge(defs: Defs, config) -> Callable[..., tuple[Judged, States]]:
  """Builds `judge(state, w, sequences, old, ref, reward_tokens, reward_mask, arm=None)`: annotate
  (algorithm 1).

  old and ref are what policy and reference say of the sequences, of which the first `sampled` are
  samples and the rest the greedy rows of "remax". `group` as in `make_read`, where the reward model
  reads the very tokens of the policy. Also returns the backbone's own states.
  """
  variant, score, parts = VARIANTS[config.variant], make_score(defs, config), parts_of(config)
  own_states = variant.feedback == "own_states"
  together = dict(how=config.reward.combine, variance_weight=config.reward.variance_weight)

  def judge(
    state: TrainState,
    w,
    sequences: Sequences,
    old: Feedback,
    ref: Feedback,
    reward_tokens,
    reward_mask,
    arm: Arm | None = None,
    *,
    sampled,
    group=1,
  ):
    backbone = nnx.merge(defs.reward_backbone, state.reward_backbone)
    shared_of = functools.partial(shared_prompts, group, sequences)

    def states_of(tokens, mask):
      return read_reward_states(backbone, tokens, mask, own_states, shared_of(tokens))

    rte, hidden = map_rows(states_of, parts, reward_tokens, reward_mask)
    own, mask = States(hidden, reward_mask), sequences.token_mask
    states = feed_back(
      variant.feedback,
      States(old.hidden, mask),
      States(ref.hidden, mask),
      own,
      step_key(state, KEY_NOISE),
      others=other_rows(len(rte), sampled),
    )
    head = state.reward_head if state.reward_average is None else state.reward_average
    scores, frozen = (
      score(head, rte, states, w, arm),
      member_scores(nnx.merge(defs.phi, state.reward_frozen), rte),
    )
    judged = Judged(
      rte=rte, scores=combine(scores, **together), scores_frozen=combine(frozen, **together)
    )
    return judged, own

  return judge


def step_key(state: TrainState, purpose: int) -> jax.Array:
  return jax.random.fold_in(jax.random.fold_in(state.key, state.step), purpose)


def make_learn(
  defs: Defs, config, mesh: Mesh, *, same_tokens: bool = False
) -> Callable[..., tuple[TrainState, StepOutput]]:
  """Builds `learn(state, sequences, reward_tokens, reward_mask, pairs=None, arm=None)`, not yet
  jitted.

  With algorithm "remax" the greedy response to each prompt follows the sampled ones as P more rows.
  `pairs` are the step's labels where config.r2m.labels is "preference". `same_tokens`: the reward
  model's rows are the policy's. Reads the config once; a missing knob fails here and not in the
  middle of a run.
  """
  variant, algorithm, K = VARIANTS[config.variant], config.algorithm, config.rollout.group_size
  read, omega_at = make_read(config), make_omega(config)
  score, judge = make_score(defs, config), make_judge(defs, config)
  advantages_of, objective = make_advantages(config), make_objective(config, defs.vocab_size)
  estimator, kl_in_reward = kl_estimator(config, defs.vocab_size), config.kl.placement == "reward"
  exact, draw = estimator == "exact", sampling(config) | dict(chunk=config.logits_chunk)
  epochs, minibatches, accumulation = (
    config.ppo.epochs,
    config.ppo.minibatches,
    config.ppo.accumulation,
  )
  layer, parts = config.r2m.feedback_layer, parts_of(config)
  alpha, gre_eps = config.r2m.alpha if variant.alpha is None else variant.alpha, config.r2m.gre_eps
  controller, shaping, average = config.kl.controller, config.shaping, config.r2m.average
  toward, spike = dict(target=config.kl.target, horizon=config.kl.horizon), config.guard.spike

  def shared_in(batch: Experience, whole: Experience) -> Shared:
    return shared_prompts(dealt(K, minibatches), whole.sequences, batch.advantages)

  def policy_loss(policy_state, batch: Experience, ref_state, beta, whole: Experience):
    """Eq. 2: the clipped objective minus beta * KL(policy || reference); of a micro-batch, its
      share of the `whole`.

    Also returns what the policy says of these rows and their refreshed h.
    """
    policy, T = defs.open_policy(policy_state, ref_state), batch.sequences.response_mask.shape[1]
    shared = shared_in(batch, whole)
    out = policy(
      batch.sequences.tokens, batch.sequences.token_mask, feedback_layer=layer, shared=shared
    )
    ref = (defs.open_ref(ref_state).head, batch.ref_hidden) if exact else None
    last_hidden, tokens = predicts_response(out.hidden, T), batch.sequences.tokens[:, -T:]
    stats = token_stats(policy.head, last_hidden, tokens, ref=ref, **draw)
    h = out.feedback if variant.feedback in READS_POLICY else out.feedback[..., :0]
    return objective(stats, batch, beta, whole)[0], (stats, h)

  def critic_loss(critic, batch: Experience, whole: Experience):
    values = open_values(critic, batch.sequences, shared_in(batch, whole))
    return squared_error(values, batch, whole.sequences.response_mask)[0], values

  def squared_error(values, batch: Experience, whole=None):
    mask, clip = batch.sequences.response_mask, config.critic.value_clip
    return losses.value_clip(values, batch.old_values, batch.returns, mask, clip=clip, whole=whole)

  def open_values(critic, sequences: Sequences, shared: Shared):
    backbone, head = (
      nnx.merge(defs.critic_backbone, critic["backbone"]),
      nnx.merge(defs.critic_head, critic["head"]),
    )
    return read_values(backbone, head, sequences, shared)

  def update_policy(state: TrainState, experience: Experience, hidden, beta):
    """Scans epochs x minibatches over policy and critic: the new states, metrics [updates], and h',
    which falls out of the last epoch."""
    rows = experience.advantages.shape[0]

    def update(carry, order):
      policy, opt, critic, critic_opt, hidden = carry
      batch = take_rows(experience, order, minibatches) if minibatches > 1 else experience
      policy, opt, _, (stats, new_hidden), done = descend(
        defs.policy_tx,
        functools.partial(policy_loss, whole=batch),
        policy,
        opt,
        batch,
        state.ref,
        beta,
        parts=accumulation,
      )
      hidden = put_rows(hidden, order, minibatches, new_hidden) if minibatches > 1 else new_hidden
      metrics = objective(stats, batch, beta)[1] | {
        f"policy/{name}": value for name, value in done.items()
      }
      if algorithm == "ppo":
        critic, critic_opt, _, values, done = descend(
          defs.critic_tx,
          functools.partial(critic_loss, whole=batch),
          critic,
          critic_opt,
          batch,
          parts=accumulation,
        )
        metrics |= squared_error(values, batch)[1] | {
          f"critic/{name}": value for name, value in done.items()
        }
      return (policy, opt, critic, critic_opt, hidden), metrics

    keys = jax.random.split(step_key(state, KEY_SHUFFLE), epochs)
    orders = jax.vmap(lambda key: deal_orders(key, rows, minibatches))(keys)
    carry = (state.policy, state.policy_opt, state.critic, state.critic_opt, hidden)
    return jax.lax.scan(update, carry, orders.reshape(epochs * minibatches, -1))

  def update_reward(state: TrainState, judged: Judged, states: States, w, labelled, arm):
    """One step on GREBT (eq. 7) for cross-attention and phi, with rte and h' as data.

    labelled: (rte, states, weight) of the pairs whose order is known; None: the annotation scores
    say which of a group is the winner and which the loser.
    """
    rte, states, labelled = jax.lax.stop_gradient((judged.rte, states, labelled))
    annotations = judged.scores.reshape(-1, K)

    def reward_loss(head_state):
      rewards = score(
        head_state, rte, states, w, arm
      )  # [B, M]: each head of an ensemble has a loss of its own
      pairs = None
      if labelled is not None:
        winner, loser = jnp.split(score(head_state, *labelled[:2], w, arm), 2)
        pairs = winner.T, loser.T

      def member(rewards, pairs):
        return losses.grebt(
          rewards.reshape(-1, K),
          annotations,
          alpha=alpha,
          eps=gre_eps,
          pairs=None if pairs is None else (*pairs, labelled[2]),
        )

      loss, metrics = jax.vmap(member)(rewards.T, pairs)
      return loss.mean(), {name: value.mean() for name, value in metrics.items()}

    head, opt, _, metrics, done = descend(
      defs.reward_tx, reward_loss, state.reward_head, state.reward_opt
    )
    if arm is not None:
      before = state.reward_head, state.reward_opt, jax.tree.map(jnp.zeros_like, done)
      head, opt, done = jax.tree.map(
        lambda new, old: jnp.where(arm.trained, new, old), (head, opt, done), before
      )
    return head, opt, metrics | {f"r2m/{name}": value for name, value in done.items()}

  def read_labelled(state: TrainState, policy_state, pairs: Pairs):
    """rte, feedback of the updated policy, and weight of labelled pairs."""

    def read(model):
      return model(pairs.tokens, pairs.token_mask, feedback_layer=layer).feedback

    def states(model):
      return States(read(model), pairs.token_mask)

    backbone = nnx.merge(defs.reward_backbone, state.reward_backbone)
    rte, own = read_reward_states(backbone, pairs.reward_tokens, pairs.reward_mask)
    fed = feed_back(
      variant.feedback,
      states(defs.open_policy(policy_state, state.ref)),
      states(defs.open_ref(state.ref)),
      States(own, pairs.reward_mask),
      step_key(state, KEY_PAIR_NOISE),
      others=np.roll(np.arange(len(rte)), 1),
    )
    return rte, fed, pairs.weight

  def learn(
    state: TrainState,
    sequences: Sequences,
    reward_tokens: jax.Array,
    reward_mask: jax.Array,
    pairs: Pairs | None = None,
    arm: Arm | None = None,
  ):
    rows = len(sequences.tokens)
    sampled = rows * K // (K + 1) if algorithm == "remax" else rows
    group = K if sampled == rows else 1  # greedy rows do not lie beside the samples of their prompt

    def first_rows(tree):
      return jax.tree.map(lambda x: lay_rows(x[:sampled]), tree) if sampled < rows else tree

    policy, ref_policy = defs.open_policy(state.policy, state.ref), defs.open_ref(state.ref)
    old, ref = read(policy, ref_policy, sequences, group)
    kl = measured_kl(*first_rows((old, ref, sequences)))
    w = omega_at(state.step, kl)
    beta, next_beta = kl_weight(controller, state.beta, kl, **toward)
    judged, own = judge(
      state,
      w,
      sequences,
      old,
      ref,
      reward_tokens,
      reward_mask,
      arm,
      sampled=sampled,
      group=group if same_tokens else 1,
    )
    scores = shape_scores(
      judged.scores, sequences.response_mask.sum(-1), sequences.has_eos, shaping
    )
    greedy_scores = scores[sampled:] if algorithm == "remax" else None
    scores, judged, own, old, ref, sequences = first_rows(
      (scores, judged, own, old, ref, sequences)
    )

    mask, T = sequences.response_mask, sequences.response_mask.shape[1]
    token_kl = jnp.zeros_like(old.logprobs)
    if kl_in_reward and exact:
      token_kl = map_rows(
        lambda h, ref_h, tokens: (
          token_stats(policy.head, h, tokens, ref=(ref_policy.head, ref_h), **draw).kl
        ),
        parts,
        old.last_hidden,
        ref.last_hidden,
        sequences.tokens[:, -T:],
      )
    elif kl_in_reward:
      token_kl = KL_OF_LOGPROBS[estimator](old.logprobs, ref.logprobs)
    values = None
    if algorithm == "ppo":

      def values_of(part):
        return open_values(state.critic, part, shared_prompts(K, sequences, part.tokens))

      values = map_rows(values_of, parts, sequences)
    targets = advantages_of(
      scores, token_kl, mask, beta, greedy_scores=greedy_scores, values=values
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
    updated, updates = update_policy(state, experience, old.hidden, beta)
    new_policy, policy_opt, critic, critic_opt, refreshed = updated
    head, reward_opt, reward_metrics = state.reward_head, state.reward_opt, {}
    if variant.trained:
      states = feed_back(
        variant.feedback,
        States(refreshed, sequences.token_mask),
        States(ref.hidden, sequences.token_mask),
        own,
        step_key(state, KEY_REFRESHED_NOISE),
        others=other_rows(sampled, sampled),
      )
      labelled = None if pairs is None else read_labelled(state, new_policy, pairs)
      head, reward_opt, reward_metrics = update_reward(state, judged, states, w, labelled, arm)
    averaged = state.reward_average
    if averaged is not None:
      averaged = jax.tree.map(lambda old, new: average * old + (1 - average) * new, averaged, head)

    first = {k: v[0] for k, v in updates.items()}  # of the policy that drew the samples
    norms = (("policy", updates), ("critic", updates), ("r2m", reward_metrics))
    spikes = sum(
      (found[f"{of}/grad_norm"] > spike * config[of].max_grad_norm).sum()
      for of, found in norms
      if f"{of}/grad_norm" in found and config[of].max_grad_norm
    )
    skipped = sum(
      updates.pop(name).sum() for name in ("policy/skipped", "critic/skipped") if name in updates
    )
    skipped += reward_metrics.pop("r2m/skipped", 0)
    metrics = {
      "reward/used": judged.scores.mean(),
      "reward/frozen": judged.scores_frozen.mean(),
      "reward/used_std": judged.scores.reshape(-1, K).std(-1).mean(),
      "kl": first["kl"],
      "kl_weight": beta,
      "entropy": masked_mean(old.entropy, mask),
      "length": mask.sum(-1).mean(dtype=judged.scores.dtype),
      "truncated": 1 - sequences.has_eos.mean(dtype=judged.scores.dtype),
      "policy/old_ref_deviation": jnp.abs(jnp.where(mask, old.logprobs - ref.logprobs, 0)).max(),
      "policy/first_ratio_deviation": first["policy/ratio_deviation"],
      "policy/first_mean_ratio_deviation": first["policy/mean_ratio_deviation"],
      "policy/first_loss": first["policy/loss"],
      "policy/clip_fraction": updates["policy/clip_fraction"][-1],
      "policy/ratio_deviation": updates["policy/ratio_deviation"].max(),
      "policy/loss": updates["policy/loss"].mean(),
      "policy/grad_norm": updates["policy/grad_norm"].mean(),
      "policy/first_grad_norm": first["policy/grad_norm"],
      **{name: value.mean() for name, value in updates.items() if name.startswith("critic/")},
      **reward_metrics,
      "skipped": skipped,
      "spikes": jnp.asarray(spikes, judged.scores.dtype),
    }
    if variant.feedback or variant.scaled:
      metrics["r2m/omega"] = w
    next_omega = omega_at(state.step + 1, kl)
    state = state.replace(
      step=state.step + 1,
      policy=new_policy,
      policy_opt=policy_opt,
      beta=jnp.where(jnp.isfinite(next_beta), next_beta, state.beta),
      critic=critic,
      critic_opt=critic_opt,
      reward_head=head,
      reward_opt=reward_opt,
      omega=jnp.where(jnp.isfinite(next_omega), next_omega, state.omega),
      reward_average=averaged,
    )
    return state, StepOutput(metrics=metrics, sequences=sequences, judged=judged)

  return on_mesh(mesh, learn)


def sampling(config) -> dict:
  """How tokens are drawn, in the sampler and in every log-probability alike."""
  rollout = config.rollout
  return dict(
    temperature=rollout.temperature,
    truncation=Truncation(rollout.top_k, rollout.top_p, rollout.min_p),
  )


def truncated(config) -> bool:
  """Whether some tokens may never be sampled."""
  return sampling(config)["truncation"] != Truncation()


def make_rollout(defs: Defs, config, mesh: Mesh, eos_ids: tuple[int, ...], pad_id: int):
  """Builds `rollout(state, prompts) -> Sequences`, not yet jitted; see `make_learn` for the rows
  of "remax".
  """
  settings = sampling(config) | dict(
    group_size=config.rollout.group_size,
    max_new_tokens=config.rollout.max_new_tokens,
    repetition_stop=config.rollout.repetition_stop,
    greedy_rows=config.algorithm == "remax",
    eos_ids=tuple(eos_ids),
    pad_id=pad_id,
    waves=config.rollout.waves,
  )

  def rollout(state: TrainState, prompts: Prompts) -> Sequences:
    return generate(
      defs.open_policy(state.policy, state.ref), prompts, state.key, state.step, **settings
    )

  return on_mesh(mesh, rollout)


def make_step(
  defs: Defs,
  config,
  mesh: Mesh,
  eos_ids: tuple[int, ...],
  pad_id: int,
  state_shardings: Any,
  labeller: Labeller | None = None,
  arms: bool = False,
):
  """The step for a policy and a reward model that share a tokenizer: step(state, prompts) ->
  (state, output).

  One jitted program; the state is donated: the old one must not be used again. With
  config.r2m.labels "preference" the host labels some of the samples in between, labeller(sequences
  on the host, step number) -> Pairs, and the two parts are two programs. Without labels, `arms`
  makes it step(state, prompts, arm), for any `Arm` if it is r2m's.
  """
  rollout = make_rollout(defs, config, mesh, eos_ids, pad_id)
  learn = make_learn(defs, config, mesh, same_tokens=True)

  def jit_learn(f, args):
    return jax.jit(
      f,
      donate_argnums=0,
      in_shardings=(state_shardings,) + (None,) * args,
      out_shardings=(state_shardings, None),
    )

  if not uses_labels(config):

    def step(
      state: TrainState, prompts: Prompts, arm: Arm | None = None
    ) -> tuple[TrainState, StepOutput]:
      sequences = rollout(state, prompts)
      return learn(state, sequences, sequences.tokens, sequences.token_mask, arm=arm)

    return jit_learn(step, 2 if arms else 1)

  rollout, learn = jax.jit(rollout), jit_learn(learn, 4)

  def labelled_step(state: TrainState, prompts: Prompts) -> tuple[TrainState, StepOutput]:
    number, sequences = int(state.step), rollout(state, prompts)
    pairs = labeller(hosts.fetch(sequences), number)
    return learn(state, sequences, sequences.tokens, sequences.token_mask, pairs)

  return labelled_step
