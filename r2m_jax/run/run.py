"""A run and its loop, the same for every task: from a first state to the last step."""

import dataclasses
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from r2m_jax.algorithm.variants import VARIANTS
from r2m_jax.parallel import hosts
from r2m_jax.run import checkpoint, loop, speed
from r2m_jax.run.build import Build
from r2m_jax.run.metrics import EVAL, Metrics, append_samples
from r2m_jax.run.progress import progress
from r2m_jax.run.speed import phase, profiled, take_seconds

PROFILE = "profile"  # folder of a trace


class Steps(NamedTuple):
  """The functions that the loop calls, made once for the state from which it continues."""

  batches: Iterator[tuple]  # tuples of `step`'s arguments after the state; Prompts first
  # (state, *batch) -> (state, StepOutput, *seen); the state is donated, `seen` belongs to the task
  step: Callable
  # (step number, state, StepOutput on the host, batch, *seen) -> (metrics, values for the bar)
  measure: Callable


class Texts(NamedTuple):
  """How to show a step to a reader, for task=replay."""

  # (StepOutput on the host, *seen) -> tokens i32[B, L] that the reward model read, and their mask
  read: Callable
  tell: Callable[..., dict]  # (StepOutput on the host, row, *seen) -> the row's prompt and answer
  word: Callable[[int], str]  # one of the policy's tokens


@dataclasses.dataclass(frozen=True)
class Run:
  """The parts of a run that differ between tasks and arms. Each function is called when it is
  needed.

  config: of the arm, config.variant.
  built: of the program that runs it.
  first: () -> the TrainState of step 0, before a warm start. It may donate the models' weights.
  warm: (that state) -> the state with a fitted reward head, for arms that start from one.
  steps: (the state to continue from) -> its Steps.
  samples: (state, "before" or "after") -> rows of samples.jsonl; None if `measure` writes them.
  texts: None if the run cannot be replayed.
  end: (the last state) -> None; called at the end, for example to export.
  watch: sees the state at the start and after each step, see `loop.Watch`. It evaluates the state,
    and may end the run early. Its values become rows of stage "eval".
  data: fingerprint of the rows behind the prompts.
  name: the displayed name of the run; "": config.variant.
  shown: whether its progress is printed if there is no terminal.
  costed: whether it logs the cost of each step; see `speed.Cost`.
  """

  config: Any
  built: Build
  first: Callable[[], Any]
  warm: Callable[[Any], Any]
  steps: Callable[[Any], Steps]
  samples: Callable[[Any, str], list[dict]] | None = None
  texts: Texts | None = None
  end: Callable[[Any], None] | None = None
  watch: loop.Watch = loop.watch_nothing
  data: str = ""
  name: str = ""
  shown: bool = True
  costed: bool = True


def train(run: Run, workdir: Path):
  """Trains to config.steps or until `run.watch` ends it, from the newest checkpoint if there is one;
  returns the last state.

  Steps are logged and saved according to config.log and config.checkpoint. The state is a
  TrainState, or the stacked states of several seeds.

  Raises:
    CheckpointError: the checkpoint belongs to another config, other rows or other frozen models, or
      a save failed.
    Interrupted: a signal came; the step is finished and saved.
    Diverged: config.guard.max_skipped steps in a row had a skipped update, or more than half did.
  """
  config, (state, start, checkpoints, facts) = run.config, opened(run, workdir)
  if start == config.steps:
    return ended(run, state)
  steps, guard = run.steps(state), loop.Guard(config, workdir, checkpoints)
  cost = speed.Cost(config, state) if run.costed else no_cost
  with (
    loop.at_hand() as asked,
    checkpoint.finished(checkpoints),
    profiled(config.log.profile, workdir / PROFILE) as profile,
  ):
    # before `Metrics`, which drops rows of steps that are repeated; the watch may read them
    seen = run.watch(state, start, None)
    with (
      Metrics(workdir, "rl", config.variant, from_step=start, also=EVAL) as log,
      bar_of(run, start) as bar,
    ):
      loop.log_seen(log, start, seen)
      for t in range(start, start if seen.stop else config.steps):
        profile(t)
        with phase("step"):
          with phase("data"):
            batch = next(steps.batches)
          state, out, *more = steps.step(state, *batch)
          bar.dispatched()
          with phase("learn"):  # waits for the device
            out = hosts.fetch(out)
          metrics, live = steps.measure(t, state, out, batch, *more)
        loop.require_best(config, metrics)
        with phase("save"):
          log.log(t, metrics | cost(state, out, take_seconds()))
        bar.update(**live)
        guard.see(t, metrics, out, batch[0].example_id)
        with phase("eval"):
          seen = run.watch(state, t + 1, metrics)
          loop.log_seen(log, t + 1, seen)
        ends, stop = t + 1 == config.steps or bool(seen.stop), asked()
        if ends or stop or loop.is_due(config, t + 1, seen):
          with phase("save"):
            loop.save(config, workdir, checkpoints, t + 1, state, metrics, seen, facts)
        if ends or stop:
          log.close("stopped" if stop else "finished")
          break
  guard.require_learned()
  if run.samples:
    append_samples(workdir, run.samples(state, "after"))
  return ended(run, state)


def opened(run: Run, workdir: Path):
  """(the state to continue from, its step, the checkpoints, the run's facts for checkpoints)."""
  config, name = run.config, run.name or run.config.variant
  loop.warn_of_best(config)
  folder = workdir / "checkpoints" / config.variant
  checkpoints = checkpoint.open_checkpoints(folder, config.checkpoint)
  state = run.first()
  facts = dict(data=run.data, models=loop.models_of(state))
  state, start = loop.resume(config, checkpoints, state, name=name, **facts)
  if not start:
    state = warmed(run, state)
    if run.samples:
      append_samples(workdir, run.samples(state, "before"))
  return state, start, checkpoints, facts


def warmed(run: Run, state):
  """The state of step 0, after a warm start if the arm has one."""
  return run.warm(state) if VARIANTS[run.config.variant].start == "head" else state


def ended(run: Run, state):
  """The last state, after `run.end`."""
  if run.end:
    run.end(state)
  return state


def bar_of(run: Run, start: int):
  """The progress bar of the run's steps."""
  shown = run.shown or sys.stderr.isatty()
  name = run.name or run.config.variant
  return progress(run.config.steps, name, initial=start, enabled=shown)


def no_cost(state, out, seconds) -> dict[str, float]:
  """Replaces `speed.Cost` if the cost of a step is not logged."""
  del state, out, seconds
  return {}
