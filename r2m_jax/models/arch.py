"""The architecture of a decoder: one frozen, hashable description, and its translation from and to
Hugging Face's config.json.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from r2m_jax.models import rope
from r2m_jax.models.rope import RopeScaling

SCORE_FIELDS = (
  "score_width",
  "score_activation",
)  # of a two-layer score head; our own
CLASSIFIERS = (
  "ForSequenceClassification",
  "ForRewardModel",
)  # class name endings
SCORE_ACTIVATIONS = ("relu", "silu", "gelu", "tanh")  # between two layers of a score head
MOST_LAYERS = 10_000  # a number far beyond any model means a damaged file


def whole(value) -> int:
  """The value if it is a whole number, otherwise 0."""
  return value if isinstance(value, int) and not isinstance(value, bool) else 0


class LayerKind(NamedTuple):
  """Properties in which layers may differ."""

  slides: bool  # whether it has the sliding window
  unrotated: bool  # whether it has no positions (NoPE)


FOLLOWS_OTHERS: Any = None  # stands for a value that `FOLLOWS` computes


@dataclasses.dataclass(frozen=True)
class ArchConfig:
  """Static shape of a decoder. The defaults describe a small Llama."""

  vocab_size: int = 32000
  hidden_size: int = 512  # D
  num_layers: int = 8  # N
  num_heads: int = 8  # H
  num_kv_heads: int = FOLLOWS_OTHERS  # KV; None: num_heads
  head_dim: int = FOLLOWS_OTHERS  # Dh; None: hidden_size // num_heads
  intermediate_size: int = FOLLOWS_OTHERS  # None: 4 * hidden_size
  family: str = "llama"  # Hugging Face model_type; names and layouts on disk only
  # norms
  norm: str = "rms"  # "rms" | "layer" (with bias)
  norm_eps: float = 1e-6
  norm_offset: float = 0.0  # Gemma stores w and multiplies by 1 + w
  qk_norm: bool = False  # norm each head's query and key before the rotation (Qwen3, Gemma 3)
  qk_norm_joint: bool = False  # qk_norm over all heads together (OLMo 2, 3)
  pre_norms: bool = True  # norm the inputs of attention and MLP; not in OLMo 2 and 3
  # norm again after attention and MLP, before the residual sum (Gemma 2, 3, OLMo 2, 3)
  post_norms: bool = False
  # MLP and linears
  activation: str = "silu"  # "silu" | "gelu" (erf) | "gelu_tanh"
  gated_mlp: bool = True
  qkv_bias: bool = False
  out_bias: bool = False
  mlp_bias: bool = False
  parallel_residual: bool = False  # x + attn(norm(x)) + mlp(norm'(x)) (GPT-NeoX)
  residual_scale: float = 1.0  # multiplies the outputs of attention and MLP (Granite)
  # embeddings and head
  tie_embeddings: bool = False
  lm_head: bool = True  # False: a reward model's backbone, no vocabulary head
  # a reward model's score head of two layers: the width between them; 0: the head has one layer
  score_width: int = 0
  score_activation: str = "relu"  # between the two layers: one of SCORE_ACTIVATIONS
  embed_scale: float = 1.0  # Gemma: sqrt(hidden_size)
  logit_divisor: float = 1.0  # Granite: logits are divided by it
  final_softcap: float | None = None  # c * tanh(logits / c)
  # attention
  query_scale: float = FOLLOWS_OTHERS  # None: head_dim ** -0.5
  attn_softcap: float | None = None
  sliding_window: int | None = None  # a token sees itself and the window - 1 tokens before it
  # 0-based; None: every layer, if sliding_window is set
  sliding_layers: tuple[int, ...] = FOLLOWS_OTHERS
  # rotary positions
  rotary_fraction: float = 1.0  # leading part of head_dim that is rotated (GPT-NeoX: 0.25)
  rope_theta: float = 10000.0
  rope_scaling: RopeScaling | None = None
  # Gemma 3, OLMo 3: sliding layers' own theta, without rope_scaling
  rope_local_theta: float | None = None
  unrotated_layers: tuple[int, ...] = ()  # 0-based; their queries and keys have no positions
  max_positions: int = 2048  # tokens for which the model was trained; longer rows get a warning

  def __post_init__(self):
    if whole(self.num_layers) > MOST_LAYERS:
      raise ValueError(f"ArchConfig.num_layers={self.num_layers!r}: give {MOST_LAYERS} at most")
    for field, follow in FOLLOWS.items():
      if getattr(self, field) is None:
        object.__setattr__(self, field, follow(self))
    for field in ("sliding_layers", "unrotated_layers"):
      object.__setattr__(self, field, tuple(getattr(self, field)))
    self._validate()
    if not self.sliding_layers:
      object.__setattr__(self, "sliding_window", None)

  def _need(self, ok, field, fix):
    if not ok:
      raise ValueError(f"ArchConfig.{field}={getattr(self, field)!r}: {fix}")

  def _validate(self):
    need = self._need
    for field in (
      "vocab_size",
      "hidden_size",
      "num_layers",
      "num_heads",
      "num_kv_heads",
      "head_dim",
      "intermediate_size",
      "max_positions",
    ):
      need(0 < whole(getattr(self, field)) <= 2**31, field, "give a positive integer")
    need(
      self.num_heads % self.num_kv_heads == 0,
      "num_kv_heads",
      f"must divide num_heads={self.num_heads}",
    )
    need(self.norm in ("rms", "layer"), "norm", "use 'rms' or 'layer'")
    need(self.norm_eps > 0, "norm_eps", "must be positive, for example 1e-6")
    need(
      self.activation in ("silu", "gelu", "gelu_tanh"),
      "activation",
      "use 'silu', 'gelu' or 'gelu_tanh'",
    )
    need(
      not (self.parallel_residual and self.post_norms),
      "post_norms",
      "set False, or parallel_residual=False",
    )
    need(
      not self.parallel_residual or (self.pre_norms and self.residual_scale == 1.0),
      "parallel_residual",
      "set False, or pre_norms=True and residual_scale=1.0",
    )
    width = self.score_width
    need(
      whole(width) >= 0 and whole(width) == width, "score_width", "give a width; 0 for one layer"
    )
    need(
      self.score_activation in SCORE_ACTIVATIONS,
      "score_activation",
      f"use one of {', '.join(SCORE_ACTIVATIONS)}",
    )
    need(self.qk_norm or not self.qk_norm_joint, "qk_norm_joint", "also set qk_norm=True")
    for field in ("logit_divisor", "residual_scale", "embed_scale"):
      need(getattr(self, field) > 0, field, "must be positive; 1.0 changes nothing")
    for field in ("final_softcap", "attn_softcap", "sliding_window", "rope_local_theta"):
      need(
        getattr(self, field) is None or getattr(self, field) > 0,
        field,
        "give a positive number, or None for off",
      )
    self._validate_positions()

  def _validate_positions(self):
    need = self._need
    need(self.rope_theta > 0, "rope_theta", "must be positive, for example 10000.0")
    need(0 < self.rotary_fraction <= 1, "rotary_fraction", "give a fraction of head_dim in (0, 1]")
    need(
      self.rotary_dim % 2 == 0 and self.rotary_dim > 0,
      "rotary_fraction" if self.rotary_fraction < 1 else "head_dim",
      f"rotates int(head_dim * rotary_fraction) = {self.rotary_dim} numbers, which must be even "
      "and positive",
    )
    for field in ("sliding_layers", "unrotated_layers"):
      need(
        all(0 <= i < self.num_layers for i in getattr(self, field)),
        field,
        f"list 0-based layers below num_layers={self.num_layers}",
      )
    factors = len(self.rope_scaling.short_factors) if self.rope_scaling else 0
    need(
      factors in (0, self.rotary_dim // 2),
      "rope_scaling",
      f"give {self.rotary_dim // 2} short factors, one for each rotated pair",
    )
    need(
      not self.sliding_layers or self.sliding_window is not None,
      "sliding_layers",
      "also set sliding_window, or leave it empty",
    )

  @property
  def rotary_dim(self) -> int:
    """The number of leading elements of each head that are rotated."""
    return int(self.head_dim * self.rotary_fraction)

  @property
  def kind_of_layers(self) -> tuple[LayerKind, ...]:
    """The kind of each layer."""
    sliding, unrotated = set(self.sliding_layers), set(self.unrotated_layers)
    return tuple(LayerKind(i in sliding, i in unrotated) for i in range(self.num_layers))

  @property
  def kinds(self) -> list[LayerKind]:
    """The kinds of layer that occur, sorted."""
    return sorted(set(self.kind_of_layers))

  @property
  def embedding_size(self) -> int:
    """Dr, the width of the input of a score head's last layer."""
    return self.score_width or self.hidden_size

  @property
  def untied_head(self) -> bool:
    """Whether the model has a separate `lm_head`."""
    return self.lm_head and not self.tie_embeddings

  def replace(self, **changes) -> "ArchConfig":
    """A changed copy. Fields that have the value derived from other fields (head_dim, query_scale,
    ...) are derived again.
    """
    again = {
      field: None for field, follow in FOLLOWS.items() if getattr(self, field) == follow(self)
    }
    return dataclasses.replace(self, **{**again, **changes})

  @classmethod
  def from_hf(cls, config: Mapping[str, Any]) -> "ArchConfig":
    """The architecture that a config.json describes, in the spelling of transformers 4 or 5.

    If a folder has more than a language model, such as `gemma3`, the result describes the language
    model. `lm_head` is False if `architectures` names a sequence classifier. Raises ValueError for
    a model_type, a field or a rope type that is not supported.
    """
    config = text_config(config)
    family = family_of(config.get("model_type"))
    given, config = config, {**family.defaults, **config}
    fields = {**FIELDS, **family.fields}
    if missing := [fields[field] for field in FIELDS if fields[field] not in config]:
      raise ValueError(
        f"config.json of model_type {config['model_type']!r} lacks {missing}; add what the model "
        "has"
      )
    if config.get("quantization_config"):
      raise ValueError(
        "quantization_config in config.json: quantised weights are not supported; give them in full"
      )
    if config.get("use_bidirectional_attention"):
      raise ValueError(
        "use_bidirectional_attention=true in config.json is not supported: decoders here are causal; "
        "give another model"
      )
    whole = config["hidden_size"] // max(config["num_attention_heads"], 1)
    if "head_dim" not in family.fields.values() and config.get("head_dim") not in (None, whole):
      raise ValueError(
        f"head_dim = {config['head_dim']} in config.json is not hidden_size / num_attention_heads ="
        f" {whole}, and model_type {config['model_type']!r} has no head size of its own; take it out"
      )
    activation = config[family.activation]
    if activation not in ACTIVATIONS:
      raise ValueError(
        f"{family.activation}={activation!r} in config.json is not one of {sorted(ACTIVATIONS)}; "
        "give a model that has one of these"
      )
    return cls(
      family=config["model_type"],
      activation=ACTIVATIONS[activation],
      lm_head=not any(name.endswith(CLASSIFIERS) for name in config.get("architectures") or ()),
      **{field: config[field] for field in SCORE_FIELDS if {field, "score_width"} <= config.keys()},
      **{field: config[key] for field, key in fields.items()},
      **family.fixed,
      **rope.read(config, given, family.defaults, family.nested_rope),
      **family.derived(config),
      **_read_sliding(config, family),
    )

  def _class_of(self, family: "Family") -> str:
    """The class in config.json. No class of transformers has a score head of two layers; its
    sequence classifiers would initialise a new layer.
    """
    if self.lm_head:
      return family.causal
    return (
      f"{family.causal.split('For')[0]}ForRewardModel" if self.score_width else family.classifier
    )

  def to_hf(self) -> dict[str, Any]:
    """The config.json of this architecture, in both spellings. Raises an error if its family cannot
    express it.
    """
    family = family_of(self.family)
    config = {
      "model_type": self.family,
      "architectures": [self._class_of(family)],
      family.activation: {ours: theirs for theirs, ours in ACTIVATIONS.items()}[self.activation],
      **{key: getattr(self, field) for field, key in {**FIELDS, **family.fields}.items()},
      **rope.write(self, family.defaults, family.nested_rope),
      **_write_sliding(self, family),
      **family.restored(self),
      **{field: getattr(self, field) for field in SCORE_FIELDS if self.score_width},
    }
    back = dataclasses.asdict(ArchConfig.from_hf(config))
    if lost := [
      f"{k}={v!r} (reads {back[k]!r})" for k, v in dataclasses.asdict(self).items() if back[k] != v
    ]:
      raise ValueError(
        f"Hugging Face's {self.family!r} cannot express {', '.join(lost)}; set ArchConfig.family"
      )
    return config


# Fields that may be None, and the values that they then have.
FOLLOWS = {
  "num_kv_heads": lambda arch: arch.num_heads,
  "head_dim": lambda arch: arch.hidden_size // max(arch.num_heads, 1),
  "intermediate_size": lambda arch: 4 * arch.hidden_size,
  "query_scale": lambda arch: arch.head_dim**-0.5,
  "sliding_layers": lambda arch: (
    () if arch.sliding_window is None else tuple(range(arch.num_layers))
  ),
}

# Hugging Face's name for an activation -> ours; the last of several is the one written.
ACTIVATIONS = {
  "silu": "silu",
  "gelu": "gelu",
  "gelu_new": "gelu_tanh",
  "gelu_pytorch_tanh": "gelu_tanh",
}

# ArchConfig field -> config.json field, for every family.
FIELDS = {
  "vocab_size": "vocab_size",
  "hidden_size": "hidden_size",
  "num_layers": "num_hidden_layers",
  "num_heads": "num_attention_heads",
  "intermediate_size": "intermediate_size",
  "max_positions": "max_position_embeddings",
  "tie_embeddings": "tie_word_embeddings",
}
GROUPED = {
  "num_kv_heads": "num_key_value_heads",
  "head_dim": "head_dim",
  "norm_eps": "rms_norm_eps",
}
SOFTCAPS = {"attn_softcap": "attn_logit_softcapping", "final_softcap": "final_logit_softcapping"}
BIASES = {"qkv_bias": "attention_bias", "out_bias": "attention_bias"}


@dataclasses.dataclass(frozen=True)
class Family:
  """One Hugging Face model_type."""

  causal: str  # class with a language-model head
  classifier: str  # class with a score head
  fields: Mapping[str, str]  # ArchConfig field -> config.json field, beyond FIELDS
  defaults: Mapping[str, Any]  # config.json fields that a file may omit
  fixed: Mapping[str, Any] = dataclasses.field(
    default_factory=dict
  )  # ArchConfig fields, the same in every member
  derived: Callable[[dict], dict] = lambda config: {}  # config.json -> further ArchConfig fields
  # ArchConfig -> further fields of config.json: the inverse of `derived`
  restored: Callable[[ArchConfig], dict] = lambda arch: {}
  slides: Callable[[dict, int], bool] | None = (
    None  # whether a layer slides, if layer_types is missing
  )
  activation: str = "hidden_act"
  nested_rope: bool = False  # whether sliding layers have a separate rotation


def text_config(config: Mapping[str, Any]) -> Mapping[str, Any]:
  """config.json, or its language-model part if the folder has more than a language model."""
  if config.get("model_type") not in TOWERS:
    return config
  outer = ("architectures", "quantization_config", "tie_word_embeddings")
  own = {key: config[key] for key in outer if key in config}
  return {**TOWERS[config["model_type"]], **(config.get("text_config") or {}), **own}


def family_of(model_type: str | None) -> Family:
  """The table entry, or a ValueError that lists them."""
  if model_type not in FAMILIES:
    raise ValueError(
      f"model_type {model_type!r} in config.json is not supported; supported are "
      f"{sorted({*FAMILIES, *TOWERS})}: give a model of one of these"
    )
  return FAMILIES[model_type]


def _gemma(config: dict) -> dict:
  return {
    "embed_scale": config["hidden_size"] ** 0.5,
    "query_scale": config["query_pre_attn_scalar"] ** -0.5,
  }


def _gemma_restored(arch: ArchConfig) -> dict:
  return {"query_pre_attn_scalar": round(arch.query_scale**-2)}


def _smollm3(config: dict) -> dict:
  layers = range(config["num_hidden_layers"])
  return {"unrotated_layers": [i for i in layers if not _smollm3_rotates(config, i)]}


def _smollm3_rotates(config: dict, layer: int) -> bool:
  if config["no_rope_layers"] is not None:
    return bool(config["no_rope_layers"][layer])
  return (layer + 1) % config["no_rope_layer_interval"] != 0


def _smollm3_restored(arch: ArchConfig) -> dict:
  return {"no_rope_layers": [int(not kind.unrotated) for kind in arch.kind_of_layers]}


def _ministral3(config: dict) -> dict:
  if not config.get("rope_parameters") and not config["rope_scaling"]:
    raise ValueError(
      "config.json of model_type 'ministral3' lacks rope_parameters; add what the model has"
    )
  return {}


def _granite_hybrid(config: dict) -> dict:
  kinds = config["layer_types"] or ["mamba"]
  if config["num_local_experts"] or not {*kinds} <= {"attention", "full_attention"}:
    raise ValueError(
      f"config.json has num_local_experts = {config['num_local_experts']} and layers of kind "
      f"{sorted(set(kinds))}: of model_type 'granitemoehybrid' only dense models are supported, "
      "with 0 experts and attention in all layers; give one of these"
    )
  rotated = config["position_embedding_type"] == "rope"
  return {"unrotated_layers": [] if rotated else range(config["num_hidden_layers"])}


def _granite_hybrid_restored(arch: ArchConfig) -> dict:
  return {
    "layer_types": ["attention"] * arch.num_layers,
    "intermediate_size": arch.intermediate_size,  # of the experts, which do not exist
    "num_local_experts": 0,
    "num_experts_per_tok": 0,
    "position_embedding_type": None if arch.unrotated_layers else "rope",
    "mamba_n_heads": 1,  # used by no layer; transformers checks that it divides the width
  }


_ROPE = {"rope_theta": 10000.0, "rope_scaling": None}
_LLAMA = _ROPE | {
  "num_key_value_heads": None,
  "head_dim": None,
  "rms_norm_eps": 1e-6,
  "tie_word_embeddings": False,
  "max_position_embeddings": 2048,
  "hidden_act": "silu",
}
_MISTRAL = _LLAMA | {
  "num_key_value_heads": 8,
  "sliding_window": 4096,
  "max_position_embeddings": 131072,
}
_QWEN = _LLAMA | {
  "num_key_value_heads": 32,
  "max_position_embeddings": 32768,
  "use_sliding_window": False,
  "sliding_window": 4096,
  "max_window_layers": 28,
  "layer_types": None,
}
_GEMMA = _LLAMA | {
  "num_key_value_heads": 4,
  "head_dim": 256,
  "tie_word_embeddings": True,
  "attention_bias": False,
  "max_position_embeddings": 8192,
  "hidden_activation": "gelu_pytorch_tanh",
  "sliding_window": 4096,
  "query_pre_attn_scalar": 256,
  "layer_types": None,
}
_OLMO = _LLAMA | {"rms_norm_eps": 1e-5, "attention_bias": False}
_OLMO_FIXED = {"pre_norms": False, "post_norms": True, "qk_norm": True, "qk_norm_joint": True}
_GRANITE = _LLAMA | {
  "attention_bias": False,
  "mlp_bias": False,
  "embedding_multiplier": 1.0,
  "residual_multiplier": 1.0,
  "attention_multiplier": 1.0,
  "logits_scaling": 1.0,
}
_MULTIPLIERS = {
  "embed_scale": "embedding_multiplier",
  "residual_scale": "residual_multiplier",
  "query_scale": "attention_multiplier",
  "logit_divisor": "logits_scaling",
}
_GEMMA_FIXED = {"norm_offset": 1.0, "post_norms": True}

FAMILIES = {
  "llama": Family(
    "LlamaForCausalLM",
    "LlamaForSequenceClassification",
    fields=GROUPED | BIASES | {"mlp_bias": "mlp_bias"},
    defaults=_LLAMA | {"attention_bias": False, "mlp_bias": False},
  ),
  "mistral": Family(
    "MistralForCausalLM",
    "MistralForSequenceClassification",
    fields=GROUPED,
    defaults=_MISTRAL,
    slides=lambda config, layer: True,
  ),
  "qwen2": Family(
    "Qwen2ForCausalLM",
    "Qwen2ForSequenceClassification",
    fields=GROUPED,
    defaults=_QWEN,
    fixed={"qkv_bias": True},
    slides=lambda config, layer: layer >= config["max_window_layers"],
  ),
  "qwen3": Family(
    "Qwen3ForCausalLM",
    "Qwen3ForSequenceClassification",
    fields=GROUPED | BIASES,
    defaults=_QWEN | {"head_dim": 128, "attention_bias": False},
    fixed={"qk_norm": True},
    slides=lambda config, layer: layer >= config["max_window_layers"],
  ),
  "gemma2": Family(
    "Gemma2ForCausalLM",
    "Gemma2ForSequenceClassification",
    fields=GROUPED | BIASES | SOFTCAPS,
    defaults=_GEMMA | {"attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0},
    fixed=_GEMMA_FIXED,
    derived=_gemma,
    restored=_gemma_restored,
    slides=lambda config, layer: layer % 2 == 0,
    activation="hidden_activation",
  ),
  "gemma3_text": Family(
    "Gemma3ForCausalLM",
    "Gemma3TextForSequenceClassification",
    fields=GROUPED | BIASES | SOFTCAPS,
    defaults=_GEMMA
    | {
      "attn_logit_softcapping": None,
      "final_logit_softcapping": None,
      "max_position_embeddings": 131072,
    }
    | {"rope_theta": 1e6, "rope_local_base_freq": 10000.0, "sliding_window_pattern": 6},
    fixed=_GEMMA_FIXED | {"qk_norm": True},
    derived=_gemma,
    restored=_gemma_restored,
    slides=lambda config, layer: (layer + 1) % config["sliding_window_pattern"] != 0,
    activation="hidden_activation",
    nested_rope=True,
  ),
  "ministral": Family(
    "MinistralForCausalLM",
    "MinistralForSequenceClassification",
    fields=GROUPED,
    defaults=_MISTRAL | {"layer_types": None},
    slides=lambda config, layer: True,
  ),
  "ministral3": Family(
    "Ministral3ForCausalLM",
    "Ministral3ForSequenceClassification",
    fields=GROUPED,
    defaults=_MISTRAL | {"rms_norm_eps": 1e-5, "head_dim": 128, "sliding_window": None},
    derived=_ministral3,
    slides=lambda config, layer: True,
  ),
  "olmo2": Family(
    "Olmo2ForCausalLM",
    "Olmo2ForSequenceClassification",
    fields=GROUPED | BIASES,
    defaults=_OLMO,
    fixed=_OLMO_FIXED,
  ),
  "olmo3": Family(
    "Olmo3ForCausalLM",
    "Olmo3ForSequenceClassification",
    fields=GROUPED | BIASES,
    defaults=_OLMO | {"rope_theta": 5e5, "sliding_window": 4096, "layer_types": None},
    fixed=_OLMO_FIXED,
    slides=lambda config, layer: (layer + 1) % 4 != 0,
    nested_rope=True,
  ),
  "smollm3": Family(
    "SmolLM3ForCausalLM",
    "SmolLM3ForSequenceClassification",
    fields=GROUPED | BIASES | {"mlp_bias": "mlp_bias"},
    defaults=_LLAMA
    | {
      "num_key_value_heads": 4,
      "rope_theta": 2e6,
      "max_position_embeddings": 32768,
      "tie_word_embeddings": True,
      "attention_bias": False,
      "mlp_bias": False,
      "no_rope_layers": None,
      "no_rope_layer_interval": 4,
      "use_sliding_window": False,
      "sliding_window": None,
      "layer_types": None,
      "pad_token_id": 128004,
    },
    derived=_smollm3,
    restored=_smollm3_restored,
    slides=lambda config, layer: not _smollm3_rotates(config, layer),
  ),
  "phi3": Family(
    "Phi3ForCausalLM",
    "Phi3ForSequenceClassification",
    fields={"num_kv_heads": "num_key_value_heads", "norm_eps": "rms_norm_eps"},
    defaults=_LLAMA
    | {
      "rms_norm_eps": 1e-5,
      "max_position_embeddings": 4096,
      "original_max_position_embeddings": 4096,
      "partial_rotary_factor": 1.0,
      "sliding_window": None,
      "pad_token_id": 32000,
    },
    slides=lambda config, layer: True,
  ),
  "granite": Family(
    "GraniteForCausalLM",
    "GraniteForSequenceClassification",
    fields=GROUPED | BIASES | _MULTIPLIERS | {"mlp_bias": "mlp_bias"},
    defaults=_GRANITE,
  ),
  "granitemoehybrid": Family(
    "GraniteMoeHybridForCausalLM",
    "GraniteMoeHybridForSequenceClassification",
    fields=GROUPED | BIASES | _MULTIPLIERS | {"intermediate_size": "shared_intermediate_size"},
    defaults=_GRANITE
    | {"num_local_experts": 8, "layer_types": None, "position_embedding_type": None},
    derived=_granite_hybrid,
    restored=_granite_hybrid_restored,
  ),
  "gpt_neox": Family(
    "GPTNeoXForCausalLM",
    "GPTNeoXForSequenceClassification",
    fields=BIASES | {"norm_eps": "layer_norm_eps", "parallel_residual": "use_parallel_residual"},
    defaults={
      "layer_norm_eps": 1e-5,
      "use_parallel_residual": True,
      "attention_bias": True,
      "hidden_act": "gelu",
      "tie_word_embeddings": False,
      "max_position_embeddings": 2048,
      "rotary_pct": 0.25,
      "rotary_emb_base": 10000.0,
      "rope_scaling": None,
    },
    fixed={"norm": "layer", "gated_mlp": False, "mlp_bias": True},
  ),
}


# model_type of a folder that holds more than a language model -> fields that its text_config may
# omit
TOWERS: dict[str, dict[str, Any]] = {
  "gemma3": {
    "model_type": "gemma3_text",
    "vocab_size": 262208,
    "hidden_size": 2304,
    "intermediate_size": 9216,
    "num_hidden_layers": 26,
    "num_attention_heads": 8,
  },
  "mistral3": {"model_type": "mistral"},
}


def _read_sliding(config: dict, family: Family) -> dict[str, Any]:
  """ArchConfig's sliding_window and sliding_layers."""
  if (
    family.slides is None
    or config["sliding_window"] is None
    or "use_sliding_window" in family.defaults
    and not config["use_sliding_window"]
  ):
    return {}
  kinds = config["layer_types"] if "layer_types" in family.defaults else None
  layers = range(config["num_hidden_layers"])
  if kinds is None:
    slides = [family.slides(config, layer) for layer in layers]
  elif len(kinds) == len(layers) and set(kinds) <= {"sliding_attention", "full_attention"}:
    slides = [kind == "sliding_attention" for kind in kinds]
  else:
    raise ValueError(
      "layer_types in config.json must list 'sliding_attention' or 'full_attention' for each of "
      f"{len(layers)} layers; it is {kinds}: correct it"
    )
  return {
    "sliding_window": config["sliding_window"],
    "sliding_layers": [i for i in layers if slides[i]],
  }


def _write_sliding(arch: ArchConfig, family: Family) -> dict[str, Any]:
  """sliding_window, and layer_types if the family has them."""
  if family.slides is None:
    return {}
  config: dict[str, Any] = {"sliding_window": arch.sliding_window}
  if "use_sliding_window" in family.defaults:
    config["use_sliding_window"] = arch.sliding_window is not None
  if "max_window_layers" in family.defaults:
    config["max_window_layers"] = min(arch.sliding_layers, default=arch.num_layers)
  if "layer_types" in family.defaults:
    slides = [i in arch.sliding_layers for i in range(arch.num_layers)]
    config["layer_types"] = ["sliding_attention" if s else "full_attention" for s in slides]
    config["sliding_window"] = arch.sliding_window or family.defaults["sliding_window"]
  return config
