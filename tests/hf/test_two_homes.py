"""Settings that a folder may have in two places or two spellings: we choose like transformers, or
refuse and name both.
"""

import json
import shutil

import hf_models
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.torch
import tiny_text
import torch
import transformers
from flax import nnx

from configs import default
from r2m_jax.data.text import TextError, load_tokenizer
from r2m_jax.hf.folders import FolderError, load_reward, phi_score
from r2m_jax.hf.weights import PretrainedError, load_pretrained, save_pretrained
from r2m_jax.models.reward import read_rte

IDS = np.arange(3, 20)[None]
WEIGHTS = "model.safetensors"
LIKE = dict(dtype=torch.float32, attn_implementation="eager")
FAMILIES = ["llama3.1", "mistral", "qwen2", "qwen3", "gemma2", "gemma3", "pythia"]


def edit(file, **changes):
  """Sets fields of a JSON file; the value `...` removes a field."""
  found = json.loads(file.read_text()) | changes
  file.write_text(json.dumps({name: x for name, x in found.items() if x is not ...}))


def rename(folder, name):
  """Stores every tensor under name(its name)."""
  tensors = safetensors.torch.load_file(folder / WEIGHTS)
  tensors = {name(key): x for key, x in tensors.items()}
  safetensors.torch.save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})


def logits(folder):
  made = load_pretrained(folder)
  model = nnx.merge(made.graphdef, made.state)
  return np.asarray(model.logits(model(IDS, np.ones(IDS.shape, bool)).hidden))[0]


def their_logits(folder):
  load = transformers.AutoModelForCausalLM.from_pretrained
  model, info = load(folder, output_loading_info=True, **LIKE)
  assert not info["missing_keys"] and not info["mismatched_keys"]  # those would be random
  with torch.no_grad():
    return model.eval()(torch.tensor(IDS)).logits[0].numpy()


def require_equal(folder):
  np.testing.assert_allclose(logits(folder), their_logits(folder), atol=1e-4, rtol=1e-4)


# ---- config.json ----


@pytest.mark.parametrize("case", FAMILIES)
def test_heads_are_counted_as_by_transformers(case, tmp_path):
  """head_dim and num_key_value_heads are given, null or absent, in every family."""
  hf_models.make(case, tmp_path)
  config = tmp_path / "config.json"
  given = config.read_text()
  for changes in (
    dict(head_dim=...),
    dict(head_dim=None),
    dict(num_key_value_heads=...),
    dict(num_key_value_heads=None),
    dict(head_dim=json.loads(given).get("head_dim") or 8),
  ):
    config.write_text(given)
    edit(config, **changes)
    try:
      want = their_logits(tmp_path)
    except Exception:  # noqa: BLE001  torch or transformers' config may refuse the shapes
      want = None
    try:
      got = logits(tmp_path)
    except ValueError:
      assert want is None, changes
      continue
    if want is None:  # a null that transformers does not accept is read as absent
      (name,) = (name for name, value in changes.items() if value is None)
      edit(config, **{name: ...})
      want = their_logits(tmp_path)
    np.testing.assert_allclose(got, want, atol=1e-4, rtol=1e-4)


def test_dtype_and_torch_dtype_do_not_change_what_is_read(tmp_path):
  hf_models.make("llama2", tmp_path)
  want = logits(tmp_path)
  for changes in (
    dict(dtype="float16", torch_dtype="bfloat16"),
    dict(dtype=..., torch_dtype="float16"),
    dict(dtype=..., torch_dtype=...),
  ):
    edit(tmp_path / "config.json", **changes)
    np.testing.assert_array_equal(logits(tmp_path), want)
    require_equal(tmp_path)


def test_a_rope_theta_in_two_places(tmp_path):
  hf_models.make("llama2", tmp_path)
  config = tmp_path / "config.json"
  edit(config, rope_parameters=..., rope_theta=300.0)  # the older spelling
  require_equal(tmp_path)
  edit(config, rope_parameters={"rope_type": "default", "rope_theta": 300.0})  # both agree
  require_equal(tmp_path)
  edit(config, rope_theta=500.0)
  with pytest.raises(
    ValueError, match="rope_theta = 500.0 and rope_parameters with rope_theta = 3"
  ):
    logits(tmp_path)


# ---- tensors ----


@pytest.mark.parametrize("case", ["llama_biased_tied", "qwen3", "gemma2"])
def test_tensors_without_the_models_prefix_are_read_as_by_transformers(case, tmp_path):
  """AutoModel.save_pretrained writes the decoder of a model with tied embeddings in this way."""
  hf_models.make(case, tmp_path)
  want = logits(tmp_path)
  rename(tmp_path, lambda name: name.removeprefix("model."))
  require_equal(tmp_path)
  np.testing.assert_array_equal(logits(tmp_path), want)


@pytest.mark.parametrize("case", ["llama2", "pythia"])
def test_a_decoder_without_a_head_is_no_language_model_but_a_start_of_a_reward_model(
  case, tmp_path
):
  hf_models.make(case, tmp_path)
  want = load_pretrained(tmp_path, lm_head=False)
  head, prefix = ("embed_out", "gpt_neox.") if case == "pythia" else ("lm_head", "model.")
  tensors = safetensors.torch.load_file(tmp_path / WEIGHTS)
  del tensors[f"{head}.weight"]
  tensors = {name.removeprefix(prefix): x for name, x in tensors.items()}
  safetensors.torch.save_file(tensors, tmp_path / WEIGHTS, metadata={"format": "pt"})
  with pytest.raises(PretrainedError, match=f"lacks 1 tensors, the first {head}.weight"):
    load_pretrained(tmp_path)
  got = load_pretrained(tmp_path, lm_head=False)
  jax.tree.map(np.testing.assert_array_equal, got.state, want.state)


def test_a_prefix_on_some_tensors_alone_is_refused(tmp_path):
  hf_models.make("llama_biased_tied", tmp_path)
  rename(tmp_path, lambda name: name.removeprefix("model.") if "layers.1" in name else name)
  with pytest.raises(PretrainedError, match=r"lacks \d+ tensors, the first model.layers.1"):
    load_pretrained(tmp_path)
  rename(tmp_path, lambda name: f"model.{name}")
  with pytest.raises(PretrainedError, match="copy the weights again, or correct config.json"):
    load_pretrained(tmp_path)


def test_a_tensor_in_two_files_of_an_index_is_refused(tmp_path):
  hf_models.make("llama2", tmp_path, shard="30KB")
  assert not (tmp_path / WEIGHTS).exists()
  require_equal(tmp_path)
  first, last = (sorted(tmp_path.glob("model-*.safetensors"))[i] for i in (0, -1))
  name, x = next(iter(safetensors.torch.load_file(first).items()))
  more = safetensors.torch.load_file(last) | {name: x + 1}
  safetensors.torch.save_file(more, last, metadata={"format": "pt"})
  with pytest.raises(PretrainedError, match=f"{name} lies in {first.name} and in {last.name}"):
    load_pretrained(tmp_path)


def test_an_old_pickle_and_its_index_beside_safetensors_are_ignored(tmp_path):
  hf_models.make("llama2", tmp_path)
  (tmp_path / "pytorch_model.bin").write_bytes(b"not even a pickle")
  where = dict.fromkeys(safetensors.torch.load_file(tmp_path / WEIGHTS), "pytorch_model.bin")
  index = json.dumps({"metadata": {}, "weight_map": where})
  (tmp_path / "pytorch_model.bin.index.json").write_text(index)
  require_equal(tmp_path)


# ---- labels of a classifier ----


def scores(folder):
  made = load_reward(str(folder), default.get_config())
  backbone = nnx.merge(made.graphdef, made.state)
  return np.asarray(phi_score(made.phi, read_rte(backbone, jnp.asarray(IDS), IDS >= 0)))


def their_scores(folder):
  load = transformers.AutoModelForSequenceClassification.from_pretrained
  model, info = load(folder, output_loading_info=True, **LIKE)
  assert not info["missing_keys"] and not info["mismatched_keys"]
  model.config.pad_token_id = None
  with torch.no_grad():
    return model.eval()(torch.tensor(IDS)).logits[:, 0].numpy()


def test_labels_are_as_many_as_the_heads_rows(tmp_path):
  tiny_text.model("llama2", "plain", tmp_path, classifier=True)
  config = tmp_path / "config.json"
  one = {"0": "reward"}
  for changes in (dict(id2label=one), dict(id2label=one, num_labels=1), dict(num_labels=1)):
    edit(config, **({"id2label": ..., "label2id": ..., "num_labels": ...} | changes))
    np.testing.assert_allclose(scores(tmp_path), their_scores(tmp_path), atol=1e-4)
  edit(config, num_labels=1, id2label={"0": "a", "1": "b"})  # transformers takes num_labels
  np.testing.assert_allclose(scores(tmp_path), their_scores(tmp_path), atol=1e-4)
  wrong = [
    (dict(id2label=..., num_labels=3), "3 labels in num_labels, and score.weight .* has 1 rows"),
    (dict(id2label=one), "3 labels in num_labels, and score.weight .* has 1 rows"),
    (
      dict(id2label={"0": "a", "1": "b"}, num_labels=...),
      "2 labels in id2label, and score.weight .* has 1 rows",
    ),
  ]
  for changes, message in wrong:
    edit(config, **changes)
    with pytest.raises(FolderError, match=message):
      scores(tmp_path)
    with pytest.raises((AssertionError, RuntimeError, ValueError)):
      their_scores(tmp_path)


def test_a_classifier_without_the_models_prefix_is_read_as_by_transformers(tmp_path):
  tiny_text.model("llama2", "plain", tmp_path, classifier=True)
  want = scores(tmp_path)
  rename(tmp_path, lambda name: name.removeprefix("model."))
  np.testing.assert_array_equal(scores(tmp_path), want)
  np.testing.assert_allclose(want, their_scores(tmp_path), atol=1e-4)


@pytest.mark.parametrize("shape", [(), (32,), (1, 31), (2, 1, 32)])
def test_a_score_head_of_another_shape_is_refused(shape, tmp_path):
  tiny_text.model("llama2", "plain", tmp_path, classifier=True, num_hidden_layers=1)
  tensors = safetensors.torch.load_file(tmp_path / WEIGHTS) | {"score.weight": torch.ones(shape)}
  safetensors.torch.save_file(tensors, tmp_path / WEIGHTS, metadata={"format": "pt"})
  with pytest.raises(FolderError, match="score.weight has shape .*correct it, or copy the weights"):
    scores(tmp_path)


# ---- the tokenizer, and the ends of answers ----


@pytest.fixture
def folder(tmp_path):
  tiny_text.model("llama3.1", "llama3", tmp_path / "model")
  return tmp_path / "model"


def their_ends(folder) -> set[int]:
  """The ids at which transformers' generate stops."""
  model = transformers.AutoModelForCausalLM.from_pretrained(folder)
  ends = model.generation_config.eos_token_id
  return set(ends if isinstance(ends, list) else [] if ends is None else [ends])


def test_ends_of_generation_config_go_before_those_of_config(folder):
  tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
  own = {tokenizer.eos_token_id, tokenizer.convert_tokens_to_ids("<|eot|>")}
  generation = folder / "generation_config.json"
  for ends, in_config in (([7, 8], 9), (7, [8, 9]), (..., 9), (None, [8, 9])):
    edit(folder / "config.json", eos_token_id=in_config)
    if generation.exists():
      edit(generation, eos_token_id=ends)
    else:
      generation.write_text(json.dumps({"eos_token_id": ends}))
    found = set(load_tokenizer(folder, 287).eos_ids)
    assert their_ends(folder) <= found and own <= found
    if ends is not ... and ends is not None:
      assert found == their_ends(folder) | own  # nothing from config.json
  generation.unlink()
  edit(folder / "config.json", eos_token_id=[8, 9])
  assert set(load_tokenizer(folder, 287).eos_ids) == their_ends(folder) | own == {8, 9} | own


def test_special_tokens_of_tokenizer_config_go_before_those_of_other_files(folder):
  edit(folder / "tokenizer_config.json", eos_token="<|eot|>", pad_token="<|stop|>")
  for name in ("special_tokens_map.json", "added_tokens.json"):
    (folder / name).write_text(
      '{"eos_token": "</s>", "pad_token": "</s>"}' if "map" in name else "{}"
    )
  theirs, ours = transformers.AutoTokenizer.from_pretrained(folder), load_tokenizer(folder, 287)
  assert theirs.eos_token_id in ours.eos_ids and ours.pad_id == theirs.pad_token_id
  text = "The cat sat <|eot|>"
  assert ours.render(text) == theirs(text)["input_ids"]


@pytest.mark.parametrize("bos", [True, False, None])
@pytest.mark.parametrize("eos", [True, False, None])
def test_added_bos_and_eos_are_those_of_transformers(folder, bos, eos):
  """add_bos_token and add_eos_token in tokenizer_config.json together with the rule in
  tokenizer.json.
  """
  edit(folder / "tokenizer_config.json", add_bos_token=bos, add_eos_token=eos)
  theirs, ours = transformers.AutoTokenizer.from_pretrained(folder), load_tokenizer(folder, 287)
  text = "The cat sat on the mat."
  assert [*ours.render(text), *ours.suffix] == theirs(text)["input_ids"]


TURNS = [{"role": "user", "content": "What is rain?"}]
PLAIN = "{% for m in messages %}{{ m.content }}{% endfor %}"


def test_the_chat_template_is_the_one_that_transformers_takes(folder):
  def render():
    theirs = transformers.AutoTokenizer.from_pretrained(folder)
    want = theirs.apply_chat_template(TURNS, tokenize=False, add_generation_prompt=True)
    tokenizer = load_tokenizer(folder, 287)
    assert tokenizer.render(TURNS) == theirs(want, add_special_tokens=False)["input_ids"]
    return want

  jinja, config = folder / "chat_template.jinja", folder / "tokenizer_config.json"
  assert jinja.exists()
  edit(config, chat_template="config" + PLAIN)
  beside = render()
  jinja.write_text("jinja" + PLAIN)
  assert render() == "jinjaWhat is rain?" != beside  # tokenizer_config.json comes second
  (folder / "chat_template.json").write_text(json.dumps({"chat_template": "json" + PLAIN}))
  assert render() == "jinjaWhat is rain?"
  jinja.unlink()
  render()
  named = [{"name": "rag", "template": "rag" + PLAIN}, {"name": "default", "template": PLAIN}]
  edit(config, chat_template=named)
  (folder / "chat_template.json").unlink()
  assert render() == "What is rain?"


def test_named_chat_templates_without_a_default_are_refused(folder):
  (folder / "chat_template.jinja").unlink()
  edit(folder / "tokenizer_config.json", chat_template=[{"name": "rag", "template": PLAIN}])
  with pytest.raises(TextError, match="default"):
    load_tokenizer(folder, 287)


def test_a_copy_of_a_folder_holds_what_was_read(folder, tmp_path):
  """The files that an export copies with the weights give the same tokens again."""
  made = load_pretrained(folder)
  save_pretrained(tmp_path / "out", made.arch, made.state, tokenizer_folder=folder)
  first, again = load_tokenizer(folder, 287), load_tokenizer(tmp_path / "out", 287)
  assert first.render(TURNS) == again.render(TURNS) and first.eos_ids == again.eos_ids
  require_equal(tmp_path / "out")
  shutil.rmtree(tmp_path / "out")
