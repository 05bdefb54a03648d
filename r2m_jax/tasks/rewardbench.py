"""`task=rewardbench`: measures how well a reward model orders completions with a known order.

  python -m r2m_jax.main --config=configs/default.py --workdir=W --config.task=rewardbench \\
    --config.reward.path=R --config.rewardbench.data=reward_bench_2.parquet

An R2M reward model also needs the policy whose states it reads, as --config.policy.path. WORKDIR
then holds rewardbench.json, rewardbench.html and scores.jsonl; docs/judge.md explains them.
"""

import math
import time
from pathlib import Path
from typing import Any

import numpy as np

from r2m_jax.data.jsonl import write_rows
from r2m_jax.data.rows import records
from r2m_jax.hf.folders import load_reward, mesh_of
from r2m_jax.judge.preferences import Row, measure, read_preferences
from r2m_jax.judge.results import decimal, percent, write_result
from r2m_jax.report.intervals import Interval
from r2m_jax.report.page import lead_section, settings_section, table_section, write_page
from r2m_jax.run.workdir import claim
from r2m_jax.tasks import serve


def run(config, workdir: Path) -> None:
  """Scores every completion and writes the results into the workdir."""
  claim(config, workdir)
  data = config.data.copy_and_resolve_references()
  data.name = config.rewardbench.data
  rows = read_preferences(data, records)
  mesh = mesh_of(config)
  with serve.matmul_precision(config):
    reward = load_reward(config.reward.path, config, mesh)
    given = f"config.reward.path is {config.reward.path}"
    policy = serve.policy_read_by(config, reward, mesh, given)
    flat = [
      {"where": row.where, "prompt": row.prompt, "response": text}
      for row in rows
      for text in row.completions
    ]
    scores = serve.score(config, reward, policy, flat, mesh)
  model = f"config.reward.path = {config.reward.path}"
  serve.require_finite(config, np.isfinite(scores), "scores", model)
  ends = np.cumsum([len(row.completions) for row in rows])[:-1]
  write(config, workdir, rows, np.split(scores.astype(float), ends))


def write(config, workdir: Path, rows: list[Row], scores: list[np.ndarray]) -> None:
  """Writes the files of the workdir, and prints the results."""
  result = measure(rows, scores)
  about = {
    "date": time.strftime("%Y-%m-%d %H:%M:%S"),
    "reward": config.reward.path,
    "policy": config.policy.path,
    "data": config.rewardbench.data,
  }
  each = [
    {"id": row.id, "subset": row.subset, "num_correct": row.correct, "scores": values.tolist()}
    for row, values in zip(rows, scores)
  ]
  write_rows(str(workdir / "scores.jsonl"), each)
  write_result(workdir / "rewardbench.json", about | {"result": result})
  write_page(
    workdir / "rewardbench.html",
    title="Reward model",
    heading="A reward model on preferences",
    about=f"{about['reward']} on {about['data']}, {about['date']}.",
    sections=[
      lead_section("What it gets right", findings(result), cautions(result)),
      *map(table_section, tables(result)),
      settings_section(about),
    ],
  )
  for line in [*findings(result), *cautions(result)]:
    print(f"result   {line}")
  for name, one in result["subsets"].items():
    print(f"subset   {name}: {percent(one)} of {one.count} prompts")
  print(f"wrote    {workdir / 'rewardbench.json'} and {workdir / 'rewardbench.html'}")


def share(value: float) -> str:
  return f"{100 * value:.1f}%" if math.isfinite(value) else "–"


def findings(result: dict[str, Any]) -> list[str]:
  rule = result["length_rule"]
  return [
    f"Mean accuracy over {len(result['subsets'])} subsets: {share(result['mean'])}. The rule that the "
    f"longer completion is better: {share(rule['mean'])}.",
    f"Of all pairs {percent(result['pair_accuracy'])} are in order; mean margin "
    f"{decimal(result['margin']['mean'])}.",
    f"Calibration of sigmoid(margin): expected calibration error {result['ece']:.3f}, Brier "
    f"score {result['brier']:.3f} (0.25 is uninformative).",
    f"Correlation of score and length: {result['length_correlation']:.2f} over all completions, "
    f"{result['length_correlation_within_prompts']:.2f} within prompts.",
  ]


def cautions(result: dict[str, Any]) -> list[str]:
  rule = result["length_rule"]["mean"]
  found = []
  if max(rule, 1 - rule) >= result["mean"] and len(result["subsets"]) and not result["ties"]:
    found.append(
      "Preferring the longer completion, or the shorter, does as well, so this shows only an "
      "effect of length."
    )
  return found


def tables(result: dict[str, Any]) -> list[dict]:
  rule = result["length_rule"]["subsets"]
  rows = [
    [name, percent(one), percent(Interval(rule[name].value, math.nan, math.nan, 0)), str(one.count)]
    for name, one in result["subsets"].items()
  ]
  found = [
    {
      "title": "By subset",
      "head": ["Subset", "Accuracy [95%]", "The longer one", "Prompts"],
      "rows": rows,
      "note": "1 over the number of completions tied at the maximum; the subset Ties has its published "
      "weights. Intervals are by a bootstrap over prompts.",
    }
  ]
  for name, parts in result["ties"].items():
    found.append(
      {
        "title": f"The parts of {name}",
        "head": ["Part", "Value"],
        "rows": [[part, f"{value:.3f}"] for part, value in parts.items()],
        "note": "",
      }
    )
  return found
