"""Questions to an OpenAI-compatible endpoint: asked once, saved at once, and bounded in time and
cost.

It uses the standard library's HTTP. The key comes from the environment and never reaches a file, a
log or an error: every text that leaves this module has passed `Endpoint.hide`.
"""

import contextlib
import email.utils
import hashlib
import http.client
import json
import math
import os
import queue
import random
import threading
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple

from r2m_jax.config import HIDDEN, ConfigError, redact
from r2m_jax.parallel.errors import UserError
from r2m_jax.run.files import DamagedFile, read_jsonl

LARGEST = 2**24  # maximum bytes of an answer
SLOWEST = 60.0  # seconds; the longest wait between two attempts
IN_A_ROW = 5  # consecutive questions without an answer after which an endpoint counts as down
GRACE = 10.0  # seconds for pending answers to arrive after a signal
CHARACTERS = 3  # characters of a token, for an upper estimate
TOKENS_KEPT = 3  # tokens of an answer whose most likely alternatives are kept


class JudgeError(UserError, RuntimeError):
  """A judge cannot continue. Its answers are kept, and the same command asks the remaining
  questions.
  """

  status = 1


class NoAnswer(Exception):
  """One question has no answer; the message gives the reason."""


class Again(Exception):
  """An attempt that may succeed later; `after` is the wait that the server requested, in
  seconds.
  """

  def __init__(self, reason: str, after: float | None = None):
    super().__init__(reason)
    self.after = after


class Stopped(Exception):
  """The questions are no longer needed."""


class _NoRedirect(urllib.request.HTTPRedirectHandler):
  """A redirect would carry the key to another address, so it is an error."""

  def redirect_request(self, *args, **kwargs):
    return None


def key_from(name: str, field: str = "judge.key_env") -> str:
  """The key in the environment variable `name`, which is the value of the config's `field`; "" if
  there is none.

  Raises:
    ConfigError: the value cannot be a key. The message does not show it.
  """
  key = os.environ.get(name, "").strip() if name else ""
  if not key.isascii() or any(c.isspace() or not c.isprintable() for c in key):
    raise ConfigError(
      f"config.{field} is {name!r}: that variable holds spaces or characters that no key "
      "has; set it again"
    )
  return key


class Endpoint:
  """An OpenAI-compatible chat endpoint; its methods may be called from several threads.

  Args:
    url: up to the version, such as http://localhost:8000/v1, or with /chat/completions.
    key: sent as a bearer token; "" for none.
    named: the config fields with the address, the model and the key's variable.
    timeout: seconds within which one attempt must return its whole answer.
    retries: further attempts after the first.
    backoff: seconds before the second attempt; doubled before each further one.
    longest: seconds; a server that requests a longer wait stops the questions.
  """

  what = "judge"
  malformed = "no chat completion"
  advice = "config.judge.logprobs and config.judge.body change what is sent"

  def __init__(
    self,
    url: str,
    key: str,
    *,
    timeout: float,
    retries: int,
    backoff: float,
    longest: float,
    named: tuple[str, str, str] = ("judge.url", "judge.model", "judge.key_env"),
  ):
    self.url = self.address(url)
    self.stop = threading.Event()
    self._named = named
    self._key = key
    self._timeout = timeout
    self._retries = retries
    self._backoff = backoff
    self._longest = longest
    self._opener = urllib.request.build_opener(_NoRedirect)
    self._lock = threading.Lock()
    self._resume = 0.0  # monotonic time before which no question is sent

  @staticmethod
  def address(url: str) -> str:
    """The address of requests."""
    base = url.rstrip("/")
    return base if base.endswith("/chat/completions") else f"{base}/chat/completions"

  def hide(self, text: str) -> str:
    """The text without the key and without anything that looks like a key."""
    return redact(text.replace(self._key, HIDDEN) if self._key else text)

  def ask(self, body: dict[str, Any]) -> dict[str, Any]:
    """The answer to one request, with retries.

    Returns:
      text, first (`top_tokens`), finish, model, prompt_tokens and completion_tokens (`counted`).

    Raises:
      NoAnswer: the request was refused, or all attempts failed.
      JudgeError: no request can succeed.
      Stopped: `stop` was set.
    """
    reason = ""
    for attempt in range(self._retries + 1):
      self._pause(attempt)
      try:
        return self._attempt(body, last=attempt == self._retries)
      except Again as error:
        reason = str(error)
        self._hold_back(error.after)
    raise NoAnswer(f"{self._retries + 1} attempts failed, the last with: {reason}")

  def _pause(self, attempt: int) -> None:
    """Waits for the backoff of this attempt, and for the wait that the server requested from any
    thread.
    """
    wait = 0.0
    if attempt:
      longest = min(self._backoff * 2 ** (attempt - 1), SLOWEST)
      wait = longest * random.uniform(0.5, 1.0)  # so that threads do not retry at the same time
    with self._lock:
      wait = max(wait, self._resume - time.monotonic())
    if self.stop.wait(max(wait, 0.0)):
      raise Stopped

  def _hold_back(self, seconds: float | None) -> None:
    """Makes all threads wait until the time that a server named."""
    if seconds is None:
      return
    if seconds > self._longest:
      raise JudgeError(
        f"the {self.what} at {self.url} asks to wait {seconds:.0f} s, longer than "
        f"config.judge.longest_wait = {self._longest:g}; run the same command later, which keeps "
        "the answers, or raise that"
      )
    with self._lock:
      self._resume = max(self._resume, time.monotonic() + seconds)

  def _attempt(self, body: dict[str, Any], *, last: bool) -> dict[str, Any]:
    headers = {"Content-Type": "application/json", "Accept": "application/json"}
    if self._key:
      headers["Authorization"] = f"Bearer {self._key}"
    data = json.dumps(body).encode()
    request = urllib.request.Request(self.url, data, headers, method="POST")
    try:
      with self._opener.open(request, timeout=self._timeout) as response:
        content = _read(response, self._timeout)
    except TimeoutError:
      raise _too_slow(self._timeout) from None
    except urllib.error.HTTPError as error:
      raise self._refusal(error) from None
    except (OSError, http.client.HTTPException) as error:
      if isinstance(getattr(error, "reason", None), TimeoutError):  # while it connects
        raise _too_slow(self._timeout) from None
      raise Again(self.hide(f"{type(error).__name__}: {error}")) from None
    try:
      return self.answer(json.loads(content), body, last=last)
    except (ValueError, KeyError, TypeError, IndexError, AttributeError, RecursionError):
      shown = content[:200].decode("utf-8", "replace")
      raise Again(self.hide(f"{self.malformed}: {shown!r}")) from None

  def answer(self, reply: Any, body: dict[str, Any], *, last: bool) -> dict[str, Any]:
    """The parts of a reply that are kept. `last`: no attempt follows.

    Raises:
      Again: another attempt may give a better one. ValueError or similar: the reply has another
      form.
    """
    answer = _answer(reply, self.hide)
    if not answer["text"].strip() and not last and answer["finish"] != "length":
      raise Again("an empty answer")
    return counted(answer, body)

  def _refusal(self, error: urllib.error.HTTPError) -> Exception:
    """The error for a status other than 200: another attempt, no answer, or the end."""
    with contextlib.suppress(OSError, http.client.HTTPException):
      text = " ".join(self.hide(error.read(2000).decode("utf-8", "replace")).split())[:300]
      reason = f"HTTP {error.code}: {text}" if text else f"HTTP {error.code}"
      if error.code in (401, 403) or "insufficient_quota" in text:
        return JudgeError(
          f"the {self.what} at {self.url} refuses the key in config.{self._named[2]} ({reason}); set that "
          "environment variable, then give the same command"
        )
      if error.code in (404, 405) or 300 <= error.code < 400:
        return self.not_found(reason)
      if error.code in (408, 409, 425, 429) or error.code >= 500:
        return Again(reason, seconds_of(error.headers.get("Retry-After")))
      return NoAnswer(f"the {self.what} refuses the request ({reason}); {self.advice}")
    return Again(f"HTTP {error.code}, cut off", seconds_of(error.headers.get("Retry-After")))

  def not_found(self, reason: str) -> JudgeError:
    """The final error, if no known service answers at the address."""
    url, model, _ = self._named
    return JudgeError(
      f"config.{url} leads to {self.url}, which is no chat endpoint or does not know "
      f"config.{model} ({reason}); correct the two"
    )


def seconds_of(header: str | None) -> float | None:
  """The wait in a Retry-After header, a number or a date, in seconds from now; None without one."""
  if not header:
    return None
  try:
    seconds = float(header)
  except ValueError:
    try:
      seconds = email.utils.parsedate_to_datetime(header).timestamp() - time.time()
    except ValueError:
      return None
  return max(seconds, 0.0) if math.isfinite(seconds) else None


def _too_slow(timeout: float) -> Again:
  return Again(f"no whole answer within config.judge.timeout = {timeout:g} s (timed out)")


def _read(response, timeout: float) -> bytes:
  """The whole body, within `timeout` seconds even if it arrives slowly."""
  end = time.monotonic() + timeout
  parts = []
  size = 0
  while part := response.read1(2**16):
    parts.append(part)
    size += len(part)
    if size > LARGEST:
      raise Again(f"an answer of more than {LARGEST} bytes")
    if time.monotonic() > end:
      raise _too_slow(timeout)
  return b"".join(parts)


def _answer(reply: dict, hide: Callable[[str], str]) -> dict[str, Any]:
  """The parts of a chat completion that are kept. Raises ValueError or similar for another form."""
  choice = min(reply["choices"], key=lambda c: c.get("index", 0))
  content = choice["message"]["content"]
  usage = reply.get("usage") or {}

  def count(name):
    value = usage.get(name)
    return value if isinstance(value, int) and value >= 0 else None

  if not isinstance(content, str | None):
    raise ValueError("the content is not text")
  return {
    "text": hide(content or ""),
    "first": top_tokens(choice.get("logprobs")),
    "finish": str(choice.get("finish_reason") or ""),
    "model": hide(str(reply.get("model") or "")),
    "prompt_tokens": count("prompt_tokens"),
    "completion_tokens": count("completion_tokens"),
  }


def top_tokens(logprobs: Any) -> list[dict[str, float]] | None:
  """The log-probabilities of the most likely tokens, for each of an answer's first tokens."""
  content = logprobs.get("content") if isinstance(logprobs, dict) else None
  if not isinstance(content, list):
    return None
  tokens = []
  for place in content[:TOKENS_KEPT]:
    found = {}
    for entry in [place, *(place.get("top_logprobs") or [])]:
      if isinstance(entry.get("logprob"), (int, float)) and math.isfinite(entry["logprob"]):
        found[str(entry.get("token"))] = float(entry["logprob"])
    tokens.append(found)
  return tokens


# ---- questions and their cache ----


class Question(NamedTuple):
  """A request and its key in the cache, which identifies everything that the answer depends on."""

  key: str
  body: dict[str, Any]


def question(body: dict[str, Any], url: str, repeat: int) -> Question:
  """The question for a request; repeats of one request are separate questions."""
  named = json.dumps([url, body, repeat], sort_keys=True)
  return Question(hashlib.sha256(named.encode()).hexdigest(), body)


class Cache:
  """Answers by question, as JSON lines; every answer is on disk before it counts."""

  def __init__(self, path: Path):
    self.path = path
    self.answers: dict[str, dict] = {}
    for number, row in enumerate(read_jsonl(path), 1):
      if not isinstance(row, dict) or not isinstance(row.get("key"), str):
        raise DamagedFile(
          f"{path}:{number} is not an answer of a judge; restore the file from a copy"
        )
      self.answers[row["key"]] = row
    self._lock = threading.Lock()
    path.parent.mkdir(parents=True, exist_ok=True)
    self._file = open(path, "ab+")  # noqa: SIM115  open until the task ends
    self._cut_tail()

  def _cut_tail(self) -> None:
    """Drops an incomplete last line, to which the next line would otherwise be appended."""
    self._file.seek(0)
    content = self._file.read()
    self._file.truncate(content.rfind(b"\n") + 1)

  def keep(self, key: str, answer: dict) -> None:
    self.keep_all({key: answer})

  def keep_all(self, answers: dict[str, dict]) -> None:
    """Saves several answers, by key, with one write."""
    rows = [{"key": key} | answer for key, answer in answers.items()]
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    with self._lock:
      self._file.write(text.encode("utf-8", "backslashreplace"))
      self._file.flush()
      os.fsync(self._file.fileno())
      self.answers |= {row["key"]: row for row in rows}

  def close(self) -> None:
    with self._lock:
      self._file.close()


def ask_all(
  endpoint: Endpoint,
  questions: Iterable[Question],
  cache: Cache,
  *,
  workers: int,
  seen: Callable[[str, dict], None] = lambda key, answer: None,
  keep: Callable[[str, dict], None] | None = None,
) -> dict[str, str]:
  """Sends the questions that are not in the cache, each once, from a pool of threads.

  Args:
    keep: saves the answer to a question in the cache, by the question's key; None: unchanged.
    seen: called in this thread with the key of every new answer and the answer, once it is in the
      cache. An error that it raises ends the questions.

  Returns:
    The reason, by key, for each question without an answer. These questions are sent again next
    time.

  Raises:
    JudgeError: the endpoint refuses all questions, or `IN_A_ROW` consecutive questions had no
      answer.
  """
  endpoint.stop.clear()
  keep = keep or cache.keep
  missing = {one.key: one for one in questions if one.key not in cache.answers}
  waiting: queue.SimpleQueue = queue.SimpleQueue()
  results: queue.SimpleQueue = queue.SimpleQueue()
  for one in missing.values():
    waiting.put(one)

  def work():
    with contextlib.suppress(queue.Empty, Stopped):
      while not endpoint.stop.is_set():
        one = waiting.get_nowait()
        try:
          answer = endpoint.ask(one.body)
          keep(one.key, answer)
          results.put((one.key, answer))
        except Stopped:
          raise
        except Exception as error:  # noqa: BLE001  reported to the waiting thread
          results.put((one.key, error))

  threads = [threading.Thread(target=work, daemon=True) for _ in range(min(workers, len(missing)))]
  for thread in threads:
    thread.start()
  try:
    return _collect(endpoint, results, len(missing), seen)
  finally:
    endpoint.stop.set()
    end = time.monotonic() + GRACE
    for thread in threads:
      thread.join(max(end - time.monotonic(), 0.0))


def _collect(endpoint: Endpoint, results, count: int, seen) -> dict[str, str]:
  failed: dict[str, str] = {}
  in_a_row = 0
  for _ in range(count):
    key, found = results.get()
    if isinstance(found, NoAnswer):
      failed[key] = str(found)
      in_a_row += 1
      if in_a_row == IN_A_ROW:
        raise JudgeError(
          f"{IN_A_ROW} questions in a row had no answer from {endpoint.url}: {found}. The "
          "answers are kept; run the same command once it answers"
          f"{', or raise config.judge.timeout' if 'timed out' in str(found) else ''}"
        )
    elif isinstance(found, Exception):
      raise found
    else:
      in_a_row = 0
      seen(key, found)
  return failed


# ---- cost ----


class Prices(NamedTuple):
  """Dollars per million tokens; 0 and 0 if they are unknown."""

  prompt: float
  completion: float

  def cost(self, prompt_tokens: float, completion_tokens: float) -> float:
    return (self.prompt * prompt_tokens + self.completion * completion_tokens) / 1e6

  def spent(self, answers: Iterable[dict[str, Any]]) -> float:
    """The cost of answers with `counted` tokens."""
    return sum(self.cost(a["prompt_tokens"], a["completion_tokens"]) for a in answers)


def tokens_of(body: dict[str, Any]) -> tuple[int, int]:
  """(prompt tokens, completion tokens) of a request, estimated from above."""
  text = sum(len(message["content"]) for message in body["messages"])
  most = body.get("max_completion_tokens") or body.get("max_tokens") or 0
  return math.ceil(text / CHARACTERS) + 8 * len(body["messages"]), int(most)


def counted(answer: dict[str, Any], body: dict[str, Any]) -> dict[str, Any]:
  """The answer with its numbers of tokens: counted by the endpoint, or else estimated."""
  estimate = {
    "prompt_tokens": tokens_of(body)[0],
    "completion_tokens": math.ceil(len(answer["text"]) / CHARACTERS),
  }
  return answer | {name: value for name, value in estimate.items() if answer[name] is None}
