"""Adapters. Oracles: the base with A B added to its kernels, and the library `peft` in torch."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_text
import torch
import transformers
from flax import nnx
from test_folders import PAIRS, PROMPTS, small
from test_serve import config, read, write

from r2m_jax.config import ConfigError, check_config
from r2m_jax.hf import export
from r2m_jax.hf.folders import FolderError
from r2m_jax.models import lora, transformer
from r2m_jax.models.arch import ArchConfig
from r2m_jax.models.lora import LoraConfig
from r2m_jax.parallel import sharding
from r2m_jax.tasks import export as export_task
from r2m_jax.tasks import folders as folders_task

ARCH = ArchConfig(
  vocab_size=37, hidden_size=32, num_layers=3, num_heads=4, num_kv_heads=2, intermediate_size=48
)
ALL = "attn/(q|k|v|o)|mlp/(gate|up|down)"


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
  root = tmp_path_factory.mktemp("models")
  tiny_text.model("qwen2", "chatml", root / "qwen2")
  tiny_text.model("pythia", "plain", root / "pythia")
  tiny_text.model("llama3.1", "llama3", root / "reward", classifier=True)
  return root


def logits(graphdef):
  return jax.jit(
    lambda *s: (lambda m: m.logits(m(TOKENS, TOKENS > 0).hidden))(nnx.merge(graphdef, *s))
  )


TOKENS = np.arange(1, 15, dtype=np.int32).reshape(2, 7)


def noisy(tree, seed=0):
  rng = np.random.default_rng(seed)
  return jax.tree.map(lambda x: jnp.asarray(0.1 * rng.standard_normal(x.shape), x.dtype), tree)


def test_adapters_start_at_the_base_and_merge_into_it():
  base_def, base = transformer.init(ARCH, jax.random.key(0))
  settings = LoraConfig(rank=4, alpha=8.0, targets="attn/(q|o)|mlp/down")
  adapted = lora.graphdef(ARCH, settings, dtype=jnp.float32, remat="full")
  adapters = lora.init(ARCH, settings, jax.random.key(1), dtype=jnp.float32)
  shapes = {
    sharding.path_name(p): x.shape for p, x in jax.tree_util.tree_flatten_with_path(adapters)[0]
  }
  assert shapes == {
    "layers/attn/q/kernel_lora_a": (3, 32, 4),
    "layers/attn/q/kernel_lora_b": (3, 4, 32),
    "layers/attn/o/kernel_lora_a": (3, 32, 4),
    "layers/attn/o/kernel_lora_b": (3, 4, 32),
    "layers/mlp/down/kernel_lora_a": (3, 48, 4),
    "layers/mlp/down/kernel_lora_b": (3, 4, 32),
  }
  a = adapters["layers"]["attn"]["q"]["kernel_lora_a"][...]
  assert float(jnp.abs(a[0] - a[1]).max()) > 0  # every layer has its own initial values
  plain, with_adapters = logits(base_def), logits(adapted)
  np.testing.assert_array_equal(with_adapters(adapters, base), plain(base))
  adapters = noisy(adapters)
  got = with_adapters(adapters, base)
  np.testing.assert_allclose(got, plain(lora.merged(adapters, base, settings)), atol=2e-5)
  assert np.abs(got - plain(base)).max() > 0.1
  doubled = LoraConfig(rank=4, alpha=16.0, targets=settings.targets)
  want = plain(lora.merged(jax.tree.map(lambda x: x * 2**0.5, adapters), base, settings))
  np.testing.assert_allclose(plain(lora.merged(adapters, base, doubled)), want, atol=2e-5)


def test_adapters_are_laid_out_over_the_mesh():
  mesh = sharding.make_mesh((1, 4, 2))
  adapters = lora.init(ARCH, LoraConfig(4, 8.0, ALL), jax.random.key(1), mesh, dtype=jnp.float32)

  def part(*path):
    return path_of(adapters, path).sharding.shard_shape(path_of(adapters, path).shape)

  assert part("attn", "q", "kernel_lora_a") == (3, 8, 4) and part("attn", "q", "kernel_lora_b") == (
    3,
    4,
    16,
  )
  assert part("mlp", "down", "kernel_lora_a") == (3, 24, 4) and part(
    "mlp", "down", "kernel_lora_b"
  ) == (3, 4, 8)


def path_of(state, path):
  state = state["layers"]
  for name in path:
    state = state[name]
  return state[...]


def test_patterns_that_match_nothing_are_refused(folders, tmp_path):
  assert LoraConfig(4, 8.0, ALL).linears(ARCH) == list(lora.LINEARS)
  assert "mlp/gate" not in LoraConfig(4, 8.0, ".*").linears(ARCH.replace(gated_mlp=False))
  with pytest.raises(ValueError, match="'query': it matches none of attn/q"):
    LoraConfig(4, 8.0, "query").linears(ARCH)
  with pytest.raises(ConfigError, match="config.lora.rank is 4: adapters need a base model"):
    check_config(config(lora__rank=4))
  cfg = small(
    folders,
    tmp_path,
    task="sft",
    lora__rank=2,
    lora__targets="nothing",
    policy__path=str(folders / "qwen2"),
    data__name=write(tmp_path / "data.jsonl", [{"prompt": "a", "response": "b"}] * 4),
  )
  with pytest.raises(ConfigError, match="config.lora.targets is 'nothing'"):
    folders_task.run(cfg, tmp_path / "run")


def their_logits(model, ids):
  with torch.no_grad():
    return model(torch.tensor([ids])).logits[0].numpy()


@pytest.mark.parametrize(
  "case, targets", [("qwen2", "attn/(q|v)|mlp/gate"), ("pythia", "attn/(q|v|o)|mlp/up")]
)
def test_peft_folder_agrees_with_peft(case, targets, folders, tmp_path):
  """SFT with adapters, exported for peft (fused query_key_value included) and merged: three forms
  of one model.
  """
  import peft

  rows = [{"prompt": "The cat sat on", "response": "the mat."}] * 4
  cfg = small(
    folders,
    tmp_path,
    task="sft",
    policy__path=str(folders / case),
    sft__lr=0.05,
    lora__rank=2,
    lora__alpha=3.0,
    lora__targets=targets,
    lora__export="peft",
    data__name=write(tmp_path / "data.jsonl", rows),
    export__check=False,
  )
  folders_task.run(cfg, tmp_path / "run")
  out = tmp_path / "run/export/policy"
  assert {"adapter_config.json", "adapter_model.safetensors", "tokenizer.json", "README.md"} <= {
    p.name for p in out.iterdir()
  }
  assert "model.safetensors" not in {p.name for p in out.iterdir()}
  base = transformers.AutoModelForCausalLM.from_pretrained(folders / case)
  ids = [5, 9, 20, 33, 7]
  before = their_logits(base, ids)
  adapted = peft.PeftModel.from_pretrained(base, out).eval()
  exporting = config(
    task="export",
    export__checkpoint=str(tmp_path / "run"),
    export__out=str(tmp_path / "out"),
    lora__export="peft",
    export__check=False,
  )
  export_task.run(exporting)
  name = "adapter_model.safetensors"
  assert (tmp_path / "out/policy" / name).read_bytes() == (out / name).read_bytes()
  exporting.lora.export, exporting.export.out = "merged", str(tmp_path / "merged")
  export_task.run(exporting)
  merged = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "merged/policy")
  want = their_logits(adapted, ids)
  np.testing.assert_allclose(their_logits(merged, ids), want, atol=1e-4)
  assert np.abs(want - before).max() > 0.05


@pytest.mark.long
@pytest.mark.parametrize("case", ["qwen2", "phi4_mini"])
def test_adapters_of_a_folder_are_trained_on(case, folders, tmp_path):
  """R2M starts from the folder's adapters, with the base as reference. The learning rate is too
  small to change them, and peft loads them on the same base.
  """
  import peft

  if not (folders / case).exists():
    tiny_text.model(case, "chatml", folders / case)
  base = transformers.AutoModelForCausalLM.from_pretrained(folders / case)
  fused = case == "phi4_mini"
  settings = peft.LoraConfig(
    task_type="CAUSAL_LM",
    r=2,
    lora_alpha=3,
    use_rslora=True,
    target_modules=["qkv_proj"] if fused else ["q_proj", "v_proj"],
  )
  model = peft.get_peft_model(base, settings).eval()
  torch.manual_seed(0)
  with torch.no_grad():
    for name, x in model.named_parameters():
      if "lora_" in name:
        x.copy_(0.3 * torch.randn_like(x))
  model.save_pretrained(tmp_path / "adapters")
  ids = [5, 9, 20, 33, 7]
  want = their_logits(model, ids)
  targets = "attn/(q|k|v)" if fused else "attn/(q|v)"
  cfg = small(
    folders,
    tmp_path,
    policy__path=str(tmp_path / "adapters"),
    policy__adapters="trained",
    policy__lr=1e-9,
    lora__rank=2,
    lora__alpha=5.0,
    lora__targets=targets,
    lora__export="peft",
    steps=1,
    data__name=write(tmp_path / "data.jsonl", [{"prompt": p} for p in PROMPTS[:2]]),
    export__check=False,
  )
  folders_task.run(cfg, tmp_path / "run")
  (row,) = read(tmp_path / "run/metrics.jsonl")
  assert row["policy/old_ref_deviation"] > 1e-2
  out = tmp_path / "run/export/policy"
  again = transformers.AutoModelForCausalLM.from_pretrained(folders / case)
  again = peft.PeftModel.from_pretrained(again, out).eval()
  assert again.peft_config["default"].base_model_name_or_path == str(folders / case)
  np.testing.assert_allclose(their_logits(again, ids), want, atol=1e-4)
  for change, message in {
    (("rank", 3),): "of rank 2: set config.lora.rank to it, not to 3",
    (("targets", "mlp/down"),): "which config.lora.targets = 'mlp/down' does not",
    (("rank", 0),): "config.policy.adapters is 'trained' and config.lora.rank is 0",
  }.items():
    wrong = cfg.copy_and_resolve_references()
    wrong.lora.update(dict(change))
    with pytest.raises(FolderError, match=message):
      folders_task.run(wrong, tmp_path / f"wrong-{change[0][1]}".replace("/", "-"))


def test_r2m_with_adapters_keeps_one_base(folders, tmp_path, capsys):
  cfg = small(
    folders,
    tmp_path,
    policy__path=str(folders / "qwen2"),
    lora__rank=2,
    lora__targets="attn/(q|v)",
    steps=2,
    data__name=write(tmp_path / "data.jsonl", [{"prompt": p} for p in PROMPTS[:2]]),
    policy__lr=0.05,
  )
  states = []
  original = export.write_run
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(export, "write_run", lambda *args: states.append(args[4]) or original(*args))
    folders_task.run(cfg, tmp_path / "run")
  (state,) = states
  base = transformers.AutoModelForCausalLM.from_pretrained(folders / "qwen2")
  np.testing.assert_array_equal(
    state.ref["embed"]["embedding"][...], base.model.embed_tokens.weight.detach()
  )
  names = {sharding.path_name(p) for p, _ in jax.tree_util.tree_flatten_with_path(state.policy)[0]}
  assert all("_lora_" in name for name in names) and len(names) == 4
  assert "within 1e-04" in capsys.readouterr().out
  trained = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "run/export/policy")
  moved = {n for n, x in trained.state_dict().items() if not torch.equal(x, base.state_dict()[n])}
  assert moved == {f"model.layers.{i}.self_attn.{n}_proj.weight" for i in range(3) for n in "qv"}
  assert [row["policy/old_ref_deviation"] for row in read(tmp_path / "run/metrics.jsonl")][0] == 0


def test_reward_with_adapters(folders, tmp_path):
  cfg = small(
    folders,
    tmp_path,
    task="reward",
    lora__rank=2,
    lora__targets="mlp/.*",
    reward__lr=1e-2,
    reward__epochs=2,
    data__name=write(tmp_path / "data.jsonl", PAIRS),
    export__check=True,
  )
  folders_task.run(cfg, tmp_path / "run")
  before, after = (
    transformers.AutoModelForSequenceClassification.from_pretrained(folder).state_dict()
    for folder in (folders / "reward", tmp_path / "run/export/reward")
  )
  moved = {name.split(".")[-2] for name in before if not torch.equal(before[name], after[name])}
  assert moved == {"gate_proj", "up_proj", "down_proj", "score"}
