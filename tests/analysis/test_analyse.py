"""task=analyse: its estimators against closed forms, loops and models of other libraries, and the
command on small runs.
"""

import csv
import hashlib
import os
import pathlib
import subprocess
import sys

import jax
import numpy as np
import pytest
import small
import tiny_text
import torch
from flax import nnx

from configs import default, quickstart
from r2m_jax.analysis import analyse, evidence, probes
from r2m_jax.analysis.evidence import Judged, Read
from r2m_jax.config import PIECES, ConfigError, check_config
from r2m_jax.data import datasets
from r2m_jax.goldtask import task as goldtask
from r2m_jax.hf.folders import load_policy
from r2m_jax.parallel import sharding

ROOT = pathlib.Path(__file__).parents[2]


def planted(prompts=40, samples=6, width=12, noise=0.5, seed=0):
  """(features, target, prompt): the target is linear in the features, plus noise with that standard
  deviation.
  """
  rng = np.random.default_rng(seed)
  x = rng.normal(size=(prompts * samples, width)) * rng.uniform(0.1, 30, width) + 5
  clean = ((x - x.mean(0)) / x.std(0)) @ rng.normal(size=width)
  y = clean / clean.std() + noise * rng.normal(size=len(x)) - 3
  return x, y, np.repeat(np.arange(prompts), samples)


# ---- probes ----


def test_ridge_is_least_squares_of_the_augmented_system():
  """Row-wise penalty: appending sqrt(N penalty) I to the standardised features and zeros to the
  target.
  """
  x, y, _ = planted()
  penalties = np.array([1e-4, 0.3, 20.0])
  new = x[:7] * 1.3
  got = probes.ridge(x, y, penalties)(new)
  z, mean, scale = (x - x.mean(0)) / x.std(0), x.mean(0), x.std(0)
  for penalty, mine in zip(penalties, got.T):
    system = np.concatenate([z, np.sqrt(len(x) * penalty) * np.eye(x.shape[1])])
    beta = np.linalg.lstsq(
      system, np.concatenate([y - y.mean(), np.zeros(x.shape[1])]), rcond=None
    )[0]
    np.testing.assert_allclose(mine, y.mean() + (new - mean) / scale @ beta, rtol=1e-9)


def test_a_column_that_never_varies_has_no_part():
  x, y, prompt = planted()
  still = np.concatenate([x, np.full((len(x), 2), 7.0)], 1)
  np.testing.assert_allclose(probes.probe(still, y, prompt), probes.probe(x, y, prompt), rtol=1e-9)


def test_probe_finds_what_is_planted_and_nothing_where_labels_are_shuffled():
  x, y, prompt = planted(noise=0.5)  # 1 / 1.25 of the variance is linear
  found = probes.r_squared(y, probes.probe(x, y, prompt), prompt=prompt)
  assert 0.7 < found.value < 0.85 and found.low < 0.8 < found.high
  assert probes.rank_correlation(y, probes.probe(x, y, prompt), prompt).low > 0.6
  shuffled = np.random.default_rng(1).permutation(y)
  nothing = probes.r_squared(shuffled, probes.probe(x, shuffled, prompt), prompt=prompt)
  assert -0.1 < nothing.value < 0.05


def test_no_prediction_saw_its_prompt():
  """The feature identifies the prompt, and the target has one value per prompt. It is predicted if
  and only if a fold leaks the prompt.
  """
  prompt = np.repeat(np.arange(40), 6)
  y = np.random.default_rng(0).normal(size=40)[prompt]
  names = (prompt[:, None] == np.arange(40)).astype(float)
  assert (
    probes.r_squared(y, probes.ridge(names, y, np.array([1e-4]))(names)[:, 0], prompt=prompt).value
    > 0.99
  )
  assert probes.r_squared(y, probes.probe(names, y, prompt), prompt=prompt).value < 0.01


def test_r_squared_is_the_formula_and_a_difference_is_paired():
  x, y, prompt = planted()
  a, b = probes.probe(x, y, prompt), probes.probe(x[:, :3], y, prompt)

  def r2(p):
    return 1 - ((y - p) ** 2).sum() / ((y - y.mean()) ** 2).sum()

  one, both = probes.r_squared(y, a, prompt=prompt), probes.r_squared(y, a, b, prompt=prompt)
  np.testing.assert_allclose([one.value, both.value], [r2(a), r2(a) - r2(b)], rtol=1e-9)
  same = probes.r_squared(y, a, a, prompt=prompt)
  assert same[:3] == (0, 0, 0) and both.low > 0


# ---- similarity ----


def test_similarities_equal_a_loop_over_pairs():
  rng = np.random.default_rng(3)
  prompt, states, label = (
    np.repeat(np.arange(6), 4),
    rng.normal(size=(24, 5)) + 1,
    rng.integers(-1, 2, 24),
  )
  got = probes.similarities(states, label, prompt)

  def cosine(i, j):
    return states[i] @ states[j] / np.linalg.norm(states[i]) / np.linalg.norm(states[j])

  mean = {
    (a, b): np.mean(
      [
        cosine(i, j)
        for i in range(24)
        for j in range(24)
        if prompt[i] != prompt[j] and label[i] == a and label[j] == b
      ]
    )
    for a, b in ((0, 0), (1, 1), (0, 1))
  }
  np.testing.assert_allclose(
    [got.first.value, got.second.value, got.cross.value], list(mean.values()), rtol=1e-9
  )
  np.testing.assert_allclose(got.gap.value, (mean[0, 0] + mean[1, 1]) / 2 - mean[0, 1], rtol=1e-9)


def test_the_interval_of_the_gap_holds_zero_on_random_labels_and_not_on_planted_ones():
  rng = np.random.default_rng(4)
  prompt, states = np.repeat(np.arange(30), 6), rng.normal(size=(180, 16)) + 0.7
  labels = [rng.integers(0, 2, 180) for _ in range(30)]
  gaps = [probes.similarities(states, label, prompt).gap for label in labels]
  assert sum(gap.low <= 0 <= gap.high for gap in gaps) >= 27
  shifted = states + np.where(labels[0][:, None] == 1, 1.0, 0.0)
  assert probes.similarities(shifted, labels[0], prompt).gap.low > 0


def test_a_label_that_no_row_has_gives_no_number():
  got = probes.similarities(np.eye(4), np.ones(4, int), np.arange(4))
  assert np.isnan(got.first.value) and np.isnan(got.gap.value) and got.second.value == 0


def test_correlation_is_numpys_and_within_prompts_removes_what_a_prompt_shares():
  rng = np.random.default_rng(5)
  prompt = np.repeat(np.arange(20), 5)
  shared, x = 10 * rng.normal(size=20)[prompt], rng.normal(size=100)
  y = -x + shared + 0.1 * rng.normal(size=100)
  np.testing.assert_allclose(
    probes.correlation(x, y, prompt).value, np.corrcoef(x, y)[0, 1], rtol=1e-9
  )
  assert probes.correlation(x, y, prompt, within=True).high < -0.95


def test_states_by_layer_are_those_of_transformers(tmp_path):
  """Mean over the tokens of the response, by a NumPy loop over the hidden states from torch."""
  model, _ = tiny_text.model("llama3.1", "chatml", tmp_path)
  config = default.get_config()
  config.score.batch_size = 4
  mesh = sharding.make_mesh((1, 1, 1))
  policy = load_policy(str(tmp_path), config, mesh)
  rows = [
    {"prompt": "The cat", "chosen": "sat on the mat", "rejected": "ran"},
    {"prompt": "What is it?", "chosen": "Paris", "rejected": "the sea and trees"},
  ]
  rows = [row | {"sides": datasets.sides_of(config, policy.tokenizer, row)} for row in rows]
  got = analyse.text_states(config, policy, rows, mesh)
  layers = analyse.layers_of(policy.arch.num_layers)
  assert list(got) == list(layers) and list(layers)[-1] == "final" and len(layers) > 1
  sides = [(row["prompt"], row[side]) for row in rows for side in ("chosen", "rejected")]
  for i, (prompt, response) in enumerate(sides):
    before = policy.tokenizer.render(prompt)
    ids = [*before, *policy.tokenizer.encode(response, special=False), policy.tokenizer.end_id]
    with torch.no_grad():
      hidden = model(torch.tensor([ids]), output_hidden_states=True).hidden_states
    for name, layer in layers.items():
      want = [
        hidden[-1 if name == "final" else layer + 1][0, t].numpy()
        for t in range(len(before), len(ids))
      ]
      np.testing.assert_allclose(got[name][i], np.mean(want, 0), rtol=2e-4, atol=2e-5)
  final = analyse.text_states(config, policy, rows, mesh, every_layer=False)
  assert list(final) == ["final"]
  np.testing.assert_allclose(final["final"], got["final"], rtol=1e-6, atol=1e-6)


def test_layers_are_spread_evenly_and_end_with_what_the_head_reads():
  assert analyse.layers_of(1) == {"final": -1}
  assert analyse.layers_of(2) == {"1": 0, "final": -1}
  assert analyse.layers_of(33) == {"1": 0, "9": 8, "17": 16, "24": 23, "32": 31, "final": -1}


def test_look_equals_a_loop_over_the_model():
  """States, reward token embedding and scores of a gold-task state, row by row from the modules."""
  cfg = small.config()
  built, state = small.start(cfg, ref_noise=0.05)
  drawn = small.step_of(cfg, built, jax.tree.map(lambda x: x.copy(), state))(
    jax.tree.map(lambda x: x.copy(), state), small.prompts(cfg, 0)
  )[1].sequences
  seen = analyse.make_look(cfg, built)(state, jax.device_get(drawn), None)
  policy, T = built.defs.open_policy(state.policy, state.ref), drawn.response_mask.shape[1]
  for name, layer in analyse.layers_of(2).items():
    hidden = np.asarray(policy(drawn.tokens, drawn.token_mask, feedback_layer=layer).feedback)[
      :, -T:
    ]
    for i in (0, 7, 20):
      rows = [hidden[i, t] for t in range(T) if drawn.response_mask[i, t]]
      np.testing.assert_allclose(seen["states"][name][i], np.mean(rows, 0), rtol=1e-4, atol=1e-5)
  head = nnx.merge(built.defs.reward_head, state.reward_head)
  h = policy(drawn.tokens, drawn.token_mask).hidden
  fused = head(seen["rte"].astype(np.float32), h, drawn.token_mask, state.omega)
  np.testing.assert_allclose(seen["used"], fused, rtol=1e-4, atol=1e-5)


# ---- pieces ----


def reads(seed=0, prompts=30, samples=4):
  rng = np.random.default_rng(seed)
  prompt, size = np.repeat(np.arange(prompts), samples), prompts * samples
  scores = {"frozen proxy": rng.normal(size=size), "gold": rng.normal(size=size)}
  states = {"final": rng.normal(size=(size, 6))}
  return Read("x", prompt, evidence.above_median(scores["gold"], prompt), states, scores)


def test_labels_are_sides_of_the_prompts_median():
  assert evidence.above_median(
    np.array([1.0, 2, 3, 5, 5, 5]), np.array([0, 0, 0, 1, 1, 1])
  ).tolist() == [0, -1, 1] + [-1, -1, -1]


def test_hacking_and_sound_responses_differ_in_gold_and_not_in_the_rule_on_the_proxy():
  read = reads()
  kind, proxy, gold = evidence.hacks(read, read), read.scores["frozen proxy"], read.scores["gold"]
  assert (kind == 1).sum() > 2 and (kind == 0).sum() > 2
  for i in range(len(kind)):
    high = proxy[i] >= np.quantile(proxy, 0.75)
    want = (
      1
      if high and gold[i] < np.quantile(gold, 0.25)
      else 0
      if high and gold[i] >= np.median(gold)
      else -1
    )
    assert kind[i] == want


def test_accuracy_counts_pairs_as_a_loop_does():
  rng = np.random.default_rng(2)
  prompt = np.repeat(np.arange(10), 4)
  gold, frozen, after = (rng.integers(0, 4, 40).astype(float) for _ in range(3))
  rows = evidence.accuracy([Judged("r2m", "its own", gold, frozen, -gold, after)], prompt)
  found = {row.measure: row.found.value for row in rows}
  pairs = [
    (i, j) for i in range(40) for j in range(i) if prompt[i] == prompt[j] and gold[i] != gold[j]
  ]

  def right(score):
    return 100 * np.mean(
      [
        0.5 if score[i] == score[j] else float((score[i] > score[j]) == (gold[i] > gold[j]))
        for i, j in pairs
      ]
    )

  np.testing.assert_allclose(
    [found["frozen"], found["after"]], [right(frozen), right(after)], rtol=1e-9
  )
  assert found["before"] == 0
  np.testing.assert_allclose(found["after less frozen"], right(after) - right(frozen), rtol=1e-9)


def test_drift_and_the_matrix_of_steps_agree():
  rng = np.random.default_rng(0)
  states, prompt = {t: rng.normal(size=(12, 5)) for t in (0, 40, 80)}, np.repeat(np.arange(4), 3)
  matrix = evidence.step_matrix(states)
  np.testing.assert_allclose(matrix, matrix.T)
  np.testing.assert_allclose(np.diag(matrix), 1)
  rows = evidence.drift({"r2m": states}, prompt)
  np.testing.assert_allclose([row.found.value for row in rows], matrix[0], rtol=1e-9)


def test_noise_pairs_seeds_and_says_step_noise_for_one():
  rng = np.random.default_rng(0)
  steps = np.arange(50) / 50

  def of(slope, seeds):
    return {"reward/used": slope * steps + 0.01 * rng.normal(size=(seeds, 50))}

  for seeds in (1, 5):
    rows = {
      row.measure: row.found for row in evidence.noise({"r2m": of(2, seeds), "noise": of(1, seeds)})
    }
    assert (
      rows["r2m less noise"].count == seeds
      and rows["r2m less noise"].low < 0.9 < rows["r2m less noise"].high
    )
    assert (
      rows["r2m less noise"].low > 0.8 and rows["rise of r2m"].value > rows["rise of noise"].value
    )


# ---- the command ----


def main(workdir, *args, config="configs/quickstart.py:test"):
  command = [
    sys.executable,
    "-m",
    "r2m_jax.main",
    f"--config={config}",
    f"--workdir={workdir}",
    "--config.task=analyse",
    *args,
  ]
  return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=os.environ)


def digest(workdir):
  return {
    str(path): path.is_file() and hashlib.sha256(path.read_bytes()).hexdigest()
    for path in sorted(workdir.rglob("*"))
    if "analysis" not in path.relative_to(workdir).parts
  }


def table(workdir, name):
  with open(workdir / "analysis" / f"{name}.csv", newline="", encoding="utf-8") as file:
    return list(csv.DictReader(file))


def test_the_command_leaves_every_piece_and_changes_nothing(smallest_run):
  workdir, _ = smallest_run
  before = digest(workdir)
  result = main(workdir, "--config.analyse.prompts=24", "--config.analyse.samples=4")
  assert result.returncode == 0, result.stderr[-3000:]
  assert digest(workdir) == before
  assert "without noise: it compares the arms r2m and noise" in result.stdout
  made = [name for name in PIECES if name != "noise"]
  page = (workdir / "analysis" / "report.html").read_text()
  assert "data:image/png;base64" in page and "it compares the arms r2m and noise" in page
  for name in made:
    rows = table(workdir, name)
    assert rows and all(set(row) >= {"measure", "value", "low", "high", "count"} for row in rows)
    assert analyse.TITLES[name][0].split(" (")[0] in page
    assert (
      name in ("ablations", "checks")
      or (workdir / "analysis" / f"{name}.png").stat().st_size > 1000
    )
  policies = {row["policy"] for row in table(workdir, "probes")}
  assert policies == {"start", "vanilla", "scaled", "r2m"}
  blind = [
    float(row["value"])
    for row in table(workdir, "probes")
    if row["read from"] == evidence.SHUFFLED and row["measure"] == "R²"
  ]
  assert len(blind) == 4 and max(blind) < 0.1
  steps = [
    row["measure"]
    for row in table(workdir, "hacking")
    if row["policy"] == "r2m" and "step" in row["measure"]
  ]
  assert steps == ["step 0 with step 0", "step 2 with step 0", "step 4 with step 0"]
  assert {row["responses"] for row in table(workdir, "accuracy")} == {"start", "its own"}
  checked = {
    (row["check"], row["measure"]): float(row["value"]) for row in table(workdir, "checks")
  }
  assert {arm for _, arm in checked} == {"r2m, before", "r2m, after"}
  # the head has changed after RL, but not before
  assert checked["deviation, used / frozen", "r2m, before"] < 1
  assert (
    checked["change of phi, %", "r2m, after"] > 0 and checked["change of wo, %", "r2m, after"] > 0
  )
  assert 0 <= checked["self-labels right, step 4, %", "r2m, after"] <= 100
  assert "The paper's premise" in result.stdout and "The paper&#39;s premise" in page


def test_one_piece_alone_and_what_is_refused(smallest_run, tmp_path):
  workdir, _ = smallest_run
  config = quickstart.get_config("test")
  config.task, config.analyse.what = "analyse", "dynamics, cost"
  found = analyse.run(config, workdir)
  assert list(found) == ["dynamics", "cost"] and {row.labels[0] for row in found["cost"].rows} == {
    "vanilla",
    "scaled",
    "r2m",
  }
  flops = {
    row.labels[0]: row.found.value for row in found["cost"].rows if row.measure == "GFLOP a step"
  }
  assert flops["vanilla"] == flops["scaled"] < flops["r2m"] < 1.1 * flops["vanilla"]
  config.analyse.what = "noise"
  with pytest.raises(
    ConfigError, match="config.analyse.what asks .* noise: it compares the arms r2m and noise"
  ):
    analyse.run(config, workdir)
  with pytest.raises(ConfigError, match="holds no run to analyse: there is no config.json"):
    analyse.run(config, tmp_path)
  (tmp_path / "config.json").write_text((workdir / "config.json").read_text())
  config.analyse.what = ""
  with pytest.raises(
    ConfigError, match="has nothing to analyse: there is no stages/sft.*no RL step was logged"
  ):
    analyse.run(config, tmp_path)
  assert [path.name for path in tmp_path.iterdir()] == ["config.json"]


@pytest.mark.parametrize(
  "field, value, fix",
  [
    ("what", "probes,fig3", "fig3: choose from similarity"),
    ("prompts", 19, "at least 20"),
    ("samples", 1, "at least 2"),
  ],
)
def test_a_mistake_is_refused_before_anything_is_read(field, value, fix):
  config = default.get_config()
  config.analyse[field] = value
  with pytest.raises(ConfigError, match=rf"config\.analyse\.{field} is .*{fix}"):
    check_config(config)


def test_held_out_prompts_are_no_prompts_of_training():
  cfg = quickstart.get_config()

  def rows(stream, index, count):
    return {tuple(sorted(row)) for row in goldtask.prompts(0, stream, index, count).tokens}

  mine = rows(analyse.STREAM_ANALYSE, 0, cfg.analyse.prompts)
  assert not mine & rows(1, 0, cfg.reward.pairs) and not mine & rows(0, 0, cfg.sft.examples)
  assert not any(mine & rows(3, t, cfg.rollout.prompts) for t in range(cfg.steps))
