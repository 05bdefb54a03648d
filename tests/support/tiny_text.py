"""Tiny tokenizers with and without chat templates, and models with them, for tests that run on
text.
"""

import hf_models
import tokenizers
import transformers
from tokenizers import decoders, models, pre_tokenizers, processors, trainers

CORPUS = [
  "The cat sat on the mat and the dog ran after the cat.",
  "What is the capital of France? It is Paris.",
  "Please write a short poem about rain, trees and the sea.",
]
CHATML = (
  "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' "
  "}}{% endfor %}"
  "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
LLAMA3 = (
  "{{ bos_token }}{% for m in messages %}{{ '<|start|>' + m['role'] + '<|stop|>' + (m['content'] | "
  "trim) + '<|eot|>' }}"
  "{% endfor %}{% if add_generation_prompt %}{{ '<|start|>assistant<|stop|>' }}{% endif %}"
)
# kind -> (special tokens, which of them are bos, eos and pad, chat template, whether it adds a BOS,
# vocabulary)
KINDS = {
  "chatml": (
    ["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
    (None, "<|endoftext|>", "<|endoftext|>"),
    CHATML,
    False,
    301,
  ),
  "llama3": (
    ["<s>", "</s>", "<|start|>", "<|stop|>", "<|eot|>"],
    ("<s>", "</s>", None),
    LLAMA3,
    True,
    287,
  ),
  "plain": (["<s>", "</s>"], ("<s>", "</s>", "</s>"), None, True, 293),
}


def tokenizer(kind: str, folder=None):
  """A byte-level BPE tokenizer of transformers; saved to `folder` if one is given."""
  special, (bos, eos, pad), template, adds_bos, size = KINDS[kind]
  core = tokenizers.Tokenizer(models.BPE())
  core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
  core.decoder = decoders.ByteLevel()
  alphabet = pre_tokenizers.ByteLevel.alphabet()
  core.train_from_iterator(
    CORPUS,
    trainers.BpeTrainer(
      vocab_size=size, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    ),
  )
  assert core.get_vocab_size() == size
  if adds_bos:
    core.post_processor = processors.TemplateProcessing(
      single=f"{bos} $A", special_tokens=[(bos, core.token_to_id(bos))]
    )
  hf = transformers.PreTrainedTokenizerFast(
    tokenizer_object=core, bos_token=bos, eos_token=eos, pad_token=pad
  )
  hf.add_special_tokens(
    {"additional_special_tokens": [t for t in special if t not in (bos, eos, pad)]}
  )
  hf.chat_template = template
  if folder is not None:
    hf.save_pretrained(folder)
  return hf


def model(case: str, kind: str, folder, **kwargs):
  """A model of hf_models with a tokenizer of `kind`, both saved to `folder`; returns (model,
  tokenizer).
  """
  hf = tokenizer(kind, folder)
  ids = dict(vocab_size=KINDS[kind][-1], bos_token_id=hf.bos_token_id, eos_token_id=hf.eos_token_id)
  return hf_models.make(case, folder, **(ids | kwargs)), hf


# as Qwen3: the last answer has a block of reasoning, an empty one if it has none; earlier ones lose
# theirs; enable_thinking=False ends the generation prompt with an empty block
QWEN3 = (
  "{% for m in messages %}{% set c = m['content'] %}"
  "{% if m['role'] == 'assistant' %}{% set r = '' %}"
  "{% if '</think>' in c %}"
  "{% set r = c.split('</think>')[0].rstrip('\n').split('<think>')[-1].lstrip('\n') %}"
  "{% set c = c.split('</think>')[-1].lstrip('\n') %}{% endif %}"
  "{% if loop.last %}"
  "{% set c = '<think>\n' + r.strip('\n') + '\n</think>\n\n' + c.lstrip('\n') %}{% endif %}"
  "{{ '<|im_start|>assistant\n' + c + '<|im_end|>\n' }}"
  "{% else %}{{ '<|im_start|>' + m['role'] + '\n' + c + '<|im_end|>\n' }}{% endif %}{% endfor %}"
  "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}"
  "{% if enable_thinking is defined and enable_thinking is false %}"
  "{{ '<think>\n\n</think>\n\n' }}{% endif %}{% endif %}"
)
# as DeepSeek-R1: the generation prompt opens the reasoning, and every answer loses its own
R1 = (
  "{% for m in messages %}{% set c = m['content'] %}"
  "{% if m['role'] == 'assistant' %}"
  "{{ '<|im_start|>' + (c.split('</think>')[-1] if '</think>' in c else c) + '<|im_end|>' }}"
  "{% else %}{{ m['role'] + ': ' + c }}{% endif %}{% endfor %}"
  "{% if add_generation_prompt %}{{ '<|im_start|><think>\n' }}{% endif %}"
)


def thinking_tokenizer(template: str, folder=None):
  """The tokenizer of kind "chatml" with ordinary tokens <think> and </think>, as Qwen3 has them, and
  a template; 303 entries.
  """
  hf = tokenizer("chatml")
  hf.add_tokens(["<think>", "</think>"])
  hf.chat_template = template
  if folder is not None:
    hf.save_pretrained(folder)
  return hf
