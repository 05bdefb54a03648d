"""The laboratory's second task on tiny text: gold never reaches training. Also tests the data of a
proxy and the log.
"""

import csv
import functools
import json
import shutil
import threading
import time
import types

import numpy as np
import pytest
import tiny_text
import torch
import transformers
from safetensors.numpy import load_file
from test_scratch import make_data

from configs import real_gold
from r2m_jax.config import ConfigError, check_config
from r2m_jax.data.jsonl import DataError
from r2m_jax.hf.folders import FolderError, load_policy, load_reward, mesh_of
from r2m_jax.lab import realtext
from r2m_jax.lab.table import read_table
from r2m_jax.run.files import read_jsonl
from r2m_jax.run.metrics import read_metrics, without_clock
from r2m_jax.tasks import scratch, serve


def settings(root, **overrides):
  cfg = real_gold.get_config("test")
  cfg.data.root, cfg.policy.path = str(root), str(root / "policy")
  cfg.lab.arms = ("vanilla", "r2m")
  for name, value in overrides.items():
    cfg.update_from_flattened_dict({name.replace("__", "."): value})
  return cfg


def test_scores_that_are_not_finite_give_no_scale(monkeypatch, tmp_path):
  monkeypatch.setattr(realtext, "load_reward", lambda *args: types.SimpleNamespace(phi=None))
  monkeypatch.setattr(serve, "score", lambda *args: np.array([1.0, np.nan], np.float32))
  with pytest.raises(FolderError, match="the scores of 1 of 2 rows are not finite.*raw"):
    realtext.standardise(settings(tmp_path), tmp_path / "raw", tmp_path, None, [], tmp_path / "out")


@pytest.fixture(scope="module")
def ended(tmp_path_factory):
  """(data and policy, workdir, {(arm, seed): rows that gold scored at each step}) of the whole
  task.
  """
  root, workdir = make_data(tmp_path_factory.mktemp("data")), tmp_path_factory.mktemp("lab_text")
  tiny_text.model(
    "llama3.1", "chatml", root / "policy", num_hidden_layers=2, max_position_embeddings=256
  )
  cfg, seen, original = settings(root), [], serve.make_scorer
  check_config(cfg)

  def recorded(*args, shown=True):
    scored = original(*args, shown=shown)
    return scored if shown else lambda rows: (seen.append(rows), scored(rows))[1]

  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(serve, "make_scorer", recorded)
    realtext.run(cfg, workdir)
  order = [(arm, seed) for seed in cfg.lab.seeds for arm in cfg.lab.arms]
  return (
    root,
    workdir,
    {run: seen[i * cfg.steps : (i + 1) * cfg.steps] for i, run in enumerate(order)},
  )


def begun(ended, folder):
  """A copy of the finished task in its state before RL."""
  for part in ("models", "sft_samples.jsonl"):
    (shutil.copytree if part == "models" else shutil.copyfile)(ended[1] / part, folder / part)
  for seed in (0, 1):
    shutil.copytree(ended[1] / f"proxy_{seed}", folder / f"proxy_{seed}")
  return folder


def policy_bytes(workdir, arm, seed):
  return (realtext.run_of(workdir, arm, seed) / "export/policy/model.safetensors").read_bytes()


def timeless(workdir, arm, seed):
  rows = read_metrics(realtext.run_of(workdir, arm, seed))
  return list(map(without_clock, rows))


# ---- gold never reaches training ----


def test_another_gold_model_gives_the_same_policies(ended, tmp_path):
  """Equal byte for byte, and so are all metrics except those that use gold."""
  root, workdir, _ = ended
  tiny_text.model(
    "llama2", "chatml", tmp_path / "other", classifier=True, max_position_embeddings=256, seed=5
  )
  again = begun(ended, tmp_path)
  shutil.rmtree(again / "models/gold")
  realtext.run(
    settings(root, gold__path=str(tmp_path / "other"), lab__seeds=(1,), lab__arms=("r2m",)), again
  )
  against_gold = {"reward/gold", "reward/within_corr", "r2m/pair_disagreement"}
  assert policy_bytes(again, "r2m", 1) == policy_bytes(workdir, "r2m", 1)
  rows, want = (timeless(run, "r2m", 1) for run in (again, workdir))
  assert len(rows) == len(want) == 2
  for row, old in zip(rows, want):
    assert row.keys() == old.keys() and {k for k in row if row[k] != old[k]} <= against_gold
    assert row["reward/gold"] != old["reward/gold"]


def test_gold_is_what_transformers_says_of_the_samples(ended):
  """Oracle: the exported classifier, one row at a time, on text rendered by its chat template. Its
  bias is read from the file.
  """
  _, workdir, seen = ended
  folder = workdir / "models/gold"
  hf = transformers.AutoTokenizer.from_pretrained(folder)
  model = transformers.AutoModelForSequenceClassification.from_pretrained(folder).eval()
  model.config.pad_token_id = None
  bias = load_file(folder / "model.safetensors")["score.bias"]
  checked = 0
  for (arm, seed), steps in seen.items():
    for t, (rows, row) in enumerate(zip(steps, timeless(workdir, arm, seed))):
      assert row["step"] == t and len(rows) == 4
      scores = []
      for sample in rows:
        text = hf.apply_chat_template(sample["prompt"], tokenize=False, add_generation_prompt=True)
        text += sample["response"] + ("" if sample["truncated"] else "<|im_end|>\n")
        ids = hf(text, add_special_tokens=False)["input_ids"]
        with torch.no_grad():
          scores.append(float(model(torch.tensor([ids])).logits[0, 0]) + float(bias[0]))
      assert row["reward/gold"] == pytest.approx(np.mean(scores), abs=2e-4)
      checked += len(rows)
  assert checked == 4 * 2 * 4
  first = read_jsonl(realtext.run_of(workdir, "vanilla", 0) / "samples.jsonl")[0]
  assert first["response"] == seen["vanilla", 0][0][0]["response"]  # the log has the gold scores


# ---- reward models ----


@pytest.mark.parametrize("factor", [2, 3])
def test_a_grown_policy_says_the_same(ended, tmp_path, factor):
  """Oracle: transformers on both folders. Each further layer is a copy, except for the matrices
  that add to the residual stream.
  """
  root, _, _ = ended
  cfg = settings(root, task="sft")
  grown = realtext.grow(load_policy(cfg.policy.path, cfg), factor)
  realtext.export.write_policy(tmp_path / "grown", cfg, grown, grown.state, tmp_path)
  load = transformers.AutoModelForCausalLM.from_pretrained
  small, large = load(cfg.policy.path).eval(), load(tmp_path / "grown").eval()
  assert large.config.num_hidden_layers == factor * small.config.num_hidden_layers
  ids = torch.tensor(np.random.default_rng(0).integers(0, 301, (2, 20)))
  with torch.no_grad():
    np.testing.assert_allclose(large(ids).logits, small(ids).logits, atol=2e-5)
  for i, layer in enumerate(large.model.layers):
    of = small.model.layers[i // factor]
    assert torch.equal(layer.mlp.up_proj.weight, of.mlp.up_proj.weight)
    assert (
      bool(layer.mlp.down_proj.weight.any())
      == bool(layer.self_attn.o_proj.weight.any())
      == (i % factor == 0)
    )


def test_reward_models_are_trained_and_at_scale(ended):
  root, workdir, _ = ended
  cfg, mesh = settings(root), mesh_of(settings(root))
  drawn = read_jsonl(workdir / "sft_samples.jsonl")
  grown = transformers.AutoModelForCausalLM.from_pretrained(
    workdir / "models/grown"
  ).model.state_dict()
  for name, start in (("gold", grown), ("proxy_0", None), ("proxy_1", None)):
    scores = serve.score(
      cfg, load_reward(str(workdir / "models" / name), cfg, mesh), None, drawn, mesh
    )
    assert (scores.mean(), scores.std()) == pytest.approx((0, 1), abs=1e-4)
    if start:
      model = transformers.AutoModelForSequenceClassification.from_pretrained(
        workdir / "models" / name
      ).model
      moved = {key: float((x - start[key]).abs().max()) for key, x in model.state_dict().items()}
      adds = [
        key for key in moved if "o_proj" in key or "down_proj" in key
      ]  # where a copied layer begins to learn
      assert len(adds) == 2 * 4 and min(moved[key] for key in adds) > 0
  weights = [(workdir / f"models/proxy_{seed}/model.safetensors").read_bytes() for seed in (0, 1)]
  assert weights[0] != weights[1]


@pytest.mark.parametrize("share, count", [(0.25, 12), (0.25, 10), (0.0, 8), (1.0, 8)])
def test_exactly_the_share_is_flipped(ended, share, count):
  cfg = settings(ended[0], reward__pairs=count, reward__label_flip=share)
  rows = [{"prompt": f"p{i}", "chosen": f"good {i}", "rejected": f"bad {i}"} for i in range(16)]
  subsets = [realtext.noisy_subset(cfg, rows, seed) for seed in (0, 0, 1)]
  assert subsets[0] == subsets[1] and (subsets[0] != subsets[2] or count == 16)
  for subset in subsets:
    assert len({row["prompt"] for row in subset}) == count
    assert sum(row["flipped"] for row in subset) == round(share * count)
    for row in subset:
      assert row["chosen"].startswith("bad" if row["flipped"] else "good")
      assert {row["chosen"], row["rejected"]} == {
        f"{x} {row['prompt'][1:]}" for x in ("good", "bad")
      }
  with pytest.raises(
    ConfigError, match="config.reward.pairs is 40: more than the 16 rows of config.scratch.pairs"
  ):
    realtext.noisy_subset(settings(ended[0], reward__pairs=40), rows, 0)


def test_proxies_learn_from_training_pairs_alone(ended):
  """The pairs stored with each proxy come from the training files and are within the limits. A
  quarter of them is exchanged.
  """
  root, workdir, _ = ended
  cfg = settings(root)
  known = {}
  for pattern in cfg.scratch.pairs.split(","):
    for row in scratch.load(scratch.derived(cfg, "reward", pattern).data, "pair"):
      known.setdefault(json.dumps(row["prompt"]), []).append((row["chosen"], row["rejected"]))
  subsets = [read_jsonl(workdir / f"proxy_{seed}/pairs.jsonl") for seed in (0, 1)]
  assert subsets[0] != subsets[1]
  for subset in subsets:
    assert len(subset) == 12 and sum(row["flipped"] for row in subset) == 3
    for row in subset:
      pair = row["chosen"], row["rejected"]
      assert (pair[::-1] if row["flipped"] else pair) in known[json.dumps(row["prompt"])]


# ---- resuming ----


def test_a_killed_run_ends_as_the_unbroken_one(ended, tmp_path, monkeypatch, capsys):
  """Killed while gold scores the second step of the second arm, then started again with the same
  command.
  """
  root, workdir, _ = ended
  cfg, again, calls, original = (
    settings(root, lab__seeds=(0,)),
    begun(ended, tmp_path),
    [],
    realtext.against_gold,
  )
  shutil.copytree(workdir / "runs/vanilla", again / "runs/vanilla")

  def dies(*args):
    calls.append(1)
    if len(calls) == 2:
      raise KeyboardInterrupt
    return original(*args)

  with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
    patched.setattr(realtext, "against_gold", dies)
    realtext.run(cfg, again)
  assert len(timeless(again, "r2m", 0)) == 1
  capsys.readouterr()
  realtext.run(cfg, again)
  shown = capsys.readouterr().out
  assert "r2m: resumes at step 1 of 2" in shown and "vanilla of seed 0: done before" in shown
  for arm in cfg.lab.arms:
    assert policy_bytes(again, arm, 0) == policy_bytes(workdir, arm, 0)
    assert timeless(again, arm, 0) == timeless(workdir, arm, 0)


def test_an_arm_with_other_settings_is_refused(ended):
  root, workdir, _ = ended
  with pytest.raises(ConfigError, match="holds a run of another config(?s:.*)config.policy.lr"):
    realtext.run(settings(root, policy__lr=1e-2), workdir)


def test_processes_share_the_work(tmp_path):
  """An arm that another process runs comes last, after that process has ended. No process repeats
  work.
  """
  done = []
  jobs = {name: functools.partial(done.append, name) for name in "abc"}
  with realtext.alone(tmp_path, "a"):
    process = threading.Thread(target=realtext.share_out, args=(tmp_path, jobs))
    process.start()
    deadline = time.monotonic() + 60
    while len(done) < 2 and time.monotonic() < deadline:
      time.sleep(0.01)
    assert done == ["b", "c"] and process.is_alive()
  process.join(60)
  assert done == ["b", "c", "a"]


# ---- files ----


def test_table_and_summary(ended):
  """The table has the rows of each run, differences are paired by seed, and the report has the
  tables of the reward models.
  """
  root, workdir, _ = ended
  for arm in ("vanilla", "r2m"):
    columns, _ = read_table(workdir / "table" / f"{arm}.parquet")
    for seed in (0, 1):
      mine = columns["seed"] == seed
      for name in ("reward/gold", "reward/frozen", "reward/used", "kl", "length", "truncated"):
        np.testing.assert_allclose(
          columns[name][mine], [row[name] for row in timeless(workdir, arm, seed)], rtol=1e-6
        )
  rows = {
    (row["arm"], row["measure"], row["against"]): row
    for row in csv.DictReader((workdir / "summary.csv").open())
  }
  final = {
    arm: [timeless(workdir, arm, seed)[-1]["reward/gold"] for seed in (0, 1)]
    for arm in ("vanilla", "r2m")
  }
  gap = np.mean(np.subtract(final["r2m"], final["vanilla"]))
  assert float(rows["r2m", "final", "vanilla"]["value"]) == pytest.approx(gap, abs=1e-4)
  assert rows["r2m", "final", "vanilla"]["seeds"] == "2"
  page = (workdir / "report.html").read_text()
  found = json.loads((workdir / "reward_models.json").read_text())
  assert set(found["proxies"]) == {"0", "1"} and all(
    table["title"] in page for table in found["tables"]
  )
  accuracy = found["tables"][0]["rows"]
  sets = [int(row[3]) for row in accuracy if row[0].endswith("_val")]
  assert (
    len(sets) == 7
    and accuracy[-1][0] == "all validation sets"
    and int(accuracy[-1][3]) == sum(sets) > 0
  )
  assert sorted(path.name for path in (workdir / "figures").iterdir()) == [
    "1_gold_against_step.png",
    "2_frontier.png",
    "3_differences.png",
  ]


# ---- errors before any work ----


@pytest.mark.parametrize(
  "field, value, message",
  [
    (
      "lab.betas",
      (1.0, 2.0),
      r"config.lab.betas is \(1.0, 2.0\): on text an arm has one KL weight",
    ),
    ("kl.estimator", "k2", "config.lab.arms: vanilla: config.kl.estimator must be 'exact'"),
    ("kl.estimator", "auto", "config.lab.arms: vanilla: config.kl.estimator must be 'exact'"),
    ("budget", 9.0, "config.budget is 9.0: runs of as many steps are compared"),
    ("gold.depth", 0, "config.gold.depth is 0: must be at least 1"),
    (
      "reward.max_length",
      0,
      "config.reward.max_reply_length is 8: long prompts lose their beginning at .* which is 0",
    ),
    ("gold.budget", -1.0, "config.gold.budget is -1.0: must be at least 0"),
    ("gold.lr_schedule", "step", "config.gold.lr_schedule is 'step': choose one of"),
    ("scratch.pairs", "", "config.scratch.pairs is '': task=lab_text needs it"),
    ("scratch.prompts_val", "", "config.scratch.prompts_val is '': task=lab_text needs it"),
    (
      "lab.arms",
      ("pretrained_rm",),
      "config.lab.arms: pretrained_rm: config.variant .* fit the reward model first",
    ),
    (
      "lab.arms",
      ("vanilla reward.ensemble=3",),
      "config.lab.arms: vanilla: config.reward.ensemble is 3: a folder's",
    ),
  ],
)
def test_settings_that_cannot_work_are_refused(field, value, message):
  cfg = real_gold.get_config("test")
  check_config(cfg)
  with pytest.raises(ConfigError, match=message):
    cfg.update_from_flattened_dict({field: value})
    check_config(cfg)


def test_without_data_it_says_what_to_download(tmp_path):
  with pytest.raises(DataError, match="there is no file(?s:.*)huggingface.co/datasets"):
    realtext.run(real_gold.get_config("test"), tmp_path / "run")
  assert not (tmp_path / "run").exists()


def test_what_each_model_may_learn_from():
  """Only reward models are trained on harmless-base. No held-out row is used for training."""
  names = real_gold.get_config().scratch
  assert "harmless" in names.pairs
  assert not any("harmless" in names[field] for field in ("corpus", "sft", "prompts"))
  assert not any(
    "_val" in names[f] or "_dev" in names[f] for f in ("corpus", "sft", "pairs", "prompts")
  )
