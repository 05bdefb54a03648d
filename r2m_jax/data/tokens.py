"""Whether a reward model may read the very tokens of the policy, in place of their text.

Two ways lead from a sampled response to the reward model. By text, the response is decoded and
rendered by `Renderer.ids`. By tokens, the reward model reads the prompt and the sampled ids as they
are, and `own_ending` after a response that ended. Both give the same ids, if the two tokenizers and
templates agree and the response is written as its own text would be encoded. `own_ending` checks the
former before a run, on its prompts; `recoded` counts the samples for which the latter fails.
"""

import dataclasses
import json
from collections.abc import Sequence

from r2m_jax.data import thinking
from r2m_jax.data.text import Prompt, Renderer, Tokenizer

ANSWER = "Yes, it is so."
REASONED = "Once more.\n</think>\n\nIt is so."  # an answer after reasoning, but for its opening tag
THOROUGH = 64  # prompts that are rendered with each of the answers; the others with one
# of a fast tokenizer's JSON: what decides which ids a text becomes
PARTS = ("normalizer", "pre_tokenizer", "model", "decoder")


class Differs(ValueError):
  """Why a reward model does not read the policy's tokens, as the end of a sentence."""


def own_ending(
  tokenizer: Tokenizer,
  renderer: Renderer,
  prompts: Sequence[Prompt],
  ids: Sequence[Sequence[int]],
  longest: int,
) -> tuple[int, ...]:
  """The tokens that the reward model reads after a finished response, in place of the one token that
  ended it for the policy.

  Args:
    tokenizer: of the policy.
    prompts, ids: the run's prompts, and their tokens as the policy reads them.
    longest: most tokens of a response.

  Raises:
    Differs: the two do not render alike.
  """
  theirs = renderer.tokenizer
  if not knows_tokens_of(theirs, tokenizer):
    raise Differs("its tokenizer is not the policy's")
  if theirs.vocab_size is not None and theirs.vocab_size < (tokenizer.vocab_size or 0):
    raise Differs(
      f"it knows {theirs.vocab_size} ids, and the policy may sample {tokenizer.vocab_size}"
    )
  if renderer.strip_thinking:
    raise Differs("reward.strip_thinking leaves reasoning out of what it reads")
  most, renderer = renderer.max_length, dataclasses.replace(renderer, max_length=0)
  ending = ending_of(tokenizer, renderer, prompts[0], ids[0])
  length = max(map(len, ids)) + longest + max(0, len(ending) - 1)
  if most and most < length:
    raise Differs(
      f"reward.max_length is {most}, and a prompt with its response may have {length} tokens, of "
      "which it would lose the beginning"
    )
  for number, (prompt, row) in enumerate(zip(prompts, ids)):
    require_alike(tokenizer, renderer, prompt, row, ending, thorough=number < THOROUGH)
  return ending


def knows_tokens_of(theirs: Tokenizer, mine: Tokenizer) -> bool:
  """Whether `theirs` makes the same ids of a text as `mine`; it may have more special tokens.

  Of tokenizers that are not fast only the vocabularies can be compared.
  """
  ids = theirs.hf.get_vocab()
  if any(ids.get(token) != i for token, i in mine.hf.get_vocab().items()):
    return False
  if not (mine.hf.is_fast and theirs.hf.is_fast):
    return mine.hf.is_fast == theirs.hf.is_fast
  one, other = (json.loads(each.hf.backend_tokenizer.to_str()) for each in (mine, theirs))
  return all(one.get(part) == other.get(part) for part in PARTS)


def ending_of(
  tokenizer: Tokenizer, renderer: Renderer, prompt: Prompt, ids: Sequence[int]
) -> tuple[int, ...]:
  """What the renderer adds to a finished response.

  Raises:
    Differs: it does not begin with the policy's prompt and the response.
  """
  begins = [*ids, *tokenizer.encode(ANSWER, special=False)]
  read = renderer.ids(prompt, tokenizer.whole(prompt, ANSWER))
  if read[: len(begins)] != begins:
    raise Differs(difference(renderer, prompt, begins, read))
  return tuple(read[len(begins) :])


def require_alike(
  tokenizer: Tokenizer,
  renderer: Renderer,
  prompt: Prompt,
  ids: Sequence[int],
  ending: Sequence[int],
  *,
  thorough: bool,
) -> None:
  """Raises Differs if the renderer makes other ids of a prompt and an answer than the policy has.

  Args:
    thorough: try each of `answers_of`, finished and cut off; else one finished answer.
  """
  tried = answers_of(tokenizer) if thorough else (ANSWER,)
  for answer in tried:
    for truncated in (False, True) if thorough else (False,):
      wanted = [*ids, *tokenizer.encode(answer, special=False), *(() if truncated else ending)]
      read = renderer.ids(prompt, tokenizer.whole(prompt, answer), truncated=truncated)
      if read != wanted:
        raise Differs(difference(renderer, prompt, wanted, read))


def answers_of(tokenizer: Tokenizer) -> tuple[str, ...]:
  """The kinds of answers that a policy gives, as it samples them: with reasoning, too, unless the
  generation prompt holds an empty block of it.
  """
  if thinking.is_open(tokenizer.opening):
    return ANSWER, REASONED
  return (ANSWER,) if tokenizer.opening else (ANSWER, f"{thinking.OPEN}\n{REASONED}")


def difference(
  renderer: Renderer, prompt: Prompt, wanted: Sequence[int], read: Sequence[int]
) -> str:
  """Where two renderings of a row part, in words."""
  if isinstance(prompt, str):
    rule = "its chat template" if renderer.tokenizer.has_template else "prompt + ' ' + response"
    return f"a prompt of text is taken as it is by the policy, and rendered by {rule} for it"
  at = next(
    (i for i, (a, b) in enumerate(zip(wanted, read)) if a != b), min(len(wanted), len(read))
  )
  mine, theirs = (
    renderer.tokenizer.hf.decode(row[max(0, at - 4) :][:12]) for row in (wanted, read)
  )
  return f"its chat template gives {theirs!r} where the policy has {mine!r}"


def recoded(
  renderer: Renderer, rows: Sequence[tuple[Prompt, str, bool]], read: Sequence[Sequence[int]]
) -> int:
  """How many rows (prompt, response, whether it was cut off) would be read as other ids than `read`
  if their text were rendered.
  """
  ids = (renderer.ids(prompt, text, truncated=cut) for prompt, text, cut in rows)
  return sum(list(one) != list(other) for one, other in zip(ids, read))
