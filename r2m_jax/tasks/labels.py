"""A judge as the labeller of the reward update: it compares a step's own samples between the two
programs of the step.

An answer is stored in WORKDIR/label_answers.jsonl before it is used. A run that resumes draws the
same samples, so it has the same questions and finds the answers there, without a network.
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from r2m_jax.algorithm.labels import Labeller, pairs_at, pairs_per_step
from r2m_jax.data.text import Renderer, Tokenizer, bucket, pad_left, responses_of
from r2m_jax.judge.endpoint import Cache, JudgeError, Question, question
from r2m_jax.judge.items import Item, shown
from r2m_jax.judge.templates import TEMPLATES, read_answer, request
from r2m_jax.ops import response_part
from r2m_jax.parallel import hosts
from r2m_jax.tasks.judge import ask_within_budget, body_of, endpoint_of
from r2m_jax.types import Pairs, Sequences

STREAM = 7  # stream of random numbers; the other labellers use 5
LABEL_ANSWERS = "label_answers.jsonl"


def judge_labeller(
  config,
  tokenizer: Tokenizer,
  renderer: Renderer,
  prompts_at: Callable[[int], Sequence[Any]],
  workdir: Path,
  row_length: int = 0,
) -> Labeller:
  """Builds `label(sequences, step) -> Pairs`: pairs of two random samples of one random prompt, as
  many as the budget allows, ordered by the judge at config.r2m.judge_url.

  A pair with a tie or an unreadable answer counts against the budget and has weight 0.

  Args:
    prompts_at: the prompts of a step, as in the rows.
    row_length: least length of the reward model's rows; see `RewardModel`.
  """
  K, most = config.rollout.group_size, pairs_per_step(config)
  ask = make_ask(config, workdir)

  def label(sequences: Sequences, step: int) -> Pairs:
    rng = np.random.default_rng([config.seed, STREAM, step])
    groups = rng.permutation(np.arange(most) % config.rollout.prompts)
    a, b = np.stack([g * K + rng.choice(K, 2, replace=False) for g in groups]).T
    prompts = prompts_at(step)
    texts = [
      (tokenizer.whole(prompts[i // K], text), cut)
      for i, (text, cut) in enumerate(responses_of(sequences, tokenizer))
    ]
    count = pairs_at(config, step)
    pairs = [
      (shown(prompts[g]), texts[i][0], texts[j][0])
      for g, i, j in zip(groups[:count], a[:count], b[:count])
    ]
    liked = np.full(most, 0.5)
    liked[:count] = hosts.on_first(lambda: ask(pairs, step))
    rows = np.where(liked >= 0.5, [a, b], [b, a]).reshape(-1)  # winners, then losers
    ids = [renderer.ids(prompts[i // K], texts[i][0], truncated=texts[i][1]) for i in rows.tolist()]
    length = max(bucket(max(map(len, ids))), row_length)
    tokens, mask = pad_left(ids, renderer.tokenizer.pad_id, length)
    mine = sequences.token_mask[rows]
    return Pairs(
      tokens=sequences.tokens[rows],
      token_mask=mine,
      response_mask=response_part(mine, sequences.response_mask.shape[1]),
      reward_tokens=tokens,
      reward_mask=mask,
      weight=(liked != 0.5).astype(np.float32),
    )

  return label


def make_ask(config, workdir: Path) -> Callable[[list[tuple[str, str, str]], int], list[float]]:
  """Builds `ask(pairs, step)`: the preference for the first answer of each (prompt, answer,
  answer).

  Raises:
    JudgeError: a question has no answer, in the cache or from the endpoint.
  """
  template = TEMPLATES[config.r2m.judge_template]
  endpoint = endpoint_of(config, config.r2m.judge_url)
  cache = Cache(workdir / LABEL_ANSWERS) if hosts.first() else None
  orders = (True, False) if config.judge.both_orders else (True,)

  def about(pair: tuple[str, str, str], straight: bool) -> Question:
    prompt, first, second = pair if straight else (pair[0], pair[2], pair[1])
    item = Item("", prompt, [prompt], [first], [second], [], "")
    messages = request(template, item, 0, [first], [second])
    # the address may change during the run, so it is not part of the question
    return question(body_of(config, template, messages, config.r2m.judge_model), "", 0)

  def ask(pairs: list[tuple[str, str, str]], step: int) -> list[float]:
    asked = [[(about(pair, order), order) for order in orders] for pair in pairs]
    every = [one for pair in asked for one, _ in pair]
    failed = ask_within_budget(config, endpoint, cache, every, shown=False)
    if failed:
      raise JudgeError(
        f"RL step {step}: {len(failed)} of {len(every)} questions to the judge have no answer "
        f"({next(iter(failed.values()))}); run the same command, which resumes from the last "
        "checkpoint and keeps the answers"
      )
    return [preference([(cache.answers[one.key], order) for one, order in pair]) for pair in asked]

  def preference(answers: list[tuple[dict, bool]]) -> float:
    """The mean over the orders; 0.5 if an answer is unreadable."""
    found = [(read_answer(template, answer), order) for answer, order in answers]
    if any(reading is None for reading, _ in found):
      return 0.5
    values = [reading.value if order else 1 - reading.value for reading, order in found]
    return float(np.mean(values))

  return ask
