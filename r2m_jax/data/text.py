"""Text to token ids and back: tokenizers, chat templates, and the one renderer of reward-model
input.

Everything here runs on the host. Reward training, RL and evaluation all use `Renderer.ids` to turn
(prompt, response) into reward-model tokens. Its `contract` is stored with a reward model and
compared when the model is loaded.
"""

import contextlib
import copy
import dataclasses
import datetime
import functools
import hashlib
import json
import pathlib
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from r2m_jax.data import thinking
from r2m_jax.parallel.errors import UserError
from r2m_jax.types import Prompts, Sequences

JOINER = " "  # between prompt and response, for a reward model without a chat template
SHORTEST = 16  # tokens; padded lengths are this times a power of two, or 1.5 times that
CONTRACT_FORMAT = 1
POLICY = "policy"  # key of a contract: how the policy's prompts were rendered, if a head reads it
# Put before a template, it hides the function with which some templates write today's date.
NO_DATE = "{% macro strftime_now(format) %}a day{% endmacro %}"

MARK = "answerhere"  # a placeholder for a text, to find what the template itself adds
DATE_FORMAT = re.compile(r"""strftime_now\(\s*(["'])(.*?)\1\s*\)""")

Prompt = str | list[dict[str, str]]  # text, or messages [{"role": ..., "content": ...}]


class TextError(UserError, ValueError):
  """A text that cannot be turned into tokens; the message names the text and the fix."""


@dataclasses.dataclass(frozen=True)
class Chat:
  """A user's changes to the chat template of a model.

  Attributes:
    args: variables of the template, such as enable_thinking=False; JSON types only.
    system: a system message for messages that have none; "": none.
    file: a file with the template that replaces the folder's; "": the folder's own.
    section: the config section of these settings, for messages.
  """

  args: Mapping[str, Any] = dataclasses.field(default_factory=dict, hash=False)
  system: str = ""
  file: str = ""
  section: str = "policy"

  def read_template(self) -> str:
    """The text of `file`, "" if there is none. Raises TextError if it cannot be read."""
    try:
      return pathlib.Path(self.file).expanduser().read_text("utf-8") if self.file else ""
    except (OSError, ValueError) as error:
      raise TextError(
        f"config.{self.section}.chat_template is {self.file!r}: {error}; give the path of a .jinja "
        "file in UTF-8"
      ) from None

  @property
  def contract(self) -> dict[str, Any]:
    """The settings as JSON. The user's own template is stored in an export's folder."""
    given = {"chat_template_args": dict(self.args), "system_prompt": self.system}
    return {name: value for name, value in given.items() if value}

  def check(self, template: str, source: str) -> None:
    """Raises TextError if there is no template to change. Warns of arguments whose names do not
    occur in the template, because they have no effect.
    """
    given = [
      f"config.{self.section}.{name}"
      for name, value in (("chat_template_args", self.args), ("system_prompt", self.system))
      if value
    ]
    if given and not template:
      raise TextError(
        f"{' and '.join(given)} change a chat template, and the tokenizer of {source} has none; "
        f"leave out what is set, or give config.{self.section}.chat_template"
      )
    unused = [name for name in self.args if not re.search(rf"\b{re.escape(name)}\b", template)]
    if unused:
      print(
        f"warning: config.{self.section}.chat_template_args has {', '.join(unused)}, which the chat "
        f"template of {self.file or source} never reads: it changes nothing. Check the spelling",
        file=sys.stderr,
      )


@dataclasses.dataclass(frozen=True)
class Tokenizer:
  """A Hugging Face tokenizer with the end and pad ids of its model's folder."""

  hf: Any
  source: str
  eos_ids: tuple[int, ...]  # any of these ends a response
  end_id: (
    int | None
  )  # the end of a finished response: the chat template's end-of-turn, or else the tokenizer's eos
  pad_id: int  # may equal an eos id, because masks come from lengths
  vocab_size: int | None = None  # of the model in the same folder, if there is one
  date: str = ""  # YYYY-MM-DD, the day that chat templates write; "": today
  suffix: tuple[
    int, ...
  ] = ()  # ids that the tokenizer itself appends to every text, such as an EOS
  max_positions: int | None = None  # max_position_embeddings of the model, in tokens
  chat: Chat = Chat()  # its template file is already in `hf`

  @property
  def has_template(self) -> bool:
    return bool(self.hf.chat_template)

  @functools.cached_property
  def opening(self) -> str:
    """The end of the generation prompt from `<think>` on: "<think>\\n" if an answer starts within
    its reasoning, an empty block if it has none, "" without the tag.
    """
    if not self.has_template:
      return ""
    ask = [{"role": "user", "content": MARK}]
    after = self._text(self._chat(ask), add_generation_prompt=True).rpartition(MARK)[2]
    return after[after.index(thinking.OPEN) :] if thinking.OPEN in after else ""

  @functools.cached_property
  def drops_reasoning(self) -> bool:
    """Whether the chat template removes the reasoning of the last answer from a dialogue."""
    answer = f"{thinking.OPEN}\n{MARK}\n{thinking.CLOSE}\n\nb"
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": answer}]
    return self.has_template and MARK not in self._text(self._chat(turns))

  def encode(self, text: str, *, special: bool = True) -> list[int]:
    """Ids of a text. With `special` they begin with the ids that the tokenizer itself prepends,
    such as a BOS.

    Ids that the tokenizer appends (`suffix`) are removed, because the tokenizer does not know
    whether a text is finished.
    """
    ids = list(self.hf(text, add_special_tokens=special)["input_ids"])
    added = special and self.suffix and tuple(ids[-len(self.suffix) :]) == self.suffix
    return ids[: -len(self.suffix)] if added else ids

  def decode(self, ids: Sequence[int]) -> str:
    """Text without special tokens."""
    return self.hf.decode([int(i) for i in ids], skip_special_tokens=True)

  def beginning(self, text: str, length: int) -> tuple[str, bool]:
    """(the text's first `length` tokens as text, whether the text is longer)."""
    ids = self.encode(text, special=False)
    return (self.decode(ids[:length]), True) if len(ids) > length else (text, False)

  def render(self, prompt: Prompt) -> list[int]:
    """Ids of a prompt: text verbatim, messages by the model's own chat template up to the
    assistant's answer.
    """
    if not isinstance(prompt, str):
      ids = self._template(self._chat(prompt), add_generation_prompt=True)
    elif self.chat.system:
      raise TextError(
        f"config.{self.chat.section}.system_prompt needs prompts of messages, and "
        f"{prompt[:80]!r} is text, which is used verbatim; give "
        '[{"role": "user", "content": ...}]'
      )
    else:
      ids = self.encode(prompt)
    return self._checked(ids, prompt)

  def written(self, prompt: Prompt) -> list[bool]:
    """For each token of `render(prompt)`, whether it is text of the prompt: False on special tokens
    and on what the chat template adds, such as roles and its own system prompt.
    """
    ids, special = self.render(prompt), set(self.hf.all_special_ids)
    if isinstance(prompt, str) or not self.hf.is_fast:  # only fast ones know a token's position
      return [i not in special for i in ids]
    spans = self._spans(self._chat(prompt))
    if spans is None:
      return [i not in special for i in ids]
    text = self._text(self._chat(prompt), add_generation_prompt=True)
    places = self.hf(text, add_special_tokens=False, return_offsets_mapping=True)["offset_mapping"]
    return [any(a < end and b > start for start, end in spans) for a, b in places]

  def _spans(self, messages: list[dict]) -> list[tuple[int, int]] | None:
    """The start and end of each message's text in the rendered prompt; None if the template changes
    the texts. They are found by rendering placeholders instead of the texts.
    """
    marks = [f"{MARK}{i}{MARK}" for i in range(len(messages))]
    marked = [message | {"content": mark} for message, mark in zip(messages, marks)]
    rest, between = self._text(marked, add_generation_prompt=True), []
    for mark in marks:
      before, found, rest = rest.partition(mark)
      if not found:
        return None
      between.append(before)
    text = self._text(messages, add_generation_prompt=True)
    for contents in ([m["content"] for m in messages], [m["content"].strip() for m in messages]):
      if text == "".join(map("".join, zip(between, contents))) + rest:
        ends = np.cumsum([len(a) + len(b) for a, b in zip(between, contents)]).tolist()
        return [(end - len(content), end) for end, content in zip(ends, contents)]
    return None

  def answer(self, prompt: Prompt, response: str) -> list[int]:
    """Ids of a response from a row of data that follows `render(prompt)`; no end-of-turn.

    After messages, each reasoning tag appears once; see `thinking.continuation`.
    """
    text = isinstance(prompt, str)
    joined = response if text else thinking.continuation(self.opening, response)
    return self.known(self.encode(joined, special=False), response)

  def sampled(self, prompt: Prompt, response: str) -> list[int]:
    """Ids of a text that a policy sampled after `render(prompt)`, in the form of `whole`."""
    text = isinstance(prompt, str)
    joined = response if text else thinking.after_opening(self.opening, response)
    return self.known(self.encode(joined, special=False), response)

  def whole(self, prompt: Prompt, text: str) -> str:
    """A sampled text with the `<think>` that the generation prompt opened for it, if it did."""
    opens = not isinstance(prompt, str) and thinking.is_open(self.opening)
    return self.opening + text if opens else text

  def dialogue(self, prompt: Prompt, response: str, *, truncated: bool) -> list[int]:
    """Ids of prompt and response by the chat template; there is no end-of-turn after a truncated
    response.
    """
    turns = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
    messages = self._chat(turns)
    answered = [*messages, {"role": "assistant", "content": response}]
    if not truncated:
      return self._checked(self._template(answered, add_generation_prompt=False), messages)
    ids = None
    if response.strip() and not thinking.is_unclosed(response):
      with contextlib.suppress(ValueError):  # the template drops or moves reasoning
        ids = self._template(answered, continue_final_message=True)
    return self._checked(ids or self._unfinished(messages, response), messages)

  def _unfinished(self, messages: list[dict], response: str) -> list[int]:
    """Ids of a truncated response after the generation prompt, as it was sampled."""
    text = self._text(messages, add_generation_prompt=True)
    # a response with reasoning has the tags that a generation prompt may end with
    if thinking.OPEN in response or (response and thinking.is_open(self.opening)):
      text = text.removesuffix(self.opening)
    return self.encode(text + response, special=False)

  def join(self, prompt: Prompt, response: str) -> list[int]:
    """Ids of `prompt + " " + response`, for a tokenizer without a chat template."""
    if not isinstance(prompt, str):
      raise TextError(self._no_template(prompt))
    return self._checked(self.encode(prompt + JOINER + response), prompt)

  def _chat(self, messages) -> list[dict]:
    """The checked messages, with the user's own system message if they have none."""
    messages = check_messages(messages)
    own = self.chat.system and messages[0]["role"] != "system"
    return [{"role": "system", "content": self.chat.system}, *messages] if own else messages

  def _template(self, messages: list[dict], **kwargs) -> list[int]:
    return self.encode(self._text(messages, **kwargs), special=False)

  def _text(self, messages: list[dict], **kwargs) -> str:
    """The messages as the chat template renders them."""
    if not self.has_template:
      raise TextError(self._no_template(messages))
    from jinja2 import TemplateError

    if self.date:
      kwargs["chat_template"] = dated(self.hf.get_chat_template(), self.date)
    try:
      return self.hf.apply_chat_template(messages, tokenize=False, **self.chat.args, **kwargs)
    # such as a template without a system role, or one that adds text to a number
    except (TemplateError, TypeError, ValueError, AttributeError) as error:
      shown = json.dumps(messages, ensure_ascii=False)[:120]
      raise TextError(
        f"the chat template of {self.source} refuses {shown}: {error}; change the messages"
      ) from None

  def _no_template(self, messages) -> str:
    return (
      f"the tokenizer of {self.source} has no chat template, and the prompt is a list of "
      f"{len(messages)} messages; "
      "give prompts as text, or a model whose tokenizer_config.json (or chat_template.jinja) has a "
      "chat_template"
    )

  def _checked(self, ids: list[int], prompt) -> list[int]:
    shown = prompt if isinstance(prompt, str) else json.dumps(prompt, ensure_ascii=False)
    if not ids:
      raise TextError(
        f"the prompt {shown[:80]!r} has no tokens with the tokenizer of {self.source}; give a "
        "longer one"
      )
    self.known(ids, shown)
    bos = self.hf.bos_token_id
    if bos is not None and ids[:2] == [bos, bos]:
      raise TextError(
        f"doubled BOS: {self.hf.decode(ids[:8])!r} begins with {self.hf.bos_token!r} twice "
        "(tokenizer of "
        f"{self.source}); take one out of the prompt or of the chat template: {shown[:80]!r}"
      )
    return ids

  def known(self, ids: list[int], text: str) -> list[int]:
    """The ids of a text, or a TextError if the model does not know one of them."""
    if self.vocab_size is not None and ids and max(ids) >= self.vocab_size:
      token = self.hf.convert_ids_to_tokens(max(ids))
      raise TextError(
        f"{text[:80]!r} holds the token {token!r} with id {max(ids)}; the model of {self.source} "
        "knows "
        f"{self.vocab_size} ids: the tokenizer is not the model's; copy the model's own files "
        "again"
      )
    return ids

  def warn_beyond(self, lengths: Sequence[int], what: str, fix: str) -> None:
    """Warns on stderr if rows of these lengths, in tokens, are longer than the model supports.

    Args:
      what: name of the rows, with the fields that determine their length.
      fix: how to shorten them.
    """
    limit = self.max_positions
    if limit is None or not len(lengths) or max(lengths) <= limit:
      return
    print(
      f"warning: {sum(n > limit for n in lengths)} of {len(lengths)} {what} are longer than "
      f"max_position_embeddings = {limit} in the config.json of {self.source}, the longest "
      f"{max(lengths)} tokens: the model was not trained on positions beyond it, so its outputs "
      f"there may be meaningless; {fix}, or use a model with more positions",
      file=sys.stderr,
    )

  def describe(self, prompt: Prompt) -> str:
    """Text for the user to check: one rendered prompt with its special tokens, and the important
    ids.
    """
    ids = self.render(prompt)

    def name(i):
      return f"{i} {self.hf.convert_ids_to_tokens(i)!r}"

    bos = "none" if self.hf.bos_token_id is None else name(self.hf.bos_token_id)
    as_it_is = (
      "\nnote     prompts of text are used verbatim, without the chat template; for a chat model "
      'give {"prompt": [{"role": "user", "content": ...}]}'
    )
    return (
      f"tokens   {self.source}: bos {bos}, ends at "
      f"{', '.join(map(name, self.eos_ids)) or 'nothing'}, "
      f"pad {name(self.pad_id)}, {'a' if self.has_template else 'no'} chat template\n"
      f"sample   {len(ids)} tokens: {self.hf.decode(ids)!r}"
      f"{as_it_is if self.has_template and isinstance(prompt, str) else ''}"
    )


def load_tokenizer(
  folder: str | pathlib.Path,
  vocab_size: int | None = None,
  date: str = "",
  max_positions: int | None = None,
  chat: Chat | None = None,
  base: str | pathlib.Path | None = None,
) -> Tokenizer:
  """The tokenizer in a model's folder, with the eos ids of the generation config, the tokenizer and
  the template.

  `vocab_size` belongs to the model: a text with an id beyond it is refused when it is rendered.
  `date`, `max_positions` and `chat` are as in Tokenizer. `base` is the folder of the model, if
  `folder` holds only its adapters.
  """
  import transformers

  folder = pathlib.Path(folder)
  try:
    hf = transformers.AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
  except Exception as error:  # noqa: BLE001  its parsers raise errors of all kinds
    reason = " ".join(f"{type(error).__name__}: {error}".split())[:400]
    raise TextError(
      f"{folder} holds no tokenizer that transformers reads (tokenizer.json): {reason}; copy its "
      "tokenizer files again, or write them by save_pretrained of its tokenizer"
    ) from None
  chat = chat or Chat()
  hf.chat_template = chat.read_template() or hf.chat_template
  if chat.args or chat.system:
    chat.check(hf.get_chat_template() if hf.chat_template else "", str(folder))
  end = _end_of_turn(hf, chat)
  own = [] if hf.eos_token_id is None else [hf.eos_token_id]
  model = _model_eos_ids(folder) or _model_eos_ids(pathlib.Path(base or folder))
  eos_ids = tuple(dict.fromkeys([*model, *own, *([] if end is None else [end])]))
  if beyond := [i for i in eos_ids if vocab_size is not None and i >= vocab_size]:
    raise TextError(
      f"{folder}: end-of-sequence ids {beyond} lie beyond the model's {vocab_size} ids, so they "
      "belong to another model; put the model's own into generation_config.json and "
      "tokenizer_config.json"
    )
  end = end if end is not None else next(iter([*own, *eos_ids]), None)

  # masks come from lengths, so any id within the embedding may pad a row
  def fits(i):
    return i is not None and (vocab_size is None or i < vocab_size)

  pad = next((i for i in (hf.pad_token_id, hf.eos_token_id, *eos_ids) if fits(i)), 0)
  return Tokenizer(
    hf=hf,
    source=str(folder),
    eos_ids=eos_ids,
    end_id=end,
    pad_id=pad,
    vocab_size=vocab_size,
    date=date,
    suffix=_suffix(hf),
    max_positions=max_positions,
    chat=chat,
  )


def _suffix(hf) -> tuple[int, ...]:
  """The ids that a tokenizer itself appends to a text."""
  bare, whole = (
    tuple(hf("a", add_special_tokens=special)["input_ids"]) for special in (False, True)
  )
  for start in range(len(whole) - len(bare) + 1 if bare else 0):
    if whole[start : start + len(bare)] == bare:
      return whole[start + len(bare) :]
  return ()


def save_tokenizer(
  core, folder: str | pathlib.Path, *, end: str, pad: str, special: Sequence[str], template: str
) -> None:
  """Writes a `tokenizers.Tokenizer` in the form that transformers reads: `end` is its eos,
  `special` its other special tokens.
  """
  import transformers

  hf = transformers.PreTrainedTokenizerFast(tokenizer_object=core, eos_token=end, pad_token=pad)
  hf.add_special_tokens({"additional_special_tokens": list(special)})
  hf.chat_template = template
  hf.save_pretrained(folder)


def _model_eos_ids(folder: pathlib.Path) -> list[int]:
  """eos_token_id of generation_config.json, or of config.json if the former has none."""
  for name in ("generation_config.json", "config.json"):
    file = folder / name
    try:
      eos = (
        json.loads(file.read_text(encoding="utf-8")).get("eos_token_id") if file.exists() else None
      )
    except (ValueError, AttributeError, RecursionError) as error:
      raise TextError(f"{file} holds no JSON object: {error}; copy it again") from None
    ids = eos if isinstance(eos, list) else [eos]
    if eos is not None and not all(isinstance(i, int) and i >= 0 for i in ids):
      raise TextError(
        f"{file} has eos_token_id {str(eos)[:80]!r}: give a token's number, or a list of them"
      )
    if eos is not None:
      return ids
  return []


def _end_of_turn(hf, chat: Chat) -> int | None:
  """The special token that the chat template puts after an assistant's answer; None if there is
  none.
  """
  if not hf.chat_template:
    return None
  from jinja2 import TemplateError

  messages, mark = [{"role": "user", "content": "a"}], MARK
  if chat.system:  # a template may require one
    messages.insert(0, {"role": "system", "content": chat.system})
  try:
    text = hf.apply_chat_template(
      [*messages, {"role": "assistant", "content": mark}], tokenize=False, **chat.args
    )
  except (
    TemplateError,
    TypeError,
    ValueError,
    AttributeError,
  ) as error:  # the last three for a text that is not a template
    source = chat.file or hf.name_or_path
    raise TextError(
      f"the chat template of {source} cannot render a question and its answer: {error}; fix it "
      "in chat_template.jinja (or tokenizer_config.json), or remove it"
    ) from None
  after = (
    hf(text[text.rindex(mark) + len(mark) :], add_special_tokens=False)["input_ids"]
    if mark in text
    else []
  )
  special = {
    *hf.all_special_ids,
    *(i for i, token in hf.added_tokens_decoder.items() if token.special),
  }
  return next((i for i in after if i in special), None)


def dated(template: str, date: str) -> str:
  """The chat template with `date`, YYYY-MM-DD, instead of today, because a run must render the same
  text tomorrow.

  Templates write a date with strftime_now(format), which transformers defines and which only the
  template can override.
  """
  day = datetime.datetime.fromisoformat(date)
  formats = dict.fromkeys(m[1] for m in DATE_FORMAT.findall(template))
  if "strftime_now" not in template:
    return template
  cases = "".join(
    f"{{% if format == {json.dumps(f)} %}}{day.strftime(f)}{{% endif %}}" for f in formats
  )
  return f"{{% macro strftime_now(format) %}}{cases}{{% endmacro %}}{template}"


def check_messages(messages) -> list[dict[str, str]]:
  """The messages, or a TextError that describes the required form."""
  good = isinstance(messages, list) and messages
  if not good or not all(
    isinstance(m, dict) and isinstance(m.get("content"), str) and m.get("role") for m in messages
  ):
    shown = json.dumps(messages, ensure_ascii=False, default=str)[:120]
    raise TextError(
      f"a prompt is text or a list of {{'role': ..., 'content': text}}; this one is {shown}: "
      "change it"
    )
  return messages


# ---- arrays ----


def bucket(length: int) -> int:
  """The padded length for `length` tokens. There are few distinct ones, so that few programs are
  compiled.
  """
  size = SHORTEST
  while size < length:
    size = size * 3 // 2 if size & (size - 1) == 0 else size * 4 // 3  # 16, 24, 32, 48, 64, 96, ...
  return size


def pad_left(
  rows: Sequence[Sequence[int]], pad_id: int, length: int = 0
) -> tuple[np.ndarray, np.ndarray]:
  """Rows of ids as tokens i32[N, L] and mask bool[N, L]; L is `length`, or the bucket of the
  longest row.
  """
  length = length or bucket(max(map(len, rows)))
  tokens = np.full((len(rows), length), pad_id, np.int32)
  mask = np.zeros((len(rows), length), bool)
  for i, row in enumerate(rows):
    if len(row) > length:
      raise TextError(f"row {i} has {len(row)} tokens and {length} fit; shorten it")
    if len(row):
      tokens[i, -len(row) :], mask[i, -len(row) :] = row, True
  return tokens, mask


def as_prompts(rows: Sequence[Sequence[int]], pad_id: int, *, length: int = 0) -> Prompts:
  """Rendered prompts as `Prompts`, numbered from 0 (example_id i32[N]), padded like `pad_left`."""
  tokens, mask = pad_left(rows, pad_id, length)
  return Prompts(tokens=tokens, mask=mask, example_id=np.arange(len(rows), dtype=np.int32))


def responses_of(sequences: Sequences, tokenizer: Tokenizer) -> list[tuple[str, bool]]:
  """(text, truncated) of every row: the sampled text without its end token."""
  mask, ended = np.asarray(sequences.response_mask), np.asarray(sequences.has_eos)
  tokens = np.asarray(sequences.tokens)[:, -mask.shape[1] :]
  lengths = (
    mask.sum(1) - ended
  )  # the end token may be an ordinary one, so it is removed by its position
  return [(tokenizer.decode(row[:n]), not end) for row, n, end in zip(tokens, lengths, ended)]


# ---- reward-model input ----


@dataclasses.dataclass(frozen=True)
class Renderer:
  """(prompt, response) -> the reward model's tokens, in reward training, RL and evaluation.

  A chat template renders the dialogue, with a text prompt as one user message. Without a template
  the text is prompt + " " + response, with the ids that the tokenizer itself appends. Nothing is
  appended to a truncated response: neither an end-of-turn nor anything else. Reasoning that begins
  without `<think>`, because the policy's prompt had it, gets the tag.
  """

  tokenizer: Tokenizer
  max_length: int = 0  # tokens; longer inputs lose their beginning. 0: no limit
  strip_thinking: bool = False  # remove reasoning from the response; see `thinking`

  def ids(self, prompt: Prompt, response: str, *, truncated: bool = False) -> list[int]:
    tokenizer = self.tokenizer
    response = (thinking.without_reasoning if self.strip_thinking else thinking.opened)(response)
    if tokenizer.has_template:
      ids = tokenizer.dialogue(prompt, response, truncated=truncated)
    else:
      ids = tokenizer.join(prompt, response)
      ids = ids if truncated else [*ids, *tokenizer.suffix]
    return ids[-self.max_length :] if self.max_length else ids

  def describe(self, prompt: Prompt, response: str, truncated: bool = False) -> str:
    """One rendered input of the reward model with its special tokens, for the user to check."""
    tokenizer = self.tokenizer
    ids = self.ids(prompt, response, truncated=truncated)
    rule = "its chat template" if tokenizer.has_template else "prompt + ' ' + response"
    rule += ", without reasoning" if self.strip_thinking else ""
    return (
      f"rewards  {tokenizer.source}: input by {rule}\n"
      f"sample   {len(ids)} tokens: {tokenizer.hf.decode(ids)!r}"
    )

  def batch(
    self, rows: Sequence[tuple[Prompt, str, bool]], *, length: int = 0
  ) -> tuple[np.ndarray, np.ndarray]:
    """[(prompt, response, truncated)] -> tokens i32[N, L], mask bool[N, L]."""
    return pad_left(
      [self.ids(p, r, truncated=t) for p, r, t in rows], self.tokenizer.pad_id, length
    )

  @property
  def contract(self) -> dict[str, Any]:
    """The settings that must not change between the training of a reward model and its use. JSON
    types only.
    """
    tokenizer = self.tokenizer
    template = tokenizer.hf.get_chat_template() if tokenizer.has_template else ""
    undated = dataclasses.replace(tokenizer, hf=copy.copy(tokenizer.hf), date="")
    undated.hf.chat_template = template and NO_DATE + template  # a contract must hold tomorrow
    probe = [
      Renderer(undated).ids("What is 2 + 2?", "It is 4.", truncated=truncated)
      for truncated in (False, True)
    ]
    bos = tokenizer.hf.bos_token_id
    given = tokenizer.chat.contract
    given |= {"strip_thinking": True} if self.strip_thinking else {}
    return given | {
      "format": CONTRACT_FORMAT,
      "template_sha256": hashlib.sha256(template.encode()).hexdigest() if template else None,
      "joiner": None if template else JOINER,
      "starts_with_bos": bos is not None and probe[0][0] == bos,
      "ends_with": probe[0][
        len(probe[1]) :
      ],  # after a finished response; nothing after a truncated one
      "pad": "left, masks by length",
      "max_length": self.max_length,
      "truncation": "the beginning is dropped",
      "probe_sha256": hashlib.sha256(json.dumps(probe).encode()).hexdigest(),
    }

  def require(self, saved: dict[str, Any], where) -> None:
    """Raises TextError if a reward model was trained with another contract than this renderer's."""
    now = self.contract
    changed = [
      f"{key}: {saved.get(key)!r} then, {now.get(key)!r} now"
      for key in sorted({*saved, *now} - {POLICY})
      if saved.get(key) != now.get(key)
    ]
    if changed:
      raise TextError(
        f"the reward model in {where} was made with another rendering of its input than this "
        "tokenizer and config "
        "give; use its own tokenizer, chat template and config.reward.max_length (and "
        "system_prompt, chat_template_args and strip_thinking, if named below), or train it "
        "again:\n  " + "\n  ".join(changed)
      )


def each_row(rows: Sequence[dict], f: Callable[[dict], Any], file: str = "") -> list:
  """[f(row)]. A TextError names the row by its number in `file`, or by its `where` if there is no
  file.
  """
  results = []
  for number, row in enumerate(rows, 1):
    try:
      results.append(f(row))
    except TextError as error:
      raise TextError(f"{f'{file}, row {number}' if file else row['where']}: {error}") from None
  return results
