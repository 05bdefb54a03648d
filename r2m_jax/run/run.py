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
from r2m_jax.run.metrics import Metrics, append_samples
from r2m_jax.run.progress import progress
from r2m_jax.run.speed import phase, profiled, take_seconds

PROFILE = "profile"  # folder of a trace


class Steps(NamedTuple):
  """What the loop calls, made once for the state that it goes on from."""

  batches: Iterator[tuple]  # what `step` is given, a tuple for each step; it begins with Prompts
  # (state, *batch) -> (state, StepOutput, *seen); the state is donated, `seen` is the task's own
  step: Callable
  # (step number, state, StepOutput on the host, batch, *seen) -> (metrics, values for the bar)
  measure: Callable


class Texts(NamedTuple):
  """How a person reads a step, for task=replay."""

  # (StepOutput on the host, *seen) -> tokens i32[B, L] that the reward model read, and their mask
  read: Callable
  tell: Callable[..., dict]  # (StepOutput on the host, row, *seen) -> the row's prompt and answer
  word: Callable[[int], str]  # one of the policy's tokens


@dataclasses.dataclass(frozen=True)
class Run:
  """What tells one run of an arm from another. Each part is called when it is needed.

  config: of the arm, config.variant.
  built: of the program that runs it.
  first: () -> the TrainState of step 0, before a warm start. It may use up the models' weights.
  warm: (that state) -> the state with a fitted reward head, for arms that start from one.
  steps: (the state to go on from) -> its Steps.
  samples: (state, "before" or "after") -> rows of samples.jsonl; None if `measure` writes them.
  texts: None if the run cannot be replayed.
  end: (the last state) -> None; what is made of it.
  data: fingerprint of the rows behind the prompts.
  name: what the run is called where it is shown; "" is config.variant.
  shown: whether its progress is printed if there is no terminal.
  costed: whether it logs what each step cost; see `speed.Cost`.
  """

  config: Any
  built: Build
  first: Callable[[], Any]
  warm: Callable[[Any], Any]
  steps: Callable[[Any], Steps]
  samples: Callable[[Any, str], list[dict]] | None = None
  texts: Texts | None = None
  end: Callable[[Any], None] | None = None
  data: str = ""
  name: str = ""
  shown: bool = True
  costed: bool = True


def train(run: Run, workdir: Path):
  """Trains to config.steps, from the newest checkpoint if there is one; returns the last state.

  Every step is logged and saved as config.log and config.checkpoint say. The state is a TrainState,
  or those of several seeds, stacked.

  Raises:
    CheckpointError: the checkpoint is of another config, other rows or other frozen models, or a
      save failed, now or in the background.
    Interrupted: a signal came; the step is finished and saved.
    Diverged: config.guard.max_skipped steps in a row had a skipped update, or more than half of
      all.
  """
  config, name = run.config, run.name or run.config.variant
  checkpoints = checkpoint.open_checkpoints(
    workdir / "checkpoints" / config.variant, config.checkpoint
  )
  state = run.first()
  facts = dict(data=run.data, models=loop.models_of(state))
  state, start = loop.resume(config, checkpoints, state, name=name, **facts)
  if start < config.steps:
    if not start:
      state = begin(run, state, workdir)
    state = advance(run, state, start, workdir, checkpoints, facts)
    if run.samples:
      append_samples(workdir, run.samples(state, "after"))
  if run.end:
    run.end(state)
  return state


def advance(run: Run, state, start: int, workdir: Path, checkpoints, facts: dict):
  """The loop of `train`, from step `start` on; facts: of the run, for the checkpoints."""
  config, name = run.config, run.name or run.config.variant
  steps, guard = run.steps(state), loop.Guard(config, workdir, checkpoints, start)
  cost = speed.Cost(config, state) if run.costed else no_cost
  shown = run.shown or sys.stderr.isatty()
  with (
    loop.at_hand() as asked,
    checkpoint.finished(checkpoints),
    profiled(config.log.profile, workdir / PROFILE) as profile,
    Metrics(workdir, "rl", config.variant, from_step=start) as log,
    progress(config.steps, name, initial=start, enabled=shown) as bar,
  ):
    for t in range(start, config.steps):
      profile(t)
      with phase("step"):
        with phase("data"):
          batch = next(steps.batches)
        state, out, *seen = steps.step(state, *batch)
        bar.dispatched()
        with phase("learn"):  # waits for the device
          out = hosts.fetch(out)
        metrics, live = steps.measure(t, state, out, batch, *seen)
      loop.require_best(config, metrics)
      with phase("save"):
        log.log(t, metrics | cost(state, out, take_seconds()))
      bar.update(**live)
      stop = asked()
      guard.see(t, metrics, out, batch[0].example_id)
      if stop or t + 1 == config.steps or (t + 1) % config.log.checkpoint_every == 0:
        with phase("save"):
          loop.save(config, workdir, checkpoints, t + 1, state, metrics, facts)
      if stop:
        log.close("stopped")
        break
  guard.require_learned()
  return state


def no_cost(state, out, seconds) -> dict[str, float]:
  """In place of `speed.Cost`: nothing is logged of what a step cost."""
  del state, out, seconds
  return {}


def begin(run: Run, state, workdir: Path):
  """The state of a fresh start; its samples are in samples.jsonl."""
  state = warmed(run, state)
  if run.samples:
    append_samples(workdir, run.samples(state, "before"))
  return state


def warmed(run: Run, state):
  """The state of step 0, after a warm start if the arm has one."""
  return run.warm(state) if VARIANTS[run.config.variant].start == "head" else state
