"""The files of other evaluators: their fields, on rows written by hand."""

import json

import pytest

from r2m_jax.data.jsonl import DataError
from r2m_jax.judge.formats import check_form, markdown, write_answers

ROW = {
  "prompt": [{"role": "user", "content": "Q1"}],
  "turns": ["Q1", "Q2"],
  "question_id": 81,
  "answers": ["a1", "a2"],
  "text": "a2",
  "tokens": [1, 2, 3],
}


def test_alpaca_eval(tmp_path):
  rows = [{"prompt": "Do", "text": "Done", "tokens": [1], "dataset": "koala"}]
  file = write_answers(str(tmp_path / "out.json"), rows, "alpaca_eval", "mine")
  want = {"instruction": "Do", "output": "Done", "generator": "mine", "dataset": "koala"}
  assert json.loads(file.read_text()) == [want]


def test_mt_bench(tmp_path):
  file = write_answers(str(tmp_path / "out.jsonl"), [ROW], "mt_bench", "mine")
  row = json.loads(file.read_text())
  assert row["choices"] == [{"index": 0, "turns": ["a1", "a2"]}] and row["question_id"] == 81
  assert row["model_id"] == "mine" and row["tstamp"] > 1e9 and len(row["answer_id"]) == 22
  assert set(row) == {"question_id", "answer_id", "model_id", "choices", "tstamp"}


def test_arena_hard(tmp_path):
  text = "# Title\n**bold** and\n```\n# no\n- no\n```\n1. one\n- two\n* three\n## Sub\n__b__"
  rows = [{"prompt": "Q", "uid": "u1", "text": text, "tokens": [5] * 40}]
  row = json.loads(write_answers(str(tmp_path / "o"), rows, "arena_hard", "mine").read_text())
  assert row["messages"] == [
    {"role": "user", "content": "Q"},
    {"role": "assistant", "content": {"answer": text}},
  ]
  assert set(row) == {"uid", "ans_id", "model", "messages", "tstamp", "metadata"}
  heads = {f"h{n}": 0 for n in range(1, 7)} | {"h1": 1, "h2": 1}
  assert row["metadata"] == {
    "token_len": 40,
    "header_count": heads,
    "list_count": {"ordered": 1, "unordered": 2},
    "bold_count": {"**": 1, "__": 1},
  }
  assert markdown("```\n# open block")["header_count"]["h1"] == 0


def test_rows_that_a_form_cannot_name():
  check_form([ROW], "rows", 1)
  check_form([ROW], "mt_bench", 1)
  with pytest.raises(DataError, match="format is 'arena_hard', and row 1 .* has no 'uid'"):
    check_form([ROW], "arena_hard", 1)
  with pytest.raises(DataError, match="'alpaca_eval', which has one turn; row 1"):
    check_form([ROW], "alpaca_eval", 1)
  with pytest.raises(DataError, match="one answer a prompt; set config.generate.n = 1"):
    check_form([ROW], "mt_bench", 2)
