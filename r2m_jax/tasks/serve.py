"""Batch use of a model from a Hugging Face folder: `task=generate` and `task=score`, JSON lines in
and out.

  python -m r2m_jax.main --config=configs/default.py --workdir=W --config.task=generate \\
    --config.policy.path=P --config.generate.input=IN.jsonl --config.generate.output=OUT.jsonl
  python -m r2m_jax.main --config=configs/default.py --workdir=W --config.task=score \\
    --config.reward.path=P --config.score.input=IN.jsonl --config.score.output=OUT.jsonl
"""

from collections.abc import Callable, Iterator
from pathlib import Path

import jax
import numpy as np
from flax import nnx
from jax.sharding import NamedSharding

from r2m_jax.algorithm.read import read_feedback
from r2m_jax.data.datasets import SHORTER_INPUTS
from r2m_jax.data.jsonl import DataError, check_kept, check_output, read_rows, turns_of, write_rows
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
from r2m_jax.ops import Truncation
from r2m_jax.parallel import hosts, sharding
from r2m_jax.run.progress import progress

# fields of a row of `task=generate` that every answer replaces
WRITTEN = ("prompt_tokens", "tokens", "logprobs", "text", "truncated")


def run(config, workdir: Path | None = None) -> None:
  """`config.task`: "generate" or "score". The workdir is not used; the config names the files."""
  del workdir
  with matmul_precision(config):
    {"generate": run_generate, "score": run_score}[config.task](config)


def matmul_precision(config):
  """Inside this context, float32 matmuls use full precision; accelerators would otherwise use fewer
  bits.
  """
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
  """Row indices in batches of similar length, each with `size` rows or with all rows; the last is
  padded by repeating rows at its end.
  """
  order = np.argsort(lengths, kind="stable")
  for i in range(0, len(order), size):
    yield np.resize(order[i : i + size], size)


def batch_size(config, section, rows: int, mesh, *, each: int = 1) -> int:
  """The section's batch size in rows of `each` answers, no larger than necessary, as a multiple of
  the batch's shards.
  """
  shards = mesh.shape["data"] * mesh.shape["fsdp"]
  return -(-min(max(1, section.batch_size // each), rows) // shards) * shards


def spread(batch, mesh):
  """Distributes rows of host arrays over the devices that split a batch."""
  layout = NamedSharding(mesh, sharding.BATCH)
  return hosts.place(hosts.take(batch, layout), layout)


# ---- generate ----


def run_generate(config) -> None:
  """Reads rows with `prompt`; writes them with prompt_tokens, tokens, logprobs, text and truncated,
  in their order. With config.generate.n above 1, each row is written n times, with the index
  `sample`. In a conversation (a row with `turns`) the fields describe the last turn, and `answers`
  holds the texts of all turns.
  """
  settings, mesh = config.generate, mesh_of(config)
  check_output(settings.output, "config.generate.output")
  rows = read_rows(settings.input, ("prompt",))[: settings.rows or None]
  require_input_kept(settings)
  check_form(rows, settings.format, settings.n)
  if settings.format == "rows":
    check_kept(rows, settings.input, WRITTEN)
  policy = load_policy(config.policy.path, config, mesh)
  print(policy.tokenizer.describe(rows[0]["prompt"]))
  results = converse(config, policy, rows, mesh)
  rows = [row for row in rows for _ in range(settings.n)]
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


def require_input_kept(settings) -> None:
  """Raises DataError if the output would replace an input of which it lacks rows or fields."""
  given, out = (Path(path).expanduser().resolve() for path in (settings.input, settings.output))
  if given == out and (settings.rows or settings.format != "rows"):
    raise DataError(
      f"config.generate.output is {settings.output!r}, the input, which would lose what the output "
      "lacks (config.generate.rows, config.generate.format); give another file"
    )


def converse(config, policy: Policy, rows: list[dict], mesh) -> list[dict]:
  """config.generate.n responses to each row's prompt, and then one response to each further message
  of its `turns`, in n conversations.
  """
  n = config.generate.n
  results = answers_to(config, policy, rows, mesh)
  rows = [row for row in rows for _ in range(n)]
  turns, prompts = [turns_of(row) for row in rows], [row["prompt"] for row in rows]
  answers = [[result["text"]] for result in results]
  once = config.copy_and_resolve_references()
  with once.unlocked():
    once.generate.n = 1
  for turn in range(1, max(map(len, turns))):
    asked = [i for i, mine in enumerate(turns) if turn < len(mine)]
    for i in asked:
      said = {"role": "assistant", "content": answers[i][-1]}
      prompts[i] = [*prompts[i], said, {"role": "user", "content": turns[i][turn]}]
    where = [f"{config.generate.input}, row {i // n + 1}" for i in asked]
    later = [rows[i] | {"where": at, "prompt": prompts[i]} for at, i in zip(where, asked)]
    for i, result in zip(asked, answers_to(once, policy, later, mesh, turn)):
      answers[i].append(result["text"])
      results[i] |= result
  return [
    result | ({"answers": said} if mine else {})
    for result, said, mine in zip(results, answers, turns)
  ]


def answers_to(config, policy: Policy, rows: list[dict], mesh, turn: int = 0) -> list[dict]:
  """config.generate.n responses to the prompt of each row, as the fields of a row."""
  settings, tokenizer = config.generate, policy.tokenizer
  file = "" if turn else settings.input  # in later turns the rows name themselves
  prompts = each_row(rows, lambda row: tokenizer.render(row["prompt"]), file)
  lengths = [len(prompt) + settings.max_new_tokens for prompt in prompts]
  what = f"prompts with config.generate.max_new_tokens = {settings.max_new_tokens}"
  fix = "lower config.generate.max_new_tokens or give shorter prompts"
  tokenizer.warn_beyond(lengths, what, fix)
  results = sample(config, policy, prompts, mesh, turn, temperatures_of(config, rows))
  for number, result in enumerate(results):
    result["text"] = tokenizer.whole(rows[number // settings.n]["prompt"], result["text"])
  return results


def temperatures_of(config, rows: list[dict]) -> list[float]:
  """The sampling temperature of each row, by its category."""
  settings = config.generate
  by = settings.temperature_by.to_dict()
  return [by.get(str(row.get("category") or ""), settings.temperature) for row in rows]


def sample(
  config,
  policy: Policy,
  prompts: list[list[int]],
  mesh,
  turn: int = 0,
  temperatures: list[float] | None = None,
) -> list[dict]:
  """config.generate.n responses for each rendered prompt, next to each other, as the fields of a
  row. They depend only on the seed, the turn, the position of the prompt, its temperature and the
  index of the sample.

  Args:
    temperatures: one for each prompt; None: config.generate.temperature.
  """
  settings, n = config.generate, config.generate.n
  size = batch_size(config, settings, len(prompts), mesh, each=n)
  T, tokenizer = settings.max_new_tokens, policy.tokenizer
  given = np.asarray(temperatures or [settings.temperature] * len(prompts))
  parts = []  # (draw function, indices of the prompts that are drawn together)
  for temperature in np.unique(given).tolist():
    draw = make_draw(config, policy, mesh, turn, temperature)
    mine = np.flatnonzero(given == temperature)
    parts += [(draw, mine[at]) for at in batches([len(prompts[i]) for i in mine], size)]
  results: list[dict] = [{}] * (len(prompts) * n)
  with progress(len(parts), "generate", unit="batch") as bar:
    for draw, index in parts:
      batch = as_prompts([prompts[i] for i in index], tokenizer.pad_id).replace(
        example_id=index.astype(np.int32)
      )
      drawn = draw(policy.state, spread(batch, mesh))
      bar.dispatched()
      sequences, logprobs = hosts.fetch(drawn)
      texts, lengths = responses_of(sequences, tokenizer), sequences.response_mask.sum(1)
      own = len(np.unique(index)) * n  # rows; those after them are padding, and have other samples
      for row, (text, truncated) in enumerate(texts[:own]):
        i, which = int(index[row // n]), row % n
        results[i * n + which] = {
          **({"sample": which} if n > 1 else {}),
          "prompt_tokens": list(prompts[i]),
          "tokens": sequences.tokens[row, -T:][: lengths[row]].tolist(),
          "logprobs": logprobs[row, : lengths[row]].astype(float).tolist(),
          "text": text,
          "truncated": truncated,
        }
      bar.update()
  return results


def make_draw(config, policy: Policy, mesh, turn: int, temperature: float) -> Callable:
  """Builds `draw(state, prompts) -> (Sequences, log-probabilities f32[P * n, T])` with the settings
  of config.generate, at a temperature. The log-probabilities belong to the distribution from which
  the tokens were sampled.
  """
  settings, tokenizer = config.generate, policy.tokenizer
  truncation = Truncation(settings.top_k, settings.top_p, settings.min_p)
  seed = config.seed if settings.seed == -1 else settings.seed
  if not temperature:  # the most likely token is never truncated; all log-probabilities are kept
    truncation = Truncation()

  @sharding.jit_on(mesh)
  def draw(state, prompts):
    model = nnx.merge(policy.graphdef, state)
    sequences = generate(
      model,
      prompts,
      jax.random.key(seed),
      turn,
      group_size=settings.n,
      max_new_tokens=settings.max_new_tokens,
      eos_ids=tokenizer.eos_ids,
      temperature=temperature,
      pad_id=tokenizer.pad_id,
      truncation=truncation,
    )
    # at temperature 0 the log-probabilities come from the unscaled logits
    logprobs = read_feedback(
      model,
      sequences,
      temperature=temperature or 1.0,
      layer=-1,
      chunk=config.logits_chunk,
      truncation=truncation,
    ).logprobs
    return sequences, logprobs

  return draw


# ---- score ----


def run_score(config) -> None:
  """Reads rows with `prompt` and config.score.field (and `truncated`, if given); writes them with
  `score`, in their order.
  """
  settings, mesh = config.score, mesh_of(config)
  field = settings.field
  check_output(settings.output, "config.score.output")
  hint = (
    ", or name the field of the replies as config.score.field ('text' in files of task=generate)"
  )
  given = read_rows(settings.input, ("prompt", field), hint)
  check_kept(given, settings.input, ("score",))
  rows = [row | {"response": row[field]} for row in given]
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
      write_rows(settings.output, [row | {"score": float(s)} for row, s in zip(given, scores)])
    )

  file = hosts.on_first(write)
  low, high = scores.min(), scores.max()
  print(
    f"wrote    {len(rows)} scores to {file}, mean {scores.mean():.4f}, from {low:.4f} to {high:.4f}"
  )


def policy_read_by(config, reward: RewardModel, mesh, given: str) -> Policy | None:
  """The policy whose hidden states a reward model reads; None if it reads none. `given` is the
  model's name in errors.
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
  """Prompt and response in the form in which the policy would have sampled them."""
  ids = tokenizer.render(row["prompt"]) + tokenizer.sampled(row["prompt"], row["response"])
  return (
    ids if row.get("truncated", False) or tokenizer.end_id is None else [*ids, tokenizer.end_id]
  )


def score(config, reward: RewardModel, policy: Policy | None, rows: list[dict], mesh) -> np.ndarray:
  """The score of every row, f32[N]. An R2M reward model reads `policy`, at its exported omega."""
  return make_scorer(config, reward, policy, mesh)(rows)


def warn_of_lengths(
  reward: RewardModel, policy: Policy | None, lengths: list[int], read: list[int]
) -> None:
  """Warns if rows with these lengths, for the reward model and for the policy, are too long."""
  reward.renderer.tokenizer.warn_beyond(lengths, "rows for the reward model", SHORTER_INPUTS)
  if policy is not None:
    policy.tokenizer.warn_beyond(read, "rows for the policy", "shorten prompts or responses")


def require_policy(config, reward: RewardModel, policy: Policy) -> None:
  """Raises FolderError unless an R2M reward model can read this policy like its own."""
  size = reward.head[0].policy_hidden_size
  if size != policy.arch.hidden_size:
    raise FolderError(
      f"{reward.folder} reads hidden states of {size} numbers; those of config.policy.path = "
      f"{config.policy.path} have {policy.arch.hidden_size}: give the policy with which it was "
      "trained"
    )
  if policy.tokenizer.chat.contract != reward.policy_chat:
    raise FolderError(
      f"{reward.folder} reads the states of a policy whose prompts were rendered with "
      f"{reward.policy_chat or 'no changes to its chat template'}; config.policy gives "
      f"{policy.tokenizer.chat.contract or 'none'}: set config.policy.system_prompt and "
      "chat_template_args as they were in training"
    )


def make_scorer(
  config, reward: RewardModel, policy: Policy | None, mesh, *, shown: bool = True
) -> Callable[[list[dict]], np.ndarray]:
  """Builds the function behind `score`, rows -> f32[N], for many calls: its program is compiled
  once.

  Args:
    shown: print a line of progress, and warn of rows that are too long for a model.
  """
  head_config, head_state = reward.head or (None, None)
  if head_config is not None:
    require_policy(config, reward, policy)
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
    read = []
    if head_config is not None:
      read = each_row(rows, lambda r: policy_ids(policy.tokenizer, r), config.score.input)
    if shown:
      warn_of_lengths(reward, policy, lengths, [len(row) for row in read])
    scores = np.zeros(len(rows), np.float32)
    size = batch_size(config, config.score, len(rows), mesh)
    with progress(-(-len(rows) // size), "score", enabled=shown, unit="batch") as bar:
      for index in batches(lengths, size):
        tokens, mask = spread(
          pad_left([ids[i] for i in index], reward.renderer.tokenizer.pad_id), mesh
        )
        if head_config is None:
          result = plain(reward.state, reward.phi, tokens, mask)
        else:
          fed = spread(pad_left([read[i] for i in index], policy.tokenizer.pad_id), mesh)
          result = fused(reward.state, head_state, policy.state, tokens, mask, *fed)
        bar.dispatched()
        scores[index] = hosts.fetch(result)
        bar.update()
    return scores

  return scores_of
