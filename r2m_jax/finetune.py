"""Runs that start from Hugging Face folders and end with them: task = sft, reward and r2m.

Policy and reward model may be of different families, sizes and tokenizers. A step is two programs, and the host
re-renders the responses for the reward model in between: step = learn ∘ rollout, with the code of the fused step.
"""

import dataclasses
import json
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from r2m_jax import checkpoint, export, sharding
from r2m_jax.build import Build, build, init_adapters, initial_state
from r2m_jax.checks import check_model, check_step_zero
from r2m_jax.config import ConfigError, check_batch
from r2m_jax.data.batches import Stream, group_by_length, pack, row_batches
from r2m_jax.data.rows import fingerprint, keep, load, too_long
from r2m_jax.folders import RENDERER, FolderError, Policy, RewardModel
from r2m_jax.folders import describe_reward, load_policy, load_reward, mesh_of, reward_start
from r2m_jax.metrics import Metrics, append_samples, progress, read_metrics, write_atomic
from r2m_jax.models import lora
from r2m_jax.optim import make_optimizer
from r2m_jax.pretrain import Timed, fit, reward_loss, sft_loss, steps_within
from r2m_jax.report import format_summary, summary_table, write_report
from r2m_jax.step import VARIANTS, make_learn, make_rollout
from r2m_jax.text import Renderer, TextError, as_prompts, bucket, pad_left, responses_of
from r2m_jax.train import claim, stage, with_variant
from r2m_jax.types import Prompts


BUDGETS = export.BUDGETS


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


def shapes_of(tree):
  """Shapes, dtypes and shardings of a tree of arrays."""
  return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), tree)


def rendered(rows: list[dict], f) -> list:
  """[f(row)], with the row's file and line in an error."""
  results = []
  for row in rows:
    try:
      results.append(f(row))
    except TextError as error:
      raise TextError(f"{row['where']}: {error}") from None
  return results


def select(config, rows: list[dict], ids: list[tuple[list[int], ...]], what: str, chosen=None) -> list[int]:
  """Which rows have a prompt and responses, given as token ids, that config.data allows; says why the others go.

  `chosen` holds the ids of the responses that the paper's filter looks at, row by row.
  """
  seen, reasons = set(), []
  for i, (prompt, *responses) in enumerate(ids):
    reason = too_long(config.data, len(prompt), [len(r) for r in responses], len(chosen[i]) if chosen else 0)
    if reason is None and config.data.unique:
      row = hash((tuple(prompt), *map(tuple, responses)))
      reason = "the same as an earlier row" if row in seen else None
      seen.add(row)
    reasons.append(reason)
  return keep(rows, reasons, what)


def row_stream(config, rows: list[dict], batch_size: int, *, lengths=None, ids, workdir: Path, stage: str):
  """(dataset of row numbers, padded length of each row) for one stage; holds the stage to the rows it began with."""
  parts = [row["part"] for row in rows]
  weights = tuple(config.data.weights)
  groups = []
  if lengths is not None:
    top = bucket(max(lengths))
    groups = group_by_length(lengths, [*(b for b in config.data.buckets if b < top), top], batch_size)
  used = sorted(set(parts))  # a name whose rows were all dropped is no source
  parts = [used.index(part) for part in parts]
  weights = [weights[part] for part in used] if weights else ()
  hold(workdir / f"data_{stage}.json", {"rows": len(ids), "sha256": fingerprint(ids)})
  shard = (jax.process_index(), jax.process_count()) if lengths is not None else (0, 1)
  return row_batches(parts, batch_size, seed=config.seed, weights=weights, groups=groups, shard=shard), groups


def hold(path: Path, found: dict) -> None:
  """Writes what a stage reads; where it is there already, it must be the same."""
  if path.exists() and (saved := json.loads(path.read_text(encoding="utf-8"))) != found:
    raise ConfigError(
      f"config.data.name gives {found['rows']} rows that are not the {saved['rows']} with which {path.parent} began; "
      "give it the files it had, or choose another --workdir"
    )
  write_atomic(path, json.dumps(found))


def budgeted(workdir: Path, stage: str, seconds: float, measure) -> int:
  """The steps that a budget of seconds gives, measured once in a workdir."""
  path = workdir / BUDGETS
  saved = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
  if stage not in saved:
    saved[stage] = measure(seconds)
    write_atomic(path, json.dumps(saved))
  return saved[stage]


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


def run_sft(config, workdir: Path, mesh, *, name: str = "sft", out: Path | None = None) -> None:
  """Negative log-likelihood of the responses, or of whole packed dialogues; ends with the policy in `out`.

  Args:
    name: of the stage, in metrics and on disk.
    out: WORKDIR/export/policy where not given.
  """
  settings = config.sft
  policy = load_policy(config.policy.path, config, mesh)
  dataset, collate = (packed_lines if config.data.pack else sft_rows)(config, policy, workdir, name)
  built = build_lora(config, mesh, arch=policy.arch)
  start, frozen = policy.state, None
  loss = loss_fn = sft_loss(built.defs.policy, chunk=config.logits_chunk)
  if built.lora:
    start, frozen = init_adapters(config, built, mesh), policy.state
    loss_fn = lambda state, batch, base: loss(nnx.merge_state(state, base), batch)
  steps = settings.steps
  if settings.budget:
    probe = dict(batch_sharding=built.rows, frozen=frozen)
    measure = lambda seconds: steps_within(seconds, loss_fn, start, Stream(dataset, collate), **probe)
    steps = budgeted(workdir, name, settings.budget, measure)

  def make():
    return fit(
      loss_fn, start, make_optimizer(settings, steps), Stream(dataset, collate), total=steps, stage=name,
      workdir=workdir, state_shardings=sharding.shardings(start, mesh), batch_sharding=built.rows, frozen=frozen,
    )  # fmt: skip

  state = stage(workdir, name, shapes_of(start), make)
  export.write_policy(out or workdir / "export/policy", config, policy, state, workdir, base=frozen)


def sft_rows(config, policy: Policy, workdir: Path, name: str):
  """Batches of tokens, token_mask [B, L] and response_mask [B, T]: prompt and response end to end, padded on the left.

  Returns (dataset of row numbers, their collate function).
  """
  tokenizer = policy.tokenizer
  rows = load(config.data, "response")
  print(tokenizer.describe(rows[0]["prompt"]))
  end = [] if tokenizer.end_id is None else [tokenizer.end_id]
  ids = rendered(rows, lambda r: (tokenizer.render(r["prompt"]), tokenizer.encode(r["response"], special=False)))
  kept = select(config, rows, ids, name)
  enough(len(kept), "sft.batch_size", config.sft.batch_size)
  rows, ids = [rows[i] for i in kept], [(ids[i][0], ids[i][1] + end) for i in kept]
  widest = bucket(max(len(response) for _, response in ids))
  dataset, lengths = row_stream(config, rows, config.sft.batch_size, lengths=[len(p) + len(r) for p, r in ids],
                                ids=ids, workdir=workdir, stage=name)  # fmt: skip

  def collate(batch):
    length = int(lengths[batch[0]])
    tokens, mask = pad_left([ids[i][0] + ids[i][1] for i in batch], tokenizer.pad_id, length)
    columns = np.arange(min(widest, length - 1))[::-1]  # counted from the end; the first token is predicted by none
    response_mask = columns < np.asarray([len(ids[i][1]) for i in batch])[:, None]
    return {"tokens": tokens, "token_mask": mask, "response_mask": response_mask}

  return dataset, collate


def packed_lines(config, policy: Policy, workdir: Path, name: str):
  """As `sft_rows`, for dialogues and texts laid end to end in full lines; every token but a line's first counts."""
  tokenizer, data = policy.tokenizer, config.data
  end = [] if tokenizer.end_id is None else [tokenizer.end_id]

  def whole(row):
    if "text" in row:
      return tokenizer.encode(row["text"]) + end
    if tokenizer.has_template:
      return tokenizer.dialogue(row["prompt"], row["response"], truncated=False)
    return tokenizer.join(row["prompt"], row["response"]) + end

  rows = load(data, "text")
  texts = rendered(rows, whole)
  if data.unique:
    texts = list({tuple(ids): ids for ids in texts}.values())
  length = data.max_prompt_length + data.max_response_length
  lines = pack([texts[i] for i in np.random.default_rng(config.seed).permutation(len(texts))], length)
  print(f"data     {len(texts)} of {len(rows)} dialogues for {name} make {len(lines)} lines of {length} tokens")
  enough(len(lines), "sft.batch_size", config.sft.batch_size)
  dataset, _ = row_stream(config, [{"part": 0}] * len(lines), config.sft.batch_size, lengths=[length] * len(lines),
                          ids=lines.tolist(), workdir=workdir, stage=name)  # fmt: skip
  full = np.ones((config.sft.batch_size // jax.process_count(), length), bool)
  return dataset, lambda batch: {"tokens": lines[batch], "token_mask": full, "response_mask": full[:, 1:]}


# ---- reward ----


def run_reward(config, workdir: Path, mesh, *, out: Path | None = None) -> None:
  """Bradley-Terry on pairs, from a reward model or from a policy without a score head; ends with it in `out`."""
  settings = config.reward
  reward = load_reward(config.reward.path or config.policy.path, config, mesh, from_policy=True)
  if reward.head is not None:
    raise FolderError(f"{reward.folder} is an R2M reward model; task=reward trains one that reads no policy")
  hold_contract(workdir, reward.renderer)
  dataset, collate, count = pairs(config, reward, workdir)
  built = build_lora(config, mesh, arch=reward.arch, reward_arch=reward.arch)
  start, frozen = reward_start(reward, mesh), None
  loss = loss_fn = reward_loss(built.defs.policy if built.lora else built.defs.reward_backbone, built.defs.phi)
  if built.lora:
    start, frozen = {**start, "backbone": init_adapters(config, built, mesh)}, start["backbone"]
    loss_fn = lambda state, batch, base: loss({**state, "backbone": nnx.merge_state(state["backbone"], base)}, batch)
  steps = settings.epochs * (count // settings.batch_size)
  if settings.budget:
    probe = dict(batch_sharding=built.rows, frozen=frozen)
    measure = lambda seconds: steps_within(seconds, loss_fn, start, Stream(dataset, collate), **probe)
    steps = budgeted(workdir, "reward", settings.budget, measure)

  def make():
    return fit(
      loss_fn, start, make_optimizer(settings, steps), Stream(dataset, collate), total=steps, stage="reward",
      workdir=workdir, state_shardings=sharding.shardings(start, mesh), batch_sharding=built.rows, frozen=frozen,
    )  # fmt: skip

  model = stage(workdir, "reward", shapes_of(start), make)
  backbone = lora.merged(model["backbone"], frozen, built.lora) if built.lora else model["backbone"]
  export.write_reward(out or workdir / "export/reward", config, reward, backbone, model["phi"], workdir)


def pair_ids(config, reward: RewardModel, rows: list[dict], what: str) -> tuple[list[dict], list[tuple]]:
  """The rows within the limits of config.data, and (chosen, rejected) of each as the reward model's tokens."""
  renderer, tokenizer = reward.renderer, reward.renderer.tokenizer
  plain = lambda text: tokenizer.encode(text, special=False)
  prompt = lambda p: plain(p) if isinstance(p, str) else tokenizer.render(p)
  ids = rendered(rows, lambda r: (prompt(r["prompt"]), plain(r["chosen"]), plain(r["rejected"])))
  rows = [rows[i] for i in select(config, rows, ids, what, chosen=[chosen for _, chosen, _ in ids])]
  sides = lambda r: tuple(renderer.ids(r["prompt"], r[side]) for side in ("chosen", "rejected"))
  return rows, rendered(rows, sides)


def pairs(config, reward: RewardModel, workdir: Path):
  """Batches of chosen and rejected i32[B, L] with their masks. (dataset of row numbers, collate, number of rows)."""
  rows = load(config.data, "pair")
  print(describe_reward(reward, rows[0]["prompt"], rows[0]["chosen"]))
  rows, ids = pair_ids(config, reward, rows, "reward")
  enough(len(rows), "reward.batch_size", config.reward.batch_size)
  dataset, lengths = row_stream(config, rows, config.reward.batch_size, lengths=[max(map(len, pair)) for pair in ids],
                                ids=ids, workdir=workdir, stage="reward")  # fmt: skip

  def collate(batch):
    arrays = {}
    for side, name in enumerate(("chosen", "rejected")):
      rows = [ids[i][side] for i in batch]
      arrays[name], arrays[f"{name}_mask"] = pad_left(rows, reward.renderer.tokenizer.pad_id, int(lengths[batch[0]]))
    return arrays

  return dataset, collate, len(rows)


def hold_contract(workdir: Path, renderer: Renderer) -> None:
  """The renderer's contract lies with the run's checkpoints; a run that goes on with another one is refused."""
  path = workdir / RENDERER
  if path.exists():
    renderer.require(json.loads(path.read_text(encoding="utf-8")), workdir)
  write_atomic(path, json.dumps(renderer.contract, indent=2))


# ---- r2m ----


def run_r2m(config, workdir: Path, mesh, *, out: Path | None = None) -> None:
  """RL on prompts, for config.variant (ends in `out`, or WORKDIR/export) or each of config.arms (in a folder of it)."""
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
  data = prompt_data(config, policy, workdir)
  if not (workdir / "checkpoints").exists():
    check_model(
      built.defs.base or built.defs.policy, policy.state, vocab_size=policy.arch.vocab_size, dtype=config.dtype,
      temperature=config.rollout.temperature,
    )  # fmt: skip
  arms = (config.variant,) if config.variant else tuple(config.arms)
  if config.budget:
    probed = with_variant(config, arms[-1])
    measure = lambda seconds: rl_steps_within(seconds, probed, built, policy, reward, data)
    config = with_variant(config, config.variant)
    config.steps = budgeted(workdir, "rl", config.budget, measure)
    built = build_lora(config, mesh, arch=policy.arch, reward_arch=reward.arch)
  for i, variant in enumerate(arms):
    folder = (out or workdir / "export") / ("" if config.variant else variant)
    last = i == len(arms) - 1
    run_arm(with_variant(config, variant), built, workdir, policy, reward, data, folder, donate=last)


def rl_steps_within(seconds: float, config, built: Build, policy: Policy, reward: RewardModel, data) -> int:
  """How many RL steps take about `seconds`, compiling included, from three steps timed here; prints the rate."""
  state, times = start_state(config, built, policy, reward, donate=False), []
  step = make_two_part_step(config, built, policy, reward, sharding.shardings(state, built.mesh))
  for t in range(3):
    began, index = time.perf_counter(), data.order[t]
    state, output, _ = step(state, batch_of(data, index, policy), [data.prompts[i] for i in index])
    jax.block_until_ready((state, output))
    times.append(time.perf_counter() - began)
  each = sum(times[1:]) / 2
  steps = max(1, int((seconds - times[0]) / each))
  print(f"rate     {each:.2f} s an RL step, measured in {sum(times):.0f} s: {steps} steps in a budget of {seconds:g} s")
  return steps


@dataclasses.dataclass(frozen=True)
class PromptData:
  prompts: list  # text or messages
  ids: list[list[int]]  # rendered for the policy
  length: int  # of the padded prompts: one for the run, so that the rollout compiles once
  order: Any  # dataset of row numbers: entry t is the prompts of step t


def prompt_data(config, policy: Policy, workdir: Path) -> PromptData:
  tokenizer = policy.tokenizer
  rows = load(config.data, "prompt")
  print(tokenizer.describe(rows[0]["prompt"]))
  ids = rendered(rows, lambda row: (tokenizer.render(row["prompt"]),))
  kept = select(config, rows, ids, "r2m", [tokenizer.encode(row.get("chosen", ""), special=False) for row in rows])
  enough(len(kept), "rollout.prompts", config.rollout.prompts)
  rows, ids = [rows[i] for i in kept], [ids[i][0] for i in kept]
  order, _ = row_stream(config, rows, config.rollout.prompts, ids=ids, workdir=workdir, stage="r2m")
  return PromptData([row["prompt"] for row in rows], ids, bucket(max(map(len, ids))), order)


def make_two_part_step(config, built: Build, policy: Policy, reward: RewardModel, layout):
  """Builds `step(state, prompts, texts) -> (state, output, reward-model text of row 0)`; the state is donated.

  `texts` are the prompts as the rows give them, for the reward model's own rendering.
  """
  K, tokenizer, renderer = config.rollout.group_size, policy.tokenizer, reward.renderer
  rollout = jax.jit(make_rollout(built.defs, config, built.mesh, tokenizer.eos_ids, tokenizer.pad_id))
  learn = jax.jit(
    make_learn(built.defs, config, built.mesh), donate_argnums=0,
    in_shardings=(layout, None, None, None), out_shardings=(layout, None),
  )  # fmt: skip

  def step(state, prompts, texts):
    sequences = rollout(state, prompts)
    answers = responses_of(jax.device_get(sequences), tokenizer)
    rows = [(texts[i // K], text, truncated) for i, (text, truncated) in enumerate(answers)]
    tokens, mask = renderer.batch(rows)
    state, out = learn(state, sequences, tokens, mask)
    return state, out, rows

  return step


def run_arm(config, built: Build, workdir: Path, policy: Policy, reward: RewardModel, data: PromptData, out: Path,
            *, donate: bool) -> None:  # fmt: skip
  """RL for one variant, from the folders' models or from the arm's newest checkpoint; exports both models."""
  arm = config.variant
  manager = checkpoint.open_checkpoints(workdir / "checkpoints" / arm)
  state = start_state(config, built, policy, reward, donate=donate)
  layout = sharding.shardings(state, built.mesh)
  if manager.latest_step() is not None:
    state = checkpoint.restore(manager, state)
    print(f"{arm}: goes on from step {int(state.step)} of {config.steps}")
  start = int(state.step)
  if start < config.steps:
    step = make_two_part_step(config, built, policy, reward, layout)
    order = Timed(Stream(data.order, start=start))  # a step takes one batch: the saved step is where the data goes on
    with Metrics(workdir, "rl", arm, from_step=start) as log, progress(config.steps, arm, initial=start) as bar:
      for t, index in zip(range(start, config.steps), order):
        state, output, rows = step(state, batch_of(data, index, policy), [data.prompts[i] for i in index])
        output = jax.device_get(output)
        if t == 0:
          check_step_zero(output.metrics, config.dtype)
          print(describe_reward(reward, *rows[0]))
        if t in (0, config.steps - 1):
          append_samples(workdir, samples(config, output, rows, "before" if t == 0 else "after"))
        log.log(t, output.metrics | {"data/wait": order.waiting_share()})
        bar.update(reward=output.metrics["reward/used"], kl=output.metrics["kl"])
        if (t + 1) % config.log.checkpoint_every == 0 or t + 1 == config.steps:
          checkpoint.save(manager, t + 1, state)
  manager.wait_until_finished()
  export.write_run(out, config, policy, reward, state, workdir)


def batch_of(data: PromptData, index: np.ndarray, policy: Policy) -> Prompts:
  prompts = as_prompts([data.ids[i] for i in index], policy.tokenizer.pad_id, length=data.length)
  return prompts.replace(example_id=np.asarray(index, np.int32))


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


def prompt_text(prompt) -> str:
  """A prompt for the sample table."""
  return prompt if isinstance(prompt, str) else "\n".join(f"{m['role']}: {m['content']}" for m in prompt)


def samples(config, output, rows, when: str) -> list[dict]:
  """One row of samples.jsonl for each of the step's first prompts."""
  K, judged = config.rollout.group_size, output.judged
  lengths = output.sequences.response_mask.sum(1)
  shown = range(0, min(config.log.samples * K, len(rows)), K)
  return [
    {
      "arm": config.variant, "when": when, "prompt": prompt_text(rows[i][0]), "response": rows[i][1],
      "reward": judged.scores[i], "frozen": judged.scores_frozen[i], "length": int(lengths[i]), "truncated": rows[i][2],
    }
    for i in shown
  ]  # fmt: skip
