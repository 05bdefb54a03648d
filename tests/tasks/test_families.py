"""Every family in all stages, with a reward model of another family; published forms of reward
models. Oracle: transformers in torch float32.
"""

import json

import hf_models
import numpy as np
import pytest
import tiny_text
import transformers
from test_folders import PAIRS, PROMPTS, small
from test_serve import config, read, their_scores, write

from r2m_jax.hf import parity
from r2m_jax.hf.folders import FolderError, load_reward, mesh_of
from r2m_jax.tasks import folders as folders_task
from r2m_jax.tasks import serve

# case of hf_models -> the family of its reward model
REWARDS = {
  "gemma3_folder": "qwen3",
  "mistral_yarn": "olmo2",
  "ministral": "llama3.2",
  "ministral3": "qwen3_yarn",
  "qwen3_yarn": "ministral",
  "llama3.2": "gemma3_folder",
  "olmo2": "phi4_mini",
  "olmo3": "granite4",
  "smollm3": "olmo3",
  "phi3": "smollm3",
  "phi4_mini": "granite",
  "granite": "ministral3",
  "granite4": "phi3",
}
QUICK = {"olmo3", "phi4_mini"}


@pytest.mark.parametrize(
  "case", [c if c in QUICK else pytest.param(c, marks=pytest.mark.long) for c in REWARDS]
)
def test_a_family_through_sft_reward_and_r2m(case, tmp_path):
  tiny_text.model(case, "chatml", tmp_path / "policy")
  tiny_text.model(REWARDS[case], "llama3", tmp_path / "base")
  rows = [{"prompt": p, "response": "the mat."} for p in PROMPTS[:2]] * 2
  sft = small(
    tmp_path,
    tmp_path,
    task="sft",
    sft__steps=2,
    data__name=write(tmp_path / "sft.jsonl", rows),
    export__check=False,
  )
  folders_task.run(sft, tmp_path / "sft")
  reward = small(
    tmp_path,
    tmp_path,
    task="reward",
    reward__path=str(tmp_path / "base"),
    data__name=write(tmp_path / "pairs.jsonl", PAIRS),
    export__check=False,
  )
  folders_task.run(reward, tmp_path / "reward")
  prompts = [{"prompt": p} for p in PROMPTS[:2]]
  rl = small(
    tmp_path,
    tmp_path,
    policy__path=str(tmp_path / "sft/export/policy"),
    reward__path=str(tmp_path / "reward/export/reward"),
    data__name=write(tmp_path / "prompts.jsonl", prompts),
    export__check=False,
  )
  folders_task.run(rl, tmp_path / "r2m")
  metrics = read(tmp_path / "r2m/metrics.jsonl")
  assert len(metrics) == 3
  values = [v for row in metrics for v in row.values() if isinstance(v, float)]
  assert np.isfinite(values).all()
  assert metrics[-1]["kl"] != 0
  out = tmp_path / "r2m/export"
  assert parity.policy_gap(out / "policy").value <= parity.BOUND
  assert parity.reward_gap(out / "reward", out / "policy").value <= parity.BOUND


def test_published_reward_models_score_as_their_cards_say(tmp_path):
  """Models like Skywork-Reward-V2: a classifier, a chat template that adds its own system prompt,
  and the rendered text without a second BOS.
  """
  system = "{{ '<|start|>system<|stop|>Date: 2 July 2025<|eot|>' }}"
  _, hf = tiny_text.model("qwen3", "llama3", tmp_path / "reward", classifier=True)
  hf.chat_template = tiny_text.LLAMA3.replace("{{ bos_token }}", "{{ bos_token }}" + system)
  hf.model_max_length = 16  # their usage notes do not truncate to it, so neither do we
  hf.save_pretrained(tmp_path / "reward")
  rows = [
    {"prompt": "What is the capital of France?", "response": "It is Paris."},
    {"prompt": [{"role": "user", "content": "rain"}], "response": "trees and the sea " * 4},
  ]
  settings = config(reward__path=str(tmp_path / "reward"))
  mesh = mesh_of(settings)
  got = serve.score(settings, load_reward(settings.reward.path, settings, mesh), None, rows, mesh)
  model = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / "reward")
  ids = []
  for row in rows:
    turns = row["prompt"]
    turns = [{"role": "user", "content": turns}] if isinstance(turns, str) else turns
    turns = [*turns, {"role": "assistant", "content": row["response"]}]
    text = hf.apply_chat_template(turns, tokenize=False)
    assert text.startswith("<s><|start|>system<|stop|>Date: 2 July 2025")
    ids.append(hf(text.removeprefix(hf.bos_token))["input_ids"])
    assert ids[-1][0] == hf.bos_token_id and len(ids[-1]) > 16
  np.testing.assert_allclose(got, their_scores(model, ids), atol=1e-4)


def test_one_label_of_several_is_the_reward(tmp_path):
  folder = tmp_path / "reward"
  model, _ = tiny_text.model("olmo2", "plain", folder, classifier=True, labels=3)
  file = folder / "config.json"
  names = {"id2label": {"0": "helpful", "1": "verbose", "2": "1:1"}}
  file.write_text(json.dumps(json.loads(file.read_text()) | names))
  theirs = model.score.weight.detach().numpy().T

  def kernel(label):
    settings = config(reward__path=str(folder), reward__label=label)
    reward = load_reward(str(folder), settings, mesh_of(settings))
    assert reward.phi["kernel"][...].shape == (32, 1)
    return np.asarray(reward.phi["kernel"][...])[:, 0]

  np.testing.assert_array_equal(kernel("verbose"), theirs[:, 1])
  np.testing.assert_array_equal(kernel("0"), theirs[:, 0])
  np.testing.assert_array_equal(kernel("1:1"), theirs[:, 2])
  want = 0.75 * theirs[:, 0] - 0.5 * theirs[:, 1] + theirs[:, 2]
  np.testing.assert_allclose(kernel("helpful:0.75, verbose:-0.5,1:1:1.0"), want, atol=1e-6)
  for label, message in {
    "": "gives 3 labels; a reward is one number: set config.reward.label to one of helpful, verbose",
    "3": "config.reward.label is '3': '3' is not a label of .*; give some of helpful, verbose, 1:1",
    "helpful:many": "'helpful:many' is not a label",
    "harmless:1": "'harmless:1' is not a label",
    "helpful:0": "give finite weights, not all of them 0",
    "helpful:nan": "give finite weights",
  }.items():
    with pytest.raises(FolderError, match=message):
      kernel(label)


def test_the_label_is_that_of_the_runs_own_reward_model(tmp_path):
  tiny_text.model("olmo2", "plain", tmp_path / "one", classifier=True)
  tiny_text.model("olmo2", "plain", tmp_path / "three", classifier=True, labels=3)
  settings = config(reward__path=str(tmp_path / "three"), reward__label="2")
  mesh, field = mesh_of(settings), dict(field="eval.gold.path")
  load_reward(settings.reward.path, settings, mesh)
  load_reward(str(tmp_path / "one"), settings, mesh, **field)
  with pytest.raises(FolderError, match="eval.gold.path is .*; give a reward model with one label"):
    load_reward(str(tmp_path / "three"), settings, mesh, **field)


def test_all_new_cases_have_a_run():
  """Every new family must have a run with a reward model of another family."""
  families = {hf_models.CASES[case][0] for case in REWARDS}
  older = {"llama", "mistral", "qwen2", "qwen3", "gemma2", "gemma3_text", "gpt_neox"}
  of_cases = {model_type for model_type, _ in hf_models.CASES.values()}
  assert of_cases - older <= families | {"granitemoehybrid"}
  for case, reward in REWARDS.items():
    assert hf_models.CASES[case][0] != hf_models.CASES[reward][0]
