"""A judge that labels the pairs of the reward update. Oracles: the fake judge's rule, and a first
run.
"""

import shutil

import numpy as np
import pytest
import tiny_text
from judge_server import Server, completion, verdict
from test_folders import PROMPTS, folders, small  # noqa: F401  a fixture
from test_serve import config, read, write

from r2m_jax.algorithm.labels import pairs_at
from r2m_jax.config import ConfigError, check_config
from r2m_jax.data.datasets import judged_pairs, take_pairs
from r2m_jax.data.text import Renderer, load_tokenizer
from r2m_jax.judge.endpoint import JudgeError
from r2m_jax.tasks import folders as folders_task
from r2m_jax.tasks import labels
from r2m_jax.types import Sequences

ANSWERS = ["xx", "a", "", "xxx", "b", "xa", "c", "x"]  # four samples of each of two prompts


def labelled(url, **changes):
  settings = dict(
    policy__path="p",
    reward__path="r",
    variant="r2m",
    rollout__prompts=2,
    rollout__group_size=4,
    r2m__labels="preference",
    r2m__label_budget=0.75,
    r2m__judge_url=url,
    r2m__judge_model="judge-1",
    judge__backoff=0.01,
    judge__retries=0,
  )
  result = config(**(settings | changes))
  check_config(result)
  return result


def samples(tokenizer, prompts):
  """Sequences of the answers, as the policy would have sampled them."""
  rows = [tokenizer.render(prompt) for prompt in prompts for _ in range(4)]
  answers = [[*tokenizer.encode(text, special=False), tokenizer.end_id] for text in ANSWERS]
  T, P = max(map(len, answers)), max(map(len, rows))
  tokens, mask = np.zeros((8, P + T), np.int32), np.zeros((8, P + T), bool)
  for i, (row, answer) in enumerate(zip(rows, answers)):
    tokens[i, P - len(row) : P + len(answer)] = [*row, *answer]
    mask[i, P - len(row) : P + len(answer)] = True
  return Sequences(tokens, mask, mask[:, -T:], np.ones(8, bool))


def test_pairs_of_samples_are_ordered_by_the_judge(tmp_path):
  tiny_text.tokenizer("chatml", tmp_path)
  tokenizer = load_tokenizer(tmp_path)
  prompts = ["The cat", [{"role": "user", "content": "rain"}]]
  sequences = samples(tokenizer, prompts)
  with Server(lambda body, before: completion(verdict(body))) as server:
    cfg = labelled(server.url)
    label = labels.judge_labeller(cfg, tokenizer, Renderer(tokenizer), lambda t: prompts, tmp_path)
    found = [label(sequences, step) for step in range(4)]
    assert sum(server.asked.values()) == len(read(tmp_path / labels.LABEL_ANSWERS))
  decided = 0
  for step, pairs in enumerate(found):
    m = len(pairs.weight)
    assert m == 3 and pairs.tokens.shape == (6, sequences.tokens.shape[1])
    at = [next(i for i in range(8) if (sequences.tokens[i] == row).all()) for row in pairs.tokens]
    for winner, loser, weight in zip(at[:m], at[m:], pairs.weight):
      assert winner // 4 == loser // 4 and winner != loser  # two samples of one prompt
      mine, theirs = ANSWERS[winner].count("x"), ANSWERS[loser].count("x")
      # equal answers, shown in both orders, are a tie
      if weight:
        assert mine > theirs
      elif mine != theirs:
        assert sum(pairs.weight) < m and pairs_at(cfg, step) < m
      decided += weight
    for i, row, mask in zip(at, pairs.tokens, pairs.response_mask):
      assert row[mask].tolist() == [*tokenizer.encode(ANSWERS[i], special=False), tokenizer.end_id]
    for i, row, mask in zip(at, pairs.reward_tokens, pairs.reward_mask):
      want = Renderer(tokenizer).ids(prompts[i // 4], ANSWERS[i])
      assert row[mask].tolist() == want
  assert decided >= 6
  # the server is gone: known questions are answered from the file, and a new one ends the run
  again = labels.judge_labeller(cfg, tokenizer, Renderer(tokenizer), lambda t: prompts, tmp_path)
  for step, pairs in enumerate(found):
    for name in ("tokens", "reward_tokens", "weight"):
      np.testing.assert_array_equal(getattr(again(sequences, step), name), getattr(pairs, name))
  with pytest.raises(
    JudgeError, match="RL step 9: .*no answer.*the same command, which resumes|in a row"
  ):
    new = ["another prompt", "and another"]
    labels.judge_labeller(cfg, tokenizer, Renderer(tokenizer), lambda t: new, tmp_path)(
      sequences, 9
    )


def test_judgments_of_a_file_know_where_the_responses_begin(tmp_path):
  tiny_text.tokenizer("chatml", tmp_path)
  tokenizer = load_tokenizer(tmp_path)
  given = [("The cat", "sat", "ran on the mat"), ("rain", "xx", "a")]
  rows = [dict(zip(("prompt", "chosen", "rejected"), row)) for row in given]
  cfg = config(r2m__judgments=write(tmp_path / "judgments.jsonl", rows))
  arrays = judged_pairs(cfg, tokenizer, Renderer(tokenizer), tmp_path)
  pairs = take_pairs(arrays, np.array([1, 0]))
  answers = [given[i][side] for side in (1, 2) for i in (1, 0)]  # winners, then losers
  assert len(pairs["tokens"]) == len(answers)
  for answer, row, mask, real in zip(
    answers, pairs["tokens"], pairs["response_mask"], pairs["token_mask"]
  ):
    assert row[mask].tolist() == [*tokenizer.encode(answer, special=False), tokenizer.end_id]
    assert real[mask].all() and not mask[: int(real.argmax()) + 1].any()


@pytest.mark.parametrize(
  "changes, message",
  [
    (dict(r2m__judge_model=""), "config.r2m.judge_model is '': name the model"),
    (dict(r2m__labels="self"), "config.r2m.labels is 'self': use 'preference'"),
    (dict(policy__path="", reward__path=""), "config.r2m.judge_url is .*a judge reads text"),
    (dict(variant="warm_start"), "config.r2m.judgments is ''"),
  ],
)
def test_refusals(changes, message):
  with pytest.raises(ConfigError, match=message):
    labelled("http://127.0.0.1:9/v1", **changes)


@pytest.mark.long
def test_a_run_goes_on_without_its_judge(folders, tmp_path):  # noqa: F811  the fixture
  """Labels at each of three steps. A second run that only has the stored answers is equal bit for
  bit.
  """
  with Server(lambda body, before: completion(verdict(body))) as server:
    cfg = small(
      folders,
      tmp_path,
      data__name=write(tmp_path / "data.jsonl", [{"prompt": p} for p in PROMPTS]),
      variant="r2m",
      export__check=False,
      r2m__labels="preference",
      r2m__label_budget=1.0,
      r2m__judge_url=server.url,
      r2m__judge_model="judge-1",
      judge__retries=0,
    )
    folders_task.run(cfg, tmp_path / "one")
    asked = sum(server.asked.values())
  assert asked
  (tmp_path / "two").mkdir()
  shutil.copy(tmp_path / "one" / labels.LABEL_ANSWERS, tmp_path / "two")
  folders_task.run(cfg, tmp_path / "two")

  def rows(name):
    return [
      {key: value for key, value in row.items() if not key.startswith(("seconds", "time"))}
      for row in read(tmp_path / name / "metrics.jsonl")
    ]

  losses = [row["r2m/bt"] for row in rows("one")]
  assert losses == [row["r2m/bt"] for row in rows("two")] and len(losses) == 3
  with pytest.raises(JudgeError, match="the same command, which resumes"):
    folders_task.run(cfg, tmp_path / "three")
