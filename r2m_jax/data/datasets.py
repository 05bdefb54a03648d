"""Rows of config.data as batches for a model: rendered, tokenised, filtered by length in tokens,
and ordered.

Each task gets a dataset of row indices (data.batches) and a function that makes a batch's arrays
from them.
"""

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np

from r2m_jax.algorithm.labels import Labeller, pairs_at, pairs_per_step
from r2m_jax.config import ConfigError
from r2m_jax.data import thinking
from r2m_jax.data.batches import group_by_length, pack, row_batches
from r2m_jax.data.checked import fingerprint, keep, too_long
from r2m_jax.data.jsonl import DataError
from r2m_jax.data.rows import load
from r2m_jax.data.text import Renderer, Tokenizer, as_prompts, bucket, each_row, pad_left
from r2m_jax.parallel import hosts
from r2m_jax.run.files import read_json, write_atomic
from r2m_jax.types import Pairs, Prompts


def select(
  config,
  rows: list[dict],
  ids: list[tuple[list[int], ...]],
  what: str,
  chosen=None,
  *,
  long: bool = False,
  empty: str = "",
) -> list[int]:
  """The indices of the rows whose prompt and responses, given as token ids, config.data allows;
  prints why the others are dropped.

  `chosen` has the ids of the responses to which the paper's filter applies, row by row; `long` rows
  are kept. `empty` is the reason for dropping rows with an empty response; "": they are kept.
  """
  seen, reasons = set(), []
  for i, (prompt, *responses) in enumerate(ids):
    lengths = len(prompt), [len(r) for r in responses], len(chosen[i]) if chosen else 0
    reason = None if long else too_long(config.data, *lengths)
    if empty and not all(lengths[1]):
      reason = empty
    if reason is None and config.data.unique:
      row = hash((tuple(prompt), *map(tuple, responses)))
      reason = "the same as an earlier row" if row in seen else None
      seen.add(row)
    reasons.append(reason)
  return keep(rows, reasons, what)


def row_stream(config, rows: list[dict], batch_size: int, *, lengths=None):
  """(dataset of row indices, padded length of each row) for one stage.

  Args:
    lengths: of the rows in tokens, for bucketing; None: one group.
  """
  parts = [row["part"] for row in rows]
  weights = tuple(config.data.weights)
  groups = []
  if lengths is not None:
    top = bucket(max(lengths))
    groups = group_by_length(
      lengths, [*(b for b in config.data.buckets if b < top), top], batch_size
    )
  used = sorted(set(parts))  # a name whose rows were all dropped is not a source
  parts = [used.index(part) for part in parts]
  weights = [weights[part] for part in used] if weights else ()
  return row_batches(parts, batch_size, seed=config.seed, weights=weights, groups=groups), groups


def hold(workdir: Path, stage: str, rows: list[dict], ids: list, field: str = "data.name") -> None:
  """Requires a stage to have the rows with which it began. If they differ, the error names the
  first file that has changed.

  Args:
    ids: one or more lists of ids for each row, which must be the same when the run resumes.
    field: of the config, which names the rows.
  """
  path, files = workdir / f"data_{stage}.json", {}
  for row, one in zip(rows, ids):
    files.setdefault(row["where"].rpartition(":")[0], []).append(one)
  found = {"rows": len(ids), "sha256": fingerprint(ids)}
  hosts.require_same(
    found, f"the rows that config.{field} gives; let every host read the same files"
  )
  found |= {
    "files": {
      file: {"rows": len(mine), "sha256": fingerprint(mine)} for file, mine in files.items()
    }
  }
  if not path.exists():
    write_atomic(path, json.dumps(found))
    return
  saved = read_json(path)
  if saved.get("sha256") == found["sha256"]:
    return
  then, now = saved.get("files", {}), found["files"]
  where = ""
  changed = next((file for file in [*then, *now] if then.get(file) != now.get(file)), None)
  if changed is not None:
    before, after = (files[changed]["rows"] if changed in files else "no" for files in (then, now))
    where = f" ({changed} gave {before} rows then, {'others' if before == after else after} now)"
  raise ConfigError(
    f"config.{field} gives {found['rows']} rows that are not the {saved.get('rows')} with which "
    f"{workdir} began{where}; restore the files and run the same command again, or choose "
    "another --workdir"
  )


def enough(rows: int, field: str, size: int, source: str = "data.name") -> None:
  if rows < size:
    raise ConfigError(
      f"config.{field} is {size}: more than the {rows} rows of config.{source}; make it smaller, "
      "or give more rows"
    )


SHORTER_ROWS = "lower config.data.max_prompt_length or config.data.max_response_length"
SHORTER_SAMPLES = "lower config.data.max_prompt_length or config.rollout.max_new_tokens"
SHORTER_INPUTS = (
  "set config.reward.max_length to that limit, which drops the beginning of longer rows"
)
# prompts that are rendered for the reward model before the run, to check their lengths
LONGEST = 8


# ---- sft ----


def sft_rows(config, tokenizer: Tokenizer, workdir: Path, name: str):
  """Batches of tokens, token_mask [B, L] and response_mask [B, T]: prompt and response joined,
  padded on the left.

  Returns (dataset of row indices, their collate function).
  """
  rows = load(config.data, "response")
  print(tokenizer.describe(rows[0]["prompt"]))
  end = [] if tokenizer.end_id is None else [tokenizer.end_id]
  ids = each_row(
    rows, lambda r: (tokenizer.render(r["prompt"]), tokenizer.answer(r["prompt"], r["response"]))
  )
  print(seam(tokenizer, rows), end="")
  kept = select(config, rows, ids, name, empty="no answer after its reasoning")
  enough(len(kept), "sft.batch_size", config.sft.batch_size)
  rows, ids = [rows[i] for i in kept], [(ids[i][0], ids[i][1] + end) for i in kept]
  print(f"response {len(ids[0][1])} tokens: {tokenizer.hf.decode(ids[0][1])!r}")
  widest = bucket(max(len(response) for _, response in ids))
  tokenizer.warn_beyond([len(p) + len(r) for p, r in ids], f"rows for {name}", SHORTER_ROWS)
  hold(workdir, name, rows, ids)
  dataset, lengths = row_stream(
    config, rows, config.sft.batch_size, lengths=[len(p) + len(r) for p, r in ids]
  )

  def collate(batch):
    length = int(lengths[batch[0]])
    tokens, mask = pad_left([ids[i][0] + ids[i][1] for i in batch], tokenizer.pad_id, length)
    columns = np.arange(min(widest, length - 1))[
      ::-1
    ]  # counted from the end; the first token is not predicted
    response_mask = columns < np.asarray([len(ids[i][1]) for i in batch])[:, None]
    return {"tokens": tokens, "token_mask": mask, "response_mask": response_mask}

  return dataset, collate


def seam(tokenizer: Tokenizer, rows: list[dict]) -> str:
  """A line with the number of answers that were changed to fit the generation prompt, if any."""
  changed = sum(
    not isinstance(row["prompt"], str)
    and thinking.continuation(tokenizer.opening, row["response"]) != row["response"]
    for row in rows
  )
  if not changed:
    return ""
  ends = f"ends with {tokenizer.opening!r}" if tokenizer.opening else "opens no <think>"
  return (
    f"seam     {changed} of {len(rows)} answers are adapted to the generation prompt, which "
    f"{ends}\n"
  )


def packed_lines(config, tokenizer: Tokenizer, workdir: Path, name: str):
  """Like `sft_rows`, with packing: dialogues and texts are joined into full lines, and every token
  except a line's first counts.
  """
  data = config.data
  end = [] if tokenizer.end_id is None else [tokenizer.end_id]

  def whole(row):
    if "text" in row:
      return tokenizer.known(tokenizer.encode(row["text"]), row["text"]) + end
    if tokenizer.has_template and not drops_reasoning(tokenizer, row):
      return tokenizer.dialogue(row["prompt"], row["response"], truncated=False)
    if tokenizer.has_template:
      prompt = row["prompt"]
      turns = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
      return tokenizer.render(turns) + tokenizer.answer(turns, row["response"]) + end
    return tokenizer.join(row["prompt"], row["response"]) + end

  rows = load(data, "text")
  texts = each_row(rows, whole)
  hold(workdir, name, rows, [(ids,) for ids in texts])
  if data.unique:
    texts = list({tuple(ids): ids for ids in texts}.values())
  length = data.max_prompt_length + data.max_response_length
  lines = pack(
    [texts[i] for i in np.random.default_rng(config.seed).permutation(len(texts))], length
  )
  print(
    f"data     {len(texts)} of {len(rows)} dialogues for {name} make {len(lines)} lines of "
    f"{length} tokens"
  )
  tokenizer.warn_beyond([length] * len(lines), f"packed lines for {name}", SHORTER_ROWS)
  enough(len(lines), "sft.batch_size", config.sft.batch_size)
  dataset, _ = row_stream(
    config, [{"part": 0}] * len(lines), config.sft.batch_size, lengths=[length] * len(lines)
  )

  def collate(batch):
    full = np.ones((len(batch), length), bool)
    return {"tokens": lines[batch], "token_mask": full, "response_mask": full[:, 1:]}

  return dataset, collate


def drops_reasoning(tokenizer: Tokenizer, row: dict) -> bool:
  """Whether a row's answer has reasoning that the chat template removes from a dialogue."""
  return thinking.CLOSE in row["response"] and tokenizer.drops_reasoning


# ---- reward ----


def sides_of(config, tokenizer: Tokenizer, row: dict) -> list[dict]:
  """Chosen and rejected as (prompt, response, truncated), in the form of a sample.

  With config.reward.max_reply_length, longer replies are truncated to that many tokens and rendered
  as unfinished, as a policy with that limit would have left them.
  """
  sides = [(row[side], False) for side in ("chosen", "rejected")]
  if limit := config.reward.max_reply_length:
    sides = [tokenizer.beginning(text, limit) for text, _ in sides]
  return [
    {"prompt": row["prompt"], "response": text, "truncated": truncated} for text, truncated in sides
  ]


def pair_ids(
  config, renderer: Renderer, rows: list[dict], what: str
) -> tuple[list[dict], list[tuple]]:
  """The rows that config.data allows, each with its `sides_of` as "sides", and the reward model's
  tokens for both sides.
  """
  tokenizer = renderer.tokenizer

  def plain(text):
    return tokenizer.encode(text, special=False)

  def prompt(p):
    return plain(p) if isinstance(p, str) else tokenizer.render(p)

  rows = [row | {"sides": sides_of(config, tokenizer, row)} for row in rows]
  ids = each_row(
    rows, lambda r: (prompt(r["prompt"]), *(plain(side["response"]) for side in r["sides"]))
  )
  kept = select(
    config, rows, ids, what, [row[1] for row in ids], long=config.reward.max_reply_length > 0
  )
  rows = [rows[i] for i in kept]

  def rendered(side):
    return renderer.ids(side["prompt"], side["response"], truncated=side["truncated"])

  return rows, each_row(rows, lambda r: tuple(map(rendered, r["sides"])))


def pairs(config, renderer: Renderer, workdir: Path):
  """Batches of chosen and rejected i32[B, L] with their masks. Returns (dataset of row indices,
  collate, number of rows).
  """
  rows = load(config.data, "pair")
  print(renderer.describe(rows[0]["prompt"], rows[0]["chosen"]))
  rows, ids = pair_ids(config, renderer, rows, "reward")
  enough(len(rows), "reward.batch_size", config.reward.batch_size)
  lengths_of_sides = [len(side) for pair in ids for side in pair]
  renderer.tokenizer.warn_beyond(lengths_of_sides, "responses of pairs", SHORTER_INPUTS)
  hold(workdir, "reward", rows, ids)
  dataset, lengths = row_stream(
    config, rows, config.reward.batch_size, lengths=[max(map(len, pair)) for pair in ids]
  )

  def collate(batch):
    arrays = {}
    for side, name in enumerate(("chosen", "rejected")):
      rows = [ids[i][side] for i in batch]
      arrays[name], arrays[f"{name}_mask"] = pad_left(
        rows, renderer.tokenizer.pad_id, int(lengths[batch[0]])
      )
    return arrays

  return dataset, collate, len(rows)


# ---- r2m ----


@dataclasses.dataclass(frozen=True)
class HeldOut:
  """Prompts that are used only for evaluation."""

  prompts: list  # text or messages
  ids: list[list[int]]  # rendered for the policy

  @property
  def length(self) -> int:
    """Of the padded prompts."""
    return bucket(max(map(len, self.ids)))


@dataclasses.dataclass(frozen=True)
class PromptData:
  prompts: list  # text or messages
  ids: list[list[int]]  # rendered for the policy
  length: int  # of the padded prompts; one length for the run, so that the rollout compiles once
  order: Any  # dataset of row indices: entry t has the prompts of step t
  held_out: HeldOut | None = None  # set aside from the rows; None: none are


def prompt_rows(config, data, tokenizer: Tokenizer, what: str) -> tuple[list[dict], list]:
  """The rows of `data` (like config.data) that the limits allow, and their prompts' ids."""
  rows = load(data, "prompt")
  print(tokenizer.describe(rows[0]["prompt"]))
  ids = each_row(rows, lambda row: (tokenizer.render(row["prompt"]),))
  chosen = [tokenizer.encode(row.get("chosen", ""), special=False) for row in rows]
  kept = select(config, rows, ids, what, chosen)
  return [rows[i] for i in kept], [ids[i][0] for i in kept]


def prompt_data(config, tokenizer: Tokenizer, workdir: Path) -> PromptData:
  rows, ids = prompt_rows(config, config.data, tokenizer, "r2m")
  held_out, source = None, "data.name"
  if config.eval.every and not config.eval.data:
    chosen, left = set_aside(config, ids)
    held_out = HeldOut([rows[i]["prompt"] for i in chosen], [ids[i] for i in chosen])
    print(
      f"held out {len(chosen)} prompts for evaluation: {len(rows) - len(left)} of {len(rows)} rows"
    )
    rows, ids = [rows[i] for i in left], [ids[i] for i in left]
    source += f" that config.eval.prompts = {config.eval.prompts} leaves"
  enough(len(ids), "rollout.prompts", config.rollout.prompts, source)
  hold(workdir, "r2m", rows, [(i,) for i in ids])
  order, _ = row_stream(config, rows, config.rollout.prompts)
  prompts = [row["prompt"] for row in rows]
  return PromptData(prompts, ids, bucket(max(map(len, ids))), order, held_out)


def set_aside(config, ids: list, source: str = "data.name") -> tuple[list[int], list[int]]:
  """config.eval.prompts different prompts, chosen at random by the seed, and the remaining rows, as
  indices. Rows with the same prompt as a chosen row are in neither.
  """
  first = {tuple(ids[i]): i for i in reversed(range(len(ids)))}
  numbers = sorted(first.values())
  enough(len(numbers), "eval.prompts", config.eval.prompts, source)
  order = np.random.default_rng([config.seed, 6]).permutation(len(numbers))
  chosen = [numbers[i] for i in order[: config.eval.prompts]]
  held = {tuple(ids[i]) for i in chosen}
  return chosen, [i for i, prompt in enumerate(ids) if tuple(prompt) not in held]


def evaluation_prompts(config, tokenizer: Tokenizer, workdir: Path, data: PromptData) -> HeldOut:
  """The prompts of the run's evaluations: the prompts that were set aside, or config.eval.prompts
  prompts of config.eval.data on which the run does not train.
  """
  if data.held_out is not None:
    return data.held_out
  source = config.data.copy_and_resolve_references()
  source.name, source.weights = config.eval.data, ()
  rows, ids = prompt_rows(config, source, tokenizer, "evaluation")
  trained = set(map(tuple, data.ids))
  new = [i for i, prompt in enumerate(ids) if tuple(prompt) not in trained]
  if len(new) < len(ids):
    print(
      f"held out {len(ids) - len(new)} rows of config.eval.data are in the training data: dropped"
    )
  rows, ids = [rows[i] for i in new], [ids[i] for i in new]
  chosen, _ = set_aside(config, ids, "eval.data")
  rows, ids = [rows[i] for i in chosen], [ids[i] for i in chosen]
  hold(workdir, "eval", rows, [(prompt,) for prompt in ids], "eval.data")
  return HeldOut([row["prompt"] for row in rows], ids)


def warn_of_lengths(
  config, data: PromptData, tokenizer: Tokenizer, renderer: Renderer | None
) -> None:
  """Warns if samples may be longer than the policy's or the reward model's training length.
  `renderer` None: there is no reward model.
  """
  new = config.rollout.max_new_tokens
  more = f"with config.rollout.max_new_tokens = {new}"
  tokenizer.warn_beyond([len(ids) + new for ids in data.ids], f"prompts {more}", SHORTER_SAMPLES)
  if renderer is None:
    return
  inputs = longest_inputs(config, data, renderer)
  what = f"longest prompts {more}, as input of the reward model,"
  renderer.tokenizer.warn_beyond(inputs, what, f"{SHORTER_SAMPLES}, {SHORTER_INPUTS}")


def longest_inputs(config, data: PromptData, renderer: Renderer) -> list[int]:
  """The tokens that a reward model reads of the longest prompts with the longest responses.

  The length of a response in the reward model's tokens is not known before sampling. It is assumed
  to equal the length in the policy's tokens.
  """
  longest = sorted(range(len(data.ids)), key=lambda i: len(data.ids[i]))[-LONGEST:]
  new = config.rollout.max_new_tokens
  inputs = [len(renderer.ids(data.prompts[i], "", truncated=True)) + new for i in longest]
  return [min(n, renderer.max_length or n) for n in inputs]


def batch_of(data: PromptData, index: np.ndarray, tokenizer: Tokenizer) -> Prompts:
  prompts = as_prompts([data.ids[i] for i in index], tokenizer.pad_id, length=data.length)
  return prompts.replace(example_id=np.asarray(index, np.int32))


# ---- judgments ----


def judged_pairs(
  config, tokenizer: Tokenizer, renderer: Renderer, workdir: Path
) -> dict[str, np.ndarray]:
  """The judgments of config.r2m.judgments for both models: arrays [N, 2, ...], winner and loser,
  named as in `Pairs`.

  A judged response is complete, so it ends with the policy's end token, as in supervised training.
  """
  data = config.data.copy_and_resolve_references()
  data.name, data.weights = config.r2m.judgments, ()
  rows = load(data, "pair")
  end = [] if tokenizer.end_id is None else [tokenizer.end_id]

  def encode(row):
    prompt, sides = tokenizer.render(row["prompt"]), (row["chosen"], row["rejected"])
    answers = [[*tokenizer.answer(row["prompt"], side), *end] for side in sides]
    theirs = [renderer.ids(row["prompt"], side) for side in sides]
    return [[*prompt, *answer] for answer in answers], theirs, [len(x) for x in answers]

  limit = config.data.max_prompt_length + config.data.max_response_length
  ids = each_row(rows, encode)
  hold(workdir, "judgments", rows, [(*mine, *theirs) for mine, theirs, _ in ids], "r2m.judgments")
  kept = [pair for pair in ids if max(map(len, pair[0])) <= limit]
  print(
    f"labels   {len(kept)} of {len(ids)} judgments in {config.r2m.judgments}; the others exceed "
    f"{limit} tokens"
  )
  if not kept:
    raise DataError(
      f"no row of {config.r2m.judgments} is within config.data.max_prompt_length + "
      f"max_response_length = {limit} tokens; raise them, or give shorter judgments"
    )
  for which, of, fix in ((0, tokenizer, SHORTER_ROWS), (1, renderer.tokenizer, SHORTER_INPUTS)):
    of.warn_beyond([len(side) for pair in kept for side in pair[which]], "judged responses", fix)
  arrays = {}
  for which, name, pad in ((0, "", tokenizer.pad_id), (1, "reward_", renderer.tokenizer.pad_id)):
    flat = [side for pair in kept for side in pair[which]]
    tokens, mask = pad_left(flat, pad, bucket(max(map(len, flat))))
    arrays |= {f"{name}tokens": tokens.reshape(len(kept), 2, -1)}
    arrays |= {"token_mask" if not name else "reward_mask": mask.reshape(len(kept), 2, -1)}
  lengths, L = np.array([pair[2] for pair in kept]), arrays["tokens"].shape[-1]
  arrays["response_mask"] = np.arange(L) >= L - lengths[:, :, None]
  return arrays


def take_pairs(arrays: dict[str, np.ndarray], rows) -> dict[str, np.ndarray]:
  """The selected judgments as rows of `Pairs`: the winners, then their losers."""
  return {name: np.concatenate([x[rows, 0], x[rows, 1]]) for name, x in arrays.items()}


def judgments_labeller(config, arrays: dict[str, np.ndarray]) -> Labeller:
  """Builds `label(sequences, step) -> Pairs`: the next judgments of the file, in a new order in
  each pass.
  """
  most, count = pairs_per_step(config), len(arrays["tokens"])

  def label(sequences, step: int) -> Pairs:
    del sequences  # the file's responses were judged before the run
    at = sum(pairs_at(config, t) for t in range(step)) + np.arange(most)
    rows = [
      np.random.default_rng([config.seed, 5, i // count]).permutation(count)[i % count] for i in at
    ]
    weight = (np.arange(most) < pairs_at(config, step)).astype(np.float32)
    return Pairs(**take_pairs(arrays, rows), weight=weight)

  return label
