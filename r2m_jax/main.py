"""Entry point: python -m r2m_jax.main --config=quickstart --workdir=runs/mine
[--config.FIELD=VALUE ...]

`r2m` is the same command, and `r2m --help` lists configs and tasks.
"""

import importlib
import os
import sys
from collections.abc import Callable
from pathlib import Path

from absl import app

from r2m_jax import tasks
from r2m_jax.config import ConfigError, check_config
from r2m_jax.parallel import hosts
from r2m_jax.run import process
from r2m_jax.run.command_line import CONFIG, WORKDIR, parse_flags


def run_of(module: str) -> Callable:
  """(config) -> `run(config, workdir)` of a module, which is imported only if its task runs."""
  return lambda config: importlib.import_module(f"r2m_jax.{module}").run


def training_of(module: str) -> Callable:
  """As `run_of`, for a module of the gold-reward task, or of runs from folders if the config names
  a folder.
  """
  return lambda config: tasks.training(config, module).run


TRAINING = training_of("tasks.gold")
SERVING = run_of("tasks.serve")
TASKS = {
  "tokenizer": run_of("tasks.tokenizer"),
  "sft": TRAINING,
  "reward": TRAINING,
  "r2m": TRAINING,
  "scratch": run_of("tasks.scratch"),
  "lab": training_of("lab.grid"),
  "lab_text": run_of("lab.realtext"),
  "lab_notes": run_of("lab.notes"),
  "generate": SERVING,
  "score": SERVING,
  "judge": run_of("tasks.judge"),
  "rewardbench": run_of("tasks.rewardbench"),
  "export": run_of("tasks.export"),
  "replay": run_of("tasks.replay"),
  "analyse": run_of("analysis.analyse"),
  "compare": run_of("tasks.compare"),
  "plan": run_of("plan.plan"),
}


def main(argv):
  del argv  # read by parse_flags
  # a shell leaves the ~ of --workdir=~/runs as it is
  config, workdir = CONFIG.value, Path(os.path.expanduser(WORKDIR.value))
  process.set_up()
  with process.mistakes_end_it():
    if not WORKDIR.value:
      raise ConfigError("--workdir is empty; give one, such as --workdir=runs/mine")
    check_config(config)  # first, before any device is touched
    if config.task == "plan":
      sys.exit(0 if TASKS["plan"](config)(config, workdir) else 1)
    process.set_up_jax(config)
    with hosts.together(config.hosts):
      process.require_platform()
      run(config, workdir)


def run(config, workdir: Path) -> None:
  """Runs `config.task`, or ends the program with one line: the problem and the fix."""
  with process.trouble_ends_it(workdir):
    config = process.agreed(config, workdir)
    TASKS[config.task](config)(config, workdir)


def start() -> None:
  """The console script `r2m`."""
  app.run(main, flags_parser=parse_flags)


if __name__ == "__main__":
  start()
