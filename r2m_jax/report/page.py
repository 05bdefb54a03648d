"""The report of a run: metrics.jsonl and samples.jsonl as figures/*.png and one self-contained
report.html.
"""

import base64
import html
import io
import json
import math
from pathlib import Path

import numpy as np

from r2m_jax.report.summary import (
  cautions,
  control_case,
  findings,
  format_summary,
  number,
  series,
  summary_table,
  window_means,
)
from r2m_jax.run.files import read_jsonl, write_atomic
from r2m_jax.run.metrics import ROW_KEYS, read_metrics

__all__ = ["format_summary", "summary_table", "write_report"]

MAX_PROMPTS, MAX_CHARS = 40, 4000  # what the sample table shows

# Okabe and Ito's colourblind-safe colours, less the yellow; arms past the seventh repeat them
# dashed.
COLOURS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#D55E00", "#56B4E9", "#767676")
OWN_COLOUR = {
  "": "#0072B2",
  "vanilla": "#767676",
  "scaled": "#E69F00",
  "r2m": "#0072B2",
}  # alike in every report

# (file, title, x, caption, panels); a panel is (metric, title, y label, reference line or None).
# The metrics of the stages before RL carry the stage's name here: sft/loss.
STEP, ROOT_KL = "step", "sqrt(KL from the reference)  [√nat]"
FIGURES = (
  (
    "1_rewards",
    "Gold and proxy reward",
    STEP,
    "Over-optimisation is gold falling while the frozen proxy still rises. Dots mark each arm's "
    "gold peak. The used "
    "reward is what the policy is trained on; where it moves or is scaled it is not comparable "
    "across arms.",
    (
      ("reward/gold", "Gold reward", "gold", None),
      ("reward/frozen", "Frozen proxy, same samples", "proxy", None),
      ("reward/used", "Used reward", "reward", None),
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
      ("reward/frozen", "Frozen proxy, same samples", "proxy", None),
    ),
  ),
  (
    "3_behaviour",
    "What the policy does",
    STEP,
    "A reward gained by collapsing to very short, very long or repeated text is no gain.",
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
    "Pairs are labelled by the reward itself. Disagreement is the share of them whose order "
    "contradicts gold (dotted: "
    "chance). The correlation is that of used reward and gold among responses to one prompt.",
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


# ---- figures ----


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


CELL, DPI = (
  (4.2, 2.9),
  150,
)  # a panel's inches; whole pixels, so that a figure cuts exactly into its panels


def draw_figure(rows, x, panels, styles, matched_kl=None):
  """Returns (png of the figure, [png of each panel]); panels that no row has are left out, none
  left gives None.
  """
  from matplotlib.backends.backend_agg import FigureCanvasAgg
  from matplotlib.figure import Figure
  from PIL import Image

  panels = [panel for panel in panels if len(series(rows, panel[0])[0])]
  if not panels:
    return None
  arms = _arms_with(rows, panels)
  columns = min(3, len(panels))
  height = -(-len(panels) // columns) * CELL[1]
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
    )  # x, y of the lower left from the top
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
  canvas = FigureCanvasAgg(figure)
  canvas.draw()
  image = Image.fromarray(np.asarray(canvas.buffer_rgba())).convert("RGB")
  return png(image), [png(image.crop(box)) for box in boxes]


def _arms_with(rows, panels):
  return list(dict.fromkeys(row["arm"] for row in rows if any(panel[0] in row for panel in panels)))


def png(image):
  """Bytes of a Pillow image, with few colours."""
  data = io.BytesIO()
  image.quantize(128).save(data, "png")
  return data.getvalue()


def _draw_panel(axes, rows, arms, x, panel, styles, matched_kl):
  metric, title, label, reference = panel
  for arm in arms:
    colour, dashes = styles.get(arm, (COLOURS[0], "-"))
    mine = [row for row in rows if row["arm"] == arm]
    if x == STEP:
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
      label=arm or "run",
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


def dress(axes, title, x, label):
  """A panel's title, labels, grid and spines."""
  axes.set_title(title, fontsize=11, loc="left", fontweight="bold", color="#222")
  axes.set_xlabel(x, fontsize=9.5, color="#444")
  axes.set_ylabel(label, fontsize=9.5, color="#444")
  axes.tick_params(labelsize=9, colors="#444", length=3)
  axes.locator_params(nbins=5)
  for axis in (
    axes.xaxis,
    axes.yaxis,
  ):  # no common factor above the axes, where the title is; + 0.0: no -0
    axis.set_major_formatter(lambda value, _: f"{round(value, 10) + 0.0:.4g}")
  axes.grid(color="#e6e8eb", lw=0.8)
  axes.set_axisbelow(True)
  for side in ("top", "right"):
    axes.spines[side].set_visible(False)
  for side in ("left", "bottom"):
    axes.spines[side].set_color("#bbb")


# ---- page ----

STYLE = """
:root{--bg:#f6f7f9;--card:#fff;--ink:#1c2127;--soft:#5b6570;--line:#e2e5e9;--mark:#0b5cad;--tint:#eef5fc}
@media(prefers-color-scheme:dark){:root{--bg:#14171b;--card:#1d2126;--ink:#e6e9ec;--soft:#9aa4af;--line:#333a42;
--mark:#6fb1ef;--tint:#1a2836}}
*{box-sizing:border-box}[hidden]{display:none!important}
body{margin:0;background:var(--bg);color:var(--ink);font:16px/1.55 system-ui,-apple-system,"Segoe UI",Roboto,sans-serif}
main{max-width:1200px;margin:0 auto;padding:28px 18px 64px}
h1{font-size:1.65rem;line-height:1.2;margin:0 0 4px}h2{font-size:1.15rem;margin:36px 0 2px}
p{margin:.4em 0}.soft{color:var(--soft);font-size:.9rem;max-width:96ch}
.card{background:var(--card);border:1px solid var(--line);border-radius:12px;padding:16px 20px;margin:14px 0}
.lead{background:var(--tint);border-left:5px solid var(--mark)}.lead ul{margin:.5em 0;padding-left:1.2em}
.lead li{margin:.3em 0}.care{color:var(--soft);font-size:.9rem;margin-top:12px}.wide{overflow-x:auto}
table{border-collapse:collapse;width:100%;font-size:.9rem;font-variant-numeric:tabular-nums}
th{color:var(--soft);font-weight:600;font-size:.8rem}
th,td{padding:7px 10px;text-align:right;border-bottom:1px solid var(--line);vertical-align:top;white-space:nowrap}
tr:last-child td{border-bottom:0}thead th{vertical-align:bottom;white-space:normal}
th:first-child,td:first-child,.text{text-align:left}
.key{display:inline-block;width:22px;border-top:4px solid;vertical-align:middle;margin-right:8px}
.keys{display:flex;flex-wrap:wrap;gap:4px 20px;font-size:.88rem;margin:6px 0}
.panels{display:grid;grid-template-columns:repeat(auto-fill,minmax(min(100%,330px),1fr));gap:10px;margin:8px 0}
.panels img{width:100%;max-width:560px;display:block;background:#fff;border:1px solid var(--line);border-radius:10px}
.panels.whole{grid-template-columns:1fr}.panels.whole img{max-width:none}
@media(prefers-color-scheme:dark){.panels img{filter:brightness(.9)}}
td.text{white-space:pre-wrap;overflow-wrap:anywhere;width:60%;min-width:260px;font-size:.88rem}
.tall{max-height:22em;overflow:auto}
.prompt{white-space:pre-wrap;overflow-wrap:anywhere;font-size:.9rem;background:var(--tint);border-radius:8px;
padding:8px 12px;margin:0 0 6px;max-height:11em}summary{cursor:pointer;font-weight:600}
pre{overflow-x:auto;font-size:.82rem;line-height:1.45}select{font:inherit;padding:2px 6px}
@media(max-width:640px){body{font-size:15px}.card{padding:12px 14px}.samples thead{display:none}
.samples tr{display:flex;flex-wrap:wrap;gap:2px 16px;padding:8px 0;border-bottom:1px solid var(--line)}
.samples tr:last-child{border-bottom:0}.samples td{border:0;padding:0;white-space:normal}
.samples td.text{width:100%;flex:0 0 100%;order:9}.samples td[data-name]::before{content:attr(data-name) " ";
color:var(--soft)}}
"""
SCRIPT = """
const pick = document.getElementById("pick");
if (pick) {
  pick.hidden = false;
  pick.querySelector("select").onchange = (event) => {
    for (const row of document.querySelectorAll("tr[data-arm]"))
      row.hidden = event.target.value && row.dataset.arm && row.dataset.arm !== event.target.value;
  };
}
"""


def write_report(workdir, *, title, notes=(), tables=(), config=None):
  """Writes WORKDIR/report.html and WORKDIR/figures/*.png; returns the page's path.

  notes: plain sentences to show under the findings. tables: dicts of title, head, rows (lists of
  text) and note.
  config: a dict, or None to read WORKDIR/config.json if it is there.
  """
  workdir = Path(workdir)
  rows, samples = read_metrics(workdir), read_jsonl(workdir / "samples.jsonl")
  if config is None and (workdir / "config.json").exists():
    config = json.loads((workdir / "config.json").read_text(encoding="utf-8"))
  table = summary_table(rows)
  styles = style_of(
    list(dict.fromkeys([row["arm"] for row in rows] + [row["arm"] for row in samples]))
  )
  parts = [
    f"<h1>{_text(title)}</h1>",
    f'<p class="soft">{_text(describe(rows))}</p>',
    _headline(table, notes),
  ]
  if table:
    parts.append(_summary_html(table, styles))
  parts += [table_html(table) for table in tables]
  named = [row if row["stage"] == "rl" else _with_stage(row) for row in rows]
  for name, heading, x, caption, panels in FIGURES:
    drawn = draw_figure(named, x, panels, styles, table[0]["matched_kl"] if table else None)
    if drawn:
      write_atomic(workdir / "figures" / f"{name}.png", drawn[0])
      parts.append(figure_html(heading, caption, drawn[1], _arms_with(named, panels), styles))
  parts.append(_samples_html(samples, styles))
  if config is not None:
    shown = json.dumps(
      config.to_dict() if hasattr(config, "to_dict") else config, indent=2, default=str
    )
    parts.append(
      f'<details class="card"><summary>Configuration</summary><pre>{_text(shown)}</pre></details>'
    )
  return write_page(workdir / "report.html", title, parts)


def write_page(path, title, parts):
  """Writes a self-contained page of HTML parts in the report's style; returns its path."""
  page = (
    f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{_text(title)}</title>'
    '<meta name="viewport" content="width=device-width,initial-scale=1">'
    f'<meta name="color-scheme" content="light dark"><style>{STYLE}</style></head>\n<body><main>\n'
    + "\n".join(filter(None, parts))
    + f"\n</main><script>{SCRIPT}</script></body></html>\n"
  )
  write_atomic(path, page)
  return path


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


def _text(value):
  return html.escape(str(value))


def _key(arm, styles):
  colour, dashes = styles.get(arm, (COLOURS[0], "-"))
  kind = {"-": "solid", "--": "dashed", ":": "dotted"}[dashes]
  return f'<span class="key" style="border-top:4px {kind} {colour}"></span>{_text(arm or "run")}'


def _headline(table, notes):
  cases = [sentence for _, sentence in control_case(table)]
  points = findings(table) + cases + list(notes)
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
  care = f'<div class="care"><b>Read with care</b>{bullets(care)}</div>' if care else ""
  return f'<div class="card lead"><b>What this run shows</b>{bullets(points)}{care}</div>'


def bullets(texts):
  """An HTML list of sentences."""
  return "<ul>" + "".join(f"<li>{_text(text)}</li>" for text in texts) + "</ul>"


def _summary_html(table, styles):
  gold = any(entry["start"] is not None for entry in table)
  matched = table[0]["matched_kl"]
  head = ["Arm"] + ["Gold start", "Gold peak (step)", "Gold end", "Share of gain lost"] * gold
  head += ["Frozen proxy start → end", "KL end", "Length start → end"]
  head += [f"Gold at KL {number(matched, 1)}"] if matched is not None else []
  lines = []
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
    lines.append("<tr>" + "".join(f"<td>{cell}</td>" for cell in cells) + "</tr>")
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
  return (
    '<div class="card"><div class="wide"><table><thead><tr>'
    + "".join(f"<th>{_text(h)}</th>" for h in head)
    + f'</tr></thead><tbody>{"".join(lines)}</tbody></table></div><p class="soft">{note}</p></div>'
  )


def table_html(table):
  """A section from a dict of title, head, rows (lists of text) and note."""
  head = "".join(f"<th>{_text(name)}</th>" for name in table["head"])
  body = "".join(
    "<tr>" + "".join(f"<td>{_text(cell)}</td>" for cell in row) + "</tr>" for row in table["rows"]
  )
  return (
    f'<section><h2>{_text(table["title"])}</h2><div class="card"><div class="wide"><table><thead><tr>{head}</tr>'
    f'</thead><tbody>{body}</tbody></table></div><p class="soft">{_text(table["note"])}</p></div></section>'
  )


def figure_html(heading, caption, images, arms=(), styles=None, *, whole=False):
  """A section of png images, with a key to the arms where there are several; `whole`: at full
  width.
  """
  keys = "".join(f"<span>{_key(arm, styles)}</span>" for arm in arms) if len(arms) > 1 else ""
  panels = "".join(
    f'<img alt="{_text(heading)}, panel {i}" src="data:image/png;base64,'
    f'{base64.b64encode(image).decode()}">'
    for i, image in enumerate(images, 1)
  )
  return (
    f'<section><h2>{_text(heading)}</h2><p class="soft">{_text(caption)}</p><div class="keys">{keys}</div>'
    f'<div class="panels{" whole" * whole}">{panels}</div></section>'
  )


def _samples_html(samples, styles):
  """Every prompt with its responses: before, at steps in between, after; one row a response."""
  if not samples:
    return ""
  order = {"before": -1, "after": math.inf}
  prompts = list(dict.fromkeys(row["prompt"] for row in samples))
  scores = [
    (key, name)
    for key, name in (("gold", "gold"), ("reward", "used"), ("frozen", "frozen"))
    if any(row.get(key) is not None for row in samples)
  ]
  head = "".join(f"<th>{name}</th>" for name in ["arm", *(name for _, name in scores), "tokens"])
  blocks = []
  for prompt in prompts[:MAX_PROMPTS]:
    lines = []
    mine = _merge_before([row for row in samples if row["prompt"] == prompt])
    for row in sorted(mine, key=lambda row: order.get(row["when"], row["when"])):
      when = row["when"] if row["when"] in order else f"step {row['when']}"
      who = f"{_key(row['arm'], styles)}, {_text(when)}" if row["arm"] else _text(when)
      cells = [
        f"<td>{who}</td>",
        f'<td class="text"><div class="tall">{_cut(row["response"])}</div></td>',
      ]
      cells += [
        f'<td data-name="{name}">{number(_float(row.get(key)))}</td>' for key, name in scores
      ]
      length = (
        "–"
        if row.get("length") is None
        else f"{row['length']:.0f}{' (cut)' if row.get('truncated') else ''}"
      )
      cells.append(f'<td data-name="tokens">{length}</td>')
      lines.append(f'<tr data-arm="{_text(row["arm"])}">{"".join(cells)}</tr>')
    blocks.append(
      f'<div class="card"><div class="prompt tall">{_cut(prompt)}</div><div class="wide"><table class='
      f'"samples"><thead><tr>{head.replace("</th>", "</th><th class=text>response</th>", 1)}</tr></thead>'
      f"<tbody>{''.join(lines)}</tbody></table></div></div>"
    )
  arms = dict.fromkeys(row["arm"] for row in samples if row["arm"])
  options = "".join(f"<option>{_text(arm)}</option>" for arm in arms)
  pick = f'<label id="pick" hidden>Show <select><option value="">all arms</option>{options}</select></label>'
  more = (
    f" The first {MAX_PROMPTS} of {len(prompts)} prompts." if len(prompts) > MAX_PROMPTS else ""
  )
  return (
    f'<section><h2>Samples before and after</h2><p class="soft">Model text as it was sampled, unedited.{more}'
    f" {pick if len(arms) > 1 else ''}</p>"
    + "".join(blocks[:6])
    + (
      f"<details><summary>{len(blocks) - 6} more prompts</summary>{''.join(blocks[6:])}</details>"
      if len(blocks) > 6
      else ""
    )
    + "</section>"
  )


def _merge_before(rows):
  """Arms start from one policy: where all have the same sample before, it is one row, of no arm."""
  before = [row | {"arm": ""} for row in rows if row["when"] == "before"]
  same = len(before) > 1 and all(row == before[0] for row in before)
  return before[:1] + [row for row in rows if row["when"] != "before"] if same else rows


def _cut(text):
  return _text(text[:MAX_CHARS]) + (
    f" … ({len(text) - MAX_CHARS} more characters)" if len(text) > MAX_CHARS else ""
  )


def _float(value):
  return float(value) if value is not None else None  # a non-finite score is a string here
