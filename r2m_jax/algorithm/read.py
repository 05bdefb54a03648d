"""Read (algorithm 1): policy and reference read a step's rows. This file also has what every later
part needs: the modules of a run, how tokens are drawn, and the keys of a step.
"""

import dataclasses
import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from r2m_jax.algorithm import losses
from r2m_jax.algorithm.objective import kl_estimator
from r2m_jax.algorithm.variants import VARIANTS
from r2m_jax.models.attention import Shared
from r2m_jax.models.logprobs import token_stats
from r2m_jax.models.transformer import Transformer
from r2m_jax.ops import Truncation, masked_sum, predicts_response
from r2m_jax.parallel.rows import Deal, map_rows, neighbours
from r2m_jax.parallel.sharding import lay_rows
from r2m_jax.types import Feedback, Rollout, Rows, Sequences, TrainState

# purposes of a step's key
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
  base: nnx.GraphDef | None = None  # of the reference, if the policy is adapters on top of it
  critic_backbone: nnx.GraphDef | None = None  # of PPO's critic
  critic_head: nnx.GraphDef | None = None
  critic_tx: optax.GradientTransformation | None = None
  # share of a pass's padded places that is computed; see `Transformer.__call__`
  share: float = 1.0

  def open_policy(self, policy, ref) -> Transformer:
    """The policy's module. With adapters, `policy` holds only the adapters and `ref` the base
    weights.
    """
    return (
      nnx.merge(self.policy, policy) if self.base is None else nnx.merge(self.policy, policy, ref)
    )

  def open_ref(self, ref) -> Transformer:
    """The reference's module; with adapters, the base without them."""
    return nnx.merge(self.policy if self.base is None else self.base, ref)


def step_key(state: TrainState, purpose: int) -> jax.Array:
  return jax.random.fold_in(jax.random.fold_in(state.key, state.step), purpose)


def sampling(config) -> dict:
  """How tokens are drawn, both in the sampler and in every log-probability."""
  rollout = config.rollout
  return dict(
    temperature=rollout.temperature,
    truncation=Truncation(rollout.top_k, rollout.top_p, rollout.min_p),
  )


def truncated(config) -> bool:
  """Whether some tokens may never be sampled."""
  return sampling(config)["truncation"] != Truncation()


def all_rows(rollout: Rollout):
  """Both parts of a rollout: the rows of the samples, then the greedy rows.   [B (+ P), ...]."""
  if rollout.greedy is None:
    return rollout.samples

  def join(samples, greedy):
    return lay_rows(jnp.concatenate([samples, greedy]))

  return jax.tree.map(join, rollout.samples, rollout.greedy)


def split_rows(tree, samples: int) -> Rollout:
  """The inverse of `all_rows`: the first `samples` rows and the others, if there are any."""
  if len(jax.tree.leaves(tree)[0]) == samples:
    return Rollout(tree)
  return Rollout(
    jax.tree.map(lambda x: lay_rows(x[:samples]), tree),
    jax.tree.map(lambda x: lay_rows(x[samples:]), tree),
  )


def closed(rows: Sequences, ending: tuple[int, ...]) -> Sequences:
  """The rows as a reward model with the policy's tokens reads them: `ending` in place of the token
  that ended a response.

  Rows that were cut off stay as they are. `ending` may be empty. The responses are wider by
  len(ending) - 1 columns, if that is more than none.
  """
  count = len(ending)
  wider = ((0, 0), (0, max(0, count - 1)))
  tokens, response = jnp.pad(rows.tokens, wider), jnp.pad(rows.response_mask, wider)
  prompt = tokens.shape[1] - response.shape[1]
  # columns from the token that ended the response on
  place = jnp.arange(response.shape[1]) - (rows.response_mask.sum(-1, keepdims=True) - 1)
  ended = rows.has_eos[:, None]
  response = jnp.where(ended, place < count, response)
  if count:
    own = jnp.asarray(ending, tokens.dtype)[jnp.clip(place, 0, count - 1)]
    answers = jnp.where(ended & (place >= 0) & (place < count), own, tokens[:, prompt:])
    tokens = jnp.concatenate([tokens[:, :prompt], answers], 1)
  mask = jnp.concatenate([rows.token_mask[:, :prompt], response], 1)
  return Sequences(tokens, mask, response, rows.has_eos)


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
  share: float = 1.0,
) -> Feedback:
  """One forward pass: log-probabilities of the sampled tokens, and the hidden states that the
  reward model reads.
  """
  T = sequences.response_mask.shape[1]
  out = model(
    sequences.tokens, sequences.token_mask, feedback_layer=layer, shared=shared, share=share
  )
  last_hidden = predicts_response(out.hidden, T)
  stats = token_stats(
    model.head,
    last_hidden,
    sequences.tokens[:, -T:],
    temperature=temperature,
    truncation=truncation,
    support=support,
    chunk=chunk,
    mask=sequences.response_mask,
    share=share,
  )
  return Feedback(
    logprobs=stats.logprobs, entropy=stats.entropy, hidden=out.feedback, last_hidden=last_hidden
  )


def make_read(config, share: float = 1.0) -> Callable[..., tuple[Feedback, Feedback]]:
  """Builds `read(policy, ref, sequences, group=1)`: `read_feedback` of both models with the
  config's settings.

  `group` neighbouring rows have one prompt, which is computed once for the rows that go through a
  model together. If sampling is truncated, the reference is normalised over the tokens that the
  policy may sample. States that the config's variant and KL do not read have width 0, because
  states are the largest arrays of a step. `share` comes from `Defs`.
  """
  settings = sampling(config) | dict(layer=config.r2m.feedback_layer, chunk=config.logits_chunk)
  settings |= dict(share=share)
  needs_support, parts = truncated(config), parts_of(config)
  reads = VARIANTS[config.variant].reads

  def read_rows(policy, ref, shared_of, sequences: Sequences) -> tuple[Feedback, Feedback]:
    shared = shared_of(sequences.tokens)
    old = read_feedback(policy, sequences, **settings, shared=shared)
    support = (policy.head, old.last_hidden) if needs_support else None
    reference = read_feedback(ref, sequences, **settings, support=support, shared=shared)
    exact = kl_estimator(config, policy.arch.vocab_size) == "exact"
    return old.keep(reads == "policy", exact), reference.keep(reads == "reference", exact)

  def read(
    policy: Transformer, ref: Transformer, sequences: Sequences, group=1
  ) -> tuple[Feedback, Feedback]:
    shared_of = functools.partial(shared_prompts, group, sequences)
    deal = deal_of(sequences, group, share)
    read_part = functools.partial(read_rows, policy, ref, shared_of)
    return map_rows(read_part, parts, sequences, deal=deal)

  return read


def shared_prompts(group: int, whole: Sequences, tokens: jax.Array) -> Shared:
  """How the rows of `tokens`, a part of `whole`, share prompts: `group` neighbours of `whole` have
  one prompt.
  """
  return Shared(
    whole.tokens.shape[1] - whole.response_mask.shape[1], neighbours(group, len(tokens))
  )


def deal_of(rows: Sequences | Rows, group: int, share: float) -> Deal | None:
  """How rows are dealt out to the parts of a pass: as neighbours if all places are computed, and
  otherwise by their tokens, because the fullest part decides which share is large enough. `group`
  neighbours have one prompt.
  """
  if share == 1:
    return None
  if isinstance(rows, Rows):
    return Deal(rows.mask.sum(-1).astype(jnp.float32), 1)
  return deal_by_lines(rows, group)


def deal_by_lines(rows: Sequences, group: int) -> Deal:
  """For rows of which `group` neighbours share a prompt, whose tokens count once."""
  answers = rows.response_mask.sum(-1)
  prompts = rows.token_mask.sum(-1) - answers
  return Deal(answers + prompts / np.float32(group), group)


def parts_of(config) -> int:
  """The number of parts into which passes without a gradient split the rows of a step. A part has
  as many rows as a micro-batch of an update.
  """
  return config.ppo.minibatches * config.ppo.accumulation


def measured_kl(old: Feedback, ref: Feedback, sequences: Sequences) -> jax.Array:
  """KL(policy || reference) of the samples, nats a sequence: k3 summed over tokens, averaged over
  rows. f32[].
  """
  return masked_sum(losses.kl_k3(old.logprobs, ref.logprobs), sequences.response_mask, -1).mean()
