"""A PEFT folder as a model. Oracle: the library `peft`, which merges the same adapters."""

import json
import shutil

import hf_models
import jax
import numpy as np
import peft
import pytest
import safetensors.numpy
import tiny_text
import torch
import transformers

from configs import default
from r2m_jax.hf.folders import FolderError, load_policy
from r2m_jax.hf.weights import load_pretrained
from r2m_jax.parallel import sharding

ALL = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
  root = tmp_path_factory.mktemp("bases")
  for case in ("llama3.1", "phi4_mini", "pythia"):
    hf_models.make(case, root / case)
  return root


def adapters(base, out, targets, *, task="CAUSAL_LM", labels=None, **settings):
  """A PEFT folder with random adapters in `out`, and its merged model in `out`-merged."""
  auto = transformers.AutoModelForCausalLM
  more = {}
  if task == "SEQ_CLS":
    auto, more = transformers.AutoModelForSequenceClassification, dict(num_labels=labels)
  model = auto.from_pretrained(base, dtype=torch.float32, **more)
  config = peft.LoraConfig(
    task_type=task, r=3, lora_alpha=5, target_modules=targets, lora_dropout=0.0, **settings
  )
  model = peft.get_peft_model(model, config)
  torch.manual_seed(0)
  with torch.no_grad():
    for name, x in model.named_parameters():
      if "lora_A" in name or "lora_B" in name or "modules_to_save" in name:
        x.copy_(0.2 * torch.randn_like(x))
      if "magnitude" in name:
        x.mul_(1 + 0.3 * torch.rand_like(x))
  model.save_pretrained(out)
  model.merge_and_unload().save_pretrained(f"{out}-merged")
  return out


def assert_same(found, wanted):
  for x, y in zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True):
    np.testing.assert_allclose(x, y, rtol=0, atol=2e-6 * float(np.abs(y).max()))


@pytest.mark.parametrize(
  "case, targets, settings",
  [
    ("llama3.1", ["q_proj", "v_proj"], {}),
    ("llama3.1", ALL, dict(use_rslora=True)),
    ("llama3.1", ALL, dict(use_dora=True)),
    ("llama3.1", ALL, dict(rank_pattern={"q_proj": 2}, alpha_pattern={"layers.1.*v_proj": 9})),
    ("phi4_mini", ["qkv_proj", "o_proj", "gate_up_proj"], dict(use_dora=True, use_rslora=True)),
    ("pythia", ["query_key_value", "dense_h_to_4h"], {}),
    ("llama3.1", ["q_proj", "lm_head"], {}),
  ],
  ids=["lora", "rslora", "dora", "patterns", "fused_dora", "fused_heads", "lm_head"],
)
def test_adapters_are_merged_as_peft_merges_them(case, targets, settings, bases, tmp_path):
  out = adapters(bases / case, tmp_path / "adapters", targets, **settings)
  ours, base = load_pretrained(out), load_pretrained(bases / case)
  merged = load_pretrained(f"{out}-merged")
  assert ours.arch == merged.arch
  assert_same(ours.state, merged.state)
  moved = jax.tree.map(lambda x, y: float(np.abs(x - y).max()), ours.state, base.state)
  assert max(jax.tree.leaves(moved)) > 0.05
  parts = load_pretrained(out, mesh=sharding.make_mesh((1, 4, 2)))
  assert jax.tree.all(jax.tree.map(np.array_equal, ours.state, parts.state))


def test_a_reward_model_of_adapters_has_its_own_score(bases, tmp_path):
  out = adapters(bases / "llama3.1", tmp_path / "reward", ["q_proj"], task="SEQ_CLS", labels=1)
  ours, merged = load_pretrained(out), load_pretrained(f"{out}-merged")
  assert not ours.arch.lm_head
  np.testing.assert_array_equal(ours.score.kernel, merged.score.kernel)
  assert_same(ours.state, merged.state)


def test_a_folder_with_its_own_tokenizer_ends_as_its_base_does(tmp_path):
  tiny_text.model("llama3.1", "llama3", tmp_path / "base")
  out = adapters(tmp_path / "base", tmp_path / "adapters", ["q_proj"])
  (tmp_path / "base/generation_config.json").write_text('{"eos_token_id": [7, 2]}')
  assert load_policy(str(out), default.get_config()).folder == tmp_path / "base"
  for file in [*(tmp_path / "base").glob("tokenizer*"), tmp_path / "base/chat_template.jinja"]:
    shutil.copy(file, out)
  config = default.get_config()
  own, base = load_policy(str(out), config), load_policy(str(tmp_path / "base"), config)
  assert own.folder == out and own.tokenizer.eos_ids == base.tokenizer.eos_ids
  assert {7, 2} <= {*own.tokenizer.eos_ids}


def change(folder, **fields):
  file = folder / "adapter_config.json"
  file.write_text(json.dumps(json.loads(file.read_text()) | fields))


@pytest.mark.parametrize(
  "fields, message",
  [
    (dict(peft_type="IA3"), "peft_type = 'IA3'"),
    (dict(bias="all"), "bias = 'all'"),
    (dict(base_model_name_or_path=None), "names no base_model_name_or_path"),
    (dict(use_dora=True), "has only .* of model.layers.0.self_attn.q_proj.weight"),
  ],
)
def test_other_adapters_are_refused(fields, message, bases, tmp_path):
  out = adapters(bases / "llama3.1", tmp_path / "a", ["q_proj"])
  change(out, **fields)
  with pytest.raises(FolderError, match=f"adapter folder .PEFT. .*{message}.*merge_and_unload"):
    load_policy(str(out), default.get_config())


@pytest.mark.parametrize("start", ["pissa", "olora"])
def test_adapters_whose_start_is_taken_out_of_the_base_are_refused(start, bases, tmp_path):
  out = adapters(bases / "llama3.1", tmp_path / "a", ["q_proj"], init_lora_weights=start)
  with pytest.raises(FolderError, match=f"init_lora_weights = '{start}'.*merge_and_unload"):
    load_policy(str(out), default.get_config())
  again = peft.PeftModel.from_pretrained(
    transformers.AutoModelForCausalLM.from_pretrained(bases / "llama3.1", dtype=torch.float32), out
  )
  again.merge_and_unload().save_pretrained(tmp_path / "merged")
  merged = load_pretrained(tmp_path / "merged")
  change(out, init_lora_weights=True)  # merged as any other adapter, it would be another model
  away = jax.tree.map(
    lambda x, y: float(np.abs(x - y).max()), load_pretrained(out).state, merged.state
  )
  assert max(jax.tree.leaves(away)) > 0.05


def test_an_embedding_that_leaves_its_tied_head_is_refused(tmp_path):
  hf_models.make("qwen3", tmp_path / "base")
  save = dict(modules_to_save=["embed_tokens"])
  alone = adapters(tmp_path / "base", tmp_path / "alone", ["q_proj"], **save)
  with pytest.raises(FolderError, match="with its own model.embed_tokens.weight.*merge_and_unload"):
    load_policy(str(alone), default.get_config())
  both = adapters(
    tmp_path / "base", tmp_path / "both", ["q_proj"], ensure_weight_tying=True, **save
  )
  assert_same(load_pretrained(both).state, load_pretrained(f"{both}-merged").state)


@pytest.mark.parametrize(
  "field, targets, settings",
  [
    ("target_modules", ["q_proj", "lm_head"], {}),
    ("modules_to_save", ["q_proj"], dict(modules_to_save=["lm_head"])),
  ],
)
def test_a_head_that_leaves_its_tied_embedding_is_refused(field, targets, settings, tmp_path):
  hf_models.make("qwen3", tmp_path / "base")
  out = adapters(tmp_path / "base", tmp_path / "a", targets, **settings)
  with pytest.raises(FolderError) as refused:
    load_policy(str(out), default.get_config())
  message = str(refused.value)
  assert f"{out / 'adapter_config.json'} has 'lm_head' in {field}" in message
  assert "the base ties lm_head.weight to model.embed_tokens.weight" in message
  assert "train the adapters without lm_head" in message


def test_an_adapters_own_copy_of_a_weight_must_fit_the_base(bases, tmp_path):
  out = adapters(bases / "llama3.1", tmp_path / "a", ["lm_head"])
  file = out / "adapter_model.safetensors"
  tensors = safetensors.numpy.load_file(file)
  (name,) = [name for name in tensors if name.endswith("base_layer.weight")]
  safetensors.numpy.save_file(tensors | {name: tensors[name][:-1].copy()}, file)
  with pytest.raises(FolderError, match=r"own copy of lm_head.weight is \(60, 32\).*\(61, 32\)"):
    load_policy(str(out), default.get_config())


def test_adapters_of_another_base_are_refused(bases, tmp_path):
  out = adapters(bases / "llama3.1", tmp_path / "a", ["q_proj"])
  change(out, base_model_name_or_path=str(bases / "pythia"))
  with pytest.raises(FolderError, match="adapters of model.layers.0.* does not have"):
    load_policy(str(out), default.get_config())
  hf_models.make("llama3.1", tmp_path / "wide", hidden_size=48)
  change(out, base_model_name_or_path=str(tmp_path / "wide"))
  with pytest.raises(FolderError, match=r"q_proj.weight is \(48, 3\) x \(3, 32\).*\(48, 48\)"):
    load_policy(str(out), default.get_config())
  (out / "adapter_model.safetensors").write_bytes(b"short")
  with pytest.raises(FolderError, match="with no adapter_model.safetensors that can be read"):
    load_policy(str(out), default.get_config())
  safetensors.numpy.save_file(
    {"base_model.model.model.embed_tokens.lora_embedding_A": np.ones((2, 2), np.float32)},
    out / "adapter_model.safetensors",
  )
  with pytest.raises(
    FolderError, match="lora_embedding_A, which is not an adapter of a linear layer"
  ):
    load_policy(str(out), default.get_config())


@pytest.mark.parametrize("name", ["config.json", "adapter_config.json"])
def test_a_repeated_key_is_refused_by_name(name, bases, tmp_path):
  base = shutil.copytree(bases / "llama3.1", tmp_path / "base")
  out = adapters(base, tmp_path / "a", ["q_proj"])
  file = (base if name == "config.json" else out) / name
  key = "vocab_size" if name == "config.json" else "lora_alpha"
  file.write_text(file.read_text().replace("{", f'{{"{key}": 3,', 1))
  with pytest.raises(FolderError) as refused:
    load_policy(str(out), default.get_config())
  assert f"{file} is ambiguous: the key {key!r} occurs twice in one object" in str(refused.value)


def test_a_repeated_key_of_a_tokenizer_is_refused_by_name(tmp_path):
  tiny_text.model("llama3.1", "llama3", tmp_path)
  file = tmp_path / "tokenizer_config.json"
  file.write_text(file.read_text().replace("{", '{"eos_token": "<s>",', 1))
  with pytest.raises(FolderError) as refused:
    load_policy(str(tmp_path), default.get_config())
  assert f"{file} is ambiguous: the key 'eos_token' occurs twice" in str(refused.value)


def test_no_adapters_for_peft_on_top_of_merged_ones(bases, tmp_path):
  out = adapters(bases / "llama3.1", tmp_path / "a", ["q_proj"])
  config = default.get_config()
  config.lora.rank, config.lora.export = 2, "peft"
  with pytest.raises(FolderError, match="config.lora.export is 'peft'.*set it to 'merged'"):
    load_policy(str(out), config, training=True)
