"""The variants of the method: whose states the reward reads, what is trained, and the controls.

Equation numbers are those of R2M (arXiv 2601.22664). Each variant works with every estimator.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from r2m_jax.ops import at_least_f32, masked_mean, response_part
from r2m_jax.types import Sequences

# Kinds of feedback, see `feed_back`: whose states it uses: "policy", "reference" or the "reward"
# backbone. The states of the other models are not kept. "": none are read.
FEEDBACK = {
  "": "",
  "policy": "policy",
  "noise": "policy",
  "constant": "policy",
  "shuffled": "policy",
  "reference": "reference",
  "own_states": "reward",
}


class Variant(NamedTuple):
  """How a variant changes the reward."""

  # states that are fused into the reward (eqs. 3 and 4), see `feed_back`; "": none
  feedback: str = ""
  # multiply the frozen reward by omega instead: the control for the shrinking by eq. 4
  scaled: bool = False
  # retrain the head after each policy update (eqs. 5 to 7); without feedback the head is only phi
  trained: bool = False
  # weight of the group reward entropy in eq. 7, instead of the config's
  alpha: float | None = None
  # what is fitted before RL: "golden" the reward model on golden pairs, "head" the attention and
  # phi
  start: str = ""
  # the direction of the reward that trains the policy, if its scale is another reward's; see
  # `rescaled`
  direction: str = ""

  @property
  def width(self) -> str:
    """The model whose width and row length the fused states have: "policy", "reward" (its
    backbone), or "" if there are none.
    """
    return "policy" if self.reads == "reference" else self.reads

  @property
  def reads(self) -> str:
    """The model whose states the feedback uses: see `FEEDBACK`."""
    return FEEDBACK[self.feedback]


VARIANTS = {
  "vanilla": Variant(),
  "r2m": Variant(feedback="policy", trained=True),
  # the paper's ablations
  "r2m_untrained": Variant(feedback="policy"),
  "noise": Variant(feedback="noise", trained=True),
  "constant": Variant(feedback="constant", trained=True),
  "no_bt": Variant(feedback="policy", trained=True, alpha=1.0),
  "no_gre": Variant(feedback="policy", trained=True, alpha=0.0),
  "iterative_head": Variant(trained=True),
  "pretrained_rm": Variant(start="golden"),
  # controls and placebos that the paper does not have
  "scaled": Variant(scaled=True),
  "shuffled": Variant(feedback="shuffled", trained=True),
  "reference": Variant(feedback="reference", trained=True),
  "own_states": Variant(feedback="own_states", trained=True),
  "warm_start": Variant(feedback="policy", trained=True, start="head"),
  # scale without direction, and direction without scale
  "matched_scale": Variant(feedback="policy", trained=True, direction="frozen"),
  "renormed": Variant(feedback="policy", trained=True, direction="head"),
}


class Arm(NamedTuple):
  """The traced scalars bool[] that distinguish the variants that share the program of "r2m"."""

  fused: jax.Array | np.bool_  # the policy's states are fused into the reward
  scaled: jax.Array | np.bool_  # omega multiplies it
  trained: jax.Array | np.bool_  # the update of the head is kept


def arm_of(name: str) -> Arm | None:
  """A variant as an `Arm`; None if the program of "r2m" cannot express it."""
  variant = VARIANTS[name]
  if variant.feedback not in ("", "policy") or variant.alpha is not None or variant.direction:
    return None
  return Arm(*map(np.bool_, (variant.feedback, variant.scaled, variant.trained)))


def measured(metric: str, name: str) -> bool:
  """Whether a metric of the step is meaningful for this variant, whichever program ran it."""
  variant = VARIANTS[name]
  if metric == "r2m/omega":
    return bool(variant.feedback or variant.scaled)
  return variant.trained or not metric.startswith("r2m/")


def rescaled(
  direction: str, head: jax.Array, frozen: jax.Array, sampled: int, group_size: int
) -> jax.Array:
  """The reward that trains the policy, f32[B], by its direction and its scale.

    ""      head
    frozen  frozen * s: the frozen reward at the scale of the head's
    head    head / s: the head's reward at the scale of the frozen one

  s is the mean standard deviation of `head` within a group, divided by that of `frozen`; 1 if
  either is zero.

  Args:
    head, frozen: f32[B], the reward by the trained head and by the frozen reward model.
    sampled: how many of the rows are samples. They come first, in groups of group_size rows.
  """
  if not direction:
    return head

  def spread(scores):
    return scores[:sampled].reshape(-1, group_size).std(-1).mean()

  of_head, of_frozen = spread(head), spread(frozen)
  varied = (of_head > 0) & (of_frozen > 0)
  of_head, of_frozen = (jnp.where(varied, x, 1) for x in (of_head, of_frozen))
  if direction == "frozen":
    return frozen * (of_head / of_frozen)
  return head * (of_frozen / of_head)


class States(NamedTuple):
  """Hidden states of one kind over a batch of trajectories."""

  hidden: jax.Array  # [B, S, D]
  mask: jax.Array  # bool[B, S], True on real tokens, of the prompt and of the response
  # bool[B, S], the part of mask that is the response. None: not known, if the reward model reads
  # the rows with a tokenizer of its own
  response_mask: jax.Array | None = None

  @classmethod
  def of(cls, hidden: jax.Array, sequences: Sequences) -> "States":
    """Those over the very tokens of `sequences`; hidden is [B, L, D]."""
    mask, T = sequences.token_mask, sequences.response_mask.shape[1]
    return cls(hidden, mask, response_part(mask, T))


def feed_back(
  kind: str, policy: States, ref: States, own: States, key: jax.Array, *, others
) -> States:
  """The states that the reward model reads as policy feedback.

    policy      the policy's own: the method
    noise       Gaussian, with the mean and variance that each feature of the policy's states has over this batch
    constant    ones: the parameters of the attention without anything to read
    shuffled    the policy's states over another trajectory: row i reads row others[i]; see `other_rows`
    reference   those of the policy as it was at the start
    own_states  the reward backbone's, over its own tokens
    ""          no one reads them

  States that a kind does not use are not computed, because a jitted caller drops them. States that
  FEEDBACK does not assign to the kind have width 0.
  """
  if kind == "noise":
    h, mask = at_least_f32(policy.hidden), policy.mask[..., None]
    mean = masked_mean(h, mask, (0, 1))
    deviation = jnp.sqrt(masked_mean((h - mean) ** 2, mask, (0, 1)))
    noise = mean + deviation * jax.random.normal(key, h.shape, jnp.float32)
    return policy._replace(hidden=noise.astype(policy.hidden.dtype))
  if kind == "constant":
    return policy._replace(hidden=jnp.ones_like(policy.hidden))
  if kind == "shuffled":
    return jax.tree.map(lambda x: x[others], policy)
  return {"": policy, "policy": policy, "reference": ref, "own_states": own}[kind]


def other_rows(rows: int, sampled: int) -> np.ndarray:
  """For each row, a row of another prompt if there are at least two prompts: i32[rows].

  For a `sampled` row this is the row half a batch away. For a greedy row (one for each prompt,
  after the samples) it is the row before.
  """
  return np.concatenate(
    [np.roll(np.arange(sampled), sampled // 2), np.roll(np.arange(sampled, rows), 1)]
  )
