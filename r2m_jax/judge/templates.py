"""The questions to a judge and the parsing of its answers: one template for each published
protocol.

The wording is ours. The protocols come from the publications: which texts are shown, in which
order, the scale, the labels, and the value of a label. Scores with the original prompts are
therefore close to these, but not equal.

  alpaca_eval       arXiv 2404.04475: two outputs under the labels m and M, one label as the answer
  mt_bench          arXiv 2306.05685: two assistants, an explanation, then [[A]], [[B]] or [[C]] (tie)
  mt_bench_single   the same paper: one assistant, an explanation, then a rating [[1]] to [[10]]
  arena_hard        arXiv 2406.11939, v2.0: the judge answers first, then one of five labels
  tldr              arXiv 2305.18290, 2009.01325: two summaries of a post, a comparison, then a label
"""

import hashlib
import math
import re
from typing import Any, NamedTuple

from r2m_jax.judge.items import Item

LOWEST = 1  # limits of a rating
HIGHEST = 10
STRONG = 3.0  # weight of Arena-Hard's "much better"
NEED_REFERENCE = ("math", "reasoning", "coding")  # categories of MT-bench with a reference answer
TOP = 20  # requested alternatives of a token; most endpoints allow no more


class Reading(NamedTuple):
  """The parsed answer of a judge."""

  value: float  # preference for the answer shown first, in [0, 1], or a rating
  weight: float = 1.0


class Template(NamedTuple):
  """The template of a protocol.

  Attributes:
    system: the judge's role.
    ask: the user's message. {question}, {first}, {second} and {reference} are filled in.
    labels: label -> Reading; empty for a rating.
    max_tokens: of the answer.
    bare: the answer is only the label, so that its log-probability is a preference.
    turns: whether the template supports a second turn.
  """

  name: str
  system: str
  ask: str
  labels: dict[str, Reading]
  max_tokens: int
  bare: bool = False
  turns: bool = False

  @property
  def rates(self) -> bool:
    """Whether one answer is rated, instead of two compared."""
    return not self.labels

  @property
  def sha256(self) -> str:
    return hashlib.sha256(f"{self.system}\n{self.ask}\n{SECOND_TURN}".encode()).hexdigest()


SECOND_TURN = (
  "The conversation has two turns. Judge the answer to the second question; the first turn is shown "
  "for its context."
)

THREE = {"A": Reading(1.0), "B": Reading(0.0), "C": Reading(0.5)}
FIVE = {
  "A>>B": Reading(1.0, STRONG),
  "A>B": Reading(1.0),
  "A=B": Reading(0.5),
  "B>A": Reading(0.0),
  "B>>A": Reading(0.0, STRONG),
}
FIVE |= {
  "A<<B": FIVE["B>>A"],
  "A<B": FIVE["B>A"],
  "B=A": FIVE["A=B"],
  "B<A": FIVE["A>B"],
  "B<<A": FIVE["A>>B"],
}

PAIR = """{note}{reference}[Question]
{question}
[End of the question]

[Answer of A]
{first}
[End of A's answer]

[Answer of B]
{second}
[End of B's answer]"""

TEMPLATES = {
  one.name: one
  for one in (
    Template(
      name="alpaca_eval",
      system=(
        "You compare the outputs of two language models and rank them as most people would. You "
        "reply with the label of the better output and with nothing else."
      ),
      ask=(
        "An instruction was given to two models, which are called m and M.\n\n"
        "<instruction>\n{question}\n</instruction>\n\n"
        "<output_m>\n{first}\n</output_m>\n\n<output_M>\n{second}\n</output_M>\n\n"
        "Which of the two outputs would people prefer for this instruction? Reply with one "
        "character: m or M."
      ),
      labels={"m": Reading(1.0), "M": Reading(0.0)},
      max_tokens=1,
      bare=True,
    ),
    Template(
      name="mt_bench",
      system=(
        "You are a fair referee between two AI assistants, A and B. Find out which of them serves "
        "the user better. Weigh how helpful, relevant, correct, thorough, creative and detailed "
        "the answers are. The order in which you see them, their length and the names of the "
        "assistants must not matter. First explain your comparison briefly. Then close with exactly "
        "one of these marks: [[A]] if A is better, [[B]] if B is better, [[C]] if they are equally "
        "good."
      ),
      ask=PAIR,
      labels=THREE,
      max_tokens=1024,
      turns=True,
    ),
    Template(
      name="mt_bench_single",
      system=(
        "You are a fair grader of an AI assistant's answers. Weigh how helpful, relevant, correct, "
        "thorough, creative and detailed the answer is. First explain your grade briefly. Then "
        "close with a whole number from 1 to 10 in double brackets, such as [[5]]; 10 is best."
      ),
      ask="{note}{reference}[Question]\n{question}\n[End of the question]\n\n"
      "[Answer]\n{first}\n[End of the answer]",
      labels={},
      max_tokens=1024,
      turns=True,
    ),
    Template(
      name="arena_hard",
      system=(
        "You judge the answers of two AI assistants, A and B, to a user's prompt. Begin with an "
        "answer of your own to the prompt. Then hold both answers against yours: point out and "
        "correct their mistakes, and weigh whether they are helpful, to the point, concise, and "
        "creative if that is called for, and what they leave out that the user should know. Close "
        "with exactly one of these verdicts: [[A>>B]] if A is much better, [[A>B]] if A is slightly "
        "better, [[A=B]] if they are about equal, [[B>A]] if B is slightly better, [[B>>A]] if B is "
        "much better."
      ),
      ask=PAIR,
      labels=FIVE,
      max_tokens=4096,
    ),
    Template(
      name="tldr",
      system=(
        "You compare two summaries, A and B, of a forum post. The better summary gives the most "
        "important points of the post, correctly and briefly, without unimportant or irrelevant "
        "details."
      ),
      ask=(
        "[Post]\n{question}\n[End of the post]\n\n[Summary A]\n{first}\n\n[Summary B]\n{second}\n\n"
        "Write one sentence that compares the summaries and tells which you prefer and why. On a "
        "new line write [[A]] or [[B]], for the summary you prefer."
      ),
      labels={label: THREE[label] for label in "AB"},
      max_tokens=256,
    ),
  )
}


def request(
  template: Template, item: Item, turn: int, first: list[str], second: list[str]
) -> list[dict[str, str]]:
  """The messages for one question to the judge.

  Args:
    turn: the turn that is judged, from 0; those before it are shown.
    first: the answers, by turn, of the side that is shown first.
    second: of the side that is shown second; empty if one answer is rated.
  """
  several = turn > 0
  fields = {
    "question": said(item.questions, [], turn) if several else item.questions[0],
    "first": said(item.questions, first, turn) if several else first[0],
    "note": f"{SECOND_TURN}\n\n" if several else "",
    "reference": reference(item, turn) if template.turns else "",
  }
  if second:
    fields["second"] = said(item.questions, second, turn) if several else second[0]
  return [
    {"role": "system", "content": template.system},
    {"role": "user", "content": template.ask.format(**fields)},
  ]


def said(questions: list[str], answers: list[str], turn: int) -> str:
  """The turns so far as text: only the questions, or each with its answer."""
  parts = []
  for t in range(turn + 1):
    parts.append(f"(turn {t + 1}) User: {questions[t]}" if turn else questions[t])
    if answers:
      parts.append(f"(turn {t + 1}) Assistant: {answers[t]}")
  return "\n\n".join(parts)


def reference(item: Item, turn: int) -> str:
  """The reference answers, for the categories that need one and the rows that have one."""
  if not item.reference or (item.group and item.group not in NEED_REFERENCE):
    return ""
  text = "\n\n".join(item.reference[: turn + 1])
  return f"[Reference answer]\n{text}\n[End of the reference answer]\n\n"


# ---- answers ----


def read_answer(template: Template, answer: dict[str, Any]) -> Reading | None:
  """The parsed answer, or None if it is unreadable without guessing."""
  if template.rates:
    return rating(answer["text"])
  if template.bare:
    found = label_probability(template, answer.get("first"))
    return found or template.labels.get(answer["text"].strip().strip("\"'`*.()[]:"))
  marks = set(re.findall(r"\[\[\s*([AB]\s*(?:>>|<<|[<>=])\s*[AB]|[ABC])\s*\]\]", answer["text"]))
  readings = {template.labels.get(re.sub(r"\s", "", mark)) for mark in marks}
  return readings.pop() if len(readings) == 1 else None  # two verdicts are no verdict


def rating(text: str) -> Reading | None:
  """A rating from `LOWEST` to `HIGHEST` in double brackets; None if there is none or several."""
  marks = {float(mark) for mark in re.findall(r"\[\[\s*(\d{1,3}(?:\.\d{1,3})?)\s*\]\]", text)}
  value = marks.pop() if len(marks) == 1 else math.nan
  return Reading(value) if LOWEST <= value <= HIGHEST else None


def label_probability(template: Template, tokens: list[dict[str, float]] | None) -> Reading | None:
  """The probability of the first label among both labels, at the first token that is not blank."""
  for place in tokens or []:
    masses = dict.fromkeys(template.labels, 0.0)
    for token, logprob in place.items():
      if token.strip() in masses:
        masses[token.strip()] += math.exp(min(logprob, 0.0))
    total = sum(masses.values())
    if total > 0:
      return Reading(sum(template.labels[label].value * m for label, m in masses.items()) / total)
    if any(token.strip() for token in place):
      return None
  return None
