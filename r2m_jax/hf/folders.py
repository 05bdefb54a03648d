"""Complete Hugging Face folders: model, tokenizer, renderer contract and, for R2M, the head that
reads a policy.

A reward model is a sequence classifier. Its folder may also contain

  r2m_renderer.json      the contract of its input (text.Renderer), compared on loading
  r2m_head.json          an R2M reward model: sizes, feedback layer and omega of its head ...
  r2m_head.safetensors   ... and cross-attention and phi, linear layers as [out, in]
"""

import dataclasses
import json
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh
from safetensors import SafetensorError
from safetensors.numpy import load_file

from r2m_jax.config import ConfigError
from r2m_jax.data.text import POLICY, Chat, Renderer, TextError, Tokenizer, load_tokenizer
from r2m_jax.hf.adapters import Adapter, is_adapter, read_adapter
from r2m_jax.hf.peft import check_trainable
from r2m_jax.hf.weights import (
  HUB,
  Pretrained,
  PretrainedError,
  Score,
  commit_of,
  fetch,
  load_pretrained,
  model_folder,
  read_json,
)
from r2m_jax.models.arch import ArchConfig
from r2m_jax.models.reward import RewardHead
from r2m_jax.parallel import hosts, sharding
from r2m_jax.parallel.errors import UserError
from r2m_jax.run.build import lora_of, model_kwargs
from r2m_jax.run.files import write_atomic

RENDERER = "r2m_renderer.json"
HEAD_CONFIG = "r2m_head.json"
HEAD_WEIGHTS = "r2m_head.safetensors"
HEAD_FORMAT = 1


class FolderError(UserError, ValueError):
  """A folder that a task cannot use; the message describes it and names the fix."""


@dataclasses.dataclass(frozen=True)
class HeadConfig:
  """The properties of an R2M head other than its weights."""

  policy_hidden_size: int
  reward_hidden_size: int
  attention_dim: int
  num_heads: int
  feedback_layer: int  # -1: the input of the policy's language-model head
  omega: float  # weight on the reward model's own embedding (eq. 4) at the step of the export
  format: int = HEAD_FORMAT


@dataclasses.dataclass(frozen=True)
class Policy:
  """A causal language model with its tokenizer."""

  folder: pathlib.Path
  arch: ArchConfig
  graphdef: Any
  state: nnx.State
  tokenizer: Tokenizer
  adapter: Adapter | None = None  # from which training starts, on top of `state`


@dataclasses.dataclass(frozen=True)
class RewardModel:
  """A reward model with its renderer; `head` is None unless it reads a policy."""

  folder: pathlib.Path
  arch: ArchConfig
  graphdef: Any  # of the backbone
  state: nnx.State
  phi: nnx.State | None  # the score head [Dr, 1] with a bias; None for a language model
  has_bias: bool  # whether the folder's score head has a bias
  renderer: Renderer
  head: tuple[HeadConfig, nnx.State] | None
  policy_chat: dict[str, Any]  # `Chat.contract` of the policy that the head reads; {}: no changes
  # of a run in which it reads the policy's own tokens, see `data.tokens`; None: it reads text
  ending: tuple[int, ...] | None = None
  # least length of a step's rows, in tokens: that of the longest expected row, so that steps with
  # shorter responses need no program of their own
  row_length: int = 0


def mesh_of(config) -> Mesh:
  """The config's mesh; raises ConfigError if it does not fit the devices."""
  try:
    return sharding.make_mesh(tuple(config.mesh))
  except ValueError as error:
    raise ConfigError(error) from None


def load_policy(
  source: str,
  config,
  mesh: Mesh | None = None,
  *,
  workdir: pathlib.Path | None = None,
  training: bool = False,
) -> Policy:
  """The language model and tokenizer of a folder or hub name, in the config's dtypes.

  Args:
    workdir: of a run, which keeps the commit of a hub name with which it began; see `pinned`.
    training: apply config.policy.adapters; otherwise the adapters of a PEFT folder are merged.
  """
  adapter = adapter_of(source, config, workdir) if training else None
  folder, model = _load(source, "policy.path", config, mesh, workdir, merge=adapter is None)
  if model.score is not None:
    raise FolderError(
      f"config.policy.path is {source}: a sequence classifier, which cannot generate; give a "
      "causal language model"
    )
  if adapter is not None:
    try:
      check_trainable(adapter, model.arch, lora_of(config))
    except ValueError as error:
      raise FolderError(f"config.policy.path is {source}: {error}") from None
  tokenizer = _tokenizer(folder, model.arch, config, chat_of(config, "policy"))
  return Policy(folder, model.arch, model.graphdef, model.state, tokenizer, adapter)


def adapter_of(source: str, config, workdir: pathlib.Path | None) -> Adapter | None:
  """The adapters from which training starts; None if there are none, or if they will be merged."""
  try:
    folder = pinned(source, "policy.path", config, workdir)
    adapter = read_adapter(folder) if source and is_adapter(folder) else None
  except (ValueError, OSError):
    return None  # `_load` reports the problem
  if adapter is None:
    return None
  if config.policy.adapters == "trained":
    if not config.lora.rank:
      raise FolderError(
        "config.policy.adapters is 'trained' and config.lora.rank is 0: set config.lora.rank, "
        f"alpha and targets to those of {source}"
      )
    return adapter
  if config.lora.rank and config.lora.export == "peft":
    raise FolderError(
      f"config.policy.path is {source}, an adapter folder (PEFT), and config.lora.export is 'peft': "
      "adapters on top of merged adapters have no base that peft could load; set it to 'merged', or "
      "config.policy.adapters to 'trained'"
    )
  return None


def load_reward(
  source: str,
  config,
  mesh: Mesh | None = None,
  *,
  from_policy: bool = False,
  workdir: pathlib.Path | None = None,
  field: str = "reward.path",
) -> RewardModel:
  """The reward model of a folder or hub name; refused if its contract does not match this tokenizer
  and config.

  Args:
    from_policy: accept a language model without a score head, as the start of a reward model.
    workdir: as for `load_policy`.
    field: of the config, which names the source.
  """
  folder, model = _load(source, field, config, mesh, workdir, lm_head=False)
  if model.score is None and not from_policy:
    raise FolderError(
      f"config.{field} is {source}: it holds no score head, so it cannot score; give a "
      "sequence classifier, or "
      "train one from it with config.task=reward"
    )
  if model.score is not None:
    wanted = label_of(source, field, config)
    model = model._replace(score=one_label(model.score, folder, wanted, source, field))
  saved = read_object(folder / RENDERER) if (folder / RENDERER).exists() else {}
  renderer = _renderer(folder, model.arch, config, saved, own=field == "reward.path")
  if saved:
    renderer.require(saved, folder)
  phi = None if model.score is None else phi_state(model.score)
  has_bias = model.score is not None and model.score.bias is not None
  return RewardModel(
    folder,
    model.arch,
    model.graphdef,
    model.state,
    phi,
    has_bias,
    renderer,
    load_head(folder),
    saved.get(POLICY) or {},
  )


def _renderer(
  folder: pathlib.Path, arch: ArchConfig, config, saved: dict[str, Any], *, own: bool
) -> Renderer:
  """The renderer of a reward model, from config.reward and its contract, `saved`. A model that is
  not the run's `own` (a gold reward model) is rendered only by its contract.
  """
  given = config.reward
  if own:
    chat, length = chat_of(config, "reward", saved), given.max_length
    strip = given.strip_thinking or saved.get("strip_thinking") is True
  else:
    args = saved.get("chat_template_args")
    system = str(saved.get("system_prompt") or "")
    chat = Chat(args=args if isinstance(args, dict) else {}, system=system, section="eval.gold")
    length = saved["max_length"] if isinstance(saved.get("max_length"), int) else 0
    strip = saved.get("strip_thinking") is True if saved else given.strip_thinking
  return Renderer(_tokenizer(folder, arch, config, chat), length, strip)


def chat_of(config, section: str, saved: dict[str, Any] | None = None) -> Chat:
  """The changes to a chat template in config.policy or config.reward, the `section`.

  Args:
    saved: the contract of a reward model, whose system prompt and arguments are used if the config
      gives none; the renderer refuses others.
  """
  given, saved = config[section], saved or {}
  args = given.chat_template_args.to_dict() or saved.get("chat_template_args") or {}
  return Chat(
    args=args if isinstance(args, dict) else {},
    system=given.system_prompt or str(saved.get("system_prompt") or ""),
    file=given.chat_template,
    section=section,
  )


def revision_of(source: str, field: str, config) -> str:
  """The config's revision of a model that is loaded as `field`; "" if the model is not named in the
  config. A reward model may start from the policy's folder.
  """
  for section in (field.split(".")[0], "policy"):
    if config[section].get("path") == source:
      return config[section].revision
  return ""


def pinned(source: str, field: str, config, workdir: pathlib.Path | None) -> pathlib.Path:
  """The local folder of a model. For a hub name it is the commit with which the run in `workdir`
  began.

  The commit is stored in WORKDIR/hub.json, so that a moving branch changes no run. It applies to
  one name and revision; another revision in the config is looked up again.
  """
  revision = revision_of(source, field, config)
  if workdir is None or pathlib.Path(source).expanduser().is_dir():
    return fetch(source, revision)
  path = workdir / HUB
  saved = read_json(path) if path.exists() else {}
  asked = {"name": source, "revision": revision}
  entry = saved.get(field, {})
  if asked.items() <= entry.items():
    return fetch(source, entry["commit"])
  folder = fetch(source, revision)
  commit = hosts.from_first(commit_of(folder))
  if not commit:
    return folder
  print(f"hub      {source} is commit {commit}")
  write_atomic(path, json.dumps(saved | {field: asked | {"commit": commit}}, indent=2))
  return folder if commit_of(folder) == commit else fetch(source, commit)


def _load(
  source: str, field: str, config, mesh, workdir, **kwargs
) -> tuple[pathlib.Path, Pretrained]:
  if not source:
    raise FolderError(f"config.{field} is empty; give a Hugging Face folder or a hub name")
  try:
    folder = pinned(source, field, config, workdir)
    if not (folder / "config.json").exists() and not is_adapter(folder):
      raise FolderError(f"{folder} holds no config.json; give the folder of a Hugging Face model")
    mesh = mesh or mesh_of(config)
    model = load_pretrained(folder, mesh=mesh, **model_kwargs(config, mesh), **kwargs)
    return with_tokenizer(folder), model
  except TextError:
    raise
  except (ValueError, OSError, SafetensorError) as error:
    raise FolderError(f"config.{field} is {source}: {error}") from error


def label_of(source: str, field: str, config) -> str | None:
  """config.reward.label for the run's own reward model, None for any other."""
  own = field == "reward.path" and source == (config.reward.path or config.policy.path)
  return config.reward.label if own else None


def label_names(folder: pathlib.Path, count: int) -> list[str]:
  """The names of a classifier's outputs in config.json, or else their numbers."""
  names = read_object(model_folder(folder) / "config.json").get("id2label")
  names = names if isinstance(names, dict) else {}
  return [str(names.get(str(i), i)) for i in range(count)]


def one_label(
  score: Score, folder: pathlib.Path, wanted: str | None, source: str, field: str
) -> Score:
  """The score head of the label `wanted`, or of a weighted sum of several labels; "" or None: of
  the only label.

  Args:
    wanted: config.reward.label; None if it does not apply to this model.
    source: the value of the config's `field`, which named the folder.
  """
  count = score.kernel.shape[1]
  if not wanted and count == 1:
    return score
  labels = label_names(folder, count)
  if not wanted:
    several = f"config.{field} is {source}: it gives {count} labels; a reward is one number"
    if wanted is None:
      raise FolderError(f"{several}; give a reward model with one label")
    raise FolderError(
      f"{several}: set config.reward.label to one of {', '.join(labels)}, or to a weighted sum such "
      f"as {labels[0]}:0.5,{labels[1]}:0.5"
    )
  numbers = {str(i): i for i in range(len(labels))} | {name: i for i, name in enumerate(labels)}
  weights = np.zeros(len(labels))
  for part in map(str.strip, wanted.split(",")):
    name, _, weight = (part, "", "1") if part in numbers else part.rpartition(":")
    try:
      weights[numbers[name.strip()]] += float(weight)
    except (ValueError, KeyError):
      raise FolderError(
        f"config.reward.label is {wanted!r}: {part!r} is not a label of {source}; give some of "
        f"{', '.join(labels)}, with or without a weight such as {labels[0]}:0.5"
      ) from None
  if not np.isfinite(weights).all() or not weights.any():
    raise FolderError(f"config.reward.label is {wanted!r}: give finite weights, not all of them 0")
  wide = jnp.promote_types(score.kernel.dtype, jnp.float32)

  def summed(x):
    return (x.astype(wide) * jnp.asarray(weights, wide)).sum(-1, keepdims=True)

  return Score(summed(score.kernel), None if score.bias is None else summed(score.bias))


def with_tokenizer(folder: pathlib.Path) -> pathlib.Path:
  """The folder, or the base of a PEFT folder that has no tokenizer."""
  return folder if list(folder.glob("tokenizer*")) else model_folder(folder)


def _tokenizer(folder: pathlib.Path, arch: ArchConfig, config, chat: Chat) -> Tokenizer:
  base = model_folder(folder)
  if (file := folder / "tokenizer_config.json").exists():
    read_object(file)  # a repeated key is refused; transformers would take the last value
  return load_tokenizer(folder, arch.vocab_size, config.data.date, arch.max_positions, chat, base)


def reward_start(reward: RewardModel, mesh):
  """The state {"backbone", "phi"} from which task=reward starts; a new score head is zero."""
  phi = reward.phi
  if phi is None:
    phi = nnx.state(
      nnx.Linear(
        reward.arch.embedding_size, 1, kernel_init=nnx.initializers.zeros, rngs=nnx.Rngs(0)
      )
    )
    phi = hosts.put(jax.device_get(phi), sharding.shardings(phi, mesh))
  state = {"backbone": reward.state, "phi": phi}
  return jax.device_put(state, sharding.shardings(state, mesh))


def phi_state(score: Score) -> nnx.State:
  """A classifier's score head as the state of phi: at least float32, with a bias (zero if there was
  none).
  """
  wide = jnp.promote_types(score.kernel.dtype, jnp.float32)
  kernel = score.kernel.astype(wide)
  bias = jnp.zeros(kernel.shape[1], wide) if score.bias is None else score.bias.astype(wide)
  phi = nnx.eval_shape(lambda: nnx.Linear(*kernel.shape, rngs=nnx.Rngs(0), param_dtype=wide))
  nnx.update(phi, {"kernel": kernel, "bias": bias})
  return nnx.state(phi)


def phi_score(phi: nnx.State, rte: jax.Array) -> jax.Array:
  """r = phi(H_last), at least float32.   [B, Dr] -> [B]."""
  scores = jnp.matmul(rte, phi["kernel"][...], precision="highest")  # see ops.all_bits
  return (scores + phi["bias"][...])[:, 0]


def score_of(phi: nnx.State, *, bias: bool) -> Score:
  """phi as a classifier's score head. Without `bias` the bias is omitted (transformers' classifiers
  have none).
  """
  return Score(phi["kernel"][...], phi["bias"][...] if bias else None)


def read_object(file: pathlib.Path) -> dict[str, Any]:
  """The object in a JSON file of a folder."""
  try:
    return read_json(file)
  except PretrainedError as error:
    raise FolderError(error) from None


# ---- the R2M head ----


def abstract_head(config: HeadConfig, param_dtype=jnp.float32) -> RewardHead:
  return nnx.eval_shape(
    lambda: RewardHead(
      config.policy_hidden_size,
      config.reward_hidden_size,
      config.attention_dim,
      config.num_heads,
      rngs=nnx.Rngs(0),
      param_dtype=param_dtype,
    )
  )


def load_head(folder: pathlib.Path) -> tuple[HeadConfig, nnx.State] | None:
  """The R2M head in a folder; None if there is none."""
  if not (folder / HEAD_CONFIG).exists():
    if (folder / HEAD_WEIGHTS).exists():
      raise FolderError(f"{folder} holds {HEAD_WEIGHTS} without {HEAD_CONFIG}; copy it again")
    return None
  fields = read_object(folder / HEAD_CONFIG)
  known = {field.name: field.type for field in dataclasses.fields(HeadConfig)}

  def number(name):
    return isinstance(fields.get(name), int | known[name]) and not isinstance(fields[name], bool)

  sizes = ("policy_hidden_size", "reward_hidden_size", "attention_dim", "num_heads")
  good = (
    fields.get("format") == HEAD_FORMAT and all(map(number, known)) and 0 <= fields["omega"] <= 1
  )
  if (
    not good
    or not all(0 < fields[name] <= 2**31 for name in sizes)
    or fields["attention_dim"] % fields["num_heads"]
  ):
    wanted = f"format {HEAD_FORMAT} with {', '.join(sorted(known))}"
    raise FolderError(
      f"{folder / HEAD_CONFIG} is not of {wanted}: {str(fields)[:400]}; copy it again"
    )
  config = HeadConfig(**{name: fields[name] for name in known})
  if not (folder / HEAD_WEIGHTS).exists():
    raise FolderError(f"{folder} holds {HEAD_CONFIG} without {HEAD_WEIGHTS}; copy it again")
  try:
    tensors = load_file(folder / HEAD_WEIGHTS)
  except (SafetensorError, OSError, ValueError, TypeError, KeyError) as error:
    raise FolderError(
      f"{folder / HEAD_WEIGHTS} is not a complete safetensors file: {error}; copy it again"
    ) from None
  head = abstract_head(config)

  def read(path, like):
    module, leaf = sharding.path_name(path).split("/")
    name = f"{module}.{'bias' if leaf == 'bias' else 'weight'}"
    x = tensors[name].T if leaf == "kernel" and name in tensors else tensors.get(name)
    if x is None or x.shape != like.shape:
      found = None if x is None else x.shape
      raise FolderError(
        f"{folder / HEAD_WEIGHTS}: {name} (transposed) must be {like.shape}; it is {found}: copy "
        "both files again"
      )
    return jnp.asarray(x, like.dtype)

  return config, jax.tree_util.tree_map_with_path(read, nnx.state(head))


def head_tensors(head: nnx.State) -> dict[str, np.ndarray]:
  """The head's weights by name, linear layers as [out, in], float32. All processes must call it."""
  tensors = {}
  for path, x in jax.tree_util.tree_flatten_with_path(head)[0]:
    module, leaf = sharding.path_name(path).split("/")
    x = np.asarray(hosts.fetch(x), np.float32)
    tensors[f"{module}.{'bias' if leaf == 'bias' else 'weight'}"] = np.ascontiguousarray(
      x.T if leaf == "kernel" else x
    )
  return tensors
