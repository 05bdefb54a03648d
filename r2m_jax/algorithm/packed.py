"""The share of a step's padded places that hold a token, and the program that computes only that
share.

Shapes are static, so `learn` is compiled for a few shares (config.packing), and a step runs the
smallest share that holds its tokens. `needed` considers every pass of `learn`: minibatches and
micro-batches determine which rows go through a model together and are therefore packed together.
"""

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from r2m_jax.algorithm.annotate import is_given
from r2m_jax.algorithm.read import Defs, all_rows, deal_by_lines, parts_of, shared_prompts
from r2m_jax.algorithm.update import shared_group, shuffles
from r2m_jax.models.transformer import Transformer
from r2m_jax.parallel.rows import Deal, balanced, blocks_of, parts_of_rows, take_rows
from r2m_jax.types import Rollout, Sequences, TrainState


def smallest(shares: Sequence[float], need):
  """Index of the first of the ascending `shares` that is at least `need`, f32[] or a float."""
  return (np.asarray(shares, np.float32)[:-1] < need).sum()


def make_needed(defs: Defs, config) -> Callable[..., jax.Array]:
  """Builds `needed(state, rollout, reward_rows=None) -> f32[]`: the smallest share of the places
  that holds the tokens of every pass of `learn`. The arguments are those of `learn`.
  """
  by_policy, K = make_needed_by_policy(defs, config), config.rollout.group_size

  def needed(state: TrainState, rollout: Rollout, reward_rows: Rollout | None = None):
    found, rows = by_policy(state, rollout), all_rows(rollout)
    read = rows if reward_rows is None else all_rows(reward_rows)
    if isinstance(read, Sequences):
      reward = nnx.merge(defs.reward_backbone, state.reward_backbone)
      group = K if rollout.greedy is None else 1
      in_all = parts_of_rows(len(rows.tokens), parts_of(config))
      return jnp.maximum(found, share_of(reward, read, in_all, group))
    if is_given(reward_rows):
      return found
    return jnp.maximum(found, needed_by_rows(read.mask.sum(-1), read.mask.shape[1], config))

  return needed


def make_needed_by_policy(defs: Defs, config) -> Callable[..., jax.Array]:
  """Builds `needed(state, rollout) -> f32[]`: the share that the passes of policy, reference and
  critic need.
  """
  K, parts = config.rollout.group_size, parts_of(config)
  minibatches, accumulation = config.ppo.minibatches, config.ppo.accumulation

  def needed(state: TrainState, rollout: Rollout):
    policy, samples = defs.open_policy(state.policy, state.ref), rollout.samples
    critic = policy
    if defs.critic_backbone is not None:
      critic = nnx.merge(defs.critic_backbone, state.critic["backbone"])
    rows, group = all_rows(rollout), K if rollout.greedy is None else 1
    in_all = parts_of_rows(len(rows.tokens), parts)
    in_samples = parts_of_rows(len(samples.tokens), parts)
    found = [
      share_of(policy, rows, in_all, group),
      share_of(policy, samples, in_samples, K),
      share_of(critic, samples, in_samples, K),
    ]

    def of_minibatch(order):
      batch = take_rows(samples, order, minibatches) if minibatches > 1 else samples
      of = [share_of(one, batch, accumulation, shared_group(config)) for one in (policy, critic)]
      return jnp.maximum(*of)

    orders = shuffles(config, state, len(samples.tokens))
    return jnp.stack([*found, jax.lax.map(of_minibatch, orders).max()]).max()

  return needed


def needed_by_rows(lengths, width: int, config):
  """The share that a reward model's own rows need, f32[]. lengths i32[R]: the real ones of the
  `width` tokens of each row, on the host or traced.
  """
  parts = parts_of_rows(len(lengths), parts_of(config))
  order = balanced(Deal(lengths.astype(np.float32), 1), parts)
  return share_of_blocks(by_part(lengths, order), width, parts)


def share_of(model: Transformer, rows: Sequences, parts: int, group: int) -> jax.Array:
  """The share that a pass of `rows` through `model` in `parts` needs, f32[]: the larger of the
  shares of all tokens and of response tokens, which are packed for the vocabulary head.
  """
  count, length = rows.tokens.shape
  width = rows.response_mask.shape[1]
  order = balanced(deal_by_lines(rows, group), parts)
  answers = by_part(rows.response_mask.sum(-1), order)
  tokens = by_part(rows.token_mask.sum(-1), order)
  in_part = count // parts
  shared = shared_prompts(group, rows, rows.tokens[:in_part])
  lines = model.lines_of(shared, in_part, length)
  needed = share_of_blocks(answers, width, parts)
  if lines is None:
    return jnp.maximum(needed, share_of_blocks(tokens, length, parts))
  prompts = (tokens - answers)[:: lines.copies]
  of_line = prompts + answers.reshape(-1, lines.copies).sum(-1)
  places = lines.length + lines.copies * width
  return jnp.maximum(needed, share_of_blocks(of_line, places, parts))


def by_part(x, order):
  """x [R] in the order in which `scan_rows` deals rows out to the parts of each device; see
  `balanced`. On the host if both are there.
  """
  devices = np.arange(len(order))[:, None]
  return x.reshape(len(order), -1)[devices, order.reshape(len(order), -1)].reshape(-1)


def share_of_blocks(tokens, width: int, parts: int):
  """The largest share of real tokens in what is packed together, f32[]. tokens i32[R]: the real
  ones of each row or line of `width` places, which are computed in `parts`. Each device packs its
  neighbouring rows of a part.
  """
  _, together = blocks_of(len(tokens), parts)
  return tokens.reshape(-1, together).sum(-1).max() / np.float32(together * width)
