"""Supervised fine-tuning and Bradley-Terry reward fitting, on the same parts as the RL step."""

import itertools
import time
from collections.abc import Callable, Iterable
from pathlib import Path

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from r2m_jax import checkpoint, loop
from r2m_jax.losses import bradley_terry
from r2m_jax.metrics import Metrics, progress
from r2m_jax.models.reward import member_scores, read_rte
from r2m_jax.ops import combine, masked_mean, predicts_response, token_stats
from r2m_jax.optim import descend, make_optimizer
from r2m_jax.sharding import shardings
from r2m_jax.step import Defs, make_score
from r2m_jax.variants import States

LOG_EVERY = 10  # updates; a fetch waits for the device
BAD_ROWS = 3  # logged rows in a row whose update was skipped, then the fit stops
SAVE_SECONDS = 300  # between saves of an unfinished fit
PARTIAL = "partial"  # folder of these


def sft_loss(graphdef, *, chunk: int = 0) -> Callable:
  """Builds loss(policy_state, batch): mean negative log-likelihood of the response tokens, nats a token.

  A batch has tokens i32[B, L], token_mask bool[B, L] and response_mask bool[B, T] over the last T columns.
  """

  def loss(state, batch):
    model, mask = nnx.merge(graphdef, state), batch["response_mask"]
    T = mask.shape[1]
    hidden = predicts_response(model(batch["tokens"], batch["token_mask"]).hidden, T)
    stats = token_stats(model.logits, hidden, batch["tokens"][:, -T:], temperature=1.0, chunk=chunk)
    return -masked_mean(stats.logprobs, mask), {}

  return loss


def reward_loss(backbone_def, phi_def, *, sum_to_zero: float = 0.0) -> Callable:
  """Builds loss(state, batch): Bradley-Terry (eq. 5) over pairs, for the whole reward model.

  The state is {"backbone", "phi"}; a batch has chosen, rejected i32[B, L] and their masks bool[B, L], and for an
  ensemble a weight f32[B, M] of each pair for each head of phi.

  Args:
    sum_to_zero: weight of the squared mean score of the batch, which keeps scores from growing together.
  """

  def loss(state, batch):
    backbone, phi = nnx.merge(backbone_def, state["backbone"]), nnx.merge(phi_def, state["phi"])
    tokens = jnp.concatenate([batch["chosen"], batch["rejected"]])
    mask = jnp.concatenate([batch["chosen_mask"], batch["rejected_mask"]])
    scores = member_scores(phi, read_rte(backbone, tokens, mask))  # [2B, M]
    weight = batch.get("weight", jnp.ones((len(tokens) // 2, scores.shape[1]), scores.dtype))
    loss = jax.vmap(bradley_terry, 1)(*jnp.split(scores, 2), weight).mean()
    if sum_to_zero:
      loss += sum_to_zero * (scores.mean(0) ** 2).mean()
    chosen, rejected = jnp.split(combine(scores), 2)
    # a tie is half right: a model that scores all alike is at 0.5, not at 0 or 1
    accuracy = jnp.where(chosen == rejected, 0.5, (chosen > rejected).astype(chosen.dtype)).mean()
    return loss, {"accuracy": accuracy}

  return loss


def head_loss(defs: Defs, score: Callable, *, layer: int, omega: float) -> Callable:
  """Builds loss(head, batch, frozen): Bradley-Terry of cross-attention and phi over pairs, for a warm start.

  Args:
    score: of `step.make_score`.
    layer: of the policy whose states are read.
    omega: weight of the reward model's own embedding (eq. 4).

  A batch is a `types.Pairs` as a dict, frozen is {"policy", "backbone"}: neither moves.
  """

  def loss(head, batch, frozen):
    policy = nnx.merge(defs.base or defs.policy, frozen["policy"])
    backbone = nnx.merge(defs.reward_backbone, frozen["backbone"])
    rte = read_rte(backbone, batch["reward_tokens"], batch["reward_mask"])
    hidden = policy(batch["tokens"], batch["token_mask"], feedback_layer=layer).feedback
    states = jax.lax.stop_gradient(States(hidden, batch["token_mask"]))
    chosen, rejected = jnp.split(score(head, jax.lax.stop_gradient(rte), states, jnp.asarray(omega, rte.dtype)), 2)
    loss = jax.vmap(bradley_terry, 1)(chosen, rejected).mean()
    return loss, {"accuracy": ((chosen > rejected) + 0.5 * (chosen == rejected)).mean()}

  return loss


def fit(
  loss_fn: Callable,
  state,
  tx: optax.GradientTransformation,
  batches: Iterable[dict],
  *,
  total: int,
  stage: str,
  workdir: Path,
  state_shardings,
  batch_sharding,
  frozen=None,
):
  """Minimises loss_fn over `batches` and returns the state; it is donated. Logs to stage `stage` of the workdir.

  What a signal or the clock makes it save lies in WORKDIR/partial, from where it goes on, until the stage is done.
  `frozen`, where given, is a tree of arrays that loss_fn(state, batch, frozen) reads: the base below adapters.
  """
  extra = () if frozen is None else (frozen,)

  @jax.jit
  def init(state):
    return tx.init(state)

  def update(state, opt, batch, *extra):
    state, opt, loss, aux, done = descend(tx, loss_fn, state, opt, batch, *extra)
    return state, opt, {"loss": loss, **done, **aux}

  update = jax.jit(update, donate_argnums=(0, 1), out_shardings=(state_shardings, None, None))
  opt, bad, saved = init(state), 0, time.monotonic()
  partial = checkpoint.open_checkpoints(workdir / PARTIAL / stage, last=1)
  start = checkpoint.newest(partial) or 0
  if start:
    state, opt = checkpoint.restore(partial, (state, opt), start)
    print(f"{stage}: goes on from update {start} of {total}")
  with loop.at_hand() as asked, checkpoint.finished(partial), Metrics(workdir, stage, from_step=start) as log:
    with progress(total, stage, initial=start) as bar:
      for i, batch in enumerate(itertools.islice(batches, start, None), start):
        state, opt, metrics = update(state, opt, jax.device_put(batch, batch_sharding), *extra)
        if i % LOG_EVERY == 0 or i == total - 1:
          metrics = {k: float(v) for k, v in metrics.items()}
          log.log(i, metrics)
          bad = bad + 1 if metrics["skipped"] else 0
          if bad == BAD_ROWS:
            raise loop.Diverged(f"{stage}: updates up to {i} are skipped, loss {metrics['loss']}: lower {stage}'s lr")
        bar.update(**({"loss": metrics["loss"]} if isinstance(metrics["loss"], float) else {}))
        if (stop := asked()) or time.monotonic() - saved > SAVE_SECONDS:
          checkpoint.save(partial, i + 1, (state, opt))
          saved = time.monotonic()
        if stop:
          break
  return state


def fit_warm_head(config, built, workdir: Path, head, batches: Iterable[dict], total: int, *, frozen):
  """Fits cross-attention and phi to pairs before RL, with the optimizer of config.r2m; see `head_loss`."""
  loss = head_loss(
    built.defs, make_score(built.defs, config), layer=config.r2m.feedback_layer, omega=config.r2m.omega_min
  )
  return fit(
    loss, head, make_optimizer(config.r2m, total), batches, total=total, stage="warm_start", workdir=workdir,
    state_shardings=shardings(head, built.mesh), batch_sharding=built.rows, frozen=frozen,
  )  # fmt: skip
