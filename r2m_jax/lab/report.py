"""The laboratory's page: figures and tables from the results, and a line for each finished arm."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from r2m_jax.lab import contrasts, figures, results, stats
from r2m_jax.lab.results import Results, at_kl, at_weight, find, gold_measures, rival, stop_name
from r2m_jax.report import intervals, page
from r2m_jax.report.figures import rendered
from r2m_jax.report.summary import number, over_optimised, rise_and_fall
from r2m_jax.run.checkpoint import MANIFEST
from r2m_jax.run.files import read_json, write_atomic


def span(found: intervals.Interval | None, digits: int = 2) -> str:
  """ "0.83 [0.70, 0.95]"; the caller adds the count if not every seed has the number."""
  if found is None or not np.isfinite(found.value):
    return "–"
  if not np.isfinite(found.low):
    return number(found.value, digits)
  return (
    f"{number(found.value, digits)} [{number(found.low, digits)}, {number(found.high, digits)}]"
  )


def line(config, found: Results, name: str) -> str:
  """The results of an arm, printed when it has ended."""
  factor = figures.only_factor(found, name)
  parts = [
    f"gold {span(find(found, name, 'start', factor))}",
    f"peak {span(find(found, name, 'peak', factor))}",
    f"final {span(find(found, name, 'final', factor))}",
  ]
  other = rival(name, config.lab.baseline, found.curves)
  difference = find(found, name, "final", factor, other) if other else None
  return "  ".join(parts + ([f"final - {other} {span(difference)}"] if difference else []))


def notes(config, found: Results) -> list[str]:
  """Sentences that summarise the results, each figure with its interval."""
  base = config.lab.baseline
  control = config.lab.control
  said = []
  if base in found.curves:
    factor = figures.only_factor(found, base)

    def of(measure):
      return find(found, base, measure, factor)

    said.append(
      f"{base}: gold starts at {span(of('start'))}, peaks at {span(of('peak'))} and ends at "
      f"{span(of('final'))}; from peak to end it loses {span(of('lost'))} while the frozen proxy "
      f"rises by {span(of('frozen_rise'))}. A peak is a maximum, so noise by itself gives a "
      "small loss."
    )
    for kind, formula in (("bon", "d(a - b d)"), ("rl", "d(a - b log d)")):
      fit = found.fits[base, factor][kind]
      said.append(
        f"{base}, gold minus the supervised policy's gold = {formula}, d = sqrt(KL): a "
        f"{span(fit.a)}, b {span(fit.b)}, turns at d = {span(fit.turn)}, R² {fit.r2:.2f}."
      )
    for target in config.lab.stops:
      name = stop_name(config, target)
      said.append(
        f"{base} stopped as its KL passes {target:g}: gold "
        f"{span(find(found, name, 'final', factor))}, "
        f"{span(find(found, name, 'final', factor, base))} more than run to the end."
      )
  for name, factors in found.curves.items():
    other = rival(name, control, found.curves) if control else None
    if name.split(".")[0] == "r2m" and other and 1.0 in factors:
      parts = [
        f"{span(find(found, name, measure, 1.0, other))} ({measure.replace('_', ' ')})"
        for measure in gold_measures(config)
        if measure != "peak"
      ]
      said.append(f"{name} minus its control {other}: " + ", ".join(parts) + ".")
  return said


def tables(config, found: Results, facts: dict[int, dict]) -> list[dict]:
  """Sections of numbers for page.table_section; without seeds in `facts`, none about the reward
  models.
  """
  sections = contrasts.tables(config, found.curves)
  sections += gold_tables(config, found)
  sections += same_weight_table(config, found)
  sections += [behaviour_table(found)]
  sections += checks_table(found)
  sections += drift_table(found)
  sections += [turnover_table(found)]
  sections += choice_table(config, found)
  sections += best_table(found)
  return sections + reward_table(facts)


def _table(title: str, head: Sequence[str], rows: list[list[str]], note: str) -> dict:
  return {"title": title, "head": list(head), "rows": rows, "note": note}


def _label(key: tuple[str, float]) -> str:
  return key[0] if key[1] == 1.0 else f"{key[0]}, KL weight x {key[1]:g}"


def _counted(x: intervals.Interval | None, full: int) -> str:
  return span(x) + (f" (n {x.count})" if x and x.count < full else "")


def gold_tables(config, found: Results) -> list[dict]:
  """Gold of every arm by each measure, and its paired differences from the baseline and the
  control.
  """
  lab = config.lab
  leads = list(dict.fromkeys((lab.baseline, lab.control)))

  def compared(key, measure):
    size = len(next(iter(found.values[key].values())))
    cells = [_counted(find(found, key[0], measure, key[1]), size)]
    for lead in leads:
      other = rival(key[0], lead, found.curves)
      cells.append(_counted(find(found, key[0], measure, key[1], other), size) if other else "–")
    return cells

  sections = []
  for measure, title in (
    ("final", "Gold at the end"),
    ("peak", "Gold at its peak"),
    ("area", "Mean gold of all steps"),
    *((at_kl("gold", kl), f"Gold at KL {kl:g}") for kl in lab.kls),
  ):
    rows = [
      [_label(key), *compared(key, measure)]
      for key, values in found.values.items()
      if measure in values
    ]
    note = (
      "Means over seeds with 95% intervals. A difference is between two arms, paired by seed. An arm "
      "with a suffix, such as r2m.two_percent, is compared with the arm that has the same suffix "
      "(vanilla.two_percent) if there is such an arm, otherwise with the arm without a suffix "
      "(vanilla). n: the number of seeds that have the value, if not all do."
    )
    sections.append(_table(title, ["arm", "mean", *(f"less {lead}" for lead in leads)], rows, note))
  return sections


def same_weight_table(config, found: Results) -> list[dict]:
  """Paired differences at one KL weight; [] if no two arms share one."""
  lead, rows = config.lab.control or config.lab.baseline, []
  measures = [measure for measure in gold_measures(config) if measure != "peak"]
  for arm, factor in found.values:
    if arm not in found.curves:
      continue
    curves, other = found.curves[arm][factor], rival(arm, lead, found.curves)
    against = other and at_weight(other, curves.beta)
    if against and find(found, arm, "final", factor, against):
      cells = [
        _counted(find(found, arm, measure, factor, against), len(curves.seeds))
        for measure in measures
      ]
      rows.append([arm, f"{curves.beta:g}", other, *cells])
  if not rows:
    return []
  kls = [f"gold at KL {kl:g}" for kl in config.lab.kls]
  note = f"Paired differences from {lead} at the same KL weight, if both were run at it."
  return [
    _table("At one KL weight", ["arm", "KL weight", "less", "final", "area", *kls], rows, note)
  ]


def behaviour_table(found: Results) -> dict:
  """The behaviour of each arm's policy at the end."""
  show = (
    "kl_final",
    "frozen_final",
    "used_final",
    "length_final",
    "coverage_final",
    "hallucinated_final",
    "truncated_final",
    "repetition_final",
    "entropy_final",
    "within_corr",
    "pair_disagreement",
  )
  rows = [
    [_label(key), *(span(find(found, key[0], name, key[1])) for name in show)]
    for key in found.values
  ]
  return _table(
    "What the policy does at the end",
    ["arm", *(name.removesuffix("_final").replace("_", " ") for name in show)],
    rows,
    "Correlation (used reward and gold within a prompt) and disagreement (share of the pairs "
    "that the reward labels against gold; 0.5 is chance) are means over the second half of the "
    "steps. High gold with a length near 1 is collapse, not alignment.",
  )


def checks_table(found: Results) -> list[dict]:
  """Manipulation checks that need no checkpoint; [] for runs that did not log them."""
  show = ("growth", "frozen_corr", "pair_disagreement", "frozen_disagreement")
  rows = [
    [_label(key), *(span(find(found, key[0], name, key[1]), 3) for name in show)]
    for key, values in found.values.items()
    if "growth" in values
  ]
  if not rows:
    return []
  head = ["arm", "deviation, used / frozen", "correlation of used and frozen"]
  return [
    _table(
      "Manipulation checks",
      [*head, "self-labels against gold", "the same pairs by the frozen reward"],
      rows,
      "Within prompts, means over the second half of the steps. An arm tests its own reward only "
      "to the extent that it differs from the frozen one. `task=analyse` of a run of one seed "
      "measures attention, dose and states.",
    )
  ]


def drift_table(found: Results) -> list[dict]:
  """Scores as the policy's states move; [] if no arm reads feedback."""
  show = ("fixed_states", "fixed_states_std", "fixed_score", "own_states")
  rows = [
    [_label(key), *(span(find(found, key[0], name, key[1]), 3) for name in show)]
    for key, values in found.values.items()
    if "fixed_states" in values
  ]
  if not rows:
    return []
  head = ["arm", "states alone", "its spread", "score in all"]
  return [
    _table(
      "Scores under drifting feedback",
      [*head, "own samples: gain through own states"],
      rows,
      "Means over the second half of the steps; the proxy's standard deviation at the start is 1.",
    )
  ]


def turnover_table(found: Results) -> dict:
  """The fitted curves of gold against sqrt(KL)."""
  rows = [
    [
      _label(key),
      *(span(getattr(fit[kind], part)) for kind in stats.KINDS for part in ("a", "b", "turn")),
      *(f"{fit[kind].r2:.2f}" for kind in stats.KINDS),
    ]
    for key, fit in found.fits.items()
  ]
  squared = ["d(a - b d): a", "b", "turns at d"]
  logarithm = ["d(a - b log d): a", "b", "turns at d"]
  return _table(
    "Turn-over",
    ["arm", *squared, *logarithm, "R²", "R², log"],
    rows,
    "Gold minus the supervised policy's gold, d = sqrt(KL); over all steps of all seeds, with "
    "intervals over seeds. –: no peak in more than 2.5% of the resamples.",
  )


def choice_table(config, found: Results) -> list[dict]:
  """The candidates of each arm and the chosen one; [] if there are none."""
  chosen = results.choose(config, found)
  if not chosen:
    return []
  show = ("skipped", "length_start", "length_final", at_kl("frozen", config.lab.kls[0]))
  show = (*show, "frozen_final")
  rows = [
    [name, "taken" if name in chosen.values() else "", *(span(find(found, name, x)) for x in show)]
    for name in found.curves
    if results.CANDIDATE in name
  ]
  head = ["candidate", "", *(x.replace("_", " ") for x in show)]
  note = "By the rule of the protocol, which reads no gold."
  return [_table("Choice of settings", head, rows, note)]


def best_table(found: Results) -> list[dict]:
  """Best of n of the supervised policy; [] if it was not measured."""
  if not found.best:
    return []
  rows = []
  for i, (n, kl) in enumerate(zip(found.best["n"][0], found.best["kl"][0])):
    means = (span(intervals.interval(found.best[x][:, i])) for x in ("gold", "proxy"))
    rows.append([str(n), f"{kl:.2f}", *means])
  note = "Of the supervised policy, by the proxy; unbiased over all subsets of the samples."
  return [_table("Best of n", ["n", "KL", "gold", "proxy"], rows, note)]


def reward_table(facts: dict[int, dict]) -> list[dict]:
  """The results of fitting each seed's proxy; [] without facts."""
  if not facts:
    return []
  rows = [
    [str(seed), f"{f['heldout_accuracy']:.3f}", f"{f['gold_of_sft']:.2f}"]
    for seed, f in facts.items()
  ]
  head = ["seed", "held-out accuracy", "gold of the supervised policy"]
  return [_table("Reward models", head, rows, "Against clean gold labels.")]


def seeds_text(found: Results) -> str:
  """Start, peak and end of every seed's gold, arm by arm, at the arm's own KL weight, and whether
  it over-optimised (`summary.over_optimised`).
  """
  lines = [
    f"{'arm':<14} {'seed':>4}  {'start':>6} {'peak':>6} {'last':>6}  {'lost':>5}  over-optimised"
  ]
  ends = []
  for name in found.curves:
    mine, entries = found.curves[name][figures.only_factor(found, name)], []
    for i, seed in enumerate(mine.seeds):
      entry = rise_and_fall(
        *(finite(mine.metrics[f"reward/{key}"][i]) for key in ("gold", "frozen"))
      )
      entries.append(entry)
      lost = "–" if entry["lost_share"] is None else f"{entry['lost_share']:.0%}"
      numbers = " ".join(f"{number(entry[part]):>6}" for part in ("start", "peak", "last"))
      over = "yes" if over_optimised(entry) else "no"
      lines.append(f"{name:<14} {seed:>4}  {numbers}  {lost:>5}  {over}")
    last = np.array([entry["last"] for entry in entries])
    count = sum(map(over_optimised, entries))
    spread = last.std(ddof=min(1, len(last) - 1))
    ends.append(
      f"{name}: over-optimised on {count} of {len(entries)} seeds; "
      f"last gold {last.mean():.2f}, standard deviation {spread:.2f}"
    )
  return "\n".join(lines + ends)


def finite(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
  """(steps, values) of the finite values of a curve f64[T]."""
  steps = np.flatnonzero(np.isfinite(values))
  return steps, values[steps]


def write(
  config, found: Results, facts: dict[int, dict], workdir: Path, *, more: Sequence[dict] = ()
) -> str:
  """Draws WORKDIR/figures and WORKDIR/report.html, with `more` tables, and writes seeds.txt;
  returns the text to print.
  """
  sections = [page.lead_section("What the table shows", notes(config, found))]
  for name, heading, caption, draw in figures.FIGURES:
    if (figure := draw(config, found)) is not None:
      image = rendered(figure)
      write_atomic(workdir / "figures" / f"{name}.png", image)
      sections.append(page.figure_section(heading, caption, [image], whole=True))
  sections += [page.table_section(one) for one in [*tables(config, found, facts), *more]]
  sections.append(page.settings_section(config))
  path = page.write_page(
    workdir / "report.html",
    title="R2M laboratory",
    heading="Laboratory: arms against the gold reward",
    about=f"{len(found.curves)} arms; gold never trains, selects or stops anything.",
    sections=sections,
  )
  text, registered = seeds_text(found), contrasts.text(config, found.curves)
  write_atomic(workdir / "seeds.txt", "\n\n".join(filter(None, [text, registered])) + "\n")
  lines = text.splitlines()
  shown = lines if len(lines) <= 24 else [line for line in lines if ": over-optimised on " in line]
  shown += [f"{arm}: takes {name}" for arm, name in results.choose(config, found).items()]
  return "\n".join(
    [
      *(["", registered] if registered else []),
      "",
      "Gold reward, means over a tenth of the steps",
      *shown,
      f"report   {path}",
      f"table    {workdir / 'table'}, in short {workdir / 'summary.csv'}",
    ]
  )


def read(config, arms, workdir: Path, folder: Path) -> tuple[Results, dict[int, dict]]:
  """The results so far, and the facts of each seed's fitted proxy; `folder` has the proxies."""
  manifests = {
    int(path.parts[-3].removeprefix("seed_")): path for path in folder.glob(f"seed_*/0/{MANIFEST}")
  }
  facts = {seed: read_json(manifests[seed])["found"] for seed in sorted(manifests)}
  found = results.results_of(
    config, arms, workdir, {seed: fact["gold_of_sft"] for seed, fact in facts.items()}
  )
  return found, facts
