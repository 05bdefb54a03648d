"""Rewards from outside the program: a served reward model, a judge, or a function of texts.

They are computed between the two programs of a step. A server's scores are stored in a file of the
workdir before they are used. A run that resumes draws the same samples, so it requests nothing
twice, and needs no network for earlier requests.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from r2m_jax.data import thinking
from r2m_jax.data.text import Prompt
from r2m_jax.judge.endpoint import Cache, Question, key_from, question
from r2m_jax.judge.items import Item, shown
from r2m_jax.judge.scores import Rater, ScoreServer, require_all, served_scores
from r2m_jax.judge.templates import TEMPLATES, read_answer, request
from r2m_jax.parallel import hosts
from r2m_jax.parallel.errors import UserError
from r2m_jax.tasks.judge import ask_within_budget, body_of, patience_of, warn_of_plain_http

# (prompts as in the rows of the data, responses) -> a score for each
Function = Callable[[Sequence[Prompt], Sequence[str]], Sequence[float]]

TEMPLATE = "mt_bench_single"  # template with which a judge rates
SHOWN = 200  # characters of a response shown in a message


class RewardError(UserError, RuntimeError):
  """A reward from outside is not a finite number for each response."""

  status = 1


@dataclasses.dataclass(frozen=True)
class OutsideReward:
  """A reward that is computed outside this program.

  function: called only in the first process.
  name: its displayed name.
  strip_thinking: remove reasoning from the responses that it reads.
  """

  function: Function
  name: str
  strip_thinking: bool = False

  def scores(self, rows: Sequence[tuple[Prompt, str, bool]]) -> np.ndarray:
    """f32[N] for rows (prompt, response, whether it was cut off), the same in every process.

    Raises:
      RewardError: a score is missing or not finite.
    """
    prompts = [prompt for prompt, _, _ in rows]
    texts = [self.read(text) for _, text, _ in rows]
    found = hosts.on_first(lambda: finite(self.function(prompts, texts), texts, self.name))
    return np.asarray(found, np.float32)

  def read(self, response: str) -> str:
    """The response in the form in which it is scored."""
    return (thinking.without_reasoning if self.strip_thinking else thinking.opened)(response)

  def describe(self, prompt: Prompt, response: str, truncated: bool = False) -> str:
    """One row in the form in which it is scored, for the user to check."""
    del truncated
    return f"rewards  {self.name}\nsample   {prompt!r} -> {self.read(response)!r}"


def finite(scores: Sequence[float], responses: Sequence[str], name: str) -> list[float]:
  """The scores as numbers.

  Raises:
    RewardError: there is not one finite number for each response.
  """
  try:
    found = np.asarray(scores, np.float64)
  except (TypeError, ValueError) as error:
    raise RewardError(
      f"{name} gave scores that are not numbers ({error}); make it give one number for each "
      "response"
    ) from None
  if found.shape != (len(responses),):
    raise RewardError(
      f"{name} gave scores of shape {found.shape} for {len(responses)} responses; make it give one "
      "number for each"
    )
  wrong = np.flatnonzero(~(np.abs(found) <= np.finfo(np.float32).max))
  if wrong.size:
    first = int(wrong[0])
    raise RewardError(
      f"{name} gave the score {found[first]} to {responses[first][:SHOWN]!r}; make it give a finite "
      "number for each response"
    )
  return found.tolist()


def by_function(function: Function, config) -> OutsideReward:
  """The reward of a run with a function as its reward."""
  name = f"the function {getattr(function, '__name__', type(function).__name__)!r}"
  return OutsideReward(function, name, config.reward.strip_thinking)


def by_server(config, section: str, workdir: Path) -> OutsideReward:
  """The reward at config.SECTION.url. section: "reward" or "eval.gold"."""
  settings = config.reward if section == "reward" else config.eval.gold
  path = workdir / f"{section.rpartition('.')[2]}_answers.jsonl"
  cache = functools.cache(lambda: Cache(path))  # opened by the first process, when it is needed
  make = judge_of if settings.judge_model else server_of
  function = make(config, settings, section, cache)
  return OutsideReward(function, f"config.{section}.url", config.reward.strip_thinking)


def server_of(config, settings, section: str, cache: Callable[[], Cache]) -> Function:
  """The scores of a served reward model."""
  key, named = key_of(config, settings, section)
  server = ScoreServer(settings.url, key, named=named, **patience_of(config))
  warn_of_plain_http(server.url, key)
  how = dict(rows=settings.request_rows, workers=config.judge.workers)
  return lambda prompts, responses: served_scores(server, cache(), prompts, responses, **how)


def judge_of(config, settings, section: str, cache: Callable[[], Cache]) -> Function:
  """The ratings of a judge, from 1 to 10."""
  template = TEMPLATES[TEMPLATE]
  key, named = key_of(config, settings, section)
  judge = Rater(settings.url, key, template, named=named, **patience_of(config))
  warn_of_plain_http(judge.url, key)

  def about(prompt: Prompt, response: str) -> Question:
    item = Item("", prompt, [shown(prompt)], [response], [], [], "")
    messages = request(template, item, 0, [response], [])
    # the address may change during the run, so it is not part of the question
    return question(body_of(config, template, messages, settings.judge_model), "", 0)

  def ratings(prompts: Sequence[Prompt], responses: Sequence[str]) -> list[float]:
    asked = [about(*row) for row in zip(prompts, responses)]
    failed = ask_within_budget(config, judge, cache(), asked, shown=False)
    require_all(failed, len({one.key for one in asked}), judge)
    readings = [read_answer(template, cache().answers[one.key]) for one in asked]
    return [reading.value for reading in readings if reading is not None]

  return ratings


def key_of(config, settings, section: str) -> tuple[str, tuple[str, str, str]]:
  """The key for a server, and the fields with its address, its model and its key."""
  field, variable = f"{section}.key_env", settings.key_env
  if settings.judge_model and not variable:
    field, variable = "judge.key_env", config.judge.key_env
  return key_from(variable, field), (f"{section}.url", f"{section}.judge_model", field)
