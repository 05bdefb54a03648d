"""From scratch on real text: tokenizer, policy, reward model, RL.

The policy has 4 million parameters; RL is RLOO and RLOO + R2M.

  python -m r2m_jax.main --config=configs/real_small.py --config.data.root=DATA --workdir=runs/real_small

DATA has preferences/ and prompts/ with files of JSON lines or parquet, named as below; without them
the command prints what to download. The budgets add up to about 45 minutes on two cores, and the
same command resumes where it stopped.

The results depend on what else the machine does, and on two cores they are modest: replies make no
sense, and the reward model is hardly better than the rule that the longer reply wins. The point is
that every part works on real lengths and real noise. A run on two cores, shared with small jobs of
lower priority, took 47.7 minutes, 6 of them for measurements. Held-out perplexity was 203 (191 to
214) after 505 updates of language modelling and 185 (174 to 197) after 174 updates of SFT. The
reward model's accuracy over all validation pairs was 54.0% (50.0 to 58.0) after 337 updates; on no
set was it clearly above the length rule or its opposite. With feedback it was 54.2% before RL and
53.3% (49.5 to 57.2) after. In 40 RL steps per arm the frozen reward on held-out prompts rose from
-0.60 (-0.70 to -0.50) to 0.46 (0.39 to 0.53) for vanilla and 0.49 (0.43 to 0.55) for r2m, at a KL
of 7.8 and 7.9 nats, mostly by replies that reach the limit (92% of both, 41% before). With more
time, raise the budgets.
"""

from r2m_jax.configs import default

PREFERENCES = (
  "ultrafeedback",
  "hh_helpful_base",
  "hh_helpful_online",
  "hh_helpful_rejection_sampled",
  "alpaca_eval_direct",
  "alpaca_eval_via_reference",
)
PROMPTS = ("alpaca_eval", "dialogsum")
DOWNLOAD = (
  "put the splits of UltraFeedback "
  "(huggingface.co/datasets/HuggingFaceH4/ultrafeedback_binarized), HH-RLHF "
  "(huggingface.co/datasets/Anthropic/hh-rlhf), AlpacaEval (github.com/tatsu-lab/alpaca_eval) and "
  "DialogSum "
  "(github.com/cylnlp/dialogsum) into one folder, named as configs/real_small.py says: "
  "--config.data.root=FOLDER"
)


def files(folder: str, names, split: str) -> str:
  return ",".join(f"{folder}/{name}_{split}.*" for name in names)


def get_config(size: str = ""):
  if size not in ("", "test"):
    raise ValueError(f"size {size!r} is unknown; use real_small or real_small:test")
  config = default.get_config()
  config.task = "scratch"
  names = config.scratch
  names.download = DOWNLOAD
  # hh_harmless is not imitated: its replies are only used for measurements
  names.sft = files("preferences", PREFERENCES, "train") + "," + files("prompts", PROMPTS, "train")
  names.corpus = names.sft
  names.pairs = files("preferences", PREFERENCES, "train")
  names.prompts = files("preferences", PREFERENCES, "train")
  names.sft_val = files("preferences", PREFERENCES, "val") + "," + files("prompts", PROMPTS, "val")
  names.prompts_val = files("preferences", PREFERENCES, "val")
  names.pairs_val = "preferences/*_val.*"
  names.pairs_dev = "preferences/*_dev.*"

  config.tokenizer.vocab_size = 4096
  arch = config.policy.arch
  arch.hidden_size = 256
  arch.num_layers = 4
  arch.num_heads = 4
  arch.num_kv_heads = 4
  arch.intermediate_size = 704
  arch.tie_embeddings = True
  config.data.max_prompt_length = 192
  config.data.max_response_length = 256
  config.data.max_chosen_length = 512
  config.data.unique = True
  config.data.buckets = (128, 256)

  names.lm.budget = 600.0
  names.lm.batch_size = 8
  names.lm.lr = 3e-3
  names.lm.warmup_steps = 20
  config.sft.budget = 240.0
  config.sft.batch_size = 16
  config.sft.lr = 1e-3
  config.sft.warmup_steps = 10
  config.reward.budget = 420.0
  config.reward.batch_size = 8
  config.reward.lr = 3e-4
  config.reward.warmup_steps = 10
  config.budget = 330.0  # seconds for each arm
  config.rollout.prompts = 8
  config.rollout.group_size = 4
  config.rollout.max_new_tokens = 64
  config.policy.lr = 1e-4
  config.r2m.lr = 1e-4
  config.kl.beta = 0.05
  config.r2m.attention_dim = 128
  config.log.checkpoint_every = 20
  config.log.samples = 12
  config.generate.batch_size = 64
  config.score.batch_size = 64
  if size == "test":
    config.tokenizer.vocab_size = 320
    config.tokenizer.min_frequency = 1
    arch.hidden_size = 32
    arch.num_layers = 1
    arch.intermediate_size = 64
    config.data.buckets = ()
    names.lm.budget = config.sft.budget = config.reward.budget = config.budget = 0.0
    names.lm.steps = 4
    names.lm.batch_size = 2
    config.sft.steps = 4
    config.sft.batch_size = 4
    config.data.max_prompt_length = 48
    config.data.max_response_length = 24
    config.reward.epochs = 1
    config.reward.batch_size = 4
    config.steps = 2
    config.rollout.prompts = 2
    config.rollout.group_size = 2
    config.rollout.max_new_tokens = 8
    config.r2m.attention_dim = 16
    names.samples = 6
    config.log.samples = 2
    config.export.check = False
    config.log.checkpoint_every = 1
  return config
