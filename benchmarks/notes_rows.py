"""The rows of runs of configs/smollm2_notes.py: read from workdirs, kept in two small files."""

import csv
import io
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

import numpy as np

from r2m_jax.goldtask import notes
from r2m_jax.lab.notes import COLUMNS, END, SAMPLES, as_text, steps_csv
from r2m_jax.lab.realtext import SAMPLES as SFT_SAMPLES
from r2m_jax.lab.table import Curves, read_table, write_table
from r2m_jax.run.files import read_jsonl, write_atomic

HELD_OUT = -1  # as a step: samples for the held-out prompts, after RL
SFT = "sft"  # as an arm: the policy before RL

Runs = dict[str, dict[int, dict[str, np.ndarray]]]  # arm -> seed -> column of steps.csv -> f64[T]


class Rows(NamedTuple):
  """All steps, and all samples without their texts."""

  steps: list[dict[str, str]]  # rows of steps.csv
  # arm, seed, step, prompt (its number in the step), gold, used, frozen: [N] each
  samples: dict[str, np.ndarray]


def sample_rows(arm: str, seed: int, step: int, file: Path) -> Iterable[tuple]:
  """The samples of one file; rewards that it does not have are NaN."""
  numbers: dict[str, int] = {}
  for row in map(as_text, read_jsonl(file)):
    prompt = numbers.setdefault(row["prompt"], len(numbers))
    gold = row["gold"] if "gold" in row else float(notes.gold([row])[0])
    rewards = (float(row.get(name, np.nan)) for name in ("used", "frozen"))
    yield arm, seed, step, prompt, gold, *rewards


def of_workdir(workdir: Path) -> Rows:
  """The rows of all runs of a workdir, finished or not, and of the policy before RL. Samples of steps
  that a run has still to repeat are left out.
  """
  steps = list(csv.DictReader(io.StringIO(steps_csv(workdir))))
  done = {(row["arm"], row["seed"], row["step"]) for row in steps}
  found: list[tuple] = []
  if (workdir / SFT_SAMPLES).exists():
    found += sample_rows(SFT, 0, HELD_OUT, workdir / SFT_SAMPLES)
  for run in sorted(workdir.glob("runs/*/seed_*")):
    arm, seed = run.parent.name, int(run.name.removeprefix("seed_"))
    for file in sorted((run / SAMPLES).glob("step_*.jsonl")):
      step = int(file.stem.removeprefix("step_"))
      if (arm, str(seed), str(step)) in done:
        found += sample_rows(arm, seed, step, file)
    if (run / END).exists():
      found += sample_rows(arm, seed, HELD_OUT, run / END)
  names = ("arm", "seed", "step", "prompt", "gold", "used", "frozen")
  kinds = (object, np.int64, np.int64, np.int64, np.float32, np.float32, np.float32)
  columns = zip(*found) if found else ((),) * len(names)
  samples = {n: np.array(list(x), kind) for n, x, kind in zip(names, columns, kinds)}
  return Rows(steps, samples)


def files_of(stem: Path) -> tuple[Path, Path]:
  return stem.with_suffix(".csv"), stem.with_suffix(".parquet")


def read(path: Path) -> Rows:
  """The rows of a workdir, or those of the two files FOLDER/NAME.csv and FOLDER/NAME.parquet if
  `path` is FOLDER/NAME.
  """
  steps, samples = files_of(path)
  if path.is_dir() or not steps.exists():
    return of_workdir(path)
  with open(steps, newline="", encoding="utf-8") as file:
    return Rows(list(csv.DictReader(file)), read_table(samples)[0])


def joined(parts: list[Rows]) -> Rows:
  """The rows of several workdirs; those of the policy before RL are taken from the first.

  Raises:
    SystemExit: two of them have steps of the same run.
  """
  runs = [{(row["arm"], row["seed"]) for row in part.steps} for part in parts]
  if len(set().union(*runs)) < sum(map(len, runs)):
    raise SystemExit("two of the workdirs have the same run; give one of them")
  kept = [parts[0].samples]
  for part in parts[1:]:
    ours = part.samples["arm"] != SFT
    kept.append({name: values[ours] for name, values in part.samples.items()})
  samples = {name: np.concatenate([part[name] for part in kept]) for name in kept[0]}
  return Rows([row for part in parts for row in part.steps], samples)


def keep(rows: Rows, stem: Path) -> None:
  """Writes the two files that `read` reads."""
  steps, samples = files_of(stem)
  text = io.StringIO()
  writer = csv.DictWriter(text, ["arm", "seed", "step", *COLUMNS], lineterminator="\n")
  writer.writeheader()
  writer.writerows(rows.steps)
  write_atomic(steps, text.getvalue())
  write_table(samples, rows.samples)


def runs_of(rows: Rows) -> Runs:
  """All runs with at least one step."""
  found: dict = {}
  for row in rows.steps:
    columns = found.setdefault(row["arm"], {}).setdefault(int(row["seed"]), {})
    for name in COLUMNS:
      columns.setdefault(name, []).append(float(row[name]) if row[name] else np.nan)
  return {
    arm: {
      seed: {name: np.array(values) for name, values in columns.items()}
      for seed, columns in seeds.items()
    }
    for arm, seeds in found.items()
  }


def curves_of(runs: Runs) -> dict[str, dict[float, Curves]]:
  """Gold and KL of the arms, as `r2m_jax.lab.contrasts` reads them."""
  found = {}
  for arm, seeds in runs.items():
    columns = {"reward/gold": "gold", "kl": "kl"}
    metrics = {
      name: np.stack([seeds[seed][column] for seed in sorted(seeds)])
      for name, column in columns.items()
    }
    found[arm] = {1.0: Curves(np.nan, sorted(seeds), metrics)}
  return found
