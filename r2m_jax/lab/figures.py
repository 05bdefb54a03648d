"""The laboratory's figures, drawn from its results. Each can be read in black and white: by marker,
dash and position.
"""

import numpy as np

from r2m_jax.lab import stats
from r2m_jax.lab.results import Results, at_kl, rival
from r2m_jax.report import intervals
from r2m_jax.report.figures import COLOURS, ROOT_KL, canvas, dress, grid, legend
from r2m_jax.report.summary import window_means

MARKS, DASHES = "os^DvPX*", ("-", "--", "-.", ":")
INK, GREY = "#1c2127", "#767676"
MOST = 8  # arms in one panel
OF = {
  "gold": dict(marker="s", ls="-", color=INK),
  "proxy": dict(marker="o", ls=":", color="#D55E00", mfc="white"),
}


def style(i: int) -> dict:
  """Colour, marker and dash of the i-th arm of a panel; no two of `MOST` share a marker."""
  return dict(
    color=COLOURS[i % len(COLOURS)], marker=MARKS[i % len(MARKS)], ls=DASHES[i % len(DASHES)]
  )


def root(kl):
  """sqrt(KL); negative values from rounding count as zero."""
  return np.sqrt(np.maximum(kl, 0))


def band(values: np.ndarray) -> np.ndarray:
  """Mean and interval over seeds of window means at each step: f64[S, T] -> f64[3, T']."""
  means = np.stack([window_means(row) for row in values])
  return (
    np.repeat(means, 3, 0)
    if len(values) < 2
    else np.stack([means.mean(0), *intervals.bounds(means)])
  )


def only_factor(results: Results, arm: str) -> float:
  """The KL weight at which an arm is shown if only one is shown: its own."""
  factors = results.curves[arm]
  return 1.0 if 1.0 in factors else next(iter(factors))


def against_step(config, results: Results):
  """A panel for each arm: gold with its interval, the frozen proxy, and the baseline's gold."""
  names = list(results.curves)
  figure, axes = grid(len(names), 4, (3.0, 2.2), 0.5)
  for axis, name in zip(axes, names):
    metrics = results.curves[name][only_factor(results, name)].metrics
    other = rival(name, config.lab.baseline, results.curves)
    if other and only_factor(results, other) == only_factor(results, name):
      beside = band(results.curves[other][only_factor(results, other)].metrics["reward/gold"])[0]
      axis.plot(beside, color=GREY, ls="--", lw=1.3, label="gold of the baseline")
    mean, low, high = band(metrics["reward/gold"])
    at = np.arange(len(mean))
    axis.fill_between(at, low, high, color="#0072B2", alpha=0.18, lw=0)
    axis.plot(at, mean, color=INK, lw=1.8, label="gold, 95% interval over seeds")
    axis.plot(
      at, band(metrics["reward/frozen"])[0], color="#D55E00", ls=":", lw=1.6, label="frozen proxy"
    )
    dress(axis, name, "step", "reward")
  legend(figure, max(axes, key=lambda axis: len(axis.lines)), 3, place="upper")
  return figure


def frontier(config, results: Results):
  """Gold against sqrt(KL): the path of each arm, and the ends of its runs over the KL weights."""
  swept = [name for name, factors in results.curves.items() if len(factors) > 1]
  shown = (swept or list(results.curves))[:MOST]
  figure, axes = canvas(11, 4.6, 1, 2)
  for i, name in enumerate(shown):
    curves = results.curves[name][only_factor(results, name)].metrics
    way = [
      np.stack([window_means(row) for row in curves[key]]).mean(0) for key in ("kl", "reward/gold")
    ]
    axes[0, 0].plot(
      root(way[0]), way[1], label=name, lw=1.5, ms=5, markevery=max(1, len(way[0]) // 7), **style(i)
    )
    ends = []
    for factor in sorted(results.curves[name]):
      found = results.values[name, factor]
      ends.append(
        (root(intervals.interval(found["kl_final"])[0]), *intervals.interval(found["final"])[:3])
      )
    x, y, low, high = np.array(ends).T
    axes[0, 1].errorbar(x, y, [y - low, high - y], label=name, lw=1.3, ms=6, capsize=2, **style(i))
  dress(axes[0, 0], "Paths, at the arm's own KL weight (means over seeds)", ROOT_KL, "gold")
  dress(axes[0, 1], "Ends, a point for each KL weight (95% intervals)", ROOT_KL, "gold")
  legend(figure, axes[0, 0])
  return figure


def forest(config, results: Results):
  """Paired differences of gold, a row for each arm: filled against the baseline, open against
  the control.
  """
  measures = ["final", "area", *(at_kl("gold", target) for target in config.lab.kls)]
  titles = {"final": "Gold in the end", "area": "Mean gold of all steps"}
  rows = [row for row in results.rows if row["against"] and row["factor"] == 1.0]
  names = list(dict.fromkeys(row["arm"] for row in rows))
  if not names:
    return None
  figure, axes = canvas(3.0 + 2.5 * len(measures), 0.3 * len(names) + 1.7, 1, len(measures))
  leads = (
    (config.lab.baseline, "s", INK, INK, 0.14),
    (config.lab.control, "o", "#D55E00", "white", -0.14),
  )
  for axis, measure in zip(axes[0], measures):
    axis.axvline(0, color=GREY, lw=1)
    for lead, mark, colour, fill, shift in leads:
      mine = [
        row for row in rows if row["measure"] == measure and row["against"].split(".")[0] == lead
      ]
      if lead and mine:
        y = np.array([len(names) - 1 - names.index(row["arm"]) for row in mine]) + shift
        x, low, high = np.array([[row["value"], row["low"], row["high"]] for row in mine], float).T
        axis.errorbar(
          x,
          y,
          xerr=np.clip([x - low, high - x], 0, None),
          fmt=mark,
          color=colour,
          mfc=fill,
          ms=5,
          lw=1.2,
          capsize=2,
          label=f"less {lead} (or {lead}.NAME)",
        )
    title = titles.get(measure) or f"Gold at KL {measure.rpartition('_')[2]}"
    dress(axis, title, "difference of gold", "")
    axis.set_yticks(range(len(names)), names[::-1] if axis is axes[0, 0] else [""] * len(names))
    axis.set_ylim(-0.6, len(names) - 0.4)
  legend(figure, axes[0, 0], 2)
  return figure


def best_of_n(config, results: Results):
  """Best-of-n by the proxy, and the baseline's path, with the fitted curves of Gao et al. on
  both.
  """
  if not results.best:
    return None
  figure, axes = canvas(10.5, 4.2, 1, 2)
  d = np.sqrt(results.best["kl"][0])
  gain = results.best["gold"] - results.best["gold"][:, :1]
  shift = results.best["proxy"] - results.best["proxy"][:, :1]
  for label, values in (("gold", gain), ("proxy", shift)):
    mean, low, high = np.array([intervals.interval(column)[:3] for column in values.T]).T
    axes[0, 0].errorbar(d, mean, [mean - low, high - mean], capsize=2, label=label, **OF[label])
  panels = [(axes[0, 0], d, ("best_of_n", 1.0), "bon", "d (a - b d)")]
  base = config.lab.baseline
  if base in results.curves:
    factor = only_factor(results, base)
    seeds, curves = results.curves[base][factor].seeds, results.curves[base][factor].metrics
    way = {
      key: np.stack([window_means(row) for row in curves[key]])
      for key in ("kl", "reward/gold", "reward/frozen")
    }
    way["reward/gold"] -= np.array(
      [[results.sft_gold[seed]] for seed in seeds]
    )  # the proxy's mean there is 0
    x = root(way["kl"].mean(0))
    for label, key in (("gold", "reward/gold"), ("proxy", "reward/frozen")):
      axes[0, 1].plot(x, way[key].mean(0), label=label, markevery=max(1, len(x) // 9), **OF[label])
    panels.append((axes[0, 1], x, (base, factor), "rl", "d (a - b log d)"))
  for axis, x, key, kind, formula in panels:
    fit, at = results.fits[key][kind], np.linspace(max(x.max() * 1e-3, 1e-6), x.max(), 200)
    curve = at * (fit.a.value - fit.b.value * stats.KINDS[kind](at))
    axis.plot(
      at, curve, color="#0072B2", ls="--", lw=1.4, label=f"fit of gold: {formula}, R² {fit.r2:.2f}"
    )
    axis.legend(frameon=False, fontsize=8.5)
  dress(axes[0, 0], "Best of n by the proxy", ROOT_KL, "change from the supervised policy")
  dress(axes[0, 1], f"RL: {base}", ROOT_KL, "change from the supervised policy")
  return figure


def drift(config, results: Results):
  """The change of scores as the policy's states move, a line for each arm with feedback (means over
  seeds).
  """
  panels = (
    ("drift/fixed_states", "Fixed responses: states only", "mean change of score"),
    ("drift/fixed_states_std", "The same, spread over responses", "deviation of the change"),
    ("drift/own_states", "Own samples: gain through own states", "score"),
  )

  def has(name):
    return panels[0][0] in results.curves[name][only_factor(results, name)].metrics

  names = [name for name in results.curves if has(name)][:MOST]
  if not names:
    return None
  figure, axes = canvas(12, 4.0, 1, 3)
  for axis, (key, title, label) in zip(axes[0], panels):
    axis.axhline(0, color=GREY, lw=1, ls=":")
    for i, name in enumerate(names):
      mean = results.curves[name][only_factor(results, name)].metrics[key].mean(0)
      at = np.flatnonzero(np.isfinite(mean))
      axis.plot(at, mean[at], label=name, lw=1.4, ms=5, **style(i))
    dress(axis, title, "step", label)
  legend(figure, axes[0, 0])
  return figure


# (file, heading, caption, drawing)
FIGURES = (
  (
    "1_gold_against_step",
    "Gold against the step",
    "Solid: gold, with its interval over seeds. Dotted: the frozen proxy on the same samples. "
    "Dashed: gold of the "
    "baseline of the same kind.",
    against_step,
  ),
  (
    "2_frontier",
    "Gold against distance from the reference",
    "An arm is better if it has more gold at the same KL. Ending sooner on the same curve is a "
    "smaller step, not a better reward.",
    frontier,
  ),
  (
    "3_differences",
    "Paired differences of gold",
    "Means over seeds with 95% intervals; an interval that contains 0 shows no difference. Gold "
    "at a KL uses the seeds that reach it in both arms.",
    forest,
  ),
  (
    "4_best_of_n",
    "Best of n",
    "No training: the best of n samples of the supervised policy by the proxy.",
    best_of_n,
  ),
  (
    "5_drift",
    "Scores under drifting feedback",
    "With fixed responses and a fixed reward head, the score changes only with the policy's "
    "states. A change that all responses share affects no advantage; its standard deviation over "
    "responses does. On the right: what the policy's own samples gain because the reward reads "
    "the policy's states instead of the reference's.",
    drift,
  ),
)
