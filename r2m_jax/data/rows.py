"""All rows of `config.data.name`. Each of its names is files, a hub dataset or a TFDS dataset."""

from collections.abc import Iterator
from typing import Any

from r2m_jax.data.checked import BadRows, good_rows, hub_files, split_names
from r2m_jax.data.files import Record, find_files, read_file
from r2m_jax.data.jsonl import DataError


def load(data, need: str) -> list[dict[str, Any]]:
  """All good rows of `data.name` in the form that `need` (forms.NEEDS) requires; prints what was
  read.

  Every row also has `where` ("file:line") and `part`, the index of its comma-separated name, from
  0.

  Args:
    data: config.data: name, root, split, tfds_dir, max_bad_share.

  Raises DataError if a file cannot be read, or has no rows or too many bad rows.
  """
  if not data.name:
    raise DataError(
      "config.data.name is empty; give a path or glob of JSON lines or parquet, tfds:NAME or "
      "hf:OWNER/NAME"
    )
  rows = []
  for part, name in enumerate(split_names(data.name, data.root)):
    bad = BadRows(name)
    rows += [row | {"part": part} for row in good_rows(records(name, data), need, bad)]
    bad.check(data.max_bad_share)
    print(f"data     {bad.summary()}")
  return rows


def records(name: str, data) -> Iterator[Record]:
  """The raw records behind one name."""
  kind, _, rest = name.partition(":")
  if kind == "tfds":
    from r2m_jax.data import tfds

    yield from tfds.records(rest, data)
    return
  files = hub_files(rest, data.split) if kind == "hf" else find_files(name, data.root, data.split)
  for file in files:
    yield from read_file(file)
