"""Several runs on one page: their curves over steps and KL, numbers, settings and texts.

A line of a figure is an arm of a run. Runs whose settings differ only in `seed` are one line: its
mean over the seeds, with a 95% interval.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from r2m_jax.config import fixed
from r2m_jax.report import page
from r2m_jax.report.figures import FIGURES, arms_with, described, draw_figure, key_of, style_of
from r2m_jax.report.intervals import bounds, interval
from r2m_jax.report.samples import ORDER, UNEDITED, slider
from r2m_jax.report.settings import as_dict, differing
from r2m_jax.report.summary import findings, number, summary_table
from r2m_jax.run.files import read_json, read_jsonl
from r2m_jax.run.metrics import read_metrics

# entry of `summary_table` -> its column among the final numbers, and digits
NUMBERS = {
  "start": ("Gold start", 2),
  "peak": ("Gold peak", 2),
  "last": ("Gold end", 2),
  "gold_at_kl": ("Gold at KL", 2),
  "frozen_last": ("Frozen proxy end", 2),
  "kl_last": ("KL end", 1),
  "length_last": ("Length end", 1),
}
DRAWN = {"kl"} | {panel[0] for *_, panels in FIGURES for panel in panels}


class Arm(NamedTuple):
  """One arm of one run."""

  name: str  # of the folder, with the arm's name if the run has several arms
  arm: str
  config: dict
  rows: list[dict]  # of metrics.jsonl
  samples: list[dict]  # of samples.jsonl
  evaluated: list[dict]  # of eval_samples.jsonl


class Line(NamedTuple):
  """One line of the figures: an arm of runs that differ only in their seed."""

  name: str
  arms: list[Arm]  # one for each seed


def arms_in(workdirs: Sequence[Path]) -> list[Arm]:
  """The arms of several runs, in their order.

  Raises:
    DamagedFile: a file of a run is damaged.
  """
  found = []
  for workdir, folder in zip(workdirs, folder_names(workdirs)):
    config, rows = read_json(workdir / "config.json"), read_metrics(workdir)
    samples = read_jsonl(workdir / "samples.jsonl")
    evaluated = read_jsonl(workdir / "eval_samples.jsonl")
    arms = list(dict.fromkeys(row["arm"] for row in rows if row["stage"] == "rl"))
    for arm in arms or [""]:
      name = f"{folder} {arm}" if len(arms) > 1 else folder
      mine = [[row for row in kind if row["arm"] == arm] for kind in (rows, samples, evaluated)]
      found.append(Arm(name, arm, config, *mine))
  return found


def folder_names(workdirs: Sequence[Path]) -> list[str]:
  """The shortest distinct ends of the paths."""
  parts = [workdir.resolve().parts for workdir in workdirs]
  depth = 1
  while len({each[-depth:] for each in parts}) < len(parts) and depth < max(map(len, parts)):
    depth += 1
  return ["/".join(each[-depth:]) for each in parts]


def lines_of(arms: list[Arm]) -> list[Line]:
  """Groups arms whose settings differ only in their seeds; a second run with the same seed is a
  separate line.
  """
  groups: list[list[Arm]] = []
  for arm in arms:
    for group in groups:
      same = settings_of(group[0]) == settings_of(arm) and group[0].arm == arm.arm
      if same and arm.config.get("seed") not in [other.config.get("seed") for other in group]:
        group.append(arm)
        break
    else:
      groups.append([arm])
  return [Line(name_of(group), group) for group in groups]


def settings_of(arm: Arm) -> dict:
  """The settings that affect the result, without the seed."""
  return {name: value for name, value in fixed(arm.config).items() if name != "seed"}


def name_of(group: list[Arm]) -> str:
  """The name of the first run, and the number of other seeds."""
  others = len(group) - 1
  if not others:
    return group[0].name
  return f"{group[0].name} and {others} more seed{'s' if others > 1 else ''}"


# ---- rows ----


def rows_of(line: Line) -> list[dict]:
  """The rows of a line: its run's rows, or means over its seeds with the ends of their
  intervals.
  """
  if len(line.arms) == 1:
    return [row | {"arm": line.name} for row in line.arms[0].rows]
  several = [{(row["stage"], row["step"]): row for row in arm.rows} for arm in line.arms]
  shared = [place for place in several[0] if all(place in rows for rows in several)]
  return [mean_row([rows[place] for rows in several], line.name) for place in shared]


def mean_row(rows: list[dict], name: str) -> dict:
  """The mean over seeds of every drawn metric that all rows have, with NAME_low and NAME_high as
  the ends of its 95% interval.
  """
  first = rows[0]
  stage = "" if first["stage"] == "rl" else f"{first['stage']}/"
  merged = {"stage": first["stage"], "arm": name, "step": first["step"]}
  merged["seconds"] = float(np.mean([row["seconds"] for row in rows]))
  keys = [key for key in first if stage + key in DRAWN and all(key in row for row in rows)]
  if keys:
    values = np.array([[row[key] for key in keys] for row in rows], float)
    low, high = bounds(values)
    for at, key in enumerate(keys):
      merged[key] = float(values[:, at].mean())
      merged[f"{key}_low"], merged[f"{key}_high"] = float(low[at]), float(high[at])
  return merged


# ---- the page ----


def write(workdirs: Sequence[Path], path: Path) -> Path:
  """Writes the page of several runs; returns its path."""
  lines = lines_of(arms_in(workdirs))
  styles = style_of([line.name for line in lines])
  rows = [row for line in lines for row in rows_of(line)]
  entries = summary_table([row | {"arm": arm.name} for arm in all_arms(lines) for row in arm.rows])
  sections = [page.lead_section("What these runs show", findings(entries), cautions(lines))]
  sections.append(numbers_section(lines, entries, styles))
  sections.append(settings_table(lines))
  sections += curves(rows, styles, entries[0]["matched_kl"] if entries else None)
  sections += texts(lines, styles)
  return page.write_page(
    path,
    title=f"{len(workdirs)} runs compared",
    heading=f"{len(workdirs)} runs compared",
    about="; ".join(map(str, workdirs)),
    sections=sections,
  )


def all_arms(lines: list[Line]) -> list[Arm]:
  return [arm for line in lines for arm in line.arms]


def cautions(lines: list[Line]) -> list[str]:
  """Reasons to read the numbers with care."""
  texts = []
  if any(len(line.arms) == 1 for line in lines):
    texts.append(
      "Some lines have one seed: a difference between two of them may come from the seeds."
    )
  if any(1 < len(line.arms) < 5 for line in lines):
    texts.append("Intervals over fewer than five seeds assume a Normal distribution over seeds.")
  tasks = {arm.config.get("task") for arm in all_arms(lines)}
  if len(tasks) > 1:
    texts.append(f"The runs have different tasks: {', '.join(sorted(map(str, tasks)))}.")
  return texts


def numbers_section(lines: list[Line], entries: list[dict], styles) -> dict:
  """Final numbers, a row for each line; for several seeds a mean with its interval."""
  by_name = {entry["arm"]: entry for entry in entries}
  matched = entries[0]["matched_kl"] if entries else None
  names = [name for name in NUMBERS if any(entry.get(name) is not None for entry in entries)]
  head = ["Run", "Seeds", "Steps", *(NUMBERS[name][0] for name in names)]
  if "gold_at_kl" in names:
    head[3 + names.index("gold_at_kl")] += f" {number(matched, 1)}"
  table = []
  for line in lines:
    mine = [by_name[arm.name] for arm in line.arms if arm.name in by_name]
    steps = max((entry["last_step"] + 1 for entry in mine), default=0)
    cells = [over_seeds([entry[name] for entry in mine], NUMBERS[name][1]) for name in names]
    table.append([key_of(line.name, styles), str(len(line.arms)), str(steps), *cells])
  return page.table_section(
    {
      "title": "Final numbers",
      "head": head,
      "rows": table,
      "note": "Start and end are means over the first and the last tenth of the logged steps, the "
      "peak is the largest such mean. In brackets: 95% interval over seeds.",
    }
  )


def over_seeds(values, digits):
  """A number, or a mean with its interval; "–" if a seed has none."""
  if not values or None in values:
    return "–"
  if len(values) == 1:
    return number(values[0], digits)
  mean = interval(values)
  low, high = number(mean.low, digits), number(mean.high, digits)
  return f"{number(mean.value, digits)} [{low}, {high}]"


def settings_table(lines: list[Line]) -> dict:
  """The settings that differ between the lines."""
  configs = [
    as_dict(line.arms[0].config) | {"seed": ", ".join(str(a.config.get("seed")) for a in line.arms)}
    for line in lines
  ]
  return page.table_section(
    {
      "title": "Settings that differ",
      "head": ["Setting", *(line.name for line in lines)],
      "rows": differing(configs),
      "note": "Every other setting is the same in all runs.",
      "words": True,
    }
  )


def curves(rows: list[dict], styles, matched: float | None) -> list[dict]:
  """A section for each figure that the rows have data for."""
  named = [row if row["stage"] == "rl" else page.with_stage(row) for row in rows]
  sections = []
  for name, heading, x, caption, panels in FIGURES:
    drawn = draw_figure(named, x, panels, styles, matched)
    if drawn:
      keys = [key_of(arm, styles) for arm in arms_with(named, panels)]
      if name == "7_evaluations":
        caption = "Means over held-out prompts."
      note = f"{caption} A band is the 95% interval over seeds if a line has several."
      alts = described(named, x, panels)
      sections.append(
        page.figure_section(heading, note.strip(), drawn[1], keys, alts=alts, tab="Curves")
      )
  return sections


def texts(lines: list[Line], styles) -> list[dict]:
  """The same prompts side by side, at the steps that all lines have."""
  sections = []
  several = any(len(line.arms) > 1 for line in lines)
  note = f"{UNEDITED} If there are several seeds, the first is shown." if several else UNEDITED
  for kind, title, name, at in (
    ("evaluated", "The same held-out prompts at each evaluation", "evaluations", "at"),
    ("samples", "The same prompts before and after", "before-and-after", "at-sample"),
  ):
    found = [
      row | {"arm": line.name, "when": row.get("when", row.get("step"))}
      for line in lines
      for row in getattr(line.arms[0], kind)
    ]
    shared = shared_rows(found, [line.name for line in lines])
    whens = sorted({row["when"] for row in shared}, key=lambda when: ORDER.get(when, when))
    if shared:
      sections.append(slider(shared, whens, styles, title=title, note=note, name=name, at=at))
  return sections or [
    page.points_section("Texts", ["The runs have no prompts in common."], tab="Samples")
  ]


def shared_rows(rows: list[dict], names: list[str]) -> list[dict]:
  """The rows whose prompt and step all lines have."""
  whose: dict[tuple, set] = {}
  for row in rows:
    whose.setdefault((row["prompt"], row["when"]), set()).add(row["arm"])
  return [row for row in rows if len(whose[row["prompt"], row["when"]]) == len(set(names))]
