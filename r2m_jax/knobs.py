"""Every knob: its default, what it does, its unit, its bounds, and whether it may change between
two starts of a run.

`KNOBS` is the whole table, in the order of config.json. configs/default.py makes a config of it,
r2m_jax/config.py checks a config by it, and docs/config.md is generated from it:

  python -m r2m_jax.knobs > docs/config.md
"""

import datetime
import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from ml_collections import ConfigDict

from r2m_jax.algorithm import advantages
from r2m_jax.algorithm.advantages import NORMS
from r2m_jax.algorithm.certify import WIDTHS
from r2m_jax.algorithm.losses import RATIOS
from r2m_jax.algorithm.schedules import KL_CONTROLLERS, OMEGA_SCHEDULES
from r2m_jax.algorithm.variants import VARIANTS
from r2m_jax.models.attention import ATTENTION
from r2m_jax.ops import AGGREGATIONS, COMBINE

TASKS = {  # config.task -> what it does, as `r2m --help` shows it
  "tokenizer": "train a tokenizer on rows of text",
  "sft": "supervised fine-tuning of the policy",
  "reward": "fit the reward model to preferences",
  "r2m": "RL with the fused reward; fits the models first if the config names none",
  "scratch": "train everything on real text, from a tokenizer to evaluation",
  "lab": "compare variants over seeds, with the gold reward",
  "lab_text": "compare variants on real text",
  "lab_notes": "compare variants on a pretrained model, with a gold reward for English",
  "generate": "sample from a policy: rows of prompts in, rows of responses out",
  "score": "score rows of prompts and responses with a reward model",
  "judge": "compare two sets of answers, judged by an endpoint, a reward model or a file",
  "rewardbench": "measure how well a reward model orders preferences",
  "export": "write a checkpoint as Hugging Face folders",
  "replay": "compute one sample of a run again, with its log-probabilities and rewards",
  "analyse": "make the paper's figures and tables from the checkpoints of a run",
  "compare": "show several runs on one page: curves, final numbers, settings, the same prompts",
  "plan": "compute the memory and time of a run on a TPU slice, without a TPU",
}
# of task=analyse; docs/analyse.md defines them
PIECES = (
  "similarity",
  "differences",
  "dynamics",
  "noise",
  "cost",
  "hacking",
  "accuracy",
  "checks",
  "ablations",
  "probes",
)
# of task=judge; r2m_jax/judge/templates.py has their texts
PROTOCOLS = ("alpaca_eval", "mt_bench", "mt_bench_single", "arena_hard", "tldr")
FORMATS = ("rows", "alpaca_eval", "mt_bench", "arena_hard")
ALGORITHMS = tuple(advantages.ESTIMATORS)
ESTIMATORS = ("auto", "k1", "k2", "k3", "exact")
DTYPES = ("float32", "bfloat16", "float64")
TRACKERS = ("tensorboard", "wandb", "trackio", "mlflow")
GENERATIONS = ("v4", "v5e", "v5p", "v6e")


# ---- rules ----


class Rule(NamedTuple):
  """A condition on one value."""

  holds: Callable[[Any], bool]
  fix: str | Callable[[Any], str]  # advice of the message, or a function of the refused value
  bound: str  # the condition, as shown in docs/config.md


class Knob:
  """One setting.

  Attributes:
    default: its value in configs/default.py; a config keeps its type.
    about: what it does, in one sentence.
    rules: the conditions on its value, in the order in which they are checked.
    unit: of its value, such as "tokens"; "" if it has none.
    free: whether a run may be resumed with another value.
  """

  def __init__(self, default, about: str, *rules: Rule, unit: str = "", free: bool = False):
    self.default = default
    self.about = about
    self.rules = rules
    self.unit = unit
    self.free = free


class Section(NamedTuple):
  """A named group of knobs and sections."""

  title: str
  parts: dict  # name -> Knob or Section
  free: bool = False  # whether all of its knobs are free
  tasks: tuple[str, ...] = ()  # values of config.task for which its rules are checked; (): all


def one_of(*choices) -> Rule:
  named = ", ".join(map(repr, choices))
  return Rule(lambda x: x in choices, f"choose one of {named}", named.replace("'", '"'))


def at_least(low, fix: str = "") -> Rule:
  return Rule(lambda x: x >= low, fix or f"must be at least {low}", f"at least {low}")


def above(low, fix: str = "") -> Rule:
  return Rule(lambda x: x > low, fix or f"must be above {low}", f"above {low}")


def within(interval: str, hint: str = "") -> Rule:
  """The value lies in an interval such as "(0, 1]"."""
  low, high = map(float, interval[1:-1].split(","))

  def holds(x):
    above_low = low <= x if interval[0] == "[" else low < x
    below_high = x <= high if interval[-1] == "]" else x < high
    return above_low and below_high

  return Rule(holds, f"must lie in {interval}{hint}", f"in {interval}")


def is_date(text: str) -> bool:
  """Whether the text is "" or a day as YYYY-MM-DD."""
  if text == "":
    return True
  try:
    return bool(re.fullmatch(r"\d{4}-\d\d-\d\d", text) and datetime.date.fromisoformat(text))
  except ValueError:
    return False


def names_in(text: str) -> list[str]:
  """The comma-separated names in a text, each once."""
  return list(dict.fromkeys(name.strip() for name in text.split(",") if name.strip()))


def unknown_pieces(text: str) -> str:
  """The names in config.analyse.what that are not pieces of the analysis, separated by commas."""
  return ", ".join(name for name in names_in(text) if name not in PIECES)


def is_object(text: str) -> bool:
  """Whether the text is "" or a JSON object."""
  try:
    return text == "" or isinstance(json.loads(text), dict)
  except ValueError:
    return False


def is_address(text: str) -> bool:
  """Whether the text is "" or an HTTP address without a user name."""
  return text == "" or bool(re.fullmatch(r"https?://[^/\s@?#]+(/[^\s?#]*)?", text))


def is_mesh(sizes) -> bool:
  """Whether the sizes are three positive integers, one of which may be -1."""
  positive = all(isinstance(size, int) and (size > 0 or size == -1) for size in sizes)
  return len(sizes) == 3 and positive and tuple(sizes).count(-1) <= 1


def is_window(window) -> bool:
  """Whether the value is () or (first step >= 0, number of steps >= 1)."""
  whole = all(type(number) is int for number in window)
  return not window or whole and len(window) == 2 and window[0] >= 0 and window[1] >= 1


def are_weights(weights) -> bool:
  """Whether the values are numbers of at least 0, not all of them 0."""
  good = all(isinstance(weight, (int, float)) and weight >= 0 for weight in weights)
  return good and (not weights or sum(weights) > 0)


def are_variables(values) -> bool:
  """Whether a dict has identifiers as keys and values that JSON can represent."""
  try:
    json.dumps(dict(values), allow_nan=False, default=dict)  # a nested dict is a ConfigDict
  except (TypeError, ValueError):
    return False
  return all(isinstance(name, str) and name.isidentifier() for name in values)


def are_temperatures(values) -> bool:
  """Whether all values of a dict are finite numbers of at least 0."""
  return all(isinstance(x, (int, float)) and 0 <= x < float("inf") for x in dict(values).values())


def are_positive(values) -> bool:
  """Whether the values are distinct numbers above 0."""
  good = all(isinstance(value, (int, float)) and value > 0 for value in values)
  return good and len(set(values)) == len(values)


def are_contrasts(texts) -> bool:
  """Whether each value is "ARM - ARM" with the names of two arms."""
  pairs = [text.split(" - ") if isinstance(text, str) else [] for text in texts]
  return all(
    len(pair) == 2 and pair[0] != pair[1] and all(re.fullmatch(r"[\w.-]+", name) for name in pair)
    for pair in pairs
  )


ARMS = (
  Rule(
    lambda x: len(x) > 0 and set(x) <= set(VARIANTS),
    f"choose from {', '.join(VARIANTS)}",
    "variants",
  ),
  Rule(lambda x: len(set(x)) == len(x), "name each variant once", "each once"),
)
SEED = Rule(
  lambda x: 0 <= x < 2**32,
  "must be at least 0 and below 2**32: random keys have 32 bits",
  "in [0, 2**32)",
)
MESH = Rule(
  is_mesh,
  "give three sizes (data, fsdp, tensor), at most one of them -1, such as (-1, 1, 1)",
  "three sizes, at most one of them -1",
)
DUAL_CLIP = Rule(
  lambda x: x == 0 or x > 1, "must be above 1, such as 3, or 0: off", "0, or above 1"
)
IS_FILE = Rule(
  lambda x: not x or Path(x).expanduser().is_file(),
  'there is no such file; give the path of a .jinja file, or "" for the model\'s own template',
  'a file, or ""',
)
# variables that the renderer itself passes to a chat template or to transformers
RENDERED = (
  "messages",
  "conversation",
  "chat_template",
  "add_generation_prompt",
  "continue_final_message",
  "tokenize",
  "padding",
  "truncation",
  "max_length",
  "return_tensors",
  "return_dict",
  "return_assistant_tokens_mask",
  "tokenizer_kwargs",
)
TEMPLATE_ARGS = (
  Rule(
    are_variables,
    "give names of the template's variables and values that JSON can hold, such as "
    "{'enable_thinking': False}",
    "names and JSON values",
  ),
  Rule(
    lambda x: not set(x) & set(RENDERED),
    lambda x: f"{', '.join(sorted(set(x) & set(RENDERED)))} is set by the renderer; leave it out",
    "not a variable of the renderer",
  ),
)
PACKING = (
  Rule(
    lambda x: len(x) > 0 and x[-1] == 1 and all(0 < low < high for low, high in zip(x, x[1:])),
    "give ascending shares above 0, the last one 1, such as (0.5, 0.7, 1.0)",
    "ascending, above 0, the last one 1",
  ),
  Rule(
    lambda x: len(x) <= 3,
    "give at most three shares, because learning is compiled for each",
    "at most three",
  ),
)
LENGTHS = Rule(
  lambda x: all(0 < share <= 1 for share in x),
  "give shares above 0 and at most 1, such as (0.1, 0.2, 0.3, 0.5, 1.0)",
  "each above 0 and at most 1",
)
FINITE = Rule(lambda x: x < float("inf"), "must be a finite number, such as 1e-4", "finite")
DATE = Rule(
  is_date, "give a day as YYYY-MM-DD, or '' for the day that the run begins", 'YYYY-MM-DD or ""'
)
OBJECT = Rule(
  is_object, "give a JSON object, such as '{\"top_p\": 1}', or ''", 'a JSON object or ""'
)
ADDRESS = Rule(
  is_address,
  "give an address up to its version, such as http://localhost:8000/v1, without a key in it",
  "http or https",
)
KNOWN_TRACKERS = Rule(
  lambda x: set(x) <= set(TRACKERS) and len(set(x)) == len(x),
  f"choose from {', '.join(TRACKERS)}, each once, or ()",
  f"{', '.join(TRACKERS)}, each once",
)
WINDOW = Rule(
  is_window,
  "give the first step, from 0 on, and how many steps, from 1 on, such as (10, 3), or ()",
  "two whole numbers, or ()",
)
WEIGHTS = Rule(are_weights, "give numbers from 0 on, not all of them 0", "at least 0, not all 0")
BUCKETS = Rule(
  lambda x: all(isinstance(b, int) and b >= 2 for b in x),
  "give lengths in tokens from 2 on, such as (128, 256, 512), or ()",
  "each at least 2",
)
TEMPERATURES = Rule(
  are_temperatures, "give numbers from 0 on, such as {'math': 0.0}", "numbers, at least 0"
)
KNOWN_PIECES = Rule(
  lambda x: not unknown_pieces(x),
  lambda x: f"{unknown_pieces(x)}: choose from {', '.join(PIECES)}, with commas",
  ", ".join(PIECES),
)
KNOWN_TPUS = Rule(
  lambda x: set(x) <= set(GENERATIONS),
  f"choose from {', '.join(GENERATIONS)}",
  ", ".join(GENERATIONS),
)
SEEDS = (
  Rule(
    lambda x: len(x) > 0 and all(isinstance(seed, int) and 0 <= seed < 2**32 for seed in x),
    "give whole numbers from 0 on and below 2**32, such as (0, 1, 2)",
    "whole numbers in [0, 2**32)",
  ),
  Rule(lambda x: len(set(x)) == len(x), "give each seed once", "each once"),
)
CONTRASTS = Rule(
  are_contrasts, "give pairs of arms, such as ('r2m.kl2 - scaled.kl2',)", '"ARM - ARM" each'
)
POSITIVE_FIX = "give numbers above 0, each once, such as (1.0,)"
POSITIVE = Rule(are_positive, POSITIVE_FIX, "above 0, each once")
SOME_POSITIVE = Rule(
  lambda x: len(x) > 0 and are_positive(x), POSITIVE_FIX, "at least one, above 0, each once"
)
RUNS = Rule(
  lambda x: len(x) != 1 and all(isinstance(name, str) and name for name in x),
  "give the workdirs of two runs or more, such as ('runs/a', 'runs/b')",
  "() or two or more",
)


# ---- the knobs ----


def optimizer(lr: float, schedule: str = "constant", warmup: int = 0) -> dict[str, Knob]:
  """The knobs of algorithm.optim.make_optimizer."""
  return dict(
    optimizer=Knob("adamw", "update rule", one_of("adamw", "sgd")),
    lr=Knob(lr, "peak learning rate", at_least(0), FINITE),
    lr_schedule=Knob(
      schedule,
      'learning rate after the warm-up; "linear" and "cosine" reach zero at the last update',
      one_of("constant", "linear", "cosine"),
    ),
    warmup_steps=Knob(
      warmup, "length of the linear warm-up from zero", at_least(0), unit="optimizer updates"
    ),
    b1=Knob(0.9, "Adam's decay of the first moment", within("[0, 1)")),
    b2=Knob(0.99, "Adam's decay of the second moment", within("[0, 1)")),
    adam_eps=Knob(
      1e-5,
      "added to Adam's denominator; larger than the usual 1e-8, so that a gradient of rounding "
      "noise does not become a full-sized step",
      at_least(0),
    ),
    weight_decay=Knob(0.0, "decoupled weight decay", at_least(0)),
    max_grad_norm=Knob(1.0, "gradients are clipped to this global norm; 0: never", at_least(0)),
    moment_dtype=Knob(
      "float32",
      'dtype of Adam\'s moments; with "float32", float64 parameters have float64 moments',
      one_of("float32", "bfloat16"),
    ),
  )


def chat(reads: str) -> dict[str, Knob]:
  """The knobs of data.text.Chat; `reads` names what is rendered."""
  return dict(
    chat_template=Knob(
      "", f'Jinja file with the chat template for {reads}; "": the model\'s own', IS_FILE
    ),
    chat_template_args=Knob(
      {},
      "variables of the chat template, as a dict such as {'enable_thinking': False}",
      *TEMPLATE_ARGS,
    ),
    system_prompt=Knob("", f"system message for {reads}, unless a row has its own"),
  )


def served(what: str) -> dict:
  """Settings of a score server; `what` names what it scores."""
  return dict(
    url=Knob(
      "",
      f"address of a server {what}, see docs/models.md; waits, prices and workers as in `judge`",
      ADDRESS,
      free=True,
    ),
    judge_model=Knob(
      "",
      "the server is an OpenAI-compatible endpoint, and this model rates each response from 1 to "
      '10; "": it takes prompts and responses and gives scores',
    ),
    key_env=Knob(
      "",
      'environment variable with the server\'s key; "": the one in `judge` for a judge, none '
      "for a score server",
      free=True,
    ),
    request_rows=Knob(
      32, "maximum rows in a request to a score server", at_least(1), unit="rows", free=True
    ),
  )


RUN = dict(
  task=Knob(
    "r2m",
    '"sft", "reward" and "r2m" run the pipeline up to that stage; "scratch" trains all models on '
    'text, from the tokenizer on; "tokenizer" trains only that; "lab", "lab_text" and '
    '"lab_notes" compare arms; "generate" and "score" apply a model to JSON lines; "judge" '
    'compares two sets of answers; "rewardbench" measures a reward model on preferences; '
    '"export" writes a checkpoint as Hugging Face folders; "replay" reproduces one sample of a '
    'run; "analyse" draws its evidence; "compare" puts several runs on one page; "plan" reports '
    "whether a run fits a machine",
    one_of(*TASKS),
    free=True,
  ),
  algorithm=Knob(
    "rloo",
    'policy-gradient estimator, see docs/variants.md; only "ppo" has a critic',
    one_of(*ALGORITHMS),
  ),
  variant=Knob(
    "r2m",
    'what the reward reads and trains, see docs/variants.md; "": every variant in `arms`, each '
    "from the same checkpoints",
    one_of("", *VARIANTS),
  ),
  arms=Knob(("vanilla", "scaled", "r2m"), 'variants that are run if `variant` is ""', *ARMS),
  steps=Knob(120, "length of RL, the paper's T", at_least(1), unit="RL steps"),
  budget=Knob(
    0.0,
    "time budget of RL from Hugging Face folders; `steps` is derived from a measured rate. 0: "
    "use `steps`",
    at_least(0),
    unit="seconds",
  ),
  seed=Knob(0, "seed of all random numbers", SEED),
  seeds=Knob(
    1,
    "seeds of RL on the gold-reward task, from `seed` on; each further one is a run in "
    "WORKDIR/seeds, and the report shows means over all",
    at_least(1),
    free=True,
  ),
  dtype=Knob(
    "float32",
    "dtype of the computation; scores, advantages and losses are at least float32, with all bits. "
    "Other float32 products are rounded to bfloat16 on a TPU and to TF32 on a GPU during training, "
    "unless JAX_DEFAULT_MATMUL_PRECISION=highest is set",
    one_of(*DTYPES),
  ),
  param_dtype=Knob("float32", "dtype of the parameters", one_of(*DTYPES)),
  mesh=Knob(
    (1, 1, 1),
    "devices along (data, fsdp, tensor); -1: all remaining devices",
    MESH,
    unit="devices",
    free=True,
  ),
  remat=Knob(
    "dots",
    'what the backward pass recomputes: "dots" everything except weight matmuls, "full" whole '
    'layers, "none" nothing',
    one_of("none", "full", "dots"),
    free=True,
  ),
  attention=Knob(
    "auto",
    'attention kernel for whole rows: "xla", "dot_product" (cuDNN on GPUs, with a decoding kernel '
    'as well), "splash" (TPUs); "auto" chooses by the devices',
    one_of(*ATTENTION),
    free=True,
  ),
  packing=Knob(
    (1.0,),
    "packing: shares of a step's padded places for which learning is compiled. Each step runs "
    "the smallest share that holds its tokens; a share of 1 also computes padding",
    *PACKING,
    free=True,
  ),
  logits_chunk=Knob(
    2**21,
    "most logits (tokens x vocabulary) of one row held in memory at once; 0: no limit",
    at_least(0),
    unit="logits",
    free=True,
  ),
)

TRUNCATION = dict(
  top_k=Knob(0, "sample from the k most likely tokens; 0: from all", at_least(0), unit="tokens"),
  top_p=Knob(
    1.0,
    "sample from the fewest most likely tokens whose probabilities reach this sum",
    within("(0, 1]", "; 1 keeps every token"),
  ),
  min_p=Knob(
    0.0,
    "sample from tokens at least this fraction as likely as the most likely token",
    within("[0, 1)", "; 0 keeps every token"),
  ),
)

ROLLOUT = dict(
  prompts=Knob(16, "prompts per RL step, n", at_least(1)),
  group_size=Knob(
    8, "responses per prompt, K", at_least(2, "R2M compares K >= 2 responses per prompt")
  ),
  max_new_tokens=Knob(24, "longest response", at_least(1), unit="tokens"),
  temperature=Knob(
    1.0, "sampling temperature", above(0, "must be above 0: greedy samples have no log-probability")
  ),
  **TRUNCATION,
  halvings=Knob(
    0,
    "how often decoding continues with half of the rows once at most half are unfinished; each "
    "time is compiled separately",
    at_least(0),
    free=True,
  ),
  waves=Knob(
    1,
    "groups of prompts that are sampled one after another; only one group's KV cache is in memory",
    at_least(1),
    free=True,
  ),
  repetition_stop=Knob(
    0,
    "a response ends when its last N tokens repeat the N tokens before them; 0: never",
    at_least(0),
    unit="tokens",
  ),
)

# their bounds are checked in models.arch.ArchConfig, because they depend on each other
ARCH = dict(
  hidden_size=Knob(64, "width of the residual stream"),
  num_layers=Knob(2, "number of layers"),
  num_heads=Knob(4, "attention heads"),
  num_kv_heads=Knob(4, "key-value heads; fewer than num_heads: grouped-query attention"),
  intermediate_size=Knob(256, "width of the MLP"),
  norm=Knob("rms", 'normalisation: "rms" or "layer"'),
  activation=Knob("silu", 'activation of the MLP: "silu", "gelu" or "gelu_tanh"'),
  gated_mlp=Knob(True, "whether the MLP has a gate"),
  tie_embeddings=Knob(False, "whether input and output embeddings share their weights"),
)

POLICY = dict(
  **optimizer(lr=3e-4),
  path=Knob("", 'Hugging Face folder or hub name; "": a new model for the gold-reward task'),
  adapters=Knob(
    "merged",
    'adapters of a PEFT folder: "merged" into the base, or "trained" further, with the base as '
    "reference",
    one_of("merged", "trained"),
  ),
  revision=Knob(
    "", 'branch, tag or commit of a hub name; "": main. A run keeps the commit with which it began'
  ),
  **chat("prompts"),
  arch=Section(
    "Shape of a new model; the vocabulary comes from the task (`models.arch.ArchConfig`)", ARCH
  ),
)

PPO = dict(
  epochs=Knob(2, "passes over the samples of a step, k", at_least(1)),
  minibatches=Knob(1, "policy updates per epoch", at_least(1)),
  accumulation=Knob(
    1,
    "micro-batches per update, whose gradients are summed; also limits the rows of passes "
    "without a gradient; affects memory, not results",
    at_least(1),
    free=True,
  ),
  clip_eps=Knob(
    0.2, "half-width of the clipped interval of the ratio", within("(0, 1)", ", such as 0.2")
  ),
  clip_eps_high=Knob(0.0, "upper half-width of an asymmetric clip; 0: clip_eps", at_least(0)),
  dual_clip=Knob(
    0.0, "largest ratio that multiplies a negative advantage, such as 3; 0: no limit", DUAL_CLIP
  ),
  ratio=Knob("token", 'importance ratio per "token" or per "sequence" (GSPO)', one_of(*RATIOS)),
  aggregation=Knob(
    "sequence_sum",
    "how the losses of tokens become one number, see docs/variants.md",
    one_of(*AGGREGATIONS),
  ),
  whiten_advantages=Knob(False, "whiten advantages over all response tokens of the batch"),
  advantage_norm=Knob(
    "group",
    'standard deviation by which GRPO divides: of the "group", of the "batch", or "none"',
    one_of(*NORMS),
  ),
  advantage_eps=Knob(1e-4, "added to the variance by which GRPO divides", above(0)),
)

CRITIC = dict(
  **optimizer(lr=3e-4),
  init=Knob(
    "reward",
    'what the critic starts from: the "reward" model (if the tokenizers agree) or the "policy"',
    one_of("reward", "policy"),
  ),
  gamma=Knob(1.0, "discount per token", within("[0, 1]")),
  lam=Knob(0.95, "lambda of generalised advantage estimation", within("[0, 1]")),
  value_clip=Knob(0.2, "half-width of the clip around the old value", at_least(0)),
)

KL = dict(
  beta=Knob(0.05, "weight of KL(policy || reference)", at_least(0)),
  placement=Knob(
    "loss",
    '"loss": the KL is added to the loss; "reward": it is subtracted from each token\'s reward',
    one_of("loss", "reward"),
  ),
  estimator=Knob(
    "auto",
    '"k1" (only in the reward), "k2", "k3", or "exact" over the vocabulary; "auto": k1 in the '
    "reward, and in the loss exact up to 1,024 entries, else k2",
    one_of(*ESTIMATORS),
  ),
  controller=Knob(
    "fixed",
    "how the weight changes: not at all, slowly towards `target`, by a wall above `target`, or until "
    "the KL is held at `target`; see docs/variants.md",
    one_of(*KL_CONTROLLERS),
  ),
  target=Knob(
    6.0,
    'target KL of "adaptive", "hold" and "held"',
    above(0, "must be above 0 nats"),
    unit="nats per sequence",
  ),
  horizon=Knob(100, 'time scale of "adaptive"', at_least(1), unit="RL steps"),
  damping=Knob(
    0.0,
    'for "held": the weight of a step is also multiplied by exp(damping x relative error of the '
    "KL), so that the KL does not oscillate around `target`; 0: off",
    at_least(0),
  ),
)

SHAPING = dict(
  centre=Knob(False, "subtract the batch's mean"),
  clip=Knob(0.0, "limit on the absolute score; 0: no limit", at_least(0)),
  missing_eos=Knob(
    "none",
    'for a response without an end token, the penalty is subtracted from the score ("subtract") '
    'or replaces it ("replace")',
    one_of("none", "subtract", "replace"),
  ),
  missing_eos_penalty=Knob(1.0, "the penalty of missing_eos", at_least(0)),
  length_penalty=Knob(0.0, "subtracted for every token", at_least(0), unit="reward per token"),
  mask_truncated=Knob(False, "leave responses without an end token out of the policy's loss"),
)

CERTIFY = dict(
  share=Knob(
    0.0,
    "share of a step's samples whose advantage becomes 0, because the pairs of the reward model do "
    "not certify its sign; other advantages are shortened by as much; 0: off",
    within("[0, 1)", "; 0 changes no advantage"),
  ),
  width=Knob(
    "posterior",
    'what an advantage is shortened by: the uncertainty of the score head about it ("posterior"), '
    'or, as controls, about another sample of the prompt ("permuted"), or the same for every sample '
    '("constant")',
    one_of(*WIDTHS),
  ),
  rescale=Knob(False, "shortened advantages are scaled to the mean square that they had"),
  tau=Knob(
    1.0,
    "standard deviation of the score head's weights before any pair, for standardised features",
    above(0),
  ),
)

R2M = dict(
  **optimizer(lr=1e-4),
  omega_min=Knob(
    0.6, "floor of the weight on the reward model's own embedding, Omega in eq. 4", within("[0, 1]")
  ),
  omega_schedule=Knob(
    "cosine",
    'fall of that weight over training; "cosine" is the paper\'s, "kl" falls with the KL and needs '
    "no T",
    one_of(*OMEGA_SCHEDULES),
  ),
  omega_kl=Knob(
    6.0,
    'KL at which "kl" reaches the end of its fall',
    above(0, "must be above 0 nats"),
    unit="nats per sequence",
  ),
  alpha=Knob(0.3, "weight of the group reward entropy (eq. 7)", within("[0, 1]")),
  gre_eps=Knob(1e-4, "added to the variance by which eq. 6 divides", above(0)),
  attention_dim=Knob(64, "width of the cross-attention, d in eq. 3", at_least(1)),
  num_heads=Knob(1, "heads of the cross-attention; a divisor of attention_dim", at_least(1)),
  attention_scale=Knob(
    1.0,
    "factor on the initial output weights of the cross-attention, W_o; it scales the "
    "contribution of an untrained head to the reward",
    above(0),
  ),
  feedback_layer=Knob(
    -1, "policy layer whose hidden states are fed back; -1: the last, after the final norm"
  ),
  average=Knob(
    0.0,
    "decay per step of a moving average of the head, which then scores; 0: the head itself scores",
    within("[0, 1)", "; 0 scores with the head itself"),
  ),
  labels=Knob(
    "self",
    'what orders the pairs of eq. 5: scores of the reward model ("self") or "preference" labels',
    one_of("self", "preference"),
  ),
  label_confidence=Knob(
    0.0,
    "a pair that the reward labels itself trains the head only if sigmoid(gap / label_temperature) "
    "is above this and the frozen reward agrees; 0: every pair does",
    within("[0, 1)", "; 0 trains on every pair"),
  ),
  label_temperature=Knob(
    1.0,
    "temperature of label_confidence, by which the gap between a pair's two rewards is divided",
    above(0),
    unit="reward",
  ),
  label_budget=Knob(
    0.02,
    "trajectories in labelled pairs, as a fraction of all sampled trajectories",
    within("(0, 1]", ", such as 0.02"),
  ),
  judgments=Knob(
    "", "JSON lines {prompt, chosen, rejected} with the labels of a run from Hugging Face folders"
  ),
  judge_url=Knob(
    "",
    "OpenAI-compatible endpoint that labels pairs of samples in a run from Hugging Face folders, "
    "instead of the file; key, waits and prices as in `judge`",
    ADDRESS,
    free=True,
  ),
  judge_model=Knob("", "name of the model at this endpoint"),
  judge_template=Knob(
    "alpaca_eval",
    "protocol of its questions, see docs/judge.md",
    one_of("alpaca_eval", "mt_bench", "arena_hard", "tldr"),
  ),
  warm_epochs=Knob(4, 'passes over the preferences in variant "warm_start"', at_least(1)),
)

SFT = dict(
  **optimizer(lr=4e-3, schedule="cosine", warmup=100),
  examples=Knob(16384, "training examples of the gold-reward task", at_least(1)),
  steps=Knob(1000, "length of SFT", at_least(1), unit="updates"),
  batch_size=Knob(64, "size of a batch", at_least(1), unit="sequences"),
  budget=Knob(
    0.0,
    "time budget of SFT from Hugging Face folders; sft.steps is derived from a measured rate. 0: "
    "use sft.steps",
    at_least(0),
    unit="seconds",
  ),
)

REWARD = dict(
  **optimizer(lr=1e-3, schedule="cosine"),
  path=Knob("", 'Hugging Face folder or hub name of a sequence classifier; "": it is fitted'),
  **served("that scores the samples of a run from Hugging Face folders, instead of `path`"),
  label=Knob(
    "",
    "if a classifier has several labels: the label that is the reward, by name or number, or a "
    'weighted sum such as "helpful:0.8,verbose:-0.2"; "": there is only one label',
  ),
  revision=Knob("", "as policy.revision"),
  **chat("what the reward model reads"),
  strip_thinking=Knob(
    False,
    "leave reasoning between <think> tags out of what the reward model reads; it still counts in the "
    "length",
  ),
  input=Knob(
    "text",
    'what the reward model of a run from Hugging Face folders reads: a response\'s "text", rendered '
    'again; the policy\'s own "tokens"; "auto": the tokens if the two models render the run\'s prompts '
    "alike. See docs/models.md",
    one_of("auto", "tokens", "text"),
  ),
  max_length=Knob(
    0, "longest input; longer ones lose their beginning. 0: no limit", at_least(0), unit="tokens"
  ),
  max_reply_length=Knob(
    0,
    "longest reply of a pair; longer ones are truncated and no pair is dropped. 0: the limits in "
    "`data`",
    at_least(0),
    unit="tokens",
  ),
  pairs=Knob(2048, "training pairs", at_least(1)),
  epochs=Knob(4, "passes over the pairs", at_least(1)),
  batch_size=Knob(32, "size of a batch", at_least(1), unit="pairs"),
  budget=Knob(
    0.0,
    "time budget from Hugging Face folders, replaces reward.epochs. 0: use reward.epochs",
    at_least(0),
    unit="seconds",
  ),
  choice_temperature=Knob(0.3, "T in P(a is preferred) = sigmoid((gold_a - gold_b) / T)", above(0)),
  label_flip=Knob(0.2, "fraction of labels that are then flipped", within("[0, 1]")),
  contrast=Knob(
    0,
    "pairs added for each training pair of the gold-reward task: its preferred response beats a "
    "response to another prompt, under its own prompt",
    at_least(0),
    unit="pairs",
  ),
  heldout_pairs=Knob(512, "held-out pairs with clean labels, to measure accuracy", at_least(1)),
  ensemble=Knob(
    1, "score heads on one backbone, each fitted on a bootstrap of the pairs", at_least(1)
  ),
  combine=Knob("mean", "how the heads' scores are combined", one_of(*COMBINE)),
  variance_weight=Knob(1.0, 'weight of the variance in "mean_minus_variance"', at_least(0)),
  sum_to_zero=Knob(0.0, "weight in the loss of the squared mean score of a batch", at_least(0)),
)

GOLD = dict(
  formula=Knob(
    "",
    "Python file with gold(prompt, response, ended): the gold reward of the gold-reward task and "
    'of task "lab_notes", as docs/lab.md describes; "": the built-in one',
  ),
  **optimizer(lr=1e-3, schedule="cosine"),
  path=Knob("", 'Hugging Face folder of a finished one; "": it is fitted'),
  depth=Knob(
    2, "layers of the gold model for each layer of the policy, from which it is grown", at_least(1)
  ),
  epochs=Knob(1, "passes over the pairs", at_least(1)),
  batch_size=Knob(32, "size of a batch", at_least(1), unit="pairs"),
  budget=Knob(
    0.0, "time budget, replaces gold.epochs. 0: use gold.epochs", at_least(0), unit="seconds"
  ),
)

LORA = dict(
  rank=Knob(0, "rank of the adapters; 0: no adapters, every parameter is trained", at_least(0)),
  alpha=Knob(16.0, "the adapters' output is multiplied by alpha / rank", above(0)),
  targets=Knob(
    "attn/(q|k|v|o)|mlp/(gate|up|down)",
    "regular expression for the paths of the adapted linear layers; see models.transformer",
  ),
  export=Knob(
    "merged",
    'how adapters are exported: "merged" into the weights, or as a "peft" adapter folder',
    one_of("merged", "peft"),
  ),
)

DATA = dict(
  name=Knob(
    "",
    "path, folder or glob of JSON lines or parquet, tfds:NAME, or hf:OWNER/NAME; several are "
    "separated by commas",
  ),
  root=Knob(
    "",
    'folder in which relative paths start and from whose files tfds:NAME is prepared ("": from '
    "the hub)",
  ),
  split=Knob(
    "train", "split of tfds: and hf: names, and of a folder that has files of several splits"
  ),
  date=Knob(
    "",
    'today\'s date in chat templates; "": the day that the run begins; a run keeps the date on '
    "which it began",
    DATE,
    free=True,
  ),
  tfds_dir=Knob("", 'folder of prepared data sets; "": ~/tensorflow_datasets'),
  weights=Knob(
    (), "relative sampling rate of each name; (): proportional to its number of rows", WEIGHTS
  ),
  max_bad_share=Knob(
    0.01, "largest fraction of broken rows in a name; the run stops above it", within("[0, 1]")
  ),
  max_prompt_length=Knob(512, "rows with a longer prompt are dropped", at_least(1), unit="tokens"),
  max_response_length=Knob(
    512, "rows with a longer response are dropped", at_least(1), unit="tokens"
  ),
  max_chosen_length=Knob(
    512,
    "rows with a longer chosen response are dropped, also in RL (the paper's filter). 0: off",
    at_least(0),
    unit="tokens",
  ),
  unique=Knob(False, "use rows only once if they are equal in everything that a task reads"),
  buckets=Knob(
    (),
    "padded lengths of SFT and reward batches, each compiled once; (): the longest row",
    BUCKETS,
    unit="tokens",
  ),
  pack=Knob(
    False, "packing in SFT: whole dialogues fill each line, and the loss is over every token"
  ),
)

LM = dict(
  **optimizer(lr=1e-3, schedule="cosine"),
  steps=Knob(1000, "length of language modelling", at_least(1), unit="updates"),
  batch_size=Knob(16, "size of a batch", at_least(1), unit="lines"),
  budget=Knob(
    0.0,
    "time budget; scratch.lm.steps is derived from a measured rate. 0: use scratch.lm.steps",
    at_least(0),
    unit="seconds",
  ),
)

SCRATCH = dict(
  arms=Knob(
    ("vanilla", "r2m"),
    "variants to run; the last is exported to WORKDIR/export, the others to folders in it",
  ),
  corpus=Knob("", "data for the tokenizer and for language modelling"),
  sft=Knob("", "data with responses"),
  pairs=Knob("", "data with chosen and rejected responses"),
  prompts=Knob("", "prompts of RL"),
  sft_val=Knob("", "held-out data with responses"),
  prompts_val=Knob("", "held-out prompts"),
  pairs_val=Knob("", "held-out pairs; each name gets its own line in the report"),
  pairs_dev=Knob("", 'held-out pairs, of which only rows with meta.group = "val" are measured'),
  samples=Knob(256, "held-out prompts sampled before and after RL", at_least(1)),
  download=Knob("", "what to download and from where, printed if the data is missing"),
  lm=Section("Language modelling; otherwise as `sft`", LM),
)

NOTES = dict(
  demonstrations=Knob(
    256, "demonstrations of SFT; 0: RL starts from `policy.path` itself", at_least(0)
  ),
  epochs=Knob(1, "passes over the demonstrations", at_least(1)),
  proxy=Knob(
    "head",
    'what is fitted to the preferences: a linear score "head" on the policy\'s backbone, or the "whole" '
    "model, as task=reward does",
    one_of("head", "whole"),
  ),
)

TOKENIZER = dict(
  vocab_size=Knob(
    4096, "entries, including the 256 bytes and the special tokens", at_least(300), unit="tokens"
  ),
  min_frequency=Knob(2, "a pair of pieces is merged if it occurs this often", at_least(1)),
)

GENERATE = dict(
  input=Knob("", "JSON lines with prompt, as text or messages"),
  output=Knob("", "file for the answers"),
  rows=Knob(0, "answer only the first rows; 0: all", at_least(0), unit="rows"),
  max_new_tokens=Knob(128, "longest answer", at_least(1), unit="tokens"),
  temperature=Knob(1.0, "sampling temperature; 0: the most likely token", at_least(0)),
  temperature_by=Knob(
    {},
    "temperatures by the category of a row, which replace it, as a dict such as {'math': 0.0}",
    TEMPERATURES,
  ),
  **TRUNCATION,
  n=Knob(1, "answers for each prompt", at_least(1)),
  seed=Knob(
    -1,
    "seed of the samples; -1: `seed`",
    Rule(lambda x: -1 <= x < 2**32, "must be -1, or in [0, 2**32)", "-1, or in [0, 2**32)"),
  ),
  batch_size=Knob(16, "size of a batch", at_least(1), unit="answers"),
  format=Knob(
    "rows",
    'form of the output: the input\'s "rows" with the answers, or the format of another evaluator',
    one_of(*FORMATS),
  ),
  name=Knob("", 'name of the model in these files; "": the name of its folder'),
)

SCORE = dict(
  input=Knob("", "JSON lines with prompt and `field`"),
  field=Knob("response", 'field of the reply; "text" in files that task=generate writes'),
  output=Knob("", "file for the scores"),
  batch_size=Knob(16, "size of a batch", at_least(1), unit="rows"),
)

JUDGE = dict(
  candidate=Knob(
    "",
    "JSON lines with the prompts and the answers that are judged, as task=generate writes them; "
    '"": config.policy.path answers config.generate.input first',
  ),
  candidate_field=Knob("text", "field of the candidate's answer"),
  baseline=Knob(
    "", 'JSON lines with the answers to compare with; "": the candidate\'s rows hold them'
  ),
  baseline_field=Knob(
    "",
    'field of the baseline\'s answer; "": "text" in its own file, "reference" in the candidate\'s',
  ),
  url=Knob("", "judge: an OpenAI-compatible endpoint", ADDRESS),
  model=Knob("", "name of the model at the endpoint"),
  reward=Knob("", "judge: Hugging Face folder or hub name of a reward model"),
  judgments=Knob("", "judge: JSON lines with id and winner, or preference"),
  votes=Knob("", "JSON lines of the same form, with which the judge's agreement is measured"),
  key_env=Knob("OPENAI_API_KEY", "environment variable with the endpoint's key"),
  template=Knob("alpaca_eval", "protocol of the questions, see docs/judge.md", one_of(*PROTOCOLS)),
  both_orders=Knob(True, "ask about each pair in both orders; False: in one, drawn by the seed"),
  repeats=Knob(1, "times that each question is asked", at_least(1)),
  answer_temperature=Knob(0.0, "sampling temperature of the judge", at_least(0)),
  max_tokens=Knob(0, "longest answer; 0: the template's own", at_least(0), unit="tokens"),
  logprobs=Knob(True, "request the label's log-probabilities if the answer is only a label"),
  body=Knob(
    "", "JSON object of further fields of each request; null removes one of our fields", OBJECT
  ),
  workers=Knob(8, "questions asked at a time", at_least(1)),
  timeout=Knob(120.0, "time that one attempt may take", above(0), unit="seconds"),
  retries=Knob(6, "further attempts after a failed one", at_least(0)),
  backoff=Knob(
    1.0,
    "wait before the second attempt, doubled before each further one",
    at_least(0),
    unit="seconds",
  ),
  longest_wait=Knob(
    600.0, "if a server requests a longer wait, the task stops", at_least(0), unit="seconds"
  ),
  prompt_price=Knob(0.0, "price of a million prompt tokens; 0: unknown", at_least(0), unit="$"),
  completion_price=Knob(0.0, "price of a million tokens of answers", at_least(0), unit="$"),
  max_cost=Knob(
    0.0,
    "the task stops before its questions cost more than this; 0: no limit",
    at_least(0),
    unit="$",
  ),
)

REWARDBENCH = dict(
  data=Knob(
    "",
    "preferences, named as in data.name: RewardBench 2's columns or pairs in any form of data.md",
  ),
)

EXPORT = dict(
  checkpoint=Knob(
    "", "workdir of a run, or WORKDIR/checkpoints/ARM[/STEP], or WORKDIR/stages/STAGE"
  ),
  out=Knob("", "folder in which policy and reward are written"),
  check=Knob(True, "compare with transformers if torch is installed; loads the model once more"),
  push_to=Knob("", "hub name OWNER/MODEL; also uploads OWNER/MODEL-policy and OWNER/MODEL-reward"),
  private=Knob(True, "whether models that push_to creates are private"),
  revision=Knob("", 'branch that push_to uploads to, made if it does not exist; "": main'),
  pull_request=Knob(False, "push_to opens a pull request in existing models"),
  license=Knob(
    "", 'license in the model card, such as "apache-2.0"; "": the license of the base\'s card'
  ),
)

LOG = dict(
  checkpoint_every=Knob(
    40, "interval between checkpoints; the last step is always saved", at_least(1), unit="RL steps"
  ),
  samples=Knob(12, "rows of the sample table, before and after", at_least(1)),
  to=Knob(
    ("tensorboard",),
    "trackers that also get the scalars of metrics.jsonl, see docs/trackers.md; (): none",
    KNOWN_TRACKERS,
  ),
  profile=Knob(
    (),
    "(first step, number of steps) of RL that are traced to WORKDIR/profile; (): none",
    WINDOW,
    unit="RL steps",
  ),
  peak_flops=Knob(
    0.0,
    "peak of one device, for speed/mfu; 0: the vendor's figure for bfloat16, and no speed/mfu if "
    "the device is not known",
    at_least(0),
    FINITE,
    unit="FLOP/s",
  ),
)

EVAL = dict(
  every=Knob(
    0,
    "interval between evaluations on held-out prompts, also before the first step and after the "
    "last; 0: none",
    at_least(0),
    unit="RL steps",
  ),
  prompts=Knob(64, "held-out prompts, one sample each", at_least(2)),
  data=Knob(
    "",
    'held-out prompts, named as in data.name; "": a random part of the run\'s prompts, set aside',
  ),
  batch_size=Knob(64, "prompts at a time", at_least(1), unit="sequences", free=True),
  gold=Section(
    "A second reward model, which only measures",
    dict(
      path=Knob(
        "",
        "Hugging Face folder or hub name of a sequence classifier of another family; any tokenizer",
      ),
      **served("that scores the held-out samples, instead of `path`"),
    ),
  ),
)

STOP = dict(
  kl=Knob(
    0.0,
    "the run ends after the first step whose `kl` in metrics.jsonl is at least this; 0: never",
    at_least(0),
    unit="nats per sequence",
  ),
  patience=Knob(
    0,
    "the run ends after this many evaluations in a row without a new best of "
    "checkpoint.best_metric; 0: never",
    at_least(0),
    unit="evaluations",
  ),
)

CHECKPOINT = dict(
  keep_last=Knob(
    2, "newest checkpoints kept; with 1, a damaged one has no predecessor", at_least(1)
  ),
  keep_every=Knob(
    0, "also keep the steps that are multiples of this; 0: none", at_least(0), unit="RL steps"
  ),
  keep_best=Knob(0, "also keep this many with the best value of best_metric", at_least(0)),
  best_metric=Knob(
    "",
    'name in metrics.jsonl, read at the checkpoint\'s step, or "eval/NAME" of an evaluation; "": '
    '"eval/gold" if it is measured, else "reward/used"',
  ),
  best_mode=Knob("max", "which value of best_metric is best", one_of("max", "min")),
  background=Knob(True, "write while the next steps run"),
  fork_from=Knob("", "workdir of a run with other settings to start from; that run is not changed"),
)

GUARD = dict(
  max_skipped=Knob(
    10, "the run stops after this many skipped updates in a row", at_least(1), unit="RL steps"
  ),
  spike=Knob(
    10.0,
    "gradient norms above this multiple of max_grad_norm are counted",
    above(1, "must be above 1, such as 10"),
  ),
)

REPLAY = dict(
  arm=Knob("", 'variant of the run; "": the only one', one_of("", *VARIANTS)),
  step=Knob(0, "RL step, as in metrics.jsonl", at_least(0)),
  prompt=Knob(0, "index of the prompt in the step", at_least(0)),
  example_id=Knob(
    -1, "id of the prompt in the data, as in skipped.jsonl; -1: use replay.prompt", at_least(-1)
  ),
  sample=Knob(0, "index among the prompt's K responses", at_least(0)),
)

COMPARE = dict(
  runs=Knob((), "workdirs of the runs; runs that differ only in `seed` are one curve", RUNS),
)

ANALYSE = dict(
  what=Knob(
    "",
    'pieces of the analysis, separated by commas; "": all for which the run has data',
    KNOWN_PIECES,
  ),
  prompts=Knob(
    256,
    "held-out prompts of the gold-reward task, or pairs of a run on text",
    at_least(20, "must be at least 20, which probes split into 5 x 4 parts"),
  ),
  samples=Knob(8, "responses per prompt on the gold-reward task", at_least(2)),
  pairs=Knob("", 'held-out pairs for a run on text; "": scratch.pairs_val'),
)

PLAN = dict(
  topology=Knob(
    "",
    'hardware, such as v5p:2x2x4, gpu:h100x8 or cpu:1; "auto": the smallest slice of each TPU that '
    "fits",
  ),
  generations=Knob(GENERATIONS, 'TPUs that "auto" tries', KNOWN_TPUS),
  policy=Knob("", "name of a shape (plan/sizes.py) if policy.path is not a local folder"),
  reward=Knob("", "name of a shape (plan/sizes.py) if reward.path is not a local folder"),
  prompt_length=Knob(0, "padded prompt; 0: data.max_prompt_length", at_least(0), unit="tokens"),
  reward_length=Knob(
    0,
    "padded input of the reward model; 0: prompt and response together",
    at_least(0),
    unit="tokens",
  ),
  lengths=Knob(
    (),
    "lengths of responses as shares of rollout.max_new_tokens, all equally likely, for counting "
    "the work under packing and halvings; (): all responses have the maximum length",
    LENGTHS,
  ),
  compile=Knob(True, "False: only count, which takes seconds and needs no compiler"),
  layers=Knob(0, "at most this many layers of each model, for a quick look; 0: all", at_least(0)),
  compare=Knob("vanilla", 'variant that the run is compared with; "": none', one_of("", *VARIANTS)),
)

HOSTS = dict(
  coordinator=Knob(
    "",
    'HOST:PORT of process 0; "": from JAX_COORDINATOR_ADDRESS or the cluster, "none": one process',
  ),
  processes=Knob(0, "number of processes; 0: from JAX_NUM_PROCESSES or the cluster"),
  process=Knob(-1, "index of this process, from 0; -1: from JAX_PROCESS_ID or the cluster"),
  start_timeout=Knob(
    300, "time within which all processes must have joined", at_least(1), unit="seconds"
  ),
  heartbeat_timeout=Knob(
    100,
    "time without a heartbeat after which a process counts as lost",
    at_least(1),
    unit="seconds",
  ),
  end_timeout=Knob(
    30, "time that a finished process waits for the others", at_least(1), unit="seconds"
  ),
)

LAB = dict(
  arms=Knob(
    ("vanilla", "scaled", "r2m"),
    'arms as "VARIANT[.NAME] [FIELD=VALUE ...]"; if `variant` is set, only that one runs',
  ),
  seeds=Knob((0, 1, 2, 3, 4), "seeds of every arm", *SEEDS),
  betas=Knob((1.0,), "KL weights, as multiples of the arm's own kl.beta", SOME_POSITIVE),
  together=Knob(10, "runs in one program at a time, limited by memory", at_least(1)),
  kls=Knob(
    (2.0, 4.0),
    "KLs at which arms are compared by gold reward",
    SOME_POSITIVE,
    unit="nats per sequence",
  ),
  stops=Knob(
    (2.0, 4.0), "KLs at which the baseline is stopped early", POSITIVE, unit="nats per sequence"
  ),
  baseline=Knob(
    "vanilla", "arm with which each arm is paired, or BASELINE.NAME if there is such an arm"
  ),
  control=Knob("scaled", 'the same for a second comparison; "": none'),
  contrasts=Knob(
    (),
    'registered contrasts of arms whose KL is held, each as "ARM - ARM"; (): none',
    CONTRASTS,
  ),
  margin=Knob(
    0.05, "two arms are equivalent if they differ by less than this", above(0), unit="gold"
  ),
  tail=Knob(
    30,
    "number of last steps whose mean gold is a seed's value in a contrast",
    at_least(1),
    unit="RL steps",
  ),
  probe_every=Knob(
    10,
    "interval at which fixed responses are scored with the current feedback",
    at_least(1),
    unit="RL steps",
  ),
  probe_prompts=Knob(32, "prompts of these fixed responses", at_least(1)),
  best_prompts=Knob(64, "prompts for best-of-n", at_least(1)),
  best_samples=Knob(256, "responses per prompt from which best-of-n is estimated", at_least(1)),
)

KNOBS = Section(
  "The run",
  dict(
    **RUN,
    rollout=Section("Sampling", ROLLOUT),
    policy=Section("The policy and its optimizer", POLICY),
    ppo=Section("The policy update", PPO),
    critic=Section('The critic of algorithm "ppo" and its optimizer', CRITIC),
    kl=Section("KL to the reference policy", KL),
    shaping=Section(
      "Changes to the scores before advantages, in this order (`objective.shape_scores`)", SHAPING
    ),
    certify=Section(
      "Sign-certified advantages, on the gold-reward task (`algorithm/certify.py`)", CERTIFY
    ),
    r2m=Section("The reward head that reads the policy's hidden states", R2M),
    sft=Section("Supervised fine-tuning", SFT),
    reward=Section("The proxy reward model, fitted to noisy preferences", REWARD),
    gold=Section(
      'The gold reward: a formula, or the gold reward model of task "lab_text", which is fitted to '
      "clean pairs and otherwise as `reward`",
      GOLD,
    ),
    lora=Section(
      'LoRA adapters of a Hugging Face folder\'s policy, and of its reward model in task "reward"',
      LORA,
    ),
    data=Section("Rows for runs on text; data/forms.py lists the forms", DATA),
    scratch=Section(
      'Training from scratch on text (task "scratch"); data sets are named as in data.name', SCRATCH
    ),
    notes=Section(
      'The notes task on a pretrained model (task "lab_notes"); docs/lab.md',
      NOTES,
      tasks=("lab_notes",),
    ),
    tokenizer=Section(
      'A tokenizer, and a model of policy.arch with random weights (task "tokenizer")', TOKENIZER
    ),
    generate=Section('Batch generation (task "generate")', GENERATE, free=True),
    score=Section('Batch scoring (task "score")', SCORE, free=True),
    judge=Section(
      'Two sets of answers compared by a judge (task "judge"); docs/judge.md', JUDGE, free=True
    ),
    rewardbench=Section(
      'A reward model on preferences (task "rewardbench"); docs/judge.md',
      REWARDBENCH,
      free=True,
    ),
    export=Section('A checkpoint as Hugging Face folders (task "export")', EXPORT, free=True),
    log=Section("Logging", LOG, free=True),
    eval=Section("Held-out evaluation during a run; docs/evaluate.md", EVAL),
    stop=Section("When a run ends before its last step; docs/evaluate.md", STOP, free=True),
    checkpoint=Section("Which checkpoints are kept, and where a run starts", CHECKPOINT, free=True),
    guard=Section("Non-finite updates are skipped and counted", GUARD, free=True),
    replay=Section(
      'One sample of the run in WORKDIR, recomputed (task "replay")', REPLAY, free=True
    ),
    compare=Section('Several runs on one page (task "compare")', COMPARE, free=True),
    analyse=Section(
      'The paper\'s evidence from the run in WORKDIR (task "analyse"); docs/analyse.md',
      ANALYSE,
      free=True,
    ),
    plan=Section(
      'Whether the run fits a machine (task "plan"); config.mesh is used if it covers the chips',
      PLAN,
      free=True,
    ),
    hosts=Section(
      "The processes of one run, one per host; found on TPU slices, GKE, Slurm and Open MPI without "
      "these settings",
      HOSTS,
      free=True,
    ),
    lab=Section(
      'Arms x seeds x KL weights on the gold-reward task (task "lab") or on text ("lab_text", '
      '"lab_notes"); docs/lab.md',
      LAB,
      free=True,
      tasks=("lab", "lab_text", "lab_notes"),
    ),
  ),
)


# ---- configs and documentation made from the table ----


def make_config(parts: dict) -> ConfigDict:
  """A config with all defaults of `parts`: name -> Knob or Section."""
  config = ConfigDict()
  for name, part in parts.items():
    config[name] = make_config(part.parts) if isinstance(part, Section) else part.default
  return config


def walk(section: Section, prefix: str = "") -> Iterator[tuple[str, Knob | Section]]:
  """(dotted name, Knob or Section) of everything in a section; a section comes before its parts."""
  for name, part in section.parts.items():
    yield prefix + name, part
    if isinstance(part, Section):
      yield from walk(part, f"{prefix}{name}.")


# settings that a run may change from one start to the next: they affect placement, duration and
# logging, not the result
FREE = tuple(name for name, part in walk(KNOBS) if part.free)


def document() -> str:
  """docs/config.md: a table for each section."""
  lines = [
    "# Every knob",
    "",
    "Generated from [`r2m_jax/knobs.py`](../r2m_jax/knobs.py) by `python -m r2m_jax.knobs > "
    "docs/config.md`; edit that file, not this one.",
    "Set a knob on the command line with `--config.FIELD=VALUE`, or in a file of `configs/`. A run "
    "can be resumed with another value",
    'of a knob only if "may change" is yes.',
  ]
  sections = [("", KNOBS), *((n, part) for n, part in walk(KNOBS) if isinstance(part, Section))]
  for name, section in sections:
    heading = f"`{name}`: {section.title}" if name else section.title
    lines += ["", f"## {heading}", ""]
    lines += ["| field | default | unit, values | may change | what it does |"]
    lines += ["| --- | --- | --- | --- | --- |"]
    prefix = f"{name}." if name else ""
    for field, part in section.parts.items():
      if isinstance(part, Knob):
        lines.append(_row(prefix + field, part, part.free or section.free))
  return "\n".join(lines) + "\n"


def _row(field: str, knob: Knob, free: bool) -> str:
  """A knob's line of docs/config.md."""
  values = "; ".join([*([knob.unit] if knob.unit else []), *(rule.bound for rule in knob.rules)])
  default = f'"{knob.default}"' if isinstance(knob.default, str) else repr(knob.default)
  default = default.replace("'", '"').replace("|", "\\|")
  about = knob.about.replace("|", "\\|")
  return f"| `{field}` | `{default}` | {values} | {'yes' if free else ''} | {about} |"


if __name__ == "__main__":
  print(document(), end="")
