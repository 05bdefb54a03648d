"""The loop around a step: what is logged and saved, when it stops, and how the same command
resumes.

On SIGTERM or SIGINT the current step finishes, the run saves, and the program ends with exit status
75 (EX_TEMPFAIL), "resume me". A second signal ends it at once. docs/resume.md describes what each
fault leaves behind.
"""

import contextlib
import hashlib
import json
import os
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np

from r2m_jax.config import ConfigError, best_metric, identity
from r2m_jax.parallel import hosts
from r2m_jax.parallel.errors import UserError
from r2m_jax.run import checkpoint
from r2m_jax.run.checkpoint import CheckpointError, Checkpoints
from r2m_jax.run.files import plain, read_jsonl, write_atomic
from r2m_jax.run.metrics import EVAL, Metrics

RESUME = 75  # exit status of a run that a signal stopped after it has saved everything
SAMPLES_KEPT = "skipped.jsonl"


class Interrupted(BaseException):
  """A signal stopped the run. Everything is saved, and the same command resumes.

  Like KeyboardInterrupt, it is not an `Exception`: it may be raised within any library's call, and
  handlers of that library's errors must not catch it.
  """


class Diverged(UserError, RuntimeError):
  """Too many consecutive steps had an update skipped because of non-finite numbers."""

  status = 1


# ---- signals ----

_received: list[int] = []  # the first signal, if one came
_at_hand = False  # some work is being done that should be finished


@contextlib.contextmanager
def signals_end_the_run() -> Iterator[None]:
  """Inside this context, the first SIGTERM or SIGINT raises Interrupted as soon as the work
  `at_hand` is done; the second kills the process.
  """

  def received(number, frame):
    del frame
    for each in before:
      signal.signal(each, signal.SIG_DFL)
    _received.append(number)
    if not _at_hand:
      raise Interrupted(signal.Signals(number).name)
    note = (
      f"\n{signal.Signals(number).name}: finishing the current step, then saving; a second "
      "signal stops at once\n"
    )
    os.write(2, note.encode())  # not print, because the signal may interrupt a print

  before = {each: signal.signal(each, received) for each in (signal.SIGTERM, signal.SIGINT)}
  try:
    yield
  finally:
    for each, handler in before.items():
      signal.signal(each, handler)
    _received.clear()


@contextlib.contextmanager
def at_hand() -> Iterator[Callable[[], bool]]:
  """Defers signals. Yields `asked()`, whether any process got a signal; raises Interrupted at the
  end if one did.
  """
  global _at_hand
  stopping = False

  def asked() -> bool:
    nonlocal stopping
    stopping = hosts.any_of(_received)  # all stop after the same step
    return stopping

  _at_hand = True
  try:
    yield asked
  finally:
    _at_hand = False
  if _received or stopping:
    raise Interrupted(
      signal.Signals(_received[0]).name if _received else "a signal to another process"
    )


# ---- saving and resuming ----


class Seen(NamedTuple):
  """The result of a watch for one state."""

  values: dict[str, float] = {}  # of an evaluation, by their names in its row; {} if there was none
  stop: str = ""  # the reason why the run ends here; "": it does not


# (state, its step, metrics of the step before it, or None for the first state of a start) -> Seen.
# It may read the state and must not change it.
Watch = Callable[..., Seen]


def watch_nothing(state, step: int, metrics: dict | None) -> Seen:
  """The `Watch` of a run that is not evaluated and does not end early."""
  del state, step, metrics
  return Seen()


def log_seen(log: Metrics, step: int, seen: Seen) -> None:
  """Logs the row of an evaluation, if there was one."""
  if seen.values:
    log.log(step, seen.values, stage=EVAL)


def is_due(config, step: int, seen: Seen) -> bool:
  """Whether the state of this step is saved: at an interval, or because it may be among the
  best.
  """
  evaluated = bool(config.checkpoint.keep_best and seen.values)
  return evaluated or step % config.log.checkpoint_every == 0


def value_of(metric: str, metrics: dict, seen: Seen):
  """The value of `best_metric` at a step; None if there is none."""
  stage, _, name = metric.partition("/")
  return seen.values.get(name) if stage == EVAL else metrics.get(metric)


def save(config, workdir: Path, checkpoints, step: int, state, metrics, seen: Seen, facts) -> None:
  """Starts the save of a step's state, which may be donated at once.

  facts: data= and models=, fingerprints; see `resume`.
  """
  require_workdir(workdir)
  value = value_of(best_metric(config), metrics, seen)
  facts = {"config": identity(config), **facts}
  checkpoint.save(checkpoints, step, state, value=value, facts=facts)


def warn_of_best(config) -> None:
  """Warns if the best checkpoints are chosen by a reward that the run optimises."""
  best = best_metric(config)
  if config.checkpoint.keep_best and best in ("reward/used", "reward/frozen", "eval/frozen"):
    print(
      f"warning: config.checkpoint.keep_best uses {best}, the reward that this run optimises, so "
      "it keeps the checkpoint that games this reward most. Name eval/gold in "
      "config.checkpoint.best_metric: config.eval.every and, from folders, "
      "config.eval.gold.path measure it",
      file=sys.stderr,
    )


def require_best(config, metrics: dict) -> None:
  """Raises ConfigError if the best checkpoints are kept by a metric that does not exist."""
  best = best_metric(config)
  if best.startswith(f"{EVAL}/"):  # `check_evaluation` checks whether it is measured
    return
  if config.checkpoint.keep_best and best not in metrics:
    names = ", ".join(sorted(metrics))
    raise ConfigError(f"config.checkpoint.best_metric is {best!r}: choose one of {names}")


def require_workdir(workdir: Path) -> None:
  """Raises CheckpointError if the workdir was deleted during the run."""
  if not (workdir / "config.json").exists():
    raise CheckpointError(
      f"{workdir} has vanished: bring it back, or start again with another --workdir"
    )


def resume(
  config, checkpoints: Checkpoints, state, *, data: str = "", models: str = "", name: str = ""
):
  """The state of the newest intact checkpoint and its step; `state` and 0 if there is none.

  Args:
    data: fingerprint of the rows behind the prompts.
    models: fingerprint of the frozen models: the reference (with adapters, their base) and the
      reward model.
    name: of the run, for messages; "": config.variant.

  Raises:
    CheckpointError: the checkpoint is of another config, of other rows or of other frozen models.
  """
  step = checkpoint.newest(checkpoints)
  if step is None:
    return state, 0
  if not config.checkpoint.fork_from:
    checkpoint.require(checkpoints, step, config=identity(config), data=data, models=models)
  state = checkpoint.restore(checkpoints, state, step)
  print(f"{name or config.variant}: resumes at step {step} of {config.steps}", flush=True)
  return state, step


def models_of(state) -> str:
  """Fingerprint of the frozen models of a run: the reference (with adapters, their base) and the
  reward model.
  """
  return checkpoint.fingerprint((state.ref, state.reward_backbone, state.reward_frozen))


def fingerprint(rows) -> str:
  """SHA-256 of any JSON value."""
  return hashlib.sha256(json.dumps(rows, sort_keys=True).encode()).hexdigest()


# ---- non-finite numbers ----


class Guard:
  """Counts the steps with a skipped update, saves their rows, and stops a run that learns nothing.

  Metrics without "skipped" belong to several seeds, which do not stop each other.
  """

  def __init__(self, config, workdir: Path, checkpoints: Checkpoints):
    self.config = config
    self.workdir = workdir
    self.checkpoints = checkpoints
    self.in_a_row: list[int] = []
    self.seen = self.skipped = 0  # steps

  def see(self, t: int, metrics: dict, out, example_id) -> None:
    """Raises Diverged after step t if too many in a row had a skipped update.

    Args:
      out: StepOutput of the step, on the host.
      example_id: of its prompts, i32[P].
    """
    self.seen += 1
    if not metrics.get("skipped"):
      self.in_a_row = []
      return
    self.in_a_row.append(t)
    self.skipped += 1
    keep_rows(self.workdir, self.config.variant, t, out, example_id)
    if len(self.in_a_row) >= self.config.guard.max_skipped:
      raise Diverged(report(self.workdir, self.checkpoints, self.in_a_row, metrics))

  def require_learned(self) -> None:
    """Raises Diverged if more than half of the steps had a skipped update."""
    if self.skipped > self.seen / 2:
      raise Diverged(
        f"{self.config.variant}: {self.skipped} of {self.seen} steps had an update skipped because a "
        "loss, gradient or reward was not finite, so nothing is exported. Their rows are in "
        f"{self.workdir / SAMPLES_KEPT}; look at one with --config.task=replay, lower the learning "
        "rates, or look for NaN in the models' weights"
      )


def keep_rows(workdir: Path, arm: str, step: int, out, example_id) -> None:
  """Saves the rows of a step whose update was skipped, for task=replay: rows with a non-finite
  score, or all rows if every score is finite.
  """
  sequences = out.sequences
  scores = out.judged.scores
  frozen = out.judged.scores_frozen
  K, width = len(scores) // len(example_id), sequences.response_mask.shape[1]
  bad = ~(np.isfinite(scores) & np.isfinite(frozen))
  rows = [
    {
      "arm": arm,
      "step": step,
      "example_id": int(example_id[i // K]),
      "sample": i % K,
      "prompt": sequences.tokens[i, :-width][sequences.token_mask[i, :-width]].tolist(),
      "response": sequences.tokens[i, -width:][sequences.response_mask[i]].tolist(),
      "reward": plain(scores[i]),
      "frozen": plain(frozen[i]),
    }
    for i in np.flatnonzero(bad if bad.any() else ~bad).tolist()
  ]
  path = workdir / SAMPLES_KEPT
  kept = [row for row in read_jsonl(path) if (row["arm"], row["step"]) != (arm, step)]
  write_atomic(path, "".join(json.dumps(row, allow_nan=False) + "\n" for row in kept + rows))


def report(workdir: Path, checkpoints: Checkpoints, steps: list[int], metrics: dict) -> str:
  """The report of a run that diverged, for its user."""
  wrong = [name for name, value in metrics.items() if value is not None and not np.isfinite(value)]
  return (
    f"steps {steps[0]} to {steps[-1]} each had an update skipped because a loss, gradient or "
    "reward was not finite\n"
    f"  not finite   {', '.join(wrong) or 'gradients alone'}\n"
    f"  rows         {workdir / SAMPLES_KEPT}; look at one with --config.task=replay\n"
    f"  saved        step {checkpoints.latest_step()} in {checkpoints.folder}; nothing that was "
    "skipped is in it\n"
    "  what to do   lower the learning rates or raise config.kl.beta in a fork "
    "(config.checkpoint.fork_from), or look\n"
    "               for the cause in the rows; config.guard.max_skipped says how long to wait "
    "before stopping"
  )
