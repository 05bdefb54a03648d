"""The figures of `task=analyse`, in the style of lab/figures.py: distinguished by marker, dash and
position, not only by colour.
"""

import numpy as np

from r2m_jax.analysis.evidence import DYNAMICS, TREND, Curves, Read, Row, hacks, step_matrix
from r2m_jax.analysis.probes import centred, pairs_of_prompts, unit
from r2m_jax.lab.figures import GREY, INK, MARKS, MOST, band, style
from r2m_jax.report.figures import COLOURS, canvas, dress, grid, legend
from r2m_jax.report.summary import window_of

BINS = 8  # of pairs, by similarity
SHOWN = 40  # responses of a kind in a similarity matrix


def spans(rows: list[Row]) -> np.ndarray:
  """(value, below, above) of rows, f64[3, N]; no bar if there is no interval."""
  x = np.array([row.found[:3] for row in rows], float).reshape(-1, 3)
  return np.stack(
    [x[:, 0], *np.nan_to_num(np.clip([x[:, 0] - x[:, 1], x[:, 2] - x[:, 0]], 0, None))]
  )


def similarity(rows: list[Row]):
  """Fig. 1: a column for each policy, cosine by layer; below it, same label minus across."""
  names, layers = (list(dict.fromkeys(row.labels[i] for row in rows)) for i in (0, 1))
  names, measures = names[:5], list(dict.fromkeys(row.measure for row in rows))
  figure, axes = canvas(2.7 * len(names) + 0.6, 5.2, 2, len(names))
  lines = [measure for measure in measures if not measure.startswith("gap")]
  for j, name in enumerate(names):
    axes[1, j].axhline(0, color=GREY, lw=1)
    for m, measure in enumerate(measures):
      y, *bars = spans([row for row in rows if row.labels[0] == name and row.measure == measure])
      at = np.arange(len(y)) + 0.06 * (m % 3 - 1)
      axes[int(measure not in lines), j].errorbar(
        at, y, bars, label=measure, capsize=2, lw=1.4, ms=5, **style(m)
      )
    for i, label in enumerate(("mean cosine", "gap")):
      dress(axes[i, j], name if i == 0 else "", "layer", "" if j else label)
      axes[i, j].set_xticks(range(len(layers)), layers)
  parts = [axis.get_legend_handles_labels() for axis in axes[:, 0]]
  handles, labels = (parts[0][i] + parts[1][i] for i in (0, 1))
  figure.legend(handles, labels, loc="outside lower center", ncols=5, frameon=False, fontsize=9)
  return figure


def differences(reads: list[Read]):
  """Fig. 2: mean |difference of reward| over equal-sized bins of pairs, relative to its mean over
  all pairs.
  """
  names = list(dict.fromkeys(name for read in reads for name in read.scores))
  figure, axes = canvas(3.9 * len(names), 3.9, 1, len(names))
  for axis, name in zip(axes[0], names):
    for i, read in enumerate(reads[:MOST]):
      if name not in read.scores:
        continue
      pairs = pairs_of_prompts(read.final, read.prompt)
      gap = np.abs(read.scores[name][pairs.i] - read.scores[name][pairs.j])
      parts = np.array_split(np.argsort(pairs.cosine), min(BINS, len(gap)))
      x, y = (
        [v[part].mean() for part in parts] for v in (pairs.cosine, gap / max(gap.mean(), 1e-12))
      )
      axis.plot(x, y, label=read.name, lw=1.4, ms=5, **style(i))
    dress(
      axis,
      f"By {name}",
      "cosine of last-layer states",
      "" if axis is not axes[0, 0] else "|Δ reward| / its mean",
    )
  legend(figure, axes[0, 0], 5)
  return figure


def _curve(axis, values: np.ndarray, i: int, label: str):
  """Means over windows of a tenth of the steps, with the interval over seeds if there are
  several.
  """
  mean, low, high = band(values)
  at = np.arange(len(mean)) + (window_of(values.shape[1]) - 1) / 2
  if len(values) > 1:
    axis.fill_between(at, low, high, color=style(i)["color"], alpha=0.15, lw=0)
  axis.plot(
    at,
    mean,
    label=label,
    lw=1.4,
    ms=5,
    markevery=(i, max(1, len(at) // 6)) if len(at) > 8 else 1,
    **style(i),
  )


def dynamics(curves: Curves):
  """Fig. 5: a panel for each metric, a line for each arm."""
  panels = [panel for panel in DYNAMICS if any(panel[0] in metrics for metrics in curves.values())]
  figure, axes = grid(len(panels), 4, (3.3, 2.7), 0.4)
  for axis, (metric, title, label) in zip(axes, panels):
    for i, arm in enumerate(list(curves)[:MOST]):
      if metric in curves[arm]:
        _curve(axis, curves[arm][metric], i, arm)
    dress(axis, title, "step", label)
  legend(figure, max(axes, key=lambda axis: len(axis.lines)), 8)
  return figure


def noise(curves: Curves):
  """Fig. 6: each reward against the step, with the policy's states and with noise instead."""
  metrics = [metric for metric in TREND if all(metric in curves[arm] for arm in ("r2m", "noise"))]
  titles = {metric: title for metric, title, _ in DYNAMICS}
  figure, axes = canvas(3.7 * len(metrics), 3.4, 1, len(metrics))
  for axis, metric in zip(axes[0], metrics):
    for i, arm in enumerate(("r2m", "noise", "vanilla")):
      if arm in curves:
        _curve(axis, curves[arm][metric], i, arm)
    dress(axis, titles[metric], "step", "reward" if axis is axes[0, 0] else "")
  legend(figure, axes[0, 0])
  return figure


def dots(
  rows: list[Row], measures: list[str], titles: list[str], group: int = 0, name: int = 1, zero=None
):
  """A panel for each measure: a row for each label `name`, a marker for each label `group`."""
  names, groups = (list(dict.fromkeys(row.labels[i] for row in rows)) for i in (name, group))
  groups = groups[:MOST]
  figure, axes = canvas(
    2.6 + 3.6 * len(measures), 0.3 * len(names) * max(1, len(groups) / 3) + 1.4, 1, len(measures)
  )
  for axis, measure, title in zip(axes[0], measures, titles):
    if zero is not None:
      axis.axvline(zero, color=GREY, lw=1)
    for i, one in enumerate(groups):
      mine = [row for row in rows if row.labels[group] == one and row.measure == measure]
      x, *bars = spans(mine)
      y = [
        len(names) - 1 - names.index(row.labels[name]) + 0.6 * (0.5 - (i + 0.5) / len(groups))
        for row in mine
      ]
      look = dict(
        color=COLOURS[i % len(COLOURS)], fmt=MARKS[i % len(MARKS)], mfc="white" if i % 2 else None
      )
      axis.errorbar(x, y, xerr=bars, label=one, ms=5, lw=1.1, capsize=2, **look)
    dress(axis, title, "", "")
    axis.set_yticks(range(len(names)), names[::-1] if axis is axes[0, 0] else [""] * len(names))
    axis.set_ylim(-0.6, len(names) - 0.4)
  legend(figure, axes[0, 0], 5)
  return figure


def cost(rows: list[Row]):
  """Fig. 7: seconds and FLOPs of a step, with the arms side by side."""
  arms = list(dict.fromkeys(row.labels[0] for row in rows))
  panels = [m for m in ("seconds a step", "GFLOP a step") if any(row.measure == m for row in rows)]
  figure, axes = canvas(0.9 * len(arms) * len(panels) + 2.5, 3.2, 1, len(panels))
  for axis, measure in zip(axes[0], panels):
    mine = [row for row in rows if row.measure == measure]
    y, *bars = spans(mine)
    bars = bars if np.any(bars) else None
    drawn = axis.bar(range(len(y)), y, yerr=bars, color="#c9d6e3", edgecolor=INK, capsize=3, lw=1)
    axis.bar_label(drawn, [f"{v:.3g}" for v in y], label_type="center", fontsize=9)
    dress(axis, measure, "", "")
    axis.set_xticks(
      range(len(y)), [row.labels[0] for row in mine], rotation=20 if len(arms) > 4 else 0
    )
  return figure


def matrices(reads: list[Read], start: Read, seed: int):
  """Fig. 9: cosine of centred last-layer states between responses: sound ones first, then hacking
  ones.
  """
  drawn = []
  for read in reads:
    kind, rng = hacks(read, start), np.random.default_rng(seed)
    picked = [np.sort(rng.permutation(np.flatnonzero(kind == k))[:SHOWN]) for k in (0, 1)]
    if all(map(len, picked)):
      drawn.append((read, picked))
  if not drawn:
    return None
  figure, axes = canvas(3.1 * len(drawn) + 0.9, 3.6, 1, len(drawn))
  for axis, (read, picked) in zip(axes[0], drawn):
    x = unit(centred(read.final))[np.concatenate(picked)]
    image = axis.imshow(x @ x.T, cmap="gray", vmin=-1, vmax=1, interpolation="nearest")
    for line in (axis.axhline, axis.axvline):
      line(len(picked[0]) - 0.5, color="#D55E00", lw=1.5, ls="--")
    axis.set_title(f"{read.name}", fontsize=11, loc="left", fontweight="bold", color=INK)
    middles = [len(picked[0]) / 2, len(picked[0]) + len(picked[1]) / 2]
    labels = [f"{word} ({len(rows)})" for word, rows in zip(("sound", "hacking"), picked)]
    axis.set_xticks(middles, labels, fontsize=9)
    axis.set_yticks(
      middles, labels if axis is axes[0, 0] else ["", ""], fontsize=9, rotation=90, va="center"
    )
    axis.tick_params(length=0)
  figure.colorbar(image, ax=axes[0].tolist(), label="cosine, centred", shrink=0.8)
  return figure


def steps(arms: dict[str, dict[int, np.ndarray]]):
  """Fig. 9 over steps: mean cosine between the states of the same responses, read at two steps, for
  each arm.
  """
  names = list(arms)[:6]
  figure, axes = canvas(2.9 * len(names) + 0.9, 3.3, 1, len(names))
  found = {name: step_matrix(arms[name]) for name in names}
  low = min(matrix.min() for matrix in found.values())
  for axis, (name, matrix) in zip(axes[0], found.items()):
    image = axis.imshow(matrix, cmap="gray", vmin=low, vmax=1)
    axis.set_title(name, fontsize=11, loc="left", fontweight="bold", color=INK)
    at = range(len(matrix))
    axis.set_xticks(at, [str(step) for step in arms[name]], fontsize=9)
    axis.set_yticks(at, [str(step) for step in arms[name]], fontsize=9)
    axis.set_xlabel("step", fontsize=9.5)
    if len(matrix) <= 8:
      for i in at:
        for j in at:
          dark = matrix[i, j] < (low + 1) / 2
          axis.text(
            j,
            i,
            f"{matrix[i, j]:.2f}",
            ha="center",
            va="center",
            fontsize=8,
            color="white" if dark else INK,
          )
  figure.colorbar(image, ax=axes[0].tolist(), label="mean cosine", shrink=0.8)
  return figure
