"""The pytrees that flow through a training step, and nothing else.

Axis letters, used everywhere in the package:

  P   prompts in a step            K   responses per prompt (a group)
  B   trajectories, B = P * K; row p * K + k is sample k of prompt p
  Lp  padded prompt length         T   maximum response length         L = Lp + T
  D   hidden size (Dp policy, Dr reward model)                         V   vocabulary

Prompts are padded on the left and responses on the right, so every row starts its response at
column Lp. A mask is True at places that count. Masks come from lengths, never from token ids.
"""

from typing import Any

import jax
from flax import struct


@struct.dataclass
class Prompts:
  """One step's prompts."""

  tokens: jax.Array  # i32[P, Lp]   left-padded
  mask: jax.Array  # bool[P, Lp]  True on real tokens
  # i32[P]       which prompt of the data set; it is part of every sample's random key
  example_id: jax.Array


@struct.dataclass
class Sequences:
  """Prompts with their sampled responses."""

  tokens: jax.Array  # i32[B, L]
  # bool[B, L]   True on the prompt's real tokens and on the response up to and with its EOS
  token_mask: jax.Array
  response_mask: jax.Array  # bool[B, T]   the response part of token_mask
  has_eos: jax.Array  # bool[B]      False where the length limit cut the response off


@struct.dataclass
class Rows:
  """Prompts and responses in the tokens of a model with its own tokenizer."""

  tokens: jax.Array  # i32[B, L']   left-padded
  mask: jax.Array  # bool[B, L']  True on real tokens


@struct.dataclass
class Given:
  """Responses with scores that were computed outside of the step."""

  scores: jax.Array  # f32[B]


@struct.dataclass
class Rollout:
  """The responses drawn for one step's prompts, or an array or tree of arrays with a leading axis
  for these rows.
  """

  samples: Any  # `Sequences` of B rows
  greedy: Any = None  # P rows, the greedy response to each prompt; None: none are drawn


class Feedback(struct.PyTreeNode):
  """The results of one forward pass of a policy over `Sequences`."""

  logprobs: jax.Array  # f32[B, T]    of the sampled tokens, at the rollout temperature
  entropy: jax.Array  # f32[B, T]    of the distribution each token was drawn from, nats
  # [B, L, Dp]   policy feedback h: last layer after the final norm, or the configured layer
  hidden: jax.Array
  # [B, T, Dp]   what the language-model head read to predict each response token
  last_hidden: jax.Array

  def keep(self, hidden: bool, last_hidden: bool) -> "Feedback":
    """A copy in which states that are not requested have width 0."""

    def width(x, kept):
      return x if kept else x[..., :0]

    return self.replace(
      hidden=width(self.hidden, hidden), last_hidden=width(self.last_hidden, last_hidden)
    )


@struct.dataclass
class Judged:
  """The reward model's results for `Sequences`."""

  rte: jax.Array  # f32[B, Dr]   reward token embedding, H_last
  # f32[B]       annotation scores: the reward that trains the policy, before any shaping
  scores: jax.Array
  scores_frozen: jax.Array  # f32[B]       the frozen reward model's own score of the same rows


@struct.dataclass
class Experience:
  """The data of the policy's minibatches; every array has the leading axis B."""

  sequences: Sequences
  old_logprobs: jax.Array  # f32[B, T]
  ref_logprobs: jax.Array  # f32[B, T]
  ref_hidden: jax.Array  # [B, T, Dp]   the reference's last_hidden, for the exact KL
  advantages: jax.Array  # f32[B, T]
  old_values: Any = None  # f32[B, T]    of the critic; None without one
  returns: Any = None  # f32[B, T]    the critic's targets


@struct.dataclass
class Pairs:
  """Labelled preferences for the reward update: rows 0 .. m - 1 are the winners, m .. 2m - 1
  their losers.
  """

  tokens: jax.Array  # i32[2m, L]   for the policy
  token_mask: jax.Array  # bool[2m, L]
  reward_tokens: jax.Array  # i32[2m, L'] for the reward model
  reward_mask: jax.Array  # bool[2m, L']
  weight: jax.Array  # f32[m]       0 for missing pairs, if this step has fewer than m labels
  # bool[2m, L], the response part of token_mask. A variant whose states depend on it needs it
  response_mask: Any = None


class TrainState(struct.PyTreeNode):
  """The whole run as one pytree: donated to the step, saved by the checkpointer."""

  step: jax.Array  # i32[]
  key: jax.Array  # the run's typed random key; it never changes, and every use folds in its purpose
  policy: Any  # nnx.State of models.transformer.Transformer
  policy_opt: Any
  beta: jax.Array  # f32[]; weight of the KL, which a controller may move
  ref: Any  # the policy at the start, frozen
  # frozen; nnx.State of a Transformer. All reward fields are None if scores come from outside
  reward_backbone: Any
  reward_frozen: Any  # frozen; nnx.State of the score head phi as it was before RL
  reward_head: Any  # trained; nnx.State of models.reward.RewardHead: cross-attention and phi
  reward_opt: Any
  omega: jax.Array  # f32[]; weight of the reward model's own embedding (eq. 4) after `step` steps
  reward_average: Any = (
    None  # moving average of reward_head, which then gives the scores; None: off
  )
  critic: Any = None  # PPO: {"backbone": nnx.State of a Transformer, "head": of an nnx.Linear}
  critic_opt: Any = None
  # f32[Dr, Dr], frozen: the score head's uncertainty, see algorithm/certify.py; None: not used
  certificate: Any = None
