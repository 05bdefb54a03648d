"""R2M on a pretrained model: the notes task on SmolLM2-135M-Instruct, with a gold reward for English.

A prompt is a short note; the reply should pass on some of its facts in one or two sentences. Gold
is a formula on the text (r2m_jax/goldtask/notes.py). The proxy is SmolLM2's own backbone with a
linear score head, fitted to noisy preferences.

  python -m r2m_jax.main --config=configs/smollm2_notes.py --workdir=runs/notes
  python -m r2m_jax.main --config=configs/smollm2_notes.py --workdir=runs/notes \\
    --config.policy.path=FOLDER                              # without a connection to the hub
  python -m r2m_jax.main --config=configs/smollm2_notes.py:test --workdir=/tmp/notes   # in seconds

The sizes are chosen for two CPU cores. For one large GPU (not yet measured):

  python -m r2m_jax.main --config=configs/smollm2_notes.py --workdir=runs/notes_gpu \\
    --config.notes.demonstrations=512 --config.reward.pairs=2000 --config.notes.proxy=whole \\
    --config.rollout.prompts=16 --config.rollout.group_size=8 --config.steps=100

The protocol is in docs/lab.md, "The third task". The same command resumes where it stopped, and
processes with the same command share the work. `:test` is the same job with a tiny random model of
the same family, whose tokenizer is trained on the demonstrations.
"""

from r2m_jax.configs import default

ARMS = ("vanilla", "r2m", "scaled", "shuffled")


def get_config(size: str = ""):
  if size not in ("", "test"):
    raise ValueError(
      f"size {size!r} is unknown; use configs/smollm2_notes.py or configs/smollm2_notes.py:test"
    )
  config = default.get_config()
  config.task, config.variant = "lab_notes", ""
  config.policy.path = "HuggingFaceTB/SmolLM2-135M-Instruct"
  config.policy.system_prompt = config.reward.system_prompt = "Be brief."
  config.notes.demonstrations, config.notes.epochs = 128, 1
  config.sft.lr, config.sft.batch_size, config.sft.warmup_steps = 2e-4, 4, 4
  config.data.max_prompt_length, config.data.max_response_length = 128, 64
  config.data.max_chosen_length = 0
  config.data.buckets = (104,)

  config.reward.pairs, config.reward.heldout_pairs = 192, 48
  config.reward.epochs, config.reward.batch_size = 1, 8
  config.reward.lr, config.reward.warmup_steps = 3e-5, 2
  config.reward.choice_temperature, config.reward.label_flip = 0.5, 0.1

  config.rollout.prompts, config.rollout.group_size, config.rollout.max_new_tokens = 4, 4, 40
  config.rollout.temperature = 0.7
  # truncates every pair as a policy with this limit would
  config.reward.max_reply_length = config.rollout.max_new_tokens - 1
  config.reward.max_length = 160  # no prompt with its response is longer
  config.steps = 20
  config.ppo.epochs = 1
  config.policy.lr = 3e-5
  config.kl.beta, config.kl.estimator = 0.02, "exact"
  # the paper's 1e-6 at width 4,096, scaled for the same change of the head at width 576
  config.r2m.lr, config.r2m.attention_dim = 7e-6, 288
  config.packing = (0.68, 0.76, 1.0)
  config.lab.arms, config.lab.seeds = ARMS, (0, 1, 2)
  config.lab.kls, config.lab.stops = (1.0, 2.0), ()
  config.log.checkpoint_every, config.checkpoint.keep_last = 10, 1
  config.scratch.samples = 48
  config.generate.batch_size, config.score.batch_size = 48, 24
  if size == "test":
    smallest(config)
  return config


def smallest(config) -> None:
  """The same job in seconds."""
  config.policy.path = ""
  config.tokenizer.vocab_size = 400
  arch = config.policy.arch
  arch.hidden_size, arch.num_layers, arch.num_heads, arch.num_kv_heads = 24, 2, 3, 1
  arch.intermediate_size, arch.tie_embeddings = 64, True
  config.notes.demonstrations, config.sft.batch_size = 16, 4
  config.data.max_prompt_length = config.data.max_response_length = 256
  config.data.buckets = ()
  config.reward.pairs, config.reward.heldout_pairs, config.reward.batch_size = 12, 6, 4
  config.reward.max_length, config.reward.max_reply_length = 320, 11
  config.rollout.prompts, config.rollout.group_size, config.rollout.max_new_tokens = 2, 2, 12
  config.sft.lr, config.reward.lr, config.policy.lr = 1e-3, 1e-3, 1e-3
  config.r2m.attention_dim, config.packing, config.steps = 16, (1.0,), 2
  config.lab.arms, config.lab.seeds = ("vanilla", "r2m"), (0, 1)
  config.lab.kls, config.log.checkpoint_every = (0.005,), 1
  config.scratch.samples = 4
