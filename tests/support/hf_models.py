"""Tiny random Hugging Face checkpoints of every supported family, for tests to read."""

import json

import torch
import transformers

from r2m_jax.models.arch import FAMILIES

torch.set_num_threads(1)

_SMALL = dict(
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
_CAPPED = dict(attn_logit_softcapping=1.5, final_logit_softcapping=2.0)  # low enough to bend
_LINEAR = {"rope_type": "linear", "factor": 4.0, "rope_theta": 500.0}
_LLAMA3 = {
  "rope_type": "llama3",
  "factor": 8.0,
  "low_freq_factor": 1.0,
  "high_freq_factor": 4.0,
  "original_max_position_embeddings": 32,
  "rope_theta": 100.0,
}

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
  "pythia": ("gpt_neox", {}),
  "neox_sequential": ("gpt_neox", dict(use_parallel_residual=False, attention_bias=False)),
}


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
  fields = _SMALL | fields | (dict(num_labels=labels) if classifier else {}) | changes
  family = FAMILIES[model_type]
  model_class = getattr(transformers, family.classifier if classifier else family.causal)
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
