"""The depth of a run: the functions between its entry and the call of a compiled program."""

import pathlib
import sys

import jax
import pytest

import r2m_jax

OURS, JAX = (str(pathlib.Path(module.__file__).parent) for module in (r2m_jax, jax))


class Reached(BaseException):
  """Raised when the step is traced, to end the run."""


def frames_to_the_step(monkeypatch, module, run) -> list[str]:
  """Names of the functions of r2m_jax on the stack, from `run()` to the one that calls the first
  jitted program of the step, outermost first. The call is detected when the program is traced.

  Args:
    module: the module from which the task imports `make_rollout`.
  """
  stack = []

  def make_rollout(*args):
    def rollout(*args):
      frame = sys._getframe()
      while frame:
        stack.insert(0, frame.f_code)
        frame = frame.f_back
      raise Reached

    return rollout

  monkeypatch.setattr(module, "make_rollout", make_rollout)
  with pytest.raises(Reached):
    run()
  files = [code.co_filename for code in stack]
  first = next(i for i, file in enumerate(files) if file.startswith(OURS))
  last = next(i for i in range(first, len(files)) if files[i].startswith(JAX))
  return [code.co_name for code in stack[first:last] if code.co_filename.startswith(OURS)]
