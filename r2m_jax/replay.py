"""One sample of a run once more: its tokens, log-probabilities, what the reward reads, and how the reward is made.

  python -m r2m_jax.main --config=configs/default.py --workdir=RUN --config.task=replay \\
    --config.replay.step=7 --config.replay.prompt=3 --config.replay.sample=0

The step is run again by the program of the run itself, from the nearest checkpoint before it, so on the same kind of
device every token is the one that was drawn. RUN is read and only RUN/replay is written.
"""

import functools
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from r2m_jax import checkpoint, sharding
from r2m_jax.build import abstract, build, initial_state, init_policy, init_reward_model
from r2m_jax.config import ConfigError
from r2m_jax.lab import goldtask
from r2m_jax.metrics import plain, read_metrics, write_atomic
from r2m_jax.step import make_judge, make_omega, make_read, measured_kl
from r2m_jax.train import make_gold_step, rl_prompts, shapes_of, warm, with_variant
from r2m_jax.variants import VARIANTS


def run(config, workdir: Path) -> dict:
  """Prints the sample that config.replay names, writes it to WORKDIR/replay and returns it."""
  wanted = config.replay
  config = run_config(config, workdir)
  t, row = wanted.step, wanted.prompt * config.rollout.group_size + wanted.sample
  limits = {"step": config.steps, "prompt": config.rollout.prompts, "sample": config.rollout.group_size}
  for name, limit in limits.items():
    if wanted[name] >= limit:
      raise ConfigError(f"config.replay.{name} is {wanted[name]}: the run has {limit}, counted from 0")
  built = build(config, sharding.make_mesh(tuple(config.mesh)), vocab_size=goldtask.VOCAB_SIZE)
  state = state_before(config, built, workdir, t)
  step = make_gold_step(config, built, sharding.shardings(state, built.mesh))
  for earlier in range(int(state.step), t):
    state, _ = step(state, rl_prompts(config, earlier))
  before = jax.tree.map(jnp.copy, state)  # the step donates its state
  _, out = step(state, rl_prompts(config, t))
  parts, out = jax.device_get((make_parts(config, built)(before, out.sequences), out))

  prompt_length = out.sequences.tokens.shape[1] - out.sequences.response_mask.shape[1]
  tokens, mask = out.sequences.tokens[row], out.sequences.token_mask[row]
  keep = out.sequences.response_mask[row]
  gold = jax.tree.map(lambda x: float(x[row]), goldtask.gold(out.sequences))
  reward, frozen, w = out.judged.scores[row], out.judged.scores_frozen[row], float(parts["omega"])
  found = {
    "arm": config.variant, "step": t, "prompt": wanted.prompt, "sample": wanted.sample,
    "example_id": int(rl_prompts(config, t).example_id[wanted.prompt]),
    "prompt_text": goldtask.render(tokens[:prompt_length], mask[:prompt_length]),
    "response_text": goldtask.render(tokens[prompt_length:], keep),
    "tokens": tokens[prompt_length:][keep].tolist(),
    "logprobs": parts["logprobs"][row][keep].tolist(),
    "ref_logprobs": parts["ref_logprobs"][row][keep].tolist(),
    "attention": None if parts["attention"] is None else parts["attention"][row][:, mask].tolist(),
    "omega": w,
    "reward": plain(reward), "frozen": plain(frozen), "gold": gold._asdict(),
  }  # fmt: skip
  path = workdir / "replay" / f"{config.variant}-{t}-{wanted.prompt}-{wanted.sample}.json"
  write_atomic(path, json.dumps(found, indent=1))
  print(f"prompt   {found['prompt_text']}\nanswer   {found['response_text']}")
  print(f"reward   {reward:.4f} (frozen {frozen:.4f}, omega {w:.3f}), gold {gold.gold:.2f}")
  if parts["attention"] is not None:
    shown, weights = tokens[mask], parts["attention"][row][:, mask].mean(0)
    most = np.argsort(-weights)[:5]
    print("reads    " + ", ".join(f"{goldtask.WORDS[shown[i]]} {weights[i]:.2f}" for i in most))
  compare(workdir, config.variant, t, out.metrics)
  print(f"all of it in {path}")
  return found


def compare(workdir: Path, arm: str, t: int, metrics: dict) -> None:
  """Says whether the step made again has the metrics that the run logged."""
  logged = [row for row in read_metrics(workdir) if (row["stage"], row["arm"], row["step"]) == ("rl", arm, t)]
  if not logged:
    print(f"check    metrics.jsonl has no row of {arm}, step {t}")
    return
  off = {name: abs(float(plain(value)) - logged[0][name]) for name, value in metrics.items() if name in logged[0]}
  worst = max(off, key=lambda name: np.nan_to_num(off[name], nan=0.0))
  print(f"check    {len(off)} metrics of the step against metrics.jsonl: largest difference {off[worst]:.1e} ({worst})")


def run_config(config, workdir: Path):
  """The config of the run in `workdir` with this call's mesh, for the arm that config.replay names."""
  path = workdir / "config.json"
  if not path.is_file():
    raise ConfigError(f"--workdir={workdir} holds no run: there is no config.json")
  saved = json.loads(path.read_text(encoding="utf-8"))
  arms = sorted(folder.name for folder in (workdir / "checkpoints").glob("*"))
  arm = config.replay.arm or (arms[0] if len(arms) == 1 else "")
  if arm not in arms:
    have = ", ".join(arms) or "no checkpoints"
    raise ConfigError(f"config.replay.arm is {config.replay.arm!r}: {workdir} has {have}")
  result = config.copy_and_resolve_references()
  try:
    result.update({name: value for name, value in saved.items() if name not in ("mesh", "replay", "task")})
  except (KeyError, TypeError, AttributeError) as error:
    raise ConfigError(f"{path} is not a config of this version: {error}") from None
  if result.policy.path or result.reward.path:
    raise ConfigError(f"{workdir} started from folders: task=replay knows the prompts of the gold-reward task alone")
  return with_variant(result, arm)


def state_before(config, built, workdir: Path, t: int):
  """The TrainState of the newest sound checkpoint at or before step t, else the run's first."""
  key = jax.random.key(config.seed)
  policy = abstract(functools.partial(init_policy, config, built), built.mesh, key)
  reward = abstract(functools.partial(init_reward_model, config, built), built.mesh, policy, key)
  stage = lambda name, like: checkpoint.restore(checkpoint.open_checkpoints(workdir / "stages" / name), like)
  started = stage("reward_golden" if VARIANTS[config.variant].start == "golden" else "reward", reward)
  state = initial_state(config, built, stage("sft", policy), started["backbone"], started["phi"])
  saved = checkpoint.open_checkpoints(workdir / "checkpoints" / config.variant)
  for step in sorted((step for step in saved.all_steps() if step <= t), reverse=True):
    if checkpoint.damage(saved.folder / str(step)) is None:
      print(f"replay   step {t} of {config.variant}, from the checkpoint of step {step}")
      return checkpoint.restore(saved, state, step)
  if VARIANTS[config.variant].start == "head":
    head = stage("warm_start", shapes_of(state.reward_head))
    state = warm(state, head)
  print(f"replay   step {t} of {config.variant}, from the beginning: no checkpoint is at or before it")
  return state


def make_parts(config, built):
  """Builds `parts(state, sequences)`: log-probabilities of both models, the head's attention [B, heads, L], omega."""
  read, judge, omega_at = make_read(config), make_judge(built.defs, config), make_omega(config)
  defs, feedback = built.defs, VARIANTS[config.variant].feedback

  @sharding.jit_on(built.mesh)
  def parts(state, sequences):
    old, ref = read(defs.open_policy(state.policy, state.ref), defs.open_ref(state.ref), sequences)
    w = omega_at(state.step, measured_kl(old, ref, sequences))
    tokens, mask = sequences.tokens, sequences.token_mask
    judged, _ = judge(state, w, sequences, old, ref, tokens, mask, sampled=len(tokens))
    head = nnx.merge(defs.reward_head, state.reward_head if state.reward_average is None else state.reward_average)
    attention = None
    if feedback == "policy":
      attention = head.attention_weights(judged.rte, old.hidden, sequences.token_mask)
    return {"logprobs": old.logprobs, "ref_logprobs": ref.logprobs, "attention": attention, "omega": w}

  return parts
