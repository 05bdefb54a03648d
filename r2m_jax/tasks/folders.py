"""Runs from Hugging Face folders to Hugging Face folders: task = sft, reward and r2m.

Policy and reward model may have different families, sizes and tokenizers. A step then has two
programs, step = learn ∘ rollout, with the code of the fused step. Between them the host renders the
responses for the reward model. If both models render alike, config.reward.input can let the reward
model read the policy's own tokens. The host then renders nothing, and with one share of packing a
step is the fused one.
"""

import dataclasses
import functools
import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec

from r2m_jax.algorithm.advantages import ESTIMATORS
from r2m_jax.algorithm.annotate import is_given
from r2m_jax.algorithm.labels import Labeller, uses_labels
from r2m_jax.algorithm.optim import make_optimizer
from r2m_jax.algorithm.packed import (
  make_needed,
  make_needed_by_policy,
  needed_by_rows,
  smallest,
)
from r2m_jax.algorithm.read import closed, split_rows
from r2m_jax.algorithm.variants import VARIANTS
from r2m_jax.config import ConfigError, check_evaluation, check_function
from r2m_jax.data.batches import Stream
from r2m_jax.data.datasets import (
  PromptData,
  batch_of,
  enough,
  evaluation_prompts,
  judged_pairs,
  judgments_labeller,
  longest_inputs,
  packed_lines,
  pairs,
  prompt_data,
  sft_rows,
  take_pairs,
  warn_of_lengths,
)
from r2m_jax.data.text import Renderer, bucket, pad_left, responses_of
from r2m_jax.data.tokens import Differs, own_ending, recoded
from r2m_jax.hf import export
from r2m_jax.hf.folders import (
  RENDERER,
  FolderError,
  Policy,
  RewardModel,
  load_policy,
  load_reward,
  reward_start,
)
from r2m_jax.hf.peft import load_peft
from r2m_jax.models import lora
from r2m_jax.parallel import hosts, sharding
from r2m_jax.parallel.sharding import on_mesh
from r2m_jax.run.build import Build, build, init_adapters, initial_state
from r2m_jax.run.files import read_json, write_atomic
from r2m_jax.run.fit import (
  Timed,
  do,
  epochs_of_rows,
  fit,
  reward_loss,
  sft_loss,
  steps_within,
  warm_job,
)
from r2m_jax.run.identities import check_model, check_step_zero, sample_rounding
from r2m_jax.run.loop import fingerprint
from r2m_jax.run.metrics import append_samples
from r2m_jax.run.progress import doing, progress
from r2m_jax.run.run import Run, Steps, Texts, train
from r2m_jax.run.speed import phase
from r2m_jax.run.workdir import shapes_of, stage, warm, with_variant
from r2m_jax.step import (
  StepOutput,
  jit_step,
  make_learn_at,
  make_rollout,
  make_step,
  with_ending,
)
from r2m_jax.tasks import export as export_task
from r2m_jax.tasks.evaluation import load_gold, make_evaluate
from r2m_jax.tasks.follow import Watch as Follow
from r2m_jax.tasks.gold import begin, conclude
from r2m_jax.tasks.labels import judge_labeller
from r2m_jax.tasks.rewards import Function, OutsideReward, by_function, by_server
from r2m_jax.types import Given, Rollout, Rows

Reward = RewardModel | OutsideReward
Watch = Callable[[int, StepOutput, list[tuple[Any, str, bool]]], dict[str, float | None]]


def run(config, workdir: Path, rewards: Function | None = None) -> None:
  """Runs `config.task` from the folders config.policy.path and config.reward.path; writes
  WORKDIR/export.

  Args:
    rewards: in task=r2m, scores the samples instead of a reward model; see `runs`.
  """
  if config.task not in ("sft", "reward", "r2m"):
    raise ConfigError(
      f"config.task is {config.task!r}: from a folder it is one of sft, reward, r2m; choose one"
    )
  mesh = begin(config, workdir)
  if config.task == "sft":
    run_sft(config, workdir, mesh)
  if config.task == "reward":
    run_reward(config, workdir, mesh)
  if config.task == "r2m":
    for each in runs(config, workdir, mesh, rewards=rewards):
      train(each, workdir)
  title = f"R2M: {config.task} from {config.policy.path or config.reward.path}"
  hosts.on_first(lambda: conclude(workdir, title, f"models   {workdir / 'export'}"))


def budgeted(workdir: Path, stage: str, seconds: float, measure) -> int:
  """The number of steps for a time budget, measured once in a workdir."""
  path = workdir / export_task.BUDGETS
  saved = hosts.on_first(lambda: read_json(path) if path.exists() else {})
  if stage not in saved:
    saved[stage] = hosts.from_first(
      measure(seconds)
    )  # every process has measured with its own clock
    write_atomic(path, json.dumps(saved))
  return saved[stage]


def fit_stage(
  workdir: Path,
  name: str,
  settings,
  steps: int,
  built: Build,
  loss_fn,
  start,
  frozen,
  dataset,
  collate,
):
  """`fit` from `start` as the stage `name`, cached, for `steps` updates or for settings.budget
  seconds.
  """
  own = dataset.map(
    lambda rows: hosts.take(rows, built.rows)
  )  # the same order for any number of processes

  def batches():
    return Stream(own, collate)

  if settings.budget:
    probe = dict(batch_sharding=built.rows, frozen=frozen)

    def measure(seconds):
      return steps_within(seconds, loss_fn, start, batches(), **probe)

    steps = budgeted(workdir, name, settings.budget, measure)

  def make():
    return fit(
      loss_fn,
      start,
      make_optimizer(settings, steps),
      batches(),
      total=steps,
      stage=name,
      workdir=workdir,
      state_shardings=sharding.shardings(start, built.mesh),
      batch_sharding=built.rows,
      frozen=frozen,
      budget=settings.budget,
      settings=settings,
    )

  return stage(workdir, name, shapes_of(start), make, frozen=frozen)


def build_lora(config, mesh, **archs) -> Build:
  """`build`; a pattern that matches no linear layer is a ConfigError."""
  try:
    return build(config, mesh, **archs)
  except ValueError as error:
    raise ConfigError(error) from None


def start_adapters(built: Build, policy: Policy, fresh):
  """The adapters from which training starts: new ones, or a PEFT folder's."""
  if policy.adapter is None:
    return fresh
  assert built.lora is not None  # load_policy requires it
  return load_peft(policy.adapter, built.arch, built.lora, fresh)


# ---- sft ----


def run_sft(config, workdir: Path, mesh, *, name: str = "sft", out: Path | None = None) -> None:
  """Minimises the negative log-likelihood of the responses, or of whole packed dialogues; writes
  the policy to `out`.

  Args:
    name: of the stage, in metrics and on disk.
    out: None: WORKDIR/export/policy.
  """
  settings = config.sft
  policy = load_policy(config.policy.path, config, mesh, workdir=workdir, training=True)
  dataset, collate = (packed_lines if config.data.pack else sft_rows)(
    config, policy.tokenizer, workdir, name
  )
  built = build_lora(config, mesh, arch=policy.arch)
  start, frozen = policy.state, None
  loss = loss_fn = sft_loss(built.defs.policy, chunk=config.logits_chunk)
  if built.lora:
    start, frozen = start_adapters(built, policy, init_adapters(config, built, mesh)), policy.state

    def loss_fn(state, batch, base):
      return loss(nnx.merge_state(state, base), batch)

  state = fit_stage(
    workdir, name, settings, settings.steps, built, loss_fn, start, frozen, dataset, collate
  )
  export.write_policy(out or workdir / "export/policy", config, policy, state, workdir, base=frozen)


# ---- reward ----


def run_reward(config, workdir: Path, mesh, *, out: Path | None = None) -> None:
  """Fits Bradley-Terry on pairs, from a reward model or from a policy without a score head; writes
  the reward model to `out`.
  """
  settings = config.reward
  source = config.reward.path or config.policy.path
  reward = load_reward(source, config, mesh, from_policy=True, workdir=workdir)
  if reward.head is not None:
    raise FolderError(
      f"{reward.folder} is an R2M reward model, and task=reward trains models that read no "
      "policy; give a reward model without a head, or a policy"
    )
  hold_contract(workdir, reward.renderer)
  dataset, collate, count = pairs(config, reward.renderer, workdir)
  built = build_lora(config, mesh, arch=reward.arch, reward_arch=reward.arch)
  start, frozen = reward_start(reward, mesh), None
  loss = loss_fn = reward_loss(
    built.defs.policy if built.lora else built.defs.reward_backbone, built.defs.phi
  )
  if built.lora:
    start, frozen = {**start, "backbone": init_adapters(config, built, mesh)}, start["backbone"]

    def loss_fn(state, batch, base):
      return loss({**state, "backbone": nnx.merge_state(state["backbone"], base)}, batch)

  steps = settings.epochs * (count // settings.batch_size)
  model = fit_stage(
    workdir, "reward", settings, steps, built, loss_fn, start, frozen, dataset, collate
  )
  backbone = lora.merged(model["backbone"], frozen, built.lora) if built.lora else model["backbone"]
  export.write_reward(
    out or workdir / "export/reward", config, reward, backbone, model["phi"], workdir
  )


def hold_contract(workdir: Path, renderer: Renderer) -> None:
  """Stores the renderer's contract with the run's checkpoints; a resumed run with another contract
  is refused.
  """
  path = workdir / RENDERER
  if path.exists():
    renderer.require(read_json(path), workdir)
  else:
    write_atomic(path, json.dumps(renderer.contract, indent=2))


# ---- r2m ----


def run_r2m(
  config, workdir: Path, mesh, *, out: Path | None = None, watch: Watch | None = None
) -> None:
  """Trains all of `runs`."""
  for each in runs(config, workdir, mesh, out=out, watch=watch):
    train(each, workdir)


def runs(
  config,
  workdir: Path,
  mesh,
  stage: Callable = stage,
  *,
  out: Path | None = None,
  watch: Watch | None = None,
  rewards: Function | None = None,
) -> Iterator[Run]:
  """RL on prompts: a Run of config.variant (exported to `out`, or WORKDIR/export) or of each of
  config.arms (exported to a folder in it).

  Args:
    stage: returns the result of a stage: `workdir.stage`, which computes missing ones, or
      `workdir.saved`, which only reads.
    watch: (step number, the step's output on the host, its samples as (prompt, response,
      truncated)) -> more metrics for its row. They never reach training.
    rewards: (prompts, responses) -> a finite score for each, instead of a reward model. It is not
      part of the config, so a resumed run must pass the same function.
  """
  policy, reward = load_models(config, workdir, mesh, rewards)
  built = build_run(config, mesh, policy, reward)
  data = prompt_data(config, policy.tokenizer, workdir)
  warn_of_lengths(config, data, policy.tokenizer, renderer_of(reward))
  reward = as_it_reads(config, policy, reward, data)
  if isinstance(reward, RewardModel):
    longest = max(longest_inputs(config, data, reward.renderer))
    reward = dataclasses.replace(reward, row_length=bucket(longest))
  follow = follow_of(config, policy, reward, data, mesh, workdir)
  if not (workdir / "checkpoints").exists():
    with doing("checking the policy against its KV cache"):
      check_model(
        built.defs.base or built.defs.policy,
        policy.state,
        config,
        vocab_size=policy.arch.vocab_size,
        prompt_length=data.length,
      )
  arms = (config.variant,) if config.variant else tuple(config.arms)
  if config.budget:
    probed = with_variant(config, arms[-1])
    probe = build_run(probed, mesh, policy, reward)

    def measure(seconds):
      return rl_steps_within(seconds, probed, probe, policy, reward, data, workdir)

    config = with_variant(config, config.variant)
    config.steps = budgeted(workdir, "rl", config.budget, measure)
  for i, variant in enumerate(arms):
    folder = (out or workdir / "export") / ("" if config.variant else variant)
    last, arm = i == len(arms) - 1, with_variant(config, variant)
    built = build_run(arm, mesh, policy, reward)
    watches = dict(watch=watch, follow=follow(arm, built))
    yield run_of(arm, built, workdir, policy, reward, data, folder, stage, donate=last, **watches)


def build_run(config, mesh, policy: Policy, reward: Reward) -> Build:
  """`build_lora` for a policy and its reward."""
  reward_arch = reward.arch if isinstance(reward, RewardModel) else None
  return build_lora(config, mesh, arch=policy.arch, reward_arch=reward_arch)


def renderer_of(reward: Reward) -> Renderer | None:
  """The reward model's renderer; None if there is no reward model."""
  return reward.renderer if isinstance(reward, RewardModel) else None


def load_models(
  config, workdir: Path, mesh, rewards: Function | None = None
) -> tuple[Policy, Reward]:
  """The policy and the reward of RL; raises an error if the config requires something that they do
  not have.
  """
  if rewards is not None:
    check_function(config)
  if config.policy.path and (rewards is not None or config.reward.url):
    policy = load_policy(config.policy.path, config, mesh, workdir=workdir, training=True)
    check_feedback_layer(config, policy)
    if rewards is not None:
      return policy, by_function(rewards, config)
    return policy, by_server(config, "reward", workdir)
  if not (config.policy.path and config.reward.path):
    missing = "reward.path" if config.policy.path else "policy.path"
    raise FolderError(
      f"config.{missing} is empty: task=r2m from folders needs a policy and a reward model; "
      "give both, or a served reward as config.reward.url"
    )
  policy = load_policy(config.policy.path, config, mesh, workdir=workdir, training=True)
  reward = load_reward(config.reward.path, config, mesh, workdir=workdir)
  hold_contract(workdir, reward.renderer)
  same_tokens = policy.tokenizer.hf.get_vocab() == reward.renderer.tokenizer.hf.get_vocab()
  has_critic = ESTIMATORS[config.algorithm].baseline == "critic"
  if has_critic and config.critic.init == "reward" and not same_tokens:
    raise ConfigError(
      "config.critic.init is 'reward': the critic reads the policy's tokens, and this reward "
      "model has its own tokenizer; use 'policy'"
    )
  if has_critic and config.critic.init == "reward" and reward.arch.score_width:
    raise ConfigError(
      "config.critic.init is 'reward': a critic has one linear layer, and the score head of this "
      "reward model has two; use 'policy'"
    )
  check_feedback_layer(config, policy)
  return policy, reward


def as_it_reads(config, policy: Policy, reward: Reward, data: PromptData) -> Reward:
  """The reward, with `ending` if the reward model reads the policy's own tokens; prints which.

  Raises:
    ConfigError: config.reward.input is "tokens", and the two models do not render alike.
  """
  if config.reward.input == "text" or isinstance(reward, OutsideReward):
    return reward
  longest = config.rollout.max_new_tokens
  renderer = reward.renderer
  try:
    with doing("comparing how policy and reward model render"):
      ending = own_ending(policy.tokenizer, renderer, data.prompts, data.ids, longest)
  except Differs as why:
    if config.reward.input == "tokens":
      raise ConfigError(
        "config.reward.input is 'tokens': the reward model does not read what the policy reads, "
        f"since {why}; set it to 'auto' or 'text'"
      ) from None
    print(f"rewards  by text, rendered for the reward model: {why}")
    return reward
  closing = repr(renderer.tokenizer.hf.decode(ending)) if ending else "nothing"
  print(f"rewards  the policy's own tokens; a finished response ends with {closing}")
  return dataclasses.replace(reward, ending=ending)


def check_feedback_layer(config, policy: Policy) -> None:
  """Raises ConfigError unless the policy has the layer whose states are fed back."""
  layers = policy.arch.num_layers
  if not -layers <= config.r2m.feedback_layer < layers:
    raise ConfigError(
      f"config.r2m.feedback_layer is {config.r2m.feedback_layer}: the policy has {layers} layers; "
      f"give a number from {-layers} to {layers - 1}"
    )


def follow_of(
  config, policy: Policy, reward: Reward, data: PromptData, mesh, workdir: Path
) -> Callable[..., Follow]:
  """Builds `follow(arm's config, its Build)`: the evaluation of an arm, which may end it early."""
  check_evaluation(config)
  if not config.eval.every:
    return lambda arm, built: Follow(arm, workdir)
  held_out = evaluation_prompts(config, policy.tokenizer, workdir, data)
  in_url = config.eval.gold.url
  gold = by_server(config, "eval.gold", workdir) if in_url else load_gold(config, mesh)
  if gold is not None:
    print((renderer_of(gold) or gold).describe(held_out.prompts[0], "yes"))

  def follow(arm, built: Build) -> Follow:
    proxy = renderer_of(reward) or reward
    evaluate = make_evaluate(arm, built, policy, proxy, held_out, gold, prompt_text)
    return Follow(arm, workdir, evaluate)

  return follow


def rl_steps_within(
  seconds: float, config, built: Build, policy: Policy, reward: Reward, data, workdir: Path
) -> int:
  """The number of RL steps that take about `seconds`, without compilation; times three steps and
  prints the rate.
  """
  state, times = start_state(config, built, policy, reward, donate=False), []
  labeller = labeller_of(config, policy, reward, data, workdir)
  layout = sharding.shardings(state, built.mesh)
  step = make_folder_step(config, built, policy, reward, layout, labeller)
  with progress(3, "rate", doing="compiling, then the first step") as bar:
    for t in range(3):
      began, index = time.perf_counter(), data.order[t]
      state, output, _ = step(
        state, batch_of(data, index, policy.tokenizer), [data.prompts[i] for i in index]
      )
      jax.block_until_ready((state, output))
      times.append(time.perf_counter() - began)
      bar.update()
  each = sum(times[1:]) / 2
  steps = max(1, int(seconds / each))
  print(
    f"rate     {each:.2f} s an RL step, measured in {sum(times):.0f} s: {steps} steps in a budget "
    f"of {seconds:g} s"
  )
  return steps


def labeller_of(
  config, policy: Policy, reward: Reward, data: PromptData, workdir: Path
) -> Labeller | None:
  """The labeller of the reward update's pairs, if the run uses real labels: a judge, or the file of
  judgments.
  """
  if not uses_labels(config):
    return None
  assert isinstance(reward, RewardModel)  # a reward from outside is not trained
  if config.r2m.judge_url:

    def prompts_at(step):
      return [data.prompts[i] for i in data.order[step]]

    length = reward.row_length
    return judge_labeller(config, policy.tokenizer, reward.renderer, prompts_at, workdir, length)
  return judgments_labeller(
    config, judged_pairs(config, policy.tokenizer, reward.renderer, workdir)
  )


def make_folder_step(config, built: Build, policy: Policy, reward: Reward, layout, labeller=None):
  """Builds `step(state, prompts, texts) -> (state, output, seen)`; `rows_of` makes rows of what is
  seen. `texts` are the prompts as the rows of the data give them. The state is donated.
  """
  ending, K = ending_of(reward), config.rollout.group_size
  if ending is None:
    return make_two_part_step(config, built, policy, reward, layout, labeller)
  ends = policy.tokenizer.eos_ids, policy.tokenizer.pad_id
  if len(config.packing) == 1:
    whole = make_step(built.defs, config, built.mesh, *ends, layout, labeller, ending)
  else:
    whole = make_packed_step(config, built, ends, ending, layout, labeller)

  def step(state, prompts, texts):
    state, out = whole(state, hosts.place(hosts.take(prompts, built.rows), built.rows))
    return state, out, [text for text in texts for _ in range(K)]

  return step


def make_packed_step(
  config, built: Build, ends: tuple, ending: tuple[int, ...], layout, labeller=None
):
  """`make_step` for several shares of packing, with the same arguments and results, but for `ends`,
  its eos_ids and pad_id. The host chooses the share, so a share is compiled once a step needs it: one
  program for all of them would take as long to compile as each together.
  """
  draw = make_rollout(built.defs, config, built.mesh, *ends)
  needed = make_needed(built.defs, config)
  learn, labelled = make_learn_shares(config, built, layout), uses_labels(config)

  def drawn_and_read(state, prompts):
    drawn = draw(state, prompts)
    read = with_ending(drawn, ending)
    return (drawn, read), needed(state, drawn, read)

  rollout = jit_rollout(built, drawn_and_read)

  def step(state, prompts):
    with phase("rollout"):
      (drawn, read), need = jax.block_until_ready(rollout(state, prompts))
    pairs = (labeller(hosts.fetch(drawn.samples), int(state.step)),) if labelled else ()
    with phase("learn"):
      return learn(float(need), state, drawn, read, *pairs)

  return step


def jit_rollout(built: Build, f: Callable) -> Callable:
  """Jits f(state, prompts) -> (batches of rows, the share of packing that they need)."""
  whole = NamedSharding(built.mesh, PartitionSpec())
  return jax.jit(on_mesh(built.mesh, f), out_shardings=(built.rows, whole))


def make_learn_shares(config, built: Build, layout) -> Callable:
  """Builds `learn(need, state, drawn, read, *pairs)`: it runs the program of the smallest share of
  config.packing that is at least `need`. The state is donated.
  """
  labelled = uses_labels(config)
  learns = [
    jit_step(on_mesh(built.mesh, make_learn_at(share, built.defs, config)), layout, 2 + labelled)
    for share in config.packing
  ]

  def learn(need: float, state, drawn, read, *pairs):
    return learns[smallest(config.packing, need)](state, drawn, read, *pairs)

  return learn


def ending_of(reward: Reward) -> tuple[int, ...] | None:
  """What the reward model reads after a response that ended, if it reads the policy's own tokens;
  None if it reads text, or is no model.
  """
  return reward.ending if isinstance(reward, RewardModel) else None


def rows_of(policy: Policy, reward: Reward, output: StepOutput, seen: list) -> list:
  """A step's samples as (prompt, answer, whether it was cut off).

  Args:
    output: of the step, on the host.
    seen: what the step gave beside it: these rows, or the prompt of each if the step made no text.
  """
  if ending_of(reward) is None:
    return seen
  answers = responses_of(output.sequences, policy.tokenizer)
  return [(p, policy.tokenizer.whole(p, text), cut) for p, (text, cut) in zip(seen, answers)]


def make_two_part_step(config, built: Build, policy: Policy, reward: Reward, layout, labeller=None):
  """Builds `step(state, prompts, texts) -> (state, output, reward-model text of row 0)`; the state
  is donated.

  `texts` are the prompts as in the rows, for the reward model's own rendering.
  """
  K = config.rollout.group_size
  tokenizer = policy.tokenizer
  read_rows = make_read_rows(reward)
  outside = isinstance(reward, OutsideReward)
  draw = make_rollout(built.defs, config, built.mesh, tokenizer.eos_ids, tokenizer.pad_id)
  by_policy = make_needed_by_policy(built.defs, config)
  learn, labelled = make_learn_shares(config, built, layout), uses_labels(config)

  def drawn_and_needed(state, prompts):
    drawn = draw(state, prompts)
    return drawn, by_policy(state, drawn) if len(config.packing) > 1 else jnp.float32(0)

  rollout = jit_rollout(built, drawn_and_needed)

  def answered(sequences, texts):
    """(prompt, answer, whether it was cut off) of this process's rows; `texts` has those of all
    rows. A reward from outside is called once for all rows.
    """
    count = len(sequences.tokens)
    mine = range(count) if outside else hosts.rows_of(built.rows, count).tolist()
    answers = responses_of((hosts.fetch if outside else hosts.local)(sequences), tokenizer)
    return [
      (texts[i], tokenizer.whole(texts[i], text), cut) for i, (text, cut) in zip(mine, answers)
    ]

  def step(state, prompts, texts):
    with phase("rollout"):
      drawn, need = rollout(state, hosts.place(hosts.take(prompts, built.rows), built.rows))
      samples = answered(drawn.samples, [text for text in texts for _ in range(K)])
      greedy = [] if drawn.greedy is None else answered(drawn.greedy, texts)
    with phase("render"):
      read = split_rows(read_rows(samples + greedy), len(samples))
    if outside:
      read = hosts.take(read, built.rows)
    pairs = (labeller(hosts.fetch(drawn.samples), int(state.step)),) if labelled else ()
    need = max(float(need), needed_by_reward(config, built, read))
    read = hosts.place(read, built.rows)
    with phase("learn"):
      state, out = learn(need, state, drawn, read, *pairs)
    return state, out, samples

  return step


def needed_by_reward(config, built: Build, read: Rollout) -> float:
  """The share of packing that the reward model's own rows need; 0 for scores from outside.

  Args:
    read: this process's `Rows`, or all scores.
  """
  if is_given(read) or len(config.packing) == 1:
    return 0.0
  masks = [rows.mask for rows in (read.samples, read.greedy) if rows is not None]
  own = [mask.sum(-1, dtype=np.int32) for mask in masks]
  lengths = np.concatenate(hosts.fetch(hosts.place(own, built.rows)))
  return float(on_mesh(built.mesh, needed_by_rows)(lengths, masks[0].shape[1], config))


def make_read_rows(reward: Reward) -> Callable[[list[tuple[Any, str, bool]]], Rows | Given]:
  """Builds `read_rows(rows)`: from rows (prompt, answer, whether it was cut off) to the step's
  arguments: tokens for the reward model, or scores.
  """
  if isinstance(reward, OutsideReward):
    return lambda rows: Given(reward.scores(rows))
  renderer = reward.renderer

  def read_rows(rows):
    ids = [renderer.ids(prompt, text, truncated=truncated) for prompt, text, truncated in rows]
    length = hosts.largest(max(bucket(max(map(len, ids))), reward.row_length))
    return Rows(*pad_left(ids, renderer.tokenizer.pad_id, length))

  return read_rows


def run_of(
  config,
  built: Build,
  workdir: Path,
  policy: Policy,
  reward: Reward,
  data: PromptData,
  out: Path,
  stage: Callable,
  *,
  donate: bool,
  follow: Follow,
  watch: Watch | None = None,
) -> Run:
  """The Run of config.variant, from the folders' models; it exports both models at the end."""

  def first():
    return start_state(config, built, policy, reward, donate=donate)

  def warm_up(state):
    assert isinstance(reward, RewardModel)
    pairs = judged_pairs(config, policy.tokenizer, reward.renderer, workdir)
    return warm_start(config, built, workdir, state, pairs, stage)

  def batch(index):
    return batch_of(data, index, policy.tokenizer), [data.prompts[i] for i in index]

  def steps(state):
    labeller = labeller_of(config, policy, reward, data, workdir)
    layout = sharding.shardings(state, built.mesh)
    step = make_folder_step(config, built, policy, reward, layout, labeller)
    # a step takes one batch, so the data resumes at the saved step
    order = Timed(Stream(data.order, start=int(state.step)))
    return Steps(map(batch, order), step, functools.partial(measure, order))

  def measure(order, t: int, state, output, batch, seen):
    rows = rows_of(policy, reward, output, seen) if watch or t == 0 else []
    if t == 0:
      rounding = sample_rounding(built.defs, config, state.ref, output.sequences)
      check_step_zero(output.metrics, rounding, config, continued=policy.adapter is not None)
      print(described(reward, output, rows))
    ends = t == config.steps - 1 or bool(follow.kl_reached(output.metrics["kl"], t + 1))
    if t == 0 or ends:
      when = "before" if t == 0 else "after"
      append_samples(workdir, samples(config, output, batch[1], policy, when))
    metrics = output.metrics | {"data/wait": order.waiting_share()}
    metrics |= watch(t, output, rows) if watch else {}
    return metrics, dict(reward=metrics["reward/used"], kl=metrics["kl"])

  in_folder = reward if isinstance(reward, RewardModel) else None

  def end(state):
    export.write_run(out, config, policy, in_folder, state, workdir)

  texts = in_folder and texts_of(policy, in_folder)
  ids = fingerprint(data.ids)
  return Run(config, built, first, warm_up, steps, texts=texts, end=end, watch=follow, data=ids)


def described(reward: Reward, output: StepOutput, rows: list) -> str:
  """What the reward reads of the first sample, and whether the samples' text would give other ids."""
  if ending_of(reward) is None:
    return (renderer_of(reward) or reward).describe(*rows[0])
  tokens, mask = tokens_read(reward, output)
  read = [row[keep].tolist() for row, keep in zip(tokens, mask)]
  hf, others = reward.renderer.tokenizer.hf, recoded(reward.renderer, rows, read)
  return (
    f"rewards  {reward.renderer.tokenizer.source}: the policy's own tokens\n"
    f"sample   {len(read[0])} tokens: {hf.decode(read[0])!r}\n"
    f"note     the text of {others} of {len(read)} samples would be encoded to other tokens than "
    "those that were sampled and are read"
  )


def tokens_read(reward: RewardModel, output: StepOutput) -> tuple[np.ndarray, np.ndarray]:
  """The policy's tokens as the reward model reads them: i32[B, L] and their mask."""
  rows = jax.device_get(closed(output.sequences, reward.ending))
  return rows.tokens, rows.token_mask


def texts_of(policy: Policy, reward: RewardModel) -> Texts:
  """How to show a step of a run from folders to a reader."""

  def read(out, seen):
    return reward.renderer.batch(seen) if reward.ending is None else tokens_read(reward, out)

  def tell(out, row: int, seen) -> dict:
    prompt, answer, cut = rows_of(policy, reward, out, seen)[row]
    ids = reward.renderer.ids(prompt, answer, truncated=cut)
    if reward.ending is not None:
      tokens, mask = tokens_read(reward, out)
      ids = tokens[row][mask[row]]
    return {
      "prompt_text": prompt_text(prompt),
      "response_text": answer,
      "truncated": cut,
      "reward_reads": reward.renderer.tokenizer.hf.decode(ids),
    }

  return Texts(read, tell, lambda i: policy.tokenizer.hf.decode([i]))


def warm_start(
  config, built: Build, workdir: Path, state, arrays: dict[str, np.ndarray], stage: Callable
):
  """The state with a head that was fitted to the judgments; see `fit.head_loss`."""
  count, size = len(arrays["tokens"]), config.reward.batch_size
  enough(count, "reward.batch_size", size, "r2m.judgments")
  total = config.r2m.warm_epochs * (count // size)
  order = epochs_of_rows(config.seed, count, size, total)
  batches = (hosts.take(take_pairs(arrays, rows), built.rows) for rows in order)
  job = warm_job(config, built, state.ref, state.reward_backbone, state.reward_head, batches, total)
  like = shapes_of(state.reward_head)
  return warm(
    state, stage(workdir, job.stage, like, lambda: do(job, built, workdir), frozen=job.frozen)
  )


def start_state(config, built: Build, policy: Policy, reward: Reward, *, donate: bool):
  """The run's first TrainState; an R2M reward model keeps its own head. `donate`: the weights are
  donated.
  """
  in_folder = isinstance(reward, RewardModel)
  starts = (reward.state, reward.phi) if in_folder else (None, None)
  state = initial_state(config, built, policy.state, *starts, donate=donate)
  if built.lora:
    state = state.replace(policy=start_adapters(built, policy, state.policy))
  if not in_folder or reward.head is None or not VARIANTS[config.variant].feedback:
    return state
  saved, head = reward.head
  wanted = (
    built.arch.hidden_size,
    built.reward_arch.embedding_size,
    config.r2m.attention_dim,
    config.r2m.num_heads,
  )
  found = (saved.policy_hidden_size, saved.reward_hidden_size, saved.attention_dim, saved.num_heads)
  if wanted != found:
    raise FolderError(
      f"{reward.folder} has an R2M head of (policy size, reward size, attention_dim, num_heads) = "
      f"{found}; this run "
      f"asks for {wanted}: set config.r2m.attention_dim and num_heads, or give a reward model "
      "without a head"
    )
  like = state.reward_head

  def put(x, old):
    return hosts.put(np.asarray(x, old.dtype), old.sharding)

  return warm(state, jax.tree.map(put, head, like))


def prompt_text(prompt) -> str:
  """A prompt for the sample table."""
  return (
    prompt if isinstance(prompt, str) else "\n".join(f"{m['role']}: {m['content']}" for m in prompt)
  )


def samples(config, output, prompts: list, policy: Policy, when: str) -> list[dict]:
  """One row of samples.jsonl for each of the step's first prompts."""
  judged = output.judged
  shown = slice(0, config.log.samples * config.rollout.group_size, config.rollout.group_size)
  sequences = jax.tree.map(lambda x: x[shown], output.sequences)
  return [
    {
      "arm": config.variant,
      "when": when,
      "prompt": prompt_text(prompt),
      "response": policy.tokenizer.whole(prompt, text),
      "reward": reward,
      "frozen": frozen,
      "length": int(mask.sum()),
      "truncated": truncated,
    }
    for prompt, (text, truncated), reward, frozen, mask in zip(
      prompts,
      responses_of(sequences, policy.tokenizer),
      judged.scores[shown],
      judged.scores_frozen[shown],
      sequences.response_mask,
    )
  ]
