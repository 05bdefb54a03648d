"""What the paper's three experiments (arXiv 2601.22664) share, the words that choose an estimator
and a variant, and its three evaluations of a finished run:

  run="python -m r2m_jax.main --config.policy.path=runs/qwen/export/policy"
  judge="--config.judge.url=http://localhost:8000/v1 --config.judge.model=NAME"
  $run --config=configs/paper.py:evaluate,alpaca_eval --workdir=runs/qwen_alpaca $judge \\
    --config.generate.input=alpaca_eval.jsonl
  $run --config=configs/paper.py:evaluate,mt_bench --workdir=runs/qwen_mt $judge \\
    --config.generate.input=question.jsonl
  $run --config=configs/paper.py:evaluate,tldr --workdir=runs/tldr_wins $judge \\
    --config.generate.input=tldr_test.parquet

docs/reproduce.md says where the files come from, what it costs and what the paper got.
"""

from configs import default
from r2m_jax.algorithm.variants import VARIANTS

ESTIMATORS = ("rloo", "grpo")
AGGREGATIONS = {"grpo": "sequence_mean"}  # of an estimator whose loss has one of its own
# The paper gives no sampling settings of its evaluations. Lengths are those of the benchmarks' own
# tools; temperatures are ours.
EVALUATIONS = {
  "alpaca_eval": {
    "judge.template": "alpaca_eval",
    "judge.baseline_field": "reference",
    "generate.max_new_tokens": 2048,
    "generate.temperature": 0.7,
  },
  "mt_bench": {
    "judge.template": "mt_bench_single",
    "generate.max_new_tokens": 1024,
    "generate.temperature": 0.7,
  },
  "tldr": {
    "judge.template": "tldr",
    "judge.baseline_field": "completion",
    "generate.max_new_tokens": 50,
    "generate.temperature": 0.0,
    "generate.rows": 1000,
  },
}


def evaluate(words: list[str]):
  """`task=judge` as one of the paper's evaluations, named by the only word."""
  if len(words) != 1 or words[0] not in EVALUATIONS:
    raise ValueError(
      f"evaluate needs one of {', '.join(EVALUATIONS)} after a comma, such as evaluate,alpaca_eval"
    )
  config = default.get_config()
  config.task, config.dtype, config.param_dtype = "judge", "bfloat16", "bfloat16"
  config.mesh = (1, -1, 1)
  config.update_from_flattened_dict(EVALUATIONS[words[0]])
  return config


def get_config(words: str):
  """The shared settings; `words` as in `grpo`, `rloo,vanilla` or `r2m_untrained`. RLOO + R2M
  where it does not say. `evaluate,NAME` is an evaluation.
  """
  if words.split(",")[0] == "evaluate":
    return evaluate(words.split(",")[1:])
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

  config.dtype, config.param_dtype, config.remat = "bfloat16", "bfloat16", "full"
  config.mesh = (1, -1, 1)
  config.ppo.epochs = 2
  config.ppo.clip_eps = 0.2  # ours: the paper gives neither this nor beta
  config.kl.beta = 0.05
  config.rollout.temperature = 0.7  # and neither top-k nor top-p
  config.r2m.omega_schedule, config.r2m.alpha, config.r2m.attention_dim = "cosine", 0.3, 2048
  return config


def dialogue(words: str):
  """UltraFeedback, 64 prompts x 8 responses of up to 512 tokens, judged by Skywork's 8B reward
  model.
  """
  config = get_config(words)
  config.data.name = "hf:HuggingFaceH4/ultrafeedback_binarized"
  config.data.split = "train_prefs"
  config.data.max_chosen_length = 512
  config.steps = 100
  config.rollout.prompts, config.rollout.group_size, config.rollout.max_new_tokens = 64, 8, 512
  config.ppo.accumulation = 16
  config.sft.batch_size = config.reward.batch_size = 64
  config.reward.path, config.plan.reward = "Skywork/Skywork-Reward-V2-Llama-3.1-8B", "llama3.1-8b"
  config.r2m.lr = 1e-6
  return config
