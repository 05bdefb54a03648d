"""RL from a first state to the last step, the same for every task."""

import dataclasses
from collections.abc import Callable
from pathlib import Path

from r2m_jax.algorithm.variants import VARIANTS
from r2m_jax.run import checkpoint, loop
from r2m_jax.run.metrics import append_samples
from r2m_jax.types import TrainState


@dataclasses.dataclass(frozen=True)
class Run:
  """What tells one run of an arm from another. Each part is called when `train` comes to it.

  first: () -> the TrainState of step 0, before a warm start. It may use up the models' weights.
  warm: (that state) -> the state with a fitted reward head, for arms that start from one.
  steps: (the state to go on from) -> `advance` of `loop.run_steps`.
  samples: (state, "before" or "after") -> rows of samples.jsonl; None if `steps` writes them.
  data: fingerprint of the rows behind the prompts.
  watch: of `loop.run_steps`: evaluates the states of the run and may end it early.
  """

  first: Callable[[], TrainState]
  warm: Callable[[TrainState], TrainState]
  steps: Callable[[TrainState], Callable]
  samples: Callable[[TrainState, str], list[dict]] | None = None
  data: str = ""
  watch: loop.Watch = loop.watch_nothing


def train(run: Run, config, workdir: Path) -> TrainState:
  """Trains config.variant to config.steps or until `run.watch` ends it, from its newest checkpoint
  if there is one; returns the last state.

  Raises:
    CheckpointError: the checkpoint is of another config, other rows or other frozen models, or a
      save failed.
    Interrupted, Diverged: see `loop.run_steps`.
  """
  arm = config.variant
  loop.warn_of_best(config)
  checkpoints = checkpoint.open_checkpoints(workdir / "checkpoints" / arm, config.checkpoint)
  state = run.first()
  facts = dict(data=run.data, models=loop.models_of(state))
  state, fresh = loop.resume(config, checkpoints, state, **facts)
  if int(state.step) == config.steps:
    return state
  if fresh and VARIANTS[arm].start == "head":
    state = run.warm(state)
  if fresh and run.samples:
    append_samples(workdir, run.samples(state, "before"))
  advance = run.steps(state)
  state = loop.run_steps(config, workdir, checkpoints, state, advance, watch=run.watch, **facts)
  if run.samples:
    append_samples(workdir, run.samples(state, "after"))
  return state
