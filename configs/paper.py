"""The common settings of the paper's three experiments (arXiv 2601.22664), and the words that
choose an estimator and a variant.
"""

from r2m_jax.algorithm.variants import VARIANTS
from r2m_jax.configs import default

ESTIMATORS = ("rloo", "grpo")
AGGREGATIONS = {"grpo": "sequence_mean"}  # for an estimator with its own aggregation


def shared(words: str):
  """The common settings; `words` such as `grpo`, `rloo,vanilla` or `r2m_untrained`. The default is
  RLOO + R2M.
  """
  config = default.get_config()
  for word in filter(None, words.split(",")):
    if word in ESTIMATORS:
      config.algorithm = word
    elif word in VARIANTS:
      config.variant = word
    else:
      raise ValueError(
        f"{word!r} is unknown; use {', '.join(ESTIMATORS)}, or a variant: {', '.join(VARIANTS)}"
      )
  config.ppo.aggregation = AGGREGATIONS.get(config.algorithm, config.ppo.aggregation)

  config.dtype = "bfloat16"
  config.param_dtype = "bfloat16"
  config.remat = "full"
  config.mesh = (1, -1, 1)
  config.ppo.epochs = 2
  config.ppo.clip_eps = 0.2  # our choice: the paper gives neither this nor beta
  config.kl.beta = 0.05
  config.reward.input = "auto"  # the policy's own tokens, if both models render alike
  config.rollout.temperature = 0.7  # nor top-k nor top-p
  config.r2m.omega_schedule = "cosine"
  config.r2m.alpha = 0.3
  config.r2m.attention_dim = 2048
  return config


def dialogue(words: str):
  """UltraFeedback, 64 prompts x 8 responses of up to 512 tokens, judged by Skywork's 8B reward
  model.
  """
  config = shared(words)
  config.data.name = "hf:HuggingFaceH4/ultrafeedback_binarized"
  config.data.split = "train_prefs"
  config.data.max_chosen_length = 512
  config.steps = 100
  config.rollout.prompts = 64
  config.rollout.group_size = 8
  config.rollout.max_new_tokens = 512
  config.ppo.accumulation = 16
  config.packing = (0.5, 0.7, 1.0)
  config.rollout.halvings = 2
  config.sft.batch_size = config.reward.batch_size = 64
  config.reward.path = "Skywork/Skywork-Reward-V2-Llama-3.1-8B"
  config.plan.reward = "llama3.1-8b"
  config.r2m.lr = 1e-6
  return config
