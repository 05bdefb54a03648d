"""The whole job from nothing, on text that the test makes: the tokenizer, every stage, the report,
and resuming.
"""

import gzip
import json
import os
import pathlib
import shutil
import subprocess
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch
import transformers

from configs import real_small
from r2m_jax import main
from r2m_jax.analysis import analyse
from r2m_jax.config import ConfigError, check_config
from r2m_jax.data import datasets
from r2m_jax.data.jsonl import DataError
from r2m_jax.hf.folders import load_policy, load_reward, mesh_of
from r2m_jax.run import fit
from r2m_jax.run.files import read_jsonl
from r2m_jax.run.metrics import read_metrics, without_clock
from r2m_jax.tasks import evals, folders, replay, scratch, tokenizer

ROOT = pathlib.Path(__file__).parents[2]
WORDS = "the a cat dog sea rain tree mat sat ran fell saw on under near over red old small tall and then".split()


def make_data(root):
  """A folder for configs/real_small.py. A reply is good if it repeats a word of its prompt."""
  rng = np.random.default_rng(0)

  def say(n):
    return " ".join(rng.choice(WORDS, n))

  def row(i):
    ask, group = say(4), "val" if i % 2 else "train"
    prompt = [{"role": "user", "content": ask}]
    if i % 3 == 0:
      prompt = [
        {"role": "user", "content": say(3)},
        {"role": "assistant", "content": say(2)},
        *prompt,
      ]
    return {
      "prompt": prompt,
      "chosen": f"{ask.split()[0]} {say(3)} {i}",
      "rejected": say(4),
      "meta": {"group": group},
    }

  names = [
    f"{name}_{split}"
    for name in (*real_small.PREFERENCES, "hh_harmless_base")
    for split in ("train", "val")
  ]
  for name in (*names, "llmbar_dev", "pandalm_human_dev"):
    write(root / f"preferences/{name}.jsonl.gz", [row(i) for i in range(6)])
  for name in [f"{name}_{split}" for name in real_small.PROMPTS for split in ("train", "val")]:
    rows = [{"prompt": row(i)["prompt"], "reference": say(5) if i else None} for i in range(4)]
    write(root / f"prompts/{name}.jsonl.gz", [row for row in rows if row["reference"]])
  return root


def write(path, rows):
  path.parent.mkdir(parents=True, exist_ok=True)
  with gzip.open(path, "wt", encoding="utf-8") as file:
    file.writelines(json.dumps(row) + "\n" for row in rows)


def config(root, **overrides):
  result = real_small.get_config("test")
  result.update_from_flattened_dict(
    {"data.root": str(root)} | {k.replace("__", "."): v for k, v in overrides.items()}
  )
  return result


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
  """(data, workdir, output of the command) of the main job on real text at its smallest size."""
  root, workdir = (
    make_data(tmp_path_factory.mktemp("data")),
    tmp_path_factory.mktemp("real") / "run",
  )
  flags = [
    "--config=configs/real_small.py:test",
    f"--config.data.root={root}",
    f"--workdir={workdir}",
  ]
  command = [sys.executable, "-m", "r2m_jax.main", *flags]
  result = subprocess.run(
    command, cwd=ROOT, capture_output=True, text=True, env=os.environ, timeout=2500
  )
  assert result.returncode == 0, result.stderr[-4000:]
  return root, workdir, result.stdout


def test_ends_with_folders_that_transformers_loads(finished):
  _, workdir, _ = finished
  for folder in ("export/policy", "export/vanilla/policy", "models/lm", "models/sft"):
    model, info = transformers.AutoModelForCausalLM.from_pretrained(
      workdir / folder, output_loading_info=True
    )
    assert not any(info.values()) and sum(p.numel() for p in model.parameters()) < 30_000
  for folder in ("export/reward", "export/vanilla/reward", "models/reward"):
    transformers.AutoModelForSequenceClassification.from_pretrained(workdir / folder)
  assert (workdir / "export/reward/r2m_head.safetensors").exists()


def test_every_stage_trained(finished):
  """Each stage changed its model and logged its own loss and its wait for data."""
  _, workdir, _ = finished

  def load(folder):
    return transformers.AutoModelForCausalLM.from_pretrained(workdir / folder).state_dict()

  models = [load(f) for f in ("models/start", "models/lm", "models/sft", "export/policy")]
  for before, after in zip(models, models[1:]):
    assert max((before[name] - after[name]).abs().max() for name in before) > 1e-6
  rows = read_metrics(workdir)
  assert {(row["stage"], row["arm"]) for row in rows} == {
    ("lm", ""),
    ("sft", ""),
    ("reward", ""),
    ("rl", "vanilla"),
    ("rl", "r2m"),
  }
  assert all(0 <= row["data/wait"] <= 1 for row in rows)


def test_the_report_has_what_was_asked_for(finished):
  _, workdir, shown = finished
  page = (workdir / "report.html").read_text()
  tables = {table["title"]: table for table in json.loads((workdir / "tables.json").read_text())}
  for title in tables:
    assert title in page and title in shown
  sets = [row[0] for row in tables["Reward-model accuracy on held-out pairs, %"]["rows"]]
  assert sets == sorted(f"{name}_val" for name in (*real_small.PREFERENCES, "hh_harmless_base")) + [
    "llmbar_dev",
    "pandalm_human_dev",
  ]
  of = {row[0]: row[-1] for row in tables["Reward-model accuracy on held-out pairs, %"]["rows"]}
  assert (
    of["llmbar_dev"] == "3" and of["ultrafeedback_val"] == "6"
  )  # only the validation group of dev sets
  assert [row[0] for row in tables["Policies on held-out prompts"]["rows"]] == [
    "SFT",
    "vanilla",
    "r2m",
  ]
  feedback = [row[0] for row in tables["Reward-model accuracy with policy feedback, %"]["rows"]]
  assert feedback == ["frozen reward model, no feedback", "r2m before RL", "r2m after RL"]
  samples = read_jsonl(workdir / "samples.jsonl")
  held = {(s["prompt"], s["when"]) for s in samples if s["arm"] == "vanilla"} & {
    (s["prompt"], s["when"]) for s in samples if s["arm"] == "r2m"
  }
  assert len(held) >= 4  # the same held-out prompts before and after, in both arms


def test_analyse_reads_held_out_pairs_and_changes_nothing(finished):
  root, workdir, _ = finished

  def files():
    return {
      path: path.read_bytes()
      for path in sorted(workdir.rglob("*"))
      if path.is_file() and "analysis" not in path.relative_to(workdir).parts
    }

  before, settings = files(), config(root, task="analyse", analyse__prompts=20)
  found = analyse.run(settings, workdir)
  assert files() == before
  pieces = ["similarity", "differences", "dynamics", "cost", "accuracy", "checks", "ablations"]
  assert list(found) == pieces
  assert {row.labels for row in found["differences"].rows} == {
    *((name, "frozen reward") for name in ("start", "vanilla", "r2m")),
    ("r2m", "r2m reward"),
  }
  rows = {(*row.labels, row.measure): row.found for row in found["similarity"].rows}
  one = rows["start", "final", "both chosen"]
  assert one.count == 20 and one.low < one.value < one.high <= 1
  assert rows["start", "final", "across"].value != rows["r2m", "final", "across"].value
  page = (workdir / "analysis" / "report.html").read_text()
  assert "r2m before RL" in page and "only the gold-reward task has a gold reward" in page
  settings.analyse.what = "probes"
  with pytest.raises(ConfigError, match="probes: only the gold-reward task has a gold reward"):
    analyse.run(settings, workdir)


def test_perplexity_is_what_torch_gives(finished):
  """Oracle: transformers, one row at a time."""
  root, workdir, _ = finished
  (saved,) = [
    t
    for t in json.loads((workdir / "tables.json").read_text())
    if t["title"].startswith("Validation")
  ]
  cfg = config(root)
  hf = transformers.AutoTokenizer.from_pretrained(workdir / "models/sft")
  model = transformers.AutoModelForCausalLM.from_pretrained(workdir / "models/sft")
  nll, seen = [], set()
  for pattern in cfg.scratch.sft_val.split(","):
    for file in root.glob(pattern):
      for row in map(json.loads, gzip.open(file, "rt")):
        response = row.get("chosen") or row["reference"]
        text = (
          "".join(f"<|{m['role']}|>{m['content']}<|end|>" for m in row["prompt"]) + "<|assistant|>"
        )
        prompt, answer = hf(text)["input_ids"], hf(response + "<|end|>")["input_ids"]
        key = text + response
        if (
          len(prompt) > cfg.data.max_prompt_length
          or len(answer) > cfg.data.max_response_length + 1
          or key in seen
        ):
          continue
        seen.add(key)
        with torch.no_grad():
          logp = torch.log_softmax(
            model(torch.tensor([prompt + answer])).logits[0, len(prompt) - 1 : -1], -1
          )
        nll.append(-logp[range(len(answer)), answer].numpy())
  _, shown, rows, tokens = saved["rows"][1]
  assert (int(rows), int(tokens)) == (len(nll), sum(map(len, nll)))
  assert float(shown.split()[0]) == pytest.approx(np.exp(np.concatenate(nll).mean()), abs=0.06)


def test_a_rerun_goes_on_where_it_stopped(finished, capsys):
  root, workdir, _ = finished
  cfg, export = config(root), workdir / "export/policy/model.safetensors"
  before, stamps = export.read_bytes(), (workdir / "metrics.jsonl").read_bytes()
  began = time.perf_counter()
  scratch.run(cfg, workdir)
  assert time.perf_counter() - began < 90 and capsys.readouterr().out.count("done before") == 6
  assert export.read_bytes() == before and (workdir / "metrics.jsonl").read_bytes() == stamps


def test_rl_goes_on_from_its_checkpoint(finished, tmp_path):
  """Stopped after the first of two steps of the last arm. After resuming, files are equal byte for
  byte to the uninterrupted run's.
  """
  root, workdir, _ = finished
  again = tmp_path / "run"
  shutil.copytree(workdir, again)
  for lost in ("export/policy", "export/reward", "checkpoints/r2m/2"):
    shutil.rmtree(again / lost)
  cfg = config(root)
  models = dict(
    policy__path=str(workdir / "models/sft"),
    reward__path=str(workdir / "models/reward"),
    variant="r2m",
  )
  cfg = scratch.derived(cfg, "r2m", cfg.scratch.prompts, **models)
  folders.run_r2m(cfg, again, mesh_of(cfg))
  files = ("policy/model.safetensors", "reward/model.safetensors", "reward/r2m_head.safetensors")

  def bytes_of(run):
    return [(run / "export" / name).read_bytes() for name in files]

  assert bytes_of(again) == bytes_of(workdir)

  rows, want = (
    [without_clock(row) for row in read_metrics(run) if row["arm"] == "r2m"]
    for run in (again, workdir)
  )
  assert rows == want and len(rows) == 2


def test_data_that_changed_is_refused(finished, tmp_path):
  _, workdir, _ = finished
  rows = [{"where": f"sft.jsonl:{i}"} for i in range(3)]
  with pytest.raises(
    ConfigError, match="gives 3 rows that are not the .* with which .* began .* rows then, no now"
  ):
    datasets.hold(workdir, "sft", rows, [([i],) for i in range(3)])


@pytest.mark.parametrize("arm", ["vanilla", "r2m"])
def test_a_sample_of_each_arm_is_made_again(finished, arm, capsys):
  """The samples of the first and last steps are in samples.jsonl, and their metrics in
  metrics.jsonl.
  """
  _, workdir, _ = finished
  for step, when in ((0, "before"), (1, "after")):
    found = replay.run(config("", task="replay", replay__arm=arm, replay__step=step), workdir)
    mine = [
      row
      for row in read_jsonl(workdir / "samples.jsonl")
      if (row["arm"], row["when"]) == (arm, when)
    ]

    def same(row):
      return (row["prompt"], row["response"]) == (found["prompt_text"], found["response_text"])

    (row,) = filter(same, mine)
    assert (row["reward"], row["frozen"], row["length"]) == (
      found["reward"],
      found["frozen"],
      len(found["tokens"]),
    )
    assert (found["attention"] is None) == (arm == "vanilla")
    shown = capsys.readouterr().out
    assert "metrics of the step against metrics.jsonl: largest difference 0.0e+00" in shown, shown


def test_replay_takes_the_steps_that_the_budget_gave(finished, tmp_path):
  _, workdir, _ = finished
  shutil.copyfile(workdir / "config.json", tmp_path / "config.json")
  (tmp_path / "checkpoints/r2m").mkdir(parents=True)
  (tmp_path / "budgets.json").write_text('{"sft": 3, "rl": 7}')
  found = replay.config_of(config("", task="replay"), tmp_path)
  assert (found.steps, found.variant, found.policy.path) == (7, "r2m", str(tmp_path / "models/sft"))


def test_without_the_data_it_says_what_to_download(tmp_path, capsys):
  with pytest.raises(SystemExit):
    main.run(config(tmp_path), tmp_path / "run")
  error = capsys.readouterr().err
  assert error.count("\n") == 1 and not (tmp_path / "run").exists()
  assert (
    "there is no file" in error
    and "huggingface.co/datasets/Anthropic/hh-rlhf" in error
    and "data.root" in error
  )


def test_red_team_replies_are_never_trained_on():
  names = real_small.get_config().scratch
  assert not any("harmless" in names[field] for field in ("corpus", "sft", "pairs", "prompts"))
  assert not any(
    "_val" in names[f] or "_dev" in names[f] for f in ("corpus", "sft", "pairs", "prompts")
  )


# ---- the tokenizer ----


def test_any_text_comes_back_from_its_tokens(finished):
  _, workdir, _ = finished
  hf = transformers.AutoTokenizer.from_pretrained(workdir / "models/start")
  assert len(hf) == 320 and (hf.eos_token, hf.pad_token, hf.bos_token) == (
    "<|end|>",
    "<|pad|>",
    None,
  )
  for text in ("the cat", "  Blanks  and\nlines\t", "naïve café – 日本語 🐈", "x" * 50, "\x00"):
    assert hf.decode(hf(text)["input_ids"]) == text
  talk = [{"role": "user", "content": "the cat"}, {"role": "assistant", "content": "sat"}]
  assert (
    hf.apply_chat_template(talk, tokenize=False) == "<|user|>the cat<|end|><|assistant|>sat<|end|>"
  )
  ids = hf.apply_chat_template(talk[:1], add_generation_prompt=True)["input_ids"]
  assert hf.convert_ids_to_tokens([ids[0], ids[-1]]) == ["<|user|>", "<|assistant|>"]
  policy = load_policy(str(workdir / "models/start"), real_small.get_config("test"))
  assert policy.tokenizer.end_id == hf.eos_token_id and policy.arch.vocab_size == 320


def test_tokenizer_task(tmp_path):
  """From plain text. The merges of the smaller of two vocabularies are the first ones of the
  larger.
  """
  with open(tmp_path / "a.jsonl", "w") as file:
    file.writelines(
      json.dumps({"text": " ".join(np.random.default_rng(i).choice(WORDS, 9))}) + "\n"
      for i in range(40)
    )
  cfg = real_small.get_config("test")
  cfg.task, cfg.data.name = "tokenizer", str(tmp_path / "a.jsonl")
  check_config(cfg)
  main.run(cfg, tmp_path / "run")
  small = transformers.AutoTokenizer.from_pretrained(tmp_path / "run/export/policy")
  assert len(small("the cat sat on the mat")["input_ids"]) < len("the cat sat on the mat")
  transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "run/export/policy")
  with pytest.raises(
    DataError,
    match="give only [0-9]+ entries of config.tokenizer.vocab_size = 5000: give more text",
  ):
    tokenizer.train(["a few words"], 5000, 1)


# ---- budgets ----


def test_a_budget_is_turned_into_steps_once(finished, tmp_path, capsys):
  root, workdir, _ = finished
  asked = []
  for _ in range(2):
    steps = folders.budgeted(tmp_path, "sft", 7.0, lambda seconds: asked.append(seconds) or 41)
    assert steps == 41
  assert asked == [7.0]
  cfg = scratch.derived(
    config(root), "sft", config(root).scratch.sft, policy__path=str(workdir / "models/lm")
  )
  cfg.sft.budget = 4.0
  began = time.perf_counter()
  folders.run_sft(cfg, tmp_path / "run", mesh_of(cfg))
  took, shown = time.perf_counter() - began, capsys.readouterr().out
  steps = json.loads((tmp_path / "run/budgets.json").read_text())["sft"]
  assert f"{steps} updates in a budget of 4 s" in shown and shown.index("rate ") < shown.index(
    "export "
  )
  assert read_metrics(tmp_path / "run")[-1]["step"] <= steps - 1 and took < 120 and steps > 3


def test_a_stage_far_behind_its_budget_is_cut_short(tmp_path, capsys):
  device = jax.NamedSharding(jax.make_mesh((1,), ("data",), devices=jax.devices()[:1]), jax.P())

  def slow():
    for _ in range(100):
      time.sleep(0.02)
      yield {"x": np.ones(1, np.float32)}

  def run(budget):
    return fit.fit(
      lambda state, batch: ((state * batch["x"]).sum(), {}),
      jnp.ones(1),
      optax.sgd(0.1),
      slow(),
      total=100,
      stage="s",
      workdir=tmp_path,
      state_shardings=device,
      batch_sharding=device,
      budget=budget,
    )

  state, rows = run(0.4), read_metrics(tmp_path)
  steps = rows[-1]["step"] + 1
  assert 2 < steps <= 30 and f"s: ends after {steps} of 100 updates" in capsys.readouterr().out
  np.testing.assert_allclose(state, 1 - 0.1 * steps, rtol=1e-5)
  run(0.0)
  assert read_metrics(tmp_path)[-1]["step"] == 99 and read_metrics(tmp_path)[-1]["data/wait"] > 0.5


# ---- measurements ----


def test_interval_over_groups():
  """With one row per group it is the Normal interval of a proportion. Copies of rows do not narrow
  it.
  """
  rng = np.random.default_rng(1)
  right = rng.random(400) < 0.6
  one = evals.mean_of(right, range(400))
  half = 1.96 * np.sqrt(one.value * (1 - one.value) / 400)
  assert one[1:3] == pytest.approx((one.value - half, one.value + half), abs=0.008)
  copies = evals.mean_of(np.repeat(right, 5), np.repeat(np.arange(400), 5))
  assert copies[:3] == pytest.approx(one[:3]) and (copies.count, copies.groups) == (2000, 400)
  assert (
    scratch.shown(one, 1, 100)
    == f"{100 * one.value:.1f} ({100 * one.low:.1f} to {100 * one.high:.1f})"
  )
  assert (
    scratch.shown(evals.mean_of([1.0, 0.0], "ab"), 2) == "0.50 (–)"
  )  # the spread cannot be estimated from two prompts
  assert evals.wins([2.0, 1.0, 3.0], [1.0, 2.0, 3.0]).tolist() == [1.0, 0.0, 0.5]


def test_feedback_before_rl_is_the_arms_own_start(finished):
  """If the head were measured "before RL" at omega = 1, it would score like the frozen model. It
  differs only through feedback.
  """
  root, workdir, _ = finished
  cfg = scratch.derived(
    config(root),
    "r2m",
    config(root).scratch.prompts,
    policy__path=str(workdir / "models/sft"),
    reward__path=str(workdir / "models/reward"),
  )
  mesh = mesh_of(cfg)
  reward, sft = load_reward(cfg.reward.path, cfg, mesh), load_policy(cfg.policy.path, cfg, mesh)
  rows = [{"sides": [{"prompt": "the cat", "response": text} for text in ("the sea", "a dog")]}]
  head = scratch.untrained(cfg, "r2m", reward, sft, mesh)
  plain, fused = (scratch.scores_of(cfg, model, sft, rows, mesh) for model in (reward, head))
  settings, state = head.head
  whole = scratch.dataclasses.replace(
    head, head=(scratch.dataclasses.replace(settings, omega=1.0), state)
  )
  np.testing.assert_allclose(scratch.scores_of(cfg, whole, sft, rows, mesh), plain, atol=1e-6)
  assert np.abs(fused - plain).max() > 1e-6
