"""Evaluations during a run: their alarm, and when the run ends early.

Nothing here reaches training. All decisions are functions of the config and of the rows of
metrics.jsonl up to a step, so a resumed run makes the same decisions as an uninterrupted one.
"""

import json
import math
from pathlib import Path

from r2m_jax.config import best_metric
from r2m_jax.parallel import hosts
from r2m_jax.parallel.errors import UserError
from r2m_jax.report.summary import alarm, alarm_line, evaluation_line
from r2m_jax.run.files import plain, read_jsonl, write_atomic
from r2m_jax.run.loop import Seen
from r2m_jax.run.metrics import EVAL, read_metrics
from r2m_jax.tasks.evaluation import Evaluate
from r2m_jax.types import TrainState

SAMPLES = "eval_samples.jsonl"


class NotFinite(UserError, ValueError):
  """An evaluation has no finite result because of the models."""


class Watch:
  """The `loop.Watch` of one arm: evaluates every config.eval.every steps, before the first step and
  after the last, and ends the run according to config.stop.

  Args:
    evaluate: None: there are no evaluations.
  """

  def __init__(self, config, workdir: Path, evaluate: Evaluate | None = None):
    self.config = config
    self.workdir = workdir
    self.evaluate = evaluate
    self.rows: list[dict] = []  # of the evaluations so far, {"step", **values}

  def __call__(self, state: TrainState, step: int, metrics: dict | None) -> Seen:
    if metrics is None:
      return self.begin(state, step)
    stop = self.kl_reached(metrics["kl"], step)
    values = self.values_at(state, step, due=bool(stop) or self.is_due(step))
    stop = stop or (self.out_of_patience() if values else "")
    return self.end(step, values, stop)

  def begin(self, state: TrainState, step: int) -> Seen:
    """Reads what earlier starts logged up to `step`; evaluates the state if they have not done
    so.
    """
    logged = hosts.on_first(self.logged)
    self.rows = [row for row in logged[EVAL] if row["step"] <= step]
    stop = ""
    for row in logged["rl"]:
      if row["step"] < step and not stop:
        stop = self.kl_reached(row.get("kl", math.nan), row["step"] + 1)
    done = bool(self.rows) and self.rows[-1]["step"] == step
    if done:
      values = {name: value for name, value in self.rows[-1].items() if name != "step"}
    else:
      values = self.values_at(state, step, due=self.is_due(step))
      require_finite(values)
    stop = stop or self.out_of_patience()
    return self.end(step, values, stop)

  def logged(self) -> dict[str, list[dict]]:
    """This arm's rows of metrics.jsonl by stage, with the step as the only key of the row."""
    rows: dict[str, list[dict]] = {"rl": [], EVAL: []}
    for row in read_metrics(self.workdir):
      if row["stage"] in rows and row["arm"] == self.config.variant:
        left_out = ("stage", "arm", "seconds")
        rows[row["stage"]].append({k: v for k, v in row.items() if k not in left_out})
    return rows

  def is_due(self, step: int) -> bool:
    every = self.config.eval.every
    return self.evaluate is not None and (step % every == 0 or step == self.config.steps)

  def values_at(self, state: TrainState, step: int, *, due: bool) -> dict[str, float]:
    """Evaluates the state, prints the results and writes the samples; {} if no evaluation is
    due.
    """
    if not due or self.evaluate is None:
      return {}
    arm, found = self.config.variant, self.evaluate(state)
    # rounded as in metrics.jsonl, from which a resumed run decides
    values = {name: float(plain(value)) for name, value in found.values.items()}
    self.rows.append({"step": step, **values})
    print(evaluation_line(arm, step, values))
    hosts.on_first(lambda: self.write(found.samples, step))
    since = alarm(self.rows)
    if since is not None and alarm(self.rows[:-1]) is None:
      print(f"ALARM    {alarm_line(arm, since, step)}")
    return values

  def write(self, samples: list[dict], step: int) -> None:
    """Adds this step's samples to eval_samples.jsonl, and drops the arm's samples from this step
    on.
    """
    path, arm = self.workdir / SAMPLES, self.config.variant
    samples = [{"arm": arm, "step": step, **row} for row in samples]
    kept = [row for row in read_jsonl(path) if row["arm"] != arm or row["step"] < step]
    lines = [json.dumps(row, ensure_ascii=False, allow_nan=False) for row in kept + samples]
    write_atomic(path, "".join(line + "\n" for line in lines))

  # ---- when the run ends early ----

  def end(self, step: int, values: dict[str, float], stop: str) -> Seen:
    if stop and step < self.config.steps:
      print(f"stop     {self.config.variant} ends at step {step} of {self.config.steps}: {stop}")
    return Seen(values, stop)

  def kl_reached(self, kl: float, step: int) -> str:
    """The reason why the run ends if the step before `step` measured this KL; "" if it does not
    end.
    """
    limit = self.config.stop.kl
    if not 0 < limit <= kl:
      return ""
    return f"at step {step - 1} the KL was {kl:.3g}, and config.stop.kl is {limit:g}"

  def out_of_patience(self) -> str:
    """The reason why the run ends after the evaluations so far; "" if it does not end."""
    patience, metric = self.config.stop.patience, best_metric(self.config)
    if not patience or self.evaluate is None:
      return ""
    best, waited = best_so_far(self.rows, metric.removeprefix(f"{EVAL}/"), self.config)
    if waited < patience:
      return ""
    return (
      f"{waited} evaluations in a row had no better {metric} than step {best['step']}, and "
      f"config.stop.patience is {patience}"
    )


def require_finite(values: dict[str, float]) -> None:
  """Raises NotFinite if the first evaluation of a start has a non-finite number."""
  wrong = [name for name, value in values.items() if not math.isfinite(value)]
  if wrong:
    raise NotFinite(
      f"the first evaluation has no finite value of {', '.join(wrong)}: the weights of a model may "
      "hold NaN or infinity (gold: config.eval.gold.path, frozen: config.reward.path), or overflow "
      "in config.dtype; try --config.dtype=float32, or copy the folder again"
    )


def best_so_far(rows: list[dict], name: str, config) -> tuple[dict, int]:
  """The first row with the best finite value, and the number of rows after it. Without such a
  value, the first row is used.
  """
  sign = 1 if config.checkpoint.best_mode == "max" else -1

  def worth(row: dict) -> float:
    value = row.get(name, math.nan)  # a fork may measure it only from its own first row on
    return sign * value if math.isfinite(value) else -math.inf

  if not rows:
    return {}, 0
  best = max(range(len(rows)), key=lambda i: (worth(rows[i]), -i))
  return rows[best], len(rows) - 1 - best
