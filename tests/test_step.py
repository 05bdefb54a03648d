"""The whole jitted step against a float64 oracle in torch, and the parameters that it must and must
not change.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import small
import torch

from r2m_jax import step as step_module
from r2m_jax.parallel import sharding

pytestmark = pytest.mark.numerics


@pytest.fixture(autouse=True)
def float64():
  torch.set_default_dtype(torch.float64)
  yield
  torch.set_default_dtype(torch.float32)


def flat(state) -> dict[str, np.ndarray]:
  leaves = jax.tree_util.tree_flatten_with_path(state)[0]
  return {sharding.path_name(path): np.asarray(x) for path, x in leaves}


def hidden_states(w, arch, tokens, mask):
  """A Llama in float64 torch, written from its equations. `w` has our names. (The one in
  transformers rounds to float32.)
  """
  B, L = tokens.shape
  heads, kv, dim = arch.num_heads, arch.num_kv_heads, arch.head_dim
  position = (mask.long().cumsum(-1) - 1).clamp(min=0)
  angle = position[..., None] * arch.rope_theta ** (-torch.arange(0, dim, 2) / dim)
  cos, sin = (torch.cat([f(angle)] * 2, -1)[:, None] for f in (torch.cos, torch.sin))
  # padding may attend to itself: a softmax without any key would be NaN, and 0 * NaN spreads
  seen = (torch.ones(L, L).tril().bool() & mask[:, None, :] | torch.eye(L).bool())[:, None]

  def norm(x, scale):
    return x / torch.sqrt((x**2).mean(-1, keepdim=True) + arch.norm_eps) * scale

  def rotate(x):
    half = torch.cat([-x[..., dim // 2 :], x[..., : dim // 2]], -1)
    return x * cos + half * sin

  x = w["embed/embedding"][tokens]
  for i in range(arch.num_layers):
    layer = {
      name.removeprefix("layers/"): value[i]
      for name, value in w.items()
      if name.startswith("layers/")
    }
    n = norm(x, layer["attn_norm/scale"])

    def split(name, count):
      return (n @ layer[f"attn/{name}/kernel"]).view(B, L, count, dim).transpose(1, 2)

    q, k, v = rotate(split("q", heads)), rotate(split("k", kv)), split("v", kv)
    k, v = (y.repeat_interleave(heads // kv, 1) for y in (k, v))
    weights = torch.softmax((q @ k.transpose(-1, -2) / dim**0.5).masked_fill(~seen, -torch.inf), -1)
    x = x + (weights @ v).transpose(1, 2).reshape(B, L, -1) @ layer["attn/o/kernel"]
    n = norm(x, layer["mlp_norm/scale"])
    gate = torch.nn.functional.silu(n @ layer["mlp/gate/kernel"])
    x = x + (gate * (n @ layer["mlp/up/kernel"])) @ layer["mlp/down/kernel"]
  return norm(x, w["final_norm/scale"])


def to_torch(state, requires_grad=False):
  return {name: torch.tensor(x, requires_grad=requires_grad) for name, x in flat(state).items()}


def oracle_step(cfg, built, state, sequences, step_number):
  """Algorithm 1 after sampling, in torch: two epochs of SGD on eq. 2, then one step of SGD on
  eq. 7.
  """
  arch, K, T = built.arch, cfg.rollout.group_size, sequences.response_mask.shape[1]
  policy, ref = to_torch(state.policy, requires_grad=True), to_torch(state.ref)
  backbone, head = to_torch(state.reward_backbone), to_torch(state.reward_head, requires_grad=True)
  tokens = torch.tensor(np.array(sequences.tokens, np.int64))
  mask, response = (
    torch.tensor(np.array(sequences.token_mask)),
    torch.tensor(np.array(sequences.response_mask)),
  )

  def logp_all(model):
    h = hidden_states(model, arch, tokens, mask)
    return torch.log_softmax(
      h[:, -T - 1 : -1] @ model["lm_head/kernel"] / cfg.rollout.temperature, -1
    ), h

  def of_tokens(logp):
    return torch.gather(logp, -1, tokens[:, -T:, None])[..., 0]

  w = max(0.5 * np.cos(np.pi * step_number / cfg.steps) + 0.5, cfg.r2m.omega_min)

  def fused(h):
    q, k, v = rte @ head["wq/kernel"], h @ head["wk/kernel"], h @ head["wv/kernel"]
    attention = torch.einsum("bd,bsd->bs", q, k) / np.sqrt(cfg.r2m.attention_dim)
    weights = torch.softmax(attention.masked_fill(~mask, -torch.inf), -1)
    h_hat = torch.einsum("bs,bsd->bd", weights, v) @ head["wo/kernel"]
    return (((1 - w) * h_hat + w * rte) @ head["phi/kernel"] + head["phi/bias"])[:, 0]

  with torch.no_grad():
    old_logp, h = logp_all(policy)
    ref_logp, old = logp_all(ref)[0], of_tokens(old_logp)
    last = mask.shape[1] - 1 - mask.flip(-1).long().argmax(-1)
    rte = hidden_states(backbone, arch, tokens, mask)[torch.arange(len(tokens)), last]
    scores = fused(h)
    groups = scores.reshape(-1, K)
    advantages = (
      (groups - (groups.sum(-1, keepdim=True) - groups) / (K - 1)).reshape(-1, 1)
    ).expand(-1, T)

  def per_sequence(x):
    return (x * response).sum(-1).mean()

  losses, norms = [], []
  for _ in range(cfg.ppo.epochs):
    logp, refreshed = logp_all(policy)
    ratio = torch.exp(of_tokens(logp) - old)
    clipped = torch.clamp(ratio, 1 - cfg.ppo.clip_eps, 1 + cfg.ppo.clip_eps)
    # the textbook objective; at ratio 1 torch would split a tie, so the branches are chosen here
    picked = torch.where(ratio * advantages <= clipped * advantages, ratio, clipped)
    kl = (logp.exp() * (logp - ref_logp)).sum(-1)
    loss = per_sequence(-picked * advantages) + cfg.kl.beta * per_sequence(kl)
    grads = dict(zip(policy, torch.autograd.grad(loss, list(policy.values()))))
    losses.append(loss.item())
    norms.append(np.sqrt(sum((g**2).sum().item() for g in grads.values())))
    policy = {
      k: (p - cfg.policy.lr * grads[k]).detach().requires_grad_() for k, p in policy.items()
    }

  rewards = fused(refreshed.detach()).reshape(-1, K)
  rows = torch.arange(len(rewards))
  r_w, r_l = rewards[rows, groups.argmax(-1)], rewards[rows, groups.argmin(-1)]
  bt = -torch.nn.functional.logsigmoid(r_w - r_l).mean()
  variance = rewards.var(-1, correction=0, keepdim=True)
  z = (rewards - rewards.mean(-1, keepdim=True)) / torch.sqrt(variance + cfg.r2m.gre_eps)
  gre = torch.distributions.Categorical(logits=z).entropy().mean()
  reward_loss = (1 - cfg.r2m.alpha) * bt + cfg.r2m.alpha * gre
  reward_loss.backward()
  new_head = {k: (v - cfg.r2m.lr * v.grad).detach().numpy() for k, v in head.items()}
  return dict(
    policy={k: p.detach().numpy() for k, p in policy.items()},
    head=new_head,
    scores=scores.numpy(),
    losses=losses,
    norms=norms,
    bt=bt.item(),
    gre=gre.item(),
  )


SGD = dict(
  policy__optimizer="sgd",
  policy__lr=0.05,
  policy__max_grad_norm=0.0,
  r2m__optimizer="sgd",
  r2m__lr=0.5,
  r2m__max_grad_norm=0.0,
)


def test_whole_step_matches_float64_torch_oracle():
  with jax.enable_x64(True):
    cfg = small.config(
      dtype="float64", param_dtype="float64", rollout__temperature=0.7, kl__beta=0.3, **SGD
    )
    built, state = small.start(cfg, ref_noise=0.05)
    state = state.replace(step=jnp.int32(2))  # omega is below 1, so the feedback counts
    before = jax.device_get(state.replace(key=None))
    state, out = small.step_of(cfg, built, state)(state, small.prompts(cfg, 0, left_pad=2))
    out, after = jax.device_get(out), jax.device_get(state.replace(key=None))
  want = oracle_step(cfg, built, before, out.sequences, 2)

  assert (
    0 < out.sequences.response_mask.sum() < out.sequences.response_mask.size
  )  # some rows ended early
  np.testing.assert_allclose(out.judged.scores, want["scores"], rtol=1e-9)
  np.testing.assert_allclose(out.metrics["policy/first_loss"], want["losses"][0], rtol=1e-8)
  np.testing.assert_allclose(out.metrics["policy/loss"], np.mean(want["losses"]), rtol=1e-8)
  np.testing.assert_allclose(out.metrics["policy/first_grad_norm"], want["norms"][0], rtol=1e-8)
  np.testing.assert_allclose(out.metrics["r2m/bt"], want["bt"], rtol=1e-8)
  np.testing.assert_allclose(out.metrics["r2m/gre"], want["gre"], rtol=1e-8)
  for got, start, expected in (
    (flat(after.policy), flat(before.policy), want["policy"]),
    (flat(after.reward_head), flat(before.reward_head), want["head"]),
  ):
    assert set(got) == set(expected)
    for name in got:  # SGD: the change is the gradient times the learning rate
      move, expected_move = got[name] - start[name], expected[name] - start[name]
      assert np.abs(expected_move).max() > 1e-9 or name == "phi/bias", name
      np.testing.assert_allclose(
        move, expected_move, atol=1e-8 * np.abs(expected_move).max() + 1e-13, err_msg=name
      )


def test_one_trace_and_only_what_should_move_moves(monkeypatch):
  traces = []
  original = step_module.generate
  monkeypatch.setattr(
    step_module, "generate", lambda *a, **k: traces.append(1) or original(*a, **k)
  )
  cfg = small.config()
  built, state = small.start(cfg)
  before = jax.device_get(state.replace(key=None))
  step = small.step_of(cfg, built, state)
  for t in range(3):
    state, _ = step(state, small.prompts(cfg, t))
  after = jax.device_get(state.replace(key=None))
  assert len(traces) == 1 and int(after.step) == 3
  for name in ("ref", "reward_backbone", "reward_frozen"):
    assert all(
      map(
        np.array_equal,
        jax.tree.leaves(getattr(before, name)),
        jax.tree.leaves(getattr(after, name)),
      )
    ), name
  for name in ("policy", "reward_head"):
    old, new = flat(getattr(before, name)), flat(getattr(after, name))
    still = [
      k for k in old if np.array_equal(old[k], new[k]) and k != "phi/bias"
    ]  # a bias shifts all K alike
    assert not still, still


@pytest.mark.parametrize("variant", ["vanilla", "scaled", "r2m_untrained"])
def test_variants_without_training_leave_the_head_alone(variant):
  cfg = small.config(variant=variant)
  outputs, state = small.run(cfg, 2)
  _, fresh = small.start(cfg)
  assert all(
    map(np.array_equal, jax.tree.leaves(fresh.reward_head), jax.tree.leaves(state.reward_head))
  )
  used, frozen = outputs[1].judged.scores, outputs[1].judged.scores_frozen
  w = max(0.5 * np.cos(np.pi * 1 / cfg.steps) + 0.5, cfg.r2m.omega_min)
  if variant == "vanilla":
    np.testing.assert_array_equal(used, frozen)
  elif variant == "scaled":
    np.testing.assert_allclose(used, np.float32(w) * frozen, rtol=1e-6)
  else:
    assert np.abs(used - w * frozen).max() > 1e-3  # the feedback is in the reward


def test_step_zero_identities():
  """Before any update, the ratio is 1 within 2e-5, and old log-probabilities equal the reference's
  exactly.
  """
  for dtype, bound in (("float32", 2e-5), ("bfloat16", 2e-2)):
    outputs, _ = small.run(small.config(dtype=dtype), 1)
    metrics = outputs[0].metrics
    assert metrics["policy/old_ref_deviation"] == 0
    assert metrics["policy/first_ratio_deviation"] <= bound
    assert (
      metrics["policy/ratio_deviation"] > 1e-4
    )  # the second epoch is off-policy: the metric can be non-zero


def padded(cfg):
  """A step's output, without and with three columns of padding before the prompts."""
  built, state = small.start(cfg)
  step, results = small.step_of(cfg, built, state), []
  for pad in (0, 3):
    _, out = step(small.start(cfg)[1], small.prompts(cfg, 0, left_pad=pad))
    results.append(jax.device_get(out))
  T = results[0].sequences.response_mask.shape[1]
  np.testing.assert_array_equal(*(out.sequences.tokens[:, -T:] for out in results))
  return [small.metrics_of([out]) for out in results]


def test_prompt_padding_changes_nothing():
  with jax.enable_x64(True):
    exact, far = padded(small.config(**small.FLOAT64))
  small.equal_in_float64(far, exact)
  low, far = padded(small.config())
  small.as_good_in_float32(far, low, exact)


def test_minibatches_cover_every_row_once_per_epoch():
  """With a learning rate of zero, the mean over minibatches is the loss of the full batch, and h'
  equals h in every row.
  """
  still = dict(policy__lr=0.0, r2m__lr=0.0, **small.FLOAT64)
  with jax.enable_x64(True):
    (full, *_), _ = small.run(small.config(**still), 1)
    (parts, *_), _ = small.run(small.config(**still, ppo__minibatches=4), 1)
  np.testing.assert_array_equal(full.sequences.tokens, parts.sequences.tokens)
  np.testing.assert_allclose(full.metrics["policy/loss"], parts.metrics["policy/loss"], atol=1e-12)
  np.testing.assert_allclose(full.metrics["r2m/loss"], parts.metrics["r2m/loss"], rtol=1e-10)
