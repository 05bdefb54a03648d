"""A reward model that reads the policy's own tokens in a run from folders: one program, the numbers of
two. Oracles: transformers' templates and scores, and the run by text.
"""

import contextlib
import io
import itertools
import json
import signal

import jax
import numpy as np
import pytest
import safetensors.numpy
import small as small_run
import tiny_text
import tokenizers
import transformers
from test_serve import config, their_scores, write
from tokenizers import decoders, models, pre_tokenizers

from r2m_jax.config import ConfigError, check_config
from r2m_jax.data.text import bucket
from r2m_jax.hf.folders import load_policy, load_reward, mesh_of
from r2m_jax.run import loop
from r2m_jax.run.metrics import read_metrics, without_clock
from r2m_jax.tasks import folders as folders_task
from r2m_jax.tasks import replay

END = "<|im_end|>"
LETTERS = "abcdefghijklmnopqrstuvwxyz:."
# after an answer comes END and one more token, as the newline of ChatML
PLAIN = (
  "{% for m in messages %}{{ m['role'] + ':' + m['content'] + '<|im_end|>.' }}{% endfor %}"
  "{% if add_generation_prompt %}{{ 'assistant:' }}{% endif %}"
)


def letters(folder):
  """A tokenizer whose tokens are letters: every sample is written as its text is encoded."""
  vocabulary = {token: i for i, token in enumerate([END, *LETTERS])}
  core = tokenizers.Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
  core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
  core.decoder = decoders.ByteLevel()
  hf = transformers.PreTrainedTokenizerFast(tokenizer_object=core, eos_token=END, pad_token=END)
  hf.chat_template = PLAIN
  hf.save_pretrained(folder)


@pytest.fixture(scope="module")
def root(tmp_path_factory):
  """Two pairs of models with one tokenizer each: of letters, and one with merges and ChatML."""
  root = tmp_path_factory.mktemp("models")
  sizes = dict(vocab_size=len(LETTERS) + 1, eos_token_id=0, bos_token_id=None)
  for name, kwargs in (("policy", {}), ("reward", dict(classifier=True, hidden_size=48, seed=1))):
    tiny_text.hf_models.make("qwen2", root / f"letters_{name}", **sizes, **kwargs)
    letters(root / f"letters_{name}")
    tiny_text.model("qwen2", "chatml", root / f"chatml_{name}", **kwargs)
  return root


def asks(*texts):
  return [[{"role": "user", "content": text}] for text in texts]


def settings(root, tmp_path, kind="letters", **overrides):
  rows = [{"prompt": ask} for ask in asks("thecat", "asea", "whoran", "rain")]
  given = dict(
    task="r2m",
    policy__path=str(root / f"{kind}_policy"),
    reward__path=str(root / f"{kind}_reward"),
    reward__input="tokens",
    data__name=write(tmp_path / "rows.jsonl", rows),
    steps=2,
    rollout__prompts=2,
    rollout__group_size=4,
    rollout__max_new_tokens=6,
    log__samples=2,
    log__checkpoint_every=1,
    r2m__attention_dim=16,
    r2m__num_heads=2,
    policy__lr=1e-3,
    r2m__lr=1e-2,
    export__check=False,
  )
  cfg = config(**(given | overrides))
  check_config(cfg)
  return cfg


def outputs_of(cfg, workdir):
  """[(StepOutput on the host, what the step gave beside it)] of a run."""
  with small_run.recorded_steps(folders_task, "make_folder_step") as seen:
    folders_task.run(cfg, workdir)
  return seen


CASES = {
  "r2m": dict(),
  "remax-own_states": dict(
    algorithm="remax", variant="own_states", packing=(0.8, 1.0), ppo__accumulation=2
  ),
}


@pytest.mark.numerics
@pytest.mark.parametrize(
  "case", [name if name == "r2m" else pytest.param(name, marks=pytest.mark.long) for name in CASES]
)
def test_one_program_gives_the_numbers_of_two(case, root, tmp_path):
  """In float64, on samples whose text is encoded to the tokens that were sampled."""
  with jax.enable_x64(True):
    both = {
      how: outputs_of(
        settings(root, tmp_path, reward__input=how, **CASES[case], **small_run.FLOAT64),
        tmp_path / how,
      )
      for how in ("text", "tokens")
    }
  text, tokens = ([out for out, _ in both[how]] for how in ("text", "tokens"))
  small_run.same_tokens(tokens, text)
  ended = np.concatenate([out.sequences.has_eos for out in tokens])
  assert ended.any() and not ended.all()
  found, exact = map(small_run.metrics_of, (tokens, text))
  found.pop("metric learn/computed", None)
  exact.pop("metric learn/computed", None)
  for name in ("rte", "scores", "scores_frozen"):
    found[name], exact[name] = (
      np.stack([getattr(out.judged, name) for out in each]) for each in (tokens, text)
    )
  small_run.equal_in_float64(found, exact)
  mine, theirs = (
    safetensors.numpy.load_file(tmp_path / how / "export/policy/model.safetensors")
    for how in ("tokens", "text")
  )
  for name, x in theirs.items():
    np.testing.assert_allclose(mine[name], x, atol=1e-7, err_msg=name)


@pytest.fixture(scope="module")
def merged_run(root, tmp_path_factory):
  """A run by tokens whose samples are seldom written as their text would be encoded: (config,
  workdir, `outputs_of`, its steps, what it printed).
  """
  tmp_path = tmp_path_factory.mktemp("merged")
  cfg = settings(root, tmp_path, "chatml", reward__input="auto")
  traced, original = [], folders_task.make_step

  def counted(*args):
    traced.append(original(*args))
    return traced[-1]

  shown = io.StringIO()
  with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(shown):
    patch.setattr(folders_task, "make_step", counted)
    seen = outputs_of(cfg, tmp_path / "run")
  return cfg, tmp_path / "run", seen, traced, shown.getvalue()


def test_the_reward_model_reads_what_was_sampled(merged_run, root):
  """Each frozen score is that of transformers for prompt, sampled tokens and the template's end."""
  _, workdir, seen, traced, shown = merged_run
  hf = transformers.AutoTokenizer.from_pretrained(root / "chatml_reward")
  model = transformers.AutoModelForSequenceClassification.from_pretrained(root / "chatml_reward")
  ending = hf(f"{END}\n", add_special_tokens=False)["input_ids"]
  recoded = []
  for out, prompts in seen:
    T, rows = out.sequences.response_mask.shape[1], []
    for i, prompt in enumerate(prompts):
      tokens = out.sequences.tokens[i, -T:][out.sequences.response_mask[i]].tolist()
      cut = not out.sequences.has_eos[i]
      asked = hf.apply_chat_template(prompt, add_generation_prompt=True)["input_ids"]
      rows.append(asked + (tokens if cut else tokens[:-1] + ending))
      text = hf.decode(tokens if cut else tokens[:-1], skip_special_tokens=True)
      recoded.append(
        hf(text, add_special_tokens=False)["input_ids"] != tokens[: None if cut else -1]
      )
    np.testing.assert_allclose(out.judged.scores_frozen, their_scores(model, rows), atol=1e-4)
  assert any(recoded)
  assert f"the text of {sum(recoded[:8])} of 8 samples would be encoded to other tokens" in shown
  assert [step._cache_size() for step in traced] == [1]
  rows = read_metrics(workdir)
  assert all("seconds/render" not in row and row["seconds/learn"] > 0 for row in rows)


@pytest.mark.long
def test_a_sample_read_by_tokens_is_made_again(merged_run, capsys):
  cfg, workdir, seen, *_ = merged_run
  found = replay.run(config(task="replay", replay__step=1, replay__prompt=1), workdir)
  out, row = seen[1][0], cfg.rollout.group_size
  assert found["frozen"] == pytest.approx(float(out.judged.scores_frozen[row]), rel=1e-6)
  assert found["reward_reads"].endswith(f"{END}\n" if out.sequences.has_eos[row] else "")
  assert "largest difference 0.0e+00" in capsys.readouterr().out


@pytest.mark.long
def test_a_run_by_tokens_resumes_bit_for_bit(merged_run, tmp_path):
  cfg, whole, *_ = merged_run

  def stop(t, output, rows):
    assert len(rows) == 8 and {len(row) for row in rows} == {3}
    signal.raise_signal(signal.SIGTERM)
    return {}

  mesh = folders_task.begin(cfg, tmp_path)
  with pytest.raises(loop.Interrupted), loop.signals_end_the_run():
    folders_task.run_r2m(cfg, tmp_path, mesh, watch=stop)
  folders_task.run(cfg, tmp_path)
  for model in ("policy", "reward"):
    name = f"export/{model}/model.safetensors"
    assert (tmp_path / name).read_bytes() == (whole / name).read_bytes()
  once, twice = ([without_clock(row) for row in read_metrics(of)] for of in (whole, tmp_path))
  assert twice == once


@pytest.mark.parametrize("how", ["text", pytest.param("tokens", marks=pytest.mark.long)])
def test_a_run_with_three_shares_compiles_four_programs_each_once(how, root, tmp_path, monkeypatch):
  """The shares are used in turn: with rows this short each of them holds every token. By text, the
  longest rows of the steps are of two padded lengths.
  """
  sizes = dict(rollout__prompts=1, rollout__max_new_tokens=3, packing=(0.98, 0.99, 1.0), steps=6)
  cfg = settings(root, tmp_path, reward__input=how, variant="vanilla", **sizes)
  made, programs, lengths = folders_task.make_folder_step, [], []
  shares = itertools.cycle(range(3))

  def counted(*args):
    step = made(*args)

    def call(*given):
      with small_run.compiled_programs() as names:
        result = step(*given)
      programs.extend(names)
      return result

    return call

  def seen(length):
    lengths.append(bucket(length))
    return lengths[-1]

  monkeypatch.setattr(folders_task, "make_folder_step", counted)
  monkeypatch.setattr(folders_task, "smallest", lambda *_: next(shares))
  monkeypatch.setattr(folders_task, "bucket", seen)
  folders_task.run(cfg, tmp_path / "run")
  used = [row["learn/computed"] for row in read_metrics(tmp_path / "run")]
  np.testing.assert_allclose(used, cfg.packing * 2)
  if how == "text":
    assert len(lengths) == 7 and len(set(lengths[1:])) == 2
  drawn = "drawn_and_needed" if how == "text" else "drawn_and_read"
  assert sorted(programs) == [f"jit({name})" for name in (drawn, "learn", "learn", "learn")]


def test_models_that_render_differently_are_read_by_text_or_refused(root, tmp_path, capsys):
  auto = settings(root, tmp_path, reward__path=str(root / "chatml_reward"), reward__input="auto")
  mesh = mesh_of(auto)
  policy, reward = load_policy(auto.policy.path, auto), load_reward(auto.reward.path, auto)
  data = folders_task.prompt_data(auto, policy.tokenizer, tmp_path)
  assert folders_task.as_it_reads(auto, policy, reward, data) is reward
  assert "rewards  by text, rendered for the reward model: its tokenizer is not" in (
    capsys.readouterr().out
  )
  auto.reward.input = "tokens"
  with pytest.raises(ConfigError, match="reward.input is 'tokens'.*tokenizer is not the policy's"):
    next(folders_task.runs(auto, tmp_path, mesh))
  served = dict(reward__path="", reward__url="http://localhost:1", variant="vanilla")
  with pytest.raises(ConfigError, match="config.reward.input is 'tokens': a reward from outside"):
    settings(root, tmp_path, **served)
  assert json.loads((tmp_path / "r2m_renderer.json").read_text())["format"] == 1
