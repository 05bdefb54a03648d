"""Held-out evaluation during a run from folders: its numbers against transformers, resumed runs,
the alarm, and early stopping.
"""

import json
import math
import os
import shutil
import signal

import jax
import numpy as np
import pytest
import tiny_text
import torch
import transformers
from test_serve import config, their_scores, write

from configs import quickstart
from r2m_jax.config import ConfigError, check_config
from r2m_jax.data import datasets
from r2m_jax.goldtask import task as goldtask
from r2m_jax.hf.folders import FolderError
from r2m_jax.run import checkpoint, loop
from r2m_jax.run.files import read_jsonl
from r2m_jax.run.metrics import read_metrics, without_clock
from r2m_jax.tasks import evaluation, folders, follow, gold
from r2m_jax.types import Sequences

PROMPTS = [f"Please write about {thing}" for thing in "rain trees Paris cats dogs mats".split()]
HELD = ["What is the sea?", "The dog ran after the cat", "Is it Paris?", "rain and the sea", "cat"]


@pytest.fixture(scope="module")
def models(tmp_path_factory):
  """A policy (qwen2), a reward model (llama3.1) and a gold one (pythia), each with its own
  tokenizer.
  """
  root = tmp_path_factory.mktemp("models")
  tiny_text.model("qwen2", "chatml", root / "policy")
  tiny_text.model("llama3.1", "llama3", root / "reward", classifier=True, hidden_size=48)
  tiny_text.model("pythia", "plain", root / "gold", classifier=True)
  write(root / "prompts.jsonl", [{"prompt": p} for p in PROMPTS])
  write(root / "held.jsonl", [{"prompt": p} for p in [*HELD, HELD[0], PROMPTS[0]]])
  return root


def settings(models, **changes):
  base = dict(
    policy__path=str(models / "policy"),
    reward__path=str(models / "reward"),
    eval__gold__path=str(models / "gold"),
    data__name=str(models / "prompts.jsonl"),
    eval__data=str(models / "held.jsonl"),
    eval__every=2,
    eval__prompts=5,
    eval__batch_size=3,
    steps=4,
    rollout__prompts=6,
    rollout__group_size=2,
    rollout__max_new_tokens=6,
    log__samples=9,
    log__checkpoint_every=2,
    r2m__attention_dim=16,
    r2m__num_heads=2,
    policy__lr=1e-2,
    sft__batch_size=4,
    reward__batch_size=4,
    export__check=False,
  )
  return config(**(base | changes))


def rows_of(workdir):
  """The rows of metrics.jsonl without times, evaluations last."""
  rows = map(without_clock, read_metrics(workdir))
  return sorted(rows, key=lambda row: (row["stage"], row["step"]))


def evaluations(workdir):
  return [row for row in rows_of(workdir) if row["stage"] == "eval"]


def arrays(workdir, arm="r2m", step=4):
  saved = checkpoint.open_checkpoints(workdir / "checkpoints" / arm)
  leaves = jax.tree.leaves(saved.restore(step))
  keys = [jax.dtypes.issubdtype(x.dtype, jax.dtypes.prng_key) for x in leaves]
  return [
    np.asarray(jax.random.key_data(x) if key else x).tobytes() for x, key in zip(leaves, keys)
  ]


@pytest.fixture(scope="module")
def whole(models, tmp_path_factory):
  """An uninterrupted run, with the rows of each of its evaluations."""
  workdir, seen = tmp_path_factory.mktemp("whole") / "run", []
  original = evaluation.columns_of

  def recording(sequences, kl, scores):
    seen.append((sequences, original(sequences, kl, scores)))
    return seen[-1][1]

  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(evaluation, "columns_of", recording)
    folders.run(settings(models), workdir)
  return workdir, seen


def test_every_number_is_what_transformers_gives(models, whole):
  """KL from the logits of both policies, scores of both reward models for texts rendered by hand."""
  workdir, seen = whole
  assert [row["step"] for row in evaluations(workdir)] == [0, 2, 4] and len(seen) == 3
  assert seen[0][1]["kl"] == pytest.approx(np.zeros(5), abs=1e-5)
  hf = transformers.AutoTokenizer.from_pretrained(models / "policy")
  ends = [hf.eos_token_id, hf.convert_tokens_to_ids("<|im_end|>")]
  load = transformers.AutoModelForCausalLM.from_pretrained
  policy, base = load(workdir / "export/policy"), load(models / "policy")
  sequences, columns = seen[-1]
  T = sequences.response_mask.shape[1]
  texts = []
  for i in range(5):
    ids = sequences.tokens[i][sequences.token_mask[i]].tolist()
    n = int(sequences.response_mask[i].sum())
    with torch.no_grad():
      p, q = (torch.log_softmax(m(torch.tensor([ids])).logits[0], -1) for m in (policy, base))
    kl = sum(
      float((p[t].exp() * (p[t] - q[t])).sum()) for t in range(len(ids) - n - 1, len(ids) - 1)
    )
    assert columns["kl"][i] == pytest.approx(kl, rel=1e-3, abs=1e-5)
    tokens = sequences.tokens[i, -T:][:n].tolist()
    done = tokens[-1] in ends
    assert columns["length"][i] == n and columns["truncated"][i] == (not done)
    texts.append((hf.decode(tokens[:-1] if done else tokens, skip_special_tokens=True), done))
  assert columns["kl"].min() > 1e-3  # the policy has moved
  asked = [row["prompt"] for row in read_jsonl(workdir / follow.SAMPLES)][-5:]
  assert sorted(asked) == sorted(HELD)  # one copy of a repeated prompt, and none that is trained on
  theirs = transformers.AutoTokenizer.from_pretrained(models / "reward")
  by_hand = [
    f"<s><|start|>user<|stop|>{prompt}<|eot|><|start|>assistant<|stop|>"
    + (text.strip() + "<|eot|>" if done else text.lstrip())
    for prompt, (text, done) in zip(asked, texts)
  ]
  ids = [theirs(text, add_special_tokens=False)["input_ids"] for text in by_hand]
  judge = transformers.AutoModelForSequenceClassification.from_pretrained
  want = their_scores(judge(models / "reward"), ids)
  np.testing.assert_allclose(columns["frozen"], want, rtol=1e-4, atol=1e-5)
  plain = transformers.AutoTokenizer.from_pretrained(models / "gold")
  ids = [plain(f"{prompt} {text}")["input_ids"] for prompt, (text, _) in zip(asked, texts)]
  want = their_scores(judge(models / "gold"), ids)
  np.testing.assert_allclose(columns["gold"], want, rtol=1e-4, atol=1e-5)
  row = evaluations(workdir)[-1]
  for name, values in columns.items():
    assert row[name] == pytest.approx(values.mean(), rel=1e-6, abs=1e-9)
    assert row[f"{name}_low"] <= row[name] <= row[f"{name}_high"]


def test_evaluation_changes_nothing_of_the_training(models, whole, tmp_path):
  """Against the same run without evaluations: every array and every row of the steps are equal."""
  folders.run(settings(models, eval__every=0, eval__gold__path=""), tmp_path / "off")
  assert arrays(tmp_path / "off") == arrays(whole[0])
  assert rows_of(tmp_path / "off") == [row for row in rows_of(whole[0]) if row["stage"] == "rl"]


@pytest.mark.parametrize(
  "how", ["signal", pytest.param("killed before the save", marks=pytest.mark.long)]
)
def test_a_resumed_run_equals_the_unbroken_one(models, whole, tmp_path, monkeypatch, how):
  workdir, made, original = tmp_path / "broken", [], follow.Watch.values_at
  stop_at = 2 if how == "signal" else 4

  def counting(self, state, step, *, due):
    made.extend([step] if due else [])
    values = original(self, state, step, due=due)
    if due and step == stop_at and made.count(step) == 1:
      if how == "signal":
        os.kill(os.getpid(), signal.SIGTERM)
      else:
        raise RuntimeError("killed")
    return values

  monkeypatch.setattr(follow.Watch, "values_at", counting)
  with pytest.raises((loop.Interrupted, RuntimeError)), loop.signals_end_the_run():
    folders.run(settings(models), workdir)
  folders.run(settings(models), workdir)
  assert made == ([0, 2, 4] if how == "signal" else [0, 2, 4, 4])
  assert rows_of(workdir) == rows_of(whole[0])
  assert arrays(workdir) == arrays(whole[0])
  files = [path / follow.SAMPLES for path in (workdir, whole[0])]
  assert files[0].read_bytes() == files[1].read_bytes()


@pytest.mark.long
def test_an_evaluation_is_the_same_on_a_mesh_with_adapters(models, tmp_path):
  """Eight devices against one, with LoRA. Five prompts are not divisible by four shards."""
  found = []
  for mesh in ((1, 1, 1), (2, 2, 2)):
    cfg = settings(models, mesh=mesh, lora__rank=2, rollout__prompts=4, variant="vanilla")
    laid = folders.mesh_of(cfg)
    policy = folders.load_policy(cfg.policy.path, cfg, laid)
    reward = folders.load_reward(cfg.reward.path, cfg, laid)
    built = folders.build_lora(cfg, laid, arch=policy.arch, reward_arch=reward.arch)
    state = folders.start_state(cfg, built, policy, reward, donate=False)
    moved = jax.tree.map(lambda x: x + 0.05, state.policy)  # new adapters change nothing
    held = datasets.HeldOut(HELD, [policy.tokenizer.render(prompt) for prompt in HELD])
    gold = evaluation.load_gold(cfg, laid)
    parts = (cfg, built, policy, reward.renderer, held, gold, folders.prompt_text)
    found.append(evaluation.make_evaluate(*parts)(state.replace(policy=moved)))
  one, eight = found
  assert [row["response"] for row in one.samples] == [row["response"] for row in eight.samples]
  assert one.values["kl"] > 1e-3 and one.values == pytest.approx(eight.values, rel=1e-3, abs=1e-4)


def test_the_gold_task_is_evaluated_by_its_own_gold(smallest_run, tmp_path):
  """Gold is recomputed from the words of the written samples. No prompt is used in training."""
  shutil.copytree(smallest_run[0] / "stages", tmp_path / "run/stages")
  cfg = quickstart.get_config("test")
  cfg.variant, cfg.eval.every, cfg.eval.prompts, cfg.log.samples = "vanilla", 2, 8, 8
  gold.run(cfg, tmp_path / "run")
  rows, samples = evaluations(tmp_path / "run"), read_jsonl(tmp_path / "run" / follow.SAMPLES)
  assert [row["step"] for row in rows] == [0, 2, 4] and len(samples) == 24
  words = {word: i for i, word in enumerate(goldtask.WORDS)}
  prompts, answers = (
    [[words[word] for word in row[key].split()] for row in samples]
    for key in ("prompt", "response")
  )
  width = max(map(len, answers))
  mask = np.arange(width) < np.array([[len(row)] for row in answers])
  tokens = np.zeros((24, goldtask.PROMPT_LENGTH + width), np.int32)
  for line, prompt, answer in zip(tokens, prompts, answers):
    line[: len(prompt)], line[len(prompt) : len(prompt) + len(answer)] = prompt, answer
  asked = np.ones((24, goldtask.PROMPT_LENGTH), bool)
  ended = np.array([not row["truncated"] for row in samples])
  sequences = Sequences(tokens, np.concatenate([asked, mask], 1), mask, ended)
  by_hand = goldtask.gold(sequences).gold.reshape(3, 8)
  assert [row["gold"] for row in rows] == pytest.approx(by_hand.mean(1))
  assert rows[0]["kl"] == pytest.approx(0, abs=1e-5) and rows[2]["kl"] > 0


# ---- early stopping ----


def test_a_run_stopped_at_a_kl_exports_and_is_not_trained_further(models, tmp_path, capsys):
  cfg = settings(models, stop__kl=1.0, log__checkpoint_every=4, eval__every=4)
  folders.run(cfg, tmp_path / "run")
  rows = rows_of(tmp_path / "run")
  kls = [row["kl"] for row in rows if row["stage"] == "rl"]
  end = len(kls)
  assert end < 4 and kls[-1] >= 1 and max(kls[:-1]) < 1
  assert [row["step"] for row in rows if row["stage"] == "eval"] == [0, end]  # also the last state
  why = f"stop     r2m ends at step {end} of 4: at step {end - 1} the KL was"
  assert why in capsys.readouterr().out
  assert (tmp_path / "run/export/policy/config.json").exists()
  before = arrays(tmp_path / "run", step=end)
  folders.run(cfg, tmp_path / "run")
  assert why in capsys.readouterr().out
  assert rows_of(tmp_path / "run") == rows and arrays(tmp_path / "run", step=end) == before


def watch_of(cfg, tmp_path, golds, frozen=None):
  """A watch whose evaluations have these values."""
  values = iter(zip(golds, frozen or golds))

  def evaluate(state):
    del state
    gold, proxy = next(values)
    names = ("gold", "frozen", "kl", "length", "truncated", "repetition")
    found = dict(zip(names, (gold, proxy, 0.0, 1.0, 0.0, 0.0)))
    ends = {f"{name}{end}": value for name, value in found.items() for end in ("_low", "_high")}
    return evaluation.Evaluation(found | ends, [])

  return follow.Watch(cfg, tmp_path, evaluate)


def steps_until_stop(watch, steps):
  """The step at which the watch ends a run, or None."""
  seen = watch(None, 0, None)
  for step in range(1, steps + 1):
    if seen.stop:
      return step - 1
    seen = watch(None, step, {"kl": 0.0})
  return steps if seen.stop else None


@pytest.mark.parametrize(
  ("golds", "mode", "end"),
  [
    ([1, 2, 3, 4, 5, 6], "max", None),
    ([1, 2, 3, 3, 2, 9], "max", 4),  # an equal value is no gain
    ([3, 2, 1, 9, 9, 9], "min", 4),
    ([1, math.nan, math.nan, 5, 5, 5], "max", 2),
    ([0, math.nan, 2, 1, 3, 3], "max", None),
  ],
)
def test_patience_counts_evaluations_without_a_gain(tmp_path, golds, mode, end):
  changes = dict(eval__every=1, stop__patience=2, steps=5, checkpoint__best_mode=mode)
  cfg = config(**changes, checkpoint__best_metric="eval/gold")
  assert steps_until_stop(watch_of(cfg, tmp_path, golds), 5) == end


# ---- the alarm ----


def test_the_alarm_is_printed_once(tmp_path, capsys):
  rise, fall = [float(i) for i in range(15)], [10 - abs(i - 8.0) for i in range(15)]
  cfg = config(eval__every=1, steps=14)
  watch = watch_of(cfg, tmp_path, fall, rise)
  assert steps_until_stop(watch, 14) is None
  lines = [line for line in capsys.readouterr().out.splitlines() if "ALARM" in line]
  assert len(lines) == 1 and "proxy up, gold down since step 8" in lines[0]
  watch = watch_of(cfg, tmp_path, fall, [-x for x in rise])  # the proxy falls together with gold
  assert steps_until_stop(watch, 14) is None and "ALARM" not in capsys.readouterr().out


# ---- prompts and settings ----


def test_prompts_are_set_aside_by_the_seed_and_never_trained_on(models, tmp_path):
  rows = [{"prompt": p} for p in [*PROMPTS, PROMPTS[0], PROMPTS[3]]]
  path = write(tmp_path / "twice.jsonl", rows)
  policy = folders.load_policy(str(models / "policy"), config())
  held = []
  for seed in (0, 0, 1):
    changes = dict(data__name=path, eval__data="", eval__prompts=3, rollout__prompts=2, seed=seed)
    cfg = settings(models, **changes)
    data = datasets.prompt_data(cfg, policy.tokenizer, tmp_path / f"w{len(held)}")
    found = datasets.evaluation_prompts(cfg, policy.tokenizer, tmp_path, data)
    assert len(set(found.prompts)) == 3 and not set(found.prompts) & set(data.prompts)
    assert set(found.prompts) | set(data.prompts) == set(PROMPTS)
    held.append(found.prompts)
  assert held[0] == held[1] != held[2]
  cfg = settings(models, data__name=path, eval__data="", eval__prompts=7)
  with pytest.raises(ConfigError, match="config.eval.prompts is 7: more than the 6 rows"):
    datasets.prompt_data(cfg, policy.tokenizer, tmp_path / "few")
  cfg = settings(models, data__name=path, eval__data="", eval__prompts=5, rollout__prompts=4)
  left = (
    r"is 4: more than the \d rows of config.data.name that config.eval.prompts = 5 leaves; make"
  )
  with pytest.raises(ConfigError, match=left):
    datasets.prompt_data(cfg, policy.tokenizer, tmp_path / "fewer")


def test_repetition_by_hand():
  assert evaluation.repetition([1, 2, 3]) == 0 and evaluation.repetition(range(9)) == 0
  assert evaluation.repetition([7] * 8) == pytest.approx(4 / 5)  # 5 grams, one of them new
  assert evaluation.repetition([1, 2, 3, 4] * 2) == pytest.approx(1 / 5)


@pytest.mark.parametrize(
  ("changes", "message"),
  [
    (dict(eval__gold__path="reward"), "config.eval.gold.path is .*: that is the reward model that"),
    (dict(eval__every=0), "config.eval.every is 0: config.eval.gold.path is measured every so"),
    (
      dict(checkpoint__keep_best=1, checkpoint__best_metric="eval/reward"),
      "config.checkpoint.best_metric is 'eval/reward': choose one of eval/gold, eval/frozen",
    ),
    (
      dict(stop__patience=2, checkpoint__best_metric="eval/gold", eval__gold__path=""),
      "gold is measured if config.eval.gold.path names a second reward model",
    ),
    (
      dict(stop__patience=2, checkpoint__best_metric="reward/used"),
      "config.stop.patience is 2: it counts evaluations: name one of eval/gold",
    ),
    (
      dict(task="lab", eval__every=0, eval__gold__path="", stop__kl=2.0),
      "config.stop.kl is 2.0: the laboratory compares runs of one",
    ),
  ],
)
def test_settings_that_cannot_work_are_refused(models, changes, message):
  changes = {key: str(models / x) if x == "reward" else x for key, x in changes.items()}
  with pytest.raises(ConfigError, match=message):
    check_config(settings(models, **changes))


def test_a_gold_model_must_be_a_reward_model(models, tmp_path):
  cfg = settings(models, eval__gold__path=str(models / "policy"))
  with pytest.raises(FolderError, match="config.eval.gold.path is .*it holds no score head"):
    folders.run(cfg, tmp_path / "run")


def test_a_gold_model_with_nan_is_told_before_the_first_step(tmp_path):
  watch = watch_of(config(eval__every=1, steps=5), tmp_path, [math.nan, 1.0])
  with pytest.raises(follow.NotFinite, match="no finite value of gold.*config.eval.gold.path"):
    watch(None, 0, None)
  watch = watch_of(config(eval__every=1, steps=5), tmp_path, [1.0, math.nan])
  watch(None, 0, None)
  assert math.isnan(watch(None, 1, {"kl": 0.0}).values["gold"])  # not special later on


def test_patience_in_a_fork_that_adds_gold():
  rows = [{"step": 0, "frozen": 1.0}, *({"step": t, "gold": x} for t, x in ((1, 3.0), (2, 2.0)))]
  best, waited = follow.best_so_far(rows, "gold", config())
  assert best["step"] == 1 and waited == 1


def test_the_optimised_reward_as_the_best_metric_gets_a_warning(models, capsys):
  for metric, warned in (("", False), ("eval/gold", False), ("reward/used", True)):
    changes = dict(checkpoint__keep_best=1, checkpoint__best_metric=metric)
    loop.warn_of_best(settings(models, **changes))
    text = capsys.readouterr().err
    assert ("the reward that this run optimises" in text) == warned, metric
  assert json.dumps(loop.Seen().values) == "{}"
