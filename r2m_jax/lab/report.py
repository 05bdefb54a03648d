"""The laboratory's page: figures and tables from the results, and a line for each arm as it
ends.
"""

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from r2m_jax.lab import figures, results, stats
from r2m_jax.lab.results import Results, at_kl, at_weight, find, gold_measures, rival, stop_name
from r2m_jax.lab.turnover import turnover, turnover_table
from r2m_jax.report import page as report_page
from r2m_jax.report.summary import number
from r2m_jax.run.checkpoint import MANIFEST
from r2m_jax.run.files import write_atomic


def span(found: stats.Interval | None, digits: int = 2) -> str:
  """ "0.83 [0.70, 0.95]"; the count where not every seed has the number is added by the caller."""
  if found is None or not np.isfinite(found.value):
    return "–"
  if not np.isfinite(found.low):
    return number(found.value, digits)
  return (
    f"{number(found.value, digits)} [{number(found.low, digits)}, {number(found.high, digits)}]"
  )


def line(config, found: Results, name: str) -> str:
  """What an arm did, as it is printed when it has ended."""
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
  """Sentences, each with its interval."""
  base, control, said = config.lab.baseline, config.lab.control, []
  if base in found.curves:
    factor = figures.only_factor(found, base)

    def of(measure):
      return find(found, base, measure, factor)

    said.append(
      f"{base}: gold starts at {span(of('start'))}, peaks at {span(of('peak'))} and ends at "
      f"{span(of('final'))}; from "
      f"peak to end it loses {span(of('lost'))} while the frozen proxy rises by "
      f"{span(of('frozen_rise'))}. A peak is a "
      "maximum, so noise alone gives a small loss."
    )
    for kind, formula in (("bon", "d(a - b d)"), ("rl", "d(a - b log d)")):
      fit = found.fits[base, factor][kind]
      said.append(
        f"{base}, gold less that of the supervised policy = {formula}, d = sqrt(KL): a "
        f"{span(fit.a)}, "
        f"b {span(fit.b)}, turns at d = {span(fit.turn)}, R² {fit.r2:.2f}."
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
      said.append(f"{name} less its control {other}: " + ", ".join(parts) + ".")
  return said


def tables(config, found: Results, facts: dict[int, dict]) -> list[dict]:
  """Sections of numbers, as page.table_html takes them; no seed in `facts`: none about the
  reward models.
  """
  lab, keys = config.lab, list(found.values)

  def label(key):
    return key[0] if key[1] == 1.0 else f"{key[0]}, KL weight x {key[1]:g}"

  def counted(x, full):
    return span(x) + (f" (n {x.count})" if x and x.count < full else "")

  def compared(key, measure):
    size, cells = len(next(iter(found.values[key].values()))), []
    cells.append(counted(find(found, key[0], measure, key[1]), size))
    for lead in dict.fromkeys((lab.baseline, lab.control)):
      other = rival(key[0], lead, found.curves)
      cells.append(counted(find(found, key[0], measure, key[1], other), size) if other else "–")
    return cells

  leads = [f"less {lead}" for lead in dict.fromkeys((lab.baseline, lab.control))]
  sections = []
  for measure, title in (
    ("final", "Gold in the end"),
    ("peak", "Gold at its peak"),
    ("area", "Mean gold of all steps"),
    *((at_kl("gold", kl), f"Gold at KL {kl:g}") for kl in lab.kls),
  ):
    rows = [[label(key), *compared(key, measure)] for key in keys if measure in found.values[key]]
    sections.append(
      dict(
        title=title,
        head=["arm", "mean", *leads],
        rows=rows,
        note=(
          "Means over seeds with 95% intervals; differences are paired by seed, with the arm of "
          "the same suffix where "
          "there is one. n: seeds that have the number, where not all do."
        ),
      )
    )
  beta = {key: found.curves[key[0]][key[1]].beta for key in keys if key[0] in found.curves}
  rows, lead = [], lab.control or lab.baseline
  for key in beta:
    other = rival(key[0], lead, found.curves)
    against = other and at_weight(other, beta[key])
    if against and find(found, key[0], "final", key[1], against):
      measures = [measure for measure in gold_measures(config) if measure != "peak"]
      rows.append(
        [
          key[0],
          f"{beta[key]:g}",
          other,
          *(
            counted(
              find(found, key[0], measure, key[1], against), len(found.curves[key[0]][key[1]].seeds)
            )
            for measure in measures
          ),
        ]
      )
  if rows:
    head = ["arm", "KL weight", "less", "final", "area", *(f"gold at KL {kl:g}" for kl in lab.kls)]
    sections.append(
      dict(
        title="At one KL weight",
        head=head,
        rows=rows,
        note=f"Paired differences from {lead} at the "
        "very same KL weight, wherever both were run at it.",
      )
    )
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
  rows = [[label(key), *(span(find(found, key[0], name, key[1])) for name in show)] for key in keys]
  sections.append(
    dict(
      title="What the policy does in the end",
      rows=rows,
      head=["arm", *(name.removesuffix("_final").replace("_", " ") for name in show)],
      note="Correlation (used reward and gold within a prompt) and disagreement (share of the pairs "
      "that the reward labels against gold; 0.5 is chance): means of the second half of the "
      "steps. A high gold with a length near 1 is collapse, not alignment.",
    )
  )
  drift = [key for key in keys if "fixed_states" in found.values[key]]
  if drift:
    show = ("fixed_states", "fixed_states_std", "fixed_score", "own_states")
    rows = [
      [label(key), *(span(find(found, key[0], name, key[1]), 3) for name in show)] for key in drift
    ]
    sections.append(
      dict(
        title="Scores under drifting feedback",
        head=[
          "arm",
          "states alone",
          "its spread",
          "score in all",
          "own samples: gain through own states",
        ],
        rows=rows,
        note="Means of the second half of the steps; the proxy's deviation at the start is 1.",
      )
    )
  rows = [
    [
      label(key),
      *(span(getattr(fit[kind], part)) for kind in stats.KINDS for part in ("a", "b", "turn")),
      *(f"{fit[kind].r2:.2f}" for kind in stats.KINDS),
    ]
    for key, fit in found.fits.items()
  ]
  sections.append(
    dict(
      title="Turn-over",
      rows=rows,
      head=[
        "arm",
        "d(a - b d): a",
        "b",
        "turns at d",
        "d(a - b log d): a",
        "b",
        "turns at d",
        "R²",
        "R², log",
      ],
      note="Gold less that of the supervised policy, d = sqrt(KL); over all steps of all seeds, "
      "intervals over seeds. –: no peak in more than 2.5% of the resamples.",
    )
  )
  chosen = results.choose(config, found)
  if chosen:
    show = ("skipped", "length_start", "length_final", at_kl("frozen", lab.kls[0]), "frozen_final")
    names = [name for name in found.curves if results.CANDIDATE in name]
    rows = [
      [
        name,
        "taken" if name in chosen.values() else "",
        *(span(find(found, name, x)) for x in show),
      ]
      for name in names
    ]
    sections.append(
      dict(
        title="Choice of settings",
        head=["candidate", "", *(x.replace("_", " ") for x in show)],
        rows=rows,
        note="By the rule of the protocol, which reads no gold.",
      )
    )
  if found.best:
    rows = [
      [str(n), f"{kl:.2f}", *(span(stats.interval(found.best[x][:, i])) for x in ("gold", "proxy"))]
      for i, (n, kl) in enumerate(zip(found.best["n"][0], found.best["kl"][0]))
    ]
    note = "Of the supervised policy, by the proxy; unbiased over all subsets of the samples."
    sections.append(
      dict(title="Best of n", head=["n", "KL", "gold", "proxy"], rows=rows, note=note)
    )
  rows = [
    [str(seed), f"{f['heldout_accuracy']:.3f}", f"{f['gold_of_sft']:.2f}"]
    for seed, f in facts.items()
  ]
  if rows:
    sections.append(
      dict(
        title="Reward models",
        head=["seed", "held-out accuracy", "gold of the supervised policy"],
        rows=rows,
        note="Against clean gold labels.",
      )
    )
  return sections


def seeds_text(found: Results) -> str:
  """Start, peak and end of every seed, arm by arm, at the arm's own KL weight."""
  rows = []
  for name in found.curves:
    mine = found.curves[name][figures.only_factor(found, name)]
    for i, seed in enumerate(mine.seeds):
      curves = (mine.metrics[f"reward/{key}"][i] for key in ("gold", "frozen"))
      rows.append({"arm": name, "seed": seed, "turnover": turnover(*curves)})
  return turnover_table(rows)


def write(
  config, found: Results, facts: dict[int, dict], workdir: Path, *, more: Sequence[dict] = ()
) -> str:
  """Draws WORKDIR/figures and WORKDIR/report.html, with `more` tables, and writes seeds.txt;
  returns what to print.
  """
  parts = [
    "<h1>Laboratory: arms against the gold reward</h1>",
    f'<p class="soft">{len(found.curves)} arms; gold never trains, selects or stops anything.</p>',
    '<div class="card lead"><b>What the table shows</b>',
    report_page.bullets(notes(config, found)),
    "</div>",
  ]
  for name, heading, caption, draw in figures.FIGURES:
    if (figure := draw(config, found)) is not None:
      image = figures.rendered(figure)
      write_atomic(workdir / "figures" / f"{name}.png", image)
      parts.append(report_page.figure_html(heading, caption, [image], whole=True))
  parts += [report_page.table_html(section) for section in [*tables(config, found, facts), *more]]
  parts.append(
    f'<details class="card"><summary>Configuration</summary><pre>{config.to_json(indent=1)}</pre></details>'
  )
  page = report_page.write_page(workdir / "report.html", "R2M laboratory", parts)
  text = seeds_text(found)
  write_atomic(workdir / "seeds.txt", text + "\n")
  lines = text.splitlines()
  shown = lines if len(lines) <= 24 else [line for line in lines if ": over-optimised on " in line]
  shown += [f"{arm}: takes {name}" for arm, name in results.choose(config, found).items()]
  return "\n".join(
    [
      "",
      "Gold reward, means over 12-step bins",
      *shown,
      f"report   {page}",
      f"table    {workdir / 'table'}, in short {workdir / 'summary.csv'}",
    ]
  )


def read(config, arms, workdir: Path, folder: Path) -> tuple[Results, dict[int, dict]]:
  """The results so far, and what fitting the proxy found for each seed; `folder` has the fitted
  proxies.
  """
  manifests = {
    int(path.parts[-3].removeprefix("seed_")): path for path in folder.glob(f"seed_*/0/{MANIFEST}")
  }
  facts = {
    seed: json.loads(manifests[seed].read_text(encoding="utf-8"))["found"]
    for seed in sorted(manifests)
  }
  found = results.results_of(
    config, arms, workdir, {seed: fact["gold_of_sft"] for seed, fact in facts.items()}
  )
  return found, facts
