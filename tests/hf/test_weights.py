"""Reading and writing Hugging Face folders. Oracle: transformers in torch float32, on random
weights of every family.
"""

import json
import pathlib

import hf_models
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy
import torch
import transformers
from flax import nnx

from r2m_jax.hf import weights
from r2m_jax.hf.weights import PretrainedError, load_pretrained, save_pretrained
from r2m_jax.models import transformer
from r2m_jax.models.arch import TOWERS, ArchConfig, RopeScaling
from r2m_jax.models.generate import generate
from r2m_jax.parallel import sharding
from r2m_jax.types import Prompts

BOUND = 1e-4  # the documented tolerance of logits and scores
TOLERANCE = 3e-6  # of the largest logit; measured 5e-7 to 1.1e-6
LENGTH, PREFILL, CONTINUED = 14, 10, 32  # tokens; longer than every window of hf_models
PADDING = (9, 5, 1, 0)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
  """(case, classifier) -> (folder, torch model), made once."""
  made = {}

  def get(case, classifier=False, **kwargs):
    key = (case, classifier, *kwargs.items())
    if key not in made:
      folder = tmp_path_factory.mktemp(f"{case}-{'classifier' if classifier else 'policy'}")
      shard = "5GB" if classifier else "30KB"  # policies are stored in several files
      made[key] = folder, hf_models.make(case, folder, classifier=classifier, shard=shard, **kwargs)
      assert (
        len(list(folder.glob("*.safetensors"))) == 1
        if classifier
        else (folder / weights.INDEX).exists()
      )
    return made[key]

  return get


def batch():
  tokens = np.random.default_rng(0).integers(3, 61, (len(PADDING), LENGTH)).astype(np.int32)
  return tokens, np.arange(LENGTH) >= np.array(PADDING)[:, None]


def theirs(model, tokens, mask):
  """transformers' logits for a left-padded batch."""
  positions = torch.tensor(np.maximum(mask.cumsum(1) - 1, 0))
  with torch.no_grad():
    out = model(
      torch.tensor(tokens).long(), attention_mask=torch.tensor(mask).long(), position_ids=positions
    )
  return out.logits.numpy()


def files_of(folder):
  """Every tensor of a folder by name."""
  shards = [safetensors.numpy.load_file(path) for path in sorted(folder.glob("*.safetensors"))]
  return {name: x for shard in shards for name, x in shard.items()}


def language_model_of(folder):
  """Every tensor of a folder's language model, by its name in a folder of its own."""
  tensors = files_of(folder)
  if json.loads((folder / "config.json").read_text())["model_type"] in TOWERS:
    tensors = {weights.own_name(name): x for name, x in tensors.items()}
    del tensors[None]  # tensors of other parts
  return tensors


def rewrite(folder, target, change):
  """A copy of `folder` in `target` whose tensors went through `change(dict)`."""
  target.mkdir(exist_ok=True)
  tensors = files_of(folder)
  change(tensors)
  safetensors.numpy.save_file(tensors, target / "model.safetensors", metadata={"format": "pt"})
  (target / "config.json").write_text((folder / "config.json").read_text())
  return target


def assert_close(ours, reference):
  np.testing.assert_allclose(ours, reference, rtol=0, atol=TOLERANCE * np.abs(reference).max())


@pytest.mark.parametrize("case", hf_models.cases())
def test_policy_equals_transformers(case, saved):
  """Logits over left-padded prompts and their continuations, in one pass and with a cache, and the
  greedy continuation.
  """
  folder, model = saved(case)
  tokens, mask = batch()
  ours = load_pretrained(folder)

  @jax.jit
  def continued(state, tokens, mask):
    m, prompts = nnx.merge(ours.graphdef, state), Prompts(tokens, mask, jnp.arange(len(tokens)))
    out = generate(
      m,
      prompts,
      jax.random.key(0),
      0,
      group_size=1,
      max_new_tokens=CONTINUED,
      temperature=0,
      eos_ids=(),
      pad_id=0,
    )
    cache = m.init_cache(tokens.shape[0], LENGTH + CONTINUED)
    first = m(tokens[:, :PREFILL], mask[:, :PREFILL], cache=cache, cache_index=0)

    def decode(cache, t):
      def at(x):
        return jax.lax.dynamic_slice_in_dim(x, t, 1, 1)

      one = m(at(out.tokens), at(out.token_mask), cache=cache, cache_index=t)
      return one.cache, one.hidden[:, 0]

    _, rest = jax.lax.scan(decode, first.cache, jnp.arange(PREFILL, LENGTH + CONTINUED))
    cached = jnp.concatenate([first.hidden, rest.swapaxes(0, 1)], 1)
    return out, m.logits(m(out.tokens, out.token_mask).hidden), m.logits(cached)

  out, logits, cached = jax.device_get(continued(ours.state, tokens, mask))
  for i, pad in enumerate(PADDING):
    with torch.no_grad():  # one row at a time, without padding
      row = model.generate(
        torch.tensor(tokens[i : i + 1, pad:]).long(),
        max_new_tokens=CONTINUED,
        do_sample=False,
        eos_token_id=None,
        pad_token_id=0,
      )
    assert out.tokens[i, pad:].tolist() == row[0].tolist(), i
  reference, real = theirs(model, out.tokens, out.token_mask), out.token_mask
  assert real.sum(1).tolist() == [LENGTH - pad + CONTINUED for pad in PADDING]
  assert np.isfinite(logits).all() and np.isfinite(cached).all()
  largest = np.abs(logits - reference)[real].max()
  print(
    f"{case}: max |logit difference| {largest:.1e}, the largest logit "
    f"{np.abs(reference[real]).max():.1f}"
  )
  assert largest <= BOUND
  assert_close(logits[real], reference[real])
  assert_close(cached[real], logits[real])


def test_a_gemma3_folder_by_the_names_of_the_hub_and_of_transformers(saved, tmp_path):
  folder, _ = saved("gemma3_folder")
  pairs = {"language_model.model.": "model.language_model.", "language_model.lm_head.": "lm_head."}

  def renamed(tensors, pairs):
    for name in list(tensors):
      for old, new in pairs.items():
        if name.startswith(old):
          tensors[new + name.removeprefix(old)] = tensors.pop(name)

  hub = {new: old for old, new in pairs.items()}
  states = [
    load_pretrained(rewrite(folder, tmp_path / f"{i}", lambda t, p=p: renamed(t, p))).state
    for i, p in enumerate((pairs, hub))
  ]
  assert jax.tree.all(jax.tree.map(np.array_equal, *states))


def test_the_language_model_of_a_mistral3_folder(tmp_path):
  text = hf_models.SMALL | hf_models.CASES["ministral3"][1] | {"model_type": "ministral3"}
  vision = dict(model_type="pixtral", hidden_size=8, intermediate_size=8, num_hidden_layers=1)
  vision |= dict(num_attention_heads=1, image_size=8, patch_size=4, head_dim=8)
  config = transformers.Mistral3Config(
    text_config=text, vision_config=vision, image_token_index=60, tie_word_embeddings=False
  )
  model = transformers.Mistral3ForConditionalGeneration._from_config(config).float().eval()
  model.save_pretrained(tmp_path)
  ours = load_pretrained(tmp_path)
  tokens = np.arange(3, 13, dtype=np.int32)[None]

  @jax.jit
  def logits(state):
    m = nnx.merge(ours.graphdef, state)
    return m.logits(m(tokens, tokens > 0).hidden)

  assert ours.arch.family == "ministral3"
  assert np.abs(logits(ours.state) - theirs(model, tokens, tokens > 0)).max() <= BOUND


@pytest.mark.parametrize("case", hf_models.cases())
def test_classifier_equals_transformers(case, saved):
  folder, model = saved(case, True)
  tokens, mask = batch()
  ours = load_pretrained(folder)
  assert not ours.arch.lm_head and ours.score.kernel.shape == (32, 1) and ours.score.bias is None
  score = jax.jit(
    lambda state, kernel: nnx.merge(ours.graphdef, state)(tokens, mask).hidden[:, -1] @ kernel
  )
  # one row at a time without padding: with pad None transformers reads the last column, whatever
  # its token
  reference = [
    theirs(model, tokens[i : i + 1, pad:], mask[i : i + 1, pad:])[0]
    for i, pad in enumerate(PADDING)
  ]
  largest = np.abs(score(ours.state, ours.score.kernel) - np.stack(reference)).max()
  print(
    f"{case}: max |score difference| {largest:.1e}, the largest score {np.abs(reference).max():.1f}"
  )
  assert largest <= BOUND


@pytest.mark.parametrize("classifier", [False, True], ids=["policy", "classifier"])
@pytest.mark.parametrize("case", hf_models.cases())
def test_round_trip_is_bitwise(case, classifier, saved, tmp_path):
  folder, model = saved(case, classifier)
  ours = load_pretrained(folder)
  save_pretrained(tmp_path / "out", ours.arch, ours.state, score=ours.score)
  before, after = language_model_of(folder), files_of(tmp_path / "out")
  assert before.keys() == after.keys()
  assert all(
    before[name].dtype == x.dtype and np.array_equal(before[name], x) for name, x in after.items()
  )
  auto = hf_models.opener_of(ours.arch.family, classifier)
  again, info = auto.from_pretrained(
    tmp_path / "out", output_loading_info=True, attn_implementation="eager"
  )
  assert not any(info.values()), info
  assert type(again) is hf_models.class_of(ours.arch.family, classifier)
  again.config.pad_token_id = None
  row = [x[PADDING.index(0) :] for x in batch()]
  assert_close(theirs(again, *row), theirs(model, *row))


@pytest.mark.parametrize("case", ["qwen2", "gemma3", "pythia", "phi4_mini", "granite4", "olmo3"])
def test_shards_are_read_and_written_on_a_mesh(case, saved, tmp_path):
  folder, _ = saved(case)
  whole = load_pretrained(folder)
  save_pretrained(tmp_path / "sharded", whole.arch, whole.state, max_shard_bytes=10_000)
  assert len(list((tmp_path / "sharded").glob("model-*-of-*.safetensors"))) > 3
  mesh = sharding.make_mesh((1, 4, 2))
  parts = load_pretrained(tmp_path / "sharded", mesh=mesh)
  assert jax.tree.all(jax.tree.map(np.array_equal, whole.state, parts.state))
  layouts = sharding.shardings(parts.state, mesh)
  assert jax.tree.all(jax.tree.map(lambda x, layout: x.sharding == layout, parts.state, layouts))
  query = parts.state["layers"]["attn"]["q"]["kernel"][...]
  width = whole.arch.num_heads * whole.arch.head_dim
  assert query.shape == (3, 32, width)
  assert query.sharding.shard_shape(query.shape) == (3, 8, width // 2)
  save_pretrained(tmp_path / "again", parts.arch, parts.state)
  before, after = files_of(folder), files_of(tmp_path / "again")
  assert before.keys() == after.keys() and all(
    np.array_equal(before[name], x) for name, x in after.items()
  )
  model, info = transformers.AutoModelForCausalLM.from_pretrained(
    tmp_path / "sharded", output_loading_info=True
  )
  assert not any(info.values()), info


@pytest.mark.parametrize(
  "case",
  [
    "olmo3",
    *(pytest.param(c, marks=pytest.mark.long) for c in ("smollm3", "phi4_mini", "granite")),
  ],
)
def test_a_mesh_gives_the_same_logits(case, saved):
  """Norms over all heads, layers without positions, fused tensors and a single key head, all
  sharded.
  """
  folder, _ = saved(case)
  tokens, mask = batch()

  def logits(mesh):
    ours = load_pretrained(folder, mesh=mesh)

    @sharding.jit_on(mesh)
    def run(state):
      m = nnx.merge(ours.graphdef, state)
      return m.logits(m(tokens, mask).hidden)

    return np.asarray(run(ours.state))[mask]

  assert_close(logits(sharding.make_mesh((1, 4, 2))), logits(sharding.make_mesh((1, 1, 1))))


def test_each_shard_reads_only_its_part(saved, monkeypatch):
  folder, _ = saved("llama3.1")
  largest = 0
  read = weights.Files._read

  def counting(self, name, *args):
    nonlocal largest
    x = read(self, name, *args)
    if "_proj" in name:
      largest = max(largest, x.size / np.prod(self.shapes[name]))
    return x

  monkeypatch.setattr(weights.Files, "_read", counting)
  load_pretrained(folder, mesh=sharding.make_mesh((1, 4, 2)))
  assert largest == 1 / 8


def test_bfloat16_on_disk(saved, tmp_path):
  folder, _ = saved("llama3.1")
  ours = load_pretrained(folder)
  save_pretrained(tmp_path / "half", ours.arch, ours.state, dtype=jnp.bfloat16)
  config = json.loads((tmp_path / "half/config.json").read_text())
  assert config["dtype"] == config["torch_dtype"] == "bfloat16"
  half = load_pretrained(tmp_path / "half", param_dtype=jnp.bfloat16)
  wide = load_pretrained(tmp_path / "half")
  for x, h, w in zip(*map(jax.tree.leaves, (ours.state, half.state, wide.state))):
    assert (h.dtype, w.dtype) == (jnp.bfloat16, jnp.float32)
    np.testing.assert_array_equal(np.asarray(x).astype(jnp.bfloat16), h)
    np.testing.assert_array_equal(np.asarray(h).astype(np.float32), w)
  assert all(x.dtype == ml_dtypes.bfloat16 for x in files_of(tmp_path / "half").values())


@pytest.mark.parametrize("case", hf_models.cases(hf_models.LONG | hf_models.USUAL))
def test_bfloat16_checkpoint_equals_transformers(case, saved, tmp_path):
  """Logits and scores in float32, from weights stored in bfloat16."""
  tokens, mask = batch()
  for classifier in (False, True):
    folder, model = saved(case, classifier)
    half = tmp_path / f"half-{classifier}"
    ours = load_pretrained(folder)
    save_pretrained(half, ours.arch, ours.state, score=ours.score, dtype=jnp.bfloat16)
    ours = load_pretrained(half)
    auto = hf_models.class_of(ours.arch.family, classifier)
    model = auto.from_pretrained(half, dtype=torch.float32, attn_implementation="eager").eval()
    model.config.pad_token_id = None

    @jax.jit
    def read(state, score):
      m = nnx.merge(ours.graphdef, state)
      hidden = m(tokens, mask).hidden
      return m.logits(hidden) if score is None else hidden[:, -1] @ score.kernel

    got = np.asarray(read(ours.state, ours.score))
    for i, pad in enumerate(PADDING):
      want = theirs(model, tokens[i : i + 1, pad:], mask[i : i + 1, pad:])[0]
      assert np.abs((got[i] if classifier else got[i, pad:]) - want).max() <= BOUND


def test_score_head_with_bias_and_several_labels(saved, tmp_path):
  folder, model = saved("pythia", True, labels=3)
  biased = rewrite(
    folder, tmp_path / "biased", lambda t: t.update({"score.bias": np.array([1, 2, 3], np.float32)})
  )
  ours = load_pretrained(biased)
  np.testing.assert_array_equal(ours.score.kernel, model.score.weight.detach().numpy().T)
  np.testing.assert_array_equal(ours.score.bias, [1, 2, 3])
  save_pretrained(tmp_path / "out", ours.arch, ours.state, score=ours.score)
  assert json.loads((tmp_path / "out/config.json").read_text())["id2label"].keys() == {
    "0",
    "1",
    "2",
  }
  before, after = files_of(biased), files_of(tmp_path / "out")
  assert before.keys() == after.keys() and all(
    np.array_equal(before[name], x) for name, x in after.items()
  )


def test_reward_model_from_a_policy(saved, tmp_path):
  """A policy's backbone with a new score head is a classifier that transformers reads."""
  folder, model = saved("qwen3")
  ours = load_pretrained(folder, lm_head=False)
  assert not ours.arch.lm_head and ours.score is None
  with pytest.raises(ValueError, match="score="):
    save_pretrained(tmp_path / "out", ours.arch, ours.state)
  score = weights.Score(jnp.ones((32, 1)), None)
  save_pretrained(tmp_path / "out", ours.arch, ours.state, score=score, extra={"pad_token_id": 0})
  again, info = transformers.AutoModelForSequenceClassification.from_pretrained(
    tmp_path / "out", output_loading_info=True
  )
  assert not any(info.values()) and again.config.num_labels == 1 and again.config.pad_token_id == 0
  for name, x in model.model.state_dict().items():
    assert torch.equal(x, again.model.state_dict()[name]), name


def test_tokenizer_and_its_ids_come_along(saved, tmp_path):
  folder, _ = saved("llama2")
  (tmp_path / "tok/tokenizer").mkdir(parents=True)
  (tmp_path / "tok/tokenizer.json").write_text("{}")
  (tmp_path / "tok/pytorch_model.bin").write_text("")
  (tmp_path / "tok/config.json").write_text(
    '{"eos_token_id": [7, 8], "pad_token_id": 9, "hidden_size": 1}'
  )
  ours = load_pretrained(folder)
  save_pretrained(tmp_path / "out", ours.arch, ours.state, tokenizer_folder=tmp_path / "tok")
  config = json.loads((tmp_path / "out/config.json").read_text())
  assert (config["eos_token_id"], config["pad_token_id"], config["hidden_size"]) == ([7, 8], 9, 32)
  assert {p.name for p in (tmp_path / "out").iterdir()} == {
    "config.json",
    "model.safetensors",
    "tokenizer.json",
  }


def test_saving_is_all_or_nothing(saved, tmp_path, monkeypatch):
  folder, _ = saved("llama2")
  ours = load_pretrained(folder)
  out = tmp_path / "runs/out"
  save_pretrained(out, ours.arch, ours.state)
  first = (out / "model.safetensors").read_bytes()

  def fails(*args, **kwargs):
    raise OSError("disk full")

  with monkeypatch.context() as patch:
    patch.setattr(weights, "save_file", fails)
    with pytest.raises(OSError, match="disk full"):
      save_pretrained(out, ours.arch, jax.tree.map(jnp.zeros_like, ours.state))
  assert (out / "model.safetensors").read_bytes() == first
  assert [p.name for p in out.parent.iterdir()] == ["out"]
  save_pretrained(out, ours.arch, jax.tree.map(jnp.zeros_like, ours.state))
  assert (out / "model.safetensors").read_bytes() != first
  assert [p.name for p in out.parent.iterdir()] == ["out"]
  (tmp_path / "notes").mkdir()
  (tmp_path / "notes/thesis.txt").write_text("mine")
  with pytest.raises(FileExistsError, match="holds no model"):
    save_pretrained(tmp_path / "notes", ours.arch, ours.state)


def test_wrong_tensors_are_named(saved, tmp_path):
  folder, _ = saved("llama2")
  name = "model.layers.1.mlp.up_proj.weight"
  broken = rewrite(folder, tmp_path / "a", lambda tensors: tensors.pop(name))
  with pytest.raises(
    PretrainedError, match=rf"lacks 1 tensors, the first {name} of shape \(48, 32\)"
  ):
    load_pretrained(broken)
  rewrite(folder, broken, lambda tensors: tensors.update({name: np.zeros((48, 31), np.float32)}))
  with pytest.raises(
    PretrainedError, match=rf"{name} has shape \(48, 31\) in .*model.safetensors.*\(48, 32\)"
  ):
    load_pretrained(broken)
  rewrite(
    folder, broken, lambda tensors: tensors.update({"v_head.weight": np.zeros((1, 32), np.float32)})
  )
  with pytest.raises(
    PretrainedError, match=r"model.safetensors holds 1 tensors .* v_head.weight of shape \(1, 32\)"
  ):
    load_pretrained(broken)
  rewrite(
    folder,
    broken,
    lambda tensors: tensors.update({"model.layers.0.self_attn.rotary_emb.inv_freq": np.ones(4)}),
  )
  load_pretrained(broken)
  ours = load_pretrained(folder)
  with pytest.raises(
    ValueError, match=r"layers/attn/k/kernel: shape \(3, 32, 32\) in the state, \(3, 32, 16\)"
  ):
    save_pretrained(tmp_path / "out", ours.arch.replace(num_kv_heads=2), ours.state)


def test_tensors_that_are_not_read_may_have_any_dtype(saved, tmp_path):
  masks = {
    "gpt_neox.layers.0.attention.bias": np.ones((1, 1, 8, 8), bool),
    "gpt_neox.layers.0.attention.masked_bias": np.full((), -1e9, np.float32),
  }
  places = {"vision_tower.vision_model.embeddings.position_ids": np.arange(4)[None]}
  for case, more in (("pythia", masks), ("gemma3_folder", places)):
    folder, _ = saved(case)
    old = rewrite(folder, tmp_path / case, lambda tensors, more=more: tensors.update(more))
    assert jax.tree.all(
      jax.tree.map(np.array_equal, load_pretrained(old).state, load_pretrained(folder).state)
    )
  folder, name = saved("llama2")[0], "model.norm.weight"
  eight = rewrite(folder, tmp_path / "a", lambda t: t.update({name: np.ones(32, np.uint8)}))
  with pytest.raises(PretrainedError, match=f"1 tensors as U8, the first {name}: quantised"):
    load_pretrained(eight)


def test_unusable_folders_are_explained(saved, tmp_path):
  folder, _ = saved("llama2")
  (tmp_path / "config.json").write_text((folder / "config.json").read_text())
  with pytest.raises(PretrainedError, match="holds neither model.safetensors nor"):
    load_pretrained(tmp_path)
  (tmp_path / "pytorch_model.bin").write_bytes(b"")
  with pytest.raises(PretrainedError, match="unpickled.*save_pretrained"):
    load_pretrained(tmp_path)
  (tmp_path / weights.INDEX).write_text(
    '{"weight_map": {"lm_head.weight": "model-00001-of-00002.safetensors"}}'
  )
  with pytest.raises(PretrainedError, match="model-00001-of-00002.safetensors.*not in the folder"):
    load_pretrained(tmp_path)
  with pytest.raises(FileNotFoundError, match="is not a folder"):
    load_pretrained(tmp_path / "absent")
  whole = (folder / "config.json").read_text()
  (tmp_path / weights.INDEX).unlink()
  (tmp_path / "model.safetensors").write_bytes(
    files_of(folder)["lm_head.weight"].tobytes()
  )  # an interrupted copy
  with pytest.raises(
    PretrainedError, match="model.safetensors is not a complete safetensors file.*copy it again"
  ):
    load_pretrained(tmp_path)
  (tmp_path / "config.json").write_text(whole[:40])
  with pytest.raises(PretrainedError, match="config.json is not JSON"):
    load_pretrained(tmp_path)


def test_a_model_that_the_hub_does_not_give(monkeypatch):
  import huggingface_hub
  from huggingface_hub.errors import LocalEntryNotFoundError

  def download(name, allow_patterns):
    raise LocalEntryNotFoundError("Cannot find it.\nThere is no network.")

  monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
  with pytest.raises(FileNotFoundError) as refused:
    load_pretrained("someone/some-model")
  assert str(refused.value) == (
    "someone/some-model is neither a folder nor a model on the hub: "
    "Cannot find it. There is no network."
  )


def test_hub_names_fetch_safetensors_and_json_only(saved, monkeypatch):
  import huggingface_hub

  folder, _ = saved("llama2")
  asked = {}

  def download(name, allow_patterns):
    asked.update(name=name, patterns=allow_patterns)
    return str(folder)

  monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
  assert load_pretrained("someone/some-model").arch.family == "llama"
  assert asked["name"] == "someone/some-model"

  def kept(file):
    return any(pathlib.PurePath(file).match(pattern) for pattern in asked["patterns"])

  assert all(
    map(kept, ["config.json", "model-00001-of-00002.safetensors", weights.INDEX, "tokenizer.json"])
  )
  assert not any(
    map(
      kept, ["pytorch_model.bin", "training_args.bin", "modeling_custom.py", "original/model.pth"]
    )
  )


@pytest.mark.parametrize("case", hf_models.cases())
def test_config_reads_both_spellings(case, saved):
  folder, model = saved(case)
  config = json.loads((folder / "config.json").read_text())
  arch = ArchConfig.from_hf(config)
  both = arch.to_hf()
  assert ArchConfig.from_hf(both) == arch
  assert ArchConfig.from_hf({k: v for k, v in both.items() if k != "rope_parameters"}) == arch
  theirs = model.config.get_text_config()
  written = type(theirs).from_dict(both).to_dict()
  ignored = {
    "architectures",
    "_name_or_path",
    "dtype",
    "_attn_implementation_internal",
    "bos_token_id",
    "eos_token_id",
  }
  ignored |= {"pad_token_id", "max_window_layers", "transformers_version"}
  ignored |= {"no_rope_layer_interval"}  # `no_rope_layers` has an entry for each layer
  different = {k: (v, written.get(k)) for k, v in theirs.to_dict().items() if written.get(k) != v}
  assert different.keys() <= ignored, different


def test_config_of_hub_files():
  """Fields with the spellings, and the omissions, of files on the hub."""
  llama = dict(
    model_type="llama",
    vocab_size=128256,
    hidden_size=2048,
    intermediate_size=8192,
    num_hidden_layers=16,
    num_attention_heads=32,
    num_key_value_heads=8,
    head_dim=64,
    hidden_act="silu",
    rms_norm_eps=1e-05,
    max_position_embeddings=131072,
    tie_word_embeddings=True,
    rope_theta=500000.0,
    torch_dtype="bfloat16",
    rope_scaling=dict(
      factor=32.0,
      high_freq_factor=4.0,
      low_freq_factor=1.0,
      rope_type="llama3",
      original_max_position_embeddings=8192,
    ),
  )
  arch = ArchConfig.from_hf(llama)
  assert (
    arch.rope_scaling == RopeScaling("llama3", 32.0, 1.0, 4.0, 8192) and arch.rope_theta == 500000.0
  )
  assert arch.num_kv_heads == 8 and arch.tie_embeddings and arch.norm_eps == 1e-05
  gemma = dict(
    model_type="gemma3_text",
    vocab_size=262144,
    hidden_size=1152,
    intermediate_size=6912,
    num_hidden_layers=26,
    num_attention_heads=4,
    num_key_value_heads=1,
    head_dim=256,
    sliding_window=512,
    rope_local_base_freq=10000,
    rope_theta=1000000,
    sliding_window_pattern=6,
    query_pre_attn_scalar=256,
    hidden_activation="gelu_pytorch_tanh",
    rms_norm_eps=1e-06,
  )
  arch = ArchConfig.from_hf(gemma)
  assert (arch.rope_theta, arch.rope_local_theta, arch.sliding_window) == (
    1e6,
    1e4,
    512,
  ) and arch.tie_embeddings
  assert [i for i in range(26) if i not in arch.sliding_layers] == [5, 11, 17, 23]
  pythia = dict(
    model_type="gpt_neox",
    vocab_size=50304,
    hidden_size=512,
    intermediate_size=2048,
    num_hidden_layers=6,
    num_attention_heads=8,
    rotary_pct=0.25,
    rotary_emb_base=10000,
    hidden_act="gelu",
    layer_norm_eps=1e-05,
    max_position_embeddings=2048,
    use_parallel_residual=True,
    tie_word_embeddings=False,
  )
  arch = ArchConfig.from_hf(pythia)
  assert (
    arch.rotary_dim == 16
    and arch.parallel_residual
    and arch.qkv_bias
    and arch.mlp_bias
    and not arch.gated_mlp
  )
  qwen = dict(
    model_type="qwen2",
    vocab_size=151936,
    hidden_size=896,
    intermediate_size=4864,
    num_hidden_layers=24,
    num_attention_heads=14,
    num_key_value_heads=2,
    rope_theta=1000000.0,
    tie_word_embeddings=True,
    use_sliding_window=False,
    sliding_window=32768,
    max_window_layers=21,
  )
  arch = ArchConfig.from_hf(qwen)
  assert arch.qkv_bias and not arch.out_bias and arch.sliding_window is None and arch.head_dim == 64


@pytest.mark.parametrize(
  "change, message",
  [
    (dict(model_type="gpt2"), "'gpt2' in config.json is not supported"),
    (dict(hidden_act="relu"), "hidden_act='relu'"),
    (dict(rope_scaling=dict(type="dynamic", factor=4.0)), "rope type 'dynamic'"),
    (dict(use_bidirectional_attention=True), "causal"),
    (dict(quantization_config=dict(quant_method="fp8")), "quantised weights are not supported"),
  ],
)
def test_unsupported_configs_are_refused(change, message):
  config = ArchConfig().to_hf()
  del config["rope_parameters"]
  with pytest.raises(ValueError, match=message):
    ArchConfig.from_hf(config | change)


@pytest.mark.parametrize(
  "case, change, message",
  [
    ("granite4", dict(num_local_experts=4), "num_local_experts = 4.*only dense models"),
    ("granite4", dict(layer_types=["mamba"] * 3), r"layers of kind \['mamba'\]"),
    ("ministral3", dict(rope_parameters=None), "'ministral3' lacks rope_parameters"),
    ("phi3", dict(head_dim=6), "has no head size of its own"),
    ("olmo3", dict(sliding="yarn"), "sliding layers the rope type 'yarn'"),
  ],
)
def test_members_of_a_family_that_are_not_supported(case, change, message):
  model_type, fields = hf_models.CASES[case]
  config = hf_models.SMALL | dict(model_type=model_type) | fields
  if "sliding" in change:
    rope = config["rope_parameters"]
    change = dict(rope_parameters=rope | {"sliding_attention": rope["full_attention"]})
  with pytest.raises(ValueError, match=message):
    ArchConfig.from_hf(config | change)


def test_an_architecture_outside_its_family_is_refused(tmp_path):
  arch = ArchConfig(
    vocab_size=61, hidden_size=32, num_layers=2, num_heads=4, norm="layer", qk_norm=True
  )
  with pytest.raises(
    ValueError, match=r"'llama' cannot express norm='layer' \(reads 'rms'\), qk_norm=True"
  ):
    save_pretrained(tmp_path / "out", arch, transformer.abstract(arch)[1])
