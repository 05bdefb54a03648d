"""Answers of `task=generate` in the file formats of other evaluators.

alpaca_eval   one JSON array of {instruction, output, generator, dataset}
mt_bench      JSON lines {question_id, answer_id, model_id, choices: [{index, turns}], tstamp}
arena_hard    JSON lines {uid, ans_id, model, messages, tstamp, metadata}, of version 2
"""

import hashlib
import json
import re
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from r2m_jax.data.jsonl import DataError, turns_of, write_rows
from r2m_jax.judge.items import shown
from r2m_jax.run.files import write_atomic


def write_answers(path: str, rows: list[dict[str, Any]], form: str, name: str) -> Path:
  """Writes rows of `task=generate` in the form of `config.generate.format`; `name` is the model's
  name.
  """
  if form == "rows":
    return write_rows(path, rows)
  made = [WRITERS[form](row, name, number) for number, row in enumerate(rows, 1)]
  if form != "alpaca_eval":
    return write_rows(path, made)
  file = Path(path).expanduser()
  write_atomic(file, json.dumps(made, indent=2, ensure_ascii=False, allow_nan=False) + "\n")
  return file


def check_form(rows: Sequence[dict[str, Any]], form: str, n: int) -> None:
  """Raises DataError, before any of the `n` answers per prompt is generated, if the form cannot
  hold them or if a row lacks the form's id field.
  """
  if form != "rows" and n > 1:
    raise DataError(
      f"config.generate.format is {form!r}, which has one answer a prompt; set config.generate.n = 1"
    )
  wanted = {"mt_bench": ("question_id", "id"), "arena_hard": ("uid", "id")}.get(form, ())
  for number, row in enumerate(rows, 1):
    if wanted and not any(row.get(field) is not None for field in wanted):
      raise DataError(
        f"config.generate.format is {form!r}, and row {number} of config.generate.input has no "
        f"{wanted[0]!r}; give the benchmark's own questions"
      )
    if form in ("alpaca_eval", "arena_hard") and len(turns_of(row)) > 1:
      raise DataError(
        f"config.generate.format is {form!r}, which has one turn; row {number} of "
        "config.generate.input has more; choose 'mt_bench', or leave that row out"
      )


def alpaca_eval(row: dict, name: str, number: int) -> dict[str, Any]:
  del number
  return {
    "instruction": shown(row["prompt"]),
    "output": row["text"],
    "generator": name,
    "dataset": row.get("dataset", ""),
  }


def mt_bench(row: dict, name: str, number: int) -> dict[str, Any]:
  question = row.get("question_id", row.get("id"))
  return {
    "question_id": question,
    "answer_id": answer_id(row, name, number),
    "model_id": name,
    "choices": [{"index": 0, "turns": row.get("answers") or [row["text"]]}],
    "tstamp": time.time(),
  }


def arena_hard(row: dict, name: str, number: int) -> dict[str, Any]:
  prompt = row["prompt"]
  asked = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
  return {
    "uid": row.get("uid", row.get("id")),
    "ans_id": answer_id(row, name, number),
    "model": name,
    "messages": [*asked, {"role": "assistant", "content": {"answer": row["text"]}}],
    "tstamp": time.time(),
    "metadata": {"token_len": len(row["tokens"])} | markdown(row["text"]),
  }


def answer_id(row: dict, name: str, number: int) -> str:
  """A deterministic name of the answer, the same in repeated runs."""
  text = json.dumps([name, number, row.get("answers") or row["text"]])
  return hashlib.sha256(text.encode()).hexdigest()[:22]


def markdown(text: str) -> dict[str, dict[str, int]]:
  """Headers, list items and bold words outside of code blocks, as counted by Arena-Hard's style
  control.
  """
  text = re.sub(r"```.*?(```|\Z)", "", text, flags=re.S)

  def count(pattern):
    return len(re.findall(pattern, text, re.M))

  return {
    "header_count": {f"h{n}": count(rf"^#{{{n}}}\s") for n in range(1, 7)},
    "list_count": {"ordered": count(r"^\s*\d+\.\s"), "unordered": count(r"^\s*[-*+]\s")},
    "bold_count": {"**": count(r"\*\*[^*\n]+\*\*"), "__": count(r"__[^_\n]+__")},
  }


WRITERS: dict[str, Callable[[dict, str, int], dict]] = {
  "alpaca_eval": alpaca_eval,
  "mt_bench": mt_bench,
  "arena_hard": arena_hard,
}
