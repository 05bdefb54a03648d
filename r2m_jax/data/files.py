"""Raw records from files on disk: JSON lines (plain or gzip) and parquet, streamed, with what is broken told apart."""

import dataclasses
import glob
import gzip
import json
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from r2m_jax.data.jsonl import DataError

JSON_LINES = (".jsonl", ".ndjson", ".json")
SUFFIXES = (*JSON_LINES, *(f"{suffix}.gz" for suffix in JSON_LINES), ".parquet")
KINDS = ("broken JSON", "cut off", "invalid UTF-8", "not an object", "missing field", "empty field", "wrong type",
         "wrong roles", "different prompts", "chosen equals rejected")  # fmt: skip


class BadRow(ValueError):
  """A row that cannot be used: what is wrong with it, as one of KINDS, and a detail for the reader."""

  def __init__(self, kind: str, detail: str):
    assert kind in KINDS, kind
    super().__init__(detail)
    self.kind = kind


@dataclasses.dataclass(frozen=True)
class Record:
  """One row of a file as it was stored; `value` is a BadRow where it could not even be read."""

  value: Any
  file: Path | str  # or the name of a data set
  number: int  # line, or row of a parquet file, from 1

  @property
  def where(self) -> str:
    return f"{self.file}:{self.number}"


def find_files(pattern: str, root: str = "") -> list[Path]:
  """The data files that a path, folder or glob names, sorted; a relative one starts from `root`."""
  path = Path(root).expanduser() / Path(pattern).expanduser()
  found = [path] if path.exists() else sorted(map(Path, glob.glob(str(path), recursive=True)))
  files = [file for one in found for file in (sorted(one.rglob("*")) if one.is_dir() else [one])]
  if not files:
    raise DataError(f"there is no file {str(path)!r} from {Path.cwd()}; config.data.name is a path, a folder or a glob")
  known = [file for file in files if file.is_file() and file.name.lower().endswith(SUFFIXES)]
  odd = [file for file in found if file.is_file() and file not in known]
  if odd or not known:
    raise DataError(f"{(odd or found)[0]} is not of a kind that is read ({', '.join(SUFFIXES)}); convert it")
  return known


def read_file(file: Path) -> Iterator[Record]:
  """Every record of a file, the unreadable ones too; blank lines are left out."""
  try:
    yield from _read_parquet(file) if file.suffix == ".parquet" else _read_lines(file)
  except OSError as error:
    raise DataError(f"{file} cannot be read: {error}") from None


# ---- JSON lines ----


def _read_lines(file: Path) -> Iterator[Record]:
  number = 0
  with gzip.open(file, "rb") if file.suffix == ".gz" else open(file, "rb") as stream:
    while True:
      number += 1
      try:
        line = stream.readline()
      except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        if number == 1:
          raise DataError(f"{file} is not a whole gzip file ({error}); fetch it again") from None
        yield Record(BadRow("cut off", f"the archive ends or is damaged here: {error}"), file, number)
        return
      if not line:
        return
      if number == 1:
        line = line.removeprefix(b"\xef\xbb\xbf")  # a byte-order mark
        if line.lstrip()[:1] == b"[" and not line.rstrip().endswith(b"]"):
          raise DataError(f"{file} is one JSON array over many lines; give JSON lines, one object a line")
      if line.strip():
        yield Record(_parse(line), file, number)


def _parse(line: bytes) -> Any:
  """The JSON value of a line, or the BadRow that says why there is none."""
  try:
    return json.loads(line.decode("utf-8"))
  except UnicodeDecodeError as error:
    return BadRow("invalid UTF-8", str(error))
  except RecursionError:
    return BadRow("broken JSON", "nested too deeply")
  except ValueError as error:
    # only the last line of a file can lack its newline
    return BadRow("broken JSON" if line.endswith(b"\n") else "cut off", str(error))


# ---- parquet ----


def _read_parquet(file: Path) -> Iterator[Record]:
  import pyarrow
  import pyarrow.parquet

  try:
    table, number = pyarrow.parquet.ParquetFile(file), 0
    for batch in table.iter_batches(batch_size=1024):
      for value in _values(batch):
        number += 1
        yield Record(value, file, number)
  except (pyarrow.ArrowException, OSError) as error:
    raise DataError(f"{file} is damaged or cut off, or not parquet: {' '.join(str(error).split())[:200]}") from None


def _values(batch) -> list[Any]:
  try:
    return batch.to_pylist()
  except UnicodeDecodeError:
    return [_value(batch.slice(i, 1)) for i in range(batch.num_rows)]


def _value(row) -> Any:
  try:
    return row.to_pylist()[0]
  except UnicodeDecodeError as error:
    return BadRow("invalid UTF-8", str(error))
