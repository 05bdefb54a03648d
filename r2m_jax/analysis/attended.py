"""An R2M head's reading of a policy's states: its attention, and its score with and without it."""

import numpy as np
from flax import nnx

from r2m_jax.analysis.checks import Attended
from r2m_jax.goldtask import task as goldtask
from r2m_jax.hf.folders import Policy, RewardModel, abstract_head
from r2m_jax.models.reward import read_rte
from r2m_jax.parallel import hosts, sharding
from r2m_jax.tasks import serve
from r2m_jax.types import Sequences


def template_of_gold(sequences: Sequences) -> np.ndarray:
  """bool[B, L]: the tokens that frame note and response."""
  frame = (goldtask.PAD, goldtask.BOS, goldtask.EOS, goldtask.SEP)
  return np.isin(np.asarray(sequences.tokens), frame) & np.asarray(sequences.token_mask)


def template_of(policy: Policy, row: dict, length: int) -> list[bool]:
  """For a row of `length` policy tokens, those that come from neither the prompt nor the
  response.
  """
  asked = [not written for written in policy.tokenizer.written(row["prompt"])]
  answered = [False] * (length - len(asked))
  if answered and not row.get("truncated", False):
    answered[-1] = policy.tokenizer.end_id is not None
  return asked + answered


def attended_text(
  config, reward: RewardModel, policy: Policy, rows: list[dict], mesh
) -> tuple[np.ndarray, np.ndarray, Attended]:
  """An R2M reward model's results for rows of prompt, response and truncated, at the omega of its
  head: (scores f64[N], their part without attention f64[N], the attention).
  """
  assert reward.head is not None  # the caller passes an R2M reward model
  settings, head_state = reward.head
  head_def = nnx.graphdef(abstract_head(settings))
  graphdefs = reward.graphdef, policy.graphdef

  @sharding.jit_on(mesh)
  def look(states, head, tokens, mask, read, read_mask):
    backbone, model = (nnx.merge(*pair) for pair in zip(graphdefs, states))
    rte, module = read_rte(backbone, tokens, mask), nnx.merge(head_def, head)
    h = model(read, read_mask, feedback_layer=settings.feedback_layer).feedback
    return {
      "used": module(rte, h, read_mask, settings.omega),
      "own": settings.omega * module.score(rte),
      "weights": module.attention_weights(rte, h, read_mask).mean(1),
    }

  ids = [
    reward.renderer.ids(row["prompt"], row["response"], truncated=row.get("truncated", False))
    for row in rows
  ]
  read = [serve.policy_ids(policy.tokenizer, row) for row in rows]
  used, own = np.zeros(len(rows)), np.zeros(len(rows))
  weights = np.zeros((len(rows), max(map(len, read))))
  template, states = np.zeros(weights.shape, bool), (reward.state, policy.state)
  for index in serve.batches(
    [len(row) for row in read], serve.batch_size(config, config.score, len(rows), mesh)
  ):
    both = serve.pad_left([ids[i] for i in index], reward.renderer.tokenizer.pad_id)
    both += serve.pad_left([read[i] for i in index], policy.tokenizer.pad_id)
    out = hosts.fetch(look(states, head_state, *serve.spread(both, mesh)))
    used[index], own[index] = out["used"], out["own"]
    for i, row in zip(index, out["weights"]):
      weights[i, : len(read[i])] = row[len(row) - len(read[i]) :]
      template[i, : len(read[i])] = template_of(policy, rows[i], len(read[i]))
  mask = np.arange(weights.shape[1]) < np.array([len(row) for row in read])[:, None]
  return used, own, Attended(weights, mask, template)
