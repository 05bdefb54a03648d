"""Hugging Face folders from any checkpoint of a run, on request.

  python -m r2m_jax.main --config=configs/default.py --workdir=W --config.task=export \\
    --config.export.checkpoint=RUN --config.export.out=OUT

RUN is a run's workdir, WORKDIR/checkpoints/<arm>, WORKDIR/checkpoints/<arm>/<step> or
WORKDIR/stages/<stage>. OUT then holds policy and reward, or only the one that the checkpoint has.
"""

import operator
from pathlib import Path

import jax

from r2m_jax.config import DICTS
from r2m_jax.hf.export import write_policy, write_reward, write_run
from r2m_jax.hf.folders import (
  RENDERER,
  FolderError,
  RewardModel,
  load_policy,
  load_reward,
  mesh_of,
  reward_start,
)
from r2m_jax.models.lora import merged
from r2m_jax.run import checkpoint
from r2m_jax.run.build import abstract, build, init_adapters, make_first_state
from r2m_jax.run.files import read_json, subfolders

BUDGETS = "budgets.json"  # in a workdir: the number of steps that each time budget gave


def run(config, workdir: Path | None = None) -> None:
  """Exports `config.export.checkpoint` into `config.export.out`. The command's own workdir is not
  used.
  """
  workdir, stage, step = find_checkpoint(Path(config.export.checkpoint).expanduser().absolute())
  lora_export, config = config.lora.export, run_config(config, workdir, mine=("export", "mesh"))
  config.lora.export = lora_export
  out, mesh = Path(config.export.out).expanduser(), mesh_of(config)
  print(f"export   {'/'.join(stage)} of {workdir}{'' if step is None else f', step {step}'}")
  if not (config.policy.path or config.reward.path):
    raise FolderError(
      f"{workdir} is a run of the gold-reward task, whose words have no tokenizer: only runs "
      "that started from config.policy.path or config.reward.path can be exported; name one of "
      "these"
    )
  require_models_kept(config, out)
  manager = checkpoint.open_checkpoints(workdir.joinpath(*stage))
  at = checkpoint.newest_to_read(manager) if step is None else step
  if at is None:
    raise FolderError(
      f"{workdir.joinpath(*stage)} holds no intact checkpoint; name another one of the run, or bring "
      "its files back from a copy"
    )
  if at not in manager.all_steps():
    raise FolderError(
      f"{workdir.joinpath(*stage)} holds checkpoints of steps {manager.all_steps()}, not of {step}; "
      "choose one of these"
    )
  if stage == ("stages", "sft"):
    export_policy(config, workdir, out, mesh, manager, at)
    return
  config.task = stage[1] if stage[0] == "stages" else "r2m"
  if config.task == "r2m" and not config.reward.path:
    config.variant = stage[1]
    export_run(config, workdir, out, mesh, manager, at, None)  # its rewards came from outside
    return
  source, from_policy = config.reward.path or config.policy.path, config.task == "reward"
  reward = load_reward(source, config, mesh, from_policy=from_policy, workdir=workdir)
  if (workdir / RENDERER).exists():
    reward.renderer.require(read_json(workdir / RENDERER), workdir)
  if config.task == "reward":
    export_reward(config, workdir, out, mesh, manager, at, reward)
    return
  config.variant = stage[1]
  export_run(config, workdir, out, mesh, manager, at, reward)


def require_models_kept(config, out: Path) -> None:
  """Raises FolderError if the export would replace a model from which the run started."""
  for name in ("policy.path", "reward.path", "eval.gold.path"):
    section, _, field = name.rpartition(".")
    given = operator.attrgetter(section)(config)[field]
    for made in (out / "policy", out / "reward"):
      if given and Path(given).expanduser().resolve() == made.resolve():
        raise FolderError(
          f"config.export.out is {out}: the run started from {made}, its {name}, which the export "
          "would replace; give another folder"
        )


def export_run(
  config, workdir: Path, out: Path, mesh, manager, at: int, reward: RewardModel | None
) -> None:
  """Exports the policy and the reward model, if there is one, of an RL checkpoint at step `at`."""
  policy = load_policy(config.policy.path, config, mesh, workdir=workdir, training=True)
  reward_arch = None if reward is None else reward.arch
  built = build(config, mesh, arch=policy.arch, reward_arch=reward_arch)
  of_reward = (None, None) if reward is None else (reward.state, reward.phi)
  starts = policy.state, *of_reward
  if not config.checkpoint.fork_from:
    checkpoint.require(manager, at, models=checkpoint.fingerprint(starts))  # as in loop.models_of
  state = checkpoint.restore(manager, exported_parts(config, built, *starts), at)
  write_run(out, config, policy, reward, state, workdir)


def export_policy(config, workdir: Path, out: Path, mesh, manager, at: int) -> None:
  """Exports the policy of a checkpoint of supervised training at step `at`."""
  policy = load_policy(config.policy.path, config, mesh, workdir=workdir, training=True)
  config.task = "sft"
  built, like = build(config, mesh, arch=policy.arch), policy.state
  if built.lora:
    like = init_adapters(config, built, mesh)
    checkpoint.require(manager, at, models=checkpoint.fingerprint(policy.state))
  state = checkpoint.restore(manager, like, at)
  write_policy(out / "policy", config, policy, state, workdir, base=policy.state)


def export_reward(
  config, workdir: Path, out: Path, mesh, manager, at: int, reward: RewardModel
) -> None:
  """Exports the reward model of a checkpoint of task=reward at step `at`."""
  built = build(config, mesh, arch=reward.arch, reward_arch=reward.arch)
  like = reward_start(reward, mesh)
  if built.lora:
    checkpoint.require(manager, at, models=checkpoint.fingerprint(like["backbone"]))
    like["backbone"] = init_adapters(config, built, mesh)
  model = checkpoint.restore(manager, like, at)
  backbone = (
    merged(model["backbone"], reward.state, built.lora) if built.lora else model["backbone"]
  )
  write_reward(out / "reward", config, reward, backbone, model["phi"], workdir)


def exported_parts(config, built, policy, reward_backbone, phi):
  """The TrainState of a run as shapes, dtypes and shardings, without the parts that are not
  exported.

  Optimizer moments and the critic are `...`: `checkpoint.restore` neither reads nor allocates them.
  """
  make, key = make_first_state(config, built), jax.random.key(config.seed)
  like = abstract(make, built.mesh, key, policy, reward_backbone, phi)
  parts = ("policy_opt", "reward_opt", "critic", "critic_opt")
  return like.replace(**{name: checkpoint.left_out(getattr(like, name)) for name in parts})


def find_checkpoint(path: Path) -> tuple[Path, tuple[str, str], int | None]:
  """(workdir, ("checkpoints", arm) or ("stages", name), step or None for the newest) of a path
  given by the user.
  """
  for workdir in (path, *path.parents):
    if (workdir / "metrics.jsonl").exists() and (workdir / "config.json").exists():
      break
  else:
    raise FolderError(
      f"config.export.checkpoint is {path}: neither it nor a folder above it is the workdir of a "
      "run; give one, or a checkpoint in it"
    )
  parts = path.relative_to(workdir).parts
  found = sorted(
    p.relative_to(workdir).parts
    for kind in ("checkpoints", "stages")
    for p in subfolders(workdir / kind)
  )
  stages = [stage for stage in found if stage[: len(parts)] == parts[:2]]
  if not parts or len(parts) == 1:  # a workdir: its RL checkpoint, or else its last stage
    stages = [stage for stage in stages if stage[0] == "checkpoints"] or stages
  if len(stages) != 1:
    names = ", ".join(str(workdir.joinpath(*stage)) for stage in found) or "nothing"
    raise FolderError(f"config.export.checkpoint is {path}: give one of {names}")
  step = parts[2] if len(parts) > 2 else None
  if step is not None and not step.isdecimal():
    raise FolderError(
      f"config.export.checkpoint is {path}: {step!r} is not the number of a step; give the folder "
      "of a step"
    )
  return workdir, stages[0], None if step is None else int(step)


def run_config(config, workdir: Path, *, mine: tuple[str, ...]):
  """The config of the run in `workdir`, with the number of steps that its budget gave, and this
  call's sections `mine`.
  """
  saved = read_json(workdir / "config.json")
  result = config.copy_and_resolve_references()
  try:
    for section, name in (field.split(".") for field in DICTS):
      # replaced as a whole, because `update` adds no names
      result[section][name] = saved[section].get(name, {})
    result.update({key: value for key, value in saved.items() if key not in mine})
  except (KeyError, TypeError, AttributeError) as error:
    raise FolderError(
      f"{workdir / 'config.json'} is not a config of this version: {error}; use the version "
      "of r2m_jax that made the run"
    ) from None
  if (workdir / BUDGETS).exists():
    result.steps = read_json(workdir / BUDGETS).get("rl", result.steps)
  return result
