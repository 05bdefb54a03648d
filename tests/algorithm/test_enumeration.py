"""The expected gradient of every estimator against sums over all responses of a small policy
(tests/support/enumeration.py).

Estimators that are documented as unbiased are also compared with the gradient of the exact
objective. Everything is in float64.
"""

import functools
import itertools

import enumeration
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from enumeration import EOS, Sampling, Setting, Space
from scipy.stats import chi2

from configs import default
from r2m_jax import config as rules
from r2m_jax import ops
from r2m_jax.algorithm import advantages, losses
from r2m_jax.algorithm.objective import KL_OF_LOGPROBS, make_advantages, make_objective
from r2m_jax.config import ConfigError, check_config
from r2m_jax.models.generate import sample_token
from r2m_jax.models.logprobs import token_stats
from r2m_jax.ops import Truncation
from r2m_jax.types import Experience, Sequences

TOLERANCE = dict(rtol=0, atol=1e-9)  # rounding of float64 leaves about 1e-15
VOCAB, TAU = 3, 0.7
KLS = [
  ("loss", "k2"),
  ("loss", "k3"),
  ("loss", "exact"),
  ("reward", "k1"),
  ("reward", "k2"),
  ("reward", "k3"),
  ("reward", "exact"),
]
ALGORITHMS = [
  ("rloo", "group"),
  ("grpo", "group"),
  ("grpo", "batch"),
  ("grpo", "none"),
  ("reinforce++", "group"),
  ("remax", "group"),
  ("ppo", "group"),
]
ONE_PROMPT, TWO_PROMPTS = (
  Space(VOCAB, 3),
  Space(VOCAB, 2, prompts=2),
)  # 225 batches of 2 rows, 2,401 of 4


@pytest.fixture(autouse=True)
def float64():
  with jax.enable_x64(True):
    yield


def config_of(setting, sampling=Sampling(TAU)):
  config = default.get_config()
  config.algorithm = setting.algorithm
  config.rollout.update(group_size=2, **sampling._asdict())
  config.kl.update(placement=setting.placement, estimator=setting.estimator, beta=setting.beta)
  config.ppo.update(
    aggregation=setting.aggregation,
    advantage_norm=setting.norm,
    ratio=setting.ratio,
    clip_eps=setting.clip_eps,
    clip_eps_high=setting.clip_eps_high,
    dual_clip=setting.dual_clip,
    whiten_advantages=setting.whiten,
    advantage_eps=setting.advantage_eps,
  )
  config.critic.update(gamma=setting.gamma, lam=setting.lam)
  config.shaping.mask_truncated = setting.mask_truncated
  return config


def reader(space, tokens, states, sampling):
  """stats(logits, ref=None, support=None) of tokens [..., B, T] in states [..., B, T]: a table
  is a policy.
  """
  one_hot = jax.nn.one_hot(states, space.states, dtype=jnp.float64)
  truncation = Truncation(*sampling[1:])

  def stats(logits, ref=None, support=None):
    def head(table, hidden):
      return None if table is None else (lambda h: h @ table, hidden)

    def read(tokens, hidden):
      return token_stats(
        lambda h: h @ logits,
        hidden,
        tokens,
        temperature=sampling.temperature,
        truncation=truncation,
        ref=head(ref, hidden),
        support=head(support, hidden),
      )

    return jax.vmap(read)(tokens, one_hot)

  return stats


class Batches:
  """All batches of a space in the library's format, and the probability of each. Arrays have axes
  [N, B, ...].
  """

  def __init__(self, space, tables, sampling):
    def pick(x):
      return x[space.prompt[None], space.batches]

    self.space, self.tables = space, tables
    self.tokens, self.states = space.tokens[space.batches].astype(np.int32), pick(space.state)
    self.mask, self.has_eos = space.mask[space.batches], space.has_eos[space.batches]
    self.scores, self.values = (
      pick(tables.reward),
      np.where(self.mask, tables.values[self.states], 0),
    )
    self.stats = reader(space, self.tokens, self.states, sampling)
    self.old = self.stats(tables.old, ref=tables.ref)
    truncated = sampling[1:] != Sampling()[1:]
    self.ref = self.stats(tables.ref, support=tables.old if truncated else None)
    self.probability = np.exp(np.where(self.mask, self.old.logprobs, 0).sum((1, 2)))
    keep = enumeration.kept(tables.old, sampling)
    allowed = enumeration.token_logprobs(space, np.where(keep, 0.0, -np.inf)).sum(-1) == 0  # [P, Y]
    self.probability = np.where(
      pick(allowed).all(-1), self.probability, 0
    )  # whether a token is kept depends on its state
    self.greedy = np.array([self.greedy_score(p) for p in range(space.prompts)])

  def greedy_score(self, prompt):
    """The score of the response that has the most likely token in each state."""
    space, rows = self.space, np.arange(len(self.space.tokens))
    for t in range(space.length):
      best = int(self.tables.old[space.state[prompt, rows[0], t]].argmax())
      rows = rows[space.tokens[rows, t] == best]
      if best == EOS:
        break
    return self.tables.reward[prompt, rows[0]]

  def advantages(self, setting, sampling):
    """[N, B, T]"""
    config = config_of(setting, sampling)
    make = make_advantages(config)
    if setting.estimator == "exact":
      token_kl = self.old.kl
    else:
      token_kl = KL_OF_LOGPROBS[setting.estimator](self.old.logprobs, self.ref.logprobs)

    def row(scores, kl, mask, values):
      return make(
        scores, kl, mask, setting.beta, greedy_scores=jnp.asarray(self.greedy), values=values
      ).advantages

    return jax.vmap(row)(self.scores, token_kl, self.mask, self.values)

  def expected(self, setting, sampling):
    """(value, gradient) of the library's loss at the policy, averaged over all batches."""
    objective = make_objective(config_of(setting, sampling), self.space.vocab)
    adv = self.advantages(setting, sampling)

    def batch_loss(stats, old, ref, adv, tokens, mask, has_eos):
      sequences = Sequences(tokens=tokens, token_mask=mask, response_mask=mask, has_eos=has_eos)
      batch = Experience(
        sequences, old_logprobs=old, ref_logprobs=ref, ref_hidden=None, advantages=adv
      )
      return objective(stats, batch, setting.beta)[0]

    def loss(logits):
      stats = self.stats(logits, ref=self.tables.ref)
      each = jax.vmap(batch_loss)(
        stats, self.old.logprobs, self.ref.logprobs, adv, self.tokens, self.mask, self.has_eos
      )
      return (self.probability * each).sum()

    return jax.value_and_grad(loss)(jnp.asarray(self.tables.policy))


@functools.cache
def batches(space, sampling=Sampling(TAU), on_policy=True, seed=0):
  return Batches(space, space.random_tables(seed, on_policy), sampling)


def compare(space, setting, sampling=Sampling(TAU), on_policy=True):
  """The library's expected loss and gradient against the documented ones; returns tables and
  gradient.
  """
  check_config(config_of(setting, sampling))
  made = batches(space, sampling, on_policy)
  np.testing.assert_allclose(made.probability.sum(), 1, rtol=1e-12)
  value, gradient = made.expected(setting, sampling)
  documented_value, documented = enumeration.documented(space, made.tables, sampling, setting)
  np.testing.assert_allclose(gradient, documented, **TOLERANCE)
  np.testing.assert_allclose(value, documented_value, **TOLERANCE)
  assert np.abs(documented).max() > 1e-3
  return made.tables, np.asarray(gradient)


# ---- the oracle's own consistency ----


@pytest.mark.parametrize("space", [ONE_PROMPT, TWO_PROMPTS], ids=["one", "two"])
def test_the_oracles_true_gradient_is_that_of_its_objective(space):
  tables, sampling = space.random_tables(1), Sampling(TAU)
  exact = enumeration.true_gradient(space, tables, sampling, 0.3)
  np.testing.assert_allclose(enumeration.central(space, tables, sampling, 0.3), exact, atol=1e-9)
  log_p = enumeration.log_distribution(
    tables.policy, sampling, enumeration.kept(tables.policy, sampling)
  )
  np.testing.assert_allclose(enumeration.probabilities(space, log_p).sum(-1), 1, rtol=1e-12)


# ---- every estimator, every place and kind of KL, every aggregation ----


@pytest.mark.parametrize("how", ops.AGGREGATIONS)
@pytest.mark.parametrize("kl", KLS, ids="-".join)
@pytest.mark.parametrize("algorithm", ALGORITHMS, ids="-".join)
def test_expected_gradient_is_the_documented_one(algorithm, kl, how):
  name, norm = algorithm
  space = (
    TWO_PROMPTS if norm == "batch" else ONE_PROMPT
  )  # of one prompt, batch and group are the same
  compare(space, Setting(name, *kl, aggregation=how, norm=norm))


def test_nothing_that_is_allowed_is_left_out():
  """The lists above contain every value that the config accepts."""
  assert {name for name, _ in ALGORITHMS} == set(rules.ALGORITHMS)
  assert {norm for name, norm in ALGORITHMS if name == "grpo"} == set(advantages.NORMS)
  for placement, estimator in itertools.product(
    ("loss", "reward"), [e for e in rules.ESTIMATORS if e != "auto"]
  ):
    config = config_of(Setting(placement=placement, estimator=estimator))
    if (placement, estimator) in KLS:
      check_config(config)
    else:
      with pytest.raises(ConfigError, match="k1"):
        check_config(config)


@pytest.mark.parametrize("how", ["sequence_sum", "token_mean"])
@pytest.mark.parametrize("kl", [("loss", "k2"), ("reward", "exact")], ids="-".join)
@pytest.mark.parametrize("name", ["rloo", "reinforce++", "ppo"])
def test_with_the_ratio_of_whole_responses(name, kl, how):
  compare(ONE_PROMPT, Setting(name, *kl, aggregation=how, ratio="sequence"))


@pytest.mark.parametrize("algorithm", ALGORITHMS, ids="-".join)
def test_with_whitened_advantages(algorithm):
  space = TWO_PROMPTS if algorithm[1] == "batch" else ONE_PROMPT
  compare(space, Setting(algorithm[0], "reward", "k1", norm=algorithm[1], whiten=True))


@pytest.mark.parametrize("how", ops.AGGREGATIONS)
def test_with_responses_that_were_cut_off_left_out(how):
  compare(ONE_PROMPT, Setting("rloo", "loss", "k2", aggregation=how, mask_truncated=True))
  compare(
    ONE_PROMPT,
    Setting("rloo", "loss", "exact", aggregation=how, mask_truncated=True, ratio="sequence"),
  )


@pytest.mark.parametrize("ratio", losses.RATIOS)
@pytest.mark.parametrize(
  "clips", [(0.2, 0.0, 0.0), (0.1, 0.4, 0.0), (0.3, 0.0, 1.5)], ids=["same", "high", "dual"]
)
@pytest.mark.parametrize("name", ["rloo", "ppo"])
def test_after_the_policy_has_moved(name, clips, ratio):
  """Samples come from one policy and the gradient is that of another, so ratios lie on both sides
  of every clip.
  """
  low, high, dual = clips
  clipped = dict(clip_eps=low, clip_eps_high=high, dual_clip=dual, ratio=ratio)
  _, gradient = compare(ONE_PROMPT, Setting(name, "loss", "k2", **clipped), on_policy=False)
  free = enumeration.documented(
    ONE_PROMPT,
    batches(ONE_PROMPT, on_policy=False).tables,
    Sampling(TAU),
    Setting(name, "loss", "k2", **clipped | dict(clip_eps=0.99, clip_eps_high=1e3, dual_clip=0.0)),
  )[1]
  assert np.abs(gradient - free).max() > 1e-3


# ---- what is unbiased, and for what ----


@pytest.mark.parametrize("space", [ONE_PROMPT, TWO_PROMPTS], ids=["one", "two"])
@pytest.mark.parametrize(
  "name, estimator", [*itertools.product(["rloo", "remax", "ppo"], ["k1", "exact"]), ("grpo", "k1")]
)
def test_kl_in_the_reward_follows_the_kl_of_whole_responses(name, estimator, space):
  """grad(E[r] - beta KL). PPO with gamma = lambda = 1 agrees for any critic. Dr. GRPO agrees up to
  the factor (K - 1) / K, but not with the exact KL, because the factor applies to the advantage and
  not to the direct derivative.
  """
  setting = Setting(name, "reward", estimator, norm="none", gamma=1.0, lam=1.0)
  tables, gradient = compare(space, setting)
  share = 0.5 if name == "grpo" else 1
  truth = share * enumeration.central(space, tables, Sampling(TAU), setting.beta)
  np.testing.assert_allclose(-gradient, truth, **TOLERANCE)
  without = share * enumeration.true_gradient(space, tables, Sampling(TAU), 0.0)
  assert np.abs(truth - without).max() > 5e-3  # a missing KL would be noticed


@pytest.mark.parametrize("estimator", ["k2", "exact"])
@pytest.mark.parametrize("name", ["rloo", "remax"])
def test_kl_in_the_loss_holds_the_visited_states_fixed(name, estimator):
  """grad E[r] - beta E_s[grad KL(pi(.|s) || ref(.|s))]: it lacks the part of the gradient of the KL
  of whole responses that comes from the change of the visited states.
  """
  setting, sampling = Setting(name, "loss", estimator), Sampling(TAU)
  tables, gradient = compare(ONE_PROMPT, setting)
  np.testing.assert_allclose(
    -gradient, enumeration.held(ONE_PROMPT, tables, sampling, setting.beta), **TOLERANCE
  )
  assert (
    np.abs(gradient + enumeration.true_gradient(ONE_PROMPT, tables, sampling, setting.beta)).max()
    > 1e-2
  )


@pytest.mark.parametrize(
  "setting",
  [
    Setting("rloo", "loss", "k3"),
    Setting("rloo", "reward", "k2"),
    Setting("rloo", "reward", "k3"),
    Setting("grpo", "reward", "k1"),
    Setting("reinforce++", "reward", "k1"),
    Setting("ppo", "reward", "k1"),
  ],
  ids=lambda s: f"{s.algorithm}-{s.placement}-{s.estimator}",
)
def test_what_is_documented_as_biased_is(setting):
  """These follow neither objective. This shows that the tests above can fail."""
  tables, gradient = compare(ONE_PROMPT, setting)

  def follow(truth):
    return np.abs(gradient + truth).max()

  assert follow(enumeration.true_gradient(ONE_PROMPT, tables, Sampling(TAU), setting.beta)) > 3e-3
  assert follow(enumeration.held(ONE_PROMPT, tables, Sampling(TAU), setting.beta)) > 3e-3


def test_k1_in_the_loss_would_hold_nothing_back():
  """The reason why the config refuses it: its expected gradient is zero for any reference."""
  made = batches(ONE_PROMPT)

  def penalty(logits):
    k1 = losses.kl_k1(made.stats(logits).logprobs, made.ref.logprobs)
    return (made.probability * (made.mask * k1).sum((1, 2))).sum()

  np.testing.assert_allclose(jax.grad(penalty)(jnp.asarray(made.tables.policy)), 0, atol=1e-12)


# ---- truncated sampling ----

TRUNCATED = [
  Sampling(TAU),
  Sampling(1.6),
  Sampling(1.0, top_k=1),
  Sampling(1.0, top_k=3),
  Sampling(TAU, top_k=2),
  Sampling(1.0, top_p=0.3),
  Sampling(1.0, top_p=0.8),
  Sampling(1.6, top_p=0.9),
  Sampling(1.0, min_p=0.2),
  Sampling(TAU, min_p=0.05),
  Sampling(1.0, top_k=3, top_p=0.7),
  Sampling(1.3, top_k=4, min_p=0.25),
  Sampling(0.8, top_p=0.85, min_p=0.15),
  Sampling(1.3, top_k=4, top_p=0.9, min_p=0.2),
]
WIDE = Space(6, 2, group=1)


def label(s):
  return f"T{s.temperature}-k{s.top_k}-p{s.top_p}-m{s.min_p}"


def test_the_truncations_differ():
  logits = WIDE.random_tables(3).policy
  sets = {label(s): enumeration.kept(logits, s) for s in TRUNCATED}
  assert len({x.tobytes() for x in sets.values()}) >= 9
  assert all(keep.any(-1).all() for keep in sets.values())


@pytest.mark.parametrize("sampling", TRUNCATED, ids=label)
def test_truncated_probabilities_and_scores(sampling):
  """The probabilities of the kept tokens equal NumPy's, no other token is drawn, and E[grad log pi]
  = 0.
  """
  made = batches(WIDE, sampling, seed=3)
  tables, p = made.tables, made.probability
  keep = enumeration.kept(tables.policy, sampling)
  log_p = enumeration.log_distribution(tables.policy, sampling, keep)
  scaled = jnp.asarray(tables.policy / sampling.temperature)
  np.testing.assert_array_equal(ops.kept(scaled, Truncation(*sampling[1:])), keep)
  np.testing.assert_allclose(
    p, enumeration.probabilities(WIDE, log_p)[0][WIDE.batches[:, 0]], atol=1e-12
  )

  def score(logits, weight):
    return (weight * made.mask * made.stats(logits).logprobs).sum()

  grad = jax.grad(score)
  np.testing.assert_allclose(grad(jnp.asarray(tables.policy), p[:, None, None]), 0, atol=1e-12)
  one = int(p.argmax())  # and the gradients are not all zero
  if keep.sum(-1)[0] > 1:
    assert (
      np.abs(grad(jnp.asarray(tables.policy), (np.arange(len(p)) == one)[:, None, None])).max()
      > 1e-3
    )

  count = np.asarray(made.mask, float)
  entropy = -enumeration.times_log_ratio(np.exp(log_p), log_p, 0).sum(-1)
  kl, _ = enumeration.state_kl(tables.policy, tables.ref, sampling)
  np.testing.assert_allclose(
    (made.old.entropy * count)[p > 0], (entropy[made.states] * count)[p > 0], atol=1e-12
  )
  np.testing.assert_allclose(
    (made.old.kl * count)[p > 0], (kl[made.states] * count)[p > 0], atol=1e-12
  )


@pytest.mark.parametrize("sampling", TRUNCATED, ids=label)
def test_the_sampler_draws_the_kept_tokens_at_their_rates(sampling):
  logits = WIDE.random_tables(3).policy[0]
  keep = enumeration.kept(logits[None], sampling)
  p = np.exp(enumeration.log_distribution(logits[None], sampling, keep))[0]
  drawn = draw(jax.random.split(jax.random.key(0), 4096), jnp.asarray(logits), sampling)
  counts = np.bincount(drawn, minlength=WIDE.vocab)
  assert not counts[~keep[0]].any()
  expected = 4096 * p[keep[0]]
  statistic = ((counts[keep[0]] - expected) ** 2 / expected).sum()
  assert statistic <= chi2.ppf(0.9999, max(keep.sum() - 1, 1))


def draw(keys, logits, sampling):
  repeated = jnp.broadcast_to(logits, (len(keys), *logits.shape))
  return np.asarray(sample_token(keys, repeated / sampling.temperature, Truncation(*sampling[1:])))


@pytest.mark.parametrize(
  "sampling", [s for s in TRUNCATED if s.top_k != 1 and s.top_p != 0.3], ids=label
)
@pytest.mark.parametrize("kl", [("reward", "k1"), ("reward", "exact")], ids="-".join)
def test_rloo_follows_the_truncated_objective(kl, sampling):
  """Reward and KL are those of the sampling distribution. The reference is normalised over the same
  tokens.
  """
  space = Space(4, 2)
  tables, gradient = compare(space, Setting("rloo", *kl), sampling)
  np.testing.assert_allclose(
    -gradient, enumeration.true_gradient(space, tables, sampling, 0.3), **TOLERANCE
  )


def test_a_token_that_the_policy_would_drop_by_now_keeps_a_log_probability():
  """Because it was sampled, it counts as one more kept token for the policy and for the reference,
  and all numbers are finite.
  """
  sampling = Sampling(1.3, top_k=2)
  tables = WIDE.random_tables(4)
  stats = reader(WIDE, WIDE.tokens[:, None].astype(np.int32), WIDE.state[0][:, None], sampling)
  found = jax.tree.map(
    lambda x: np.asarray(x)[:, 0, 0], stats(tables.policy, ref=tables.ref)
  )  # of the first token
  of_ref = np.asarray(stats(tables.ref, support=tables.policy).logprobs)[:, 0, 0]
  keep = enumeration.kept(tables.policy[:1], sampling)[0]
  for y, token in enumerate(WIDE.tokens[:, 0]):
    wider = (keep | (np.arange(WIDE.vocab) == token))[None]
    log_p, log_q = (
      enumeration.log_distribution(x[:1], sampling, wider)[0] for x in (tables.policy, tables.ref)
    )
    np.testing.assert_allclose(found.logprobs[y], log_p[token], rtol=1e-12)
    np.testing.assert_allclose(of_ref[y], log_q[token], rtol=1e-12)
    np.testing.assert_allclose(
      found.kl[y], enumeration.times_log_ratio(np.exp(log_p), log_p, log_q).sum(), rtol=1e-9
    )
  assert keep.sum() == 2 and len(set(WIDE.tokens[:, 0])) == 6


def test_rounding_at_the_edge_of_top_p_moves_a_ratio_by_a_whole_token():
  """Programs that round differently may keep or drop the token at the edge. For this reason the
  checks at step 0 use the mean there.
  """
  logits = np.log([[0.5, 0.4, 0.1]])

  def stats(table):
    return token_stats(
      lambda h: h @ table,
      jnp.ones((1, 1, 1)),
      jnp.zeros((1, 1), jnp.int32),
      temperature=1.0,
      truncation=Truncation(top_p=0.9),
    )

  rounding = np.array([[1e-7, 0, -1e-7]])
  one, other = (stats(logits + sign * rounding).logprobs[0, 0] for sign in (1, -1))
  assert abs(np.exp(other - one) - 1) > 0.05  # caused by a rounding error of 1e-7


@pytest.mark.parametrize("kl", [("loss", "k2"), ("loss", "exact")], ids="-".join)
def test_kl_in_the_loss_of_a_truncated_policy(kl):
  space, sampling = Space(4, 2), Sampling(1.3, top_k=3, min_p=0.1)
  tables, gradient = compare(space, Setting("rloo", *kl), sampling)
  np.testing.assert_allclose(-gradient, enumeration.held(space, tables, sampling, 0.3), **TOLERANCE)
