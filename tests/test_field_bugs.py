"""Known bugs of other RLHF code. Each has at least one test, which fails if this library has the bug.

KL
  k1_in_the_loss_is_refused                  k1 as a loss: its gradient is zero, so the policy drifts freely
  k3_in_the_loss_is_the_other_direction      k3 as a loss taken for KL(policy || reference)
  kl_in_the_loss_pulls_back                  a KL in the loss that has no gradient
  step_zero_with_temperature_and_truncation  KL not 0 or ratio not 1 before any update, if T is not 1 or with top-p
  exact_kl_of_one_model_to_itself_is_zero    the same
  log_probabilities_of_what_is_sampled       policy at T = 1 and reference at the rollout's T, or neither truncated
  kl_is_in_the_baseline                      KL missing in RLOO's baseline
  reward_of_the_step_by_hand                 the same in the step; a missing end not penalised, or other rows penalised
Ends and padding
  padding_may_be_eos                         masks from `token != pad` if pad is eos: the end is never trained
  the_end_is_trained                         the ending token cut off the response, or masked in the loss
  every_eos_id_ends_a_response               only one of several eos ids ends a response
  eos_inside_the_prompt_is_attended          end-of-turn marks inside the prompt hidden from attention
  a_sampled_pad_is_a_word                    a pad id at the length limit treated as an end
  padding_is_never_read                      padding attended to
  the_reward_model_reads_the_end             the score read one token early, or at padding
  missing_end                                truncated responses scored like the others
  lengths_are_tokens                         limits in characters compared with tokens
Advantages
  tied_groups                                NaN or amplified noise if a group's scores tie or nearly tie
  a_group_of_one_is_refused                  a group of one: a baseline of 0 or a deviation of 1 is assumed
  rewards_are_clipped_before_the_baseline    rewards clipped after the baseline is subtracted
  whitening_leaves_padding_out               whitening over padding
Losses
  token_mean_counts_tokens_of_all_devices    a mean of micro-batch or device means instead of a token mean
  aggregations_are_what_they_say             sequence mean instead of token mean; a loss that grows with the batch
  rloo_is_over_whole_responses               RLOO with losses averaged over tokens
  the_second_epoch_is_off_policy             ratio always 1, as old log-probabilities are the new ones; epochs ignored
  the_clip_is_pessimistic                    the optimistic branch of the clip for negative advantages
  no_dual_clip_unless_asked                  a dual clip that is always on
Reward model
  one_rendering_for_training_and_rl          trained with an end of text and used without
  truncated_answers_look_truncated           a truncated answer closed by the template so that it looks finished
  a_long_reply_is_read_as_cut_off            a pair's long reply cut and then closed, or cut after its rendering
  no_double_bos                              the beginning of text twice
  long_inputs_keep_their_end                 the end overwritten or cut off if the input is too long
  scores_are_not_cast_to_integers            scores cast to the integers of the token ids
Sampling
  no_key_is_used_twice                       the same key in every call; identical samples of a prompt
"""

import dataclasses
import functools

import enumeration
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import small
import tiny_text
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from configs import default
from r2m_jax import ops
from r2m_jax.algorithm import advantages, losses
from r2m_jax.algorithm.objective import kl_estimator, make_advantages, make_objective, shape_scores
from r2m_jax.algorithm.read import make_read
from r2m_jax.config import ConfigError, check_config
from r2m_jax.data.datasets import pair_ids, select
from r2m_jax.data.text import Renderer, TextError, load_tokenizer, responses_of
from r2m_jax.goldtask import task as goldtask
from r2m_jax.models.logprobs import TokenStats, token_stats
from r2m_jax.models.reward import read_rte
from r2m_jax.ops import Truncation, predicts_response
from r2m_jax.step import make_learn, make_rollout
from r2m_jax.types import Experience, Rollout, Sequences

PAD, EOS, OTHER_EOS = goldtask.PAD, goldtask.EOS, 5
TAU, TOP_K, TOP_P, BETA, CLIP, PENALTY = 0.7, 24, 0.9, 0.5, 5.0, 1.5


# ---- one small run: T is not 1, sampling is truncated, two ids end a response, KL in the reward ----


@pytest.fixture(scope="module")
def run():
  """Two steps on the same prompts, each with an eos inside, padded with `PAD`; see `Run` below for
  the fields.
  """
  return Run()


class Run:
  def __init__(self):
    self.config = cfg = small.config(
      rollout__temperature=TAU,
      rollout__top_k=TOP_K,
      rollout__top_p=TOP_P,
      kl__placement="reward",
      kl__estimator="k1",
      kl__beta=BETA,
      ppo__aggregation="token_mean",
      policy__lr=3e-3,
      shaping__clip=CLIP,
      shaping__missing_eos="subtract",
      shaping__missing_eos_penalty=PENALTY,
    )
    check_config(cfg)
    self.built, self.start = small.start(cfg)
    self.prompts = small.prompts(cfg, 0, left_pad=2)
    self.prompts.tokens[:, -4] = EOS  # where a template puts it, after an earlier turn
    self.learn = jax.jit(make_learn(self.built.defs, cfg, self.built.mesh))
    self.read = jax.jit(lambda state, sequences: make_read(cfg)(*self.models(state), sequences))
    self.rte = jax.jit(
      lambda tokens, mask: read_rte(
        nnx.merge(self.built.defs.reward_backbone, self.start.reward_backbone), tokens, mask
      )
    )
    self.logits = jax.jit(
      lambda state, sequences: [
        m.logits(predicts_response(m(sequences.tokens, sequences.token_mask).hidden, self.T))
        for m in self.models(state)
      ]
    )
    self.sequences = self.draw(self.start, PAD)
    self.T = self.sequences.response_mask.shape[1]
    self.after, self.out = self.step(self.start, self.sequences)
    self.second = self.draw(self.after, PAD)
    _, self.second_out = self.step(self.after, self.second)

  def models(self, state):
    return self.built.defs.open_policy(state.policy, state.ref), self.built.defs.open_ref(state.ref)

  @functools.cache
  def rollout(self, pad):
    return jax.jit(
      make_rollout(self.built.defs, self.config, self.built.mesh, (EOS, OTHER_EOS), pad)
    )

  def draw(self, state, pad):
    return jax.device_get(self.rollout(pad)(state, self.prompts).samples)

  def step(self, state, sequences):
    state, out = self.learn(state, Rollout(sequences))
    return state, jax.device_get(out)

  def responses(self, sequences):
    return np.asarray(sequences.tokens)[:, -self.T :]


def with_response(sequences, tokens):
  prompt = np.asarray(sequences.tokens)[:, : -tokens.shape[1]]
  return sequences.replace(tokens=np.concatenate([prompt, tokens], 1).astype(np.int32))


# ---- KL ----


def test_k1_in_the_loss_is_refused():
  config = default.get_config()
  config.kl.placement, config.kl.estimator = "loss", "k1"
  with pytest.raises(
    ConfigError, match="config.kl.estimator is 'k1'.*gradient of k1 is zero.*'k2' or 'exact'"
  ):
    check_config(config)
  config.kl.placement = "reward"
  check_config(config)
  config.kl.update(placement="loss", estimator="auto")
  assert {kl_estimator(config, vocab) for vocab in (64, 100_000)} == {
    "exact",
    "k2",
  }  # never k1, never k3


def test_k3_in_the_loss_is_the_other_direction():
  """Exact expectations over five tokens: k1 has no gradient, k2 has the gradient of KL(pi || ref),
  and k3 that of KL(ref || pi).
  """
  with jax.enable_x64(True):
    logits, ref = (jnp.asarray(np.random.default_rng(seed).normal(size=5)) for seed in (0, 1))
    log_ref, weight = jax.nn.log_softmax(ref), jax.nn.softmax(logits)

    def kl(p, q):
      return (jnp.exp(p) * (p - q)).sum()

    forward = jax.grad(lambda x: kl(jax.nn.log_softmax(x), log_ref))(logits)
    other = jax.grad(lambda x: kl(log_ref, jax.nn.log_softmax(x)))(logits)

    def loss(term):
      return jax.grad(lambda x: (weight * term(jax.nn.log_softmax(x), log_ref)).sum())(logits)

    np.testing.assert_allclose(loss(losses.kl_k1), 0, atol=1e-12)
    np.testing.assert_allclose(loss(losses.kl_k2), forward, atol=1e-12)
    np.testing.assert_allclose(loss(losses.kl_k3), other, atol=1e-12)
    assert np.abs(forward - other).max() > 0.1


@pytest.mark.parametrize("estimator", ["k2", "k3", "exact"])
def test_kl_in_the_loss_pulls_back(estimator):
  """Without advantages, a descent step on the loss brings the policy nearer to the reference."""
  config = default.get_config()
  config.kl.update(placement="loss", estimator=estimator)
  rng = np.random.default_rng(0)
  logits, ref = (jnp.asarray(rng.normal(size=(1, 1, 6)), jnp.float32) for _ in range(2))
  tokens, mask = np.arange(6, dtype=np.int32)[:, None], np.ones((6, 1), bool)  # every token once

  def head(h):
    return h

  @jax.jit
  def read(x, other=ref):
    hidden, other = jnp.repeat(x, 6, 0), jnp.repeat(other, 6, 0)
    return token_stats(head, hidden, tokens, temperature=TAU, ref=(head, other))

  p = jnp.exp(read(logits).logprobs)
  batch = Experience(
    Sequences(tokens, mask, mask, mask[:, 0]),
    old_logprobs=read(logits).logprobs,
    ref_logprobs=read(ref).logprobs,
    ref_hidden=None,
    advantages=jnp.zeros((6, 1)),
  )
  objective = make_objective(config, 6)

  def loss(x):  # the expectation over tokens: each row's loss times the probability of its token
    rows = jax.tree.map(lambda x: jnp.asarray(x)[:, None], (read(x, ref), batch))
    return (p[:, 0] * jax.vmap(lambda stats, batch: objective(stats, batch, 1.0)[0])(*rows)).sum()

  gradient = jax.jit(jax.grad(loss))(logits)
  kl_after = read(logits - 0.1 * gradient / jnp.linalg.norm(gradient), ref).kl[0, 0]
  assert kl_after < read(logits, ref).kl[0, 0] - 1e-3


def test_step_zero_with_temperature_and_truncation(run):
  """T = 0.7, top-k and top-p: before any update the ratio is 1 and the KL is 0. After one update
  neither is.
  """
  assert run.out.metrics["policy/first_ratio_deviation"] <= 2e-5
  assert run.out.metrics["policy/old_ref_deviation"] == 0
  assert abs(run.out.metrics["kl"]) <= 1e-6
  assert run.second_out.metrics["policy/first_ratio_deviation"] <= 2e-5
  assert (
    run.second_out.metrics["policy/old_ref_deviation"] > 0.1 and run.second_out.metrics["kl"] > 0.01
  )


def test_exact_kl_of_one_model_to_itself_is_zero():
  """Also if sampling is truncated."""
  hidden = jax.random.normal(jax.random.key(0), (2, 3, 20))
  for truncation in (
    Truncation(),
    Truncation(top_k=5),
    Truncation(top_p=0.6),
    Truncation(min_p=0.1),
  ):

    def head(h):
      return 3 * h

    stats = token_stats(
      head,
      hidden,
      jnp.zeros((2, 3), jnp.int32),
      temperature=TAU,
      truncation=truncation,
      ref=(head, hidden),
    )
    np.testing.assert_array_equal(stats.kl, 0)


def test_log_probabilities_of_what_is_sampled(run):
  """Policy and reference, at the rollout's temperature and over the kept tokens, against NumPy."""
  sampling = enumeration.Sampling(TAU, TOP_K, TOP_P)
  old, ref = jax.device_get(run.read(run.after, run.second))
  policy_logits, ref_logits = (np.asarray(x, float) for x in run.logits(run.after, run.second))
  drawn, mask = run.responses(run.second), run.second.response_mask
  differ = 0
  for b, t in np.argwhere(mask):
    keep_here = enumeration.kept_row(policy_logits[b, t], sampling)
    token = drawn[b, t]
    assert keep_here[token], "the sampler drew a token that its truncation excludes"
    for got, logits in ((old, policy_logits), (ref, ref_logits)):
      want = enumeration.log_distribution(logits[b, t][None], sampling, keep_here[None])[0, token]
      np.testing.assert_allclose(got.logprobs[b, t], want, atol=2e-5)
    plain = enumeration.log_distribution(
      policy_logits[b, t][None], enumeration.Sampling(), np.ones((1, 64), bool)
    )
    differ += abs(plain[0, token] - old.logprobs[b, t]) > 0.05
  assert differ > 0.9 * mask.sum()  # at T = 1 over the whole vocabulary they differ


def shaped_by_hand(run, out, sequences):
  scores = np.clip(out.judged.scores.astype(float), -CLIP, CLIP)
  return np.where(sequences.has_eos, scores, scores - PENALTY)


@pytest.mark.parametrize("step", [0, 1])
def test_reward_of_the_step_by_hand(run, step):
  """The first loss of a step, from the scores: shaping, KL in the reward and in RLOO's baseline,
  mean over tokens.
  """
  state, sequences, out = [
    (run.start, run.sequences, run.out),
    (run.after, run.second, run.second_out),
  ][step]
  old, ref = jax.device_get(run.read(state, sequences))
  mask, K = sequences.response_mask, run.config.rollout.group_size
  kl = np.where(mask, old.logprobs.astype(float) - ref.logprobs, 0).sum(1)

  def baseline(r):
    return ((r.reshape(-1, K).sum(1, keepdims=True) - r.reshape(-1, K)) / (K - 1)).reshape(-1)

  def loss(adv):
    return -(adv * mask.sum(1)).sum() / mask.sum()

  rewards = shaped_by_hand(run, out, sequences) - BETA * kl
  np.testing.assert_allclose(
    out.metrics["policy/first_loss"], loss(rewards - baseline(rewards)), atol=2e-5
  )
  unshaped, shaped = out.judged.scores.astype(float), shaped_by_hand(run, out, sequences)
  others = {"no penalty": unshaped - baseline(unshaped) - BETA * (kl - baseline(kl))}
  if step:  # before the first update there is no KL
    others["KL out of the baseline"] = rewards - baseline(shaped)
    others["no KL"] = shaped - baseline(shaped)
  for name, adv in others.items():
    assert abs(loss(adv) - out.metrics["policy/first_loss"]) > 1e-3, name


def test_kl_is_in_the_baseline():
  """Scores tie, but the KLs do not: each baseline has the KL of the other responses, worked by hand
  for a pair.
  """
  config = default.get_config()
  config.rollout.group_size = 2
  config.kl.placement = "reward"
  kl = jnp.array([[1.0, 3.0], [0.5, 9.0]])
  mask = jnp.array([[True, True], [True, False]])
  adv = make_advantages(config)(jnp.array([2.0, 2.0]), kl, mask, 0.1).advantages
  np.testing.assert_allclose(adv, [[-0.4 + 0.05] * 2, [-0.05 + 0.4, 0]], atol=1e-6)


# ---- ends and padding ----


def test_padding_may_be_eos(run):
  """If eos is the padding, samples, masks and numbers are equal bit for bit."""
  same = run.draw(run.start, EOS)
  np.testing.assert_array_equal(same.response_mask, run.sequences.response_mask)
  np.testing.assert_array_equal(same.has_eos, run.sequences.has_eos)
  kept = run.sequences.response_mask
  np.testing.assert_array_equal(run.responses(same)[kept], run.responses(run.sequences)[kept])
  assert (run.responses(same)[~kept] == EOS).all() and (
    run.responses(run.sequences)[~kept] == PAD
  ).all()
  prompt = np.asarray(same.tokens)[:, : -run.T]
  left = ~np.asarray(same.token_mask)[:, : -run.T]
  same = with_response(
    same.replace(tokens=np.concatenate([np.where(left, EOS, prompt), run.responses(same)], 1)),
    run.responses(same),
  )
  state, out = run.step(run.start, same)
  for name, value in run.out.metrics.items():
    np.testing.assert_array_equal(out.metrics[name], value, err_msg=name)
  assert all(map(np.array_equal, jax.tree.leaves(state.policy), jax.tree.leaves(run.after.policy)))


def test_every_eos_id_ends_a_response(run):
  tokens, mask = run.responses(run.sequences), run.sequences.response_mask
  last = tokens[np.arange(len(tokens)), mask.sum(1) - 1]
  ended = run.sequences.has_eos
  assert {EOS, OTHER_EOS} == set(last[ended])
  np.testing.assert_array_equal(ended, np.isin(last, (EOS, OTHER_EOS)))
  inside = mask.copy()
  inside[np.arange(len(tokens)), mask.sum(1) - 1] = False
  assert not np.isin(tokens[inside], (EOS, OTHER_EOS)).any()


def test_the_end_is_trained(run):
  """The ending token is in the response and counts in the loss. A good response makes it more
  likely.
  """
  sequences, ended = run.sequences, run.sequences.has_eos
  old, ref = run.read(run.start, sequences)
  zero = jnp.zeros_like(old.logprobs)
  adv = advantages.per_token(jnp.ones(len(ended)), jnp.asarray(sequences.response_mask))
  batch = Experience(sequences, old.logprobs, ref.logprobs, None, adv)

  def loss(new):
    return make_objective(run.config, 64)(TokenStats(new, zero, zero), batch, 0.0)[0]

  gradient = np.asarray(jax.jit(jax.grad(loss))(old.logprobs))
  length = sequences.response_mask.sum(1)
  at_end = gradient[np.arange(len(ended)), length - 1][ended]
  np.testing.assert_allclose(at_end, -1 / length.sum(), rtol=1e-5)
  np.testing.assert_array_equal(gradient[~sequences.response_mask], 0)


def test_eos_inside_the_prompt_is_attended(run):
  """If it is masked or replaced by another token, the same response has other log-probabilities."""
  sequences = run.sequences
  column = run.prompts.tokens.shape[1] - 4
  assert (sequences.tokens[:, column] == EOS).all() and sequences.token_mask[:, column].all()
  plain = np.asarray(run.read(run.start, sequences)[0].logprobs)
  hidden, swapped = np.array(sequences.token_mask), np.array(sequences.tokens)
  hidden[:, column], swapped[:, column] = False, 50
  for changed in (sequences.replace(token_mask=hidden), sequences.replace(tokens=swapped)):
    other = np.asarray(run.read(run.start, changed)[0].logprobs)
    assert (np.abs(other - plain).max(1) > 1e-3).all()


def test_a_sampled_pad_is_a_word(run):
  """A pad id that is no eos may be sampled: it counts, and at the length limit it is not an end."""
  cut = ~run.sequences.has_eos
  said = np.where(run.sequences.response_mask, run.responses(run.sequences), -1)
  pad = max(
    said[cut, -1], key=lambda word: (said[:, :-1] == word).sum()
  )  # sampled at the limit of a row, and before it
  sequences = run.draw(run.start, int(pad))
  np.testing.assert_array_equal(sequences.response_mask, run.sequences.response_mask)
  np.testing.assert_array_equal(sequences.has_eos, run.sequences.has_eos)
  same = (run.responses(sequences) == pad) & sequences.response_mask
  np.testing.assert_array_equal(same, said == pad)
  assert same[:, :-1].any() and same[cut, -1].any()


def test_padding_is_never_read(run):
  """Other tokens in the left and right padding change no bit of log-probabilities, scores and the
  update.
  """
  noise = np.random.default_rng(0).integers(0, 64, run.sequences.tokens.shape, dtype=np.int32)
  dirty = run.sequences.replace(
    tokens=np.where(run.sequences.token_mask, run.sequences.tokens, noise)
  )
  assert (dirty.tokens != run.sequences.tokens).any()
  mask = run.sequences.response_mask
  for one, other in zip(run.read(run.start, run.sequences), run.read(run.start, dirty)):
    np.testing.assert_array_equal(np.asarray(one.logprobs)[mask], np.asarray(other.logprobs)[mask])
  state, out = run.step(run.start, dirty)
  np.testing.assert_array_equal(out.judged.scores, run.out.judged.scores)
  assert all(map(np.array_equal, jax.tree.leaves(state.policy), jax.tree.leaves(run.after.policy)))


def test_the_reward_model_reads_the_end(run):
  """H_last is that of the ending token, even if padding is eos. It equals that of the row without
  padding.
  """
  ended = np.flatnonzero(run.sequences.has_eos & (run.sequences.response_mask.sum(1) < run.T))
  tokens, mask = np.array(run.sequences.tokens), np.array(run.sequences.token_mask)
  tokens[~mask] = EOS
  plain = np.asarray(run.rte(tokens, mask))
  moved_tokens, moved_mask = tokens.copy(), mask.copy()
  for b in ended:  # the same row, shifted right so that nothing follows its end
    shift = run.T - run.sequences.response_mask[b].sum()
    moved_tokens[b], moved_mask[b] = np.roll(tokens[b], shift), np.roll(mask[b], shift)
  assert moved_mask[ended, -1].all()
  np.testing.assert_allclose(run.rte(moved_tokens, moved_mask)[ended], plain[ended], atol=1e-4)
  early_mask, swapped = mask.copy(), tokens.copy()
  last = mask.shape[1] - 1 - mask[:, ::-1].argmax(1)
  early_mask[ended, last[ended]], swapped[ended, last[ended]] = False, 50
  assert (np.abs(run.rte(tokens, early_mask)[ended] - plain[ended]).max(1) > 1e-2).all()
  assert (np.abs(run.rte(swapped, mask)[ended] - plain[ended]).max(1) > 1e-2).all()


@pytest.mark.parametrize(
  "how, want", [("none", [4.0, -2.0]), ("subtract", [4.0, -3.5]), ("replace", [4.0, -1.5])]
)
def test_missing_end(how, want):
  settings = default.get_config().shaping
  settings.update(missing_eos=how, missing_eos_penalty=1.5)
  scores, has_eos = jnp.array([4.0, -2.0]), jnp.array([True, False])
  np.testing.assert_allclose(shape_scores(scores, jnp.array([3, 8]), has_eos, settings), want)
  settings.length_penalty = 0.1
  want = np.array(want) - 0.1 * np.array([3, 8])
  np.testing.assert_allclose(
    shape_scores(scores, jnp.array([3, 8]), has_eos, settings), want, rtol=1e-6
  )


def test_lengths_are_tokens(run, capsys):
  """A row's limits, the length penalty and the length reported: all in tokens, including the ending
  token.
  """
  config = default.get_config()
  config.data.update(max_prompt_length=3, max_response_length=4)
  ids = [([1, 2, 3], [4] * 4), ([1] * 4, [4]), ([1], [4] * 5), ([1], [4] * 3)]
  rows = [{"prompt": "a very long word" * 9}, {"prompt": "a"}, {"prompt": "b"}, {"prompt": "c"}]
  assert select(config, rows, ids, "a test") == [0, 3]
  shown = capsys.readouterr().out
  assert "1 dropped: prompt over 3 tokens" in shown and "1 dropped: response over 4 tokens" in shown
  assert run.sequences.response_mask.shape[1] == run.config.rollout.max_new_tokens
  np.testing.assert_allclose(
    run.out.metrics["length"], run.sequences.response_mask.sum(1).mean(), rtol=1e-6
  )


# ---- advantages ----


@pytest.mark.parametrize("algorithm", ["rloo", "grpo", "reinforce++", "ppo"])
def test_tied_groups(algorithm):
  """All scores of a group equal: advantage and gradient are zero, not NaN; a difference of 1e-6
  remains.
  """
  config = default.get_config()
  config.algorithm, config.rollout.group_size = algorithm, 3
  mask = jnp.ones((6, 2), bool)
  zero = jnp.zeros(mask.shape)
  make = jax.jit(
    lambda scores: make_advantages(config)(scores, zero, mask, 0.0, values=zero).advantages
  )
  tied = jnp.array([0.1, 0.1, 0.1, 7.3, 7.3, 7.3])
  found, pull = make(tied), jax.jit(jax.grad(lambda s: (make(s) ** 2).sum()))(tied)
  assert np.isfinite(found).all() and np.isfinite(pull).all()
  if algorithm in ("rloo", "grpo"):
    np.testing.assert_array_equal(found, 0)
    near = tied + jnp.array([1e-6, 0, 0, 0, 0, 0])
    assert np.abs(make(near)).max() <= 1e-6 / np.sqrt(config.ppo.advantage_eps) * 1.5
  else:
    np.testing.assert_allclose(
      make(jnp.full(6, 0.1)), 0 if algorithm == "reinforce++" else 0.1, atol=0.02
    )


def test_a_group_of_one_is_refused():
  config = default.get_config()
  config.rollout.group_size = 1
  with pytest.raises(ConfigError, match="config.rollout.group_size is 1"):
    check_config(config)


def test_rewards_are_clipped_before_the_baseline(run):
  """Scores far above the clip are all clipped to it, so their group ties except for the missing
  ends. If they were clipped after the baseline, their differences would remain.
  """
  head, frozen = (
    jax.tree.map(jnp.copy, x) for x in (run.start.reward_head, run.start.reward_frozen)
  )
  head["phi"]["bias"][...] = head["phi"]["bias"][...] + 1000.0
  _, out = run.step(run.start.replace(reward_head=head, reward_frozen=frozen), run.sequences)
  assert out.judged.scores.min() > 900 and out.judged.scores.std() > 0.1
  K, length = run.config.rollout.group_size, run.sequences.response_mask.sum(1)
  groups = np.where(run.sequences.has_eos, CLIP, CLIP - PENALTY).reshape(-1, K)
  adv = ((groups - groups.mean(1, keepdims=True)) * K / (K - 1)).reshape(-1)
  np.testing.assert_allclose(
    out.metrics["policy/first_loss"], -(adv * length).sum() / length.sum(), atol=1e-5
  )


def test_whitening_leaves_padding_out():
  x = np.random.default_rng(0).normal(3, 2, size=(4, 6))
  mask = np.arange(6) < np.array([6, 1, 3, 2])[:, None]
  found = np.asarray(ops.masked_whiten(jnp.asarray(np.where(mask, x, 1e4)), jnp.asarray(mask)))
  np.testing.assert_allclose(found[mask], (x[mask] - x[mask].mean()) / x[mask].std(), atol=1e-5)
  np.testing.assert_array_equal(found[~mask], 0)


# ---- losses ----


def batch_of(lengths, columns=6, seed=0):
  """A made-up minibatch of rows of these lengths: new log-probabilities and the experience."""
  rng = np.random.default_rng(seed)
  old = -rng.exponential(size=(len(lengths), columns)).astype(np.float32)
  mask = np.arange(columns) < np.asarray(lengths)[:, None]
  adv = np.where(mask, rng.normal(size=(len(lengths), 1)), 0).astype(np.float32)
  sequences = Sequences(
    tokens=mask.astype(np.int32), token_mask=mask, response_mask=mask, has_eos=mask[:, -1]
  )
  batch = Experience(sequences, old, old + 0.3, mask.astype(np.float32), adv)
  return (old + 0.1 * rng.normal(size=old.shape)).astype(np.float32), batch


def loss_of(config, new, batch, beta=0.1):
  return make_objective(config, 100_000)(
    TokenStats(new, jnp.zeros_like(new), jnp.zeros_like(new)), batch, beta
  )[0]


def test_token_mean_counts_tokens_of_all_devices():
  """Eight devices, one long or short row each: the sum over all tokens divided by their number, and
  not a mean of means.
  """
  config = default.get_config()
  config.ppo.aggregation = "token_mean"
  new, batch = batch_of([6, 1, 1, 1, 5, 1, 2, 1])
  mesh = Mesh(np.array(jax.devices()[:8]), ("data",))

  def split(x):
    return jax.device_put(x, NamedSharding(mesh, PartitionSpec("data")))

  both = jax.jit(jax.value_and_grad(lambda new, batch: loss_of(config, new, batch)))
  loss, gradient = both(split(new), jax.tree.map(split, batch))
  value, want = both(new, batch)
  np.testing.assert_allclose(loss, value, rtol=1e-6)
  np.testing.assert_allclose(gradient, want, rtol=1e-5, atol=1e-8)
  rows = [both(*jax.tree.map(lambda x: x[i : i + 1], (new, batch)))[0] for i in range(8)]
  lengths = batch.sequences.response_mask.sum(1)
  np.testing.assert_allclose(loss, (np.array(rows) * lengths).sum() / lengths.sum(), rtol=1e-5)
  assert abs(np.mean(rows) - loss) > 1e-2


@pytest.mark.parametrize("how", ops.AGGREGATIONS)
def test_aggregations_are_what_they_say(how):
  """By hand for a row of 4 tokens and one of 1; the same batch twice has the same loss."""
  x = jnp.array([[1.0, 2.0, 3.0, 4.0], [10.0, 99.0, 99.0, 99.0]])
  mask = jnp.array([[True] * 4, [True] + [False] * 3])
  want = {
    "sequence_sum": (10 + 10) / 2,
    "sequence_mean": (2.5 + 10) / 2,
    "token_mean": 20 / 5,
    "constant": 20 / 8,
  }[how]
  np.testing.assert_allclose(ops.aggregate(x, mask, how), want)
  np.testing.assert_allclose(ops.aggregate(jnp.tile(x, (2, 1)), jnp.tile(mask, (2, 1)), how), want)


def test_rloo_is_over_whole_responses():
  """By default every token of a response has the whole advantage, for any length of the
  response.
  """
  config = default.get_config()
  assert config.algorithm == "rloo"
  _, batch = batch_of([6, 1, 3, 2])
  gradient = jax.jit(jax.grad(lambda new: loss_of(config, new, batch, 0.0)))(batch.old_logprobs)
  np.testing.assert_allclose(gradient, -batch.advantages / 4, atol=1e-7)


def test_the_second_epoch_is_off_policy(run):
  """In every epoch the old log-probabilities are those of the policy that drew the samples, so the
  ratio changes and the clip has an effect. The mean over both epochs is not the first.
  """
  assert run.config.ppo.epochs == 2
  metrics = run.out.metrics
  assert metrics["policy/first_ratio_deviation"] <= 2e-5 and metrics["policy/ratio_deviation"] > 0.1
  assert metrics["policy/clip_fraction"] > 0.1
  assert abs(metrics["policy/loss"] - metrics["policy/first_loss"]) > 1e-3


@functools.partial(jax.jit, static_argnames="dual_clip")
def loss_and_gradient(new, advantages, dual_clip):
  mask = jnp.ones(new.shape, bool)
  settings = dict(clip_eps=0.2, aggregation="token_mean", dual_clip=dual_clip)

  def loss(new):
    return losses.ppo_clip(new, jnp.zeros_like(new), advantages, mask, **settings)[0]

  return jax.value_and_grad(loss)(new)


def clipped_loss(ratio, advantage, dual_clip=0.0):
  """(loss, gradient) of one token."""
  loss, gradient = loss_and_gradient(
    np.log(np.full((1, 1), ratio, np.float32)), np.full((1, 1), advantage), dual_clip
  )
  return float(loss), float(gradient[0, 0])


@pytest.mark.parametrize(
  "ratio, advantage, loss, gradient",
  [
    (1.5, 1.0, -1.2, 0.0),
    (0.5, 1.0, -0.5, -0.5),
    (1.5, -1.0, 1.5, 1.5),
    (0.5, -1.0, 0.8, 0.0),
    (1.0, -1.0, 1.0, 1.0),
  ],
)
def test_the_clip_is_pessimistic(ratio, advantage, loss, gradient):
  """The larger of the two losses: for a negative advantage the loss is not bounded if the ratio has
  grown.
  """
  np.testing.assert_allclose(clipped_loss(ratio, advantage), (loss, gradient), atol=1e-6)


def test_no_dual_clip_unless_asked():
  assert default.get_config().ppo.dual_clip == 0
  np.testing.assert_allclose(clipped_loss(20.0, -1.0), (20.0, 20.0), rtol=1e-5)
  np.testing.assert_allclose(clipped_loss(20.0, -1.0, dual_clip=3.0), (3.0, 0.0), rtol=1e-5)
  np.testing.assert_allclose(clipped_loss(20.0, 1.0, dual_clip=3.0), (-1.2, 0.0), rtol=1e-5)


# ---- the reward model's input ----

ASK, ANSWER = "What is the sea?", "It is blue."


@pytest.fixture(scope="module")
def renderers(tmp_path_factory):
  made = {}
  for kind in tiny_text.KINDS:
    folder = tmp_path_factory.mktemp(kind)
    tiny_text.tokenizer(kind, folder)
    made[kind] = Renderer(load_tokenizer(folder))
  return made


@pytest.mark.parametrize("kind", tiny_text.KINDS)
def test_one_rendering_for_training_and_rl(kind, renderers):
  """Compares the training rows of the reward model with its input in RL for the same response."""
  renderer = renderers[kind]
  tokenizer = renderer.tokenizer
  rows = [{"prompt": ASK, "chosen": ANSWER, "rejected": "The cat ran."}]
  _, ((trained, _),) = pair_ids(default.get_config(), renderer, rows, "a test")

  said = [*tokenizer.encode(ANSWER, special=False), tokenizer.eos_ids[-1]]
  mask = np.ones((1, len(said)), bool)
  sequences = Sequences(
    np.array([[1, *said]]), np.ones((1, len(said) + 1), bool), mask, np.array([True])
  )
  ((text, truncated),) = responses_of(sequences, tokenizer)
  tokens, asked = renderer.batch([(ASK, text, truncated)])
  assert tokens[0][asked[0]].tolist() == trained
  if tokenizer.has_template:
    assert tokenizer.end_id in trained[-2:]


@pytest.mark.parametrize("kind", tiny_text.KINDS)
def test_a_long_reply_is_read_as_cut_off(kind, renderers):
  """With reward.max_reply_length a long reply is read as RL reads a response cut off there; a short
  one is complete.
  """
  renderer = dataclasses.replace(renderers[kind], max_length=24)
  tokenizer, cfg = renderer.tokenizer, default.get_config()
  cfg.data.max_prompt_length, cfg.data.max_response_length, cfg.data.max_chosen_length = (
    1,
    1,
    1,
  )  # every row exceeds them
  long, short = " ".join([ANSWER] * 3), "The cat"
  said = tokenizer.encode(long, special=False)
  cfg.reward.max_reply_length, cfg.reward.max_length = limit, most = len(said) // 2, 24
  assert len(tokenizer.encode(short, special=False)) <= limit < most
  rows = [
    {"prompt": ASK, "chosen": long, "rejected": short},
    {"prompt": ASK * 9, "chosen": short, "rejected": long},
  ]
  kept, ((cut, whole), (far, _)) = pair_ids(cfg, renderer, rows, "a test")
  assert len(kept) == 2 and [side["truncated"] for row in kept for side in row["sides"]] == [
    True,
    False,
    False,
    True,
  ]

  mask, token_mask = np.ones((1, limit), bool), np.ones((1, limit + 1), bool)
  sequences = Sequences(np.array([[1, *said[:limit]]]), token_mask, mask, np.array([False]))
  tokens, asked = renderer.batch([(ASK, *responses_of(sequences, tokenizer)[0])])
  assert tokens[0][asked[0]].tolist() == cut
  assert (
    whole == renderer.ids(ASK, short)
    and len(far) == most
    and far[-8:] == renderer.ids(ASK, short)[-8:]
  )


@pytest.mark.parametrize("kind", [kind for kind in tiny_text.KINDS if kind != "plain"])
def test_truncated_answers_look_truncated(kind, renderers):
  renderer = renderers[kind]
  tokenizer = renderer.tokenizer
  said = tokenizer.encode(ANSWER, special=False)
  mask = np.ones((1, len(said)), bool)
  sequences = Sequences(
    np.array([[1, *said]]), np.ones((1, len(said) + 1), bool), mask, np.array([False])
  )
  ((text, truncated),) = responses_of(sequences, tokenizer)
  cut, done = renderer.ids(ASK, text, truncated=truncated), renderer.ids(ASK, text)
  assert truncated and text == ANSWER
  assert done[: len(cut)] == cut and tokenizer.end_id in done[len(cut) :]
  assert cut[-len(said) :] == said  # the last token of the answer is the last that is read


@pytest.mark.parametrize("kind", tiny_text.KINDS)
def test_no_double_bos(kind, renderers):
  tokenizer = renderers[kind].tokenizer
  bos = tokenizer.hf.bos_token_id
  asked = [renderers[kind].ids(ASK, ANSWER, truncated=truncated) for truncated in (False, True)]
  for ids in (*asked, tokenizer.render(ASK)):
    assert ids.count(bos) == (bos is not None)
  if bos is not None:
    with pytest.raises(TextError, match="doubled BOS"):
      tokenizer.render(tokenizer.hf.bos_token + ASK)


@pytest.mark.parametrize("kind", tiny_text.KINDS)
def test_long_inputs_keep_their_end(kind, renderers):
  whole = renderers[kind].ids(ASK, ANSWER)
  short = Renderer(renderers[kind].tokenizer, max_length=6)
  assert short.ids(ASK, ANSWER) == whole[-6:]
  tokens, mask = short.batch([(ASK, ANSWER, False), (ASK, "No.", False)])
  np.testing.assert_array_equal(tokens[0][mask[0]], whole[-6:])
  assert mask[:, -1].all()  # the last column is read, and it is real in every row


def test_scores_are_not_cast_to_integers(run):
  """0.73 stays 0.73 on its way to the last token, next to integer ids; integer scores are
  refused, not used.
  """
  config = default.get_config()
  config.algorithm, config.critic.lam = "ppo", 1.0
  mask = jnp.array([[True, True, True], [True, False, False]])
  made = make_advantages(config)(
    jnp.array([0.73, -1.9]), jnp.zeros((2, 3)), mask, 0.0, values=jnp.zeros((2, 3))
  )
  np.testing.assert_allclose(made.advantages, [[0.73] * 3, [-1.9, 0, 0]], rtol=1e-6)
  np.testing.assert_allclose(made.returns, [[0.73] * 3, [-1.9, 0, 0]], rtol=1e-6)
  for f in (lambda s: advantages.rloo(s, 2), lambda s: advantages.grpo(s, 2, eps=1e-4)):
    with pytest.raises(TypeError, match="expected a floating array"):
      f(jnp.array([1, 2]))
  assert run.out.judged.scores.dtype == np.float32
  assert (run.out.judged.scores != np.round(run.out.judged.scores)).all()


# ---- sampling ----


def test_no_key_is_used_twice(run):
  """The same prompts and weights at another step or with another seed, and the samples of one
  prompt: all differ. The same step again gives the same samples.
  """
  first = run.responses(run.sequences)
  K = run.config.rollout.group_size
  for group in first.reshape(-1, K, run.T):
    assert len(np.unique(group, axis=0)) > 1
  states = (
    run.start,
    run.start.replace(step=run.start.step + 1),
    run.start.replace(key=jax.random.key(1234)),
  )
  again, later, other = (run.responses(run.draw(state, PAD)) for state in states)
  np.testing.assert_array_equal(again, first)
  for drawn in (later, other):
    assert (drawn != first).any(1).mean() > 0.8


# ---- the table ----


def test_the_table_at_the_top_is_complete():
  named = [line.split()[0] for line in __doc__.splitlines() if line.startswith("  ")]
  assert sorted(named) == sorted(
    name.removeprefix("test_")
    for name in globals()
    if name.startswith("test_") and "the_table" not in name
  )
