"""Damaged files and folders of rows: our rows equal those of a plain reader, or they are refused.

Seeds are fixed. 60 mutations run with the other tests, 300 with `-m long`.
"""

import gzip
import json

import numpy as np
import pytest

from configs import default
from r2m_jax.data.jsonl import DataError
from r2m_jax.data.rows import load

ROWS = [{"prompt": f"Question {i}?", "response": f"Answer {i}."} for i in range(6)]
VALUES = [None, 3, True, "", " ", [], {}, "caf\u00e9", "\U0001f600", "a\u2028b", "x" * 5000, ["a"]]


def plain(files) -> list[tuple[str, str]]:
  """(prompt, response) of every line of every file that is an object in which both are text."""
  found = []
  for file in files:
    raw = file.read_bytes()
    raw = gzip.decompress(raw) if file.name.lower().endswith(".gz") else raw
    for line in raw.removeprefix(b"\xef\xbb\xbf").split(b"\n"):
      try:
        row = json.loads(line.decode("utf-8"))
        pair = row["prompt"], row["response"]
        assert all(isinstance(x, str) and x.strip() and x.encode("utf-8") for x in pair)
      except (ValueError, KeyError, TypeError, AssertionError, IndexError):
        continue
      found.append(pair)
  return found


def damaged_lines(rng) -> bytes:
  """Lines of ROWS, one of which has a changed value or changed bytes."""
  lines = [json.dumps(row, ensure_ascii=bool(rng.integers(2))).encode() for row in ROWS]
  at = rng.integers(len(lines))
  kind = rng.choice(
    ["value", "drop", "cut", "bytes", "blank", "array", "surrogate", "twice", "bom"]
  )
  row = dict(ROWS[at])
  field = rng.choice(["prompt", "response"])
  if kind == "value":
    row[field] = VALUES[rng.integers(len(VALUES))]
    lines[at] = json.dumps(row).encode()
  if kind == "drop":
    del row[field]
    lines[at] = json.dumps(row).encode()
  if kind == "cut":
    lines[at] = lines[at][: rng.integers(1, len(lines[at]))]
  if kind == "bytes":
    damaged = bytearray(lines[at])
    damaged[rng.integers(len(damaged))] = rng.integers(128, 256)
    lines[at] = bytes(damaged)
  if kind == "blank":
    lines.insert(at, b"  ")
  if kind == "array":
    lines[at] = json.dumps([row]).encode()
  if kind == "surrogate":
    lines[at] = b'{"prompt": "half \\ud83d", "response": "no text"}'
  if kind == "twice":
    lines[at] = lines[at] + lines[at]
  if kind == "bom":
    lines[0] = b"\xef\xbb\xbf" + lines[0]
  return b"\n".join(lines) + (b"\n" if rng.integers(2) else b"")


def folder_of(root, rng):
  """A folder with one or two data files and with unrelated files. Returns the data files."""
  data = []
  for i in range(rng.integers(1, 3)):
    name = rng.choice(["a.jsonl", "B.JSONL", "c.json", "d.ndjson", "e.jsonl.gz", "sub/f.jsonl"])
    file = root / f"{name.rsplit('/', 1)[0] + '/' if '/' in name else ''}{i}{name.split('/')[-1]}"
    file.parent.mkdir(parents=True, exist_ok=True)
    content = damaged_lines(rng)
    file.write_bytes(gzip.compress(content) if file.name.endswith(".gz") else content)
    data.append(file)
  around = {
    ".hidden.jsonl": b'{"prompt": "hidden", "response": "no"}\n',
    "._0a.jsonl": b"\x00\x05\x16\x07",
    ".ipynb_checkpoints/0a.jsonl": b'{"prompt": "old", "response": "no"}\n',
    "README.md": b"# hi",
    "dataset_info.json": b'{"prompt": "meta", "response": "no"}',
    "notes.txt": b"x",
    "data.arrow": b"ARROW1",
  }
  for name, content in around.items():
    if rng.random() < 0.4:
      (root / name).parent.mkdir(parents=True, exist_ok=True)
      (root / name).write_bytes(content)
  return data


def check(root, seed) -> bool:
  """Whether the rows of the folder or file of `seed` were read. Fails if they differ from the plain
  reader's.
  """
  rng = np.random.default_rng(seed)
  root.mkdir()
  files = sorted(folder_of(root, rng))
  config = default.get_config()
  one = rng.integers(2) == 0
  config.data.name = str(files[0] if one else root)
  config.data.max_bad_share = 1.0
  want = plain(files[:1] if one else files)
  try:
    got = [(row["prompt"], row["response"]) for row in load(config.data, "response")]
  except DataError as error:
    assert "\n" not in str(error) and not want, f"seed {seed}: {error}"
    return False
  assert sorted(got) == sorted(want), f"seed {seed}"
  return True


def test_sixty_damaged_folders_give_a_plain_readers_rows(tmp_path):
  assert sum(check(tmp_path / str(seed), seed) for seed in range(60)) > 50


@pytest.mark.long
def test_three_hundred_damaged_folders_give_a_plain_readers_rows(tmp_path):
  assert sum(check(tmp_path / str(seed), seed) for seed in range(1000, 1300)) > 250
