"""Runs with a model like Qwen3 and its template: thinking off, a system prompt, and reasoning that
the reward does not read. Oracle: templates and scores of transformers.
"""

import numpy as np
import pytest
import small as small_run
import tiny_text
import torch
import transformers
from test_serve import config, read, their_scores, write

from r2m_jax import main
from r2m_jax.hf.folders import RENDERER, FolderError, load_reward
from r2m_jax.run.files import read_json
from r2m_jax.tasks import folders as folders_task
from r2m_jax.tasks import serve

OFF = {"enable_thinking": False}
SYSTEM = {"role": "system", "content": "Be brief."}
ASKS = [[{"role": "user", "content": text}] for text in ("What is the sea?", "Who ran?")]
# possible samples, (text, truncated), and the parts that the reward reads
SAMPLED = [
  ("It is blue.", False, "It is blue."),
  ("<think>\nrain\n</think>\n\nIt is blue.", False, "It is blue."),
  ("rain\n</think>\n\nThe dog", True, "The dog"),
  ("<think>\nrain and", True, ""),
]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
  """A policy and a reward model with the template of Qwen3."""
  root = tmp_path_factory.mktemp("models")
  for name, kwargs in (("policy", {}), ("reward", dict(classifier=True))):
    tiny_text.model("qwen3", "chatml", root / name, vocab_size=304, **kwargs)
    tiny_text.thinking_tokenizer(tiny_text.QWEN3, root / name)
  return root


def settings(folders, rows, tmp_path, **more):
  return config(
    policy__path=str(folders / "policy"),
    reward__path=str(folders / "reward"),
    data__name=write(tmp_path / "rows.jsonl", rows),
    policy__chat_template_args=OFF,
    policy__system_prompt="Be brief.",
    steps=2,
    rollout__prompts=2,
    rollout__group_size=2,
    rollout__max_new_tokens=6,
    sft__batch_size=2,
    sft__steps=2,
    sft__warmup_steps=0,
    r2m__attention_dim=16,
    **more,
  )


def rendered(folders, messages, **kwargs):
  hf = transformers.AutoTokenizer.from_pretrained(folders / "policy")
  return hf.apply_chat_template([SYSTEM, *messages], **kwargs)["input_ids"]


@pytest.fixture(scope="module")
def supervised(folders, tmp_path_factory):
  """Two updates of SFT with thinking off, on answers with and without reasoning."""
  tmp_path = tmp_path_factory.mktemp("sft")
  answers = ("It is blue.", "<think>\nrain\n</think>\n\nIt is blue.")
  rows = [{"prompt": ask, "response": answer} for ask, answer in zip(ASKS, answers)]
  folders_task.run(settings(folders, rows, tmp_path, task="sft"), tmp_path / "run")
  return tmp_path / "run"


def test_sft_with_thinking_off_ends_with_a_policy(supervised, folders):
  log = [row for row in read(supervised / "metrics.jsonl") if row["stage"] == "sft"]
  assert len(log) == 2 and all(np.isfinite(row["loss"]) for row in log)
  model = transformers.AutoModelForCausalLM.from_pretrained(supervised / "export/policy")
  hf = transformers.AutoTokenizer.from_pretrained(supervised / "export/policy")
  assert model.config.model_type == "qwen3" and hf.chat_template == tiny_text.QWEN3


def generate(folder, tmp_path, **more):
  cfg = config(
    task="generate",
    policy__path=str(folder),
    policy__chat_template_args=OFF,
    policy__system_prompt="Be brief.",
    generate__input=write(tmp_path / "in.jsonl", [{"prompt": ask} for ask in ASKS]),
    generate__output=str(tmp_path / "out.jsonl"),
    generate__max_new_tokens=5,
    **{f"generate__{name}": value for name, value in more.items()},
  )
  serve.run(cfg)
  return read(tmp_path / "out.jsonl")


def test_several_samples_of_each_prompt(supervised, folders, tmp_path):
  """Each prompt has n rows with their index. They depend only on the seed."""
  policy = supervised / "export/policy"
  rows = generate(policy, tmp_path, n=3, seed=7)
  assert [(row["prompt"], row["sample"]) for row in rows] == [
    (ask, i) for ask in ASKS for i in range(3)
  ]
  prompts = [rendered(folders, ask, add_generation_prompt=True, **OFF) for ask in ASKS]
  assert [row["prompt_tokens"] for row in rows] == [p for p in prompts for _ in range(3)]
  assert len({tuple(row["tokens"]) for row in rows}) == 6  # each row has its own noise
  again = generate(policy, tmp_path, n=3, seed=7, batch_size=3)
  other = generate(policy, tmp_path, n=3, seed=8)
  tokens, same, different = ([row["tokens"] for row in found] for found in (rows, again, other))
  assert tokens == same != different
  single = generate(policy, tmp_path, seed=7)
  assert [row["tokens"] for row in single] == tokens[::3] and "sample" not in single[0]


@pytest.mark.parametrize("cut", [dict(top_k=3), dict(top_p=0.3), dict(min_p=0.5)])
def test_truncated_sampling_is_that_of_transformers(supervised, folders, tmp_path, cut):
  """Every token is kept by transformers' filter, and has the log-probability of the filtered
  distribution.
  """
  policy = supervised / "export/policy"
  rows = generate(policy, tmp_path, n=2, temperature=0.7, **cut)
  model = transformers.AutoModelForCausalLM.from_pretrained(policy)
  ((name, value),) = cut.items()
  warper = {
    "top_k": transformers.TopKLogitsWarper,
    "top_p": transformers.TopPLogitsWarper,
    "min_p": transformers.MinPLogitsWarper,
  }[name](value)
  for row in rows:
    ids = torch.tensor([row["prompt_tokens"] + row["tokens"]])
    with torch.no_grad():
      logits = model(ids).logits[0, len(row["prompt_tokens"]) - 1 : -1] / 0.7
    left = torch.log_softmax(warper(None, logits), -1)
    want = left[torch.arange(len(row["tokens"])), torch.tensor(row["tokens"])]
    np.testing.assert_allclose(row["logprobs"], want, atol=1e-4)


@pytest.fixture(scope="module")
def r2m_run(folders, tmp_path_factory):
  """Two R2M steps whose samples are replaced by the texts in SAMPLED. Every output is recorded."""
  tmp_path = tmp_path_factory.mktemp("r2m")
  cfg = settings(
    folders,
    [{"prompt": ask} for ask in ASKS],
    tmp_path,
    reward__chat_template_args=OFF,
    reward__system_prompt="Be brief.",
    reward__strip_thinking=True,
  )

  def texts(sequences, tokenizer):
    return [SAMPLED[i % len(SAMPLED)][:2] for i in range(len(sequences.tokens))]

  recorded = small_run.recorded_steps(folders_task, "make_two_part_step")
  with pytest.MonkeyPatch.context() as patch, recorded as seen:
    patch.setattr(folders_task, "responses_of", texts)
    folders_task.run(cfg, tmp_path / "run")
  return cfg, tmp_path / "run", seen


def test_the_reward_reads_what_transformers_renders_without_reasoning(r2m_run, folders):
  """The length counts all tokens, including reasoning."""
  _, _, seen = r2m_run
  model = transformers.AutoModelForSequenceClassification.from_pretrained(folders / "reward")
  assert len(seen) == 2
  for out, rows in seen:
    by_hand = []
    for (prompt, text, cut), (_, _, answer) in zip(rows, SAMPLED):
      assert (text, cut) in [case[:2] for case in SAMPLED]
      turn = [*prompt, {"role": "assistant", "content": answer}]
      if not answer:
        by_hand.append(rendered(folders, prompt, add_generation_prompt=True, **OFF))
      else:
        by_hand.append(rendered(folders, turn, continue_final_message=cut, **OFF))
    np.testing.assert_allclose(out.judged.scores_frozen, their_scores(model, by_hand), atol=1e-4)
    tokens = out.sequences.response_mask.sum(1)
    assert tokens.min() >= 1 and out.metrics["length"] == pytest.approx(tokens.mean())


def test_a_checkpoint_is_exported_by_its_own_settings(r2m_run, tmp_path):
  """By the table of tasks, as on the command line. The config of the export has none of the
  settings.
  """
  _, workdir, _ = r2m_run
  asking = config(
    task="export",
    export__checkpoint=str(workdir),
    export__out=str(tmp_path / "out"),
    export__check=False,
  )
  asking.lock()
  main.TASKS["export"](asking)(asking, tmp_path / "unused")
  for name in (RENDERER, "r2m_head.safetensors"):
    first = (workdir / "export/reward" / name).read_bytes()
    assert (tmp_path / "out/reward" / name).read_bytes() == first
  assert not (tmp_path / "unused").exists()


def test_an_export_is_read_as_it_was_trained(r2m_run, tmp_path):
  """No setting is given. The policy must be rendered as in training."""
  cfg, workdir, _ = r2m_run
  export = workdir / "export"
  contract = read_json(export / "reward" / RENDERER)
  assert contract["strip_thinking"] and contract["system_prompt"] == "Be brief."
  assert contract["policy"] == {"chat_template_args": OFF, "system_prompt": "Be brief."}
  rows = [{"prompt": ask, "response": SAMPLED[i][0]} for i, ask in enumerate(ASKS)]
  scoring = config(
    task="score",
    reward__path=str(export / "reward"),
    policy__path=str(export / "policy"),
    policy__chat_template_args=OFF,
    policy__system_prompt="Be brief.",
    score__input=write(tmp_path / "in.jsonl", rows),
    score__output=str(tmp_path / "out.jsonl"),
  )
  ours = load_reward(str(export / "reward"), scoring).renderer
  trained = load_reward(cfg.reward.path, cfg).renderer
  for row in rows:
    assert ours.ids(row["prompt"], row["response"]) == trained.ids(row["prompt"], row["response"])
  serve.run(scoring)
  assert np.isfinite([row["score"] for row in read(tmp_path / "out.jsonl")]).all()
  scoring.policy.system_prompt = ""
  with pytest.raises(
    FolderError, match="were rendered with .*'Be brief.'.*as they were in training"
  ):
    serve.run(scoring)
