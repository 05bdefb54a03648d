"""A second gold reward of the gold-reward task: right words, few others, in the order of the note.

It is of another kind than the built-in one (`r2m_jax/goldtask/task.py`), which counts words and does
not see their order. It was written after all settings had been chosen, and before its first run:
docs/lab.md, "A second gold reward".

  python -m r2m_jax.main --config=configs/holds.py:placebos \\
    --config.gold.formula=benchmarks/gold_second.py --workdir=runs/holds_second
"""

from r2m_jax.goldtask.task import FACTS, WORDS

ALL_FACTS = frozenset(WORDS[word] for word in FACTS)


def gold(prompt: str, response: str, ended: bool) -> float:
  """3 recall + 1.5 precision + order - 0.5 invented - not ended.

  recall: the share of the note's facts that are named. precision: the share of the response's words
  that name a fact of the note for the first time. order: the share of neighbours among these words
  that stand in the order of the note. invented: distinct facts that are not in the note.
  """
  place = {word: i for i, word in enumerate(prompt.split()) if word in ALL_FACTS}
  words = response.split()
  named = list(dict.fromkeys(word for word in words if word in place))
  in_order = [place[a] < place[b] for a, b in zip(named, named[1:])]
  recall = len(named) / max(1, len(place))
  precision = len(named) / max(1, len(words))
  order = sum(in_order) / max(1, len(in_order))
  invented = len(ALL_FACTS & set(words) - place.keys())
  return 3 * recall + 1.5 * precision + order - 0.5 * invented - (not ended)
