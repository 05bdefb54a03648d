"""Recomputes one sample of a run: its tokens, its log-probabilities, what the reward reads, and the
parts of the reward.

  python -m r2m_jax.main --config=configs/default.py --workdir=RUN --config.task=replay \\
    --config.replay.step=7 --config.replay.prompt=3 --config.replay.sample=0

RUN is a run of the gold-reward task, one from Hugging Face folders, or one of task=scratch. The
run's own program repeats the step, from the nearest checkpoint before it. On the same kind of
device and mesh every token is therefore the one that was drawn. RUN is only read; RUN/replay is
written.
"""

import itertools
import json
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from r2m_jax.algorithm.annotate import make_annotate
from r2m_jax.algorithm.read import make_read, measured_kl
from r2m_jax.algorithm.schedules import make_omega
from r2m_jax.algorithm.variants import VARIANTS
from r2m_jax.config import ConfigError
from r2m_jax.hf.folders import mesh_of
from r2m_jax.models.reward import member_scores
from r2m_jax.parallel import sharding
from r2m_jax.report.page import points_section, write_page
from r2m_jax.report.samples import attention_section
from r2m_jax.run import checkpoint, loop
from r2m_jax.run.build import Build
from r2m_jax.run.files import plain, subfolders, write_atomic
from r2m_jax.run.metrics import read_metrics
from r2m_jax.run.run import Run, warmed
from r2m_jax.run.workdir import saved, with_variant
from r2m_jax.tasks import scratch, training
from r2m_jax.tasks.export import run_config
from r2m_jax.types import Rollout, Rows, TrainState

# largest difference from a logged metric; rounding, if the mesh differs from the run's
MATCHES = 1e-5


def run(config, workdir: Path) -> dict:
  """Prints the sample that config.replay names, writes it to WORKDIR/replay and returns it."""
  wanted = config.replay
  config = config_of(config, workdir)
  require_in_run(config, wanted)
  if config.policy.path and not config.reward.path:
    raise ConfigError(
      f"--workdir={workdir} is a run whose rewards came from outside, which replay cannot "
      "analyse; choose a run with a reward model"
    )
  t = wanted.step
  again = next(training(config).runs(config, workdir, mesh_of(config), stage=saved))
  state, start = state_before(again, workdir, t)
  steps = again.steps(state)
  *earlier, batch = itertools.islice(steps.batches, t + 1 - start)
  place = place_of(wanted, batch[0].example_id)
  row = place * config.rollout.group_size + wanted.sample
  for each in earlier:
    state, *_ = steps.step(state, *each)
  before = jax.tree.map(jnp.copy, state)  # the step donates its state
  _, out, *seen = steps.step(state, *batch)
  read = again.texts.read(out, *seen)
  parts, out = jax.device_get((make_parts(config, again.built)(before, out.sequences, *read), out))
  found = {
    "arm": config.variant,
    "step": t,
    "prompt": place,
    "sample": wanted.sample,
    "example_id": int(batch[0].example_id[place]),
    **again.texts.tell(out, row, *seen),
    **facts_of(again.texts.word, out, parts, row),
  }
  path = workdir / "replay" / f"{config.variant}-{t}-{place}-{wanted.sample}.json"
  write_atomic(path, json.dumps(found, indent=1, allow_nan=False))
  write_strip(found, path.with_suffix(".html"))
  show(found, out, row)
  compare(workdir, config.variant, t, out.metrics)
  print(f"all of it in {path}")
  return found


def write_strip(found: dict, path: Path) -> None:
  """Writes the sample as a page, with the attention as a strip of words. Arms without attention
  have no page.
  """
  if section := attention_section(found, tab=""):
    texts = [f"Prompt: {found['prompt_text']}", f"Response: {found['response_text']}"]
    sections = [points_section("The sample", texts), section]
    write_page(path, title=path.stem, heading="One sample again", about="", sections=sections)
    print(f"page     {path}")


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
        f"config.replay.{name} is {wanted[name]}: the run has {limit}, counted from 0; give a "
        "smaller one"
      )


def place_of(wanted, example_ids) -> int:
  """The index of the requested prompt in its step, by number or by example id."""
  if wanted.example_id < 0:
    return wanted.prompt
  ids = [int(i) for i in example_ids]
  if wanted.example_id not in ids:
    raise ConfigError(
      f"config.replay.example_id is {wanted.example_id}: the prompts of step {wanted.step} are "
      f"{ids}; choose one of these"
    )
  return ids.index(wanted.example_id)


def facts_of(word: Callable[[int], str], out, parts: dict, row: int) -> dict:
  """Tokens, log-probabilities, attention and rewards of one row, as JSON values.

  Args:
    word: maps one of the policy's tokens to text.
    out: StepOutput of the step, on the host.
    parts: the result of `make_parts`, on the host.
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
    # the policy's tokens of prompt and answer, which attention reads
    "states": [word(i) for i in tokens[mask].tolist()],
    "attention": None if weights is None else [listed(head) for head in weights[:, mask]],
    "omega": plain(mine["omega"]),
    "reward": plain(out.judged.scores[row]),
    "frozen": plain(out.judged.scores_frozen[row]),
    "own": listed(mine["own"]),
    "read": None if mine["read"] is None else listed(mine["read"]),
  }


def show(found: dict, out, row: int) -> None:
  """Prints a sample: its texts, its rewards and the states with the most attention."""
  print(f"prompt   {found['prompt_text']}\nanswer   {found['response_text']}")
  reward, frozen = out.judged.scores[row], out.judged.scores_frozen[row]
  gold = f", gold {found['gold']['gold']:.2f}" if "gold" in found else ""
  print(f"reward   {reward:.4f} (frozen {frozen:.4f}, omega {float(found['omega']):.3f}){gold}")
  if found["attention"] is not None:
    weights = np.mean(np.asarray(found["attention"], float), 0)
    most = np.argsort(-weights)[:5]
    print("reads    " + ", ".join(f"{found['states'][i]} {weights[i]:.2f}" for i in most))


def compare(workdir: Path, arm: str, t: int, metrics: dict) -> None:
  """Prints whether the metrics of the repeated step equal the run's logged ones."""
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
      f"check    this is NOT the run's sample, or another version made it: {', '.join(wrong)}; "
      "give it the run's --config.mesh, kind of device and version"
    )


def config_of(config, workdir: Path):
  """The config with which the run in `workdir` made the arm that config.replay names, but with this
  call's mesh.
  """
  if not (workdir / "config.json").is_file():
    raise ConfigError(
      f"--workdir={workdir} holds no run: there is no config.json; give the workdir of a run"
    )
  arms = [folder.name for folder in subfolders(workdir / "checkpoints")]
  arm = config.replay.arm or (arms[0] if len(arms) == 1 else "")
  if arm not in arms:
    have = ", ".join(arms) or "no checkpoints"
    raise ConfigError(
      f"config.replay.arm is {config.replay.arm!r}: {workdir} has {have}; choose one of its arms"
    )
  config = run_config(config, workdir, mine=("mesh", "replay"))
  if config.task == "scratch":
    config = scratch.arm_config(config, workdir, arm)
  config = with_variant(config, arm)
  config.task, config.budget = "r2m", 0.0  # the number of steps from the budget is known
  return config


def state_before(again: Run, workdir: Path, t: int) -> tuple[TrainState, int]:
  """The TrainState of the newest intact checkpoint at or before step t, or else the run's first;
  and its step.
  """
  config, first = again.config, again.first()
  arm = config.variant
  kept = checkpoint.open_checkpoints(workdir / "checkpoints" / arm)
  for step in sorted((step for step in kept.all_steps() if step <= t), reverse=True):
    if checkpoint.damage(kept.folder / str(step)) is None:
      if not config.checkpoint.fork_from:
        checkpoint.require(kept, step, models=loop.models_of(first))
      print(f"replay   step {t} of {arm}, from the checkpoint of step {step}")
      return checkpoint.restore(kept, first, step), step
  if config.checkpoint.fork_from:
    raise ConfigError(
      f"config.replay.step is {t}: no checkpoint of this fork is at or before it; replay it in "
      f"{config.checkpoint.fork_from} if that run made the step"
    )
  print(f"replay   step {t} of {arm}, from the beginning: no checkpoint is at or before it")
  return warmed(again, first), 0


def make_parts(config, built: Build):
  """Builds `parts(state, sequences, reward_tokens, reward_mask)`, every array except omega has the
  leading axis B.

  logprobs, ref_logprobs f32[B, T]; attention f32[B, heads, L] of the head over the policy's states;
  omega; own and read f32[B, M], the scores by each head of phi of the reward model's own embedding
  and of what attention read. With the policy's feedback the reward is omega * own + (1 - omega) *
  read (eq. 4; phi is linear).
  """
  read = make_read(config)
  annotate = make_annotate(built.defs, config)
  omega_at = make_omega(config)
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
