"""Files of a workdir: written atomically, and read with an error that names the damage."""

import contextlib
import hashlib
import json
import math
import os
from pathlib import Path

from r2m_jax.parallel import hosts
from r2m_jax.parallel.errors import UserError


def write_atomic(path, data):
  """Writes str or bytes so that a reader sees the old file or the new one, never a part."""
  if not hosts.first():
    return
  path = Path(path)
  path.parent.mkdir(parents=True, exist_ok=True)
  temp = path.with_name(f".{path.name}.{os.getpid()}.tmp")
  try:
    temp.write_bytes(data.encode("utf-8") if isinstance(data, str) else data)
    os.replace(temp, path)
  except OSError:  # on a full disk the old file stays, and the partial file is removed
    with contextlib.suppress(OSError):
      temp.unlink()
    raise


class DamagedFile(UserError, ValueError):
  """A file of a workdir is damaged; the message names the file and the fix."""

  status = 1


def read_json(path):
  """The object in a JSON file of a workdir. Raises DamagedFile if it holds no object."""
  try:
    found = json.loads(Path(path).read_text(encoding="utf-8"))
  except (ValueError, RecursionError) as error:
    raise DamagedFile(
      f"{path} is damaged: {error}; bring it back from a copy, or choose another --workdir"
    ) from None
  if not isinstance(found, dict):
    raise DamagedFile(
      f"{path} is damaged: it holds no object; bring it back from a copy, or choose another "
      "--workdir"
    )
  return found


class RepeatedKey(ValueError):
  """An object has one key twice. JSON allows it, and readers differ in which value they take."""


def unique_keys(pairs):
  """The object_pairs_hook of `json.loads` that raises RepeatedKey."""
  found = dict(pairs)
  if len(found) < len(pairs):
    keys = [key for key, _ in pairs]
    twice = next(key for key in keys if keys.count(key) > 1)
    raise RepeatedKey(f"the key {twice[:80]!r} occurs twice in one object")
  return found


def read_jsonl(path):
  """The rows of a JSON-lines file; [] if it does not exist. A last line that a crash cut off is
  dropped.
  """
  path = Path(path)
  if not path.exists():
    return []
  lines = path.read_bytes().split(b"\n")  # bytes, because the cut may be inside a character
  rows = []
  for number, line in enumerate(lines, 1):
    if not line.strip():
      continue
    try:
      rows.append(json.loads(line))
    except ValueError as error:
      if number == len(lines):  # no newline after it: the write was interrupted
        break
      raise DamagedFile(
        f"{path}:{number} is not JSON: {line[:80]!r}; take the line out, or bring the file back "
        "from a copy"
      ) from error
  return rows


def sha256_of(file: Path) -> str:
  """SHA-256 of a file's bytes, as hexadecimal digits."""
  with open(file, "rb") as opened:
    return hashlib.file_digest(opened, "sha256").hexdigest()


def subfolders(folder) -> list[Path]:
  """The folders in a folder, sorted. Files and hidden folders, which file managers leave, are left
  out.
  """
  found = (path for path in Path(folder).glob("*") if path.is_dir())
  return sorted(path for path in found if not path.name.startswith("."))


def plain(value):
  """A value that JSON can represent: array scalars become Python numbers, non-finite floats become
  strings.
  """
  value = value.item() if hasattr(value, "item") else value
  if isinstance(value, float) and not math.isfinite(value):
    return str(value)  # "nan", "inf" or "-inf"
  # 9 digits give every float32 back exactly
  return float(f"{value:.9g}") if isinstance(value, float) else value
