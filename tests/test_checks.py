"""The live start-up checks: they pass on the model as it is, and fail on a model with the bug they are for."""

import jax
import pytest
import small

from r2m_jax import checks
from r2m_jax.models import transformer


def check(built, state):
  return checks.check_model(built.defs.policy, state.policy, vocab_size=64, dtype="float32", temperature=0.7)


def test_model_passes_and_reports_what_it_measured(capsys):
  found = check(*small.start(small.config()))
  assert set(found) == {"padding", "cached decoding"} and all(0 <= v <= 1e-4 for v in found.values())
  assert any(found.values())  # two programs: a deviation of exactly zero everywhere would compare a thing with itself
  assert "bound 1e-04" in capsys.readouterr().out


def test_positions_that_count_padding_are_caught(monkeypatch):
  built, state = small.start(small.config())
  original = transformer.Transformer._tables
  ones = lambda self, keys, *others: original(self, jax.numpy.ones_like(keys), *others)
  monkeypatch.setattr(transformer.Transformer, "_tables", ones)
  with pytest.raises(checks.IdentityError, match="padding changes a log-probability"):
    check(built, state)


def test_a_cache_that_loses_a_token_is_caught(monkeypatch):
  built, state = small.start(small.config())
  original = transformer.Transformer.__call__

  def forgetful(self, tokens, mask, *, cache=None, cache_index=None, **kwargs):
    if tokens.shape[1] == 1:
      cache = cache.replace(mask=cache.mask.at[:, cache_index - 1].set(False))
    return original(self, tokens, mask, cache=cache, cache_index=cache_index, **kwargs)

  monkeypatch.setattr(transformer.Transformer, "__call__", forgetful)
  with pytest.raises(checks.IdentityError, match="cached decoding changes"):
    check(built, state)


@pytest.mark.parametrize("ratio, kl, message", [(3e-5, 0.0, "ratio is off"), (0.0, 1e-9, "old and reference")])
def test_step_zero_refuses_what_is_off(ratio, kl, message):
  checks.check_step_zero({"policy/first_ratio_deviation": 2e-5, "policy/old_ref_deviation": 0.0}, "float32")
  with pytest.raises(checks.IdentityError, match=message):
    checks.check_step_zero({"policy/first_ratio_deviation": ratio, "policy/old_ref_deviation": kl}, "float32")


def test_single_tokens_may_be_off_where_rounding_alone_moves_them():
  """Truncated sampling and bfloat16 are held to the mean, which a real mistake moves as well."""
  names = ("policy/first_ratio_deviation", "policy/first_mean_ratio_deviation", "policy/old_ref_deviation")
  edge = dict(zip(names, (0.1, 1e-6, 0.0)))
  checks.check_step_zero(edge, "float32", truncated=True)
  checks.check_step_zero(edge, "bfloat16")
  with pytest.raises(checks.IdentityError, match="max"):
    checks.check_step_zero(edge, "float32")
  with pytest.raises(checks.IdentityError, match="mean"):
    checks.check_step_zero(edge | {"policy/first_mean_ratio_deviation": 0.03}, "bfloat16")
