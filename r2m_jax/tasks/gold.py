"""A run of the gold-reward task: stages one after another (sft, reward, RL arms). Each is logged
and saved, and skipped if it was done before.
"""

import functools
import itertools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import jax
from jax.sharding import Mesh
from ml_collections import ConfigDict

from r2m_jax.algorithm.annotate import make_annotate
from r2m_jax.algorithm.read import make_read, measured_kl, sampling
from r2m_jax.algorithm.schedules import make_omega
from r2m_jax.algorithm.variants import VARIANTS, measured
from r2m_jax.config import check_batch
from r2m_jax.goldtask import formula
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
  certificate,
  fit_golden,
  fit_reward,
  fit_sft,
  head_job,
)
from r2m_jax.hf.folders import mesh_of
from r2m_jax.models.generate import generate
from r2m_jax.parallel import hosts, sharding
from r2m_jax.report import seeds
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
from r2m_jax.run.run import Run, Steps, Texts, train
from r2m_jax.run.workdir import SEEDS, claim, shapes_of, stage, warm, with_variant
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
  mesh = begin(config, workdir)
  if config.task == "r2m":
    for one, folder in seeds_of(config, workdir):
      if folder != workdir:
        claim(one, folder)
        print(f"r2m_jax  seed {one.seed}; writes {folder}")
      for each in runs(one, folder, mesh):
        train(each, folder)
  else:
    fitted(config, workdir, mesh, stage)
  hosts.on_first(lambda: report(config, workdir))


def seeds_of(config, workdir: Path) -> list[tuple[ConfigDict, Path]]:
  """(config, workdir) of each seed: the first in `workdir`, the others in WORKDIR/seeds/SEED."""
  found = [(config, workdir)]
  for seed in range(config.seed + 1, config.seed + config.seeds):
    one = config.copy_and_resolve_references()
    one.seed, one.seeds = seed, 1
    if old := config.checkpoint.fork_from:
      fork = Path(old).expanduser() / SEEDS / str(seed)
      one.checkpoint.fork_from = str(fork) if fork.exists() else ""
    found.append((one, workdir / SEEDS / str(seed)))
  return found


def report(config, workdir: Path) -> None:
  """Writes the report of a run; prints the summary and the paths of the files."""
  title, seed = f"R2M: {config.task}, {config.algorithm}", config.seed
  figures = f"figures  {workdir / 'figures'}"
  folders = [folder for _, folder in seeds_of(config, workdir)]
  if config.task != "r2m" or len(folders) == 1:
    conclude(workdir, f"{title}, seed {seed}", figures)
    return
  for further, folder in enumerate(folders[1:], seed + 1):
    write_report(folder, title=f"{title}, seed {further}")
  page = seeds.write_report(folders, title=f"{title}, seeds {seed} to {seed + len(folders) - 1}")
  print(seeds.format_summary(folders))
  print(f"report   {page}\n{figures}\nmetrics  {workdir / 'metrics.jsonl'}, {workdir / SEEDS}")


def begin(config, workdir: Path) -> Mesh:
  """Claims the workdir and prints the run's devices; returns the config's mesh."""
  mesh = mesh_of(config)
  check_batch(config, tuple(mesh.shape.values()))
  claim(config, workdir)
  formula.keep(config.gold.formula, workdir)
  devices = f"{mesh.size} {jax.devices()[0].platform} device(s) as {dict(mesh.shape)}"
  print(f"r2m_jax  {devices}, {config.dtype}; writes {workdir}")
  return mesh


def conclude(workdir: Path, title: str, *lines: str) -> None:
  """Writes the report; prints the summary and the paths of the files."""
  report = write_report(workdir, title=title)
  print(format_summary(summary_table(read_metrics(workdir))))
  print("\n".join([f"report   {report}", *lines, f"metrics  {workdir / 'metrics.jsonl'}"]))


def fitted(config, workdir: Path, mesh: Mesh, stage: Callable):
  """(build, policy, reward model) from which RL starts; for task=sft the reward model is None."""
  built, key = build(config, mesh, vocab_size=goldtask.VOCAB_SIZE), jax.random.key(config.seed)
  like = abstract(functools.partial(init_policy, config, built), mesh, key)
  policy = stage(workdir, "sft", like, lambda: fit_sft(config, built, workdir))
  if config.task == "sft":
    return built, policy, None
  like = abstract(functools.partial(init_reward_model, config, built), mesh, like, key)
  reward = stage(workdir, "reward", like, lambda: fit_reward(config, built, workdir, policy))
  return built, policy, reward


def runs(config, workdir: Path, mesh: Mesh, stage: Callable = stage) -> Iterator[Run]:
  """A Run of config.variant, or of each of config.arms if there is none.

  Args:
    stage: returns the result of a stage: `workdir.stage`, which computes missing ones, or
      `workdir.saved`, which only reads.
  """
  built, policy, reward = fitted(config, workdir, mesh, stage)
  if not (workdir / "checkpoints").exists():
    check_model(
      built.defs.policy,
      policy,
      config,
      vocab_size=built.arch.vocab_size,
      prompt_length=goldtask.PROMPT_LENGTH,
    )
  made: dict[str, Programs] = {}
  for variant in (config.variant,) if config.variant else config.arms:
    arm = with_variant(config, variant)
    program = program_of(arm)
    if program.variant not in made:
      made[program.variant] = make_programs(program, mesh, policy, reward)
    yield run_of(arm, made[program.variant], workdir, policy, reward, stage)


class Programs(NamedTuple):
  """The compiled programs that several arms share."""

  built: Build
  first: Callable  # of build.make_first_state
  step: Callable  # of make_gold_step
  sample: Callable  # of make_sampler
  evaluate: Evaluate | None  # None if config.eval.every is 0


def make_programs(config, mesh: Mesh, policy, reward) -> Programs:
  """The programs of `config`; each is compiled when it is first called. policy and reward define
  the shapes of the first state.
  """
  built = build(config, mesh, vocab_size=goldtask.VOCAB_SIZE)
  first = make_first_state(config, built)
  state = jax.eval_shape(
    first, jax.random.key(config.seed), policy, reward["backbone"], reward["phi"]
  )
  step = make_gold_step(config, built, sharding.shardings(state, mesh))
  evaluate = make_evaluate(config, built) if config.eval.every else None
  return Programs(built, first, step, make_sampler(config, built), evaluate)


def run_of(config, programs: Programs, workdir: Path, policy, reward, stage: Callable) -> Run:
  """The Run of config.variant, from the shared starting policy and reward model."""
  arm = config.variant
  built = programs.built
  shared = shared_arm(config)
  if VARIANTS[arm].start == "golden":
    proxy, like = reward, shapes_of(reward)
    reward = stage(
      workdir, "reward_golden", like, lambda: fit_golden(config, built, workdir, policy, proxy)
    )

  def first():
    start = policy, reward["backbone"], reward["phi"]
    state = initial_state(config, built, *start, make=programs.first)
    if state.certificate is None:
      return state

    like = {"root": shapes_of(state.certificate)}

    def make():
      found = certificate(config, built, policy, reward)
      return jax.device_put(found, {"root": state.certificate.sharding})

    return state.replace(certificate=stage(workdir, "certificate", like, make)["root"])

  def warm_start(state):
    def make():
      return do(head_job(config, built, policy, reward, state.reward_head), built, workdir)

    return warm(state, stage(workdir, "warm_start", shapes_of(state.reward_head), make))

  def steps(state):
    batches = ((rl_prompts(config, t), shared) for t in itertools.count(int(state.step)))
    return Steps(batches, programs.step, measure)

  def measure(t: int, state, out, batch):
    metrics = {name: value for name, value in out.metrics.items() if measured(name, arm)}
    metrics |= gold_metrics(out, config.rollout.group_size, config.gold.formula)
    if t == 0:
      rounding = sample_rounding(built.defs, config, state.ref, out.sequences)
      check_step_zero(metrics, rounding, config)
    shown = dict(gold=metrics["reward/gold"], frozen=metrics["reward/frozen"], kl=metrics["kl"])
    return metrics, shown

  def samples(state, when: str):
    drawn = hosts.fetch(programs.sample(state, shared))
    return table_rows(arm, when, *drawn, config.gold.formula)

  texts = Texts(
    read_tokens, functools.partial(tell, config.gold.formula), goldtask.WORDS.__getitem__
  )
  watch = Watch(config, workdir, programs.evaluate)
  return Run(config, built, first, warm_start, steps, samples, texts, watch=watch)


def read_tokens(out):
  """The reward model reads the policy's own tokens."""
  return out.sequences.tokens, out.sequences.token_mask


def tell(formula: str, out, row: int) -> dict:
  """The texts of a row, and the parts of its gold reward."""
  sequences, width = out.sequences, out.sequences.response_mask.shape[1]
  tokens, mask = sequences.tokens[row], sequences.token_mask[row]
  return {
    "prompt_text": goldtask.render(tokens[:-width], mask[:-width]),
    "response_text": goldtask.render(tokens[-width:], sequences.response_mask[row]),
    "gold": jax.tree.map(lambda x: float(x[row]), goldtask.gold(sequences, formula))._asdict(),
  }


def make_evaluate(config, built: Build) -> Evaluate:
  """Builds the evaluation of a run on separate prompts; gold is the task's gold reward."""
  prompts = goldtask.prompts(config.seed, STREAM_EVALUATION, 0, config.eval.prompts)
  draw = make_draw(config, built, (goldtask.EOS,), goldtask.PAD)
  frozen = make_frozen(config, built)
  asked = [goldtask.render(*row) for row in zip(prompts.tokens, prompts.mask)]

  def evaluate(state: TrainState) -> Evaluation:
    sequences, kl = draw(state, prompts)
    scores = {
      "gold": goldtask.gold(sequences, config.gold.formula).gold,
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
      repetition_stop=config.rollout.repetition_stop,
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


def table_rows(arm: str, when: str, sequences, judged, formula: str) -> list[dict]:
  """Rows of samples.jsonl."""
  gold, width = goldtask.gold(sequences, formula), sequences.response_mask.shape[1]
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
