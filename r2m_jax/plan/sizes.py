"""The run in numbers: architectures, rows and lengths. What everything else here is computed
from.
"""

import dataclasses
import json
import pathlib

from r2m_jax.algorithm.advantages import ESTIMATORS
from r2m_jax.algorithm.variants import VARIANTS
from r2m_jax.config import ConfigError
from r2m_jax.data.text import bucket
from r2m_jax.goldtask import task as goldtask
from r2m_jax.models.arch import ArchConfig, RopeScaling

# Shapes by name, so that a plan needs no download: the config.json of each model on the hub.
LLAMA_8B = ArchConfig(
  family="llama",
  vocab_size=128256,
  hidden_size=4096,
  num_layers=32,
  num_heads=32,
  num_kv_heads=8,
  intermediate_size=14336,
  norm_eps=1e-5,
  rope_theta=5e5,
  max_positions=8192,
)
ARCHS = {
  "qwen2.5-0.5b": ArchConfig(
    family="qwen2",
    vocab_size=151936,
    hidden_size=896,
    num_layers=24,
    num_heads=14,
    num_kv_heads=2,
    intermediate_size=4864,
    qkv_bias=True,
    tie_embeddings=True,
    rope_theta=1e6,
    max_positions=32768,
  ),
  "qwen2.5-3b": ArchConfig(
    family="qwen2",
    vocab_size=151936,
    hidden_size=2048,
    num_layers=36,
    num_heads=16,
    num_kv_heads=2,
    intermediate_size=11008,
    qkv_bias=True,
    tie_embeddings=True,
    rope_theta=1e6,
    max_positions=32768,
  ),
  "llama3-8b": LLAMA_8B,
  "llama3.1-8b": LLAMA_8B.replace(
    rope_scaling=RopeScaling("llama3", 8.0, 1.0, 4.0, 8192), max_positions=131072
  ),
  "pythia-2.8b": ArchConfig(
    family="gpt_neox",
    vocab_size=50304,
    hidden_size=2560,
    num_layers=32,
    num_heads=32,
    intermediate_size=10240,
    norm="layer",
    norm_eps=1e-5,
    activation="gelu",
    gated_mlp=False,
    qkv_bias=True,
    out_bias=True,
    mlp_bias=True,
    parallel_residual=True,
    rotary_fraction=0.25,
    max_positions=2048,
  ),
}


@dataclasses.dataclass(frozen=True)
class Sizes:
  """One step of a run. B rows, of which P are greedy if those are the baseline."""

  arch: ArchConfig  # of the policy
  reward_arch: ArchConfig
  prompts: int  # P
  rows: int  # B
  prompt_length: int  # Lp, padded
  response_length: int  # T
  reward_length: int  # tokens of the reward model's padded input
  same_tokens: bool  # the reward model's rows are the policy's

  @property
  def length(self) -> int:
    return self.prompt_length + self.response_length


def sizes_of(config) -> Sizes:
  """The sizes of a config's step. Raises ConfigError where an architecture is not known here."""
  if config.policy.path or config.plan.policy:
    arch = arch_of(config.policy.path, config.plan.policy, "policy")
  else:
    arch = ArchConfig(vocab_size=goldtask.VOCAB_SIZE, **config.policy.arch)
  if config.reward.path or config.plan.reward:
    reward_arch = arch_of(config.reward.path, config.plan.reward, "reward")
  else:
    reward_arch = arch
  if config.plan.layers:

    def cut(arch):
      return arch.replace(num_layers=min(arch.num_layers, config.plan.layers))

    arch, reward_arch = cut(arch), cut(reward_arch)
  from_text = bool(config.policy.path or config.plan.policy)
  prompt = config.plan.prompt_length or (
    bucket(config.data.max_prompt_length) if from_text else goldtask.PROMPT_LENGTH
  )
  response = config.rollout.max_new_tokens
  own = bucket(prompt + response) if from_text else prompt + response
  prompts = config.rollout.prompts
  greedy = prompts if baseline_of(config) == "greedy" else 0
  return Sizes(
    arch,
    reward_arch.replace(lm_head=False),
    prompts,
    prompts * config.rollout.group_size + greedy,
    prompt,
    response,
    config.plan.reward_length or own,
    not from_text,
  )


def arch_of(path: str, name: str, which: str) -> ArchConfig:
  """What the config.json of a local folder says, else the shape called `name`."""
  file = pathlib.Path(path).expanduser() / "config.json"
  if path and file.is_file():
    try:
      return ArchConfig.from_hf(json.loads(file.read_text(encoding="utf-8")))
    except ValueError as error:
      raise ConfigError(f"config.{which}.path is {path!r}: {error}") from None
  if name in ARCHS:
    return ARCHS[name]
  if name:
    raise ConfigError(f"config.plan.{which} is {name!r}: choose one of {', '.join(ARCHS)}")
  raise ConfigError(
    f"config.{which}.path is {path!r}, which is no folder here: a plan downloads nothing; give a "
    "folder with a "
    f"config.json, or a shape by name as config.plan.{which}: {', '.join(ARCHS)}"
  )


def reads_feedback(config) -> bool:
  return VARIANTS[config.variant].width != ""


def fed_states(config, sizes: Sizes) -> tuple[int, int]:
  """(tokens, hidden size) of the states of a row that are fused into the reward, if any are."""
  if VARIANTS[config.variant].width == "reward":
    return sizes.reward_length, sizes.reward_arch.hidden_size
  return sizes.length, sizes.arch.hidden_size


def baseline_of(config) -> str:
  """What the config's estimator compares a reward with; see `advantages.Estimator`."""
  return ESTIMATORS[config.algorithm].baseline
