"""The report of one run over several seeds. Oracles: NumPy, SciPy, and numbers worked by hand."""

import json
import re

import numpy as np
import pytest
from scipy import stats

from configs.default import get_config
from r2m_jax.report import seeds

GOLD = {"scaled": (0.0, 1.0, 2.0), "r2m": (1.0, 2.5, 4.0)}  # at the last step, by seed
STEPS = 20


def write_run(workdir, seed):
  """A workdir with two arms whose gold rises in a line from 0 to its value in `GOLD`."""
  workdir.mkdir(parents=True)
  config = get_config()
  config.seed = seed
  (workdir / "config.json").write_text(config.to_json())
  rows = [{"stage": "sft", "arm": "", "step": 0, "seconds": 1.0, "loss": 1.0 + seed}]
  rows += [
    {"stage": "rl", "arm": arm, "step": t, "seconds": float(t), "kl": 0.5 * t, "length": 4.0}
    | {"reward/gold": gold[seed] * t / (STEPS - 1), "reward/frozen": 0.1 * t}
    for arm, gold in GOLD.items()
    for t in range(STEPS)
  ]
  samples = [
    {"arm": arm, "when": "after", "prompt": "p", "response": f"of seed {seed}"} for arm in GOLD
  ]
  for name, lines in (("metrics", rows), ("samples", samples)):
    (workdir / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
  return workdir


@pytest.fixture
def folders(tmp_path):
  return [write_run(tmp_path / name, seed) for seed, name in enumerate(("run", "run/1", "run/2"))]


def ends(values):
  """Student's 95% interval of a mean."""
  half = stats.t.ppf(0.975, len(values) - 1) * stats.sem(values)
  return np.mean(values) - half, np.mean(values) + half


def test_rows_are_means_with_their_intervals(folders):
  rows = seeds.mean_rows([seeds.read_metrics(folder) for folder in folders])
  assert len(rows) == 1 + 2 * STEPS and rows[0]["loss"] == pytest.approx(2.0)
  last = rows[-1]
  assert (last["arm"], last["step"]) == ("r2m", STEPS - 1)
  assert last["reward/gold"] == pytest.approx(2.5)
  found = last["reward/gold_low"], last["reward/gold_high"]
  np.testing.assert_allclose(found, ends(GOLD["r2m"]))


def test_differences_are_paired_by_seed(folders):
  table = seeds.tables_of([seeds.read_metrics(folder) for folder in folders])
  assert list(table) == ["scaled", "r2m"] and [len(entries) for entries in table.values()] == [3, 3]
  window = (STEPS - 1.5) / (STEPS - 1)  # the mean of the last two steps, as a share of the last
  gaps = window * np.subtract(GOLD["r2m"], GOLD["scaled"])
  found = seeds.difference(table, "r2m", "scaled", "last")
  np.testing.assert_allclose((found.value, found.low, found.high), (gaps.mean(), *ends(gaps)))
  (text,) = seeds.contrasts(table)
  numbers = [float(x) for x in re.findall(r"[-+]?\d+\.\d+", text)[:3]]
  np.testing.assert_allclose(numbers, (gaps.mean(), *ends(gaps)), atol=0.005)
  assert seeds.difference(table, "r2m", "scaled", "lost_share") is None  # gold never falls


def test_the_page_and_the_terminal(folders):
  path = seeds.write_report(folders, title="three seeds")
  text = path.read_text(encoding="utf-8")
  assert path == folders[0] / "report.html" and not re.search(r"https?://", text)
  assert "over-optimisation in 0 of 3 seeds" in text and "of seed 0" in text
  assert "of seed 1" not in text  # texts are of the first seed
  assert {file.name for file in (folders[0] / "figures").iterdir()} >= {
    "1_rewards.png",
    "6_before_rl.png",
  }
  lines = seeds.format_summary(folders).splitlines()
  assert lines[0] == "means over 3 seeds, with 95% intervals"
  assert [line.split()[0] for line in lines[1:]] == ["arm", "scaled", "r2m", "r2m"]
