"""Checks a config before any device work: every refusal names the field, its value and the fix.

Rules for a single field are declared with the field, in r2m_jax/knobs.py. Rules that involve
several fields are here.
"""

import ast
import difflib
import hashlib
import importlib.util
import json
import os
import re
from pathlib import Path

from ml_collections import ConfigDict

from r2m_jax.algorithm.advantages import ESTIMATORS as ESTIMATOR_ROWS
from r2m_jax.algorithm.objective import kl_estimator
from r2m_jax.algorithm.variants import VARIANTS
from r2m_jax.knobs import (
  ALGORITHMS,
  ESTIMATORS,
  FREE,
  KNOBS,
  PIECES,
  Knob,
  Section,
  make_config,
  names_in,
  walk,
)
from r2m_jax.models.arch import ArchConfig
from r2m_jax.models.attention import choose
from r2m_jax.parallel.errors import UserError
from r2m_jax.parallel.hosts import HostsError, addresses

__all__ = [
  "ALGORITHMS",
  "ESTIMATORS",
  "FREE",
  "PIECES",
  "DICTS",
  "DICT_EXAMPLE",
  "ConfigError",
  "arms_of",
  "best_metric",
  "check_batch",
  "check_config",
  "check_fields",
  "chosen_pieces",
  "difference",
  "fixed",
  "identity",
  "is_dict",
  "redact",
]

SECRET = re.compile(  # not within a word: multitask-... is no key that begins with sk-
  r"(?<![A-Za-z0-9])(hf_[A-Za-z0-9]{20,}|sk-[\w-]{20,}|gh[pousr]_\w{20,}|github_pat_\w{20,}|"
  r"AKIA[0-9A-Z]{16}|AIza[\w-]{35}|xox[abprs]-[\w-]{10,})|://[^/\s]+:[^/\s]+@"
)
SECRET_NAME = re.compile(
  r"TOKEN|SECRET|PASSW|CREDENTIAL|(API|ACCESS|PRIVATE)_?KEY", re.I
)  # of environment variables
HIDDEN = "(hidden)"
SHORTEST_SECRET = 12  # characters; a shorter value of such a variable is probably a setting
# settings whose value is a dict with arbitrary names
DICTS = tuple(name for name, part in walk(KNOBS) if isinstance(part, Knob) and part.default == {})
DICT_EXAMPLE = "{'enable_thinking': False}"
# what an evaluation measures; "gold" only if there is a gold reward
EVALUATED = ("gold", "frozen", "kl", "length", "truncated", "repetition")
TRAIN_A_REWARD = ("reward", "scratch", "lab", "lab_text")  # tasks
LAB_VOCAB = 64  # entries of the gold-reward task's vocabulary
TEXT_VOCAB = 4096  # a vocabulary for which kl.estimator "auto" is not "exact"
# files that a task reads or writes, which have no default
FILES = {
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
  "rewardbench": ("rewardbench.data", "reward.path"),
  "export": ("export.checkpoint", "export.out"),
  "compare": ("compare.runs",),
  "plan": ("plan.topology",),
}


class ConfigError(UserError, ValueError):
  """A config that cannot run; the message names the field, the value and the fix."""


def check_config(config: ConfigDict) -> None:
  """Raises ConfigError for the first value that cannot work. Touches no device."""
  check_secrets(config)
  check_home(config)
  check_rules(config)
  check_seeds(config)
  check_kl(config)
  check_reward_lengths(config)
  check_weights(config)
  check_shapes(config)
  if config.task in ("lab", "lab_text", "lab_notes"):
    check_lab(config)
  check_files(config)
  check_lora(config)
  check_sizes(config)
  check_trackers(config)
  check_revisions(config)
  check_served(config)
  if config.policy.path or config.reward.path:
    check_folder_run(config)
  elif config.task in ("sft", "reward", "r2m"):
    # the gold-reward task generates its own prompts
    fix = (
      "give the models that train on it, config.policy.path and config.reward.path, or leave it out"
    )
    need(config, not config.data.name, "data.name", fix)
  check_labels(config)
  check_certify(config)
  check_evaluation(config)
  check_label_judge(config)
  if config.task == "judge":
    check_judge(config)
  try:
    addresses(config.hosts)
  except HostsError as error:
    raise ConfigError(error) from None
  mesh = tuple(config.mesh)
  if -1 not in mesh[:2]:
    check_batch(config, mesh)


def need(config: ConfigDict, ok: bool, field: str, fix: str) -> None:
  """Raises ConfigError with the field, its value and the fix unless `ok`."""
  if not ok:
    value = _get(config, field)
    shown = value.to_dict() if isinstance(value, ConfigDict) else value
    raise ConfigError(f"config.{field} is {shown!r}: {fix}")


def check_secrets(config: ConfigDict) -> None:
  """Raises ConfigError if a value looks like a token or a password."""
  for field in _fields(config):
    value = _get(config, field)
    text = isinstance(value, (str, tuple, list)) or is_dict(field)
    if text and redact(str(value)) != str(value):
      raise ConfigError(
        f"config.{field} looks like it holds a token or a password, which would end in the run's "
        "files: give it in the environment instead, such as HF_TOKEN"
      )


def check_home(config: ConfigDict) -> None:
  """A home folder exists if a path begins with ~."""
  try:
    Path.home()
  except RuntimeError:
    for field in _fields(config):
      value = _get(config, field)
      names = value.split(",") if isinstance(value, str) else ()
      needs_home = any(name.strip().startswith("~") for name in names)
      need(
        config, not needs_home, field, "there is no home folder; give the whole path, or set HOME"
      )


def check_rules(config: ConfigDict) -> None:
  """The rules of each knob on its own, in the order of the table."""
  skipped = ()
  for field, part in walk(KNOBS):
    if isinstance(part, Section):
      if part.tasks and config.task not in part.tasks:
        skipped += (f"{field}.",)
    elif not field.startswith(skipped):
      for rule in part.rules:
        value = _get(config, field)
        if not rule.holds(value):
          need(config, False, field, rule.fix if isinstance(rule.fix, str) else rule.fix(value))


def check_seeds(config: ConfigDict) -> None:
  """Several seeds are runs of the gold-reward task, and their random keys have 32 bits."""
  from_folder = bool(config.policy.path or config.reward.path)
  need(
    config,
    config.seeds == 1 or not from_folder,
    "seeds",
    "a run from folders has one seed; give 1, and start a run for each config.seed",
  )
  need(
    config,
    config.seed + config.seeds <= 2**32,
    "seeds",
    f"the last seed must be below 2**32; lower it, or config.seed = {config.seed}",
  )


def check_kl(config: ConfigDict) -> None:
  """The KL estimator has a gradient at its placement."""
  need(
    config,
    (config.kl.placement, config.kl.estimator) != ("loss", "k1"),
    "kl.estimator",
    "in the loss the expected gradient of k1 is zero, so it has no effect; use 'k2' or "
    "'exact', or kl.placement='reward'",
  )


def check_reward_lengths(config: ConfigDict) -> None:
  """The longest allowed reply leaves room for its prompt."""
  reward = config.reward
  need(
    config,
    reward.max_reply_length == 0 or reward.max_length > reward.max_reply_length,
    "reward.max_reply_length",
    "long prompts lose their beginning at config.reward.max_length, which is "
    f"{reward.max_length}; give it more",
  )


def check_weights(config: ConfigDict) -> None:
  """There are as many weights as names of data."""
  sources = [name for name in config.data.name.split(",") if name.strip()]
  weights = config.data.weights
  need(
    config,
    not weights or len(weights) == len(sources),
    "data.weights",
    f"give one for each of {len(sources)} names, or ()",
  )


def check_shapes(config: ConfigDict) -> None:
  """The policy's shape, its attention kernel, and the layer that the reward head reads."""
  need(
    config,
    config.r2m.attention_dim % config.r2m.num_heads == 0,
    "r2m.num_heads",
    f"must divide r2m.attention_dim = {config.r2m.attention_dim}",
  )
  try:
    arch = ArchConfig(vocab_size=64, **config.policy.arch)
  except ValueError as error:
    raise ConfigError(f"config.policy.arch: {error}") from None
  try:
    choose(config.attention, "cpu", arch, config.dtype)
  except ValueError as error:
    raise ConfigError(error) from None
  layers = arch.num_layers
  if not config.policy.path:  # otherwise the folder defines the number of layers
    need(
      config,
      -layers <= config.r2m.feedback_layer < layers,
      "r2m.feedback_layer",
      f"the policy has {layers} layers; give one from {-layers} to {layers - 1}, such as -1, the last",
    )


def check_files(config: ConfigDict) -> None:
  """The task's files are named."""
  for field in FILES.get(config.task, ()):
    fix = f"task={config.task} needs it; pass --config.{field}=..."
    need(config, _get(config, field) not in ("", ()), field, fix)


def check_lora(config: ConfigDict) -> None:
  """Adapters have a base model."""
  from_folder = bool(config.policy.path or config.reward.path) or config.task == "export"
  need(
    config,
    config.lora.rank == 0 or from_folder,
    "lora.rank",
    "adapters need a base model: give config.policy.path",
  )


def check_revisions(config: ConfigDict) -> None:
  """A revision belongs to a hub name, and a pull request has no revision."""
  for section in ("policy", "reward"):
    path = config[section].path
    need(
      config,
      not config[section].revision or path != "" and not os.path.isdir(os.path.expanduser(path)),
      f"{section}.revision",
      f"it belongs to a hub name, and config.{section}.path is {path!r}: leave it out",
    )
  need(
    config,
    not (config.export.pull_request and config.export.revision),
    "export.revision",
    "a pull request is opened against the main branch: leave it out, or pull_request=False",
  )


def check_trackers(config: ConfigDict) -> None:
  """The libraries of the trackers are installed; none is imported."""
  for name in config.log.to:
    if name != "tensorboard" and importlib.util.find_spec(name) is None:
      need(config, False, "log.to", f"{name} is not installed: pip install {name}")


def check_sizes(config: ConfigDict) -> None:
  """Batches are no larger than their source; shuffling needs two prompts."""
  for section, examples in (("sft", "examples"), ("reward", "pairs")):
    need(
      config,
      config[section].batch_size <= config[section][examples],
      f"{section}.batch_size",
      f"must not exceed {section}.{examples}",
    )
  need(
    config,
    config.reward.contrast < config.reward.pairs,
    "reward.contrast",
    "must be below reward.pairs: each contrast needs another prompt",
  )
  need(
    config,
    config.variant != "shuffled" or config.rollout.prompts > 1,
    "rollout.prompts",
    "variant shuffled needs two; give 2 or more, or choose another variant",
  )


def check_labels(config: ConfigDict) -> None:
  """Labels are bought only for a reward that is trained."""
  trains_nothing = config.variant != "" and not VARIANTS[config.variant].trained
  need(
    config,
    config.r2m.labels == "self" or not trains_nothing,
    "r2m.labels",
    f"variant {config.variant!r} never updates the reward, so no label would be used; take 'self', "
    "or a variant such as 'r2m' or 'iterative_head'",
  )
  need(
    config,
    config.r2m.labels == "self" or config.r2m.label_confidence == 0,
    "r2m.label_confidence",
    "give 0: only pairs that the reward labels itself are filtered, and config.r2m.labels is "
    "'preference'",
  )


def check_certify(config: ConfigDict) -> None:
  """Certified advantages are those of a linear, frozen reward within a group, and the pairs that the
  reward was fitted to are at hand.
  """
  if config.certify.share == 0:
    return
  field = "certify.share"
  for path in ("policy.path", "reward.path", "reward.url"):
    fix = f"the pairs of a reward model from a folder are not known: give 0, or leave out {path}"
    need(config, not _get(config, path), field, fix)
  need(
    config,
    config.task not in ("scratch", "lab_text", "lab_notes"),
    field,
    "only the gold-reward task has it: give 0, or task 'r2m' or 'lab'",
  )
  for variant in (config.variant,) if config.variant else config.arms:
    changes = VARIANTS[variant].feedback or VARIANTS[variant].trained or VARIANTS[variant].start
    fix = f"variant {variant!r} does not use the frozen reward alone: give 0, or variant 'vanilla'"
    need(config, not changes, field, fix)
  needs = [
    ("algorithm", ESTIMATOR_ROWS[config.algorithm].baseline == "group", "'rloo' or 'grpo'"),
    ("kl.placement", config.kl.placement == "loss", "'loss'"),
    ("ppo.whiten_advantages", not config.ppo.whiten_advantages, "False"),
    ("reward.ensemble", config.reward.ensemble == 1, "1"),
    ("shaping.clip", config.shaping.clip == 0, "0"),
    ("shaping.missing_eos", config.shaping.missing_eos == "none", "'none'"),
    ("shaping.length_penalty", config.shaping.length_penalty == 0, "0"),
  ]
  for name, holds, value in needs:
    fix = f"certified advantages need {value}: give that, or certify.share 0"
    need(config, holds, name, fix)


def measures_gold(config: ConfigDict) -> bool:
  """Whether a run's evaluations have a gold reward: a second reward model, or the toy task's
  own.
  """
  gold = config.eval.gold
  return config.eval.every > 0 and bool(gold.path or gold.url or not config.policy.path)


def best_metric(config: ConfigDict) -> str:
  """The metric that `keep_best` and `stop.patience` compare."""
  return config.checkpoint.best_metric or ("eval/gold" if measures_gold(config) else "reward/used")


def check_evaluation(config: ConfigDict) -> None:
  """Evaluations have the models they need, and every metric used for selection is measured."""
  if config.task in ("lab", "lab_text", "lab_notes"):
    fix = "the laboratory compares runs of one length and measures gold at each step: give 0"
    for field in ("eval.every", "stop.kl", "stop.patience"):
      need(config, _get(config, field) == 0, field, fix)
  gold, reward = config.eval.gold, config.reward
  fix = "config.eval.gold.path is given too, and there is one gold reward; leave one of the two out"
  need(config, not (gold.path and gold.url), "eval.gold.url", fix)
  fix = "give the judge's address as config.eval.gold.url, or leave it out"
  need(config, bool(gold.url) or not gold.judge_model, "eval.gold.judge_model", fix)
  if gold.path or gold.url:
    field = "eval.gold.path" if gold.path else "eval.gold.url"
    same = bool(gold.path and reward.path)
    same = same and os.path.realpath(gold.path) == os.path.realpath(reward.path)
    same |= gold.url != "" and (gold.url, gold.judge_model) == (reward.url, reward.judge_model)
    fix = "that is the reward model that the run optimises; give one of another family"
    need(config, not same, field, fix)
    fix = "the gold-reward task has its own gold; a second reward model needs config.policy.path"
    need(config, config.task != "r2m" or bool(config.policy.path), field, fix)
    no_run = config.task not in ("r2m", "scratch")
    fix = f"config.{field} is measured every so many steps, such as 10"
    need(config, no_run or config.eval.every > 0, "eval.every", fix)
  if config.stop.patience or (config.checkpoint.keep_best and config.task == "r2m"):
    check_best_metric(config)


def check_best_metric(config: ConfigDict) -> None:
  """If `checkpoint.best_metric` is a metric of evaluations, it is measured; `stop.patience`
  requires such a metric.
  """
  stage, _, name = best_metric(config).partition("/")
  field, names = "checkpoint.best_metric", [f"eval/{name}" for name in EVALUATED]
  if stage != "eval":
    fix = f"it counts evaluations: name one of {', '.join(names)} in config.{field}"
    need(config, config.stop.patience == 0, "stop.patience", fix)
    return
  need(config, name in EVALUATED, field, f"choose one of {', '.join(names)}")
  need(
    config, config.eval.every > 0, field, "set config.eval.every above 0, so that it is measured"
  )
  fix = (
    "gold is measured if config.eval.gold.path names a second reward model, or gold.url a server"
  )
  need(config, name != "gold" or measures_gold(config), field, fix)


def check_judge(config: ConfigDict) -> None:
  """There is exactly one judge, with the settings that it needs."""
  judge = config.judge
  given = [name for name in ("url", "reward", "judgments") if judge[name]]
  need(
    config,
    len(given) == 1,
    f"judge.{given[-1] if given else 'url'}",
    "give one judge: an endpoint (judge.url, judge.model), a reward model (judge.reward) or a file "
    "(judge.judgments)",
  )
  need(
    config,
    judge.model != "" or not judge.url,
    "judge.model",
    "name the model at config.judge.url",
  )
  answered = judge.candidate != "" or judge.judgments != ""
  for field in () if answered else ("policy.path", "generate.input"):
    need(
      config,
      _get(config, field) != "",
      field,
      "give the answers as config.judge.candidate, or config.policy.path and config.generate.input "
      "to generate them first",
    )
  need(
    config,
    judge.max_cost == 0 or judge.prompt_price + judge.completion_price > 0,
    "judge.max_cost",
    "a cap needs prices: give config.judge.prompt_price and config.judge.completion_price",
  )


def check_label_judge(config: ConfigDict) -> None:
  """Checks that a judge that labels has a model name and gets its samples as text."""
  labels = config.r2m
  if not labels.judge_url:
    return
  need(
    config,
    bool(config.policy.path or config.reward.path),
    "r2m.judge_url",
    "give config.policy.path and config.reward.path: a judge reads text, which only runs from "
    "Hugging Face folders have",
  )
  need(
    config,
    labels.labels == "preference",
    "r2m.labels",
    "use 'preference': only then a judge at r2m.judge_url orders the pairs",
  )
  need(
    config,
    labels.judge_model != "",
    "r2m.judge_model",
    "name the model at config.r2m.judge_url",
  )


def chosen_pieces(config: ConfigDict) -> list[str]:
  """The names in config.analyse.what, each once and in the order of the report."""
  return sorted(
    names_in(config.analyse.what), key=lambda name: PIECES.index(name) if name in PIECES else -1
  )


def check_lab(config: ConfigDict) -> None:
  """Every arm, and the settings by which arms are compared."""
  text = config.task in ("lab_text", "lab_notes")
  fix = "the laboratory splits seeds over the devices, not one seed: (1, 1, 1)"
  need(config, text or tuple(config.mesh) == (1, 1, 1), "mesh", fix)
  need(
    config,
    not text or tuple(config.lab.betas) == (1.0,),
    "lab.betas",
    "on text an arm has one KL weight, its own: give (1.0,)",
  )
  need(
    config,
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
  """The laboratory's arms by name, each with its config. If config.variant is set, only that one.

  An arm is "VARIANT[.NAME] [FIELD=VALUE ...]", such as "r2m.whitened ppo.whiten_advantages=True".

  Raises:
    ConfigError: an arm cannot be read.
  """
  arms = {}
  for text in (config.variant,) if config.variant else config.lab.arms:
    name, *changes = text.split() or [""]
    arm = config.copy_and_resolve_references()
    arm.task = "r2m"
    arm.variant = name.split(".")[0]
    arm.seed = 0

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
        refuse(f"has {change!r}: give FIELD=VALUE, of a field that affects the result")
      try:
        check_fields(arm, [field])
        value = value if isinstance(_get(arm, field), str) else ast.literal_eval(value)
        arm.update_from_flattened_dict({field: value})
      except (ValueError, SyntaxError, TypeError) as error:
        refuse(f"has {change!r}: {error}")
    arms[name] = arm
  return arms


def redact(text: str) -> str:
  """The text without anything that looks like a token, and without the tokens in the
  environment.
  """
  for name, value in os.environ.items():
    if SECRET_NAME.search(name) and len(value) >= SHORTEST_SECRET and not value.startswith("/"):
      text = text.replace(value, HIDDEN)
  return SECRET.sub(HIDDEN, text)


def check_folder_run(config: ConfigDict) -> None:
  """A run from Hugging Face folders does not use settings that it does not support."""
  need(
    config,
    config.reward.ensemble == 1,
    "reward.ensemble",
    "a folder's reward model has one score head; give 1",
  )
  need(
    config,
    config.reward.contrast == 0,
    "reward.contrast",
    "contrast pairs are made only on the gold-reward task; give 0, and put such pairs in the data",
  )
  if config.task != "r2m":
    return
  for variant in (config.variant,) if config.variant else config.arms:
    start = VARIANTS[variant].start
    need(
      config,
      start != "golden",
      "variant",
      "fit the reward model first: run task=reward on golden pairs of the same prompts, give its "
      "WORKDIR/export/reward "
      "as config.reward.path, and run variant 'vanilla'",
    )
    needed = start == "head" or (config.r2m.labels == "preference" and VARIANTS[variant].trained)
    need(
      config,
      not needed or config.r2m.judgments != "" or (start != "head" and config.r2m.judge_url != ""),
      "r2m.judgments",
      f"variant {variant!r} with labels {config.r2m.labels!r} needs a file of JSON lines "
      f"{{prompt, chosen, rejected}}; give one",
    )


def check_served(config: ConfigDict) -> None:
  """A reward server replaces the reward model only in RL from a policy's folder."""
  reward = config.reward
  if not reward.url:
    fix = "give the server's address as config.reward.url, or leave it out"
    need(config, not reward.judge_model, "reward.judge_model", fix)
    return
  fix = "only task=r2m gets rewards from a server; leave it out"
  need(config, config.task not in (*TRAIN_A_REWARD, "sft", "plan"), "reward.url", fix)
  fix = "config.reward.path is given too, and a run has one reward; leave one of the two out"
  need(config, not reward.path, "reward.url", fix)
  if config.task == "r2m":
    fix = "a served reward reads text, which the gold-reward task does not have; give a folder"
    need(config, config.policy.path != "", "policy.path", fix)
    check_scores_alone(config)


def check_function(config: ConfigDict) -> None:
  """A run whose reward is a function has no other reward."""
  for field in ("reward.path", "reward.url"):
    fix = "the run is given a function as its reward; leave one of the two out"
    need(config, _get(config, field) == "", field, fix)
  need(config, config.policy.path != "", "policy.path", "a function scores text; give a folder")
  check_scores_alone(config)


def check_scores_alone(config: ConfigDict) -> None:
  """If rewards come from outside, as numbers, no part of the run reads a reward model."""
  fix = "a reward from outside of the program reads text; use 'auto' or 'text'"
  need(config, config.reward.input != "tokens", "reward.input", fix)
  for name in (config.variant,) if config.variant else config.arms:
    variant = VARIANTS[name]
    need(
      config,
      not (variant.feedback or variant.trained or variant.start),
      "variant" if config.variant else "arms",
      f"{name!r} reads the reward model's embedding or trains its head, and a reward from outside "
      "is only a number; use variant 'vanilla' or 'scaled', or give the reward model as "
      "config.reward.path",
    )
  critic = ESTIMATOR_ROWS[config.algorithm].baseline == "critic"
  need(
    config,
    not critic or config.critic.init != "reward",
    "critic.init",
    "a reward from outside has no weights for the critic to start from; use 'policy'",
  )


def check_fields(config: ConfigDict, fields: list[str]) -> None:
  """Raises ConfigError, with the nearest valid name, for the first dotted name that is not a field
  of the config.
  """
  known = _fields(config)
  for field in fields:
    if field not in known:
      if is_dict(inside := field.rpartition(".")[0]):
        raise ConfigError(
          f"config.{field} does not exist; give the whole dict, such as "
          f'--config.{inside}="{DICT_EXAMPLE}"'
        )
      last = field.split(".")[-1]
      same = [
        name for name in known if name.split(".")[-1] == last
      ]  # a correct name in the wrong section
      near = difflib.get_close_matches(field, same or known, n=1, cutoff=0.0 if same else 0.5)
      hint = f"did you mean config.{near[0]}?" if near else f"choose from {', '.join(config)}"
      raise ConfigError(f"config.{field} does not exist; {hint}")


def is_dict(field: str) -> bool:
  """Whether the dotted name is a setting whose value is a dict, and not a section."""
  return field in DICTS


def check_batch(config: ConfigDict, mesh: tuple[int, int, int]) -> None:
  """Raises ConfigError if a batch does not split over the mesh's data and fsdp axes."""
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
  minibatches = config.ppo.minibatches
  accumulation = config.ppo.accumulation
  waves = config.rollout.waves
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
  """SHA-256 of all settings that affect the result (those outside `FREE`) and differ from their
  defaults. So a run keeps its identity if a later version has more settings.
  """
  usual = defaults()
  given = flat(fixed(json.loads(config.to_json())))
  chosen = {name: value for name, value in given.items() if value != usual.get(name)}
  return hashlib.sha256(json.dumps(chosen, sort_keys=True).encode()).hexdigest()


def defaults() -> dict:
  """{dotted name: default} of every setting, as JSON values."""
  return flat(json.loads(make_config(KNOBS.parts).to_json()))


def flat(settings: dict, prefix: str = "") -> dict:
  """{dotted name: value} of a config as nested dicts. A setting whose value is a dict stays a dict."""
  found = {}
  for name, value in settings.items():
    if isinstance(value, dict) and not is_dict(prefix + name):
      found |= flat(value, f"{prefix}{name}.")
    else:
      found[prefix + name] = value
  return found


def fixed(settings: dict, prefix: str = "") -> dict:
  """A config as nested dicts without the settings in `FREE`."""

  def inner(name, value):
    return fixed(value, f"{prefix}{name}.") if isinstance(value, dict) else value

  return {name: inner(name, value) for name, value in settings.items() if prefix + name not in FREE}


def _fields(config: ConfigDict, prefix: str = "") -> list[str]:
  """Dotted names of all sections and settings."""
  names = []
  for key, value in config.items():
    name = f"{prefix}{key}"
    section = isinstance(value, ConfigDict) and not is_dict(name)
    names += [name] + (_fields(value, f"{name}.") if section else [])
  return names


def _get(config, field: str):
  for name in field.split("."):
    config = config[name]
  return config
