"""The model card of an exported folder: what was trained, on what, how, and the run's figures."""

from pathlib import Path

from r2m_jax.run.metrics import ROW_KEYS, read_metrics

HOW = {
  "sft": "supervised fine-tuning on the responses",
  "reward": "Bradley-Terry reward modelling on pairs of responses",
  "r2m": "reinforcement learning from the reward model",
}
SETTINGS = {
  "sft": ("sft.steps", "sft.batch_size", "sft.lr", "sft.lr_schedule"),
  "reward": (
    "reward.epochs",
    "reward.batch_size",
    "reward.lr",
    "reward.lr_schedule",
    "reward.max_length",
    "reward.max_reply_length",
  ),
  "r2m": (
    "algorithm",
    "variant",
    "steps",
    "rollout.prompts",
    "rollout.group_size",
    "rollout.max_new_tokens",
    "rollout.temperature",
    "policy.lr",
    "r2m.lr",
    "r2m.omega_min",
    "r2m.alpha",
    "r2m.attention_dim",
    "r2m.feedback_layer",
    "kl.beta",
    "ppo.epochs",
  ),
}
USE = {
  "policy": """from transformers import AutoModelForCausalLM, AutoTokenizer

model, tokenizer = AutoModelForCausalLM.from_pretrained(FOLDER), AutoTokenizer.from_pretrained(FOLDER)""",
  "reward": """from transformers import AutoModelForSequenceClassification

model = AutoModelForSequenceClassification.from_pretrained(FOLDER)  # scores prompt and response: {rule}
model.config.pad_token_id = None  # one unpadded row at a time, so that the last token is read""",
  "r2m_reward": """# an R2M reward model: it also reads the hidden states of its policy; see r2m_head.py
head = r2m_head.R2MHead.from_folder(FOLDER)
reward_model = AutoModelForSequenceClassification.from_pretrained(FOLDER)
policy = AutoModelForCausalLM.from_pretrained(POLICY_FOLDER)
r2m_head.score(head, reward_model, reward_ids, policy, policy_ids)  # input of reward_model: {rule}""",
  "adapters": """from peft import AutoPeftModelForCausalLM

model = AutoPeftModelForCausalLM.from_pretrained(FOLDER)""",
}


def write_card(
  folder: Path, config, workdir: Path, *, kind: str, bases: list[str], rule: str = ""
) -> None:
  """README.md in `folder`.

  Args:
    kind: of USE.
    bases: the folders or hub names that training started from, the model's own first.
    rule: how a reward model's input is rendered.
  """
  hub = [base for base in bases if not Path(base).expanduser().is_dir()]
  names = [base if base in hub else Path(base).name for base in bases]
  trained = {"policy": "policy", "adapters": "policy (LoRA adapters)"}.get(kind, "reward model")
  lines = [
    *_front_matter(kind, hub, named=bases[0] in hub),
    "",
    f"# {Path(workdir).name}: {trained}",
    "",
    f"A {trained} from {', '.join(names)}, made by {HOW[config.task]} with r2m_jax (R2M, arXiv "
    "2601.22664).",
    "",
    "## What was trained",
    "",
    *_training(config, names),
    "",
    "## Figures of the run",
    "",
    *_figures(config, workdir),
    "",
    "## Use",
    "",
    "```python",
    USE[kind].replace("{rule}", rule),
    "```",
    "",
  ]
  (folder / "README.md").write_text("\n".join(lines), encoding="utf-8")


def _front_matter(kind: str, hub: list[str], *, named: bool) -> list[str]:
  """The card's YAML. `named`: whether the model's own base is a name of the hub."""
  # only a hub name may stand here: the hub refuses cards whose base_model it cannot find
  base = ["base_model:", *(f"- {name}" for name in hub)] if named else []
  return [
    "---",
    "library_name: " + ("peft" if kind == "adapters" else "transformers"),
    *base,
    "tags:",
    "- r2m_jax",
    f"- {'reward-model' if 'reward' in kind else 'text-generation'}",
    "---",
  ]


def _training(config, names: list[str]) -> list[str]:
  """A line for each thing that made the model what it is: start, data, seed and settings."""
  sources = [
    name if ":" in name else Path(name).name for name in config.data.name.split(",") if name
  ]
  lines = [
    f"- starts from: {', '.join(names)}",
    f"- data: {', '.join(sources) or 'the gold-reward task'}",
    f"- seed: {config.seed}",
    *(f"- {field}: {_get(config, field)}" for field in SETTINGS[config.task]),
  ]
  if config.lora.rank:
    lines.append(
      f"- lora: rank {config.lora.rank}, alpha {config.lora.alpha}, targets `{config.lora.targets}`"
    )
  return lines


def _figures(config, workdir: Path) -> list[str]:
  """The metrics of the stage's first and last logged step, as a table."""
  task = config.task
  rows = [row for row in read_metrics(workdir) if row["stage"] == ("rl" if task == "r2m" else task)]
  rows = [row for row in rows if task != "r2m" or row["arm"] == config.variant]
  if not rows:
    return ["None were logged."]
  first, last = rows[0], rows[-1]

  def shown(x):
    return f"{x:.4g}" if isinstance(x, float) else str(x)

  return [
    f"| | step {first['step']} | step {last['step']} |",
    "|---|---|---|",
    *(f"| {k} | {shown(first.get(k, ''))} | {shown(last[k])} |" for k in last if k not in ROW_KEYS),
  ]


def _get(config, field: str):
  for name in field.split("."):
    config = config[name]
  return config
