"""The head of an R2M reward model in PyTorch: its score from a policy's hidden states (arXiv
2601.22664, eqs. 3 and 4).

This file is copied unchanged into an exported reward model's folder, next to r2m_head.json and
r2m_head.safetensors. It needs torch and safetensors, and nothing from r2m_jax. In that folder:

  from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification
  import r2m_head

  head = r2m_head.R2MHead.from_folder(".")
  reward_model = AutoModelForSequenceClassification.from_pretrained(".")       # its own score head is not used
  policy = AutoModelForCausalLM.from_pretrained("the policy it was trained with")
  r2m_head.score(head, reward_model, reward_ids, policy, policy_ids)          # both long[1, length], unpadded

`reward_ids` are prompt and response, rendered as described in r2m_renderer.json: by the reward
tokenizer's chat template, or as the text prompt + " " + response. `policy_ids` are prompt and
response in the policy's own tokens, with the response's end token. The two need not align: a single
query from one sequence reads the other.
"""

import json
import pathlib

import torch
from safetensors import safe_open
from safetensors.torch import load_file

ACTIVATIONS = {
  "relu": torch.nn.ReLU,
  "silu": torch.nn.SiLU,
  "gelu": torch.nn.GELU,
  "tanh": torch.nn.Tanh,
}


class R2MHead(torch.nn.Module):
  """r = phi((1 - w) H_hat + w H_last), where H_hat is what H_last reads from the policy's hidden
  states by attention.
  """

  def __init__(self, config: dict):
    super().__init__()
    policy = config["policy_hidden_size"]
    reward = config["reward_hidden_size"]
    width = config["attention_dim"]
    self.num_heads = config["num_heads"]
    self.omega = config["omega"]
    self.feedback_layer = config["feedback_layer"]
    self.wq = torch.nn.Linear(reward, width, bias=False)
    self.wk = torch.nn.Linear(policy, width, bias=False)
    self.wv = torch.nn.Linear(policy, width, bias=False)
    self.wo = torch.nn.Linear(width, reward, bias=False)
    self.phi = torch.nn.Linear(reward, 1)
    self.first = torch.nn.Identity()  # see `first_layer`

  @classmethod
  def from_folder(cls, folder) -> "R2MHead":
    """Reads r2m_head.json and r2m_head.safetensors. The result is in float32, ready for
    inference.
    """
    folder = pathlib.Path(folder)
    head = cls(json.loads((folder / "r2m_head.json").read_text(encoding="utf-8")))
    head.load_state_dict(load_file(folder / "r2m_head.safetensors"))
    head.first = first_layer(folder)
    return head.eval()

  def forward(
    self, rte: torch.Tensor, hidden: torch.Tensor, mask: torch.Tensor, omega: float | None = None
  ):
    """Scores [B].

    rte [B, Dr]: H_last, the reward backbone's last hidden state (after its final norm) at the last
      real token, through `first`.
    hidden [B, S, Dp]: the policy's hidden states over prompt and response; see `feedback`. mask
    bool[B, S]: True on real tokens of both prompt and response. omega: the weight w on the reward
    model's own embedding; None: its value at the export.
    """
    omega = self.omega if omega is None else omega

    def split(x):
      return x.unflatten(-1, (self.num_heads, -1))

    q, k, v = (
      split(self.wq(rte)),
      split(self.wk(hidden)),
      split(self.wv(hidden)),
    )  # [B, n, d], [B, S, n, d] twice
    logits = torch.einsum("bnd,bsnd->bns", q, k) * q.shape[-1] ** -0.5
    weights = logits.masked_fill(~mask.bool()[:, None], torch.finfo(logits.dtype).min).softmax(-1)
    h_hat = self.wo(torch.einsum("bns,bsnd->bnd", weights, v).flatten(1))  # eq. 3
    return self.phi((1 - omega) * h_hat + omega * rte)[:, 0]  # eq. 4


def first_layer(folder) -> torch.nn.Module:
  """The first layer of a reward model's two-layer score head: a linear layer and its activation.
  For a head of one layer it is the identity.
  """
  folder = pathlib.Path(folder)
  activation = json.loads((folder / "config.json").read_text(encoding="utf-8")).get(
    "score_activation"
  )
  if activation is None:
    return torch.nn.Identity()
  tensors = {}
  for file in folder.glob("model*.safetensors"):
    with safe_open(file, "pt") as opened:
      for name in set(opened.keys()) & {"score.0.weight", "score.0.bias"}:
        tensors[name.removeprefix("score.0.")] = opened.get_tensor(name).float()
  linear = torch.nn.Linear(*reversed(tensors["weight"].shape))
  linear.load_state_dict(tensors)
  return torch.nn.Sequential(linear, ACTIVATIONS[activation]()).eval()


def reward_token_embedding(reward_model, ids: torch.Tensor) -> torch.Tensor:
  """H_last [1, Dr] of one unpadded row long[1, length]."""
  return reward_model.base_model(ids).last_hidden_state[:, -1].float()


def feedback(policy, ids: torch.Tensor, layer: int = -1) -> torch.Tensor:
  """The policy's hidden states [1, length, Dp]: after the final norm (-1), or the residual
  stream after `layer`.
  """
  count = policy.config.get_text_config().num_hidden_layers
  if not -1 <= layer < count - 1:
    raise ValueError(
      f"feedback layer {layer} is not among transformers' hidden_states of {count} layers"
    )
  return (
    policy(ids, output_hidden_states=True).hidden_states[-1 if layer == -1 else layer + 1].float()
  )


@torch.no_grad()
def score(
  head: R2MHead, reward_model, reward_ids: torch.Tensor, policy, policy_ids: torch.Tensor
) -> float:
  """The reward of one response; both rows long[1, length] without padding."""
  hidden = feedback(policy, policy_ids, head.feedback_layer)
  rte = head.first(reward_token_embedding(reward_model, reward_ids))
  return head(rte, hidden, torch.ones(hidden.shape[:2], dtype=torch.bool)).item()
