"""What a decoder looks like: one frozen, hashable description, and how Hugging Face's
config.json spells it.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

MOST_LAYERS = 10_000  # a number far beyond any model is a damaged file


def whole(value) -> int:
  """A whole number as it is, anything else as 0."""
  return value if isinstance(value, int) and not isinstance(value, bool) else 0


@dataclasses.dataclass(frozen=True)
class RopeScaling:
  """How rotary frequencies are stretched beyond the pretraining length."""

  # "linear": every frequency / factor; "llama3": long wavelengths / factor, short ones kept, smooth
  # between
  kind: str
  factor: float
  low_freq_factor: float = 1.0  # llama3 only
  high_freq_factor: float = 4.0  # llama3 only
  original_length: int = 8192  # llama3 only: the pretraining length in tokens

  def __post_init__(self):
    if self.kind not in ("linear", "llama3"):
      raise ValueError(f"RopeScaling.kind={self.kind!r} is not supported; use 'linear' or 'llama3'")
    if self.factor <= 0:
      raise ValueError(
        f"RopeScaling.factor={self.factor} must be positive; 1.0 leaves the frequencies alone"
      )
    if self.kind == "llama3" and self.high_freq_factor <= self.low_freq_factor:
      raise ValueError(
        f"RopeScaling.high_freq_factor={self.high_freq_factor} must exceed "
        f"low_freq_factor={self.low_freq_factor};"
        " Llama 3.1 uses 4.0 and 1.0"
      )


FOLLOWS_OTHERS: Any = None  # given for a field, `FOLLOWS` has its value


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
  # norm again after attention and MLP, before the residual sum (Gemma 2, 3)
  post_norms: bool = False
  # MLP and linears
  activation: str = "silu"  # "silu" | "gelu" (erf) | "gelu_tanh"
  gated_mlp: bool = True
  qkv_bias: bool = False
  out_bias: bool = False
  mlp_bias: bool = False
  parallel_residual: bool = False  # x + attn(norm(x)) + mlp(norm'(x)) (GPT-NeoX)
  # embeddings and head
  tie_embeddings: bool = False
  lm_head: bool = True  # False: a reward model's backbone, no vocabulary head
  embed_scale: float = 1.0  # Gemma: sqrt(hidden_size)
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
  rope_local_theta: float | None = None  # Gemma 3: sliding layers' own theta, without rope_scaling
  max_positions: int = 2048  # what the model was trained for, tokens; longer rows get a warning

  def __post_init__(self):
    if whole(self.num_layers) > MOST_LAYERS:
      raise ValueError(f"ArchConfig.num_layers={self.num_layers!r}: give {MOST_LAYERS} at most")
    for field, follow in FOLLOWS.items():
      if getattr(self, field) is None:
        object.__setattr__(self, field, follow(self))
    object.__setattr__(self, "sliding_layers", tuple(self.sliding_layers))
    self._validate()
    if not self.sliding_layers:
      object.__setattr__(self, "sliding_window", None)

  def _validate(self):
    def need(ok, field, fix):
      if not ok:
        raise ValueError(f"ArchConfig.{field}={getattr(self, field)!r}: {fix}")

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
    for field in ("final_softcap", "attn_softcap", "sliding_window", "rope_local_theta"):
      need(
        getattr(self, field) is None or getattr(self, field) > 0,
        field,
        "give a positive number, or None for off",
      )
    need(self.rope_theta > 0, "rope_theta", "must be positive, for example 10000.0")
    need(0 < self.rotary_fraction <= 1, "rotary_fraction", "give a fraction of head_dim in (0, 1]")
    need(
      self.rotary_dim % 2 == 0 and self.rotary_dim > 0,
      "rotary_fraction" if self.rotary_fraction < 1 else "head_dim",
      f"rotates int(head_dim * rotary_fraction) = {self.rotary_dim} numbers, which must be even "
      "and positive",
    )
    need(
      all(0 <= i < self.num_layers for i in self.sliding_layers),
      "sliding_layers",
      f"list 0-based layers below num_layers={self.num_layers}",
    )
    need(
      not self.sliding_layers or self.sliding_window is not None,
      "sliding_layers",
      "also set sliding_window, or leave it empty",
    )

  @property
  def rotary_dim(self) -> int:
    """How many leading numbers of each head are rotated."""
    return int(self.head_dim * self.rotary_fraction)

  @property
  def untied_head(self) -> bool:
    """Whether the model has an `lm_head` of its own."""
    return self.lm_head and not self.tie_embeddings

  def replace(self, **changes) -> "ArchConfig":
    """A changed copy. Fields at the value that follows from others (head_dim, query_scale, ...)
    follow again.
    """
    again = {
      field: None for field, follow in FOLLOWS.items() if getattr(self, field) == follow(self)
    }
    return dataclasses.replace(self, **{**again, **changes})

  @classmethod
  def from_hf(cls, config: Mapping[str, Any]) -> "ArchConfig":
    """The architecture that a config.json describes, in the spelling of transformers 4 or 5.

    `lm_head` is False where `architectures` names a sequence classifier. Raises ValueError for a
    model_type, a field or a rope type that is not supported.
    """
    family = family_of(config.get("model_type"))
    given, config = config, {**family.defaults, **config}
    if missing := [key for key in FIELDS.values() if key not in config]:
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
      lm_head=not any(
        name.endswith("ForSequenceClassification") for name in config.get("architectures") or ()
      ),
      **{field: config[key] for field, key in {**FIELDS, **family.fields}.items()},
      **family.fixed,
      **family.derived(config),
      **_read_rope(config, given, family),
      **_read_sliding(config, family),
    )

  def to_hf(self) -> dict[str, Any]:
    """The config.json of this architecture, in both spellings. Raises where its family cannot
    express it.
    """
    family = family_of(self.family)
    config = {
      "model_type": self.family,
      "architectures": [family.causal if self.lm_head else family.classifier],
      family.activation: {ours: theirs for theirs, ours in ACTIVATIONS.items()}[self.activation],
      **{key: getattr(self, field) for field, key in {**FIELDS, **family.fields}.items()},
      **_write_rope(self, family),
      **_write_sliding(self, family),
    }
    if "query_pre_attn_scalar" in family.defaults:
      config["query_pre_attn_scalar"] = round(self.query_scale**-2)
    back = dataclasses.asdict(ArchConfig.from_hf(config))
    if lost := [
      f"{k}={v!r} (reads {back[k]!r})" for k, v in dataclasses.asdict(self).items() if back[k] != v
    ]:
      raise ValueError(
        f"Hugging Face's {self.family!r} cannot express {', '.join(lost)}; set ArchConfig.family"
      )
    return config


# Fields that may be None, and what they then are.
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
  defaults: Mapping[str, Any]  # config.json fields that a file may leave out
  fixed: Mapping[str, Any] = dataclasses.field(
    default_factory=dict
  )  # ArchConfig fields, the same in every member
  derived: Callable[[dict], dict] = lambda config: {}  # config.json -> further ArchConfig fields
  slides: Callable[[dict, int], bool] | None = (
    None  # whether a layer slides, where layer_types does not say
  )
  activation: str = "hidden_act"


def family_of(model_type: str | None) -> Family:
  """The table entry, or a ValueError that lists them."""
  if model_type not in FAMILIES:
    raise ValueError(
      f"model_type {model_type!r} in config.json is not supported; supported are {sorted(FAMILIES)}: "
      "give a model of one of these"
    )
  return FAMILIES[model_type]


def _gemma(config: dict) -> dict:
  return {
    "embed_scale": config["hidden_size"] ** 0.5,
    "query_scale": config["query_pre_attn_scalar"] ** -0.5,
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
    defaults=_LLAMA
    | {"num_key_value_heads": 8, "sliding_window": 4096, "max_position_embeddings": 131072},
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
    slides=lambda config, layer: (layer + 1) % config["sliding_window_pattern"] != 0,
    activation="hidden_activation",
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


def _agree(given: Mapping[str, Any], new: dict, *, partial: bool) -> None:
  """Raises ValueError if rope_parameters and the older spelling beside it say different things.

  Args:
    given: config.json as it is, without defaults.
    partial: whether the family's rotation may cover a part of a head.
  """
  old = given.get("rope_scaling") or {}

  def kind(rope):
    return rope.get("rope_type", rope.get("type", "default"))

  both = (
    {"factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"}
    & old.keys()
    & new.keys()
  )
  if old and new and (kind(old) != kind(new) or any(old[name] != new[name] for name in both)):
    raise ValueError(
      f"config.json has rope_parameters {new} and rope_scaling {old}, which disagree; keep one of "
      "them"
    )
  pairs = {
    "rope_theta": "rope_theta",
    "rotary_emb_base": "rope_theta",
    "rotary_pct": "partial_rotary_factor",
  }
  for name, other in pairs.items():
    if given.get(name) is not None and other in new and given[name] != new[other]:
      raise ValueError(
        f"config.json has {name} = {given[name]} and rope_parameters with {other} = {new[other]}, "
        "which disagree; keep "
        "one of them"
      )
  own = given.get("partial_rotary_factor")
  if not partial and {"partial_rotary_factor": own, **old, **new}["partial_rotary_factor"] not in (
    None,
    1.0,
  ):
    raise ValueError(
      "config.json has a partial_rotary_factor, which transformers ignores for this model_type; "
      "take it out, or name "
      "the model_type that it belongs to"
    )


def _read_rope(config: dict, given: Mapping[str, Any], family: Family) -> dict[str, Any]:
  """The four rotary fields of ArchConfig from rope_parameters (transformers 5), else from the
  older spelling.
  """
  partial = "rotary_pct" in family.defaults
  rope = {
    "rope_theta": config["rotary_emb_base"] if partial else config.get("rope_theta"),
    "partial_rotary_factor": config["rotary_pct"] if partial else 1.0,
    **(config["rope_scaling"] or {}),
  }
  new, local = config.get("rope_parameters") or {}, config.get("rope_local_base_freq")
  if "full_attention" in new:
    local = new["sliding_attention"]["rope_theta"]
    new = new["full_attention"]
  _agree(given, new, partial=partial)
  rope |= new
  kind = rope.get("rope_type", rope.get("type", "default"))
  if kind == "default":
    scaling = None
  elif kind == "linear":
    scaling = RopeScaling("linear", rope["factor"])
  elif kind == "llama3":
    length = rope.get("original_max_position_embeddings", config["max_position_embeddings"])
    scaling = RopeScaling(
      "llama3", rope["factor"], rope["low_freq_factor"], rope["high_freq_factor"], length
    )
  else:
    raise ValueError(
      f"rope type {kind!r} in config.json is not supported; 'default', 'linear' and 'llama3' "
      "are: give a model that has one of these"
    )
  return {
    "rope_theta": rope["rope_theta"],
    "rotary_fraction": rope["partial_rotary_factor"],
    "rope_scaling": scaling,
    "rope_local_theta": local,
  }


def _write_rope(arch: ArchConfig, family: Family) -> dict[str, Any]:
  """Both spellings of the rotary fields."""
  scaling = arch.rope_scaling
  kind: dict[str, Any] = {"rope_type": "default"}
  if scaling is not None:
    kind = {"rope_type": scaling.kind, "factor": scaling.factor}
    if scaling.kind == "llama3":
      kind |= {
        "low_freq_factor": scaling.low_freq_factor,
        "high_freq_factor": scaling.high_freq_factor,
        "original_max_position_embeddings": scaling.original_length,
      }
  old: dict[str, Any] = {"rope_scaling": scaling and kind}
  new: dict[str, Any] = {**kind, "rope_theta": arch.rope_theta}
  if "rotary_pct" in family.defaults:
    new["partial_rotary_factor"] = arch.rotary_fraction
    return old | {
      "rotary_pct": arch.rotary_fraction,
      "rotary_emb_base": arch.rope_theta,
      "rope_parameters": new,
    }
  if "rope_local_base_freq" in family.defaults:
    old["rope_local_base_freq"] = local = arch.rope_local_theta or arch.rope_theta
    new = {
      "full_attention": new,
      "sliding_attention": {"rope_type": "default", "rope_theta": local},
    }
  return old | {"rope_theta": arch.rope_theta, "rope_parameters": new}


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
  """sliding_window, and layer_types where the family has them."""
  if family.slides is None:
    return {}
  config: dict[str, Any] = {"sliding_window": arch.sliding_window}
  if "use_sliding_window" in family.defaults:
    config["use_sliding_window"] = arch.sliding_window is not None
    config["max_window_layers"] = min(arch.sliding_layers, default=arch.num_layers)
  if "layer_types" in family.defaults:
    slides = [i in arch.sliding_layers for i in range(arch.num_layers)]
    config["layer_types"] = ["sliding_attention" if s else "full_attention" for s in slides]
    config["sliding_window"] = arch.sliding_window or family.defaults["sliding_window"]
  return config
