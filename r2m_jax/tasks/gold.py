"""The run: stages one after another (sft, reward, RL arms), each logged, saved, and skipped
where done before.
"""

import functools
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import jax

from r2m_jax.algorithm.annotate import make_annotate
from r2m_jax.algorithm.read import make_read, measured_kl, sampling
from r2m_jax.algorithm.schedules import make_omega
from r2m_jax.algorithm.variants import VARIANTS, measured
from r2m_jax.config import ConfigError, check_batch
from r2m_jax.goldtask import task as goldtask
from r2m_jax.goldtask.rl import (
  gold_metrics,
  make_gold_step,
  program_of,
  reward_of,
  rl_prompts,
  shared_arm,
)
from r2m_jax.goldtask.stages import (
  STREAM_EVALUATION,
  STREAM_TABLE,
  fit_golden,
  fit_reward,
  fit_sft,
  head_job,
)
from r2m_jax.models.generate import generate
from r2m_jax.parallel import hosts, sharding
from r2m_jax.report.page import format_summary, summary_table, write_report
from r2m_jax.run.build import (
  KEY_TABLE,
  Build,
  abstract,
  build,
  init_policy,
  init_reward_model,
  initial_state,
  make_first_state,
)
from r2m_jax.run.fit import do
from r2m_jax.run.identities import check_model, check_step_zero, sample_rounding
from r2m_jax.run.metrics import read_metrics
from r2m_jax.run.run import Run, train
from r2m_jax.run.workdir import claim, shapes_of, stage, warm, with_variant
from r2m_jax.tasks.evaluation import (
  Evaluate,
  Evaluation,
  columns_of,
  evaluation,
  make_draw,
  make_frozen,
)
from r2m_jax.tasks.follow import Watch
from r2m_jax.types import Rollout, TrainState


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
    reward_like = abstract(
      functools.partial(init_reward_model, config, built), mesh, policy_like, key
    )
    reward = stage(
      workdir, "reward", reward_like, lambda: fit_reward(config, built, workdir, policy)
    )
  if config.task == "r2m":
    if not (workdir / "checkpoints").exists():
      check_model(
        built.defs.policy,
        policy,
        vocab_size=built.arch.vocab_size,
        dtype=config.dtype,
        temperature=config.rollout.temperature,
      )
    programs = {}
    for variant in (config.variant,) if config.variant else config.arms:
      arm = with_variant(config, variant)
      program = program_of(arm)
      if program.variant not in programs:
        programs[program.variant] = make_programs(program, mesh, policy, reward)
      built, start = programs[program.variant].built, reward
      if VARIANTS[variant].start == "golden":
        start = stage(
          workdir,
          "reward_golden",
          reward_like,
          lambda: fit_golden(arm, built, workdir, policy, reward),
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
  evaluate: Evaluate | None  # None if config.eval.every is 0


def make_programs(config, mesh, policy, reward) -> Programs:
  """Nothing is compiled before it is called. policy and reward say of what shape the arms start."""
  built = build(config, mesh, vocab_size=goldtask.VOCAB_SIZE)
  first = make_first_state(config, built)
  state = jax.eval_shape(
    first, jax.random.key(config.seed), policy, reward["backbone"], reward["phi"]
  )
  step = make_gold_step(config, built, sharding.shardings(state, mesh))
  evaluate = make_evaluate(config, built) if config.eval.every else None
  return Programs(built, first, step, make_sampler(config, built), evaluate)


def run_arm(config, programs: Programs, workdir: Path, policy, reward) -> None:
  """RL for one variant, from the shared starting policy and reward model or from the arm's
  newest checkpoint.
  """
  arm, built, shared = config.variant, programs.built, shared_arm(config)

  def first():
    return initial_state(
      config, built, policy, reward["backbone"], reward["phi"], make=programs.first
    )

  def warm_start(state):
    def make():
      return do(head_job(config, built, policy, reward, state.reward_head), built, workdir)

    return warm(state, stage(workdir, "warm_start", shapes_of(state.reward_head), make))

  def advance(state, t: int):
    prompts = rl_prompts(config, t)
    state, out = programs.step(state, prompts, shared)
    out = hosts.fetch(out)
    out = out.replace(
      metrics={name: value for name, value in out.metrics.items() if measured(name, arm)}
    )
    metrics = out.metrics | gold_metrics(out, config.rollout.group_size)
    if t == 0:
      check_step_zero(
        metrics, sample_rounding(built.defs, config, state.ref, out.sequences), config
      )
    shown = dict(gold=metrics["reward/gold"], frozen=metrics["reward/frozen"], kl=metrics["kl"])
    return state, out, prompts.example_id, metrics, shown

  def samples(state, when: str):
    return table_rows(arm, when, *hosts.fetch(programs.sample(state, shared)))

  watch = Watch(config, workdir, programs.evaluate)
  run = Run(first, warm_start, lambda state: advance, samples, watch=watch)
  train(run, config, workdir)


def make_evaluate(config, built: Build) -> Evaluate:
  """Builds the evaluation of a run on prompts of their own; gold is the task's."""
  prompts = goldtask.prompts(config.seed, STREAM_EVALUATION, 0, config.eval.prompts)
  draw = make_draw(config, built, (goldtask.EOS,), goldtask.PAD)
  frozen = make_frozen(config, built)
  asked = [goldtask.render(*row) for row in zip(prompts.tokens, prompts.mask)]

  def evaluate(state: TrainState) -> Evaluation:
    sequences, kl = draw(state, prompts)
    scores = {
      "gold": goldtask.gold(sequences).gold,
      "frozen": frozen(state, sequences.tokens, sequences.token_mask),
    }
    width = sequences.response_mask.shape[1]
    texts = [
      goldtask.render(tokens[-width:], used)
      for tokens, used in zip(sequences.tokens, sequences.response_mask)
    ]
    return evaluation(config, columns_of(sequences, kl, scores), asked, texts)

  return evaluate


def make_sampler(config, built: Build):
  """Builds `sample(state, arm) -> (sequences, judged)`: one sample for each of a few fixed
  prompts.
  """
  count = config.log.samples
  prompts = goldtask.prompts(config.seed, STREAM_TABLE, 0, count)
  read, omega_at = make_read(config), make_omega(config)

  @sharding.jit_on(built.mesh)
  def sample(state, arm):
    key = jax.random.fold_in(state.key, KEY_TABLE)
    sequences = generate(
      built.defs.open_policy(state.policy, state.ref),
      prompts,
      key,
      0,
      group_size=1,
      eos_ids=(goldtask.EOS,),
      max_new_tokens=config.rollout.max_new_tokens,
      pad_id=goldtask.PAD,
      **sampling(config),
    )
    old, ref = read(
      built.defs.open_policy(state.policy, state.ref), built.defs.open_ref(state.ref), sequences
    )
    w = omega_at(state.step, measured_kl(old, ref, sequences))
    annotate = make_annotate(built.defs, config, reward_of(built.defs, arm))
    return sequences, annotate(state, w, Rollout(sequences), old, ref)[0]

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
