"""The work that peers.py gives to TRL and to tunix, and the stopwatch for it.

Their own processes import this file in environments without r2m_jax, so it imports only the
standard library and numpy.
"""

import itertools
import json
import os

import numpy as np

from benchmarks import machine

# Qwen2 shapes, the same for policy, reference and reward model; vocabulary projection untied
SIZES = {
  "tiny": dict(
    vocab_size=512, hidden_size=128, layers=4, heads=4, kv_heads=2, intermediate_size=512
  ),
  "small": dict(
    vocab_size=32000, hidden_size=512, layers=8, heads=8, kv_heads=4, intermediate_size=2048
  ),
  # for a GPU, in bfloat16: four times the prompts, eight times the response, tied like the real
  # model is
  "0.5b": dict(
    vocab_size=151936, hidden_size=896, layers=24, heads=14, kv_heads=2, intermediate_size=4864
  ),
}
ROPE_THETA, NORM_EPS = 1e6, 1e-6
# prompts, samples of each, tokens of a prompt and of a response
PROMPTS = 8
GROUP = 8
LENGTH = 64
RESPONSE = 64
ROWS = PROMPTS * GROUP
ON_GPU = {
  "0.5b": dict(prompts=32, response=512, parts=8)
}  # parts: an update's rows, one part at a time
TEMPERATURE = 0.7
EPOCHS = 2
BETA = 0.05
LEARNING_RATE = 1e-6
WIDTH = 7  # characters of a token's text


def word(token: int) -> str:
  return f"t{token:0{WIDTH - 1}d}"


def prompts(vocab_size: int, step: int, count: int = PROMPTS) -> list[str]:
  """Random tokens as text, new ones at every step."""
  tokens = np.random.default_rng(step).integers(0, vocab_size, (count, LENGTH))
  return ["".join(map(word, row)) for row in tokens]


def make_tokenizer(vocab_size: int, ends: int = 0):
  """A fast tokenizer for which encoding a decoded text restores exactly the same tokens, also if
  two texts are joined.

  The end token and the pad token are outside the models' vocabulary, so no row ends before its last
  token, and no peer pays for suppressing one. An unknown word raises an error, because it has no
  token. If the first `ends` words end a row, the first is the end token, and the last word pads.
  """
  from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
  from transformers import PreTrainedTokenizerFast

  words = {word(token): token for token in range(vocab_size)} | {
    "<eos>": vocab_size,
    "<pad>": vocab_size + 1,
  }
  found = Tokenizer(models.WordLevel(words))
  found.pre_tokenizer = pre_tokenizers.Split(Regex(f"t[0-9]{{{WIDTH - 1}}}"), "isolated")
  found.decoder = decoders.Fuse()
  end, pad = (word(0), word(vocab_size - 1)) if ends else ("<eos>", "<pad>")
  found = PreTrainedTokenizerFast(
    tokenizer_object=found, eos_token=end, pad_token=pad, padding_side="left"
  )
  texts = prompts(vocab_size, 0)
  check_length("a prompt", map(len, found(text=texts)["input_ids"]), LENGTH)
  assert found.batch_decode(found(text=texts)["input_ids"]) == texts, (
    "text and tokens do not restore each other"
  )
  return found


def check_length(what: str, lengths, asked: int) -> None:
  """Ends the process if the work is not the specified one."""
  if wrong := sorted(set(lengths) - {asked}):
    raise SystemExit(f"{what} has {wrong} tokens, not {asked}: this would not be the same work")


class Watch:
  """Times rollouts, each with all its updates, until `count` were quiet or there were `most` times
  as many.

  The first `warm` rollouts are not counted, because programs compile and memory is allocated. The
  use of the cores by others is measured over the same time as the rollout.
  """

  def __init__(self, count: int, most: int, warm: int = 1):
    self.count, self.warm = count, warm
    self.laps = warm + most * count  # at most
    self.seconds = []
    self.busy = []
    self.ticks = []

  def lap(self) -> None:
    """Ends one rollout and starts the next; the first call only starts."""
    self.ticks.append(machine.Ticks.now())
    if len(self.ticks) > self.warm + 1:
      before, after = self.ticks[-2:]
      self.seconds.append(after.wall - before.wall)
      self.busy.append(machine.others_share(before, after, os.cpu_count() or 1))

  @property
  def done(self) -> bool:
    quiet = sum(busy <= machine.QUIET for busy in self.busy)
    return quiet >= self.count or len(self.ticks) > self.laps

  def result(self, peer: str, version: str, **more) -> str:
    """One JSON line for peers.py."""
    kept, enough = machine.quietest(self.busy, self.count, machine.QUIET)
    warm = [
      after.wall - before.wall for before, after in itertools.pairwise(self.ticks[: self.warm + 1])
    ]
    return json.dumps(
      {
        "peer": peer,
        "version": version,
        "seconds": [self.seconds[i] for i in kept],
        "busy": [self.busy[i] for i in kept],
        "dropped": len(self.seconds) - len(kept),
        "quiet": enough,
        "warm": warm,
        "peak": machine.peak_memory(),
        **more,
      }
    )
