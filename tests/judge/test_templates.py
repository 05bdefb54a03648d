"""The prompts for judges and the parsing of their answers, on cases written by hand."""

import math

import pytest

from r2m_jax.judge.items import Item, read_items
from r2m_jax.judge.templates import TEMPLATES, Reading, read_answer, request
from r2m_jax.knobs import PROTOCOLS

ITEM = Item("7", "Q?", ["Q1 {x}", "Q2"], ["a1", "a2"], ["b1", "b2"], ["r1", "r2"], "math")


def test_every_protocol_has_a_template():
  assert tuple(TEMPLATES) == PROTOCOLS


@pytest.mark.parametrize("name", PROTOCOLS)
def test_both_answers_are_shown_in_their_order(name):
  template = TEMPLATES[name]
  second = [] if template.rates else ["SECOND"]
  system, user = request(template, ITEM, 0, ["FIRST"], second)
  assert system["role"] == "system" and user["role"] == "user" and "{" not in system["content"]
  text = user["content"]
  assert "Q1 {x}" in text and "Q2" not in text and "FIRST" in text
  assert template.rates or text.index("FIRST") < text.index("SECOND")
  assert ("r1" in text) == template.turns and "r2" not in text


def test_a_second_turn_shows_the_first():
  _, user = request(TEMPLATES["mt_bench"], ITEM, 1, ITEM.candidate, ITEM.baseline)
  places = [
    user["content"].index(text) for text in ("r1", "r2", "Q1", "Q2", "a1", "a2", "b1", "b2")
  ]
  assert places == sorted(places) and "second question" in user["content"]
  other = ITEM._replace(group="writing")
  assert "r1" not in request(TEMPLATES["mt_bench"], other, 1, *other[3:5])[1]["content"]


CASES = [
  ("mt_bench", "A is better. [[A]]", Reading(1.0)),
  ("mt_bench", "so: [[ B ]]", Reading(0.0)),
  ("mt_bench", "equal [[C]], yes [[C]]", Reading(0.5)),
  ("mt_bench", "[[A]] or rather [[B]]", None),
  ("mt_bench", "A is better", None),
  ("mt_bench", "[A]", None),
  ("mt_bench", "", None),
  ("tldr", "[[C]]", None),
  ("tldr", "shorter and right\n[[B]]", Reading(0.0)),
  ("arena_hard", "my verdict is [[A>>B]]", Reading(1.0, 3.0)),
  ("arena_hard", "[[B>A]]", Reading(0.0, 1.0)),
  ("arena_hard", "[[B>>A]]", Reading(0.0, 3.0)),
  ("arena_hard", "[[A=B]] hence [[B=A]]", Reading(0.5)),
  ("arena_hard", "[[A<<B]]", Reading(0.0, 3.0)),
  ("arena_hard", "[[A>B]] ... [[A>>B]]", None),
  ("arena_hard", "[[A]]", None),
  ("mt_bench_single", "Rating: [[7]]", Reading(7.0)),
  ("mt_bench_single", "[[10]]", Reading(10.0)),
  ("mt_bench_single", "[[7.5]] / 10", Reading(7.5)),
  ("mt_bench_single", "[[11]]", None),
  ("mt_bench_single", "[[0]]", None),
  ("mt_bench_single", "7", None),
  ("mt_bench_single", "[[3]] then [[4]]", None),
  ("alpaca_eval", "m", Reading(1.0)),
  ("alpaca_eval", ' "M".', Reading(0.0)),
  ("alpaca_eval", "Model m", None),
]


@pytest.mark.parametrize("name, text, want", CASES)
def test_answers_are_read_and_never_guessed(name, text, want):
  assert read_answer(TEMPLATES[name], {"text": text, "first": None}) == want


def test_log_probabilities_of_the_label():
  template = TEMPLATES["alpaca_eval"]

  def read(*places, text="?"):
    return read_answer(template, {"text": text, "first": list(places)})

  found = read({"m": math.log(0.3), " m": math.log(0.1), "M": math.log(0.2), "x": -0.1})
  assert found.value == pytest.approx(0.4 / 0.6)
  assert read({"\n": -0.01}, {"M": math.log(0.9), "m": math.log(0.1)}).value == pytest.approx(0.1)
  assert read({"Neither": -0.1}, {"m": -0.1}) is None  # the answer does not begin with a label
  assert read({"x": -0.1}, text="M") == Reading(0.0)  # the letter counts in this case
  assert read({"m": 0.0}).value == 1.0


def write(path, *lines):
  path.write_text("".join(f"{line}\n" for line in lines))
  return str(path)


def test_items_are_matched_by_prompt(tmp_path):
  mine = write(
    tmp_path / "mine.jsonl",
    '{"prompt": "p", "text": "1", "id": "x"}',
    '{"prompt": [{"role": "user", "content": "q"}], "text": "2", "category": "c"}',
    '{"prompt": "p", "text": "3", "id": "x"}',
  )
  theirs = write(
    tmp_path / "theirs.jsonl",
    '{"prompt": [{"role": "user", "content": "q"}], "text": "B"}',
    '{"prompt": "p", "text": "A"}',
    '{"prompt": "p", "text": "C"}',
  )
  items = read_items(mine, "text", theirs, "text")
  assert [(i.id, i.candidate, i.baseline) for i in items] == [
    ("x", ["1"], ["A"]),
    ("2", ["2"], ["B"]),
    ("x#2", ["3"], ["C"]),
  ]
  assert items[1].questions == ["q"] and items[1].group == "c"
  with pytest.raises(ValueError, match=r"no answer to the prompt of .*, row 3: 'p'"):
    read_items(
      mine, "text", write(tmp_path / "few.jsonl", *open(theirs).read().splitlines()[:2]), "text"
    )
  with pytest.raises(ValueError, match="answers 1 prompts that"):
    read_items(
      write(tmp_path / "few.jsonl", *open(mine).read().splitlines()[:2]), "text", theirs, "text"
    )
  with pytest.raises(ValueError, match="needs 'reference' as text"):
    read_items(mine, "text", "", "reference")


def test_conversations(tmp_path):
  row = '{"prompt": "q1", "turns": ["q1", "q2"], "answers": ["%s1", "%s2"], "text": "%s2"}'
  mine = write(tmp_path / "mine.jsonl", row % (("a",) * 3))
  theirs = write(tmp_path / "theirs.jsonl", row % (("b",) * 3))
  (item,) = read_items(mine, "text", theirs, "text")
  assert item.questions == ["q1", "q2"]
  assert (item.candidate, item.baseline) == (["a1", "a2"], ["b1", "b2"])
  (alone,) = read_items(mine, "text", "", "")
  assert alone.baseline == [] and alone.reference == []
  bad = write(tmp_path / "bad.jsonl", (row % (("b",) * 3)).replace('"b1", ', ""))
  with pytest.raises(ValueError, match="row 1: 'answers' must hold a text for each of 'turns'"):
    read_items(mine, "text", bad, "text")
