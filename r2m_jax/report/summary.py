"""The findings of the RL rows of metrics.jsonl, as numbers and as sentences; no files, no figures.

A mean is over a window of a tenth of an arm's rows. `se` is the standard error of such a mean from
step-to-step noise only; it does not cover differences between seeds.
"""

import math

import numpy as np

MIN_ROWS = 10  # fewer rows than this give no verdict
SURE = 4  # standard errors that a rise or a fall must exceed: a peak is a maximum of many means


# ---- numbers ----


def arms_of(rows):
  """The arms of the RL rows, in order of first appearance."""
  return list(dict.fromkeys(row["arm"] for row in rows if row["stage"] == "rl"))


def series(rows, *names):
  """[steps, values of the first name, ...] over the rows in which all names are finite; for a
  repeated step the last row counts.
  """
  finite = [row for row in rows if all(math.isfinite(row.get(name, math.nan)) for name in names)]
  by_step = {row["step"]: [row[name] for name in names] for row in finite}
  steps = sorted(by_step)
  columns = np.array([by_step[step] for step in steps], float).reshape(len(steps), len(names))
  return [np.array(steps, float), *columns.T]


def window_of(n):
  return max(1, round(n / 10))


def window_means(values):
  """Means over every full window of a tenth of the values; entry i covers values[i : i +
  window].
  """
  width = window_of(len(values))
  return (
    np.convolve(values, np.full(width, 1 / width), "valid") if len(values) else np.asarray(values)
  )


def standard_error(values):
  """The standard error of one window mean: the step noise over sqrt(window). The noise comes from
  successive differences, so that a trend does not count.

  se^2 = mean((x_t - x_{t-1})^2) / 2 / window
  """
  return (
    math.sqrt(np.mean(np.diff(values) ** 2) / 2 / window_of(len(values)))
    if len(values) > 1
    else math.nan
  )


def summary_table(rows):
  """One dict for each arm, from the RL rows of metrics.jsonl (read_metrics). Values that the rows
  do not have are None.

  start, last: mean of the first and the last window; peak: the largest window mean, at peak_step
  (the window's middle); gain = peak - start; loss = peak - last; lost_share = loss / gain, None if
  the gain is within 4 se of zero. rows: number of rows with gold, or of all rows if none has gold.
  evaluated: whether gold and the frozen proxy come from held-out evaluations. They do if only the
  evaluations have gold. X_start, X_last, X_se for X in frozen, kl,
  length, truncated: the first and last window means and their error. gold_at_kl: gold where the arm
  first reaches matched_kl, the largest KL that every arm reaches.
  """
  table = [
    _summarise(
      arm,
      [r for r in rows if r["stage"] == "rl" and r["arm"] == arm],
      evaluations(rows, arm),
    )
    for arm in arms_of(rows)
  ]
  reached = [
    entry["kl_max"] for entry in table if entry["start"] is not None and entry["kl_max"] is not None
  ]
  matched = min(reached) if len(reached) > 1 else None
  for entry in table:
    arm_rows = [row for row in rows if row["stage"] == "rl" and row["arm"] == entry["arm"]]
    entry["matched_kl"] = matched
    entry["gold_at_kl"] = (
      None if matched is None else _value_at_kl(arm_rows, "reward/gold", matched)
    )
  return table


def _summarise(arm, rows, evaluated):
  gold, frozen = series(rows, "reward/gold"), series(rows, "reward/frozen")
  by_evaluations = not len(gold[0]) and len(series(evaluated, "gold")[0]) > 0
  if by_evaluations:
    gold, frozen = series(evaluated, "gold"), series(evaluated, "frozen")
  entry = {
    "arm": arm,
    "evaluated": by_evaluations,
    "rows": len(gold[0]) or len(rows),
    "last_step": max(row["step"] for row in rows),
    "seconds": max(row["seconds"] for row in rows),
    **rise_and_fall(gold, frozen),
  }
  for name in ("kl", "length", "truncated"):
    entry |= _first_and_last(name, series(rows, name)[1])
  kl_means = window_means(series(rows, "kl")[1])
  entry["kl_max"] = float(kl_means.max()) if len(kl_means) else None
  disagreement = series(rows, "r2m/pair_disagreement")[1]
  entry["pair_disagreement"] = float(disagreement.mean()) if len(disagreement) else None
  entry["nonfinite"] = sum(
    isinstance(v, float) and not math.isfinite(v) for row in rows for v in row.values()
  )
  return entry


def rise_and_fall(gold, frozen):
  """The rise and fall of gold in one run, with the frozen proxy: the part of a summary_table entry
  that `over_optimised` reads.

  Args:
    gold, frozen: (steps f64[T], values f64[T]) each, finite and in order of the steps.

  Returns:
    start, peak, peak_step, last, gain, loss, lost_share, se, window, frozen_start, frozen_last and
    frozen_se as in `summary_table`; frozen_peak is the mean of the frozen proxy over the window of
    the gold peak. None if there are no values.
  """
  keys = ("start", "peak", "peak_step", "last", "gain", "loss", "lost_share", "se", "window")
  entry = dict.fromkeys(keys) | {"frozen_peak": None} | _first_and_last("frozen", frozen[1])
  steps, values = gold
  if not len(values):
    return entry
  means = window_means(values)
  width = window_of(len(values))
  se = standard_error(values)
  top = int(np.argmax(means))
  start = float(means[0])
  peak = float(means[top])
  last = float(means[-1])
  gain, loss = peak - start, peak - last
  near = (frozen[0] >= steps[top]) & (frozen[0] <= steps[top + width - 1])
  return entry | {
    "start": start,
    "peak": peak,
    "peak_step": float(steps[top : top + width].mean()),
    "last": last,
    "gain": gain,
    "loss": loss,
    "lost_share": loss / gain if gain > SURE * se else None,
    "se": se,
    "window": width,
    "frozen_peak": float(frozen[1][near].mean()) if near.any() else None,
  }


def _first_and_last(name, values):
  means = window_means(values)
  return {
    f"{name}_start": float(means[0]) if len(means) else None,
    f"{name}_last": float(means[-1]) if len(means) else None,
    f"{name}_se": standard_error(values),
  }


def gold_fell(entry):
  """Whether gold ended below its peak by more than `SURE` standard errors."""
  return entry["loss"] > SURE * entry["se"]


def over_optimised(entry):
  """Whether a run over-optimised its reward: the criterion of all reports.

  Gold ended below its peak, and the frozen proxy ended above its value at that peak (means over
  windows; the proxy's over the steps of the gold peak). Each difference must exceed `SURE` of its
  standard errors of step noise. A fall of gold without a rise of the proxy is not
  over-optimisation.

  Args:
    entry: from `rise_and_fall` or `summary_table`, for a run with gold.
  """
  if entry["frozen_peak"] is None or not gold_fell(entry):
    return False
  return entry["frozen_last"] - entry["frozen_peak"] > SURE * entry["frozen_se"]


# ---- evaluations ----


def evaluations(rows, arm):
  """The rows of an arm's evaluations, in order of their steps; for a repeated step the last row
  counts.
  """
  mine = {row["step"]: row for row in rows if row["stage"] == "eval" and row["arm"] == arm}
  return [mine[step] for step in sorted(mine)]


def alarm(rows):
  """The step since which gold has fallen and the frozen proxy has risen, by `over_optimised`; None
  if there is no such step, or if fewer than `MIN_ROWS` evaluations have gold.

  Args:
    rows: of the evaluations of one arm.
  """
  gold, frozen = series(rows, "gold"), series(rows, "frozen")
  if len(gold[0]) < MIN_ROWS:
    return None
  entry = rise_and_fall(gold, frozen)
  return round(entry["peak_step"]) if over_optimised(entry) else None


def first_alarm(rows):
  """(step at which the alarm was first raised, step since which gold has fallen); None if it never
  was.
  """
  for count in range(MIN_ROWS, len(rows) + 1):
    since = alarm(rows[:count])
    if since is not None:
      return rows[count - 1]["step"], since
  return None


def alarm_line(arm, since, step):
  """The alarm in one line, for the terminal and the report."""
  name = f"{arm}: " if arm else ""
  return f"{name}proxy up, gold down since step {since} (raised at step {step})"


def with_interval(row, name, scale=1.0, digits=2):
  """The value of an evaluation with its interval, as text; "–" if it was not measured."""
  if name not in row:
    return number(None)
  value, low, high = (row[name + end] for end in ("", "_low", "_high"))
  value, low, high = (number(scale * x, digits) for x in (value, low, high))
  return f"{value} [{low}, {high}]"


def evaluation_line(arm, step, row):
  """The results of an evaluation, in a line for the terminal."""
  parts = [f"{name} {with_interval(row, name)}" for name in ("gold", "frozen", "kl") if name in row]
  parts += [f"length {number(row['length'], 1)}", f"cut {row['truncated']:.0%}"]
  parts += [f"repetition {row['repetition']:.0%}"]
  return f"eval     {arm + ' ' if arm else ''}step {step}: {', '.join(parts)}"


def _value_at_kl(rows, name, target):
  """Linear interpolation of the window means of `name` where those of the KL first reach the
  target; None if never.
  """
  return value_at(*series(rows, "kl", name)[1:], target)


def value_at(kl, values, target):
  """Linear interpolation of the window means of `values` where those of `kl` first reach the
  target; None if never.
  """
  kl, values = window_means(kl), window_means(values)
  reached = np.flatnonzero(kl >= target * (1 - 1e-9))
  if not len(reached) or (reached[0] == 0 and kl[0] > target * (1 + 1e-9)):
    return None
  i = int(reached[0])
  if i == 0:
    return float(values[0])
  part = (target - kl[i - 1]) / (kl[i] - kl[i - 1])
  return float(values[i - 1] + min(part, 1.0) * (values[i] - values[i - 1]))


# ---- sentences ----

OVER = "over-optimisation"
OTHER = "gold fell without a rise of the proxy"
NONE_SEEN = "no over-optimisation seen"
NO_GOLD, TOO_FEW = "no gold measured", "too few steps"


def number(value, digits=2):
  if value is None or not math.isfinite(value):
    return "–"
  return (
    f"{value:.0f}" if abs(value) >= 1000 else f"{round(value, digits) + 0.0:.{digits}f}"
  )  # + 0.0: no -0.00


def verdict(entry):
  """The verdict on an entry of `summary_table`: one of the five above."""
  if entry["rows"] < MIN_ROWS:
    return TOO_FEW
  if entry["start"] is None:
    return NO_GOLD
  if over_optimised(entry):
    return OVER
  return OTHER if gold_fell(entry) else NONE_SEEN


def finding(entry):
  """A sentence on an arm's gold and frozen proxy."""
  arm = entry["arm"] or "the run"
  n = number
  found = verdict(entry)
  proxy = f"the frozen proxy went from {n(entry['frozen_start'])} to {n(entry['frozen_last'])}"
  if found == TOO_FEW:
    what = "evaluations" if entry["evaluated"] else "logged steps"
    return f"{arm}: {entry['rows']} {what} are too few for a verdict."
  if found == NO_GOLD:
    return (
      f"In {arm} {proxy}, at a KL of {n(entry['kl_last'], 1)} at the end. No gold reward was "
      "measured, and the proxy by itself cannot distinguish improvement from over-optimisation."
    )
  rose = entry["gain"] > SURE * entry["se"]
  peak = f"{n(entry['peak'])} (step {entry['peak_step']:.0f})"
  if found == NONE_SEEN:
    gold = f"rose from {n(entry['start'])} to {peak}" if rose else f"started at {n(entry['start'])}"
    return (
      f"In {arm} gold {gold} and ended at {n(entry['last'])}, within the step noise of its peak, "
      f"while {proxy}: "
      "no over-optimisation seen in these steps."
    )
  gold = (
    f"peaked at {peak}" if rose else f"never rose clearly above its start of {n(entry['start'])}"
  )
  gold = f"In {arm} gold {gold} and ended at {n(entry['last'])}"
  if found == OVER:
    proxy = f"rose from {n(entry['frozen_peak'])} at that peak to {n(entry['frozen_last'])}"
    return f"{gold} while the frozen proxy {proxy}: over-optimisation."
  if entry["frozen_peak"] is None:
    return f"{gold}; no frozen proxy was logged with it."
  proxy = f"went from {n(entry['frozen_peak'])} at that peak to {n(entry['frozen_last'])}"
  return f"{gold}, but the frozen proxy {proxy}: a fall without a rise of the proxy is not over-optimisation."


def findings(table):
  """A sentence for each arm, up to four arms; with more, the first arm's sentence and the arms of
  each verdict.
  """
  if len(table) <= 4:
    return [finding(entry) for entry in table]
  groups = {}
  for entry in table:
    groups.setdefault(verdict(entry), []).append(entry["arm"])
  return [finding(table[0])] + [
    f"{found.capitalize()} in {len(arms)} of {len(table)} arms: {', '.join(arms)}."
    for found, arms in groups.items()
  ]


def cautions(table):
  """Reasons to read the numbers with care."""
  if not table:
    return []
  texts = [
    "One seed: differences between arms are anecdotes, not evidence."
    if len(table) > 1
    else "One seed: another seed may give another result."
  ]
  for entry in table:
    arm = entry["arm"] or "the run"
    before = entry["length_start"]
    after = entry["length_last"]
    if before and not 0.5 <= after / before <= 2:
      texts.append(
        f"In {arm} responses went from {number(before, 1)} to {number(after, 1)} tokens; a "
        "collapse of the "
        "length can raise the final gold."
      )
    if (entry["truncated_last"] or 0) > 0.1:
      texts.append(
        f"In {arm} {entry['truncated_last']:.0%} of the last responses were cut at the length "
        "limit."
      )
    if entry["nonfinite"]:
      texts.append(f"In {arm} {entry['nonfinite']} logged values were not finite.")
  shares = [
    (e["arm"] or "the run", e["pair_disagreement"])
    for e in table
    if e["pair_disagreement"] is not None
  ]
  if shares:
    listed = ", ".join(f"{arm} {share:.0%}" for arm, share in shares)
    texts.append(f"Pseudo-labelled pairs whose order contradicts gold (50% is chance): {listed}.")
  return texts


def control_case(table):
  """The comparison of every r2m arm with `scaled`: [(short, sentence)].

  scaled shrinks the frozen reward by the same omega and reads no feedback, so only an advantage of
  r2m over scaled can be due to the feedback.
  """
  control = next(
    (entry for entry in table if entry["arm"] == "scaled" and entry["start"] is not None), None
  )
  judged = [
    entry for entry in table if entry["arm"].startswith("r2m") and entry["start"] is not None
  ]
  return [_against(entry, control) for entry in judged]


def _against(entry, control):
  arm = entry["arm"]
  if control is None:
    return (
      f"{arm} has no scaled arm to compare with",
      f"No scaled arm was run with {arm}: a gain over vanilla cannot be distinguished from the "
      "shrinking by ω.",
    )
  if min(entry["rows"], control["rows"]) < MIN_ROWS:
    return (
      f"too few steps to compare {arm} with scaled",
      f"Too few steps to compare {arm} with scaled.",
    )
  noise = 2 * math.hypot(entry["se"], control["se"])
  final, at_kl = entry["last"] - control["last"], None
  text = f"{arm} ended at {number(entry['last'])} and scaled at {number(control['last'])}, a difference of {final:+.2f}"
  if entry["gold_at_kl"] is not None and control["gold_at_kl"] is not None:
    at_kl = entry["gold_at_kl"] - control["gold_at_kl"]
    text += f", and {at_kl:+.2f} at the matched KL of {number(entry['matched_kl'], 1)}"
  if final <= noise and at_kl is not None and at_kl > noise:
    short = f"{arm} is above scaled at equal KL, not at the end"
    reading = "it moved further from the reference and lost gold there."
  elif final <= noise:
    short = f"{arm} {'ends below' if final < -noise else 'does not beat'} scaled"
    reading = "any gain over vanilla is not due to the policy feedback."
  elif at_kl is not None and at_kl <= noise:
    short = f"{arm} beats scaled at the end, not at equal KL"
    reading = "it may only have moved less from the reference."
  else:
    short = f"{arm} beats scaled"
    reading = (
      "the shrinking by ω does not explain that. More seeds are needed to attribute it to the "
      "feedback."
    )
  return (
    f"{short} ({final:+.2f} at the end)",
    f"{text} (step noise ±{number(noise)}). Here {short}: {reading}",
  )


def format_summary(table, max_lines=6):
  """The closing lines of a run on a terminal: aligned columns, one line for each arm, then the
  comparison with the control.
  """
  if not table:
    return "no RL steps were logged"
  verdicts = [short for short, _ in control_case(table)][:1]
  room = max_lines - 1 - len(verdicts)
  shown = table if len(table) <= room else table[: room - 1]
  cells = [("arm", "gold start", "peak", "(step)", "end", "lost", "proxy end", "KL", "length")]
  for e in shown:
    lost = "–" if e["lost_share"] is None else f"{e['lost_share']:.0%}"
    step = "–" if e["peak_step"] is None else f"({e['peak_step']:.0f})"
    cells.append(
      (
        e["arm"] or "-",
        number(e["start"]),
        number(e["peak"]),
        step,
        number(e["last"]),
        lost,
        number(e["frozen_last"]),
        number(e["kl_last"], 1),
        number(e["length_last"], 1),
      )
    )
  widths = [max(map(len, column)) for column in zip(*cells)]
  lines = [
    "  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]) for row in cells
  ]
  if len(shown) < len(table):
    lines.append(f"and {len(table) - len(shown)} more arms in report.html")
  return "\n".join(line.rstrip() for line in lines + [f"{v}; one seed" for v in verdicts])
