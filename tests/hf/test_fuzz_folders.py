"""Folders of models with one change: our numbers equal those of transformers, or the folder is
refused.

Configs, tokenizer files, indices, and tensors' names, shapes, dtypes and values. Seeds are fixed.
40 mutations run with the other tests, 300 with `-m long`.
"""

import json
import shutil
import warnings

import numpy as np
import pytest
import safetensors.torch
import tiny_text
import torch
import transformers
from flax import nnx

from configs import default
from r2m_jax.config import ConfigError
from r2m_jax.data.text import TextError
from r2m_jax.hf.folders import FolderError, load_policy
from r2m_jax.tasks.serve import require_finite

OWN = (ConfigError, FolderError, TextError)
BASES = [("llama3.1", "chatml"), ("qwen2", "chatml"), ("gemma2", "llama3"), ("pythia", "plain")]
WEIGHTS = "model.safetensors"
PROMPTS = ["The cat sat on the mat.", "What is the capital of France?"]
ODD = [None, -1, 0, 1, 7, 2.5, "x", [], {}, True, 10**9, [1, 2], "float8_e4m3fn"]
FIELDS = {
  "hidden_size": [32, 48],
  "num_attention_heads": [2, 4, 8],
  "num_key_value_heads": [1, 2, 4, 8],
  "head_dim": [8, 12, None],
  "num_hidden_layers": [1, 3, 4],
  "vocab_size": [61, 301, 400],
  "rms_norm_eps": [1e-6, 1e-3],
  "hidden_act": ["silu", "gelu", "relu", "gelu_pytorch_tanh"],
  "tie_word_embeddings": [True, False],
  "attention_bias": [True, False],
  "mlp_bias": [True, False],
  "dtype": ["float16", "bfloat16", "float32"],
  "torch_dtype": ["float16", "float32"],
  "rope_theta": [100.0, 1e6],
  "rope_scaling": [None, {"rope_type": "linear", "factor": 2.0}, {"type": "yarn", "factor": 4.0}],
  "rope_parameters": [
    None,
    {"rope_type": "default", "rope_theta": 100.0},
    {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0},
    {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5},
  ],
  "partial_rotary_factor": [0.5],
  "max_position_embeddings": [16, 64],
  "sliding_window": [None, 2, 5],
  "use_sliding_window": [True, False],
  "max_window_layers": [0, 2],
  "layer_types": [["full_attention"] * 3, ["sliding_attention"] * 3],
  "eos_token_id": [0, [1, 2], 151645, "x"],
  "pad_token_id": [0, 5, 151643],
  "bos_token_id": [0, 999],
  "model_type": ["llama", "qwen2", "mistral", "gpt2", "gemma2"],
  "architectures": [["LlamaForSequenceClassification"], ["Unknown"], []],
  "quantization_config": [{"quant_method": "fp8"}],
  "query_pre_attn_scalar": [8, 20],
  "attn_logit_softcapping": [None, 5.0],
  "final_logit_softcapping": [None, 5.0],
  "rotary_pct": [0.25, 0.5],
  "use_parallel_residual": [True, False],
  "num_labels": [1, 3],
}


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
  folders = []
  for case, kind in BASES:
    folder = tmp_path_factory.mktemp("base") / case
    tiny_text.model(case, kind, folder)
    folders.append(folder)
  return folders


# ---- mutations: each takes (folder, rng), makes one change and returns its description ----


def of_config(folder, rng) -> str:
  file = folder / "config.json"
  config = json.loads(file.read_text())
  name = rng.choice(sorted({*FIELDS, *config}))
  if name in config and rng.random() < 0.15:
    del config[name]
    what = f"config without {name}"
  else:
    choices = FIELDS.get(name, ODD)
    choices = ODD if rng.random() < 0.2 else choices
    config[name] = choices[rng.integers(len(choices))]
    what = f"config {name} = {config[name]}"
  file.write_text(json.dumps(config))
  return what


def of_tensor(folder, rng) -> str:
  tensors = safetensors.torch.load_file(folder / WEIGHTS)
  name = rng.choice(sorted(tensors))
  kind = rng.choice(["drop", "rename", "extra", "transpose", "longer", "dtype", "nan", "head"])
  x = tensors[name]
  if kind in ("drop", "rename"):
    del tensors[name]
  if kind == "rename":
    tensors[f"{name}.x"] = x
  if kind == "extra":
    tensors["model.layers.9.mlp.up_proj.weight"] = x.clone()
  if kind == "transpose":
    tensors[name] = x.T.contiguous()
  if kind == "longer":
    tensors[name] = torch.cat([x, x])
  if kind == "nan":
    x.view(-1)[0] = float("nan")
  if kind == "head":
    tensors["lm_head.weight"] = torch.randn(61, 32)
  if kind == "dtype":
    dtypes = [torch.float16, torch.bfloat16, torch.float64, torch.int8, torch.float8_e4m3fn]
    to = dtypes[rng.integers(len(dtypes))]
    tensors[name] = x.to(to)
    kind = str(to)
  safetensors.torch.save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
  return f"{name} {kind}"


def of_index(folder, rng) -> str:
  names = list(safetensors.torch.load_file(folder / WEIGHTS))
  kind = rng.choice(["stale", "absent", "short", "outside", "no map"])
  where = dict.fromkeys(names, "model-00001-of-00001.safetensors")
  if kind != "stale":
    (folder / WEIGHTS).rename(folder / "model-00001-of-00001.safetensors")
  if kind == "absent":
    where[names[0]] = "model-00002-of-00002.safetensors"
  if kind == "short":
    del where[names[0]]
  if kind == "outside":
    where[names[0]] = "../model.safetensors"
  index = {"metadata": {}} if kind == "no map" else {"metadata": {}, "weight_map": where}
  (folder / f"{WEIGHTS}.index.json").write_text(json.dumps(index))
  return f"index {kind}"


def of_tokenizer(folder, rng) -> str:
  kind = rng.choice(["absent", "cut", "eos", "pad", "template", "generation"])
  if kind == "absent":
    (folder / "tokenizer.json").unlink()
  if kind == "cut":
    file = folder / "tokenizer.json"
    file.write_bytes(file.read_bytes()[: rng.integers(1, 4000)])
  if kind in ("eos", "pad"):
    file = folder / "tokenizer_config.json"
    values = ["<|nothing|>", None, 7]
    config = json.loads(file.read_text()) | {f"{kind}_token": values[rng.integers(3)]}
    file.write_text(json.dumps(config))
  if kind == "template":
    values = ["{{ broken", "{% for m in messages %}{{ m.content }}{% endfor %}", ""]
    (folder / "chat_template.jinja").write_text(values[rng.integers(3)])
  if kind == "generation":
    values = ['{"eos_token_id": 100000}', "[]", '{"eos_token_id": [1, 2]}', "{"]
    (folder / "generation_config.json").write_text(values[rng.integers(4)])
  return f"tokenizer {kind}"


MUTATIONS = [of_config] * 5 + [of_tensor] * 3 + [of_index, of_tokenizer]


# ---- ours against theirs ----


def our_logits(folder):
  """Logits of the prompts from our reader, one row at a time. Raises one of OWN."""
  policy = load_policy(str(folder), default.get_config())
  model = nnx.merge(policy.graphdef, policy.state)
  rows = []
  for prompt in PROMPTS:
    ids = np.asarray(policy.tokenizer.render(prompt), np.int32)[None]
    rows.append(np.asarray(model.logits(model(ids, np.ones(ids.shape, bool)).hidden))[0])
  finite = np.array([np.isfinite(row).all() for row in rows])
  require_finite(default.get_config(), finite, "log-probabilities", str(folder))
  return rows


def their_logits(folder):
  tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
  like = dict(dtype=torch.float32, attn_implementation="eager")
  model, info = transformers.AutoModelForCausalLM.from_pretrained(
    folder, output_loading_info=True, **like
  )
  assert not info["missing_keys"] and not info["mismatched_keys"]  # those would be random
  with torch.no_grad():
    return [
      model.eval()(torch.tensor([tokenizer(prompt)["input_ids"]])).logits[0].numpy()
      for prompt in PROMPTS
    ]


def compare(base, folder, seed) -> str:
  """Mutates a copy of `base` by `seed`: "equal", "refused" or "alone", if transformers fails."""
  rng = np.random.default_rng(seed)
  shutil.copytree(base, folder)
  what = MUTATIONS[rng.integers(len(MUTATIONS))](folder, rng)
  try:
    got = our_logits(folder)
  except OWN as error:
    assert str(error).strip(), what
    return "refused"
  except Exception as error:  # a user would get a traceback
    raise AssertionError(f"{base.name}, seed {seed}, {what}: {type(error).__name__}") from error
  try:
    want = their_logits(folder)
  except Exception:  # noqa: BLE001  if transformers raises anything, nothing can be compared
    return "alone"
  for mine, theirs in zip(got, want):
    distance = np.abs(mine - theirs).max()
    assert distance <= 1e-4 * max(1, np.abs(theirs).max()), (
      f"{base.name}, seed {seed}, {what}: logits differ by {distance:.1e}"
    )
  return "equal"


def fuzz(bases, tmp_path, seeds):
  found = {"equal": 0, "refused": 0, "alone": 0}
  wrong = []
  transformers.logging.set_verbosity_error()
  for seed in seeds:
    folder = tmp_path / str(seed)
    with warnings.catch_warnings():
      warnings.simplefilter("ignore")
      try:
        found[compare(bases[seed % len(bases)], folder, seed)] += 1
      except AssertionError as error:
        wrong.append(f"{error} ({error.__cause__})")
    shutil.rmtree(folder, ignore_errors=True)
  print(found)
  assert not wrong, "\n".join(wrong)
  return found


def test_forty_mutations_equal_transformers_or_are_refused(bases, tmp_path):
  found = fuzz(bases, tmp_path, range(40))
  assert found["equal"] >= 5 and found["refused"] >= 5


@pytest.mark.long
def test_three_hundred_mutations_equal_transformers_or_are_refused(bases, tmp_path):
  fuzz(bases, tmp_path, range(1000, 1300))
