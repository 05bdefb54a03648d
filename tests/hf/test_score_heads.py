"""Score heads of two layers with an activation between them. Oracle: torch.nn.Sequential on the
backbone that transformers loads.
"""

import json

import jax
import numpy as np
import pytest
import safetensors.numpy
import tiny_text
import torch
import transformers
from flax import nnx
from test_serve import config, write

from r2m_jax.hf import parity
from r2m_jax.hf.folders import FolderError, load_head, load_reward, phi_score
from r2m_jax.hf.weights import load_pretrained, save_pretrained
from r2m_jax.models.reward import read_rte
from r2m_jax.tasks import folders

ACTIVATIONS = dict(relu=torch.nn.ReLU, silu=torch.nn.SiLU, gelu=torch.nn.GELU, tanh=torch.nn.Tanh)
WIDTH = 24  # between the two layers; the model is 32 wide


def two_layers(folder, activation, *, last=2, bias=True, **fields):
  """A reward model whose head is Sequential(Linear, activation, Linear); returns that head."""
  tiny_text.model("qwen2", "chatml", folder, classifier=True)
  torch.manual_seed(1)
  parts = torch.nn.Linear(32, WIDTH), ACTIVATIONS[activation](), torch.nn.Linear(WIDTH, 1, bias)
  head = torch.nn.Sequential(*parts)
  for x in head.parameters():
    torch.nn.init.normal_(x, std=0.5)
  tensors = safetensors.numpy.load_file(folder / "model.safetensors")
  del tensors["score.weight"]
  for name, x in head.state_dict().items():
    layer, kind = name.split(".")
    tensors[f"score.{last if layer == '2' else layer}.{kind}"] = x.numpy()
  safetensors.numpy.save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
  file = folder / "config.json"
  saved = json.loads(file.read_text()) | {"architectures": ["MyRewardModel"]} | fields
  file.write_text(json.dumps(saved))
  return head.eval()


def theirs(folder, head, rows):
  """The scores of unpadded rows of ids."""
  backbone = transformers.AutoModel.from_pretrained(folder, dtype=torch.float32).eval()
  with torch.no_grad():
    states = [backbone(torch.tensor(row)[None]).last_hidden_state[0, -1] for row in rows]
    return np.array([float(head(state)) for state in states])


def ours(folder, rows):
  model = load_reward(str(folder), config())
  tokens, mask = parity.padded(rows)

  @jax.jit
  def score(state, phi):
    return phi_score(phi, read_rte(nnx.merge(model.graphdef, state), tokens, mask))

  with jax.default_matmul_precision("highest"):
    return model, np.asarray(score(model.state, model.phi))


@pytest.mark.parametrize(
  ("activation", "how"),
  [
    ("relu", dict(architectures=["Qwen2ForRewardModel"])),
    ("silu", dict(score_activation="silu", last=3, bias=False)),
    ("gelu", dict(score_activation="gelu")),
    ("tanh", dict(score_activation="tanh")),
  ],
)
def test_scores_are_those_of_torch_and_come_back_bit_equal(tmp_path, activation, how):
  head = two_layers(tmp_path / "in", activation, **how)
  rows = parity.random_rows(tiny_text.KINDS["chatml"][-1])
  model, found = ours(tmp_path / "in", rows)
  want = theirs(tmp_path / "in", head, rows)
  assert np.abs(want).max() > 0.1
  np.testing.assert_allclose(found, want, atol=1e-4)
  read = load_pretrained(tmp_path / "in")
  save_pretrained(tmp_path / "out", read.arch, read.state, score=read.score)
  before, after = (
    safetensors.numpy.load_file(tmp_path / name / "model.safetensors") for name in ("in", "out")
  )
  last = how.get("last", 2)
  before = {name.replace(f"score.{last}.", "score.2."): x for name, x in before.items()}
  assert before.keys() == after.keys()
  for name, x in before.items():
    np.testing.assert_array_equal(x, after[name], err_msg=name)
  assert json.loads((tmp_path / "out/config.json").read_text())["score_activation"] == activation
  assert load_pretrained(tmp_path / "out").arch == read.arch


def test_r2m_reads_what_the_last_layer_reads(tmp_path):
  """The RTE is as wide as the last layer's input. The first layer does not change, and the exported
  reward agrees with its own PyTorch module.
  """
  tiny_text.model("llama3.1", "llama3", tmp_path / "policy")
  two_layers(tmp_path / "reward", "relu", score_activation="relu")
  data = write(tmp_path / "prompts.jsonl", [{"prompt": p} for p in ("rain", "The cat sat on")])
  cfg = config(
    policy__path=str(tmp_path / "policy"),
    reward__path=str(tmp_path / "reward"),
    data__name=data,
    variant="r2m",
    steps=1,
    rollout__prompts=2,
    rollout__group_size=2,
    rollout__max_new_tokens=6,
    r2m__attention_dim=16,
    sft__batch_size=2,
    reward__batch_size=2,
    export__check=False,
  )
  folders.run(cfg, tmp_path / "run")
  out = tmp_path / "run/export"
  settings, state = load_head(out / "reward")
  assert settings.reward_hidden_size == WIDTH and state["phi"]["kernel"].shape == (WIDTH, 1)
  for name in ("score.0.weight", "score.0.bias", "score.2.weight"):
    both = [
      safetensors.numpy.load_file(folder / "model.safetensors")[name]
      for folder in (tmp_path / "reward", out / "reward")
    ]
    np.testing.assert_array_equal(*both)
  gap = parity.reward_gap(out / "reward", out / "policy")
  assert gap.value < 1e-4
  assert parity.reward_gap(tmp_path / "reward").value < 1e-4


@pytest.mark.parametrize(
  ("fields", "message"),
  [
    ({}, "config.json has None as score_activation: .*set it to one of relu, silu, gelu, tanh"),
    (dict(score_activation="swiglu"), "config.json has 'swiglu' as score_activation"),
    (dict(third=True), r"a score head of the layers \[0, 2, 4\]: only linear ones"),
  ],
)
def test_a_head_that_is_not_known_is_refused(tmp_path, fields, message):
  third = fields.pop("third", False)
  two_layers(tmp_path, "relu", **fields)
  if third:
    tensors = safetensors.numpy.load_file(tmp_path / "model.safetensors")
    tensors["score.4.weight"] = np.zeros((1, 1), np.float32)
    safetensors.numpy.save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
  with pytest.raises(FolderError, match=message):
    load_reward(str(tmp_path), config())
