"""Reading rows: the common formats, more than thirty kinds of malformed input, and the sources of
rows.
"""

import gzip
import json

import huggingface_hub
import pyarrow
import pyarrow.parquet
import pytest

from configs import default
from r2m_jax.config import ConfigError, check_config
from r2m_jax.data.checked import keep, too_long
from r2m_jax.data.files import KINDS, find_files
from r2m_jax.data.jsonl import DataError
from r2m_jax.data.rows import load


def USER(text):
  return {"role": "user", "content": text}


def SAID(text):
  return {"role": "assistant", "content": text}


HH = "\n\nHuman: hi\n\nAssistant: hello\n\nHuman: a cat?\n\nAssistant: "
TALK = [USER("hi"), SAID("hello"), USER("a cat?")]


def data(name, **overrides):
  section = default.get_config().data
  section.name = str(name)
  section.update(overrides)
  return section


def lines(path, rows):
  """Rows as JSON lines; a row of bytes is written unchanged."""
  packed = [row if isinstance(row, bytes) else json.dumps(row).encode() + b"\n" for row in rows]
  (gzip.open if path.suffix == ".gz" else open)(path, "wb").write(b"".join(packed))
  return path


def only(row, need, tmp_path):
  (found,) = load(data(lines(tmp_path / "row.jsonl", [row])), need)
  assert found.pop("where").endswith("row.jsonl:1") and found.pop("part") == 0
  return found


# ---- formats ----

PAIR = {"prompt": TALK, "chosen": "yes", "rejected": "no"}
FORMS = {
  "explicit": (PAIR, "pair", PAIR),
  "text prompt": (PAIR | {"prompt": "hi"}, "pair", PAIR | {"prompt": "hi"}),
  "replies as messages": (PAIR | {"chosen": [SAID("yes")], "rejected": [SAID("no")]}, "pair", PAIR),
  "whole dialogues beside a prompt": (
    {"prompt": "hi", "chosen": [USER("hi"), SAID("yes")], "rejected": [USER("hi"), SAID("no")]},
    "pair",
    {"prompt": "hi", "chosen": "yes", "rejected": "no"},
  ),
  "implicit, messages": (
    {"chosen": [*TALK, SAID("yes")], "rejected": [*TALK, SAID("no")]},
    "pair",
    PAIR,
  ),
  "implicit, HH": ({"chosen": HH + "yes", "rejected": HH + "no"}, "pair", PAIR),
  "HH as prompts": (
    {"chosen": HH + "yes", "rejected": HH + "no"},
    "prompt",
    {"prompt": TALK, "chosen": "yes"},
  ),
  "prompt only": ({"prompt": TALK, "other": 1}, "prompt", {"prompt": TALK}),
  "messages as a prompt": ({"messages": TALK}, "prompt", {"prompt": TALK}),
  "messages": ({"messages": [*TALK, SAID("yes")]}, "response", {"prompt": TALK, "response": "yes"}),
  "completion": (
    {"prompt": "hi", "completion": "yes"},
    "response",
    {"prompt": "hi", "response": "yes"},
  ),
  "response of a pair": (PAIR, "response", {"prompt": TALK, "response": "yes"}),
  "system": (
    {"prompt": [{"role": "system", "content": "s"}, USER("hi")]},
    "prompt",
    {"prompt": [{"role": "system", "content": "s"}, USER("hi")]},
  ),
  "reference": (
    {"prompt": "hi", "reference": "yes"},
    "response",
    {"prompt": "hi", "response": "yes"},
  ),
  "plain text": ({"text": "abc"}, "text", {"text": "abc"}),
  "a dialogue as text": (PAIR, "text", {"prompt": TALK, "response": "yes"}),
  "null beside it": (
    {"prompt": "hi", "response": None, "completion": "yes"},
    "response",
    {"prompt": "hi", "response": "yes"},
  ),
  "meta": (
    {"prompt": "hi", "meta": {"group": "val"}},
    "prompt",
    {"prompt": "hi", "meta": {"group": "val"}},
  ),
}


@pytest.mark.parametrize("form", FORMS)
def test_form(form, tmp_path):
  stored, need, row = FORMS[form]
  assert only(stored, need, tmp_path) == row


# ---- malformed rows: each counted under its kind, with file and line, among 199 good ones ----

GOOD = {"prompt": "Who?", "chosen": "Me.", "rejected": "You."}
MALFORMED = {
  "half an object": (b'{"prompt": "a", \n', "broken JSON"),
  "single quotes": (b"{'prompt': 'a'}\n", "broken JSON"),
  "two objects on a line": (b'{"prompt": "a"} {"prompt": "b"}\n', "broken JSON"),
  "a key twice": (
    b'{"prompt": "a", "chosen": "b", "rejected": "c", "chosen": "d"}\n',
    "repeated key",
  ),
  "a key twice in a message": (
    b'{"prompt": [{"role": "user", "content": "a", "content": "b"}], "chosen": "b", "rejected": "c"}\n',
    "repeated key",
  ),
  "bare words": (b"prompt: a\n", "broken JSON"),
  "nested beyond reason": (b"[" * 100_000 + b"\n", "broken JSON"),
  "a number beyond reason": (b'{"prompt": ' + b"9" * 5000 + b"}\n", "broken JSON"),
  "a raw control character": (b'{"prompt": "a\x01"}\n', "broken JSON"),
  "Latin-1": ('{"prompt": "caf\xe9"}\n'.encode("latin-1"), "invalid UTF-8"),
  "a character cut in two": (b'{"prompt": "\xe2\x82"}\n', "invalid UTF-8"),
  "half of a surrogate pair": (
    b'{"prompt": "\\ud83d", "chosen": "a", "rejected": "b"}\n',
    "invalid UTF-8",
  ),
  "a list": ([1, 2], "not an object"),
  "text": ("prompt", "not an object"),
  "null": (b"null\n", "not an object"),
  "no prompt": ({"chosen_text": "a"}, "missing field"),
  "no chosen": ({"prompt": "a", "rejected": "b"}, "missing field"),
  "no rejected": ({"prompt": "a", "chosen": "b"}, "missing field"),
  "chosen is null": (GOOD | {"chosen": None}, "missing field"),
  "empty prompt": (GOOD | {"prompt": ""}, "empty field"),
  "blank chosen": (GOOD | {"chosen": " \n"}, "empty field"),
  "empty rejected": (GOOD | {"rejected": ""}, "empty field"),
  "no messages": (GOOD | {"prompt": []}, "empty field"),
  "a turn without text": (GOOD | {"prompt": [USER("")]}, "empty field"),
  "an HH turn without text": (
    {"chosen": "\n\nHuman: hi\n\nAssistant:", "rejected": HH + "a"},
    "empty field",
  ),
  "prompt is a number": (GOOD | {"prompt": 3}, "wrong type"),
  "chosen is an object": (GOOD | {"chosen": {"content": "a"}}, "wrong type"),
  "rejected is true": (GOOD | {"rejected": True}, "wrong type"),
  "a message is text": (GOOD | {"prompt": ["hi"]}, "wrong type"),
  "content in parts": (
    GOOD | {"prompt": [{"role": "user", "content": [{"type": "text"}]}]},
    "wrong type",
  ),
  "a message without a role": (GOOD | {"prompt": [{"content": "hi"}]}, "missing field"),
  "a message without content": (GOOD | {"prompt": [{"role": "user"}]}, "missing field"),
  "an unknown role": (GOOD | {"prompt": [{"role": "human", "content": "hi"}]}, "wrong roles"),
  "a role that is a number": (GOOD | {"prompt": [{"role": 1, "content": "hi"}]}, "wrong roles"),
  "two user turns": (GOOD | {"prompt": [USER("a"), USER("b")]}, "wrong roles"),
  "the assistant begins": (GOOD | {"prompt": [SAID("a"), USER("b")]}, "wrong roles"),
  "the assistant is last": (GOOD | {"prompt": [USER("a"), SAID("b")]}, "wrong roles"),
  "a late system message": (
    GOOD | {"prompt": [USER("a"), {"role": "system", "content": "s"}]},
    "wrong roles",
  ),
  "only a system message": (GOOD | {"prompt": [{"role": "system", "content": "s"}]}, "wrong roles"),
  "the reply is the user's": (GOOD | {"chosen": [USER("a")]}, "wrong roles"),
  "text without turns": ({"chosen": "hello", "rejected": "bye"}, "wrong roles"),
  "a dialogue of one message": ({"chosen": [SAID("a")], "rejected": [SAID("b")]}, "empty field"),
  "other histories": (
    {"chosen": HH + "a", "rejected": HH.replace("cat", "dog") + "b"},
    "different prompts",
  ),
  "another prompt in the dialogue": (
    GOOD | {"chosen": [USER("What?"), SAID("a")]},
    "different prompts",
  ),
  "chosen equals rejected": (GOOD | {"rejected": "Me."}, "chosen equals rejected"),
  "equal but for blanks": (GOOD | {"rejected": " Me.\n"}, "chosen equals rejected"),
}


@pytest.mark.parametrize("case", MALFORMED)
def test_malformed_row_is_counted(case, tmp_path, capsys):
  row, kind = MALFORMED[case]
  path = lines(tmp_path / "d.jsonl", [GOOD] * 150 + [row] + [GOOD] * 49)
  assert len(load(data(path), "pair")) == 199
  shown = capsys.readouterr().out
  assert f"200 rows read, 1 bad; 1 {kind}, first {path}:151: " in shown and shown.count("\n") == 1


def test_a_repeated_key_is_named(tmp_path, capsys):
  path = lines(tmp_path / "d.jsonl", [GOOD] * 150 + [MALFORMED["a key twice"][0]])
  load(data(path), "pair")
  assert f"first {path}:151: the key 'chosen' occurs twice" in capsys.readouterr().out


def test_malformed_covers_every_kind():
  assert {kind for _, kind in MALFORMED.values()} | {"cut off", "undesirable"} == set(
    KINDS
  ) and len(MALFORMED) >= 30


@pytest.mark.parametrize("suffix", [".jsonl", ".jsonl.gz"])
def test_a_file_cut_in_the_middle_is_counted(suffix, tmp_path, capsys):
  whole = lines(
    tmp_path / f"whole{suffix}", [GOOD | {"prompt": f"{i} {i * 7919 % 10007}"} for i in range(2000)]
  )
  cut = tmp_path / f"cut{suffix}"
  cut.write_bytes(whole.read_bytes()[:-60])
  rows = load(data(cut), "pair")
  assert 1500 < len(rows) < 2000
  assert f"1 bad; 1 cut off, first {cut}:{len(rows) + 1}: " in capsys.readouterr().out


def test_too_many_bad_rows_stop_the_run(tmp_path):
  path = lines(tmp_path / "d.jsonl", [GOOD] * 97 + [b"{\n", b"[\n", GOOD | {"prompt": ""}])
  with pytest.raises(DataError) as stopped:
    load(data(path), "pair")
  message = str(stopped.value)
  assert "100 rows read, 3 bad; 2 broken JSON, first" in message and f"{path}:98:" in message
  assert f"1 empty field, first {path}:100: 'prompt' is empty" in message
  assert "more than config.data.max_bad_share = 0.01" in message and "\n" not in message
  assert message.endswith("--config.data.max_bad_share=0.03")
  assert len(load(data(path, max_bad_share=0.03), "pair")) == 97
  lines(path, [GOOD] * 99 + [b"{\n"])  # exactly the allowed share
  assert len(load(data(path), "pair")) == 99
  other = lines(
    tmp_path / "many.jsonl", [GOOD] * 10_000
  )  # a small broken source is not hidden by a large one
  lines(path, [GOOD] * 10 + [b"{\n"])
  with pytest.raises(DataError, match="11 rows read, 1 bad"):
    load(data(f"{other},{path}"), "pair")


def parquet(path, rows):
  pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
  return path


def damaged(path, content):
  path.write_bytes(content)
  return path


REFUSED = {
  "no such file": (lambda d: d / "absent.jsonl", "there is no file"),
  "a glob of nothing": (lambda d: d / "*.jsonl", "there is no file"),
  "an empty folder": (lambda d: d, "there is no file"),
  "an empty file": (lambda d: damaged(d / "a.jsonl", b""), "holds no rows"),
  "blank lines": (lambda d: damaged(d / "a.jsonl", b"\n \n"), "holds no rows"),
  "another kind of file": (
    lambda d: damaged(d / "a.csv", b"prompt\nhi\n"),
    "not of a kind that is read",
  ),
  "a folder of others": (lambda d: damaged(d / "a.txt", b"").parent, "not of a kind that is read"),
  "a JSON array": (
    lambda d: damaged(d / "a.json", b'[\n{"prompt": "a"}\n]'),
    "one JSON array over many lines",
  ),
  "not gzip": (lambda d: damaged(d / "a.jsonl.gz", b'{"prompt": "a"}'), "not a complete gzip file"),
  "half a gzip header": (
    lambda d: damaged(d / "a.jsonl.gz", gzip.compress(b"{}")[:9]),
    "not a complete gzip file",
  ),
  "not parquet": (
    lambda d: damaged(d / "a.parquet", b"PAR1"),
    "damaged, truncated or not parquet",
  ),
  "half a parquet file": (
    lambda d: damaged(d / "b.parquet", parquet(d / "a.parquet", [GOOD]).read_bytes()[:-40]),
    "damaged, truncated",
  ),
  "parquet of other columns": (lambda d: parquet(d / "a.parquet", [{"x": 1}]), "1 missing field"),
  "UTF-16": (lambda d: damaged(d / "a.jsonl", json.dumps(GOOD).encode("utf-16")), "invalid UTF-8"),
  "a hub name of one part": (lambda d: "hf:ultrafeedback", "give hf:OWNER/NAME"),
  "a hub name that climbs": (lambda d: "hf:a/../b", "give hf:OWNER/NAME"),
  "no name": (lambda d: "", "config.data.name is empty"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_unreadable_input_is_refused_in_one_line(case, tmp_path):
  make, message = REFUSED[case]
  with pytest.raises(DataError, match=message) as refused:
    load(data(make(tmp_path)), "pair")
  assert "\n" not in str(refused.value)


def test_a_damaged_page_of_parquet_is_refused(tmp_path):
  path = parquet(tmp_path / "a.parquet", [GOOD | {"prompt": str(i)} for i in range(1000)])
  content = bytearray(path.read_bytes())
  content[30:200] = bytes(170)
  path.write_bytes(content)
  with pytest.raises(DataError, match="damaged"):
    load(data(path), "pair")


def test_parquet_reads_as_json_lines_do(tmp_path):
  rows = [
    {"chosen": [*TALK, SAID(f"yes {i}")], "rejected": [*TALK, SAID("no")], "meta": {"i": i}}
    for i in range(2000)
  ]
  got = load(data(parquet(tmp_path / "a.parquet", rows)), "pair")
  want = load(data(lines(tmp_path / "a.jsonl.gz", rows)), "pair")

  def strip(rows):
    return [{k: v for k, v in row.items() if k != "where"} for row in rows]

  assert strip(got) == strip(want) and got[1500]["where"].endswith("a.parquet:1501")


def test_parquet_text_that_is_not_utf8_is_counted(tmp_path, capsys):
  column = (
    pyarrow.array([b"good"] * 120 + [b"\xff\xfe"] + [b"good"] * 9)
    .cast(pyarrow.binary())
    .view(pyarrow.binary())
  )
  text = pyarrow.Array.from_buffers(pyarrow.string(), len(column), column.buffers())
  pyarrow.parquet.write_table(pyarrow.table({"prompt": text}), tmp_path / "a.parquet")
  assert len(load(data(tmp_path / "a.parquet"), "prompt")) == 129
  assert f"1 invalid UTF-8, first {tmp_path / 'a.parquet'}:121" in capsys.readouterr().out


# ---- sources of rows ----


def test_paths_folders_and_globs(tmp_path):
  for name in ("b.jsonl", "a.jsonl", "sub/c.jsonl"):
    (tmp_path / name).parent.mkdir(exist_ok=True)
    lines(tmp_path / name, [{"prompt": name}])
  (tmp_path / "README.md").write_text("notes")

  def prompts(name, **kw):
    return [(row["prompt"], row["part"]) for row in load(data(name, **kw), "prompt")]

  assert prompts(tmp_path) == [("a.jsonl", 0), ("b.jsonl", 0), ("sub/c.jsonl", 0)]
  assert prompts("*.jsonl", root=str(tmp_path)) == [("a.jsonl", 0), ("b.jsonl", 0)]
  assert prompts("**/c.*,b.jsonl", root=str(tmp_path)) == [("sub/c.jsonl", 0), ("b.jsonl", 1)]
  assert find_files("b.jsonl", str(tmp_path)) == [tmp_path / "b.jsonl"]


def test_a_byte_order_mark_and_blank_lines_are_no_mistakes(tmp_path, capsys):
  path = damaged(tmp_path / "a.jsonl", b'\xef\xbb\xbf{"prompt": "a"}\n\n{"prompt": "b"}')
  assert [row["where"] for row in load(data(path), "prompt")] == [f"{path}:1", f"{path}:3"]
  assert "2 rows read, 0 bad\n" in capsys.readouterr().out


def test_hub_names_read_the_files_of_their_split(tmp_path, monkeypatch):
  asked = []

  def snapshot(name, *, repo_type, allow_patterns):
    asked.append((name, repo_type))
    return str(tmp_path)

  monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot)
  for name in (
    "data/train-00000-of-00001.parquet",
    "data/train_prefs-00000.parquet",
    "data/test-00000.parquet",
  ):
    (tmp_path / name).parent.mkdir(exist_ok=True)
    parquet(tmp_path / name, [{"prompt": name}])
  (tmp_path / "helpful-base").mkdir()
  lines(tmp_path / "helpful-base/test.jsonl.gz", [{"prompt": "helpful"}])

  def prompts(name, **kw):
    return [row["prompt"] for row in load(data(name, **kw), "prompt")]

  assert prompts("hf:me/mine") == ["data/train-00000-of-00001.parquet"]
  assert prompts("hf:me/mine", split="train_prefs") == ["data/train_prefs-00000.parquet"]
  assert prompts("hf:me/mine/helpful-base", split="test") == ["helpful"]
  assert asked == [("me/mine", "dataset")] * 3
  with pytest.raises(DataError, match="hf:me/mine has no file of config.data.split = 'val' among"):
    prompts("hf:me/mine", split="val")

  def offline(*_, **__):
    raise OSError("no route to host")

  monkeypatch.setattr(huggingface_hub, "snapshot_download", offline)
  with pytest.raises(
    DataError, match="cannot be fetched .no route to host.; without a network give the folder"
  ):
    prompts("hf:me/mine")


def test_limits_count_tokens_and_say_why(capsys):
  section = data("x", max_prompt_length=5, max_response_length=4, max_chosen_length=3)
  reasons = [
    too_long(section, 5, (4, 2), 3),
    too_long(section, 6, (1,)),
    too_long(section, 1, (5,)),
    too_long(section, 9, (9,), 4),
    too_long(section, 1, (1,), 4),
  ]
  assert keep([{}] * 5, reasons, "reward") == [0]
  assert capsys.readouterr().out == (
    "data     1 of 5 rows for reward; 2 dropped: chosen over 3 tokens; 1 dropped: prompt over 5 "
    "tokens; "
    "1 dropped: response over 4 tokens\n"
  )
  section.max_chosen_length = 0
  assert too_long(section, 1, (1,), 400) is None
  with pytest.raises(
    DataError, match="no row of config.data.name is left for sft; 1 dropped: prompt over 5 tokens"
  ):
    keep([{}], [too_long(section, 6, ())], "sft")


@pytest.mark.parametrize(
  "field, value, message",
  [
    ("data.weights", (1.0,), "give one for each of 2 names"),
    ("data.weights", (0.0, 0.0), "not all of them 0"),
    ("data.weights", (1.0, -1.0), "numbers from 0 on"),
    ("data.buckets", (128, 0), "lengths in tokens from 2 on"),
    ("data.max_bad_share", 1.5, r"must lie in \[0, 1\]"),
    ("data.max_chosen_length", -1, "must be at least 0"),
    ("data.max_prompt_length", 0, "must be at least 1"),
    ("sft.budget", -1.0, "must be at least 0"),
    ("tokenizer.vocab_size", 200, "must be at least 300"),
    ("task", "scratch", "config.scratch.corpus is ''"),
  ],
)
def test_settings_that_cannot_work(field, value, message):
  config = default.get_config()
  config.data.name = "a.jsonl,b.jsonl"
  config.policy.path = config.reward.path = "models/mine"
  check_config(config)
  config.update_from_flattened_dict({field: value})
  with pytest.raises(
    ConfigError, match=f"{'' if field == 'task' else f'config.{field} is '}.*{message}"
  ):
    check_config(config)


@pytest.mark.parametrize("no, yes", [(False, True), (0, 1), (0.0, 1.0), ("false", "true")])
def test_a_label_of_kto_may_be_a_number_or_text(no, yes, tmp_path, capsys):
  rows = [{"prompt": "a", "completion": "good", "label": yes}] * 9
  path = lines(tmp_path / "kto.jsonl", [*rows, rows[0] | {"completion": "bad", "label": no}])
  found = load(data(path, max_bad_share=0.2), "response")
  assert [row["response"] for row in found] == ["good"] * 9
  assert f"1 undesirable, first {path}:10: label is {json.dumps(no)}" in capsys.readouterr().out
  assert len(load(data(path), "prompt")) == 10


def test_a_number_next_to_plain_text_is_a_class(tmp_path):
  path = lines(tmp_path / "classes.jsonl", [{"text": "bad film", "label": 0}])
  assert len(load(data(path), "text")) == 1
