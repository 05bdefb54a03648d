"""Files of judgments by people or another judge, used as verdicts or as votes for measuring
agreement.

A row names a prompt by `id` (or `question_id`) and `turn` (default 1), and the winner:

  winner       "candidate", "baseline" or "tie"; with `model_a` and `model_b` in the row, as MT-bench
               writes them, "model_a", "model_b" or a text that begins with "tie"
  preference   in its place: a number in [0, 1] for the candidate, null if there is none
"""

import collections
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from r2m_jax.data.jsonl import DataError, read_rows
from r2m_jax.judge import statistics
from r2m_jax.judge.items import Item
from r2m_jax.judge.results import findings, percent, write_result
from r2m_jax.judge.statistics import Agreement, Verdict
from r2m_jax.report.page import lead_section, table_section, write_page

NAMED = {"candidate": 1.0, "model_a": 1.0, "baseline": 0.0, "model_b": 0.0}


def preference_of(row: dict[str, Any], where: str) -> float | None:
  """The preference in a row for the candidate, or for model_a."""
  if "winner" in row:
    winner = row["winner"]
    if isinstance(winner, str) and winner.startswith("tie"):
      return 0.5
    if isinstance(winner, str) and winner in NAMED:
      return NAMED[winner]
    raise DataError(
      f"{where} has winner = {winner!r}; give 'candidate', 'baseline' or 'tie', or with model_a and "
      "model_b in the row 'model_a', 'model_b' or 'tie'"
    )
  value = row.get("preference", "missing")
  number = isinstance(value, (int, float)) and not isinstance(value, bool)
  if value is None or number and 0 <= value <= 1:
    return value
  raise DataError(f"{where} has {value!r}; give 'winner', or 'preference' in [0, 1]")


def weight_of(row: dict[str, Any], where: str) -> float:
  """The weight of a row, 1 if it has none."""
  value = row.get("weight", 1.0)
  number = isinstance(value, (int, float)) and not isinstance(value, bool)
  if number and 0 < value < math.inf:
    return float(value)
  raise DataError(f"{where} has weight = {value!r}; give a finite number above 0, or leave it out")


def read_votes(file: str) -> Iterator[tuple[str, dict[str, Any]]]:
  """(where, row) of a file of judgments, with `id` as text and `turn` from 0."""
  for number, row in enumerate(read_rows(file, ()), 1):
    where = f"{file}, row {number}"
    name = row.get("id", row.get("question_id"))
    turn = row.get("turn", 1)
    if name is None:
      raise DataError(f"{where} has {', '.join(row) or 'nothing'}; add 'id' or 'question_id'")
    if not isinstance(turn, int) or isinstance(turn, bool) or turn < 1:
      raise DataError(f"{where} has turn = {turn!r}; give a whole number from 1 on")
    yield where, row | {"id": str(name), "turn": turn - 1}


# ---- for the candidate and the baseline ----


def verdicts_of(file: str, items: list[Item]) -> list[Verdict]:
  """The judgments of a file on these items."""
  numbers = {item.id: number for number, item in enumerate(items)}
  verdicts: list[Verdict] = []
  repeats = collections.Counter[tuple]()
  for where, row in read_votes(file):
    if row["id"] not in numbers:
      raise DataError(
        f"{where} judges {row['id']!r}, which is not an id, question_id or uid of "
        "config.judge.candidate; leave it out, or give the file that was judged"
      )
    item = numbers[row["id"]]
    if row["turn"] >= len(items[item].questions):
      raise DataError(f"{where} judges turn {row['turn'] + 1}; {row['id']!r} has fewer; correct it")
    first = row.get("candidate_first")
    what = item, row["turn"], first
    repeat = row.get("repeat", repeats[what])
    repeats[what] += 1
    preference, weight = preference_of(row, where), weight_of(row, where)
    verdicts.append(Verdict(item, row["turn"], repeat, first, preference, weight))
  return verdicts


def against_items(file: str, items: list[Item], verdicts: list[Verdict]) -> Agreement:
  """The agreement of the votes in a file with the verdicts."""
  sums: dict[tuple[int, int], list[float]] = collections.defaultdict(list)
  for v in statistics.usable(verdicts):
    sums[v.item, v.turn].append(v.preference or 0.0)
  judged = {what: float(np.mean(values)) for what, values in sums.items()}
  cast = [
    ((v.item, v.turn), v.item, v.preference)
    for v in verdicts_of(file, items)
    if v.preference is not None
  ]
  return statistics.agreement(cast, judged)


# ---- for many pairs of models ----


def pair_votes(file: str) -> list[tuple[tuple, str, float]]:
  """(question, turn and pair of models; question; preference for the first model by name)."""
  found = []
  for where, row in read_votes(file):
    pair = row.get("model_a"), row.get("model_b")
    if not all(isinstance(name, str) and name for name in pair):
      raise DataError(
        f"{where} has no 'model_a' and 'model_b': add them, or give config.judge.candidate; the rows "
        "say who was compared if it is not given"
      )
    preference = preference_of(row, where)
    if preference is None:
      continue
    if pair[0] > pair[1]:
      pair, preference = pair[::-1], 1 - preference
    found.append(((row["id"], row["turn"], *pair), row["id"], preference))
  return found


def compare_files(judgments: str, votes: str, workdir: Path) -> None:
  """Win rates of each pair of models in a file of judgments, and its agreement with votes.

  Args:
    votes: another file of this form, such as people's votes; "": none.
  """
  rows = pair_votes(judgments)
  judged: dict[tuple, list[float]] = collections.defaultdict(list)
  for what, _, preference in rows:
    judged[what].append(preference)
  verdict = {what: float(np.mean(values)) for what, values in judged.items()}
  pairs: dict[str, Any] = {}
  for pair in sorted({what[2:] for what in verdict}):
    mine = {what: value for what, value in verdict.items() if what[2:] == pair}
    numbers = {name: i for i, name in enumerate(dict.fromkeys(what[0] for what in mine))}
    verdicts = [Verdict(numbers[what[0]], what[1], 0, None, value) for what, value in mine.items()]
    pairs[" against ".join(pair)] = statistics.win_rate(
      *statistics.by_prompt(verdicts, len(numbers))
    )
  result: dict[str, Any] = {"judgments": judgments, "votes": votes, "win_rates": pairs}
  for name, rate in pairs.items():
    print(f"result   {name}: win rate {percent(rate)} over {rate.count} questions")
  if votes:
    found = statistics.agreement(pair_votes(votes), verdict)
    result["agreement"] = found
    print(
      f"result   agreement with {votes}: {percent(found.with_ties)} of {found.votes} votes with "
      f"ties, {percent(found.without_ties)} of {found.decided} without"
    )
  write_result(workdir / "judge.json", result)
  write_pairs_page(workdir / "judge.html", result)
  print(f"wrote    {workdir / 'judge.json'} and {workdir / 'judge.html'}")


def write_pairs_page(path: Path, result: dict[str, Any]) -> None:
  """The page of `compare_files`."""
  rows = [[name, percent(rate), str(rate.count)] for name, rate in result["win_rates"].items()]
  table = {
    "title": "Pairs of models",
    "head": ["Pair", "Win rate of the first [95%]", "Questions"],
    "rows": rows,
    "note": "Ties count as half. 95% intervals by a bootstrap over questions.",
  }
  about = f"Judgments: {result['judgments']}. Votes: {result['votes'] or 'none'}."
  points = findings(result) or [f"{len(rows)} pairs of models were compared."]
  sections = [lead_section("Who wins", points), table_section(table)]
  write_page(path, title="Judged", heading="Judged models", about=about, sections=sections)
