"""Twenty pinned steps: loss, gradient norm, rewards and tokens. They may change only on purpose.

R2M_WRITE_GOLDEN=1 ./launch/test.sh tests/test_golden.py    # rewrites tests/golden/; give the reason in the commit
"""

import json
import os
import pathlib
import zlib

import jax
import numpy as np
import pytest
import small

from r2m_jax.goldtask import task as goldtask
from r2m_jax.parallel import sharding
from r2m_jax.run import build

pytestmark = pytest.mark.numerics

FOLDER = pathlib.Path(__file__).parent / "golden"
NAMES = (
  "policy/first_loss",
  "policy/loss",
  "policy/grad_norm",
  "reward/used",
  "reward/frozen",
  "kl",
  "entropy",
  "length",
)
CASES = {
  "r2m_rloo": {},
  "vanilla_grpo": dict(
    variant="vanilla", algorithm="grpo", ppo__minibatches=2, kl__estimator="k2", logits_chunk=200
  ),
}
STEPS, CONFIG = 20, small.config()


@pytest.mark.parametrize("case", CASES)
def test_trajectory_is_the_pinned_one(case):
  """In float64, in which processors agree. Float32 may differ from it as much as float64 with a
  start rounded to float32 does.

  Trajectories in float32 cannot be compared directly, because they depend on the processor. A start
  with a relative error of 2 ** -24, up or down at random, shows the effect of rounding.
  """
  cfg = small.config(steps=STEPS, **CASES[case])
  wide = small.config(steps=STEPS, **CASES[case], **small.FLOAT64)
  names = NAMES + (("r2m/loss", "r2m/bt", "r2m/gre") if case.startswith("r2m") else ())
  models = ("policy", "ref", "reward_backbone", "reward_frozen", "reward_head")
  with jax.enable_x64(True):
    built, first = start(wide)
    state, moved = (small.widened(start(wide)[1]) for _ in range(2))
    step = small.step_of(wide, built, state)
    exact = run(step, state)
    moved = run(
      step, moved.replace(**{name: small.rounded(getattr(moved, name)) for name in models})
    )
  built, _ = small.start(cfg)
  low = run(small.step_of(cfg, built, first), first)

  got, tokens = numbers(exact, names)
  path = FOLDER / f"{case}.json"
  if os.environ.get("R2M_WRITE_GOLDEN"):
    path.write_text(json.dumps({"tokens_crc32": tokens, **got}, indent=1) + "\n")
  want = json.loads(path.read_text())
  assert tokens == want.pop("tokens_crc32")
  assert set(got) == set(want)
  for name in got:
    np.testing.assert_allclose(got[name], want[name], rtol=1e-8, atol=1e-9, err_msg=name)
  assert np.ptp(got["policy/grad_norm"]) > 0  # the numbers change from step to step

  # a token may differ if two candidates nearly tie, and then all later tokens may
  alike = [a == b == c for a, b, c in zip(tokens, numbers(moved, names)[1], numbers(low, names)[1])]
  until = (alike + [False]).index(False)
  assert until >= 5
  exact, moved, low = (small.metrics_of(outputs[:until]) for outputs in (exact, moved, low))
  small.as_good_in_float32(low, moved, exact)


def start(cfg):
  """(built, first state), the numbers drawn in float64 and rounded to float32.

  Random numbers in float32 differ in their last place between processors, and so would all later
  numbers.
  """
  built = build.build(cfg, sharding.make_mesh((1, 1, 1)), vocab_size=goldtask.VOCAB_SIZE)
  policy, reward = small.models(cfg.policy.arch.to_json(), "float64", cfg.reward.ensemble)
  state = build.initial_state(cfg, built, policy, reward["backbone"], reward["phi"])
  return built, jax.tree.map(lambda x: x.astype(np.float32) if x.dtype == np.float64 else x, state)


def run(step, state):
  outputs = []
  for t in range(STEPS):
    state, out = step(state, small.prompts(CONFIG, t))
    outputs.append(jax.device_get(out))
  return outputs


def numbers(outputs, names):
  """({name: its value at each step}, a checksum of each step's tokens)."""
  values = {name: [float(out.metrics[name]) for out in outputs] for name in names}
  return values, [zlib.crc32(out.sequences.tokens.astype("<i4").tobytes()) for out in outputs]
