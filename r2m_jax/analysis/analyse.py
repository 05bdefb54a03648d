"""`task=analyse`: the paper's own evidence from the checkpoints and metrics of a run, as
docs/analyse.md defines it.

  python -m r2m_jax.main --config=configs/quickstart.py --workdir=RUN --config.task=analyse \\
    [--config.analyse.what=similarity,probes]

RUN is a run of the gold-reward task, of task=lab, of task=scratch or from Hugging Face folders. It
is only read; RUN/analysis is written: report.html, a PNG for each figure, a CSV for each table.
"""

import csv
import functools
import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from r2m_jax.algorithm.annotate import make_annotate
from r2m_jax.algorithm.read import make_read
from r2m_jax.algorithm.variants import VARIANTS
from r2m_jax.analysis import checks as manipulation
from r2m_jax.analysis import evidence
from r2m_jax.analysis import figures as analysis_figures
from r2m_jax.analysis.attended import attended_text, template_of_gold
from r2m_jax.analysis.checks import Checked
from r2m_jax.analysis.evidence import Curves, Judged, Read, Row
from r2m_jax.config import PIECES, ConfigError, chosen_pieces
from r2m_jax.goldtask import task as goldtask
from r2m_jax.goldtask.rl import program_of, reward_of, shared_arm
from r2m_jax.goldtask.stages import STREAM_ANALYSE, sample
from r2m_jax.hf.folders import Policy, head_tensors, load_policy, load_reward, mesh_of
from r2m_jax.lab.report import span
from r2m_jax.lab.table import read_arms
from r2m_jax.models.reward import last_token
from r2m_jax.ops import masked_mean
from r2m_jax.parallel import hosts, sharding
from r2m_jax.plan.sizes import sizes_of
from r2m_jax.plan.work import Layout, phases_of
from r2m_jax.report import page
from r2m_jax.report.figures import rendered
from r2m_jax.run import checkpoint, loop
from r2m_jax.run.files import read_json, subfolders, write_atomic
from r2m_jax.run.metrics import read_metrics
from r2m_jax.run.run import warmed
from r2m_jax.run.workdir import saved, with_variant
from r2m_jax.tasks import gold, scratch, serve, training
from r2m_jax.tasks.export import run_config
from r2m_jax.types import Rollout, Sequences

KEY_ANALYSE = 2**31 - 11  # of the held-out responses
MOST_LAYERS = 5  # of a policy, evenly spaced, in addition to its last; as many as in the paper
START = "start"  # the name of the supervised policy


class Found(NamedTuple):
  """One piece: `head` names the labels of its rows; `tables` are sections without rows."""

  head: tuple[str, ...] = ()
  rows: list[Row] = []
  figures: dict[str, Any] = {}
  tables: list[dict] = []
  points: list[str] = []  # sentences


def run(config, workdir: Path) -> dict[str, Found]:
  """Computes the pieces in config.analyse.what ("": all for which the run has data) and writes
  WORKDIR/analysis.

  Raises:
    ConfigError: the workdir holds no run, or a requested piece needs data that the run does not
      have.
  """
  if not (workdir / "config.json").is_file():
    raise ConfigError(
      f"--workdir={workdir} holds no run to analyse: there is no config.json; give the workdir of a run"
    )
  wanted, task = chosen_pieces(config), read_json(workdir / "config.json").get("task")
  config = run_config(config, workdir, mine=("mesh", "analyse"))
  kind = task if task in ("lab", "scratch") else training(config).__name__.rpartition(".")[2]
  curves = curves_of(workdir, kind, config)
  lacks = missing(config, workdir, kind, curves)
  if refused := [f"{name}: {lacks[name]}" for name in wanted if name in lacks]:
    raise ConfigError(
      f"config.analyse.what asks {workdir} for what it does not have: "
      + "; ".join(refused)
      + "; leave it out"
    )
  wanted = wanted or [name for name in PIECES if name not in lacks]
  if not wanted:
    reasons = "; ".join(dict.fromkeys(lacks.values()))
    raise ConfigError(
      f"--workdir={workdir} has nothing to analyse: {reasons}; give the workdir of another run"
    )
  for name in PIECES:
    if name not in wanted and name in lacks:
      print(f"analyse  without {name}: {lacks[name]}")
  found = {}
  reads = READS[kind](config, workdir, wanted) if needs_models(kind, wanted) else None
  for name in wanted:
    found[name] = MAKE[name](config, workdir, kind, curves, reads)
    print(f"analyse  {name}", flush=True)
  print(f"report   {write(config, workdir, found, lacks)}")
  return found


def needs_models(kind: str, wanted: list[str]) -> bool:
  """Whether any of the pieces reads a checkpoint."""
  of_states = {
    "similarity",
    "differences",
    "hacking",
    "probes",
    *(("accuracy",) if kind == "gold" else ()),
    *(("checks",) if kind != "lab" else ()),
  }
  return bool(of_states & set(wanted))


def missing(config, workdir: Path, kind: str, curves: Curves) -> dict[str, str]:
  """piece -> why this run does not have it."""
  lacks = {}
  gold_only = "only the gold-reward task has a gold reward"
  if kind == "lab":
    lacks = dict.fromkeys(
      ("similarity", "differences", "hacking", "accuracy", "probes"),
      "a laboratory keeps no checkpoint of an arm; analyse a run of one seed",
    )
    lacks["cost"] = "a laboratory runs its seeds together and logs no seconds"
    if not any("reward/growth" in metrics for metrics in curves.values()):
      lacks["checks"] = "its arms did not log reward/growth"
    if not (workdir / "summary.csv").is_file():
      lacks["ablations"] = "there is no summary.csv"
  elif kind == "gold":
    if any(not (workdir / "stages" / stage).is_dir() for stage in ("sft", "reward")):
      reason = "there is no stages/sft with a stages/reward"
      pieces = ("similarity", "differences", "hacking", "accuracy", "checks", "probes")
      lacks = dict.fromkeys(pieces, reason)
    elif not any(
      VARIANTS[arm].feedback or VARIANTS[arm].trained for arm in saved_steps(config, workdir)
    ):
      reason = "no arm in checkpoints/ reads feedback or trains its reward"
      lacks = dict.fromkeys(("accuracy", "checks"), reason)
  else:
    lacks = dict.fromkeys(("hacking", "probes"), gold_only)
    if not (config.analyse.pairs or kind == "scratch" and config.scratch.pairs_val):
      reason = (
        "there are no held-out pairs: give rows with chosen and rejected as config.analyse.pairs"
      )
      lacks |= dict.fromkeys(("similarity", "differences", "checks"), reason)
    elif not (outs := exports_of(config, workdir, kind)):
      reason = "there is no finished arm in export/"
      lacks |= dict.fromkeys(("similarity", "differences", "checks"), reason)
    elif not any(VARIANTS[arm].feedback == "policy" for arm in outs):
      lacks["checks"] = "no finished arm reads the policy's states"
    if kind != "scratch" or not (workdir / scratch.TABLES).is_file():
      lacks["accuracy"] = (
        "task=scratch measures it, as the last of its tables, and this run has none"
      )
  if not curves:
    lacks |= dict.fromkeys(("dynamics", "noise", "cost"), "no RL step was logged")
    if kind != "lab":
      lacks["ablations"] = "no RL step was logged"
  elif not {"r2m", "noise"} <= set(curves):
    lacks["noise"] = "it compares the arms r2m and noise, of which the run lacks one"
  return lacks


def curves_of(workdir: Path, kind: str, config) -> Curves:
  """The logged RL metrics of every arm, f64[seeds, steps]; a laboratory's at its own KL weight."""
  if kind == "lab":
    arms = read_arms(workdir, [arm.split()[0] for arm in config.lab.arms])
    return {
      arm: (found[1.0] if 1.0 in found else next(iter(found.values()))).metrics
      for arm, found in arms.items()
    }
  rows = [row for row in read_metrics(workdir) if row["stage"] == "rl"]
  curves = {}
  for arm in dict.fromkeys(row["arm"] for row in rows):
    mine = sorted((row for row in rows if row["arm"] == arm), key=lambda row: row["step"])
    names = [name for name in mine[-1] if isinstance(mine[-1][name], (int, float))]
    curves[arm] = {
      name: np.array([[row.get(name, np.nan) for row in mine]], float) for name in names
    }
  return curves


# ---- reading a run of the gold-reward task ----


class GoldReads(NamedTuple):
  """Everything that the pieces need from checkpoints."""

  reads: list[
    Read
  ]  # of the supervised policy, then of each arm at its end: the responses of each, read by itself
  steps: dict[
    str, dict[int, np.ndarray]
  ]  # arm -> step -> last-layer states of the first one's responses, f64[N, D]
  judged: list[Judged]
  checked: list[Checked]


def saved_steps(config, workdir: Path) -> dict[str, list[int]]:
  """arm -> steps of its intact checkpoints, in order; arms without one are omitted."""
  found = {}
  for folder in subfolders(workdir / "checkpoints"):
    steps = sorted(int(path.name) for path in folder.iterdir() if path.name.isdecimal())
    if sound := [step for step in steps if checkpoint.damage(folder / str(step)) is None]:
      found[folder.name] = sound
  order = [*config.arms, *VARIANTS]
  return {arm: found[arm] for arm in sorted(found, key=order.index)}


def layers_of(count: int) -> dict[str, int]:
  """Name -> index of the policy's layers that are read, with one forward pass each: "final", the
  input of the language-model head, and at most `MOST_LAYERS` of the earlier layers, whose names
  count from 1.
  """
  picked = np.unique(np.linspace(0, count - 2, min(count - 1, MOST_LAYERS)).round().astype(int))
  return {str(layer + 1): int(layer) for layer in picked} | {"final": -1}


def pool(hidden: jax.Array, response_mask: jax.Array) -> jax.Array:
  """Mean over a response's tokens, at least float32.   [B, L, D], bool[B, T], the last columns
  -> f32[B, D].
  """
  T = response_mask.shape[1]
  return masked_mean(
    hidden[:, -T:].astype(jnp.promote_types(hidden.dtype, jnp.float32)), response_mask[..., None], 1
  )


def make_look(config, built) -> Callable[..., dict]:
  """Builds `look(state, sequences, arm)`: the states and scores of responses by the policy,
  reference and reward model of a TrainState.

  states {layer: f32[B, D]}; last, ref_mean, ref_last f32[B, D]; rte f32[B, Dr]; used, frozen
  f32[B], at the state's own omega; own f32[B], the part of `used` without attention; weights
  f32[B, L], of the attention if it reads the policy's states.
  """
  read, layers = make_read(config), layers_of(built.arch.num_layers)

  @sharding.jit_on(built.mesh)
  def look(state, sequences: Sequences, arm) -> dict:
    policy, ref = built.defs.open_policy(state.policy, state.ref), built.defs.open_ref(state.ref)
    rows, shown = (sequences.tokens, sequences.token_mask), sequences.response_mask
    annotate = make_annotate(built.defs, config, reward_of(built.defs, arm))
    feedback = read(policy, ref, sequences)
    judged, _ = annotate(state, state.omega, Rollout(sequences), *feedback)
    alone, _ = annotate(state, jnp.ones_like(state.omega), Rollout(sequences), *feedback)
    of_ref, final = ref(*rows).hidden, policy(*rows).hidden
    states = {
      name: pool(policy(*rows, feedback_layer=layer).feedback, shown)
      for name, layer in layers.items()
    }
    found = {
      "states": states,
      "last": last_token(final, rows[1]),
      "ref_mean": pool(of_ref, shown),
      "ref_last": last_token(of_ref, rows[1]),
      "rte": judged.rte,
      "used": judged.scores,
      "frozen": judged.scores_frozen,
      "own": state.omega * alone.scores,
    }
    if VARIANTS[config.variant].feedback == "policy":
      head = nnx.merge(built.defs.reward_head, state.reward_head)
      found["weights"] = head.attention_weights(judged.rte, feedback[0].hidden, rows[1]).mean(1)
    return found

  return lambda *args: jax.tree.map(lambda x: np.asarray(x, float), hosts.fetch(look(*args)))


def seen_of(arm: str, written: Sequences, look: dict, formula: str) -> manipulation.Seen:
  """An arm's rewards of a policy's responses, for the checks."""
  attended = None
  if VARIANTS[arm].feedback == "policy" and "weights" in look:
    mask = np.asarray(written.token_mask)
    weights = np.where(mask, look["weights"], 0)
    attended = manipulation.Attended(weights, mask, template_of_gold(written))
  scored = manipulation.Scored(look["used"], look["own"], look["frozen"])
  return manipulation.Seen(scored, goldtask.gold(written, formula).gold, attended)


def read_gold(config, workdir: Path, wanted: list[str]) -> GoldReads:
  """Samples responses to held-out prompts from the supervised policy and from each arm's last
  checkpoint, and reads all of them.
  """
  settings, K = config.analyse, config.analyse.samples
  saved_at = saved_steps(config, workdir)
  config = with_variant(config, "")
  config.task, config.arms = "r2m", tuple(saved_at) or ("vanilla",)
  config.ppo.minibatches = config.ppo.accumulation = 1  # there is no update
  notes = goldtask.prompts(config.seed, STREAM_ANALYSE, 0, settings.prompts)
  # streams do not share sample keys
  notes = notes.replace(example_id=notes.example_id + STREAM_ANALYSE * 2**24)
  prompt = np.repeat(np.arange(settings.prompts), K)
  looks = {}
  first_written = None
  found = GoldReads([], {}, [], [])
  for each in gold.runs(config, workdir, mesh_of(config), stage=saved):
    mine, arm = each.config, each.config.variant
    program, shared = program_of(mine), shared_arm(mine)
    if program.variant not in looks:
      looks[program.variant] = make_look(program, each.built)
    look = looks[program.variant]

    def seen_by(state, rows):
      return look(state, rows, shared)  # noqa: B023

    def draw(policy):
      return sample(mine, each.built, policy, notes, group_size=K, purpose=KEY_ANALYSE)  # noqa: B023

    first = warmed(each, each.first())
    if first_written is None:
      first_written = draw(first.policy)
      first_seen = seen_by(first, first_written)
      found.reads.append(read_of(START, first_written, first_seen, prompt, config.gold.formula))
    if not saved_at:
      break
    kept = checkpoint.open_checkpoints(workdir / "checkpoints" / arm)
    if not mine.checkpoint.fork_from:
      checkpoint.require(kept, saved_at[arm][-1], models=loop.models_of(first))
    found.steps[arm] = {0: first_seen["states"]["final"]}
    of_arm = OfArm(mine, kept, first, first_written, seen_by, draw)
    read_arm(found, of_arm, saved_at[arm], wanted, prompt)
    print(f"analyse  read {arm}, steps {', '.join(map(str, saved_at[arm]))}", flush=True)
  return found


class OfArm(NamedTuple):
  """The inputs of `read_arm` for one arm."""

  config: Any
  kept: Any  # its checkpoints
  first: Any  # TrainState of step 0
  first_written: Sequences  # responses of the supervised policy
  look: Callable[[Any, Sequences], dict]  # built by `make_look`
  draw: Callable[[Any], Sequences]  # responses of a policy


def read_arm(found: GoldReads, arm: OfArm, steps: list[int], wanted: list[str], prompt) -> None:
  """Adds to `found` the results of the arm's checkpoints, at `steps`, for responses."""
  name = arm.config.variant
  labels = {}
  formula = arm.config.gold.formula
  judges = bool(VARIANTS[name].feedback or VARIANTS[name].trained)
  checked = judges and "checks" in wanted
  for step in steps if checked or "hacking" in wanted else steps[-1:]:
    state = checkpoint.restore(arm.kept, arm.first, step)
    of_first = arm.look(state, arm.first_written)
    found.steps[name][step] = of_first["states"]["final"]
    if checked or step == steps[-1]:
      written = arm.draw(state.policy)
      seen = arm.look(state, written)
    if checked:
      own = seen_of(name, written, seen, formula)
      labels[step] = manipulation.self_labels(own.scored, own.gold, prompt)
  found.reads.append(read_of(name, written, seen, prompt, formula))
  if not judges:
    return
  floor = arm.first.replace(omega=jnp.full_like(arm.first.omega, arm.config.r2m.omega_min))
  before = [arm.look(floor, rows) for rows in (arm.first_written, written)]
  of_start, of_own = (
    seen_of(name, *x, formula) for x in ((arm.first_written, before[0]), (written, seen))
  )
  for whose, true, old, new in (
    (START, of_start.gold, before[0], of_first),
    ("its own", of_own.gold, before[1], seen),
  ):
    found.judged.append(Judged(name, whose, true, old["frozen"], old["used"], new["used"]))
  weights = tuple(weights_of(x.reward_head) for x in (arm.first, state))
  found.checked.append(Checked(name, prompt, of_start, of_own, weights, labels))


def weights_of(head) -> dict[str, np.ndarray]:
  """The weights of attention and phi by name, without the bias, which is never trained."""
  tensors = head_tensors(head).items()
  return {name.split(".")[0]: x for name, x in tensors if name.endswith(".weight")}


def read_of(name: str, written: Sequences, seen: dict, prompt: np.ndarray, formula: str) -> Read:
  """A policy's own responses as `Read`."""
  gold = goldtask.gold(written, formula)
  V = goldtask.VOCAB_SIZE
  T = written.response_mask.shape[1]
  ids = np.arange(V)
  said = ((written.tokens[:, -T:, None] == ids) & written.response_mask[..., None]).sum(1)
  noted = (written.tokens[:, :-T, None] == ids).sum(1)
  features = {
    evidence.EMBEDDING: seen["rte"],
    evidence.POLICY: seen["states"]["final"],
    "policy, last token": seen["last"],
    evidence.REFERENCE: seen["ref_mean"],
    "reference, last token": seen["ref_last"],
    "length alone": gold.length[:, None],
    "token counts": np.concatenate([said, noted], 1).astype(float),
  }
  scores = {"frozen proxy": seen["frozen"], "used reward": seen["used"], "gold": gold.gold}
  if name == START:
    del scores["used reward"]  # it is the frozen proxy
  return Read(
    name, prompt, evidence.above_median(gold.gold, prompt), seen["states"], scores, features
  )


# ---- reading a run on text ----


def exports_of(config, workdir: Path, kind: str) -> dict[str, Path]:
  """arm -> folder with policy and reward model of every arm that has ended with both."""
  if kind == "scratch":
    arms = {
      arm: workdir / "export" / ("" if arm == config.scratch.arms[-1] else arm)
      for arm in config.scratch.arms
    }
  else:
    arms = {
      arm: workdir / "export" / ("" if config.variant else arm) for arm in [config.variant] if arm
    }
    arms = arms or {arm: workdir / "export" / arm for arm in config.arms}
  files = ("policy/config.json", "reward/config.json")
  return {arm: out for arm, out in arms.items() if all((out / f).is_file() for f in files)}


def read_text(config, workdir: Path, wanted: list[str], *, kind: str) -> GoldReads:
  """Held-out pairs, one for each prompt, read by the policy before RL and by each arm's exported
  policy.
  """
  names = config.analyse.pairs or config.scratch.pairs_val
  settings = config
  mesh = mesh_of(config)
  if kind == "scratch":
    models = {
      "policy__path": str(workdir / "models" / "sft"),
      "reward__path": str(workdir / "models" / "reward"),
    }
    settings = scratch.derived(config, "r2m", config.scratch.prompts, **models)
  reward = load_reward(settings.reward.path, settings, mesh, workdir=workdir)
  rows = {
    json.dumps(row["prompt"]): row
    for pairs in scratch.sets_of(settings, reward, names)
    for row in pairs.rows
  }
  rows = list(rows.values())  # the last pair of each prompt
  picked = np.random.default_rng([config.seed, STREAM_ANALYSE]).permutation(len(rows))[
    : config.analyse.prompts
  ]
  rows = [rows[i] for i in np.sort(picked)]
  if len(rows) < 2:
    raise ConfigError(
      f"config.analyse.pairs gives {len(rows)} prompts within the limits of config.data: give 2 at least, "
      "or raise config.data.max_prompt_length and max_response_length"
    )
  prompt, label = np.repeat(np.arange(len(rows)), 2), np.tile([1, 0], len(rows))
  frozen = scratch.scores_of(settings, reward, None, rows, mesh).reshape(-1)
  reads = []
  checked = []
  first = None
  for name, out in {START: None, **exports_of(config, workdir, kind)}.items():
    policy = load_policy(
      settings.policy.path if out is None else str(out / "policy"),
      settings,
      mesh,
      workdir=workdir,
    )
    first, scores = first or policy, {"frozen reward": frozen}
    if out is not None and VARIANTS[name].feedback == "policy":
      model = load_reward(str(out / "reward"), settings, mesh)
      scores["r2m reward"] = scratch.scores_of(settings, model, policy, rows, mesh).reshape(-1)
      if "checks" in wanted:
        before = scratch.untrained(settings, name, reward, first, mesh)
        models = (before, first), (model, policy)
        checked.append(checked_text(settings, name, models, rows, frozen, mesh))
    states = text_states(settings, policy, rows, mesh, every_layer="similarity" in wanted)
    reads.append(Read(name, prompt, label, states, scores))
    print(f"analyse  read {name}: {len(rows)} held-out pairs, one a prompt", flush=True)
  return GoldReads(reads, {}, [], checked)


def checked_text(config, arm: str, models, rows: list[dict], frozen: np.ndarray, mesh) -> Checked:
  """The checks of an arm on held-out pairs, whose chosen reply is the better one.

  Args:
    models: (reward model, policy that it reads) before RL, then after.
    frozen: f64[2N], scores of the frozen reward model.
  """
  prompt, better = np.repeat(np.arange(len(rows)), 2), np.tile([1.0, 0.0], len(rows))
  sides, seen = [side for row in rows for side in row["sides"]], []
  for model, policy in models:
    used, own, attended = attended_text(config, model, policy, sides, mesh)
    seen.append(manipulation.Seen(manipulation.Scored(used, own, frozen), better, attended))
  before, after = (weights_of(model.head[1]) for model, _ in models)
  return Checked(arm, prompt, *seen, (before, after))


def text_states(
  config, policy: Policy, rows: list[dict], mesh, every_layer: bool = True
) -> dict[str, np.ndarray]:
  """Mean states over the tokens of each row's chosen, then rejected response, by layer.   ->
  f64[2N, D] each.

  Args:
    every_layer: False: only "final", with one forward pass.
  """
  layers = layers_of(policy.arch.num_layers) if every_layer else {"final": -1}

  @sharding.jit_on(mesh)
  def read(state, tokens, mask, response):
    model = nnx.merge(policy.graphdef, state)
    return {
      name: pool(model(tokens, mask, feedback_layer=layer).feedback, response)
      for name, layer in layers.items()
    }

  sides = [side for row in rows for side in row["sides"]]
  ids = [serve.policy_ids(policy.tokenizer, side) for side in sides]
  sizes = np.array(
    [len(own) - len(policy.tokenizer.render(side["prompt"])) for own, side in zip(ids, sides)]
  )
  found = {name: np.zeros((len(ids), policy.arch.hidden_size)) for name in layers}
  for index in serve.batches(
    [len(row) for row in ids], serve.batch_size(config, config.score, len(ids), mesh)
  ):
    tokens, mask = serve.pad_left([ids[i] for i in index], policy.tokenizer.pad_id)
    response = np.arange(tokens.shape[1])[::-1] < sizes[index, None]
    for name, x in hosts.fetch(
      read(policy.state, *serve.spread((tokens, mask, response), mesh))
    ).items():
      found[name][index] = x
  return found


READS = {
  "gold": read_gold,
  "scratch": functools.partial(read_text, kind="scratch"),
  "folders": functools.partial(read_text, kind="folders"),
}


# ---- pieces ----


def similarity(config, workdir, kind, curves, found) -> Found:
  names = ("worse", "better") if kind == "gold" else ("rejected", "chosen")
  rows = evidence.similarity(found.reads, names)
  return Found(("policy", "layer"), rows, {"": analysis_figures.similarity(rows)})


def differences(config, workdir, kind, curves, found) -> Found:
  return Found(
    ("policy", "reward"),
    evidence.differences(found.reads),
    {"": analysis_figures.differences(found.reads)},
  )


def dynamics(config, workdir, kind, curves, found) -> Found:
  return Found(("arm", "curve"), evidence.dynamics(curves), {"": analysis_figures.dynamics(curves)})


def noise(config, workdir, kind, curves, found) -> Found:
  return Found(("curve",), evidence.noise(curves), {"": analysis_figures.noise(curves)})


def cost(config, workdir, kind, curves, found) -> Found:
  config = config.copy_and_resolve_references()
  if kind == "scratch":
    config.policy.path, config.reward.path = (
      str(workdir / "models" / name) for name in ("sft", "reward")
    )
  try:
    sizes = sizes_of(config)

    def count(arm):
      return phases_of(with_variant(config, arm), sizes, Layout(1, 1, 1), jax.devices()[0].platform)

    flops = {
      arm: {phase.name: phase.flops for phase in count(arm)}
      for arm in dict.fromkeys(["vanilla", *curves])
    }
  except ConfigError as unknown:  # the models' folder has been moved
    print(f"analyse  cost without FLOPs: {unknown}")
    flops = {}
  rows = evidence.cost(
    {arm: np.diff(metrics["seconds"][0]) for arm, metrics in curves.items()}, flops
  )
  return Found(("arm",), rows, {"": analysis_figures.cost(rows)})


def hacking(config, workdir, kind, curves, found) -> Found:
  rows = evidence.hacking(found.reads, found.reads[0])
  drawn = {"": analysis_figures.matrices(found.reads, found.reads[0], config.seed)}
  if found.steps:
    rows += evidence.drift(found.steps, found.reads[0].prompt)
    drawn["_steps"] = analysis_figures.steps(found.steps)
  return Found(
    ("policy",), rows, {name: figure for name, figure in drawn.items() if figure is not None}
  )


def accuracy(config, workdir, kind, curves, found) -> Found:
  if kind == "scratch":
    tables = json.loads((workdir / scratch.TABLES).read_text(encoding="utf-8"))
    return Found(
      tables=[table for table in tables if table["title"].startswith("Reward-model accuracy")]
    )
  rows = evidence.accuracy(found.judged, found.reads[0].prompt)
  names = [
    row._replace(labels=(f"{row.labels[0]}, on {row.labels[1]}", row.measure)) for row in rows
  ]
  levels = [row for row in names if "less" not in row.measure]
  levels = [row._replace(labels=(row.measure, row.labels[0]), measure="accuracy") for row in levels]
  figure = analysis_figures.dots(
    levels, ["accuracy"], ["Pairs ordered as gold orders them, %"], zero=50
  )
  return Found(("arm", "responses"), rows, {"": figure})


def checks(config, workdir, kind, curves, found) -> Found:
  if kind == "lab":
    return Found(("arm",), evidence.late(curves, manipulation.LOGGED))
  rows = manipulation.rows_of(found.checked)
  correlations = [row.found.value for row in evidence.differences(found.reads)]
  gaps = []
  if kind == "gold":
    of_hacking = evidence.hacking(found.reads, found.reads[0])
    gaps = [row.found.value for row in of_hacking if row.measure == "gap"]
  points = [manipulation.premise(correlations, gaps), *manipulation.words(rows)]
  return Found(("check",), rows, points=points)


def ablations(config, workdir, kind, curves, found) -> Found:
  leads = ("vanilla", "scaled")
  rows = (
    evidence.ablations_of_lab(workdir / "summary.csv")
    if kind == "lab"
    else evidence.ablations(curves, leads)
  )
  return Found(("arm",), rows)


def probes(config, workdir, kind, curves, found) -> Found:
  rows = evidence.probing(
    found.reads, config.seed, lambda name: print(f"analyse  probed {name}", flush=True)
  )
  measures = ["R²", "rank, within prompts"]
  return Found(
    ("policy", "read from"),
    rows,
    {
      "": analysis_figures.dots(
        rows, measures, ["R² on held-out prompts", "Rank correlation within prompts"], zero=0
      )
    },
  )


MAKE = {
  "similarity": similarity,
  "differences": differences,
  "dynamics": dynamics,
  "noise": noise,
  "cost": cost,
  "hacking": hacking,
  "accuracy": accuracy,
  "checks": checks,
  "ablations": ablations,
  "probes": probes,
}


# ---- page ----

# piece -> (title, caption)
TITLES = {
  "similarity": (
    "Similarity by layer (fig. 1)",
    "Mean cosine over pairs of responses to different prompts. Better and worse: above and below "
    "the median gold of the prompt. Gap: same label minus across. Centred: with the mean of all "
    "states subtracted, because a common vector by itself puts every cosine near 1.",
  ),
  "differences": (
    "Difference of reward against similarity (fig. 2)",
    "Pairs of responses to one prompt. Within prompts: with each prompt's means subtracted.",
  ),
  "dynamics": (
    "Loss, reward and KL (fig. 5)",
    "Means over a tenth of the steps; start and end are the first and the last tenth. With "
    "several seeds, their mean and 95% interval. At most eight arms are drawn.",
  ),
  "noise": (
    "Feedback against noise (fig. 6)",
    "Noise has the mean and variance of each feature of the policy's states over the batch. With "
    "one seed the intervals only cover step noise: another seed may give another result.",
  ),
  "cost": (
    "Cost (fig. 7)",
    "Seconds from one step's log to the next, median and quartiles. On the gold-reward task, "
    "arms that differ little run in r2m's program and take as long as it does. FLOPs are counted "
    "from the shapes, only matmuls, for a separate program of each arm.",
  ),
  "hacking": (
    "Hacking and sound responses; states across steps (fig. 9, table 5)",
    "Both kinds have a frozen proxy in the upper quarter of the supervised policy's responses; "
    "hacking: gold below its "
    "lower quartile, sound: gold at its median or above. Cosine with step 0: the supervised "
    "policy's responses, as the "
    "policy reads them at that step.",
  ),
  "accuracy": (
    "Accuracy of the reward model, % (table 3)",
    "Pairs of fresh responses to one held-out prompt, ordered as their gold orders them. Before: "
    "the head RL began with, reading the supervised policy; after: the final head and policy; at "
    "omega's floor if the run has ended.",
  ),
  "checks": (
    "Manipulation checks",
    "Whether the run can be evidence for or against the method. Before: the initial head, "
    "reading the supervised policy; after: the final head and policy. Definitions: "
    "docs/analyse.md.",
  ),
  "ablations": (
    "Where each arm ends (table 4)",
    "Means over the last tenth of the steps; intervals over seeds, if there are several.",
  ),
  "probes": (
    "Linear probes of gold",
    "Ridge regression fitted on other prompts than the predicted ones, which also choose its "
    "penalty. Rank: Spearman's correlation within a prompt, averaged over prompts. With "
    '"minus": the difference of two R².',
  ),
}


def tables_of(title: str, found: Found) -> list[dict]:
  """Rows as a table: a line for each set of labels, a column for each measure."""
  if not found.rows:
    return found.tables
  measures = list(dict.fromkeys(row.measure for row in found.rows))
  lines: dict[tuple, dict] = {}
  for row in found.rows:
    lines.setdefault(row.labels, {})[row.measure] = span(
      row.found, 5 if abs(row.found.value) < 0.01 else 3
    )
  rows = [
    [*labels, *(cells.get(measure, "") for measure in measures)] for labels, cells in lines.items()
  ]
  return [
    {
      "title": title,
      "head": [*found.head, *measures],
      "rows": rows,
      "note": "95% intervals, unless stated otherwise.",
    }
  ]


def csv_of(found: Found) -> str:
  """The numbers of an analysis as CSV, one line for each number, with five digits."""
  text = io.StringIO()
  writer = csv.writer(text, lineterminator="\n")
  for table in found.tables:
    writer.writerows([[table["title"]], table["head"], *table["rows"]])
  if found.rows:
    writer.writerow([*found.head, "measure", "value", "low", "high", "count"])
  for row in found.rows:
    writer.writerow(
      [*row.labels, row.measure, *(f"{x:.5g}" for x in row.found[:3]), row.found.count]
    )
  return text.getvalue()


def write(config, workdir: Path, found: dict[str, Found], lacks: dict[str, str]) -> Path:
  """WORKDIR/analysis: report.html, a PNG for each figure, a CSV for each piece. Returns the
  page's path.
  """
  out, sections = workdir / "analysis", []
  for name, piece in found.items():
    title, caption = TITLES[name]
    for suffix, figure in piece.figures.items():
      image = rendered(figure)
      write_atomic(out / f"{name}{suffix}.png", image)
      sections.append(page.figure_section(title, caption, [image], whole=True))
    for table in tables_of(title, piece):
      noted = table if piece.figures else {"note": caption, **table}
      sections.append(page.table_section(noted))
    if piece.points:
      sections.append(page.points_section(f"{title}: in words", piece.points))
      print("\n".join(f"{name:8s} {point}" for point in piece.points))
    write_atomic(out / f"{name}.csv", csv_of(piece))
  left = [f"{name}: {reason}." for name, reason in lacks.items() if name not in found]
  if left:
    sections.append(page.points_section("Pieces for which this run has no data", left))
  return page.write_page(
    out / "report.html",
    title=f"Analysis of {workdir.name}",
    heading=f"Analysis of {workdir.name}",
    about="Definitions of each piece: docs/analyse.md. Intervals are by bootstrap over prompts, or "
    "over seeds if a curve has several.",
    sections=sections,
  )
