"""The child of notes_step.py: an RL step of the notes task in TRL's RLOOTrainer. It runs in TRL's own
environment, without r2m_jax.

  PEERS/trl/bin/python -m benchmarks.peer_notes WORK.json
"""

import json
import os
import sys
import tempfile
from pathlib import Path

import datasets
import torch
import transformers
import trl

from benchmarks import machine, peer_task, peer_trl


def main(path: str) -> None:
  work = json.loads(Path(path).read_text(encoding="utf-8"))
  transformers.utils.logging.set_verbosity_error()
  torch.set_num_threads(os.cpu_count() or 1)
  torch.manual_seed(0)
  watch = peer_task.Watch(work["steps"], 1)
  watch.laps = watch.warm + work["steps"] + work["more"]
  laps = peer_trl.Laps(watch, None, epochs=1)
  system = {"role": "system", "content": work["system"]}
  rows = [[system, {"role": "user", "content": text}] for text in work["prompts"]]
  folders = work["policy"], work["reward"]
  tokenizer, judge = map(transformers.AutoTokenizer.from_pretrained, folders)
  reward = transformers.AutoModelForSequenceClassification.from_pretrained(
    work["reward"], num_labels=1, dtype=torch.float32
  )
  with tempfile.TemporaryDirectory() as folder:
    laps.trainer = trl.RLOOTrainer(
      model=work["policy"],
      reward_funcs=reward,
      callbacks=[laps],
      args=peer_trl.training(
        folder,
        watch.laps,
        work["rows"],
        work["response"],
        1,
        False,
        num_generations=work["group"],
        temperature=work["temperature"],
        num_iterations=1,
        beta=work["beta"],
        learning_rate=work["lr"],
        max_steps=watch.laps,
      ),
      train_dataset=datasets.Dataset.from_dict({"prompt": rows}),
      processing_class=tokenizer,
      reward_processing_classes=judge,
    )
    laps.trainer.train()
  print(
    json.dumps(
      {
        "seconds": watch.seconds,
        "busy": watch.busy,
        "lengths": laps.lengths[watch.warm :],
        "first_length": laps.lengths[0],
        "peak": machine.peak_memory(),
        "version": trl.__version__,
        "torch": torch.__version__,
      }
    )
  )


if __name__ == "__main__":
  main(sys.argv[1])
