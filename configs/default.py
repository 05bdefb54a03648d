"""Every knob, with its unit. Experiment configs override these; nothing else adds keys (the config is locked)."""

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
  config.adam_eps = 1e-5  # not 1e-8: a gradient that is rounding noise must not become a full-sized step
  config.weight_decay = 0.0
  config.max_grad_norm = 1.0  # clip by global norm; 0 does not clip
  return config


def architecture() -> ConfigDict:
  """Shape of a model that starts from nothing; see models.arch.ArchConfig. The vocabulary comes from the task."""
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
  config.task = "r2m"  # how far to go: "sft", "reward" or "r2m" run the pipeline up to there; "lab" compares seeds
  # "generate" and "score" use a folder's model on JSON lines; "export" writes a checkpoint as Hugging Face folders
  config.algorithm = "rloo"  # "rloo" or "grpo"
  config.variant = "r2m"  # step.VARIANTS; "" runs each of config.arms, side by side from the same checkpoints
  config.arms = ("vanilla", "scaled", "r2m")
  config.steps = 120  # RL steps, the paper's T
  config.budget = 0.0  # seconds of RL from folders: sets `steps` by a rate that is measured first. 0: `steps` as given
  config.seed = 0

  # how to run it
  config.dtype = "float32"  # of the computation; scores, advantages and losses are at least float32
  config.param_dtype = "float32"
  config.mesh = (1, 1, 1)  # devices along (data, fsdp, tensor); one of them may be -1
  config.remat = "none"  # "none", "full" or "dots": what the backward pass computes again
  config.logits_chunk = 0  # tokens of a row whose logits exist at a time; 0 is all of them

  # sampling
  config.rollout = ConfigDict()
  config.rollout.prompts = 16  # n, prompts per step
  config.rollout.group_size = 8  # K, responses per prompt
  config.rollout.max_new_tokens = 24  # tokens
  config.rollout.temperature = 1.0

  # policy and its update
  config.policy = optimizer(lr=3e-4)
  config.policy.path = ""  # Hugging Face folder or hub name; "" starts from nothing, on the gold-reward task
  config.policy.arch = architecture()
  config.ppo = ConfigDict()
  config.ppo.epochs = 2  # k, passes over a step's samples
  config.ppo.minibatches = 1  # updates per epoch
  config.ppo.clip_eps = 0.2
  config.ppo.aggregation = "sequence_sum"  # ops.AGGREGATIONS
  config.ppo.whiten_advantages = False
  config.ppo.advantage_eps = 1e-4  # added to the variance by which GRPO divides
  config.kl = ConfigDict()
  config.kl.beta = 0.05  # weight of KL(policy || reference) in the loss
  config.kl.estimator = "auto"  # "exact" over the vocabulary, "k2", or "auto": exact up to 1,024 entries

  # the reward that reads the policy
  config.r2m = optimizer(lr=1e-4)
  config.r2m.omega_min = 0.6  # Omega, floor of the weight on the reward model's own embedding (eq. 4)
  config.r2m.alpha = 0.3  # weight of the group reward entropy (eq. 7)
  config.r2m.gre_eps = 1e-4  # added to the variance by which eq. 6 divides
  config.r2m.attention_dim = 64  # d, width of the cross-attention (eq. 3)
  config.r2m.num_heads = 1
  config.r2m.feedback_layer = -1  # which layer's states are fed back; -1: the last, after the final norm

  # supervised start
  config.sft = optimizer(lr=4e-3)
  config.sft.lr_schedule = "cosine"
  config.sft.warmup_steps = 100
  config.sft.examples = 16384
  config.sft.steps = 1000
  config.sft.batch_size = 64  # sequences
  config.sft.budget = 0.0  # seconds, from folders: sets sft.steps by a rate that is measured first. 0: as given

  # the proxy reward model, fitted on noisy preferences
  config.reward = optimizer(lr=1e-3)
  config.reward.path = ""  # Hugging Face folder or hub name of a sequence classifier
  config.reward.max_length = 0  # tokens of its input; the beginning of longer ones is dropped. 0: no limit
  config.reward.lr_schedule = "cosine"
  config.reward.pairs = 2048
  config.reward.epochs = 4
  config.reward.batch_size = 32  # pairs
  config.reward.budget = 0.0  # seconds, from folders, in place of reward.epochs. 0: off
  config.reward.choice_temperature = 0.3  # P(a preferred) = sigmoid((gold_a - gold_b) / this)
  config.reward.label_flip = 0.2  # share of labels then flipped
  config.reward.heldout_pairs = 512  # with clean gold labels, to measure accuracy

  # low-rank adapters for the policy (and for the reward model in task = "reward") of a Hugging Face folder
  config.lora = ConfigDict()
  config.lora.rank = 0  # 0: off, every parameter is trained
  config.lora.alpha = 16.0  # the adapters' output is multiplied by alpha / rank
  config.lora.targets = "attn/(q|k|v|o)|mlp/(gate|up|down)"  # pattern of the linears' paths; see models.transformer
  config.lora.export = "merged"  # "merged" into the weights, or "peft": an adapter folder

  # rows for runs on text; every form of data/forms.py is read
  config.data = ConfigDict()
  config.data.name = ""  # path, folder or glob of JSON lines or parquet; tfds:NAME; hf:OWNER/NAME. Several: with commas
  config.data.root = ""  # folder where relative paths start, and from whose files tfds:NAME is prepared ("": the hub)
  config.data.split = "train"  # of tfds: and hf: names
  config.data.tfds_dir = ""  # where prepared data sets lie; "": ~/tensorflow_datasets
  config.data.weights = ()  # how often each name's rows come, relative to one another; (): as often as it has rows
  config.data.max_bad_share = 0.01  # of a name's rows; a run stops where more are broken
  config.data.max_prompt_length = 512  # tokens; rows with a longer prompt are left out
  config.data.max_response_length = 512  # tokens; rows with a longer response are left out
  config.data.max_chosen_length = 512  # tokens; the paper's filter, for RL too: a longer chosen goes. 0: off
  config.data.unique = False  # rows alike in all that a task reads are used once
  config.data.buckets = ()  # tokens; padded lengths of sft and reward batches, a program each. (): the longest
  config.data.pack = False  # sft: whole dialogues end to end in full lines, every token counts: language modelling

  # everything from nothing on real text (task = "scratch"); names of data as in data.name
  config.scratch = ConfigDict()
  config.scratch.arms = ("vanilla", "r2m")  # the last one ends in WORKDIR/export, the others in folders of it
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
  config.export.checkpoint = ""  # a run's workdir, or WORKDIR/checkpoints/<arm>[/<step>], WORKDIR/stages/<stage>
  config.export.out = ""  # folder; policy and reward are made in it
  config.export.check = True  # compare with transformers where torch is installed; loads the model once more
  config.export.push_to = ""  # hub name owner/model: also upload, private, as owner/model-policy and owner/model-reward

  # what is kept
  config.log = ConfigDict()
  config.log.checkpoint_every = 40  # RL steps; the last step is always saved
  config.log.samples = 12  # rows of the sample table, before and after

  # several seeds, one after another (task = "lab")
  config.lab = ConfigDict()
  config.lab.seeds = (0, 1, 2, 3, 4)
  return config
