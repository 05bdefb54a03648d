"""`task=judge`: compares two sets of answers, judged by an endpoint, a reward model or a file.

  python -m r2m_jax.main --config=configs/default.py --workdir=W --config.task=judge \\
    --config.judge.candidate=AFTER.jsonl --config.judge.baseline=BEFORE.jsonl \\
    --config.judge.url=http://localhost:8000/v1 --config.judge.model=NAME

docs/judge.md describes the judges, the templates and the numbers. WORKDIR then holds

  judge.json         the result, with judge, date and template
  judge.html         the same as a page
  judgments.jsonl    every verdict
  answers.jsonl      every answer of an endpoint; a rerun sends only missing questions
"""

import collections
import json
import random
import sys
import time
import urllib.parse
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from r2m_jax.config import ConfigError
from r2m_jax.data.jsonl import write_rows
from r2m_jax.hf.folders import load_reward, mesh_of, read_object
from r2m_jax.judge import statistics, votes
from r2m_jax.judge.endpoint import (
  Cache,
  Endpoint,
  JudgeError,
  Prices,
  Question,
  ask_all,
  key_from,
  question,
  tokens_of,
)
from r2m_jax.judge.items import Item, read_items
from r2m_jax.judge.results import (
  Scores,
  Unread,
  cautions,
  findings,
  numbers,
  write_judge_page,
  write_result,
)
from r2m_jax.judge.statistics import Verdict
from r2m_jax.judge.templates import TEMPLATES, TOP, Reading, Template, read_answer, request
from r2m_jax.run.files import read_json, sha256_of, write_atomic
from r2m_jax.run.progress import progress
from r2m_jax.run.workdir import claim
from r2m_jax.tasks import serve

SAME_RATING = 0.1  # ratings that differ by at most this are a tie, as in MT-bench
ANSWERS = "answers.jsonl"
JUDGMENTS = "judgments.jsonl"


class Judged(NamedTuple):
  """The results of a judge."""

  verdicts: list[Verdict]
  scores: Scores | None
  unread: Unread
  rows: list[dict[str, Any]]  # of judgments.jsonl
  judge: dict[str, Any]  # name of the judge, for the result


def run(config, workdir: Path) -> None:
  """Judges, and writes the result into the workdir.

  Raises:
    JudgeError: some questions have no answer, or no answer can be read. The result is written.
  """
  settings = config.judge
  claim(config, workdir)
  if settings.judgments and not settings.candidate:
    votes.compare_files(settings.judgments, settings.votes, workdir)
    return
  with serve.matmul_precision(config):
    candidate = settings.candidate or generated(config, workdir)
    items = read_items(candidate, settings.candidate_field, settings.baseline, baseline_of(config))
    print(f"judge    {len(items)} prompts of {candidate}")
    judged = judge_of(config)(config, items, workdir)
  report(config, workdir, items, judged)


def judge_of(config):
  """The judging function for the judge that the config names."""
  if config.judge.url:
    return by_endpoint
  return by_reward_model if config.judge.reward else by_file


def baseline_of(config) -> str:
  """The field with the baseline's answers; "" if answers are rated without a baseline."""
  settings = config.judge
  if settings.baseline_field or settings.baseline:
    return settings.baseline_field or "text"
  alone = settings.url and TEMPLATES[settings.template].rates
  return "" if alone else "reference"


def generated(config, workdir: Path) -> str:
  """The file of the policy's answers to config.generate.input, generated in the workdir if it does
  not exist.
  """
  out, made = workdir / "candidate.jsonl", workdir / "candidate.json"
  how = json.loads(config.generate.to_json()) | {"policy": config.policy.path, "seed": config.seed}
  for name in ("output", "batch_size", "format", "name", "n"):
    del how[name]
  read = contents(config)
  if out.exists() and made.exists():
    before = read_json(made)
    changed = [name for name in how if before.get(name) != how[name]]
    # an earlier version has not stored them
    changed += [name for name in read if before.get(name, read[name]) != read[name]]
    if changed:
      raise ConfigError(
        f"{out} was generated with other settings ({', '.join(changed)}); choose another "
        "--workdir, or delete that file"
      )
    print(f"judge    the answers in {out} were generated before")
    return str(out)
  config = config.copy_and_resolve_references()
  with config.unlocked():
    config.generate.output = str(out)
    config.generate.format = "rows"
    config.generate.n = 1
  serve.run_generate(config)
  write_atomic(made, json.dumps(how | read, indent=1) + "\n")
  return str(out)


def contents(config) -> dict[str, list[str]]:
  """SHA-256 of each file behind the input and the policy's weights, if they are on this machine."""
  given, policy = (Path(path).expanduser() for path in (config.generate.input, config.policy.path))
  files = {"generate.input": [given] if given.is_file() else []}
  files["policy.path"] = sorted(policy.glob("*.safetensors"))
  return {
    f"content of {field}": list(map(sha256_of, found)) for field, found in files.items() if found
  }


def report(config, workdir: Path, items: list[Item], judged: Judged) -> None:
  """Writes the files of the workdir and prints the results."""
  result = numbers(items, judged.verdicts, judged.scores, judged.unread)
  if config.judge.votes:
    result["agreement"] = votes.against_items(config.judge.votes, items, judged.verdicts)
  about = {
    "date": time.strftime("%Y-%m-%d %H:%M:%S"),
    "judge": judged.judge,
    "candidate": config.judge.candidate or config.policy.path,
    "baseline": config.judge.baseline or f"{baseline_of(config)} of the same rows",
  }
  write_rows(str(workdir / JUDGMENTS), judged.rows)
  write_result(workdir / "judge.json", about | {"result": result})
  won, weight = statistics.by_prompt(statistics.usable(judged.verdicts), len(items))
  preference = {i: float(won[i] / weight[i]) for i in np.flatnonzero(weight)}
  write_judge_page(workdir / "judge.html", about, result, items, preference)
  for line in findings(result):
    print(f"result   {line}")
  for line in cautions(result):
    print(f"care     {line}")
  print(f"wrote    {workdir / 'judge.json'} and {workdir / 'judge.html'}")
  if judged.unread.unanswered:
    raise JudgeError(
      f"{judged.unread.unanswered} questions have no answer; the result covers the others. Run "
      "the same command to ask them again"
    )
  if judged.unread.unparsed and judged.unread.unparsed == len(judged.rows):
    fix = "config.judge.template or config.judge.model, or give more config.judge.max_tokens"
    raise JudgeError(
      f"none of the {judged.unread.unparsed} answers could be read, so there is no result; they are "
      f"in {workdir / JUDGMENTS}. Name another {fix if config.judge.url else 'config.judge.judgments'}"
    )


# ---- an endpoint ----


class Asked(NamedTuple):
  """A question with its subject."""

  item: int
  turn: int
  repeat: int
  candidate_first: bool  # for a comparison; for a rating, whether the candidate is rated
  question: Question


def by_endpoint(config, items: list[Item], workdir: Path) -> Judged:
  """Verdicts of the model behind config.judge.url."""
  settings = config.judge
  template = TEMPLATES[settings.template]
  check_turns(template, items)
  endpoint = endpoint_of(config, settings.url)
  asked = questions_of(config, template, items, endpoint.url)
  cache = Cache(workdir / ANSWERS)
  try:
    failed = ask_within_budget(config, endpoint, cache, [one.question for one in asked])
  finally:
    cache.close()
  for reason, count in collections.Counter(failed.values()).most_common(3):
    print(f"judge    {count} questions without an answer: {reason}")
  about = {
    "kind": "endpoint",
    "name": settings.model,
    "answered_as": sorted(answered_as(asked, cache.answers)),
    "url": endpoint.url,
    "template": template.name,
    "template_sha256": template.sha256,
    "system": template.system,
    "ask": template.ask,
    "temperature": settings.answer_temperature,
    "max_tokens": most_tokens(config, template),
    "both_orders": settings.both_orders,
    "repeats": settings.repeats,
    "body": settings.body,
  }
  read = rated if template.rates else compared
  return read(template, items, asked, cache.answers)._replace(judge=about)


def answered_as(asked: list[Asked], answers: dict[str, dict]) -> set[str]:
  """The model names in the endpoint's answers."""
  found = [answers.get(one.question.key, {}) for one in asked]
  return {answer["model"] for answer in found if answer.get("model")}


def endpoint_of(config, url: str) -> Endpoint:
  """The endpoint at an address, with the settings and the key of config.judge."""
  key = key_from(config.judge.key_env)
  endpoint = Endpoint(url, key, **patience_of(config))
  warn_of_plain_http(endpoint.url, key)
  return endpoint


def patience_of(config) -> dict[str, Any]:
  """The waits and retries of an `Endpoint`, from config.judge."""
  settings = config.judge
  return dict(
    timeout=settings.timeout,
    retries=settings.retries,
    backoff=settings.backoff,
    longest=settings.longest_wait,
  )


def check_turns(template: Template, items: Sequence[Item]) -> None:
  """Raises ConfigError if a conversation has more turns than the template supports."""
  if not template.turns and any(len(item.questions) > 1 for item in items):
    raise ConfigError(
      f"config.judge.template is {template.name!r}, which compares single answers; the rows have "
      "several turns: use 'mt_bench' or 'mt_bench_single'"
    )
  if not template.rates and not all(item.baseline for item in items):
    raise ConfigError(
      f"config.judge.template is {template.name!r}, which compares two answers; give "
      "config.judge.baseline"
    )


def warn_of_plain_http(url: str, key: str) -> None:
  parts = urllib.parse.urlsplit(url)
  if key and parts.scheme == "http" and parts.hostname not in ("localhost", "127.0.0.1", "::1"):
    print(f"warning: the key goes to {parts.hostname} unencrypted: use https", file=sys.stderr)


def most_tokens(config, template: Template) -> int:
  return config.judge.max_tokens or template.max_tokens


def questions_of(config, template: Template, items: list[Item], url: str) -> list[Asked]:
  """All questions: prompts x turns x repeats x orders, or x answers for ratings."""
  asked = []
  for number, item in enumerate(items):
    for turn in range(len(item.questions)):
      for repeat in range(config.judge.repeats):
        for mine in sides_of(config, template, item, repeat):
          first, second = (
            (item.candidate, item.baseline) if mine else (item.baseline, item.candidate)
          )
          messages = request(template, item, turn, first, [] if template.rates else second)
          body = body_of(config, template, messages, config.judge.model)
          asked.append(Asked(number, turn, repeat, mine, question(body, url, repeat)))
  return asked


def sides_of(config, template: Template, item: Item, repeat: int) -> tuple[bool, ...]:
  """Whether the candidate is shown first, for each question about an item."""
  if template.rates:
    return (True, False) if item.baseline else (True,)
  if config.judge.both_orders:
    return (True, False)
  return (random.Random(f"{config.seed} {item.id} {repeat}").random() < 0.5,)


def body_of(config, template: Template, messages: list[dict], model: str) -> dict[str, Any]:
  """The request body, with the changes in config.judge.body, in which null removes a field."""
  settings = config.judge
  body: dict[str, Any] = {
    "model": model,
    "messages": messages,
    "temperature": settings.answer_temperature,
    "max_tokens": most_tokens(config, template),
  }
  if template.bare and settings.logprobs:
    body |= {"logprobs": True, "top_logprobs": TOP}
  body |= json.loads(settings.body or "{}")
  return {name: value for name, value in body.items() if value is not None}


def ask_within_budget(
  config, endpoint: Endpoint, cache: Cache, asked: Iterable[Question], *, shown: bool = True
) -> dict[str, str]:
  """Sends the missing questions, if their estimated cost is within the limit. Returns the reasons
  for questions without an answer.

  Args:
    shown: print the estimate and a line of progress.
  """
  settings = config.judge
  prices = Prices(settings.prompt_price, settings.completion_price)
  every = {one.key: one for one in asked}
  missing = [one for key, one in every.items() if key not in cache.answers]
  prompt, written = np.sum([tokens_of(one.body) for one in missing] or [(0, 0)], 0).tolist()
  paid, most = prices.spent(cache.answers.values()), prices.cost(prompt, written)
  money = f", at most ${most:.2f}; ${paid:.2f} are spent" if any(prices) else ""
  if shown:
    print(
      f"judge    {len(missing)} of {len(every)} questions will be sent: about {prompt} prompt "
      f"tokens and at most {written} of answers{money}"
    )
  if settings.max_cost and missing and paid + most > settings.max_cost:
    raise ConfigError(
      f"config.judge.max_cost is {settings.max_cost:g}: the questions may cost ${paid + most:.2f} "
      "in all; allow that, judge fewer prompts, or lower config.judge.max_tokens"
    )

  waiting = "waiting for the first answer"
  with progress(len(missing), "judge", enabled=shown, unit="question", doing=waiting) as bar:

    def seen(key, answer):
      nonlocal paid
      del key
      bar.update()
      paid += prices.spent([answer])
      if settings.max_cost and paid > settings.max_cost:
        raise JudgeError(
          f"the answers have cost ${paid:.2f}, over config.judge.max_cost = "
          f"{settings.max_cost:g}; they are kept; raise the limit and run the same command again"
        )

    return ask_all(endpoint, missing, cache, workers=settings.workers, seen=seen)


def read_all(
  template: Template, asked: list[Asked], answers: dict[str, dict]
) -> tuple[list[tuple[Asked, Reading | None, str]], Unread]:
  """(question, its parsed answer, the answer) for the answered questions, and the unreadable
  answers.
  """
  found = []
  unanswered = unparsed = 0
  for one in asked:
    answer = answers.get(one.question.key)
    if answer is None:
      unanswered += 1
      continue
    reading = read_answer(template, answer)
    unparsed += reading is None
    found.append((one, reading, whole_characters(answer["text"])))
  return found, Unread(unanswered, unparsed)


def whole_characters(text: str) -> str:
  """The text with "?" for half of a surrogate pair, which a cut within an emoji leaves and which no
  file in UTF-8 holds.
  """
  return text.encode("utf-8", "replace").decode("utf-8")


def compared(
  template: Template, items: list[Item], asked: list[Asked], answers: dict[str, dict]
) -> Judged:
  """Verdicts from comparisons. A question without an answer counts as unreadable."""
  found, unread = read_all(template, asked, answers)
  readings = {one.question.key: reading for one, reading, _ in found}
  texts = {one.question.key: text for one, _, text in found}
  verdicts, rows = [], []
  for one in asked:
    reading = readings.get(one.question.key)
    preference = None
    if reading is not None:
      preference = reading.value if one.candidate_first else 1 - reading.value
    weight = 1.0 if reading is None else reading.weight
    verdict = Verdict(one.item, one.turn, one.repeat, one.candidate_first, preference, weight)
    verdicts.append(verdict)
    rows.append(row_of(items, verdict) | {"answer": texts.get(one.question.key)})
  return Judged(verdicts, None, unread, rows, {})


def row_of(items: list[Item], verdict: Verdict) -> dict[str, Any]:
  """A row of judgments.jsonl, in the form of config.judge.judgments."""
  fields = verdict._asdict()
  return {"id": items[fields.pop("item")].id} | fields | {"turn": verdict.turn + 1}


def rated(
  template: Template, items: list[Item], asked: list[Asked], answers: dict[str, dict]
) -> Judged:
  """Ratings (for each turn, the mean over repeats) and the resulting verdicts."""
  found, unread = read_all(template, asked, answers)
  values: dict[tuple[int, int, int], dict[bool, float]] = collections.defaultdict(dict)
  shape = len(items), max(len(item.questions) for item in items)
  sums, rows = np.zeros((2, 2, *shape)), []
  for one, reading, text in found:
    rows.append(
      {
        "id": items[one.item].id,
        "turn": one.turn + 1,
        "repeat": one.repeat,
        "of": "candidate" if one.candidate_first else "baseline",
        "rating": None if reading is None else reading.value,
        "answer": text,
      }
    )
    if reading is not None:
      values[one.item, one.turn, one.repeat][one.candidate_first] = reading.value
      sums[int(one.candidate_first), :, one.item, one.turn] += (reading.value, 1)
  with np.errstate(invalid="ignore"):
    means = sums[:, 0] / sums[:, 1]
  paired = any(item.baseline for item in items)
  verdicts = [
    Verdict(item, turn, repeat, None, preferred(one.get(True), one.get(False), SAME_RATING))
    for (item, turn, repeat), one in values.items()
    if paired
  ]
  return Judged(verdicts, Scores(means[1], means[0] if paired else None), unread, rows, {})


def preferred(mine: float | None, theirs: float | None, same: float) -> float | None:
  """The preference from two scores: 1, 0, or 0.5 if they differ by at most `same`."""
  if mine is None or theirs is None:
    return None
  if abs(mine - theirs) <= same:
    return 0.5
  return float(mine > theirs)


# ---- a reward model ----


def by_reward_model(config, items: list[Item], workdir: Path) -> Judged:
  """Verdicts of the reward model in config.judge.reward: the higher score wins."""
  del workdir
  if not all(item.baseline for item in items):
    raise ConfigError(
      "config.judge.baseline is '': give a file of answers; a reward model compares two"
    )
  settings = config.judge
  mesh = mesh_of(config)
  judge = config.copy_and_resolve_references()
  with judge.unlocked():
    judge.reward.revision = ""  # the policy is the proxy's
  reward = load_reward(settings.reward, judge, mesh)
  warn_of_relation(reward.folder, config.reward.path)
  policy = serve.policy_read_by(config, reward, mesh, f"config.judge.reward is {settings.reward}")
  places, rows = [], []
  for number, item in enumerate(items):
    for turn in range(len(item.questions)):
      for side, answers in enumerate((item.candidate, item.baseline)):
        places.append((side, number, turn))
        row = scored_row(item, answers, turn)
        rows.append(row | {"truncated": last_turn(item, turn) and item.truncated[side]})
  scores = serve.score(config, reward, policy, rows, mesh)
  serve.require_finite(
    config, np.isfinite(scores), "scores", f"config.judge.reward = {settings.reward}"
  )
  return from_scores(items, places, scores)._replace(
    judge={"kind": "reward model", "name": settings.reward, "template": None}
  )


def last_turn(item: Item, turn: int) -> bool:
  return turn == len(item.questions) - 1


def scored_row(item: Item, answers: list[str], turn: int) -> dict[str, Any]:
  """The row of `task=score` for one turn, including the turns before it."""
  row = {"where": f"prompt {item.id}", "response": answers[turn]}
  if len(item.questions) == 1:
    return row | {"prompt": item.prompt}
  messages = []
  for t in range(turn):
    messages.append({"role": "user", "content": item.questions[t]})
    messages.append({"role": "assistant", "content": answers[t]})
  return row | {"prompt": [*messages, {"role": "user", "content": item.questions[turn]}]}


def from_scores(items: list[Item], places: list[tuple[int, int, int]], scores) -> Judged:
  """Verdicts from scores f32[N] of (side, item, turn)."""
  table = np.full((2, len(items), max(len(item.questions) for item in items)), np.nan)
  for place, score in zip(places, scores):
    table[place] = score
  verdicts, rows = [], []
  for number, turn in np.argwhere(np.isfinite(table[0])).tolist():
    mine, theirs = table[:, number, turn].tolist()
    verdict = Verdict(number, turn, 0, None, preferred(mine, theirs, 0.0))
    verdicts.append(verdict)
    rows.append(row_of(items, verdict) | {"candidate_score": mine, "baseline_score": theirs})
  return Judged(verdicts, Scores(table[0], table[1]), Unread(0, 0), rows, {})


def warn_of_relation(judge: Path, proxy: str) -> None:
  """Warns if the judge has the proxy's family and may share its errors. Both must be folders."""
  if not proxy or not (Path(proxy).expanduser() / "config.json").is_file():
    return
  kinds = [
    read_object(folder / "config.json").get("model_type")
    for folder in (judge, Path(proxy).expanduser())
  ]
  if kinds[0] == kinds[1]:
    print(
      f"warning: the judge {judge} is of the family {kinds[0]}, as the proxy {proxy} is, and "
      "may share its errors: use one of another family",
      file=sys.stderr,
    )


# ---- a file ----


def by_file(config, items: list[Item], workdir: Path) -> Judged:
  """Verdicts from the rows of config.judge.judgments."""
  del workdir
  file = config.judge.judgments
  verdicts = votes.verdicts_of(file, items)
  missing = len(items) - len({v.item for v in verdicts})
  if missing:
    print(f"judge    {file} judges {len(items) - missing} of {len(items)} prompts")
  unread = Unread(0, sum(v.preference is None for v in verdicts))
  rows = [row_of(items, verdict) for verdict in verdicts]
  return Judged(verdicts, None, unread, rows, {"kind": "file", "name": file, "template": None})
