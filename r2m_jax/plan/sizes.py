"""The sizes of a run: architectures, rows and lengths, from which everything else here is
computed.
"""

import dataclasses
import json
import pathlib

from r2m_jax.algorithm.advantages import ESTIMATORS
from r2m_jax.algorithm.variants import VARIANTS
from r2m_jax.config import ConfigError
from r2m_jax.data.text import bucket
from r2m_jax.goldtask import task as goldtask
from r2m_jax.models.arch import ArchConfig


def shape(
  model_type: str, vocab: int, hidden: int, layers: int, heads: int, wide: int, **more
) -> ArchConfig:
  """The architecture of a config.json with these sizes and fields; other fields have the family's
  defaults.
  """
  return ArchConfig.from_hf(
    dict(
      model_type=model_type,
      vocab_size=vocab,
      hidden_size=hidden,
      num_hidden_layers=layers,
      num_attention_heads=heads,
      intermediate_size=wide,
      **more,
    )
  )


def qwen(version: str, hidden: int, layers: int, heads: int, wide: int, **more) -> ArchConfig:
  kv = 8 if version == "qwen3" else 2
  length = 40960 if version == "qwen3" else 32768
  fields = dict(num_key_value_heads=kv, rope_theta=1e6, max_position_embeddings=length)
  return shape(version, 151936, hidden, layers, heads, wide, **fields, **more)


def llama(hidden: int, layers: int, heads: int, wide: int, factor: float = 0, **more) -> ArchConfig:
  """Llama 3 or, with a factor, 3.1 and 3.2."""
  fields = dict(num_key_value_heads=8, rms_norm_eps=1e-5, rope_theta=5e5)
  fields |= dict(max_position_embeddings=131072 if factor else 8192)
  stretched = dict(rope_type="llama3", factor=factor, low_freq_factor=1.0, high_freq_factor=4.0)
  stretched |= dict(original_max_position_embeddings=8192)
  scaling = stretched if factor else None
  return shape("llama", 128256, hidden, layers, heads, wide, rope_scaling=scaling, **fields, **more)


def gemma3(hidden: int, layers: int, heads: int, wide: int, **more) -> ArchConfig:
  """The language model of a folder with a vision tower."""
  scaling = dict(rope_type="linear", factor=8.0)
  fields = dict(sliding_window=1024, rope_scaling=scaling, **more)
  return shape("gemma3_text", 262208, hidden, layers, heads, wide, **fields)


TIED = dict(tie_word_embeddings=True)
OLMO = dict(rope_theta=5e5, rms_norm_eps=1e-6)
YARN = dict(rope_type="yarn", factor=8.0, original_max_position_embeddings=8192)

# Shapes by name, so that a plan needs no download: the config.json of each model on the hub.
ARCHS = {
  "qwen2.5-0.5b": qwen("qwen2", 896, 24, 14, 4864, **TIED),
  "qwen2.5-3b": qwen("qwen2", 2048, 36, 16, 11008, **TIED),
  "qwen3-0.6b": qwen("qwen3", 1024, 28, 16, 3072, **TIED),
  "qwen3-1.7b": qwen("qwen3", 2048, 28, 16, 6144, **TIED),
  "qwen3-4b": qwen("qwen3", 2560, 36, 32, 9728, **TIED),
  "qwen3-8b": qwen("qwen3", 4096, 36, 32, 12288),
  "llama3-8b": llama(4096, 32, 32, 14336),
  "llama3.1-8b": llama(4096, 32, 32, 14336, factor=8.0),
  "llama3.2-1b": llama(2048, 16, 32, 8192, factor=32.0, **TIED),
  "llama3.2-3b": llama(3072, 28, 24, 8192, factor=32.0, **TIED),
  "gemma2-2b": shape("gemma2", 256000, 2304, 26, 8, 9216),
  "gemma2-9b": shape("gemma2", 256000, 3584, 42, 16, 14336, num_key_value_heads=8),
  "gemma3-1b": shape(
    "gemma3_text", 262144, 1152, 26, 4, 6912, num_key_value_heads=1, sliding_window=512
  ),
  "gemma3-4b": gemma3(2560, 34, 8, 10240),
  "gemma3-12b": gemma3(3840, 48, 16, 15360, num_key_value_heads=8),
  "olmo2-7b": shape("olmo2", 100352, 4096, 32, 32, 11008, max_position_embeddings=4096, **OLMO),
  "olmo3-7b": shape(
    "olmo3", 100278, 4096, 32, 32, 11008, max_position_embeddings=65536, rope_scaling=YARN, **OLMO
  ),
  "smollm3-3b": shape(
    "smollm3", 128256, 2048, 36, 16, 11008, rope_theta=5e6, max_position_embeddings=65536
  ),
  # without its longrope factors, which cost nothing
  "phi4-mini": shape(
    "phi3", 200064, 3072, 32, 24, 8192, num_key_value_heads=8, partial_rotary_factor=0.75, **TIED
  ),
  "pythia-2.8b": shape("gpt_neox", 50304, 2560, 32, 32, 10240),
}
# Skywork-Reward-V2 models are classifiers with the shapes of their bases.
ARCHS |= {
  f"skywork-v2-{base}": ARCHS[base]
  for base in (
    *("qwen3-0.6b", "qwen3-1.7b", "qwen3-4b", "qwen3-8b"),
    *("llama3.2-1b", "llama3.2-3b", "llama3.1-8b"),
  )
}


@dataclasses.dataclass(frozen=True)
class Sizes:
  """One step of a run with B rows, P of which are greedy if greedy responses are the baseline."""

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
  """The sizes of a config's step. Raises ConfigError if an architecture is not known here."""
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
      count = min(arch.num_layers, config.plan.layers)
      kept = {
        field: tuple(i for i in getattr(arch, field) if i < count)
        for field in ("sliding_layers", "unrotated_layers")
      }
      return arch.replace(num_layers=count, **kept)

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
  """The architecture in a local folder's config.json, or else the shape called `name`."""
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
  """The baseline of the config's estimator; see `advantages.Estimator`."""
  return ESTIMATORS[config.algorithm].baseline
