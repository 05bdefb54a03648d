"""task = "lab_notes": the laboratory on a pretrained model, with the notes task's gold reward. See
docs/lab.md, "The third task".

  SFT on demonstrations -> per seed: pairs of its samples, labelled by gold with noise -> proxy
  reward model -> RL of every arm -> table and report

Each stage leaves a folder below WORKDIR, so that the same command resumes where it stopped.
Processes with the same command share the work.
"""

import csv
import functools
import io
import json
from pathlib import Path

import jax
import numpy as np

from r2m_jax.config import ConfigError, arms_of, check_batch
from r2m_jax.data.jsonl import read_rows, write_rows
from r2m_jax.goldtask import formula, notes
from r2m_jax.goldtask.rl import against_gold
from r2m_jax.goldtask.task import noisy_choice
from r2m_jax.hf.folders import load_policy, load_reward, mesh_of
from r2m_jax.lab import heads, realtext, report
from r2m_jax.lab.grid import alone
from r2m_jax.lab.realtext import correlation, run_of
from r2m_jax.parallel import hosts
from r2m_jax.run.files import plain, read_json, read_jsonl, write_atomic
from r2m_jax.run.metrics import read_metrics
from r2m_jax.run.workdir import claim
from r2m_jax.tasks import folders, scratch, serve, tokenizer
from r2m_jax.tasks.evals import mean_of, wins

# streams of prompts; the streams of a seed share no number
STREAM_SFT, STREAM_SCALE, STREAM_HELD, STREAM_PAIRS, STREAM_RL = range(5)
HELD, END = "held_out_pairs.jsonl", "held_out.jsonl"  # in the workdir, in a run's folder
STEPS = "steps.csv"
TEXTS = 64  # demonstrations for training a tokenizer
SAMPLES = "samples"  # in a run's folder: a file for each step
COLUMNS = {  # column of STEPS -> the metric
  "gold": "reward/gold",
  "frozen": "reward/frozen",
  "used": "reward/used",
  "kl": "kl",
  "length": "length",
  "cut_off": "truncated",
  "coverage": "gold/coverage",
  "distractors": "gold/distractors",
  "invented": "gold/hallucinated",
  "repeats": "gold/repeats",
  "outside": "gold/outside",
  "marks": "gold/marks",
  "within_corr": "reward/within_corr",
  "pair_disagreement": "r2m/pair_disagreement",
}


def run(config, workdir: Path) -> None:
  """Runs what is missing; writes WORKDIR/steps.csv, table, summary.csv and report.html."""
  if jax.process_count() > 1:
    raise ConfigError(
      "config.task is 'lab_notes': runs in one process; start one, with "
      f"--config.hosts.coordinator={hosts.ALONE}"
    )
  workdir = workdir.absolute()
  mesh = mesh_of(config)
  arms = arms_of(config)
  check_batch(config, tuple(mesh.shape.values()))
  claim(config, workdir, shared=True)
  formula.keep(config.gold.formula, workdir)
  print(
    f"r2m_jax  lab_notes: {len(arms)} arms x {len(config.lab.seeds)} seeds on {mesh.size} "
    f"{jax.devices()[0].platform} device(s); writes {workdir}",
    flush=True,
  )
  with alone(workdir, "policy"):
    sft = make_policy(config, workdir, mesh)
    drawn = scale_samples(config, workdir, mesh, sft)
    held = held_out_pairs(config, workdir, mesh, sft)
  gold_of_sft = float(notes.gold(map(as_text, drawn), config.gold.formula).mean())

  def fit_proxy(seed):
    return make_proxy(config, workdir, mesh, sft, seed, drawn, held)

  def rl(name, seed):
    run_arm(name, arms[name], workdir, mesh, sft, proxy_of(workdir, seed), seed)
    with alone(workdir, "table"):
      print(report.line(config, collect(config, arms, workdir, gold_of_sft), name), flush=True)

  # one seed after another, so that a run that is stopped early has complete seeds
  for seed in config.lab.seeds:
    realtext.share_out(workdir, {f"proxy {seed}": functools.partial(fit_proxy, seed)})
    runs = {f"{name} {seed}": functools.partial(rl, name, seed) for name in arms}
    realtext.share_out(workdir, runs)
  with alone(workdir, "table"):
    found = collect(config, arms, workdir, gold_of_sft)
    tables = [proxy_table(config, workdir), held_out_table(config, arms, workdir)]
    print(report.write(config, found, {}, workdir, more=tables))


def as_text(row: dict) -> dict:
  """A row with its prompt as the text of the user's message, which gold reads."""
  prompt = row["prompt"]
  return row if isinstance(prompt, str) else row | {"prompt": prompt[-1]["content"]}


def as_messages(prompt: str) -> list[dict]:
  return [{"role": "user", "content": prompt}]


# ---- the policy and its samples ----


def make_policy(config, workdir: Path, mesh) -> Path:
  """The folder of the policy after SFT on demonstrations; config.policy.path if there are none."""
  start, out = config.policy.path or str(random_policy(config, workdir)), workdir / "models/sft"
  count, folder = config.notes.demonstrations, workdir / "sft"
  if not count:
    return Path(load_policy(start, config, mesh).folder)
  data = write_demonstrations(config, workdir / "data/demonstrations.jsonl", count)
  settings = scratch.derived(config, "sft", data, policy__path=start)
  settings.sft.steps = max(1, config.notes.epochs * (count // config.sft.batch_size))

  def fit(out):
    claim(settings, folder, shared=True)
    folders.run_sft(settings, folder, mesh, out=out)

  scratch.once(workdir, "sft", out, fit)
  return out


def random_policy(config, workdir: Path) -> Path:
  """A model of config.policy.arch with random weights, and a tokenizer trained on
  demonstrations.
  """
  out = workdir / "models/start"
  data = write_demonstrations(config, workdir / "data/corpus.jsonl", TEXTS)
  settings = scratch.derived(config, "tokenizer", data)
  scratch.once(workdir, "start", out, lambda out: tokenizer.run(settings, workdir, out=out))
  return out


def write_demonstrations(config, path: Path, count: int) -> str:
  """Writes `count` demonstrations as rows of messages; returns the path."""
  rows = notes.demonstrations(config.seed, STREAM_SFT, count)
  write_rows(str(path), [row | {"prompt": as_messages(row["prompt"])} for row in rows])
  return str(path)


def answers(config, mesh, policy: Path, asked: list[str], seed: int, each: int) -> list[dict]:
  """`each` samples for each prompt, drawn as in RL: rows with prompt, response, truncated, length."""
  settings = scratch.derived(config, "r2m", "(none)", policy__path=str(policy), seed=seed)
  settings.generate.update(
    n=each,
    seed=-1,
    max_new_tokens=config.rollout.max_new_tokens,
    temperature=config.rollout.temperature,
  )
  model = load_policy(str(policy), settings, mesh)
  ids = [model.tokenizer.render(as_messages(prompt)) for prompt in asked]
  drawn = serve.sample(settings, model, ids, mesh)
  return [
    {
      "prompt": as_messages(asked[i // each]),
      "response": answer["text"],
      "truncated": answer["truncated"],
      "length": len(answer["tokens"]),
    }
    for i, answer in enumerate(drawn)
  ]


def scale_samples(config, workdir: Path, mesh, sft: Path) -> list[dict]:
  """One response of the supervised policy to each of config.scratch.samples held-out prompts, which
  define the scale of scores.
  """
  path = workdir / realtext.SAMPLES
  if not path.exists():
    asked = notes.prompts(config.seed, STREAM_SCALE, config.scratch.samples, notes.HELD_OUT)
    write_rows(str(path), answers(config, mesh, sft, asked, config.seed, 1))
  return read_rows(str(path), ("prompt", "response"))


# ---- proxies ----


def proxy_of(workdir: Path, seed: int) -> Path:
  """The folder of a seed's standardised proxy."""
  return workdir / "models" / f"proxy_{seed}"


def pair_rows(config, mesh, sft: Path, asked: list[str], seed: int) -> list[dict]:
  """Two samples for each prompt, with their gold; prompts with two equal samples are left out."""
  drawn = answers(config, mesh, sft, asked, seed, 2)
  gold, rows = notes.gold(map(as_text, drawn), config.gold.formula), []
  for i in range(0, len(drawn), 2):
    if drawn[i]["response"].strip() != drawn[i + 1]["response"].strip():
      rows.append(
        {
          "prompt": drawn[i]["prompt"],
          "responses": [drawn[i]["response"], drawn[i + 1]["response"]],
          "truncated": [drawn[i]["truncated"], drawn[i + 1]["truncated"]],
          "length": [drawn[i]["length"], drawn[i + 1]["length"]],
          "gold": gold[i : i + 2].tolist(),
        }
      )
  return rows


def held_out_pairs(config, workdir: Path, mesh, sft: Path) -> list[dict]:
  """Pairs on held-out prompts, on which every proxy is measured against clean gold.

  Raises:
    ConfigError: in every pair the gold of both samples is the same.
  """
  path = workdir / HELD
  if not path.exists():
    asked = notes.prompts(config.seed, STREAM_HELD, config.reward.heldout_pairs, notes.HELD_OUT)
    write_rows(str(path), pair_rows(config, mesh, sft, asked, config.seed))
  rows = read_jsonl(path)
  if not any(row["gold"][0] != row["gold"][1] for row in rows):
    raise ConfigError(
      f"config.reward.heldout_pairs is {config.reward.heldout_pairs}: the {len(rows)} pairs of "
      "different samples have no difference in gold, so no proxy can be measured; raise it, or "
      "give another config.gold.formula"
    )
  return rows


def labelled(config, rows: list[dict], seed: int) -> list[dict]:
  """The pairs as a noisy labeller orders them: P(a is preferred) = sigmoid((gold_a - gold_b) / T),
  T = config.reward.choice_temperature, of which a share config.reward.label_flip is then flipped.
  """
  gold = np.array([row["gold"] for row in rows])
  settings = config.reward
  first = noisy_choice(
    *gold.T, seed, temperature=settings.choice_temperature, flip=settings.label_flip
  )
  found = []
  for row, a_wins in zip(rows, first):
    order = (0, 1) if a_wins else (1, 0)
    chosen, rejected = ({k: row[k][i] for k in ("responses", "gold")} for i in order)
    found.append(
      {
        "prompt": row["prompt"],
        "chosen": chosen["responses"],
        "rejected": rejected["responses"],
        "gold_chosen": chosen["gold"],
        "gold_rejected": rejected["gold"],
      }
    )
  return found


def make_proxy(
  config, workdir: Path, mesh, sft: Path, seed: int, drawn: list[dict], held: list[dict]
) -> Path:
  """The folder of a seed's proxy: the policy's backbone with a score head, fitted to the seed's
  noisy pairs according to config.notes.proxy, and standardised.
  """
  folder, out = workdir / f"proxy_{seed}", proxy_of(workdir, seed)
  pairs, raw = folder / "pairs.jsonl", folder / "raw"
  settings = scratch.derived(config, "reward", str(pairs), policy__path=str(sft), seed=seed)

  def fit(out):
    claim(settings, folder, shared=True)
    if not pairs.exists():
      asked = notes.prompts(seed, STREAM_PAIRS, config.reward.pairs)
      rows = labelled(config, pair_rows(config, mesh, sft, asked, seed), seed)
      write_rows(str(pairs), rows)
      against = wins([row["gold_rejected"] for row in rows], [row["gold_chosen"] for row in rows])
      print(f"pairs    {len(rows)}; {against.mean():.1%} of the labels are against gold")
    if config.notes.proxy == "whole":
      folders.run_reward(settings, folder, mesh, out=out)
    else:
      heads.fit(settings, read_jsonl(pairs), folder, mesh, out)

  def scale(out):
    realtext.standardise(settings, raw, workdir, mesh, drawn, out)

  scratch.once(workdir, f"proxy of seed {seed}", raw, fit)
  scratch.once(workdir, f"proxy of seed {seed} at scale", out, scale)
  measured = folder / "measured.json"
  if not measured.exists():
    write_atomic(measured, json.dumps(measure_proxy(config, mesh, out, pairs, drawn, held)))
  return out


def measure_proxy(config, mesh, folder: Path, pairs: Path, drawn: list[dict], held: list[dict]):
  """The quality of a proxy, as cells of `proxy_table`: on held-out pairs with different gold, and
  on single samples.
  """
  model = load_reward(str(folder), config, mesh)
  held = [row for row in held if row["gold"][0] != row["gold"][1]]
  sides = [
    {"prompt": row["prompt"], "response": row["responses"][i], "truncated": row["truncated"][i]}
    for row in held
    for i in (0, 1)
  ]
  scores = serve.score(config, model, None, sides, mesh).reshape(-1, 2)
  gold = np.array([row["gold"] for row in held])
  better, rows = np.argsort(gold, 1), np.arange(len(held))
  prompts = [json.dumps(row["prompt"]) for row in held]
  lengths = np.array([row["length"] for row in held])

  def accuracy(values):
    return mean_of(wins(values[rows, better[:, 1]], values[rows, better[:, 0]]), prompts)

  labels = read_jsonl(pairs)
  against = wins([row["gold_rejected"] for row in labels], [row["gold_chosen"] for row in labels])
  mine = serve.score(config, model, None, drawn, mesh)
  of_gold = notes.gold(map(as_text, drawn), config.gold.formula)
  return {
    "accuracy": list(accuracy(scores))[:3],
    "longer": list(accuracy(lengths))[:3],
    "pairs": len(held),
    "labels": len(labels),
    "against_gold": float(against.mean()),
    "correlation": correlation(mine, of_gold),
    "length_correlation": correlation(mine, np.array([row["length"] for row in drawn])),
  }


# ---- RL ----


def measured(parts: list[notes.GoldParts]) -> dict[str, float]:
  """Means of the parts of gold, under the names of metrics."""
  columns = dict(zip(notes.GoldParts._fields, np.array(parts, float).T))
  names = {"invented": "hallucinated"}
  return {
    f"gold/{names.get(name, name)}": float(values.mean())
    for name, values in columns.items()
    if name != "gold"
  }


def run_arm(name: str, arm, workdir: Path, mesh, sft: Path, proxy: Path, seed: int) -> None:
  """Runs RL of one arm on one seed's proxy, then measures gold on held-out prompts. Gold reads each
  step's samples on the host after the step.
  """
  folder, data = run_of(workdir, name, seed), workdir / "data" / f"prompts_{seed}.jsonl"
  if not data.exists():
    asked = notes.prompts(seed, STREAM_RL, arm.steps * arm.rollout.prompts)
    write_rows(str(data), [{"prompt": as_messages(prompt)} for prompt in asked])

  def watch_of(settings):
    return functools.partial(watch, settings, folder / SAMPLES)

  realtext.train_arm(name, arm, str(data), workdir, mesh, sft, proxy, seed, watch_of)
  if not (folder / END).exists():
    asked = notes.prompts(arm.seed, STREAM_SCALE, arm.scratch.samples, notes.HELD_OUT)
    drawn = list(map(as_text, answers(arm, mesh, folder / "export/policy", asked, arm.seed, 1)))
    gold = notes.gold(drawn, arm.gold.formula)
    write_rows(str(folder / END), [row | {"gold": float(x)} for row, x in zip(drawn, gold)])


def watch(config, folder: Path, t: int, output, samples) -> dict[str, float | None]:
  """Gold metrics of a step; all of its samples are written to a file in `folder`."""
  rows = [as_text(dict(zip(("prompt", "response", "truncated"), sample))) for sample in samples]
  parts = notes.all_parts(rows, config.gold.formula)
  judged = output.judged
  scored = zip(rows, parts, judged.scores, judged.scores_frozen)
  write_rows(
    str(folder / f"step_{t:04d}.jsonl"),
    [
      row | part._asdict() | {"used": plain(used), "frozen": plain(frozen)}
      for row, part, used, frozen in scored
    ],
  )
  gold = np.array([part.gold for part in parts])
  return against_gold(gold, judged.scores, config.rollout.group_size) | measured(parts)


# ---- results ----


def collect(config, arms, workdir: Path, gold_of_sft: float):
  """WORKDIR/steps.csv, table and summary.csv, from the finished runs."""
  write_atomic(workdir / STEPS, steps_csv(workdir))
  return realtext.collect(config, arms, workdir, gold_of_sft)


def steps_csv(workdir: Path) -> str:
  """One row for each step of every run so far, finished or not."""
  text = io.StringIO()
  writer = csv.writer(text, lineterminator="\n")
  writer.writerow(["arm", "seed", "step", *COLUMNS])
  for path in sorted(workdir.glob("runs/*/seed_*/metrics.jsonl")):
    arm, seed = path.parts[-3], path.parts[-2].removeprefix("seed_")
    for row in read_metrics(path.parent):
      if row["stage"] == "rl":
        cells = (row.get(key) for key in COLUMNS.values())
        shown = ["" if value is None else f"{value:.6g}" for value in cells]
        writer.writerow([arm, seed, row["step"], *shown])
  return text.getvalue()


def proxy_table(config, workdir: Path) -> dict:
  """The quality of the proxies."""
  lines = []
  for seed in config.lab.seeds:
    found = read_json(workdir / f"proxy_{seed}" / "measured.json")
    model, longer = (
      f"{100 * value:.1f} ({100 * low:.1f} to {100 * high:.1f})"
      for value, low, high in (found["accuracy"], found["longer"])
    )
    shares = f"{found['against_gold']:.1%} of {found['labels']}"
    both = (f"{found[name]:.2f}" for name in ("correlation", "length_correlation"))
    lines.append([f"proxy of seed {seed}", model, longer, shares, *both])
  return {
    "title": "Proxy reward models",
    "head": [
      "Reward model",
      "Accuracy, % (95%)",
      "Longer reply wins, %",
      "Labels against gold",
      "Correlation with gold",
      "With length",
    ],
    "rows": lines,
    "note": "Accuracy: on held-out pairs with different gold, against clean gold. Correlations: over "
    f"one sample of the supervised policy for each of {config.scratch.samples} held-out "
    "prompts.",
  }


def held_out_table(config, arms, workdir: Path) -> dict:
  """Gold of the trained policies on held-out prompts, over all runs of an arm together."""
  drawn = read_jsonl(workdir / realtext.SAMPLES)
  gold = {"SFT": [notes.gold(map(as_text, drawn), config.gold.formula)]}
  for name in arms:
    files = [run_of(workdir, name, seed) / END for seed in config.lab.seeds]
    gold[name] = [np.array([row["gold"] for row in read_jsonl(file)]) for file in files]
  lines = [
    [name, str(len(each)), scratch.shown(mean_of(np.mean(each, 0), range(len(each[0]))), 2)]
    for name, each in gold.items()
  ]
  return {
    "title": "Gold on held-out prompts, after RL",
    "head": ["Policy", "Runs", "Gold (95%)"],
    "rows": lines,
    "note": "One sample for each prompt and run; no two values of a held-out note were in one "
    "training note. Intervals over prompts.",
  }
