"""Runs that start from Hugging Face folders and end with them: task = sft, reward and r2m.

Policy and reward model may be of different families, sizes and tokenizers. A step is two programs, and the host
re-renders the responses for the reward model in between: step = learn ∘ rollout, with the code of the fused step.
"""

import dataclasses
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from r2m_jax import checkpoint, export, loop, sharding
from r2m_jax.build import Build, build, init_adapters, initial_state
from r2m_jax.checks import check_model, check_step_zero
from r2m_jax.config import ConfigError, check_batch
from r2m_jax.data.jsonl import DataError, read_rows
from r2m_jax.folders import RENDERER, FolderError, Policy, RewardModel
from r2m_jax.folders import describe_reward, load_policy, load_reward, mesh_of, reward_start
from r2m_jax.lab.stages import epochs_of_rows
from r2m_jax.metrics import append_samples, read_metrics, write_atomic
from r2m_jax.models import lora
from r2m_jax.optim import make_optimizer
from r2m_jax.pretrain import fit, fit_warm_head, reward_loss, sft_loss
from r2m_jax.report import format_summary, summary_table, write_report
from r2m_jax.serve import each_row
from r2m_jax.step import Labeller, make_learn, make_rollout, pairs_at, pairs_per_step, uses_labels
from r2m_jax.text import Renderer, as_prompts, bucket, pad_left, responses_of
from r2m_jax.types import Pairs
from r2m_jax.variants import VARIANTS
from r2m_jax.train import claim, shapes_of, stage, warm, with_variant


def run(config, workdir: Path) -> None:
  """`config.task` from the folders config.policy.path and config.reward.path; ends in WORKDIR/export."""
  tasks = {"sft": run_sft, "reward": run_reward, "r2m": run_r2m}
  if config.task not in tasks:
    raise ConfigError(f"config.task is {config.task!r}: from a folder it is one of {', '.join(tasks)}")
  mesh = mesh_of(config)
  check_batch(config, tuple(mesh.shape.values()))
  claim(config, workdir)
  devices = f"{mesh.size} {jax.devices()[0].platform} device(s) as {dict(mesh.shape)}"
  print(f"r2m_jax  {devices}, {config.dtype}; writes {workdir}")
  tasks[config.task](config, workdir, mesh)
  report = write_report(workdir, title=f"R2M: {config.task} from {config.policy.path or config.reward.path}")
  print(format_summary(summary_table(read_metrics(workdir))))
  print(f"report   {report}\nmetrics  {workdir / 'metrics.jsonl'}\nmodels   {workdir / 'export'}")


def keep(rows: list[dict], ids: list[tuple[list[int], ...]], config, what: str) -> list[int]:
  """Which rows have a prompt and responses within the limits of config.data; says how many do not."""
  limits = config.data.max_prompt_length, config.data.max_response_length
  kept = [i for i, (prompt, *responses) in enumerate(ids)
          if len(prompt) <= limits[0] and all(len(r) <= limits[1] for r in responses)]  # fmt: skip
  print(f"data     {len(kept)} of {len(rows)} rows for {what}; the others exceed {limits[0]} + {limits[1]} tokens")
  if not kept:
    raise DataError(f"no row of {config.data.train} is within config.data.max_prompt_length and max_response_length")
  return kept


def build_lora(config, mesh, **archs) -> Build:
  """`build`, with a pattern that matches no linear told as a mistake of the config."""
  try:
    return build(config, mesh, **archs)
  except ValueError as error:
    raise ConfigError(error) from None


def enough(rows: int, field: str, size: int) -> None:
  if rows < size:
    raise ConfigError(f"config.{field} is {size}: more than the {rows} rows of config.data.train; make it smaller")


# ---- sft ----


def run_sft(config, workdir: Path, mesh) -> None:
  """Negative log-likelihood of the responses, from rows {prompt, response}."""
  settings = config.sft
  policy = load_policy(config.policy.path, config, mesh)
  rows = read_rows(config.data.train, ("prompt", "response"))
  batch = sft_arrays(config, policy, rows)
  enough(len(batch["tokens"]), "sft.batch_size", settings.batch_size)
  built = build_lora(config, mesh, arch=policy.arch)
  start, frozen = policy.state, None
  loss = loss_fn = sft_loss(built.defs.policy, chunk=config.logits_chunk)
  if built.lora:
    start, frozen = init_adapters(config, built, mesh), policy.state
    loss_fn = lambda state, batch, base: loss(nnx.merge_state(state, base), batch)

  def make():
    return fit(
      loss_fn,
      start,
      make_optimizer(settings, settings.steps),
      ({name: x[index] for name, x in batch.items()} for index in
       epochs_of_rows(config.seed, len(batch["tokens"]), settings.batch_size, settings.steps)),
      total=settings.steps, stage="sft", workdir=workdir,
      state_shardings=sharding.shardings(start, mesh), batch_sharding=built.rows, frozen=frozen,
    )  # fmt: skip

  state = stage(workdir, "sft", shapes_of(start), make)
  export.write_policy(workdir / "export/policy", config, policy, state, workdir, base=frozen)


def sft_arrays(config, policy: Policy, rows: list[dict]) -> dict[str, np.ndarray]:
  """tokens, token_mask [N, L] and response_mask [N, T]: prompts padded on the left, responses on the right."""
  tokenizer = policy.tokenizer
  print(tokenizer.describe(rows[0]["prompt"]))
  end = [] if tokenizer.end_id is None else [tokenizer.end_id]
  pair = lambda r: (tokenizer.render(r["prompt"]), tokenizer.encode(r["response"], special=False) + end)
  ids = each_row(rows, pair, config.data.train)
  ids = [ids[i] for i in keep(rows, ids, config, "sft")]
  tokens, mask = pad_left([prompt for prompt, _ in ids], tokenizer.pad_id)
  # a row read backwards pads it on the right
  response, response_mask = (x[:, ::-1] for x in pad_left([r[::-1] for _, r in ids], tokenizer.pad_id))
  return {
    "tokens": np.concatenate([tokens, response], 1),
    "token_mask": np.concatenate([mask, response_mask], 1),
    "response_mask": response_mask,
  }


# ---- reward ----


def run_reward(config, workdir: Path, mesh) -> None:
  """Bradley-Terry on rows {prompt, chosen, rejected}, from a reward model or from a policy without a score head."""
  settings = config.reward
  reward = load_reward(config.reward.path or config.policy.path, config, mesh, from_policy=True)
  if reward.head is not None:
    raise FolderError(f"{reward.folder} is an R2M reward model; task=reward trains one that reads no policy")
  hold_contract(workdir, reward.renderer)
  rows = read_rows(config.data.train, ("prompt", "chosen", "rejected"))
  batch = reward_arrays(config, reward, rows)
  enough(len(batch["chosen"]), "reward.batch_size", settings.batch_size)
  built = build_lora(config, mesh, arch=reward.arch, reward_arch=reward.arch)
  start, frozen = reward_start(reward, mesh), None
  loss = loss_fn = reward_loss(built.defs.policy if built.lora else built.defs.reward_backbone, built.defs.phi)
  if built.lora:
    start, frozen = {**start, "backbone": init_adapters(config, built, mesh)}, start["backbone"]
    loss_fn = lambda state, batch, base: loss({**state, "backbone": nnx.merge_state(state["backbone"], base)}, batch)
  steps = settings.epochs * (len(batch["chosen"]) // settings.batch_size)

  def make():
    return fit(
      loss_fn,
      start,
      make_optimizer(settings, steps),
      ({name: x[index] for name, x in batch.items()} for index in
       epochs_of_rows(config.seed, len(batch["chosen"]), settings.batch_size, steps)),
      total=steps, stage="reward", workdir=workdir,
      state_shardings=sharding.shardings(start, mesh), batch_sharding=built.rows, frozen=frozen,
    )  # fmt: skip

  model = stage(workdir, "reward", shapes_of(start), make)
  backbone = lora.merged(model["backbone"], frozen, built.lora) if built.lora else model["backbone"]
  export.write_reward(workdir / "export/reward", config, reward, backbone, model["phi"], workdir)


def reward_arrays(config, reward: RewardModel, rows: list[dict]) -> dict[str, np.ndarray]:
  """chosen and rejected i32[N, L] with their masks, by the one renderer."""
  renderer, tokenizer = reward.renderer, reward.renderer.tokenizer
  print(describe_reward(reward, rows[0]["prompt"], rows[0]["chosen"]))
  lengths = [tuple(tokenizer.encode(text, special=False) for text in (row["chosen"], row["rejected"])) for row in rows]
  prompts = [tokenizer.encode(r["prompt"], special=False) if isinstance(r["prompt"], str) else
             tokenizer.render(r["prompt"]) for r in rows]  # fmt: skip
  rows = [rows[i] for i in keep(rows, [(p, *r) for p, r in zip(prompts, lengths)], config, "reward")]
  ids_of = lambda side: each_row(rows, lambda row: renderer.ids(row["prompt"], row[side]), config.data.train)
  sides = {side: ids_of(side) for side in ("chosen", "rejected")}
  length = bucket(max(len(ids) for side in sides.values() for ids in side))
  arrays = {}
  for side, ids in sides.items():
    arrays[side], arrays[f"{side}_mask"] = pad_left(ids, tokenizer.pad_id, length)
  return arrays


def hold_contract(workdir: Path, renderer: Renderer) -> None:
  """The renderer's contract lies with the run's checkpoints; a run that goes on with another one is refused."""
  path = workdir / RENDERER
  if path.exists():
    renderer.require(json.loads(path.read_text(encoding="utf-8")), workdir)
  write_atomic(path, json.dumps(renderer.contract, indent=2))


# ---- r2m ----


def run_r2m(config, workdir: Path, mesh) -> None:
  """RL on rows {prompt}, for config.variant or for each of config.arms."""
  if not (config.policy.path and config.reward.path):
    missing = "reward.path" if config.policy.path else "policy.path"
    raise FolderError(f"config.{missing} is empty: task=r2m from folders needs a policy and a reward model")
  policy = load_policy(config.policy.path, config, mesh)
  reward = load_reward(config.reward.path, config, mesh)
  hold_contract(workdir, reward.renderer)
  layers = policy.arch.num_layers
  if not -layers <= config.r2m.feedback_layer < layers:
    raise ConfigError(f"config.r2m.feedback_layer is {config.r2m.feedback_layer}: the policy has {layers} layers")
  built = build_lora(config, mesh, arch=policy.arch, reward_arch=reward.arch)
  data = prompt_data(config, policy)
  if not (workdir / "checkpoints").exists():
    check_model(
      built.defs.base or built.defs.policy, policy.state, vocab_size=policy.arch.vocab_size, dtype=config.dtype,
      temperature=config.rollout.temperature,
    )  # fmt: skip
  arms = (config.variant,) if config.variant else tuple(config.arms)
  for i, variant in enumerate(arms):
    out = workdir / "export" / ("" if config.variant else variant)
    last, arm = i == len(arms) - 1, with_variant(config, variant)
    built = build_lora(arm, mesh, arch=policy.arch, reward_arch=reward.arch)
    run_arm(arm, built, workdir, policy, reward, data, out, donate=last)


@dataclasses.dataclass(frozen=True)
class PromptData:
  prompts: list  # text or messages
  ids: list[list[int]]  # rendered for the policy
  length: int  # of the padded prompts: one for the run, so that the rollout compiles once


def prompt_data(config, policy: Policy) -> PromptData:
  rows = read_rows(config.data.train, ("prompt",))
  print(policy.tokenizer.describe(rows[0]["prompt"]))
  ids = each_row(rows, lambda row: policy.tokenizer.render(row["prompt"]), config.data.train)
  kept = keep(rows, [(i,) for i in ids], config, "r2m")
  enough(len(kept), "rollout.prompts", config.rollout.prompts)
  ids = [ids[i] for i in kept]
  return PromptData([rows[i]["prompt"] for i in kept], ids, bucket(max(map(len, ids))))


def labelled_pairs(config, policy: Policy, reward: RewardModel) -> dict[str, np.ndarray]:
  """The judgments of config.r2m.judgments for both models: arrays [N, 2, ...], winner and loser, named as in `Pairs`.

  A judged response is complete, so it ends with the policy's ending token, as in supervised training.
  """
  rows = read_rows(config.r2m.judgments, ("prompt", "chosen", "rejected"))
  tokenizer, renderer = policy.tokenizer, reward.renderer
  end = [] if tokenizer.end_id is None else [tokenizer.end_id]

  def encode(row):
    prompt = tokenizer.render(row["prompt"])
    sides = row["chosen"], row["rejected"]
    return [[*prompt, *tokenizer.encode(side, special=False), *end] for side in sides], \
           [renderer.ids(row["prompt"], side) for side in sides]  # fmt: skip

  limit = config.data.max_prompt_length + config.data.max_response_length
  ids = each_row(rows, encode, config.r2m.judgments)
  kept = [pair for pair in ids if max(map(len, pair[0])) <= limit]
  print(f"labels   {len(kept)} of {len(ids)} judgments in {config.r2m.judgments}; the others exceed {limit} tokens")
  if not kept:
    raise DataError(f"no row of {config.r2m.judgments} is within config.data.max_prompt_length + max_response_length")
  arrays = {}
  for which, name, pad in ((0, "", tokenizer.pad_id), (1, "reward_", renderer.tokenizer.pad_id)):
    flat = [side for pair in kept for side in pair[which]]
    tokens, mask = pad_left(flat, pad, bucket(max(map(len, flat))))
    arrays |= {f"{name}tokens": tokens.reshape(len(kept), 2, -1)}
    arrays |= {"token_mask" if not name else "reward_mask": mask.reshape(len(kept), 2, -1)}
  return arrays


def take_pairs(arrays: dict[str, np.ndarray], rows) -> dict[str, np.ndarray]:
  """Some judgments as the rows of `Pairs`: the winners, then their losers."""
  return {name: np.concatenate([x[rows, 0], x[rows, 1]]) for name, x in arrays.items()}


def judgments_labeller(config, arrays: dict[str, np.ndarray]) -> Labeller:
  """Builds `label(sequences, step) -> Pairs`: the next judgments of the file, in a new order each time through."""
  most, count = pairs_per_step(config), len(arrays["tokens"])

  def label(sequences, step: int) -> Pairs:
    del sequences  # the file's responses were judged before the run
    at = sum(pairs_at(config, t) for t in range(step)) + np.arange(most)
    rows = [np.random.default_rng([config.seed, 5, i // count]).permutation(count)[i % count] for i in at]
    weight = (np.arange(most) < pairs_at(config, step)).astype(np.float32)
    return Pairs(**take_pairs(arrays, rows), weight=weight)

  return label


def make_two_part_step(config, built: Build, policy: Policy, reward: RewardModel, layout, labeller=None):
  """Builds `step(state, prompts, texts) -> (state, output, reward-model text of row 0)`; the state is donated.

  `texts` are the prompts as the rows give them, for the reward model's own rendering.
  """
  K, tokenizer, renderer = config.rollout.group_size, policy.tokenizer, reward.renderer
  rollout = jax.jit(make_rollout(built.defs, config, built.mesh, tokenizer.eos_ids, tokenizer.pad_id))
  labelled = uses_labels(config)
  learn = jax.jit(
    make_learn(built.defs, config, built.mesh), donate_argnums=0,
    in_shardings=(layout,) + (None,) * (4 if labelled else 3), out_shardings=(layout, None),
  )  # fmt: skip

  def step(state, prompts, texts):
    sequences = rollout(state, prompts)
    on_host = jax.device_get(sequences)
    answers, sampled = responses_of(on_host, tokenizer), K * len(texts)  # then the greedy rows of "remax"
    rows = [
      (texts[i // K if i < sampled else i - sampled], text, truncated) for i, (text, truncated) in enumerate(answers)
    ]
    tokens, mask = renderer.batch(rows)
    pairs = (labeller(on_host, int(state.step)),) if labelled else ()
    state, out = learn(state, sequences, tokens, mask, *pairs)
    return state, out, rows[:sampled]

  return step


def run_arm(config, built: Build, workdir: Path, policy: Policy, reward: RewardModel, data: PromptData, out: Path,
            *, donate: bool) -> None:  # fmt: skip
  """RL for one variant, from the folders' models or from the arm's newest checkpoint; exports both models."""
  arm = config.variant
  checkpoints = checkpoint.open_checkpoints(workdir / "checkpoints" / arm, config.checkpoint)
  state = start_state(config, built, policy, reward, donate=donate)
  layout = sharding.shardings(state, built.mesh)
  rows_are = loop.fingerprint(data.ids)
  state, fresh = loop.resume(config, checkpoints, state, data=rows_are)
  if int(state.step) < config.steps:
    judged = VARIANTS[arm].start == "head" or uses_labels(config)
    arrays = labelled_pairs(config, policy, reward) if judged else {}
    if VARIANTS[arm].start == "head" and fresh:
      state = warm_start(config, built, workdir, state, arrays)
    labeller = judgments_labeller(config, arrays) if uses_labels(config) else None
    step = make_two_part_step(config, built, policy, reward, layout, labeller)
    order = list(epochs_of_rows(config.seed, len(data.ids), config.rollout.prompts, config.steps))

    def advance(state, t: int):
      prompts = as_prompts([data.ids[i] for i in order[t]], policy.tokenizer.pad_id, length=data.length)
      prompts = prompts.replace(example_id=np.asarray(order[t], np.int32))
      state, output, rows = step(state, prompts, [data.prompts[i] for i in order[t]])
      output = jax.device_get(output)
      if t == 0:
        check_step_zero(output.metrics, config.dtype)
        print(describe_reward(reward, *rows[0]))
      if t in (0, config.steps - 1):
        append_samples(workdir, samples(config, output, rows, "before" if t == 0 else "after"))
      shown = dict(reward=output.metrics["reward/used"], kl=output.metrics["kl"])
      return state, output, prompts.example_id, output.metrics, shown

    state = loop.run_steps(config, workdir, checkpoints, state, advance, data=rows_are)
  export.write_run(out, config, policy, reward, state, workdir)


def warm_start(config, built: Build, workdir: Path, state, arrays: dict[str, np.ndarray]):
  """The state with a head that was first fitted to the judgments; see `pretrain.head_loss`."""
  count, size = len(arrays["tokens"]), config.reward.batch_size
  enough(count, "reward.batch_size", size)
  total = config.r2m.warm_epochs * (count // size)
  batches = (take_pairs(arrays, rows) for rows in epochs_of_rows(config.seed, count, size, total))
  frozen = {"policy": state.ref, "backbone": state.reward_backbone}
  make = lambda: fit_warm_head(config, built, workdir, state.reward_head, batches, total, frozen=frozen)
  return warm(state, stage(workdir, "warm_start", shapes_of(state.reward_head), make))


def start_state(config, built: Build, policy: Policy, reward: RewardModel, *, donate: bool):
  """The run's first TrainState; an R2M reward model goes on with its own head. `donate` uses the weights up."""
  state = initial_state(config, built, policy.state, reward.state, reward.phi, donate=donate)
  if reward.head is None or not VARIANTS[config.variant].feedback:
    return state
  saved, head = reward.head
  wanted = (built.arch.hidden_size, built.reward_arch.hidden_size, config.r2m.attention_dim, config.r2m.num_heads)
  found = (saved.policy_hidden_size, saved.reward_hidden_size, saved.attention_dim, saved.num_heads)
  if wanted != found:
    raise FolderError(
      f"{reward.folder} has an R2M head of (policy size, reward size, attention_dim, num_heads) = {found}; this run "
      f"asks for {wanted}: set config.r2m.attention_dim and num_heads, or give a reward model without a head"
    )
  like = state.reward_head
  head = jax.tree.map(lambda x, old: jax.device_put(jnp.asarray(x, old.dtype), old.sharding), head, like)
  return state.replace(reward_head=head)


def samples(config, output, rows, when: str) -> list[dict]:
  """One row of samples.jsonl for each of the step's first prompts."""
  K, judged = config.rollout.group_size, output.judged
  lengths = output.sequences.response_mask.sum(1)
  shown = range(0, min(config.log.samples * K, len(rows)), K)
  text = lambda prompt: prompt if isinstance(prompt, str) else "\n".join(f"{m['role']}: {m['content']}" for m in prompt)
  return [
    {
      "arm": config.variant, "when": when, "prompt": text(rows[i][0]), "response": rows[i][1],
      "reward": judged.scores[i], "frozen": judged.scores_frozen[i], "length": int(lengths[i]), "truncated": rows[i][2],
    }
    for i in shown
  ]  # fmt: skip
