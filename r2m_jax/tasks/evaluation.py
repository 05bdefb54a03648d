"""An evaluation: one sample for each of a run's held-out prompts, and measurements of these
samples.

Every evaluation of a run draws with the same keys, which depend only on the seed and the prompt. So
it does not change the run's state, and the noise that two evaluations share cancels in their
difference. docs/evaluate.md defines each number.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from flax import nnx

from r2m_jax.algorithm.read import sampling
from r2m_jax.data.datasets import HeldOut
from r2m_jax.data.text import Prompt, Renderer, as_prompts, pad_left, responses_of
from r2m_jax.hf.folders import FolderError, Policy, RewardModel, load_reward, phi_score
from r2m_jax.models.generate import generate
from r2m_jax.models.logprobs import token_stats
from r2m_jax.models.reward import member_scores, read_rte
from r2m_jax.models.transformer import Transformer
from r2m_jax.ops import combine, masked_sum, predicts_response
from r2m_jax.parallel import hosts
from r2m_jax.parallel.sharding import jit_on
from r2m_jax.report.intervals import bounds
from r2m_jax.run.build import Build
from r2m_jax.run.files import plain
from r2m_jax.tasks.rewards import OutsideReward
from r2m_jax.tasks.serve import batch_size, spread
from r2m_jax.types import Prompts, Sequences, TrainState

KEY_EVALUATION = 2**31 - 5  # folded into the run's key where an RL step folds in its number
NGRAM = 4  # tokens of a repeated n-gram


class Evaluation(NamedTuple):
  values: dict[str, float]  # means and the ends of their intervals, for one row of metrics.jsonl
  samples: list[dict]  # rows of eval_samples.jsonl without arm and step


Evaluate = Callable[[TrainState], Evaluation]


# ---- on the devices ----


def exact_kl(config, policy: Transformer, ref: Transformer, sequences: Sequences) -> jax.Array:
  """KL(policy || reference) of every row, in nats: the exact KL of each token's distribution,
  summed over the response. At least f32[B].
  """
  T = sequences.response_mask.shape[1]
  hidden, ref_hidden = (
    predicts_response(model(sequences.tokens, sequences.token_mask).hidden, T)
    for model in (policy, ref)
  )
  tokens, chunk = sequences.tokens[:, -T:], config.logits_chunk
  against = (ref.head, ref_hidden)
  stats = token_stats(policy.head, hidden, tokens, **sampling(config), ref=against, chunk=chunk)
  return masked_sum(stats.kl, sequences.response_mask, -1)


def make_draw(config, built: Build, eos_ids: Sequence[int], pad_id: int):
  """Builds `draw(state, prompts) -> (Sequences, KL f32[P])` on the host: one sample for each
  prompt, drawn as in training, for any number of `Prompts` on the host.
  """
  defs, key = built.defs, jax.random.fold_in(jax.random.key(config.seed), KEY_EVALUATION)
  rollout = config.rollout

  @jit_on(built.mesh)
  def program(policy_state, ref_state, prompts):
    policy, ref = defs.open_policy(policy_state, ref_state), defs.open_ref(ref_state)
    sequences = generate(
      policy,
      prompts,
      key,
      0,
      group_size=1,
      max_new_tokens=rollout.max_new_tokens,
      repetition_stop=rollout.repetition_stop,
      eos_ids=tuple(eos_ids),
      pad_id=pad_id,
      **sampling(config),
    )
    return sequences, exact_kl(config, policy, ref, sequences)

  def draw(state: TrainState, prompts: Prompts) -> tuple[Sequences, np.ndarray]:
    return in_batches(
      config, built.mesh, lambda part: program(state.policy, state.ref, part), prompts
    )

  return draw


def make_score(config, mesh, backbone_def, head: Callable):
  """Builds `score(backbone, phi, tokens, mask) -> f32[N]` on the host, for any number of rows; head
  maps (phi, rte f32[B, D]) to f32[B].
  """

  @jit_on(mesh)
  def program(backbone, phi, tokens, mask):
    return head(phi, read_rte(nnx.merge(backbone_def, backbone), tokens, mask))

  def score(backbone, phi, tokens, mask) -> np.ndarray:
    return in_batches(config, mesh, lambda rows: program(backbone, phi, *rows), (tokens, mask))

  return score


def make_frozen(config, built: Build):
  """Builds `frozen(state, tokens, mask) -> f32[N]`: the score of the reward model before RL."""
  defs = built.defs
  together = dict(how=config.reward.combine, variance_weight=config.reward.variance_weight)

  def head(phi, rte):
    return combine(member_scores(nnx.merge(defs.phi, phi), rte), **together)

  score = make_score(config, built.mesh, defs.reward_backbone, head)

  def frozen(state: TrainState, tokens, mask) -> np.ndarray:
    return score(state.reward_backbone, state.reward_frozen, tokens, mask)

  return frozen


def in_batches(config, mesh, program: Callable, rows: Any):
  """Runs `program` on host arrays [N, ...], config.eval.batch_size rows at a time; returns the
  results [N, ...] on the host. The last batch is padded by repeating its rows, so that there is one
  shape.
  """
  count = len(jax.tree.leaves(rows)[0])
  size, parts = batch_size(config, config.eval, count, mesh), []
  for first in range(0, count, size):
    index = np.resize(np.arange(first, min(first + size, count)), size)
    found = hosts.fetch(program(spread(jax.tree.map(lambda x: x[index], rows), mesh)))
    parts.append(jax.tree.map(lambda x: x[: count - first], found))
  return jax.tree.map(lambda *xs: np.concatenate(xs), *parts)


# ---- measurements ----


def repetition(tokens: Sequence[int]) -> float:
  """The share of a response's 4-grams that occur earlier in it; 0 for fewer than four tokens.

  seq-rep-4 of Welleck et al., Neural Text Generation with Unlikelihood Training (arXiv 1908.04319).
  """
  grams = [tuple(tokens[i : i + NGRAM]) for i in range(len(tokens) - NGRAM + 1)]
  return 1 - len(set(grams)) / len(grams) if grams else 0.0


def responses_in(sequences: Sequences) -> list[list[int]]:
  """The sampled tokens of every row."""
  mask = sequences.response_mask
  tokens = sequences.tokens[:, -mask.shape[1] :]
  return [row[used].tolist() for row, used in zip(tokens, mask)]


def columns_of(sequences: Sequences, kl: np.ndarray, scores: dict) -> dict[str, np.ndarray]:
  """The measurements of every row, f64[N] each, by name. scores: "frozen" and "gold"."""
  measured = {
    "kl": kl,
    "length": sequences.response_mask.sum(-1),
    "truncated": ~sequences.has_eos,
    "repetition": [repetition(row) for row in responses_in(sequences)],
  }
  return {name: np.asarray(values, float) for name, values in (scores | measured).items()}


def means(columns: dict[str, np.ndarray]) -> dict[str, float]:
  """The mean of each column, and the ends NAME_low and NAME_high of its 95% interval over prompts
  (`report.intervals`).
  """
  table = np.stack(list(columns.values()), -1)
  found = {}
  for name, mean, low, high in zip(columns, table.mean(0), *bounds(table)):
    found |= {name: float(mean), f"{name}_low": float(low), f"{name}_high": float(high)}
  return found


def evaluation(
  config, columns: dict[str, np.ndarray], prompts: Sequence[str], texts: Sequence[str]
) -> Evaluation:
  """The evaluation of rows with these columns, prompts and responses."""
  shown = range(min(config.log.samples, len(prompts)))

  def sample(i: int) -> dict:
    row = {name: plain(values[i]) for name, values in columns.items() if name != "repetition"}
    row |= {"length": int(row["length"]), "truncated": bool(row["truncated"])}
    return {"prompt": prompts[i], "response": texts[i], **row}

  return Evaluation(means(columns), [sample(i) for i in shown])


# ---- for runs from folders ----


def load_gold(config, mesh) -> RewardModel | None:
  """The reward model in config.eval.gold.path; None if none is named.

  Raises:
    FolderError: it is not a reward model, or it reads a policy.
  """
  path = config.eval.gold.path
  if not path:
    return None
  gold = load_reward(path, config, mesh, field="eval.gold.path")
  if gold.head is not None:
    raise FolderError(
      f"config.eval.gold.path is {path}: an R2M reward model, which reads a policy and was "
      "trained with it; give a reward model that reads only text"
    )
  return gold


# (the state, rows of prompt, response and whether it was cut off) -> f32[N], on the host
Measure = Callable[[TrainState, Sequence[tuple[Prompt, str, bool]]], np.ndarray]


def rendered(by: Renderer, rows: Sequence[tuple[Prompt, str, bool]]):
  """Tokens i32[N, L] and mask bool[N, L] of a reward model's input."""
  ids = [by.ids(prompt, text, truncated=cut) for prompt, text, cut in rows]
  return pad_left(ids, by.tokenizer.pad_id)


def make_proxy(config, built: Build, reward: Renderer | OutsideReward) -> Measure:
  """Builds the `Measure` of the run's reward as it was before RL."""
  if isinstance(reward, OutsideReward):
    return lambda state, rows: reward.scores(rows)
  frozen = make_frozen(config, built)
  return lambda state, rows: frozen(state, *rendered(reward, rows))


def make_gold(config, mesh, gold: RewardModel | OutsideReward) -> Measure:
  """Builds the `Measure` of the gold reward."""
  if isinstance(gold, OutsideReward):
    return lambda state, rows: gold.scores(rows)
  score = make_score(config, mesh, gold.graphdef, phi_score)
  return lambda state, rows: score(gold.state, gold.phi, *rendered(gold.renderer, rows))


def make_evaluate(
  config,
  built: Build,
  policy: Policy,
  reward: Renderer | OutsideReward,
  held_out: HeldOut,
  gold: RewardModel | OutsideReward | None,
  shown: Callable[[Any], str],
) -> Evaluate:
  """Builds the evaluation of a run from folders.

  Args:
    reward: the renderer of the run's reward model; the gold reward model has its own.
    shown: a prompt, text or messages, as text.
  """
  tokenizer, mesh = policy.tokenizer, built.mesh
  prompts = as_prompts(held_out.ids, tokenizer.pad_id, length=held_out.length)
  draw = make_draw(config, built, tokenizer.eos_ids, tokenizer.pad_id)
  measures = {"frozen": make_proxy(config, built, reward)}
  if gold is not None:
    measures["gold"] = make_gold(config, mesh, gold)
  asked = [shown(prompt) for prompt in held_out.prompts]

  def evaluate(state: TrainState) -> Evaluation:
    sequences, kl = draw(state, prompts)
    rows = [
      (prompt, tokenizer.whole(prompt, text), cut)
      for prompt, (text, cut) in zip(held_out.prompts, responses_of(sequences, tokenizer))
    ]
    scores = {name: measure(state, rows) for name, measure in measures.items()}
    columns = columns_of(sequences, kl, scores)
    return evaluation(config, columns, asked, [text for _, text, _ in rows])

  return evaluate
