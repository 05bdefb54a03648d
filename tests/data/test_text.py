"""Tokenizers, chat templates and the renderer of reward-model input. Oracle: transformers' own
templates.
"""

import datetime
import json

import numpy as np
import pytest
import tiny_text
from transformers.utils import chat_template_utils

from r2m_jax.data.text import (
  Chat,
  Renderer,
  TextError,
  Tokenizer,
  as_prompts,
  bucket,
  load_tokenizer,
  pad_left,
  responses_of,
)
from r2m_jax.types import Sequences

ASK = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "What is the sea?"}]
TURN = [{"role": "user", "content": "What is the sea?"}]


@pytest.fixture(scope="module")
def made(tmp_path_factory):
  """kind -> (our tokenizer, transformers'), from a folder."""
  pairs = {}
  for kind in tiny_text.KINDS:
    folder = tmp_path_factory.mktemp(kind)
    theirs = tiny_text.tokenizer(kind, folder)
    pairs[kind] = load_tokenizer(folder), theirs
  return pairs


def template(hf, messages, **kwargs):
  return hf(hf.apply_chat_template(messages, tokenize=False, **kwargs), add_special_tokens=False)[
    "input_ids"
  ]


@pytest.mark.parametrize("kind", ["chatml", "llama3"])
def test_prompts_by_the_models_own_template(kind, made):
  ours, theirs = made[kind]
  assert ours.render(ASK) == template(theirs, ASK, add_generation_prompt=True)
  assert (
    ours.render(ASK) == theirs.apply_chat_template(ASK, add_generation_prompt=True)["input_ids"]
  )
  assert ours.render("The sea") == theirs("The sea")["input_ids"]
  assert theirs.decode(ours.render(ASK)).endswith(
    {"chatml": "assistant\n", "llama3": "assistant<|stop|>"}[kind]
  )


def test_messages_need_a_template(made):
  ours, _ = made["plain"]
  with pytest.raises(
    TextError, match="has no chat template, and the prompt is a list of 2 messages; give prompts as"
  ):
    ours.render(ASK)
  with pytest.raises(TextError, match="no chat template"):
    Renderer(ours).ids(ASK, "It is blue.")
  for wrong in ([], [{"role": "user"}], ["hello"], [{"role": "user", "content": None}]):
    with pytest.raises(TextError, match="list of .'role'"):
      made["chatml"][0].render(wrong)


def test_doubled_bos_is_refused(made, tmp_path):
  ours, theirs = made["llama3"]
  with pytest.raises(TextError, match="doubled BOS: '<s><s>The sea' begins with '<s>' twice"):
    ours.render("<s>The sea")
  twice = tiny_text.tokenizer("llama3")
  twice.chat_template = "{{ bos_token }}" + tiny_text.LLAMA3
  twice.save_pretrained(tmp_path)
  with pytest.raises(TextError, match="doubled BOS"):
    load_tokenizer(tmp_path).render(TURN)
  with pytest.raises(TextError, match="doubled BOS"):
    Renderer(load_tokenizer(tmp_path)).ids(TURN, "Blue.")
  with pytest.raises(TextError, match="has no tokens"):
    made["chatml"][0].render("")


def test_ids_beyond_the_vocabulary_are_refused(made):
  small = load_tokenizer(made["plain"][0].source, vocab_size=100)
  with pytest.raises(TextError, match="knows 100 ids: the tokenizer is not the model's"):
    small.render("The cat")
  for answered in (small.answer, small.sampled):
    with pytest.raises(TextError, match="'The cat' holds the token .* knows 100 ids"):
      answered("", "The cat")


def test_every_eos_id_counts(made, tmp_path):
  def id_of(kind, token):
    return made[kind][1].convert_tokens_to_ids(token)

  assert set(made["chatml"][0].eos_ids) == {
    id_of("chatml", "<|endoftext|>"),
    id_of("chatml", "<|im_end|>"),
  }
  assert made["chatml"][0].end_id == id_of("chatml", "<|im_end|>")
  assert set(made["llama3"][0].eos_ids) == {id_of("llama3", "</s>"), id_of("llama3", "<|eot|>")}
  assert made["plain"][0].eos_ids == (id_of("plain", "</s>"),) and made["plain"][0].end_id == id_of(
    "plain", "</s>"
  )
  tiny_text.tokenizer("plain", tmp_path)
  (tmp_path / "config.json").write_text('{"eos_token_id": 9, "model_type": "llama"}')
  assert load_tokenizer(tmp_path).eos_ids == (9, 1)
  (tmp_path / "generation_config.json").write_text('{"eos_token_id": [7, 8]}')
  assert load_tokenizer(tmp_path).eos_ids == (7, 8, 1)


def test_pad_falls_back_to_eos(made):
  assert made["plain"][0].pad_id == made["plain"][1].eos_token_id
  assert (
    made["llama3"][1].pad_token_id is None
    and made["llama3"][0].pad_id == made["llama3"][1].eos_token_id
  )


def test_start_up_print_shows_special_tokens(made):
  shown = made["llama3"][0].describe(TURN)
  assert "bos 0 '<s>'" in shown and "'</s>', 4 '<|eot|>'" in shown and "a chat template" in shown
  assert repr("<s><|start|>user<|stop|>What is the sea?<|eot|><|start|>assistant<|stop|>") in shown
  assert "no chat template" in made["plain"][0].describe("The sea")


def test_left_padding_masks_by_length(made):
  tokenizer, _ = made["plain"]
  rows = [[5, tokenizer.pad_id, 7], [tokenizer.pad_id]]  # real tokens that equal the pad id
  prompts = as_prompts(rows, tokenizer.pad_id)
  assert prompts.tokens.shape == (2, 16) and prompts.tokens.dtype == np.int32
  assert (
    prompts.mask.sum(1).tolist() == [3, 1]
    and prompts.mask[:, -1].all()
    and prompts.example_id.tolist() == [0, 1]
  )
  assert prompts.tokens[0, -3:].tolist() == rows[0]
  with pytest.raises(TextError, match="row 0 has 3 tokens and 2 fit"):
    pad_left(rows, 0, 2)
  assert [bucket(n) for n in (1, 16, 17, 25, 33, 49, 65, 97)] == [16, 16, 24, 32, 48, 64, 96, 128]


@pytest.mark.parametrize("kind", ["chatml", "llama3"])
def test_reward_input_by_template(kind, made):
  ours, theirs = made[kind]
  renderer = Renderer(ours)
  answer = [*TURN, {"role": "assistant", "content": "It is blue."}]
  done, cut = renderer.ids(TURN, "It is blue."), renderer.ids(TURN, "It is blue.", truncated=True)
  assert done == template(theirs, answer) == renderer.ids("What is the sea?", "It is blue.")
  assert cut == template(theirs, answer, continue_final_message=True) == done[: len(cut)]
  assert ours.end_id in done[len(cut) :] and theirs.decode(cut).endswith("It is blue.")
  assert renderer.ids(TURN, "", truncated=True) == template(
    theirs, TURN, add_generation_prompt=True
  )
  assert Renderer(ours, 5).ids(TURN, "It is blue.") == done[-5:]


def test_a_template_that_drops_part_of_the_answer(tmp_path):
  """Templates of reasoning models do so. A truncated answer is then rendered as it was sampled."""
  hf = tiny_text.tokenizer("chatml")
  hf.chat_template = tiny_text.CHATML.replace("m['content']", "m['content'].split('</think>')[-1]")
  hf.save_pretrained(tmp_path)
  ids = Renderer(load_tokenizer(tmp_path)).ids(TURN, "<think>Hm</think>", truncated=True)
  assert hf.decode(ids).endswith("<|im_start|>assistant\n<think>Hm</think>")


def test_reward_input_without_template(made):
  ours, theirs = made["plain"]
  renderer = Renderer(ours)
  assert renderer.ids("The cat", "ran.") == theirs("The cat ran.")["input_ids"]
  assert renderer.ids("The cat", "ran.", truncated=True) == theirs("The cat ran.")["input_ids"]
  tokens, mask = renderer.batch(
    [("The cat", "ran.", False), ("The cat sat", "on the mat.", True)], length=32
  )
  assert (
    tokens.shape == (2, 32)
    and tokens[1][mask[1]].tolist() == theirs("The cat sat on the mat.")["input_ids"]
  )


def test_responses_end_where_they_ended(made):
  """The ending token is removed by its position, so an ordinary token may end a response. A
  truncated response keeps all its tokens.
  """
  ours, theirs = made["chatml"]
  words = theirs("The cat sat on the mat")["input_ids"]
  T = len(words)
  tokens = np.array([[1, 1, *words], [1, 1, *words]], np.int32)
  mask = np.arange(T) < np.array([[T], [3]])
  sequences = Sequences(
    tokens=tokens,
    token_mask=np.concatenate([np.ones((2, 2), bool), mask], 1),
    response_mask=mask,
    has_eos=np.array([False, True]),
  )
  assert responses_of(sequences, ours) == [
    ("The cat sat on the mat", True),
    (theirs.decode(words[:2]), False),
  ]


def test_contract(made, tmp_path):
  renderer = Renderer(made["llama3"][0])
  contract = renderer.contract
  assert contract == json.loads(json.dumps(contract))
  assert contract["starts_with_bos"] and contract["ends_with"] == [made["llama3"][0].end_id]
  assert (
    Renderer(made["plain"][0]).contract["joiner"] == " "
    and not Renderer(made["plain"][0]).contract["ends_with"]
  )
  renderer.require(contract, "somewhere")
  changed = tiny_text.tokenizer("llama3")
  changed.chat_template = tiny_text.LLAMA3.replace("| trim", "")
  changed.save_pretrained(tmp_path)
  with pytest.raises(
    TextError, match="in somewhere was made with another rendering(.|\n)*template_sha256"
  ):
    Renderer(load_tokenizer(tmp_path)).require(contract, "somewhere")
  with pytest.raises(TextError, match="max_length: 0 then, 64 now"):
    Renderer(made["llama3"][0], 64).require(contract, "somewhere")
  for kind in ("chatml", "plain"):
    with pytest.raises(TextError, match="another rendering"):
      Renderer(made[kind][0]).require(contract, "somewhere")


def test_a_template_with_todays_date_keeps_its_contract(tmp_path, monkeypatch):
  """Llama 3.2's template writes the date. A reward model that was made today must load tomorrow."""
  dated = tiny_text.LLAMA3.replace("{{ bos_token }}", "{{ bos_token + strftime_now('%d %b %Y') }}")
  hf = tiny_text.tokenizer("llama3")
  hf.chat_template = dated
  hf.save_pretrained(tmp_path)
  renderer = Renderer(load_tokenizer(tmp_path))
  ids, contract = renderer.ids(TURN, "Blue."), renderer.contract

  class Tomorrow(datetime.datetime):
    @classmethod
    def now(cls, tz=None):
      return datetime.datetime(2040, 2, 3)

  monkeypatch.setattr(chat_template_utils, "datetime", Tomorrow)
  assert (
    "03 Feb 2040" in hf.decode(renderer.ids(TURN, "Blue.")) and renderer.ids(TURN, "Blue.") != ids
  )
  renderer.require(contract, "somewhere")
  hf.chat_template = dated.replace("%d %b", "%b %d")
  hf.save_pretrained(tmp_path)
  with pytest.raises(TextError, match="template_sha256"):
    Renderer(load_tokenizer(tmp_path)).require(contract, "somewhere")


def test_a_template_that_refuses_is_explained(tmp_path):
  hf = tiny_text.tokenizer("chatml")
  refuse = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
  hf.chat_template = refuse + tiny_text.CHATML
  hf.save_pretrained(tmp_path)
  tokenizer = load_tokenizer(tmp_path)
  assert tokenizer.render(TURN)
  for refused in (tokenizer.render, lambda prompt: Renderer(tokenizer).ids(prompt, "Blue.")):
    with pytest.raises(
      TextError, match='refuses .*"Be brief.".*: System role not supported; change the messages'
    ):
      refused(ASK)
  hf.chat_template = refuse.replace("raise_exception('System role not supported')", "1 + 'a'")
  hf.chat_template += tiny_text.CHATML
  hf.save_pretrained(tmp_path)
  with pytest.raises(TextError, match='refuses .*"Be brief.".*: unsupported operand'):
    load_tokenizer(tmp_path).render(ASK)
  hf.chat_template = "{{ raise_exception('no') }}"
  hf.save_pretrained(tmp_path)
  with pytest.raises(TextError, match="cannot render a question and its answer: no"):
    load_tokenizer(tmp_path)


def test_a_template_that_requires_a_system_message(tmp_path):
  hf = tiny_text.tokenizer("chatml")
  require = "{% if messages[0]['role'] != 'system' %}{{ raise_exception('No system') }}{% endif %}"
  hf.chat_template = require + tiny_text.CHATML
  hf.save_pretrained(tmp_path)
  with pytest.raises(TextError, match="cannot render a question and its answer: No system"):
    load_tokenizer(tmp_path)
  given = load_tokenizer(tmp_path, chat=Chat(system="Be brief."))
  assert given.end_id == hf.convert_tokens_to_ids("<|im_end|>")
  system = [{"role": "system", "content": "Be brief."}]
  assert given.render(TURN) == given.render([*system, *TURN])


def test_a_folder_without_a_tokenizer(tmp_path):
  with pytest.raises(TextError, match="holds no tokenizer that transformers reads"):
    load_tokenizer(tmp_path)
  tiny_text.tokenizer("plain", tmp_path)
  assert isinstance(load_tokenizer(tmp_path), Tokenizer)
