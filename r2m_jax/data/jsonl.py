"""Rows of `task=generate` and `task=score`: every row is used, or the file is refused with a
message that names the row.
"""

import json
import os
import pathlib
from collections.abc import Iterable
from typing import Any

from r2m_jax.data.files import BadRow, DataError, read_file
from r2m_jax.run.files import write_atomic


def read_rows(path: str, fields: tuple[str, ...], hint: str = "") -> list[dict[str, Any]]:
  """All rows of a file that `files.read_file` reads, checked.

  `prompt` may be text or a list of messages; every other field in `fields` is text. `truncated`, if
  a row has it, is true or false. Instead of `prompt`, a row may have `turns`, the user's messages
  of a conversation; the first turn is then the prompt.

  Args:
    hint: additional advice in messages about a field.

  Raises:
    DataError: there is no such file, or a row is broken, lacks a field or has a field of the wrong
      type.
  """
  file, wanted = pathlib.Path(path).expanduser(), ", ".join(fields)
  if not path or not file.is_file():
    raise DataError(
      f"there is no file {path!r} from {pathlib.Path.cwd()}; give JSON lines with {wanted}"
    )
  rows = []
  for record in read_file(file):
    row = record.value
    if isinstance(row, BadRow):
      raise DataError(
        f"{record.where} cannot be read ({row.kind}): {row}; give JSON lines with {wanted}"
      )
    if not isinstance(row, dict):
      raise DataError(
        f"{record.where} is a {type(row).__name__}, not an object with {wanted}; give one object a "
        "line"
      )
    if "prompt" in fields and "turns" in row and "prompt" not in row:
      row = with_first_turn(row, record.where)
    for field in fields:
      if not isinstance(row.get(field), (str, list) if field == "prompt" else str):
        kind = "text or a list of messages" if field == "prompt" else "text"
        raise DataError(
          f"{record.where} needs {field!r} as {kind}; it has {', '.join(row) or 'nothing'}; add it"
          f"{hint if field != 'prompt' else ''}"
        )
    if not isinstance(row.get("truncated", False), bool):
      raise DataError(
        f"{record.where} has truncated = {row['truncated']!r}; give true or false, without quotes"
      )
    rows.append(row)
  if not rows:
    raise DataError(f"{file} holds no rows; give JSON lines with {wanted}")
  return rows


def with_first_turn(row: dict[str, Any], where: str) -> dict[str, Any]:
  """A conversation's row with its first turn as the prompt."""
  turns = row["turns"]
  good = isinstance(turns, list) and all(isinstance(turn, str) and turn.strip() for turn in turns)
  if not good or not turns:
    raise DataError(f"{where} has turns = {str(turns)[:80]}; give a list of texts, the user's")
  return row | {"prompt": first_message(turns)}


def first_message(turns: list[str]) -> list[dict[str, str]]:
  return [{"role": "user", "content": turns[0]}]


def turns_of(row: dict[str, Any]) -> list[str]:
  """The user's messages if a row is a conversation (the first is its prompt), otherwise []."""
  turns = row.get("turns")
  if not isinstance(turns, list) or not turns or row["prompt"] != first_message(turns):
    return []
  return turns if all(isinstance(turn, str) for turn in turns) else []


def check_kept(rows: Iterable[dict[str, Any]], file: str, replaced: tuple[str, ...]) -> None:
  """Raises DataError if a row has a value that `write_rows` cannot write, such as NaN or bytes. It
  is called before the work, so that no result is lost.

  Args:
    file: from which the rows were read.
    replaced: fields that the results replace.
  """
  for number, row in enumerate(rows, 1):
    for name, value in row.items():
      try:
        json.dumps(None if name in replaced else value, allow_nan=False)
      except (TypeError, ValueError, RecursionError):
        raise DataError(
          f"{file}, row {number} has {name!r} = {str(value)[:80]}, which JSON cannot hold; leave "
          "the field out, or make it null or text"
        ) from None


def check_output(path: str, field: str) -> None:
  """Raises DataError if `write_rows` could not write there. It is called before the work, so that
  no result is lost.
  """
  file = pathlib.Path(path).expanduser()
  if file.exists() and not file.is_file() and not file.is_dir():
    raise DataError(f"{field} is {path!r}: a device or a pipe, not a file; give the name of a file")
  if file.name.lower().endswith((".gz", ".parquet")):
    raise DataError(
      f"{field} is {path!r}: JSON lines are written, not compressed; give a name that ends with "
      ".jsonl"
    )
  if not path or file.is_dir():
    raise DataError(
      f"{field} is {path!r}: {'a folder' if path else 'empty'}; give the name of a file"
    )
  try:
    file.parent.mkdir(parents=True, exist_ok=True)
  except OSError as error:
    raise DataError(
      f"{field} is {path!r}: its folder cannot be made ({error}); give a file elsewhere"
    ) from None
  if not os.access(file.parent, os.W_OK):
    raise DataError(f"{field} is {path!r}: {file.parent} cannot be written; give a file elsewhere")


def write_rows(path: str, rows: Iterable[dict[str, Any]]) -> pathlib.Path:
  """Writes rows atomically, so that a reader sees all of them or none.

  Several processes may write the same rows at the same time.

  Raises:
    ValueError: a number is not finite, which JSON cannot hold.
  """
  file = pathlib.Path(path).expanduser()
  text = "".join(json.dumps(row, ensure_ascii=False, allow_nan=False) + "\n" for row in rows)
  write_atomic(file, text)
  return file
