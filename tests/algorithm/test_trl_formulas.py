"""Losses and advantages against TRL's, on fixed tensors in float64.

Each of TRL's formulas is written here in torch, in one function. Its docstring names the version of
TRL and the code that it repeats: GRPO and RLOO of 1.16.0, PPO of 1.12.0 (the last release with
PPO). The last tests call TRL's own loss code, if trl 1.16.0 is installed. If our formula differs by
design, the settings are matched and a line explains how.
"""

import collections
import itertools
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from configs import default
from r2m_jax.algorithm import advantages, losses
from r2m_jax.algorithm.objective import make_advantages, make_objective, shape_scores
from r2m_jax.models.logprobs import TokenStats
from r2m_jax.ops import masked_whiten
from r2m_jax.types import Experience, Sequences

TOLERANCE = dict(rtol=0, atol=1e-6)
P, K, T, VOCAB = 2, 4, 6, 2000  # a vocabulary for which "auto" is not the exact KL
B = P * K


@pytest.fixture(autouse=True)
def float64():
  with jax.enable_x64(True):
    yield


def tensors(seed=0, columns=T, moved=0.4):
  """Old, new and reference log-probabilities, scores, values, old values and advantages, for rows
  of several lengths.
  """
  rng = np.random.default_rng(seed)
  old = -rng.exponential(size=(B, columns))
  lengths = np.array([columns, 1, 3, 2, columns, 4, 5, 3]).clip(max=columns)
  return types.SimpleNamespace(
    old=old,
    new=old + moved * rng.normal(size=old.shape),
    ref=old + 0.5 * rng.normal(size=old.shape),
    scores=2 * rng.normal(size=B),
    values=rng.normal(size=old.shape),
    new_values=rng.normal(size=old.shape),
    advantages=rng.normal(size=B),
    mask=np.arange(columns) < lengths[:, None],
    has_eos=np.array([False, True] * (B // 2)),
  )


def config_of(**fields):
  config = default.get_config()
  config.rollout.group_size = K
  config.kl.beta = 0.0
  config.update_from_flattened_dict(
    {name.replace("__", "."): value for name, value in fields.items()}
  )
  return config


def ours(x, config, per_token_advantages=None):
  """Loss and its gradient with respect to the new log-probabilities."""
  objective = make_objective(config, VOCAB)
  adv = advantages.per_token(jnp.asarray(x.advantages), jnp.asarray(x.mask))
  adv = adv if per_token_advantages is None else per_token_advantages
  batch = Experience(
    Sequences(
      tokens=None,
      token_mask=None,
      response_mask=jnp.asarray(x.mask),
      has_eos=jnp.asarray(x.has_eos),
    ),
    old_logprobs=x.old,
    ref_logprobs=x.ref,
    ref_hidden=None,
    advantages=adv,
  )
  zero = jnp.zeros_like(x.new)

  def loss(new):
    return objective(TokenStats(logprobs=new, entropy=zero, kl=zero), batch, config.kl.beta)[0]

  return jax.value_and_grad(loss)(jnp.asarray(x.new))


def theirs(loss, x):
  """Loss and gradient of a torch function of the new log-probabilities."""
  new = torch.tensor(x.new, requires_grad=True)
  value = loss(new)
  value.backward()
  return value.item(), new.grad.numpy()


def agree(one, other):
  np.testing.assert_allclose(one[0], other[0], **TOLERANCE)
  np.testing.assert_allclose(one[1], other[1], **TOLERANCE)
  assert np.abs(other[1]).max() > 1e-3


t = torch.tensor


# ---- TRL's formulas ----


def trl_rloo_advantages(scores, old, ref, mask, *, beta, clip_range=None):
  """1.16.0, RLOOTrainer._generate_and_score_completions: clip, subtract the sum of k1, then
  subtract the mean of the others.
  """
  scores = scores if clip_range is None else scores.clamp(*clip_range)
  rewards = (scores - beta * ((old - ref) * mask).sum(1)).view(-1, K)
  return (rewards - (rewards.sum(1, keepdim=True) - rewards) / (K - 1)).view(-1)


def trl_rloo_loss(new, old, advantages, mask, *, low, high):
  """1.16.0, RLOOTrainer._compute_loss: one ratio per response, from the product of its
  probabilities.
  """
  ratio = ((new * mask).sum(1) - (old * mask).sum(1)).exp()
  return -torch.minimum(ratio * advantages, ratio.clamp(1 - low, 1 + high) * advantages).mean()


def trl_grpo_advantages(scores, *, scale, eps=1e-4):
  """1.16.0, GRPOTrainer._generate_and_score_completions: standard deviations with 1 / (n - 1), and
  eps added to them.
  """
  groups = scores.view(-1, K)
  centred = groups - groups.mean(1, keepdim=True)
  if scale == "group":
    centred = centred / (groups.std(1, keepdim=True) + eps)
  elif scale == "batch":
    centred = centred / (scores.std() + eps)
  return centred.reshape(-1)


def trl_grpo_loss(
  new, old, ref, advantages, mask, *, loss_type, low, high, delta, level, beta, max_length
):
  """1.16.0, GRPOTrainer._compute_loss for one micro-batch that is the whole batch."""
  log_ratio = new - old
  if level == "sequence":
    log_ratio = (log_ratio * mask).sum(1, keepdim=True) / mask.sum(1, keepdim=True).clamp(min=1)
  ratio = log_ratio.exp()
  bounded = ratio.clamp(1 - low, 1 + high)
  ratio = ratio if delta is None else ratio.clamp(max=delta)
  per_token = -torch.minimum(ratio * advantages[:, None], bounded * advantages[:, None])
  if beta:
    per_token = per_token + beta * ((ref - new).exp() - (ref - new) - 1)
  total = (per_token * mask).sum(1)
  if loss_type == "grpo":
    return (total / mask.sum(1).clamp(min=1)).mean()
  if loss_type == "luspo":
    return total.mean()
  return (
    total.sum()
    / {"bnpo": mask.sum(), "dapo": mask.sum(), "dr_grpo": mask.numel() // T * max_length}[loss_type]
  )


def trl_masked_whiten(x, mask):
  """1.12.0, experimental.ppo masked_whiten: variance with 1 / (n - 1)."""
  kept = x[mask]
  return (x - kept.mean()) / (kept.var() + 1e-8).sqrt()


def trl_gae(rewards, values, *, gamma, lam):
  """1.12.0, experimental.ppo PPOTrainer.train, part 6: values and rewards are zero after the
  end.
  """
  later, found = torch.zeros(len(values), dtype=values.dtype), []
  for column in reversed(range(values.shape[1])):
    following = values[:, column + 1] if column + 1 < values.shape[1] else torch.zeros_like(later)
    later = rewards[:, column] + gamma * following - values[:, column] + gamma * lam * later
    found.insert(0, later)
  found = torch.stack(found, 1)
  return found, found + values


def trl_ppo_policy_loss(new, old, advantages, mask, *, clip):
  """1.12.0, experimental.ppo PPOTrainer.train: the larger of two losses, mean over tokens."""
  ratio = (new - old).exp()
  return torch.maximum(-advantages * ratio, -advantages * ratio.clamp(1 - clip, 1 + clip))[
    mask
  ].mean()


def trl_ppo_value_loss(values, old_values, returns, mask, *, clip):
  """1.12.0, experimental.ppo PPOTrainer.train."""
  near = torch.minimum(torch.maximum(values, old_values - clip), old_values + clip)
  return 0.5 * torch.maximum((values - returns) ** 2, (near - returns) ** 2)[mask].mean()


# ---- RLOO ----


@pytest.mark.parametrize("clip", [0.0, 1.5])
@pytest.mark.parametrize("beta", [0.0, 0.3])
def test_rloo_advantages(beta, clip):
  x = tensors()
  config = config_of(
    algorithm="rloo", kl__placement="reward", kl__estimator="k1", shaping__clip=clip
  )
  shaped = shape_scores(jnp.asarray(x.scores), x.mask.sum(1), x.has_eos, config.shaping)
  found = make_advantages(config)(
    shaped, losses.kl_k1(x.old, x.ref), jnp.asarray(x.mask), beta
  ).advantages
  clip_range = (-clip, clip) if clip else None
  expected = trl_rloo_advantages(
    t(x.scores), t(x.old), t(x.ref), t(x.mask), beta=beta, clip_range=clip_range
  )
  np.testing.assert_allclose(found, expected[:, None].numpy() * x.mask, **TOLERANCE)


def test_rloo_gradient_before_the_first_update():
  """Ours has a ratio and a clip for each token, TRL's has one for the response. While the policy is
  that of the samples, the gradients are equal, and the values differ by a factor of the length.
  """
  x = tensors(moved=0.0)
  _, gradient = ours(x, config_of(ppo__aggregation="sequence_sum"))

  def loss(new):
    return trl_rloo_loss(new, t(x.old), t(x.advantages), t(x.mask), low=0.2, high=0.2)

  np.testing.assert_allclose(gradient, theirs(loss, x)[1], **TOLERANCE)


@pytest.mark.parametrize("how", ["sequence_sum", "sequence_mean", "token_mean", "constant"])
def test_rloo_loss_of_single_tokens(how):
  """Responses of one token, for which token and response are the same. Ratios lie on both sides of
  an asymmetric clip.
  """
  x = tensors(columns=1)
  found = ours(x, config_of(ppo__aggregation=how, ppo__clip_eps=0.2, ppo__clip_eps_high=0.3))

  def loss(new):
    return trl_rloo_loss(new, t(x.old), t(x.advantages), t(x.mask), low=0.2, high=0.3)

  agree(found, theirs(loss, x))
  assert 0 < (np.asarray(found[1]) == 0).sum() < B  # some are clipped


# ---- GRPO ----


def test_grpo_advantages_without_a_scale():
  """Dr. GRPO."""
  x = tensors()
  found = advantages.grpo(jnp.asarray(x.scores), K, eps=1e-4, norm="none")
  np.testing.assert_allclose(found, trl_grpo_advantages(t(x.scores), scale="none"), **TOLERANCE)


def test_grpo_advantages_by_group():
  """Ours: variance with 1 / K, and eps under the root. TRL: 1 / (K - 1), and eps outside the root.
  They are matched by setting both eps to 0.
  """
  x = tensors()
  found = advantages.grpo(jnp.asarray(x.scores), K, eps=1e-300) * np.sqrt((K - 1) / K)
  np.testing.assert_allclose(
    found, trl_grpo_advantages(t(x.scores), scale="group", eps=0.0), **TOLERANCE
  )


def test_grpo_advantages_by_batch():
  """Ours: standard deviation of the scores from their group's mean, with 1 / B. TRL: from the
  batch's mean, with 1 / (B - 1). They are matched if all groups have the same mean.
  """
  x = tensors()
  scores = x.scores.reshape(P, K)
  scores = (scores - scores.mean(1, keepdims=True) + 0.7).reshape(-1)
  found = advantages.grpo(jnp.asarray(scores), K, eps=1e-300, norm="batch") * np.sqrt((B - 1) / B)
  np.testing.assert_allclose(
    found, trl_grpo_advantages(t(scores), scale="batch", eps=0.0), **TOLERANCE
  )
  apart = advantages.grpo(jnp.asarray(x.scores), K, eps=1e-300)
  assert np.abs(found - apart).max() > 0.1  # and not by group


AGGREGATIONS = {
  "grpo": "sequence_mean",
  "bnpo": "token_mean",
  "dapo": "token_mean",
  "dr_grpo": "constant",
  "luspo": "sequence_sum",
}
GRPO_CASES = {
  "plain": dict(low=0.2, high=0.2, delta=None, level="token", beta=0.0),
  "kl": dict(low=0.2, high=0.2, delta=None, level="token", beta=0.04),
  "asymmetric": dict(low=0.2, high=0.28, delta=None, level="token", beta=0.0),
  "two_sided": dict(low=0.2, high=0.2, delta=1.4, level="token", beta=0.04),
  "gspo": dict(low=0.1, high=0.15, delta=None, level="sequence", beta=0.0),
  "gspo_kl": dict(low=0.1, high=0.15, delta=1.3, level="sequence", beta=0.04),
}


def grpo_config(loss_type, case):
  return config_of(
    algorithm="grpo",
    ppo__aggregation=AGGREGATIONS[loss_type],
    ppo__clip_eps=case["low"],
    ppo__clip_eps_high=case["high"],
    ppo__dual_clip=case["delta"] or 0.0,
    ppo__ratio=case["level"],
    kl__placement="loss",
    kl__estimator="k3",
    kl__beta=case["beta"],
  )


@pytest.mark.parametrize("case", GRPO_CASES)
@pytest.mark.parametrize("loss_type", AGGREGATIONS)
def test_grpo_loss(loss_type, case):
  """TRL's delta bounds the ratio for every advantage, ours (dual clip) only for negative ones. They
  are equal because delta lies above the upper clip.
  """
  x, case = tensors(moved=0.5), GRPO_CASES[case]

  def loss(new):
    return trl_grpo_loss(
      new, t(x.old), t(x.ref), t(x.advantages), t(x.mask), loss_type=loss_type, max_length=T, **case
    )

  agree(ours(x, grpo_config(loss_type, case)), theirs(loss, x))


# ---- PPO ----


@pytest.mark.parametrize("clip", [0.1, 0.2])
def test_ppo_policy_loss(clip):
  x = tensors()
  adv = tensors(seed=1).values * x.mask
  found = ours(
    x,
    config_of(algorithm="ppo", ppo__aggregation="token_mean", ppo__clip_eps=clip),
    jnp.asarray(adv),
  )

  def loss(new):
    return trl_ppo_policy_loss(new, t(x.old), t(adv), t(x.mask), clip=clip)

  agree(found, theirs(loss, x))


@pytest.mark.parametrize("gamma, lam", [(1.0, 0.95), (0.9, 0.7), (1.0, 1.0)])
def test_gae(gamma, lam):
  """TRL adds the score to the column after the last token, if there is one, and trains a value
  there. Ours adds it to the last token. The recursion is compared on rewards placed as in ours.
  """
  x = tensors()
  rewards = tensors(seed=1).values * x.mask
  values = x.values * x.mask
  adv, returns = advantages.gae(
    jnp.asarray(rewards), jnp.asarray(x.values), jnp.asarray(x.mask), gamma=gamma, lam=lam
  )
  expected = trl_gae(t(rewards), t(values), gamma=gamma, lam=lam)
  np.testing.assert_allclose(adv, expected[0].numpy() * x.mask, **TOLERANCE)
  np.testing.assert_allclose(returns, expected[1].numpy() * x.mask, **TOLERANCE)


@pytest.mark.parametrize("estimator", ["k1", "k3"])
@pytest.mark.parametrize("whiten", [False, True])
def test_ppo_advantages_from_scores_and_kl(whiten, estimator):
  """Full rows, for which TRL also adds the score to the last token. Its whitening divides by n - 1,
  ours by n.
  """
  x = tensors()
  x.mask[:] = True
  config = config_of(
    algorithm="ppo", kl__placement="reward", kl__estimator=estimator, ppo__whiten_advantages=whiten
  )
  token_kl = {"k1": losses.kl_k1, "k3": losses.kl_k3}[estimator](x.old, x.ref)
  found = make_advantages(config)(
    jnp.asarray(x.scores), token_kl, jnp.asarray(x.mask), 0.05, values=x.values
  )
  log_ratio = t(x.ref) - t(x.old)
  kl = -log_ratio if estimator == "k1" else (log_ratio.exp() - 1) - log_ratio
  rewards = -0.05 * kl
  rewards[:, -1] += t(x.scores)
  adv, returns = trl_gae(rewards, t(x.values), gamma=config.critic.gamma, lam=config.critic.lam)
  if whiten:
    adv = trl_masked_whiten(adv, t(x.mask)) * np.sqrt(x.mask.sum() / (x.mask.sum() - 1))
  np.testing.assert_allclose(found.advantages, adv, **TOLERANCE)
  np.testing.assert_allclose(found.returns, returns, **TOLERANCE)


def test_whitening():
  """TRL: variance with 1 / (n - 1); ours: 1 / n."""
  x = tensors()
  n = x.mask.sum()
  found = masked_whiten(jnp.asarray(x.values), jnp.asarray(x.mask)) * np.sqrt((n - 1) / n)
  np.testing.assert_allclose(
    found, trl_masked_whiten(t(x.values), t(x.mask)).numpy() * x.mask, **TOLERANCE
  )


@pytest.mark.parametrize("clip", [0.1, 0.5])
def test_ppo_value_loss(clip):
  x = tensors()
  returns = tensors(seed=2).values

  def loss(v):
    return losses.value_clip(v, x.values, jnp.asarray(returns), jnp.asarray(x.mask), clip=clip)[0]

  found = jax.value_and_grad(loss)(jnp.asarray(x.new_values))
  values = torch.tensor(x.new_values, requires_grad=True)
  expected = trl_ppo_value_loss(values, t(x.values), t(returns), t(x.mask), clip=clip)
  expected.backward()
  agree(found, (expected.item(), values.grad.numpy()))


@pytest.mark.parametrize("estimator", ["k1", "k2", "k3"])
def test_what_policy_and_reference_think_of_padding_has_no_part_in_the_loss(estimator):
  """Nothing keeps them near each other there, and exp(1000) has no finite gradient."""
  x = tensors()
  config = config_of(kl__beta=0.1, kl__placement="loss", kl__estimator=estimator)
  apart = types.SimpleNamespace(**vars(x) | dict(new=np.where(x.mask, x.new, x.ref - 1e3)))
  for found, want in zip(ours(apart, config), ours(x, config)):
    np.testing.assert_array_equal(found, want)


def test_missing_eos_penalty():
  """1.12.0, experimental.ppo: the penalty is subtracted from the score and does not replace it."""
  x = tensors()
  config = config_of(shaping__missing_eos="subtract", shaping__missing_eos_penalty=1.3)
  found = shape_scores(jnp.asarray(x.scores), x.mask.sum(1), jnp.asarray(x.has_eos), config.shaping)
  expected = t(x.scores)
  expected[~t(x.has_eos)] -= 1.3
  np.testing.assert_allclose(found, expected, **TOLERANCE)


# ---- TRL's own code ----


class Anything:
  """Replaces a trainer's accelerator and metrics, to which the loss only reports."""

  num_processes = 1
  gather = gather_for_metrics = staticmethod(lambda x: x)

  def reduce(self, x, reduction="sum"):
    return x


def stand_in(new, **fields):
  """The parts of a trainer that `_compute_loss` reads. Log-probabilities come from `new`."""

  def read(*args, **kwargs):
    return (new, torch.zeros_like(new), None)

  return types.SimpleNamespace(
    _get_per_token_logps_and_entropies=read,
    accelerator=Anything(),
    model=types.SimpleNamespace(training=True),
    aux_loss_enabled=False,
    _metrics={"train": collections.defaultdict(list)},
    **fields,
  )


def inputs_of(x, **more):
  ids = torch.zeros(B, x.mask.shape[1], dtype=torch.long)
  return dict(
    prompt_ids=ids[:, :1],
    prompt_mask=ids[:, :1] + 1,
    completion_ids=ids,
    completion_mask=t(x.mask).long(),
    advantages=t(x.advantages),
    **more,
  )


def test_grpo_loss_of_trl_itself():
  pytest.importorskip(
    "trl", minversion="1.16.0", reason="TRL is no dependency; its formulas are tested above"
  )
  from trl.trainer.grpo_trainer import GRPOTrainer

  x = tensors(moved=0.5)

  def loss(new, loss_type, case):
    args = types.SimpleNamespace(
      delta=case["delta"], use_bias_correction_kl=False, steps_per_generation=1
    )
    trainer = stand_in(
      new,
      args=args,
      loss_type=loss_type,
      importance_sampling_level=case["level"],
      epsilon_low=case["low"],
      epsilon_high=case["high"],
      beta=case["beta"],
      max_completion_length=T,
      top_entropy_quantile=1.0,
      off_policy_mask_threshold=None,
      use_vllm=False,
      current_gradient_accumulation_steps=1,
      _entropy_bonus_enabled=False,
    )
    given = inputs_of(
      x,
      old_per_token_logps=t(x.old),
      ref_per_token_logps=t(x.ref),
      num_items_in_batch=t(x.mask).sum(),
    )
    return GRPOTrainer._compute_loss(trainer, None, given)

  for loss_type, case in itertools.product(AGGREGATIONS, GRPO_CASES.values()):
    agree(ours(x, grpo_config(loss_type, case)), theirs(lambda new: loss(new, loss_type, case), x))


def test_rloo_loss_of_trl_itself():
  pytest.importorskip(
    "trl", minversion="1.16.0", reason="TRL is no dependency; its formulas are tested above"
  )
  from trl.trainer.rloo_trainer import RLOOTrainer

  def loss(x):
    given = inputs_of(x, old_logps=(t(x.old) * t(x.mask)).sum(1))
    return lambda new: RLOOTrainer._compute_loss(
      stand_in(new, epsilon_low=0.2, epsilon_high=0.3), None, given
    )

  single = tensors(columns=1)
  agree(
    ours(single, config_of(ppo__clip_eps=0.2, ppo__clip_eps_high=0.3)), theirs(loss(single), single)
  )
  fresh = tensors(moved=0.0)
  np.testing.assert_allclose(
    ours(fresh, config_of())[1], theirs(loss(fresh), fresh)[1], **TOLERANCE
  )
