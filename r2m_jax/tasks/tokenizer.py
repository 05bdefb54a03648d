"""`task=tokenizer`: trains a byte-level BPE tokenizer with a chat template, and adds a model with
random weights.

  python -m r2m_jax.main --config=configs/default.py --workdir=W --config.task=tokenizer \\
    --config.data.name=FILES

It writes W/export/policy, an ordinary Hugging Face folder: `--config.policy.path=W/export/policy`
with `--config.task=sft` trains it. The corpus may be texts, dialogues or preferences, of which only
the chosen reply is read.
"""

import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path

import jax
import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

from r2m_jax.data.jsonl import DataError
from r2m_jax.data.rows import load
from r2m_jax.data.text import save_tokenizer
from r2m_jax.hf.export import new_folder
from r2m_jax.hf.folders import mesh_of
from r2m_jax.hf.weights import save_pretrained
from r2m_jax.run.build import KEY_INIT, build, init_policy
from r2m_jax.run.workdir import claim

END = "<|end|>"
PAD = "<|pad|>"
ROLES = ("<|system|>", "<|user|>", "<|assistant|>")
TEMPLATE = (  # one token opens a message, one closes it
  "{% for m in messages %}{{ '<|' + m['role'] + '|>' + m['content'] + '<|end|>' }}{% endfor %}"
  "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)


def run(config, workdir: Path, *, out: Path | None = None) -> None:
  """Trains on config.data; writes tokenizer and model to `out` (None: WORKDIR/export/policy)."""
  if out is None:
    claim(config, workdir)
  texts = list(texts_of(load(config.data, "text")))
  texts = list(dict.fromkeys(texts)) if config.data.unique else texts
  core = train(texts, config.tokenizer.vocab_size, config.tokenizer.min_frequency)
  characters, tokens = sum(map(len, texts)), sum(len(e.ids) for e in core.encode_batch_fast(texts))
  print(
    f"tokens   {core.get_vocab_size()} entries, {characters / tokens:.2f} characters a token of "
    "its own corpus"
  )
  out, mesh = out or workdir / "export/policy", mesh_of(config)
  built = build(config, mesh, vocab_size=core.get_vocab_size())
  state = init_policy(config, built, jax.random.fold_in(jax.random.key(config.seed), KEY_INIT))
  with new_folder(out) as folder, tempfile.TemporaryDirectory() as beside:
    save_tokenizer(core, beside, end=END, pad=PAD, special=ROLES, template=TEMPLATE)
    save_pretrained(folder, built.arch, state, tokenizer_folder=beside)
  parameters = sum(x.size for x in jax.tree.leaves(state))
  print(
    f"export   a tokenizer and a model of {parameters / 1e6:.2f} million random weights in {out}"
  )


def texts_of(rows: Iterable[dict]) -> Iterator[str]:
  """Every message of every row as a separate text."""
  for row in rows:
    if "text" in row:
      yield row["text"]
      continue
    yield from (
      [row["prompt"]] if isinstance(row["prompt"], str) else [m["content"] for m in row["prompt"]]
    )
    yield row["response"]


def train(texts: Iterable[str], vocab_size: int, min_frequency: int) -> tokenizers.Tokenizer:
  """A byte-level BPE tokenizer: decoding its tokens restores any text exactly. The size includes
  the special tokens.
  """
  core = tokenizers.Tokenizer(models.BPE())
  core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
  core.decoder = decoders.ByteLevel()
  trainer = trainers.BpeTrainer(
    vocab_size=vocab_size,
    min_frequency=min_frequency,
    special_tokens=[END, PAD, *ROLES],
    show_progress=False,
    initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
  )
  core.train_from_iterator(texts, trainer)
  if core.get_vocab_size() < vocab_size:
    raise DataError(
      f"the texts of config.data.name give only {core.get_vocab_size()} entries of "
      "config.tokenizer.vocab_size = "
      f"{vocab_size}: give more text, a smaller vocabulary or a smaller "
      "config.tokenizer.min_frequency"
    )
  return core
