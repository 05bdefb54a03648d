"""One R2M training step (algorithm 1), top to bottom: the file to read first.

  rollout -> read -> annotate -> credit -> update policy -> update reward -> metrics

Everything after the rollout is one jitted, donated program, `learn`. If policy and reward model
share a tokenizer, sampling is part of it, and the whole step is one program. Equation numbers are
those of R2M (arXiv 2601.22664).

Each part is a file of `algorithm/`. Estimators are rows of a table in `advantages`, and variants
are rows of a table in `variants`.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct
from jax.sharding import Mesh

from r2m_jax.algorithm.advantages import ESTIMATORS
from r2m_jax.algorithm.annotate import Reward, make_annotate, make_reward
from r2m_jax.algorithm.credit import make_credit
from r2m_jax.algorithm.labels import Labeller, uses_labels
from r2m_jax.algorithm.packed import make_needed, smallest
from r2m_jax.algorithm.read import (
  Defs,
  all_rows,
  closed,
  make_read,
  measured_kl,
  sampling,
  split_rows,
)
from r2m_jax.algorithm.schedules import kl_weight, make_omega
from r2m_jax.algorithm.update import (
  Trained,
  TrainedReward,
  make_update_policy,
  make_update_reward,
)
from r2m_jax.algorithm.variants import VARIANTS, rescaled
from r2m_jax.models.generate import generate
from r2m_jax.ops import masked_mean
from r2m_jax.parallel import hosts
from r2m_jax.parallel.sharding import on_mesh
from r2m_jax.types import Feedback, Judged, Pairs, Prompts, Rollout, Sequences, TrainState


@struct.dataclass
class StepOutput:
  metrics: dict[str, jax.Array]  # f32[] each
  sequences: Sequences
  judged: Judged


Learn = Callable[..., tuple[TrainState, "StepOutput"]]


def make_learn(defs: Defs, config, mesh: Mesh, reward: Reward | None = None) -> Learn:
  """Builds `learn(state, rollout, reward_rows=None, labels=None)`, not yet jitted: `make_learn_at`
  for the smallest share of config.packing that holds the step's tokens.
  """
  learns = [make_learn_at(share, defs, config, reward) for share in config.packing]
  needed = make_needed(defs, config)

  def learn(state: TrainState, rollout: Rollout, reward_rows=None, labels: Pairs | None = None):
    which = smallest(config.packing, needed(state, rollout, reward_rows))
    return jax.lax.switch(which, learns, state, rollout, reward_rows, labels)

  return on_mesh(mesh, learns[0] if len(learns) == 1 else learn)


def make_learn_at(share: float, defs: Defs, config, reward: Reward | None = None) -> Learn:
  """Builds `learn(state, rollout, reward_rows=None, labels=None)`, which computes a share of the
  padded places; see `algorithm.packed`.

  Of the built function:
    reward_rows: a `Rollout` of `Rows`, the responses as the reward model reads them, of
      `Sequences`, the policy's tokens with the reward model's own ending, or of `Given`, their
      scores. None: it reads the policy's own tokens.
    labels: the step's `Pairs` if config.r2m.labels is "preference".

  If `reward` is None, the variant's own reward is used. A missing knob fails here and not in the
  middle of a run.
  """
  defs = dataclasses.replace(defs, share=share)
  reward = reward or make_reward(defs, config)
  read, omega_at = make_read(config, share), make_omega(config)
  annotate, credit = make_annotate(defs, config, reward), make_credit(defs, config)
  update_policy = make_update_policy(defs, config)
  update_reward = make_update_reward(defs, config, reward)
  metrics_of, controller = make_step_metrics(config), config.kl.controller
  direction, K = VARIANTS[config.variant].direction, config.rollout.group_size
  toward = {name: config.kl[name] for name in ("target", "horizon", "damping")}

  def learn(state: TrainState, rollout: Rollout, reward_rows=None, labels: Pairs | None = None):
    sequences, B = rollout.samples, len(rollout.samples.tokens)
    # greedy rows are not neighbours of their prompt's samples
    group = K if rollout.greedy is None else 1

    # 1. Read: old log-probabilities and policy feedback h, by the policy and by the reference.
    policy, reference = defs.open_policy(state.policy, state.ref), defs.open_ref(state.ref)
    feedback = read(policy, reference, all_rows(rollout), group)
    old, ref = split_rows(feedback, B).samples
    kl = measured_kl(old, ref, sequences)
    w = omega_at(state.step, kl)
    beta, next_beta = kl_weight(controller, state.beta, kl, **toward)

    # 2. Annotate: one pass of the frozen backbone, fused with h (eqs. 3 and 4).
    annotated = annotate(state, w, rollout, *feedback, reward_rows, group=group)
    judged, own = split_rows(annotated, B).samples
    used = rescaled(direction, annotated[0].scores, annotated[0].scores_frozen, B, K)

    # 3. Credit: scores to advantages (eq. 1, or the estimator's own).
    experience, certified = credit(state, rollout, used, judged, old, ref, beta)

    # 4. Update the policy (eq. 2). The last epoch also gives the refreshed h'.
    trained, updates = update_policy(state, experience, old.hidden, beta)

    # 5. Update the reward on h' (eqs. 5 to 7). The policy and the backbone do not change.
    head = update_reward(state, sequences, judged, own, ref, trained, w, labels)

    # 6. Compute metrics and the next step's state.
    judged = judged.replace(scores=used[:B])
    average = averaged(state.reward_average, head.head, config.r2m.average)
    metrics = metrics_of(sequences, judged, old, ref, w, beta, updates, head.metrics) | certified
    if len(config.packing) > 1:
      metrics["learn/computed"] = jnp.float32(share)
    state = next_state(state, trained, head, average, next_beta, omega_at(state.step + 1, kl))
    return state, StepOutput(metrics=metrics, sequences=sequences, judged=judged)

  return learn


def averaged(old, head, average: float):
  """The moving average of the reward head, updated with this step's head; None if it is off.

  It is moved towards the head, so a head that does not change is its own average. In float32,
  `average` and 1 - average do not add up to 1.
  """
  if old is None:
    return None
  return jax.tree.map(lambda old, new: old + (1 - average) * (new - old), old, head)


def next_state(
  state: TrainState, trained: Trained, head: TrainedReward, average, beta, omega
) -> TrainState:
  """The next step's initial state. beta and omega, f32[], keep their old values if the new ones are
  not finite.
  """
  return state.replace(
    step=state.step + 1,
    policy=trained.policy,
    policy_opt=trained.policy_opt,
    beta=jnp.where(jnp.isfinite(beta), beta, state.beta),
    critic=trained.critic,
    critic_opt=trained.critic_opt,
    reward_head=head.head,
    reward_opt=head.opt,
    omega=jnp.where(jnp.isfinite(omega), omega, state.omega),
    reward_average=average,
  )


def make_step_metrics(config) -> Callable[..., dict[str, jax.Array]]:
  """Builds `step_metrics(sequences, judged, old, ref, w, beta, updates, reward_metrics)`: {name:
  f32[]} of one step.

  Arguments of the built function, with rows of the samples:
    w, beta: f32[], the weights of this step.
    updates: metrics of policy and critic, f32[updates] each.
    reward_metrics: metrics of the reward update, f32[] each; empty if there was none.
  """
  variant, K = VARIANTS[config.variant], config.rollout.group_size
  reports_omega = bool(variant.feedback or variant.scaled)
  troubles = make_troubles(config)

  def step_metrics(
    sequences: Sequences,
    judged: Judged,
    old: Feedback,
    ref: Feedback,
    w,
    beta,
    updates: dict,
    reward_metrics: dict,
  ) -> dict[str, jax.Array]:
    first = {name: value[0] for name, value in updates.items()}  # of the sampling policy
    skipped, spikes = troubles(updates, reward_metrics)
    mask, dtype = sequences.response_mask, judged.scores.dtype
    critic = [k for k in updates if k.startswith("critic/") and k != "critic/skipped"]
    reward = {k: v for k, v in reward_metrics.items() if k != "r2m/skipped"}
    return {
      "reward/used": judged.scores.mean(),
      "reward/frozen": judged.scores_frozen.mean(),
      "reward/used_std": judged.scores.reshape(-1, K).std(-1).mean(),
      "kl": first["kl"],
      "kl_weight": beta,
      "entropy": masked_mean(old.entropy, mask),
      "length": mask.sum(-1).mean(dtype=dtype),
      "truncated": 1 - sequences.has_eos.mean(dtype=dtype),
      "policy/old_ref_deviation": jnp.abs(jnp.where(mask, old.logprobs - ref.logprobs, 0)).max(),
      "policy/first_ratio_deviation": first["policy/ratio_deviation"],
      "policy/first_mean_ratio_deviation": first["policy/mean_ratio_deviation"],
      "policy/first_loss": first["policy/loss"],
      "policy/clip_fraction": updates["policy/clip_fraction"][-1],
      "policy/ratio_deviation": updates["policy/ratio_deviation"].max(),
      "policy/loss": updates["policy/loss"].mean(),
      "policy/grad_norm": updates["policy/grad_norm"].mean(),
      "policy/first_grad_norm": first["policy/grad_norm"],
      **{name: updates[name].mean() for name in critic},
      **reward,
      "skipped": skipped,
      "spikes": jnp.asarray(spikes, dtype),
      **({"r2m/omega": w} if reports_omega else {}),
    }

  return step_metrics


def make_troubles(config) -> Callable[[dict, dict], tuple[jax.Array, jax.Array]]:
  """Builds `troubles(updates, reward_metrics) -> (skipped, spikes)`, numbers of updates, f32[] and
  i32[]: updates skipped because of a non-finite number, and updates whose gradient norm is far
  above the clipping threshold.
  """
  bounds = {of: config.guard.spike * config[of].max_grad_norm for of in ("policy", "critic", "r2m")}

  def troubles(updates: dict, reward_metrics: dict):
    found = updates | reward_metrics
    norms = [(found.get(f"{of}/grad_norm"), bound) for of, bound in bounds.items() if bound]
    spikes = sum((norm > bound).sum() for norm, bound in norms if norm is not None)
    names = [name for name in ("policy/skipped", "critic/skipped") if name in updates]
    skipped = sum(updates[name].sum() for name in names)
    return skipped + reward_metrics.get("r2m/skipped", 0), spikes

  return troubles


def make_rollout(defs: Defs, config, mesh: Mesh, eos_ids: tuple[int, ...], pad_id: int):
  """Builds `rollout(state, prompts) -> Rollout`, not yet jitted. It includes greedy responses if
  they are the estimator's baseline.
  """
  greedy = ESTIMATORS[config.algorithm].baseline == "greedy"
  settings = sampling(config) | dict(
    group_size=config.rollout.group_size,
    max_new_tokens=config.rollout.max_new_tokens,
    repetition_stop=config.rollout.repetition_stop,
    greedy_rows=greedy,
    eos_ids=tuple(eos_ids),
    pad_id=pad_id,
    waves=config.rollout.waves,
    halvings=config.rollout.halvings,
  )

  def rollout(state: TrainState, prompts: Prompts) -> Rollout:
    policy = defs.open_policy(state.policy, state.ref)
    drawn = generate(policy, prompts, state.key, state.step, **settings)
    return split_rows(drawn, config.rollout.group_size * len(prompts.tokens))

  return on_mesh(mesh, rollout)


def make_step(
  defs: Defs,
  config,
  mesh: Mesh,
  eos_ids: tuple[int, ...],
  pad_id: int,
  state_shardings: Any,
  labeller: Labeller | None = None,
  ending: tuple[int, ...] | None = None,
):
  """The step for a policy and a reward model that share a tokenizer: step(state, prompts) ->
  (state, output).

  It is one jitted program. The state is donated, so the old one must not be used again. If
  config.r2m.labels is "preference", the host labels some of the samples between sampling and
  learning: labeller(samples on the host, step number) -> Pairs. Sampling and learning are then two
  programs. `ending`: what the reward model reads in place of the token that ended a response; None:
  that token.
  """
  rollout = make_rollout(defs, config, mesh, eos_ids, pad_id)
  learn_rows = make_learn(defs, config, mesh)

  def learn(state: TrainState, drawn: Rollout, pairs: Pairs | None = None):
    return learn_rows(state, drawn, None if ending is None else with_ending(drawn, ending), pairs)

  if not uses_labels(config):

    def step(state: TrainState, prompts: Prompts) -> tuple[TrainState, StepOutput]:
      return learn(state, rollout(state, prompts))

    return jit_step(step, state_shardings, 1)

  assert labeller is not None, "config.r2m.labels is 'preference': a labeller orders the pairs"
  draw, learn_labelled = jax.jit(rollout), jit_step(learn, state_shardings, 2)

  def labelled_step(state: TrainState, prompts: Prompts) -> tuple[TrainState, StepOutput]:
    number, drawn = int(state.step), draw(state, prompts)
    pairs = labeller(hosts.fetch(drawn.samples), number)
    return learn_labelled(state, drawn, pairs)

  return labelled_step


def with_ending(drawn: Rollout, ending: tuple[int, ...]) -> Rollout:
  """Both parts of a rollout as the reward model reads them; see `closed`."""
  greedy = None if drawn.greedy is None else closed(drawn.greedy, ending)
  return Rollout(closed(drawn.samples, ending), greedy)


def jit_step(f: Callable, state_shardings: Any, arguments: int) -> Callable:
  """Jits f(state, *arguments) -> (state, output) with the state donated."""
  return jax.jit(
    f,
    donate_argnums=0,
    in_shardings=(state_shardings,) + (None,) * arguments,
    out_shardings=(state_shardings, None),
  )
