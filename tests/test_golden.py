"""Twenty steps, pinned: loss, gradient norm, rewards and tokens. A change here must be one that was
meant.

R2M_WRITE_GOLDEN=1 ./launch/test.sh tests/test_golden.py    # writes tests/golden/ anew; say why in the commit
"""

import json
import os
import pathlib
import zlib

import numpy as np
import pytest
import small

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


@pytest.mark.parametrize("case", CASES)
def test_trajectory_is_the_pinned_one(case):
  outputs, _ = small.run(small.config(steps=20, **CASES[case]), 20)
  names = NAMES + (("r2m/loss", "r2m/bt", "r2m/gre") if case.startswith("r2m") else ())
  got = {name: [float(out.metrics[name]) for out in outputs] for name in names}
  tokens = [zlib.crc32(out.sequences.tokens.astype("<i4").tobytes()) for out in outputs]
  path = FOLDER / f"{case}.json"
  if os.environ.get("R2M_WRITE_GOLDEN"):
    path.write_text(json.dumps({"tokens_crc32": tokens, **got}, indent=1) + "\n")
  want = json.loads(path.read_text())
  assert tokens == want.pop("tokens_crc32")
  assert set(got) == set(want)
  for name in got:
    np.testing.assert_allclose(got[name], want[name], rtol=1e-4, atol=1e-5, err_msg=name)
  assert np.ptp(got["policy/grad_norm"]) > 0  # a trajectory, not a constant
