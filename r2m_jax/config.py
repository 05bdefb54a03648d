"""Checks a config before any device work: every refusal names the field, its value and the fix."""

import ast
import datetime
import difflib
import hashlib
import json
import os
import re

from ml_collections import ConfigDict

from r2m_jax.algorithm.advantages import NORMS
from r2m_jax.algorithm.losses import RATIOS
from r2m_jax.algorithm.objective import kl_estimator
from r2m_jax.algorithm.schedules import KL_CONTROLLERS, OMEGA_SCHEDULES
from r2m_jax.algorithm.variants import VARIANTS
from r2m_jax.models.arch import ArchConfig
from r2m_jax.models.attention import ATTENTION, choose
from r2m_jax.ops import AGGREGATIONS, COMBINE
from r2m_jax.parallel.errors import UserError
from r2m_jax.parallel.hosts import HostsError, addresses

TASKS = (
  "tokenizer",
  "sft",
  "reward",
  "r2m",
  "scratch",
  "lab",
  "lab_text",
  "generate",
  "score",
  "export",
  "replay",
  "analyse",
  "plan",
)
# of task=analyse; docs/analyse.md defines them
PIECES = (
  "similarity",
  "differences",
  "dynamics",
  "noise",
  "cost",
  "hacking",
  "accuracy",
  "ablations",
  "probes",
)
ALGORITHMS = ("rloo", "grpo", "reinforce++", "remax", "ppo")
ESTIMATORS = ("auto", "k1", "k2", "k3", "exact")
DTYPES = ("float32", "bfloat16", "float64")
# settings that a run may change from one start to the next: they say how far, where and how often,
# not what is computed
FREE = (
  "task",
  "mesh",
  "log",
  "checkpoint",
  "guard",
  "replay",
  "analyse",
  "export",
  "generate",
  "score",
  "plan",
  "hosts",
  "lab",
  "remat",
  "attention",
  "logits_chunk",
  "ppo.accumulation",
  "rollout.waves",
  # a run keeps the one that it began with, and the rendered prompts are held by their fingerprint
  "data.date",
)
SECRET = re.compile(
  r"hf_\w{20,}|sk-[\w-]{20,}|gh[pousr]_\w{20,}|github_pat_\w{20,}|AKIA[0-9A-Z]{16}|AIza[\w-]{35}|"
  r"xox[abprs]-[\w-]{10,}|://[^/\s]+:[^/\s]+@"
)
SECRET_NAME = re.compile(
  r"TOKEN|SECRET|PASSW|CREDENTIAL|(API|ACCESS|PRIVATE)_?KEY", re.I
)  # of environment variables
HIDDEN = "(hidden)"
SHORTEST_SECRET = 12  # characters; a shorter value of such a variable is more likely a setting
LAB_VOCAB, TEXT_VOCAB = (
  64,
  4096,
)  # entries of the gold-reward task's vocabulary, and more than "auto" is exact for
OPTIMIZER_SECTIONS = ("policy", "critic", "r2m", "sft", "reward", "gold", "scratch.lm")


class ConfigError(UserError, ValueError):
  """A config that cannot run; the message names the field, the value and the fix."""


def check_config(config: ConfigDict) -> None:
  """Raises ConfigError for the first value that cannot work. Touches no device."""

  def need(ok: bool, field: str, fix: str):
    if not ok:
      raise ConfigError(f"config.{field} is {_get(config, field)!r}: {fix}")

  def one_of(field: str, choices):
    need(
      _get(config, field) in choices, field, f"choose one of {', '.join(repr(c) for c in choices)}"
    )

  def at_least(field: str, low):
    need(_get(config, field) >= low, field, f"must be at least {low}")

  for field in _fields(config):
    value = _get(config, field)
    if isinstance(value, (str, tuple, list)) and redact(str(value)) != str(value):
      raise ConfigError(
        f"config.{field} looks like it holds a token or a password, which would end in the run's "
        "files: give it in the "
        "environment instead, such as HF_TOKEN"
      )
  one_of("task", TASKS)
  one_of("algorithm", ALGORITHMS)
  one_of("variant", ("", *VARIANTS))
  need(
    len(config.arms) > 0 and set(config.arms) <= set(VARIANTS),
    "arms",
    f"choose from {', '.join(VARIANTS)}",
  )
  need(len(set(config.arms)) == len(config.arms), "arms", "each variant may appear once")
  for field in ("dtype", "param_dtype"):
    one_of(field, DTYPES)
  one_of("remat", ("none", "full", "dots"))
  one_of("attention", ATTENTION)
  one_of("ppo.aggregation", AGGREGATIONS)
  one_of("ppo.ratio", RATIOS)
  one_of("ppo.advantage_norm", NORMS)
  one_of("critic.init", ("reward", "policy"))
  one_of("kl.placement", ("loss", "reward"))
  one_of("kl.estimator", ESTIMATORS)
  need(
    (config.kl.placement, config.kl.estimator) != ("loss", "k1"),
    "kl.estimator",
    "in the loss the expected gradient of k1 is zero, so it holds nothing back; use 'k2' or "
    "'exact', or "
    "kl.placement='reward'",
  )
  one_of("kl.controller", KL_CONTROLLERS)
  one_of("shaping.missing_eos", ("none", "subtract", "replace"))
  one_of("r2m.omega_schedule", OMEGA_SCHEDULES)
  one_of("r2m.labels", ("self", "preference"))
  one_of("reward.combine", COMBINE)
  one_of("checkpoint.best_mode", ("max", "min"))
  one_of("replay.arm", ("", *VARIANTS))
  one_of("plan.compare", ("", *VARIANTS))
  generations = ("v4", "v5e", "v5p", "v6e")
  need(
    set(config.plan.generations) <= set(generations),
    "plan.generations",
    f"choose from {', '.join(generations)}",
  )
  need(
    _is_date(config.data.date),
    "data.date",
    "give a day as YYYY-MM-DD, or '' for the day that the run begins",
  )
  need(
    0 <= config.seed < 2**32, "seed", "must be at least 0 and below 2**32: random keys have 32 bits"
  )
  need(config.guard.spike > 1, "guard.spike", "must be above 1, such as 10")

  for field in (
    "steps",
    "rollout.prompts",
    "rollout.max_new_tokens",
    "ppo.epochs",
    "ppo.minibatches",
    "ppo.accumulation",
    "rollout.waves",
    "r2m.attention_dim",
    "r2m.num_heads",
    "sft.steps",
    "sft.batch_size",
    "sft.examples",
    "reward.pairs",
    "reward.epochs",
    "scratch.lm.steps",
    "scratch.lm.batch_size",
    "scratch.samples",
    "gold.depth",
    "gold.epochs",
    "gold.batch_size",
    "reward.batch_size",
    "reward.heldout_pairs",
    "log.checkpoint_every",
    "log.samples",
    "data.max_prompt_length",
    "data.max_response_length",
    "generate.max_new_tokens",
    "generate.batch_size",
    "score.batch_size",
    "kl.horizon",
    "reward.ensemble",
    "r2m.warm_epochs",
    "checkpoint.keep_last",
    "guard.max_skipped",
    "hosts.start_timeout",
    "hosts.heartbeat_timeout",
    "hosts.end_timeout",
  ):
    at_least(field, 1)
  for field in (
    "budget",
    "sft.budget",
    "reward.budget",
    "gold.budget",
    "scratch.lm.budget",
    "data.max_chosen_length",
    "seed",
    "logits_chunk",
    "kl.beta",
    "generate.temperature",
    "reward.max_length",
    "reward.max_reply_length",
    "lora.rank",
    "rollout.top_k",
    "rollout.repetition_stop",
    "ppo.clip_eps_high",
    "critic.value_clip",
    "shaping.clip",
    "shaping.missing_eos_penalty",
    "shaping.length_penalty",
    "reward.variance_weight",
    "reward.sum_to_zero",
    "checkpoint.keep_every",
    "checkpoint.keep_best",
    "replay.step",
    "replay.prompt",
    "replay.sample",
    "plan.prompt_length",
    "plan.reward_length",
    "plan.layers",
  ):
    at_least(field, 0)
  at_least("replay.example_id", -1)
  unknown = [name for name in chosen_pieces(config) if name not in PIECES]
  need(
    not unknown,
    "analyse.what",
    f"{', '.join(unknown)}: choose from {', '.join(PIECES)}, with commas",
  )
  need(
    config.analyse.prompts >= 20,
    "analyse.prompts",
    "must be at least 20, which probes split into 5 x 4 parts",
  )
  at_least("analyse.samples", 2)
  need(
    config.rollout.group_size >= 2, "rollout.group_size", "R2M compares K >= 2 responses per prompt"
  )
  need(
    config.rollout.temperature > 0,
    "rollout.temperature",
    "must be above 0: greedy samples have no log-probability",
  )
  need(
    config.reward.max_reply_length == 0
    or config.reward.max_length > config.reward.max_reply_length,
    "reward.max_reply_length",
    "long prompts lose their beginning at config.reward.max_length, which is "
    f"{config.reward.max_length}; give it more",
  )
  for field in ("r2m.omega_min", "r2m.alpha", "reward.label_flip", "data.max_bad_share"):
    need(0 <= _get(config, field) <= 1, field, "must lie in [0, 1]")
  need(0 < config.ppo.clip_eps < 1, "ppo.clip_eps", "must lie in (0, 1), such as 0.2")
  need(
    config.ppo.dual_clip == 0 or config.ppo.dual_clip > 1,
    "ppo.dual_clip",
    "must be above 1, such as 3, or 0: off",
  )
  need(0 < config.rollout.top_p <= 1, "rollout.top_p", "must lie in (0, 1]; 1 keeps every token")
  need(0 <= config.rollout.min_p < 1, "rollout.min_p", "must lie in [0, 1); 0 keeps every token")
  for field in ("critic.gamma", "critic.lam"):
    need(0 <= _get(config, field) <= 1, field, "must lie in [0, 1]")
  need(
    0 <= config.r2m.average < 1, "r2m.average", "must lie in [0, 1); 0 scores with the head itself"
  )
  need(0 < config.r2m.label_budget <= 1, "r2m.label_budget", "must lie in (0, 1], such as 0.02")
  for field in ("kl.target", "r2m.omega_kl"):
    need(_get(config, field) > 0, field, "must be above 0 nats")
  for field in ("ppo.advantage_eps", "r2m.gre_eps", "reward.choice_temperature"):
    need(_get(config, field) > 0, field, "must be above 0")
  for section in OPTIMIZER_SECTIONS:
    one_of(f"{section}.optimizer", ("adamw", "sgd"))
    one_of(f"{section}.lr_schedule", ("constant", "linear", "cosine"))
    one_of(f"{section}.moment_dtype", ("float32", "bfloat16"))
    for name in ("lr", "warmup_steps", "adam_eps", "weight_decay", "max_grad_norm"):
      at_least(f"{section}.{name}", 0)
    need(
      _get(config, f"{section}.lr") < float("inf"),
      f"{section}.lr",
      "must be a finite number, such as 1e-4",
    )
    for name in ("b1", "b2"):
      need(0 <= _get(config, f"{section}.{name}") < 1, f"{section}.{name}", "must lie in [0, 1)")
  need(
    config.r2m.attention_dim % config.r2m.num_heads == 0,
    "r2m.num_heads",
    f"must divide r2m.attention_dim = {config.r2m.attention_dim}",
  )
  sources, weights = (
    [name for name in config.data.name.split(",") if name.strip()],
    tuple(config.data.weights),
  )
  good = all(isinstance(w, (int, float)) and w >= 0 for w in weights) and (
    not weights or sum(weights) > 0
  )
  need(
    not weights or len(weights) == len(sources),
    "data.weights",
    f"give one for each of {len(sources)} names, or ()",
  )
  need(good, "data.weights", "give numbers from 0 on, not all of them 0")
  good = all(isinstance(b, int) and b >= 2 for b in config.data.buckets)
  need(good, "data.buckets", "give lengths in tokens from 2 on, such as (128, 256, 512), or ()")
  at_least("tokenizer.vocab_size", 300)
  at_least("tokenizer.min_frequency", 1)
  try:
    arch = ArchConfig(vocab_size=64, **config.policy.arch)
  except ValueError as error:
    raise ConfigError(f"config.policy.arch: {error}") from None
  try:
    choose(config.attention, "cpu", arch, config.dtype)
  except ValueError as error:
    raise ConfigError(error) from None
  layers = arch.num_layers
  tapped = config.r2m.feedback_layer
  if not config.policy.path:  # else the folder says how many layers there are
    need(
      -layers <= tapped < layers,
      "r2m.feedback_layer",
      f"the policy has {layers} layers; -1 is the last",
    )
  if config.task in ("lab", "lab_text"):
    check_lab(config, need)
  files = {
    "tokenizer": ("data.name",),
    "scratch": ("scratch.corpus", "scratch.sft", "scratch.pairs", "scratch.prompts"),
    "lab_text": (
      "scratch.corpus",
      "scratch.sft",
      "scratch.pairs",
      "scratch.prompts",
      "scratch.prompts_val",
    ),
    "generate": ("policy.path", "generate.input", "generate.output"),
    "score": ("reward.path", "score.input", "score.output"),
    "export": ("export.checkpoint", "export.out"),
    "plan": ("plan.topology",),
  }
  for field in files.get(config.task, ()):
    need(
      _get(config, field) != "", field, f"task={config.task} needs it; pass --config.{field}=..."
    )
  one_of("lora.export", ("merged", "peft"))
  need(config.lora.alpha > 0, "lora.alpha", "must be above 0")
  from_folder = bool(config.policy.path or config.reward.path) or config.task == "export"
  need(
    config.lora.rank == 0 or from_folder,
    "lora.rank",
    "adapters need a model to sit on: give config.policy.path",
  )
  need(
    config.sft.batch_size <= config.sft.examples, "sft.batch_size", "must not exceed sft.examples"
  )
  if config.policy.path or config.reward.path:
    check_folder_run(config, need)
  need(
    config.variant != "shuffled" or config.rollout.prompts > 1,
    "rollout.prompts",
    "variant shuffled needs two",
  )
  trains_nothing = config.variant != "" and not VARIANTS[config.variant].trained
  need(
    config.r2m.labels == "self" or not trains_nothing,
    "r2m.labels",
    f"variant {config.variant!r} never updates the reward, so no label would be used; take 'self', "
    "or a variant such "
    "as 'r2m' or 'iterative_head'",
  )
  need(
    config.reward.batch_size <= config.reward.pairs,
    "reward.batch_size",
    "must not exceed reward.pairs",
  )
  try:
    addresses(config.hosts)
  except HostsError as error:
    raise ConfigError(error) from None
  mesh = tuple(config.mesh)
  need(
    len(mesh) == 3
    and all(isinstance(m, int) and (m > 0 or m == -1) for m in mesh)
    and mesh.count(-1) <= 1,
    "mesh",
    "give three sizes (data, fsdp, tensor), at most one of them -1, such as (-1, 1, 1)",
  )
  if -1 not in mesh[:2]:
    check_batch(config, mesh)


def chosen_pieces(config: ConfigDict) -> list[str]:
  """The names in config.analyse.what, each once and in the order of the report."""
  given = [name.strip() for name in config.analyse.what.split(",") if name.strip()]
  return sorted(dict.fromkeys(given), key=lambda name: PIECES.index(name) if name in PIECES else -1)


def check_lab(config: ConfigDict, need) -> None:
  """Every arm and what they are compared by."""
  lab = config.lab
  need(
    len(lab.seeds) > 0 and all(isinstance(seed, int) and seed >= 0 for seed in lab.seeds),
    "lab.seeds",
    "give whole numbers from 0 on, such as (0, 1, 2)",
  )
  need(len(set(lab.seeds)) == len(lab.seeds), "lab.seeds", "each seed may appear once")
  for field in ("lab.betas", "lab.kls", "lab.stops"):
    values = _get(config, field)
    good = all(isinstance(x, (int, float)) and x > 0 for x in values) and len(set(values)) == len(
      values
    )
    need(
      good and (field == "lab.stops" or len(values)),
      field,
      "give numbers above 0, each once, such as (1.0,)",
    )
  for field in (
    "lab.together",
    "lab.probe_every",
    "lab.probe_prompts",
    "lab.best_prompts",
    "lab.best_samples",
  ):
    need(_get(config, field) >= 1, field, "must be at least 1")
  text = config.task == "lab_text"
  fix = "the laboratory splits seeds over the devices, not one seed: (1, 1, 1)"
  need(text or tuple(config.mesh) == (1, 1, 1), "mesh", fix)
  need(
    not text or tuple(lab.betas) == (1.0,),
    "lab.betas",
    "on text an arm has one KL weight, its own: give (1.0,)",
  )
  need(
    not text or config.budget == 0,
    "budget",
    "runs of as many steps are compared: give 0, and config.steps",
  )
  for name, arm in arms_of(config).items():
    try:
      if text:
        arm.policy.path = arm.reward.path = "(made before)"
      check_config(arm)
      if kl_estimator(arm, TEXT_VOCAB if text else LAB_VOCAB) != "exact":
        raise ConfigError(
          "config.kl.estimator must be 'exact': the laboratory's KL is that over the vocabulary"
        )
    except ConfigError as error:
      raise ConfigError(f"config.lab.arms: {name}: {error}") from None


def arms_of(config: ConfigDict) -> dict[str, ConfigDict]:
  """The laboratory's arms by name, each with the config that it runs. Where config.variant is set,
  that one alone.

  An arm is "VARIANT[.NAME] [FIELD=VALUE ...]", such as "r2m.whitened ppo.whiten_advantages=True".

  Raises:
    ConfigError: an arm cannot be read.
  """
  arms = {}
  for text in (config.variant,) if config.variant else config.lab.arms:
    name, *changes = text.split() or [""]
    arm = config.copy_and_resolve_references()
    arm.task, arm.variant, arm.seed = "r2m", name.split(".")[0], 0

    def refuse(reason, text=text):
      raise ConfigError(f"config.lab.arms: {text!r} {reason}")

    if arm.variant not in VARIANTS or not re.fullmatch(r"[\w.-]+", name):
      refuse(
        f"must start with a variant, such as 'r2m' or 'r2m.mine': choose from {', '.join(VARIANTS)}"
      )
    if name in arms:
      refuse("has a name that another arm has: add .SOMETHING to it")
    for change in changes:
      field, equals, value = change.partition("=")
      if not equals or field.split(".")[0] in (*FREE, "seed", "variant", "arms"):
        refuse(f"has {change!r}: give FIELD=VALUE, of a field that says what is computed")
      try:
        check_fields(arm, [field])
        value = value if isinstance(_get(arm, field), str) else ast.literal_eval(value)
        arm.update_from_flattened_dict({field: value})
      except (ValueError, SyntaxError, TypeError) as error:
        refuse(f"has {change!r}: {error}")
    arms[name] = arm
  return arms


def redact(text: str) -> str:
  """The text without what looks like a token, and without what the environment holds as one."""
  for name, value in os.environ.items():
    if SECRET_NAME.search(name) and len(value) >= SHORTEST_SECRET and not value.startswith("/"):
      text = text.replace(value, HIDDEN)
  return SECRET.sub(HIDDEN, text)


def _is_date(text: str) -> bool:
  try:
    return (
      text == ""
      or bool(re.fullmatch(r"\d{4}-\d\d-\d\d", text))
      and bool(datetime.date.fromisoformat(text))
    )
  except ValueError:
    return False


def check_folder_run(config: ConfigDict, need) -> None:
  """What a run from Hugging Face folders cannot do."""
  need(
    config.reward.ensemble == 1,
    "reward.ensemble",
    "a folder's reward model has one score head; 1 is all it can give",
  )
  if config.task != "r2m":
    return
  for variant in (config.variant,) if config.variant else config.arms:
    start = VARIANTS[variant].start
    need(
      start != "golden",
      "variant",
      "fit the reward model first: run task=reward on golden pairs of the same prompts, give its "
      "WORKDIR/export/reward "
      "as config.reward.path, and run variant 'vanilla'",
    )
    needed = start == "head" or (config.r2m.labels == "preference" and VARIANTS[variant].trained)
    need(
      not needed or config.r2m.judgments != "",
      "r2m.judgments",
      f"variant {variant!r} with labels {config.r2m.labels!r} needs a file of JSON lines "
      f"{{prompt, chosen, rejected}}",
    )


def check_fields(config: ConfigDict, fields: list[str]) -> None:
  """Raises ConfigError for the first dotted name that is not a field of the config; names the
  nearest one that is.
  """
  known = _fields(config)
  for field in fields:
    if field not in known:
      last = field.split(".")[-1]
      same = [
        name for name in known if name.split(".")[-1] == last
      ]  # the right name in the wrong section
      near = difflib.get_close_matches(field, same or known, n=1, cutoff=0.0 if same else 0.5)
      hint = f"did you mean config.{near[0]}?" if near else f"choose from {', '.join(config)}"
      raise ConfigError(f"config.{field} does not exist; {hint}")


def check_batch(config: ConfigDict, mesh: tuple[int, int, int]) -> None:
  """Raises ConfigError where a batch does not split over the mesh's data and fsdp axes."""
  shards, rows = mesh[0] * mesh[1], config.rollout.prompts * config.rollout.group_size
  sizes = {
    "rollout.prompts": config.rollout.prompts,
    "sft.batch_size": config.sft.batch_size,
    "reward.batch_size": config.reward.batch_size,
  }
  for field, size in sizes.items():
    if size % shards:
      raise ConfigError(
        f"config.{field} is {size}, which does not split over {shards} data x fsdp shards of "
        f"config.mesh = {mesh}: "
        f"use a multiple of {shards}, such as {-(-size // shards) * shards}, or a smaller mesh"
      )
  minibatches, accumulation, waves = (
    config.ppo.minibatches,
    config.ppo.accumulation,
    config.rollout.waves,
  )
  if rows % (minibatches * shards):
    raise ConfigError(
      f"config.ppo.minibatches is {minibatches}: {rows} trajectories (rollout.prompts x "
      "rollout.group_size) "
      f"do not split into that many minibatches over {shards} data x fsdp shards; use a divisor of "
      f"{rows // shards}"
    )
  if rows % (minibatches * accumulation * shards):
    raise ConfigError(
      f"config.ppo.accumulation is {accumulation}: the {rows // minibatches} trajectories of a "
      "minibatch do not split "
      f"into that many micro-batches over {shards} data x fsdp shards; use a divisor of "
      f"{rows // minibatches // shards}"
    )
  if config.rollout.prompts % (waves * shards):
    raise ConfigError(
      f"config.rollout.waves is {waves}: {config.rollout.prompts} prompts do not split into that "
      "many waves over "
      f"{shards} data x fsdp shards; use a divisor of {config.rollout.prompts // shards}"
    )


def difference(old: dict, new: dict, prefix: str = "") -> list[str]:
  """Lines "field: old -> new" for everything that differs between two configs as nested dicts."""
  lines = []
  for key in sorted(set(old) | set(new)):
    a, b = old.get(key, "(absent)"), new.get(key, "(absent)")
    if isinstance(a, dict) and isinstance(b, dict):
      lines += difference(a, b, f"{prefix}{key}.")
    elif a != b:
      lines.append(f"config.{prefix}{key}: {a!r} -> {b!r}")
  return lines


def identity(config: ConfigDict) -> str:
  """SHA-256 of all settings that say what is computed, those outside `FREE`."""
  return hashlib.sha256(
    json.dumps(fixed(json.loads(config.to_json())), sort_keys=True).encode()
  ).hexdigest()


def fixed(settings: dict, prefix: str = "") -> dict:
  """A config as nested dicts without the settings in `FREE`."""

  def inner(name, value):
    return fixed(value, f"{prefix}{name}.") if isinstance(value, dict) else value

  return {name: inner(name, value) for name, value in settings.items() if prefix + name not in FREE}


def _fields(config: ConfigDict, prefix: str = "") -> list[str]:
  """Dotted names of all sections and settings."""
  names = []
  for key, value in config.items():
    names += [prefix + key] + (
      _fields(value, f"{prefix}{key}.") if isinstance(value, ConfigDict) else []
    )
  return names


def _get(config, field: str):
  for name in field.split("."):
    config = config[name]
  return config
