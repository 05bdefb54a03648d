"""Whether a reward model may read the policy's tokens. Oracle: transformers' chat templates."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_text

from r2m_jax.algorithm.read import closed
from r2m_jax.data import tokens
from r2m_jax.data.text import Chat, Renderer, load_tokenizer
from r2m_jax.types import Sequences

ASKS = [[{"role": "user", "content": text}] for text in ("What is the sea?", "Who ran?")]
OFF = Chat(args={"enable_thinking": False})
THINKING = {"qwen3": tiny_text.QWEN3, "r1": tiny_text.R1}


def loaded(folder, kind, chat=None, **kwargs):
  if kind in THINKING:
    tiny_text.thinking_tokenizer(THINKING[kind], folder)
  else:
    tiny_text.tokenizer(kind, folder)
  return load_tokenizer(folder, chat=chat, **kwargs)


def compared(tmp_path, kind, other=None, asks=ASKS, chat=None, **kwargs):
  """`own_ending` of a policy's tokenizer of a kind, and a reward model's of the same or another."""
  mine = loaded(tmp_path / "policy", kind, chat)
  renderer = Renderer(loaded(tmp_path / "reward", other or kind, chat), **kwargs)
  ids = [mine.render(ask) for ask in asks]
  return mine, renderer, tokens.own_ending(mine, renderer, asks, ids, 8)


@pytest.mark.parametrize(
  "kind, chat, after",
  [("chatml", None, "<|im_end|>\n"), ("llama3", None, "<|eot|>"), ("qwen3", OFF, "<|im_end|>\n")],
)
def test_tokens_are_what_the_template_gives(kind, chat, after, tmp_path):
  mine, _, ending = compared(tmp_path, kind, chat=chat)
  assert mine.hf.decode(ending) == after
  for ask in ASKS:
    turns = [*ask, {"role": "assistant", "content": "The cat sat."}]
    args = dict(chat.args) if chat else {}
    whole = mine.hf.apply_chat_template(turns, **args)["input_ids"]
    asked = mine.hf.apply_chat_template(ask, add_generation_prompt=True, **args)["input_ids"]
    said = mine.hf("The cat sat.", add_special_tokens=False)["input_ids"]
    assert whole == [*asked, *said, *ending]


@pytest.mark.parametrize(
  "given, message",
  [
    (dict(kind="chatml", other="llama3"), "its tokenizer is not the policy's"),
    (dict(kind="chatml", strip_thinking=True), "reward.strip_thinking leaves reasoning out"),
    (dict(kind="chatml", max_length=20), "reward.max_length is 20.*may have [0-9]+ tokens"),
    (
      dict(kind="chatml", asks=["The cat"]),
      "prompt of text is taken as it is .* its chat template",
    ),
    (dict(kind="plain", asks=["The cat"]), r"prompt of text .* prompt \+ ' ' \+ response"),
    (dict(kind="qwen3"), "its chat template gives '.*<think>"),
    (dict(kind="r1"), "its chat template gives .* where the policy has"),
  ],
)
def test_what_parts_the_two_is_named(given, message, tmp_path):
  with pytest.raises(tokens.Differs, match=message):
    compared(tmp_path, **given)


def test_another_template_or_a_smaller_vocabulary_parts_them(tmp_path):
  mine = loaded(tmp_path / "policy", "chatml", vocab_size=330)
  theirs = loaded(tmp_path / "reward", "chatml", vocab_size=301)
  ids = [mine.render(ask) for ask in ASKS]
  with pytest.raises(tokens.Differs, match="it knows 301 ids, and the policy may sample 330"):
    tokens.own_ending(mine, Renderer(theirs), ASKS, ids, 8)
  brief = Chat(system="Be brief.", section="reward")
  theirs = load_tokenizer(tmp_path / "reward", 330, chat=brief)
  with pytest.raises(tokens.Differs, match="gives '.*system.*' where the policy has '.*user"):
    tokens.own_ending(mine, Renderer(theirs), ASKS, ids, 8)


def test_more_special_tokens_do_not_part_them(tmp_path):
  mine = loaded(tmp_path / "policy", "chatml")
  hf = tiny_text.tokenizer("chatml")
  hf.add_special_tokens({"pad_token": "[PAD]"})
  hf.save_pretrained(tmp_path / "reward")
  theirs = Renderer(load_tokenizer(tmp_path / "reward"))
  ids = [mine.render(ask) for ask in ASKS]
  assert mine.hf.decode(tokens.own_ending(mine, theirs, ASKS, ids, 8)) == "<|im_end|>\n"


def test_samples_that_their_text_would_not_give_are_counted(tmp_path):
  mine, renderer, ending = compared(tmp_path, "chatml")
  ask, asked = ASKS[0], mine.render(ASKS[0])
  cat = mine.encode(" the cat", special=False)
  split = [i for letter in " the cat" for i in mine.encode(letter, special=False)]
  assert cat != split and mine.decode(split) == " the cat"
  rows = [(ask, " the cat", True), (ask, " the cat", False), (ask, " the cat", True)]
  read = [asked + cat, asked + cat + list(ending), asked + split]
  assert tokens.recoded(renderer, rows, read) == 1


@pytest.mark.parametrize("ending", [(), (7,), (7, 8), (7, 8, 9)])
def test_an_ending_takes_the_place_of_the_token_that_ended(ending):
  """Against a loop over rows."""
  lengths, ended = [1, 3, 4, 4, 2], [True, True, False, True, False]
  prompt, T = 2, 4
  sampled = np.arange(10, 10 + len(lengths) * T).reshape(-1, T).astype(np.int32)
  response = np.arange(T) < np.asarray(lengths)[:, None]
  asked = np.tile(np.array([[1, 2]], np.int32), (len(lengths), 1))
  rows = Sequences(
    tokens=jnp.asarray(np.concatenate([asked, sampled], 1)),
    token_mask=jnp.asarray(np.concatenate([np.ones_like(asked, bool), response], 1)),
    response_mask=jnp.asarray(response),
    has_eos=jnp.asarray(ended),
  )
  read = jax.device_get(jax.jit(closed, static_argnums=1)(rows, ending))
  for i, (n, ends) in enumerate(zip(lengths, ended)):
    want = sampled[i, :n].tolist()
    want = [*want[:-1], *ending] if ends else want
    assert read.tokens[i][read.token_mask[i]].tolist() == [1, 2, *want]
    assert read.tokens[i, prompt:][read.response_mask[i]].tolist() == want
