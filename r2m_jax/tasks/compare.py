"""Several runs on one page: their curves, final numbers, settings that differ, and texts.

  r2m --config=default --workdir=runs/compared --config.task=compare \\
      --config.compare.runs="('runs/a', 'runs/b')"

Writes WORKDIR/compare.html. A run with several seeds is one curve with its interval. The runs are only
read, and may still be training.
"""

import os
from pathlib import Path

from r2m_jax.config import ConfigError
from r2m_jax.parallel import hosts
from r2m_jax.report import compare
from r2m_jax.run.files import subfolders
from r2m_jax.run.workdir import SEEDS, claim


def run(config, workdir: Path) -> None:
  """Writes the page and prints where it is.

  Raises:
    ConfigError: a folder of config.compare.runs is not a run, or is named twice.
  """
  workdirs = [each for folder in runs_of(config) for each in with_seeds(folder)]
  claim(config, workdir)

  def write() -> None:
    path = compare.write(workdirs, workdir / "compare.html")
    print(f"compared {', '.join(map(str, workdirs))}\nreport   {path}")

  hosts.on_first(write)


def with_seeds(workdir: Path) -> list[Path]:
  """A run's workdir and those of its further seeds that have logged a row."""
  folders = [folder for folder in subfolders(workdir / SEEDS) if folder.name.isdecimal()]
  further = sorted(folders, key=lambda folder: int(folder.name))
  return [workdir, *(folder for folder in further if (folder / "metrics.jsonl").is_file())]


def runs_of(config) -> list[Path]:
  """The folders of config.compare.runs."""
  folders = [Path(os.path.expanduser(name)) for name in config.compare.runs]
  for folder in folders:
    if not (folder / "config.json").is_file():
      raise ConfigError(
        f"config.compare.runs names {str(folder)!r}: there is no config.json, so no run; give the "
        "workdir of a run"
      )
    if not (folder / "metrics.jsonl").is_file():
      raise ConfigError(
        f"config.compare.runs names {str(folder)!r}: there is no metrics.jsonl, so nothing was "
        "logged yet; wait for the run's first row, or leave it out"
      )
  if len({folder.resolve() for folder in folders}) < len(folders):
    raise ConfigError(
      f"config.compare.runs is {tuple(config.compare.runs)!r}: it names a folder twice; leave one out"
    )
  return folders
