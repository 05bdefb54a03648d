"""task = "lab_text": the laboratory on real text. See docs/lab.md, "The second task".

  policy -> gold reward model on clean pairs -> per seed: proxy on a noisy subset, RL of every arm
  -> table and report

Each stage leaves a folder below WORKDIR, so that the same command resumes where it stopped.
Processes with the same command share the work.
"""

import collections
import dataclasses
import functools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from r2m_jax.config import ConfigError, arms_of, check_batch, identity
from r2m_jax.data import datasets
from r2m_jax.data.jsonl import read_rows, write_rows
from r2m_jax.data.rows import load
from r2m_jax.goldtask.rl import against_gold
from r2m_jax.hf import export
from r2m_jax.hf.folders import Policy, RewardModel, load_policy, load_reward, mesh_of
from r2m_jax.lab import report, results, table
from r2m_jax.lab.grid import alone
from r2m_jax.parallel import hosts, sharding
from r2m_jax.run.files import read_json, write_atomic
from r2m_jax.run.metrics import ROW_KEYS, read_metrics
from r2m_jax.run.workdir import claim
from r2m_jax.tasks import folders, scratch, serve
from r2m_jax.tasks.evals import mean_of, wins

SAMPLES, PROXIES = "sft_samples.jsonl", "reward_models.json"  # in a workdir


def run(config, workdir: Path) -> None:
  """Runs what is missing; writes WORKDIR/table, summary.csv and report.html."""
  if jax.process_count() > 1:
    raise ConfigError(
      "config.task is 'lab_text': runs in one process; start one, with "
      f"--config.hosts.coordinator={hosts.ALONE}"
    )
  workdir = workdir.absolute()
  mesh = mesh_of(config)
  arms = arms_of(config)
  check_batch(config, tuple(mesh.shape.values()))
  scratch.require_data(config)
  claim(config, workdir, shared=True)
  print(
    f"r2m_jax  lab_text: {len(arms)} arms x {len(config.lab.seeds)} seeds on {mesh.size} "
    f"{jax.devices()[0].platform} device(s); writes {workdir}",
    flush=True,
  )
  with alone(workdir, "policy"):
    sft = (
      Path(config.policy.path).absolute()
      if config.policy.path
      else scratch.make_policy(config, workdir, mesh)[1]
    )
    drawn = sft_samples(config, workdir, mesh, sft)

  def fit_gold():
    return make_gold(config, workdir, mesh, sft, drawn)

  def fit_proxy(seed):
    return make_proxy(config, workdir, mesh, sft, seed, drawn)

  fits = {f"proxy {seed}": functools.partial(fit_proxy, seed) for seed in config.lab.seeds}
  share_out(workdir, {"gold": fit_gold} | fits)
  gold, proxies = (
    fit_gold(),
    {seed: fit_proxy(seed) for seed in config.lab.seeds},
  )  # their folders, whichever process made them

  def rl(name: str, seed: int) -> None:
    run_arm(name, arms[name], workdir, mesh, sft, proxies[seed], gold, seed)
    with alone(workdir, "table"):
      print(report.line(config, collect(config, arms, workdir), name), flush=True)

  runs = [(name, seed) for seed in config.lab.seeds for name in arms]
  share_out(workdir, {f"{name} {seed}": functools.partial(rl, name, seed) for name, seed in runs})
  with alone(workdir, "table"):
    measure(config, workdir, mesh, gold, drawn)
    found = collect(config, arms, workdir)
    print(report.write(config, found, {}, workdir, more=read_json(workdir / PROXIES)["tables"]))


def share_out(workdir: Path, jobs: dict[str, Callable[[], object]]) -> None:
  """Does all jobs, some of them in other processes with this workdir. A job must detect that it is
  already done.
  """
  left = dict(jobs)
  for wait in (
    False,
    True,
  ):  # first the jobs on which no other process works; then those that a killed process left
    for name in list(left):
      with alone(workdir, name, wait=wait) as mine:
        if mine:
          left.pop(name)()


# ---- reward models ----


def sft_samples(config, workdir: Path, mesh, sft: Path) -> list[dict]:
  """One response of the supervised policy to each of config.scratch.samples held-out prompts, which
  define the scale of scores.
  """
  path = workdir / SAMPLES
  if not path.exists():
    policy = load_policy(str(sft), config, mesh)
    settings, rows, prompts = scratch.held_out_prompts(config, policy)
    drawn = serve.sample(settings, policy, prompts, mesh)
    write_rows(
      str(path),
      [
        {
          "prompt": row["prompt"],
          "response": d["text"],
          "truncated": d["truncated"],
          "length": len(d["tokens"]),
        }
        for row, d in zip(rows, drawn)
      ],
    )
  return read_rows(str(path), ("prompt", "response"))


def standardise(config, raw: Path, workdir: Path, mesh, drawn: list[dict], out: Path) -> None:
  """Writes the reward model in `raw` to `out`, its scores of `drawn` with mean 0 and standard
  deviation 1.
  """
  model = load_reward(str(raw), config, mesh)
  scores, phi = serve.score(config, model, None, drawn, mesh), model.phi
  serve.require_finite(config, np.isfinite(scores), "scores", str(raw))
  scale = 1 / max(float(scores.std()), 1e-6)
  phi["kernel"][...] *= scale
  phi["bias"][...] = (phi["bias"][...] - scores.mean()) * scale
  export.write_reward(out, config, model, model.state, phi, workdir)


def grow(policy: Policy, factor: int) -> Policy:
  """The policy with `factor` times its layers, which computes the same function until it is
  trained.

  After each layer come copies of it whose output projections are zero, so that they add nothing to
  the residual stream: block expansion, Wu et al., LLaMA Pro (arXiv 2401.02415), section 3.2. Its
  graphdef remains the policy's.
  """
  layers = {
    field: tuple(factor * layer + copy for layer in own for copy in range(factor))
    for field in ("sliding_layers", "unrotated_layers")
    for own in [getattr(policy.arch, field)]
  }
  arch = policy.arch.replace(num_layers=factor * policy.arch.num_layers, **layers)

  def expand(path, x):
    name = sharding.path_name(path)
    if not name.startswith("layers/"):
      return x
    x = jnp.repeat(x, factor, 0)
    copies = (jnp.arange(len(x)) % factor > 0).reshape(-1, *[1] * (x.ndim - 1))
    return jnp.where(copies, 0, x) if name.startswith(("layers/attn/o/", "layers/mlp/down/")) else x

  state = jax.tree_util.tree_map_with_path(expand, policy.state)
  return dataclasses.replace(policy, arch=arch, state=state)


def make_gold(config, workdir: Path, mesh, sft: Path, drawn: list[dict]) -> Path:
  """The folder of the gold reward model: config.gold.path, or a model grown from the policy and
  fitted; standardised.
  """
  folder, grown, raw, out = (
    workdir / "gold",
    *(workdir / "models" / name for name in ("grown", "gold_raw", "gold")),
  )
  settings = scratch.derived(config, "reward", config.scratch.pairs, policy__path=str(grown))
  settings.reward.update(
    {name: value for name, value in config.gold.items() if name not in ("path", "depth")}
  )

  def fit(out):
    policy = grow(load_policy(str(sft), config, mesh), config.gold.depth)
    export.write_policy(grown, settings, policy, policy.state, workdir)
    claim(settings, folder, shared=True)
    folders.run_reward(settings, folder, mesh, out=out)

  if not config.gold.path:
    scratch.once(workdir, "gold", raw, fit)
  source = Path(config.gold.path).absolute() if config.gold.path else raw
  scratch.once(
    workdir,
    "gold at scale",
    out,
    lambda out: standardise(settings, source, workdir, mesh, drawn, out),
  )
  return out


def noisy_subset(config, rows: list[dict], seed: int) -> list[dict]:
  """config.reward.pairs of the pairs, with chosen and rejected exchanged in exactly a share
  config.reward.label_flip.
  """
  datasets.enough(len(rows), "reward.pairs", config.reward.pairs, "scratch.pairs")
  rng, count = np.random.default_rng([seed, 8]), config.reward.pairs
  rows = [rows[i] for i in rng.permutation(len(rows))[:count]]
  flipped = set(rng.permutation(count)[: round(config.reward.label_flip * count)].tolist())

  def sides(i):
    return ("rejected", "chosen") if i in flipped else ("chosen", "rejected")

  return [
    {
      "prompt": row["prompt"],
      "chosen": row[sides(i)[0]],
      "rejected": row[sides(i)[1]],
      "flipped": i in flipped,
    }
    for i, row in enumerate(rows)
  ]


def make_proxy(config, workdir: Path, mesh, sft: Path, seed: int, drawn: list[dict]) -> Path:
  """The folder of a seed's proxy: from the policy's backbone, fitted to the seed's noisy subset of
  the pairs, and standardised.
  """
  folder, pairs = workdir / f"proxy_{seed}", workdir / f"proxy_{seed}" / "pairs.jsonl"
  raw, out = folder / "raw", workdir / "models" / f"proxy_{seed}"
  settings = scratch.derived(config, "reward", str(pairs), policy__path=str(sft), seed=seed)

  def fit(out):
    claim(settings, folder, shared=True)
    if not pairs.exists():
      source = scratch.derived(config, "reward", config.scratch.pairs, policy__path=str(sft))
      start = load_reward(str(sft), config, mesh, from_policy=True)
      rows, _ = datasets.pair_ids(source, start.renderer, load(source.data, "pair"), "proxies")
      write_rows(str(pairs), noisy_subset(config, rows, seed))
    folders.run_reward(settings, folder, mesh, out=out)

  scratch.once(workdir, f"proxy of seed {seed}", raw, fit)

  def make(out):
    return standardise(settings, raw, workdir, mesh, drawn, out)

  scratch.once(workdir, f"proxy of seed {seed} at scale", out, make)
  return out


# ---- RL ----


def run_of(workdir: Path, name: str, seed: int) -> Path:
  return workdir / "runs" / name / f"seed_{seed}"


def run_arm(
  name: str, arm, workdir: Path, mesh, sft: Path, proxy: Path, gold: Path, seed: int
) -> None:
  """Runs RL of one arm on one seed's proxy. The gold reward model reads each step's samples after
  the step.
  """

  def watch_of(settings):
    model = load_reward(str(gold), settings, mesh)
    scored = serve.make_scorer(settings, model, None, mesh, shown=False)

    def watch(t, output, samples):
      rows = [dict(zip(("prompt", "response", "truncated"), sample)) for sample in samples]
      return against_gold(scored(rows), output.judged.scores, settings.rollout.group_size)

    return watch

  train_arm(name, arm, arm.scratch.prompts, workdir, mesh, sft, proxy, seed, watch_of)


def train_arm(
  name: str,
  arm,
  prompts: str,
  workdir: Path,
  mesh,
  sft: Path,
  proxy: Path,
  seed: int,
  watch_of: Callable[[Any], folders.Watch],
) -> None:
  """Runs RL of one arm from the policy `sft` on the reward model `proxy`, as a stage.

  Args:
    prompts: data of the run, as config.data.name.
    watch_of: the config of the run -> the function that measures each step.
  """
  folder = run_of(workdir, name, seed)
  settings = scratch.derived(
    arm, "r2m", prompts, seed=seed, policy__path=str(sft), reward__path=str(proxy)
  )

  def make(out):
    claim(settings, folder, shared=True)
    folders.run_r2m(settings, folder, mesh, out=out.parent, watch=watch_of(settings))

  scratch.once(workdir, f"{name} of seed {seed}", folder / "export/policy", make)


def collect(config, arms, workdir: Path, sft_gold: float = 0.0) -> results.Results:
  """WORKDIR/table and summary.csv from the metrics of the finished runs. Arms that have no run of
  `config.lab.seeds` keep the table of an earlier call.

  Args:
    sft_gold: mean gold of the supervised policy; it is 0 for a standardised gold reward model.
  """
  for name, arm in arms.items():
    found = {}
    for seed in config.lab.seeds:
      if (run_of(workdir, name, seed) / "export/policy/config.json").exists():
        found[seed] = [
          row for row in read_metrics(run_of(workdir, name, seed)) if row["stage"] == "rl"
        ]
    if found:
      rows = [row for seed in found for row in found[seed]]
      names = [
        key for key in dict.fromkeys(key for row in rows for key in row) if key not in ROW_KEYS
      ]
      log = [
        [[row.get(key, np.nan) for key in names] for row in rows] for rows in zip(*found.values())
      ]
      replicas = [(seed, 1.0, arm.kl.beta) for seed in found]
      columns = table.arm_columns(name, replicas, names, np.array(log, np.float32))
      table.write_table(workdir / "table" / f"{name}.parquet", columns, identity(arm))
  same: dict[int, float] = collections.defaultdict(lambda: sft_gold)  # of whatever seed a table has
  found = results.results_of(config, arms, workdir, same)
  results.write_summary(workdir / "summary.csv", found)
  results.write_seeds(workdir / "seeds.parquet", found)
  return found


# ---- quality of the reward models ----


class Held(NamedTuple):
  """The data on which every reward model is measured, with their gold scores."""

  rows: list[dict]  # the clean pairs of all validation sets together
  prompts: list  # groups of the rows; some rows are in several sets
  of_gold: np.ndarray  # scores of chosen and rejected, f32[N, 2]
  drawn: list[dict]  # samples of the supervised policy
  on_samples: np.ndarray  # the gold score of each sample
  longer: np.ndarray  # its length in tokens


def measure(config, workdir: Path, mesh, gold: Path, drawn: list[dict]) -> None:
  """Tables of all reward models on held-out pairs and on samples of the supervised policy:
  WORKDIR/reward_models.json.

  Its key "proxies" has the numbers of each seed's proxy.
  """
  path = workdir / PROXIES
  if path.exists() and set(map(str, config.lab.seeds)) <= set(read_json(path)["proxies"]):
    return
  held, sections = measure_gold(config, mesh, gold, drawn)
  right = mean_of(wins(*held.of_gold.T), held.prompts)
  length = f"{correlation(held.on_samples, held.longer):.2f}"
  lines, proxies = [["gold", scratch.shown(right, 1, 100), "–", "–", length]], {}
  for seed in config.lab.seeds:
    proxy = load_reward(str(workdir / "models" / f"proxy_{seed}"), config, mesh)
    proxies[seed], cells = measure_proxy(config, mesh, proxy, held)
    lines.append([f"proxy of seed {seed}", *cells])
  sections.append(
    {
      "title": "Reward models",
      "rows": lines,
      "head": [
        "Reward model",
        "Accuracy, % (95%)",
        "Order of gold, % (95%)",
        "Correlation with gold",
        "With length",
      ],
      "note": f"Accuracy and order: on the {len(held.rows)} clean pairs of the validation sets "
      "together. Correlations of scores: "
      f"over {len(drawn)} samples of the supervised policy on held-out prompts.",
    }
  )
  write_atomic(path, json.dumps({"proxies": proxies, "tables": sections}))


def measure_gold(config, mesh, gold: Path, drawn: list[dict]) -> tuple[Held, list[dict]]:
  """The gold reward model on held-out pairs and samples, and the table of its accuracy."""
  model = load_reward(str(gold), config, mesh)
  val = scratch.sets_of(config, model, config.scratch.pairs_val)
  dev = scratch.sets_of(config, model, config.scratch.pairs_dev, dev=True)
  rows = [row for pairs in (*val, *dev) for row in pairs.rows]
  count = sum(len(pairs.rows) for pairs in val)
  lengths = np.concatenate([pairs.lengths for pairs in val])
  every = scratch.Pairs(
    "all validation sets", rows[:count], lengths, sum(pairs.of for pairs in val)
  )
  of_gold = scratch.scores_of(config, model, None, rows, mesh)
  right = wins(*of_gold.T)
  section = scratch.accuracy_table([*val, *dev, every], np.concatenate([right, right[:count]]))
  section["title"] = "The gold reward model on held-out pairs, %"
  on_samples = serve.score(config, model, None, drawn, mesh)
  longer = np.array([row["length"] for row in drawn])
  held = Held(rows[:count], every.prompts, of_gold[:count], drawn, on_samples, longer)
  return held, [section]


def measure_proxy(config, mesh, proxy: RewardModel, held: Held) -> tuple[dict, list[str]]:
  """The numbers of one proxy, and the same as cells of the table."""
  scores = scratch.scores_of(config, proxy, None, held.rows, mesh)
  accuracy = mean_of(wins(*scores.T), held.prompts)
  orders = (np.sign(x[:, 0] - x[:, 1]) for x in (scores, held.of_gold))
  agree = mean_of(wins(*orders) == 0.5, held.prompts)
  mine = serve.score(config, proxy, None, held.drawn, mesh)
  numbers = {
    "accuracy": accuracy[:3],
    "agreement": agree[:3],
    "correlation": correlation(mine, held.on_samples),
    "length_correlation": correlation(mine, held.longer),
  }
  cells = [
    scratch.shown(accuracy, 1, 100),
    scratch.shown(agree, 1, 100),
    f"{numbers['correlation']:.2f}",
    f"{numbers['length_correlation']:.2f}",
  ]
  return numbers, cells


def correlation(a: np.ndarray, b: np.ndarray) -> float:
  """Pearson's correlation; 0 if either is constant."""
  return float(np.corrcoef(a, b)[0, 1]) if min(np.std(a), np.std(b)) > 0 else 0.0
