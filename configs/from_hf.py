"""R2M on your own policy and reward model: Hugging Face folders or names.

The two may have different tokenizers.

  python -m r2m_jax.main --config=configs/from_hf.py --workdir=runs/mine \\
    --config.policy.path=Qwen/Qwen2.5-0.5B-Instruct \\
    --config.reward.path=Skywork/Skywork-Reward-V2-Qwen3-0.6B --config.data.name=prompts.jsonl

prompts.jsonl holds {"prompt": text or messages} rows. It writes runs/mine/export/policy and
runs/mine/export/reward. `--config.task=sft` (rows with response) and `--config.task=reward`
(chosen, rejected) train the two beforehand. `--config.lora.rank=16` trains adapters only.

`--config=configs/from_hf.py:test` is a first try: three steps of 4 x 4 short responses, evaluated
before, between and after them on eight held-out prompts.
"""

from r2m_jax.configs import default


def get_config(size: str = ""):
  if size not in ("", "test"):
    raise ValueError(f"size {size!r} is unknown; use from_hf or from_hf:test")
  config = default.get_config()
  config.data.name = "prompts.jsonl"  # refused without models, which train on it
  config.steps = 100
  config.remat = "full"
  config.rollout.prompts = 16
  config.rollout.group_size = 8
  config.rollout.max_new_tokens = 256
  config.rollout.temperature = 0.7
  config.packing = (0.5, 0.7, 1.0)
  config.policy.lr = 1e-6
  config.r2m.lr = 1e-6
  config.r2m.attention_dim = 512
  config.reward.input = "auto"
  config.sft.lr = 1e-5
  config.sft.steps = 500
  config.sft.batch_size = 16
  config.reward.lr = 1e-5
  config.reward.epochs = 1
  config.reward.batch_size = 16
  if size == "test":
    config.steps = 3
    config.packing = (1.0,)
    config.rollout.prompts = 4
    config.rollout.group_size = 4
    config.rollout.max_new_tokens = 32
    config.eval.every = 1
    config.eval.prompts = 8
    config.sft.steps = 4
    config.sft.batch_size = 4
    config.reward.batch_size = 4
  return config
