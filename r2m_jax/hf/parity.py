"""How far an exported folder is from what transformers makes of it. The only file that runs torch,
where it is there.

Torch is no dependency: without it every function here returns None, and an export goes on.
"""

import importlib.util
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from r2m_jax.hf.folders import abstract_head, load_head, phi_score, phi_state
from r2m_jax.hf.weights import load_pretrained
from r2m_jax.models.reward import read_rte

BOUND = 1e-4  # what is promised of float32
# tokens of the compared rows, padded on the left in ours, one at a time in theirs
LENGTHS = (17, 11, 5, 1)


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


def policy_gap(folder: pathlib.Path) -> float | None:
  """max |logit difference| to AutoModelForCausalLM over the real tokens of four random rows,
  both in float32.
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
  return max(float(np.abs(g[-len(w) :] - w).max()) for g, w in zip(got, want))


def classifier(folder: pathlib.Path, **like):
  """AutoModelForSequenceClassification of a folder, or only the backbone of a family for which
  transformers has no such class (Granite).
  """
  import transformers

  try:
    return transformers.AutoModelForSequenceClassification.from_pretrained(folder, **like)
  except ValueError:
    return transformers.AutoModel.from_pretrained(folder, **like)


def reward_gap(folder: pathlib.Path, policy_folder: pathlib.Path | None = None) -> float | None:
  """max |score difference| to AutoModelForSequenceClassification over four random rows, both in
  float32.

  An R2M reward model is compared with its own PyTorch module, on the hidden states of the policy in
  `policy_folder`.
  """
  if not available():
    return None
  import torch
  import transformers

  from r2m_jax.hf import r2m_head

  ours, head = load_pretrained(folder), load_head(folder)
  rows = random_rows(ours.arch.vocab_size)
  tokens, mask = padded(rows)
  like = dict(dtype=torch.float32, trust_remote_code=False)
  theirs = classifier(folder, **like).eval()
  theirs.config.pad_token_id = None  # with a pad id it would look for the last token that is not it
  read = jax.jit(
    lambda state, tokens, mask: read_rte(nnx.merge(ours.graphdef, state), tokens, mask)
  )
  with jax.default_matmul_precision("highest"), torch.no_grad():
    rte = read(ours.state, tokens, mask)
    if head is None:
      got = np.asarray(phi_score(phi_state(ours.score), rte)) - (
        0 if ours.score.bias is None else ours.score.bias[0]
      )
      kernel = torch.tensor(np.asarray(ours.score.kernel, np.float32))

      def scored(row):
        out = theirs(torch.tensor(row)[None])
        return (out.logits if "logits" in out else out.last_hidden_state[:, -1] @ kernel).item()

      want = list(map(scored, rows))
      return float(np.abs(got - np.array(want)).max())

    config, state = head
    policy = load_pretrained(policy_folder)
    policy_rows = random_rows(policy.arch.vocab_size, 1)
    policy_tokens, policy_mask = padded(policy_rows)

    @jax.jit
    def fused(head_state, policy_state, rte, tokens, mask):
      out = nnx.merge(policy.graphdef, policy_state)(
        tokens, mask, feedback_layer=config.feedback_layer
      )
      head = nnx.merge(nnx.graphdef(abstract_head(config)), head_state)
      return head(rte, out.feedback, mask, jnp.float32(config.omega))

    got = np.asarray(fused(state, policy.state, rte, policy_tokens, policy_mask))
    module = r2m_head.R2MHead.from_folder(folder)
    reader = transformers.AutoModelForCausalLM.from_pretrained(policy_folder, **like).eval()
    want = [
      r2m_head.score(module, theirs, torch.tensor(a)[None], reader, torch.tensor(b)[None])
      for a, b in zip(rows, policy_rows)
    ]
    return float(np.abs(got - np.array(want)).max())
