"""The report of a run over several seeds: means with 95% intervals, and the texts of the first seed.

Every seed is a workdir of its own. Differences between arms are paired by seed.
"""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from r2m_jax.report import page
from r2m_jax.report.compare import NUMBERS, mean_row, over_seeds
from r2m_jax.report.cost import alarms, stage_table, time_table, troubles
from r2m_jax.report.figures import key_of, style_of
from r2m_jax.report.intervals import Interval, paired
from r2m_jax.report.summary import MIN_ROWS, arms_of, number, over_optimised, summary_table
from r2m_jax.run.files import read_json, read_jsonl
from r2m_jax.run.metrics import read_metrics

BAND = "A band is the 95% interval over seeds."
SHOWN = ("start", "peak", "last", "frozen_last", "kl_last", "length_last")  # on the terminal


def write_report(workdirs: Sequence[Path], *, title: str) -> Path:
  """Writes report.html and figures/*.png into the first of the workdirs; returns the page's path."""
  first = workdirs[0]
  runs = [read_metrics(workdir) for workdir in workdirs]
  rows, table = mean_rows(runs), tables_of(runs)
  samples = read_jsonl(first / "samples.jsonl")
  evaluated = read_jsonl(first / "eval_samples.jsonl")
  styles = style_of(list(table))
  config = read_json(first / "config.json")
  seed = config["seed"]
  sections = [headline(runs, table, seed)]
  found = [f"Seed {i}: {text}" for i, run in enumerate(runs, seed) for text in troubles(run)]
  if found:
    sections.append(page.points_section("Alarms", found, alarm=True))
  sections.append(numbers_section(table, styles))
  sections.append(page.what_was_run(config))
  sections += page.curves(first, rows, matched_of(table), styles, BAND)
  sections += page.text_sections(samples, evaluated, styles)
  costs = (time_table(runs[0]), stage_table(runs[0]))
  sections += [page.table_section(one, tab="Cost") for one in costs if one]
  sections.append(page.settings_section(config))
  about = f"{len(runs)} seeds. Texts and cost are of the first one. {page.describe(runs[0])}"
  return page.write_page(
    first / "report.html", title=title, heading=title, about=about, sections=sections
  )


# ---- numbers ----


def mean_rows(runs: Sequence[list[dict]]) -> list[dict]:
  """Means over seeds of the rows that all seeds have, with the ends of their 95% intervals."""
  several = [{(row["stage"], row["arm"], row["step"]): row for row in rows} for rows in runs]
  shared = [place for place in several[0] if all(place in rows for rows in several)]
  return [mean_row([rows[place] for rows in several], place[1]) for place in shared]


def tables_of(runs: Sequence[list[dict]]) -> dict[str, list[dict]]:
  """arm -> entry of `summary_table` of each seed. The matched KL is that of all seeds and arms."""
  rl = [[row for row in rows if row["stage"] in ("rl", "eval")] for rows in runs]
  entries = summary_table(
    [row | {"arm": f"{seed} {row['arm']}"} for seed, rows in enumerate(rl) for row in rows]
  )
  found = {arm: [e for e in entries if e["arm"].split(" ", 1)[1] == arm] for arm in arms_of(rl[0])}
  return {arm: mine for arm, mine in found.items() if len(mine) == len(runs)}


def matched_of(table: dict[str, list[dict]]) -> float | None:
  """The largest KL that every arm reaches on every seed."""
  return next(iter(table.values()))[0]["matched_kl"] if table else None


def difference(table: dict[str, list[dict]], arm: str, other: str, name: str) -> Interval | None:
  """The mean difference of two arms over seeds, paired; None if a seed has no value."""
  values = [[entry[name] for entry in table[one]] for one in (arm, other)]
  return None if None in values[0] + values[1] else paired(*values)


def contrasts(table: dict[str, list[dict]]) -> list[str]:
  """A sentence on gold of each r2m arm minus `scaled`, its control."""
  texts = []
  for arm in table:
    if not arm.startswith("r2m") or "scaled" not in table:
      continue
    final = difference(table, arm, "scaled", "last")
    if final is None:
      continue
    text = f"{arm} minus scaled, paired by seed: {shown(final)} gold at the end"
    at_kl = difference(table, arm, "scaled", "gold_at_kl")
    if at_kl is not None:
      text += f", {shown(at_kl)} at KL {number(matched_of(table), 1)}"
    texts.append(text)
  return texts


def shown(found: Interval) -> str:
  """A difference with its interval, as text."""
  return f"{found.value:+.2f} [{found.low:.2f}, {found.high:.2f}]"


# ---- sentences ----


def finding(arm: str, entries: list[dict]) -> str:
  """What gold and the frozen proxy did in an arm, over its seeds."""
  name = arm or "the run"
  if min(entry["rows"] for entry in entries) < MIN_ROWS:
    return f"{name}: too few logged steps for a verdict."
  proxy = (
    f"the frozen proxy went from {mean(entries, 'frozen_start')} to {mean(entries, 'frozen_last')}"
  )
  if any(entry["start"] is None for entry in entries):
    return f"In {name} {proxy}. No gold reward was measured."
  fell = sum(map(over_optimised, entries))
  return (
    f"In {name} gold started at {mean(entries, 'start')}, peaked at {mean(entries, 'peak')} and ended "
    f"at {mean(entries, 'last')}, while {proxy}: over-optimisation in {fell} of {len(entries)} seeds."
  )


def mean(entries: list[dict], name: str) -> str:
  """A mean over seeds, without its interval."""
  return number(float(np.mean([entry[name] for entry in entries])))


def headline(runs: Sequence[list[dict]], table: dict[str, list[dict]], seed: int) -> dict:
  """The findings, and reasons to read them with care. seed: the first one."""
  points = [f"ALARM: seed {i}: {line}." for i, run in enumerate(runs, seed) for line in alarms(run)]
  points += [finding(arm, entries) for arm, entries in table.items()]
  points += [f"{text}." for text in contrasts(table)]
  care = [f"Means over {len(runs)} seeds. A difference is seen only if its interval excludes zero."]
  if len(runs) < 5:
    care.append("Intervals over fewer than five seeds assume a Normal distribution over seeds.")
  if "scaled" in table:
    care.append("scaled is the control: it shrinks the reward as r2m does and reads no feedback.")
  return page.lead_section("What this run shows", points, care)


def numbers_section(table: dict[str, list[dict]], styles) -> dict:
  """Final numbers of each arm: means over seeds with their intervals."""
  names = [
    name for name in NUMBERS if any(e.get(name) is not None for es in table.values() for e in es)
  ]
  head = ["Arm", *(NUMBERS[name][0] for name in names)]
  if "gold_at_kl" in names:
    head[1 + names.index("gold_at_kl")] += f" {number(matched_of(table), 1)}"
  rows = [
    [key_of(arm, styles), *(over_seeds([e[name] for e in es], NUMBERS[name][1]) for name in names)]
    for arm, es in table.items()
  ]
  note = (
    "Start and end are means over the first and the last tenth of the steps; the peak is the largest "
    "such mean. In brackets: 95% interval over seeds."
  )
  return page.table_section({"title": "", "head": head, "rows": rows, "note": note})


def format_summary(workdirs: Sequence[Path]) -> str:
  """The closing lines of a run on a terminal: a line for each arm, then the contrasts."""
  table = tables_of([read_metrics(workdir) for workdir in workdirs])
  cells = [["arm", *(NUMBERS[name][0].lower() for name in SHOWN)]]
  for arm, entries in table.items():
    values = [over_seeds([e[name] for e in entries], NUMBERS[name][1]) for name in SHOWN]
    cells.append([arm or "-", *values])
  widths = [max(map(len, column)) for column in zip(*cells)]
  lines = ["  ".join(map(str.ljust, row, widths)).rstrip() for row in cells]
  return "\n".join(
    [f"means over {len(workdirs)} seeds, with 95% intervals", *lines, *contrasts(table)]
  )
