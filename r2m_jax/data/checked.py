"""`config.data.name` as checked rows: found, read and converted to one form. Bad rows are counted,
and too many are refused.
"""

import collections
import hashlib
import math
import os
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from r2m_jax.data.files import JSON_LINES, BadRow, Record, find_files, of_split
from r2m_jax.data.forms import as_row
from r2m_jax.data.jsonl import DataError

# columns that other programs read and that change the meaning of a row
UNREAD = {
  "system",
  "system_prompt",
  "input",
  "context",
  "tools",
  "images",
  "score",
  "score_chosen",
  "score_rejected",
  "rating",
  "margin",
  "weight",
}
HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+(/[\w.-]+)*")


def split_names(text: str, root: str = "") -> list[str]:
  """The names of data in a comma-separated list. A file or folder whose own name has a comma is
  one name.
  """
  if "," in text and (Path(root).expanduser() / Path(text).expanduser()).exists():
    return [text]
  return [name.strip() for name in text.split(",") if name.strip()]


def good_rows(raw: Iterable[Record], need: str, bad: "BadRows") -> Iterator[dict[str, Any]]:
  """The usable rows, with `where`; the others are counted in `bad`."""
  for record in raw:
    bad.read += 1
    if isinstance(record.value, dict):
      bad.unread |= UNREAD & {name for name, value in record.value.items() if value}
    try:
      yield as_row(record.value, need) | {"where": record.where}
    except BadRow as error:
      bad.add(error, record.where)


class BadRows:
  """The numbers of rows of one source that were read and that were bad, by kind, with the first
  place of each kind.
  """

  def __init__(self, name: str):
    self.name, self.read = name, 0
    self.counts: collections.Counter[str] = collections.Counter()
    self.first: dict[str, str] = {}
    self.unread: set[str] = set()  # columns that are not read and may change the meaning of a row

  def add(self, error: BadRow, where: str) -> None:
    self.counts[error.kind] += 1
    self.first.setdefault(error.kind, f"{where}: {error}")

  def summary(self) -> str:
    bad = self.counts.total()
    text = f"{self.name}: {self.read} rows read, {bad} bad"
    if self.unread:
      text += f"; columns that are not read: {', '.join(sorted(self.unread))}"
    return text + "".join(
      f"; {n} {kind}, first {self.first[kind]}" for kind, n in self.counts.most_common()
    )

  def check(self, max_share: float) -> None:
    """Raises DataError if more than `max_share` of the rows are bad, or if none are good."""
    bad = self.counts.total()
    if bad > max_share * self.read:
      raise DataError(
        f"{self.summary()}: more than config.data.max_bad_share = {max_share:g}; fix the data, "
        "or allow this many: "
        f"--config.data.max_bad_share={math.ceil(100 * bad / self.read) / 100:g}"
      )
    if bad == self.read:
      raise DataError(f"{self.name} holds no rows; name data that has some")


# ---- the hub ----


def hub_files(name: str, split: str, *, field: str = "config.data.name") -> list[Path]:
  """The data files of OWNER/NAME or OWNER/NAME/FOLDER on the hub that belong to a split; from the
  hub's cache if offline.

  A file belongs to the split that its name, or a folder above it, begins with:
  data/train-00000-of-00001.parquet.
  """
  import huggingface_hub

  if not HUB_NAME.fullmatch(name) or ".." in name:
    raise DataError(f"{field} is hf:{name}: give hf:OWNER/NAME or hf:OWNER/NAME/FOLDER")
  owner, repository, *folder = name.split("/")
  under = "/".join([*folder, ""])
  patterns = [
    f"{under}**{suffix}" for suffix in (".parquet", *JSON_LINES, *(f"{s}.gz" for s in JSON_LINES))
  ]
  try:
    root = huggingface_hub.snapshot_download(
      f"{owner}/{repository}", repo_type="dataset", allow_patterns=patterns
    )
  except (OSError, ValueError) as error:
    raise DataError(
      f"{field} is hf:{name}, which cannot be fetched ({' '.join(str(error).split())[:160]}); "
      "without a network give "
      "the folder of its parquet or JSON-lines files, or correct the name"
    ) from None
  found = find_files(os.path.join(root, under))
  files = of_split(found, split, Path(root))
  if not files:
    raise DataError(
      f"hf:{name} has no file of config.data.split = {split!r} among {[f.name for f in found][:8]}; "
      "give another split"
    )
  return files


# ---- after tokenisation ----


def keep(rows: list[dict], reasons: Sequence[str | None], what: str) -> list[int]:
  """The indices of the rows that have no reason to be dropped; prints how many rows each reason
  drops.
  """
  kept = [i for i, reason in enumerate(reasons) if reason is None]
  dropped = collections.Counter(reason for reason in reasons if reason)
  why = "".join(f"; {n} dropped: {reason}" for reason, n in dropped.most_common())
  print(f"data     {len(kept)} of {len(rows)} rows for {what}{why}")
  if not kept:
    raise DataError(
      f"no row of config.data.name is left for {what}{why}; give other rows, or change what "
      "config.data drops: its lengths and unique"
    )
  return kept


def too_long(data, prompt: int, responses: Sequence[int], chosen: int = 0) -> str | None:
  """Why a row is dropped, from its lengths in tokens; None if it is kept. `chosen` is for the
  paper's filter.
  """
  if data.max_chosen_length and chosen > data.max_chosen_length:
    return f"chosen over {data.max_chosen_length} tokens"
  if prompt > data.max_prompt_length:
    return f"prompt over {data.max_prompt_length} tokens"
  if any(n > data.max_response_length for n in responses):
    return f"response over {data.max_response_length} tokens"
  return None


def fingerprint(rows: Iterable[Sequence[Sequence[int]]]) -> str:
  """SHA-256 of tokenised rows, each of one or more lists of ids. A resumed run must find the same
  rows.
  """
  digest = hashlib.sha256()
  for row in rows:
    for ids in row:
      digest.update(len(ids).to_bytes(4, "little") + np.asarray(ids, "<i4").tobytes())
  return digest.hexdigest()
