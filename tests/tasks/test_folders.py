"""Runs from Hugging Face folders: sft, reward and R2M across families and tokenizers, and the files
that they write.
"""

import json
import pathlib
import sys

import numpy as np
import pytest
import safetensors.numpy
import small as small_run
import tiny_text
import torch
import transformers
from frames import frames_to_the_step
from test_serve import ASK, config, read, their_scores, write

from r2m_jax import main
from r2m_jax.config import ConfigError, check_config
from r2m_jax.data.jsonl import DataError
from r2m_jax.data.text import TextError
from r2m_jax.hf import export, parity
from r2m_jax.hf.card import write_card
from r2m_jax.hf.folders import (
  HEAD_CONFIG,
  HEAD_WEIGHTS,
  RENDERER,
  FolderError,
  load_policy,
  load_reward,
  mesh_of,
)
from r2m_jax.run.files import plain
from r2m_jax.run.metrics import ROW_KEYS, read_metrics
from r2m_jax.tasks import export as export_task
from r2m_jax.tasks import folders as folders_task
from r2m_jax.tasks import replay, rewardbench, serve

PROMPTS = [
  "The cat sat on",
  "What is the sea?",
  ASK,
  "rain",
  "Please write a poem about the sea",
  "The dog ran",
]
TURNS = [p if isinstance(p, str) else "Who?" for p in PROMPTS]
PAIRS = [{"prompt": p, "chosen": "the mat.", "rejected": "Paris it is"} for p in TURNS]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
  """A policy (qwen2, ChatML) and two reward models of other families with other tokenizers."""
  root = tmp_path_factory.mktemp("models")
  tiny_text.model("qwen2", "chatml", root / "policy")
  tiny_text.model("llama3.1", "llama3", root / "reward", classifier=True, hidden_size=48)
  tiny_text.model("pythia", "plain", root / "plain", classifier=True)
  return root


def small(folders, tmp_path, **overrides):
  settings = dict(
    policy__path=str(folders / "policy"),
    reward__path=str(folders / "reward"),
    steps=3,
    rollout__prompts=2,
    rollout__group_size=2,
    rollout__max_new_tokens=6,
    sft__batch_size=4,
    sft__steps=4,
    sft__warmup_steps=0,
    reward__batch_size=3,
    reward__epochs=1,
    log__samples=2,
    log__checkpoint_every=2,
    r2m__attention_dim=16,
    policy__lr=1e-3,
    r2m__lr=1e-2,
    r2m__num_heads=2,
    export__check=True,
  )
  return config(**(settings | overrides))


def run(cfg, workdir):
  folders_task.run(cfg, workdir)
  return workdir / "export"


@pytest.fixture(scope="module")
def r2m_run(folders, tmp_path_factory):
  """Three R2M steps across families and tokenizers, with every reward-model input recorded."""
  tmp_path = tmp_path_factory.mktemp("r2m")
  rows = [{"prompt": p} for p in PROMPTS]
  # all prompts are in each step, so the padded length is constant and there is one program
  cfg = small(
    folders, tmp_path, data__name=write(tmp_path / "data.jsonl", rows), rollout__prompts=len(rows)
  )
  with small_run.recorded_steps(folders_task, "make_two_part_step") as seen:
    folders_task.run(cfg, tmp_path / "run")
  return cfg, tmp_path / "run", seen


def test_five_frames_lead_to_the_compiled_step(folders, tmp_path, monkeypatch):
  """As many as on the gold-reward task: main.main calls main.run, then the functions counted
  here.
  """
  data = write(tmp_path / "data.jsonl", [{"prompt": p} for p in PROMPTS])
  cfg = small(folders, tmp_path, data__name=data, task="r2m")
  found = frames_to_the_step(monkeypatch, folders_task, lambda: main.run(cfg, tmp_path / "run"))
  assert found == ["run", "run", "train", "step"]


def test_r2m_across_families_and_tokenizers(r2m_run, folders):
  """The frozen score of every sample equals that of transformers for text rendered by hand."""
  _, workdir, seen = r2m_run
  assert len(seen) == 3
  policy_hf = transformers.AutoTokenizer.from_pretrained(folders / "policy")
  hf = transformers.AutoTokenizer.from_pretrained(folders / "reward")
  model = transformers.AutoModelForSequenceClassification.from_pretrained(folders / "reward")
  ends = [policy_hf.eos_token_id, policy_hf.convert_tokens_to_ids("<|im_end|>")]
  kinds = set()
  for out, rows in seen:
    T = out.sequences.response_mask.shape[1]
    by_hand = []
    for i, (prompt, _, _) in enumerate(rows):
      tokens = out.sequences.tokens[i, -T:][out.sequences.response_mask[i]].tolist()
      finished = tokens[-1] in ends
      kinds.add(finished)
      response = policy_hf.decode(tokens[:-1] if finished else tokens, skip_special_tokens=True)
      turns = prompt if isinstance(prompt, list) else [{"role": "user", "content": prompt}]
      text = "<s>" + "".join(
        f"<|start|>{t['role']}<|stop|>{t['content'].strip()}<|eot|>" for t in turns
      )
      text += "<|start|>assistant<|stop|>" + (
        response.strip() + "<|eot|>" if finished else response.lstrip()
      )
      by_hand.append(hf(text, add_special_tokens=False)["input_ids"])
    np.testing.assert_allclose(out.judged.scores_frozen, their_scores(model, by_hand), atol=1e-4)
  assert False in kinds  # truncated responses
  rows = [row for row in read(workdir / "metrics.jsonl") if row["stage"] == "rl"]
  assert [row["step"] for row in rows] == [0, 1, 2] and rows[0]["policy/old_ref_deviation"] == 0
  samples = read(workdir / "samples.jsonl")
  assert {row["when"] for row in samples} == {"before", "after"} and all(
    row["response"] is not None for row in samples
  )


def test_r2m_ends_with_folders_that_score_alike(r2m_run, folders, tmp_path, capsys):
  """task=score on the exports agrees with the PyTorch module in the exported folder on 20 random
  trajectories.
  """
  cfg, workdir, _ = r2m_run
  out = workdir / "export"
  names = {path.name for path in (out / "reward").iterdir()}
  assert {
    HEAD_CONFIG,
    HEAD_WEIGHTS,
    RENDERER,
    "r2m_head.py",
    "README.md",
    "tokenizer.json",
  } <= names
  assert not [name for name in names if name.endswith((".bin", ".pkl", ".pt"))]
  fields = json.loads((out / "reward" / HEAD_CONFIG).read_text())
  assert (fields["policy_hidden_size"], fields["reward_hidden_size"], fields["omega"]) == (
    32,
    48,
    pytest.approx(0.6),
  )
  rng = np.random.default_rng(0)
  words = "the cat sat on a mat rain sea trees Paris short poem dog ran".split()
  rows = [
    {
      "prompt": " ".join(rng.choice(words, 4)),
      "response": " ".join(rng.choice(words, rng.integers(1, 9))),
      "truncated": bool(i % 2),
    }
    for i in range(20)
  ]
  scoring = config(
    task="score",
    reward__path=str(out / "reward"),
    policy__path=str(out / "policy"),
    score__input=write(tmp_path / "in.jsonl", rows),
    score__output=str(tmp_path / "out.jsonl"),
  )
  serve.run(scoring)
  got = [row["score"] for row in read(tmp_path / "out.jsonl")]

  sys.path.insert(0, str(out / "reward"))
  try:
    sys.modules.pop("r2m_head", None)
    import r2m_head  # the copy in the folder

    assert pathlib.Path(r2m_head.__file__).parent == out / "reward"
  finally:
    sys.path.pop(0)
  head = r2m_head.R2MHead.from_folder(out / "reward")
  reward_model = transformers.AutoModelForSequenceClassification.from_pretrained(out / "reward")
  policy = transformers.AutoModelForCausalLM.from_pretrained(out / "policy")
  renderer = load_reward(str(out / "reward"), scoring).renderer
  tokenizer = load_policy(str(out / "policy"), scoring).tokenizer
  want = [
    r2m_head.score(
      head,
      reward_model,
      torch.tensor([renderer.ids(row["prompt"], row["response"], truncated=row["truncated"])]),
      policy,
      torch.tensor([serve.policy_ids(tokenizer, row)]),
    )
    for row in rows
  ]
  np.testing.assert_allclose(got, want, atol=1e-4)
  assert np.std(got) > 1e-3
  whole = [i for i, row in enumerate(rows) if not row["truncated"]]
  pairs = [
    {"prompt": rows[i]["prompt"], "chosen": rows[i]["response"], "rejected": "Paris, poem"}
    for i in whole
  ]
  bench = config(
    task="rewardbench",
    reward__path=str(out / "reward"),
    policy__path=str(out / "policy"),
    rewardbench__data=write(tmp_path / "pairs.jsonl", pairs),
  )
  check_config(bench)
  rewardbench.run(bench, tmp_path / "bench")
  chosen = [row["scores"][0] for row in read(tmp_path / "bench/scores.jsonl")]
  np.testing.assert_allclose(chosen, [want[i] for i in whole], atol=1e-4)
  with pytest.raises(
    FolderError, match="an R2M reward model, which reads the policy's hidden states"
  ):
    scoring.policy.path = ""
    serve.run(scoring)
  tiny_text.model("llama2", "plain", tmp_path / "wide", hidden_size=48)
  with pytest.raises(FolderError, match="reads hidden states of 32 numbers; those of .* have 48"):
    scoring.policy.path = str(tmp_path / "wide")
    serve.run(scoring)


def test_a_reward_model_with_a_head_goes_on_with_it_also_as_an_average(r2m_run):
  """With r2m.average the average scores, so it starts from the folder's head as well."""
  cfg, workdir, _ = r2m_run
  cfg = cfg.copy_and_resolve_references()
  cfg.reward.path, cfg.r2m.average = str(workdir / "export/reward"), 0.9
  mesh = mesh_of(cfg)
  policy, reward = load_policy(cfg.policy.path, cfg, mesh), load_reward(cfg.reward.path, cfg, mesh)
  built = folders_task.build_run(cfg, mesh, policy, reward)
  state = folders_task.start_state(cfg, built, policy, reward, donate=False)
  of_folder = safetensors.numpy.load_file(workdir / "export/reward" / HEAD_WEIGHTS)
  for head in (state.reward_head, state.reward_average):
    for name in ("wq", "wk", "wv", "wo", "phi"):
      np.testing.assert_array_equal(head[name]["kernel"][...].T, of_folder[f"{name}.weight"])


def test_r2m_goes_on_and_exports_any_checkpoint(r2m_run, tmp_path, capsys):
  cfg, workdir, seen = r2m_run

  def files(folder):
    return {p.name: p.read_bytes() for p in folder.iterdir() if p.is_file()}

  before = files(workdir / "export/policy") | files(workdir / "export/reward")
  folders_task.run(cfg, workdir)  # the run is finished: it exports again
  assert (
    files(workdir / "export/policy") | files(workdir / "export/reward") == before and len(seen) == 3
  )
  for path in (workdir, workdir / "checkpoints/r2m/3"):
    exporting = config(
      task="export", export__checkpoint=str(path), export__out=str(tmp_path / "out")
    )
    export_task.run(exporting)
    assert files(tmp_path / "out/policy") | files(tmp_path / "out/reward") == before
  shown = capsys.readouterr().out
  assert "parity   max |logit - that of transformers|" in shown and "ABOVE" not in shown
  exporting.export.checkpoint = str(workdir / "checkpoints/r2m/2")
  exporting.export.check = False
  export_task.run(exporting)
  assert json.loads((tmp_path / "out/reward" / HEAD_CONFIG).read_text())["omega"] == pytest.approx(
    0.6
  )
  assert files(tmp_path / "out/policy")["model.safetensors"] != before["model.safetensors"]
  for path, message in (
    (workdir / "checkpoints/r2m/1", r"steps \[2, 3\], not of 1"),
    (workdir / "checkpoints/none", "give one of .*checkpoints/r2m"),
    (tmp_path, "neither it nor a folder above it is the workdir of a run"),
  ):
    exporting.export.checkpoint = str(path)
    with pytest.raises(FolderError, match=message):
      export_task.run(exporting)


def test_any_sample_is_made_again(r2m_run, folders, capsys):
  """From the beginning and from a checkpoint. Oracles: recordings of the run, transformers, eq.
  4.
  """
  cfg, workdir, seen = r2m_run
  seen = list(seen)

  def kept():
    return {
      p: p.read_bytes() for p in workdir.rglob("*") if p.is_file() and p.parent.name != "replay"
    }

  before, K = kept(), cfg.rollout.group_size
  hf = transformers.AutoTokenizer.from_pretrained(folders / "policy")
  model = transformers.AutoModelForCausalLM.from_pretrained(folders / "policy").eval()
  for step, prompt, sample in ((0, 1, 1), (1, 4, 0), (2, 2, 1)):  # checkpoints are at 2 and 3
    found = replay.run(
      config(task="replay", replay__step=step, replay__prompt=prompt, replay__sample=sample),
      workdir,
    )
    (out, rows), row = seen[step], prompt * K + sample
    keep, tokens = out.sequences.response_mask[row], out.sequences.tokens[row]
    assert (
      found["tokens"] == tokens[-len(keep) :][keep].tolist()
      and found["response_text"] == rows[row][1]
    )
    assert (
      found["prompt_text"] == folders_task.prompt_text(rows[row][0])
      and found["truncated"] == rows[row][2]
    )
    assert (found["reward"], found["frozen"]) == (
      plain(out.judged.scores[row]),
      plain(out.judged.scores_frozen[row]),
    )
    assert found["reward_reads"].startswith("<s><|start|>")
    fused = found["omega"] * found["own"][0] + (1 - found["omega"]) * found["read"][0]
    assert fused == pytest.approx(found["reward"], abs=1e-5)
    np.testing.assert_allclose(np.sum(found["attention"], -1), 1, rtol=1e-5)
    ids, n = tokens[out.sequences.token_mask[row]], len(found["tokens"])
    assert np.shape(found["attention"]) == (2, len(ids)) and found["states"] == [
      hf.decode([i]) for i in ids
    ]
    with torch.no_grad():  # the reference: the folder's own policy
      want = model(torch.tensor(ids)[None].long()).logits[0].log_softmax(-1)[-n - 1 : -1]
    np.testing.assert_allclose(found["ref_logprobs"], want[range(n), found["tokens"]], atol=1e-4)
    assert (found["logprobs"] == found["ref_logprobs"]) == (step == 0)
    shown = capsys.readouterr().out
    assert "metrics of the step against metrics.jsonl: largest difference 0.0e+00" in shown, shown
  assert kept() == before
  by_id = config(
    task="replay", replay__step=2, replay__example_id=found["example_id"], replay__sample=1
  )
  assert replay.run(by_id, workdir) == found
  rows = pathlib.Path(cfg.data.name).read_bytes()
  try:
    pathlib.Path(cfg.data.name).write_bytes(rows.replace(b"The dog ran", b"The dog sat"))
    with pytest.raises(
      ConfigError, match="6 rows that are not the 6 .*data.jsonl gave 6 rows then, others now"
    ):
      replay.run(config(task="replay", replay__step=1), workdir)
  finally:
    pathlib.Path(cfg.data.name).write_bytes(rows)


def test_model_card(r2m_run):
  _, workdir, _ = r2m_run
  card = (workdir / "export/reward/README.md").read_text()
  assert (
    card.startswith("---\nlibrary_name: transformers\n") and "base_model" not in card
  )  # there is no hub name
  assert "from reward, policy" in card and "data.jsonl" in card and "- variant: r2m" in card
  assert (
    "| reward/used |" in card
    and "r2m_head.R2MHead.from_folder" in card
    and str(workdir.parent) not in card
  )


def test_a_run_from_folders_logs_what_is_documented_and_phases_that_add_up(r2m_run):
  rows = read_metrics(r2m_run[1])
  phases = [f"seconds/{name}" for name in ("data", "rollout", "render", "learn")]
  for row in rows:
    assert row.keys() - set(ROW_KEYS) <= small_run.documented_metrics().keys()
    parts = sum(row[name] for name in phases)
    assert min(row[name] for name in phases) > 0 and parts <= row["seconds/step"] + 1e-6
    assert 0 < row["speed/generated_tokens"] < row["speed/tokens"]
  (out, _), row = r2m_run[2][0], rows[0]
  mask, T = out.sequences.token_mask, out.sequences.response_mask.shape[1]
  K = len(mask) // len(set(map(bytes, out.sequences.tokens[:, :-T])))
  once = mask.copy()
  once[np.arange(len(mask)) % K > 0, :-T] = False  # a prompt is computed once
  places = mask.size - (len(mask) - len(mask) // K) * (mask.shape[1] - T)
  computed = row.get("learn/computed", 1.0) * places
  assert row["real/learn"] == pytest.approx(once.sum() / computed, rel=1e-6)
  assert row["lr/policy"] == pytest.approx(1e-3) and row["lr/reward"] == pytest.approx(1e-2)


def test_only_hub_names_are_base_models(tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  (tmp_path / "runs/mine").mkdir(parents=True)
  cfg = config(task="r2m", data__name="data.jsonl")
  for bases, shown, listed in (
    (
      ["someone/model", "runs/mine"],
      "from someone/model, mine, made",
      "base_model:\n- someone/model\ntags:",
    ),
    (["runs/mine"], "from mine, made", None),
    (["runs"], "from runs, made", None),
  ):
    write_card(tmp_path, cfg, tmp_path / "work", kind="policy", bases=bases)
    card = (tmp_path / "README.md").read_text()
    assert shown in card and (listed in card if listed else "base_model" not in card)


def test_a_reward_checkpoint_of_another_template_is_refused(r2m_run, folders, tmp_path):
  cfg, workdir, _ = r2m_run
  import shutil

  shutil.copytree(workdir / "export/reward", tmp_path / "reward")
  tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "reward")
  tokenizer.chat_template = tiny_text.CHATML
  tokenizer.save_pretrained(tmp_path / "reward")
  with pytest.raises(
    TextError, match="made with another rendering of its input(.|\n)*template_sha256"
  ):
    load_reward(str(tmp_path / "reward"), cfg)
  (tmp_path / "run").mkdir()
  (tmp_path / "run" / RENDERER).write_text((workdir / RENDERER).read_text())
  other = small(folders, tmp_path, reward__path=str(folders / "plain"), data__name=cfg.data.name)
  with pytest.raises(TextError, match="another rendering"):
    folders_task.run(other, tmp_path / "run")


def test_sft_from_a_folder(folders, tmp_path, capsys):
  rows = [{"prompt": prompt, "response": "the mat."} for prompt in PROMPTS]
  cfg = small(
    folders, tmp_path, task="sft", sft__lr=1e-2, data__name=write(tmp_path / "data.jsonl", rows)
  )
  out = run(cfg, tmp_path / "run")
  losses = [row["loss"] for row in read(tmp_path / "run/metrics.jsonl")]
  assert losses[-1] < losses[0]
  model, info = transformers.AutoModelForCausalLM.from_pretrained(
    out / "policy", output_loading_info=True
  )
  assert not any(info.values())
  policy = load_policy(str(folders / "policy"), cfg)
  ids = [
    (policy.tokenizer.render(r["prompt"]), policy.tokenizer.encode("the mat.", special=False))
    for r in rows
  ]
  nll = 0
  for prompt, response in ids:  # the trained model has learned the response and its end-of-turn
    response = response + [policy.tokenizer.end_id]
    with torch.no_grad():
      logp = torch.log_softmax(
        model(torch.tensor([prompt + response])).logits[0, len(prompt) - 1 : -1], -1
      )
    nll -= logp[range(len(response)), response].mean().item() / len(rows)
  assert nll < losses[0] - 0.3
  assert (out / "policy/chat_template.jinja").exists() and "supervised" in (
    out / "policy/README.md"
  ).read_text()
  shown = capsys.readouterr().out
  assert "within 1e-04" in shown and "tokens: 'the mat.<|im_end|>'" in shown
  cfg.data.max_prompt_length = 1
  with pytest.raises(
    DataError, match="no row of config.data.name is left for sft; 6 dropped: prompt over 1 tokens"
  ):
    folders_task.run(cfg, tmp_path / "again")
  cfg.data.max_prompt_length, cfg.sft.batch_size = 64, 64
  with pytest.raises(ConfigError, match="config.sft.batch_size is 64: more than the 6 rows"):
    folders_task.run(cfg, tmp_path / "third")


@pytest.mark.parametrize("start", ["plain", "policy"])
def test_reward_from_a_folder(start, folders, tmp_path, capsys):
  """From a reward model, and from a policy without a score head."""
  cfg = small(
    folders,
    tmp_path,
    task="reward",
    reward__path=str(folders / start),
    reward__lr=1e-3,
    reward__epochs=2,
    data__name=write(tmp_path / "data.jsonl", PAIRS),
  )
  out = run(cfg, tmp_path / "run")
  model, info = transformers.AutoModelForSequenceClassification.from_pretrained(
    out / "reward", output_loading_info=True
  )
  assert not any(info.values()) and "within 1e-04" in capsys.readouterr().out
  contract = json.loads((out / "reward" / RENDERER).read_text())
  assert (contract["joiner"] == " ") == (start == "plain")
  tensors = safetensors.numpy.load_file(out / "reward/model.safetensors")
  assert "score.bias" not in tensors and np.abs(tensors["score.weight"]).max() > 0
  reward = load_reward(str(out / "reward"), cfg)
  chosen = their_scores(model, [reward.renderer.ids(row["prompt"], row["chosen"]) for row in PAIRS])
  rejected = their_scores(
    model, [reward.renderer.ids(row["prompt"], row["rejected"]) for row in PAIRS]
  )
  assert np.mean(chosen) > np.mean(rejected)


@pytest.mark.long
@pytest.mark.parametrize(
  "policy, reward",
  [
    ("llama3.1", "gemma2"),
    ("mistral", "pythia"),
    ("qwen2", "llama2"),
    ("qwen3", "mistral"),
    ("gemma2", "gemma3"),
    ("gemma3", "qwen2"),
    ("pythia", "qwen3"),
    ("neox_sequential", "llama3.1"),
  ],
)
def test_every_family_in_every_task(policy, reward, tmp_path, capsys):
  """sft of a policy, reward training of a classifier of another family, and R2M from the two
  exports.
  """
  tiny_text.model(policy, "chatml", tmp_path / "policy")
  tiny_text.model(reward, "llama3", tmp_path / "reward", classifier=True, hidden_size=64)
  rows = [{"prompt": p, "response": "the mat."} for p in PROMPTS]
  stages = dict(
    sft=(rows, dict(reward__path="")),
    reward=(PAIRS, dict(policy__path="")),
    r2m=(
      rows,
      dict(
        policy__path=str(tmp_path / "sft/export/policy"),
        reward__path=str(tmp_path / "reward_run/export/reward"),
      ),
    ),
  )
  for task, (data, paths) in stages.items():
    data = write(tmp_path / f"{task}.jsonl", data)
    out = run(
      small(tmp_path, tmp_path, task=task, data__name=data, **paths),
      tmp_path / ("reward_run" if task == "reward" else task),
    )
    names = {"sft": {"policy"}, "reward": {"reward"}, "r2m": {"policy", "reward"}}[task]
    assert {path.name for path in out.iterdir()} == names
  shown = capsys.readouterr().out
  print("\n".join(line for line in shown.splitlines() if line.startswith("parity")))
  assert shown.count("within 1e-04") == 4 and "ABOVE" not in shown
  values = [
    row["reward/used"] for row in read(tmp_path / "r2m/metrics.jsonl") if row["stage"] == "rl"
  ]
  assert len(values) == 3 and np.isfinite(values).all()


def test_what_a_run_needs(folders, tmp_path):
  data = write(tmp_path / "data.jsonl", [{"prompt": "a"}])
  for overrides, error, message in (
    (
      dict(reward__path=""),
      FolderError,
      "config.reward.path is empty: task=r2m from folders needs a policy and",
    ),
    (
      dict(task="lab"),
      ConfigError,
      "config.task is 'lab': from a folder it is one of sft, reward, r2m",
    ),
    (
      dict(task="reward"),
      DataError,
      "1 missing field, first .*data.jsonl:1: no chosen; the row has prompt",
    ),
    (dict(r2m__feedback_layer=3), ConfigError, "feedback_layer is 3: the policy has 3 layers"),
    (dict(), ConfigError, "rollout.prompts is 2: more than the 1 rows"),
  ):
    with pytest.raises(error, match=message):
      folders_task.run(
        small(folders, tmp_path, data__name=data, **overrides), tmp_path / message[:12]
      )


def test_main_tells_bad_input_in_one_line(folders, tmp_path, capsys):
  cfg = small(folders, tmp_path, data__name=str(tmp_path / "absent.jsonl"))
  with pytest.raises(SystemExit) as stopped:
    main.run(cfg, tmp_path / "run")
  assert stopped.value.code == 2 and "error: there is no file" in capsys.readouterr().err


def test_push_uploads_a_private_model(tmp_path, monkeypatch):
  import huggingface_hub

  calls = []

  class Api:
    def create_repo(self, name, *, private, exist_ok):
      calls.append((name, private, exist_ok))

    def upload_folder(self, *, repo_id, folder_path, commit_message):
      calls.append((repo_id, folder_path))

  monkeypatch.setattr(huggingface_hub, "HfApi", Api)
  cfg = config(export__check=False, export__push_to="me/mine")
  export.finish(cfg, tmp_path, "reward", None)
  assert calls == [("me/mine-reward", True, True), ("me/mine-reward", str(tmp_path))]


def test_an_export_replaces_models_and_nothing_else(tmp_path):
  (tmp_path / "notes").mkdir()
  (tmp_path / "notes/thesis.txt").write_text("mine")
  with pytest.raises(FolderError, match="is not empty and holds no model"):
    with export.new_folder(tmp_path / "notes"):
      pass
  assert parity.available()


def test_labels_warm_start_and_greedy_baselines_from_folders(folders, tmp_path, capsys):
  """Judgments from a file are used to fit the head before RL and to order its pairs in the run.
  Greedy rows are also scored.
  """
  cfg = small(
    folders,
    tmp_path,
    data__name=write(tmp_path / "data.jsonl", [{"prompt": p} for p in PROMPTS]),
    steps=2,
    algorithm="remax",
    variant="warm_start",
    r2m__labels="preference",
    r2m__label_budget=0.75,
    r2m__warm_epochs=3,
    r2m__judgments=write(tmp_path / "pairs.jsonl", PAIRS),
    export__check=False,
  )
  out = run(cfg, tmp_path / "run")
  rows = read(tmp_path / "run/metrics.jsonl")
  fit = [row["loss"] for row in rows if row["stage"] == "warm_start"]
  assert len(fit) >= 2 and np.isfinite(fit).all()
  rl = [row for row in rows if row["stage"] == "rl"]
  assert [row["step"] for row in rl] == [0, 1] and all(np.isfinite(row["r2m/bt"]) for row in rl)
  assert (out / "reward" / HEAD_WEIGHTS).exists()
  assert "6 of 6 judgments" in capsys.readouterr().out


def test_a_critic_cannot_start_from_a_reward_model_with_other_tokens(folders, tmp_path):
  cfg = small(
    folders,
    tmp_path,
    data__name=write(tmp_path / "data.jsonl", [{"prompt": "rain"}]),
    algorithm="ppo",
  )
  with pytest.raises(ConfigError, match="critic.init is 'reward'.*use 'policy'"):
    folders_task.run(cfg, tmp_path / "run")


@pytest.mark.parametrize(
  "settings, message",
  [
    (dict(variant="warm_start"), "r2m.judgments is ''"),
    (dict(variant="r2m", r2m__labels="preference"), "r2m.judgments is ''"),
    (dict(variant="pretrained_rm"), "run task=reward on golden pairs"),
    (dict(reward__ensemble=3), "one score head"),
  ],
)
def test_what_folders_cannot_do_is_refused(settings, message):
  with pytest.raises(ConfigError, match=message):
    check_config(config(policy__path="p", reward__path="r", **settings))
