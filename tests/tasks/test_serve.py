"""The stable commands `generate` and `score`. Oracle: transformers in torch float32, one row at a
time.
"""

import json
import os
import pathlib
import subprocess
import sys

import jax
import numpy as np
import pytest
import tiny_text
import torch

from configs import default, evaluate
from r2m_jax.config import ConfigError, check_config
from r2m_jax.data.jsonl import DataError
from r2m_jax.data.text import TextError
from r2m_jax.hf.folders import RENDERER, FolderError
from r2m_jax.tasks import serve

ROOT = pathlib.Path(__file__).parents[2]
ASK = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "What is the sea?"}]
PROMPTS = [
  "The cat sat on",
  ASK,
  "rain",
  "Please write a short poem about rain, trees and the sea.",
]


def config(**overrides):
  result = default.get_config()
  result.update_from_flattened_dict(
    {name.replace("__", "."): value for name, value in overrides.items()}
  )
  return result


def write(path, rows):
  path.write_text("".join(json.dumps(row) + "\n" for row in rows))
  return str(path)


def read(path):
  return [json.loads(line) for line in pathlib.Path(path).read_text().splitlines()]


def prompt_ids(hf, prompt):
  if isinstance(prompt, str):
    return hf(prompt)["input_ids"]
  return hf.apply_chat_template(prompt, add_generation_prompt=True)["input_ids"]


def their_scores(model, rows):
  """One row at a time, without a pad id. With pad = eos the classifier would read the score one
  token early.
  """
  model.config.pad_token_id = None
  with torch.no_grad():
    return [model(torch.tensor([ids])).logits.item() for ids in rows]


@pytest.fixture(scope="module")
def policy(tmp_path_factory):
  """Its embedding has more rows than the tokenizer's 301 tokens, like those of Qwen. Some samples
  are such ids.
  """
  folder = tmp_path_factory.mktemp("policy")
  return folder, *tiny_text.model("qwen2", "chatml", folder, vocab_size=330)


def test_greedy_generation_is_that_of_transformers(policy, tmp_path):
  """By the documented command line, in a separate process."""
  folder, model, hf = policy
  source = write(
    tmp_path / "in.jsonl", [{"prompt": prompt, "id": i} for i, prompt in enumerate(PROMPTS)]
  )
  env = os.environ | {"XLA_FLAGS": "--xla_backend_optimization_level=0"}
  command = [
    sys.executable,
    "-m",
    "r2m_jax.main",
    "--config=configs/default.py",
    f"--workdir={tmp_path / 'work'}",
    "--config.task=generate",
    f"--config.policy.path={folder}",
    f"--config.generate.input={source}",
    f"--config.generate.output={tmp_path / 'out.jsonl'}",
    "--config.generate.max_new_tokens=32",
    "--config.generate.temperature=0",
    "--config.dtype=float32",
  ]
  done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)
  assert done.returncode == 0, done.stderr
  assert "<|im_start|>" in done.stdout or "The cat sat on" in done.stdout
  rows = read(tmp_path / "out.jsonl")
  assert [row["id"] for row in rows] == list(range(len(PROMPTS)))
  ends = {hf.eos_token_id, hf.convert_tokens_to_ids("<|im_end|>")}
  for row, prompt in zip(rows, PROMPTS):
    ids = prompt_ids(hf, prompt)
    assert row["prompt"] == prompt and row["prompt_tokens"] == ids
    with torch.no_grad():
      want = model.generate(
        torch.tensor([ids]),
        max_new_tokens=32,
        do_sample=False,
        eos_token_id=sorted(ends),
        pad_token_id=0,
      )[0]
      logits = model(want[None]).logits[0]
    assert row["tokens"] == want[len(ids) :].tolist() and len(row["tokens"]) == len(row["logprobs"])
    logprobs = torch.log_softmax(logits, -1)[
      torch.arange(len(ids) - 1, len(want) - 1), want[len(ids) :]
    ]
    np.testing.assert_allclose(row["logprobs"], logprobs, atol=1e-4)
    assert row["text"] == hf.decode(row["tokens"], skip_special_tokens=True)
    assert row["truncated"] == (row["tokens"][-1] not in ends)
  assert max(max(row["tokens"]) for row in rows) >= len(hf)


def test_sampling_does_not_depend_on_the_batch(policy, tmp_path):
  folder, _, _ = policy
  source = write(
    tmp_path / "in.jsonl",
    [{"prompt": prompt} for prompt in ("rain", "The cat sat on", "The dog", "a")],
  )
  results = []
  for size in (2, 4):
    cfg = config(
      task="generate",
      policy__path=str(folder),
      generate__input=source,
      generate__output=str(tmp_path / f"{size}"),
      generate__max_new_tokens=5,
      generate__temperature=0.7,
      generate__batch_size=size,
    )
    serve.run(cfg)
    results.append(read(cfg.generate.output))
  assert [row["tokens"] for row in results[0]] == [row["tokens"] for row in results[1]]


def test_temperatures_by_category(policy, tmp_path):
  """Each row equals its row in a file in which all rows have its temperature."""
  folder, _, _ = policy
  kinds = ["math", "writing", "stem", None, "math"]
  rows = [
    {"turns": [f"{word} and the sea", "Who?"]} | ({"category": kind} if kind else {})
    for word, kind in zip(("rain", "cat", "dog", "mat", "poem"), kinds)
  ]
  source = write(tmp_path / "in.jsonl", rows)

  def answers(**changes):
    cfg = config(
      task="generate",
      policy__path=str(folder),
      generate__input=source,
      generate__output=str(tmp_path / "out.jsonl"),
      generate__max_new_tokens=6,
      **{f"generate__{name}": value for name, value in changes.items()},
    )
    check_config(cfg)
    serve.run(cfg)
    return [row["answers"] for row in read(tmp_path / "out.jsonl")]

  greedy, warm, hot = (answers(temperature=t) for t in (0.0, 0.7, 1.5))
  assert greedy != warm != hot
  want = [greedy[0], hot[1], warm[2], warm[3], greedy[4]]
  assert answers(temperature=0.7, temperature_by={"math": 0.0, "writing": 1.5}) == want
  with pytest.raises(ConfigError, match="generate.temperature_by is {'math': -1}: give numbers"):
    answers(temperature_by={"math": -1})
  published = evaluate.get_config("mt_bench").generate.temperature_by.to_dict()
  assert published["roleplay"] == 0.7 and published["humanities"] == 0.1 and len(published) == 8


def test_a_conversation_of_two_turns_is_two_generations(policy, tmp_path):
  """Oracle: a second `generate` whose prompts have the first answers, greedy."""
  folder, _, _ = policy

  def generate(name, rows, **changes):
    cfg = config(
      task="generate",
      policy__path=str(folder),
      generate__input=write(tmp_path / "in.jsonl", rows),
      generate__output=str(tmp_path / name),
      generate__max_new_tokens=5,
      generate__temperature=0.0,
      **changes,
    )
    serve.run(cfg)
    return pathlib.Path(cfg.generate.output).read_text()

  questions = [
    {"turns": ["rain", "and the sea?"], "question_id": 81},
    {"turns": ["The cat"], "question_id": 82},
    {"prompt": "a", "turns": 3},  # a column with another meaning
  ]
  rows = [json.loads(line) for line in generate("out", questions).splitlines()]
  ask = [[{"role": "user", "content": text}] for text in ("rain", "The cat")]
  first = [json.loads(line) for line in generate("1", [{"prompt": p} for p in ask]).splitlines()]
  said = {"role": "assistant", "content": first[0]["text"]}
  again = [{"prompt": [*ask[0], said, {"role": "user", "content": "and the sea?"}]}]
  second = json.loads(generate("2", again))
  assert rows[0]["answers"] == [first[0]["text"], second["text"]]
  assert (
    rows[0]["tokens"] == second["tokens"] and rows[0]["prompt_tokens"] == second["prompt_tokens"]
  )
  assert rows[1]["answers"] == [first[1]["text"]] and "answers" not in rows[2]
  made = generate("bench", questions[:2], generate__format="mt_bench", generate__name="mine")
  assert json.loads(made.splitlines()[0])["choices"][0]["turns"] == rows[0]["answers"]
  with pytest.raises(DataError, match="in.jsonl:1 has turns = ..; give a list of texts"):
    generate("bad", [{"turns": []}])


SCORED = [
  {"prompt": "The cat", "response": "sat on the mat."},
  {"prompt": "What is the capital of France?", "response": "Paris"},
  {
    "prompt": "Please write a short poem about rain, trees and the sea. " * 2,
    "response": "The sea, the sea!",
  },
  {"prompt": "The dog", "response": ""},
]


@pytest.mark.parametrize("case, kind", [("pythia", "plain"), ("llama3.1", "llama3")])
def test_scores_are_those_of_transformers(case, kind, tmp_path):
  model, hf = tiny_text.model(case, kind, tmp_path / "reward", classifier=True)
  rows = [
    *SCORED,
    *([{"prompt": ASK, "response": "Water.", "truncated": True}] if kind == "llama3" else []),
  ]
  field = "text" if kind == "llama3" else "response"  # task=generate writes "text"
  given = [{field if k == "response" else k: v for k, v in row.items()} for row in rows]
  cfg = config(
    task="score",
    reward__path=str(tmp_path / "reward"),
    score__input=write(tmp_path / "in.jsonl", given),
    score__field=field,
    score__output=str(tmp_path / "out.jsonl"),
    score__batch_size=3,
  )
  serve.run(cfg)
  got = read(cfg.score.output)
  assert [{k: v for k, v in row.items() if k != "score"} for row in got] == given

  def by_hand(row):
    if kind == "plain":
      return hf(f"{row['prompt']} {row['response']}")["input_ids"]
    turns = (
      row["prompt"]
      if isinstance(row["prompt"], list)
      else [{"role": "user", "content": row["prompt"]}]
    )
    text = "<s>" + "".join(
      f"<|start|>{t['role']}<|stop|>{t['content'].strip()}<|eot|>" for t in turns
    )
    text += f"<|start|>assistant<|stop|>{row['response']}"
    return hf(text + ("" if row.get("truncated") else "<|eot|>"), add_special_tokens=False)[
      "input_ids"
    ]

  np.testing.assert_allclose(
    [row["score"] for row in got], their_scores(model, map(by_hand, rows)), atol=1e-4
  )


def test_batches_hold_every_row_once_in_like_lengths():
  lengths = [5, 90, 7, 6, 80]
  index = list(serve.batches(lengths, 2))
  assert [i.tolist() for i in index] == [[0, 3], [2, 4], [1, 1]]


def test_bad_input_is_explained(policy, tmp_path, monkeypatch):
  folder, _, _ = policy
  out = str(tmp_path / "out.jsonl")

  def generate(rows, path=folder):
    source = write(tmp_path / "in.jsonl", rows)
    serve.run(
      config(task="generate", policy__path=str(path), generate__input=source, generate__output=out)
    )

  def score(path, **overrides):
    source = write(tmp_path / "in.jsonl", SCORED)
    serve.run(
      config(
        task="score", reward__path=str(path), score__input=source, score__output=out, **overrides
      )
    )

  with pytest.raises(
    DataError, match="in.jsonl:2 needs 'prompt' as text or a list of messages; it has response"
  ):
    generate([{"prompt": "a"}, {"response": "b"}])
  with pytest.raises(TextError, match="in.jsonl, row 2: a prompt is text or a list"):
    generate([{"prompt": "a"}, {"prompt": [{"role": "user"}]}])
  with pytest.raises(
    FolderError, match="reward.path is .* holds no score head, so it cannot score"
  ):
    score(folder)
  plain = tmp_path / "plain"
  tiny_text.model("pythia", "plain", plain, classifier=True)
  with pytest.raises(FolderError, match="a sequence classifier, which cannot generate"):
    generate([{"prompt": "a"}], plain)
  with pytest.raises(FolderError, match="gives 3 labels; a reward is one number"):
    tiny_text.model("pythia", "plain", tmp_path / "three", classifier=True, labels=3)
    score(tmp_path / "three")
  other = json.loads((plain / "config.json").read_text()) | {"model_type": "gpt2"}
  (tmp_path / "gpt2").mkdir()
  (tmp_path / "gpt2/config.json").write_text(json.dumps(other))
  with pytest.raises(FolderError, match="'gpt2'.* is not supported; supported are .*'llama'"):
    score(tmp_path / "gpt2")
  with pytest.raises(
    FolderError, match="policy.path is /nowhere/model: /nowhere/model is not a folder"
  ):
    generate([{"prompt": "a"}], "/nowhere/model")
  (plain / RENDERER).write_text(json.dumps({"template_sha256": "0" * 64}))
  with pytest.raises(
    TextError, match="made with another rendering of its input(.|\n)*template_sha256"
  ):
    score(plain)
  for task, field in (
    ("generate", "policy.path"),
    ("score", "reward.path"),
    ("export", "export.checkpoint"),
  ):
    with pytest.raises(ConfigError, match=f"config.{field} is ''"):
      check_config(config(task=task))
  assert jax.config.jax_default_matmul_precision is None
