"""`task=scratch`: everything from scratch on real text, with the functions of runs from folders.

  tokenizer -> language modelling -> SFT -> reward model -> RL, an arm after another -> measurements
  on held-out data

Each stage writes a Hugging Face folder, from which the next one starts, so a rerun resumes after
the last finished stage.
"""

import dataclasses
import json
import time
from collections.abc import Callable
from pathlib import Path

import jax
import numpy as np

from r2m_jax.config import check_batch, check_config
from r2m_jax.data import datasets
from r2m_jax.data.checked import split_names
from r2m_jax.data.files import find_files
from r2m_jax.data.jsonl import DataError
from r2m_jax.data.rows import load
from r2m_jax.hf.folders import HeadConfig, Policy, RewardModel, load_policy, load_reward, mesh_of
from r2m_jax.parallel import hosts
from r2m_jax.report.page import format_summary, summary_table, write_report
from r2m_jax.run.build import build
from r2m_jax.run.files import write_atomic
from r2m_jax.run.metrics import append_samples, read_metrics
from r2m_jax.run.workdir import claim, with_variant
from r2m_jax.tasks import folders as folders_task
from r2m_jax.tasks import serve, tokenizer
from r2m_jax.tasks.evals import Mean, mean_of, perplexity, response_logprobs, wins

MIN_GROUPS = 10  # prompts; with fewer, a bootstrap interval is not worth printing
# in a workdir: the measurements, and the seconds of each stage
TABLES = "tables.json"
STAGES = "stages.json"


def run(config, workdir: Path) -> None:
  """Runs all stages; writes WORKDIR/export/policy and WORKDIR/export/reward from the last of
  config.scratch.arms.
  """
  workdir = workdir.absolute()  # the stages' configs name folders in it
  names, mesh = config.scratch, mesh_of(config)
  check_batch(config, tuple(mesh.shape.values()))
  require_data(config)
  claim(config, workdir)
  print(
    f"r2m_jax  {mesh.size} {jax.devices()[0].platform} device(s), {config.dtype}; writes {workdir}"
  )
  lm, sft = make_policy(config, workdir, mesh)
  reward = workdir / "models/reward"

  def of(task, data, **fields):
    return derived(config, task, data, **fields)

  settings_reward = of("reward", names.pairs, policy__path=str(sft))
  once(
    workdir,
    "reward",
    reward,
    lambda out: folders_task.run_reward(settings_reward, workdir, mesh, out=out),
  )

  models, outs = dict(policy__path=str(sft), reward__path=str(reward)), {}
  for arm in names.arms:
    outs[arm] = workdir / "export" / ("" if arm == names.arms[-1] else arm)
    settings_rl = arm_config(config, workdir, arm)
    once(
      workdir,
      arm,
      outs[arm] / "reward",
      lambda _: folders_task.run_r2m(settings_rl, workdir, mesh, out=outs[arm]),
    )

  if not (workdir / TABLES).exists():
    began = time.perf_counter()
    tables = measure(
      of("r2m", names.prompts, **models), workdir, mesh, {"lm": lm, "sft": sft}, outs
    )
    write_atomic(workdir / TABLES, json.dumps(tables))
    record(workdir, "measurements", began)
  hosts.on_first(lambda: finish(config, workdir))


def make_policy(config, workdir: Path, mesh) -> tuple[Path, Path]:
  """Runs tokenizer, language modelling and SFT; returns the policy's folders after the last two."""
  names, start, lm, sft = (
    config.scratch,
    *(workdir / "models" / name for name in ("start", "lm", "sft")),
  )
  tokens = derived(config, "tokenizer", names.corpus)
  once(workdir, "tokenizer", start, lambda out: tokenizer.run(tokens, workdir, out=out))
  settings = derived(config, "sft", names.corpus, policy__path=str(start), data__pack=True)
  settings.sft.update(names.lm)
  once(
    workdir, "lm", lm, lambda out: folders_task.run_sft(settings, workdir, mesh, name="lm", out=out)
  )
  settings_sft = derived(config, "sft", names.sft, policy__path=str(lm))
  once(workdir, "sft", sft, lambda out: folders_task.run_sft(settings_sft, workdir, mesh, out=out))
  return lm, sft


def require_data(config) -> None:
  """Raises an error before any work if a name matches no file; the message names the download."""
  names = config.scratch
  for field in (
    "corpus",
    "sft",
    "pairs",
    "prompts",
    "sft_val",
    "prompts_val",
    "pairs_val",
    "pairs_dev",
  ):
    for name in split_names(names[field]):
      if ":" not in name:
        try:
          find_files(name, config.data.root)
        except DataError as error:
          raise DataError(f"{error}{'; ' if names.download else ''}{names.download}") from None


def derived(config, task: str, data: str, **fields):
  """The config of one stage."""
  config = config.copy_and_resolve_references()
  fields = dict(export__check=False) | fields
  config.update_from_flattened_dict(
    {name.replace("__", "."): value for name, value in fields.items()}
  )
  config.task = task
  config.data.name = data
  config.data.weights = ()
  check_config(config)
  return config


def arm_config(config, workdir: Path, arm: str):
  """The config of RL for one arm, with the models of the earlier stages."""
  models = workdir / "models"
  return derived(
    config,
    "r2m",
    config.scratch.prompts,
    policy__path=str(models / "sft"),
    reward__path=str(models / "reward"),
    variant=arm,
    export__check=config.export.check,
    log__samples=1,
  )


def once(workdir: Path, name: str, out: Path, make: Callable[[Path], None]) -> None:
  """Runs a stage that writes the model `out`, unless it exists already."""
  if (out / "config.json").exists():
    print(f"\n{name}: done before, in {out}")
    return
  print(f"\n{name}: begins")
  began = time.perf_counter()
  make(out)
  record(workdir, name, began)


def record(workdir: Path, name: str, began: float) -> None:
  path = workdir / STAGES
  seconds = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
  seconds[name] = seconds.get(name, 0.0) + time.perf_counter() - began
  write_atomic(path, json.dumps(seconds))
  print(f"{name}: {seconds[name]:.0f} s")


# ---- measurements on held-out data ----


def measure(
  config, workdir: Path, mesh, folders: dict[str, Path], outs: dict[str, Path]
) -> list[dict]:
  """All tables of the report: perplexity, reward-model accuracy, effects of RL, accuracy with
  policy feedback.
  """
  names, reward = config.scratch, load_reward(config.reward.path, config, mesh)
  policies = {name: load_policy(str(folder), config, mesh) for name, folder in folders.items()}
  sft = policies["sft"]
  val = sets_of(config, reward, names.pairs_val)
  dev = sets_of(config, reward, names.pairs_dev, dev=True)
  trained = {arm: load_policy(str(out / "policy"), config, mesh) for arm, out in outs.items()}
  rows = [row for pairs in (*val, *dev) for row in pairs.rows]
  right = wins(
    *scores_of(config, reward, None, rows, mesh).T
  )  # all sets together, so that few programs are compiled
  return [
    perplexity_table(config, policies, mesh),
    accuracy_table([*val, *dev], right),
    rl_table(config, workdir, reward, sft, trained, mesh),
    feedback_table(config, reward, sft, trained, outs, val, right, mesh),
  ]


@dataclasses.dataclass(frozen=True)
class Pairs:
  """One held-out set: rows of `datasets.pair_ids`, the number of tokens of each reply that are
  read, and the original number of rows.
  """

  name: str
  rows: list[dict]
  lengths: np.ndarray  # i64[N, 2]
  of: int

  @property
  def prompts(self) -> list[str]:
    return [json.dumps(row["prompt"]) for row in self.rows]


def sets_of(config, reward: RewardModel, data: str, *, dev: bool = False) -> list[Pairs]:
  """Held-out sets, one for each file, filtered by config.data; from `dev` sets only rows of the
  validation group.
  """
  encode, sets = lambda side: reward.renderer.tokenizer.encode(side["response"], special=False), []
  for name in split_names(data):
    for source in [name] if ":" in name else map(str, find_files(name, config.data.root)):
      settings = derived(
        config, "reward", str(Path(source).absolute()) if ":" not in name else name
      )
      rows = load(settings.data, "pair")
      rows = [row for row in rows if not dev or row.get("meta", {}).get("group") == "val"]
      try:
        kept, _ = datasets.pair_ids(settings, reward.renderer, rows, Path(source).name)
      except DataError as error:  # all are too long
        print(f"data     {error}")
        continue
      lengths = np.asarray([[len(encode(side)) for side in row["sides"]] for row in kept])
      sets.append(Pairs(Path(source).name.split(".")[0], kept, lengths, len(rows)))
  return sets


def scores_of(
  config, reward: RewardModel, policy: Policy | None, rows: list[dict], mesh
) -> np.ndarray:
  """Scores of chosen and rejected of `datasets.pair_ids`.   -> f32[N, 2]."""
  sides = [side for row in rows for side in row["sides"]]
  return serve.score(config, reward, policy, sides, mesh).reshape(-1, 2)


def perplexity_table(config, policies: dict[str, Policy], mesh) -> dict:
  """Perplexity of held-out responses before and after SFT, including end-of-turn."""
  settings = derived(config, "sft", config.scratch.sft_val)
  rows, lines = load(settings.data, "response"), []
  for name, policy in policies.items():
    tokenizer = policy.tokenizer
    ids = [
      (tokenizer.render(r["prompt"]), tokenizer.answer(r["prompt"], r["response"])) for r in rows
    ]
    kept = datasets.select(settings, rows, ids, "perplexity")
    ids = [(ids[i][0], [*ids[i][1], tokenizer.end_id]) for i in kept]
    found = perplexity(
      response_logprobs(config, policy, ids, mesh), [json.dumps(rows[i]["prompt"]) for i in kept]
    )
    lines.append(
      [
        {"lm": "language modelling", "sft": "SFT"}[name],
        shown(found, 1),
        str(len(kept)),
        str(found.count),
      ]
    )
  return {
    "title": "Validation perplexity of responses",
    "head": ["After", "Perplexity (95%)", "Rows", "Tokens"],
    "rows": lines,
    "note": "exp of the mean negative log-likelihood of a response token; intervals over prompts.",
  }


def accuracy_table(sets: list[Pairs], right: np.ndarray) -> dict:
  """Accuracy of the reward model on each set, next to the rule that the longer reply wins.

  `right` is f64[N] over the pairs of all sets in order: 1 if the reward model prefers the chosen
  reply.
  """
  lines, ends = [], np.cumsum([len(pairs.rows) for pairs in sets])
  for pairs, mine in zip(sets, np.split(right, ends[:-1])):
    model, longer = mean_of(mine, pairs.prompts), mean_of(wins(*pairs.lengths.T), pairs.prompts)
    lines.append(
      [
        pairs.name,
        shown(model, 1, 100),
        shown(longer, 1, 100),
        str(model.count),
        str(model.groups),
        str(pairs.of),
      ]
    )
  return {
    "title": "Reward-model accuracy on held-out pairs, %",
    "rows": lines,
    "head": [
      "Set",
      "Reward model (95%)",
      "Longer reply wins (95%)",
      "Pairs",
      "Prompts",
      "Pairs before limits",
    ],
    "note": "Length is in tokens, and a tie counts half. Intervals are by bootstrap over prompts, if "
    "there are at least 10. A reward model has learned more than length only if it beats "
    "max(x, 100 - x) of the rule. From _dev sets only rows of the validation group are used.",
  }


def held_out_prompts(config, policy: Policy):
  """(config that samples from them, rows, rendered prompts) of config.scratch.samples prompts
  for `serve.sample`.
  """
  settings = derived(config, "r2m", config.scratch.prompts_val)
  settings.generate.max_new_tokens = config.rollout.max_new_tokens
  settings.generate.temperature = 1.0
  rows = load(settings.data, "prompt")
  ids = [(policy.tokenizer.render(row["prompt"]),) for row in rows]
  settings.data.unique = True
  kept = datasets.select(settings, rows, ids, "sampling")
  kept = np.random.default_rng(config.seed).permutation(kept)[: config.scratch.samples]
  return settings, [rows[i] for i in kept], [ids[i][0] for i in kept]


def rl_table(
  config, workdir: Path, reward: RewardModel, sft: Policy, trained: dict[str, Policy], mesh
) -> dict:
  """Reward by the frozen reward model, KL from the SFT policy and length on held-out prompts,
  before and after RL.
  """
  settings, rows, prompts = held_out_prompts(config, sft)
  lines, before = [], []
  for name, policy in {"SFT": sft, **trained}.items():
    drawn = serve.sample(settings, policy, prompts, mesh)
    answered = [
      {"prompt": row["prompt"], "response": d["text"], "truncated": d["truncated"]}
      for row, d in zip(rows, drawn)
    ]
    scores = serve.score(config, reward, None, answered, mesh)
    both = [(prompt, d["tokens"]) for prompt, d in zip(prompts, drawn)]
    own, ref = (response_logprobs(config, p, both, mesh) for p in (policy, sft))
    every = range(len(rows))
    kl = mean_of([(a - b).sum() for a, b in zip(own, ref)], every)
    length = mean_of([len(d["tokens"]) for d in drawn], every)
    cut = np.mean([d["truncated"] for d in drawn])
    lines.append(
      [
        name,
        shown(mean_of(scores, every), 2),
        "0" if policy is sft else shown(kl, 1),
        shown(length, 1),
        f"{cut:.0%}",
      ]
    )
    mine = [
      {
        "prompt": folders_task.prompt_text(a["prompt"]),
        "response": a["response"],
        "reward": s,
        "frozen": s,
        "length": len(d["tokens"]),
        "truncated": d["truncated"],
      }
      for a, s, d in zip(answered[: config.log.samples], scores, drawn)
    ]
    before = before or mine
    if name != "SFT":
      append_samples(workdir, [{"arm": name, "when": "before"} | row for row in before])
      append_samples(workdir, [{"arm": name, "when": "after"} | row for row in mine])
  return {
    "title": "Policies on held-out prompts",
    "rows": lines,
    "head": ["Policy", "Frozen reward (95%)", "KL, nats (95%)", "Length, tokens (95%)", "Cut off"],
    "note": f"One sample at temperature 1 for each of {len(rows)} held-out prompts. KL is from the "
    "SFT policy, summed over the response and estimated from the samples.",
  }


def feedback_table(
  config, reward, sft, trained, outs, val: list[Pairs], right: np.ndarray, mesh
) -> dict:
  """The paper's table 3: accuracy on held-out pairs without feedback (the first entries of
  `right`), and with feedback before and after RL.
  """
  prompts = [f"{pairs.name} {prompt}" for pairs in val for prompt in pairs.prompts]
  rows = [row for pairs in val for row in pairs.rows]

  def accuracy(model, policy):
    return mean_of(wins(*scores_of(config, model, policy, rows, mesh).T), prompts)

  lines = [
    ["frozen reward model, no feedback", shown(mean_of(right[: len(rows)], prompts), 1, 100)]
  ]
  for arm in [arm for arm in trained if arm.startswith("r2m")]:
    lines.append(
      [f"{arm} before RL", shown(accuracy(untrained(config, arm, reward, sft, mesh), sft), 1, 100)]
    )
    after = load_reward(str(outs[arm] / "reward"), config, mesh)
    lines.append([f"{arm} after RL", shown(accuracy(after, trained[arm]), 1, 100)])
  return {
    "title": "Reward-model accuracy with policy feedback, %",
    "head": ["Reward model", "Accuracy (95%)"],
    "rows": lines,
    "note": f"All {len(rows)} pairs of the validation sets together, at the ω of the last step. Before "
    "RL the cross-attention is random and reads the SFT policy; after RL both are the final "
    "ones.",
  }


def untrained(config, arm: str, reward: RewardModel, sft: Policy, mesh) -> RewardModel:
  """The reward model with the arm's initial head, at the omega of its last step."""
  config = with_variant(config, arm)
  built = build(config, mesh, arch=sft.arch, reward_arch=reward.arch)
  head = folders_task.start_state(config, built, sft, reward, donate=False).reward_head
  settings = HeadConfig(
    sft.arch.hidden_size,
    reward.arch.embedding_size,
    config.r2m.attention_dim,
    config.r2m.num_heads,
    config.r2m.feedback_layer,
    config.r2m.omega_min,
  )
  return dataclasses.replace(reward, head=(settings, head))


def shown(mean: Mean, digits: int, scale: float = 1.0) -> str:
  """The mean with its interval, or without one if there are too few groups."""
  value, low, high = (f"{x * scale:.{digits}f}" for x in mean[:3])
  return f"{value} ({low} to {high})" if mean.groups >= MIN_GROUPS else f"{value} (–)"


def finish(config, workdir: Path) -> None:
  """Writes the report with all tables, and prints them."""
  tables = json.loads((workdir / TABLES).read_text(encoding="utf-8"))
  seconds = json.loads((workdir / STAGES).read_text(encoding="utf-8"))
  budgets = {
    "lm": config.scratch.lm.budget,
    "sft": config.sft.budget,
    "reward": config.reward.budget,
  }
  budgets |= dict.fromkeys(config.scratch.arms, config.budget)
  lines = [
    [name, f"{budgets[name]:g}" if budgets.get(name) else "–", f"{s:.0f}"]
    for name, s in seconds.items()
  ]
  lines.append(["all", "–", f"{sum(seconds.values()):.0f}"])
  waits = {}
  for row in read_metrics(workdir):
    waits.setdefault(row["arm"] or row["stage"], []).append(row.get("data/wait", 0.0))
  share = ", ".join(f"{name} {np.mean(w[1:] or w):.2%}" for name, w in waits.items())
  tables.append(
    {
      "title": "Time",
      "head": ["Stage", "Budget, s", "Took, s"],
      "rows": lines,
      "note": "Loading, compiling and exporting are not part of a budget. Share of the time spent "
      f"waiting for data: {share}.",
    }
  )
  report = write_report(workdir, title="R2M on real text, from scratch", tables=tables)
  for table in tables:
    print(f"\n{table['title']}\n{aligned([table['head'], *table['rows']])}\n{table['note']}")
  print("\n" + format_summary(summary_table(read_metrics(workdir))))
  print(f"report   {report}\nmetrics  {workdir / 'metrics.jsonl'}\nmodels   {workdir / 'export'}")


def aligned(rows: list[list[str]]) -> str:
  widths = [max(map(len, column)) for column in zip(*rows)]
  return "\n".join(
    "  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip() for row in rows
  )
