"""The model card of an exported folder: what was trained, on which data and how, and the run's
figures.
"""

import contextlib
import math
from importlib import metadata
from pathlib import Path

import yaml
from huggingface_hub import EvalResult, ModelCard, ModelCardData

from r2m_jax import __version__
from r2m_jax.hf.weights import HUB
from r2m_jax.run.files import read_json
from r2m_jax.run.metrics import ROW_KEYS, read_metrics, without_clock

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


# of the last RL row, the metrics that describe the model; "eval/..." is added
EVALUATED = ("reward/gold", "reward/frozen", "reward/used", "kl", "length", "loss", "accuracy")
PIPELINES = {"reward": "text-classification", "r2m_reward": "text-classification"}
CITATION = """The method is that of

```bibtex
@article{huang2026r2m,
  title = {Real-Time Aligned Reward Model beyond Semantics},
  author = {Huang, Zixuan and Xia, Xin and Ren, Yuxi and Zheng, Jianbin and Xiao, Xuefeng and Xie, Hongyan
    and Li, Huaqiu and Liang, Songshi and Dai, Zhongxiang and Zhuang, Fuzhen and Li, Jianxin and Ban, Yikun
    and Wang, Deqing},
  journal = {arXiv preprint arXiv:2601.22664},
  year = {2026}
}
```"""
VERSIONS = ("jax", "flax", "optax", "transformers", "huggingface_hub")


def write_card(
  folder: Path,
  config,
  workdir: Path,
  *,
  kind: str,
  bases: list[str],
  rule: str = "",
  base_folder: Path | None = None,
) -> None:
  """README.md in `folder`.

  Args:
    kind: a key of USE.
    bases: the folders or hub names from which training started, the model's own first.
    rule: how a reward model's input is rendered.
    base_folder: the local folder of the model's own base, whose card may name a license.
  """
  hub = [base for base in bases if not Path(base).expanduser().is_dir()]
  commits = _commits(workdir)
  names = [_named(base, base in hub, commits) for base in bases]
  trained = {"policy": "policy", "adapters": "policy (LoRA adapters)"}.get(kind, "reward model")
  title = f"{Path(workdir).name}: {trained}"
  licensed = _license(config, base_folder)
  lines = [
    *_front_matter(config, workdir, kind, hub if bases[0] in hub else [], title, licensed),
    "",
    f"# {title}",
    "",
    f"A {trained} from {', '.join(names)}, made by {HOW[config.task]} with r2m_jax (R2M, arXiv "
    "2601.22664).",
    "",
    *([] if licensed else ["Its base names no license: the terms of the base apply.", ""]),
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
    "## Made with",
    "",
    *_versions(),
    "",
    "## Citation",
    "",
    CITATION,
    "",
  ]
  (folder / "README.md").write_text("\n".join(lines), encoding="utf-8")


def _commits(workdir: Path) -> dict[str, str]:
  """hub name -> the commit used by the run."""
  path = Path(workdir) / HUB
  found = read_json(path) if path.exists() else {}
  return {entry["name"]: entry["commit"] for entry in found.values()}


def _named(base: str, from_hub: bool, commits: dict[str, str]) -> str:
  """The name of a base in the text; never a local path."""
  if not from_hub:
    return Path(base).name
  return f"{base} (commit {commits[base]})" if base in commits else base


def _license(config, base_folder: Path | None) -> dict[str, str]:
  """license, and license_name and license_link if they exist, from the config or the base's
  card.
  """
  if config.export.license:
    return {"license": config.export.license}
  card = base_folder and Path(base_folder) / "README.md"
  if not card or not card.is_file():
    return {}
  try:
    data = ModelCard.load(card, ignore_metadata_errors=True).data.to_dict()
  except Exception:  # noqa: BLE001  an invalid card names no license
    return {}
  wanted = ("license", "license_name", "license_link")
  return {name: data[name] for name in wanted if isinstance(data.get(name), str)}


def _front_matter(
  config, workdir: Path, kind: str, hub: list[str], title: str, licensed: dict[str, str]
) -> list[str]:
  """The card's YAML, as the hub defines it. Its library checks the values.

  Args:
    hub: the hub names of the bases. Only these are allowed here, because the hub refuses a card
      with an unknown base_model.
  """
  names = [name for name in config.data.name.split(",") if name]
  datasets = [name.removeprefix("hf:") for name in names if name.startswith("hf:")]
  results = _results(config, workdir, kind, datasets, names)
  data = ModelCardData(
    library_name="peft" if kind == "adapters" else "transformers",
    base_model=hub or None,
    tags=["r2m_jax", "reward-model" if "reward" in kind else "text-generation"],
    pipeline_tag=PIPELINES.get(kind, "text-generation"),
    datasets=datasets or None,
    model_name=title if results else None,
    eval_results=results or None,
    **licensed,
  ).to_dict()
  first = [name for name in ("library_name", "base_model", "tags") if name in data]
  ordered = {name: data[name] for name in [*first, *(name for name in data if name not in first)]}
  text = yaml.safe_dump(ordered, sort_keys=False, allow_unicode=True)
  return ["---", *text.rstrip("\n").split("\n"), "---"]


def _results(
  config, workdir: Path, kind: str, datasets: list[str], names: list[str]
) -> list[EvalResult]:
  """The figures of the last logged step in the form of the hub's evaluation table.

  They are from the training prompts, unless their name begins with "eval/".
  """
  rows = _rows(config, workdir)
  last = rows[-1] if rows else {}
  chosen = [name for name in last if name in EVALUATED or name.startswith("eval/")]
  shown = ", ".join(name if ":" in name else Path(name).name for name in names)
  return [
    EvalResult(
      task_type=PIPELINES.get(kind, "text-generation"),
      dataset_type=datasets[0] if datasets else "custom",
      dataset_name=shown or "the gold-reward task",
      metric_type=name,
      metric_name=name if name.startswith("eval/") else f"{name}, training prompts",
      metric_value=float(f"{last[name]:.6g}"),
    )
    for name in chosen
    if isinstance(last[name], (int, float)) and math.isfinite(last[name])
  ]


def _versions() -> list[str]:
  """A line for each library that is needed to reproduce the model: r2m_jax and its dependencies."""
  found = {"r2m_jax": __version__}
  for name in VERSIONS:
    with contextlib.suppress(metadata.PackageNotFoundError):
      found[name] = metadata.version(name)
  return [f"- {name} {version}" for name, version in found.items()]


def _training(config, names: list[str]) -> list[str]:
  """A line for each input of the training: start, data, seed and settings."""
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
  rows = _rows(config, workdir)
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


def _rows(config, workdir: Path) -> list[dict]:
  """The logged rows of the model's training, without metrics of the clock."""
  task = config.task
  rows = [row for row in read_metrics(workdir) if row["stage"] == ("rl" if task == "r2m" else task)]
  rows = [row for row in rows if task != "r2m" or row["arm"] == config.variant]
  return list(map(without_clock, rows))


def _get(config, field: str):
  for name in field.split("."):
    config = config[name]
  return config
