"""Rotary frequencies and their spellings in config.json. Oracle: the functions of transformers."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import transformers
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from r2m_jax.models import rope, transformer
from r2m_jax.models.arch import ArchConfig
from r2m_jax.models.rope import RopeScaling
from r2m_jax.models.transformer import TooLong

YARN = {"rope_type": "yarn", "factor": 8.0, "original_max_position_embeddings": 512}
LONG = {"rope_type": "longrope", "short_factor": [1.0, 1.1, 1.3, 2.0]}
LONG |= {"long_factor": [1.0, 2.0, 5.0, 9.0], "original_max_position_embeddings": 512}
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}


@pytest.mark.parametrize(
  "parameters",
  [
    {"rope_type": "linear", "factor": 4.0},
    LLAMA3 | {"original_max_position_embeddings": 512},
    YARN,
    YARN | {"truncate": False},
    YARN | {"beta_fast": 16.0, "beta_slow": 2.0},
    YARN | {"mscale": 0.7, "mscale_all_dim": 1.2},
    YARN | {"attention_factor": 0.8},
    YARN | {"factor": 1.0},
    YARN | {"original_max_position_embeddings": 8},  # the ramp ends before it begins
    LONG,
    LONG | {"attention_factor": 1.3},
    LONG | {"factor": 1.0},
  ],
  ids=lambda p: "-".join(str(v) for v in list(p.values())[:3]),
)
def test_frequencies_are_those_of_transformers(parameters):
  """In both spellings, and after writing and reading them again."""
  sizes = dict(
    vocab_size=8, hidden_size=32, num_hidden_layers=1, num_attention_heads=4, intermediate_size=8
  )
  length = 4096
  theirs = transformers.LlamaConfig(
    **sizes, max_position_embeddings=length, rope_parameters=parameters | {"rope_theta": 500.0}
  )
  frequencies, magnitude = ROPE_INIT_FUNCTIONS[parameters["rope_type"]](theirs)
  new = theirs.to_dict()
  old = {k: v for k, v in new.items() if k != "rope_parameters"}
  old |= dict(rope_theta=500.0, rope_scaling=parameters)
  first = ArchConfig.from_hf(new)
  assert first == ArchConfig.from_hf(old) == ArchConfig.from_hf(first.to_hf())
  got = rope.frequencies(first.rotary_dim, first.rope_theta, first.rope_scaling)
  np.testing.assert_allclose(got, frequencies.numpy(), rtol=2e-6)
  assert first.rope_scaling.magnitude == pytest.approx(magnitude, rel=1e-12)
  again = transformers.LlamaConfig.from_dict(first.to_hf())
  assert torch_equal(ROPE_INIT_FUNCTIONS[parameters["rope_type"]](again), (frequencies, magnitude))


def torch_equal(found, wanted):
  return bool((found[0] == wanted[0]).all()) and found[1] == pytest.approx(wanted[1])


@pytest.mark.parametrize(
  "change, message",
  [
    (YARN | {"beta_fast": 1.0, "beta_slow": 2.0}, "beta_fast=1.0 must exceed beta_slow=2.0"),
    (YARN | {"original_max_position_embeddings": -1}, "original_length=-1 must be positive"),
    (LONG | {"short_factor": [1.0]}, "rope_scaling.*give 4 short factors"),
    (LONG | {"short_factor": 2.0}, "short_factors=2.0: give a list"),
    ({"rope_type": "longrope", "factor": 2.0}, "'longrope' without short_factor, long_factor"),
    ({"rope_type": "llama3", "factor": 2.0}, "'llama3' without low_freq_factor, high_freq_factor"),
    ({"rope_type": "dynamic", "factor": 2.0}, "rope type 'dynamic' in config.json"),
  ],
)
def test_scalings_that_cannot_be_are_refused(change, message):
  config = dict(model_type="llama", vocab_size=8, hidden_size=32, num_hidden_layers=1)
  config |= dict(num_attention_heads=4, intermediate_size=8, rope_scaling=change)
  with pytest.raises(ValueError, match=message):
    ArchConfig.from_hf(config)


def test_more_tokens_than_the_rotation_is_defined_for_are_refused():
  """Transformers then uses other factors for the whole batch, but cached keys have the old ones."""

  with pytest.raises(ValueError, match="long_factors"):
    RopeScaling("longrope", 2.0, short_factors=(1.0,))
  scaling = RopeScaling(
    "longrope", 2.0, original_length=16, short_factors=(1.0,) * 4, long_factors=(2.0,) * 4
  )
  arch = ArchConfig(
    vocab_size=8, hidden_size=32, num_layers=1, num_heads=4, family="phi3", rope_scaling=scaling
  )

  def run(length):
    model = transformer.Transformer(arch, rngs=transformer.nnx.Rngs(0))
    return model(jnp.zeros((1, length), jnp.int32), jnp.ones((1, length), bool)).hidden

  assert jax.eval_shape(lambda: run(16)).shape == (1, 16, 32)
  with pytest.raises(TooLong, match="17 tokens are more than the 16 .*'phi3'.*max_new_tokens"):
    jax.eval_shape(lambda: run(17))


def test_layers_of_all_kinds_share_one_scan():
  """Four kinds of layer: with and without window, with and without positions."""
  arch = ArchConfig(
    vocab_size=8,
    hidden_size=16,
    num_layers=5,
    num_heads=2,
    sliding_window=3,
    sliding_layers=(1, 3),
    unrotated_layers=(2, 3),
  )
  assert [tuple(kind) for kind in arch.kinds] == [
    (False, False),
    (False, True),
    (True, False),
    (True, True),
  ]
  tables, kinds = transformer.by_kind(arch, lambda kind: (jnp.asarray(kind),))
  assert kinds.tolist() == [0, 2, 1, 3, 0] and tables[0].shape == (4, 2)
