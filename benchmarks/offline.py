"""The offline table of docs/holds.md: which features and which evidence order stored samples of
`vanilla` as gold does.

  python -m benchmarks.offline --workdir=W                 # samples: hours on a busy machine
  python -m benchmarks.offline --workdir=W --stage=fit     # fits and scores what is there: minutes
  python -m benchmarks.offline --stage=table               # prints the page's tables from its rows

Each can be stopped and resumes with the same command. Several processes may fit at the same time.
"""

import json
import sys
from pathlib import Path

from absl import app, flags

from r2m_jax.configs import quickstart
from r2m_jax.lab import grid, offline, offline_page, offline_table
from r2m_jax.lab.table import write_table
from r2m_jax.run import process
from r2m_jax.run.files import write_atomic

ROWS = Path(__file__).parents[1] / "docs" / "holds.parquet"
TUNING = tuple(range(100, 104))
HELD_OUT_PAIRS = 2048

WORKDIR = flags.DEFINE_string("workdir", "", "Folder for samples and fits")
STAGE = flags.DEFINE_enum("stage", "sample", ["sample", "fit", "table"], "See above")
SEEDS = flags.DEFINE_integer("seeds", 24, "Seeds from 0 on", 1)
TOGETHER = flags.DEFINE_integer("together", 5, "Seeds in one program", 1)


def sample(workdir: Path) -> None:
  config = offline.settings(quickstart.get_config())
  process.set_up_jax(config)
  offline.tune_all(config, TUNING, HELD_OUT_PAIRS, workdir)
  for first in range(0, SEEDS.value, TOGETHER.value):
    seeds = range(first, min(first + TOGETHER.value, SEEDS.value))
    offline.sample_all(config, list(seeds), offline.TARGETS, workdir)


def fit(workdir: Path) -> None:
  """Fits the seeds that no other process is fitting, and writes the rows of all finished ones."""
  taus = widths(workdir)
  for seed in range(SEEDS.value):
    for target in offline.TARGETS:
      path, done = offline.rows_path(workdir, seed, target), fits_path(workdir, seed, target)
      if not path.exists() or done.exists():
        continue
      with grid.alone(workdir, f"fit-{done.stem}", wait=False) as mine:
        if mine and not done.exists():
          write_atomic(done, json.dumps(offline_table.rows_of(path, seed, target, taus)))
          print(f"fits     seed {seed}, KL {target:g}", flush=True)
  rows = [row for path in sorted(done_paths(workdir)) for row in json.loads(path.read_text())]
  write_table(workdir / ROWS.name, offline_page.columns_of(rows))


def widths(workdir: Path) -> dict[str, float]:
  """The width of the prior of each set of features, chosen once."""
  path = workdir / "taus.json"
  with grid.alone(workdir, "taus"):
    if not path.exists():
      paths = {seed: offline.rows_path(workdir, seed, 0.0) for seed in TUNING}
      write_atomic(path, json.dumps(offline_table.held_out_accuracies(paths)))
  found = {
    name: {float(tau): value for tau, value in of.items()}
    for name, of in json.loads(path.read_text()).items()
  }
  taus = offline_table.chosen_taus(found)
  for name, of in found.items():
    print(f"width    {name:10} {taus[name]:g} of", {t: round(v, 4) for t, v in of.items()})
  return taus


def fits_path(workdir: Path, seed: int, target: float) -> Path:
  return workdir / "fits" / f"seed_{seed}_kl_{target:g}.json"


def done_paths(workdir: Path):
  return (workdir / "fits").glob("*.json")


def main(_):
  process.set_up()
  if STAGE.value == "table":
    print(offline_page.text(offline_page.read(ROWS)))
    return
  if not WORKDIR.value:
    sys.exit("--workdir is empty: give a folder for samples and fits")
  workdir = Path(WORKDIR.value)
  {"sample": sample, "fit": fit}[STAGE.value](workdir)


if __name__ == "__main__":
  app.run(main)
