"""One device against eight, and accumulated gradients against whole ones: tokens, losses, gradients
and updates are the same.

./launch/test.sh tests/parallel/test_mesh.py           the settings of COVER
./launch/test.sh -m long tests/parallel/test_mesh.py   all 90: every mesh of eight; 1, 2, 4 micro-batches, minibatches
"""

import dataclasses
import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import small

from r2m_jax.config import ConfigError, check_config
from r2m_jax.goldtask import task as goldtask
from r2m_jax.parallel import sharding
from r2m_jax.run import build
from r2m_jax.step import make_learn, make_rollout
from r2m_jax.types import Rollout

COUNTS = (1, 2, 4)
SHAPES = [
  (data, fsdp, 8 // (data * fsdp))
  for data in (1, 2, 4, 8)
  for fsdp in (1, 2, 4, 8)
  if 8 % (data * fsdp) == 0
]
# (mesh, micro-batches of a minibatch, minibatches of an epoch)
ALL = list(itertools.product(SHAPES, COUNTS, COUNTS))
COVER = [
  ((1, 1, 8), 1, 2),
  ((1, 2, 4), 1, 4),
  ((1, 4, 2), 4, 2),
  ((1, 8, 1), 2, 4),
  ((2, 1, 4), 2, 2),
  ((2, 2, 2), 2, 1),
  ((2, 4, 1), 1, 4),
  ((4, 1, 2), 1, 1),
  ((4, 2, 1), 2, 2),
  ((8, 1, 1), 4, 1),
  ((1, 4, 2), 2, 1),
  ((4, 1, 2), 4, 4),
]
# settings that also run in float32: every axis is split, and two of them run on one device
FLOAT32 = [((1, 1, 8), 1, 2), ((1, 4, 2), 2, 1), ((2, 2, 2), 2, 1)]
needs_eight = pytest.mark.skipif(jax.device_count() < 8, reason="needs eight devices")


def recorded(lr: float, updates: int) -> optax.GradientTransformation:
  """Plain gradient descent that records every gradient: state {"grads": [updates, ...] each,
  "count"}.
  """

  def init(params):
    grads = jax.tree.map(lambda p: jnp.zeros((updates, *p.shape), p.dtype), params)
    return {"grads": grads, "count": jnp.zeros((), jnp.int32)}

  def update(grads, state, params):
    del params
    kept = jax.tree.map(lambda all_, g: all_.at[state["count"]].set(g), state["grads"], grads)
    return jax.tree.map(lambda g: -lr * g, grads), {"grads": kept, "count": state["count"] + 1}

  return optax.GradientTransformation(init, update)


def config(accumulation, minibatches, **changes):
  changes = (
    dict(
      rollout__prompts=32, rollout__max_new_tokens=4, logits_chunk=64, policy__arch__num_layers=1
    )
    | changes
  )
  return small.config(ppo__accumulation=accumulation, ppo__minibatches=minibatches, **changes)


@functools.cache
def start(mesh, minibatches, algorithm="rloo", dtype="float64"):
  """(built, state) with recorded gradients; policy and reference differ, and omega is below 1.

  In float64 the state has the numbers of float32.
  """
  cfg = config(1, minibatches, algorithm=algorithm, dtype=dtype, param_dtype=dtype)
  built = build.build(cfg, sharding.make_mesh(mesh), vocab_size=goldtask.VOCAB_SIZE)
  updates, rate = cfg.ppo.epochs * minibatches, 0.1 if algorithm == "ppo" else 0.02
  critic = dict(critic_tx=recorded(0.1, updates)) if algorithm == "ppo" else {}
  txs = dict(policy_tx=recorded(rate, updates), reward_tx=recorded(30.0, 1), **critic)
  built = dataclasses.replace(built, defs=dataclasses.replace(built.defs, **txs))
  if dtype == "float64":
    with jax.enable_x64(False):
      _, state = start(mesh, minibatches, algorithm, "float32")
    return built, small.widened(state)
  policy, reward = small.models(cfg.policy.arch.to_json(), cfg.param_dtype, cfg.reward.ensemble)
  state = build.initial_state(cfg, built, policy, reward["backbone"], reward["phi"])
  layout = jax.tree.map(lambda x: x.sharding, state.ref)
  step = jax.device_put(jnp.int32(2), state.step.sharding)
  return built, state.replace(
    step=step, ref=jax.device_put(small.perturb(state.ref, 3, 0.05), layout)
  )


@functools.cache
def sampled(mesh, dtype="float64"):
  """Sequences of the first step, sampled on the mesh and copied to the host."""
  with jax.enable_x64(dtype == "float64"):
    built, state = start(mesh, 1, "rloo", dtype)
    cfg = config(1, 1, dtype=dtype, param_dtype=dtype)
    rollout = jax.jit(make_rollout(built.defs, cfg, built.mesh, (goldtask.EOS,), goldtask.PAD))
    return jax.device_get(rollout(state, small.prompts(cfg, 0, left_pad=2)).samples)


@functools.cache
def learned(mesh, accumulation, minibatches, algorithm="rloo", dtype="float64", **changes):
  """{name: array} of all results of a learning step on the samples of one device."""
  with jax.enable_x64(dtype == "float64"):
    cfg = config(
      accumulation, minibatches, algorithm=algorithm, dtype=dtype, param_dtype=dtype, **changes
    )
    built, state = start(mesh, minibatches, algorithm, dtype)
    layout = sharding.shardings(state, built.mesh)
    learn = make_learn(built.defs, cfg, built.mesh)
    learn = jax.jit(learn, in_shardings=(layout, None), out_shardings=(layout, None))
    after, out = learn(state, Rollout(sampled((1, 1, 1))))
    found = {
      "policy": after.policy_opt["grads"],
      "reward": after.reward_opt["grads"],
      "scores": out.judged.scores,
      "reward update": jax.tree.map(jnp.subtract, after.reward_head, state.reward_head),
      "critic": None if after.critic_opt is None else after.critic_opt["grads"],
    }
    assert {x.dtype for x in jax.tree.leaves(found)} == {jnp.dtype(dtype)}
    leaves, _ = jax.tree_util.tree_flatten_with_path(found)
    found = {sharding.path_name(path): np.asarray(x, np.float64) for path, x in leaves}
    return found | {f"metric {name}": np.asarray(x, np.float64) for name, x in out.metrics.items()}


def test_the_cover_covers():
  """COVER has every mesh, every pair of counts, and every count with each axis split and not
  split.
  """
  assert len(SHAPES) == 10 and len(ALL) == 90 and len(COVER) <= 12 and set(COVER) <= set(ALL)
  assert {mesh for mesh, *_ in COVER} == set(SHAPES)
  assert {setting[1:] for setting in COVER} == set(itertools.product(COUNTS, COUNTS))
  for axis, which in itertools.product(range(3), (1, 2)):

    def pairs(settings):
      return {(setting[0][axis] > 1, setting[which]) for setting in settings}

    assert pairs(COVER) == pairs(ALL)


def test_what_is_compared_moves():
  """The compared numbers are not zero, and every update has a different gradient."""
  found = learned((1, 1, 1), 1, 4)
  up = found["policy/layers/mlp/up/kernel"]
  apart = [np.linalg.norm(a - b) / np.linalg.norm(a) for a, b in itertools.combinations(up, 2)]
  assert len(up) == 8 and min(apart) > 1e-2
  for name, value in found.items():
    if name.startswith(("policy/", "reward")) and not name.endswith("phi/bias"):
      assert np.linalg.norm(value) > 1e-5, name
  assert found["metric policy/ratio_deviation"] > 1e-3


@needs_eight
@pytest.mark.parametrize(
  "mesh, accumulation, minibatches",
  [*COVER[:6], *(pytest.param(*x, marks=pytest.mark.long) for x in COVER[6:])],
)
def test_eight_devices_equal_one(mesh, accumulation, minibatches):
  np.testing.assert_array_equal(sampled(mesh).tokens, sampled((1, 1, 1)).tokens)
  small.equal_in_float64(
    learned(mesh, accumulation, minibatches), learned((1, 1, 1), accumulation, minibatches)
  )


@needs_eight
@pytest.mark.parametrize(
  "mesh, accumulation, minibatches",
  [FLOAT32[0], *(pytest.param(*x, marks=pytest.mark.numerics) for x in FLOAT32[1:])],
)
def test_eight_devices_are_as_good_as_one_in_float32(mesh, accumulation, minibatches):
  np.testing.assert_array_equal(sampled(mesh, "float32").tokens, sampled((1, 1, 1)).tokens)
  setting = accumulation, minibatches
  low, exact = learned((1, 1, 1), *setting, dtype="float32"), learned((1, 1, 1), *setting)
  small.as_good_in_float32(learned(mesh, *setting, dtype="float32"), low, exact)


@pytest.mark.long
@needs_eight
@pytest.mark.parametrize("mesh", SHAPES, ids=lambda mesh: "x".join(map(str, mesh)))
def test_eight_devices_equal_one_at_all_settings(mesh):
  np.testing.assert_array_equal(sampled(mesh).tokens, sampled((1, 1, 1)).tokens)
  for accumulation, minibatches in itertools.product(COUNTS, COUNTS):
    print(mesh, accumulation, minibatches, end=": ")
    small.equal_in_float64(
      learned(mesh, accumulation, minibatches), learned((1, 1, 1), accumulation, minibatches)
    )


@pytest.mark.parametrize(
  "accumulation, minibatches",
  # four micro-batches are the loop of two, longer: once among the ordinary tests
  [
    *((2, count) for count in COUNTS),
    (4, 2),
    *(pytest.param(4, count, marks=pytest.mark.long) for count in (1, 4)),
  ],
)
def test_accumulated_gradients_equal_whole_ones(accumulation, minibatches):
  small.equal_in_float64(
    learned((1, 1, 1), accumulation, minibatches), learned((1, 1, 1), 1, minibatches)
  )


def test_accumulated_gradients_are_as_good_as_whole_ones_in_float32():
  low, exact = learned((1, 1, 1), 1, 2, dtype="float32"), learned((1, 1, 1), 1, 2)
  small.as_good_in_float32(learned((1, 1, 1), 4, 2, dtype="float32"), low, exact)


def test_accumulation_with_a_critic_and_other_denominators():
  """Responses have different lengths, and some are excluded. A mean of micro-batches' means would
  differ.
  """
  changes = dict(ppo__aggregation="token_mean", ppo__ratio="sequence", shaping__mask_truncated=True)
  sequences = sampled((1, 1, 1))
  assert (
    not sequences.has_eos.all()
    and sequences.has_eos.any()
    and np.ptp(sequences.response_mask.sum(1)) > 0
  )
  whole = learned((1, 1, 1), 1, 2, "ppo", **changes)
  assert any(name.startswith("critic/") for name in whole)
  small.equal_in_float64(learned((1, 1, 1), 4, 2, "ppo", **changes), whole)


def test_uneven_batch_is_refused_before_any_device_work():
  cfg = small.config(rollout__prompts=6, mesh=(4, 1, 1))
  with pytest.raises(ConfigError, match=r"rollout\.prompts is 6.*such as 8"):
    check_config(cfg)


def test_fewer_devices_than_the_mesh_names_is_refused():
  with pytest.raises(ValueError, match=r"config\.mesh is \(64, 1, 1\)"):
    sharding.make_mesh((64, 1, 1), jax.devices())
