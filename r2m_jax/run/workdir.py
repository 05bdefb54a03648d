"""The workdir of a run: its config, what a fork copies, and stages that are done once."""

import datetime
import json
import shlex
import shutil
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp

from r2m_jax.config import ConfigError, defaults, difference, fixed, flat
from r2m_jax.parallel import hosts
from r2m_jax.run import checkpoint, lock, log
from r2m_jax.run.files import read_json, subfolders, write_atomic
from r2m_jax.run.fit import PARTIAL


class Entry(NamedTuple):
  """A file of a workdir, or a folder if the name ends with a slash."""

  name: str  # <...> stands for any text
  what: str
  writer: str
  forked: bool = False  # whether a fork copies it; facts that are found again are not


LAYOUT = (
  Entry("config.json", "the config; other settings are refused", "every run"),
  Entry(".lock", "host, process and start of the run that uses the workdir", "every run"),
  Entry("log.txt", "what the first process printed, over all starts", "every run"),
  Entry("metrics.jsonl", "scalars: a row for each step of a stage and arm", "every run", True),
  Entry("samples.jsonl", "sampled responses before and after RL", "RL", True),
  Entry("eval_samples.jsonl", "responses to held-out prompts at each evaluation", "RL", True),
  Entry("skipped.jsonl", "rows behind skipped updates", "RL", True),
  Entry("tensorboard/", "the scalars of metrics.jsonl as events", "every run"),
  Entry("trackers.json", "the run's name or id in each tracker, by stage", "every run"),
  Entry("wandb/", "files of wandb, if log.to names it", "every run"),
  Entry("mlflow.db", "runs of MLflow, if log.to names it", "every run"),
  Entry("profile/", "an xprof trace of the steps in log.profile", "RL"),
  Entry("stages/", "a folder for each finished stage: its result", "every run", True),
  Entry("checkpoints/", "a folder for each arm: its TrainState, by step", "RL", True),
  Entry("seeds/", "the workdir of each further seed", "runs with config.seeds"),
  Entry("partial/", "the state of an unfinished fit or arm", "fits, task=lab"),
  Entry("data_<stage>.json", "rows and SHA-256 of each data file of a stage", "runs on text"),
  Entry("r2m_renderer.json", "how the reward model's text is rendered", "runs from folders", True),
  Entry("hub.json", "the commit of each model from the hub", "runs from folders", True),
  Entry("budgets.json", "steps that each time budget gave", "runs from folders", True),
  Entry("export/", "Hugging Face folders: policy and reward", "runs from folders"),
  Entry("report.html", "the report", "every run"),
  Entry("figures/", "its figures", "every run"),
  Entry("replay/", "samples made again", "task=replay"),
  Entry("analysis/", "tables and figures of the analysis", "task=analyse"),
  Entry("compare.html", "several runs on one page", "task=compare"),
  Entry("label_answers.jsonl", "answers of the judge at r2m.judge_url", "runs from folders"),
  Entry("reward_answers.jsonl", "scores from the server at reward.url", "runs from folders"),
  Entry("gold_answers.jsonl", "scores from the server at eval.gold.url", "runs from folders"),
  Entry("judge.json", "the result, with judge, date and template", "task=judge"),
  Entry("judge.html", "the same as a page", "task=judge"),
  Entry("judgments.jsonl", "every verdict", "task=judge"),
  Entry(
    "answers.jsonl", "every answer of the judge; these questions are not sent again", "task=judge"
  ),
  Entry("candidate.jsonl", "answers that were generated first", "task=judge"),
  Entry("candidate.json", "how they were generated", "task=judge"),
  Entry("rewardbench.json", "accuracy and calibration of a reward model", "task=rewardbench"),
  Entry("rewardbench.html", "the same as a page", "task=rewardbench"),
  Entry("scores.jsonl", "the scores of every completion", "task=rewardbench"),
  Entry("plan.json", "the plan", "task=plan"),
  Entry("plan.txt", "the plan as printed", "task=plan"),
  Entry("models/", "models that later stages start from", "task=scratch, lab_text, lab_notes"),
  Entry("stages.json", "seconds of each stage", "task=scratch, lab_text, lab_notes"),
  Entry("tables.json", "what was measured", "task=scratch"),
  Entry(
    "table/",
    "a parquet file for each arm: every step of every run",
    "task=lab, lab_text, lab_notes",
  ),
  Entry("summary.csv", "statistics of the arms", "task=lab, lab_text, lab_notes"),
  Entry("seeds.parquet", "every statistic of every seed", "task=lab, lab_text"),
  Entry("best_of_n.parquet", "best-of-n sampling", "task=lab"),
  Entry("seeds.txt", "the statistics as printed", "task=lab, lab_text, lab_notes"),
  Entry("locks/", "which process works on what", "task=lab, lab_text, lab_notes"),
  Entry("gold_formula.py", "the gold reward of config.gold.formula", "gold tasks"),
  Entry("gold/", "workdir of the gold reward model", "task=lab_text"),
  Entry("proxy_<seed>/", "workdir of a seed's proxy reward model", "task=lab_text, lab_notes"),
  Entry("runs/", "workdirs of the RL runs, by arm and seed", "task=lab_text, lab_notes"),
  Entry("sft_samples.jsonl", "samples of the supervised policy", "task=lab_text, lab_notes"),
  Entry("steps.csv", "every step of every run, in short", "task=lab_notes"),
  Entry("data/", "the prompts and demonstrations", "task=lab_notes"),
  Entry("sft/", "workdir of the supervised policy", "task=lab_notes"),
  Entry("held_out_pairs.jsonl", "pairs that measure the proxies", "task=lab_notes"),
  Entry("reward_models.json", "accuracy of the reward models", "task=lab_text"),
  Entry("policies/", "each seed's policy at its KL targets", "benchmarks.offline"),
  Entry("rows/", "samples of these policies, and what their rewards read", "benchmarks.offline"),
)
SEEDS = "seeds"  # of a workdir: the workdirs of further seeds
AT_START = ("config.json", lock.LOCK, log.LOG)  # files that `claim` itself writes
FOUND_AGAIN = (
  "r2m_renderer.json",
  "hub.json",
  "data_*.json",
)  # facts of models and rows, found before any work
TAKEN_OVER = tuple(entry.name for entry in LAYOUT if entry.forked)


def layout_table() -> str:
  """LAYOUT as a Markdown table, for docs/resume.md."""
  rows = ["| in WORKDIR | what | written by | a fork takes it over |", "| --- | --- | --- | --- |"]
  for entry in LAYOUT:
    taken = "yes" if entry.forked else ""
    rows.append(f"| `{entry.name}` | {entry.what} | {entry.writer} | {taken} |")
  return "\n".join(rows)


def shapes_of(tree):
  """Shapes, dtypes and shardings of a tree of arrays."""
  return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), tree)


def warm(state, head):
  """The run's first state, with a fitted head instead of the random one."""
  average = None if state.reward_average is None else jax.tree.map(jnp.copy, head)
  return state.replace(reward_head=head, reward_average=average)


def with_variant(config, variant: str):
  config = config.copy_and_resolve_references()
  config.variant = variant
  return config


def claim(config, workdir: Path, *, shared: bool = False) -> None:
  """Locks the workdir, records the config in it and starts its log.txt.

  With config.checkpoint.fork_from, a new workdir first gets a copy of what that run has saved, and
  the differences are printed. With several processes the first one does this, and all must see the
  workdir.

  Args:
    shared: other processes may also claim it as shared at the same time. They divide the work by
      other means.

  Raises:
    ConfigError: the workdir has been used by another config, is in use by another run, or cannot
      be written. Nothing saved is lost.
  """
  hosts.on_first(lambda: claim_alone(config, workdir, shared))
  hosts.require_shared(workdir)


def claim_alone(config, workdir: Path, shared: bool) -> None:
  """The part of `claim` that only the first process does."""
  path = workdir / "config.json"
  new = json.loads(config.to_json())
  old = Path(config.checkpoint.fork_from).expanduser() if config.checkpoint.fork_from else None
  try:
    # a shared workdir may belong to a process that has just started
    begun = path.exists() and (shared or is_begun(workdir))
    if begun:
      require_same_config(path, new)
    elif old:
      require_new(old, workdir)
    lock.take(workdir, shared=shared)
    if path.exists() and not begun and fixed_difference(path, new):
      for stale in (file for pattern in FOUND_AGAIN for file in workdir.glob(pattern)):
        stale.unlink()
    if old and not begun:
      take_over(old, workdir, new)
    write_atomic(path, json.dumps(new, indent=2))
    log.begin(workdir)
  except (OSError, ValueError) as error:
    if isinstance(error, ConfigError):
      raise
    raise ConfigError(
      f"--workdir={workdir} cannot be used: {error}; give one that can be written"
    ) from None


def is_begun(workdir: Path) -> bool:
  """Whether a run has left any work in its workdir. A run that was refused at its start has not, so
  it may be corrected and started again.
  """
  facts = {path for pattern in FOUND_AGAIN for path in workdir.glob(pattern)}
  visible = (path for path in workdir.iterdir() if not path.name.startswith("."))
  return any(path.name not in AT_START and path not in facts for path in visible)


def require_same_config(path: Path, new: dict) -> None:
  """Raises ConfigError with the differences if a workdir's config.json belongs to another run."""
  if changed := fixed_difference(path, new):
    workdir = path.parent
    raise ConfigError(
      f"{workdir} holds a run of another config; choose another --workdir, give the old "
      "values, or fork it with "
      f"another --workdir and --config.checkpoint.fork_from={shlex.quote(str(workdir))}:\n  "
      + "\n  ".join(changed)
    )


def with_date(config, workdir: Path):
  """The config with `data.date`: the given date, or the date of the run in the workdir or of the
  run that it forks, or today.
  """
  if config.data.date:
    return config

  def date() -> str:
    for folder in (workdir, Path(config.checkpoint.fork_from or workdir).expanduser()):
      if (folder / "config.json").is_file():
        return read_json(folder / "config.json").get("data", {}).get("date") or today()
    return today()

  config = config.copy_and_resolve_references()
  config.data.date = hosts.on_first(date)
  return config


def today() -> str:
  return datetime.date.today().isoformat()


def fixed_difference(path: Path, new: dict) -> list[str]:
  """The differences between a config.json and this config, among settings that affect the result.

  An earlier version may have saved config.json without some settings. They then had what is now
  their default, because a new setting by default does what was done before.
  """
  saved, given = flat(fixed(read_json(path))), flat(fixed(new))
  usual = {name: value for name, value in defaults().items() if name in given}
  return difference(usual | saved, given)


def require_new(old: Path, workdir: Path) -> None:
  """Raises ConfigError if `old` is not a run, or if `workdir` cannot hold a fork of it."""
  if not (old / "config.json").is_file():
    raise ConfigError(
      f"config.checkpoint.fork_from is {str(old)!r}: there is no config.json, so no run to start "
      "from; give the workdir of a run"
    )
  if workdir.exists() and is_begun(workdir):
    raise ConfigError(f"--workdir={workdir} is not empty: a fork needs a new one; name another")
  if workdir.resolve().is_relative_to(old.resolve()):
    raise ConfigError(
      f"--workdir={workdir} lies in {old}, which the fork only reads: give one elsewhere"
    )


def take_over(old: Path, workdir: Path, new: dict) -> None:
  """Copies stages, the newest intact checkpoint of each arm, metrics and samples of another run,
  which is only read.
  """
  workdir.mkdir(parents=True, exist_ok=True)
  changed = fixed_difference(old / "config.json", new)
  print(f"fork     from {old}" + "".join(f"\n  {line}" for line in changed))
  for name in TAKEN_OVER:
    measured_anew = name == "budgets.json" and any("budget: " in line for line in changed)
    if name.endswith("/"):
      take_newest(old / name, workdir / name)
    elif (old / name).is_file() and not measured_anew:
      shutil.copyfile(old / name, workdir / name)


def take_newest(old: Path, new: Path) -> None:
  """Copies the newest intact checkpoint of every folder in `old`."""
  for folder in subfolders(old):
    steps = sorted(
      (int(path.name) for path in folder.iterdir() if path.name.isdecimal()), reverse=True
    )
    step = next((step for step in steps if checkpoint.damage(folder / str(step)) is None), None)
    if step is not None:
      shutil.copytree(folder / str(step), new / folder.name / str(step))


def stage(workdir: Path, name: str, like, make, *, frozen=None):
  """The result of a stage: read from the workdir if it was saved before, otherwise made and saved.

  Args:
    like: shapes, dtypes and shardings of the result.
    make: () -> the result.
    frozen: a tree of arrays that the result depends on, such as the base of adapters; it must not
      have changed.
  """
  checkpoints = checkpoint.open_checkpoints(workdir / "stages" / name, last=1)
  facts = {} if frozen is None else {"models": checkpoint.fingerprint(frozen)}
  if (step := checkpoint.newest(checkpoints)) is not None:
    checkpoint.require(checkpoints, step, **facts)
    print(f"{name}: done before, read from {workdir / 'stages' / name}")
    return checkpoint.restore(checkpoints, like)
  result = make()
  checkpoint.save(checkpoints, 0, result, facts=facts)
  checkpoint.wait(checkpoints)
  if hosts.first():
    shutil.rmtree(workdir / PARTIAL / name, ignore_errors=True)
  return result


def saved(workdir: Path, name: str, like, make=None, *, frozen=None):
  """The result of a finished stage of a run that is only read: nothing is made or set aside.

  The arguments are those of `stage`.

  Raises:
    CheckpointError: its files are damaged.
  """
  del make, frozen
  return checkpoint.restore(checkpoint.open_checkpoints(workdir / "stages" / name), like, 0)
