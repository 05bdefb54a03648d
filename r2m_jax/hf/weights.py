"""Reads Hugging Face folders, from safetensors directly onto the shards of a `Transformer`'s state,
and writes them.

Only safetensors and JSON are read, and nothing is unpickled. On disk every layer has its own
tensors and linear layers are [out, in]; here layers are stacked and kernels are [in, out]. One
table per naming scheme connects the two.
"""

import contextlib
import json
import math
import pathlib
import re
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, SingleDeviceSharding
from jax.sharding import PartitionSpec as P
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from r2m_jax.hf import adapters
from r2m_jax.hf.adapters import Adapter, LowRank, is_adapter, read_adapter
from r2m_jax.models import transformer
from r2m_jax.models.arch import SCORE_ACTIVATIONS, TOWERS, ArchConfig, family_of
from r2m_jax.parallel import sharding
from r2m_jax.parallel.errors import UserError
from r2m_jax.run.files import RepeatedKey, unique_keys
from r2m_jax.run.progress import doing

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
DTYPES = ("F64", "F32", "F16", "BF16")  # of tensors on disk, by safetensors' names
HUB = "hub.json"  # in a workdir: field -> the hub name, the requested revision, and its commit
CARD = "README.md"  # the model card
ADAPTER_FILES = (adapters.CONFIG, adapters.WEIGHTS)
SCORE = "score"  # the score head of a sequence classifier
# the activation between the two layers of a score head: a field of config.json, or known for these
# classes
SCORE_ACTIVATION = "score_activation"
ACTIVATION_OF = {"Qwen2ForRewardModel": "relu"}
TOKENIZER_FILES = (
  "tokenizer*",
  "special_tokens_map.json",
  "added_tokens.json",
  "vocab.*",
  "merges.txt",
  "chat_template*",
  "generation_config.json",
)
# Left in older exports: constants that the code computes.
IGNORED = re.compile(r"rotary_emb\.inv_freq$|attention\.(bias|masked_bias)$")


class Fused(NamedTuple):
  """One of several linear layers with the same input, whose outputs are in one tensor."""

  name: str
  parts: tuple[str, ...]  # the linear layers in it, keys of `widths`
  part: int
  by_head: bool = False  # [heads, parts, head_dim] (GPT-NeoX); otherwise one part after another


# Our module -> theirs, with {} for the layer. Kernels, embeddings and scales are named `weight`
# there, biases `bias`.
LLAMA_NAMES = {
  "embed": "model.embed_tokens",
  "layers/attn_norm": "model.layers.{}.input_layernorm",
  "layers/attn/q": "model.layers.{}.self_attn.q_proj",
  "layers/attn/k": "model.layers.{}.self_attn.k_proj",
  "layers/attn/v": "model.layers.{}.self_attn.v_proj",
  "layers/attn/o": "model.layers.{}.self_attn.o_proj",
  "layers/attn/q_norm": "model.layers.{}.self_attn.q_norm",
  "layers/attn/k_norm": "model.layers.{}.self_attn.k_norm",
  "layers/mlp_norm": "model.layers.{}.post_attention_layernorm",
  "layers/mlp/gate": "model.layers.{}.mlp.gate_proj",
  "layers/mlp/up": "model.layers.{}.mlp.up_proj",
  "layers/mlp/down": "model.layers.{}.mlp.down_proj",
  "final_norm": "model.norm",
  "lm_head": "lm_head",
}
GEMMA_NAMES = LLAMA_NAMES | {
  "layers/attn_post_norm": "model.layers.{}.post_attention_layernorm",
  "layers/mlp_norm": "model.layers.{}.pre_feedforward_layernorm",
  "layers/mlp_post_norm": "model.layers.{}.post_feedforward_layernorm",
}
OLMO_NAMES = {
  name: module
  for name, module in GEMMA_NAMES.items()
  if name not in ("layers/attn_norm", "layers/mlp_norm")
}
QKV, GATE_UP = ("q", "k", "v"), ("gate", "up")
PHI_NAMES = LLAMA_NAMES | {
  "layers/attn/q": Fused("model.layers.{}.self_attn.qkv_proj", QKV, 0),
  "layers/attn/k": Fused("model.layers.{}.self_attn.qkv_proj", QKV, 1),
  "layers/attn/v": Fused("model.layers.{}.self_attn.qkv_proj", QKV, 2),
  "layers/mlp/gate": Fused("model.layers.{}.mlp.gate_up_proj", GATE_UP, 0),
  "layers/mlp/up": Fused("model.layers.{}.mlp.gate_up_proj", GATE_UP, 1),
}
GRANITE_HYBRID_NAMES = LLAMA_NAMES | {
  "layers/mlp/gate": Fused("model.layers.{}.shared_mlp.input_linear", GATE_UP, 0),
  "layers/mlp/up": Fused("model.layers.{}.shared_mlp.input_linear", GATE_UP, 1),
  "layers/mlp/down": "model.layers.{}.shared_mlp.output_linear",
}
NEOX_NAMES = {
  "embed": "gpt_neox.embed_in",
  "layers/attn_norm": "gpt_neox.layers.{}.input_layernorm",
  "layers/attn/q": Fused("gpt_neox.layers.{}.attention.query_key_value", QKV, 0, by_head=True),
  "layers/attn/k": Fused("gpt_neox.layers.{}.attention.query_key_value", QKV, 1, by_head=True),
  "layers/attn/v": Fused("gpt_neox.layers.{}.attention.query_key_value", QKV, 2, by_head=True),
  "layers/attn/o": "gpt_neox.layers.{}.attention.dense",
  "layers/mlp_norm": "gpt_neox.layers.{}.post_attention_layernorm",
  "layers/mlp/up": "gpt_neox.layers.{}.mlp.dense_h_to_4h",
  "layers/mlp/down": "gpt_neox.layers.{}.mlp.dense_4h_to_h",
  "final_norm": "gpt_neox.final_layer_norm",
  "lm_head": "embed_out",
}
NAMES = {
  "gemma2": GEMMA_NAMES,
  "gemma3_text": GEMMA_NAMES,
  "gpt_neox": NEOX_NAMES,
  "granitemoehybrid": GRANITE_HYBRID_NAMES,
  "olmo2": OLMO_NAMES,
  "olmo3": OLMO_NAMES,
  "phi3": PHI_NAMES,
}  # all others: LLAMA_NAMES


# Prefixes of the language model's tensors in a folder with more than a language model
# (arch.TOWERS), and in a language model's own folder. Other tensors are not read.
TOWER_PREFIXES = {
  "language_model.model.": "model.",
  "model.language_model.": "model.",
  "language_model.lm_head.": "lm_head.",
  "lm_head.": "lm_head.",
  "score.": "score.",
}


class Score(NamedTuple):
  """The linear head of a sequence classifier, or the last layer of a two-layer head."""

  kernel: jax.Array  # [D, labels]
  bias: jax.Array | None  # [labels]


class Pretrained(NamedTuple):
  """A model read from disk: `nnx.merge(graphdef, state)` is its `Transformer`."""

  arch: ArchConfig
  graphdef: Any
  state: nnx.State
  score: Score | None


class PretrainedError(UserError, ValueError):
  """A folder does not hold the model that it describes; the message names the file, the tensor and
  the shapes.
  """


def name_of(arch: ArchConfig, path: str) -> tuple[str, Fused | None]:
  """layers/attn/q/kernel -> (model.layers.{}.self_attn.q_proj.weight, its place in a fused linear
  or None).
  """
  module, leaf = path.rsplit("/", 1)
  names = NAMES.get(arch.family, LLAMA_NAMES)
  entry = f"{SCORE}.0" if module == "score_first" else names[module]
  fused = entry if isinstance(entry, Fused) else None
  return f"{fused.name if fused else entry}.{'bias' if leaf == 'bias' else 'weight'}", fused


def widths(arch: ArchConfig) -> dict[str, int]:
  """The numbers of outputs of the linear layers that a `Fused` may contain."""
  query, key = arch.num_heads * arch.head_dim, arch.num_kv_heads * arch.head_dim
  wide = arch.intermediate_size
  return {"q": query, "k": key, "v": key, "gate": wide, "up": wide}


def rows_of(arch: ArchConfig, fused: Fused) -> np.ndarray:
  """i64[n]: the rows of the fused tensor that belong to this linear layer, in its own order."""
  sizes = [widths(arch)[part] for part in fused.parts]
  rows = np.arange(sum(sizes))
  if fused.by_head:
    return rows.reshape(-1, len(sizes), arch.head_dim)[:, fused.part].reshape(-1)
  return np.split(rows, np.cumsum(sizes)[:-1])[fused.part]


def fused_rows(arch: ArchConfig, fused: Fused) -> int:
  """The number of rows of the fused tensor."""
  return sum(widths(arch)[part] for part in fused.parts)


# ---- reading ----


def load_pretrained(
  source: str | pathlib.Path,
  *,
  mesh: Mesh | None = None,
  dtype=jnp.float32,
  param_dtype=jnp.float32,
  remat: str = "none",
  attention: tuple[str, str] = ("auto", "cpu"),
  lm_head: bool | None = None,
  merge: bool = True,
) -> Pretrained:
  """Reads a causal language model or a sequence classifier.

  Args:
    source: a folder, or a name on the Hugging Face hub. For a PEFT folder, the base that it names
      is read and the adapters are merged into it.
    mesh: distributes each parameter by `sharding.RULES`; each shard is read from disk separately.
      None: the default device.
    dtype, param_dtype, remat, attention: as for `Transformer`.
    lm_head: None: as in the folder; False: without the vocabulary head (a reward model from a
      policy).
    merge: False: read only the base of a PEFT folder, without its adapters.
  """
  arch, files = open_folder(fetch(source), merge)
  score_name = f"{files.score}.weight"
  arch = arch.replace(lm_head=score_name not in files.shapes if lm_head is None else lm_head)
  files.check_tied(arch)
  graphdef, shapes = transformer.abstract(
    arch, dtype=dtype, param_dtype=param_dtype, remat=remat, attention=attention
  )
  flat = [
    (sharding.path_name(path), x.shape)
    for path, x in jax.tree_util.tree_flatten_with_path(shapes)[0]
  ]
  files.check({path: shape for path, shape in flat}, arch)

  total = sum(math.prod(x.shape) * x.dtype.itemsize for x in jax.tree.leaves(shapes))
  # each process reads only its own shards
  with doing(f"loading weights of {files.folder.name}", total // jax.process_count()) as bar:

    def place(path, x):
      name = sharding.path_name(path)
      layout = (
        default_sharding()
        if mesh is None
        else NamedSharding(mesh, sharding.spec_for(name, x.shape, mesh))
      )
      read = Memo(lambda index: files.read(arch, name, x.shape, index, x.dtype, bar.add))
      return jax.make_array_from_callback(x.shape, layout, read)

    state = jax.tree_util.tree_map_with_path(place, shapes)
  score = None
  if score_name in files.shapes:
    files.check_score(arch, read_json(files.folder / "config.json"))
    score = _read_score(files, mesh, param_dtype)
  return Pretrained(arch, graphdef, state, score)


def open_folder(folder: pathlib.Path, merge: bool) -> tuple[ArchConfig, "Files"]:
  """The architecture in a folder and its files. For a PEFT folder they are the base's, with the
  adapters if `merge`.
  """
  base = model_folder(folder)
  arch = read_arch(base / "config.json")
  tower = read_json(base / "config.json").get("model_type") in TOWERS
  files = Files(base, tower=tower)
  files.add_prefix(arch)
  arch = files.with_score_layers(arch, read_json(base / "config.json"))
  if merge and is_adapter(folder):
    files.adapt(read_adapter(folder), arch, tower=tower)
  return arch, files


def model_folder(folder: pathlib.Path) -> pathlib.Path:
  """The folder with a model's config.json: itself, or the base of a PEFT folder."""
  if not is_adapter(folder):
    return folder
  try:
    base = fetch(*adapters.base_of(folder))
  except OSError as error:
    adapters.refuse(folder, f"whose base cannot be read: {error}")
  if not (base / "config.json").exists():
    adapters.refuse(folder, f"whose base {base} holds no config.json")
  return base


def _read_score(files: "Files", mesh: Mesh | None, param_dtype) -> Score:
  """The score head of a classifier, replicated on every device."""
  layout = default_sharding() if mesh is None else NamedSharding(mesh, P())

  def put(x):
    return jax.make_array_from_callback(x.shape, layout, lambda index: x[index])

  name = f"{files.score}.bias"
  bias = files.tensor(name) if name in files.shapes else None
  kernel = np.ascontiguousarray(files.tensor(f"{files.score}.weight").T)
  return Score(
    put(kernel.astype(param_dtype)), None if bias is None else put(bias.astype(param_dtype))
  )


def fetch(source: str | pathlib.Path, revision: str = "") -> pathlib.Path:
  """The local folder of a model; a hub name is downloaded first: only safetensors, JSON, tokenizer
  and model card.

  Args:
    revision: branch, tag or commit of a hub name; "": its main branch.
  """
  folder = pathlib.Path(source).expanduser()
  if folder.is_dir():
    return folder
  if folder.is_absolute() or str(source).startswith((".", "~")) or str(source).count("/") > 1:
    raise FileNotFoundError(
      f"{folder} is not a folder; give a folder with config.json, or a hub name owner/model"
    )
  import huggingface_hub

  wanted = ["config.json", "model*.safetensors", INDEX, *TOKENIZER_FILES, CARD, *ADAPTER_FILES]
  pin = {"revision": revision} if revision else {}
  try:
    found = huggingface_hub.snapshot_download(str(source), allow_patterns=wanted, **pin)
  except (OSError, ValueError) as error:
    reason = " ".join(str(error).split())
    at = f" at revision {revision}" if revision else ""
    raise FileNotFoundError(
      f"{source}{at} is neither a folder nor a model on the hub: {reason}"
    ) from error
  return pathlib.Path(found)


def commit_of(folder: pathlib.Path) -> str:
  """The commit of a folder that `fetch` downloaded; "" of any other folder."""
  return folder.name if folder.parent.name == "snapshots" else ""


def read_json(file: pathlib.Path) -> dict[str, Any]:
  """The object in a JSON file."""
  try:
    found = json.loads(file.read_text(encoding="utf-8"), object_pairs_hook=unique_keys)
  except RepeatedKey as error:
    raise PretrainedError(f"{file} is ambiguous: {error}; leave one of its values") from None
  except (ValueError, RecursionError) as error:
    raise PretrainedError(f"{file} is not JSON: {error}; copy it again") from None
  if not isinstance(found, dict):
    raise PretrainedError(f"{file} holds no JSON object; copy it again")
  return found


def read_arch(file: pathlib.Path) -> ArchConfig:
  """The architecture in a config.json, with an error about the file if a value has a wrong type."""
  try:
    return ArchConfig.from_hf(read_json(file))
  except (TypeError, KeyError, AttributeError, IndexError, ArithmeticError) as error:
    kind = type(error).__name__
    raise PretrainedError(
      f"{file} does not describe a model ({kind}: {error}); copy it again"
    ) from None


def default_sharding() -> SingleDeviceSharding:
  return jnp.zeros(()).sharding


def header(file: pathlib.Path, *, tower: bool = False) -> dict[str, tuple[int, ...]]:
  """The shape of every tensor in a safetensors file. Tensors that are never read may have any
  dtype; `tower` is as for `Files`.
  """

  def is_read(name):
    return not (IGNORED.search(name) or tower and own_name(name) is None)

  try:
    with safe_open(file, "np") as opened:
      slices = {key: opened.get_slice(key) for key in opened.keys()}
      odd = [key for key, x in slices.items() if is_read(key) and x.get_dtype() not in DTYPES]
      if odd:
        raise PretrainedError(
          f"{file} stores {len(odd)} tensors as {slices[odd[0]].get_dtype()}, the first {odd[0]}: "
          "quantised weights "
          f"are not read; convert them to one of {', '.join(DTYPES)}"
        )
      return {key: tuple(x.get_shape()) for key, x in slices.items()}
  except (SafetensorError, OSError) as error:
    raise PretrainedError(
      f"{file} is not a complete safetensors file: {error}; copy it again"
    ) from None


class Memo:
  """Calls `f` once for each index, so that devices with the same shard share one read."""

  def __init__(self, f):
    self.f, self.seen = f, {}

  def __call__(self, index: tuple[slice, ...]) -> np.ndarray:
    key = tuple((s.start, s.stop) for s in index)
    if key not in self.seen:
      self.seen[key] = self.f(index)
    return self.seen[key]


def aligned(shape, dtype) -> np.ndarray:
  """An empty array that starts at a multiple of 64 bytes: JAX on a CPU then uses it without a
  copy.
  """
  size = math.prod(shape) * np.dtype(dtype).itemsize
  raw = np.empty(size + 64, np.uint8)
  start = -raw.ctypes.data % 64
  return raw[start : start + size].view(dtype).reshape(shape)


class Files:
  """The safetensors files of a folder, read slice by slice.

  A file is mapped for a single read. A permanent mapping would keep every page that was read, and
  so a second copy of the model.
  """

  def __init__(self, folder: pathlib.Path, *, tower: bool = False):
    """
    tower: read only the language model's tensors, under the names in its own folder.
    """
    if (folder / WEIGHTS).exists():  # as in transformers, it takes precedence over an index
      self.where = dict.fromkeys(header(folder / WEIGHTS, tower=tower), WEIGHTS)
    elif (folder / INDEX).exists():
      self.where = read_json(folder / INDEX).get("weight_map")
      if not isinstance(self.where, dict) or not all(
        isinstance(file, str) for file in self.where.values()
      ):
        raise PretrainedError(
          f"{folder / INDEX} has no weight_map of tensors to files; copy it again"
        )
    elif list(folder.glob("pytorch_model*.bin")):
      raise PretrainedError(
        f"{folder} holds only pytorch_model*.bin, which would have to be unpickled and is "
        "refused here; if you trust it, convert it: "
        "AutoModelForCausalLM.from_pretrained(folder).save_pretrained(new_folder)"
      )
    else:
      raise PretrainedError(
        f"{folder} holds neither {WEIGHTS} nor {INDEX}; copy one there, or write the model by "
        "save_pretrained"
      )
    self.folder = folder
    if outside := sorted(
      {file for file in self.where.values() if pathlib.PurePath(file).name != file}
    ):
      raise PretrainedError(
        f"{folder / INDEX} names {outside}: nothing outside of the folder is read; put the files "
        "into it and name them without a folder"
      )
    if absent := sorted({file for file in self.where.values() if not (folder / file).exists()}):
      raise PretrainedError(
        f"{folder / INDEX} names {absent}, which are not in the folder; copy it again"
      )
    files = sorted(set(self.where.values()))
    shapes = {name: header(folder / name, tower=tower) for name in files}
    self._require_once(shapes)
    for name, file in self.where.items():
      if name not in shapes[file]:
        raise PretrainedError(
          f"{folder / INDEX} says {name} lies in {file}, which does not hold it; copy both again"
        )
    stored = {own_name(name) if tower else name: name for name in self.where}
    self.stored = {name: theirs for name, theirs in stored.items() if name}  # name -> on disk
    self.where = {name: self.where[theirs] for name, theirs in self.stored.items()}
    self.shapes = {name: shapes[self.where[name]][at] for name, at in self.stored.items()}
    self.score = SCORE  # the score head's only or last linear layer; `with_score_layers`
    self.whole: Mapping[str, np.ndarray] = {}  # of an adapter, as `low`; see `adapt`
    self.low: Mapping[str, LowRank] = {}

  def _require_once(self, shapes: dict[str, dict]) -> None:
    """Raises an error if two files hold the same tensor: transformers would use the last file's,
    and the index may name the first.
    """
    seen: dict[str, str] = {}
    for file, held in shapes.items():
      for name in held:
        if name in seen:
          raise PretrainedError(
            f"{self.folder}: {name} lies in {seen[name]} and in {file}; take it out of one of them, "
            "or copy the folder again"
          )
        seen[name] = file

  def add_prefix(self, arch: ArchConfig) -> None:
    """Renames the tensors of a bare decoder to those of the whole model.

    AutoModel saves them without the prefix "model.", which transformers adds when it loads a model
    with a head.
    """
    embed, head = (name_of(arch, path)[0] for path in ("embed/embedding", "lm_head/kernel"))
    prefix = embed.split(".")[0] + "."
    if embed in self.shapes or embed.removeprefix(prefix) not in self.shapes:
      return
    heads = (f"{SCORE}.", head)
    self.stored = {name if name.startswith(heads) else prefix + name: name for name in self.stored}
    self.where = {name: self.where[stored] for name, stored in self.stored.items()}
    self.shapes = {name: self.shapes[stored] for name, stored in self.stored.items()}

  def with_score_layers(self, arch: ArchConfig, config: dict[str, Any]) -> ArchConfig:
    """`arch` with the first layer of a two-layer score head, torch.nn.Sequential(Linear,
    activation, Linear). config: the contents of config.json.
    """
    pattern = re.compile(rf"{SCORE}\.(\d+)\.weight")
    layers = sorted(int(m[1]) for name in self.shapes if (m := pattern.fullmatch(name)))
    if not layers:
      return arch
    if len(layers) != 2 or layers[0] != 0:
      raise PretrainedError(
        f"{self.folder} holds a score head of the layers {layers}: only linear ones and those of two "
        "layers with an activation between them are supported; take its tensors out and fit a "
        "linear one with config.task=reward"
      )
    (made,) = (config.get("architectures") or [""])[:1]
    activation = config.get(SCORE_ACTIVATION) or ACTIVATION_OF.get(made)
    if activation not in SCORE_ACTIVATIONS:
      raise PretrainedError(
        f"{self.folder} holds a score head of two layers, and config.json has {activation!r} as "
        f"{SCORE_ACTIVATION}: what its code computes between them; set it to one of "
        f"{', '.join(SCORE_ACTIVATIONS)}"
      )
    self.score = f"{SCORE}.{layers[1]}"
    width = self.shapes[f"{SCORE}.0.weight"][0]
    return arch.replace(score_width=width, score_activation=activation)

  def adapt(self, adapter: Adapter, arch: ArchConfig, *, tower: bool) -> None:
    """Merges an adapter into the weights that are read. Raises ValueError if it does not belong to
    this model.
    """
    adapter = adapter.renamed(own_name) if tower else adapter
    head, embed = (name_of(arch, path)[0] for path in ("lm_head/kernel", "embed/embedding"))
    if arch.tie_embeddings and head in adapter.low:
      adapters.refuse_tied(adapter.folder, head, "target_modules", embed)
    adapter.check(self.shapes)
    self.whole, self.low = adapter.whole, adapter.low
    self.shapes |= {name: x.shape for name, x in self.whole.items()}
    self.where |= dict.fromkeys(self.whole, str(adapter.folder))

  def tensor(self, name: str, index: tuple[slice, ...] = (slice(None),)) -> np.ndarray:
    """A part of a tensor, read from disk; with an adapter, a part of the merged tensor."""
    if name in self.whole:
      return self.whole[name][index]
    if name in self.low:
      return self.low[name].merged(self._stored(name, (slice(None),)))[index]
    return self._stored(name, index)

  def _stored(self, name: str, index: tuple[slice, ...]) -> np.ndarray:
    with safe_open(self.folder / self.where[name], "np") as file:
      return file.get_slice(self.stored[name])[index]

  def check(self, shapes: dict[str, tuple[int, ...]], arch: ArchConfig) -> None:
    """Raises an error unless the files hold exactly the parameters of `arch`, in their shapes."""
    expected = {}
    for path, shape in shapes.items():
      template, fused = name_of(arch, path)
      stacked = path.startswith("layers/")
      shape = shape[1:] if stacked else shape
      if path.endswith("/kernel"):
        shape = shape[::-1]
      if fused is not None:
        shape = (fused_rows(arch, fused), *shape[1:])
      for layer in range(arch.num_layers if stacked else 1):
        expected[template.format(layer)] = shape
    if missing := sorted(expected.keys() - self.shapes.keys()):
      raise PretrainedError(
        f"{self.folder} lacks {len(missing)} tensors, the first {missing[0]} of shape "
        f"{expected[missing[0]]}; it holds "
        f"{len(self.shapes)} of model_type {arch.family!r}, such as {min(self.shapes)}; copy "
        "the weights again, or correct config.json"
      )
    for name, shape in expected.items():
      if self.shapes[name] != shape:
        raise PretrainedError(
          f"{name} has shape {self.shapes[name]} in {self.folder / self.where[name]}; config.json "
          f"asks for {shape}: correct it, or copy the weights again"
        )
    head = name_of(arch, "lm_head/kernel")[0]
    allowed = {f"{self.score}.weight", f"{self.score}.bias", head}
    extra = sorted(
      n for n in self.shapes.keys() - expected.keys() - allowed if not IGNORED.search(n)
    )
    if layers := [name for name in extra if name.startswith(f"{SCORE}.")]:
      raise PretrainedError(
        f"{self.folder} holds a score head with {layers[0]}: only linear ones and those of two "
        "layers with an activation between them are supported; take its tensors out and fit a "
        "linear one with config.task=reward"
      )
    if extra:
      raise PretrainedError(
        f"{self.folder / self.where[extra[0]]} holds {len(extra)} tensors that config.json does "
        f"not describe, the first {extra[0]} of shape {self.shapes[extra[0]]}; correct "
        "config.json, or take them out"
      )

  def check_score(self, arch: ArchConfig, config: dict[str, Any]) -> None:
    """Raises an error if the score head's width differs from the model's, or its number of rows
    from the number of labels in `config` (config.json).

    As in transformers, `num_labels` takes precedence over `id2label`. Transformers' default of two
    labels, if both are missing, is not used: the head then defines the number. The head of a PEFT
    folder also defines it, because its config.json is the base's.
    """
    name = f"{self.score}.weight"
    shape = self.shapes[name]
    rows = shape[0] if shape else 0
    bias = self.shapes.get(f"{self.score}.bias", (rows,))
    if shape != (rows, arch.embedding_size) or bias != (rows,):
      raise PretrainedError(
        f"{name} has shape {shape} and its bias {bias} in {self.folder / self.where[name]}; a head "
        f"is (labels, {arch.embedding_size}) and (labels,): correct it, or copy the weights again"
      )
    names = config.get("id2label")
    named = len(names) if isinstance(names, dict) else names
    field = "id2label" if config.get("num_labels") is None else "num_labels"
    labels = named if field == "id2label" else config["num_labels"]
    if labels is not None and labels != rows and name not in self.whole:
      raise PretrainedError(
        f"{self.folder / 'config.json'} has {labels} labels in {field}, and {name} next to it has "
        f"{rows} rows, which disagree; correct the one that is wrong"
      )

  def check_tied(self, arch: ArchConfig) -> None:
    """Raises an error if config.json ties the head to the embedding and the files have a different
    head, or an adapter has a different embedding.
    """
    head, embed = (name_of(arch, path)[0] for path in ("lm_head/kernel", "embed/embedding"))
    if not arch.lm_head or arch.untied_head:
      return
    if embed in self.whole and head not in self.shapes:
      adapters.refuse(
        pathlib.Path(self.where[embed]),
        f"with its own {embed}, to which its base ties the head; for peft the head stays the base's",
      )
    if head in self.whole and embed not in self.whole:
      adapters.refuse_tied(pathlib.Path(self.where[head]), head, "modules_to_save", embed)
    if not {head, embed} <= self.shapes.keys():
      return
    if (
      self.shapes[head] != self.shapes[embed] or not (self.tensor(head) == self.tensor(embed)).all()
    ):
      raise PretrainedError(
        f"{self.folder}: config.json has tie_word_embeddings=true, and {head} is not {embed}; set "
        f"tie_word_embeddings=false to use {head}, or take {head} out of the files"
      )

  def read(
    self,
    arch: ArchConfig,
    path: str,
    shape: tuple[int, ...],
    index: tuple[slice, ...],
    dtype,
    done: Callable[[int], None] = lambda size: None,
  ) -> np.ndarray:
    """The part `index` of the parameter at `path`, of full `shape`, as `dtype`, read from disk one
    layer at a time; `done` is called with the bytes of each.
    """
    template, fused = name_of(arch, path)
    rows = None if fused is None else rows_of(arch, fused)
    result = aligned([len(range(*i.indices(n))) for i, n in zip(index, shape)], dtype)
    if not path.startswith("layers/"):
      result[...] = self._read(template, rows, index, path)
      done(result.nbytes)
      return result
    layers = range(*index[0].indices(shape[0]))
    for row, layer in enumerate(layers):
      result[row] = self._read(template.format(layer), rows, index[1:], path)
      done(result[row].nbytes)
    return result

  def _read(self, name, rows, index, path) -> np.ndarray:
    """One tensor's part in our layout: `index` counts [in, out] for kernels, and outputs among
    `rows` of the tensor if it is fused.
    """
    kernel = path.endswith("/kernel")
    index = index[::-1] if kernel else index
    if rows is None:
      x = self.tensor(name, index)
    else:
      rows = rows[index[0]]
      first = int(rows.min())
      x = self.tensor(name, (slice(first, int(rows.max()) + 1), *index[1:]))[rows - first]
    return np.ascontiguousarray(x.T) if kernel else x


def own_name(name: str) -> str | None:
  """A tensor of a folder with more than a language model -> its name in the language model's own
  folder, None if it belongs to another part.
  """
  for theirs, own in TOWER_PREFIXES.items():
    if name.startswith(theirs):
      return own + name.removeprefix(theirs)
  return None


# ---- writing ----


def save_pretrained(
  folder: str | pathlib.Path,
  arch: ArchConfig,
  state: nnx.State,
  *,
  score: Score | None = None,
  dtype=None,
  max_shard_bytes: int = 5 * 10**9,
  tokenizer_folder: str | pathlib.Path | None = None,
  extra: dict[str, Any] | None = None,
) -> None:
  """Writes a folder for AutoModelForCausalLM or, with a `score`, for
  AutoModelForSequenceClassification.

  The folder appears complete or not at all; an older model there is replaced. With several
  processes all must call it; the first one writes.

  Args:
    score: transformers' classifiers have no bias; a bias is written as score.bias, which
      `load_pretrained` reads. Two layers are written as score.0 and score.2, as in
      torch.nn.Sequential(Linear, activation, Linear), with the activation in config.json.
    dtype: of the tensors on disk; None: unchanged.
    max_shard_bytes: larger models are split over files with an index.
    tokenizer_folder: folder from which tokenizer files, generation config and special token ids are
      copied.
    extra: more fields for config.json, such as pad_token_id.
  """
  folder = pathlib.Path(folder).expanduser().absolute()
  if score is None and not arch.lm_head:
    raise ValueError(
      "a model with ArchConfig.lm_head=False has no vocabulary head; save it with its score: score="
    )
  if folder.exists() and any(folder.iterdir()) and not (folder / "config.json").exists():
    raise FileExistsError(f"{folder} is not empty and holds no model; give a new folder")
  arch = arch.replace(lm_head=score is None)
  params = {
    sharding.path_name(path): x for path, x in jax.tree_util.tree_flatten_with_path(state)[0]
  }
  _check_state(arch, params)
  name = str(jnp.dtype(dtype or params["embed/embedding"].dtype))
  config = _token_ids(tokenizer_folder) | arch.to_hf() | {"dtype": name, "torch_dtype": name}
  config |= _labels(score) | (extra or {})
  if family_of(arch.family).defaults.get("pad_token_id", 0) >= arch.vocab_size:
    config.setdefault("pad_token_id", None)  # otherwise transformers uses the family's

  tensors = _tensors(arch, params, score, dtype)
  if jax.process_index() != 0:
    for _ in tensors:  # every process takes part in gathering
      pass
    return
  total = sum(x.size for x in params.values()) * jnp.dtype(name).itemsize
  with _replacing(folder) as new:
    with doing(f"writing weights to {folder}", total) as bar:
      _write_shards(new, tensors, max_shard_bytes, bar.add)
    for file in tokenizer_files(tokenizer_folder) if tokenizer_folder else ():
      shutil.copyfile(file, new / file.name)
    (new / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def tokenizer_files(folder: str | pathlib.Path) -> list[pathlib.Path]:
  """The tokenizer files and the generation config in a folder; folders of such names are none."""
  found = [file for pattern in TOKENIZER_FILES for file in pathlib.Path(folder).glob(pattern)]
  return [file for file in found if file.is_file()]


def _labels(score: Score | None) -> dict[str, Any]:
  """The fields of config.json that name a classifier's outputs; {} for a language model."""
  if score is None:
    return {}
  labels = {str(i): f"LABEL_{i}" for i in range(score.kernel.shape[1])}
  return {"id2label": labels, "label2id": {label: int(i) for i, label in labels.items()}}


@contextlib.contextmanager
def _replacing(folder: pathlib.Path) -> Iterator[pathlib.Path]:
  """A new folder to fill, which replaces `folder` if the block ends without an error."""
  folder.parent.mkdir(parents=True, exist_ok=True)
  new = pathlib.Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
  try:
    yield new
    new.chmod(0o755)
    if folder.exists():
      old = pathlib.Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
      folder.rename(old / folder.name)
      new.rename(folder)
      shutil.rmtree(old)
    else:
      new.rename(folder)
  finally:
    shutil.rmtree(new, ignore_errors=True)


def _check_state(arch: ArchConfig, params: dict[str, jax.Array]) -> None:
  """Raises an error unless `params` are the parameters of `arch`; a classifier may still have a
  language-model head, which is dropped.
  """
  shapes = jax.tree_util.tree_flatten_with_path(transformer.abstract(arch)[1])[0]
  expected = {sharding.path_name(path): x.shape for path, x in shapes}
  given = {
    path: x.shape for path, x in params.items() if path in expected or path != "lm_head/kernel"
  }
  if wrong := sorted(p for p in expected.keys() | given.keys() if expected.get(p) != given.get(p)):
    at = wrong[0]
    raise ValueError(
      f"{len(wrong)} parameters are not those of the architecture, the first {at}: shape "
      f"{given.get(at)} in the state, "
      f"{expected.get(at)} expected (None: absent); merge adapters before saving"
    )


def _tensors(arch, params, score, dtype) -> Iterator[tuple[str, np.ndarray]]:
  """(name on disk, array), with at most one stacked parameter (three if fused) on the host at a
  time.
  """
  groups: dict[str, list[str]] = {}  # template -> our paths
  for path in params:
    if path != "lm_head/kernel" or arch.untied_head:
      groups.setdefault(name_of(arch, path)[0], []).append(path)
  for template, paths in sorted(groups.items()):
    parts = [gather(params[path], dtype) for path in paths]
    stacked = paths[0].startswith("layers/")
    for layer in range(arch.num_layers if stacked else 1):
      rows = [part[layer] if stacked else part for part in parts]
      rows = [row.T if path.endswith("/kernel") else row for path, row in zip(paths, rows)]
      if len(rows) > 1:
        whole = np.empty((sum(map(len, rows)), *rows[0].shape[1:]), rows[0].dtype)
        for path, row in zip(paths, rows):
          whole[rows_of(arch, name_of(arch, path)[1])] = row
        rows = [whole]
      # safetensors would write the memory of a transposed view without transposing it
      yield template.format(layer), np.ascontiguousarray(rows[0])
  if score is not None:
    name = f"{SCORE}.2" if arch.score_width else SCORE
    yield f"{name}.weight", np.ascontiguousarray(gather(score.kernel, dtype).T)
    if score.bias is not None:
      yield f"{name}.bias", gather(score.bias, dtype)


def gather(x: jax.Array, dtype) -> np.ndarray:
  """A full array on the host, also if its shards are on other processes."""
  x = x if dtype is None else x.astype(dtype)
  return np.asarray(
    x if x.is_fully_addressable else multihost_utils.process_allgather(x, tiled=True)
  )


def _write_shards(
  folder: pathlib.Path,
  tensors: Iterator[tuple[str, np.ndarray]],
  max_bytes: int,
  done: Callable[[int], None],
) -> None:
  """Fills files up to `max_bytes`, then names them: one file, or model-0000i-of-0000n with an
  index. `done` is called with the bytes of each file.
  """
  shards: list[list[str]] = []
  pending: dict[str, np.ndarray] = {}
  total = size = 0

  def flush():
    save_file(pending, folder / f"shard-{len(shards)}", metadata={"format": "pt"})
    shards.append(list(pending))
    done(sum(x.nbytes for x in pending.values()))
    pending.clear()

  for name, array in tensors:
    if pending and size + array.nbytes > max_bytes:
      flush()
      size = 0
    pending[name] = array
    size += array.nbytes
    total += array.nbytes
  flush()
  if len(shards) == 1:
    (folder / "shard-0").rename(folder / WEIGHTS)
    return
  where = {}
  for i, names in enumerate(shards):
    file = f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors"
    (folder / f"shard-{i}").rename(folder / file)
    where |= dict.fromkeys(names, file)
  index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(where.items()))}
  (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def _token_ids(tokenizer_folder) -> dict[str, Any]:
  """bos, eos and pad ids of the model in the tokenizer's folder, if there is one."""
  if (
    tokenizer_folder is None
    or not (file := pathlib.Path(tokenizer_folder) / "config.json").exists()
  ):
    return {}
  config = json.loads(file.read_text(encoding="utf-8"))
  return {
    key: config[key] for key in ("bos_token_id", "eos_token_id", "pad_token_id") if key in config
  }
