"""Sections of a report that show text: samples, the same prompts over the steps, disagreements."""

import math

import numpy as np

from r2m_jax.report.figures import key_of
from r2m_jax.report.summary import number

MAX_PROMPTS, MAX_CHARS = 40, 4000  # per section; per text
MAX_TEXT = 1_000_000  # bytes of all texts in a section, so that a page stays below 5 MB
WORST = 8  # number of disagreements shown of each kind
FEWEST = 8  # with fewer rows a score has no scale
ORDER = {"before": -1, "after": math.inf}  # of `when`; a number is a step
UNEDITED = "Unedited model text."
SAME_NUMBERS = "Unedited model text, sampled with the same random numbers at each step."


def when_name(when) -> str:
  """ "before", "after" or "step 20"."""
  return when if when in ORDER else f"step {when}"


def cut(text: str) -> str:
  """At most MAX_CHARS characters of a text, and the number of characters cut off."""
  more = f" … ({len(text) - MAX_CHARS} more characters)" if len(text) > MAX_CHARS else ""
  return text[:MAX_CHARS] + more


def as_float(value):
  """A score of a row, in which a non-finite number is a string."""
  return float(value) if value is not None else None


def within_limits(blocks, size_of) -> list:
  """The first blocks, at least one, that stay within MAX_PROMPTS and MAX_TEXT."""
  kept, total = [], 0
  for block in blocks:
    total += size_of(block)
    if kept and (total > MAX_TEXT or len(kept) >= MAX_PROMPTS):
      break
    kept.append(block)
  return kept


# ---- the same prompts over the steps ----


def evaluation_slider(samples, styles):
  """Each held-out prompt with its response at the first evaluation, next to the responses at
  another step, which a slider selects.
  """
  steps = sorted({row["step"] for row in samples})
  first = {row["prompt"]: row for row in reversed(samples) if row["step"] == steps[0]}
  return slider(
    [row | {"when": row["step"]} for row in samples],
    steps,
    styles,
    title="The same prompts at each evaluation",
    note=SAME_NUMBERS,
    first=first,
  )


def slider(
  samples, whens, styles, *, title, note=UNEDITED, first=None, name="evaluations", at="at"
):
  """Responses to the same prompts, a column for each arm, at a step that a slider selects.

  Args:
    samples: rows with arm, prompt, when, response and scores.
    whens: the positions of the slider.
    first: prompt -> row that is always shown next to the selected step; None: none.
    name, at: ids of the section and of its slider in the page.
  """
  arms = list(dict.fromkeys(row["arm"] for row in samples))
  asked = list(dict.fromkeys(row["prompt"] for row in samples))
  by_place = {(row["prompt"], row["arm"], row["when"]): row for row in samples}
  blocks = []
  for prompt in asked:
    columns = []
    for arm in arms:
      found = [by_place.get((prompt, arm, when)) for when in whens]
      columns.append({"arm": key_of(arm, styles), "cells": [_response(row) for row in found]})
    start = _response(first.get(prompt)) if first is not None else None
    blocks.append({"text": cut(prompt), "first": start, "columns": columns})

  def size_of(block):
    cells = [cell for column in block["columns"] for cell in column["cells"]]
    return sum(len(cell["text"].encode()) for cell in cells)

  return {
    "kind": "slider",
    "tab": "Samples",
    "title": title,
    "note": note,
    "name": name,
    "id": at,
    "steps": whens,
    "names": [when_name(when) for when in whens],
    "prompts": within_limits(blocks, size_of),
    "of": len(asked),
  }


def _response(row):
  """A response, and a line with its measurements."""
  if row is None:
    return {"text": "(no response at this step)", "facts": ""}
  facts = [
    f"{name} {number(as_float(row[key]))}"
    for key, name in (("gold", "gold"), ("reward", "used"), ("frozen", "frozen"), ("kl", "kl"))
    if row.get(key) is not None
  ]
  if row.get("length") is not None:
    facts.append(f"{row['length']:.0f} tokens{' (cut)' if row.get('truncated') else ''}")
  return {"text": cut(row["response"]), "facts": ", ".join(facts)}


# ---- every sample ----


def samples_section(samples, styles):
  """Every prompt with its responses: before, at steps in between, and after; one row for each
  response.
  """
  prompts = list(dict.fromkeys(row["prompt"] for row in samples))
  scores = {
    name: key
    for key, name in (("gold", "gold"), ("reward", "used"), ("frozen", "frozen"))
    if any(row.get(key) is not None for row in samples)
  }
  blocks = []
  for prompt in prompts:
    mine = _merge_before([row for row in samples if row["prompt"] == prompt])
    mine.sort(key=lambda row: ORDER.get(row["when"], row["when"]))
    rows = [_sample(row, scores, styles) for row in mine]
    blocks.append({"text": cut(prompt), "rows": rows})

  def size_of(block):
    return sum(len(row["response"].encode()) for row in block["rows"])

  return {
    "kind": "samples",
    "tab": "Samples",
    "prompts": within_limits(blocks, size_of),
    "of": len(prompts),
    "scores": list(scores),
    "arms": list(dict.fromkeys(row["arm"] for row in samples if row["arm"])),
  }


def _sample(row, scores, styles):
  """A response in the template's form. `scores`: name in the page -> name in the row."""
  when, length = row["when"], row.get("length")
  cut_off = " (cut)" if row.get("truncated") else ""
  return {
    "arm": key_of(row["arm"], styles) if row["arm"] else None,
    "when": when_name(when),
    "response": cut(row["response"]),
    "scores": {name: number(as_float(row.get(key))) for name, key in scores.items()},
    "tokens": "–" if length is None else f"{length:.0f}{cut_off}",
  }


def _merge_before(rows):
  """Arms start from the same policy: if all have the same sample before RL, it becomes one row
  without an arm.
  """
  before = [row | {"arm": ""} for row in rows if row["when"] == "before"]
  same = len(before) > 1 and all(row == before[0] for row in before)
  return before[:1] + [row for row in rows if row["when"] != "before"] if same else rows


# ---- where two scores disagree ----


def worst_disagreements(rows, judged: str, by: str) -> list[tuple[float, dict]]:
  """(difference of standard scores, row) of the rows that `judged` rates furthest above `by`.

  A standard score is (x - mean) / standard deviation over the rows that have both scores. Only rows
  with a positive difference are returned, the largest first, each text once, at most WORST; [] for
  fewer than FEWEST rows, or if a score is the same in all rows.
  """
  rows = [row for row in rows if row.get(judged) is not None and row.get(by) is not None]
  scores = np.array([[float(row[judged]), float(row[by])] for row in rows]).reshape(-1, 2)
  finite = np.isfinite(scores).all(axis=1)
  rows, scores = [row for row, kept in zip(rows, finite) if kept], scores[finite]
  if len(rows) < FEWEST or (spread := scores.std(axis=0)).min() <= 0:
    return []
  standard = (scores - scores.mean(axis=0)) / spread
  gap = standard[:, 0] - standard[:, 1]
  worst: dict[tuple[str, str], tuple[float, dict]] = {}
  for at in np.argsort(-gap, kind="stable"):
    if gap[at] > 0:
      worst.setdefault((rows[at]["prompt"], rows[at]["response"]), (float(gap[at]), rows[at]))
  return list(worst.values())[:WORST]


def disagreements_section(samples, evaluated, styles):
  """The responses that the reward rates furthest above gold, or above the frozen reward if there is
  no gold.

  The rows are training samples with their used reward, and evaluation samples with their frozen
  proxy. None if no row has two different scores.
  """
  trained = [row for row in samples if row["when"] != "before"]
  for rows, judged, by in (
    (trained, "reward", "gold"),
    ([row | {"when": row["step"]} for row in evaluated], "frozen", "gold"),
    (trained, "reward", "frozen"),
  ):
    if worst := worst_disagreements(rows, judged, by):
      break
  else:
    return None
  name = {"reward": "used", "frozen": "frozen", "gold": "gold"}
  table = []
  for gap, row in worst:
    arm = key_of(row["arm"], styles)
    scores = [number(as_float(row[judged])), number(as_float(row[by])), f"{gap:.1f}"]
    text = f"{cut(row['prompt'])}\n→ {cut(row['response'])}"
    table.append([arm, when_name(row["when"]), *scores, {"words": text}])
  return {
    "kind": "table",
    "tab": "Samples",
    "title": f"Worst disagreements: {name[judged]} reward far above {name[by]}",
    "head": ["Arm", "When", name[judged], name[by], "Gap", "Prompt → response"],
    "rows": table,
    "note": "The gap is the difference of the two scores in standard deviations of each over these "
    f"{len(rows)} responses. These are where a policy would gain by gaming the reward.",
  }


# ---- what the attention of the reward head reads ----


def attention_section(replayed: dict, *, tab: str = "Samples") -> dict | None:
  """The attention over a prompt and its response as a strip of words, darker for more weight.

  Args:
    replayed: a file of WORKDIR/replay: `states`, a word for each position, `attention`
      f[heads, states], and `tokens` of the response, which are the last states.

  Returns:
    None if the arm has no attention.
  """
  if replayed.get("attention") is None:
    return None
  weights = np.mean(np.array(replayed["attention"], float), axis=0)
  sizes = np.nan_to_num(weights)  # of a row whose update was skipped, NaN may be all there is
  shades = np.round(9 * sizes / (sizes.max() or 1.0)).astype(int).tolist()
  words = [
    {"text": word, "weight": f"{weight:.3f}", "shade": shade}
    for word, weight, shade in zip(replayed["states"], weights, shades)
  ]
  most = [words[at] for at in np.argsort(-weights, kind="stable")[:5]]
  where = f"{replayed['arm']}, step {replayed['step']}, prompt {replayed['prompt']}, sample {replayed['sample']}"
  start = len(words) - len(replayed["tokens"])
  return {
    "kind": "strip",
    "tab": tab,
    "title": f"What the reward reads: {where}",
    "note": "Weight of each hidden state of the policy in the cross-attention of the reward, averaged "
    "over heads. Largest weights:  "
    + ", ".join(f"{word['text']} {word['weight']}" for word in most)
    + f". Reward {number(as_float(replayed['reward']))}, frozen {number(as_float(replayed['frozen']))}.",
    "parts": [("Prompt", words[:start]), ("Response", words[start:])],
  }
