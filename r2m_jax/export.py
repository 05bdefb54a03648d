"""Hugging Face folders out: at the end of a run from folders, and from any checkpoint on request.

  python -m r2m_jax.main --config=configs/default.py --workdir=W --config.task=export \\
    --config.export.checkpoint=RUN --config.export.out=OUT

RUN is a run's workdir, WORKDIR/checkpoints/<arm>, WORKDIR/checkpoints/<arm>/<step> or WORKDIR/stages/<stage>. OUT then
holds policy and reward, or the one of them that the checkpoint has.
"""

import contextlib
import dataclasses
import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from flax import nnx
from safetensors.numpy import save_file

from r2m_jax import checkpoint, hosts, loop, parity
from r2m_jax.build import build, init_adapters, initial_state, lora_of
from r2m_jax.card import write_card
from r2m_jax.folders import (
  HEAD_CONFIG, HEAD_WEIGHTS, RENDERER, FolderError, HeadConfig, Policy, RewardModel, head_tensors, load_policy,
  load_reward, mesh_of, reward_start, score_of,
)  # fmt: skip
from r2m_jax.metrics import read_json
from r2m_jax.models.lora import merged
from r2m_jax.models.peft import save_peft
from r2m_jax.models.pretrained import TOKENIZER_FILES, save_pretrained
from r2m_jax.variants import VARIANTS

BUDGETS = "budgets.json"  # of a workdir: the steps that each budget of seconds gave
HEAD_MODULE = Path(__file__).with_name("r2m_head.py")  # PyTorch; copied, never imported here


@contextlib.contextmanager
def new_folder(out: Path) -> Iterator[Path]:
  """A folder to fill; it takes the place of `out` once it is complete. An older model there is replaced."""
  out = Path(out).expanduser().absolute()
  models = ("config.json", "adapter_config.json")
  if out.exists() and any(out.iterdir()) and not any((out / name).exists() for name in models):
    raise FolderError(f"{out} is not empty and holds no model; give a new folder")
  part, old = out.with_name(f".{out.name}.part"), out.with_name(f".{out.name}.old")
  if hosts.first():
    for left in (part, old):
      shutil.rmtree(left, ignore_errors=True)
  hosts.meet()
  yield part
  hosts.on_first(lambda: replace(out, part, old))


def replace(out: Path, part: Path, old: Path) -> None:
  if out.exists():
    out.rename(old)
  part.rename(out)
  shutil.rmtree(old, ignore_errors=True)


def write_policy(out: Path, config, policy: Policy, state: nnx.State, workdir: Path, *, base=None) -> None:
  """The policy with its tokenizer, generation config and card.

  Args:
    state: its weights, or the adapters of config.lora on top of `base`: merged, or a PEFT folder.
  """
  lora, bases = lora_of(config), [config.policy.path]
  peft = lora is not None and config.lora.export == "peft"
  with new_folder(out) as folder:
    if peft:
      save_peft(folder, policy.arch, state, lora, config.policy.path)
      for file in (file for pattern in TOKENIZER_FILES for file in policy.folder.glob(pattern)):
        if hosts.first():
          shutil.copyfile(file, folder / file.name)
    else:
      weights = state if lora is None else merged(state, base, lora)
      save_pretrained(folder, policy.arch, weights, tokenizer_folder=policy.folder)
      ends = {"eos_token_id": list(policy.tokenizer.eos_ids), "pad_token_id": policy.tokenizer.pad_id}
      if hosts.first() and not (folder / "generation_config.json").exists():
        (folder / "generation_config.json").write_text(json.dumps(ends, indent=2) + "\n", encoding="utf-8")
    if hosts.first():
      write_card(folder, config, workdir, kind="adapters" if peft else "policy", bases=bases)
  finish(config, out, "policy", None if peft else lambda: parity.policy_gap(out))


def write_reward(out: Path, config, reward: RewardModel, backbone, phi, workdir: Path, *, head=None, policy=None):
  """The reward model: a sequence classifier, its contract and, for R2M, the head with its PyTorch module.

  Args:
    phi: the score head that the classifier gets. For R2M that of the frozen reward model; the head has its own.
    head: (HeadConfig, state) of an R2M reward model.
    policy: folder of the policy whose hidden states the head reads.
  """
  bases = [base for base in (config.reward.path or config.policy.path, config.policy.path if head else "") if base]
  contract = reward.renderer.contract if reward.renderer else None
  with new_folder(out) as folder:
    bias = reward.has_bias or bool(np.abs(np.asarray(phi["bias"][...])).max() > 0)
    save_pretrained(folder, reward.arch, backbone, score=score_of(phi, bias=bias), tokenizer_folder=reward.folder)
    tensors = None if head is None else head_tensors(head[1])
    if hosts.first():
      if contract:
        (folder / RENDERER).write_text(json.dumps(contract, indent=2) + "\n", encoding="utf-8")
      if head is not None:
        (folder / HEAD_CONFIG).write_text(json.dumps(dataclasses.asdict(head[0]), indent=2) + "\n", encoding="utf-8")
        save_file(tensors, folder / HEAD_WEIGHTS, metadata={"format": "pt"})
        shutil.copyfile(HEAD_MODULE, folder / HEAD_MODULE.name)
      rule = "its chat template" if contract and contract["template_sha256"] else "the text prompt + ' ' + response"
      kind = "reward" if head is None else "r2m_reward"
      write_card(folder, config, workdir, kind=kind, bases=bases or [reward.arch.family], rule=rule)
  finish(config, out, "reward", None if head and not policy else lambda: parity.reward_gap(out, policy))


def write_run(out: Path, config, policy: Policy, reward: RewardModel, state, workdir: Path) -> None:
  """Policy and reward model of a TrainState. A variant without feedback has a plain classifier as its reward model."""
  write_policy(out / "policy", config, policy, state.policy, workdir, base=state.ref)
  feedback = VARIANTS[config.variant].feedback
  if feedback not in ("", "policy"):
    print(f"export   no reward model of variant {config.variant!r}: it reads {feedback} in place of a policy's states")
    return
  head, phi = None, state.reward_frozen
  trained = state.reward_head if state.reward_average is None else state.reward_average
  if feedback:
    settings = HeadConfig(
      policy.arch.hidden_size, reward.arch.hidden_size, config.r2m.attention_dim, config.r2m.num_heads,
      config.r2m.feedback_layer, float(state.omega),
    )  # fmt: skip
    head = settings, trained
  else:
    phi = trained["phi"]
  adapters_alone = lora_of(config) is not None and config.lora.export == "peft"  # which our loader does not read
  args = dict(head=head, policy=None if adapters_alone else out / "policy")
  write_reward(out / "reward", config, reward, state.reward_backbone, phi, workdir, **args)


def finish(config, out: Path, what: str, gap) -> None:
  """Says how far transformers is from ours on the written folder, and uploads it where asked to."""
  if not hosts.first():
    return
  print(f"export   {what} in {out}")
  if config.export.check and gap is None:
    print("parity   not measured: the policy is a PEFT folder; config.lora.export=merged is measured")
  elif config.export.check:
    if (value := gap()) is None:
      print("parity   not measured: torch is not installed")
    else:
      name, within = ("logit", "score")[what == "reward"], "within" if value <= parity.BOUND else "ABOVE"
      print(f"parity   max |{name} - that of transformers| {value:.1e}, {within} {parity.BOUND:.0e} (float32, 4 rows)")
  if config.export.push_to:
    push(out, f"{config.export.push_to}-{what}")


def push(folder: Path, name: str) -> None:
  """Uploads a folder to the Hugging Face hub as a private model; the hub's own login is used."""
  import huggingface_hub

  api = huggingface_hub.HfApi()
  api.create_repo(name, private=True, exist_ok=True)
  api.upload_folder(repo_id=name, folder_path=str(folder), commit_message="Export from r2m_jax")
  print(f"hub      {folder} is now {name}")


# ---- task = export ----


def run(config) -> None:
  """Exports `config.export.checkpoint` into `config.export.out`."""
  workdir, stage, step = find_checkpoint(Path(config.export.checkpoint).expanduser().absolute())
  lora_export, config = config.lora.export, run_config(config, workdir, mine=("export", "mesh"))
  config.lora.export = lora_export
  out, mesh = Path(config.export.out).expanduser(), mesh_of(config)
  print(f"export   {'/'.join(stage)} of {workdir}{'' if step is None else f', step {step}'}")
  if not (config.policy.path or config.reward.path):
    raise FolderError(
      f"{workdir} is a run of the gold-reward task, whose words have no tokenizer: only runs that started from "
      "config.policy.path or config.reward.path are exported"
    )
  manager = checkpoint.open_checkpoints(workdir.joinpath(*stage))
  if checkpoint.newest(manager) is None or step not in (None, *manager.all_steps()):
    raise FolderError(f"{workdir.joinpath(*stage)} holds checkpoints of steps {manager.all_steps()}, not of {step}")

  at = checkpoint.newest(manager) if step is None else step
  if stage == ("stages", "sft"):
    policy = load_policy(config.policy.path, config, mesh)
    config.task = "sft"
    built = build(config, mesh, arch=policy.arch)
    like = init_adapters(config, built, mesh) if built.lora else policy.state
    if built.lora:
      checkpoint.require(manager, at, models=checkpoint.fingerprint(policy.state))
    write_policy(out / "policy", config, policy, checkpoint.restore(manager, like, step), workdir, base=policy.state)
    return
  config.task = stage[1] if stage[0] == "stages" else "r2m"
  reward = load_reward(config.reward.path or config.policy.path, config, mesh, from_policy=config.task == "reward")
  if (workdir / RENDERER).exists():
    reward.renderer.require(read_json(workdir / RENDERER), workdir)
  if config.task == "reward":
    built = build(config, mesh, arch=reward.arch, reward_arch=reward.arch)
    like = reward_start(reward, mesh)
    if built.lora:
      checkpoint.require(manager, at, models=checkpoint.fingerprint(like["backbone"]))
      like["backbone"] = init_adapters(config, built, mesh)
    model = checkpoint.restore(manager, like, step)
    backbone = merged(model["backbone"], reward.state, built.lora) if built.lora else model["backbone"]
    write_reward(out / "reward", config, reward, backbone, model["phi"], workdir)
    return
  config.variant = stage[1]
  policy = load_policy(config.policy.path, config, mesh)
  built = build(config, mesh, arch=policy.arch, reward_arch=reward.arch)
  like = initial_state(config, built, policy.state, reward.state, reward.phi)
  if not config.checkpoint.fork_from:
    checkpoint.require(manager, at, models=loop.models_of(like))
  write_run(out, config, policy, reward, checkpoint.restore(manager, like, step), workdir)


def find_checkpoint(path: Path) -> tuple[Path, tuple[str, str], int | None]:
  """(workdir, ("checkpoints", arm) or ("stages", name), step or None for the newest) of what a user points at."""
  for workdir in (path, *path.parents):
    if (workdir / "metrics.jsonl").exists() and (workdir / "config.json").exists():
      break
  else:
    raise FolderError(f"config.export.checkpoint is {path}: neither it nor a folder above it is the workdir of a run")
  parts = path.relative_to(workdir).parts
  found = sorted(p.relative_to(workdir).parts for kind in ("checkpoints", "stages") for p in workdir.glob(f"{kind}/*"))
  stages = [stage for stage in found if stage[: len(parts)] == parts[:2]]
  if not parts or len(parts) == 1:  # a workdir: its RL checkpoint, else its last stage
    stages = [stage for stage in stages if stage[0] == "checkpoints"] or stages
  if len(stages) != 1:
    names = ", ".join(str(workdir.joinpath(*stage)) for stage in found) or "nothing"
    raise FolderError(f"config.export.checkpoint is {path}: point at one of {names}")
  step = parts[2] if len(parts) > 2 else None
  if step is not None and not step.isdecimal():
    raise FolderError(f"config.export.checkpoint is {path}: {step!r} is not the number of a step")
  return workdir, stages[0], None if step is None else int(step)


def run_config(config, workdir: Path, *, mine: tuple[str, ...]):
  """The config of the run in `workdir`, with the steps that its budget gave, and this call's sections `mine`."""
  saved = read_json(workdir / "config.json")
  result = config.copy_and_resolve_references()
  try:
    result.update({key: value for key, value in saved.items() if key not in mine})
  except (KeyError, TypeError, AttributeError) as error:
    raise FolderError(f"{workdir / 'config.json'} is not a config of this version: {error}") from None
  if (workdir / BUDGETS).exists():
    result.steps = read_json(workdir / BUDGETS).get("rl", result.steps)
  return result
