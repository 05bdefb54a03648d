"""Compares an exported folder with transformers. This is the only file that runs torch, if it is
installed.

Torch is not a dependency: without it every function here returns None, and an export continues.
"""

import importlib.util
import pathlib
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from r2m_jax.hf.folders import abstract_head, load_head, phi_score, phi_state
from r2m_jax.hf.weights import SCORE_ACTIVATION, Score, load_pretrained
from r2m_jax.models.reward import read_rte
from r2m_jax.run.identities import WARN, measure_rounding

BOUND = 1e-4  # the bound in float32 for logits and scores of a small model
# tokens of the compared rows: ours padded on the left, theirs one row at a time
LENGTHS = (17, 11, 5, 1)


class Gap(NamedTuple):
  """The difference between our numbers and transformers', and how much of it rounding explains.

  A logit is a sum over the width of the model, after all its layers. Large logits of a deep model
  therefore differ between two programs by more than `BOUND`. Only in that case, the rounding of
  this model is measured.
  """

  value: float  # max |difference|
  bound: float  # BOUND, or if that is exceeded WARN times the measured rounding
  size: float  # the largest |number|
  rounding: float | None = None  # how far rounding by itself moves a number; None: not measured

  def describe(self, name: str) -> str:
    """The line that an export prints; `name` is the name of the numbers, such as "logit"."""
    holds = self.value <= self.bound
    text = (
      f"max |{name} - that of transformers| {self.value:.1e}, {'within' if holds else 'ABOVE'} "
      f"{self.bound:.0e} (float32, {len(LENGTHS)} rows)"
    )
    if self.rounding is not None:
      text += (
        f": rounding by itself moves a {name} of this model by up to {self.rounding:.1e}, and "
        f"the largest is {self.size:.3g}"
      )
    if not holds:
      text += (
        ". The two programs do not compute the same: do not use the folder before you know why. "
        "Try another version of transformers, and report it with the versions of jax and r2m_jax "
        "if it stays"
      )
    return text


def gap_of(
  got: Sequence[np.ndarray], want: Sequence[np.ndarray], compute: Callable, weights, tokens, mask
) -> Gap:
  """The gap between two lists of numbers, row by row.

  Args:
    compute, weights, tokens, mask: as for `measure_rounding`: they computed `got`, and are used
      again if it is further than BOUND from `want`. Their result is [B, ...] or [B, L, ...].
  """
  value = float(max(np.abs(g - w).max() for g, w in zip(got, want)))
  size = float(max(np.abs(w).max() for w in want))
  if value <= BOUND or not np.isfinite(value):
    return Gap(value, BOUND, size)
  counted = mask if got[0].ndim > 1 else np.ones((len(got), 1), bool)
  with jax.default_matmul_precision("highest"):
    rounding = measure_rounding(compute, weights, tokens, mask, counted, "float32").largest
  return Gap(value, max(BOUND, WARN * float(rounding)), size, float(rounding))


def available() -> bool:
  return importlib.util.find_spec("torch") is not None


def random_rows(vocab_size: int, seed: int = 0) -> list[np.ndarray]:
  rng = np.random.default_rng(seed)
  return [rng.integers(0, vocab_size, n) for n in LENGTHS]


def padded(rows) -> tuple[np.ndarray, np.ndarray]:
  length = max(map(len, rows))
  tokens, mask = np.zeros((len(rows), length), np.int32), np.zeros((len(rows), length), bool)
  for i, row in enumerate(rows):
    tokens[i, length - len(row) :], mask[i, length - len(row) :] = row, True
  return tokens, mask


def policy_gap(folder: pathlib.Path) -> Gap | None:
  """The gap to the logits of AutoModelForCausalLM over the real tokens of four random rows, both in
  float32.
  """
  if not available():
    return None
  import torch
  import transformers

  ours = load_pretrained(folder)
  rows = random_rows(ours.arch.vocab_size)
  tokens, mask = padded(rows)

  @jax.jit
  def logits(state, tokens, mask):
    model = nnx.merge(ours.graphdef, state)
    return model.logits(model(tokens, mask).hidden)

  with jax.default_matmul_precision("highest"):
    got = np.asarray(logits(ours.state, tokens, mask))
  model = transformers.AutoModelForCausalLM.from_pretrained(
    folder, dtype=torch.float32, trust_remote_code=False
  ).eval()
  with torch.no_grad():
    want = [model(torch.tensor(row)[None]).logits[0].numpy() for row in rows]
  got = [g[-len(w) :] for g, w in zip(got, want)]
  return gap_of(got, want, logits, ours.state, tokens, mask)


def classifier(folder: pathlib.Path, **like):
  """AutoModelForSequenceClassification of a folder, or only the backbone if transformers has no
  such class: for Granite, and for a two-layer score head.
  """
  import transformers

  if transformers.AutoConfig.from_pretrained(folder).to_dict().get(SCORE_ACTIVATION):
    return transformers.AutoModel.from_pretrained(folder, **like)
  try:
    return transformers.AutoModelForSequenceClassification.from_pretrained(folder, **like)
  except ValueError:
    return transformers.AutoModel.from_pretrained(folder, **like)


def reward_gap(folder: pathlib.Path, policy_folder: pathlib.Path | None = None) -> Gap | None:
  """The gap to the scores of AutoModelForSequenceClassification over four random rows, both in
  float32.

  An R2M reward model is compared with its own PyTorch module, on the hidden states of the policy in
  `policy_folder`.
  """
  if not available():
    return None
  import torch

  from r2m_jax.hf import r2m_head

  like = dict(dtype=torch.float32, trust_remote_code=False)
  theirs = classifier(folder, **like).eval()
  theirs.config.pad_token_id = None  # with a pad id it would look for the last other token
  ours, head = load_pretrained(folder), load_head(folder)
  rows = random_rows(ours.arch.vocab_size)
  if head is not None:
    return _fused_gap(folder, policy_folder, ours, head, theirs, rows)

  @jax.jit
  def scores(weights, tokens, mask):
    state, phi = weights
    rte = read_rte(nnx.merge(ours.graphdef, state), tokens, mask)
    return phi_score(phi, rte)[:, None]

  weights = ours.state, phi_state(Score(ours.score.kernel, None))  # their head has no bias
  tokens, mask = padded(rows)
  with jax.default_matmul_precision("highest"):
    got = np.asarray(scores(weights, tokens, mask))
  kernel = torch.tensor(np.asarray(ours.score.kernel, np.float32))
  first = r2m_head.first_layer(folder)

  def scored(row):
    out = theirs(torch.tensor(row)[None])
    if "logits" in out:
      return out.logits[0].numpy()
    return (first(out.last_hidden_state[0, -1]) @ kernel).numpy()

  with torch.no_grad():
    want = list(map(scored, rows))
  return gap_of(got, want, scores, weights, tokens, mask)


def _fused_gap(folder, policy_folder, ours, head, theirs, rows) -> Gap:
  """`reward_gap` of an R2M reward model."""
  import torch
  import transformers

  from r2m_jax.hf import r2m_head

  config, state = head
  policy = load_pretrained(policy_folder)
  policy_rows = random_rows(policy.arch.vocab_size, 1)
  both = zip(padded(rows), padded(policy_rows))
  tokens, mask = (np.concatenate(pair, 1) for pair in both)  # reward model, then policy
  half = tokens.shape[1] // 2

  @jax.jit
  def scores(weights, tokens, mask):
    backbone, head_state, policy_state = weights
    rte = read_rte(nnx.merge(ours.graphdef, backbone), tokens[:, :half], mask[:, :half])
    reader = nnx.merge(policy.graphdef, policy_state)
    fed = tokens[:, half:], mask[:, half:]
    feedback = reader(*fed, feedback_layer=config.feedback_layer).feedback
    fuse = nnx.merge(nnx.graphdef(abstract_head(config)), head_state)
    return fuse(rte, feedback, fed[1], jnp.float32(config.omega))[:, None]

  weights = ours.state, state, policy.state
  with jax.default_matmul_precision("highest"):
    got = np.asarray(scores(weights, tokens, mask))
  module = r2m_head.R2MHead.from_folder(folder)
  like = dict(dtype=torch.float32, trust_remote_code=False)
  reader = transformers.AutoModelForCausalLM.from_pretrained(policy_folder, **like).eval()
  with torch.no_grad():
    want = [
      r2m_head.score(module, theirs, torch.tensor(a)[None], reader, torch.tensor(b)[None])
      for a, b in zip(rows, policy_rows)
    ]
  want = [np.atleast_1d(np.asarray(w, np.float32)) for w in want]
  return gap_of(got, want, scores, weights, tokens, mask)
