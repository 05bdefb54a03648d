"""R2M on a pretrained model: the notes task on SmolLM2-135M-Instruct, with a gold reward for English.

A prompt is a short note; the reply should pass on some of its facts in one or two sentences. Gold
is a formula on the text (r2m_jax/goldtask/notes.py). The proxy is SmolLM2's own backbone with a
linear score head, fitted to noisy preferences.

  python -m r2m_jax.main --config=configs/smollm2_notes.py --workdir=runs/notes
  python -m r2m_jax.main --config=configs/smollm2_notes.py --workdir=runs/notes \\
    --config.policy.path=FOLDER                              # without a connection to the hub
  python -m r2m_jax.main --config=configs/smollm2_notes.py:test --workdir=/tmp/notes   # in seconds

The sizes are chosen for two CPU cores. `:gpu` has those for one large GPU (not yet measured), and
`held` replaces the arms by ones with their KL held at 2 and at 4. A command and the same one with
`held` use one folder and share what comes before RL:

  python -m r2m_jax.main --config=configs/smollm2_notes.py:held --workdir=runs/notes
  python -m r2m_jax.main --config=configs/smollm2_notes.py:gpu --workdir=runs/notes_gpu
  python -m r2m_jax.main --config=configs/smollm2_notes.py:gpu,held --workdir=runs/notes_gpu

The protocol is in docs/lab.md, "The third task". The same command resumes where it stopped, and
processes with the same command share the work. `:test` is the same job with a tiny random model of
the same family, whose tokenizer is trained on the demonstrations.
"""

from r2m_jax.configs import default, fair

ARMS = ("vanilla", "r2m", "scaled", "shuffled")
# The registered contrasts of the arms whose KL is held. Their advantages are group-normalised, so
# `vanilla` and `scaled` have one objective.
RIVALS = ("scaled", "shuffled")
OPTIONS = ("gpu", "held", "test")


def get_config(options: str = ""):
  """options: any of `OPTIONS`, separated by commas."""
  chosen = set(options.split(",")) if options else set()
  if not chosen <= set(OPTIONS):
    raise ValueError(
      f"size {options!r} is unknown; use smollm2_notes, or one or more of "
      f"{', '.join(OPTIONS)} after it, such as smollm2_notes:gpu,held"
    )
  config = default.get_config()
  config.task = "lab_notes"
  config.variant = ""
  config.policy.path = "HuggingFaceTB/SmolLM2-135M-Instruct"
  config.policy.system_prompt = config.reward.system_prompt = "Be brief."
  config.notes.demonstrations = 128
  config.notes.epochs = 1
  config.sft.lr = 2e-4
  config.sft.batch_size = 4
  config.sft.warmup_steps = 4
  config.data.max_prompt_length = 128
  config.data.max_response_length = 64
  config.data.max_chosen_length = 0
  config.data.buckets = (104,)

  config.reward.pairs = 192
  config.reward.heldout_pairs = 48
  config.reward.epochs = 1
  config.reward.batch_size = 8
  config.reward.lr = 3e-5
  config.reward.warmup_steps = 2
  config.reward.choice_temperature = 0.5
  config.reward.label_flip = 0.1

  config.rollout.prompts = 4
  config.rollout.group_size = 4
  config.rollout.max_new_tokens = 40
  config.rollout.temperature = 0.7
  # truncates every pair as a policy with this limit would
  config.reward.max_reply_length = config.rollout.max_new_tokens - 1
  config.reward.max_length = 160  # no prompt with its response is longer
  config.steps = 20
  config.ppo.epochs = 1
  config.policy.lr = 3e-5
  config.kl.beta = 0.02
  config.kl.estimator = "exact"
  # the paper's 1e-6 at width 4,096, scaled for the same change of the head at width 576
  config.r2m.lr = 7e-6
  config.r2m.attention_dim = 288
  config.packing = (0.68, 0.76, 1.0)
  config.lab.arms = ARMS
  config.lab.seeds = (0, 1, 2)
  config.lab.kls = (1.0, 2.0)
  config.lab.stops = ()
  config.log.checkpoint_every = 10
  config.checkpoint.keep_last = 1
  config.scratch.samples = 48
  config.generate.batch_size = 48
  config.score.batch_size = 24
  if "gpu" in chosen:
    on_gpu(config)
  if "test" in chosen:
    smallest(config)
  if "held" in chosen:
    hold(config, "gpu" in chosen)
  return config


def on_gpu(config) -> None:
  """Sizes for one large GPU: as many samples a step and as many steps as in the registered test."""
  config.dtype = "bfloat16"
  config.notes.demonstrations = 512
  config.notes.proxy = "whole"
  config.reward.pairs = 2000
  config.reward.heldout_pairs = 256
  config.rollout.prompts = 16
  config.rollout.group_size = 8
  config.steps = 100
  # the paper's 6e-6 at width 2,048, scaled for the same change of the function at width 576
  config.policy.lr = 2e-5
  config.lab.kls = (2.0, 4.0)
  config.scratch.samples = 256
  config.generate.batch_size = 256
  config.score.batch_size = 256


def hold(config, gpu: bool) -> None:
  """Arms with their KL held, at the targets of the registered test. On two cores `vanilla` is left
  out, because its objective is that of `scaled`, and the first KL weight is found by KL alone.
  """
  if gpu:
    arms = fair.held(ARMS)
  else:
    config.lab.tail = 8  # of 20 or 40 steps
    at_2 = fair.held(("r2m", *RIVALS), settings="kl.beta=1.0", targets=(2,))
    at_4 = fair.held(("r2m", *RIVALS), settings="kl.beta=0.2 steps=40", targets=(4,))
    arms = (*at_2, *at_4)
  config.lab.arms = tuple(arms)
  config.lab.contrasts = tuple(
    f"r2m.kl{target} - {rival}.kl{target}" for target in fair.TARGETS for rival in RIVALS
  )
  config.lab.margin = 0.2  # gold: a quarter of one fact of five


def smallest(config) -> None:
  """The same job in seconds."""
  config.policy.path = ""
  config.tokenizer.vocab_size = 400
  arch = config.policy.arch
  arch.hidden_size = 24
  arch.num_layers = 2
  arch.num_heads = 3
  arch.num_kv_heads = 1
  arch.intermediate_size = 64
  arch.tie_embeddings = True
  config.notes.demonstrations = 16
  config.sft.batch_size = 4
  config.data.max_prompt_length = config.data.max_response_length = 256
  config.data.buckets = ()
  config.reward.pairs = 12
  config.reward.heldout_pairs = 6
  config.reward.batch_size = 4
  config.reward.max_length = 320
  config.reward.max_reply_length = 11
  config.rollout.prompts = 2
  config.rollout.group_size = 2
  config.rollout.max_new_tokens = 12
  config.sft.lr = 1e-3
  config.reward.lr = 1e-3
  config.policy.lr = 1e-3
  config.r2m.attention_dim = 16
  config.packing = (1.0,)
  config.steps = 2
  config.lab.arms = ("vanilla", "r2m")
  config.lab.seeds = (0, 1)
  config.lab.kls = (0.005,)
  config.log.checkpoint_every = 1
  config.scratch.samples = 4
