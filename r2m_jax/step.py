"""One R2M training step (algorithm 1), top to bottom: the file to read first.

  generate -> read_feedback -> read_rte -> RewardHead -> advantages -> update_policy -> update_reward

Everything after `generate` is one jitted, donated program, `learn`. Where policy and reward model share a tokenizer,
sampling joins it and the whole step is one program. Equation numbers are those of R2M (arXiv 2601.22664).
"""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import nnx, struct
from jax.sharding import Mesh

from r2m_jax import advantages, losses
from r2m_jax.config import kl_estimator
from r2m_jax.generate import generate
from r2m_jax.models.reward import read_rte
from r2m_jax.models.reward import score as phi_score
from r2m_jax.models.transformer import Transformer
from r2m_jax.ops import aggregate, masked_mean, masked_sum, masked_whiten, predicts_response, token_stats
from r2m_jax.schedules import omega
from r2m_jax.sharding import constrain_batch
from r2m_jax.types import Experience, Feedback, Judged, Prompts, Sequences, TrainState


class Variant(NamedTuple):
  """What a variant of the method does with the reward."""

  feedback: bool  # fuse the policy's hidden states into the reward (eqs. 3 and 4)
  scaled: bool  # multiply the frozen reward by omega(t) instead: the control for the shrinking that eq. 4 brings
  trained: bool  # retrain cross-attention and phi after each policy update (eqs. 5 to 7)


VARIANTS = {
  "vanilla": Variant(feedback=False, scaled=False, trained=False),
  "scaled": Variant(feedback=False, scaled=True, trained=False),
  "r2m_untrained": Variant(feedback=True, scaled=False, trained=False),
  "r2m": Variant(feedback=True, scaled=False, trained=True),
}


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

  def open_policy(self, policy, ref) -> Transformer:
    """The policy's module. With adapters `policy` holds these alone, and `ref` the weights below them."""
    return nnx.merge(self.policy, policy) if self.base is None else nnx.merge(self.policy, policy, ref)

  def open_ref(self, ref) -> Transformer:
    """The reference's module; with adapters that is the base without them."""
    return nnx.merge(self.policy if self.base is None else self.base, ref)


@struct.dataclass
class StepOutput:
  metrics: dict[str, jax.Array]  # f32[] each
  sequences: Sequences
  judged: Judged


def read_feedback(model: Transformer, sequences: Sequences, *, temperature: float, layer: int, chunk: int) -> Feedback:
  """One forward pass: log-probabilities of the sampled tokens, and the hidden states that the reward model reads."""
  T = sequences.response_mask.shape[1]
  out = model(sequences.tokens, sequences.token_mask, feedback_layer=layer)
  last_hidden = predicts_response(out.hidden, T)
  stats = token_stats(model.logits, last_hidden, sequences.tokens[:, -T:], temperature=temperature, chunk=chunk)
  return Feedback(logprobs=stats.logprobs, entropy=stats.entropy, hidden=out.feedback, last_hidden=last_hidden)


def make_read(config) -> Callable[[Transformer, Sequences], Feedback]:
  """Builds `read(model, sequences)`: `read_feedback` with the config's settings."""
  settings = dict(
    temperature=config.rollout.temperature, layer=config.r2m.feedback_layer, chunk=config.logits_chunk
  )
  return lambda model, sequences: read_feedback(model, sequences, **settings)


def make_score(defs: Defs, config) -> Callable[..., jax.Array]:
  """Builds `score(head_state, rte, hidden, mask, w)`: the reward of the config's variant, f32[B]."""
  variant = VARIANTS[config.variant]

  def score(head_state, rte, hidden, mask, w):
    head = nnx.merge(defs.reward_head, head_state)
    if variant.feedback:
      return head(rte, hidden, mask, w)
    return head.score(rte) * (w if variant.scaled else 1.0)

  return score


def make_judge(defs: Defs, config) -> Callable[..., Judged]:
  """Builds `judge(state, hidden, sequences, reward_tokens, reward_mask)`: annotate (algorithm 1, step 2)."""
  total_steps, omega_min, score = config.steps, config.r2m.omega_min, make_score(defs, config)

  def judge(state: TrainState, hidden, sequences: Sequences, reward_tokens, reward_mask) -> Judged:
    rte = read_rte(nnx.merge(defs.reward_backbone, state.reward_backbone), reward_tokens, reward_mask)
    scores = score(state.reward_head, rte, hidden, sequences.token_mask, omega(state.step, total_steps, omega_min))
    return Judged(rte=rte, scores=scores, scores_frozen=phi_score(nnx.merge(defs.phi, state.reward_frozen), rte))

  return judge


def make_learn(defs: Defs, config, mesh: Mesh) -> Callable[..., tuple[TrainState, StepOutput]]:
  """Builds `learn(state, sequences, reward_tokens, reward_mask)`, not yet jitted.

  Reads the config once; a missing knob fails here and not in the middle of a run.
  """
  variant = VARIANTS[config.variant]
  read, score, judge = make_read(config), make_score(defs, config), make_judge(defs, config)
  K, temperature, chunk = config.rollout.group_size, config.rollout.temperature, config.logits_chunk
  epochs, minibatches = config.ppo.epochs, config.ppo.minibatches
  clip_eps, aggregation, whiten = config.ppo.clip_eps, config.ppo.aggregation, config.ppo.whiten_advantages
  algorithm, advantage_eps = config.algorithm, config.ppo.advantage_eps
  beta, exact = config.kl.beta, kl_estimator(config, defs.vocab_size) == "exact"
  total_steps, omega_min, layer = config.steps, config.r2m.omega_min, config.r2m.feedback_layer
  alpha, gre_eps = config.r2m.alpha, config.r2m.gre_eps
  constrain = constrain_batch(mesh)

  def advantages_of(scores, response_mask):
    if algorithm == "rloo":
      adv = advantages.rloo(scores, K)
    else:
      adv = advantages.grpo(scores, K, eps=advantage_eps)
    adv = advantages.per_token(adv, response_mask)
    return masked_whiten(adv, response_mask) if whiten else adv

  def policy_loss(policy_state, ref_state, batch: Experience):
    """Eq. 2: the clipped objective minus beta * KL(policy || reference). Also returns the refreshed h."""
    policy, mask = defs.open_policy(policy_state, ref_state), batch.sequences.response_mask
    T = mask.shape[1]
    out = policy(batch.sequences.tokens, batch.sequences.token_mask, feedback_layer=layer)
    ref = (defs.open_ref(ref_state).logits, batch.ref_hidden) if exact else None
    stats = token_stats(
      policy.logits, predicts_response(out.hidden, T), batch.sequences.tokens[:, -T:],
      temperature=temperature, ref=ref, chunk=chunk,
    )  # fmt: skip
    objective, metrics = losses.ppo_clip(
      stats.logprobs, batch.old_logprobs, batch.advantages, mask, clip_eps=clip_eps, aggregation=aggregation
    )
    kl = stats.kl if exact else losses.kl_k2(stats.logprobs, batch.ref_logprobs)
    kl_loss = aggregate(kl, mask, aggregation)
    loss = objective + beta * kl_loss
    reported_kl = stats.kl if exact else losses.kl_k3(stats.logprobs, batch.ref_logprobs)
    metrics |= {"policy/loss": loss, "policy/objective": objective, "policy/kl_loss": kl_loss}
    metrics |= {"kl": masked_sum(reported_kl, mask, -1).mean(), "policy/entropy": masked_mean(stats.entropy, mask)}
    return loss, (metrics, out.feedback)

  def update_policy(state: TrainState, experience: Experience, hidden):
    """Scans epochs x minibatches: policy', opt', metrics [updates], and h', which falls out of the last epoch."""
    rows = experience.advantages.shape[0]
    per_batch = rows // minibatches
    shuffle_key = jax.random.fold_in(jax.random.fold_in(state.key, state.step), 2**31 - 1)

    def orders(epoch_key):  # [minibatches, rows / minibatches]; the natural order where there is only one
      rows_in_order = jnp.arange(rows)
      order = jax.random.permutation(epoch_key, rows_in_order) if minibatches > 1 else rows_in_order
      return order.reshape(minibatches, per_batch)

    def update(carry, index):
      policy, opt, hidden = carry
      batch = experience
      if minibatches > 1:
        batch = jax.tree.map(lambda x: constrain(x[index]), experience)
      grads, (metrics, new_hidden) = jax.grad(policy_loss, has_aux=True)(policy, state.ref, batch)
      updates, opt = defs.policy_tx.update(grads, opt, policy)
      policy = optax.apply_updates(policy, updates)
      hidden = constrain(hidden.at[index].set(new_hidden)) if minibatches > 1 else new_hidden
      metrics["policy/grad_norm"] = optax.tree.norm(grads)
      return (policy, opt, hidden), metrics

    index = jax.vmap(orders)(jax.random.split(shuffle_key, epochs)).reshape(epochs * minibatches, per_batch)
    (policy, opt, hidden), metrics = jax.lax.scan(update, (state.policy, state.policy_opt, hidden), index)
    return policy, opt, metrics, hidden

  def update_reward(state: TrainState, judged: Judged, hidden, mask, w):
    """One step on GREBT (eq. 7) for cross-attention and phi, with rte and h' as data."""
    rte, hidden = jax.lax.stop_gradient((judged.rte, hidden))

    def reward_loss(head_state):
      rewards = score(head_state, rte, hidden, mask, w).reshape(-1, K)
      return losses.grebt(rewards, judged.scores.reshape(-1, K), alpha=alpha, eps=gre_eps)

    grads, metrics = jax.grad(reward_loss, has_aux=True)(state.reward_head)
    updates, opt = defs.reward_tx.update(grads, state.reward_opt, state.reward_head)
    metrics["r2m/grad_norm"] = optax.tree.norm(grads)
    return optax.apply_updates(state.reward_head, updates), opt, metrics

  def learn(state: TrainState, sequences: Sequences, reward_tokens: jax.Array, reward_mask: jax.Array):
    mask = sequences.response_mask
    w = omega(state.step, total_steps, omega_min)

    old = read(defs.open_policy(state.policy, state.ref), sequences)
    ref = read(defs.open_ref(state.ref), sequences)
    judged = judge(state, old.hidden, sequences, reward_tokens, reward_mask)
    experience = Experience(
      sequences=sequences,
      old_logprobs=old.logprobs,
      ref_logprobs=ref.logprobs,
      ref_hidden=ref.last_hidden if exact else ref.last_hidden[..., :0],
      advantages=advantages_of(judged.scores, mask),
    )
    policy, policy_opt, policy_metrics, refreshed = update_policy(state, experience, old.hidden)
    head, reward_opt, reward_metrics = state.reward_head, state.reward_opt, {}
    if variant.trained:
      head, reward_opt, reward_metrics = update_reward(state, judged, refreshed, sequences.token_mask, w)

    first = {k: v[0] for k, v in policy_metrics.items()}  # of the policy that drew the samples
    metrics = {
      "reward/used": judged.scores.mean(),
      "reward/frozen": judged.scores_frozen.mean(),
      "reward/used_std": judged.scores.reshape(-1, K).std(-1).mean(),
      "kl": first.pop("kl"),
      "entropy": masked_mean(old.entropy, mask),
      "length": mask.sum(-1).mean(dtype=judged.scores.dtype),
      "truncated": 1 - sequences.has_eos.mean(dtype=judged.scores.dtype),
      "policy/old_ref_deviation": jnp.abs(jnp.where(mask, old.logprobs - ref.logprobs, 0)).max(),
      "policy/first_ratio_deviation": first["policy/ratio_deviation"],
      "policy/first_loss": first["policy/loss"],
      "policy/clip_fraction": policy_metrics["policy/clip_fraction"][-1],
      "policy/ratio_deviation": policy_metrics["policy/ratio_deviation"].max(),
      "policy/loss": policy_metrics["policy/loss"].mean(),
      "policy/grad_norm": policy_metrics["policy/grad_norm"].mean(),
      "policy/first_grad_norm": first["policy/grad_norm"],
      **reward_metrics,
    }
    if variant.feedback or variant.scaled:
      metrics["r2m/omega"] = w
    state = state.replace(
      step=state.step + 1,
      policy=policy,
      policy_opt=policy_opt,
      reward_head=head,
      reward_opt=reward_opt,
    )
    return state, StepOutput(metrics=metrics, sequences=sequences, judged=judged)

  return learn


def make_rollout(defs: Defs, config, mesh: Mesh, eos_ids: tuple[int, ...], pad_id: int):
  """Builds `rollout(state, prompts) -> Sequences`, not yet jitted."""
  settings = dict(
    group_size=config.rollout.group_size,
    max_new_tokens=config.rollout.max_new_tokens,
    temperature=config.rollout.temperature,
    eos_ids=tuple(eos_ids),
    pad_id=pad_id,
    constrain=constrain_batch(mesh),
  )

  def rollout(state: TrainState, prompts: Prompts) -> Sequences:
    return generate(defs.open_policy(state.policy, state.ref), prompts, state.key, state.step, **settings)

  return rollout


def make_step(defs: Defs, config, mesh: Mesh, eos_ids: tuple[int, ...], pad_id: int, state_shardings: Any):
  """The jitted step for a policy and a reward model that share a tokenizer: step(state, prompts) -> (state, output).

  The state is donated: the old one must not be used again.
  """
  rollout, learn = make_rollout(defs, config, mesh, eos_ids, pad_id), make_learn(defs, config, mesh)

  def step(state: TrainState, prompts: Prompts) -> tuple[TrainState, StepOutput]:
    sequences = rollout(state, prompts)
    return learn(state, sequences, sequences.tokens, sequences.token_mask)

  return jax.jit(step, donate_argnums=0, in_shardings=(state_shardings, None), out_shardings=(state_shardings, None))
