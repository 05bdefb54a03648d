"""The laboratory's third task with a tiny random model: gold never reaches training. Also tests the
data of a proxy, a killed run, and the files.
"""

import csv
import functools
import itertools
import shutil
import sys
from types import SimpleNamespace

import numpy as np
import pytest
from small import documented_metrics

from benchmarks import machine, notes_step
from benchmarks import notes as shown_notes
from configs import smollm2_notes
from r2m_jax.config import ConfigError, arms_of, check_config
from r2m_jax.goldtask import notes
from r2m_jax.lab import notes as lab_notes
from r2m_jax.lab.realtext import run_of
from r2m_jax.run.files import read_jsonl
from r2m_jax.run.metrics import ROW_KEYS, read_metrics, without_clock

RUNS = [(arm, seed) for arm in ("vanilla", "r2m") for seed in (0, 1)]


def settings(**overrides):
  config = smollm2_notes.get_config("test")
  for name, value in overrides.items():
    config.update_from_flattened_dict({name.replace("__", "."): value})
  check_config(config)
  return config


@pytest.fixture(scope="module")
def ended(tmp_path_factory):
  """The workdir of the whole task, with two arms and two seeds."""
  workdir = tmp_path_factory.mktemp("lab_notes")
  lab_notes.run(settings(), workdir)
  return workdir


def begun(ended, folder):
  """A copy of the finished task in its state before RL."""
  for name in ("models", "proxy_0", "proxy_1", "sft"):
    shutil.copytree(ended / name, folder / name)
  for name in ("sft_samples.jsonl", "held_out_pairs.jsonl"):
    shutil.copyfile(ended / name, folder / name)
  return folder


def policy_bytes(workdir, arm, seed):
  return (run_of(workdir, arm, seed) / "export/policy/model.safetensors").read_bytes()


def steps_of(workdir, arm, seed):
  rows = map(without_clock, read_metrics(run_of(workdir, arm, seed)))
  return [row for row in rows if row["stage"] == "rl"]


def samples_of(workdir, arm, seed):
  """The rows of each step's file."""
  files = sorted((run_of(workdir, arm, seed) / "samples").glob("*.jsonl"))
  return [read_jsonl(file) for file in files]


def test_pairs_without_a_difference_in_gold_are_refused_before_the_proxies(tmp_path, monkeypatch):
  (tmp_path / "gold.py").write_text("def gold(prompt, response, ended): return 1.0")
  config = settings(gold__formula=str(tmp_path / "gold.py"))
  asked = lab_notes.as_messages(*notes.prompts(0, 0, 1))
  row = dict(prompt=asked, truncated=False, length=1)
  drawn = [row | {"response": response} for response in ("a", "b", "c", "c")]
  monkeypatch.setattr(lab_notes, "answers", lambda *args: drawn)
  for _ in range(2):  # the second time the pairs are read
    with pytest.raises(ConfigError, match="heldout_pairs is .*: the 1 pairs .* no difference"):
      lab_notes.held_out_pairs(config, tmp_path, None, tmp_path)


# ---- gold never reaches training ----


@pytest.mark.long
def test_another_gold_gives_the_same_policy(ended, tmp_path, monkeypatch):
  """Equal byte for byte, and so are all metrics except those of gold."""

  def other(prompt, reply, truncated=False):
    return notes.GoldParts(float(len(reply)), 0.5, 1, 2, 3, 4, 5, 6, truncated)

  again = begun(ended, tmp_path)
  monkeypatch.setattr(lab_notes.notes, "gold_parts", other)
  lab_notes.run(settings(lab__arms=("r2m",), lab__seeds=(1,)), again)
  assert policy_bytes(again, "r2m", 1) == policy_bytes(ended, "r2m", 1)
  rows, want = (steps_of(run, "r2m", 1) for run in (again, ended))
  assert len(rows) == len(want) == 2
  for row, old in zip(rows, want):
    changed = {key for key in row if row[key] != old[key]}
    assert row.keys() == old.keys() and "reward/gold" in changed
    of_gold = {"reward/gold", "reward/within_corr", "r2m/pair_disagreement"}
    assert all(key in of_gold or key.startswith("gold/") for key in changed)


def test_every_sample_is_kept_with_its_rewards(ended):
  """Gold is recomputed from the text in the file. The means equal those in metrics.jsonl."""
  for arm, seed in RUNS:
    steps, rows = samples_of(ended, arm, seed), steps_of(ended, arm, seed)
    assert len(steps) == len(rows) == 2
    for samples, row in zip(steps, rows):
      assert len(samples) == 4 and len({sample["prompt"] for sample in samples}) == 2
      parts = [notes.gold_parts(s["prompt"], s["response"], s["truncated"]) for s in samples]
      assert [sample["gold"] for sample in samples] == [part.gold for part in parts]
      for name, metric in (("gold", "reward/gold"), ("frozen", "reward/frozen")):
        assert row[metric] == pytest.approx(np.mean([s[name] for s in samples]), rel=1e-4, abs=1e-5)
      assert row["reward/used"] == pytest.approx(np.mean([s["used"] for s in samples]), abs=1e-4)
      assert row["gold/coverage"] == pytest.approx(np.mean([part.coverage for part in parts]))
      assert row["gold/hallucinated"] == pytest.approx(np.mean([part.invented for part in parts]))
      assert row["truncated"] == pytest.approx(np.mean([s["truncated"] for s in samples]))


def test_no_prompt_is_used_twice(ended):
  """No two steps and no two stages share a prompt, and no held-out pair of values is trained on."""
  used = [
    {row["prompt"][-1]["content"] for row in read_jsonl(ended / file)}
    for file in (
      "data/demonstrations.jsonl",
      "proxy_0/pairs.jsonl",
      "proxy_1/pairs.jsonl",
      "data/prompts_0.jsonl",
      "data/prompts_1.jsonl",
      "sft_samples.jsonl",
      "held_out_pairs.jsonl",
    )
  ]
  assert len(set.union(*used)) == sum(map(len, used))
  for seed in (0, 1):
    asked = {row["prompt"] for step in samples_of(ended, "r2m", seed) for row in step}
    assert asked == used[3 + seed]


# ---- the proxy ----


@pytest.mark.parametrize("temperature, flip, share", [(0.01, 0.0, 0.0), (0.01, 1.0, 1.0)])
def test_labels_without_noise_follow_gold_or_its_opposite(temperature, flip, share):
  config = settings(reward__choice_temperature=temperature, reward__label_flip=flip)
  rows = [{"prompt": "p", "responses": ["a", "b"], "gold": [float(i % 3), 1.5]} for i in range(30)]
  found = lab_notes.labelled(config, rows, 0)
  wrong = [row["gold_rejected"] > row["gold_chosen"] for row in found]
  assert np.mean(wrong) == share
  for row, new in zip(rows, found):
    by_text = dict(zip(row["responses"], row["gold"]))
    assert by_text[new["chosen"]] == new["gold_chosen"]
    assert by_text[new["rejected"]] == new["gold_rejected"]


def test_labels_are_against_gold_as_often_as_the_logistic_says():
  """Ten thousand pairs with the same difference: sigmoid(-gap / T), then a tenth is exchanged."""
  config = settings(reward__choice_temperature=0.5, reward__label_flip=0.1)
  rows = [{"prompt": "p", "responses": ["a", "b"], "gold": [1.0, 1.7]}] * 10_000
  found = lab_notes.labelled(config, rows, 1)
  wrong = 1 / (1 + np.exp(0.7 / 0.5))
  want = wrong * 0.9 + (1 - wrong) * 0.1
  assert np.mean([row["chosen"] == "a" for row in found]) == pytest.approx(want, abs=0.015)


def test_pairs_are_samples_of_the_policy_with_their_gold(ended):
  for seed in (0, 1):
    rows = read_jsonl(ended / f"proxy_{seed}/pairs.jsonl")
    assert 6 <= len(rows) <= 12
    for row in rows:
      # a truncated sample lost another point
      prompt = row["prompt"][-1]["content"]
      for side in ("chosen", "rejected"):
        gold = notes.gold_parts(prompt, row[side]).gold
        cut = notes.gold_parts(prompt, row[side], True).gold
        assert row[f"gold_{side}"] in (gold, cut)


# ---- resuming ----


@pytest.mark.long
def test_a_killed_run_ends_as_the_unbroken_one(ended, tmp_path, monkeypatch, capsys):
  """Killed while gold scores the second step, then started again with the same command."""
  config, again, calls = settings(lab__arms=("r2m",), lab__seeds=(0,)), begun(ended, tmp_path), []

  def dies(original, *args):
    calls.append(1)
    if len(calls) == 2:
      raise KeyboardInterrupt
    return original(*args)

  with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
    patched.setattr(lab_notes, "watch", functools.partial(dies, lab_notes.watch))
    lab_notes.run(config, again)
  assert len(steps_of(again, "r2m", 0)) == 1
  capsys.readouterr()
  lab_notes.run(config, again)
  assert "r2m: resumes at step 1 of 2" in capsys.readouterr().out
  assert policy_bytes(again, "r2m", 0) == policy_bytes(ended, "r2m", 0)
  assert steps_of(again, "r2m", 0) == steps_of(ended, "r2m", 0)
  assert samples_of(again, "r2m", 0) == samples_of(ended, "r2m", 0)


# ---- files ----


def test_steps_csv_has_every_step(ended):
  with open(ended / "steps.csv", newline="") as file:
    rows = list(csv.DictReader(file))
  assert len(rows) == len(RUNS) * 2
  for row in rows:
    want = steps_of(ended, row["arm"], int(row["seed"]))[int(row["step"])]
    for name, metric in lab_notes.COLUMNS.items():
      if want.get(metric) is None:
        assert row[name] == ""
      else:
        assert float(row[name]) == pytest.approx(want[metric], rel=1e-5, abs=1e-9)
  summary = list(csv.DictReader((ended / "summary.csv").open()))
  final = {
    arm: [steps_of(ended, arm, seed)[-1]["reward/gold"] for seed in (0, 1)]
    for arm in ("vanilla", "r2m")
  }
  gap = np.mean(np.subtract(final["r2m"], final["vanilla"]))
  found = next(
    row
    for row in summary
    if (row["arm"], row["measure"], row["against"]) == ("r2m", "final", "vanilla")
  )
  assert float(found["value"]) == pytest.approx(gap, abs=1e-4)
  page = (ended / "report.html").read_text()
  assert "Proxy reward models" in page and "Gold on held-out prompts" in page


def test_a_table_may_have_other_seeds_than_the_command(ended, tmp_path):
  """Both arms have a table of seeds 0 and 1. With seed 1 alone, `r2m` has no run of it and keeps its
  table.
  """
  for name in ("runs", "table"):
    shutil.copytree(ended / name, tmp_path / name)
  shutil.rmtree(tmp_path / "runs/r2m/seed_1")
  one = settings(lab__seeds=(1,))
  found = lab_notes.collect(one, arms_of(one), tmp_path, 0.5)
  seeds = {name: [mine.seeds for mine in by.values()] for name, by in found.curves.items()}
  assert seeds == {"vanilla": [[1]], "r2m": [[0, 1]]}
  assert found.sft_gold[0] == found.sft_gold[1] == 0.5


def test_the_command_shows_arms_differences_and_samples(ended, monkeypatch, capsys):
  monkeypatch.setattr(sys, "argv", ["notes", str(ended)])
  shown_notes.main()
  lines = capsys.readouterr().out.splitlines()
  gold = {
    arm: np.array([[row["reward/gold"] for row in steps_of(ended, arm, seed)] for seed in (0, 1)])
    for arm in ("vanilla", "r2m")
  }
  for arm in gold:
    cells = next(line for line in lines if line.startswith(f"{arm} ")).split()
    want = [2, gold[arm][:, 0].mean(), gold[arm].max(1).mean(), gold[arm][:, -1].mean()]
    assert cells[2] == "2"  # steps
    assert list(map(float, cells[1:2] + cells[3:6])) == pytest.approx(want, abs=0.006)
  difference = next(line for line in lines if line.startswith("r2m - vanilla")).split()
  assert float(difference[3]) == pytest.approx(
    (gold["r2m"] - gold["vanilla"])[:, -1].mean(), abs=0.006
  )
  monkeypatch.setattr(sys, "argv", ["notes", str(ended), "--read=r2m/1/1"])
  shown_notes.main()
  printed = capsys.readouterr().out
  for row in samples_of(ended, "r2m", 1)[1]:
    assert row["prompt"] in printed and repr(row["response"]) in printed


def printed(capsys, monkeypatch, *given):
  """What benchmarks.notes prints."""
  monkeypatch.setattr(sys, "argv", ["notes", *map(str, given)])
  shown_notes.main()
  return capsys.readouterr().out


def test_the_command_shows_how_often_a_reward_is_right(ended, monkeypatch, capsys):
  """Of the pairs of samples of one prompt with unequal gold, by a loop over the files."""
  lines = printed(capsys, monkeypatch, ended).splitlines()
  right, squares = {"used": [], "frozen": []}, {"used": 0.0, "frozen": 0.0}
  for seed in (0, 1):
    for rows in samples_of(ended, "r2m", seed):
      for a, b in itertools.combinations(rows, 2):
        if a["prompt"] == b["prompt"] and a["gold"] != b["gold"]:
          for name, found in right.items():
            gap = (a[name] - b[name]) * (a["gold"] - b["gold"])
            found.append(0.5 if gap == 0 else float(gap > 0))
            squares[name] += (a[name] - b[name]) ** 2
  start = lines.index(next(line for line in lines if line.startswith("right, % of pairs")))
  cells = next(line for line in lines[start:] if line.startswith("r2m ")).split()
  assert cells[:5] == ["r2m", "0", "to", "1", str(len(right["used"]))]
  assert float(cells[5]) == pytest.approx(100 * np.mean(right["used"]), abs=0.5)
  assert float(cells[8]) == pytest.approx(100 * np.mean(right["frozen"]), abs=0.5)
  grown = np.sqrt(squares["used"] / squares["frozen"])
  assert float(cells[14]) == pytest.approx(grown, abs=0.006)


def test_the_command_shows_gold_over_the_run():
  """Means of the quarters of eight steps, over two seeds."""
  runs = {
    "r2m": {
      seed: {name: np.arange(8.0) + seed for name in ("gold", "frozen", "kl")} for seed in (0, 1)
    }
  }
  lines = shown_notes.curve_lines(runs)[1:]
  assert [line.split()[1:4] for line in lines] == [
    [str(low), "to", str(low + 1)] for low in (1, 3, 5, 7)
  ]
  for quarter, line in enumerate(lines):
    assert float(line.split()[4]) == float(line.split()[5]) == 2 * quarter + 1


def test_arms_are_cut_to_the_steps_of_those_with_the_same_ending():
  """A run that is shorter than another one of its ending is left out, one of another ending not."""
  lengths = {"r2m": (8, 6), "scaled": (8, 8), "r2m.kl2": (5, 5), "scaled.kl2": (4, 5)}
  runs = {
    arm: {seed: {"gold": np.arange(count)} for seed, count in enumerate(counts)}
    for arm, counts in lengths.items()
  }

  def seeds_and_steps(cut):
    return {arm: (list(seeds), shown_notes.steps_of(seeds)) for arm, seeds in cut.items()}

  assert seeds_and_steps(shown_notes.at_equal_steps(runs)) == {
    "r2m": ([0], 8),
    "scaled": ([0, 1], 8),
    "r2m.kl2": ([0, 1], 5),
    "scaled.kl2": ([1], 5),
  }
  assert seeds_and_steps(shown_notes.at_equal_steps(runs, 6)) == {
    "r2m": ([0, 1], 6),
    "scaled": ([0, 1], 6),
  }


def test_the_command_shows_gold_on_held_out_prompts(ended, monkeypatch, capsys):
  lines = printed(capsys, monkeypatch, ended).splitlines()
  after = [
    np.array([row["gold"] for row in read_jsonl(run_of(ended, "r2m", seed) / "held_out.jsonl")])
    for seed in (0, 1)
  ]
  rows = [lab_notes.as_text(row) for row in read_jsonl(ended / "sft_samples.jsonl")]
  before = notes.gold(rows).mean()
  cells = [line for line in lines if line.startswith("r2m ")][-1].split()
  assert cells[1] == "2" and float(cells[2]) == pytest.approx(np.mean(after), abs=0.006)
  assert float(cells[5]) == pytest.approx(np.mean(after) - before, abs=0.006)


def test_kept_rows_print_what_the_workdirs_print(ended, tmp_path, monkeypatch, capsys):
  """Two workdirs together, and the two files that they leave."""
  shutil.copytree(ended, tmp_path / "other")
  for arm in ("vanilla", "r2m"):
    shutil.move(tmp_path / "other/runs" / arm, tmp_path / "other/runs" / f"{arm}.kl2")
  both = ended, tmp_path / "other"
  want = printed(capsys, monkeypatch, *both, "--keep", tmp_path / "rows")
  assert "r2m.kl2 - vanilla.kl2" in want
  assert printed(capsys, monkeypatch, tmp_path / "rows") == want
  with pytest.raises(SystemExit, match="two of the workdirs have the same run"):
    printed(capsys, monkeypatch, ended, ended)


# ---- arms whose KL is held, and a GPU's sizes ----


def test_held_arms_are_the_same_four_at_two_targets():
  held, plain = (smollm2_notes.get_config(options) for options in ("gpu,held", "gpu"))
  check_config(held)
  check_config(plain)
  arms = arms_of(held)
  assert {name.partition(".")[0] for name in arms} == set(arms_of(plain))
  for name, arm in arms.items():
    assert (arm.kl.controller, arm.algorithm) == ("held", "grpo")
    assert name == f"{arm.variant}.kl{arm.kl.target:g}" and arm.steps == 100
  assert sorted({arm.kl.target for arm in arms.values()}) == [2, 4]
  for contrast in held.lab.contrasts:
    assert set(contrast.split(" - ")) <= set(arms)


def test_on_two_cores_three_arms_are_held_at_both_targets():
  """The last eight steps give a seed's value, and the first KL weight is smaller."""
  held, plain = (smollm2_notes.get_config(options) for options in ("held", ""))
  check_config(held)
  arms = arms_of(held)
  for target, beta, steps in ((2, 1.0, 20), (4, 0.2, 40)):
    for name in ("r2m", "scaled", "shuffled"):
      arm = arms.pop(f"{name}.kl{target}")
      assert (arm.variant, arm.kl.controller) == (name, "held")
      assert (arm.kl.target, arm.kl.beta) == (target, beta)
      assert (arm.steps, arm.policy.lr, arm.r2m.lr) == (steps, plain.policy.lr, plain.r2m.lr)
  assert not arms
  assert held.lab.tail < held.steps
  assert held.lab.contrasts == smollm2_notes.get_config("gpu,held").lab.contrasts


def test_the_learning_rates_are_the_papers_dose_by_width():
  """The function changes with learning rate x width; SmolLM2-135M has width 576."""
  config = smollm2_notes.get_config("gpu")
  assert config.policy.lr == pytest.approx(6e-6 * 2048 / 576, rel=0.1)
  assert config.r2m.lr == pytest.approx(1e-6 * 4096 / 576, rel=0.1)


def test_the_command_shows_the_contrasts_at_a_held_kl():
  """Differences of arms whose gold and KL are given."""
  gold = {"r2m": (1.0, 1.5, 1.4), "scaled": (0.5, 0.7, 0.9), "shuffled": (1.0, 1.5, 1.4)}
  runs = {
    f"{arm}.kl2": {
      seed: {"gold": np.full(20, values[seed]), "kl": np.full(20, 3.0 if arm == "shuffled" else 2)}
      for seed in range(3)
    }
    for arm, values in gold.items()
  }
  lines = shown_notes.held_text(runs).splitlines()
  first, placebo = (
    next(line for line in lines if line.startswith(f"r2m.kl2 - {rival}.kl2  "))
    for rival in ("scaled", "shuffled")
  )
  assert float(first.split()[4]) == pytest.approx(0.6) and first.endswith("undecided")
  assert placebo.endswith("KL not held")


@pytest.mark.long
def test_a_run_of_held_arms_in_the_folder_of_the_others(ended, tmp_path):
  """The second command of docs/lab.md starts from the first one's policy and proxies."""
  again = begun(ended, tmp_path)
  held = smollm2_notes.get_config("test,held")
  held.lab.arms, held.lab.seeds = held.lab.arms[:2], (0,)
  lab_notes.run(held, again)
  for arm in ("r2m.kl2", "scaled.kl2"):
    assert len(steps_of(again, arm, 0)) == 2
  assert "Arms whose KL is held" in (again / "report.html").read_text()


# ---- the step next to TRL's ----


def test_a_timed_step_is_that_of_the_task(ended):
  """Its tokens, and no step counts that compiled."""
  found = notes_step.ours(
    str(ended / "models/sft"), str(ended / "models/proxy_0"), "vanilla", 2, "test"
  )
  assert len(found["seconds"]) == len(found["busy"]) == 1 and found["peak"] > 1e8
  assert found["lengths"] == [steps_of(ended, "vanilla", 0)[1]["length"]]
  assert sum(times[0] for times in found["phases"].values()) <= found["seconds"][0]


def test_a_step_that_compiles_is_not_counted():
  names = ("step", *notes_step.PHASES)
  rows = [
    {f"seconds/{name}": float(t) for name in names}
    | {"length": 10.0 + t, "learn/computed": share, "memory/process_peak": 2.0}
    for t, share in enumerate([0.76, 1.0, 0.76, 0.76, 1.0])
  ]
  ticks = [machine.Ticks(10.0 * t, 5.0 * t, 4.0 * t) for t in range(5)]
  found = notes_step.measured(rows, ticks)
  assert found["seconds"] == [2, 3, 4] and found["lengths"] == [12, 13, 14]
  assert found["computed"] == [0.76, 0.76, 1.0] and found["peak"] == 2e9
  kept = notes_step.quietest(found | {"busy": [0.3, 0.0, 0.05]}, 2)
  assert kept["seconds"] == [3, 4] and kept["phases"]["learn"] == [3, 4]


def test_trl_is_given_the_work_of_the_task():
  config = notes_step.config_of(6)
  given = SimpleNamespace(policy="P", reward="R", steps=3, more=2)
  work = notes_step.work_of(config, given)
  assert work["prompts"] == notes.prompts(0, lab_notes.STREAM_RL, 6 * config.rollout.prompts)
  assert work["rows"] == config.rollout.prompts * work["group"] == 16
  assert (work["response"], work["temperature"]) == (40, 0.7)
  assert (work["beta"], work["lr"]) == (config.kl.beta, config.policy.lr)
  assert config.ppo.epochs * config.ppo.minibatches == 1  # TRL's child has one update too


# ---- errors before any work ----


@pytest.mark.parametrize(
  "field, value, message",
  [
    ("lab.betas", (1.0, 2.0), r"config.lab.betas is \(1.0, 2.0\): on text an arm has one KL"),
    ("kl.estimator", "auto", "config.lab.arms: vanilla: config.kl.estimator must be 'exact'"),
    ("budget", 9.0, "config.budget is 9.0: runs of as many steps are compared"),
    ("notes.demonstrations", -1, "config.notes.demonstrations is -1: must be at least 0"),
    ("notes.epochs", 0, "config.notes.epochs is 0: must be at least 1"),
    ("eval.every", 5, "config.eval.every is 5: the laboratory compares runs of one length"),
  ],
)
def test_settings_that_cannot_work_are_refused(field, value, message):
  config = settings()
  config.update_from_flattened_dict({field: value})
  with pytest.raises(ConfigError, match=message):
    check_config(config)


def test_sizes_are_named():
  for options in ("large", "gpu,large", "gpu held"):
    with pytest.raises(ValueError, match=f"size '{options}' is unknown"):
      smollm2_notes.get_config(options)


def test_every_logged_key_is_documented(ended):
  logged = {key for row in read_metrics(run_of(ended, "r2m", 0)) for key in row}
  assert logged - set(ROW_KEYS) <= documented_metrics().keys()
