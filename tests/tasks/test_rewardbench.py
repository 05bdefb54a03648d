"""`task=rewardbench` from end to end. Oracle: `task=score` on the same completions."""

import json
import pathlib

import tiny_text

from configs import default
from r2m_jax.config import check_config
from r2m_jax.tasks import rewardbench, serve


def write(path, rows):
  path.write_text("".join(json.dumps(row) + "\n" for row in rows))
  return str(path)


def test_a_reward_model_on_both_forms(tmp_path):
  tiny_text.model("qwen2", "chatml", tmp_path / "reward", classifier=True, seed=1)
  rows = [
    {"id": "ref:1", "prompt": "rain", "chosen": ["sea"], "rejected": ["cat", "dog"]},
    {"id": "tied:1", "prompt": "the cat", "chosen": ["sat", "ran"], "rejected": ["Paris"]},
  ]
  listed = write(tmp_path / "bench.jsonl", [row | {"subset": "Ties"} for row in rows])
  pairs = [
    {"prompt": "The dog", "chosen": "ran after the cat", "rejected": "sat"},
    {"prompt": "What is the capital of France?", "chosen": "Paris", "rejected": "the sea"},
    {"prompt": "broken", "chosen": "same", "rejected": "same"},
  ]
  config = default.get_config()
  config.task = "rewardbench"
  config.data.max_bad_share = 0.5
  config.reward.path = str(tmp_path / "reward")
  config.rewardbench.data = f"{listed},{write(tmp_path / 'pairs.jsonl', pairs)}"
  check_config(config)
  rewardbench.run(config, tmp_path / "work")
  scores = [json.loads(line) for line in (tmp_path / "work/scores.jsonl").open()]
  assert [len(row["scores"]) for row in scores] == [3, 3, 2, 2]
  flat = [
    {"prompt": row["prompt"], "response": text}
    for row in rows
    for text in row["chosen"] + row["rejected"]
  ]
  flat += [
    {"prompt": r["prompt"], "response": r[s]} for r in pairs[:2] for s in ("chosen", "rejected")
  ]
  config.task = "score"
  config.score.input = write(tmp_path / "in.jsonl", flat)
  config.score.output = str(tmp_path / "out.jsonl")
  serve.run(config)
  want = [json.loads(line)["score"] for line in open(config.score.output)]
  assert [x for row in scores for x in row["scores"]] == want
  saved = json.loads((tmp_path / "work/rewardbench.json").read_text())
  right = sum(row["scores"][0] > row["scores"][1] for row in scores[2:])
  assert saved["result"]["subsets"][str(tmp_path / "pairs.jsonl")]["value"] == right / 2
  page = pathlib.Path(tmp_path / "work/rewardbench.html").read_text()
  assert "The parts of Ties" in page and "Mean accuracy over 2 subsets" in page
