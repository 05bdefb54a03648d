"""TFDS data sets without TensorFlow: prepared from local files in several formats, and from a fake
hub.
"""

import pathlib
import shutil
import subprocess
import sys

import huggingface_hub
import pytest
from test_data import HH, PAIR, SAID, TALK, USER, data, lines, parquet

from r2m_jax.data.jsonl import DataError
from r2m_jax.data.rows import load

LONG = [USER("Wer?"), SAID("日本"), USER("a\n\nb")]


def rows_of(name, need, tmp_path, **overrides):
  loaded = load(data(name, tfds_dir=str(tmp_path / "tfds"), **overrides), need)
  return [{k: v for k, v in row.items() if k not in ("where", "part")} for row in loaded]


def test_ultrafeedback_from_local_parquet_and_again_without_it(tmp_path):
  stored = [
    {
      "prompt": "Wer?",
      "chosen": [USER("Wer?"), SAID(f"é {i}")],
      "rejected": [USER("Wer?"), SAID("no")],
      "score_chosen": 8.0,
    }
    for i in range(30)
  ]
  (tmp_path / "raw").mkdir()
  parquet(tmp_path / "raw/train_prefs-00000-of-00001.parquet", stored)
  parquet(tmp_path / "raw/test_prefs-00000-of-00001.parquet", stored[:2])
  want = [{"prompt": [USER("Wer?")], "chosen": f"é {i}", "rejected": "no"} for i in range(30)]

  def by_reply(rows):
    return sorted(rows, key=lambda row: row["chosen"])

  got = rows_of("tfds:ultrafeedback_binarized", "pair", tmp_path, root=str(tmp_path / "raw"))
  assert by_reply(got) == by_reply(want)
  (tmp_path / "raw/train_prefs-00000-of-00001.parquet").unlink()
  assert (
    rows_of("tfds:ultrafeedback_binarized", "pair", tmp_path) == got
  )  # in the order of the first reading
  assert len(rows_of("tfds:ultrafeedback_binarized", "pair", tmp_path, split="test")) == 2
  with pytest.raises(DataError, match="tfds:ultrafeedback_binarized, split 'val', cannot be read"):
    rows_of("tfds:ultrafeedback_binarized", "pair", tmp_path, split="val")


def test_hh_from_the_hub(tmp_path, monkeypatch):
  (tmp_path / "hub/helpful-base").mkdir(parents=True)
  stored = [{"chosen": HH + f"yes {i}", "rejected": HH + "no"} for i in range(3)]
  lines(tmp_path / "hub/helpful-base/train.jsonl.gz", stored)
  lines(tmp_path / "hub/helpful-base/test.jsonl.gz", stored[:1])
  asked = []
  monkeypatch.setattr(
    huggingface_hub,
    "snapshot_download",
    lambda name, **kw: asked.append((name, kw["repo_type"])) or str(tmp_path / "hub"),
  )
  got = rows_of("tfds:hh_rlhf/helpful_base", "pair", tmp_path)
  assert (
    sorted(r["chosen"] for r in got) == ["yes 0", "yes 1", "yes 2"] and got[0]["prompt"] == TALK
  )
  assert asked == [("Anthropic/hh-rlhf", "dataset")] * 2
  assert len(rows_of("tfds:hh_rlhf/helpful_base", "prompt", tmp_path, split="test")) == 1


def test_tldr_from_local_json_lines(tmp_path):
  stored = [{"prompt": f"POST {i}\nTL;DR:", "completion": f" short {i}"} for i in range(4)]
  path = lines(tmp_path / "posts.jsonl", stored)
  got = rows_of("tfds:tldr", "response", tmp_path, root=str(path))
  want = [{"prompt": [USER(f"POST {i}\nTL;DR:")], "response": f" short {i}"} for i in range(4)]
  assert sorted(got, key=lambda row: row["response"]) == want


def flip(path):
  content = bytearray(path.read_bytes())
  content[len(content) // 2] ^= 1
  path.write_bytes(content)


@pytest.mark.parametrize(
  "harm",
  [
    pathlib.Path.unlink,
    flip,
    lambda path: path.write_bytes(path.read_bytes()[: path.stat().st_size // 2]),
    lambda path: path.write_bytes(b""),
    lambda path: path.write_bytes(bytes(range(256)) * 400),
  ],
)
def test_prepared_files_that_are_lost_or_damaged(harm, tmp_path):
  """The error is one line that names the folder. After the files are restored or prepared again,
  the rows are the same.
  """
  stored = [{"prompt": f"POST {i}", "completion": f"short {i}"} for i in range(40)]
  root = str(lines(tmp_path / "posts.jsonl", stored))
  want = rows_of("tfds:tldr", "response", tmp_path, root=root)
  (shard,) = (tmp_path / "tfds/tldr").rglob("*array_record*")
  kept = shard.read_bytes()
  harm(shard)
  with pytest.raises(
    DataError, match="tfds:tldr, split 'train', cannot be read: .* lie in .*tldr"
  ) as refused:
    rows_of("tfds:tldr", "response", tmp_path)
  assert "\n" not in str(refused.value)
  shard.write_bytes(kept)
  assert rows_of("tfds:tldr", "response", tmp_path) == want
  harm(shard)
  shutil.rmtree(shard.parent)
  assert rows_of("tfds:tldr", "response", tmp_path, root=root) == want


def test_what_cannot_be_prepared_is_told_in_one_line(tmp_path, monkeypatch):
  def offline(*_, **__):
    raise OSError("no route to host")

  monkeypatch.setattr(huggingface_hub, "snapshot_download", offline)
  bad = lines(tmp_path / "bad.jsonl", [PAIR, PAIR | {"chosen": ""}])
  for name, root, message in (
    ("tfds:tldr", "", "hf:trl-lib/tldr, which cannot be fetched .no route to host."),
    ("tfds:no_such_set", "", "tfds:no_such_set, split 'train', cannot be read"),
    ("tfds:hh_rlhf/none", "", "tfds:hh_rlhf/none, split 'train', cannot be read"),
    (
      "tfds:hh_rlhf/helpful_base",
      str(bad),
      "2 rows read, 1 bad; 1 empty field, first .*bad.jsonl:2",
    ),
  ):
    with pytest.raises(DataError, match=message) as refused:
      rows_of(name, "pair", tmp_path, root=root)
    assert "\n" not in str(refused.value)


def test_no_tensorflow(tmp_path):
  lines(tmp_path / "a.jsonl", [{"prompt": LONG, "chosen": "a", "rejected": "b"}])
  code = f"""
import sys
from r2m_jax.configs import default
from r2m_jax.data.rows import load
section = default.get_config().data
section.name, section.root, section.tfds_dir = "tfds:hh_rlhf", {str(tmp_path / "a.jsonl")!r}, {str(tmp_path)!r}
print(load(section, "pair")[0]["prompt"])
assert "tensorflow" not in sys.modules
"""
  result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
  assert result.returncode == 0, result.stderr[-2000:]
  assert result.stdout.splitlines()[-1] == str(LONG)
