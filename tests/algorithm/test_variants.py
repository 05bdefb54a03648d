"""Every variant and every estimator in the whole step, on one device and on eight: what each one
reads and changes.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import small

from configs import quickstart
from r2m_jax.algorithm import annotate, losses, schedules, update
from r2m_jax.algorithm.labels import pairs_at, pairs_per_step
from r2m_jax.algorithm.objective import shape_scores
from r2m_jax.algorithm.read import make_read
from r2m_jax.algorithm.variants import (
  FEEDBACK,
  VARIANTS,
  States,
  arm_of,
  feed_back,
  measured,
  other_rows,
  rescaled,
)
from r2m_jax.goldtask import rl
from r2m_jax.goldtask import task as goldtask
from r2m_jax.goldtask.labels import gold_labeller
from r2m_jax.ops import combine
from r2m_jax.parallel import sharding
from r2m_jax.run import checkpoint
from r2m_jax.step import averaged, jit_step, make_learn
from r2m_jax.types import Rollout, Sequences

STEPS = 3
ALGORITHMS = {
  "grpo": dict(
    algorithm="grpo", ppo__aggregation="sequence_mean", ppo__ratio="sequence", kl__estimator="k3"
  ),
  "reinforce++": dict(
    algorithm="reinforce++", kl__placement="reward", ppo__aggregation="token_mean"
  ),
  "remax": dict(
    algorithm="remax", kl__placement="reward", kl__estimator="exact", kl__controller="hold"
  ),
  "ppo": dict(
    algorithm="ppo", kl__placement="reward", ppo__minibatches=2, ppo__whiten_advantages=True
  ),
}
# one setting for each variant, estimators in turn, so that each pair of neighbours in the table is
# run somewhere
CASES = {
  "rloo-scaled": dict(variant="scaled"),
  "rloo-noise": dict(variant="noise"),
  "rloo-constant": dict(variant="constant"),
  "rloo-shuffled": dict(variant="shuffled"),
  "rloo-no_bt": dict(variant="no_bt", kl__controller="adaptive", kl__target=0.01),
  "rloo-matched_scale": dict(variant="matched_scale", r2m__attention_scale=8.0, r2m__lr=0.01),
  "rloo-renormed": dict(
    variant="renormed", kl__controller="held", kl__target=0.01, r2m__attention_scale=8.0
  ),
  "rloo-truncated": dict(
    variant="r2m", rollout__top_p=0.9, rollout__top_k=24, r2m__feedback_layer=0
  ),
  "grpo-r2m": dict(variant="r2m", **ALGORITHMS["grpo"]),
  "grpo-own_states": dict(variant="own_states", **ALGORITHMS["grpo"]),
  "reinforce++-r2m": dict(variant="r2m", **ALGORITHMS["reinforce++"]),
  "reinforce++-iterative_head": dict(variant="iterative_head", **ALGORITHMS["reinforce++"]),
  "reinforce++-r2m_untrained": dict(variant="r2m_untrained", **ALGORITHMS["reinforce++"]),
  "remax-r2m": dict(variant="r2m", **ALGORITHMS["remax"]),
  "remax-reference": dict(variant="reference", **ALGORITHMS["remax"]),
  "ppo-r2m": dict(variant="r2m", **ALGORITHMS["ppo"]),
  "ppo-no_gre": dict(variant="no_gre", critic__init="policy", **ALGORITHMS["ppo"]),
  "ppo-vanilla": dict(variant="vanilla", **ALGORITHMS["ppo"]),
  "rloo-ensemble": dict(
    variant="r2m",
    reward__ensemble=3,
    reward__combine="mean_minus_variance",
    r2m__average=0.5,
    r2m__omega_schedule="kl",
  ),
}


def flat(tree):
  return [np.asarray(x) for x in jax.tree.leaves(tree)]


def same(a, b):
  return all(map(np.array_equal, flat(a), flat(b)))


# one case of each estimator, and cases that sum in a different order
ON_EIGHT_IN_FLOAT32 = {
  "rloo-noise",
  "grpo-r2m",
  "reinforce++-r2m",
  "remax-r2m",
  "remax-reference",
  "ppo-r2m",
  "rloo-ensemble",
}


# each differs from a remaining case only in the values of an array, or is a part of one; a minute and
# a half in total. test_an_arm_in_the_shared_program_is_the_variant_in_its_own runs the first two
# variants on one device
LONG = {
  "rloo-scaled",
  "reinforce++-r2m_untrained",
  "rloo-constant",
  "rloo-shuffled",
  "rloo-no_bt",
  "rloo-matched_scale",
  "grpo-own_states",
  "reinforce++-iterative_head",
  "ppo-no_gre",
  "ppo-vanilla",
}


def marks(name):
  numerics = name in ("remax-r2m", "remax-reference", "ppo-r2m")
  return [pytest.mark.numerics] * numerics + [pytest.mark.long] * (name in LONG)


@pytest.mark.parametrize("name", [pytest.param(name, marks=marks(name)) for name in CASES])
def test_three_steps_on_one_device_and_on_eight(name):
  """They are equal in float64. In float32 one device stays near float64 and, for one case of each
  estimator, so do eight.
  """
  cfg, wide = (small.config(**CASES[name], **dtype) for dtype in (small.FLOAT32, small.FLOAT64))
  with jax.enable_x64(True):
    exact, end = small.run(wide, STEPS)
    eight, end_of_eight = small.run(wide, STEPS, (2, 2, 2))
    _, fresh = small.start(wide)
    assert exact[0].metrics["policy/old_ref_deviation"] == 0
    assert exact[0].metrics["policy/first_ratio_deviation"] < 1e-12
    assert not same(end.policy, fresh.policy)
    variant = VARIANTS[CASES[name]["variant"]]
    assert same(end.reward_head, fresh.reward_head) != variant.trained
    assert same(end.reward_backbone, fresh.reward_backbone) and same(end.ref, fresh.ref)
    if end.critic is not None:
      assert not same(end.critic["backbone"], fresh.critic["backbone"])
    small.same_tokens(eight, exact)
    small.equal_in_float64(small.metrics_of(eight), small.metrics_of(exact))
    small.equal_in_float64(*map(parameters, (end_of_eight, end)))
  one, _ = small.run(cfg, STEPS)
  assert one[0].metrics["policy/old_ref_deviation"] == 0
  assert one[0].metrics["policy/first_ratio_deviation"] < 2e-5
  small.same_tokens(one, exact)
  low = small.metrics_of(one)
  if name in ON_EIGHT_IN_FLOAT32:
    eight, _ = small.run(cfg, STEPS, (2, 2, 2))
    small.same_tokens(eight, exact)
    small.as_good_in_float32(small.metrics_of(eight), low, small.metrics_of(exact))


def parameters(state):
  """{name: array} of all parameters that a step trains."""
  leaves, _ = jax.tree_util.tree_flatten_with_path([state.policy, state.reward_head, state.critic])
  return {sharding.path_name(path): np.asarray(x) for path, x in leaves}


SHAREABLE = {name: arm for name in VARIANTS if (arm := arm_of(name)) is not None}


@functools.cache
def shared_step():
  """(config, step) of the single program for all `SHAREABLE` variants."""
  cfg = small.config(variant="r2m", **small.FLOAT64)
  built, state = small.start(cfg)
  layout = sharding.shardings(state, built.mesh)
  return cfg, jit_step(rl.make_arm_step(built.defs, cfg, built.mesh), layout, 2)


def group_stds(scores, K):
  """The standard deviation (1/K) of each group of f64[B], by a loop."""
  found = []
  for i in range(0, len(scores), K):
    group = [float(x) for x in scores[i : i + K]]
    mean = sum(group) / K
    found.append((sum((x - mean) ** 2 for x in group) / K) ** 0.5)
  return found


@pytest.mark.parametrize("greedy", [0, 3])
def test_a_direction_at_the_scale_of_the_other(greedy):
  """Against a loop in float64. Greedy rows come after the samples and do not enter the scale."""
  rng, K, rows = np.random.default_rng(0), 4, 12
  head, frozen = rng.normal(size=(2, rows + greedy)) * [[3.0], [0.5]] + 1
  s = sum(group_stds(head[:rows], K)) / sum(group_stds(frozen[:rows], K))
  with jax.enable_x64(True):
    found = {
      kind: np.asarray(rescaled(kind, jnp.asarray(head), jnp.asarray(frozen), rows, K))
      for kind in ("", "frozen", "head")
    }
    tied = rescaled("head", jnp.asarray(head), jnp.ones(rows + greedy), rows, K)
  np.testing.assert_array_equal(found[""], head)
  np.testing.assert_allclose(found["frozen"], frozen * s, rtol=1e-12)
  np.testing.assert_allclose(found["head"], head / s, rtol=1e-12)
  np.testing.assert_array_equal(tied, head)  # a frozen reward with ties has no scale


def test_scale_without_direction_and_direction_without_scale():
  """Both start like r2m. In the second step, from the same policy and the same head, one uses the
  frozen reward and the other r2m's reward, each at the scale of the other.
  """
  settings = dict(r2m__attention_scale=8.0, r2m__lr=0.01, **small.FLOAT64)
  with jax.enable_x64(True):
    runs = {
      name: small.run(small.config(variant=name, **settings), 2)[0]
      for name in ("r2m", "matched_scale", "renormed")
    }
  for outputs in runs.values():
    small.same_tokens(outputs, runs["r2m"])
  K, second = small.config().rollout.group_size, {name: run[1] for name, run in runs.items()}
  head, frozen = second["r2m"].judged.scores, second["r2m"].judged.scores_frozen
  s = sum(group_stds(head, K)) / sum(group_stds(frozen, K))
  assert abs(np.log(s)) > 1e-3 and abs(np.corrcoef(head, frozen)[0, 1]) < 0.9999
  close = dict(rtol=1e-9)
  np.testing.assert_allclose(second["matched_scale"].judged.scores, frozen * s, **close)
  np.testing.assert_allclose(second["renormed"].judged.scores, head / s, **close)
  used = second["matched_scale"].metrics["reward/used_std"]
  np.testing.assert_allclose(used, np.mean(group_stds(head, K)), **close)


def test_which_variants_share_a_program():
  assert set(SHAREABLE) == {
    "vanilla",
    "r2m",
    "r2m_untrained",
    "iterative_head",
    "pretrained_rm",
    "scaled",
    "warm_start",
  }
  for name in VARIANTS:
    config = quickstart.get_config()
    config.variant = name
    assert rl.program_of(config).variant == ("r2m" if name in SHAREABLE else name)
    config.r2m.labels = "preference"
    assert rl.program_of(config).variant == name


@pytest.mark.parametrize("name", ["vanilla", "scaled", "r2m", "iterative_head", "r2m_untrained"])
def test_an_arm_in_the_shared_program_is_the_variant_in_its_own(name):
  with jax.enable_x64(True):
    cfg, step = shared_step()
    _, state = small.start(cfg)
    own, wanted = small.run(small.config(variant=name, **small.FLOAT64), STEPS)
    outputs = []
    for t in range(STEPS):
      state, out = step(state, small.prompts(cfg, t), SHAREABLE[name])
      outputs.append(jax.device_get(out))
    small.same_tokens(outputs, own)
    metrics = {
      metric: x
      for metric, x in small.metrics_of(outputs).items()
      if measured(metric.split()[1], name)
    }
    small.equal_in_float64(metrics, small.metrics_of(own))
    assert step._cache_size() == 1  # in every arm
    small.equal_in_float64(*map(parameters, (state, wanted)))
    trained = not same(state.reward_head, small.start(cfg)[1].reward_head)
    assert trained == VARIANTS[name].trained


def test_every_variant_is_among_the_cases():
  """Fits before RL use the same program. test_gold.py runs them on one device and on eight."""
  covered = {case["variant"] for case in CASES.values()}
  assert {name for name in VARIANTS if not VARIANTS[name].start} <= covered
  assert {case.get("algorithm", "rloo") for case in CASES.values()} == set(ALGORITHMS) | {"rloo"}


@pytest.mark.long
@pytest.mark.parametrize("algorithm", ["rloo", *ALGORITHMS])
@pytest.mark.parametrize("variant", VARIANTS)
def test_every_estimator_with_every_variant(algorithm, variant):
  """The whole table of docs/variants.md. Fits before RL are tested in test_gold.py."""
  outputs, _ = small.run(small.config(variant=variant, **ALGORITHMS.get(algorithm, {})), STEPS)
  assert all(np.isfinite(value) for out in outputs for value in out.metrics.values())
  assert outputs[0].metrics["policy/old_ref_deviation"] == 0
  assert 0 < outputs[-1].metrics["policy/old_ref_deviation"] < 3  # the policy moved, but not far


def states(rows=6, length=5, size=4, seed=0):
  rng = np.random.default_rng(seed)
  mask = np.arange(length) < rng.integers(2, length + 1, (rows, 1))
  return States(
    jnp.asarray(3 + 2 * rng.standard_normal((rows, length, size)), jnp.float32), jnp.asarray(mask)
  )


def test_feedback_controls_read_what_they_say():
  policy, ref, own = (states(rows=400, seed=i) for i in range(3))

  def read(kind):
    return feed_back(kind, policy, ref, own, jax.random.key(0), others=np.roll(np.arange(400), 2))

  assert read("policy") is policy and read("reference") is ref and read("own_states") is own
  noise = read("noise")
  real = np.asarray(policy.mask)
  for moment in (np.mean, np.std):  # of each feature, over real tokens only
    found, want = (moment(np.asarray(x.hidden)[real], 0) for x in (noise, policy))
    np.testing.assert_allclose(found, want, atol=0.2)
  assert (
    abs(
      np.corrcoef(np.asarray(noise.hidden)[real][:, 0], np.asarray(policy.hidden)[real][:, 0])[0, 1]
    )
    < 0.1
  )
  assert np.ptp(np.asarray(read("constant").hidden)) == 0
  shuffled = read("shuffled")
  np.testing.assert_array_equal(shuffled.hidden[2:], policy.hidden[:-2])
  np.testing.assert_array_equal(
    shuffled.mask[2:], policy.mask[:-2]
  )  # each mask stays with its states


def test_states_know_where_the_response_begins(monkeypatch):
  """In annotation, in the update and over labelled pairs: the masks that a variant is given, against
  the lengths of the rows."""
  cfg = small.config(r2m__labels="preference", r2m__label_budget=0.25)
  built, state = small.start(cfg)
  rng, prompts, T = np.random.default_rng(0), small.prompts(cfg, 0), cfg.rollout.max_new_tokens
  K, P = cfg.rollout.group_size, prompts.tokens.shape[1]
  lengths = rng.integers(1, T + 1, K * len(prompts.tokens))
  response_mask = np.arange(T) < lengths[:, None]
  sequences = Sequences(
    tokens=np.concatenate(
      [np.repeat(prompts.tokens, K, 0), rng.integers(3, 64, response_mask.shape).astype(np.int32)],
      1,
    ),
    token_mask=np.concatenate([np.repeat(prompts.mask, K, 0), response_mask], 1),
    response_mask=response_mask,
    has_eos=lengths < T,
  )
  seen, original = [], feed_back

  def spy(kind, policy, ref, own, key, *, others):
    seen.append([x.response_mask for x in (policy, ref, own)])
    shuffled = original("shuffled", policy, ref, own, key, others=np.arange(len(policy.mask))[::-1])
    seen[-1].append(shuffled.response_mask[::-1])
    return original(kind, policy, ref, own, key, others=others)

  for module in (annotate, update):
    monkeypatch.setattr(module, "feed_back", spy)
  pairs = gold_labeller(cfg)(sequences, 0)
  learn = make_learn(built.defs, cfg, built.mesh)

  @jax.jit
  def given(state, sequences, pairs):
    learn(state, Rollout(sequences), None, pairs)
    return seen

  annotated, updated, labelled = given(state, sequences, pairs)
  want = np.zeros((len(lengths), P + T), bool)
  for row, length in zip(want, lengths):
    row[P : P + length] = True
  for masks in (annotated, updated):
    for mask in masks:
      np.testing.assert_array_equal(mask, want)
  row_of = {row.tobytes(): i for i, row in enumerate(sequences.tokens)}
  at = [row_of[row.tobytes()] for row in pairs.tokens]
  policy, ref, own, shuffled = labelled
  assert own is None  # the reward model has rows of its own
  for mask in (policy, ref, shuffled):
    np.testing.assert_array_equal(mask, want[at])


def test_no_trajectory_keeps_its_own_states_when_shuffled():
  """A shift by half the batch leads to another prompt, for any number of prompts from two up."""
  for prompts, K in ((2, 2), (2, 4), (3, 4), (5, 2), (5, 3)):
    prompt_of = np.concatenate(
      [np.repeat(np.arange(prompts), K), np.arange(prompts)]
    )  # samples, then greedy rows
    for rows in (prompts * K, prompts * (K + 1)):
      others = other_rows(rows, prompts * K)
      assert sorted(others) == list(range(rows)) and (prompt_of[others] != prompt_of[:rows]).all()


def test_budget_of_labels_is_spent_evenly():
  for budget, expected in ((0.005, 1), (0.02, 1), (0.08, 2), (0.5, 8)):
    cfg = small.config(r2m__label_budget=budget)  # 32 trajectories a step
    spent = [pairs_at(cfg, t) for t in range(1000)]
    assert pairs_per_step(cfg) == expected and max(spent) <= expected
    assert abs(2 * sum(spent) - budget * 32 * 1000) < 2
    assert max(abs(2 * sum(spent[:t]) - budget * 32 * t) for t in range(1000)) < 2


def test_gold_labels_order_pairs_by_gold():
  cfg = small.config(r2m__label_budget=0.5, r2m__labels="preference")
  outputs, _ = small.run(small.config(), 1)
  sequences = outputs[0].sequences
  pairs = gold_labeller(cfg)(sequences, 0)
  gold = {row.tobytes(): g for row, g in zip(sequences.tokens, goldtask.gold(sequences).gold)}
  winner, loser = np.split(np.array([gold[row.tobytes()] for row in pairs.tokens]), 2)
  assert (
    (winner >= loser).all() and (pairs.weight == (winner > loser)).all() and pairs.weight.sum() > 3
  )
  prompt = pairs.tokens[:, : goldtask.PROMPT_LENGTH]
  assert np.array_equal(*np.split(prompt, 2))  # both of one prompt
  again = gold_labeller(cfg)(sequences, 0)
  assert np.array_equal(pairs.tokens, again.tokens)
  assert not np.array_equal(pairs.tokens, gold_labeller(cfg)(sequences, 1).tokens)


def test_labels_train_the_head_and_reversed_labels_train_it_the_other_way():
  """One SGD step on the BT loss of labelled pairs raises the winners over the losers. Swapped
  labels do the opposite.
  """
  sgd = dict(
    variant="no_gre",
    r2m__optimizer="sgd",
    r2m__lr=0.3,
    r2m__max_grad_norm=0.0,
    r2m__labels="preference",
  )
  cfg = small.config(r2m__label_budget=0.25, **sgd)
  label, moves, swap = gold_labeller(cfg), {}, False

  def labeller(sequences, step):
    pairs = label(sequences, step)

    def turn(x):
      return np.concatenate(np.split(x, 2)[::-1]) if swap else x

    return pairs.replace(
      **{
        name: turn(getattr(pairs, name))
        for name in ("tokens", "token_mask", "response_mask", "reward_tokens", "reward_mask")
      }
    )

  step = small.step_of(cfg, *small.start(cfg), labeller)
  for swap in (False, True):
    _, state = small.start(cfg)
    before = jax.device_get(state.reward_head)
    state, out = step(state, small.prompts(cfg, 0))
    moves[swap] = [
      np.asarray(b) - np.asarray(a) for a, b in zip(flat(before), flat(state.reward_head))
    ]
    assert np.isfinite(out.metrics["r2m/bt"])
  agree = sum((a * b).sum() for a, b in zip(*moves.values()))
  assert agree < 0


def test_labels_without_weight_change_nothing():
  cfg = small.config(variant="no_gre", r2m__labels="preference", r2m__label_budget=0.1)
  built, state = small.start(cfg)
  before = flat(state.reward_head)
  label = gold_labeller(cfg)

  def mute(*args):
    return (pairs := label(*args)).replace(weight=0 * pairs.weight)

  state, out = small.step_of(cfg, built, state, mute)(state, small.prompts(cfg, 0))
  assert all(map(np.array_equal, before, flat(state.reward_head))) and out.metrics["r2m/loss"] == 0


SHAPING = small.config().shaping


def shaped(scores, length=(3, 5, 2), has_eos=(True, False, True), **settings):
  shaping = SHAPING.copy_and_resolve_references()
  shaping.update(settings)
  return np.asarray(
    shape_scores(
      jnp.asarray(scores, jnp.float32), jnp.asarray(length), jnp.asarray(has_eos), shaping
    )
  )


def test_shaping_of_scores():
  scores = [1.0, 2.0, 6.0]
  np.testing.assert_array_equal(shaped(scores), scores)
  np.testing.assert_allclose(shaped(scores, centre=True), [-2, -1, 3])
  np.testing.assert_allclose(shaped(scores, clip=2.5), [1, 2, 2.5])
  np.testing.assert_allclose(
    shaped(scores, centre=True, clip=2.0), [-2, -1, 2]
  )  # centred before it is clipped
  np.testing.assert_allclose(
    shaped(scores, missing_eos="subtract", missing_eos_penalty=1.5), [1, 0.5, 6]
  )
  np.testing.assert_allclose(shaped(scores, missing_eos="replace"), [1, -1, 6])
  np.testing.assert_allclose(shaped(scores, length_penalty=0.1), [0.7, 1.5, 5.8], rtol=1e-6)


def test_ensembles_combine():
  scores = np.random.default_rng(0).standard_normal((7, 5))
  np.testing.assert_allclose(combine(scores), scores.mean(-1), rtol=1e-6)
  np.testing.assert_allclose(combine(scores, "min"), scores.min(-1), rtol=1e-6)
  np.testing.assert_allclose(
    combine(scores, "mean_minus_variance", 2.0),
    scores.mean(-1) - 2 * scores.var(-1),
    rtol=1e-5,
    atol=1e-6,
  )


def test_average_head_scores_and_the_raw_head_trains():
  cfg = small.config(r2m__average=0.75, r2m__lr=0.05)
  built, state = small.start(cfg)
  step, fresh = small.step_of(cfg, built, state), flat(state.reward_head)
  state, _ = step(state, small.prompts(cfg, 0))
  for start, raw, average in zip(fresh, flat(state.reward_head), flat(state.reward_average)):
    np.testing.assert_allclose(average, 0.75 * start + 0.25 * raw, rtol=1e-5, atol=1e-7)
  plain, _ = small.run(small.config(r2m__lr=0.05), 2)
  _, averaged = step(state, small.prompts(cfg, 1))
  assert not np.array_equal(plain[1].judged.scores, averaged.judged.scores)


@pytest.mark.parametrize("decay", [0.9, 0.99, 0.999, 0.9999])
def test_the_average_of_a_head_that_does_not_change_is_the_head(decay):
  """In float32, 0.9999 and 1 - 0.9999 add up to less than 1: a sum with these weights shrinks."""
  head = {"kernel": jnp.asarray(np.random.default_rng(0).standard_normal(100), jnp.float32)}

  @jax.jit
  def many(old):
    return jax.lax.fori_loop(0, 10_000, lambda _, old: averaged(old, head, decay), old)

  np.testing.assert_array_equal(many(head)["kernel"], head["kernel"])
  far = jax.tree.map(lambda x: x + 1, head)
  want = head["kernel"] + np.exp(10_000 * np.log(decay))
  np.testing.assert_allclose(many(far)["kernel"], want, atol=1e-3)


def test_omega_schedules():
  def at(u, kind):
    return float(schedules.omega(jnp.float32(u), 0.6, kind))

  np.testing.assert_allclose(
    [at(u, "linear") for u in (0, 0.25, 0.4, 1, 3)], [1, 0.75, 0.6, 0.6, 0.6], rtol=1e-6
  )
  assert {at(u, "constant") for u in (0.0, 0.5, 1.0)} == {at(1, "cosine")}
  assert at(0.2, "kl") == at(0.2, "cosine") and at(5.0, "kl") == np.float32(0.6)


def test_kl_controllers():
  def weight(kind, kl):
    return schedules.kl_weight(kind, jnp.float32(0.1), jnp.float32(kl), target=4.0, horizon=10)

  def step(kind, kl):
    return [float(x) for x in weight(kind, kl)]

  np.testing.assert_allclose(step("fixed", 40), [0.1, 0.1])
  np.testing.assert_allclose(step("hold", 2), [0.1, 0.1])
  np.testing.assert_allclose(step("hold", 8), [0.4, 0.1], rtol=1e-6)
  np.testing.assert_allclose(step("adaptive", 40), [0.1, 0.102], rtol=1e-6)
  np.testing.assert_allclose(step("adaptive", 3.6), [0.1, 0.099], rtol=1e-6)
  np.testing.assert_allclose(step("held", 40), [0.1, 0.1 * np.exp(0.1)], rtol=1e-6)
  np.testing.assert_allclose(step("held", 2), [0.1, 0.1 * np.exp(-0.05)], rtol=1e-6)


def test_held_follows_a_loop_over_any_kl():
  """Equal to NumPy for 60 steps of random KLs, many of which reach a bound of the step or of
  beta.
  """
  for start, kls, damping in ((2.0, 40.0, 0.0), (0.002, 0.1, 2.0), (0.3, 4.0, 0.5)):
    path = np.random.default_rng(0).gamma(2.0, kls / 2, 60)
    beta, want = jnp.float32(start), start
    for kl in path:
      used, beta = schedules.kl_weight(
        "held", beta, jnp.float32(kl), target=4.0, horizon=1, damping=damping
      )
      error = min(max(kl / 4.0 - 1, -1), 1)
      np.testing.assert_allclose(used, want * np.exp(damping * error), rtol=1e-5)
      want = min(max(np.exp(np.log(want) + 0.1 * error), 1e-3), 3.0)
    assert 1e-3 <= float(beta) <= 3.0


@pytest.mark.parametrize("start", [0.001, 0.08, 3.0])
def test_a_held_kl_comes_to_its_target_from_above_and_from_below(start):
  """The KL of this policy follows 0.2 / beta with a delay of some steps, like that of a trained
  policy.
  """
  beta, kl = jnp.float32(start), 0.0
  for _ in range(150):
    kl += 0.3 * (0.2 / float(beta) - kl)
    _, beta = schedules.kl_weight("held", beta, jnp.float32(kl), target=4.0, horizon=1)
  assert abs(kl / 4.0 - 1) < 0.05


def test_the_kl_of_a_small_task_is_held_and_a_restored_run_goes_the_same_way(tmp_path):
  """GRPO on random models. A run from a checkpoint in the middle ends with the same bits, including
  beta.
  """
  target, steps = 1.0, 120
  cfg = small.config(algorithm="grpo", kl__controller="held", kl__target=target, kl__beta=0.3)
  cfg.policy.lr, cfg.steps = 3e-3, steps
  built, state = small.start(cfg)
  step, kls = small.step_of(cfg, built, state), []
  kept = checkpoint.open_checkpoints(tmp_path)
  for t in range(steps):
    if t == steps // 2:
      checkpoint.save(kept, t, state)
      checkpoint.wait(kept)
    state, out = step(state, small.prompts(cfg, t))
    kls.append(float(out.metrics["kl"]))
  assert abs(np.mean(kls[-30:]) / target - 1) < 0.15  # 32 samples a step
  again = checkpoint.restore(kept, small.start(cfg)[1])
  for t in range(steps // 2, steps):
    again, _ = step(again, small.prompts(cfg, t))
  assert same(
    (again.policy, again.beta, again.reward_head), (state.policy, state.beta, state.reward_head)
  )


def test_weighted_bradley_terry():
  w, l, weight = np.random.default_rng(0).standard_normal((3, 5)).astype(np.float32)
  weight = np.abs(weight)
  want = (weight * np.log1p(np.exp(l - w))).sum() / weight.sum()
  np.testing.assert_allclose(losses.bradley_terry(w, l, weight), want, rtol=1e-5)
  np.testing.assert_allclose(
    losses.bradley_terry(w, l, np.full(5, 2.0)), losses.bradley_terry(w, l), rtol=1e-6
  )
  assert losses.bradley_terry(w, l, 0 * weight) == 0


@pytest.mark.parametrize(
  "variant, policy, reference",
  [
    ("r2m", True, False),
    ("noise", True, False),
    ("shuffled", True, False),
    ("vanilla", False, False),
    ("iterative_head", False, False),
    ("own_states", False, False),
    ("reference", False, True),
  ],
)
def test_states_that_nothing_reads_are_not_kept(variant, policy, reference):
  """They would be the largest arrays of a step, and plain RLOO does not need them."""
  cfg = small.config(variant=variant, kl__estimator="k2")
  built, state = small.start(cfg)
  rows, T = 4, cfg.rollout.max_new_tokens
  tokens, mask = jnp.zeros((rows, T + 3), jnp.int32), jnp.ones((rows, T + 3), bool)
  sequences = Sequences(tokens, mask, mask[:, -T:], mask[:, 0])
  models = built.defs.open_policy(state.policy, state.ref), built.defs.open_ref(state.ref)
  old, ref = jax.eval_shape(lambda: make_read(cfg)(*models, sequences))
  width = built.arch.hidden_size
  assert (old.hidden.shape[-1], ref.hidden.shape[-1]) == (width * policy, width * reference)
  assert old.last_hidden.shape[-1] == ref.last_hidden.shape[-1] == 0
  cfg.kl.estimator = "exact"
  assert jax.eval_shape(lambda: make_read(cfg)(*models, sequences))[1].last_hidden.shape == (
    rows,
    T,
    width,
  )


def test_a_kind_of_feedback_made_of_other_states_than_it_says_is_refused(monkeypatch):
  """Only the declared states are kept. The kind is refused by name when the step is traced."""
  monkeypatch.setitem(FEEDBACK, "noise", "reference")
  cfg = small.config(variant="noise")
  built, state = small.start(cfg)
  with pytest.raises(AssertionError, match="'noise' is made of the states of the reference"):
    jax.eval_shape(small.step_of(cfg, built, state), state, small.prompts(cfg, 0))
