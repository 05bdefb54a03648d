"""benchmarks.premise on a tiny model: its states against the library's, and its files."""

import csv
import json
import sys

import numpy as np
import pytest
import tiny_text

from benchmarks import premise
from configs import default
from r2m_jax.analysis import analyse, checks, probes
from r2m_jax.data import datasets
from r2m_jax.hf.folders import load_policy
from r2m_jax.parallel import sharding

WORDS = "cat dog sea rain tree mat poem France Paris capital short sat ran after about".split()


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
  """(folder of the policy, rows, folder of the states, rows of the CSV)."""
  folder = tmp_path_factory.mktemp("premise")
  tiny_text.model("llama3.1", "chatml", folder / "policy")
  rng, rows = np.random.default_rng(0), []
  for i in range(22):
    chosen, rejected = (" ".join(rng.permutation(WORDS)[:4]) for _ in range(2))
    ask = [{"role": "user", "content": f"What is {i}?"}]
    rows.append(dict(prompt=ask, chosen=chosen, rejected=rejected, margin=float(i % 5)))
  (folder / "pairs.jsonl").write_text("\n".join(map(json.dumps, rows)))
  args = ["premise", f"--policy={folder}/policy", "--pairs", str(folder / "pairs.jsonl")]
  args += [f"--states={folder}/states", f"--out={folder}/out.csv", "--threads=1"]
  with pytest.MonkeyPatch.context() as patched:
    patched.setattr(premise, "DRAWS", 2)
    patched.setattr(premise, "WIDTH", 32)
    patched.setattr(sys, "argv", args)
    assert premise.main() == 0
  with open(folder / "out.csv", newline="") as file:
    return folder / "policy", rows, folder / "states", list(csv.DictReader(file))


def test_its_states_are_those_that_a_run_is_analysed_by(measured):
  folder, rows, states, _ = measured
  config, mesh = default.get_config(), sharding.make_mesh((1, 1, 1))
  config.score.batch_size = 4
  policy = load_policy(str(folder), config, mesh)
  rows = [row | {"sides": datasets.sides_of(config, policy.tokenizer, row)} for row in rows[:4]]
  ours = analyse.text_states(config, policy, rows, mesh)
  with np.load(states / "pairs.npz") as found:
    np.testing.assert_allclose(found["pooled"][-1, 0, :8], ours["final"], rtol=2e-3, atol=2e-4)
    np.testing.assert_allclose(found["pooled"][1, 0, :8], ours["1"], rtol=2e-3, atol=2e-4)


def test_what_it_writes_are_those_numbers(measured):
  _, rows, states, written = measured
  names = ("check", "reading", "layer", "measure")
  table = {tuple(row[k] for k in names): row for row in written if row["data"] == "pairs"}
  with np.load(states / "pairs.npz") as found:
    final, lengths = found["pooled"][-1, 0].astype(float), found["lengths"]
  layer = str(max(int(row["layer"]) for row in written if row["layer"].isdigit()))
  label, prompt = np.tile([1, 0], 22), np.repeat(np.arange(22), 2)
  gap = probes.similarities(final, label, prompt).gap
  row = table["fig. 1", "raw, mean", layer, "gap"]
  assert float(row["value"]) == pytest.approx(gap.value, rel=1e-3)
  assert float(row["low"]) == pytest.approx(gap.low, rel=1e-3)
  read = table["attention", "none", "", "states that it can read"]
  assert float(read["value"]) == pytest.approx(lengths.mean(), rel=1e-4)
  for what in ("none", "rms of the states", "rms of both", "features standardised"):
    largest = float(table["attention", what, "", "largest weight"]["value"])
    assert 1 / lengths.max() <= largest <= 1
  margins = table["fig. 2", "replies to one prompt, margin", "last", "correlation"]
  unit = probes.unit(final)
  want = np.corrcoef((unit[::2] * unit[1::2]).sum(1), [row["margin"] for row in rows])[0, 1]
  assert float(margins["value"]) == pytest.approx(want, rel=1e-3, abs=1e-4)


def test_the_correlation_over_pairs_is_numpys_over_other_prompts():
  rng, prompt = np.random.default_rng(1), np.repeat(np.arange(8), 2)
  x, y = (z + z.T for z in rng.normal(size=(2, 16, 16)))
  other = prompt[:, None] != prompt[None]
  found = premise.over_pairs(x, y, prompt)
  assert found.value == pytest.approx(np.corrcoef(x[other], y[other])[0, 1])
  assert found.low < found.value < found.high


def test_the_effect_of_an_attention_that_is_not_there():
  rng, prompt = np.random.default_rng(2), np.repeat(np.arange(20), 2)
  own = rng.normal(size=40)
  points, share = premise.effects("x", "none", [own.copy(), own + prompt], own, prompt)
  assert points.found[:3] == (0, 0, 0) and abs(share.found.value) < 1e-12
  flipped = premise.effects("x", "none", [-own], own, prompt)[0].found.value
  right = 100 * np.mean(own[::2] > own[1::2])
  assert flipped == pytest.approx(100 - 2 * right)
  assert isinstance(points, checks.Row)
