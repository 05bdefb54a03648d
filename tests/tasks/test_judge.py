"""`task=judge` from end to end. Oracles: the fake judge's rule, and numbers worked by hand."""

import json
import math
import os
import pathlib
import shutil
import signal
import subprocess
import sys
import time

import pytest
import tiny_text
from judge_server import Server, completion, verdict

from configs import default, evaluate
from r2m_jax.config import ConfigError, check_config
from r2m_jax.data.jsonl import DataError
from r2m_jax.data.text import TextError
from r2m_jax.judge.endpoint import JudgeError
from r2m_jax.tasks import judge, serve

ROOT = pathlib.Path(__file__).parents[2]
KEY = "topsecret0123456789key"


def config(**overrides):
  result = default.get_config()
  result.task = "judge"
  result.judge.backoff = 0.01
  result.update_from_flattened_dict(
    {name.replace("__", "."): value for name, value in overrides.items()}
  )
  check_config(result)
  return result


def write(path, rows):
  path.write_text("".join(json.dumps(row) + "\n" for row in rows))
  return str(path)


def read(path):
  return [json.loads(line) for line in pathlib.Path(path).read_text().splitlines()]


def pairs(tmp_path, count=12):
  """Files of answers: the candidate has more x's in even rows, the baseline in odd rows."""
  prompts = [f"question {i}" for i in range(count)]
  mine = [{"prompt": p, "text": "x" * (i % 2 == 0) + "abc"} for i, p in enumerate(prompts)]
  theirs = [{"prompt": p, "text": "x" * (i % 2) + "abcdef"} for i, p in enumerate(prompts)]
  return {
    "judge__candidate": write(tmp_path / "mine.jsonl", mine),
    "judge__baseline": write(tmp_path / "theirs.jsonl", theirs[::-1]),
  }


def result_of(workdir):
  return json.loads((workdir / "judge.json").read_text())


def test_an_endpoint_judges_and_a_rerun_asks_nothing(tmp_path, monkeypatch, capsys):
  monkeypatch.setenv("OPENAI_API_KEY", KEY)
  with Server(lambda body, before: completion(verdict(body))) as server:
    cfg = config(judge__url=server.url, judge__model="judge-1", judge__repeats=2, **pairs(tmp_path))
    judge.run(cfg, tmp_path / "work")
    assert sum(server.answered.values()) == 48  # 12 prompts, in both orders, twice
    # each request is made once for each repeat
    assert set(server.answered.values()) == {2}
    judge.run(cfg, tmp_path / "work")
    assert sum(server.asked.values()) == 48
  saved = result_of(tmp_path / "work")
  found = saved["result"]
  assert found["win_rate"]["value"] == 0.5 and found["win_rate"]["count"] == 12
  assert (found["wins"], found["ties"], found["losses"]) == (6, 0, 6)
  assert found["position_consistency"]["value"] == found["repeat_agreement"]["value"] == 1
  assert found["first_shown"]["value"] == 0.5 and found["unparsed"] == 0
  assert saved["judge"]["name"] == "judge-1" and saved["judge"]["template"] == "alpaca_eval"
  assert "{first}" in saved["judge"]["ask"] and len(saved["date"]) == 19
  page = (tmp_path / "work/judge.html").read_text()
  assert (
    "Win rate of the candidate 50.0%" in page and "question 3" in page and "http-equiv" not in page
  )
  assert len(read(tmp_path / "work/judgments.jsonl")) == 48
  for file in (tmp_path / "work").rglob("*"):
    assert file.is_dir() or KEY.encode() not in file.read_bytes(), file
  shown = "".join(capsys.readouterr())
  assert KEY not in shown
  assert "step" not in shown and "compiling" not in shown  # of the line of progress
  # its verdicts can be used as a file of judgments
  again = config(judge__judgments=str(tmp_path / "work/judgments.jsonl"), **pairs(tmp_path))
  judge.run(again, tmp_path / "again")
  other = result_of(tmp_path / "again")["result"]
  for name in ("win_rate", "length_controlled", "position_consistency", "repeat_agreement"):
    assert other[name] == found[name], name


def test_what_cannot_be_read_is_counted_and_kept(tmp_path):
  def behave(body, before):
    text = body["messages"][-1]["content"]
    if "question 3\n" in text and "<output_m>\nx" in text:
      return completion("I like both \ud83d")  # a cut within an emoji
    if "question 4\n" in text:
      return ("status", 400, {}, "filtered")
    return completion(verdict(body))

  with Server(behave) as server:
    cfg = config(judge__url=server.url, judge__model="j", judge__workers=1, **pairs(tmp_path))
    with pytest.raises(
      JudgeError, match="2 questions have no answer; the result covers the others"
    ):
      judge.run(cfg, tmp_path / "work")
    found = result_of(tmp_path / "work")["result"]
    assert (found["unanswered"], found["unparsed"], found["judged"]) == (2, 1, 10)
    assert found["win_rate"]["value"] == 0.5  # 5 even rows against 5 odd ones
    assert "I like both ?" in [row["answer"] for row in read(tmp_path / "work/judgments.jsonl")]
    server.behave = lambda body, before: completion(verdict(body))
    asked = sum(server.asked.values())
    judge.run(cfg, tmp_path / "work")
    assert sum(server.asked.values()) == asked + 2  # stored answers are not requested again
  found = result_of(tmp_path / "work")["result"]
  assert (found["unanswered"], found["unparsed"], found["judged"]) == (0, 1, 11)


def test_a_judge_of_whom_nothing_can_be_read_is_no_result(tmp_path, capsys):
  with Server(lambda body, before: completion("I cannot choose")) as server:
    cfg = config(judge__url=server.url, judge__model="j", **pairs(tmp_path, 2))
    with pytest.raises(JudgeError, match="none of the 4 answers could be read.*judge.template"):
      judge.run(cfg, tmp_path / "work")
  assert len(read(tmp_path / "work/judgments.jsonl")) == 4
  assert "Length by itself" not in capsys.readouterr().out


def test_cost_is_capped_before_and_during(tmp_path):
  priced = dict(judge__prompt_price=1000.0, judge__completion_price=1000.0)
  with Server(lambda body, before: completion(verdict(body), usage=(900, 100))) as server:
    both = pairs(tmp_path)
    cfg = config(judge__url=server.url, judge__model="j", judge__max_cost=0.5, **priced, **both)
    with pytest.raises(ConfigError, match=r"max_cost is 0.5: the questions may cost \$\d"):
      judge.run(cfg, tmp_path / "work")
    assert not server.asked
    # more expensive than estimated: 1000 tokens, $1 each
    cfg = config(
      judge__url=server.url,
      judge__model="j",
      judge__max_cost=9.5,
      judge__workers=1,
      **priced,
      **both,
    )
    with pytest.raises(JudgeError, match=r"have cost \$10.00, over config.judge.max_cost = 9.5"):
      judge.run(cfg, tmp_path / "work")
    assert 10 <= sum(server.asked.values()) <= 11
    kept = len(read(tmp_path / "work/answers.jsonl"))
    cfg = config(judge__url=server.url, judge__model="j", **both)
    judge.run(cfg, tmp_path / "work")
    assert sum(server.answered.values()) == 24 and kept >= 10


def test_ratings(tmp_path):
  """MT-bench's single-answer grades of two turns: the mean of the judge's grades."""
  rows = [
    {"prompt": "a", "turns": ["a", "b"], "answers": [f"{one}1", f"{one}2"], "text": f"{one}2"}
    for one in ("p", "q")
  ]
  grades = {"p1": 8, "p2": 5, "q1": 9, "q2": 10}

  def behave(body, before):
    text = body["messages"][-1]["content"]
    last = max(grades, key=lambda name: text.rfind(name))
    return completion(f"fine [[{grades[last]}]]")

  with Server(behave) as server:
    cfg = config(
      judge__url=server.url,
      judge__model="j",
      judge__template="mt_bench_single",
      judge__candidate=write(tmp_path / "one.jsonl", rows[:1]),
      judge__baseline=write(tmp_path / "two.jsonl", rows[1:]),
    )
    judge.run(cfg, tmp_path / "work")
  found = result_of(tmp_path / "work")["result"]
  assert (
    found["scores"]["candidate"]["value"] == 6.5 and found["scores"]["baseline"]["value"] == 9.5
  )
  assert found["scores"]["difference"]["value"] == -3 and found["losses"] == 2
  assert list(found["by_turn"]) == ["1", "2"]


def test_votes_of_people_against_a_judge(tmp_path, capsys):
  """MT-bench's format, with the models in either order. Agreement is worked by hand."""
  row = {"question_id": 81, "model_a": "one", "model_b": "two", "turn": 1}
  judged = [
    row | {"winner": "model_a"},
    row | {"turn": 2, "winner": "tie (inconsistent)"},
    row | {"question_id": 82, "model_a": "two", "model_b": "one", "winner": "model_a"},
  ]
  cast = [
    row | {"winner": "model_a", "judge": "e1"},  # agrees
    row | {"model_a": "two", "model_b": "one", "winner": "model_a", "judge": "e2"},  # does not
    row | {"turn": 2, "winner": "tie"},  # agrees, a tie
    row | {"question_id": 82, "winner": "model_b"},  # agrees
    row | {"question_id": 83, "winner": "model_b"},  # was not judged
  ]
  cfg = config(
    judge__judgments=write(tmp_path / "judge.jsonl", judged),
    judge__votes=write(tmp_path / "people.jsonl", cast),
  )
  judge.run(cfg, tmp_path / "work")
  found = result_of(tmp_path / "work")
  assert found["agreement"]["with_ties"]["value"] == 3 / 4 and found["agreement"]["votes"] == 4
  assert found["agreement"]["without_ties"]["value"] == 2 / 3 and found["agreement"]["decided"] == 3
  # question 81: a win and a tie; 82: a loss
  assert found["win_rates"]["one against two"]["value"] == 1.5 / 3
  assert "75.0%" in capsys.readouterr().out
  page = (tmp_path / "work/judge.html").read_text()
  assert "one against two" in page and "75.0%" in page
  bad = config(judge__judgments=write(tmp_path / "bad.jsonl", [row | {"winner": "one"}]))
  with pytest.raises(DataError, match=r"bad.jsonl, row 1 has winner = 'one'; give 'candidate'"):
    judge.run(bad, tmp_path / "bad")


@pytest.mark.parametrize(
  "row, message",
  [
    ({"winner": ["candidate"]}, r"row 1 has winner = \['candidate'\]; give 'candidate'"),
    ({"winner": "tie", "weight": "2"}, "row 1 has weight = '2'; give a finite number above 0"),
    ({"winner": "tie", "weight": math.nan}, "row 1 has weight = nan"),
    ({"winner": "tie", "weight": -1.0}, "row 1 has weight = -1.0"),
  ],
)
def test_odd_judgments_are_refused(row, message, tmp_path):
  judged = write(tmp_path / "judged.jsonl", [{"id": 1} | row])
  with pytest.raises(DataError, match=message):
    judge.run(config(judge__judgments=judged, **pairs(tmp_path)), tmp_path / "work")


def test_a_prompt_that_is_no_messages_is_refused(tmp_path):
  files = pairs(tmp_path) | {"judge__judgments": write(tmp_path / "j.jsonl", [])}
  files["judge__candidate"] = write(tmp_path / "mine.jsonl", [{"prompt": ["a"], "text": "b"}])
  with pytest.raises(TextError, match="mine.jsonl, row 1: a prompt is text or a list of"):
    judge.run(config(**files), tmp_path / "work")


@pytest.mark.parametrize(
  "changes, message",
  [
    ({}, "config.judge.url is '': give one judge"),
    (dict(judge__url="http://h/v1", judge__reward="r"), "config.judge.reward is 'r': give one"),
    (dict(judge__url="localhost:8000"), "config.judge.url is 'localhost:8000': give an address"),
    (dict(judge__url="http://h/v1"), "config.judge.model is '': name the model"),
    (dict(judge__reward="r"), "config.policy.path is '': give the answers as config.judge"),
    (dict(judge__reward="r", judge__candidate="c", judge__max_cost=1.0), "a cap needs prices"),
    (dict(judge__reward="r", judge__body="[1]"), "config.judge.body is '\\[1\\]': give a JSON"),
    (dict(judge__reward="r", judge__template="gpt"), "choose one of 'alpaca_eval', 'mt_bench'"),
    (dict(judge__url="http://u:p4ss@h/v1"), "looks like it holds a token"),
  ],
)
def test_refusals(changes, message):
  with pytest.raises(ConfigError, match=message):
    config(**changes)


@pytest.mark.parametrize("name", evaluate.EVALUATIONS)
def test_the_papers_evaluations(name):
  cfg = evaluate.get_config(name)
  with pytest.raises(ConfigError, match="give one judge"):
    check_config(cfg)
  cfg.judge.url, cfg.judge.model = "http://127.0.0.1:9/v1", "judge-1"
  cfg.policy.path, cfg.generate.input = "p", "in.jsonl"
  check_config(cfg)
  assert (
    cfg.task == "judge"
    and judge.baseline_of(cfg)
    == {
      "alpaca_eval": "reference",
      "mt_bench": "",
      "tldr": "completion",
    }[name]
  )
  with pytest.raises(ValueError, match="'gpt' is unknown; use one of alpaca_eval, mt_bench, tldr"):
    evaluate.get_config("gpt")


def test_a_killed_run_goes_on(tmp_path):
  """SIGKILL in the middle of a run by the command line, with a server in another process."""
  env = os.environ | {"OPENAI_API_KEY": KEY, "PYTHONPATH": str(ROOT)}
  server = subprocess.Popen(
    [sys.executable, str(ROOT / "tests/support/judge_server.py"), "0.15"],
    stdin=subprocess.PIPE,
    stdout=subprocess.PIPE,
    text=True,
  )
  files = pairs(tmp_path, 20)
  command = [
    *(sys.executable, "-m", "r2m_jax.main", "--config=configs/default.py"),
    *(f"--workdir={tmp_path / 'work'}", "--config.task=judge", "--config.judge.model=judge-1"),
    *(f"--config.{name.replace('__', '.')}={value}" for name, value in files.items()),
    *(f"--config.judge.url={server.stdout.readline().strip()}", "--config.judge.workers=2"),
  ]
  answers = tmp_path / "work/answers.jsonl"
  first = subprocess.Popen(command, cwd=ROOT, env=env, stdout=subprocess.DEVNULL)
  end = time.monotonic() + 60
  while time.monotonic() < end and (
    not answers.exists() or len(answers.read_bytes().split(b"\n")) < 7
  ):
    time.sleep(0.02)
  first.send_signal(signal.SIGKILL)
  first.wait()
  before = answers.read_bytes().count(b"\n")
  assert 6 <= before < 40
  done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)
  assert done.returncode == 0, done.stderr
  counts = json.loads(server.communicate("\n")[0])
  # of 40 questions only the two in progress at the kill may have been answered twice
  assert len(counts) == 40 and sum(counts) <= 42
  assert result_of(tmp_path / "work")["result"]["judged"] == 20
  assert f"{40 - before} of 40 questions will be sent" in done.stdout
  for file in (tmp_path / "work").rglob("*"):
    assert file.is_dir() or KEY.encode() not in file.read_bytes(), file
  assert KEY not in done.stdout + done.stderr


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
  """A policy, and a reward model of its family."""
  folder = tmp_path_factory.mktemp("models")
  tiny_text.model("qwen2", "chatml", folder / "policy", vocab_size=330)
  tiny_text.model("qwen2", "chatml", folder / "reward", classifier=True, seed=1)
  return folder


def test_a_reward_model_judges_what_a_policy_answers(folders, tmp_path, capsys):
  """One command compares the policy's answers with references, by scores. Oracle: `task=score`."""
  prompts = [{"prompt": "The cat", "reference": "sat"}, {"prompt": "rain", "reference": "and sea"}]
  shutil.copytree(folders / "policy", tmp_path / "policy")
  cfg = config(
    policy__path=str(tmp_path / "policy"),
    reward__path=str(folders / "reward"),
    generate__input=write(tmp_path / "in.jsonl", prompts),
    generate__max_new_tokens=4,
    judge__reward=str(folders / "reward"),
  )
  judge.run(cfg, tmp_path / "work")
  made = read(tmp_path / "work/candidate.jsonl")
  assert "may share its errors" in capsys.readouterr().err
  found = read(tmp_path / "work/judgments.jsonl")
  cfg.task = "score"
  for field, name in (("text", "candidate_score"), ("reference", "baseline_score")):
    rows = [{"prompt": row["prompt"], "response": row[field]} for row in made]
    if field == "text":  # a truncated answer is rendered without an end
      rows = [row | {"truncated": one["truncated"]} for row, one in zip(rows, made)]
    cfg.score.input = write(tmp_path / "score.jsonl", rows)
    cfg.score.output = str(tmp_path / "scored.jsonl")
    serve.run(cfg)
    want = [row["score"] for row in read(cfg.score.output)]
    # other batches, so float32 sums have another order
    assert [row[name] for row in found] == pytest.approx(want, abs=1e-5)
  for row in found:
    assert row["preference"] == float(row["candidate_score"] > row["baseline_score"])
  cfg.task = "judge"
  cfg.generate.temperature = 0.0
  with pytest.raises(ConfigError, match="was generated with other settings .temperature."):
    judge.run(cfg, tmp_path / "work")
  cfg.generate.temperature = default.get_config().generate.temperature
  assert judge.generated(cfg, tmp_path / "work") == str(tmp_path / "work/candidate.jsonl")
  assert "were generated before" in capsys.readouterr().out
  (tmp_path / "policy/model.safetensors").write_bytes(b"trained further")
  with pytest.raises(ConfigError, match="with other settings .content of policy.path."):
    judge.generated(cfg, tmp_path / "work")
  write(tmp_path / "in.jsonl", prompts[:1])
  with pytest.raises(ConfigError, match="content of generate.input, content of policy.path"):
    judge.generated(cfg, tmp_path / "work")
