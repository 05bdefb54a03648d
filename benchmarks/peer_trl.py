"""One child of peers.py: the same work in TRL's RLOOTrainer. It runs in TRL's own environment,
without r2m_jax.

  PEERS/trl/bin/python -m benchmarks.peer_trl SIZE STEPS MOST [ENDS]

With ENDS so many tokens end a row, else none does. With size 0.5b it is the work of gpu.py, on a
GPU, in an environment with a CUDA build of torch.
"""

import os
import sys
import tempfile

import datasets
import torch
import transformers
import trl

from benchmarks import peer_task as task


def model_config(size: str, tokenizer, ends: int) -> transformers.Qwen2Config:
  shape = task.SIZES[size]
  return transformers.Qwen2Config(
    vocab_size=shape["vocab_size"],
    hidden_size=shape["hidden_size"],
    num_hidden_layers=shape["layers"],
    num_attention_heads=shape["heads"],
    num_key_value_heads=shape["kv_heads"],
    intermediate_size=shape["intermediate_size"],
    tie_word_embeddings=size in task.ON_GPU,
    max_position_embeddings=1024,
    rope_parameters={"rope_type": "default", "rope_theta": task.ROPE_THETA},
    rms_norm_eps=task.NORM_EPS,
    bos_token_id=None,
    eos_token_id=list(range(ends)) if ends else tokenizer.eos_token_id,
    pad_token_id=tokenizer.pad_token_id if ends else None,
  )


def training(
  folder: str, rollouts: int, rows: int, response: int, parts: int, gpu: bool, **other
) -> trl.RLOOConfig:
  """TRL's defaults, except where another choice does the same work in less time; `other` replaces
  settings.
  """
  settings = dict(
    output_dir=folder,
    use_cpu=not gpu,
    seed=0,
    bf16=False,  # no autocast: the weights have the dtype that they have
    model_init_kwargs={"dtype": "bfloat16" if gpu else "float32"},
    # all rows in one update per epoch, in one pass if they fit
    per_device_train_batch_size=rows // parts,
    gradient_accumulation_steps=parts,
    num_generations=task.GROUP,
    max_completion_length=response,
    temperature=task.TEMPERATURE,
    num_iterations=task.EPOCHS,
    beta=task.BETA,
    # on a CPU it takes 5% less time to generate, because a growing cache is copied at every token;
    # on a GPU it would be compiled
    cache_implementation=None if gpu else "static",
    gradient_checkpointing=False,  # on by default and a fifth slower; there is enough memory
    learning_rate=task.LEARNING_RATE,
    lr_scheduler_type="constant",  # AdamW in its fused form is the default
    max_steps=task.EPOCHS * rollouts,  # a step of TRL is an update
    logging_strategy="no",
    save_strategy="no",
    report_to="none",
    disable_tqdm=True,  # only the work
    dataloader_pin_memory=False,
  )
  return trl.RLOOConfig(**settings | other)


class Laps(transformers.TrainerCallback):
  """One lap is one rollout with its updates; the run ends when the watch is done."""

  def __init__(self, watch: task.Watch, response: int | None, epochs: int = task.EPOCHS):
    """response: the tokens that every response has; None: they have any number.

    epochs: updates of a rollout.
    """
    self.watch = watch
    self.epochs = epochs
    self.response = response
    self.trainer = None
    self.lengths: list[float] = []  # mean tokens of the responses of each rollout

  def on_train_begin(self, args, state, control, **kwargs):
    self.watch.lap()

  def on_step_end(self, args, state, control, **kwargs):
    if state.global_step % self.epochs == 0:
      self.watch.lap()
      seen = self.trainer._metrics[
        "train"
      ]  # there is no public access to a rollout's lengths if they are not logged
      shortest, longest = seen["completions/min_length"], seen["completions/max_length"]
      if len(shortest) * self.epochs != state.global_step:
        raise SystemExit(
          f"{len(shortest)} rollouts for {state.global_step} updates, not one for {self.epochs}"
        )
      self.lengths.append(seen["completions/mean_length"][-1])
      if self.response is not None:
        task.check_length("a response", map(int, shortest + longest), self.response)
      control.should_training_stop = self.watch.done
    return control


def main(size: str, steps: int, most: int, ends: int = 0) -> None:
  transformers.utils.logging.set_verbosity_error()
  torch.set_num_threads(os.cpu_count() or 1)
  torch.manual_seed(0)
  gpu = size in task.ON_GPU
  watch = task.Watch(steps, most)
  vocab_size = task.SIZES[size]["vocab_size"]
  work = task.ON_GPU.get(size, dict(prompts=task.PROMPTS, response=task.RESPONSE, parts=1))
  tokenizer = task.make_tokenizer(vocab_size, ends)
  config = model_config(size, tokenizer, ends)
  dtype = torch.bfloat16 if gpu else torch.float32
  laps = Laps(watch, None if ends else work["response"])
  rows = [
    text for step in range(watch.laps) for text in task.prompts(vocab_size, step, work["prompts"])
  ]
  with tempfile.TemporaryDirectory() as folder:
    # the trainer makes the reference from the policy's folder, so the model needs one
    transformers.Qwen2ForCausalLM(config).to(dtype).save_pretrained(folder)
    reward = transformers.Qwen2ForSequenceClassification(
      transformers.Qwen2Config(**config.to_dict() | {"num_labels": 1, "_name_or_path": "reward"})
    ).to(dtype)
    laps.trainer = trl.RLOOTrainer(
      model=folder,
      reward_funcs=reward,
      callbacks=[laps],
      args=training(
        folder, watch.laps, work["prompts"] * task.GROUP, work["response"], work["parts"], gpu
      ),
      train_dataset=datasets.Dataset.from_dict({"prompt": rows}),
      processing_class=tokenizer,
      reward_processing_classes=tokenizer,
    )
    for model in (laps.trainer.model, laps.trainer.ref_model, reward):
      wrong = {p.dtype for p in model.parameters()} - {dtype}
      assert not wrong, f"{dtype} is required, but found {wrong}"
    laps.trainer.train()
  print(
    watch.result(
      "TRL RLOO",
      trl.__version__,
      torch=torch.__version__,
      transformers=transformers.__version__,
      parameters=sum(p.numel() for p in laps.trainer.model.parameters()),
      lengths=laps.lengths,
    )
  )


if __name__ == "__main__":
  main(sys.argv[1], *map(int, sys.argv[2:]))
