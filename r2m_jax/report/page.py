"""The report of a run: metrics.jsonl and samples.jsonl as figures/*.png and one self-contained
report.html, which template.html makes of sections.

A section is a dict whose `kind` is a macro of the template: "lead", "points", "table", "figure",
"samples", "slider" or "settings". All text in it is plain: the template escapes it.
"""

import base64
import functools
import json
import math
from pathlib import Path

import jinja2

from r2m_jax.report.figures import COLOURS, FIGURES, arms_with, draw_figure, style_of
from r2m_jax.report.summary import (
  alarm_line,
  arms_of,
  cautions,
  control_case,
  evaluations,
  findings,
  first_alarm,
  format_summary,
  number,
  summary_table,
  with_interval,
)
from r2m_jax.run.files import read_json, read_jsonl, write_atomic
from r2m_jax.run.metrics import ROW_KEYS, read_metrics

__all__ = ["format_summary", "summary_table", "write_report"]

MAX_PROMPTS, MAX_CHARS = 40, 4000  # what the sample table shows


def write_report(workdir, *, title, notes=(), tables=(), config=None):
  """Writes WORKDIR/report.html and WORKDIR/figures/*.png; returns the page's path.

  notes: plain sentences to show under the findings. tables: dicts of title, head, rows (lists of
  text) and note.
  config: a dict, or None to read WORKDIR/config.json if it is there.
  """
  workdir = Path(workdir)
  rows, samples = read_metrics(workdir), read_jsonl(workdir / "samples.jsonl")
  if config is None and (workdir / "config.json").exists():
    config = read_json(workdir / "config.json")
  table = summary_table(rows)
  styles = style_of(
    list(dict.fromkeys([row["arm"] for row in rows] + [row["arm"] for row in samples]))
  )
  sections = [_headline(table, notes, alarms(rows))]
  if measured := evaluation_table(rows, styles):
    sections.append(table_section(measured))
  if table:
    sections.append(_summary(table, styles))
  sections += [table_section(one) for one in tables]
  named = [row if row["stage"] == "rl" else _with_stage(row) for row in rows]
  for name, heading, x, caption, panels in FIGURES:
    drawn = draw_figure(named, x, panels, styles, table[0]["matched_kl"] if table else None)
    if drawn:
      write_atomic(workdir / "figures" / f"{name}.png", drawn[0])
      keys = [_key(arm, styles) for arm in arms_with(named, panels)]
      sections.append(figure_section(heading, caption, drawn[1], keys))
  if evaluated := read_jsonl(workdir / "eval_samples.jsonl"):
    sections.append(_slider(evaluated, styles))
  if samples:
    sections.append(_samples(samples, styles))
  if config is not None:
    sections.append(settings_section(config))
  return write_page(
    workdir / "report.html", title=title, heading=title, about=describe(rows), sections=sections
  )


@functools.cache
def _template():
  environment = jinja2.Environment(
    loader=jinja2.FileSystemLoader(Path(__file__).parent),
    autoescape=True,
    undefined=jinja2.StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
  )
  return environment.get_template("template.html")


def write_page(path, *, title, heading, about, sections):
  """Writes a self-contained page of sections under a heading and a line about it; returns its path."""
  page = _template().render(title=title, heading=heading, about=about, sections=sections)
  write_atomic(path, page.strip() + "\n")
  return path


# ---- sections ----


def table_section(table):
  """A table from a dict of title, head, rows and note; a cell is text or a key to an arm."""
  return {"kind": "table", **table}


def figure_section(title, caption, images, keys=(), *, whole=False):
  """PNG images, with `keys` to the arms if there are several; `whole`: at full width."""
  return {
    "kind": "figure",
    "title": title,
    "caption": caption,
    "images": [base64.b64encode(image).decode() for image in images],
    "arms": keys if len(keys) > 1 else (),
    "whole": whole,
  }


def lead_section(title, points, care=()):
  """Sentences that stand out, and reasons to read them with care."""
  return {"kind": "lead", "title": title, "points": points, "care": care}


def points_section(title, points):
  """A list of sentences."""
  return {"kind": "points", "title": title, "points": points}


def settings_section(config):
  """The configuration as JSON, folded away."""
  shown = config.to_dict() if hasattr(config, "to_dict") else config
  return {"kind": "settings", "text": json.dumps(shown, indent=2, default=str)}


def _with_stage(row):
  return {key if key in ROW_KEYS else f"{row['stage']}/{key}": value for key, value in row.items()}


def describe(rows):
  """What was run, from the rows alone."""
  if not rows:
    return "Nothing was logged yet."
  texts = []
  for stage, word in (
    ("lm", "language modelling"),
    ("sft", "fine-tuning"),
    ("reward", "reward model"),
    ("rl", "RL"),
  ):
    mine = [row for row in rows if row["stage"] == stage]
    if mine:
      arms = list(dict.fromkeys(row["arm"] for row in mine))
      seconds = sum(max(row["seconds"] for row in mine if row["arm"] == arm) for arm in arms)
      of = (
        f", {len(arms)} arms ({', '.join(arms)})"
        if len(arms) > 1
        else f" ({arms[0]})"
        if arms[0]
        else ""
      )
      texts.append(f"{word} to step {max(row['step'] for row in mine)}{of}, {seconds:.0f} s")
  return "Logged: " + "; ".join(texts) + "."


def _key(arm, styles):
  """What shows which line of a figure is an arm's."""
  colour, dashes = styles.get(arm, (COLOURS[0], "-"))
  line = {"-": "solid", "--": "dashed", ":": "dotted"}[dashes]
  return {"name": arm or "run", "line": line, "colour": colour}


def _headline(table, notes, alarms):
  cases = [sentence for _, sentence in control_case(table)]
  points = [f"ALARM: {line}." for line in alarms] + findings(table) + cases + list(notes)
  points = points or [
    "No RL steps were logged, so there is nothing to conclude about over-optimisation."
  ]
  care = cautions(table)
  if cases:
    care.insert(
      1,
      "scaled is the control for the shrinking of the reward by ω: where r2m does not beat it, the "
      "effect is not due to the policy feedback.",
    )
  return lead_section("What this run shows", points, care)


def _summary(table, styles):
  gold = any(entry["start"] is not None for entry in table)
  matched = table[0]["matched_kl"]
  head = ["Arm"] + ["Gold start", "Gold peak (step)", "Gold end", "Share of gain lost"] * gold
  head += ["Frozen proxy start → end", "KL end", "Length start → end"]
  head += [f"Gold at KL {number(matched, 1)}"] if matched is not None else []
  rows = []
  for e in table:
    cells = [_key(e["arm"], styles)]
    if gold:
      step = "" if e["peak_step"] is None else f" ({e['peak_step']:.0f})"
      lost = "–" if e["lost_share"] is None else f"{e['lost_share']:.0%}"
      cells += [number(e["start"]), number(e["peak"]) + step, number(e["last"]), lost]
    cells += [
      f"{number(e['frozen_start'])} → {number(e['frozen_last'])}",
      number(e["kl_last"], 1),
      f"{number(e['length_start'], 1)} → {number(e['length_last'], 1)}",
    ]
    cells += [number(e["gold_at_kl"])] if matched is not None else []
    rows.append(cells)
  windows = sorted({entry["window"] for entry in table if entry["window"]})
  note = (
    (
      f"Each number is a mean over {' or '.join(map(str, windows))} logged steps. Gain is peak "
      "less start, and its "
      "lost share is (peak - end) / gain, given where the gain exceeds four standard errors of "
      "step noise. The "
      "peak is the largest of many means, so noise alone puts it a little high."
    )
    if gold
    else ""
  )
  return table_section({"title": "", "head": head, "rows": rows, "note": note})


def alarms(rows):
  """The line of each arm whose evaluations raised the alarm."""
  found = [(arm, first_alarm(evaluations(rows, arm))) for arm in arms_of(rows)]
  return [
    alarm_line(arm, since, step) for arm, raised in found if raised for step, since in [raised]
  ]


def evaluation_table(rows, styles):
  """The first, the best and the last evaluation of each arm, as a table; None without evaluations."""
  lines, gold = [], any("gold" in row for row in rows if row["stage"] == "eval")
  by = "gold" if gold else "frozen"
  for arm in arms_of(rows):
    mine = evaluations(rows, arm)
    if mine:
      best = max(mine, key=lambda row: row[by] if math.isfinite(row[by]) else -math.inf)
      for which, row in (("first", mine[0]), ("best", best), ("last", mine[-1])):
        lines.append([_key(arm, styles), *_evaluation(which, row, gold)])
  if not lines:
    return None
  head = ["Arm", "Evaluation (step)"] + ["Gold"] * gold
  head += ["Frozen proxy", "KL, nats", "Length", "Cut off", "Repetition"]
  note = f"Means over held-out prompts with 95% intervals over them. Best is by {by}."
  return {"title": "Held-out evaluation", "head": head, "rows": lines, "note": note}


def _evaluation(which, row, gold):
  """A line of `evaluation_table`, after the arm."""
  names = ["gold"] * gold + ["frozen", "kl"]
  cells = [with_interval(row, name) for name in names] + [with_interval(row, "length", digits=1)]
  cells += [f"{row['truncated']:.0%}", f"{row['repetition']:.0%}"]
  return [f"{which} ({row['step']})", *cells]


def _slider(samples, styles):
  """Each held-out prompt with its response at the first evaluation beside those at another step,
  which a slider chooses.
  """
  steps = sorted({row["step"] for row in samples})
  arms = list(dict.fromkeys(row["arm"] for row in samples))
  asked = list(dict.fromkeys(row["prompt"] for row in samples))
  by_place = {(row["prompt"], row["arm"], row["step"]): row for row in samples}
  first = {row["prompt"]: row for row in reversed(samples) if row["step"] == steps[0]}
  blocks = []
  for prompt in asked[:MAX_PROMPTS]:
    columns = []
    for arm in arms:
      found = [by_place.get((prompt, arm, step)) for step in steps]
      columns.append({"arm": _key(arm, styles), "cells": [_response(row) for row in found]})
    start = _response(first.get(prompt))
    blocks.append({"text": _cut(prompt), "first": start, "columns": columns})
  return {"kind": "slider", "steps": steps, "prompts": blocks, "of": len(asked)}


def _response(row):
  """A response of an evaluation, and a line of what was measured of it."""
  if row is None:
    return {"text": "(not evaluated at this step)", "facts": ""}
  facts = [
    f"{name} {number(_float(row[name]))}" for name in ("gold", "frozen", "kl") if name in row
  ]
  facts.append(f"{row['length']} tokens{' (cut)' if row['truncated'] else ''}")
  return {"text": _cut(row["response"]), "facts": ", ".join(facts)}


def _samples(samples, styles):
  """Every prompt with its responses: before, at steps in between, after; one row a response."""
  prompts = list(dict.fromkeys(row["prompt"] for row in samples))
  scores = {
    name: key
    for key, name in (("gold", "gold"), ("reward", "used"), ("frozen", "frozen"))
    if any(row.get(key) is not None for row in samples)
  }
  order = {"before": -1, "after": math.inf}
  blocks = []
  for prompt in prompts[:MAX_PROMPTS]:
    mine = _merge_before([row for row in samples if row["prompt"] == prompt])
    mine.sort(key=lambda row: order.get(row["when"], row["when"]))
    rows = [_sample(row, scores, styles) for row in mine]
    blocks.append({"text": _cut(prompt), "rows": rows})
  return {
    "kind": "samples",
    "prompts": blocks,
    "of": len(prompts),
    "scores": list(scores),
    "arms": list(dict.fromkeys(row["arm"] for row in samples if row["arm"])),
  }


def _sample(row, scores, styles):
  """A response as the template shows it. `scores`: name in the page -> name in the row."""
  when, length = row["when"], row.get("length")
  cut = " (cut)" if row.get("truncated") else ""
  return {
    "arm": _key(row["arm"], styles) if row["arm"] else None,
    "when": when if when in ("before", "after") else f"step {when}",
    "response": _cut(row["response"]),
    "scores": {name: number(_float(row.get(key))) for name, key in scores.items()},
    "tokens": "–" if length is None else f"{length:.0f}{cut}",
  }


def _merge_before(rows):
  """Arms start from one policy: where all have the same sample before, it is one row, of no arm."""
  before = [row | {"arm": ""} for row in rows if row["when"] == "before"]
  same = len(before) > 1 and all(row == before[0] for row in before)
  return before[:1] + [row for row in rows if row["when"] != "before"] if same else rows


def _cut(text):
  more = f" … ({len(text) - MAX_CHARS} more characters)" if len(text) > MAX_CHARS else ""
  return text[:MAX_CHARS] + more


def _float(value):
  return float(value) if value is not None else None  # a non-finite score is a string here
