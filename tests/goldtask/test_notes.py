"""The notes task: gold ranks hand-written replies as a person would, its counts equal those of a
second program, and held-out notes share nothing with training notes.
"""

import itertools
import re

import numpy as np
import pytest

from r2m_jax.goldtask import notes
from r2m_jax.goldtask.notes import gold_parts

PROMPT = (
  "Note: guest: Marta; food: plum; time: 7:15; town: Oslo; price: 34 euros.\n"
  "Write one or two sentences for a friend that use only these facts: guest, town and time."
)
# Thirty replies from the best to the worst: every reply of a later class is worse than all of an
# earlier one.
CLASSES = [
  [  # exactly what was requested
    "Marta is coming from Oslo at 7:15.",
    "Marta will be in Oslo. She arrives at 7:15!",
    "At 7:15 we meet Marta in Oslo.",
    "I'll see Marta at 7:15, and then we go to Oslo together.",
    "Good news: Marta lands in Oslo at 7:15.",
  ],
  [  # complete, with one flaw of style
    "Marta is coming from Oslo at 7:15",
    "- Marta is coming from Oslo at 7:15.",
    "Marta, Oslo, 7:15.",
    "Hello there. I hope that you are well. Marta is coming from Oslo at 7:15.",
  ],
  [  # complete, with one detail too many
    "Marta is coming from Oslo at 7:15 and brings a plum.",
    "Marta is coming from Oslo at 7:15 and it costs 34 euros.",
    "Marta and Jonas are coming from Oslo at 7:15.",
    "Marta is coming from Oslo at 7:15 and you can see her kite.",
  ],
  [  # one fact of three is missing
    "Marta is coming from Oslo this evening.",
    "We meet Marta at 7:15 as planned.",
    "It begins at 7:15 over in Oslo.",
    "Marta says that Oslo is lovely at this time of the year.",
  ],
  [  # two facts of three are missing, or one is missing and much is wrong
    "Marta is coming to see us.",
    "Marta is coming from Oslo and the plum costs 34 euros.",
    "We meet again over in Oslo.",
    "Marta is coming from Lisbon at 7:15 with Jonas.",
  ],
  [  # hardly anything is correct
    "I hope that you are well.",
    "Somebody is coming from Lisbon at 7:15.",
    "Jonas is coming from Oslo at 9:45.",
    "Dear friend, how are you? I am well. It is a nice day. See you.",
  ],
  [  # no reply at all
    "",
    "Jonas is coming from Lisbon at 9:45 with a mango.",
    "**Note** - time: 8:05; town: Lisbon; guest: Priya;",
    "so so so so so so so so so so so so so so so so so so so so so so",
    "The the the teal kite and the kite and the kite and the kite and",
  ],
]


def test_thirty_replies_in_the_order_of_a_person():
  assert sum(map(len, CLASSES)) == 30
  scores = [[gold_parts(PROMPT, reply).gold for reply in replies] for replies in CLASSES]
  for better, worse in itertools.pairwise(scores):
    assert min(better) > max(worse)
  assert scores[0] == [4.5] * 5


@pytest.mark.parametrize(
  "reply, part, count",
  [
    ("Marta is coming from Oslo at 7:15.", "coverage", 1.0),
    ("marta's train leaves OSLO at 7:15.", "coverage", 1.0),
    ("Martas and Oslos.", "coverage", 2 / 3),
    ("Marta is coming at 17:15 or 7:150.", "coverage", 1 / 3),
    ("Martano is coming.", "coverage", 0.0),
    ("Marta has two plums and pays 34 euros.", "distractors", 2),
    ("Marta has plumage.", "distractors", 0),
    ("Marta has 34 plums, plums and a plum.", "distractors", 2),
    ("Jonas and Jonas's otters are in Oslo.", "invented", 2),
    ("Marta goes to Atlantis on Monday.", "invented", 2),
    ("Atlantis is a place. Marta likes it.", "invented", 0),
    ('Marta said: "Oslo is nice." I agree, and I\'ll come.', "invented", 0),
    ("Marta pays 34 euros at 7:15, or 35 at 8:15.", "invented", 2),
    ("It is so and it is so and it is so.", "repeats", 5),
    ("Marta Oslo.", "outside", 3),
    ("word " * 25, "outside", 5),
    ("Marta came at 7:15. Oslo. Really... Yes!", "extra", 2),
    ("Marta came.", "extra", 0),
    ("- Marta\n* Oslo\n1. at 7:15", "marks", 3),
    ("guest: Marta, town: Oslo", "marks", 2),
    ("**Marta** is in `Oslo`", "marks", 4),
    ("Marta, Oslo, 7:15, 34 euros, plum.", "marks", 3),
    ("In Oslo, Marta eats.", "marks", 0),
    ('She said "Marta is coming."', "ended", True),
    ("Marta is coming", "ended", False),
    ("Marta is coming, ", "ended", False),
  ],
)
def test_what_is_counted(reply, part, count):
  assert getattr(gold_parts(PROMPT, reply), part) == pytest.approx(count)


def test_gold_is_the_sum_of_its_parts():
  """Recomputed from the parts, by a loop over finished and truncated demonstrations."""
  for row in notes.demonstrations(3, 0, 60):
    for truncated in (False, True):
      p = gold_parts(row["prompt"], row["response"], truncated)
      want = 4 * p.coverage - 0.8 * (p.distractors + p.invented) - 0.3 * p.repeats
      want += -0.15 * p.outside - 0.5 * p.extra - min(2, 0.4 * p.marks) + 0.5 * p.ended - truncated
      assert p.gold == pytest.approx(want) and not (p.ended and truncated)
  rows = [{"prompt": PROMPT, "response": reply} for replies in CLASSES for reply in replies]
  assert notes.gold(rows).tolist() == [gold_parts(r["prompt"], r["response"]).gold for r in rows]


def test_a_prompt_holds_its_note():
  """The text is split here, without the library's patterns."""
  for prompt in notes.prompts(0, 1, 200) + notes.prompts(0, 1, 200, notes.HELD_OUT):
    shown, instruction = prompt.split("\n")
    items = dict(item.split(": ") for item in shown[len("Note: ") : -1].split("; "))
    items = {key: value.removesuffix(" euros") for key, value in items.items()}
    asked = {key for key in items if key in re.findall(r"\w+", instruction)}
    note = notes.read_prompt(prompt)
    assert note.facts == {k: v for k, v in items.items() if k in asked}
    assert note.distractors == {k: v for k, v in items.items() if k not in asked}
    assert 3 <= len(note.facts) <= 6 and 1 <= len(note.distractors) and len(items) <= 7
    assert all(value in notes.LEXICONS[key] for key, value in items.items())
  with pytest.raises(ValueError, match="no prompt of the notes task: 'Hello'"):
    notes.read_prompt("Hello")


def test_no_two_values_of_a_held_out_note_are_in_one_training_note():
  def pairs(split, seeds):
    found = set()
    for seed in seeds:
      for prompt in notes.prompts(seed, 1, 1500, split):
        values = sorted(notes.read_prompt(prompt).values)
        found |= set(itertools.combinations(values, 2))
    return found

  train, held_out = pairs(notes.TRAIN, (0, 1)), pairs(notes.HELD_OUT, (0,))
  assert len(train) > 5000 and len(held_out) > 5000 and not train & held_out


def test_prompts_are_a_function_of_seed_and_stream():
  first = notes.prompts(0, 1, 50)
  assert first == notes.prompts(0, 1, 50) and len(set(first)) == 50
  assert first[:20] == notes.prompts(0, 1, 20)
  for other in (notes.prompts(1, 1, 50), notes.prompts(0, 2, 50)):
    assert not set(first) & set(other)
  used = {" ".join(prompt.split("\n")[1].split()[:2]) for prompt in notes.prompts(0, 1, 200)}
  assert len(used) == 6  # every wording of the instruction


def test_words_are_of_one_lexicon():
  """No value, and no plural of a value, is also another value or a word of an instruction."""
  words = [form for values in notes.LEXICONS.values() for v in values for form in notes.forms(v)]
  assert len(words) == len(set(words))
  spoken = " ".join([*notes.INSTRUCTIONS, *notes.FILLERS, *sum(notes.CLAUSES.values(), ())])
  assert not set(re.findall(r"\w+", spoken.lower())) & set(words)
  assert not set(re.findall(r"\w+", " ".join(notes.INSTRUCTIONS))) & set(notes.KEYS)
  assert min(map(len, notes.LEXICONS.values())) >= 3 * notes.GROUPS


def test_demonstrations_are_imperfect_and_end():
  rows = notes.demonstrations(0, 0, 400)
  assert rows == notes.demonstrations(0, 0, 400)
  gold = notes.gold(rows)
  ended = np.mean([gold_parts(r["prompt"], r["response"]).ended for r in rows])
  assert 2 < gold.mean() < 3.5 and gold.std() > 0.8 and 0.85 < ended < 0.95
