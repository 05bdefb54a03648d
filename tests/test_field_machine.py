"""Unusual machines: no home folder, terminals and disks that fail, rows longer than the model's
training.
"""

import json
import os
import pathlib
import subprocess
import sys

import pytest
import tiny_text

from configs import default
from r2m_jax.config import ConfigError, check_config
from r2m_jax.data import datasets
from r2m_jax.data.text import Renderer, load_tokenizer
from r2m_jax.run import process
from r2m_jax.tasks import serve

ROOT = pathlib.Path(__file__).parents[1]
LIMIT = 64  # max_position_embeddings of the models of tests/support/hf_models.py
WORDS = "The cat sat on the mat and the dog ran. "


@pytest.fixture(scope="module")
def models(tmp_path_factory):
  """A policy, a reward model and a file of rows."""
  root = tmp_path_factory.mktemp("machine")
  small = dict(num_hidden_layers=1)
  tiny_text.model("llama2", "plain", root / "policy", **small)
  tiny_text.model("llama2", "plain", root / "reward", classifier=True, **small)
  rows = [{"prompt": WORDS * n, "response": WORDS, "rejected": "No."} for n in (1, 5)]
  (root / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
  return root


def settings(models, **fields):
  config = default.get_config()
  config.data.name = config.generate.input = config.score.input = str(models / "rows.jsonl")
  config.policy.path, config.reward.path = str(models / "policy"), str(models / "reward")
  given = {name.replace("__", "."): value for name, value in fields.items()}
  config.update_from_flattened_dict(dict.fromkeys(SMALL, 1) | given)
  return config


SMALL = ("sft.batch_size", "reward.batch_size", "rollout.prompts")


# ---- rows longer than a model's positions ----


def beyond(tokenizer, text: str, more: int = 0) -> int:
  """The length of a row of plain text, counted by transformers' tokenizer."""
  return len(tokenizer.hf(text)["input_ids"]) + more


def test_rows_beyond_the_trained_positions_get_one_warning_for_each_stage(models, tmp_path, capsys):
  config = settings(models)
  tokenizer = load_tokenizer(models / "policy", max_positions=LIMIT)
  whole = beyond(tokenizer, WORDS * 5, beyond(tokenizer, WORDS, -1))
  end = len(["</s>"])

  def warnings(use):
    use()
    return [line for line in capsys.readouterr().err.splitlines() if line.startswith("warning: ")]

  (said,) = warnings(lambda: datasets.sft_rows(config, tokenizer, tmp_path, "sft"))
  assert f"1 of 2 rows for sft are longer than max_position_embeddings = {LIMIT}" in said
  assert f"the longest {whole + end} tokens" in said and "config.data.max_prompt_length" in said

  narrow = settings(models, data__max_prompt_length=40, data__max_response_length=30)
  (said,) = warnings(lambda: datasets.packed_lines(narrow, tokenizer, tmp_path, "packed"))
  assert f"packed lines for packed are longer than max_position_embeddings = {LIMIT}" in said
  assert "the longest 70 tokens" in said

  pairs = [json.loads(line) for line in (models / "rows.jsonl").read_text().splitlines()]
  file = tmp_path / "pairs.jsonl"
  file.write_text("".join(json.dumps(row | {"chosen": WORDS}) + "\n" for row in pairs))
  config.data.name, renderer = str(file), Renderer(tokenizer)
  (said,) = warnings(lambda: datasets.pairs(config, renderer, tmp_path))
  assert "2 of 4 responses of pairs" in said and "config.reward.max_length" in said

  data = datasets.prompt_data(config, tokenizer, tmp_path)
  policy, reward = warnings(lambda: datasets.warn_of_lengths(config, data, tokenizer, renderer))
  new = config.rollout.max_new_tokens
  assert f"prompts with config.rollout.max_new_tokens = {new} are" in policy
  assert f"the longest {beyond(tokenizer, WORDS * 5, new)} tokens" in policy
  assert "as input of the reward model" in reward
  short = Renderer(tokenizer, max_length=LIMIT)  # the beginning is dropped
  assert len(warnings(lambda: datasets.warn_of_lengths(config, data, tokenizer, short))) == 1


def test_generate_and_score_warn_before_device_work(models, tmp_path, capsys, monkeypatch):
  class AtTheDevice(Exception):
    pass

  def stop(*args, **kwargs):
    raise AtTheDevice

  config = settings(models, generate__output=str(tmp_path / "o"), score__output=str(tmp_path / "p"))
  monkeypatch.setattr(serve, "sample", stop)
  with pytest.raises(AtTheDevice):
    serve.run_generate(config)
  said = capsys.readouterr().err
  assert "prompts with config.generate.max_new_tokens" in said and str(models / "policy") in said
  monkeypatch.setattr(serve, "spread", stop)
  with pytest.raises(AtTheDevice):
    serve.run_score(config)
  said = capsys.readouterr().err
  assert "1 of 2 rows for the reward model are longer than max_position_embeddings = 64" in said


def test_rows_within_the_trained_positions_get_no_warning(models, capsys):
  tokenizer = load_tokenizer(models / "policy", max_positions=LIMIT)
  tokenizer.warn_beyond([1, LIMIT], "rows", "fix")
  tokenizer.warn_beyond([], "rows", "fix")
  load_tokenizer(models / "policy").warn_beyond([10**6], "rows", "fix")  # no model with it
  assert not capsys.readouterr().err


# ---- no home folder ----


def no_home():
  raise RuntimeError("Could not determine home directory.")  # pathlib's own words


@pytest.mark.parametrize("home", ["/dev/null/home", None])
def test_without_a_home_folder_programs_are_not_kept_and_it_is_said(home, monkeypatch, capsys):
  monkeypatch.delenv("JAX_COMPILATION_CACHE_DIR", raising=False)
  if home is None:
    monkeypatch.setattr(pathlib.Path, "home", no_home)
  else:
    monkeypatch.setenv("HOME", home)
  assert process.compilation_cache() is None
  said = capsys.readouterr().err
  assert said.count("\n") == 1 and "set JAX_COMPILATION_CACHE_DIR to a folder" in said


def test_a_named_folder_of_programs_is_used_and_a_bucket_is_left_alone(tmp_path, monkeypatch):
  monkeypatch.setattr(pathlib.Path, "home", no_home)
  for named in (str(tmp_path / "new/cache"), "gs://bucket/cache"):
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", named)
    assert process.compilation_cache() == named


def test_a_path_under_a_home_that_is_not_there_is_refused(monkeypatch):
  monkeypatch.setattr(pathlib.Path, "home", no_home)
  config = default.get_config()
  check_config(config)
  config.data.name = "rows.jsonl,~/more.jsonl"
  with pytest.raises(ConfigError, match="config.data.name is .*give the whole path, or set HOME"):
    check_config(config)


def command(models, tmp_path, task: str) -> list[str]:
  """A small job, started as by a user."""
  files = {
    "quickstart": ["--config=configs/quickstart.py:test"],
    "generate": [
      f"--config.policy.path={models}/policy",
      f"--config.generate.input={models}/rows.jsonl",
      f"--config.generate.output={tmp_path}/out.jsonl",
      "--config.generate.max_new_tokens=4",
    ],
    "score": [
      f"--config.reward.path={models}/reward",
      f"--config.score.input={models}/rows.jsonl",
      f"--config.score.output={tmp_path}/out.jsonl",
    ],
    "sft": [
      f"--config.policy.path={models}/policy",
      f"--config.data.name={models}/rows.jsonl",
      "--config.sft.steps=1",
      "--config.sft.batch_size=1",
    ],
  }[task]
  if task != "quickstart":
    files = ["--config=configs/default.py", f"--config.task={task}", *files]
  return [sys.executable, "-m", "r2m_jax.main", f"--workdir={tmp_path}/run", *files]


def run(command, **environment) -> subprocess.CompletedProcess:
  """Runs a command with these variables; None removes one."""
  absent = {"JAX_COMPILATION_CACHE_DIR": None, "XDG_CACHE_HOME": None, "JAX_PLATFORMS": "cpu"}
  variables = os.environ | absent | {"PYTHONPATH": str(ROOT)} | environment
  variables = {name: value for name, value in variables.items() if value is not None}
  return subprocess.run(command, cwd=ROOT, env=variables, capture_output=True, text=True)


# A user id that the system's list of users lacks, as in a container started with one.
UNKNOWN_USER = """
import pwd, runpy, sys
def getpwuid(number):
  raise KeyError(number)
pwd.getpwuid = getpwuid
sys.argv[0] = "main"
runpy.run_module("r2m_jax.main", run_name="__main__")
"""


@pytest.mark.long
@pytest.mark.parametrize("home", ["unset", "unwritable", "unknown user"])
@pytest.mark.parametrize("task", ["quickstart", "generate", "score", "sft"])
def test_without_a_home_folder_everything_runs(models, tmp_path, task, home):
  python, *arguments = command(models, tmp_path, task)
  if home == "unknown user":
    arguments = ["-c", UNKNOWN_USER, *arguments[2:]]
  result = run([python, *arguments], HOME="/dev/null/home" if home == "unwritable" else None)
  assert result.returncode == 0 and "Traceback" not in result.stderr, result.stderr
  assert ("compiled programs cannot be kept" in result.stderr) == (home != "unset")
  assert not (ROOT / "~").exists()
