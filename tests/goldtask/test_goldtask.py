"""The gold reward against a loop over single responses, and the content of prompts, demonstrations
and labels.
"""

import numpy as np
import oracles
import pytest
import small

from r2m_jax.goldtask import task as goldtask
from r2m_jax.types import Prompts

COUNT = 3000  # sample size of the statistics; their bounds are at least four standard errors wide


def test_gold_matches_loop_on_random_responses():
  """Responses are finished, truncated, empty, or only an ending token. Half of the words come from
  the note, so that words repeat.
  """
  rng, length, count = np.random.default_rng(0), 14, 400
  prompts = goldtask.prompts(0, 9, 0, count)
  words, responses, ended = [], [], []
  for note in prompts.tokens:
    size = int(rng.integers(0, length + 1))
    from_note = rng.uniform(size=size) < 0.5
    said = np.where(from_note, rng.choice(note[1:-1], size), rng.integers(3, 64, size)).tolist()
    ends = size < length and rng.uniform() < 0.7
    words.append(said)
    ended.append(ends)
    responses.append(said + [goldtask.EOS] * ends)
  found = goldtask.gold(small.sequences_of(prompts, responses, length, ended))
  expected = [oracles.gold_loop(*row) for row in zip(prompts.tokens, words, ended)]
  np.testing.assert_allclose(found.gold, [gold for gold, _ in expected], atol=1e-12)
  for name in goldtask.GoldParts._fields[1:]:
    np.testing.assert_allclose(
      getattr(found, name), [parts[name] for _, parts in expected], atol=1e-12, err_msg=name
    )
    assert len(set(getattr(found, name))) > 1, name
  assert (
    min(map(len, responses)) == 0 and [goldtask.EOS] in responses and {True, False} == set(ended)
  )


def by_hand(*responses, length=12):
  """The gold reward of responses to the note "facts 12, 13, 14 and chatter 40 to 48"."""
  note = [goldtask.BOS, 12, 13, 14, *range(40, 49), goldtask.SEP]
  tokens = np.tile(np.array(note, np.int32), (len(responses), 1))
  prompts = Prompts(
    tokens=tokens, mask=np.ones(tokens.shape, bool), example_id=np.arange(len(responses))
  )
  return goldtask.gold(
    small.sequences_of(prompts, responses, length, [r[-1:] == [goldtask.EOS] for r in responses])
  ).gold


def test_gold_by_hand():
  end = goldtask.EOS
  found = by_hand(
    [13, 12, 14, end],  # everything in the note
    [end],  # nothing
    [
      12,
      13,
      12,
      40,
      60,
      4,
      20,
      end,
    ],  # two of three facts, a repetition, two chatter words, a filler, one invented fact
    [12] * 10 + [end],  # one fact, nine repetitions, two words too long
    [12, 13],  # cut off
    [0, 3, end],  # padding and separator also count as fillers
  )
  expected = [4.0, 0.0, 8 / 3 - 0.3 - 1.6 - 0.25 - 0.6, 4 / 3 - 2.7 - 0.4, 8 / 3 - 1.0, -0.5]
  np.testing.assert_allclose(found, expected, atol=1e-12)


def test_prompts_are_notes_of_distinct_words():
  prompts = goldtask.prompts(0, 1, 2, COUNT)
  assert (
    prompts.tokens.shape == (COUNT, 14) and prompts.tokens.dtype == np.int32 and prompts.mask.all()
  )
  assert (prompts.tokens[:, 0] == goldtask.BOS).all() and (
    prompts.tokens[:, -1] == goldtask.SEP
  ).all()
  words = np.sort(prompts.tokens[:, 1:-1])
  assert (np.diff(words) > 0).all() and words.min() >= 12 and words.max() <= 63
  np.testing.assert_array_equal(prompts.example_id, np.arange(COUNT) + 2 * COUNT)

  is_fact = prompts.tokens[:, 1:-1] < 40
  shares = np.bincount(is_fact.sum(1), minlength=8) / COUNT
  assert shares[[0, 1, 2, 7]].sum() == 0
  np.testing.assert_allclose(shares[3:7], 0.25, atol=0.04)
  np.testing.assert_allclose(
    is_fact.mean(0), 4.5 / 12, atol=0.045
  )  # shuffled: facts occur at any position
  counts = np.bincount(words.reshape(-1), minlength=64) / COUNT
  np.testing.assert_allclose(counts[12:40], 4.5 / 28, atol=0.035)
  np.testing.assert_allclose(counts[40:], 7.5 / 24, atol=0.045)


def test_prompts_depend_on_seed_stream_and_index_alone():
  base = goldtask.prompts(3, 1, 5, 16)
  goldtask.prompts(4, 0, 0, 7)  # independently of draws in between
  np.testing.assert_array_equal(goldtask.prompts(3, 1, 5, 16).tokens, base.tokens)
  np.testing.assert_array_equal(goldtask.prompts(3, 1, 5, 4).tokens, base.tokens[:4])
  for other in [(4, 1, 5), (3, 2, 5), (3, 1, 6), (1, 3, 5)]:
    assert (goldtask.prompts(*other, 16).tokens != base.tokens).any(), other


@pytest.fixture(scope="module")
def demonstrations():
  return goldtask.demonstrations(0, COUNT, 24)


def test_demonstrations_are_well_formed(demonstrations):
  notes, tokens, lengths = demonstrations
  np.testing.assert_array_equal(notes.tokens, goldtask.prompts(0, 0, 0, COUNT).tokens)
  assert tokens.shape == (COUNT, 24) and lengths.min() >= 1 and lengths.max() <= 24
  inside = np.arange(24) < lengths[:, None]
  assert (tokens[~inside] == goldtask.PAD).all()
  ends = (tokens == goldtask.EOS) & inside
  assert (ends.sum(1) <= 1).all() and (ends.sum(1)[lengths < 24] == 1).all()
  last = tokens[np.arange(COUNT), lengths - 1]
  assert (last[lengths < 24] == goldtask.EOS).all()


def test_demonstrations_have_the_rates_they_are_said_to_have(demonstrations):
  notes, tokens, lengths = demonstrations
  inside = np.arange(24) < lengths[:, None]
  ended = (tokens[np.arange(COUNT), lengths - 1] == goldtask.EOS).tolist()
  responses = [row[:n].tolist() for row, n in zip(tokens, lengths)]
  parts = goldtask.gold(small.sequences_of(notes, responses, 24, ended))
  np.testing.assert_allclose(parts.coverage.mean(), 0.5, atol=0.025)  # 0.25 + 0.5 q
  np.testing.assert_allclose(parts.chatter.mean(), 0.12 * 7.5, atol=0.07)
  np.testing.assert_allclose(parts.hallucinated.mean(), 0.15 * (1 - 4.5 / 28), atol=0.025)
  np.testing.assert_allclose(
    parts.gold.mean(), 0.92, atol=0.12
  )  # as measured when the task was designed
  # quality differs between demonstrators: without this the variance would be 0.059, with it 0.075
  np.testing.assert_allclose(parts.coverage.var(), 0.075, atol=0.008)

  is_word = inside & (tokens >= 12)
  repeated = is_word[:, 1:] & (tokens[:, 1:] == tokens[:, :-1])
  drawn = is_word.sum() - repeated.sum()
  np.testing.assert_allclose(repeated.sum() / drawn, 0.08, atol=0.012)
  np.testing.assert_allclose(
    (inside & (tokens >= 4) & (tokens < 12)).sum() / drawn, 0.25, atol=0.02
  )
  fillers = np.bincount(tokens[inside], minlength=64)[4:12]
  assert fillers.min() > 0.75 * fillers.mean()


def test_demonstrations_are_cut_at_their_length():
  _, tokens, lengths = goldtask.demonstrations(0, 200, 4)
  assert tokens.shape == (200, 4) and lengths.max() == 4
  cut = (tokens != goldtask.EOS).all(1)
  assert 50 < cut.sum() < 200 and (lengths[cut] == 4).all()
  longer = goldtask.demonstrations(0, 200, 24)[1]
  np.testing.assert_array_equal(tokens[cut], longer[cut, :4])


def test_noisy_choice_follows_the_gap_and_flips_a_share():
  count = 20000  # standard error 0.0035
  low, high = np.zeros(count), np.full(count, 0.3)

  def choose(a, b, flip, seed=0):
    return goldtask.noisy_choice(a, b, seed, temperature=0.3, flip=flip)

  sigmoid = 1 / (1 + np.exp(-1.0))  # a difference of one temperature
  np.testing.assert_allclose(choose(high, low, 0.0).mean(), sigmoid, atol=0.015)
  np.testing.assert_allclose(choose(low, high, 0.0).mean(), 1 - sigmoid, atol=0.015)
  np.testing.assert_allclose(
    choose(high, low, 0.2).mean(), 0.8 * sigmoid + 0.2 * (1 - sigmoid), atol=0.015
  )
  np.testing.assert_allclose(choose(low, low, 0.2).mean(), 0.5, atol=0.015)
  assert choose(high * 100, low, 0.0).all() and not choose(high * 100, low, 1.0).any()
  np.testing.assert_allclose(choose(high * 100, low, 0.2).mean(), 0.8, atol=0.015)
  np.testing.assert_array_equal(choose(high, low, 0.2), choose(high, low, 0.2))
  assert (choose(high, low, 0.2) != choose(high, low, 0.2, seed=1)).any()


def test_render_leaves_masked_columns_out():
  assert len(set(goldtask.WORDS)) == goldtask.VOCAB_SIZE == 64
  assert (
    goldtask.render(np.array([1, 12, 40, 2, 0]), np.array([1, 1, 0, 1, 0], bool)) == "<s> ant </s>"
  )
