"""Converts the common forms of rows into one: a prompt with one or two replies.

  {prompt, chosen, rejected}            replies as text, as one assistant message, or as whole dialogues
  {chosen, rejected}                    whole dialogues, as messages or as HH-RLHF's text of Human: and Assistant: turns
  {prompt, response}                    or completion, chosen, reference instead
  {messages}                            the last message is the response
  {prompt}                              text or messages
  {text}                                plain text, for tokenizers and language modelling

A row that fits none of them raises BadRow. So does a reply with `label: false` or 0 (KTO) in a task
that learns from replies. The result has `prompt` (text or messages) and `response`, or `chosen` and
`rejected`. All are checked: no empty text, alternating roles, no pair of equal replies.
"""

import json
import re
from typing import Any

from r2m_jax.data.files import BadRow

NEEDS = ("prompt", "response", "pair", "text")  # the parts of a row that a task reads
# the first of these fields that a row has is its response
RESPONSES = ("response", "completion", "chosen", "reference")
TURN = re.compile(r"(?:^|\n\n)(Human|Assistant):")  # of HH-RLHF's dialogues
ROLE = {"Human": "user", "Assistant": "assistant"}


def as_row(record: Any, need: str) -> dict[str, Any]:
  """The row of a raw record with the parts that `need` (of NEEDS) requires, and its `meta` if it
  has one.

  `prompt` rows of preference data keep `chosen`, so that they can be filtered by its length.
  """
  if isinstance(record, BadRow):
    raise record
  if not isinstance(record, dict):
    raise BadRow("not an object", f"a row must be an object, this one is {_name(record)}")

  def has(field):
    return record.get(field) is not None

  if need in ("response", "text") and _to_avoid(record, of_text=need == "text" and has("text")):
    raise BadRow(
      "undesirable",
      f"label is {json.dumps(record['label'])}: the reply is to be avoided, not learned; leave such "
      "rows out, or the field if it means something else",
    )
  if need == "text" and has("text"):
    row = {"text": _text(record["text"], "text")}
  elif need == "pair":
    for side in ("chosen", "rejected"):
      if not has(side):
        raise _missing(side, record)
    prompt, chosen = _prompt_and_reply(record, "chosen")
    other, rejected = _prompt_and_reply(record, "rejected")
    if prompt != other:
      raise BadRow("different prompts", "chosen and rejected answer different dialogues")
    if chosen.strip() == rejected.strip():
      raise BadRow("chosen equals rejected", "there is nothing to prefer")
    row = {"prompt": prompt, "chosen": chosen, "rejected": rejected}
  else:
    field = next((f for f in (*RESPONSES, "messages") if has(f)), None)
    if need != "prompt" and field is None:
      raise _missing(
        " or ".join(("messages", *RESPONSES) + (("text",) if need == "text" else ())), record
      )
    if need == "prompt" and has("prompt"):
      row = {"prompt": _prompt(record["prompt"])}
      if has("chosen"):
        row["chosen"] = _prompt_and_reply(record, "chosen")[1]
    elif need == "prompt" and field == "messages" and _ends_with_user(record["messages"]):
      row = {"prompt": _prompt(record["messages"])}
    elif field is None:
      raise _missing("prompt", record)
    else:
      prompt, response = _prompt_and_reply(record, field)
      row = {"prompt": prompt, "chosen" if need == "prompt" else "response": response}
  return row | ({"meta": record["meta"]} if isinstance(record.get("meta"), dict) else {})


def _to_avoid(record: dict, *, of_text: bool) -> bool:
  """Whether `label` marks a reply to avoid: false, and of a reply also 0 and "false", because some
  files have no booleans. The number next to a plain text is a class, not a verdict.
  """
  label = record.get("label")
  if label is False or of_text:
    return label is False
  return label == 0 or isinstance(label, str) and label.strip().lower() in ("false", "0")


def _prompt_and_reply(record: dict, field: str) -> tuple[Any, str]:
  """The prompt and one reply, from an explicit prompt or from the whole dialogue in `field`."""
  value = record[field]
  if record.get("prompt") is not None:
    prompt = _prompt(record["prompt"])
    if isinstance(value, str):
      return prompt, _text(value, field)
    *before, last = _messages(value, field)
    said = prompt if isinstance(prompt, list) else [{"role": "user", "content": prompt}]

    def spoken(messages):
      return [m for m in messages if m["role"] != "system"]

    if before and spoken(before)[: len(spoken(said))] != spoken(said):
      raise BadRow(
        "different prompts", f"{field} is a dialogue that does not begin with the row's own prompt"
      )
    if len(spoken(before)) > len(
      spoken(said)
    ):  # the dialogue continues after the row's prompt, so it is the prompt
      prompt = _prompt(
        before if before[0]["role"] == "system" else [*_system(said), *before], field
      )
    elif before and before[0]["role"] == "system" and not _system(said):
      prompt = _prompt(before, field)
  else:
    if field not in ("chosen", "rejected", "messages"):
      raise _missing("prompt", record)
    *prompt, last = _dialogue(value, field) if isinstance(value, str) else _messages(value, field)
    prompt = _prompt(prompt, f"the dialogue in {field!r} before its last message")
  if last["role"] != "assistant":
    raise BadRow(
      "wrong roles",
      f"{field} ends with a message of {last['role']!r}; the reply is the assistant's",
    )
  return prompt, last["content"]


def _prompt(value: Any, name: str = "prompt") -> str | list[dict[str, str]]:
  """A prompt's text, or its messages: optionally a system message, then user and assistant in turn,
  with the user last.
  """
  if isinstance(value, str):
    return _text(value, name)
  messages = _messages(value, name)
  roles = [m["role"] for m in messages]
  turns = roles[1:] if roles[0] == "system" else roles
  if len(turns) % 2 == 0 or turns != [("user", "assistant")[i % 2] for i in range(len(turns))]:
    raise BadRow(
      "wrong roles",
      f"{name} goes {', '.join(roles)[:80]}; user and assistant take turns, the user is last",
    )
  return messages


def _messages(value: Any, field: str) -> list[dict[str, str]]:
  """A list of messages with only role and content, each with a known role and with text."""
  if not isinstance(value, list):
    raise BadRow("wrong type", f"{field!r} is {_name(value)}, not text or a list of messages")
  if not value:
    raise BadRow("empty field", f"{field!r} has no messages")
  messages = []
  for message in value:
    if not isinstance(message, dict):
      raise BadRow("wrong type", f"a message of {field!r} is {_name(message)}, not an object")
    for key in ("role", "content"):
      if message.get(key) is None:
        raise BadRow("missing field", f"a message of {field!r} has no {key!r}")
    if message["role"] not in ("system", "user", "assistant"):
      raise BadRow(
        "wrong roles",
        f"a message of {field!r} is of {message['role']!r}, not of system, user or assistant",
      )
    if message["role"] == "system" and not messages and _blank(message["content"]):
      continue  # an empty system message is dropped
    messages.append(
      {
        "role": message["role"],
        "content": _text(message["content"], f"{field} ({message['role']})"),
      }
    )
  if not messages:
    raise BadRow("empty field", f"{field!r} has no messages with text")
  return messages


def _blank(value: Any) -> bool:
  return isinstance(value, str) and not value.strip()


def _system(messages: list[dict[str, str]]) -> list[dict[str, str]]:
  return [m for m in messages if m["role"] == "system"]


def _dialogue(text: str, field: str) -> list[dict[str, str]]:
  """HH-RLHF's text of a dialogue as messages."""
  text = _text(text, field).strip()
  marks = list(TURN.finditer(text))
  if not marks or marks[0].start() != 0:
    raise BadRow(
      "wrong roles",
      f"{field!r} is text without a prompt, and not a dialogue of 'Human:' turns",
    )
  ends = [mark.start() for mark in marks[1:]] + [len(text)]
  return [
    {
      "role": ROLE[mark[1]],
      "content": _text(text[mark.end() : end].strip(), f"{field} ({mark[1]})"),
    }
    for mark, end in zip(marks, ends)
  ]


def _ends_with_user(messages: Any) -> bool:
  last = messages[-1] if isinstance(messages, list) and messages else None
  return isinstance(last, dict) and last.get("role") == "user"


def _text(value: Any, field: str) -> str:
  if not isinstance(value, str):
    raise BadRow("wrong type", f"{field!r} is {_name(value)}, not text")
  if not value.strip():
    raise BadRow("empty field", f"{field!r} is empty")
  try:
    value.encode("utf-8")
  except UnicodeEncodeError:
    raise BadRow("invalid UTF-8", f"{field!r} holds half of a surrogate pair") from None
  return value


def _missing(field: str, record: dict) -> BadRow:
  return BadRow(
    "missing field", f"no {field}; the row has {', '.join(map(str, record))[:80] or 'nothing'}"
  )


def _name(value: Any) -> str:
  names = {
    dict: "an object",
    list: "a list",
    str: "text",
    bool: "true or false",
    type(None): "null",
  }
  return names.get(
    type(value), "a number" if isinstance(value, (int, float)) else f"a {type(value).__name__}"
  )
