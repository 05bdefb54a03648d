"""Several runs on one page. Oracles: NumPy, numbers worked by hand, and the rows in the page's
data.
"""

import html
import json
import re

import numpy as np
import pytest
from matplotlib.figure import Figure
from scipy import stats

from configs.default import get_config
from r2m_jax.config import ConfigError, check_config
from r2m_jax.report import compare, figures, settings
from r2m_jax.report.cost import time_of_phases, troubles
from r2m_jax.tasks import compare as task


def write_run(workdir, *, seed=0, beta=0.05, gold=1.0, arms=("r2m",), prompts=("p", "q")):
  """A workdir with 20 steps of each arm, whose gold rises by `gold` over them."""
  workdir.mkdir(parents=True)
  config = get_config()
  config.seed, config.kl.beta = seed, beta
  (workdir / "config.json").write_text(config.to_json())
  rows = [
    {"stage": "rl", "arm": arm, "step": t, "seconds": float(t), "kl": 0.1 * t}
    | {"reward/gold": gold * t / 19, "reward/frozen": 0.5, "length": 4.0}
    for arm in arms
    for t in range(20)
  ]
  samples = [
    {"arm": arm, "when": when, "prompt": prompt, "response": f"{workdir.name} {when} {prompt}"}
    for arm in arms
    for when in ("before", "after")
    for prompt in prompts
  ]
  for name, lines in (("metrics", rows), ("samples", samples)):
    (workdir / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
  return workdir


def test_seeds_are_one_line_and_settings_another(tmp_path):
  runs = [write_run(tmp_path / f"s{i}", seed=i, gold=1.0 + i) for i in range(3)]
  runs.append(write_run(tmp_path / "beta", beta=0.1))
  runs.append(write_run(tmp_path / "again", seed=1))  # no further seed
  lines = compare.lines_of(compare.arms_in(runs))
  assert [line.name for line in lines] == ["s0 and 2 more seeds", "beta", "again"]
  rows = compare.rows_of(lines[0])
  assert len(rows) == 20 and rows[19]["reward/gold"] == pytest.approx(2.0)
  half = stats.t.ppf(0.975, 2) * np.std([1.0, 2.0, 3.0], ddof=1) / np.sqrt(3)
  assert rows[19]["reward/gold_low"] == pytest.approx(2.0 - half)
  assert rows[19]["reward/gold_high"] == pytest.approx(2.0 + half)
  assert compare.rows_of(lines[1])[3] == compare.arms_in(runs)[3].rows[3] | {"arm": "beta"}


def test_the_page_of_a_comparison(tmp_path):
  a = write_run(tmp_path / "x/a", arms=("vanilla", "r2m"))
  b = write_run(tmp_path / "y/a", beta=0.1, prompts=("q", "other"))
  path = compare.write([a, b], tmp_path / "compare.html")
  text = path.read_text(encoding="utf-8")
  assert not re.search(r"https?://|<link|src=\"(?!data:)", text) and text.count("<script") == 1
  for name in ("x/a vanilla", "x/a r2m", "y/a"):
    assert name in text
  cells = re.findall(r'data-name="Setting">([^<]+)<', text)
  assert cells == ["kl.beta"]
  prompts = re.findall(r'aria-label="Prompt">([^<]+)<', text)
  assert prompts == ["q"]  # the largest that all have
  assert "a before q" in text and "a after other" not in text
  assert "0.05" in text and "0.1" in text


def test_names_of_folders_are_no_mathematics_and_stay_in_the_legend(tmp_path):
  runs = [
    write_run(tmp_path / name, beta=0.01 * i) for i, name in enumerate(("_old", "$a{$b", "c"))
  ]
  compare.write(runs, tmp_path / "compare.html")  # matplotlib cannot read $a{$
  axes = Figure().subplots()
  for run in runs:
    axes.plot([0, 1], label=figures.literal(run.name))
  assert axes.get_legend_handles_labels()[1] == ["\u200b_old", r"\$a{\$b", "c"]


def test_runs_without_a_common_prompt(tmp_path):
  runs = [write_run(tmp_path / name, prompts=(name,)) for name in ("a", "b")]
  text = compare.write(runs, tmp_path / "compare.html").read_text(encoding="utf-8")
  assert "no prompts in common" in text


def test_the_task_refuses_what_is_no_run(tmp_path):
  config = get_config()
  config.task = "compare"
  for given, message in (
    ((), r"config.compare.runs is \(\): task=compare needs it; pass"),
    (("a",), r"config.compare.runs is \('a',\): give the workdirs of two runs or more"),
  ):
    config.compare.runs = given
    with pytest.raises(ConfigError, match=message):
      check_config(config)
  a = write_run(tmp_path / "a")
  for second, message in (
    (tmp_path / "none", "there is no config.json, so no run; give the workdir"),
    (a, "names a folder twice; leave one out"),
  ):
    config.compare.runs = (str(a), str(second))
    check_config(config)
    with pytest.raises(ConfigError, match=message):
      task.run(config, tmp_path / "out")
  (tmp_path / "b").mkdir()
  (tmp_path / "b/config.json").write_text("{}")
  config.compare.runs = (str(a), str(tmp_path / "b"))
  with pytest.raises(ConfigError, match="no metrics.jsonl, so nothing was logged yet; wait"):
    task.run(config, tmp_path / "out")
  assert not (tmp_path / "out").exists()


def test_the_task_writes_a_page_and_reads_only(tmp_path, capsys):
  runs = [write_run(tmp_path / name, seed=i) for i, name in enumerate("ab")]
  before = {path: path.read_bytes() for run in runs for path in run.iterdir()}
  config = get_config()
  config.task, config.compare.runs = "compare", tuple(map(str, runs))
  task.run(config, tmp_path / "out")
  assert str(tmp_path / "out/compare.html") in capsys.readouterr().out
  assert {path: path.read_bytes() for run in runs for path in run.iterdir()} == before
  text = html.unescape((tmp_path / "out/compare.html").read_text(encoding="utf-8"))
  assert "a and 1 more seed" in text


# ---- settings and cost ----


def test_settings_that_differ_from_the_default():
  config = get_config()
  assert settings.changed(config) == []
  config.kl.beta, config.mesh = 0.5, (1, -1, 1)
  config.policy.chat_template_args = {"enable_thinking": False}
  found = {field: (value, default) for field, value, default in settings.changed(config)}
  assert set(found) == {"kl.beta", "mesh", "policy.chat_template_args"}
  assert found["kl.beta"] == ("0.5", repr(get_config().kl.beta))
  assert found["mesh"][0] == "(1, -1, 1)"
  saved = json.loads(config.to_json()) | {"gone": 1}
  assert ["gone", "1", settings.ABSENT] in settings.changed(saved)
  assert settings.differing([get_config(), get_config()]) == []


def test_time_of_phases_by_hand():
  times = [{"seconds/step": 100.0, "seconds/learn": 90.0, "seconds/save": 0.0}]  # compiles
  times += [{"seconds/step": 4.0, "seconds/learn": 3.0, "seconds/save": 1.0}]
  times += [{"seconds/step": 6.0, "seconds/learn": 3.0, "seconds/save": 2.0}]
  head = {"stage": "rl", "arm": "a", "seconds": 1.0}
  rows = [head | {"step": i} | each for i, each in enumerate(times)]
  found = time_of_phases(rows, "a")
  assert list(found.values()) == [3.0, 1.5, 2.0] and list(found)[-1] == "Rest of the step"
  assert time_of_phases([head | {"step": 0}], "a") == {}


def test_alarms_name_what_went_wrong():
  head = {"stage": "rl", "arm": "a", "seconds": 1.0}
  rows = [head | {"step": 0, "skipped": 2.0, "spikes": 0.0, "kl": float("nan")}]
  assert troubles(rows) == [
    "rl a: 2 updates were skipped because a number was not finite, in the logged steps.",
    "rl a: 1 logged values were not finite.",
  ]
  assert troubles([head | {"step": 0, "skipped": 0.0}]) == []


def test_further_seeds_of_a_run_are_part_of_its_line(tmp_path):
  first = write_run(tmp_path / "run")
  for seed in (1, 10, 2):
    write_run(tmp_path / f"run/seeds/{seed}", seed=seed)
  (tmp_path / "run/seeds/3").mkdir()  # has not logged anything yet
  (tmp_path / "run/seeds/.DS_Store").write_bytes(b"Bud1")
  found = task.with_seeds(first)
  assert [folder.name for folder in found] == ["run", "1", "2", "10"]
  (line,) = compare.lines_of(compare.arms_in(found))
  assert line.name == "run and 3 more seeds"
