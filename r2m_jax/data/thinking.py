"""Reasoning between `<think>` and `</think>`: which part of a text it is, and how an answer
continues a generation prompt.

A chat template may end a prompt with `<think>`, so that the answer starts within its reasoning, or
with an empty block, so that it has none. The text of an answer may or may not have its opening tag.
The functions here ensure that each tag appears once.
"""

import re

OPEN, CLOSE = "<think>", "</think>"
BLOCK = re.compile(f"{OPEN}.*?({CLOSE}|\\Z)", re.S)  # an unclosed block reaches to the end


def opened(text: str) -> str:
  """The text, with an opening tag added if its first tag is a closing one."""
  before, close, _ = text.partition(CLOSE)
  return f"{OPEN}\n{text}" if close and OPEN not in before else text


def without_reasoning(text: str) -> str:
  """The text without its reasoning, and without the white space that followed it.

  Reasoning is every block between the tags, the text before an unopened closing tag, and the text
  after an unclosed opening tag. A response that was cut off during its reasoning has only the last
  kind, so its result is "".
  """
  answer = text
  while OPEN in answer or CLOSE in answer:
    answer = BLOCK.sub("", opened(answer))
  return text if answer == text else answer.lstrip()


def is_unclosed(text: str) -> bool:
  """Whether the text ends within its reasoning."""
  return OPEN in text and CLOSE not in text[text.rindex(OPEN) :]


def is_open(opening: str) -> bool:
  """Whether a generation prompt with this `Tokenizer.opening` leaves reasoning open."""
  return bool(opening) and CLOSE not in opening


def continuation(opening: str, answer: str) -> str:
  """An answer from a row of data as it continues a generation prompt.

  Args:
    opening: the end of the generation prompt from `<think>` on; see `Tokenizer.opening`.
    answer: with or without reasoning, with or without the opening tag.

  Returns:
    If the prompt has an open tag: the answer without its own opening tag, or a closing tag followed
    by an answer that has no reasoning. If the prompt has an empty block: the answer without its
    reasoning. Otherwise: the answer, with an opening tag if it has only the closing one.
  """
  if not opening:
    return opened(answer)
  if not is_open(opening):
    return without_reasoning(answer)
  rest = after_opening(opening, answer)
  return rest if CLOSE in rest or rest != answer else f"\n{CLOSE}\n\n{answer}"


def after_opening(opening: str, answer: str) -> str:
  """The answer without the opening tag that the generation prompt already has."""
  if not is_open(opening):
    return answer
  for tag in (opening, OPEN):
    if answer.lstrip().startswith(tag):
      return answer.lstrip()[len(tag) :]
  return answer
