"""The distance to transformers that an export prints. Its bounds follow from the model's
rounding.
"""

import jax
import numpy as np
import pytest
import safetensors.torch
import tiny_text
import torch
import transformers

from r2m_jax.hf import parity
from r2m_jax.hf.weights import load_pretrained

TIMES = 3000  # makes logits so large that float32 cannot hold them to 1e-4


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
  """A small policy whose logits are in the thousands."""
  folder = tmp_path_factory.mktemp("loud")
  tiny_text.model("llama2", "plain", folder, num_hidden_layers=1)
  file = folder / "model.safetensors"
  weights = safetensors.torch.load_file(file)
  weights["lm_head.weight"] *= TIMES
  safetensors.torch.save_file(weights, file, metadata={"format": "pt"})
  return folder


def exact(folder) -> list[np.ndarray]:
  """The logits of the compared rows in float64, by transformers."""
  model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64).eval()
  with torch.no_grad():
    rows = parity.random_rows(model.config.vocab_size)
    return [model(torch.tensor(row)[None]).logits[0].numpy() for row in rows]


def test_large_logits_are_within_what_rounding_explains(folder):
  gap = parity.policy_gap(folder)
  assert parity.BOUND < gap.value <= gap.bound
  largest = max(np.abs(row).max() for row in exact(folder))
  np.testing.assert_allclose(gap.size, largest, rtol=1e-5)
  eps = np.finfo(np.float32).eps
  assert eps * largest / 2 < gap.rounding < 100 * eps * largest  # a few units in the last place
  said = gap.describe("logit")
  assert "within" in said and "rounding by itself moves a logit" in said and "\n" not in said


def test_a_wrong_factor_is_no_rounding(folder, monkeypatch):
  def wrong(source):
    made = load_pretrained(source)
    state = jax.tree_util.tree_map_with_path(
      lambda path, x: x * (1.0005 if "final_norm" in jax.tree_util.keystr(path) else 1), made.state
    )
    return made._replace(state=state)

  monkeypatch.setattr(parity, "load_pretrained", wrong)
  gap = parity.policy_gap(folder)
  np.testing.assert_allclose(gap.value, 0.0005 * gap.size, rtol=0.05)
  said = gap.describe("logit")
  assert "ABOVE" in said and "do not use the folder before you know why" in said


def test_numbers_that_are_not_finite_are_above_every_bound():
  nan = [np.array([np.nan], np.float32)]
  gap = parity.gap_of(nan, nan, None, None, None, None)
  assert "ABOVE" in gap.describe("score")


def test_scores_within_the_bound_are_not_measured_again(tmp_path):
  tiny_text.model("llama2", "plain", tmp_path, classifier=True, num_hidden_layers=1)
  gap = parity.reward_gap(tmp_path)
  assert gap.value <= gap.bound == parity.BOUND and gap.rounding is None
  assert "within 1e-04 (float32, 4 rows)" in gap.describe("score")
