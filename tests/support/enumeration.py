"""A policy so small that all responses can be enumerated: expected gradients as exact sums, in
NumPy and float64.

The policy is a table of logits, one row per state; a state is a prompt and the tokens so far. A
response ends with EOS or is cut off at `length` tokens. `Space` lists the responses and all batches
of P * K independent ones. The expectation of a training step is then a finite sum over those
batches:

  documented(...)   value and gradient of the loss, averaged over all batches: the estimators as their definitions say,
                    with d log pi / d logits written out as (one-hot - pi) / temperature
  objective(...)    E[r] - beta * KL of whole responses, a scalar; `true_gradient` is its gradient, `central` too
  held(...)         grad E[r] - beta * E_s[grad KL(pi(.|s) || ref(.|s))]: the states visited are held fixed. That is
                    what "KL in the loss" means, and it is not the gradient of KL of whole responses

Nothing is imported from the library.
"""

import dataclasses
import itertools
from typing import NamedTuple

import numpy as np

EOS = 0


class Sampling(NamedTuple):
  """The changes to a state's logits before a token is sampled."""

  temperature: float = 1.0
  top_k: int = 0
  top_p: float = 1.0
  min_p: float = 0.0


class Setting(NamedTuple):
  """One estimator of the gradient."""

  algorithm: str = "rloo"
  placement: str = "reward"
  estimator: str = "k1"
  aggregation: str = "sequence_sum"
  norm: str = "group"
  ratio: str = "token"
  whiten: bool = False
  mask_truncated: bool = False
  beta: float = 0.3
  advantage_eps: float = 1e-4
  gamma: float = 0.9
  lam: float = 0.8
  clip_eps: float = 0.2
  clip_eps_high: float = 0.0
  dual_clip: float = 0.0


class Tables(NamedTuple):
  """S states in all (those of every prompt), V tokens, Y responses."""

  policy: np.ndarray  # [S, V] logits; gradients are with respect to these
  old: np.ndarray  # [S, V] logits of the policy that drew the samples
  ref: np.ndarray  # [S, V]
  reward: np.ndarray  # [P, Y]
  values: np.ndarray  # [S] of the critic


@dataclasses.dataclass(frozen=True)
class Space:
  """All responses over `vocab` tokens of at most `length`, and all batches of `group` of them
  for each prompt.
  """

  vocab: int
  length: int
  prompts: int = 1
  group: int = 2

  def __post_init__(self):
    prefixes = [()]  # prefixes that another token may follow
    for n in range(1, self.length):
      prefixes += itertools.product([t for t in range(self.vocab) if t != EOS], repeat=n)
    said = [(*prefix, t) for prefix in prefixes for t in range(self.vocab)]
    said = [y for y in said if y[-1] == EOS or len(y) == self.length]
    number = {prefix: i for i, prefix in enumerate(prefixes)}
    tokens = np.full((len(said), self.length), EOS)  # padded with EOS: masks must come from lengths
    states = np.zeros(tokens.shape, int)
    for i, y in enumerate(said):
      tokens[i, : len(y)] = y
      states[i, : len(y)] = [number[y[:t]] for t in range(len(y))]
    rows = self.prompts * self.group

    def put(name, value):
      return object.__setattr__(self, name, value)

    put("per_prompt", len(prefixes))
    put("states", len(prefixes) * self.prompts)
    put("tokens", tokens)  # [Y, T]
    put(
      "mask", np.arange(self.length) < np.array([len(y) for y in said])[:, None]
    )  # [Y, T], EOS included
    put("has_eos", np.array([y[-1] == EOS for y in said]))  # [Y]
    put("state", np.stack([states + p * len(prefixes) for p in range(self.prompts)]))  # [P, Y, T]
    put("prompt", np.repeat(np.arange(self.prompts), self.group))  # [B], of each row of a batch
    put(
      "batches", np.array(list(itertools.product(range(len(said)), repeat=rows)))
    )  # [N, B] -> which response

  def random_tables(self, seed, on_policy=True):
    rng = np.random.default_rng(seed)
    policy, shift, ref = (rng.normal(size=(self.states, self.vocab)) for _ in range(3))
    old = policy if on_policy else policy + 0.4 * shift
    return Tables(
      policy,
      old,
      policy + 0.7 * ref,
      rng.normal(size=(self.prompts, len(self.tokens))),
      rng.normal(size=self.states),
    )


# ---- distributions ----


def kept_row(logits, sampling):
  """Which tokens of one state may be drawn, bool[V]: the order is temperature, top k, top p of
  the rest, min p.
  """
  z = logits / sampling.temperature
  keep = np.ones(len(z), bool)
  if 0 < sampling.top_k < len(z):
    keep = z >= sorted(z)[-sampling.top_k]
  p = np.where(keep, np.exp(z - z.max()), 0)
  p = p / p.sum()
  if sampling.top_p < 1:
    total, smallest = 0.0, 1.0
    for value in sorted(p[keep])[::-1]:
      if total >= sampling.top_p:
        break
      total, smallest = total + value, value
    keep &= p >= smallest
  return keep & (p >= sampling.min_p * p.max())


def kept(logits, sampling):
  """[S, V] -> bool[S, V]"""
  return np.array([kept_row(row, sampling) for row in logits])


def log_distribution(logits, sampling, keep):
  """log softmax(logits / temperature) among the kept tokens, -inf elsewhere.   [S, V]"""
  z = np.where(keep, logits / sampling.temperature, -np.inf)
  z = z - z.max(-1, keepdims=True)
  return z - np.log(np.exp(z).sum(-1, keepdims=True))


def times_log_ratio(p, log_p, log_q):
  """p * (log p - log q), and 0 where p is."""
  with np.errstate(invalid="ignore"):
    return np.where(p > 0, p * (log_p - log_q), 0)


def token_logprobs(space, log_p):
  """Log-probability of each token of each response, zero outside the mask.   [S, V] -> [P, Y, T]"""
  return np.where(space.mask, log_p[space.state, space.tokens], 0)


def probabilities(space, log_p):
  """Of each response.   [S, V] -> [P, Y]"""
  return np.exp(token_logprobs(space, log_p).sum(-1))


def grad_logprobs(space, logits, sampling):
  """d log pi(token | state) / d logits.   [S, V] -> [P, Y, T, S, V]"""
  keep = kept(logits, sampling)
  p = np.exp(log_distribution(logits, sampling, keep))
  out = np.zeros((*space.state.shape, *logits.shape))
  for at in np.ndindex(space.state.shape):
    if space.mask[at[1:]]:
      state = space.state[at]
      out[at][state] = -p[state] / sampling.temperature
      out[at][state][space.tokens[at[1:]]] += 1 / sampling.temperature
  return out


def state_kl(logits, ref, sampling):
  """KL(pi(.|s) || ref(.|s)) of each state and its gradient with respect to that state's logits.   [S], [S, V]

  The reference is normalised over the tokens that the policy keeps.
  """
  keep = kept(logits, sampling)
  log_p, log_q = (log_distribution(x, sampling, keep) for x in (logits, ref))
  p = np.exp(log_p)
  terms = times_log_ratio(p, log_p, log_q)
  kl = terms.sum(-1)
  return kl, (terms - p * kl[:, None]) / sampling.temperature


# ---- exact objectives ----


def objective(space, logits, tables, sampling, beta):
  """E[r] - beta * KL(policy || reference) of whole responses, mean over prompts."""
  keep = kept(logits, sampling)
  log_p, log_q = (
    token_logprobs(space, log_distribution(x, sampling, keep)) for x in (logits, tables.ref)
  )
  p = np.exp(log_p.sum(-1))
  total = 0.0
  for i in np.ndindex(p.shape):
    if p[i] > 0:
      total += p[i] * (tables.reward[i] - beta * (log_p[i].sum() - log_q[i].sum()))
  return total / space.prompts


def true_gradient(space, tables, sampling, beta):
  """Gradient of `objective` at the policy: sum over responses of p (r - beta log(p / ref)) grad log
  p. [S, V]
  """
  keep = kept(tables.policy, sampling)
  log_p, log_q = (
    token_logprobs(space, log_distribution(x, sampling, keep)) for x in (tables.policy, tables.ref)
  )
  p = np.exp(log_p.sum(-1))
  with np.errstate(invalid="ignore"):
    weight = np.where(p > 0, p * (tables.reward - beta * (log_p - log_q).sum(-1)), 0)
  return (
    np.einsum("py,pytsv->sv", weight, grad_logprobs(space, tables.policy, sampling)) / space.prompts
  )


def central(space, tables, sampling, beta, step=1e-5):
  """`true_gradient` by central differences of `objective`."""
  out = np.zeros(tables.policy.shape)
  for i in np.ndindex(out.shape):
    ends = []
    for sign in (1, -1):
      moved = tables.policy.copy()
      moved[i] += sign * step
      ends.append(objective(space, moved, tables, sampling, beta))
    out[i] = (ends[0] - ends[1]) / (2 * step)
  return out


def reached(space, logits, sampling):
  """Probability that a response visits each state.   [S], summing to the number of states
  visited per prompt
  """
  p = np.exp(log_distribution(logits, sampling, kept(logits, sampling)))
  out = np.zeros(space.states)
  for prompt in range(space.prompts):
    out[prompt * space.per_prompt] = 1
    for y in range(len(space.tokens)):  # a state is reached only by the token before it
      for t in range(1, int(space.mask[y].sum())):
        before, state = space.state[prompt, y, t - 1], space.state[prompt, y, t]
        out[state] = out[before] * p[before, space.tokens[y, t - 1]]
  return out


def held(space, tables, sampling, beta):
  """grad E[r] - beta * sum over states of P(state is visited) * grad KL(pi(.|s) || ref(.|s)),
  mean over prompts.
  """
  _, grad_kl = state_kl(tables.policy, tables.ref, sampling)
  visits = reached(space, tables.policy, sampling)
  return (
    true_gradient(space, tables, sampling, 0.0) - beta * visits[:, None] * grad_kl / space.prompts
  )


# ---- the estimators ----


def whitened(x, mask):
  """Each batch's tokens to mean 0 and variance 1 (1e-8 added).   [N, B, T]"""
  count = mask.sum((1, 2))
  centred = np.where(mask, x - (np.where(mask, x, 0).sum((1, 2)) / count)[:, None, None], 0)
  variance = (centred**2).sum((1, 2)) / count
  return centred / np.sqrt(variance + 1e-8)[:, None, None]


def advantages(space, setting, scores, kl, mask, greedy, values):
  """scores [N, B], KL of each token in the reward [N, B, T], greedy scores [B], values [N, B, T]
  -> [N, B, T]
  """
  rows, K, (N, B, T) = range(scores.shape[1]), space.group, mask.shape
  penalty = (
    setting.beta * np.where(mask, kl, 0) if setting.placement == "reward" else np.zeros(mask.shape)
  )
  total = scores - penalty.sum(-1)
  last = mask.sum(-1) - 1
  out = np.zeros(mask.shape)

  if setting.algorithm == "rloo":
    for b in rows:
      others = [j for j in rows if j != b and space.prompt[j] == space.prompt[b]]
      out[:, b] = (total[:, b] - sum(total[:, j] for j in others) / len(others))[:, None]
  elif setting.algorithm == "remax":
    out = np.repeat((total - greedy)[:, :, None], T, 2)
  elif setting.algorithm == "grpo":
    centred = np.zeros(total.shape)
    for b in rows:
      centred[:, b] = (
        total[:, b] - sum(total[:, j] for j in rows if space.prompt[j] == space.prompt[b]) / K
      )
    for b in rows:
      pool = [j for j in rows if setting.norm == "batch" or space.prompt[j] == space.prompt[b]]
      variance = sum(centred[:, j] ** 2 for j in pool) / len(pool)
      scale = (
        np.ones(N) if setting.norm == "none" else 1 / np.sqrt(variance + setting.advantage_eps)
      )
      out[:, b] = (centred[:, b] * scale)[:, None]
  elif setting.algorithm == "reinforce++":
    for t in range(T):
      out[:, :, t] = scores - penalty[:, :, t:].sum(-1)
    out = whitened(out, mask)
  elif setting.algorithm == "ppo":
    later, later_value = np.zeros((N, B)), np.zeros((N, B))
    for t in reversed(range(T)):
      reward = np.where(last == t, scores, 0) - penalty[:, :, t]
      delta = reward + setting.gamma * later_value - values[:, :, t]
      later = np.where(mask[:, :, t], delta + setting.gamma * setting.lam * later, 0)
      later_value = np.where(mask[:, :, t], values[:, :, t], 0)
      out[:, :, t] = later
  out = np.where(mask, out, 0)
  return whitened(out, mask) if setting.whiten else out


def token_weights(mask, how):
  """The weight of each token's loss in the aggregation.   bool[N, B, T] -> [N, B, T]"""
  N, B, T = mask.shape
  lengths = mask.sum(-1, keepdims=True)
  scale = {
    "sequence_sum": np.full(mask.shape, 1 / B),
    "sequence_mean": 1 / (B * np.maximum(lengths, 1)),
    "token_mean": 1 / np.maximum(mask.sum((1, 2), keepdims=True), 1),
    "constant": np.full(mask.shape, 1 / (B * T)),
  }[how]
  return np.where(mask, scale, 0.0)


def documented(space, tables, sampling, setting):
  """(value, gradient [S, V]) of the loss of a batch drawn with `tables.old`, at `tables.policy`,
  averaged exactly.
  """
  old_keep, keep = kept(tables.old, sampling), kept(tables.policy, sampling)
  log_old, log_ref_old = (log_distribution(x, sampling, old_keep) for x in (tables.old, tables.ref))
  log_new, log_ref = (log_distribution(x, sampling, keep) for x in (tables.policy, tables.ref))

  def chosen(x):
    return x[space.prompt[None], space.batches]  # [P, Y, ...] -> [N, B, ...]

  mask, has_eos = space.mask[space.batches], space.has_eos[space.batches]
  p = chosen(probabilities(space, log_old)).prod(-1)  # [N]
  possible = p > 0
  with np.errstate(invalid="ignore", over="ignore"):
    old, ref_old, new, ref = (
      chosen(token_logprobs(space, x)) for x in (log_old, log_ref_old, log_new, log_ref)
    )
    sampled_kl = {
      "k1": old - ref_old,
      "k2": (old - ref_old) ** 2 / 2,
      "k3": np.exp(ref_old - old) - 1 + old - ref_old,
    }
  exact_old, _ = state_kl(tables.old, tables.ref, sampling)
  reward_kl = (
    exact_old[chosen(space.state)]
    if setting.estimator == "exact"
    else sampled_kl[setting.estimator]
  )

  greedy = np.zeros(space.prompts)
  for prompt in range(space.prompts):
    for y in range(len(space.tokens)):
      steps = range(int(space.mask[y].sum()))
      if all(space.tokens[y, t] == tables.old[space.state[prompt, y, t]].argmax() for t in steps):
        greedy[prompt] = tables.reward[prompt, y]
  adv = advantages(
    space,
    setting,
    chosen(tables.reward),
    reward_kl,
    mask,
    greedy[space.prompt],
    tables.values[chosen(space.state)],
  )

  counted = mask & has_eos[:, :, None] if setting.mask_truncated else mask
  weights = token_weights(counted, setting.aggregation)
  finite = possible[:, None, None]  # the others have a token that is never drawn, and weight zero
  log_rho = np.subtract(new, old, where=counted & finite, out=np.zeros(mask.shape))
  if setting.ratio == "sequence":
    log_rho = np.where(
      counted, log_rho.sum(-1, keepdims=True) / np.maximum(counted.sum(-1, keepdims=True), 1), 0
    )
  rho = np.exp(log_rho)
  high = 1 + (setting.clip_eps_high or setting.clip_eps)
  floor, ceiling = 1 - setting.clip_eps, setting.dual_clip or np.inf
  free = np.where(adv >= 0, rho < high, (rho > floor) & (rho < ceiling))
  used = np.where(adv >= 0, np.minimum(rho, high), np.minimum(np.maximum(rho, floor), ceiling))
  value = -(weights * used * adv).sum((1, 2))
  on_logprob = -weights * adv * rho * free  # factor of each token's grad log pi
  if setting.ratio == "sequence":
    on_logprob = np.where(
      counted, on_logprob.sum(-1, keepdims=True) / np.maximum(counted.sum(-1, keepdims=True), 1), 0
    )

  on_kl = np.zeros(mask.shape)  # factor of the gradient of its state's KL
  exact, grad_exact = state_kl(tables.policy, tables.ref, sampling)
  if setting.estimator == "exact":
    on_kl = setting.beta * weights
    value = value + (on_kl * exact[chosen(space.state)]).sum((1, 2))
  elif setting.placement == "loss":
    d = np.subtract(new, ref, where=np.broadcast_to(finite, mask.shape), out=np.zeros(mask.shape))
    term, slope = {"k2": (d**2 / 2, d), "k3": (np.exp(-d) - 1 + d, 1 - np.exp(-d))}[
      setting.estimator
    ]
    value = value + setting.beta * (weights * term).sum((1, 2))
    on_logprob = on_logprob + setting.beta * weights * slope

  # batches -> responses: the mean weight of each token of each response, then times its gradient
  summed = np.zeros((2, *space.state.shape))
  index = (np.broadcast_to(space.prompt, space.batches.shape), space.batches)

  def scaled(x):
    return np.where(finite, x, 0) * p[:, None, None]

  np.add.at(summed[0], index, scaled(on_logprob))
  np.add.at(summed[1], index, scaled(on_kl))
  gradient = np.einsum("pyt,pytsv->sv", summed[0], grad_logprobs(space, tables.policy, sampling))
  np.add.at(gradient, space.state, summed[1][..., None] * grad_exact[space.state])
  return float((np.where(possible, value, 0) * p).sum()), gradient
