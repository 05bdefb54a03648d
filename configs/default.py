"""Every knob, with its unit. Experiment configs override these; nothing else adds keys (the
config is locked).
"""

from ml_collections import ConfigDict


def optimizer(lr: float) -> ConfigDict:
  """A section for optim.make_optimizer."""
  config = ConfigDict()
  config.optimizer = "adamw"  # "adamw" or "sgd"
  config.lr = lr  # peak learning rate
  config.lr_schedule = "constant"  # "constant", "linear" or "cosine" (both to zero at the end)
  config.warmup_steps = 0  # optimizer updates
  config.b1 = 0.9
  config.b2 = 0.99
  config.adam_eps = (
    1e-5  # not 1e-8: a gradient that is rounding noise must not become a full-sized step
  )
  config.weight_decay = 0.0
  config.max_grad_norm = 1.0  # clip by global norm; 0 does not clip
  config.moment_dtype = (
    "float32"  # of Adam's moments, "float32" (or wider, as the parameters) or "bfloat16"
  )
  return config


def architecture() -> ConfigDict:
  """Shape of a model that starts from nothing; see models.arch.ArchConfig. The vocabulary comes
  from the task.
  """
  config = ConfigDict()
  config.hidden_size = 64
  config.num_layers = 2
  config.num_heads = 4
  config.num_kv_heads = 4  # fewer than num_heads: grouped-query attention
  config.intermediate_size = 256
  config.norm = "rms"  # "rms" or "layer"
  config.activation = "silu"  # "silu", "gelu" or "gelu_tanh"
  config.gated_mlp = True
  config.tie_embeddings = False
  return config


def get_config() -> ConfigDict:
  config = ConfigDict()

  # what to run
  # how far to go: "sft", "reward" or "r2m" run the pipeline up to there; "lab" compares arms
  config.task = "r2m"
  # "generate" and "score" use a folder's model on JSON lines; "export" writes a checkpoint as
  # Hugging Face folders "replay" makes one sample of a run again; "analyse" draws its evidence;
  # "plan" says whether a run fits a machine
  config.algorithm = "rloo"  # "rloo", "grpo", "reinforce++", "remax" or "ppo" (with a critic)
  config.variant = (
    "r2m"  # variants.VARIANTS; "" runs each of config.arms, side by side from the same checkpoints
  )
  config.arms = ("vanilla", "scaled", "r2m")
  config.steps = 120  # RL steps, the paper's T
  # seconds of RL from folders: sets `steps` by a rate that is measured first. 0: `steps` as given
  config.budget = 0.0
  config.seed = 0

  # how to run it
  config.dtype = "float32"  # of the computation; scores, advantages and losses are at least float32
  config.param_dtype = "float32"
  config.mesh = (1, 1, 1)  # devices along (data, fsdp, tensor); one of them may be -1
  # made again in the backward pass: all but products with weights; "full" layers; or "none"
  config.remat = "dots"
  # of passes over whole rows: "xla", "dot_product" (cuDNN on GPUs, where decoding then has a
  config.attention = "auto"
  # kernel too), "splash" (on TPUs), or "auto" by the devices
  config.logits_chunk = (
    2**21
  )  # logits of a row (tokens x vocabulary) that exist at a time; 0: all. See token_stats

  # sampling
  config.rollout = ConfigDict()
  config.rollout.prompts = 16  # n, prompts per step
  config.rollout.group_size = 8  # K, responses per prompt
  config.rollout.max_new_tokens = 24  # tokens
  config.rollout.temperature = 1.0
  config.rollout.top_k = 0  # sample from the k most likely tokens; 0: from all
  config.rollout.top_p = (
    1.0  # sample from the most likely tokens whose probabilities first sum to this
  )
  config.rollout.min_p = (
    0.0  # sample from tokens at least this share as likely as the most likely one
  )
  config.rollout.waves = (
    1  # groups of prompts sampled one after another: one group's KV cache exists at a time
  )
  config.rollout.repetition_stop = (
    0  # N: cut a row off when its last N tokens repeat the N before them; 0: never
  )

  # policy and its update
  config.policy = optimizer(lr=3e-4)
  config.policy.path = (
    ""  # Hugging Face folder or hub name; "" starts from nothing, on the gold-reward task
  )
  config.policy.arch = architecture()
  config.ppo = ConfigDict()
  config.ppo.epochs = 2  # k, passes over a step's samples
  config.ppo.minibatches = 1  # updates per epoch
  config.ppo.accumulation = (
    1  # micro-batches per update, whose gradients are summed; memory, not results, depends on
  )
  # it. Passes without a gradient take as many rows at a time as a micro-batch has
  config.ppo.clip_eps = 0.2
  config.ppo.clip_eps_high = 0.0  # upper half-width of an asymmetric clip; 0: clip_eps
  config.ppo.dual_clip = (
    0.0  # largest ratio that a negative advantage is multiplied by, such as 3; 0: none
  )
  config.ppo.ratio = "token"  # importance ratio per "token" or per "sequence" (GSPO)
  config.ppo.aggregation = "sequence_sum"  # ops.AGGREGATIONS
  config.ppo.whiten_advantages = False  # over all response tokens of the batch
  config.ppo.advantage_norm = (
    "group"  # what GRPO divides by: deviation of the "group", of the "batch", or "none"
  )
  config.ppo.advantage_eps = 1e-4  # added to the variance by which GRPO divides
  config.critic = optimizer(lr=3e-4)  # algorithm = "ppo" alone
  config.critic.init = (
    "reward"  # starts from the "reward" model (same tokenizer) or from the "policy"
  )
  config.critic.gamma = 1.0  # discount a token
  config.critic.lam = 0.95  # lambda of generalised advantage estimation
  config.critic.value_clip = 0.2  # half-width around the old value
  config.kl = ConfigDict()
  config.kl.beta = 0.05  # weight of KL(policy || reference)
  config.kl.placement = "loss"  # "loss", or "reward": off each token's reward
  config.kl.estimator = (
    "auto"  # "k1" (reward alone), "k2", "k3" or "exact" over the vocabulary; "auto": k1 in the
  )
  # reward; in the loss exact up to 1,024 entries, else k2
  config.kl.controller = "fixed"  # "fixed", "adaptive" or "hold"; see schedules.kl_weight
  config.kl.target = 6.0  # nats a sequence, what the last two steer by
  config.kl.horizon = 100  # RL steps, how slowly "adaptive" moves
  config.shaping = (
    ConfigDict()
  )  # of the score before advantages, in this order; see objective.shape_scores
  config.shaping.centre = False  # subtract the batch's mean
  config.shaping.clip = 0.0  # bound on its size; 0: none
  config.shaping.missing_eos = (
    "none"  # a response without an end: "subtract" the penalty, or "replace" the score by it
  )
  config.shaping.missing_eos_penalty = 1.0
  config.shaping.length_penalty = 0.0  # reward a token
  config.shaping.mask_truncated = False  # leave responses without an end out of the policy's loss

  # the reward that reads the policy
  config.r2m = optimizer(lr=1e-4)
  config.r2m.omega_min = (
    0.6  # Omega, floor of the weight on the reward model's own embedding (eq. 4)
  )
  config.r2m.omega_schedule = (
    "cosine"  # the paper's; or "linear", "constant", or "kl", which needs no T
  )
  config.r2m.omega_kl = 6.0  # nats a sequence, the KL at which "kl" reaches the floor
  config.r2m.alpha = 0.3  # weight of the group reward entropy (eq. 7)
  config.r2m.gre_eps = 1e-4  # added to the variance by which eq. 6 divides
  config.r2m.attention_dim = 64  # d, width of the cross-attention (eq. 3)
  config.r2m.num_heads = 1
  config.r2m.feedback_layer = (
    -1
  )  # which layer's states are fed back; -1: the last, after the final norm
  config.r2m.average = (
    0.0  # a moving average of the head scores, with this decay a step; 0: the head itself
  )
  config.r2m.labels = (
    "self"  # who orders the pairs of eq. 5: the annotation scores, or real "preference" labels
  )
  config.r2m.label_budget = 0.02  # trajectories in labelled pairs, as a share of those sampled
  config.r2m.judgments = (
    ""  # JSON lines {prompt, chosen, rejected}: the labels of a run that starts from folders
  )
  config.r2m.warm_epochs = 4  # over the preferences, variant "warm_start"

  # supervised start
  config.sft = optimizer(lr=4e-3)
  config.sft.lr_schedule = "cosine"
  config.sft.warmup_steps = 100
  config.sft.examples = 16384
  config.sft.steps = 1000
  config.sft.batch_size = 64  # sequences
  config.sft.budget = (
    0.0  # seconds, from folders: sets sft.steps by a rate that is measured first. 0: as given
  )

  # the proxy reward model, fitted on noisy preferences
  config.reward = optimizer(lr=1e-3)
  config.reward.path = ""  # Hugging Face folder or hub name of a sequence classifier
  config.reward.max_length = (
    0  # tokens of its input; the beginning of longer ones is dropped. 0: no limit
  )
  config.reward.max_reply_length = (
    0  # tokens of a pair's reply, cut off there; no pair is left out. 0: data's limits
  )
  config.reward.lr_schedule = "cosine"
  config.reward.pairs = 2048
  config.reward.epochs = 4
  config.reward.batch_size = 32  # pairs
  config.reward.budget = 0.0  # seconds, from folders, in place of reward.epochs. 0: off
  config.reward.choice_temperature = 0.3  # P(a preferred) = sigmoid((gold_a - gold_b) / this)
  config.reward.label_flip = 0.2  # share of labels then flipped
  config.reward.heldout_pairs = 512  # with clean gold labels, to measure accuracy
  config.reward.ensemble = (
    1  # score heads on the one backbone, each fitted on a bootstrap of the pairs
  )
  config.reward.combine = "mean"  # of their scores: "mean", "min" or "mean_minus_variance"
  config.reward.variance_weight = 1.0  # of the last
  config.reward.sum_to_zero = (
    0.0  # weight of the squared mean score of a batch, added to the loss of the fit
  )

  # the reward model that stands for what people want (task = "lab_text"); its fit, on the clean
  # pairs, is as `reward`'s
  config.gold = optimizer(lr=1e-3)
  config.gold.path = ""  # Hugging Face folder of a finished one; "": it is fitted
  config.gold.depth = 2  # its layers for each of the policy's, from which it grows
  config.gold.lr_schedule = "cosine"
  config.gold.epochs = 1
  config.gold.batch_size = 32  # pairs
  config.gold.budget = 0.0  # seconds, in place of gold.epochs. 0: off

  # low-rank adapters for the policy (and for the reward model in task = "reward") of a Hugging Face
  # folder
  config.lora = ConfigDict()
  config.lora.rank = 0  # 0: off, every parameter is trained
  config.lora.alpha = 16.0  # the adapters' output is multiplied by alpha / rank
  config.lora.targets = (
    "attn/(q|k|v|o)|mlp/(gate|up|down)"  # pattern of the linears' paths; see models.transformer
  )
  config.lora.export = "merged"  # "merged" into the weights, or "peft": an adapter folder

  # rows for runs on text; every form of data/forms.py is read
  config.data = ConfigDict()
  # path, folder or glob of JSON lines or parquet; tfds:NAME; hf:OWNER/NAME. Several: with commas
  config.data.name = ""
  # folder where relative paths start, and from whose files tfds:NAME is prepared ("": the hub)
  config.data.root = ""
  config.data.split = (
    "train"  # of tfds: and hf: names, and of a folder with files of several splits
  )
  config.data.date = ""  # YYYY-MM-DD that chat templates write; "": the day that the run begins
  config.data.tfds_dir = ""  # where prepared data sets lie; "": ~/tensorflow_datasets
  # how often each name's rows come, relative to one another; (): as often as it has rows
  config.data.weights = ()
  config.data.max_bad_share = 0.01  # of a name's rows; a run stops where more are broken
  config.data.max_prompt_length = 512  # tokens; rows with a longer prompt are left out
  config.data.max_response_length = 512  # tokens; rows with a longer response are left out
  config.data.max_chosen_length = (
    512  # tokens; the paper's filter, for RL too: a longer chosen goes. 0: off
  )
  config.data.unique = False  # rows alike in all that a task reads are used once
  # tokens; padded lengths of sft and reward batches, a program each. (): the longest
  config.data.buckets = ()
  config.data.pack = (
    False  # sft: whole dialogues end to end in full lines, every token counts: language modelling
  )

  # everything from nothing on real text (task = "scratch"); names of data as in data.name
  config.scratch = ConfigDict()
  config.scratch.arms = (
    "vanilla",
    "r2m",
  )  # the last one ends in WORKDIR/export, the others in folders of it
  config.scratch.corpus = ""  # for the tokenizer and for language modelling
  config.scratch.sft = ""  # with responses
  config.scratch.pairs = ""  # with chosen and rejected
  config.scratch.prompts = ""  # for RL
  config.scratch.sft_val = ""  # held out, as are the next three
  config.scratch.prompts_val = ""
  config.scratch.pairs_val = ""  # a name each: each is a line of the report
  config.scratch.pairs_dev = ""  # the same, of which only rows with meta.group = "val" are measured
  config.scratch.samples = 256  # held-out prompts sampled before and after RL
  config.scratch.download = ""  # what to download and from where; said where the data is not there
  config.scratch.lm = optimizer(lr=1e-3)  # language modelling; otherwise as sft
  config.scratch.lm.lr_schedule = "cosine"
  config.scratch.lm.steps = 1000
  config.scratch.lm.batch_size = 16  # lines
  config.scratch.lm.budget = 0.0  # seconds

  # a tokenizer, and a model of policy.arch with random weights beside it (task = "tokenizer")
  config.tokenizer = ConfigDict()
  config.tokenizer.vocab_size = 4096  # entries, the 256 bytes and the special tokens among them
  config.tokenizer.min_frequency = 2  # a pair of pieces is merged if it is seen this often

  # batch use (task = "generate", "score")
  config.generate = ConfigDict()
  config.generate.input = ""  # JSON lines with prompt: text or messages
  config.generate.output = ""
  config.generate.max_new_tokens = 128  # tokens
  config.generate.temperature = 1.0  # 0: the most likely token
  config.generate.batch_size = 16  # rows
  config.score = ConfigDict()
  config.score.input = ""  # JSON lines with prompt and response
  config.score.output = ""
  config.score.batch_size = 16  # rows

  # a run's checkpoint as a Hugging Face folder (task = "export")
  config.export = ConfigDict()
  config.export.checkpoint = (
    ""  # a run's workdir, or WORKDIR/checkpoints/<arm>[/<step>], WORKDIR/stages/<stage>
  )
  config.export.out = ""  # folder; policy and reward are made in it
  config.export.check = (
    True  # compare with transformers where torch is installed; loads the model once more
  )
  config.export.push_to = (
    ""  # hub name owner/model: also upload, private, as owner/model-policy and owner/model-reward
  )

  # what is kept
  config.log = ConfigDict()
  config.log.checkpoint_every = 40  # RL steps; the last step is always saved
  config.log.samples = 12  # rows of the sample table, before and after

  # which checkpoints stay, and where a run starts
  config.checkpoint = ConfigDict()
  config.checkpoint.keep_last = (
    2  # with fewer, nothing is left to go back to when the newest is damaged
  )
  config.checkpoint.keep_every = 0  # RL steps: those of its multiples stay too; 0: none
  config.checkpoint.keep_best = 0  # that many with the best value of best_metric stay too
  config.checkpoint.best_metric = "reward/used"  # of metrics.jsonl, at the checkpoint's step
  config.checkpoint.best_mode = "max"  # "max" or "min"
  config.checkpoint.background = True  # write while the next steps run
  config.checkpoint.fork_from = (
    ""  # workdir of a run with other settings to start from; it is not changed
  )

  # numbers that are not finite: the update is skipped and counted
  config.guard = ConfigDict()
  config.guard.max_skipped = 10  # steps in a row with a skipped update, then the run stops
  config.guard.spike = (
    10.0  # gradient norms above max_grad_norm times this are counted, besides being clipped
  )

  # one sample of a run in WORKDIR once more (task = "replay")
  config.replay = ConfigDict()
  config.replay.arm = ""  # variant; "": the only one there is
  config.replay.step = 0  # RL step, as in metrics.jsonl
  config.replay.prompt = 0  # its place among the step's prompts
  config.replay.example_id = -1  # or its number in the data, as in skipped.jsonl; -1: by its place
  config.replay.sample = 0  # which of the K responses to it

  # the paper's own evidence from the run in WORKDIR (task = "analyse"); docs/analyse.md
  config.analyse = ConfigDict()
  config.analyse.what = ""  # config.PIECES, with commas; "": all that the run has data for
  config.analyse.prompts = (
    256  # held-out prompts of the gold-reward task, or pairs of a run on text
  )
  config.analyse.samples = 8  # responses to each, on the gold-reward task
  config.analyse.pairs = (
    ""  # held-out rows with chosen and rejected, of a run on text; "": scratch.pairs_val
  )

  # whether the run fits a machine, without it (task = "plan"); config.mesh is used where it covers
  # the chips
  config.plan = ConfigDict()
  config.plan.topology = (
    ""  # v5p:2x2x4 and the like, gpu:h100x8, cpu:1; "auto": the smallest slice of each TPU
  )
  config.plan.generations = ("v4", "v5e", "v5p", "v6e")  # which TPUs "auto" tries
  config.plan.policy = ""  # a shape by name (plan/sizes.py), where policy.path is no folder here
  config.plan.reward = ""  # the same for reward.path
  config.plan.prompt_length = 0  # tokens of a padded prompt; 0: those of data.max_prompt_length
  config.plan.reward_length = (
    0  # tokens of the reward model's padded input; 0: those of prompt and response
  )
  config.plan.compile = True  # False: count alone, in seconds and without the compiler
  config.plan.layers = 0  # at most so many layers of each model, for a quick look; 0: all
  config.plan.compare = "vanilla"  # variant that the run's own is weighed against; "": none

  # the processes of one run, one a host; found on TPU slices, GKE, Slurm and Open MPI without any
  # of this
  config.hosts = ConfigDict()
  config.hosts.coordinator = (
    ""  # HOST:PORT of process 0; "": JAX_COORDINATOR_ADDRESS or the cluster says; "none": none
  )
  config.hosts.processes = 0  # how many in all; 0: JAX_NUM_PROCESSES or the cluster says
  config.hosts.process = -1  # number of this one, from 0; -1: JAX_PROCESS_ID or the cluster says
  config.hosts.start_timeout = 300  # seconds in which all must have come
  config.hosts.heartbeat_timeout = (
    100  # seconds without a sign of life after which a process counts as lost
  )
  config.hosts.end_timeout = 30  # seconds that a process which ends waits for the others

  # arms x seeds x KL weights on the gold-reward task, all of an arm in one program (task = "lab");
  # see docs/lab.md
  config.lab = ConfigDict()
  config.lab.arms = (
    "vanilla",
    "scaled",
    "r2m",
  )  # "VARIANT[.NAME] [FIELD=VALUE ...]"; those of `variant` "" alone
  config.lab.seeds = (0, 1, 2, 3, 4)
  config.lab.betas = (1.0,)  # KL weights, as multiples of the arm's own kl.beta
  config.lab.together = 10  # runs in one program at a time: what memory allows
  config.lab.kls = (2.0, 4.0)  # nats a sequence, where gold is compared at equal KL
  config.lab.stops = (2.0, 4.0)  # nats a sequence, KLs at which the baseline would be stopped early
  config.lab.baseline = (
    "vanilla"  # each arm is paired with it, or with BASELINE.NAME where there is such an arm
  )
  config.lab.control = "scaled"  # the same, for a second comparison; "": none
  config.lab.probe_every = (
    10  # RL steps between scores of fixed responses under the feedback of the day
  )
  config.lab.probe_prompts = 32
  config.lab.best_prompts = 64
  config.lab.best_samples = 256  # of each, from which best-of-n is estimated
  return config
