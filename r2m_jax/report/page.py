"""The report of a run: metrics.jsonl and samples.jsonl become figures/*.png and one self-contained
report.html, which template.html builds from sections.

A section is a dict whose `kind` is a macro of the template: "lead", "points", "table", "figure",
"samples", "slider", "strip" or "settings". Its `tab` is the part of the page that contains it. All
its text is plain, and the template escapes it.
"""

import base64
import functools
import json
import math
from pathlib import Path

import jinja2
import numpy as np

from r2m_jax.report.cost import alarms, stage_table, time_table, troubles
from r2m_jax.report.figures import (
  FIGURES,
  arms_with,
  described,
  draw_figure,
  key_of,
  style_of,
)
from r2m_jax.report.samples import (
  attention_section,
  disagreements_section,
  evaluation_slider,
  samples_section,
)
from r2m_jax.report.settings import changed
from r2m_jax.report.summary import (
  arms_of,
  cautions,
  control_case,
  evaluations,
  findings,
  format_summary,
  number,
  summary_table,
  with_interval,
)
from r2m_jax.run.files import read_json, read_jsonl, write_atomic
from r2m_jax.run.metrics import ROW_KEYS, read_metrics

__all__ = ["format_summary", "summary_table", "write_report"]

REPLAYED = 4  # samples of task=replay that a report shows
FIRST_TAB = "Findings"  # of sections without a tab


def write_report(workdir, *, title, notes=(), tables=(), config=None):
  """Writes WORKDIR/report.html and WORKDIR/figures/*.png; returns the page's path.

  notes: plain sentences to show under the findings. tables: dicts of title, head, rows (lists of
  text) and note.
  config: a dict, or None to read WORKDIR/config.json if it is there.
  """
  workdir = Path(workdir)
  rows, samples = read_metrics(workdir), read_jsonl(workdir / "samples.jsonl")
  evaluated = read_jsonl(workdir / "eval_samples.jsonl")
  if config is None and (workdir / "config.json").exists():
    config = read_json(workdir / "config.json")
  table = summary_table(rows)
  styles = style_of(
    list(dict.fromkeys([row["arm"] for row in rows] + [row["arm"] for row in samples]))
  )
  sections = _findings(rows, table, styles, notes) + [table_section(one) for one in tables]
  if config is not None:
    sections.append(what_was_run(config))
  matched = table[0]["matched_kl"] if table else None
  sections += curves(workdir, rows, matched, styles)
  sections += text_sections(samples, evaluated, styles)
  sections += replayed_sections(workdir)
  sections += [
    table_section(one, tab="Cost") for one in (time_table(rows), stage_table(rows)) if one
  ]
  if config is not None:
    sections.append(settings_section(config))
  return write_page(
    workdir / "report.html", title=title, heading=title, about=describe(rows), sections=sections
  )


def _findings(rows, table, styles, notes):
  """The run's findings, alarms and numbers."""
  sections = [_headline(table, notes, alarms(rows))]
  if found := troubles(rows):
    sections.append(points_section("Alarms", found, alarm=True))
  if measured := evaluation_table(rows, styles):
    sections.append(table_section(measured))
  if table:
    sections.append(_summary(table, styles))
  return sections


def what_was_run(config):
  """The settings that are not at their defaults."""
  head = ["Setting", "This run", "Default"]
  note = "Every other setting has its default; docs/config.md describes each."
  title = "Settings that differ from the default"
  return table_section(
    {"title": title, "head": head, "rows": changed(config), "note": note, "words": True},
    tab="What was run",
  )


def curves(workdir, rows, matched, styles, note=""):
  """A section for each figure that the rows have data for; also writes it to WORKDIR/figures.

  The first figure, of the rewards, is part of the findings. note: a sentence for every caption.
  """
  named = [row if row["stage"] == "rl" else with_stage(row) for row in rows]
  sections = []
  for name, heading, x, caption, panels in FIGURES:
    drawn = draw_figure(named, x, panels, styles, matched)
    if drawn:
      write_atomic(workdir / "figures" / f"{name}.png", drawn[0])
      keys = [key_of(arm, styles) for arm in arms_with(named, panels)]
      alts = described(named, x, panels)
      tab = "Curves" if sections else FIRST_TAB
      text = f"{caption} {note}".strip()
      sections.append(figure_section(heading, text, drawn[1], keys, alts=alts, tab=tab))
  return sections


def replayed_sections(workdir):
  """The attention of each sample that task=replay recomputed, at most REPLAYED."""
  files = sorted((workdir / "replay").glob("*.json"))[:REPLAYED]
  return [section for file in files if (section := attention_section(read_json(file)))]


def text_sections(samples, evaluated, styles):
  """Texts of the run: each evaluation, samples, and the responses on which reward and gold disagree
  most.
  """
  sections = []
  if evaluated:
    sections.append(evaluation_slider(evaluated, styles))
  if samples:
    sections.append(samples_section(samples, styles))
  if worst := disagreements_section(samples, evaluated, styles):
    sections.append(worst)
  return sections


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
  """Writes a self-contained page of sections under a heading and a line about it; returns its path.

  Sections with a `tab` are shown in it, the others in the first tab.
  """
  names = dict.fromkeys(section.get("tab") or FIRST_TAB for section in sections)
  tabs = [
    (name, [section for section in sections if (section.get("tab") or FIRST_TAB) == name])
    for name in names
  ]
  page = _template().render(title=title, heading=heading, about=about, tabs=tabs)
  write_atomic(path, page.strip() + "\n")
  return path


# ---- sections ----


def table_section(table, *, tab=""):
  """A table from a dict of title, head, rows and note.

  A cell is text, a key to an arm, {"text", "share"} with a bar, or {"words"}, which may be long.
  With `words` in the table, all of its columns are text.
  """
  return {"kind": "table", "tab": tab, **table}


def figure_section(title, caption, images, keys=(), *, whole=False, alts=(), tab=""):
  """PNG images, with `keys` to the arms if there are several.

  whole: at full width. alts: a sentence for each image, for readers who cannot see it.
  """
  return {
    "kind": "figure",
    "tab": tab,
    "title": title,
    "caption": caption,
    "images": [base64.b64encode(image).decode() for image in images],
    "alts": alts,
    "arms": keys if len(keys) > 1 else (),
    "whole": whole,
  }


def lead_section(title, points, care=()):
  """Sentences that stand out, and reasons to read them with care."""
  return {"kind": "lead", "title": title, "points": points, "care": care}


def points_section(title, points, *, alarm=False, tab=""):
  """A list of sentences; `alarm`: highlighted as an alarm."""
  return {"kind": "points", "tab": tab, "title": title, "points": points, "alarm": alarm}


def settings_section(config):
  """The configuration as JSON, collapsed."""
  shown = config.to_dict() if hasattr(config, "to_dict") else config
  text = json.dumps(shown, indent=2, default=str)
  return {"kind": "settings", "tab": "What was run", "text": text}


def with_stage(row):
  """A row of a stage before RL, or of an evaluation, with the stage in the names of its metrics."""
  return {key if key in ROW_KEYS else f"{row['stage']}/{key}": value for key, value in row.items()}


def describe(rows):
  """A summary of what was run, only from the rows."""
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
      "scaled is the control for the shrinking of the reward by ω: if r2m does not beat it, the "
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
    cells = [key_of(e["arm"], styles)]
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
      "minus start, and its lost share is (peak - end) / gain, given if the gain exceeds four "
      "standard errors of step noise. The peak is the largest of many means, so noise by itself "
      "raises it slightly."
    )
    if gold
    else ""
  )
  return table_section({"title": "", "head": head, "rows": rows, "note": note})


def evaluation_table(rows, styles):
  """The first, the best and the last evaluation of each arm, as a table; None without evaluations."""
  lines, gold = [], any("gold" in row for row in rows if row["stage"] == "eval")
  by = "gold" if gold else "frozen"
  for arm in arms_of(rows):
    mine = evaluations(rows, arm)
    if mine:
      values = [row.get(by, math.nan) for row in mine]  # a fork may have gold only in later rows
      best = mine[int(np.argmax(np.where(np.isfinite(values), values, -np.inf)))]
      for which, row in (("first", mine[0]), ("best", best), ("last", mine[-1])):
        lines.append([key_of(arm, styles), *_evaluation(which, row, gold)])
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
