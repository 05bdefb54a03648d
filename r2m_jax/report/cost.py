"""The cost of a run and its alarms: time of each phase, memory, problems."""

import math

import numpy as np

from r2m_jax.report.summary import (
  alarm_line,
  arms_of,
  evaluations,
  first_alarm,
  number,
  series,
)

# metric -> name of the phase in the report. The first four are parts of a step, the others are
# between two steps.
PHASES = {
  "seconds/data": "Taking prompts",
  "seconds/rollout": "Sampling",
  "seconds/render": "Rendering for the reward model",
  "seconds/learn": "Learning: rewards, advantages, updates",
  "seconds/save": "Logging and checkpoints",
  "seconds/eval": "Evaluation",
}
WITHIN_STEP = tuple(PHASES)[:4]
RATES = {
  "speed/generated_tokens": ("Generated tokens a second", 0),
  "speed/tokens": ("Tokens a second", 0),
  "speed/mfu": ("Model FLOPs utilisation", 3),
}
MEMORY = {
  "memory/device_peak": "Largest peak of a device, GiB",
  "memory/process_peak": "Peak resident memory of the process, GiB",
}


def time_of_phases(rows: list[dict], arm: str) -> dict[str, float]:
  """Phase -> mean seconds per step, over an arm's logged steps without the first, which compiles.

  {} if the rows have no times.
  """
  mine = [row for row in rows if row["stage"] == "rl" and row["arm"] == arm]
  times = {name: series(mine, name)[1][1:] for name in ("seconds/step", *PHASES)}
  if not len(times["seconds/step"]):
    return {}
  mean = {name: float(np.mean(values)) for name, values in times.items() if len(values)}
  within = sum(mean.get(name, 0.0) for name in WITHIN_STEP)
  found = {label: mean[name] for name, label in PHASES.items() if name in mean}
  return found | {"Rest of the step": max(mean["seconds/step"] - within, 0.0)}


def time_table(rows: list[dict]) -> dict | None:
  """Seconds and share of each phase, a column for each arm; None if no step has times."""
  times = {arm: found for arm in arms_of(rows) if (found := time_of_phases(rows, arm))}
  if not times:
    return None
  labels = [*PHASES.values(), "Rest of the step"]
  lines = []
  for label in labels:
    if any(label in found for found in times.values()):
      lines.append([label, *(_part(found, label) for found in times.values())])
  lines.append(["All", *(f"{sum(found.values()):.3g} s" for found in times.values())])
  return {
    "title": "Time of a step",
    "head": ["Phase", *(arm or "run" for arm in times)],
    "rows": lines,
    "note": "Mean seconds per logged step, without the first step of an arm, which compiles.",
  }


def _part(found: dict[str, float], label: str):
  """A cell: the seconds of a phase and its share of the whole."""
  if label not in found:
    return "–"
  share = found[label] / (sum(found.values()) or 1.0)
  return {"text": f"{found[label]:.3g} s ({share:.0%})", "share": share}


def stage_table(rows: list[dict]) -> dict | None:
  """Seconds of each stage and arm, speed and memory; None if there are no rows."""
  lines = []
  for stage, arm in dict.fromkeys((row["stage"], row["arm"]) for row in rows):
    if stage == "eval":
      continue
    mine = [row for row in rows if (row["stage"], row["arm"]) == (stage, arm)]
    cells = [f"{stage} {arm}".strip(), f"{max(row['seconds'] for row in mine):.1f} s"]
    cells += [_mean(mine, name, digits) for name, (_, digits) in RATES.items()]
    cells += [_largest(mine, name) for name in MEMORY]
    lines.append(cells)
  if not lines:
    return None
  head = ["Stage", "Time", *(label for label, _ in RATES.values()), *MEMORY.values()]
  kept = [at for at in range(len(head)) if at < 2 or any(line[at] != "–" for line in lines)]
  return {
    "title": "Stages, speed and memory",
    "head": [head[at] for at in kept],
    "rows": [[line[at] for at in kept] for line in lines],
    "note": "Times cover all starts of the run. Speed is a mean over logged steps.",
  }


def _mean(rows, name, digits):
  values = series(rows, name)[1]
  return number(float(np.mean(values)), digits) if len(values) else "–"


def _largest(rows, name):
  values = series(rows, name)[1]
  return number(float(np.max(values)), 2) if len(values) else "–"


# ---- alarms ----


def alarms(rows: list[dict]) -> list[str]:
  """The line of each arm whose evaluations raised the alarm."""
  found = [(arm, first_alarm(evaluations(rows, arm))) for arm in arms_of(rows)]
  return [
    alarm_line(arm, since, step) for arm, raised in found if raised for step, since in [raised]
  ]


def troubles(rows: list[dict]) -> list[str]:
  """A sentence for each alarm: over-optimisation, skipped updates, spikes, non-finite values."""
  texts = [f"{line}." for line in alarms(rows)]
  for stage, arm in dict.fromkeys((row["stage"], row["arm"]) for row in rows):
    mine = [row for row in rows if (row["stage"], row["arm"]) == (stage, arm)]
    name = f"{stage} {arm}".strip()
    for key, what in (
      ("skipped", "updates were skipped because a number was not finite"),
      ("spikes", "updates had a gradient norm far above its limit"),
    ):
      values = series(mine, key)[1]
      if len(values) and values.sum() > 0:
        texts.append(f"{name}: {values.sum():.0f} {what}, in the logged steps.")
    broken = sum(
      isinstance(value, float) and not math.isfinite(value)
      for row in mine
      for value in row.values()
    )
    if broken:
      texts.append(f"{name}: {broken} logged values were not finite.")
  return texts
