"""Batch use of a model from a Hugging Face folder: `task=generate` and `task=score`, JSON lines in
and out.

  python -m r2m_jax.main --config=configs/default.py --workdir=W --config.task=generate
    --config.policy.path=P \\ --config.generate.input=IN.jsonl --config.generate.output=OUT.jsonl
  python -m r2m_jax.main --config=configs/default.py --workdir=W --config.task=score
    --config.reward.path=P \\ --config.score.input=IN.jsonl --config.score.output=OUT.jsonl
"""

from collections.abc import Callable, Iterator
from pathlib import Path

import jax
import numpy as np
from flax import nnx
from jax.sharding import NamedSharding

from r2m_jax.algorithm.read import read_feedback
from r2m_jax.data.jsonl import check_output, read_rows, turns_of, write_rows
from r2m_jax.data.text import Tokenizer, as_prompts, each_row, pad_left, responses_of
from r2m_jax.hf.folders import (
  FolderError,
  Policy,
  RewardModel,
  abstract_head,
  load_policy,
  load_reward,
  mesh_of,
  phi_score,
)
from r2m_jax.judge.formats import check_form, write_answers
from r2m_jax.models.generate import generate
from r2m_jax.models.reward import read_rte
from r2m_jax.parallel import hosts, sharding
from r2m_jax.run.progress import progress


def run(config, workdir: Path | None = None) -> None:
  """`config.task`: "generate" or "score". The workdir is not used: what is read and written is
  named in the config.
  """
  del workdir
  with matmul_precision(config):
    {"generate": run_generate, "score": run_score}[config.task](config)


def matmul_precision(config):
  """In here float32 means float32: accelerators would otherwise multiply matrices in fewer bits."""
  return jax.default_matmul_precision("highest" if config.dtype == "float32" else "default")


def require_finite(config, finite: np.ndarray, what: str, model: str) -> None:
  """Raises FolderError if a row's result is NaN or infinite; finite: bool[N]."""
  if not finite.all():
    raise FolderError(
      f"the {what} of {(~finite).sum()} of {len(finite)} rows are not finite, the first of row "
      f"{finite.argmin() + 1}; "
      f"nothing was written. The weights of {model} may hold NaN or infinity, or overflow in "
      f"{config.dtype}: try "
      "--config.dtype=float32, or copy the folder again"
    )


def batches(lengths: list[int], size: int) -> Iterator[np.ndarray]:
  """Row indices in batches of like length, each of `size` rows or of all; the last is filled up
  by repeating rows.
  """
  order = np.argsort(lengths, kind="stable")
  for i in range(0, len(order), size):
    yield np.resize(order[i : i + size], size)


def batch_size(config, section, rows: int, mesh) -> int:
  """The section's batch size, no larger than the rows need, as a multiple of the batch's shards."""
  shards = mesh.shape["data"] * mesh.shape["fsdp"]
  return -(-min(section.batch_size, rows) // shards) * shards


def spread(batch, mesh):
  """Rows of host arrays over the devices that split a batch."""
  layout = NamedSharding(mesh, sharding.BATCH)
  return hosts.place(hosts.take(batch, layout), layout)


# ---- generate ----


def run_generate(config) -> None:
  """Reads rows with `prompt`; writes them with prompt_tokens, tokens, logprobs, text and
  truncated, in their order. In a conversation, a row with `turns`, these are of the last turn, and
  `answers` holds the texts of all.
  """
  settings, mesh = config.generate, mesh_of(config)
  check_output(settings.output, "config.generate.output")
  rows = read_rows(settings.input, ("prompt",))[: settings.rows or None]
  check_form(rows, settings.format)
  policy = load_policy(config.policy.path, config, mesh)
  print(policy.tokenizer.describe(rows[0]["prompt"]))
  results = converse(config, policy, rows, mesh)
  finite = np.array([np.isfinite(result["logprobs"]).all() for result in results])
  require_finite(config, finite, "log-probabilities", f"config.policy.path = {config.policy.path}")
  answered = [row | more for row, more in zip(rows, results)]
  name = settings.name or policy.folder.name
  file = hosts.on_first(
    lambda: str(write_answers(settings.output, answered, settings.format, name))
  )
  print(
    f"wrote    {len(rows)} rows to {file}; {sum(r['truncated'] for r in results)} cut off at the "
    "length limit"
  )


def converse(config, policy: Policy, rows: list[dict], mesh) -> list[dict]:
  """One response to each row's prompt, and to each further message of its `turns`."""

  def render(row):
    return policy.tokenizer.render(row["prompt"])

  results = sample(config, policy, each_row(rows, render, config.generate.input), mesh)
  turns = [turns_of(row) for row in rows]
  prompts = [row["prompt"] for row in rows]
  answers = [[result["text"]] for result in results]
  for turn in range(1, max(map(len, turns))):
    asked = [i for i, mine in enumerate(turns) if turn < len(mine)]
    for i in asked:
      said = {"role": "assistant", "content": answers[i][-1]}
      prompts[i] = [*prompts[i], said, {"role": "user", "content": turns[i][turn]}]
    later = [
      {"where": f"{config.generate.input}, row {i + 1}", "prompt": prompts[i]} for i in asked
    ]
    found = sample(config, policy, each_row(later, render), mesh, turn)
    for i, result in zip(asked, found):
      answers[i].append(result["text"])
      results[i] = result
  return [
    result | ({"answers": said} if mine else {})
    for result, said, mine in zip(results, answers, turns)
  ]


def sample(config, policy: Policy, prompts: list[list[int]], mesh, turn: int = 0) -> list[dict]:
  """One response for each rendered prompt, as the fields of a row; each turn draws anew."""
  settings, size = config.generate, batch_size(config, config.generate, len(prompts), mesh)
  T, tokenizer = settings.max_new_tokens, policy.tokenizer

  @sharding.jit_on(mesh)
  def draw(state, prompts):
    model = nnx.merge(policy.graphdef, state)
    sequences = generate(
      model,
      prompts,
      jax.random.key(config.seed),
      turn,
      group_size=1,
      max_new_tokens=T,
      eos_ids=tokenizer.eos_ids,
      temperature=settings.temperature,
      pad_id=tokenizer.pad_id,
    )
    # at temperature 0 the log-probabilities are those of the unscaled logits
    reading = dict(temperature=settings.temperature or 1.0, layer=-1, chunk=config.logits_chunk)
    return sequences, read_feedback(model, sequences, **reading).logprobs

  results: list[dict] = [{}] * len(prompts)
  with progress(-(-len(prompts) // size), "generate") as bar:
    for index in batches([len(p) for p in prompts], size):
      batch = as_prompts([prompts[i] for i in index], tokenizer.pad_id).replace(
        example_id=index.astype(np.int32)
      )
      sequences, logprobs = hosts.fetch(draw(policy.state, spread(batch, mesh)))
      texts, lengths = responses_of(sequences, tokenizer), sequences.response_mask.sum(1)
      for row, i in enumerate(index):
        results[i] = {
          "prompt_tokens": list(prompts[i]),
          "tokens": sequences.tokens[row, -T:][: lengths[row]].tolist(),
          "logprobs": logprobs[row, : lengths[row]].astype(float).tolist(),
          "text": texts[row][0],
          "truncated": texts[row][1],
        }
      bar.update()
  return results


# ---- score ----


def run_score(config) -> None:
  """Reads rows with `prompt` and `response` (and `truncated`, if given); writes them with
  `score`, in their order.
  """
  settings, mesh = config.score, mesh_of(config)
  check_output(settings.output, "config.score.output")
  rows = read_rows(settings.input, ("prompt", "response"))
  reward = load_reward(config.reward.path, config, mesh)
  policy = policy_read_by(config, reward, mesh, f"config.reward.path is {config.reward.path}")
  print(
    reward.renderer.describe(
      rows[0]["prompt"], rows[0]["response"], rows[0].get("truncated", False)
    )
  )
  scores = score(config, reward, policy, rows, mesh)
  require_finite(
    config, np.isfinite(scores), "scores", f"config.reward.path = {config.reward.path}"
  )

  def write():
    return str(
      write_rows(settings.output, [row | {"score": float(s)} for row, s in zip(rows, scores)])
    )

  file = hosts.on_first(write)
  low, high = scores.min(), scores.max()
  print(
    f"wrote    {len(rows)} scores to {file}, mean {scores.mean():.4f}, from {low:.4f} to {high:.4f}"
  )


def policy_read_by(config, reward: RewardModel, mesh, given: str) -> Policy | None:
  """The policy whose hidden states a reward model reads; None if it reads none. `given` names the
  model in an error.
  """
  if reward.head is None:
    return None
  if not config.policy.path:
    raise FolderError(
      f"{given}: an R2M reward model, which reads the policy's hidden states; "
      "give the policy as config.policy.path"
    )
  return load_policy(config.policy.path, config, mesh)


def policy_ids(tokenizer: Tokenizer, row: dict) -> list[int]:
  """Prompt and response as the policy would have sampled them."""
  ids = tokenizer.render(row["prompt"]) + tokenizer.encode(row["response"], special=False)
  return (
    ids if row.get("truncated", False) or tokenizer.end_id is None else [*ids, tokenizer.end_id]
  )


def score(config, reward: RewardModel, policy: Policy | None, rows: list[dict], mesh) -> np.ndarray:
  """The score of every row, f32[N]. An R2M reward model reads `policy`, at the omega it was
  exported with.
  """
  return make_scorer(config, reward, policy, mesh)(rows)


def make_scorer(
  config, reward: RewardModel, policy: Policy | None, mesh, *, shown: bool = True
) -> Callable[[list[dict]], np.ndarray]:
  """Builds the function behind `score`, rows -> f32[N], for many calls: a program is made once.

  Args:
    shown: print a line of progress.
  """
  head_config, head_state = reward.head or (None, None)
  if head_config is not None and head_config.policy_hidden_size != policy.arch.hidden_size:
    raise FolderError(
      f"{reward.folder} reads hidden states of {head_config.policy_hidden_size} numbers; those of "
      "config.policy.path = "
      f"{config.policy.path} have {policy.arch.hidden_size}: give the policy it was trained with"
    )

  head_def = None if head_config is None else nnx.graphdef(abstract_head(head_config))

  @sharding.jit_on(mesh)
  def plain(backbone, phi, tokens, mask):
    return phi_score(phi, read_rte(nnx.merge(reward.graphdef, backbone), tokens, mask))

  @sharding.jit_on(mesh)
  def fused(backbone, head, policy_state, tokens, mask, policy_tokens, policy_mask):
    rte = read_rte(nnx.merge(reward.graphdef, backbone), tokens, mask)
    model = nnx.merge(policy.graphdef, policy_state)
    h = model(policy_tokens, policy_mask, feedback_layer=head_config.feedback_layer).feedback
    return nnx.merge(head_def, head)(rte, h, policy_mask, head_config.omega)

  def scores_of(rows: list[dict]) -> np.ndarray:
    ids = each_row(
      rows,
      lambda r: reward.renderer.ids(
        r["prompt"], r["response"], truncated=r.get("truncated", False)
      ),
      config.score.input,
    )
    lengths = [len(row) for row in ids]
    if head_config is not None:
      read = each_row(rows, lambda r: policy_ids(policy.tokenizer, r), config.score.input)
    scores, size = (
      np.zeros(len(rows), np.float32),
      batch_size(config, config.score, len(rows), mesh),
    )
    with progress(-(-len(rows) // size), "score", enabled=shown) as bar:
      for index in batches(lengths, size):
        tokens, mask = spread(
          pad_left([ids[i] for i in index], reward.renderer.tokenizer.pad_id), mesh
        )
        if head_config is None:
          result = plain(reward.state, reward.phi, tokens, mask)
        else:
          fed = spread(pad_left([read[i] for i in index], policy.tokenizer.pad_id), mesh)
          result = fused(reward.state, head_state, policy.state, tokens, mask, *fed)
        scores[index] = hosts.fetch(result)
        bar.update()
    return scores

  return scores_of
