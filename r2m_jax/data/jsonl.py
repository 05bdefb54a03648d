"""Rows from JSON-lines files, one object a line, checked for the fields that a task reads."""

import json
import pathlib
from collections.abc import Iterable
from typing import Any


class DataError(ValueError):
  """A file that does not hold the rows a task needs; the message names file and line."""


def read_rows(path: str, fields: tuple[str, ...]) -> list[dict[str, Any]]:
  """All rows of a file. `prompt` may be text or a list of messages, every other field in `fields` is text."""
  file = pathlib.Path(path).expanduser()
  if not path or not file.is_file():
    raise DataError(f"there is no file {path!r} from {pathlib.Path.cwd()}; give JSON lines with {', '.join(fields)}")
  try:
    text = file.read_text(encoding="utf-8")
  except (OSError, UnicodeDecodeError) as error:
    raise DataError(f"{file} cannot be read as UTF-8 text: {error}; give JSON lines with {', '.join(fields)}") from None
  rows = []
  for number, line in enumerate(text.split("\n"), 1):
    if not line.strip():
      continue
    try:
      row = json.loads(line)
    except (ValueError, RecursionError) as error:
      raise DataError(f"{file}:{number} is not JSON: {error}") from None
    if not isinstance(row, dict):
      raise DataError(f"{file}:{number} is a {type(row).__name__}, not an object with {', '.join(fields)}")
    for field in fields:
      value = row.get(field)
      if not isinstance(value, (str, list) if field == "prompt" else str):
        wanted = "text or a list of messages" if field == "prompt" else "text"
        raise DataError(f"{file}:{number} needs {field!r} as {wanted}; it has {', '.join(row) or 'nothing'}")
    rows.append(row)
  if not rows:
    raise DataError(f"{file} holds no rows; give JSON lines with {', '.join(fields)}")
  return rows


def write_rows(path: str, rows: Iterable[dict[str, Any]]) -> pathlib.Path:
  """Writes rows through a file beside it, so that a reader sees all of them or none."""
  file = pathlib.Path(path).expanduser()
  file.parent.mkdir(parents=True, exist_ok=True)
  new = file.with_name(f".{file.name}.part")
  new.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
  new.replace(file)
  return file
