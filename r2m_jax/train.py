"""The run: stages one after another (sft, reward, RL arms), each logged, saved, and skipped where done before."""

import datetime
import functools
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from r2m_jax import checkpoint, hosts, loop, sharding
from r2m_jax.build import KEY_TABLE, Build, abstract, build, init_policy, init_reward_model, initial_state
from r2m_jax.build import make_first_state
from r2m_jax.checks import check_model, check_step_zero, sample_rounding
from r2m_jax.config import ConfigError, check_batch, difference, fixed
from r2m_jax.generate import generate
from r2m_jax.lab import goldtask
from r2m_jax.lab.labels import gold_labeller
from r2m_jax.lab.stages import STREAM_RL, STREAM_TABLE, do, fit_golden, fit_reward, fit_sft, head_job
from r2m_jax.metrics import append_samples, read_json, read_metrics, write_atomic
from r2m_jax.pretrain import PARTIAL
from r2m_jax.report import format_summary, summary_table, write_report
from r2m_jax.step import make_judge, make_omega, make_read, make_step, measured_kl, sampling, uses_labels
from r2m_jax.variants import VARIANTS, Arm, arm_of, measured


# of a forked run; what its data and its tables are is found out anew
TAKEN_OVER = ("metrics.jsonl", "samples.jsonl", "skipped.jsonl", "r2m_renderer.json", "budgets.json")


def run(config, workdir: Path) -> None:
  """Runs the pipeline up to `config.task` and writes the report."""
  try:
    mesh = sharding.make_mesh(tuple(config.mesh))
  except ValueError as error:
    raise ConfigError(error) from None
  check_batch(config, tuple(mesh.shape.values()))
  claim(config, workdir)
  devices = f"{mesh.size} {jax.devices()[0].platform} device(s) as {dict(mesh.shape)}"
  print(f"r2m_jax  {devices}, {config.dtype}; writes {workdir}")
  built = build(config, mesh, vocab_size=goldtask.VOCAB_SIZE)

  key = jax.random.key(config.seed)
  policy_like = abstract(functools.partial(init_policy, config, built), mesh, key)
  policy = stage(workdir, "sft", policy_like, lambda: fit_sft(config, built, workdir))
  if config.task != "sft":
    reward_like = abstract(functools.partial(init_reward_model, config, built), mesh, policy_like, key)
    reward = stage(workdir, "reward", reward_like, lambda: fit_reward(config, built, workdir, policy))
  if config.task == "r2m":
    if not (workdir / "checkpoints").exists():
      check_model(
        built.defs.policy, policy, vocab_size=built.arch.vocab_size, dtype=config.dtype,
        temperature=config.rollout.temperature,
      )  # fmt: skip
    programs = {}
    for variant in (config.variant,) if config.variant else config.arms:
      arm = with_variant(config, variant)
      program = program_of(arm)
      if program.variant not in programs:
        programs[program.variant] = make_programs(program, mesh, policy, reward)
      built, start = programs[program.variant].built, reward
      if VARIANTS[variant].start == "golden":
        start = stage(
          workdir, "reward_golden", reward_like, lambda: fit_golden(arm, built, workdir, policy, reward)
        )
      run_arm(arm, programs[program.variant], workdir, policy, start)
  title = f"R2M: {config.task}, {config.algorithm}, seed {config.seed}"
  hosts.on_first(lambda: conclude(workdir, title, f"figures  {workdir / 'figures'}"))


def conclude(workdir: Path, title: str, *lines: str) -> None:
  """Writes the report and prints the summary and where things are."""
  report = write_report(workdir, title=title)
  print(format_summary(summary_table(read_metrics(workdir))))
  print("\n".join([f"report   {report}", *lines, f"metrics  {workdir / 'metrics.jsonl'}"]))


class Programs(NamedTuple):
  """What is compiled once for all arms that share it."""

  built: Build
  first: Callable  # of build.make_first_state
  step: Callable  # of make_gold_step
  sample: Callable  # of make_sampler


def shared_arm(config) -> Arm | None:
  """config.variant as an arm of r2m's program: to compile takes longer than many a run of this task, and r2m's reward
  costs next to nothing. None where it has a program of its own, as all have with labels, which not all can use."""
  return None if config.r2m.labels == "preference" else arm_of(config.variant)


def program_of(config):
  """The config of the variant whose program runs config.variant."""
  return with_variant(config, config.variant if shared_arm(config) is None else "r2m")


def make_programs(config, mesh, policy, reward) -> Programs:
  """Nothing is compiled before it is called. policy and reward say of what shape the arms start."""
  built = build(config, mesh, vocab_size=goldtask.VOCAB_SIZE)
  first = make_first_state(config, built)
  state = jax.eval_shape(first, jax.random.key(config.seed), policy, reward["backbone"], reward["phi"])
  step = make_gold_step(config, built, sharding.shardings(state, mesh))
  return Programs(built, first, step, make_sampler(config, built))


def run_arm(config, programs: Programs, workdir: Path, policy, reward) -> None:
  """RL for one variant, from the shared starting policy and reward model or from the arm's newest checkpoint."""
  arm, built, shared = config.variant, programs.built, shared_arm(config)
  checkpoints = checkpoint.open_checkpoints(workdir / "checkpoints" / arm, config.checkpoint)
  state = initial_state(config, built, policy, reward["backbone"], reward["phi"], make=programs.first)
  models = loop.models_of(state)
  state, fresh = loop.resume(config, checkpoints, state, models=models)
  if fresh and VARIANTS[arm].start == "head":
    like = shapes_of(state.reward_head)
    head = stage(
      workdir, "warm_start", like,
      lambda: do(head_job(config, built, policy, reward, state.reward_head), built, workdir),
    )
    state = warm(state, head)
  if int(state.step) == config.steps:
    return
  table = lambda when: table_rows(arm, when, *hosts.fetch(programs.sample(state, shared)))
  if fresh:
    append_samples(workdir, table("before"))

  def advance(state, t: int):
    prompts = rl_prompts(config, t)
    state, out = programs.step(state, prompts, shared)
    out = hosts.fetch(out)
    out = out.replace(metrics={name: value for name, value in out.metrics.items() if measured(name, arm)})
    metrics = out.metrics | gold_metrics(out, config.rollout.group_size)
    if t == 0:
      check_step_zero(metrics, sample_rounding(built.defs, config, state.ref, out.sequences), config)
    shown = dict(gold=metrics["reward/gold"], frozen=metrics["reward/frozen"], kl=metrics["kl"])
    return state, out, prompts.example_id, metrics, shown

  state = loop.run_steps(config, workdir, checkpoints, state, advance, models=models)
  append_samples(workdir, table("after"))


def rl_prompts(config, t: int):
  """The prompts of RL step t."""
  return goldtask.prompts(config.seed, STREAM_RL, t, config.rollout.prompts)


def make_gold_step(config, built: Build, layout):
  """Builds `step(state, prompts, arm)`: `make_step` for the gold-reward task, with None for variants without an `Arm`.

  Every process gives all prompts, as host arrays, and feeds its own.
  """
  own = lambda prompts: hosts.place(hosts.take(prompts, built.rows), built.rows)
  fixed = built.defs, config, built.mesh, (goldtask.EOS,), goldtask.PAD, layout
  if uses_labels(config):
    labelled = make_step(*fixed, gold_labeller(config))
    return lambda state, prompts, arm: labelled(state, own(prompts))
  step = make_step(*fixed, arms=True)
  return lambda state, prompts, arm: step(state, own(prompts), arm)


def gold_metrics(out, group_size: int) -> dict[str, float]:
  """What the gold reward says of a step's samples, measured on the host; nothing of it reaches training."""
  parts = goldtask.gold(out.sequences)
  return against_gold(parts.gold, out.judged.scores, group_size) | {
    "repetition": (parts.repeats / np.maximum(parts.length, 1)).mean(),
    "gold/coverage": parts.coverage.mean(),
    "gold/hallucinated": parts.hallucinated.mean(),
    "gold/chatter": parts.chatter.mean(),
  }


def against_gold(gold: np.ndarray, used: np.ndarray, group_size: int) -> dict[str, float | None]:
  """Mean gold of a step's samples, and how the reward that trained on them agrees with it within a prompt.

  gold, used: [B] each, the samples of a prompt beside each other.
  """
  gold, used = (np.asarray(x, float).reshape(-1, group_size) for x in (gold, used))
  rows = np.arange(len(gold))
  gap = gold[rows, used.argmax(-1)] - gold[rows, used.argmin(-1)]  # of the pair that the reward update would label
  centred_gold, centred_used = (x - x.mean(-1, keepdims=True) for x in (gold, used))
  norm = np.sqrt((centred_gold**2).sum() * (centred_used**2).sum())
  return {
    "reward/gold": gold.mean(),
    "reward/within_corr": (centred_gold * centred_used).sum() / norm if norm > 1e-12 else None,
    "r2m/pair_disagreement": np.where(gap == 0, 0.5, gap < 0).mean(),
  }


def make_sampler(config, built: Build):
  """Builds `sample(state, arm) -> (sequences, judged)`: one sample for each of a few fixed prompts."""
  count = config.log.samples
  prompts = goldtask.prompts(config.seed, STREAM_TABLE, 0, count)
  read, judge, omega_at = make_read(config), make_judge(built.defs, config), make_omega(config)

  @sharding.jit_on(built.mesh)
  def sample(state, arm):
    key = jax.random.fold_in(state.key, KEY_TABLE)
    sequences = generate(
      built.defs.open_policy(state.policy, state.ref), prompts, key, 0, group_size=1, eos_ids=(goldtask.EOS,),
      max_new_tokens=config.rollout.max_new_tokens, pad_id=goldtask.PAD, **sampling(config),
    )  # fmt: skip
    old, ref = read(built.defs.open_policy(state.policy, state.ref), built.defs.open_ref(state.ref), sequences)
    w = omega_at(state.step, measured_kl(old, ref, sequences))
    rows = sequences.tokens, sequences.token_mask
    return sequences, judge(state, w, sequences, old, ref, *rows, arm, sampled=count)[0]

  return sample


def table_rows(arm: str, when: str, sequences, judged) -> list[dict]:
  """Rows of samples.jsonl."""
  gold, width = goldtask.gold(sequences), sequences.response_mask.shape[1]
  return [
    {
      "arm": arm,
      "when": when,
      "prompt": goldtask.render(sequences.tokens[i, :-width], sequences.token_mask[i, :-width]),
      "response": goldtask.render(sequences.tokens[i, -width:], sequences.response_mask[i]),
      "reward": judged.scores[i],
      "frozen": judged.scores_frozen[i],
      "gold": gold.gold[i],
      "length": int(gold.length[i]),
      "truncated": bool(gold.truncated[i]),
    }
    for i in range(len(gold.gold))
  ]


def shapes_of(tree):
  """Shapes, dtypes and shardings of a tree of arrays."""
  return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), tree)


def warm(state, head):
  """The run's first state with a fitted head in place of the random one."""
  average = None if state.reward_average is None else jax.tree.map(jnp.copy, head)
  return state.replace(reward_head=head, reward_average=average)


def with_variant(config, variant: str):
  config = config.copy_and_resolve_references()
  config.variant = variant
  return config


def claim(config, workdir: Path) -> None:
  """Records the config in the workdir; refuses a workdir that another config has used, so nothing saved is lost.

  A new workdir with config.checkpoint.fork_from first takes over what that run has saved, and says what differs. With
  several processes the first one does it, and all must see the workdir.
  """
  hosts.on_first(lambda: claim_alone(config, workdir))
  hosts.require_shared(workdir)


def claim_alone(config, workdir: Path) -> None:
  """What the first process does of `claim`."""
  path, new, fork = workdir / "config.json", json.loads(config.to_json()), config.checkpoint.fork_from
  try:
    if path.exists():
      if changed := fixed_difference(path, new):
        raise ConfigError(
          f"{workdir} holds a run of another config; choose another --workdir, give the old values, or fork it with "
          f"another --workdir and --config.checkpoint.fork_from={workdir}:\n  " + "\n  ".join(changed)
        )
    elif fork:
      take_over(Path(fork).expanduser(), workdir, new)
    write_atomic(path, json.dumps(new, indent=2))
  except (OSError, ValueError) as error:
    if isinstance(error, ConfigError):
      raise
    raise ConfigError(f"--workdir={workdir} cannot be used: {error}; give one that can be written") from None


def with_date(config, workdir: Path):
  """The config with `data.date`: as given, else of the run in the workdir or of the one it forks, else today."""
  if config.data.date:
    return config

  def date() -> str:
    for folder in (workdir, Path(config.checkpoint.fork_from or workdir).expanduser()):
      if (folder / "config.json").is_file():
        return read_json(folder / "config.json").get("data", {}).get("date") or today()
    return today()

  config = config.copy_and_resolve_references()
  config.data.date = hosts.on_first(date)
  return config


def today() -> str:
  return datetime.date.today().isoformat()


def fixed_difference(path: Path, new: dict) -> list[str]:
  """What differs between a config.json and this config, of the settings that say what is computed."""
  saved = read_json(path)
  return difference(fixed(saved), fixed(new))


def take_over(old: Path, workdir: Path, new: dict) -> None:
  """Copies stages, the newest sound checkpoint of each arm, metrics and samples of another run; reads it alone."""
  if not (old / "config.json").is_file():
    raise ConfigError(f"config.checkpoint.fork_from is {str(old)!r}: there is no config.json, so no run to start from")
  if workdir.exists() and any(workdir.iterdir()):
    raise ConfigError(f"--workdir={workdir} is not empty: a fork needs a new one")
  if workdir.resolve().is_relative_to(old.resolve()):
    raise ConfigError(f"--workdir={workdir} lies in {old}, which the fork only reads: give one elsewhere")
  workdir.mkdir(parents=True, exist_ok=True)
  changed = fixed_difference(old / "config.json", new)
  print(f"fork     from {old}" + "".join(f"\n  {line}" for line in changed))
  for kind in ("stages", "checkpoints"):
    for folder in sorted((old / kind).glob("*")):
      steps = sorted((int(path.name) for path in folder.iterdir() if path.name.isdecimal()), reverse=True)
      step = next((step for step in steps if checkpoint.damage(folder / str(step)) is None), None)
      if step is not None:
        shutil.copytree(folder / str(step), workdir / kind / folder.name / str(step))
  for name in TAKEN_OVER:
    measured_anew = name == "budgets.json" and any("budget: " in line for line in changed)
    if (old / name).is_file() and not measured_anew:
      shutil.copyfile(old / name, workdir / name)


def stage(workdir: Path, name: str, like, make, *, frozen=None):
  """The result of a stage: read from the workdir where it was saved before, else made and saved.

  Args:
    like: shapes, dtypes and shardings of the result.
    make: () -> the result.
    frozen: a tree of arrays that the result only works with, such as the base of adapters; held to what it was.
  """
  checkpoints = checkpoint.open_checkpoints(workdir / "stages" / name, last=1)
  facts = {} if frozen is None else {"models": checkpoint.fingerprint(frozen)}
  if (step := checkpoint.newest(checkpoints)) is not None:
    checkpoint.require(checkpoints, step, **facts)
    print(f"{name}: done before, read from {workdir / 'stages' / name}")
    return checkpoint.restore(checkpoints, like)
  result = make()
  checkpoint.save(checkpoints, 0, result, facts=facts)
  checkpoint.wait(checkpoints)
  if hosts.first():
    shutil.rmtree(workdir / PARTIAL / name, ignore_errors=True)
  return result
