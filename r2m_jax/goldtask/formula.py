"""A gold reward of your own: a Python file with

  def gold(prompt: str, response: str, ended: bool) -> float

`config.gold.formula` is its path. It takes the place of the built-in gold reward of the gold-reward
task and of the notes task. Prompt and response are text; on the gold-reward task they are words with
spaces between them. `ended` is False if the response was cut off at the longest length.
"""

import functools
import importlib.util
import math
from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np

from r2m_jax.parallel import hosts
from r2m_jax.parallel.errors import UserError
from r2m_jax.run.files import write_atomic

KEPT = "gold_formula.py"  # of a workdir
EXAMPLE = ("ant rice", "ant", True)  # what a file is tried on first
SIGNATURE = "def gold(prompt: str, response: str, ended: bool) -> float"


class FormulaError(UserError, ValueError):
  """The file of config.gold.formula gives no gold reward."""


@functools.cache
def load(path: str) -> Callable[[str, str, bool], float]:
  """The function `gold` of a Python file.

  Raises:
    FormulaError: the file cannot be run or has no such function.
  """
  spec = importlib.util.spec_from_file_location("gold_formula", Path(path).expanduser())
  if spec is None or spec.loader is None:
    raise FormulaError(f"config.gold.formula is {path!r}: give a file whose name ends with .py")
  module = importlib.util.module_from_spec(spec)
  try:
    spec.loader.exec_module(module)
  except (Exception, SystemExit) as error:
    raise FormulaError(
      f"config.gold.formula is {path!r}, which cannot be run ({type(error).__name__}: {error}); "
      f"give a Python file with {SIGNATURE}"
    ) from None
  found = getattr(module, "gold", None)
  if not callable(found):
    raise FormulaError(f"config.gold.formula is {path!r}, without `gold`; write {SIGNATURE}")
  return found


def values(path: str, rows: Iterable[tuple[str, str, bool]]) -> np.ndarray:
  """Gold of rows (prompt, response, ended), f64[N].

  Raises:
    FormulaError: it raises, or returns something that is no finite number.
  """
  formula, found = load(path), []
  for prompt, response, ended in rows:
    at = f"config.gold.formula: gold({prompt!r}, {response!r}, {ended}) of {path}"
    try:
      value = float(formula(prompt, response, ended))
    except (Exception, SystemExit) as error:
      raise FormulaError(
        f"{at} raises {type(error).__name__}: {error}; let it return a number for any text"
      ) from None
    if not math.isfinite(value):
      raise FormulaError(f"{at} is {value}; let it return a finite number")
    found.append(value)
  return np.array(found, np.float64)


def keep(path: str, workdir: Path) -> None:
  """Tries the formula, and keeps a copy in the workdir: the gold reward of a run never changes.

  Raises:
    FormulaError: it does not work, or the run began with another one.
  """
  if not path:
    return
  values(path, [EXAMPLE])
  hosts.on_first(lambda: keep_alone(path, workdir / KEPT))


def keep_alone(path: str, kept: Path) -> None:
  """What the first process does of `keep`."""
  text = Path(path).expanduser().read_text(encoding="utf-8")
  if kept.exists() and kept.read_text(encoding="utf-8") != text:
    raise FormulaError(
      f"config.gold.formula: {path} has changed since the run began; restore it from {kept}, or "
      "choose another --workdir"
    )
  write_atomic(kept, text)
