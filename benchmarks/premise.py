"""Does a pretrained model have the properties of hidden states from which R2M starts? No RL is run.

  python -m benchmarks.premise --policy=FOLDER --pairs FILE... --states=DIR [--out=FILE.csv]

Reads files of pairs in any form of docs/data.md, and the policy in FOLDER with transformers (which
returns all layers in one pass; torch comes with the extra "test"). The first call stores states in
DIR; later calls only analyse them. `--run=RUN` adds the numbers of a run's task=analyse to the CSV.
Prints, with 95% intervals over prompts:

  figure 1      similarity of states, same label minus across, by layer and by reading
  figure 2      correlation of similarity with the difference of reward
  probe         held-out pairs that a linear probe of a layer orders right
  attention     what a random cross-attention reads, and what it does to the reward
"""

import argparse
import copy
import csv
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np

from r2m_jax.analysis import checks, probes
from r2m_jax.analysis.evidence import Row
from r2m_jax.report.intervals import Interval, estimate, group_mean, resampled

CHOSEN, REJECTED = 1, 0
POOLS = ("mean", "last", "all")  # over the response, its last token, prompt and response
SHOWN = (0, 6, 12, 18, 24, 30)  # layers of the tables, if the model has them; 0: embeddings
DRAWS = 8  # random attentions
OMEGA = 0.6
WIDTH = 2048  # of the attention, the paper's
PART = 16  # rows that are read before they are saved
RESAMPLES = 400  # of statistics over all pairs of rows


# ---- the forward pass ----


def rows_of(args, file: str) -> tuple[list[dict], list[list[int]], list[int], list[list[bool]]]:
  """(rows, ids of chosen and rejected in turn, length of each response, the tokens of each prompt
  that are its own text): the first `args.count` prompts that fit.
  """
  from r2m_jax.configs import default
  from r2m_jax.data.rows import load
  from r2m_jax.data.text import load_tokenizer

  config = default.get_config()
  config.data.name = file
  tokenizer = load_tokenizer(Path(args.policy), None)
  rows = []
  ids = []
  sizes = []
  written = []
  seen = set()
  for row in load(config.data, "pair"):
    prompt = tokenizer.render(row["prompt"])
    sides = [tokenizer.answer(row["prompt"], row[side]) for side in ("chosen", "rejected")]
    sides = [[*side, tokenizer.end_id] for side in sides]
    if str(row["prompt"]) in seen or max(map(len, sides)) + len(prompt) > args.longest:
      continue
    seen.add(str(row["prompt"]))
    rows.append(row)
    ids += [[*prompt, *side] for side in sides]
    sizes += map(len, sides)
    written.append(tokenizer.written(row["prompt"]))
    if len(rows) == args.count:
      break
  return rows, ids, sizes, written


def read(args, file: str, path: Path) -> None:
  """Writes pooled states f32[layers, pools, N, D] and the last layer's states of every token. An
  interrupted pass resumes where it stopped.
  """
  import torch
  from transformers import AutoModelForCausalLM

  rows, ids, sizes, written = rows_of(args, file)
  model = AutoModelForCausalLM.from_pretrained(args.policy, dtype=torch.float32).eval()
  torch.set_num_threads(args.threads)
  parts = path.with_suffix(".parts")
  parts.mkdir(exist_ok=True)
  for first in range(0, len(ids), PART):
    part = parts / f"{first}.npz"
    if part.exists():
      continue
    pooled, states = [], []
    for i in range(first, min(first + PART, len(ids)), 2):
      for hidden, size in zip(both(model.model, ids[i : i + 2], sizes[i : i + 2]), sizes[i:]):
        means = hidden[:, -size:].mean(1), hidden[:, -1], hidden.mean(1)
        pooled.append(torch.stack(means, 1).numpy())
        states.append(hidden[-1].numpy().astype(np.float16))
    np.savez(parts / "new.npz", pooled=np.stack(pooled, 2), states=np.concatenate(states))
    (parts / "new.npz").rename(part)
    print(f"\r{first + len(pooled)} of {len(ids)}", end="", file=sys.stderr)
  loaded = [np.load(parts / f"{first}.npz") for first in range(0, len(ids), PART)]
  margins = [row.get("margin") for row in load_margins(file, rows)]
  np.savez(
    path,
    pooled=np.concatenate([part["pooled"] for part in loaded], 2),
    states=np.concatenate([part["states"] for part in loaded]),
    lengths=[len(row) for row in ids],
    sizes=sizes,
    written=[flag for flags in written for flag in flags],
    margin=np.array([np.nan if m is None else m for m in margins], float),
  )


def both(model, ids: list[list[int]], sizes: list[int]) -> list:
  """Hidden states f32[layers, length, D] of two rows that begin with one prompt, read once."""
  import torch

  def read(tokens, cache):
    with torch.no_grad():
      out = model(
        torch.tensor([tokens]), past_key_values=cache, use_cache=True, output_hidden_states=True
      )
    return torch.stack(out.hidden_states)[:, 0], out.past_key_values

  prompt, cache = read(ids[0][: -sizes[0]], None)
  replies = [
    read(row[-size:], copy.deepcopy(cache))[0] for row, size in zip(ids, sizes, strict=True)
  ]
  return [torch.cat([prompt, reply], 1) for reply in replies]


def load_margins(file: str, rows: list[dict]) -> list[dict]:
  """The raw records of rows, for a margin that the project's form does not keep."""
  import gzip
  import json

  with (gzip.open if file.endswith(".gz") else open)(file, "rt", encoding="utf-8") as stream:
    lines = stream.readlines()
  return [json.loads(lines[int(str(row["where"]).rpartition(":")[2]) - 1]) for row in rows]


# ---- figure 1 ----


def readings() -> dict[str, Callable[[np.ndarray], np.ndarray]]:
  """name -> transformation of a layer's states f64[N, D] before the cosines."""

  def standardised(x):
    return (x - x.mean(0)) / np.maximum(x.std(0), 1e-9)

  def without_top(x):
    x = probes.centred(x)
    top = np.linalg.svd(x, full_matrices=False)[2][:5]
    return x - x @ top.T @ top

  return {
    "raw": lambda x: x,
    "centred": probes.centred,
    "standardised": standardised,
    "without five components": without_top,
  }


def gaps(name: str, pooled: np.ndarray, keep: np.ndarray) -> list[Row]:
  """Figure 1: the gap by layer, pool and reading. `keep` bool[P] selects prompts."""
  count = int(keep.sum())
  label, prompt = np.tile([CHOSEN, REJECTED], count), np.repeat(np.arange(count), 2)
  mine = np.repeat(keep, 2)
  rows = []
  for layer in range(len(pooled)):
    for pool, states in zip(POOLS, pooled[layer]):
      for reading, of in readings().items():
        plain = reading == "raw" and pool == "mean"
        if plain or layer in shown(len(pooled)):
          found = probes.similarities(of(states[mine].astype(float)), label, prompt)
          same = (found.first.value + found.second.value) / 2
          labels = (name, "fig. 1", f"{reading}, {pool}", str(layer))
          rows.append(Row(labels, "gap", found.gap))
          rows.append(Row(labels, "same label", Interval(same, np.nan, np.nan, count)))
  return rows


def shown(layers: int) -> list[int]:
  """The layers in `SHOWN` that a model with this many states has, and its last layer."""
  return sorted({min(layer, layers - 1) for layer in SHOWN})


# ---- figure 2 ----


def over_pairs(x: np.ndarray, y: np.ndarray, prompt: np.ndarray) -> Interval:
  """Pearson's correlation over all pairs of rows of different prompts, x, y f64[N, N]; prompts are
  resampled."""
  other = prompt[:, None] != prompt[None]
  count = prompt.max() + 1

  def pearson(weight):
    w = weight[prompt]
    w = w[:, None] * w[None] * other
    total = w.sum()
    dx, dy = x - (w * x).sum() / total, y - (w * y).sum() / total
    return (w * dx * dy).sum() / np.sqrt((w * dx * dx).sum() * (w * dy * dy).sum())

  drawn = [pearson(weight) for weight in resampled(count, draws=RESAMPLES)]
  return Interval(
    float(pearson(np.ones(count))), *map(float, np.quantile(drawn, (0.025, 0.975))), count
  )


def differences(name: str, final: np.ndarray, score: np.ndarray, margin: np.ndarray) -> list[Row]:
  """Figure 2, by the mean states of the last layer: over all pairs of rows by a linear reward, and
  over the two replies to each prompt by the linear reward and by the data's margin.
  """
  prompt = np.repeat(np.arange(len(final) // 2), 2)
  unit = probes.unit(final.astype(float))
  rows = [
    Row(
      (name, "fig. 2", "all pairs, linear reward", "last"),
      "correlation",
      over_pairs(unit @ unit.T, np.abs(score[:, None] - score[None]), prompt),
    )
  ]
  within = (unit[::2] * unit[1::2]).sum(1)
  each = np.arange(len(within))
  for what, gap in (("linear reward", np.abs(score[::2] - score[1::2])), ("margin", margin)):
    if np.isfinite(gap).all():
      found = probes.correlation(within, gap, each)
      rows.append(
        Row((name, "fig. 2", f"replies to one prompt, {what}", "last"), "correlation", found)
      )
  return rows


# ---- probes and the attention ----


def right(score: np.ndarray) -> Interval:
  """Percentage of pairs (chosen, rejected) in the right order."""
  gap = score[::2] - score[1::2]
  return checks.percent(group_mean(0.5 + 0.5 * np.sign(gap), np.arange(len(gap))))


def probing(name: str, pooled: np.ndarray) -> list[Row]:
  """Held-out pairs that a ridge probe of the label puts in the right order, by layer and pool."""
  count = pooled.shape[2] // 2
  label, prompt = np.tile([1.0, -1.0], count), np.repeat(np.arange(count), 2)
  rows = []
  for layer in shown(len(pooled)):
    for pool, states in zip(POOLS[:2], pooled[layer]):
      predicted = probes.probe(states.astype(float), label, prompt)
      rows.append(Row((name, "probe", pool, str(layer)), "right, %", right(predicted)))
      sides = probes.similarities(probes.centred(predicted)[:, None], np.maximum(label, 0), prompt)
      labels = (name, "fig. 1", f"the probe's direction, {pool}", str(layer))
      rows.append(Row(labels, "gap", sides.gap))
  return rows


def linear_reward(rte: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
  """(score f64[N] of every row by a head that saw no reply to its prompt, that head f64[N, D])."""
  count = len(rte) // 2
  label, prompt = np.tile([1.0, -1.0], count), np.repeat(np.arange(count), 2)
  fold, score = probes.folds_of(prompt, probes.FOLDS, 0), np.zeros(len(rte))
  heads = np.zeros(rte.shape)
  for k in range(probes.FOLDS):
    train, test = fold != k, fold == k
    predict = probes.ridge(rte[train], label[train], np.array([1.0]))
    basis = np.concatenate([np.zeros((1, rte.shape[1])), np.eye(rte.shape[1])])
    values = predict(basis)[:, 0]
    heads[test] = values[1:] - values[0]
    score[test] = predict(rte[test])[:, 0]
  return score, heads


def rms(x: np.ndarray) -> np.ndarray:
  """Each state scaled to a root mean square of 1.   f64[..., D] -> f64[..., D]."""
  return x / np.sqrt((x * x).mean(-1, keepdims=True))


def normalisations(states: np.ndarray) -> dict[str, tuple[Callable, Callable]]:
  """name -> (transformation of states before W_k, of the embedding before W_q). f64[T, D]."""
  mean, deviation = states.mean(0, dtype=float), states.std(0, dtype=float)

  def standardised(x):
    return (x - mean) / deviation

  def same(x):
    return x

  return {
    "none": (same, same),
    "rms of the states": (rms, same),
    "rms of both": (rms, rms),
    "features standardised": (standardised, same),
  }


def attended(data, rte: np.ndarray, draw: int, before: tuple[Callable, Callable]):
  """(weights f64[N, S], H_hat f64[N, D]) of a random attention, initialised as in the project."""
  rng = np.random.default_rng(draw)
  D = rte.shape[1]
  N = len(rte)
  S = int(data["lengths"].max())
  wq, wk, wv = (rng.normal(size=(D, WIDTH)) * D**-0.5 for _ in range(3))
  wo = rng.normal(size=(WIDTH, D)) * WIDTH**-0.5
  weights, read = np.zeros((N, S)), np.zeros((N, D))
  ends = np.cumsum(data["lengths"])
  for i, (end, length) in enumerate(zip(ends, data["lengths"])):
    h = data["states"][end - length : end].astype(float)
    logits = before[0](h) @ (wk @ (before[1](rte[i]) @ wq)) * WIDTH**-0.5
    w = np.exp(logits - logits.max())
    weights[i, :length] = w / w.sum()
    read[i] = weights[i, :length] @ h
  return weights, read @ (wv @ wo)


def random_attention(name: str, data, pooled: np.ndarray) -> list[Row]:
  """What `DRAWS` random attentions read, and their effect on a linear reward at omega = 0.6."""
  rte = pooled[-1, POOLS.index("last")].astype(float)
  prompt = np.repeat(np.arange(len(rte) // 2), 2)
  score, heads = linear_reward(rte)
  frozen = right(score)
  rows = [Row((name, "attention", "no attention", ""), "right, %", frozen)]
  mask = np.arange(int(data["lengths"].max())) < data["lengths"][:, None]
  template = template_of(data, mask.shape[1])
  for what, before in normalisations(data["states"]).items():
    drawn = [attended(data, rte, draw, before) for draw in range(DRAWS)]
    each = [checks.attention_rows("", checks.Attended(w, mask, template), prompt) for w, _ in drawn]
    for same in zip(*each):
      mean = Interval(*np.mean([row.found[:3] for row in same], 0), same[0].found.count)
      rows.append(Row((name, "attention", what, ""), same[0].labels[0], mean))
    used = [OMEGA * (heads * rte).sum(1) + (1 - OMEGA) * (heads * h).sum(1) for _, h in drawn]
    rows += effects(name, what, used, OMEGA * (heads * rte).sum(1), prompt)
  return rows


def effects(name: str, what: str, used: list[np.ndarray], own: np.ndarray, prompt) -> list[Row]:
  """Accuracy with each draw minus accuracy without attention, and the attention's share of the
  variance, averaged over draws, with intervals over prompts.
  """
  gap = np.sign(own[::2] - own[1::2])
  drop = np.mean([0.5 * np.sign(u[::2] - u[1::2]) - 0.5 * gap for u in used], 0)
  found = checks.percent(group_mean(drop, np.arange(len(drop))))
  parts = [(checks.products(u - own, u, prompt), checks.products(u, u, prompt)) for u in used]
  share = estimate(
    lambda *sums: np.mean([sums[i] / sums[i + 1] for i in range(0, len(sums), 2)], 0),
    *(part for pair in parts for part in pair),
  )
  labels = (name, "attention", what, "")
  return [
    Row(labels, "right minus no attention, points", found),
    Row(labels, "share of the variance", share),
  ]


def template_of(data, width: int) -> np.ndarray:
  """bool[N, width]: tokens that are neither the prompt's text nor the response's."""
  found, at = np.zeros((len(data["lengths"]), width), bool), 0
  for i, (length, size) in enumerate(zip(data["lengths"], data["sizes"])):
    ask = length - size
    found[i, :ask] = ~data["written"][at : at + ask]
    found[i, length - 1] = True  # the end
    at += ask * (i % 2)  # both replies follow one prompt
  return found


# ---- output ----


def line(row: Row) -> str:
  value, low, high, _ = row.found
  digits = 4 if abs(value) < 0.1 else 2
  interval = "" if np.isnan(low) else f" [{low:.{digits}f}, {high:.{digits}f}]"
  return (
    f"{' | '.join(filter(None, row.labels)):58s} {row.measure:44s} {value:.{digits}f}{interval}"
  )


HEAD = ["data", "check", "reading", "layer", "measure", "value", "low", "high", "count"]


def written(rows: list[Row]) -> list[list[str]]:
  """The cells of each number under `HEAD`, five digits."""
  return [
    [*row.labels, row.measure, *(f"{x:.5g}" for x in row.found[:3]), str(row.found.count)]
    for row in rows
  ]


def write(path: Path, rows: list[Row]) -> None:
  with open(path, "w", newline="", encoding="utf-8") as file:
    csv.writer(file, lineterminator="\n").writerows([HEAD, *written(rows)])


def analyse(name: str, path: Path) -> list[Row]:
  with np.load(path) as file:
    data = {key: file[key] for key in file.files}
  pooled, margin = data["pooled"], data["margin"]
  everything = np.ones(len(margin), bool)
  rows = gaps(name, pooled, everything)
  if np.isfinite(margin).all():
    rows += gaps(f"{name}, upper half of margins", pooled, margin >= np.median(margin))
  rows += probing(name, pooled)
  rows += differences(name, pooled[-1, 0], linear_reward(pooled[-1, 1].astype(float))[0], margin)
  return rows + random_attention(name, data, pooled)


def of_run(run: Path, name: str = "") -> list[Row]:
  """The results of task=analyse for a run, in the same form, under the run's name or another."""
  rows = []
  for piece in ("similarity", "differences", "hacking", "accuracy", "checks"):
    file = run / "analysis" / f"{piece}.csv"
    for row in csv.DictReader(file.open(encoding="utf-8")) if file.exists() else ():
      numbers = [float(row.pop(name)) for name in ("value", "low", "high")]
      count = int(row.pop("count"))
      measure = row.pop("measure")
      layer = row.pop("layer", "")
      labels = (name or run.name, piece, ", ".join(row.values()), layer)
      rows.append(Row(labels, measure, Interval(*numbers, count)))
  return rows


def parsed() -> argparse.Namespace:
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("--policy", default="", help="folder of the model")
  parser.add_argument("--pairs", default=[], nargs="*", help="files of preference pairs")
  parser.add_argument("--states", default="states", help="folder for pooled states")
  parser.add_argument("--run", help="a run with an analysis, whose numbers are added")
  parser.add_argument("--out", help="CSV of all numbers")
  parser.add_argument("--count", type=int, default=208, help="prompts of a file")
  parser.add_argument("--longest", type=int, default=256, help="maximum tokens of prompt and reply")
  parser.add_argument("--threads", type=int, default=2)
  return parser.parse_args()


def main() -> int:
  args, rows = parsed(), []
  for file in args.pairs:
    name = Path(file).name.split(".")[0]
    path = Path(args.states) / f"{name}.npz"
    if not path.exists():
      path.parent.mkdir(parents=True, exist_ok=True)
      read(args, file, path)
    rows += analyse(name, path)
  print("\n".join(map(line, rows)))
  if args.run:
    rows += of_run(Path(args.run))
  if args.out:
    write(Path(args.out), rows)
  return 0


if __name__ == "__main__":
  sys.exit(main())
