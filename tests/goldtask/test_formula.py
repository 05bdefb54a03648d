"""A gold reward from a file: its values against a loop over words, refused files, and a run that
uses it.
"""

import json

import numpy as np
import pytest
import small

from r2m_jax.goldtask import formula, notes
from r2m_jax.goldtask import task as goldtask
from r2m_jax.tasks import gold

COUNTS = """
def gold(prompt, response, ended):
  said, asked = response.split(), prompt.split()
  return len(set(said) & set(asked)) - 0.25 * len(said) - 2.0 * (not ended)
"""


def written(tmp_path, text: str) -> str:
  path = tmp_path / "mine.py"
  path.write_text(text)
  return str(path)


def test_values_are_those_of_a_loop_over_words(tmp_path):
  count, length, rng = 40, 9, np.random.default_rng(0)
  prompts, ended = goldtask.prompts(0, 9, 0, count), rng.uniform(size=count) < 0.6
  responses, expected = [], []
  for note, ends in zip(prompts.tokens, ended):
    size = int(rng.integers(0 if ends else 1, length))
    words = rng.choice(np.concatenate([note[1:-1], np.arange(4, 64)]), size).tolist()
    responses.append(words + [goldtask.EOS] * int(ends))
    named = {word for word in words if word in note[1:-1]}
    expected.append(len(named) - 0.25 * size - 2.0 * (not ends))
  sequences = small.sequences_of(prompts, responses, length, ended)
  found, usual = goldtask.gold(sequences, written(tmp_path, COUNTS)), goldtask.gold(sequences)
  np.testing.assert_allclose(found.gold, expected, atol=1e-12)
  assert not np.allclose(found.gold, usual.gold)
  np.testing.assert_array_equal(found.coverage, usual.coverage)


def test_the_notes_task_reads_it_too(tmp_path):
  rows = [
    {"prompt": notes.prompts(0, 1, 1)[0], "response": "We meet at noon.", "truncated": False},
    {"prompt": notes.prompts(0, 1, 1)[0], "response": "We meet at", "truncated": True},
  ]
  path = written(tmp_path, "def gold(prompt, response, ended): return len(response) + 100 * ended")
  assert notes.gold(rows, path).tolist() == [116, 10]
  found, usual = notes.all_parts(rows, path), notes.all_parts(rows)
  assert [part.coverage for part in found] == [part.coverage for part in usual]


@pytest.mark.parametrize(
  "text, message",
  [
    ("def gold(prompt, response", "cannot be run .SyntaxError.*; give a Python file with def gold"),
    ("import sys; sys.exit(0)", "cannot be run .SystemExit"),
    ("def gold(prompt, response, ended): exit()", "raises SystemExit"),
    ("import no_such_module_at_all", "cannot be run .ModuleNotFoundError"),
    ("def reward(prompt, response, ended): return 1.0", "without `gold`; write def gold"),
    ("def gold(prompt, response): return 1.0", "raises TypeError.*; let it return a number"),
    ("def gold(prompt, response, ended): return 1 / 0", "raises ZeroDivisionError"),
    ("def gold(prompt, response, ended): return 'good'", "raises ValueError"),
    (
      "def gold(prompt, response, ended): return float('nan')",
      "is nan; let it return a finite number",
    ),
  ],
)
def test_a_file_without_a_gold_reward_is_refused(tmp_path, text, message):
  with pytest.raises(formula.FormulaError, match=f"config.gold.formula(?s:.*){message}"):
    formula.keep(written(tmp_path, text), tmp_path)
  assert not (tmp_path / formula.KEPT).exists()


def test_a_name_that_is_no_python_file_is_refused(tmp_path):
  for name, message in (
    ("gold.txt", "ends with .py"),
    ("absent.py", "cannot be run .FileNotFound"),
  ):
    with pytest.raises(formula.FormulaError, match=message):
      formula.keep(str(tmp_path / name), tmp_path)


def test_a_run_reads_it_and_refuses_another(tmp_path):
  """The formula depends only on whether a response ended, so its mean follows from the share of
  truncated responses.
  """
  text = "def gold(prompt, response, ended): return 7.0 if ended else 5.0"
  path = written(tmp_path, text)
  config = small.config(task="r2m", steps=2, gold__formula=path, arms=("r2m",), variant="")
  workdir = tmp_path / "run"
  gold.run(config, workdir)
  rows = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
  steps = [row for row in rows if row["stage"] == "rl"]
  assert len(steps) == 2
  for row in steps:
    assert row["reward/gold"] == pytest.approx(7 - 2 * row["truncated"], abs=1e-6)
  assert (workdir / formula.KEPT).read_text() == text
  written(tmp_path, text.replace("5.0", "6.0"))
  with pytest.raises(formula.FormulaError, match="has changed since the run began; restore it"):
    gold.run(config, workdir)
