"""Tiny random Hugging Face checkpoints of every supported family, for tests to read."""

import json

import pytest
import torch
import transformers
from transformers.modeling_layers import GenericForSequenceClassification
from transformers.models.granite.modeling_granite import GranitePreTrainedModel
from transformers.models.granitemoehybrid.modeling_granitemoehybrid import (
  GraniteMoeHybridPreTrainedModel,
)

from r2m_jax.models.arch import FAMILIES, TOWERS

torch.set_num_threads(1)

SMALL = dict(
  vocab_size=61,
  hidden_size=32,
  num_hidden_layers=3,
  num_attention_heads=4,
  intermediate_size=48,
  max_position_embeddings=64,
  pad_token_id=None,
  bos_token_id=1,
  eos_token_id=2,
)
_GROUPED = dict(num_key_value_heads=2, head_dim=12)
_CAPPED = dict(attn_logit_softcapping=1.5, final_logit_softcapping=2.0)  # they take effect
_LINEAR = {"rope_type": "linear", "factor": 4.0, "rope_theta": 500.0}
_LLAMA3 = {
  "rope_type": "llama3",
  "factor": 8.0,
  "low_freq_factor": 1.0,
  "high_freq_factor": 4.0,
  "original_max_position_embeddings": 32,
  "rope_theta": 100.0,
}

_YARN = {
  "rope_type": "yarn",
  "factor": 4.0,
  "attention_factor": 1.1386,
  "beta_fast": 4.0,
  "beta_slow": 0.5,
  "original_max_position_embeddings": 48,
  "rope_theta": 100.0,
}
_ONE_KEY = dict(num_key_value_heads=1, head_dim=6)
_TWO_ROPES = {
  "full_attention": _LINEAR,
  "sliding_attention": {"rope_type": "default", "rope_theta": 50.0},
}
_MULTIPLIERS = dict(
  embedding_multiplier=3.0, logits_scaling=1.7, residual_multiplier=0.7, attention_multiplier=0.4
)

# case -> (model_type, config). Windows are shorter than the sequences of the tests; both kinds of
# layer occur.
CASES = {
  "llama2": ("llama", dict(num_key_value_heads=4)),
  "llama3.1": ("llama", _GROUPED | dict(rope_parameters=_LLAMA3)),
  "llama_biased_tied": (
    "llama",
    _GROUPED
    | dict(attention_bias=True, mlp_bias=True, tie_word_embeddings=True, rope_parameters=_LINEAR),
  ),
  "mistral": ("mistral", _GROUPED | dict(sliding_window=5)),
  "qwen2": (
    "qwen2",
    dict(num_key_value_heads=1, use_sliding_window=True, sliding_window=4, max_window_layers=1),
  ),
  "qwen3": ("qwen3", _GROUPED | dict(tie_word_embeddings=True)),
  "gemma2": ("gemma2", _GROUPED | _CAPPED | dict(sliding_window=4, query_pre_attn_scalar=20)),
  "gemma3": (
    "gemma3_text",
    _GROUPED
    | dict(
      sliding_window=4,
      query_pre_attn_scalar=20,
      layer_types=["sliding_attention", "full_attention", "sliding_attention"],
      rope_parameters={
        "full_attention": _LINEAR,
        "sliding_attention": {"rope_type": "default", "rope_theta": 50.0},
      },
    ),
  ),
  "gemma3_folder": (
    "gemma3",
    dict(
      text_config=SMALL
      | _ONE_KEY
      | dict(vocab_size=71, sliding_window=4, query_pre_attn_scalar=20, rope_parameters=_TWO_ROPES),
      vision_config=dict(
        hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1
      )
      | dict(image_size=8, patch_size=4),
      mm_tokens_per_image=1,
    ),
  ),
  "mistral_yarn": ("mistral", _GROUPED | dict(sliding_window=None, rope_parameters=_YARN)),
  "ministral": (
    "ministral",
    _ONE_KEY
    | dict(
      vocab_size=73,
      sliding_window=5,
      layer_types=["sliding_attention", "full_attention", "sliding_attention"],
    ),
  ),
  "ministral3": (
    "ministral3",
    _GROUPED
    | dict(
      rope_parameters=_YARN | {"llama_4_scaling_beta": 0.1, "original_max_position_embeddings": 256}
    ),
  ),
  "qwen3_yarn": ("qwen3", _ONE_KEY | dict(rope_parameters=_YARN, attention_bias=True)),
  "llama3.2": (
    "llama",
    _GROUPED | dict(tie_word_embeddings=True, rope_parameters=_LLAMA3 | {"factor": 32.0}),
  ),
  "olmo2": ("olmo2", dict(vocab_size=67, num_key_value_heads=1, attention_bias=True)),
  "olmo3": (
    "olmo3",
    dict(
      vocab_size=67,
      num_key_value_heads=2,
      sliding_window=4,
      layer_types=["sliding_attention", "sliding_attention", "full_attention"],
      rope_parameters={
        "full_attention": _YARN,
        "sliding_attention": {"rope_type": "default", "rope_theta": 300.0},
      },
    ),
  ),
  "smollm3": (
    "smollm3",
    dict(num_key_value_heads=2, no_rope_layers=[1, 0, 1], attention_bias=True, mlp_bias=True),
  ),
  "smollm3_windows": (
    "smollm3",
    dict(
      num_key_value_heads=1, no_rope_layer_interval=2, use_sliding_window=True, sliding_window=4
    ),
  ),
  "phi3": ("phi3", dict(num_key_value_heads=4, sliding_window=5)),
  "phi4_mini": (
    "phi3",
    dict(
      num_key_value_heads=2,
      tie_word_embeddings=True,
      original_max_position_embeddings=256,
      rope_parameters={
        "rope_type": "longrope",
        "rope_theta": 100.0,
        "partial_rotary_factor": 0.75,
        "factor": 2.0,
        "attention_factor": 1.0857,
        "short_factor": [1.0, 1.2, 1.5],
        "long_factor": [1.0, 3.0, 9.0],
        "original_max_position_embeddings": 256,
      },
    ),
  ),
  "granite": (
    "granite",
    dict(num_key_value_heads=1, attention_bias=True, mlp_bias=True, **_MULTIPLIERS),
  ),
  "granite4": (
    "granitemoehybrid",
    dict(
      num_key_value_heads=2,
      tie_word_embeddings=True,
      intermediate_size=40,
      shared_intermediate_size=40,
      num_local_experts=0,
      num_experts_per_tok=0,
      layer_types=["full_attention"] * 3,
      position_embedding_type="rope",
      mamba_n_heads=1,
      **_MULTIPLIERS,
    ),
  ),
  "granite4_unrotated": (
    "granitemoehybrid",
    dict(
      num_key_value_heads=1,
      shared_intermediate_size=48,
      num_local_experts=0,
      num_experts_per_tok=0,
      layer_types=["full_attention"] * 3,
      mamba_n_heads=1,
      **_MULTIPLIERS,
    ),
  ),
  "pythia": ("gpt_neox", {}),
  "neox_sequential": ("gpt_neox", dict(use_parallel_residual=False, attention_bias=False)),
}


# Cases whose features also occur in other cases; their tests are marked `long`.
LONG = {
  "mistral_yarn",
  "ministral",
  "ministral3",
  "qwen3_yarn",
  "llama3.2",
  "olmo2",
  "smollm3_windows",
  "phi3",
  "granite",
  "granite4_unrotated",
}
# Cases that are covered by other tests of bfloat16.
USUAL = set(CASES) - LONG - {"phi4_mini"}


def cases(long=frozenset(LONG)) -> list:
  """All cases as parameters of a test. Those in `long` are marked so."""
  return [pytest.param(case, marks=pytest.mark.long) if case in long else case for case in CASES]


class GraniteForSequenceClassification(GenericForSequenceClassification, GranitePreTrainedModel):
  """A class that transformers has only for other families."""


class GraniteMoeHybridForSequenceClassification(
  GenericForSequenceClassification, GraniteMoeHybridPreTrainedModel
):
  """A class that transformers has only for other families."""


OURS = {
  own.__name__: own
  for own in (GraniteForSequenceClassification, GraniteMoeHybridForSequenceClassification)
}


def class_of(model_type: str, classifier: bool):
  """The class of transformers for a folder of this model_type."""
  if model_type in TOWERS:
    return (
      transformers.Gemma3ForSequenceClassification
      if classifier
      else transformers.Gemma3ForConditionalGeneration
    )
  family = FAMILIES[model_type]
  name = family.classifier if classifier else family.causal
  return OURS.get(name) or getattr(transformers, name)


def opener_of(model_type: str, classifier: bool):
  """The class that opens a folder of this model_type: the Auto class, or ours if the Auto class
  does not know it.
  """
  own = class_of(model_type, classifier)
  if own in OURS.values():
    return own
  return (
    transformers.AutoModelForSequenceClassification
    if classifier
    else transformers.AutoModelForCausalLM
  )


def make(
  case: str,
  folder,
  *,
  classifier: bool = False,
  labels: int = 1,
  seed: int = 0,
  shard="5GB",
  **changes,
):
  """Saves a random float32 model of `case` to `folder` and returns it. No parameter, norm or bias
  is at its default.

  `shard` is the size of a file; `changes` are fields of its config.
  """
  model_type, fields = CASES[case]
  config_class = transformers.AutoConfig.for_model(model_type).__class__
  if model_type in TOWERS:
    fields = fields | {"text_config": fields["text_config"] | changes}
  else:
    fields = SMALL | fields | changes
  fields = fields | (dict(num_labels=labels) if classifier else {})
  model_class = class_of(model_type, classifier)
  torch.manual_seed(seed)
  model = model_class._from_config(
    config_class(**json.loads(json.dumps(fields))), attn_implementation="eager"
  )
  with torch.no_grad():
    for parameter in model.parameters():
      parameter.add_(
        torch.randn_like(parameter) * (0.1 if parameter.ndim == 1 else parameter.shape[-1] ** -0.5)
      )
  model.save_pretrained(folder, max_shard_size=shard)
  return model.float().eval()
