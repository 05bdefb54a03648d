"""Learning without padding: it gives the same numbers as padded rows, and the share is large
enough.
"""

import jax
import numpy as np
import pytest
import small

from r2m_jax.algorithm.packed import make_needed, smallest
from r2m_jax.goldtask import task as goldtask
from r2m_jax.parallel import sharding
from r2m_jax.step import make_learn, make_rollout
from r2m_jax.types import Rollout

SHARE = 0.8
SHARE_ON_EIGHT = 0.9  # a micro-batch has one or two rows of each device
MINIBATCHES = dict(rollout__group_size=4, ppo__minibatches=2, ppo__accumulation=2)
# every estimator, place of the KL and kind of feedback occurs once
CASES = {
  "rloo-r2m": dict(MINIBATCHES),
  "ppo-r2m": dict(algorithm="ppo", **MINIBATCHES),
  "grpo-reference": dict(algorithm="grpo", variant="reference", kl__estimator="k2"),
  "remax-rte": dict(algorithm="remax", kl__placement="reward", kl__estimator="exact"),
  "reinforce++-vanilla": dict(algorithm="reinforce++", variant="vanilla", rollout__top_k=5),
}


def shortened(rollout: Rollout, seed: int = 0) -> Rollout:
  """The same responses, most of them shortened: their mean length is half of the limit."""

  def cut(rows):
    T = rows.response_mask.shape[1]
    lengths = np.random.default_rng(seed).integers(1, T + 1, (len(rows.tokens), 1))
    mask = rows.response_mask & (np.arange(T) < lengths)
    tokens = np.concatenate([rows.token_mask[:, :-T], mask], 1)
    ended = rows.has_eos & (mask.sum(1) == rows.response_mask.sum(1))
    return rows.replace(response_mask=mask, token_mask=tokens, has_eos=ended)

  return jax.tree.map(cut, rollout, is_leaf=lambda x: hasattr(x, "has_eos"))


def start(cfg, mesh=(1, 1, 1)):
  """(built, state, a rollout of short responses)."""
  built, state = small.start(cfg, mesh)
  draw = make_rollout(built.defs, cfg, built.mesh, (goldtask.EOS,), goldtask.PAD)
  return built, state, shortened(jax.jit(draw)(state, small.prompts(cfg, 0, left_pad=3)))


def numbers(cfg, packing, built, state, rollout):
  """The changes and metrics of one step of learning, {name: array}."""
  cfg = cfg.copy_and_resolve_references()
  cfg.packing = packing
  state, out = jax.jit(make_learn(built.defs, cfg, built.mesh))(state, rollout)
  moved = {"policy": state.policy, "reward_head": state.reward_head, "critic": state.critic}
  leaves = jax.tree_util.tree_leaves_with_path(jax.device_get(moved))
  found = {sharding.path_name(path): np.asarray(x) for path, x in leaves}
  found |= small.metrics_of([jax.device_get(out)])
  assert found.pop("metric learn/computed", 1) == np.float32(min(packing))
  return found


@pytest.mark.numerics
@pytest.mark.parametrize("mesh", [(1, 1, 1), pytest.param((2, 2, 2), marks=pytest.mark.long)])
@pytest.mark.parametrize(
  "case",
  [name if name == "rloo-r2m" else pytest.param(name, marks=pytest.mark.long) for name in CASES],
)
def test_packed_learning_gives_the_numbers_of_padded_rows(case, mesh):
  changes = dict(CASES[case], ppo__epochs=1)
  with jax.enable_x64(True):
    cfg = small.config(**changes, **small.FLOAT64)
    begun = start(cfg, mesh)
    needed = sharding.on_mesh(begun[0].mesh, make_needed(begun[0].defs, cfg))
    share = SHARE if mesh == (1, 1, 1) else SHARE_ON_EIGHT
    assert float(jax.jit(needed)(*begun[1:])) <= share
    padded, packed = (numbers(cfg, packing, *begun) for packing in ((1.0,), (share, 1.0)))
  small.equal_in_float64(packed, padded)


def needed_by_hand(cfg, rollout: Rollout) -> float:
  """The share that the passes need, counted row by row for one device and one minibatch: prompts are
  dealt out to the micro-batches by the number of their tokens, there and back.
  """
  rows = jax.device_get(rollout.samples)
  K, T = cfg.rollout.group_size, rows.response_mask.shape[1]
  prompt = rows.tokens.shape[1] - T
  prompts = range(len(rows.tokens) // K)
  answers = [int(rows.response_mask[K * i : K * (i + 1)].sum()) for i in prompts]
  tokens = [answers[i] + int(rows.token_mask[K * i, :prompt].sum()) for i in prompts]
  parts = [[] for _ in range(cfg.ppo.accumulation)]
  for n, i in enumerate(sorted(prompts, key=lambda i: -tokens[i])):
    turn, place = divmod(n, len(parts))
    parts[-1 - place if turn % 2 else place].append(i)
  shares = []
  for part in parts:
    shares.append(sum(answers[i] for i in part) / (len(part) * K * T))
    shares.append(sum(tokens[i] for i in part) / (len(part) * (prompt + K * T)))
  return max(shares)


def test_the_share_is_that_of_the_fullest_part():
  cfg = small.config(rollout__prompts=8, rollout__group_size=4, ppo__accumulation=2)
  built, state, rollout = start(cfg)
  found = float(jax.jit(make_needed(built.defs, cfg))(state, rollout))
  np.testing.assert_allclose(found, needed_by_hand(cfg, rollout), rtol=1e-6)


@pytest.mark.parametrize(("need", "index"), [(0.1, 0), (0.3, 0), (0.31, 1), (0.9, 2), (1.0, 2)])
def test_the_smallest_share_that_holds_the_tokens_is_run(need, index):
  assert smallest((0.3, 0.5, 1.0), need) == index
