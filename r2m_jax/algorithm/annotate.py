"""Annotate (algorithm 1): the reward model scores a rollout, fused with the policy's states.

Equation numbers are those of R2M (arXiv 2601.22664).
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
from flax import nnx

from r2m_jax.algorithm.read import (
  KEY_NOISE,
  Defs,
  all_rows,
  deal_of,
  parts_of,
  shared_prompts,
  step_key,
)
from r2m_jax.algorithm.variants import VARIANTS, States, Variant, feed_back, other_rows
from r2m_jax.models.reward import member_scores, read_reward_states
from r2m_jax.ops import combine
from r2m_jax.parallel.rows import map_rows
from r2m_jax.types import Given, Judged, Rollout, Sequences, TrainState


class Reward(NamedTuple):
  """How responses are scored, and whether an update of the head is kept."""

  # (head state, rte f32[B, Dr], States, omega f32[]) -> f32[B, M], the reward by each of M heads
  score: Callable[..., jax.Array]
  # (new, old) -> one of the two trees of head, optimizer state and metrics; None: the new one
  keep: Callable | None = None


def make_reward(defs: Defs, config) -> Reward:
  """The `Reward` of the config's variant (eqs. 3 and 4)."""
  variant = VARIANTS[config.variant]

  def score(head_state, rte, states: States, w):
    head = nnx.merge(defs.reward_head, head_state)
    if variant.feedback:
      return head.members(rte, states.hidden, states.mask, w)
    return member_scores(head.phi, rte) * (w if variant.scaled else 1.0)

  return Reward(score)


def make_annotate(
  defs: Defs, config, reward: Reward | None = None
) -> Callable[..., tuple[Judged, States]]:
  """Builds `annotate(state, w, rollout, old, ref, reward_rows=None, *, group=1)`: one pass of the
  frozen backbone, fused with the policy's states (eqs. 3 and 4).

  Of the built function:
    w: f32[], omega (eq. 4).
    old, ref: `Feedback` of policy and reference, of `all_rows` of the rollout.
    reward_rows: a `Rollout` of `Rows`, the same responses as the reward model reads them, of
      `Sequences`, the policy's tokens with the reward model's own ending, or of `Given`, their
      scores. None: it reads the policy's own tokens.
    group: as in `make_read`; not used for `Rows`, whose prompts are not shared.
  Returns (Judged, the backbone's own states), both for `all_rows` of the rollout.

  Args:
    reward: None: the variant's own.
  """
  variant, parts = VARIANTS[config.variant], parts_of(config)
  score = (reward or make_reward(defs, config)).score
  together = dict(how=config.reward.combine, variance_weight=config.reward.variance_weight)

  def annotate(state: TrainState, w, rollout: Rollout, old, ref, reward_rows=None, *, group=1):
    if is_given(reward_rows):
      return given(variant, all_rows(reward_rows).scores, w)
    backbone = nnx.merge(defs.reward_backbone, state.reward_backbone)
    sequences = all_rows(rollout)
    rows = sequences if reward_rows is None else all_rows(reward_rows)
    of_policy = isinstance(rows, Sequences)
    tokens, mask = rows.tokens, rows.token_mask if of_policy else rows.mask
    shared_of = functools.partial(shared_prompts, group if of_policy else 1, sequences)

    def states_of(tokens, mask):
      keep = variant.width == "reward"
      return read_reward_states(backbone, tokens, mask, keep, shared_of(tokens), defs.share)

    deal = deal_of(rows, group if of_policy else 1, defs.share)
    rte, hidden = map_rows(states_of, parts, tokens, mask, deal=deal)
    own = States.of(hidden, rows) if of_policy else States(hidden, mask)
    states = feed_back(
      variant.feedback,
      States.of(old.hidden, sequences),
      States.of(ref.hidden, sequences),
      own,
      step_key(state, KEY_NOISE),
      others=other_rows(len(rte), len(rollout.samples.tokens)),
    )
    assert states.hidden.shape[-1] or not variant.feedback, (
      f"FEEDBACK says that {variant.feedback!r} is made of the states of the {variant.reads}, and "
      "only those are kept: `feed_back` made it of others"
    )
    head = state.reward_head if state.reward_average is None else state.reward_average
    scores = score(head, rte, states, w)
    frozen = member_scores(nnx.merge(defs.phi, state.reward_frozen), rte)
    judged = Judged(
      rte=rte, scores=combine(scores, **together), scores_frozen=combine(frozen, **together)
    )
    return judged, own

  return annotate


def is_given(reward_rows: Rollout | None) -> bool:
  """Whether a step is given scores instead of rows for a reward model."""
  return reward_rows is not None and isinstance(reward_rows.samples, Given)


def given(variant: Variant, scores: jax.Array, w) -> tuple[Judged, States]:
  """The result of `annotate` for scores f32[B] from outside, without an embedding or states."""
  assert not variant.feedback and not variant.trained, "the config's checks refuse such a variant"
  none = scores[:, None][:, :0]
  used = scores * w if variant.scaled else scores
  return Judged(rte=none, scores=used, scores_frozen=scores), States(none[..., None], none > 0)
