"""Scores from outside: a server that scores rows in batches, or a judge that rates them one by one.

A served reward model takes a POST of {"prompts": [...], "responses": [...]} and answers with
{"scores": [...]}, one number for each row. A prompt is text or a list of messages, as in the row of
the data. A judge is an OpenAI-compatible endpoint that rates each response.
"""

import hashlib
import json
from collections.abc import Sequence
from typing import Any

from r2m_jax.judge.endpoint import (
  Again,
  Cache,
  Endpoint,
  JudgeError,
  Question,
  ask_all,
)
from r2m_jax.judge.templates import Template, read_answer

SHOWN = 200  # characters of an answer shown in a message
LARGEST = 3.4028234663852886e38  # of float32, in which a score is used


class Rater(Endpoint):
  """A chat endpoint whose answers must contain a rating; if one does not, the question is sent
  again.

  Args:
    template: one that rates.
  """

  def __init__(self, url: str, key: str, template: Template, **how):
    super().__init__(url, key, **how)
    self.template = template

  def answer(self, reply: Any, body: dict[str, Any], *, last: bool) -> dict[str, Any]:
    answer = super().answer(reply, body, last=last)
    if read_answer(self.template, answer) is None:
      raise Again(f"no rating in {answer['text'][:SHOWN]!r}")
    return answer


class ScoreServer(Endpoint):
  """A served reward model; see the module's docstring."""

  what = "reward server"
  malformed = 'no {"scores": [...]}'
  advice = 'make it take {"prompts": [...], "responses": [...]}'

  @staticmethod
  def address(url: str) -> str:
    return url

  def answer(self, reply: Any, body: dict[str, Any], *, last: bool) -> dict[str, Any]:
    """{"scores": as many finite numbers as the request has rows}.

    Raises:
      JudgeError: the number of scores is wrong, or one is not a finite number.
    """
    scores, count = list(reply["scores"]), len(body["responses"])
    if len(scores) != count:
      raise JudgeError(
        f"the reward server at {self.url} gave {len(scores)} scores for {count} responses; "
        "make it give one for each, in their order"
      )
    for score, response in zip(scores, body["responses"]):
      if not is_score(score):
        raise JudgeError(
          f"the reward server at {self.url} gave the score {score!r} to {response[:SHOWN]!r}; "
          "make it give a finite number for each response"
        )
    return {"scores": [float(score) for score in scores]}

  def not_found(self, reason: str) -> JudgeError:
    return JudgeError(
      f"config.{self._named[0]} leads to {self.url}, which serves no scores ({reason}); correct it"
    )


def is_score(value: Any) -> bool:
  """Whether a value of JSON is a finite number, in float32 too."""
  number = isinstance(value, int | float) and not isinstance(value, bool)
  return number and -LARGEST <= value <= LARGEST


def name_of(prompt: Any, response: str) -> str:
  """The key of a row in the cache, which identifies everything that its score depends on."""
  return hashlib.sha256(json.dumps([prompt, response], sort_keys=True).encode()).hexdigest()


def served_scores(
  server: ScoreServer,
  cache: Cache,
  prompts: Sequence[Any],
  responses: Sequence[str],
  *,
  rows: int,
  workers: int,
) -> list[float]:
  """The score of each row, from the cache or from the server. Each row is requested once.

  Args:
    rows: maximum rows in a request.
    workers: maximum simultaneous requests.

  Raises:
    JudgeError: a row has no score. The received scores are in the cache.
  """
  names = [name_of(*row) for row in zip(prompts, responses)]
  missing = list({name: i for i, name in enumerate(names) if name not in cache.answers}.values())
  requests, rows_of = [], {}
  for first in range(0, len(missing), rows):
    part = missing[first : first + rows]
    body = {"prompts": [prompts[i] for i in part], "responses": [responses[i] for i in part]}
    key = names[part[0]]  # a row is in one request
    rows_of[key] = [names[i] for i in part]
    requests.append(Question(key, body))

  def keep(key: str, answer: dict[str, Any]) -> None:
    scores = zip(rows_of[key], answer["scores"])
    cache.keep_all({name: {"score": score} for name, score in scores})

  failed = ask_all(server, requests, cache, workers=workers, keep=keep)
  require_all(failed, len(requests), server)
  return [cache.answers[name]["score"] for name in names]


def require_all(failed: dict[str, str], count: int, server: Endpoint) -> None:
  """Raises JudgeError if a request has no answer. failed: the reason, by its key."""
  if failed:
    raise JudgeError(
      f"{len(failed)} of {count} requests to the {server.what} at {server.url} have no answer "
      f"({next(iter(failed.values()))}). The answers are kept; run the same command, which "
      "resumes from the last checkpoint"
    )
