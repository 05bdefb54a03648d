"""Raw records from files on disk: JSON lines (plain or gzip) and parquet, streamed, with the broken
records distinguished.
"""

import dataclasses
import glob
import gzip
import json
import re
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from r2m_jax.parallel.errors import UserError
from r2m_jax.run.files import RepeatedKey, unique_keys

JSON_LINES = (".jsonl", ".ndjson", ".json")
SUFFIXES = (*JSON_LINES, *(f"{suffix}.gz" for suffix in JSON_LINES), ".parquet")
# of the datasets library
METADATA = ("dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json")
SPLITS = (
  "train",
  "training",
  "test",
  "testing",
  "validation",
  "valid",
  "val",
  "dev",
  "eval",
  "evaluation",
)
# a split by the beginning of a name: train, or longer, such as train_prefs
SPLIT = re.compile(rf"({'|'.join(SPLITS)})(_\w+)?(?=[-.]|$)", re.I)
KINDS = (
  "broken JSON",
  "cut off",
  "invalid UTF-8",
  "repeated key",
  "not an object",
  "missing field",
  "empty field",
  "wrong type",
  "wrong roles",
  "different prompts",
  "chosen equals rejected",
  "undesirable",
)


class DataError(UserError, ValueError):
  """Data that a task cannot use; the message names the file, the line and the fix."""


class BadRow(ValueError):
  """A row that cannot be used: the problem, as one of KINDS, and a detail for the reader."""

  def __init__(self, kind: str, detail: str):
    assert kind in KINDS, kind
    super().__init__(detail)
    self.kind = kind


@dataclasses.dataclass(frozen=True)
class Record:
  """One row of a file as it was stored; `value` is a BadRow if the row could not be read."""

  value: Any
  file: Path | str  # or the name of a data set
  number: int  # line, or row of a parquet file, from 1

  @property
  def where(self) -> str:
    return f"{self.file}:{self.number}"


def find_files(pattern: str, root: str = "", split: str = "") -> list[Path]:
  """The data files that a path, folder or glob names, sorted; a relative path starts from `root`.

  In a folder, hidden files and folders, metadata and files of other kinds are skipped and reported.
  If its files belong to several splits, only the files of `split` are used.

  Raises:
    DataError: there is no file, or a file that is named explicitly is of another kind.
  """
  path = Path(root).expanduser() / Path(pattern).expanduser()
  found = [path] if path.exists() else sorted(map(Path, glob.glob(str(path), recursive=True)))
  if not found:
    raise DataError(
      f"there is no file {str(path)!r} from {Path.cwd()}; config.data.name is a path, a folder or "
      "a glob: give one that exists"
    )
  if odd := [file for file in found if not file.is_dir() and not _readable(file)]:
    raise DataError(f"{odd[0]} is not of a kind that is read ({', '.join(SUFFIXES)}); convert it")
  files = [file for one in found for file in (_in_folder(one, split) if one.is_dir() else [one])]
  return list(dict.fromkeys(files))  # a glob may name a file and also a folder that holds it


def _readable(file: Path) -> bool:
  return file.is_file() and file.name.lower().endswith(SUFFIXES)


def _in_folder(folder: Path, split: str) -> list[Path]:
  """The data files of a folder and the folders below it; prints what is skipped."""
  inside = [file for file in sorted(folder.rglob("*")) if file.is_file()]

  def hidden(file):
    return any(part.startswith(".") for part in file.relative_to(folder).parts)

  files = [
    file for file in inside if _readable(file) and not hidden(file) and file.name not in METADATA
  ]
  if not files and any(file.suffix == ".arrow" for file in inside):
    raise DataError(
      f"{folder} holds arrow files, as datasets' save_to_disk writes them, which are not read; "
      "write parquet: "
      f"datasets.load_from_disk({str(folder)!r}).to_parquet('rows.parquet'), of one split if it "
      "has several"
    )
  if not files:
    what = f"{inside[0]} is not" if inside else f"there is no file in {folder}"
    raise DataError(
      f"{what} of a kind that is read ({', '.join(SUFFIXES)}); convert it, or name another folder"
    )
  others = splits_in(files, split, folder) - {split}
  if split and others:
    longer = [name for name in others if name.startswith(f"{split}_")]
    mine = longer[0] if len(longer) == 1 else split
    files = of_split(files, split, folder) or of_split(files, mine, folder)
    if not files:
      have = ", ".join(sorted(others))
      raise DataError(
        f"{folder} has files of the splits {have} and none of config.data.split = {split!r}; name "
        "one"
      )
  if passed := [file for file in inside if file not in files]:
    names = ", ".join(str(file.relative_to(folder)) for file in passed[:5]) + (
      ", ..." if len(passed) > 5 else ""
    )
    print(f"data     {folder}: {len(files)} files read, {len(passed)} skipped: {names}")
  return files


def splits_in(files: Sequence[Path], split: str, root: Path) -> set[str]:
  """The splits to which files belong by their name or by the name of a folder below `root`.

  A longer name than those in SPLITS, such as test_prefs, is a split if it is `split` or if there
  are different splits. By itself, test_notes.jsonl is just a file.
  """
  parts = [part for file in files for part in file.relative_to(root).parts]
  found = [match for part in parts if (match := SPLIT.match(part))]
  names = {match[0].lower() for match in found}
  if "_" in split and split in names or len({match[1].lower() for match in found}) > 1:
    return names
  return names & set(SPLITS)


def of_split(files: Sequence[Path], split: str, root: Path) -> list[Path]:
  """The files that belong to a split by their name or by the name of a folder below `root`:
  train.jsonl, train-00000-of-3.parquet.
  """
  mine = re.compile(rf"{re.escape(split)}([-.]|$)", re.I)
  return [file for file in files if any(mine.match(part) for part in file.relative_to(root).parts)]


def read_file(file: Path) -> Iterator[Record]:
  """Every record of a file, including unreadable ones; blank lines are skipped."""
  try:
    yield from _read_parquet(file) if file.suffix.lower() == ".parquet" else _read_lines(file)
  except OSError as error:
    raise DataError(
      f"{file} cannot be read: {error}; make it readable, or name another file"
    ) from None


# ---- JSON lines ----


def _read_lines(file: Path) -> Iterator[Record]:
  number = 0
  with gzip.open(file, "rb") if file.suffix.lower() == ".gz" else open(file, "rb") as stream:
    while True:
      number += 1
      try:
        line = stream.readline()
      except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        if number == 1:
          raise DataError(f"{file} is not a complete gzip file ({error}); fetch it again") from None
        yield Record(
          BadRow("cut off", f"the archive ends or is damaged here: {error}"), file, number
        )
        return
      if not line:
        return
      if number == 1:
        line = line.removeprefix(b"\xef\xbb\xbf")  # a byte-order mark
        if line.lstrip()[:1] == b"[" and not line.rstrip().endswith(b"]"):
          raise DataError(
            f"{file} is one JSON array over many lines; give JSON lines, one object a line"
          )
      if line.strip():
        yield Record(_parse(line), file, number)


def _parse(line: bytes) -> Any:
  """The JSON value of a line, or a BadRow with the reason why there is none."""
  try:
    value = json.loads(line.decode("utf-8"), object_pairs_hook=unique_keys)
    if b"\\u" in line:  # an escape can encode half of a surrogate pair, which is not text
      json.dumps(value, ensure_ascii=False).encode("utf-8")
    return value
  except UnicodeEncodeError as error:
    return BadRow("invalid UTF-8", f"half of a surrogate pair: {error}")
  except UnicodeDecodeError as error:
    return BadRow("invalid UTF-8", str(error))
  except RepeatedKey as error:
    return BadRow("repeated key", f"{error}; leave one of its values")
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
      for value in _values(_with_dates_as_text(batch)):
        number += 1
        yield Record(value, file, number)
  except (pyarrow.ArrowException, OSError) as error:
    raise DataError(
      f"{file} is damaged, truncated or not parquet: {' '.join(str(error).split())[:200]}; "
      "fetch or write it again"
    ) from None
  except (ValueError, OverflowError) as error:  # of a value that is no value of Python
    raise DataError(
      f"{file} has a column that cannot be read: {str(error)[:200]}; write it without that column"
    ) from None


def _with_dates_as_text(batch):
  """The rows with every date and time as text, because Python's have no nanoseconds and JSON has
  none.
  """
  from pyarrow import string, types

  def text(column):
    kinds = (types.is_timestamp, types.is_date, types.is_time)
    return column.cast(string()) if any(is_kind(column.type) for is_kind in kinds) else column

  return batch.from_arrays([text(column) for column in batch.columns], names=batch.schema.names)


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
