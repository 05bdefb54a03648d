"""Reasoning between `<think>` and `</think>`: what of a text it is, and the seam between a
generation prompt and an answer.

A chat template may end a prompt with `<think>`, so that the answer starts within its reasoning, or
with an empty block, so that it has none. The text of an answer may carry its opening tag or not.
The functions here see to it that each tag comes once.
"""

import re

OPEN, CLOSE = "<think>", "</think>"
BLOCK = re.compile(f"{OPEN}.*?({CLOSE}|\\Z)", re.S)  # an unclosed block reaches to the end


def opened(text: str) -> str:
  """The text with the opening tag that it lacks if its first tag is a closing one."""
  before, close, _ = text.partition(CLOSE)
  return f"{OPEN}\n{text}" if close and OPEN not in before else text


def without_reasoning(text: str) -> str:
  """The text without its reasoning, and without the white space that followed it.

  Reasoning is every block between the tags, what precedes a closing tag that nothing opened, and
  what follows an opening tag that nothing closes. The last is all there is of a response that the
  length limit cut off while it reasoned: "" is left of it.
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
    opening: what the generation prompt ends with from `<think>` on; see `Tokenizer.opening`.
    answer: with or without reasoning, with or without the opening tag.

  Returns:
    If the prompt has opened the tag: the answer without its own one, or a closing tag and then an
    answer that has no reasoning. If the prompt holds a whole, empty block: the answer without its
    reasoning. Else the answer, with an opening tag if it has only the closing one.
  """
  if not opening:
    return opened(answer)
  if not is_open(opening):
    return without_reasoning(answer)
  rest = after_opening(opening, answer)
  return rest if CLOSE in rest or rest != answer else f"\n{CLOSE}\n\n{answer}"


def after_opening(opening: str, answer: str) -> str:
  """The answer without the opening tag that a generation prompt has already."""
  if not is_open(opening):
    return answer
  for tag in (opening, OPEN):
    if answer.lstrip().startswith(tag):
      return answer.lstrip()[len(tag) :]
  return answer
