"""benchmarks.premise on a tiny model: its states against the library's, and its files."""

import csv
import json
import shutil
import sys

import numpy as np
import pytest
import tiny_text

from benchmarks import premise, premise_notes, premise_page
from configs import default
from r2m_jax.analysis import analyse, checks, probes
from r2m_jax.data import datasets
from r2m_jax.hf.folders import load_policy
from r2m_jax.parallel import sharding
from r2m_jax.run.files import read_jsonl

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


# ---- the notes task ----


@pytest.fixture(scope="module")
def notes_run(measured, tmp_path_factory):
  """A workdir of the notes task with the files that premise_notes reads: two steps of samples."""
  folder, rng = tmp_path_factory.mktemp("notes_run"), np.random.default_rng(3)
  for model in (folder / "models/sft", folder / "runs/vanilla/seed_0/export/policy"):
    shutil.copytree(measured[0], model)
  (folder / "config.json").write_text(json.dumps({"policy": {"system_prompt": "Be brief."}}))

  def reply():
    return " ".join(rng.permutation(WORDS)[:4])

  def ask(text):
    return [{"role": "user", "content": text}]

  def write(name, rows):
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(map(json.dumps, rows)))

  gold = [[1.0, 2.5], [2.0, 0.5], [1.0, 1.0]]
  held = [
    dict(prompt=ask(f"h {i}"), responses=[reply(), reply()], gold=g) for i, g in enumerate(gold)
  ]
  write("held_out_pairs.jsonl", held)
  against = [dict(gold_chosen=0.0, gold_rejected=1.0), dict(gold_chosen=3.0, gold_rejected=1.0)]
  pairs = [
    dict(prompt=ask(f"p {i}"), chosen=reply(), rejected=reply(), **against[i % 2])
    for i in range(20)
  ]
  write("proxy_0/pairs.jsonl", pairs)
  for step in (0, 1):
    samples = [
      dict(prompt=f"s {step} {i // 4}", response=reply(), truncated=i == 5)
      | dict(gold=float(rng.normal()), frozen=float(rng.normal()))
      for i in range(24)
    ]
    write(f"runs/vanilla/seed_0/samples/step_000{step}.jsonl", samples)
  return folder, held, pairs


def test_pairs_of_the_notes_task_are_ordered_by_gold(notes_run):
  folder, held, pairs = notes_run
  found = premise_notes.pairs_of(folder, "Be brief.")
  assert len(found) == 2 + 20  # one held-out pair is a tie
  assert [row["chosen"] for row in found[:2]] == [held[0]["responses"][1], held[1]["responses"][0]]
  assert (found[2]["chosen"], found[2]["rejected"]) == (pairs[0]["rejected"], pairs[0]["chosen"])
  assert found[3]["chosen"] == pairs[1]["chosen"] and found[3]["margin"] == 2.0
  assert [m["content"] for m in found[0]["prompt"]] == ["Be brief.", "h 0"]


def test_pairs_for_a_run_are_not_those_of_its_proxy(notes_run, monkeypatch, tmp_path):
  folder, out = notes_run[0], tmp_path / "pairs.jsonl"
  monkeypatch.setattr(sys, "argv", ["x", str(folder), f"--pairs={out}", "--seed=0"])
  assert premise_notes.main() == 0
  assert read_jsonl(out) == premise_notes.pairs_of(folder, "Be brief.")[:2]


def test_the_notes_command_measures_both(notes_run, monkeypatch, tmp_path):
  """States of a sample equal those of the same text as a pair's reply, which is read after a cached
  prompt. The gap of table 5 equals a loop over pairs of samples.
  """
  folder = notes_run[0]
  monkeypatch.setattr(premise, "DRAWS", 2)
  monkeypatch.setattr(premise, "WIDTH", 32)
  args = ["x", str(folder), f"--states={tmp_path}", f"--out={tmp_path}/out.csv", "--threads=1"]
  monkeypatch.setattr(sys, "argv", args)
  assert premise_notes.main() == 0
  pair = premise_notes.pairs_of(folder, "Be brief.")[0]
  row = dict(prompt=pair["prompt"], response=pair["chosen"], truncated=False)
  policy = folder / "models/sft"
  alone = premise_notes.mean_states(policy, [row], "Be brief.", 1, tmp_path / "one")[0]
  with np.load(tmp_path / "notes.npz") as states:
    np.testing.assert_allclose(alone, states["pooled"][-1, 0, 0], rtol=2e-3, atol=2e-4)
  samples = premise_notes.samples_of(folder / "runs/vanilla/seed_0")
  parts = [tmp_path / f"notes_samples/{first}.npy" for first in (0, 16, 32)]
  states = np.concatenate(list(map(np.load, parts))).astype(float)
  with open(tmp_path / "out.csv", newline="") as file:
    table = {r["measure"]: r for r in csv.DictReader(file) if r["check"] == "table 5"}
  assert float(table["gap"]["value"]) == pytest.approx(gap_by_loop(samples, states), abs=1e-4)


def gap_by_loop(samples: list[dict], states: np.ndarray) -> float:
  """Table 5: (sound with sound + hacking with hacking) / 2 - across, over other prompts."""
  gold, proxy = (np.array([row[name] for row in samples]) for name in ("gold", "frozen"))
  high = proxy >= np.quantile(proxy, 0.75)
  kind = {
    "hacking": high & (gold < np.quantile(gold, 0.25)),
    "sound": high & (gold >= np.median(gold)),
  }
  unit = states / np.linalg.norm(states, axis=1, keepdims=True)

  def mean(a, b):
    found = [
      unit[i] @ unit[j]
      for i in np.flatnonzero(kind[a])
      for j in np.flatnonzero(kind[b])
      if samples[i]["prompt"] != samples[j]["prompt"]
    ]
    return np.mean(found)

  within = (mean("sound", "sound") + mean("hacking", "hacking")) / 2
  return within - mean("hacking", "sound")


# ---- the page ----


def test_the_page_has_the_table_of_its_rows():
  page = (premise_page.CHECKS.parent / "premise.md").read_text(encoding="utf-8")
  assert premise_page.table(premise_page.read()) in page


def test_the_toys_cells_are_means_over_its_runs():
  with open(premise_page.CHECKS, newline="") as file:
    rows = [row for row in csv.DictReader(file) if row["data"].startswith("toy_")]
  mine = [
    float(row["value"])
    for row in rows
    if (row["reading"], row["measure"]) == ("change of phi, %", "r2m, after")
  ]
  line = next(line for line in premise_page.LINES if "phi" in line.what)
  assert len(mine) >= 2
  found = premise_page.of_runs(line.toy, premise_page.read(), premise_page.TOY)
  assert found.value == pytest.approx(np.mean(mine))
  assert premise_page.cell(None, line) == "–"


def test_new_numbers_replace_those_of_the_same_name(tmp_path, monkeypatch):
  checks_file, new = tmp_path / "checks.csv", tmp_path / "new.csv"
  head = ",".join(premise.HEAD)
  checks_file.write_text(f"{head}\na,probe,last,30,x,1,0,2,5\nb,probe,last,30,x,3,2,4,5\n")
  new.write_text(f"{head}\na,probe,last,30,x,7,6,8,5\na,probe,mean,30,x,9,8,10,5\n")
  monkeypatch.setattr(premise_page, "CHECKS", checks_file)
  run = tmp_path / "runs/r2m/seed_3"
  (run / "analysis").mkdir(parents=True)
  row = '"change of phi, %","r2m, after",0.25,nan,nan,1'
  (run / "analysis/checks.csv").write_text(f"check,measure,value,low,high,count\n{row}\n")
  premise_page.keep([new], [], [run])
  found = premise_page.read(checks_file)
  assert found["b"]["probe", "last", "30", "x"][:3] == (3, 2, 4)
  assert found["a"]["probe", "last", "30", "x"].value == 7 and len(found["a"]) == 2
  line = next(line for line in premise_page.table(found).splitlines() if "change of phi" in line)
  assert line.split(" | ")[1:] == ["about 1", "–", "–", "0.25", "– |"]
  with pytest.raises(SystemExit, match="name the workdir toy_SEED"):
    premise_page.keep([], [tmp_path / "runs"], [])
