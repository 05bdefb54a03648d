"""Figures of reports: those of a run's report, and the parts shared with the laboratory and the
analysis.

A figure is drawn on axes from `grid` or `canvas`; `rendered` turns it into a PNG.
"""

import io
import math

import numpy as np

from r2m_jax.report.summary import series, window_means

# Okabe and Ito's colourblind-safe colours, without the yellow; more than seven arms repeat them
# dashed.
COLOURS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#D55E00", "#56B4E9", "#767676")
OWN_COLOUR = {
  "": "#0072B2",
  "vanilla": "#767676",
  "scaled": "#E69F00",
  "r2m": "#0072B2",
}  # the same in every report

# (file, title, x, caption, panels); a panel is (metric, title, y label, reference line or None).
# Metrics of the stages before RL have the stage's name as a prefix here: sft/loss.
STEP, ROOT_KL = "step", "sqrt(KL from the reference)  [√nat]"
FIGURES = (
  (
    "1_rewards",
    "Rewards over the steps",
    STEP,
    "Over-optimisation is gold, if it is measured, falling while the frozen proxy still rises. "
    "Dots mark each arm's gold peak. The used reward trains the policy; if it changes or is "
    "scaled, it is not comparable across arms. All values are means over each step's own "
    "training samples.",
    (
      ("reward/gold", "Gold reward", "gold", None),
      ("reward/frozen", "Frozen proxy", "proxy", None),
      ("reward/used", "Used reward", "reward", None),
    ),
  ),
  (
    "7_evaluations",
    "Held-out evaluations",
    STEP,
    "Means over the same prompts at each evaluation, sampled with the same random numbers; bands "
    "are 95% intervals over prompts. Nothing here is used for training.",
    (
      ("eval/gold", "Gold reward", "gold", None),
      ("eval/frozen", "Frozen proxy", "proxy", None),
      ("eval/kl", "Exact KL from the reference", "nats a response", None),
      ("eval/length", "Response length", "tokens", None),
      ("eval/truncated", "Cut at the length limit", "share", None),
      ("eval/repetition", "Repeated 4-grams", "share", None),
    ),
  ),
  (
    "2_frontier",
    "Reward against distance from the reference",
    ROOT_KL,
    "Arms that move at different speeds are compared at equal KL, not at equal step. The dotted "
    "line is the largest KL "
    "that all arms reach.",
    (
      ("reward/gold", "Gold reward", "gold", None),
      ("reward/frozen", "Frozen proxy", "proxy", None),
    ),
  ),
  (
    "3_behaviour",
    "What the policy does",
    STEP,
    "A higher reward from very short, very long or repeated text is not an improvement.",
    (
      ("length", "Response length", "tokens", None),
      ("entropy", "Entropy", "nats a token", None),
      ("kl", "KL from the reference", "nats a response", None),
      ("truncated", "Cut at the length limit", "share", None),
      ("repetition", "Repetition", "share", None),
    ),
  ),
  (
    "4_reward_head",
    "The reward model during RL",
    STEP,
    "Pairs are labelled by the reward itself. Disagreement is the share of pairs whose order "
    "contradicts gold (dotted: chance). The correlation is between used reward and gold among "
    "responses to one prompt.",
    (
      ("r2m/omega", "Weight ω on the own embedding", "weight", None),
      ("r2m/bt", "Bradley-Terry loss", "nats", None),
      ("r2m/gre", "Group reward entropy", "nats", None),
      ("r2m/pair_disagreement", "Pairs that contradict gold", "share", 0.5),
      ("reward/within_corr", "Used reward and gold, within prompt", "correlation", 0.0),
      ("r2m/attention_entropy", "Attention entropy", "nats", None),
    ),
  ),
  (
    "5_policy",
    "Policy optimisation",
    STEP,
    "",
    (
      ("policy/loss", "Policy loss", "loss", None),
      ("policy/grad_norm", "Gradient norm", "norm", None),
      ("policy/clip_fraction", "Clipped tokens", "share", None),
    ),
  ),
  (
    "6_before_rl",
    "Before RL: fine-tuning and reward model",
    STEP,
    "Dotted: chance.",
    (
      ("lm/loss", "Language-modelling loss", "nats a token", None),
      ("sft/loss", "Fine-tuning loss", "nats a token", None),
      ("sft/gold", "Gold reward of samples", "gold", None),
      ("reward/loss", "Reward model: Bradley-Terry loss", "nats", None),
      ("reward/accuracy", "Reward model: pair accuracy", "share", 0.5),
    ),
  ),
)


CELL = (4.2, 2.9)  # a panel's inches; whole pixels at DPI, so that a figure can be cut exactly
DPI = 150


# ---- from axes to a PNG ----


def canvas(wide: float, tall: float, rows: int = 1, columns: int = 1):
  """(figure, axes [rows, columns]); inches."""
  from matplotlib.figure import Figure

  figure = Figure(figsize=(wide, tall), dpi=DPI, layout="constrained")
  return figure, figure.subplots(rows, columns, squeeze=False)


def shape_of(count: int, most: int) -> tuple[int, int]:
  """(rows, columns) of `count` panels, at most `most` in a row."""
  columns = min(most, count)
  return -(-count // columns), columns


def grid(count: int, most: int, cell: tuple[float, float], more: float = 0.0):
  """(figure, `count` axes), row by row, at most `most` in a row.

  Args:
    cell: inches of a panel, width and height.
    more: additional inches of height, for a legend.
  """
  rows, columns = shape_of(count, most)
  figure, axes = canvas(cell[0] * columns, cell[1] * rows + more, rows, columns)
  for axis in axes.flat[count:]:
    axis.remove()
  return figure, list(axes.flat[:count])


def legend(figure, axis, columns: int = 4, *, place: str = "lower"):
  """A legend of one axis, outside of all panels: "lower" or "upper"."""
  figure.legend(
    *axis.get_legend_handles_labels(),
    loc=f"outside {place} center",
    ncols=columns,
    frameon=False,
    fontsize=9,
  )


def image_of(figure):
  """A figure as a Pillow image."""
  from matplotlib.backends.backend_agg import FigureCanvasAgg
  from PIL import Image

  drawn = FigureCanvasAgg(figure)
  drawn.draw()
  return Image.fromarray(np.asarray(drawn.buffer_rgba())).convert("RGB")


def png(image) -> bytes:
  """A Pillow image as PNG with few colours."""
  data = io.BytesIO()
  image.quantize(128).save(data, "png")
  return data.getvalue()


def rendered(figure) -> bytes:
  """A figure as PNG."""
  return png(image_of(figure))


# ---- the figures of a run ----


def style_of(arms):
  """arm -> (colour, line style), the same in every figure and table of the report."""
  free = [c for c in COLOURS if c not in {OWN_COLOUR[a] for a in arms if a in OWN_COLOUR}] or list(
    COLOURS
  )
  others = [arm for arm in arms if arm not in OWN_COLOUR]
  styles = {arm: (colour, "-") for arm, colour in OWN_COLOUR.items()}
  return styles | {
    arm: (free[i % len(free)], ("-", "--", ":")[i // len(free) % 3]) for i, arm in enumerate(others)
  }


def key_of(arm, styles):
  """The key of an arm in a figure: its name, line and colour."""
  colour, dashes = styles.get(arm, (COLOURS[0], "-"))
  line = {"-": "solid", "--": "dashed", ":": "dotted"}[dashes]
  return {"name": arm or "run", "line": line, "colour": colour}


def described(rows, x, panels):
  """A sentence for each panel of `draw_figure`, for readers who cannot see it."""
  sentences = []
  for metric, title, label, _ in panels:
    if not len(series(rows, metric)[0]):
      continue
    parts = []
    for arm in arms_with(rows, [(metric,)]):
      means = window_means(series([row for row in rows if row["arm"] == arm], metric)[1])
      if len(means):
        parts.append(f"{arm or 'run'} from {means[0]:.3g} to {means[-1]:.3g}")
    axis = "step" if x == STEP else "distance from the reference"
    sentences.append(f"{title} ({label}) against {axis}: {'; '.join(parts)}.")
  return sentences


def draw_figure(rows, x, panels, styles, matched_kl=None):
  """Returns (PNG of the figure, [PNG of each panel]). Panels without data are omitted; None if no
  panel has data.
  """
  from matplotlib.figure import Figure

  panels = [panel for panel in panels if len(series(rows, panel[0])[0])]
  if not panels:
    return None
  arms = arms_with(rows, panels)
  rows_of_panels, columns = shape_of(len(panels), 3)
  height = rows_of_panels * CELL[1]
  strip = (
    0.26 * -(-len(arms) // (2 * columns)) + 0.04 if len(arms) > 1 else 0.0
  )  # the legend, above the panels
  figure = Figure(figsize=(columns * CELL[0], height + strip), dpi=DPI)
  boxes = []
  for i, panel in enumerate(panels):
    left, top = i % columns * CELL[0], strip + i // columns * CELL[1]
    wide, tall = figure.get_size_inches()
    box = (
      left + 0.66,
      top + CELL[1] - 0.52,
      CELL[0] - 0.80,
      CELL[1] - 0.86,
    )  # x, y of the lower left corner, from the top
    axes = figure.add_axes((box[0] / wide, 1 - box[1] / tall, box[2] / wide, box[3] / tall))
    _draw_panel(axes, rows, arms, x, panel, styles, matched_kl)
    boxes.append([round(v * DPI) for v in (left, top, left + CELL[0], top + CELL[1])])
  if strip:
    handles, labels = figure.axes[0].get_legend_handles_labels()
    figure.legend(
      handles,
      labels,
      loc="upper center",
      ncols=2 * columns,
      frameon=False,
      fontsize=9,
      borderaxespad=0.2,
    )
  image = image_of(figure)
  return png(image), [png(image.crop(box)) for box in boxes]


def arms_with(rows, panels):
  return list(dict.fromkeys(row["arm"] for row in rows if any(panel[0] in row for panel in panels)))


def _draw_panel(axes, rows, arms, x, panel, styles, matched_kl):
  metric, title, label, reference = panel
  for arm in arms:
    colour, dashes = styles.get(arm, (COLOURS[0], "-"))
    mine = [row for row in rows if row["arm"] == arm]
    if x == STEP:
      draw_band(axes, mine, metric, colour)
      steps, values = series(mine, metric)
      axes.plot(steps, values, color=colour, lw=0.7, alpha=0.3)
      at, means = window_means(steps), window_means(values)
    else:
      _, kl, values = series(mine, "kl", metric)
      axes.plot(np.sqrt(np.maximum(kl, 0)), values, ".", color=colour, ms=2.5, alpha=0.25, mew=0)
      at, means = np.sqrt(np.maximum(window_means(kl), 0)), window_means(values)
    axes.plot(
      at,
      means,
      color=colour,
      ls=dashes,
      lw=2,
      label=literal(arm or "run"),
      marker="o" if len(means) == 1 else None,
    )
    if metric == "reward/gold" and len(means) > 1:
      top = int(np.argmax(means))
      axes.plot(at[top], means[top], "o", color=colour, ms=6, mec="white", mew=1.2, zorder=5)
  if reference is not None:
    axes.axhline(reference, color="#777", lw=1, ls=":")
  if x != STEP and matched_kl is not None:
    axes.axvline(math.sqrt(max(matched_kl, 0)), color="#777", lw=1, ls=":")
  dress(axes, title, x, label)


def literal(name: str) -> str:
  """A name as the label of a line: matplotlib would read $ as mathematics, and leave labels out of
  the legend that begin with an underscore.
  """
  return name.replace("$", r"\$").replace("_", "\N{ZERO WIDTH SPACE}_", name.startswith("_"))


def draw_band(axes, rows, metric, colour):
  """Draws the interval of a metric whose ends are logged."""
  steps, low, high = series(rows, f"{metric}_low", f"{metric}_high")
  if len(steps):
    smooth = map(window_means, (steps, low, high))  # like the line inside it
    axes.fill_between(*smooth, color=colour, alpha=0.15, lw=0)


def dress(axes, title, x, label):
  """Draws a panel's title, labels, grid and spines."""
  axes.set_title(title, fontsize=11, loc="left", fontweight="bold", color="#222")
  axes.set_xlabel(x, fontsize=9.5, color="#444")
  axes.set_ylabel(label, fontsize=9.5, color="#444")
  axes.tick_params(labelsize=9, colors="#444", length=3)
  axes.locator_params(nbins=5)
  for axis in (
    axes.xaxis,
    axes.yaxis,
  ):  # no common factor above the axes, at the title; + 0.0: no -0
    axis.set_major_formatter(lambda value, _: f"{round(value, 10) + 0.0:.4g}")
  axes.grid(color="#e6e8eb", lw=0.8)
  axes.set_axisbelow(True)
  for side in ("top", "right"):
    axes.spines[side].set_visible(False)
  for side in ("left", "bottom"):
    axes.spines[side].set_color("#bbb")
