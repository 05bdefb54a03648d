"""RL on the gold-reward task: prompts, the step, which arms share a program, and gold metrics."""

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from r2m_jax.algorithm.annotate import Reward
from r2m_jax.algorithm.labels import uses_labels
from r2m_jax.algorithm.read import Defs
from r2m_jax.algorithm.variants import Arm, States, arm_of
from r2m_jax.goldtask import task as goldtask
from r2m_jax.goldtask.labels import gold_labeller
from r2m_jax.goldtask.stages import STREAM_RL
from r2m_jax.parallel import hosts
from r2m_jax.run.build import Build
from r2m_jax.run.workdir import with_variant
from r2m_jax.step import StepOutput, jit_step, make_learn, make_rollout, make_step
from r2m_jax.types import Prompts, TrainState


def shared_arm(config) -> Arm | None:
  """config.variant as an arm of r2m's program, because compiling takes longer than many runs of
  this task and r2m's reward costs almost nothing. None if the variant needs its own program. With
  labels every variant does, because not all variants can use labels.
  """
  return None if config.r2m.labels == "preference" else arm_of(config.variant)


def program_of(config):
  """The config of the variant whose program runs config.variant."""
  return with_variant(config, config.variant if shared_arm(config) is None else "r2m")


def rl_prompts(config, t: int):
  """The prompts of RL step t."""
  return goldtask.prompts(config.seed, STREAM_RL, t, config.rollout.prompts)


def make_gold_step(config, built: Build, layout):
  """Builds `step(state, prompts, arm)`: `make_step` for the gold-reward task, with None for
  variants without an `Arm`.

  Every process passes all prompts, as host arrays, and uses its own.
  """

  def own(prompts):
    return hosts.place(hosts.take(prompts, built.rows), built.rows)

  fixed = built.defs, config, built.mesh, (goldtask.EOS,), goldtask.PAD, layout
  if uses_labels(config):
    labelled = make_step(*fixed, gold_labeller(config))
    return lambda state, prompts, arm: labelled(state, own(prompts))
  program = jit_step(make_arm_step(*fixed[:3]), layout, 2)

  def step(state, prompts, arm):
    return program(state, own(prompts), arm)

  return step


def make_arm_step(defs: Defs, config, mesh):
  """Builds `step(state, prompts, arm) -> (state, output)`, not yet jitted: the step of any `Arm` if
  config.variant is r2m, or of config.variant itself if arm is None.
  """
  rollout = make_rollout(defs, config, mesh, (goldtask.EOS,), goldtask.PAD)

  def step(state: TrainState, prompts: Prompts, arm: Arm | None) -> tuple[TrainState, StepOutput]:
    learn = make_learn(defs, config, mesh, reward_of(defs, arm))
    return learn(state, rollout(state, prompts))

  return step


def reward_of(defs: Defs, arm: Arm | None) -> Reward | None:
  """The reward of an arm in r2m's program, for use during tracing. Without an arm it is None, which
  means the variant's own reward.
  """
  if arm is None:
    return None

  def score(head_state, rte, states: States, w):
    head = nnx.merge(defs.reward_head, head_state)
    fused = head.members(rte, states.hidden, states.mask, jnp.where(arm.fused, w, 1))
    return fused * jnp.where(arm.scaled, w, 1)

  def keep(new, old):
    return jax.tree.map(lambda new, old: jnp.where(arm.trained, new, old), new, old)

  return Reward(score, keep)


def gold_metrics(out, group_size: int, formula: str = "") -> dict[str, float]:
  """Gold metrics of a step's samples, computed on the host. They never enter training."""
  parts, judged = goldtask.gold(out.sequences, formula), out.judged
  found = against_gold(parts.gold, judged.scores, group_size)
  found |= against_frozen(parts.gold, judged.scores, judged.scores_frozen, group_size)
  return found | {
    "repetition": (parts.repeats / np.maximum(parts.length, 1)).mean(),
    "gold/coverage": parts.coverage.mean(),
    "gold/hallucinated": parts.hallucinated.mean(),
    "gold/chatter": parts.chatter.mean(),
  }


def against_gold(gold: np.ndarray, used: np.ndarray, group_size: int) -> dict[str, float | None]:
  """Mean gold of a step's samples, and its agreement within prompts with the reward that trained on
  them.

  gold, used: [B] each, with the samples of a prompt next to each other.
  """
  gold, used = (np.asarray(x, float).reshape(-1, group_size) for x in (gold, used))
  rows = np.arange(len(gold))
  # gap in gold of the pair that the reward update would label
  gap = gold[rows, used.argmax(-1)] - gold[rows, used.argmin(-1)]
  centred_gold, centred_used = (x - x.mean(-1, keepdims=True) for x in (gold, used))
  norm = np.sqrt((centred_gold**2).sum() * (centred_used**2).sum())
  return {
    "reward/gold": gold.mean(),
    "reward/within_corr": (centred_gold * centred_used).sum() / norm if norm > 1e-12 else None,
    "r2m/pair_disagreement": np.where(gap == 0, 0.5, gap < 0).mean(),
  }


def against_frozen(
  gold: np.ndarray, used: np.ndarray, frozen: np.ndarray, group_size: int
) -> dict[str, float | None]:
  """How far the reward that trained on a step's samples has moved from the frozen one.

  gold, used, frozen: [B] each, with the samples of a prompt next to each other.
  """
  gold, used, frozen = (np.asarray(x, float).reshape(-1, group_size) for x in (gold, used, frozen))
  u, f = (x - x.mean(-1, keepdims=True) for x in (used, frozen))
  uu = (u * u).sum()
  ff = (f * f).sum()
  uf = (u * f).sum()
  rows = np.arange(len(gold))
  best = used.argmax(-1)
  worst = used.argmin(-1)
  # whether the frozen reward orders the used reward's pairs as gold does
  agrees = np.sign(gold[rows, best] - gold[rows, worst]) * np.sign(
    frozen[rows, best] - frozen[rows, worst]
  )
  return {
    "reward/growth": np.sqrt(uu / ff) if ff > 1e-12 else None,
    "reward/frozen_corr": uf / np.sqrt(uu * ff) if uu * ff > 1e-24 else None,
    "r2m/frozen_disagreement": (0.5 - 0.5 * agrees).mean(),
  }
