"""References for the tests: the library's equations as slow NumPy loops in float64.

Written from the paper (equation numbers are those of arXiv 2601.22664), one number at a time,
without calls of the library. Inputs and outputs are NumPy arrays.
"""

import math

import numpy as np


def central_difference(f, x, step=1e-5):
  """Gradient of a scalar function at x, one entry at a time, from four values each.

  The error is of order step ** 4, so the step can be large enough for rounding errors of f to be
  small.
  """
  x = np.array(x, np.float64)
  gradient = np.zeros_like(x)
  for i in np.ndindex(x.shape):
    here, slope = x[i], 0.0
    for steps, weight in ((-2, 1), (-1, -8), (1, 8), (2, -1)):
      x[i] = here + steps * step
      slope += weight * float(f(x.copy()))
    x[i] = here
    gradient[i] = slope / (12 * step)
  return gradient


# ---- advantages ----


def rloo_loop(scores, group_size):
  """Eq. 1: each reward minus the mean of the other rewards of its group."""
  advantages = np.zeros(len(scores))
  for i in range(len(scores)):
    first = i - i % group_size
    others = [float(scores[j]) for j in range(first, first + group_size) if j != i]
    advantages[i] = float(scores[i]) - sum(others) / len(others)
  return advantages


def grpo_loop(scores, group_size, eps):
  """Each reward minus its group's mean, divided by the root of the group's variance (1/K) plus
  eps.
  """
  advantages = np.zeros(len(scores))
  for i in range(len(scores)):
    first = i - i % group_size
    group = [float(s) for s in scores[first : first + group_size]]
    mean = sum(group) / group_size
    variance = sum((s - mean) ** 2 for s in group) / group_size
    advantages[i] = (float(scores[i]) - mean) / math.sqrt(variance + eps)
  return advantages


# ---- masked reductions ----


def aggregate_loop(x, mask, how):
  """Reduces a per-token loss [B, T] to one number, in one of four ways."""
  rows, columns = x.shape
  sums, counts = [], []
  for b in range(rows):
    kept = [float(x[b, t]) for t in range(columns) if mask[b, t]]
    sums.append(sum(kept))
    counts.append(len(kept))
  if how == "sequence_sum":
    return sum(sums) / rows
  if how == "sequence_mean":
    return sum(s / max(c, 1) for s, c in zip(sums, counts)) / rows
  if how == "token_mean":
    return sum(sums) / max(sum(counts), 1)
  return sum(sums) / (rows * columns)  # constant


def masked_whiten_loop(x, mask, eps):
  """Zero mean and unit variance over the kept entries, zero elsewhere."""
  kept = [float(x[i]) for i in np.ndindex(x.shape) if mask[i]]
  mean = sum(kept) / len(kept)
  variance = sum((v - mean) ** 2 for v in kept) / len(kept)
  out = np.zeros(x.shape)
  for i in np.ndindex(x.shape):
    if mask[i]:
      out[i] = (float(x[i]) - mean) / math.sqrt(variance + eps)
  return out


# ---- losses ----


def ppo_clip_loop(new, old, advantages, mask, clip_eps, aggregation):
  """Eq. 2, first term, negated, in the textbook form min(rho A, clip(rho) A).

  Returns the loss, and over kept tokens: the share that is clipped, max |rho - 1|, mean of rho - 1
  - log rho.
  """
  per_token, clipped, deviations, kls = np.zeros(new.shape), [], [], []
  for i in np.ndindex(new.shape):
    if not mask[i]:
      continue
    log_ratio = float(new[i]) - float(old[i])
    ratio, a = math.exp(log_ratio), float(advantages[i])
    per_token[i] = -min(ratio * a, min(max(ratio, 1 - clip_eps), 1 + clip_eps) * a)
    clipped.append((a >= 0 and ratio > 1 + clip_eps) or (a < 0 and ratio < 1 - clip_eps))
    deviations.append(abs(ratio - 1))
    kls.append(ratio - 1 - log_ratio)
  return (
    aggregate_loop(per_token, mask, aggregation),
    sum(clipped) / len(clipped),
    max(deviations),
    sum(kls) / len(kls),
  )


def bradley_terry_loop(winner, loser):
  """Eq. 5: mean of -log sigmoid(r_w - r_l)."""
  return sum(
    math.log1p(math.exp(float(lose) - float(win))) for win, lose in zip(winner, loser)
  ) / len(winner)


def gre_loop(rewards, eps):
  """Eq. 6: mean over groups of the entropy of softmax((r - mean) / std), std with 1/K and eps
  inside its root.
  """
  entropies = []
  for group in rewards:
    group = [float(r) for r in group]
    mean = sum(group) / len(group)
    std = math.sqrt(sum((r - mean) ** 2 for r in group) / len(group) + eps)
    weights = [math.exp((r - mean) / std) for r in group]
    p = [w / sum(weights) for w in weights]
    entropies.append(-sum(q * math.log(q) for q in p))
  return sum(entropies) / len(entropies)


def grebt_loop(rewards, annotations, alpha, eps):
  """Eq. 7, winner and loser as annotated; returns (loss, bt, gre, share of pairs in the right
  order).
  """
  winners, losers, right = [], [], []
  for group, notes in zip(rewards, annotations):
    w = max(range(len(notes)), key=lambda k: notes[k])
    l = min(range(len(notes)), key=lambda k: notes[k])
    winners.append(group[w])
    losers.append(group[l])
    right.append(0.5 if w == l else float(group[w] > group[l]))
  bt, gre = bradley_terry_loop(winners, losers), gre_loop(rewards, eps)
  return (1 - alpha) * bt + alpha * gre, bt, gre, sum(right) / len(right)


# ---- the reward that reads the policy ----


def omega_loop(step, total_steps, omega_min):
  """Eq. 4, the weight of the reward model's own embedding."""
  return max(0.5 * math.cos(math.pi * step / total_steps) + 0.5, omega_min)


def last_token_loop(hidden, mask):
  """The state in the last unmasked column of each row."""
  rows = []
  for b in range(len(mask)):
    last = None
    for column in range(mask.shape[1]):
      if mask[b, column]:
        last = column
    rows.append(hidden[b, last])
  return np.array(rows)


def cross_attend_loop(rte, h, mask, wq, wk, wv, wo, num_heads):
  """Eq. 3, row by row and head by head. Returns (H_hat [B, Dr], attention weights [B, heads, S]).

  A head has width d / heads, and its scores are divided by the root of that width.
  """
  rows, slots = mask.shape
  width = wq.shape[1] // num_heads
  weights, h_hat = np.zeros((rows, num_heads, slots)), np.zeros((rows, wo.shape[1]))
  for b in range(rows):
    read = np.zeros(num_heads * width)
    for n in range(num_heads):
      part = slice(n * width, (n + 1) * width)
      query = rte[b] @ wq[:, part]
      scores = {
        s: float(query @ (h[b, s] @ wk[:, part])) / math.sqrt(width)
        for s in range(slots)
        if mask[b, s]
      }
      top = max(scores.values())
      total = sum(math.exp(score - top) for score in scores.values())
      for s, score in scores.items():
        weights[b, n, s] = math.exp(score - top) / total
        read[part] += weights[b, n, s] * (h[b, s] @ wv[:, part])
    h_hat[b] = read @ wo
  return h_hat, weights


def fuse_loop(rte, h_hat, omega):
  """Eq. 4."""
  out = np.zeros(rte.shape)
  for i in np.ndindex(rte.shape):
    out[i] = (1 - omega) * h_hat[i] + omega * rte[i]
  return out


# ---- the gold-reward task ----


def gold_loop(prompt, response, ended):
  """The gold reward of one response, word by word.

  prompt: token ids, special ones included. response: the tokens before the ending token, if there
  is one.
  ended: whether there is one. Returns (gold, parts by name).

  4 * (distinct prompt keys mentioned / F) - 0.8 * distinct chatter tokens - 0.6 * distinct keys not
  in the prompt - 0.3 * repeats (key or chatter) - 0.25 * tokens below 12 - 0.2 * max(0, length - 8)
  - 1 if there is no end. Keys are 12 to 39, chatter 40 to 63; F keys are in the prompt.
  """
  facts = {int(t) for t in prompt if 12 <= t <= 39}
  seen, named, hallucinated, chatter, repeats, filler = set(), set(), set(), set(), 0, 0
  for token in (int(t) for t in response):
    if token < 12:
      filler += 1
      continue
    if token in seen:
      repeats += 1
    seen.add(token)
    if token >= 40:
      chatter.add(token)
    elif token in facts:
      named.add(token)
    else:
      hallucinated.add(token)
  parts = {
    "coverage": len(named) / len(facts),
    "hallucinated": len(hallucinated),
    "chatter": len(chatter),
    "repeats": repeats,
    "filler": filler,
    "length": len(response),
    "truncated": 0 if ended else 1,
  }
  gold = (
    4.0 * parts["coverage"]
    - 0.8 * len(chatter)
    - 0.6 * len(hallucinated)
    - 0.3 * repeats
    - 0.25 * filler
  )
  gold -= 0.2 * max(0, len(response) - 8)
  return gold - (0.0 if ended else 1.0), parts
