"""One sample of a run once more: its tokens, log-probabilities, what the reward reads, and how the
reward is made.

  python -m r2m_jax.main --config=configs/default.py --workdir=RUN --config.task=replay \\
    --config.replay.step=7 --config.replay.prompt=3 --config.replay.sample=0

RUN is a run of the gold-reward task, one from Hugging Face folders, or one of task=scratch. The
step is run again by the program of the run itself, from the nearest checkpoint before it, so on the
same kind of device and mesh every token is the one that was drawn. RUN is read and only RUN/replay
is written.
"""

import dataclasses
import functools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from r2m_jax.algorithm.annotate import make_annotate
from r2m_jax.algorithm.read import make_read, measured_kl
from r2m_jax.algorithm.schedules import make_omega
from r2m_jax.algorithm.variants import VARIANTS
from r2m_jax.config import ConfigError
from r2m_jax.data.datasets import batch_of, prompt_data
from r2m_jax.goldtask import task as goldtask
from r2m_jax.goldtask.rl import make_gold_step, program_of, rl_prompts, shared_arm
from r2m_jax.hf.folders import load_policy, load_reward, mesh_of
from r2m_jax.models.reward import member_scores
from r2m_jax.parallel import sharding
from r2m_jax.run import checkpoint, loop
from r2m_jax.run.build import Build, abstract, build, init_policy, init_reward_model, initial_state
from r2m_jax.run.files import plain, write_atomic
from r2m_jax.run.metrics import read_metrics
from r2m_jax.run.workdir import shapes_of, warm, with_variant
from r2m_jax.tasks import folders, scratch
from r2m_jax.tasks.export import run_config
from r2m_jax.types import Rollout, Rows, TrainState

# a logged metric made again; a rounding error, where the mesh is another than the run's
MATCHES = 1e-5


@dataclasses.dataclass(frozen=True)
class Again:
  """The parts of a run, as it put them together."""

  built: Build
  first: TrainState  # as the run began, before a warm start
  step: (
    Callable  # (state, t) -> (state, StepOutput, input of the reward model i32[B, L'], its mask)
  )
  example_ids: Callable[[int], Any]  # of step t's prompts
  tell: Callable[
    [Any, int], dict
  ]  # (sequences on the host, row) -> texts, and what else is known of the answer
  word: Callable[[int], str]  # of one of the policy's tokens


def run(config, workdir: Path) -> dict:
  """Prints the sample that config.replay names, writes it to WORKDIR/replay and returns it."""
  wanted = config.replay
  config = config_of(config, workdir)
  require_in_run(config, wanted)
  t = wanted.step
  again = (from_folders if config.policy.path else gold_task)(config, workdir)
  place = place_of(wanted, again)
  row = place * config.rollout.group_size + wanted.sample
  state = state_before(config, again, workdir, t)
  for earlier in range(int(state.step), t):
    state, *_ = again.step(state, earlier)
  before = jax.tree.map(jnp.copy, state)  # the step donates its state
  _, out, *read = again.step(state, t)
  parts, out = jax.device_get((make_parts(config, again.built)(before, out.sequences, *read), out))
  found = {
    "arm": config.variant,
    "step": t,
    "prompt": place,
    "sample": wanted.sample,
    "example_id": int(again.example_ids(t)[place]),
    **again.tell(out.sequences, row),
    **facts_of(again, out, parts, row),
  }
  path = workdir / "replay" / f"{config.variant}-{t}-{place}-{wanted.sample}.json"
  write_atomic(path, json.dumps(found, indent=1, allow_nan=False))
  show(found, out, row)
  compare(workdir, config.variant, t, out.metrics)
  print(f"all of it in {path}")
  return found


def require_in_run(config, wanted) -> None:
  """Raises ConfigError if the run has no such step, prompt or sample."""
  limits = {
    "step": config.steps,
    "prompt": config.rollout.prompts,
    "sample": config.rollout.group_size,
  }
  for name, limit in limits.items():
    if wanted[name] >= limit:
      raise ConfigError(
        f"config.replay.{name} is {wanted[name]}: the run has {limit}, counted from 0"
      )


def place_of(wanted, again: Again) -> int:
  """Which prompt of its step is wanted, by its number or by its example id."""
  if wanted.example_id < 0:
    return wanted.prompt
  ids = [int(i) for i in again.example_ids(wanted.step)]
  if wanted.example_id not in ids:
    raise ConfigError(
      f"config.replay.example_id is {wanted.example_id}: the prompts of step {wanted.step} are "
      f"{ids}"
    )
  return ids.index(wanted.example_id)


def facts_of(again: Again, out, parts: dict, row: int) -> dict:
  """Tokens, log-probabilities, attention and rewards of one row, as JSON holds them.

  Args:
    out: StepOutput of the step, on the host.
    parts: of `make_parts`, on the host.
  """

  def listed(x):
    return [plain(value) for value in x]

  width = out.sequences.response_mask.shape[1]
  tokens, mask = out.sequences.tokens[row], out.sequences.token_mask[row]
  keep = out.sequences.response_mask[row]
  mine = {name: x if x is None or name == "omega" else x[row] for name, x in parts.items()}
  weights = mine["attention"]
  return {
    "tokens": tokens[-width:][keep].tolist(),
    "logprobs": listed(mine["logprobs"][keep]),
    "ref_logprobs": listed(mine["ref_logprobs"][keep]),
    # the policy's, prompt and answer: what attention reads
    "states": [again.word(i) for i in tokens[mask].tolist()],
    "attention": None if weights is None else [listed(head) for head in weights[:, mask]],
    "omega": float(mine["omega"]),
    "reward": plain(out.judged.scores[row]),
    "frozen": plain(out.judged.scores_frozen[row]),
    "own": listed(mine["own"]),
    "read": None if mine["read"] is None else listed(mine["read"]),
  }


def show(found: dict, out, row: int) -> None:
  """Prints a sample: its texts, its rewards and the states that attention reads most."""
  print(f"prompt   {found['prompt_text']}\nanswer   {found['response_text']}")
  reward, frozen = out.judged.scores[row], out.judged.scores_frozen[row]
  gold = f", gold {found['gold']['gold']:.2f}" if "gold" in found else ""
  print(f"reward   {reward:.4f} (frozen {frozen:.4f}, omega {found['omega']:.3f}){gold}")
  if found["attention"] is not None:
    weights = np.mean(np.asarray(found["attention"], float), 0)
    most = np.argsort(-weights)[:5]
    print("reads    " + ", ".join(f"{found['states'][i]} {weights[i]:.2f}" for i in most))


def compare(workdir: Path, arm: str, t: int, metrics: dict) -> None:
  """Says whether the step made again has the metrics that the run logged."""
  logged = [
    row
    for row in read_metrics(workdir)
    if (row["stage"], row["arm"], row["step"]) == ("rl", arm, t)
  ]
  if not logged:
    print(f"check    metrics.jsonl has no row of {arm}, step {t}")
    return
  pairs = {
    name: (float(plain(value)), logged[0][name])
    for name, value in metrics.items()
    if name in logged[0]
  }
  off = {
    name: 0.0 if np.array_equal(a, b, equal_nan=True) else abs(a - b)
    for name, (a, b) in pairs.items()
  }
  worst = max(off, key=lambda name: np.nan_to_num(off[name], nan=np.inf))
  print(
    f"check    {len(off)} metrics of the step against metrics.jsonl: largest difference "
    f"{off[worst]:.1e} ({worst})"
  )
  if wrong := [name for name in off if not off[name] <= MATCHES * max(1, abs(pairs[name][1]))]:
    print(
      f"check    this is NOT the run's sample, or made by another version: {', '.join(wrong)}; "
      "give it the run's "
      "--config.mesh, kind of device and version"
    )


def config_of(config, workdir: Path):
  """The config with which the run in `workdir` made the arm that config.replay names, with this
  call's mesh.
  """
  if not (workdir / "config.json").is_file():
    raise ConfigError(f"--workdir={workdir} holds no run: there is no config.json")
  arms = sorted(folder.name for folder in (workdir / "checkpoints").glob("*"))
  arm = config.replay.arm or (arms[0] if len(arms) == 1 else "")
  if arm not in arms:
    have = ", ".join(arms) or "no checkpoints"
    raise ConfigError(f"config.replay.arm is {config.replay.arm!r}: {workdir} has {have}")
  config = run_config(config, workdir, mine=("mesh", "replay"))
  return (
    scratch.arm_config(config, workdir, arm)
    if config.task == "scratch"
    else with_variant(config, arm)
  )


def state_before(config, again: Again, workdir: Path, t: int):
  """The TrainState of the newest sound checkpoint at or before step t, else the run's first."""
  arm = config.variant
  saved = checkpoint.open_checkpoints(workdir / "checkpoints" / arm)
  for step in sorted((step for step in saved.all_steps() if step <= t), reverse=True):
    if checkpoint.damage(saved.folder / str(step)) is None:
      if not config.checkpoint.fork_from:
        checkpoint.require(saved, step, models=loop.models_of(again.first))
      print(f"replay   step {t} of {arm}, from the checkpoint of step {step}")
      return checkpoint.restore(saved, again.first, step)
  if config.checkpoint.fork_from:
    raise ConfigError(
      f"config.replay.step is {t}: no checkpoint of this fork is at or before it; if "
      f"{config.checkpoint.fork_from} "
      "made that step, replay it there"
    )
  print(f"replay   step {t} of {arm}, from the beginning: no checkpoint is at or before it")
  return first_of(config, again, workdir)


def first_of(config, again: Again, workdir: Path):
  """The TrainState of step 0, after a warm start where the arm has one."""
  if VARIANTS[config.variant].start != "head":
    return again.first
  return warm(again.first, stage_of(workdir, "warm_start", shapes_of(again.first.reward_head)))


def stage_of(workdir: Path, name: str, like):
  """The result of a stage, refused where its files are damaged; nothing is set aside, since the
  run is only read.
  """
  return checkpoint.restore(checkpoint.open_checkpoints(workdir / "stages" / name), like, 0)


# ---- what differs between runs ----


def gold_task(config, workdir: Path) -> Again:
  """A run of the gold-reward task."""
  built = build(config, mesh_of(config), vocab_size=goldtask.VOCAB_SIZE)
  key = jax.random.key(config.seed)
  policy = abstract(functools.partial(init_policy, config, built), built.mesh, key)
  reward = abstract(functools.partial(init_reward_model, config, built), built.mesh, policy, key)
  started = stage_of(
    workdir, "reward_golden" if VARIANTS[config.variant].start == "golden" else "reward", reward
  )
  first = initial_state(
    config, built, stage_of(workdir, "sft", policy), started["backbone"], started["phi"]
  )
  layout, arm = sharding.shardings(first, built.mesh), shared_arm(config)
  program = make_gold_step(program_of(config), built, layout)

  def step(state, t: int):
    state, out = program(state, rl_prompts(config, t), arm)
    return state, out, out.sequences.tokens, out.sequences.token_mask

  def tell(sequences, row: int) -> dict:
    width = sequences.response_mask.shape[1]
    tokens, mask = sequences.tokens[row], sequences.token_mask[row]
    return {
      "prompt_text": goldtask.render(tokens[:-width], mask[:-width]),
      "response_text": goldtask.render(tokens[-width:], sequences.response_mask[row]),
      "gold": jax.tree.map(lambda x: float(x[row]), goldtask.gold(sequences))._asdict(),
    }

  return Again(
    built,
    first,
    step,
    lambda t: rl_prompts(config, t).example_id,
    tell,
    lambda i: goldtask.WORDS[i],
  )


def from_folders(config, workdir: Path) -> Again:
  """A run from Hugging Face folders; refused where its rows or the reward model's rendering are
  not what they were.
  """
  mesh = mesh_of(config)
  policy, reward = (
    load_policy(config.policy.path, config, mesh, training=True),
    load_reward(config.reward.path, config, mesh),
  )
  folders.hold_contract(workdir, reward.renderer)
  data = prompt_data(config, policy.tokenizer, workdir)
  built = folders.build_lora(config, mesh, arch=policy.arch, reward_arch=reward.arch)
  first = folders.start_state(config, built, policy, reward, donate=True)
  labeller = folders.labeller_of(config, policy, reward, workdir)
  program = folders.make_two_part_step(
    config, built, policy, reward, sharding.shardings(first, mesh), labeller
  )
  rows: list = []  # of the step made last: (prompt, answer, whether it was cut off)

  def step(state, t: int):
    index = data.order[t]
    state, out, rows[:] = program(
      state, batch_of(data, index, policy.tokenizer), [data.prompts[i] for i in index]
    )
    return state, out, *reward.renderer.batch(rows)

  def tell(sequences, row: int) -> dict:
    del sequences
    prompt, answer, cut = rows[row]
    read = reward.renderer.tokenizer.hf.decode(reward.renderer.ids(prompt, answer, truncated=cut))
    return {
      "prompt_text": folders.prompt_text(prompt),
      "response_text": answer,
      "truncated": cut,
      "reward_reads": read,
    }

  def word(i):
    return policy.tokenizer.hf.decode([i])

  return Again(built, first, step, lambda t: data.order[t], tell, word)


def make_parts(config, built: Build):
  """Builds `parts(state, sequences, reward_tokens, reward_mask)`, each array with a leading axis B
  but omega.

  logprobs, ref_logprobs f32[B, T]; attention f32[B, heads, L] of the head over the policy's states;
  omega; own and read f32[B, M], what each head of phi makes of the reward model's own embedding and
  of what attention read. With the policy's feedback the reward is omega * own + (1 - omega) * read
  (eq. 4; phi is linear).
  """
  read, annotate, omega_at = (
    make_read(config),
    make_annotate(built.defs, config),
    make_omega(config),
  )
  defs, feedback = built.defs, VARIANTS[config.variant].feedback

  @sharding.jit_on(built.mesh)
  def parts(state, sequences, reward_tokens, reward_mask):
    old, ref = read(defs.open_policy(state.policy, state.ref), defs.open_ref(state.ref), sequences)
    w = omega_at(state.step, measured_kl(old, ref, sequences))
    rows = Rollout(Rows(reward_tokens, reward_mask))
    judged, _ = annotate(state, w, Rollout(sequences), old, ref, rows)
    head = nnx.merge(
      defs.reward_head, state.reward_head if state.reward_average is None else state.reward_average
    )
    attention = attended = None
    if feedback == "policy":
      attention = head.attention_weights(judged.rte, old.hidden, sequences.token_mask)
      attended = member_scores(
        head.phi, head.cross_attend(judged.rte, old.hidden, sequences.token_mask)
      )
    return {
      "logprobs": old.logprobs,
      "ref_logprobs": ref.logprobs,
      "attention": attention,
      "omega": w,
      "own": member_scores(head.phi, judged.rte),
      "read": attended,
    }

  return parts
