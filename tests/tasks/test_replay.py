"""Replaying a sample: what is written and shown of it."""

import json
from types import SimpleNamespace

import numpy as np

from r2m_jax.tasks import replay
from r2m_jax.types import Judged, Sequences


def test_a_sample_without_a_finite_number_is_written_and_shown(tmp_path, capsys):
  """The report of a run that diverged sends its user here, for rows whose update was skipped."""
  tokens, mask = np.array([[0, 5, 6, 7]]), np.array([[False, True, True, True]])
  nan = np.full((1, 2), np.nan, np.float32)
  scores = nan[:, 0]
  out = SimpleNamespace(
    sequences=Sequences(tokens, mask, mask[:, 2:], np.array([True])),
    judged=Judged(rte=nan, scores=scores, scores_frozen=scores),
  )
  parts = {
    "logprobs": nan,
    "ref_logprobs": nan,
    "attention": np.full((1, 2, 4), np.nan, np.float32),
    "omega": np.float32(np.nan),  # of r2m.omega_schedule kl
    "own": scores[:, None],
    "read": scores[:, None],
  }
  found = {"arm": "r2m", "step": 3, "prompt": 0, "sample": 0}
  found |= {"prompt_text": "What?", "response_text": "This."}
  found |= replay.facts_of(str, out, parts, 0)
  assert json.loads(json.dumps(found, allow_nan=False)) == found
  assert found["omega"] == found["reward"] == "nan" and found["logprobs"] == ["nan", "nan"]
  replay.show(found, out, 0)
  replay.write_strip(found, tmp_path / "strip.html")
  assert "reward   nan (frozen nan, omega nan)" in capsys.readouterr().out
  assert "Weight of each hidden state" in (tmp_path / "strip.html").read_text()
