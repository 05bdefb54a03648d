"""Training pairs of the proxy reward model on the gold-reward task, against loops over single pairs."""

import numpy as np
import pytest

from configs import quickstart
from r2m_jax.config import ConfigError, check_config
from r2m_jax.goldtask import task as goldtask
from r2m_jax.goldtask.stages import contrast_pairs, ordered, with_contrast

LENGTH = 10  # of a response


def preferences(count, seed=0):
  """Random pairs in the format of `noisy_preferences`; the prompts are notes."""
  rng = np.random.default_rng(seed)
  notes = goldtask.prompts(seed, 9, 0, count)
  lengths = rng.integers(1, LENGTH + 1, (count, 2))
  mask = np.arange(LENGTH) < lengths[..., None]
  response = np.where(mask, rng.integers(4, 64, mask.shape), goldtask.PAD)

  def beside_prompt(prompt, of_response):
    return np.concatenate([np.repeat(prompt[:, None], 2, 1), of_response], 2)

  return {
    "tokens": beside_prompt(notes.tokens, response),
    "mask": beside_prompt(notes.mask, mask),
    "gold": rng.normal(size=(count, 2)),
    "a_wins": rng.uniform(size=count) < 0.5,
  }


@pytest.mark.parametrize("shift", [1, 3])
def test_a_contrast_pair_has_one_prompt_and_a_response_to_another(shift):
  train, P = preferences(5), goldtask.PROMPT_LENGTH
  found = contrast_pairs(train, shift)
  assert found["a_wins"].all()
  for i in range(5):
    j = (i + shift) % 5
    mine, other = (0 if train["a_wins"][k] else 1 for k in (i, j))
    for name in ("tokens", "mask"):
      own = train[name][i, mine]
      np.testing.assert_array_equal(found[name][i, 0], own)
      expected = [*own[:P], *train[name][j, other][P:]]
      np.testing.assert_array_equal(found[name][i, 1], expected)
    assert (train["tokens"][i, 0, :P] != train["tokens"][j, 0, :P]).any()


def test_contrast_pairs_join_the_others_as_winners_and_losers():
  train = preferences(4, 1)
  found = with_contrast(train, 2)
  assert len(found["tokens"]) == 12 and found["tokens"].dtype == train["tokens"].dtype
  for name in ("tokens", "mask", "a_wins"):
    np.testing.assert_array_equal(found[name][:4], train[name])
    np.testing.assert_array_equal(found[name][4:8], contrast_pairs(train, 1)[name])
    np.testing.assert_array_equal(found[name][8:], contrast_pairs(train, 2)[name])
  batch = ordered(found, np.array([5, 9]))
  np.testing.assert_array_equal(batch["chosen"], found["tokens"][[5, 9], 0])
  np.testing.assert_array_equal(batch["rejected"], found["tokens"][[5, 9], 1])


def test_without_contrast_the_pairs_are_the_same_object():
  train = preferences(3)
  assert with_contrast(train, 0) is train


@pytest.mark.parametrize("change", [{"pairs": 2, "batch_size": 2}, {"path": "folder"}])
def test_contrast_that_cannot_be_made_is_refused(change):
  config = quickstart.get_config("test")
  config.reward.contrast = 2
  for name, value in change.items():
    config.reward[name] = value
  if "path" in change:
    config.policy.path = "folder"
  with pytest.raises(ConfigError, match=r"config\.reward\.contrast is 2"):
    check_config(config)
