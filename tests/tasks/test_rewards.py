"""Rewards from outside: a server on loopback, a judge, a function. Oracles: the same reward model
in the run, scores by transformers, a whole run against an interrupted one, the server's counts.
"""

import json
import math
import shutil

import jax
import numpy as np
import pytest
import tiny_text
import transformers
from judge_server import Server, completion
from test_serve import config, read, their_scores, write

from r2m_jax.config import ConfigError, check_config
from r2m_jax.judge.endpoint import JudgeError
from r2m_jax.run import checkpoint
from r2m_jax.run.metrics import read_metrics, without_clock
from r2m_jax.tasks import export, folders, rewards

PROMPTS = [f"Please write about {thing}" for thing in "rain trees Paris cats".split()]


@pytest.fixture(scope="module")
def models(tmp_path_factory):
  """A policy (qwen2) and a reward model (pythia) that reads prompt + " " + response."""
  root = tmp_path_factory.mktemp("models")
  tiny_text.model("qwen2", "chatml", root / "policy")
  tiny_text.model("pythia", "plain", root / "reward", classifier=True)
  write(root / "prompts.jsonl", [{"prompt": p} for p in PROMPTS])
  return root


def settings(models, **changes):
  base = dict(
    task="r2m",
    policy__path=str(models / "policy"),
    data__name=str(models / "prompts.jsonl"),
    variant="vanilla",
    steps=3,
    rollout__prompts=4,
    rollout__group_size=2,
    rollout__max_new_tokens=6,
    log__samples=4,
    log__checkpoint_every=2,
    policy__lr=1e-2,
    sft__batch_size=4,
    reward__batch_size=4,
    reward__request_rows=3,
    judge__backoff=0.01,
    judge__retries=0,
    export__check=False,
  )
  result = config(**(base | changes))
  check_config(result)
  return result


def steps_of(workdir, stage="rl"):
  rows = [row for row in read_metrics(workdir) if row["stage"] == stage]
  return [without_clock(row) for row in rows]


def arrays(workdir, step):
  state = checkpoint.open_checkpoints(workdir / "checkpoints/vanilla").restore(step)
  keys = [jax.dtypes.issubdtype(x.dtype, jax.dtypes.prng_key) for x in jax.tree.leaves(state)]
  leaves = zip(jax.tree.leaves(state), keys)
  return [np.asarray(jax.random.key_data(x) if key else x).tobytes() for x, key in leaves]


def rule(prompts, responses):
  """More letters a, and a little for the prompt."""
  return [text.count("a") + 0.01 * len(prompt) for prompt, text in zip(prompts, responses)]


def by_rule(body, before):
  del before
  return {"scores": rule(body["prompts"], body["responses"])}


def test_a_served_model_trains_as_the_same_model_in_the_run(models, tmp_path):
  hf = transformers.AutoTokenizer.from_pretrained(models / "reward")
  model = transformers.AutoModelForSequenceClassification.from_pretrained(models / "reward")

  def theirs(body, before):
    del before
    texts = [f"{p} {r}" for p, r in zip(body["prompts"], body["responses"])]
    return {"scores": [float(s) for s in their_scores(model, [hf(t)["input_ids"] for t in texts])]}

  folders.run(settings(models, reward__path=str(models / "reward")), tmp_path / "inside")
  with Server(theirs) as server:
    folders.run(settings(models, reward__url=server.url), tmp_path / "outside")
    sizes = [len(json.loads(body)["responses"]) for body in server.asked]
    assert max(sizes) == 3 and set(server.asked.values()) == {1}
    assert "Authorization" not in server.headers[0]
  inside, outside = steps_of(tmp_path / "inside"), steps_of(tmp_path / "outside")
  assert len(outside) == 3
  for one, other in zip(inside, outside):
    for name in ("reward/used", "reward/frozen", "kl", "length", "policy/loss"):
      assert other[name] == pytest.approx(one[name], rel=1e-3, abs=1e-5), name


@pytest.mark.long
def test_a_broken_run_with_remax_asks_for_nothing_twice(models, tmp_path):
  """The server fails in the last step. The same command then ends like an uninterrupted run, and
  like one with the rule as a function.
  """
  cfg = settings(models, algorithm="remax")
  folders.run(cfg, tmp_path / "function", rewards=rule)
  failing = True

  def behave(body, before):
    late = failing and len(server.asked) > whole - 1
    return ("status", 500, {}, "down") if late else by_rule(body, before)

  with Server(by_rule) as server:
    served = settings(models, algorithm="remax", reward__url=server.url)
    folders.run(served, tmp_path / "whole")
    whole = len(server.asked)
    kept = read(tmp_path / "whole/reward_answers.jsonl")
    texts = {(p, r) for b in map(json.loads, server.asked) for p, r in zip(*b.values())}
    assert len(kept) == len(texts) and len({row["key"] for row in kept}) == len(kept)
  with Server(behave) as server:
    served = settings(models, algorithm="remax", reward__url=server.url, judge__workers=1)
    with pytest.raises(JudgeError, match="requests to the reward server .*the same command"):
      folders.run(served, tmp_path / "broken")
    assert len(steps_of(tmp_path / "broken")) == 2
    failing = False
    folders.run(served, tmp_path / "broken")
    bodies = [json.loads(body) for body, n in server.answered.items() for _ in range(n)]
    asked = [row for body in bodies for row in zip(body["prompts"], body["responses"])]
    assert len(asked) == len(set(asked)) == len(kept)
  (tmp_path / "alone").mkdir()  # without any server, only from stored answers
  shutil.copy(tmp_path / "whole/reward_answers.jsonl", tmp_path / "alone")
  folders.run(served, tmp_path / "alone")
  for name in ("broken", "alone", "function"):
    assert steps_of(tmp_path / name) == steps_of(tmp_path / "whole"), name
    assert arrays(tmp_path / name, 3) == arrays(tmp_path / "whole", 3), name
  out = tmp_path / "out"
  changes = dict(export__checkpoint=str(tmp_path / "whole"), export__check=False)
  export.run(config(export__out=str(out), **changes))
  weights = [path / "policy/model.safetensors" for path in (out, tmp_path / "whole/export")]
  assert weights[0].read_bytes() == weights[1].read_bytes() and not (out / "reward").exists()


def outside(tmp_path, url, **changes):
  cfg = config(reward__url=url, judge__retries=1, judge__backoff=0.01, **changes)
  return rewards.by_server(cfg, "reward", tmp_path)


ROWS = [("a prompt", "banana", False), ([{"role": "user", "content": "Who?"}], "x", True)]


@pytest.mark.parametrize(
  ("reply", "message"),
  [
    ({"scores": [1.0]}, "gave 1 scores for 2 responses; make it give one for each"),
    ({"scores": [1.0, math.nan]}, "gave the score nan to 'x'; make it give a finite"),
    ({"scores": [1.0, None]}, "gave the score None to 'x'"),
    ({"scores": [1.0, 1e39]}, "gave the score 1e.39 to 'x'"),  # infinite in float32
    ({"scores": [1.0, 10**400]}, "gave the score 10{400} to 'x'"),
    ({"scores": [1.0, "2"]}, "gave the score '2' to 'x'"),
    ({"rewards": [1.0, 2.0]}, '2 attempts failed, .*no {"scores": .*\'rewards\'|"rewards"'),
    (("status", 404, {}, "not here"), "config.reward.url leads to .*serves no scores .HTTP 404"),
    (("status", 401, {}, ""), "refuses the key in config.reward.key_env"),
  ],
)
def test_a_server_that_gives_no_scores(tmp_path, reply, message):
  with Server(lambda body, before: reply) as server:
    with pytest.raises(JudgeError, match=message):
      outside(tmp_path, server.url).scores(ROWS)


def test_each_row_is_asked_for_once(tmp_path, monkeypatch):
  monkeypatch.setenv("MY_SERVER", "topsecret0123456789key")
  twice = [*ROWS, ROWS[0]]
  with Server(lambda body, n: {"scores": [len(r) for r in body["responses"]]}) as server:
    url = server.url
    found = outside(tmp_path, url, reward__key_env="MY_SERVER").scores(twice)
    (asked,) = map(json.loads, server.asked)
    assert asked == {"prompts": ["a prompt", ROWS[1][0]], "responses": ["banana", "x"]}
    assert server.headers[0]["Authorization"] == "Bearer topsecret0123456789key"
  assert found.tolist() == [6, 1, 6] and found.dtype == np.float32
  assert outside(tmp_path, url).scores(ROWS).tolist() == [6, 1]  # the server is gone
  with pytest.raises(JudgeError, match="1 of 1 requests .*The answers are kept"):
    outside(tmp_path, url).scores([("a prompt", "new", False)])
  assert "topsecret" not in (tmp_path / "reward_answers.jsonl").read_text()


@pytest.mark.parametrize(
  ("function", "message"),
  [
    (lambda p, r: [1.0], r"gave scores of shape \(1,\) for 2 responses"),
    (lambda p, r: [1.0, math.inf], "gave the score inf to 'x'"),
    (lambda p, r: [1.0, None], "gave the score nan to 'x'"),
    (lambda p, r: [1.0, 1e39], "gave the score 1e.39 to 'x'"),
    (lambda p, r: ["a", "b"], "gave scores that are not numbers"),
  ],
)
def test_a_function_that_gives_no_scores(function, message):
  with pytest.raises(rewards.RewardError, match=f"the function '<lambda>' {message}"):
    rewards.by_function(function, config()).scores(ROWS)


def test_a_judge_rates_each_response(tmp_path):
  """A rating that cannot be parsed is requested again. Reasoning is removed if the config requires
  it.
  """
  ratings = {"banana": "[[7]]", "x": "Fine. [[2.5]]"}

  def judge(body, before):
    text = body["messages"][-1]["content"]
    assert "secret plan" not in text
    found = next(rating for answer, rating in ratings.items() if f"\n{answer}\n" in text)
    return completion("I cannot say" if before == 0 else found)

  rows = [(ROWS[0][0], "<think>secret plan</think>banana", False), ROWS[1]]
  with Server(judge) as server:
    changes = dict(reward__judge_model="judge-1", reward__strip_thinking=True)
    found = outside(tmp_path, f"{server.url}", **changes).scores(rows)
    assert set(server.asked.values()) == {2}
  assert found.tolist() == [7, 2.5]
  assert outside(tmp_path, "http://127.0.0.1:9", **changes).scores(rows).tolist() == [7, 2.5]


@pytest.mark.parametrize(
  ("changes", "message"),
  [
    (dict(variant="r2m"), "config.variant is 'r2m': 'r2m' reads the reward model's embedding"),
    (dict(variant="iterative_head"), "'iterative_head' reads .*use variant 'vanilla' or 'scaled'"),
    (dict(variant="", arms=("vanilla", "noise")), "config.arms is .*'noise' reads the reward"),
    (dict(algorithm="ppo"), "config.critic.init is 'reward': .*use 'policy'"),
    (dict(reward__path="r"), "config.reward.url is .*config.reward.path is given too"),
    (dict(policy__path=""), "config.policy.path is ''.*give a folder"),
    (dict(task="reward"), "config.reward.url is .*only task=r2m gets rewards from a server"),
    (dict(reward__url="", reward__judge_model="m"), "config.reward.judge_model is 'm': give the"),
    (dict(reward__url="ftp://x"), "config.reward.url is 'ftp://x': give an address"),
    (
      dict(eval__gold__url="http://h/v1"),
      "config.eval.every is 0: config.eval.gold.url is measured",
    ),
    (
      dict(eval__every=1, eval__gold__url="http://127.0.0.1:9/v1"),
      "config.eval.gold.url is .*that is the reward model that the run optimises",
    ),
  ],
)
def test_what_needs_a_reward_model_is_refused(models, changes, message):
  with pytest.raises(ConfigError, match=message):
    settings(models, **(dict(reward__url="http://127.0.0.1:9/v1") | changes))


def test_a_function_takes_the_place_of_a_reward_model(models, tmp_path):
  with pytest.raises(ConfigError, match="config.reward.path is .*is given a function"):
    cfg = settings(models, reward__path=str(models / "reward"))
    folders.run(cfg, tmp_path / "both", rewards=rule)
  with pytest.raises(ConfigError, match="config.variant is 'r2m'"):
    folders.run(settings(models, variant="r2m"), tmp_path / "r2m", rewards=rule)


@pytest.mark.long
def test_a_judge_as_gold_trains_nothing(models, tmp_path):
  """It rates the held-out samples. The steps equal those of a run without it, and an interrupted
  evaluation continues from the stored answers.
  """
  down = True

  def judge(body, before):
    text = body["messages"][-1]["content"]
    if down and len(server.answered) >= 3:
      return ("status", 503, {}, "")
    return completion(f"[[{1 + text.count('e') % 10}]]", usage=(100, 5))

  with Server(judge) as server:
    changes = dict(eval__every=2, eval__prompts=2, judge__prompt_price=1000.0, eval__batch_size=2)
    held = write(tmp_path / "held.jsonl", [{"prompt": p} for p in ("the sea", "a dog")])
    gold = dict(eval__gold__url=server.url, eval__gold__judge_model="judge-1", eval__data=held)
    cfg = settings(models, **changes, **gold)
    with pytest.raises(JudgeError, match="requests to the judge .*the same command"):
      folders.run(cfg, tmp_path / "judged", rewards=rule)
    down = False
    folders.run(cfg, tmp_path / "judged", rewards=rule)
    assert set(server.answered.values()) == {1}
    found = steps_of(tmp_path / "judged", "eval")
    assert [row["step"] for row in found] == [0, 2, 3]
    assert all(1 <= row["gold"] <= 10 for row in found)
    capped = settings(models, **changes, **gold, judge__max_cost=0.01)
    with pytest.raises(ConfigError, match="config.judge.max_cost is 0.01: the questions may cost"):
      folders.run(capped, tmp_path / "capped", rewards=rule)
  samples = read(tmp_path / "judged/eval_samples.jsonl")
  assert len(samples) == 6 and all(row["gold"] == int(row["gold"]) for row in samples)
  assert [row["frozen"] for row in samples] == pytest.approx(
    rule([row["prompt"] for row in samples], [row["response"] for row in samples])
  )
  folders.run(settings(models), tmp_path / "plain", rewards=rule)
  assert steps_of(tmp_path / "plain") == steps_of(tmp_path / "judged")
