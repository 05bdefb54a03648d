"""Writes Hugging Face folders: at the end of a run from folders, and from any checkpoint
(tasks/export.py).
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

from r2m_jax.algorithm.variants import VARIANTS
from r2m_jax.config import redact
from r2m_jax.data.text import POLICY, Tokenizer
from r2m_jax.hf import parity
from r2m_jax.hf.card import write_card
from r2m_jax.hf.folders import (
  HEAD_CONFIG,
  HEAD_WEIGHTS,
  RENDERER,
  FolderError,
  HeadConfig,
  Policy,
  RewardModel,
  head_tensors,
  score_of,
)
from r2m_jax.hf.peft import save_peft
from r2m_jax.hf.weights import commit_of, save_pretrained, tokenizer_files
from r2m_jax.models.lora import merged
from r2m_jax.parallel import hosts
from r2m_jax.parallel.errors import UserError
from r2m_jax.run.build import lora_of
from r2m_jax.run.progress import doing

HEAD_MODULE = Path(__file__).with_name("r2m_head.py")  # PyTorch; copied, never imported here


class PushError(UserError, RuntimeError):
  """The hub did not accept a model."""

  status = 1


@contextlib.contextmanager
def new_folder(out: Path) -> Iterator[Path]:
  """A folder to fill, which becomes `out` when it is complete. An older model there is replaced."""
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


def write_template(folder: Path, tokenizer: Tokenizer) -> None:
  """Writes the user's own chat template to the place where transformers looks first."""
  if tokenizer.chat.file:
    (folder / "chat_template.jinja").write_text(tokenizer.hf.chat_template, encoding="utf-8")


def write_policy(
  out: Path, config, policy: Policy, state: nnx.State, workdir: Path, *, base=None
) -> None:
  """Writes the policy with its tokenizer, generation config and card.

  Args:
    state: its weights, or the adapters of config.lora on top of `base`: merged, or a PEFT folder.
  """
  lora = lora_of(config)
  below = config.policy.path
  commit = commit_of(policy.folder)
  peft = lora is not None and config.lora.export == "peft"
  with new_folder(out) as folder:
    if peft:
      if policy.adapter is not None:
        below, commit = policy.adapter.base, policy.adapter.revision
      save_peft(folder, policy.arch, state, lora, below, commit)
      for file in tokenizer_files(policy.folder):
        if hosts.first():
          shutil.copyfile(file, folder / file.name)
    else:
      weights = state if lora is None else merged(state, base, lora)
      save_pretrained(folder, policy.arch, weights, tokenizer_folder=policy.folder)
      ends = {
        "eos_token_id": list(policy.tokenizer.eos_ids),
        "pad_token_id": policy.tokenizer.pad_id,
      }
      if hosts.first() and not (folder / "generation_config.json").exists():
        (folder / "generation_config.json").write_text(
          json.dumps(ends, indent=2) + "\n", encoding="utf-8"
        )
    if hosts.first():
      write_template(folder, policy.tokenizer)
      kind = "adapters" if peft else "policy"
      write_card(folder, config, workdir, kind=kind, bases=[below], base_folder=policy.folder)
  finish(config, out, "policy", None if peft else lambda: parity.policy_gap(out))


def write_reward(
  out: Path,
  config,
  reward: RewardModel,
  backbone,
  phi,
  workdir: Path,
  *,
  head=None,
  policy=None,
  chat=None,
):
  """Writes the reward model: a sequence classifier, its contract and, for R2M, the head with its
  PyTorch module.

  Args:
    phi: the classifier's score head. For R2M it is the frozen reward model's; the R2M head has its
      own.
    head: (HeadConfig, state) of an R2M reward model.
    policy: folder of the policy whose hidden states the head reads.
    chat: `Chat.contract` of that policy.
  """
  bases = [
    base
    for base in (config.reward.path or config.policy.path, config.policy.path if head else "")
    if base
  ]
  contract = reward.renderer.contract if reward.renderer else None
  with new_folder(out) as folder:
    bias = reward.has_bias or bool(np.abs(np.asarray(phi["bias"][...])).max() > 0)
    save_pretrained(
      folder, reward.arch, backbone, score=score_of(phi, bias=bias), tokenizer_folder=reward.folder
    )
    tensors = None if head is None else head_tensors(head[1])
    if hosts.first():
      if contract:
        write_template(folder, reward.renderer.tokenizer)
        contract |= {POLICY: chat} if head and chat else {}
        (folder / RENDERER).write_text(json.dumps(contract, indent=2) + "\n", encoding="utf-8")
      if head is not None:
        (folder / HEAD_CONFIG).write_text(
          json.dumps(dataclasses.asdict(head[0]), indent=2) + "\n", encoding="utf-8"
        )
        save_file(tensors, folder / HEAD_WEIGHTS, metadata={"format": "pt"})
        shutil.copyfile(HEAD_MODULE, folder / HEAD_MODULE.name)
      rule = (
        "its chat template"
        if contract and contract["template_sha256"]
        else "the text prompt + ' ' + response"
      )
      kind = "reward" if head is None else "r2m_reward"
      named = dict(bases=bases or [reward.arch.family], base_folder=reward.folder)
      write_card(folder, config, workdir, kind=kind, rule=rule, **named)
  finish(
    config, out, "reward", None if head and not policy else lambda: parity.reward_gap(out, policy)
  )


def write_run(
  out: Path, config, policy: Policy, reward: RewardModel | None, state, workdir: Path
) -> None:
  """Writes the policy and the reward model of a TrainState. A variant without feedback has a plain
  classifier as its reward model. `reward` None: the rewards came from outside, so there is no
  reward model.
  """
  write_policy(out / "policy", config, policy, state.policy, workdir, base=state.ref)
  if reward is None:
    return
  feedback = VARIANTS[config.variant].feedback
  if feedback not in ("", "policy"):
    print(
      f"export   no reward model of variant {config.variant!r}: it reads {feedback} in place of a "
      "policy's states"
    )
    return
  head, phi = None, state.reward_frozen
  trained = state.reward_head if state.reward_average is None else state.reward_average
  if feedback:
    settings = HeadConfig(
      policy.arch.hidden_size,
      reward.arch.embedding_size,
      config.r2m.attention_dim,
      config.r2m.num_heads,
      config.r2m.feedback_layer,
      float(state.omega),
    )
    head = settings, trained
  else:
    phi = trained["phi"]
  adapters_alone = (
    lora_of(config) is not None and config.lora.export == "peft"
  )  # our loader does not read it
  args = dict(head=head, policy=None if adapters_alone else out / "policy")
  args["chat"] = policy.tokenizer.chat.contract
  write_reward(out / "reward", config, reward, state.reward_backbone, phi, workdir, **args)


def finish(config, out: Path, what: str, gap) -> None:
  """Prints how far transformers' results differ from ours on the written folder, and uploads it if
  requested.
  """
  if not hosts.first():
    return
  print(f"export   {what} in {out}")
  if config.export.check and gap is None:
    print(
      "parity   not measured: the policy is a PEFT folder; config.lora.export=merged is measured"
    )
  elif config.export.check:
    with doing("comparing with transformers"):
      found = gap()
    name = "score" if what == "reward" else "logit"
    reason = "not measured: torch is not installed"
    print(f"parity   {reason if found is None else found.describe(name)}")
  if config.export.push_to:
    push(out, f"{config.export.push_to}-{what}", config.export)


def push(folder: Path, name: str, settings) -> None:
  """Uploads a folder to the Hugging Face hub; the hub's own login is used.

  Args:
    settings: config.export: `private`, `revision` and `pull_request`. A pull request changes an
      existing model, perhaps another user's, and creates none.

  Raises:
    PushError: the hub refused it or cannot be reached. The folder is not changed.
  """
  import huggingface_hub

  api, branch = huggingface_hub.HfApi(), settings.revision
  where = {"revision": branch} if branch else {}
  if settings.pull_request:
    where["create_pr"] = True
  try:
    if not settings.pull_request:
      api.create_repo(name, private=settings.private, exist_ok=True)
      if branch:
        api.create_branch(name, branch=branch, exist_ok=True)
    message = "Export from r2m_jax"
    done = api.upload_folder(repo_id=name, folder_path=str(folder), commit_message=message, **where)
  except Exception as error:  # noqa: BLE001  its versions raise errors of three HTTP libraries
    reason = redact(" ".join(str(error).split()))
    raise PushError(
      f"config.export.push_to: {name} was not uploaded: {reason}. {folder} is complete; fix this "
      "and export it again with --config.task=export, or run: hf upload"
    ) from None
  print(f"hub      {folder} is now {getattr(done, 'pr_url', None) or name}")
