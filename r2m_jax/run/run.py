"""A run, put together from its parts."""

import dataclasses
from collections.abc import Callable
from typing import Any

from r2m_jax.run.build import Build
from r2m_jax.types import TrainState


@dataclasses.dataclass(frozen=True)
class Again:
  """The parts of a run, as it put them together."""

  built: Build
  first: TrainState  # as the run began, before a warm start
  step: (
    Callable  # (state, t) -> (state, StepOutput, input of the reward model i32[B, L'], its mask)
  )
  example_ids: Callable[[int], Any]  # of step t's prompts
  tell: Callable[
    [Any, int], dict
  ]  # (sequences on the host, row) -> texts, and what else is known of the answer
  word: Callable[[int], str]  # of one of the policy's tokens
