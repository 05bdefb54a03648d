"""One child of peers.py: the same work in tunix's GRPO learner. It runs in tunix's own environment,
without r2m_jax.

PEERS/tunix/bin/python -m benchmarks.peer_tunix SIZE STEPS MOST [ENDS LINE]

With ENDS so many tokens end a row, else none does. With LINE the updates see packed lines of so many
tokens, one update a line.
"""

import importlib.metadata
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from tunix.models.qwen2 import model as qwen2
from tunix.rl import common, rl_cluster
from tunix.rl import utils as rl_utils
from tunix.rl.grpo import grpo_learner
from tunix.rl.rollout import base_rollout

from benchmarks import peer_task as task

ROLES = (rl_cluster.Role.ACTOR, rl_cluster.Role.REFERENCE, rl_cluster.Role.ROLLOUT)


def make_model(shape: dict, seed: int) -> qwen2.Qwen2:
  """A model with random values in every matrix: tunix's own initialisation has zeros in the MLPs,
  which would get no gradient.
  """
  config = qwen2.ModelConfig(
    num_layers=shape["layers"],
    vocab_size=shape["vocab_size"],
    embed_dim=shape["hidden_size"],
    hidden_dim=shape["intermediate_size"],
    num_heads=shape["heads"],
    num_kv_heads=shape["kv_heads"],
    head_dim=shape["hidden_size"] // shape["heads"],
    rope_theta=int(task.ROPE_THETA),
    norm_eps=task.NORM_EPS,
    use_tied_embedding=False,
    remat_config=qwen2.RematConfig.NONE,
    dtype=jnp.float32,
    param_dtype=jnp.float32,
  )
  model, rng = qwen2.Qwen2(config, rngs=nnx.Rngs(seed)), np.random.default_rng(seed)

  def random(x):
    return jnp.asarray(0.02 * rng.standard_normal(x.shape), x.dtype) if x.ndim > 1 else x

  nnx.update(model, jax.tree.map(random, nnx.state(model)))
  return model


def make_reward(shape: dict, tokenizer, lengths: list[float], ends: int):
  """The reward function that tunix requires, around a reward model, because its GRPO learner does
  not take a model.

  The model is a policy whose vocabulary projection is a score, like tunix's critics; the score of a
  row is its last token's score. The mean length of each call's responses is added to `lengths`.
  """
  model = rl_utils.create_critic_model(make_model(shape, 2))
  pad = tokenizer.pad_token_id
  eos = tokenizer.eos_token_id

  def reward(prompts, completions, **kwargs):
    asked, said = (
      [tokenizer(text=str(x))["input_ids"] for x in xs] for xs in (prompts, completions)
    )
    task.check_length("a prompt", map(len, asked), task.LENGTH)
    if not ends:
      task.check_length("a response", map(len, said), task.RESPONSE)
    lengths.append(np.mean([len(row) for row in said]))
    answers = np.full((len(said), task.RESPONSE), pad, np.int32)
    for row, tokens in zip(answers, said, strict=True):
      row[: len(tokens)] = tokens
    scores = common.compute_score(
      model, jnp.asarray(asked, jnp.int32), jnp.asarray(answers), pad, eos
    )
    last = [task.LENGTH + len(row) - 1 for row in said]
    return np.asarray(scores)[np.arange(len(said)), last].tolist()

  return reward


def make_cluster(
  shape: dict, tokenizer, rollouts: int, ends: int, line: int
) -> rl_cluster.RLCluster:
  mesh = jax.make_mesh((1, 1), ("fsdp", "tp"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
  # of a rollout: one an epoch, or one a line, of which none holds less than one row
  updates = 2 * task.EPOCHS * rollouts * (task.ROWS if line else 1)
  config = rl_cluster.ClusterConfig(
    role_to_mesh=dict.fromkeys(ROLES, mesh),
    rollout_engine="vanilla",  # the other kernels are for TPUs
    training_config=rl_cluster.RLTrainingConfig(
      actor_optimizer=optax.adamw(task.LEARNING_RATE),
      mini_batch_size=task.PROMPTS,  # all 64 rows in one pass and one update per epoch
      max_steps=updates,
      eval_every_n_steps=updates,  # ends when the prompts end
      max_seq_token_per_tpu=line or None,
    ),
    rollout_config=base_rollout.RolloutConfig(
      max_tokens_to_generate=task.RESPONSE,
      max_prompt_length=task.LENGTH,
      temperature=task.TEMPERATURE,
      top_p=1.0,
      top_k=None,  # other values sort the vocabulary for every token
      kv_cache_size=task.LENGTH + task.RESPONSE,  # no more slots than necessary
      seed=0,  # without it every step has the same samples, and a key is donated at the first step
      eos_tokens=list(range(ends)) if ends else None,
    ),
  )
  with jax.set_mesh(mesh):
    policy, reference = make_model(shape, 1), make_model(shape, 1)
    return rl_cluster.RLCluster(
      actor=policy, reference=reference, tokenizer=tokenizer, cluster_config=config
    )


def batches(vocab_size: int, watch: task.Watch, rollout_config):
  """Prompts until the watch is done. The learner requests the next batch when all updates on the
  last one are done.
  """
  for step in range(watch.laps):
    watch.lap()
    if watch.done:
      return
    rollout_config.seed = step
    yield {"prompts": np.array(task.prompts(vocab_size, step))}
  watch.lap()


def main(size: str, steps: int, most: int, ends: int = 0, line: int = 0) -> None:
  shape = task.SIZES[size]
  watch = task.Watch(steps, most)
  lengths = []
  tokenizer = task.make_tokenizer(shape["vocab_size"], ends)
  cluster = make_cluster(shape, tokenizer, watch.laps, ends, line)
  learner = grpo_learner.GRPOLearner(
    rl_cluster=cluster,
    reward_fns=make_reward(shape, tokenizer, lengths, ends),
    algo_config=grpo_learner.GRPOConfig(
      num_generations=task.GROUP,
      num_iterations=task.EPOCHS,
      beta=task.BETA,
      kl_loss_mode="low_var_kl",
    ),
  )
  learner.train(batches(shape["vocab_size"], watch, cluster.cluster_config.rollout_config))
  state = nnx.state(cluster.actor_trainer.model, nnx.Param)
  wrong = {x.dtype for x in jax.tree.leaves(state)} - {jnp.dtype("float32")}
  assert not wrong, f"float32 is required, but found {wrong}"
  updates, rollouts = cluster.actor_trainer.train_steps, len(watch.seconds) + watch.warm
  wanted = task.EPOCHS * rollouts
  assert updates > wanted if line else updates == wanted, f"{updates} updates, {rollouts} rollouts"
  print(
    watch.result(
      "tunix GRPO",
      importlib.metadata.version("google-tunix"),
      jax=jax.__version__,
      parameters=sum(x.size for x in jax.tree.leaves(state)),
      lengths=[float(x) for x in lengths],
      updates=updates / rollouts,
    )
  )


if __name__ == "__main__":
  main(sys.argv[1], *map(int, sys.argv[2:]))
