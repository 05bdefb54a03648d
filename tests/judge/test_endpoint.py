"""The client against a real HTTP server that misbehaves. Oracle: the server's own counts."""

import email.utils
import json
import time

import pytest
from judge_server import Server, completion

from r2m_jax.config import ConfigError
from r2m_jax.judge.endpoint import (
  Cache,
  Endpoint,
  JudgeError,
  NoAnswer,
  Prices,
  ask_all,
  key_from,
  question,
  seconds_of,
  tokens_of,
  top_tokens,
)

KEY = "topsecret0123456789key"


def endpoint(url, key=KEY, **changes):
  how = dict(timeout=5.0, retries=3, backoff=0.01, longest=5.0)
  return Endpoint(url, key, **(how | changes))


def body(text, **more):
  return {"model": "judge-1", "messages": [{"role": "user", "content": text}], **more}


def questions(count, url="u"):
  return [question(body(f"question {i}"), url, 0) for i in range(count)]


def unruly(body, before):
  """Every kind of failure, by the number of the question. The last attempt succeeds."""
  number = int(body["messages"][0]["content"].split()[-1])
  good = completion(f"answer {number}")
  troubles = [
    good,
    ("status", 500, {}, "oops"),
    ("status", 503, {"Retry-After": "0"}, ""),
    ("status", 429, {"Retry-After": "0.05"}, "slow down"),
    ("cut",),
    ("raw", b"{not json"),
    ("raw", b'{"error": {"message": "busy"}}'),
    ("raw", b'{"choices": []}'),
    ("raw", b'{"choices": [{"message": {"content": 7}}]}'),
    completion("  "),
    ("sleep", 0.05, good),
  ]
  if before == 0:
    return troubles[number % len(troubles)]
  # choices in another order: the one with the lowest index counts
  other = {"index": 1, "message": {"content": "not this one"}}
  return completion("", choices=[other, good["choices"][0]])


def test_nothing_is_lost_and_nothing_asked_twice(tmp_path):
  with Server(unruly) as server:
    begin = time.monotonic()
    cache, wanted = Cache(tmp_path / "answers.jsonl"), questions(44, server.url)
    seen = []
    twice = [*wanted, *wanted[:7]]
    failed = ask_all(
      endpoint(server.url), twice, cache, workers=4, seen=lambda key, answer: seen.append(key)
    )
    assert failed == {} and time.monotonic() - begin < 10
    assert sorted(seen) == sorted(one.key for one in wanted) and server.most <= 4
    for number, one in enumerate(wanted):
      assert cache.answers[one.key]["text"] == f"answer {number}"
    # the server counts a blank answer as a good one, so only questions of that kind were answered
    # twice
    again = [
      json.loads(name)["messages"][0]["content"] for name, n in server.answered.items() if n > 1
    ]
    assert sorted(again) == sorted(f"question {i}" for i in range(44) if i % 11 == 9)
    assert sum(server.asked.values()) == 44 + sum(i % 11 not in (0, 10) for i in range(44))
    cache.close()

    asked = sum(server.asked.values())
    rest = Cache(tmp_path / "answers.jsonl")
    assert ask_all(endpoint(server.url), wanted, rest, workers=4) == {}
    assert sum(server.asked.values()) == asked
    more = question(wanted[0].body, server.url, 1)  # a repeat is a separate question
    ask_all(endpoint(server.url), [*wanted, more], rest, workers=4)
    assert sum(server.asked.values()) == asked + 1
    rest.close()


def test_retry_after_holds_back_every_thread(tmp_path):
  def behave(body, before):
    first = "question 0" in body["messages"][0]["content"] and not before
    return ("status", 429, {"Retry-After": "0.6"}, "") if first else completion("a")

  with Server(behave) as server:
    cache = Cache(tmp_path / "answers.jsonl")
    ask_all(endpoint(server.url), questions(1), cache, workers=1)
    assert server.times[1] - server.times[0] >= 0.6
    ask_all(endpoint(server.url), questions(30), cache, workers=3)
    with pytest.raises(JudgeError, match="asks to wait 60 s, longer than .*longest_wait = 5"):
      server.behave = lambda body, before: ("status", 429, {"Retry-After": "60"}, "")
      endpoint(server.url).ask(body("more"))
    cache.close()
  date = email.utils.formatdate(time.time() + 30, usegmt=True)
  assert 27 < seconds_of(date) <= 30
  assert [seconds_of(x) for x in ("7", "-1", "soon", None, "nan")] == [7, 0, None, None, None]


def test_what_stays_without_an_answer_is_told_and_asked_again(tmp_path):
  def behave(body, before):
    bad = body["messages"][0]["content"] == "question 3"
    return ("status", 400, {}, f"refused for {KEY}") if bad else completion("a")

  with Server(behave) as server:
    cache = Cache(tmp_path / "answers.jsonl")
    failed = ask_all(endpoint(server.url), questions(10), cache, workers=2)
    assert list(failed) == [questions(10)[3].key] and len(cache.answers) == 9
    assert "HTTP 400: refused for (hidden)" in failed[questions(10)[3].key]
    ask_all(endpoint(server.url), questions(10), cache, workers=2)
    assert sum(server.asked.values()) == 11
    cache.close()


def test_a_dead_endpoint_ends_it_in_bounded_time(tmp_path):
  with Server(lambda body, before: ("status", 502, {}, "down")) as server:
    cache = Cache(tmp_path / "answers.jsonl")
    with pytest.raises(JudgeError, match="5 questions in a row had no answer .*HTTP 502: down"):
      ask_all(endpoint(server.url, retries=1), questions(500), cache, workers=4)
    assert sum(server.asked.values()) < 40
    cache.close()
  cache = Cache(tmp_path / "answers.jsonl")
  with pytest.raises(JudgeError, match="ConnectionRefused|Connection refused"):
    ask_all(endpoint(server.url, retries=0), questions(20), cache, workers=2)
  cache.close()


def test_slow_answers_are_cut_off():
  with Server(lambda body, before: ("sleep", 1.0, completion("late"))) as server:
    begin = time.monotonic()
    slow = r"config.judge.timeout = 0.2 s \(timed out\)"
    with pytest.raises(NoAnswer, match=f"2 attempts failed.*{slow}"):
      endpoint(server.url, timeout=0.2, retries=1).ask(body("x"))
    assert time.monotonic() - begin < 0.9


def test_a_server_that_is_always_too_slow_is_told_with_the_setting(tmp_path):
  with Server(lambda body, before: ("sleep", 1.0, completion("late"))) as server:
    cache = Cache(tmp_path / "answers.jsonl")
    with pytest.raises(JudgeError, match="run the same command .*, or raise config.judge.timeout"):
      ask_all(endpoint(server.url, timeout=0.1, retries=0), questions(9), cache, workers=3)
    cache.close()


@pytest.mark.parametrize(
  "status, message",
  [
    (401, "refuses the key in config.judge.key_env"),
    (403, "refuses the key"),
    (404, "config.judge.url leads to .*/v1/chat/completions, which is no chat endpoint"),
    (307, "is no chat endpoint"),
  ],
)
def test_what_no_retry_can_mend_ends_at_once(status, message):
  def behave(body, before):
    del body, before
    return ("status", status, {"Location": "http://127.0.0.1:9/"}, f"Incorrect key {KEY}")

  with Server(behave) as server:
    with pytest.raises(JudgeError, match=message) as caught:
      endpoint(server.url).ask(body("x"))
    assert KEY not in str(caught.value) and sum(server.asked.values()) == 1


def test_the_key_is_sent_and_kept_nowhere(tmp_path, monkeypatch):
  """The server echoes the key in every field that is stored."""

  def behave(body, before):
    del before
    reply = completion(f"your key is {KEY}")
    reply["model"] = f"model-{KEY}"
    return reply

  with Server(behave) as server:
    cache = Cache(tmp_path / "answers.jsonl")
    ask_all(endpoint(server.url), questions(3), cache, workers=1)
    cache.close()
    assert {headers["Authorization"] for headers in server.headers} == {f"Bearer {KEY}"}
    assert KEY not in (tmp_path / "answers.jsonl").read_text()
    ask_all(endpoint(server.url, key=""), questions(4)[3:], Cache(tmp_path / "b"), workers=1)
    assert "Authorization" not in server.headers[-1]
  monkeypatch.setenv("MY_JUDGE", f" {KEY}\n")
  assert key_from("MY_JUDGE") == KEY and key_from("NOT_THERE") == "" and key_from("") == ""
  monkeypatch.setenv("MY_JUDGE", f"{KEY} and\nmore")
  with pytest.raises(ConfigError, match="key_env is 'MY_JUDGE'") as caught:
    key_from("MY_JUDGE")
  assert KEY not in str(caught.value)


def test_a_line_that_a_crash_cut_is_dropped(tmp_path):
  file = tmp_path / "answers.jsonl"
  file.write_text('{"key": "a", "text": "1"}\n{"key": "b", "te')
  cache = Cache(file)
  cache.keep("c", {"text": "half a pair \ud800"})
  cache.close()
  again = Cache(file)
  assert set(again.answers) == {"a", "c"} and again.answers["c"]["text"] == "half a pair \ud800"
  again.close()


def test_log_probabilities_in_any_form():
  assert top_tokens(None) is None and top_tokens({"content": None}) is None
  place = {"token": "m", "logprob": -0.1, "top_logprobs": [{"token": "M", "logprob": -2}]}
  odd = {"token": "x", "logprob": float("-inf"), "top_logprobs": None}
  assert top_tokens({"content": [place, odd]}) == [{"m": -0.1, "M": -2.0}, {}]


def test_the_estimate_is_from_above():
  asked = body("word " * 300, max_tokens=50)
  prompt, most = tokens_of(asked)
  assert prompt >= 375 and most == 50
  assert Prices(2.0, 8.0).cost(1_000_000, 500_000) == 6.0
