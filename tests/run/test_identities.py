"""The checks at the start of a run: they pass on the correct model, and fail on a model with the
bug that they detect.
"""

import jax
import numpy as np
import pytest
import small

from r2m_jax.models import transformer
from r2m_jax.run import identities
from r2m_jax.types import Sequences


@pytest.fixture(autouse=True)
def traced_anew():
  """A test that breaks the model must not find the program of the model as it is."""
  identities.make_readings.cache_clear()


def check(built, state, **overrides):
  cfg = small.config(rollout__temperature=0.7, dtype="float32", **overrides)
  return identities.check_model(
    built.defs.policy, state.policy, cfg, vocab_size=64, prompt_length=14
  )


def test_model_passes_and_reports_what_it_measured(capsys):
  found = check(*small.start(small.config()))
  assert set(found) == {"padding", "cached decoding"} and all(
    0 <= v <= 1e-4 for v in found.values()
  )
  assert any(
    found.values()
  )  # the two programs must differ: a deviation of exactly zero everywhere would be suspicious
  assert "rounding" in capsys.readouterr().out


def test_positions_that_count_padding_are_caught(monkeypatch):
  built, state = small.start(small.config())
  original = transformer.Transformer._tables

  def ones(self, keys, *others):
    return original(self, jax.numpy.ones_like(keys), *others)

  monkeypatch.setattr(transformer.Transformer, "_tables", ones)
  with pytest.raises(identities.IdentityError, match="by padding is"):
    check(built, state)


def test_a_cache_that_loses_a_token_is_caught(monkeypatch):
  built, state = small.start(small.config())
  original = transformer.Transformer.__call__

  def forgetful(self, tokens, mask, *, cache=None, cache_index=None, **kwargs):
    if tokens.shape[1] == 1:
      cache = cache.replace(mask=cache.mask.at[:, cache_index - 1].set(False))
    return original(self, tokens, mask, cache=cache, cache_index=cache_index, **kwargs)

  monkeypatch.setattr(transformer.Transformer, "__call__", forgetful)
  with pytest.raises(identities.IdentityError, match="by cached decoding is"):
    check(built, state)


def step_zero(metrics, rounding=identities.Rounding(largest=1e-6, mean=1e-7), **overrides):
  names = (
    "policy/first_ratio_deviation",
    "policy/first_mean_ratio_deviation",
    "policy/old_ref_deviation",
  )
  identities.check_step_zero(dict(zip(names, metrics)), rounding, small.config(**overrides))


@pytest.mark.parametrize("of", [0, 2], ids=["ratio", "reference"])
def test_step_zero_passes_warns_and_refuses_by_the_rounding_that_was_measured(of, capsys):
  metrics = [0.0, 0.0, 0.0]
  for deviation, warns in ((4e-6, False), (2e-5, True)):
    metrics[of] = deviation
    step_zero(metrics)
    assert ("warning" in capsys.readouterr().err) is warns
  metrics[of] = 4e-5
  with pytest.raises(
    identities.IdentityError, match="4.00e-05 before any update; rounding alone gives 1.0e-06"
  ):
    step_zero(metrics)
  step_zero(
    metrics, identities.Rounding(1e-5, 1e-6)
  )  # the same deviation in a model with larger rounding errors
  metrics[of] = float("nan")
  with pytest.raises(identities.IdentityError):
    step_zero(metrics)


def test_single_tokens_may_be_off_if_rounding_alone_moves_them():
  """For truncated sampling and bfloat16 the mean is checked. A real mistake also changes the
  mean.
  """
  edge = (0.1, 1e-7, 0.0)
  step_zero(edge, rollout__top_p=0.9)
  step_zero(edge, dtype="bfloat16")
  with pytest.raises(identities.IdentityError, match="max"):
    step_zero(edge)
  for off in (dict(rollout__top_p=0.9), dict(dtype="bfloat16")):
    with pytest.raises(identities.IdentityError, match="mean"):
      step_zero((0.1, 0.03, 0.0), **off)


def rounding_of(depth: int, dtype="float32"):
  cfg = small.config(policy__arch__num_layers=depth, dtype=dtype)
  built, state = small.start(cfg)
  rng, prompts, T = np.random.default_rng(0), small.prompts(cfg, 0), cfg.rollout.max_new_tokens
  lengths = rng.integers(1, T + 1, len(prompts.tokens))
  response_mask = np.arange(T) < lengths[:, None]
  responses = rng.integers(3, 64, response_mask.shape).astype(np.int32)
  sequences = Sequences(
    tokens=np.concatenate([prompts.tokens, responses], 1),
    token_mask=np.concatenate([prompts.mask, response_mask], 1),
    response_mask=response_mask,
    has_eos=lengths < T,
  )
  return identities.sample_rounding(built.defs, cfg, state.ref, sequences)


def test_rounding_is_measured_on_the_model_and_its_dtype():
  shallow, deep, half = rounding_of(1), rounding_of(8), rounding_of(1, "bfloat16")
  assert 0 < shallow.mean <= shallow.largest < 1e-4
  assert deep.mean > shallow.mean  # more layers have larger rounding errors
  assert half.mean > 1000 * shallow.mean  # 16 bits fewer


@pytest.mark.parametrize("noise", [0.0, 1e-3])
def test_a_reference_of_other_weights_is_far_above_rounding_and_the_same_weights_are_not(noise):
  cfg = small.config()
  built, state = small.start(cfg, ref_noise=noise)
  state, out = small.step_of(cfg, built, state)(state, small.prompts(cfg, 0))
  out = jax.device_get(out)
  rounding = identities.sample_rounding(built.defs, cfg, state.ref, out.sequences)
  if not noise:
    return identities.check_step_zero(out.metrics, rounding, cfg)
  with pytest.raises(identities.IdentityError, match="reference"):
    identities.check_step_zero(out.metrics, rounding, cfg)


def test_weights_that_are_not_finite_are_refused_with_the_cause():
  built, state = small.start(small.config())
  broken = jax.tree.map(lambda x: x.at[..., 0].set(jax.numpy.nan), state.policy)
  with pytest.raises(identities.IdentityError, match="not finite.*NaN"):
    check(built, state.replace(policy=broken))
