"""The items that are judged: prompts with two answers each, read from files of `task=generate`."""

import collections
import json
from collections.abc import Iterable
from typing import Any, NamedTuple

from r2m_jax.data.jsonl import DataError, read_rows
from r2m_jax.data.text import check_messages, each_row


class Item(NamedTuple):
  """A conversation that one or two models have answered."""

  id: str
  prompt: Any  # as in the row: text or messages
  questions: list[str]  # the user's messages, by turn
  candidate: list[str]  # answers, by turn
  baseline: list[str]  # answers, by turn; [] if there is no baseline
  reference: list[str]  # reference answers, by turn; [] if the row has none
  group: str  # category or data set; "" if the row has none
  # whether the length limit cut off the last answer of the candidate, and of the baseline
  truncated: tuple[bool, bool] = (False, False)


def read_items(candidate: str, field: str, baseline: str, baseline_field: str) -> list[Item]:
  """The rows of a file of answers, each with the baseline's answer to the same prompt.

  Args:
    candidate: JSON lines with the prompts and the answers that are judged.
    field: of the candidate's answer.
    baseline: JSON lines with the answers of the baseline; "": the candidate's own rows hold them.
    baseline_field: of the baseline's answer; "": there is no baseline.

  Raises:
    DataError: a row lacks its answer, or the two files do not hold the same prompts.
  """
  both = [field] if baseline or not baseline_field else [field, baseline_field]
  mine = read_rows(candidate, ("prompt", *both))
  each_row(
    mine, lambda row: isinstance(row["prompt"], str) or check_messages(row["prompt"]), candidate
  )
  theirs: list[dict] | None = None
  if baseline:
    theirs = matched(mine, read_rows(baseline, ("prompt", baseline_field)), candidate, baseline)
  elif baseline_field:
    theirs = mine
  items = []
  names = ids_of(mine)
  for number, row in enumerate(mine):
    other = None if theirs is None else theirs[number]
    turns = row.get("turns") or []
    answers = answers_of(row, field, candidate, number)
    against = [] if other is None else answers_of(other, baseline_field, baseline, number)
    if against and len(against) != len(answers):
      raise DataError(
        f"{baseline}: the answer to {names[number]} has {len(against)} turns and the candidate's "
        f"has {len(answers)}; give two files of the same questions"
      )
    questions = list(turns) if len(answers) > 1 else [shown(row["prompt"])]
    items.append(
      Item(
        id=names[number],
        prompt=row["prompt"],
        questions=questions,
        candidate=answers,
        baseline=against,
        reference=[] if baseline_field == "reference" else texts(row.get("reference")),
        group=str(row.get("category") or row.get("dataset") or ""),
        truncated=(cut_off(row, field), bool(baseline) and cut_off(other or {}, baseline_field)),
      )
    )
  return items


def answers_of(row: dict, field: str, file: str, number: int) -> list[str]:
  """The answers by turn: `answers` of a conversation, otherwise the one in `field`."""
  answers = row.get("answers")
  if answers is None or field != "text":
    return [row[field]]
  turns = row.get("turns")
  good = isinstance(answers, list) and isinstance(turns, list) and len(answers) == len(turns)
  if not good or not answers or not all(isinstance(text, str) for text in [*answers, *turns]):
    raise DataError(
      f"{file}, row {number + 1}: 'answers' must hold a text for each of 'turns'; write it by task=generate"
    )
  return answers


def cut_off(row: dict, field: str) -> bool:
  """Whether `truncated` is true and belongs to this field; `task=generate` writes both."""
  return field == "text" and row.get("truncated", False)


def texts(value: Any) -> list[str]:
  """A text or a list of texts as a list; [] for anything else."""
  if isinstance(value, str):
    return [value] if value.strip() else []
  good = isinstance(value, list) and all(isinstance(text, str) for text in value)
  return list(value) if good else []


def shown(prompt: Any) -> str:
  """A prompt as text: a single user message unchanged, several messages as a transcript."""
  if isinstance(prompt, str):
    return prompt
  if len(prompt) == 1:
    return str(prompt[0]["content"])
  return "\n\n".join(f"{str(m['role']).capitalize()}: {m['content']}" for m in prompt)


def ids_of(rows: Iterable[dict]) -> list[str]:
  """A distinct name for each row: its id, question_id or uid, otherwise its number, from 1."""
  names, seen = [], collections.Counter[str]()
  for number, row in enumerate(rows, 1):
    found = next((row[f] for f in ("id", "question_id", "uid") if row.get(f) is not None), number)
    seen[str(found)] += 1
    again = seen[str(found)]
    names.append(str(found) if again == 1 else f"{found}#{again}")
  return names


def prompt_key(row: dict) -> str:
  return json.dumps(row.get("turns") or row["prompt"], ensure_ascii=False, sort_keys=True)


def matched(mine: list[dict], theirs: list[dict], file: str, other: str) -> list[dict]:
  """Their rows in the order of mine, by prompt; rows with equal prompts are matched in order.

  Raises:
    DataError: a prompt of either file is missing in the other.
  """
  by_prompt = collections.defaultdict(collections.deque)
  for row in theirs:
    by_prompt[prompt_key(row)].append(row)
  found = []
  for number, row in enumerate(mine, 1):
    if not by_prompt[prompt_key(row)]:
      raise DataError(
        f"{other} has no answer to the prompt of {file}, row {number}: {shown(row['prompt'])[:80]!r}; "
        "give two files of the same prompts"
      )
    found.append(by_prompt[prompt_key(row)].popleft())
  if left := sum(map(len, by_prompt.values())):
    raise DataError(
      f"{other} answers {left} prompts that {file} does not; give two files of the same prompts"
    )
  return found
