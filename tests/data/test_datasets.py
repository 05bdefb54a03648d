"""From rows to the arrays a model trains on. Oracle: transformers' tokenizer and chat template, one
row at a time.
"""

import collections
import json
import types

import numpy as np
import pytest
import tiny_text
from test_data import SAID, TALK, USER, lines

from configs import default
from r2m_jax.data import datasets
from r2m_jax.data.jsonl import DataError
from r2m_jax.data.text import Renderer, TextError, load_tokenizer

WORDS = "the cat sat on a mat and dog ran after it".split()


@pytest.fixture(scope="module")
def model(tmp_path_factory):
  """(tokenizer of transformers, a policy and a reward model that consist of this tokenizer)."""
  folder = tmp_path_factory.mktemp("tokenizer")
  hf, tokenizer = tiny_text.tokenizer("chatml", folder), load_tokenizer(folder)
  return hf, types.SimpleNamespace(tokenizer=tokenizer, folder=folder, renderer=Renderer(tokenizer))


def settings(path, **overrides):
  config = default.get_config()
  config.data.name, config.sft.batch_size, config.reward.batch_size, config.rollout.prompts = (
    str(path),
    4,
    4,
    4,
  )
  config.update_from_flattened_dict(
    {name.replace("__", "."): value for name, value in overrides.items()}
  )
  return config


def demonstrations(path, count=40):
  rng = np.random.default_rng(0)

  def say():
    return " ".join(rng.choice(WORDS, rng.integers(1, 12)))

  prompts = [[USER(say())] if i % 2 else TALK for i in range(count)]
  return lines(
    path, [{"prompt": prompt, "response": f"{say()} {i}"} for i, prompt in enumerate(prompts)]
  )


def ends_of(hf, row):
  """(prompt ids, response ids with the end of turn), from transformers."""
  prompt = hf.apply_chat_template(row["prompt"], add_generation_prompt=True)["input_ids"]
  return prompt, hf(row["response"] + "<|im_end|>", add_special_tokens=False)["input_ids"]


@pytest.mark.parametrize("buckets", [(), (48,)])
def test_sft_batches_hold_the_rows(buckets, model, tmp_path):
  hf, policy = model
  path = demonstrations(tmp_path / "d.jsonl")
  config = settings(path, data__buckets=buckets)
  dataset, collate = datasets.sft_rows(config, policy.tokenizer, tmp_path, "sft")
  want = collections.Counter(str(ends_of(hf, json.loads(line))) for line in open(path))
  got, shapes, t = collections.Counter(), set(), 0
  while sum(got.values()) < 400:
    batch = collate(dataset[t])
    shapes.add(batch["tokens"].shape)
    T = batch["response_mask"].shape[1]
    for tokens, mask, response in zip(batch["tokens"], batch["token_mask"], batch["response_mask"]):
      assert (np.diff(mask.astype(int)) >= 0).all() and (np.diff(response.astype(int)) >= 0).all()
      n = response.sum()
      assert mask[-T:][-n:].all() and n < len(tokens)
      got[str((tokens[mask][:-n].tolist(), tokens[-n:].tolist()))] += 1
    t += 1
  assert set(got) == set(want) and len(want) == 40
  assert len(shapes) == (2 if buckets else 1) and all(rows == 4 for rows, _ in shapes)
  if not buckets:
    assert set(got.values()) == {10}


def test_packed_lines_hold_whole_dialogues_end_to_end(model, tmp_path):
  hf, policy = model
  path = lines(
    tmp_path / "d.jsonl",
    [{"prompt": TALK, "response": f"yes {i}"} for i in range(8)]
    + [{"text": "plain text"}, {"prompt": TALK, "response": "yes 1"}],
  )
  config = settings(
    path, data__max_prompt_length=20, data__max_response_length=12, data__unique=True
  )
  dataset, collate = datasets.packed_lines(config, policy.tokenizer, tmp_path, "lm")
  batch = collate(np.arange(4))
  assert (
    batch["tokens"].shape == (4, 32)
    and batch["token_mask"].all()
    and batch["response_mask"].shape == (4, 31)
  )
  count = 1 + max(max(dataset[t]) for t in range(50))
  text = hf.decode(np.concatenate([collate(np.full(4, i))["tokens"][0] for i in range(count)]))

  def talk(i):
    return hf.apply_chat_template([*TALK, SAID(f"yes {i}")], tokenize=False)

  whole = sum(len(hf(talk(i), add_special_tokens=False)["input_ids"]) for i in range(8))
  whole += len(hf("plain text")["input_ids"]) + 1
  assert count == whole // 32  # a repeated dialogue is kept once
  assert sum(talk(i) in text for i in range(8)) >= 7  # only the last row of the stream may be cut


def test_pairs_are_the_renderers(model, tmp_path):
  hf, reward = model
  rows = [{"prompt": TALK, "chosen": f"yes {i}", "rejected": "no " * (1 + i)} for i in range(9)]
  config = settings(lines(tmp_path / "d.jsonl", rows), data__buckets=(48,))
  dataset, collate, count = datasets.pairs(config, reward.renderer, tmp_path)
  index = dataset[0]
  batch = collate(index)
  assert count == 9
  for side in ("chosen", "rejected"):
    for i, tokens, mask in zip(index, batch[side], batch[f"{side}_mask"]):
      want = hf.apply_chat_template([*TALK, SAID(rows[i][side])])["input_ids"]
      assert tokens[mask].tolist() == want and not mask[: len(mask) - len(want)].any()


def test_what_is_left_out(model, tmp_path, capsys):
  hf, policy = model
  short, long = "yes", " ".join(["yes"] * 40)
  rows = [
    {"prompt": p, "chosen": c, "rejected": "no"}
    for p, c in (
      ("the cat", short),
      ("the dog", long),
      (" ".join(["the"] * 80), short),
      ("the cat", "sat"),
      ("a mat", short),
      ("rain", short),
      ("the sea", short),
    )
  ]
  path = lines(tmp_path / "d.jsonl", rows)
  limits = dict(
    data__max_prompt_length=30, data__max_response_length=500, data__max_chosen_length=20
  )
  data = datasets.prompt_data(
    settings(path, data__unique=True, **limits), policy.tokenizer, tmp_path
  )
  assert data.prompts == [
    "the cat",
    "a mat",
    "rain",
    "the sea",
  ]  # the paper's filter counts for the prompts of RL
  shown = capsys.readouterr().out
  assert "4 of 7 rows for r2m" in shown and "1 dropped: chosen over 20 tokens" in shown
  assert (
    "1 dropped: prompt over 30 tokens" in shown and "1 dropped: the same as an earlier row" in shown
  )
  limits["data__max_chosen_length"] = 0
  kept = datasets.prompt_data(settings(path, **limits), policy.tokenizer, tmp_path / "b").prompts
  assert kept == [row["prompt"] for row in rows if len(row["prompt"]) < 80]
  with pytest.raises(
    DataError, match="no row of config.data.name is left for r2m; 7 dropped: prompt over 1 tokens"
  ):
    datasets.prompt_data(
      settings(path, data__max_prompt_length=1), policy.tokenizer, tmp_path / "c"
    )


def test_a_mixture_of_files_comes_by_its_weights(model, tmp_path):
  _, policy = model
  lines(tmp_path / "a.jsonl", [{"prompt": f"the cat {i}"} for i in range(30)])
  lines(tmp_path / "b.jsonl", [{"prompt": f"the dog {i}"} for i in range(6)])
  config = settings("a.jsonl,b.jsonl", data__root=str(tmp_path), data__weights=(1.0, 3.0))
  data = datasets.prompt_data(config, policy.tokenizer, tmp_path / "run")
  drawn = [data.prompts[i] for t in range(20) for i in data.order[t]]
  assert np.mean(["dog" in prompt for prompt in drawn]) == pytest.approx(0.75, abs=0.02)
  batch = datasets.batch_of(data, data.order[0], policy.tokenizer)
  assert (
    batch.tokens.shape == (4, data.length) and batch.example_id.tolist() == data.order[0].tolist()
  )


def test_a_text_that_cannot_be_rendered_is_named(model, tmp_path):
  _, policy = model
  path = lines(tmp_path / "d.jsonl", [{"prompt": "the cat"}, {"prompt": TALK}])
  plain = tmp_path / "plain"
  tiny_text.tokenizer("plain", plain)
  with pytest.raises(TextError, match=r"d.jsonl:2: the tokenizer of .* has no chat template"):
    datasets.prompt_data(settings(path), load_tokenizer(plain), tmp_path)
