"""The manipulation checks: their numbers against loops, and the attention measures against
transformers.
"""

import numpy as np
import pytest
import tiny_text
import torch

from configs import default
from r2m_jax.analysis import attended, checks
from r2m_jax.data.text import load_tokenizer
from r2m_jax.hf.folders import load_policy, load_reward
from r2m_jax.hf.r2m_head import R2MHead
from r2m_jax.parallel import sharding
from r2m_jax.tasks import scratch

PROMPT = np.repeat(np.arange(15), 4)


def scored(seed=0, part=0.3):
  rng = np.random.default_rng(seed)
  own, shift = rng.normal(size=60), rng.normal(size=15)[PROMPT]
  used = own + part * rng.normal(size=60) + 5 * shift
  return checks.Scored(used, own + 5 * shift, 2 * rng.normal(size=60) + shift)


def within(x):
  return np.concatenate([x[PROMPT == p] - x[PROMPT == p].mean() for p in range(15)])


def test_the_shares_of_attention_and_rest_are_covariances_and_add_up():
  found = scored()
  part, used = within(found.used - found.own), within(found.used)
  share = checks.attention_share(found, PROMPT)
  assert share.value == pytest.approx((part * used).sum() / (used * used).sum())
  rest = checks.attention_share(found._replace(own=found.used - found.own), PROMPT)
  assert share.value + rest.value == pytest.approx(1)
  assert share.low < share.value < share.high
  # the part that all responses to a prompt share is excluded
  shifted = found._replace(used=found.used + 9.0 * PROMPT)
  assert checks.attention_share(shifted, PROMPT).value == pytest.approx(share.value)


def test_growth_is_a_ratio_of_deviations_within_prompts():
  found = scored(1)
  want = np.sqrt((within(found.used) ** 2).sum() / (within(found.frozen) ** 2).sum())
  assert checks.growth(found, PROMPT).value == pytest.approx(want)
  doubled = found._replace(used=2 * found.frozen + PROMPT)
  twice = checks.growth(doubled, PROMPT)
  assert twice[:3] == pytest.approx((2, 2, 2))


def test_self_labels_are_the_best_and_the_worst_by_the_used_reward():
  found, gold = scored(2), np.random.default_rng(3).integers(0, 3, 60).astype(float)
  right = {"used": [], "frozen": []}
  for p in range(15):
    own = np.flatnonzero(PROMPT == p)
    best, worst = max(own, key=lambda i: found.used[i]), min(own, key=lambda i: found.used[i])
    if gold[best] == gold[worst]:
      continue
    right["used"].append(gold[best] > gold[worst])
    high = found.frozen[best] > found.frozen[worst]
    right["frozen"].append(high == (gold[best] > gold[worst]))
  used, frozen, difference = checks.self_labels(found, gold, PROMPT)
  assert used.value == pytest.approx(100 * np.mean(right["used"]))
  assert frozen.value == pytest.approx(100 * np.mean(right["frozen"]))
  assert difference.value == pytest.approx(used.value - frozen.value)


def rows_of(weights, template=None):
  count = len(weights)
  mask = np.arange(weights.shape[1]) >= np.arange(count)[:, None]  # padded on the left
  template = np.zeros(mask.shape, bool) if template is None else template
  rows = checks.attention_rows("x", checks.Attended(weights, mask, template), np.arange(count))
  return {row.labels[0]: row.found.value for row in rows}, mask


def test_attention_on_one_token_and_on_all_alike():
  one = np.zeros((3, 6))
  one[[0, 1, 2], [0, 1, 2]] = 1  # the first token of each response
  template = np.zeros((3, 6), bool)
  template[0, 0] = template[1, 1] = True
  found, mask = rows_of(one, template)
  assert found["states that it reads (exp of the entropy)"] == pytest.approx(1)
  assert found["weight of the first token"] == found["largest weight"] == 1
  assert found["weight of the template's tokens"] == pytest.approx(2 / 3)
  assert found["share of the template's tokens"] == pytest.approx((1 / 6 + 1 / 5 + 0) / 3)
  found, mask = rows_of(mask / mask.sum(1, keepdims=True))
  assert found["states that it reads (exp of the entropy)"] == pytest.approx(5)
  assert found["states that it can read"] == 5


def test_the_dose_is_a_relative_change():
  first = {"wq": np.full((2, 3), 2.0), "phi": np.zeros(3)}
  last = {"wq": np.full((2, 3), 2.5), "phi": np.ones(3)}
  assert checks.dose(first, last) == {"wq": pytest.approx(0.25)}  # phi was zero: no ratio


def test_collapse_and_inertia_are_told_in_words():
  weights = np.tile([0.9, 0.02, 0.02, 0.02, 0.02, 0.02], (3, 1))
  attended_by = checks.Attended(weights, np.ones((3, 6), bool), np.zeros((3, 6), bool))
  rows = checks.attention_rows("r2m, before", attended_by, np.arange(3))
  rows.append(checks.Row((checks.SHARE,), "r2m, before", checks.Interval(0.002, 0, 0.01, 9)))
  collapse, inert = checks.words(rows)
  assert "one state has 90% of the attention" in collapse and "0.2%" in inert
  rows = [checks.Row((checks.SHARE,), "r2m, before", checks.Interval(0.2, 0.1, 0.3, 9))]
  assert checks.words(rows) == []


@pytest.mark.parametrize(
  "correlations, gaps, holds",
  [
    ([0.02, -0.4], [], True),
    ([0.02, np.nan], [0.2], True),
    ([0.02], [0.01, np.nan], False),
    ([0.2], [], False),
  ],
)
def test_whether_the_premise_holds(correlations, gaps, holds):
  text = checks.premise(correlations, gaps)
  assert ("does not hold" not in text) == holds and ("table 5" in text) == bool(gaps)


# ---- text ----


@pytest.mark.parametrize("kind", ["chatml", "llama3"])
def test_the_prompts_own_tokens_are_told_from_the_templates(kind, tmp_path):
  tiny_text.tokenizer(kind, tmp_path)
  tokenizer = load_tokenizer(tmp_path, None)
  turns = ["What is the cat?", "It sat on the mat.", "user"]
  roles = ["user", "assistant", "user"]
  prompt = [{"role": r, "content": c} for r, c in zip(roles, turns)]
  ids, written = tokenizer.render(prompt), tokenizer.written(prompt)
  assert len(ids) == len(written)
  kept = tokenizer.hf.decode([i for i, own in zip(ids, written) if own])
  assert kept == "".join(turns)
  special = set(tokenizer.hf.all_special_ids)
  assert not any(i in special for i, own in zip(ids, written) if own)


def test_text_without_a_template_is_all_the_prompts(tmp_path):
  tiny_text.tokenizer("plain", tmp_path)
  tokenizer = load_tokenizer(tmp_path, None)
  assert tokenizer.written("The cat sat") == [False] + [True] * (
    len(tokenizer.render("The cat sat")) - 1
  )


def test_attention_over_text_equals_torch(tmp_path):
  """Weights by a NumPy softmax over transformers' states, scores by the exported torch head."""
  policy_folder, reward_folder = tmp_path / "policy", tmp_path / "reward"
  hf_policy, _ = tiny_text.model("llama3.1", "chatml", policy_folder)
  hf_reward, _ = tiny_text.model("qwen2", "llama3", reward_folder, classifier=True)
  config = default.get_config()
  config.policy.path, config.reward.path = str(policy_folder), str(reward_folder)
  config.score.batch_size, config.r2m.attention_dim, config.r2m.num_heads = 4, 16, 2
  mesh = sharding.make_mesh((1, 1, 1))
  policy = load_policy(str(policy_folder), config, mesh)
  reward = load_reward(str(reward_folder), config, mesh)
  model = scratch.untrained(config, "r2m", reward, policy, mesh)
  ask = [{"role": "user", "content": "What is it?"}]
  rows = [
    {"prompt": ask, "response": text, "truncated": cut}
    for text, cut in (("Paris", False), ("the sea and trees", True))
  ]
  used, own, found = attended.attended_text(config, model, policy, rows, mesh)
  settings, state = model.head
  weights = attended_weights(state, settings)
  head = R2MHead(vars(settings) | {"format": 1})
  head.load_state_dict({name: torch.tensor(x) for name, x in weights.items()})
  for i, row in enumerate(rows):
    reward_ids = model.renderer.ids(row["prompt"], row["response"], truncated=row["truncated"])
    ids = policy.tokenizer.render(ask) + policy.tokenizer.encode(row["response"], special=False)
    ids += [] if row["truncated"] else [policy.tokenizer.end_id]
    with torch.no_grad():
      h = hf_policy.model(torch.tensor([ids])).last_hidden_state
      rte = hf_reward.base_model(torch.tensor([reward_ids])).last_hidden_state[:, -1]
      mask = torch.ones(1, len(ids), dtype=torch.bool)
      want, alone = head(rte, h, mask).item(), head.omega * head.phi(rte).item()
    np.testing.assert_allclose([used[i], own[i]], [want, alone], rtol=1e-4, atol=1e-5)
    q = rte.numpy() @ weights["wq.weight"].T
    k = h[0].numpy() @ weights["wk.weight"].T
    logits = (q.reshape(2, 1, -1) * k.reshape(len(ids), 2, -1).swapaxes(0, 1)).sum(-1) / np.sqrt(8)
    softmax = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    np.testing.assert_allclose(found.weights[i, : len(ids)], softmax.mean(0), rtol=1e-3, atol=1e-6)
    assert found.mask[i].sum() == len(ids)
    assert found.template[i, len(ids) - 1] == (not row["truncated"])


def attended_weights(state, settings) -> dict[str, np.ndarray]:
  from r2m_jax.hf.folders import head_tensors

  del settings
  return head_tensors(state)
