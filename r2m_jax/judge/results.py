"""The result of a judgment: its numbers as JSON, and a page of them in the style of every report."""

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from r2m_jax.judge import statistics
from r2m_jax.judge.items import Item, shown
from r2m_jax.judge.statistics import Verdict
from r2m_jax.report.intervals import Interval
from r2m_jax.report.page import lead_section, settings_section, table_section, write_page
from r2m_jax.run.files import write_atomic

SAMPLES = 40  # prompts shown on the page
CHARS = 4000  # characters of a text on the page
FEW_GROUPS = 40  # with more groups there is no table


class Scores(NamedTuple):
  """Ratings, or scores of a reward model.   f64[P, T] each, NaN if there is none."""

  candidate: np.ndarray
  baseline: np.ndarray | None


class Unread(NamedTuple):
  """Questions without a usable answer."""

  unanswered: int  # without an answer; the same command asks them again
  unparsed: int  # with an unreadable answer, which is kept and counted


def lengths(answers: Sequence[list[str]]) -> np.ndarray:
  """Characters of each conversation's answers, f64[P]."""
  return np.array([sum(map(len, turns)) for turns in answers], float)


def numbers(
  items: list[Item], verdicts: list[Verdict], scores: Scores | None, unread: Unread
) -> dict[str, Any]:
  """All reported numbers, as Intervals."""
  mine = lengths([item.candidate for item in items])
  result: dict[str, Any] = {
    "prompts": len(items),
    "unanswered": unread.unanswered,
    "unparsed": unread.unparsed,
    "mean_length": {"candidate": float(mine.mean())},
  }
  if verdicts:
    theirs = lengths([item.baseline for item in items])
    result["mean_length"]["baseline"] = float(theirs.mean())
    result |= comparison(items, verdicts, mine, theirs)
  if scores is not None:
    result["scores"] = scored(scores)
  return result


def comparison(
  items: list[Item], verdicts: list[Verdict], mine: np.ndarray, theirs: np.ndarray
) -> dict[str, Any]:
  """The comparison of two sets of answers with lengths f64[P] each, from the verdicts."""
  used = statistics.usable(verdicts)
  won, weight = statistics.by_prompt(used, len(items))
  judged = weight > 0
  preference = won[judged] / weight[judged]
  difference = (mine - theirs)[judged]
  chosen = statistics.buckets(mine, theirs)
  groups = dict.fromkeys(item.group for item in items if item.group)
  member = np.array([item.group for item in items])

  def rate(mask):
    return statistics.win_rate(won[mask], weight[mask])

  return {
    "judged": int(judged.sum()),
    "left_out": len(verdicts) - len(used),
    "win_rate": rate(np.ones(len(items), bool)),
    **statistics.outcomes(used),
    "length_controlled": statistics.length_controlled(preference, difference),
    "separable_by_length": statistics.separable(preference, difference),
    "same_lengths": bool(len(difference) and np.ptp(difference) == 0),
    "by_length": {name: rate(mask) for name, mask in chosen.items()},
    "by_group": {name: rate(member == name) for name in groups},
    "by_turn": by_turn(used, len(items)),
    "position_consistency": statistics.position_consistency(used),
    "first_shown": statistics.first_shown(used),
    "repeat_agreement": statistics.repeat_agreement(used),
  }


def by_turn(verdicts: list[Verdict], count: int) -> dict[str, Interval]:
  """The win rate of each turn, if there are several."""
  turns = sorted({v.turn for v in verdicts})
  return {
    str(turn + 1): statistics.win_rate(
      *statistics.by_prompt([v for v in verdicts if v.turn == turn], count)
    )
    for turn in (turns if len(turns) > 1 else ())
  }


def scored(scores: Scores) -> dict[str, Interval]:
  """Mean scores, and their difference by prompt."""
  mine, theirs = scores
  result = {"candidate": statistics.ratings(mine, np.isfinite(mine))}
  if theirs is not None:
    both = np.isfinite(mine) & np.isfinite(theirs)
    turns = np.maximum(both.sum(1), 1)
    gap = np.where(both, mine - theirs, 0.0).sum(1) / turns
    result["baseline"] = statistics.ratings(theirs, np.isfinite(theirs))
    result["difference"] = statistics.mean_difference(
      np.where(both.any(1), gap, np.nan), np.zeros(len(gap))
    )
  return result


def plain(value: Any) -> Any:
  """A result as JSON values: an Interval as an object, non-finite numbers as null."""
  if isinstance(value, tuple) and hasattr(value, "_asdict"):
    return plain(value._asdict())
  if isinstance(value, dict):
    return {name: plain(one) for name, one in value.items()}
  if isinstance(value, (list, tuple)):
    return [plain(one) for one in value]
  if isinstance(value, float):
    return value if math.isfinite(value) else None
  return value


def write_result(path: Path, result: dict[str, Any]) -> None:
  text = json.dumps(plain(result), indent=1, ensure_ascii=False, allow_nan=False)
  write_atomic(path, text + "\n")


# ---- text ----


def percent(found: Interval) -> str:
  """62.5% [55.1, 69.4]."""
  if not math.isfinite(found.value):
    return "–"
  ends = f" [{100 * found.low:.1f}, {100 * found.high:.1f}]" if math.isfinite(found.low) else ""
  return f"{100 * found.value:.1f}%{ends}"


def decimal(found: Interval) -> str:
  if not math.isfinite(found.value):
    return "–"
  ends = f" [{found.low:.2f}, {found.high:.2f}]" if math.isfinite(found.low) else ""
  return f"{found.value:.2f}{ends}"


def findings(result: dict[str, Any]) -> list[str]:
  """The findings of the result, as sentences."""
  points = []
  if "win_rate" in result:
    rate = result["win_rate"]
    points.append(
      f"Win rate of the candidate {percent(rate)} over {rate.count} prompts: {result['wins']} won, "
      f"{result['ties']} tied, {result['losses']} lost."
    )
    points.append(
      f"Length-controlled win rate {percent(result['length_controlled'])}. Mean length of an answer: "
      f"{result['mean_length']['candidate']:.0f} characters, of the baseline's "
      f"{result['mean_length']['baseline']:.0f}."
    )
  if "scores" in result:
    points += [f"Mean score, {name}: {decimal(one)}." for name, one in result["scores"].items()]
  if "agreement" in result:
    one = result["agreement"]
    points.append(
      f"Agreement with the votes: {percent(one.with_ties)} of {one.votes} with ties, "
      f"{percent(one.without_ties)} of the {one.decided} if neither is a tie."
    )
  return points


def cautions(result: dict[str, Any]) -> list[str]:
  """Reasons to read the result with care, as sentences."""
  care = []
  if result.get("unanswered"):
    care.append(
      f"{result['unanswered']} questions have no answer from the judge and are left out. The same "
      "command asks them again."
    )
  if result.get("unparsed"):
    care.append(
      f"{result['unparsed']} answers of the judge are unreadable; they are kept in the cache "
      f"and left out, {result.get('left_out', 0)} verdicts with their other orders."
    )
  rate = result.get("win_rate")
  if rate is not None and math.isfinite(rate.low) and rate.low <= 0.5 <= rate.high:
    care.append("The interval of the win rate contains 50%, so there is no clear winner.")
  if result.get("same_lengths"):
    care.append("All differences in length are equal, so length cannot be controlled for.")
  elif result.get("separable_by_length") and result.get("judged"):
    care.append(
      "Length by itself separates wins from losses, or there are only wins or only losses. The "
      "length-controlled win rate then mostly reflects its ridge penalty."
    )
  consistency = result.get("position_consistency")
  if consistency is not None and consistency.value < 0.7:
    care.append(
      f"The judge names the same winner in both orders in {percent(consistency)} of the pairs."
    )
  return care


# ---- the page ----


def tables(result: dict[str, Any]) -> list[dict]:
  """The tables of the page."""
  if "win_rate" not in result:
    return []
  names = {
    "win_rate": "Win rate, ties as half",
    "length_controlled": "Length-controlled win rate",
    "position_consistency": "Same winner in both orders",
    "first_shown": "Preference for the answer shown first",
    "repeat_agreement": "Same winner in repeats",
  }
  rows = [
    [name, percent(result[key]), str(result[key].count)]
    for key, name in names.items()
    if result[key].count
  ]
  note = "95% intervals by a bootstrap over prompts."
  found = [{"title": "Results", "head": ["", "Value [95%]", "Prompts"], "rows": rows, "note": note}]
  parts = (
    ("by_length", "By length of the answer", "Length against the baseline's"),
    ("by_turn", "By turn", "Turn"),
    ("by_group", "By category", "Category"),
  )
  for key, title, head in parts:
    part = {name: one for name, one in result[key].items() if one.count}
    if 0 < len(part) <= FEW_GROUPS:
      rows = [[name, percent(one), str(one.count)] for name, one in part.items()]
      found.append(
        {"title": title, "head": [head, "Win rate [95%]", "Prompts"], "rows": rows, "note": ""}
      )
  return found


def write_judge_page(
  path: Path,
  about: dict[str, Any],
  result: dict[str, Any],
  items: list[Item],
  preference: dict[int, float],
) -> None:
  """Writes the page of a judgment; `preference` is by index of the prompt."""
  sections = [lead_section("Who wins", findings(result), cautions(result))]
  sections += [table_section(one) for one in tables(result)]
  sections.append(samples_section(items, preference))
  sections.append(settings_section(about))
  judge = about["judge"]
  line = f"Judge: {judge['name']}, {about['date']}. Template: {judge['template'] or 'none'}."
  write_page(path, title="Judged", heading="Judged answers", about=line, sections=sections)


def samples_section(items: list[Item], preference: dict[int, float]) -> dict[str, Any]:
  """The first prompts with both answers and the preference for each."""
  blocks = []
  for number, item in enumerate(items[:SAMPLES]):
    value = preference.get(number)
    sides = [("candidate", item.candidate, value)]
    if item.baseline:
      sides.append(("baseline", item.baseline, None if value is None else 1 - value))
    rows = [
      {
        "arm": None,
        "when": name,
        "response": cut("\n\n".join(answers)),
        "scores": {"preference": "–" if liked is None else f"{liked:.2f}"},
        "tokens": f"{sum(map(len, answers))}",
      }
      for name, answers, liked in sides
    ]
    asked = item.questions if len(item.questions) > 1 else [shown(item.prompt)]
    blocks.append({"text": cut("\n\n".join(asked)), "rows": rows})
  return {
    "kind": "samples",
    "title": "Answers",
    "unit": "characters",
    "prompts": blocks,
    "of": len(items),
    "scores": ["preference"],
    "arms": [],
  }


def cut(text: str) -> str:
  more = f" … ({len(text) - CHARS} more characters)" if len(text) > CHARS else ""
  return text[:CHARS] + more
