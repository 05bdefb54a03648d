"""The report in Chromium, used with real key presses. Oracle: the rows in the page's data."""

import json
from pathlib import Path

import browser
import pytest

from r2m_jax.report import page as report_page
from r2m_jax.report import samples as texts

STEPS, PROMPTS, ARMS = (0, 10, 20), ("a prompt", "another one", "the last"), ("vanilla", "r2m")


def write_run(workdir):
  """A run of two arms with evaluations, samples and a replayed sample."""
  times = {"seconds/step": 2.0, "seconds/learn": 1.5, "memory/process_peak": 1.25}
  rows = [
    {"stage": "rl", "arm": arm, "step": t, "seconds": 1.0 * t, "reward/gold": 1.0, "kl": 0.1 * t}
    | {"reward/frozen": 0.1 * t, "length": 5.0, **times}
    for arm in ARMS
    for t in range(30)
  ]
  answer = {"length": 7, "truncated": False}
  evaluated = [
    {"arm": arm, "step": t, "prompt": prompt, "response": f"{arm} {prompt} {t}", **answer}
    | {"gold": 0.5 * i, "frozen": 0.1 * t}
    for arm in ARMS
    for t in STEPS
    for i, prompt in enumerate(PROMPTS)
  ]
  samples = [
    {"arm": arm, "when": when, "prompt": prompt, "response": f"{when} {'word ' * 300}", **answer}
    | {"reward": 1.0 + i * (when == "after"), "gold": -1.0 * i}
    for arm in ARMS
    for when in ("before", 10, "after")
    for i, prompt in enumerate(PROMPTS)
  ]
  files = {"metrics": rows, "eval_samples": evaluated, "samples": samples}
  for name, lines in files.items():
    text = "".join(json.dumps(line) + "\n" for line in lines)
    (workdir / f"{name}.jsonl").write_text(text)
  replayed = {"states": ["to", "be", "read"], "attention": [[0.1, 0.2, 0.7]], "tokens": [5]}
  replayed |= {"arm": "r2m", "step": 1, "prompt": 0, "sample": 2, "reward": 1.0, "frozen": 2.0}
  (workdir / "replay").mkdir()
  (workdir / "replay/one.json").write_text(json.dumps(replayed))
  config = {"task": "r2m", "seed": 3, "steps": 30}
  return report_page.write_report(workdir, title="two arms", config=config)


@pytest.fixture(scope="module")
def page(tmp_path_factory):
  program = browser.find()
  if program is None:
    pytest.skip("no Chromium on this machine: the page is not tried in a browser")
  folder = tmp_path_factory.mktemp("report")
  path = write_run(folder)
  with browser.Page(program, tmp_path_factory.mktemp("browser")) as shown:
    shown.address = Path(path).as_uri()
    yield shown


def visible(page, query):
  """The texts of the visible elements of a query."""
  shown = "[...document.querySelectorAll(%s)].filter(e => e.offsetParent !== null)"
  return page.run(shown % json.dumps(query) + ".map(e => e.innerText.trim())")


def press(page, query, *keys):
  """Focuses the first element of a query and sends it keys."""
  page.run(f"document.querySelector({json.dumps(query)}).focus()")
  for key in keys:
    page.press(key)


def enter(page, query, value, event):
  """Gives a control a value, and the event that a reader would cause."""
  found = f"const e = document.querySelector({json.dumps(query)})"
  page.run(f"{{ {found}; e.value = {json.dumps(value)}; e.dispatchEvent(new Event('{event}')); }}")


def tab_of(name):
  return f"[role=tab][data-name={name}]"


@pytest.mark.parametrize("width", [1280, 390, 360])
def test_no_request_no_error_and_no_sideways_scrolling(page, width):
  page.size(width, 800, phone=width < 640)
  for name in ("findings", "curves", "samples", "cost", "what-was-run"):
    page.open(f"{page.address}#{name}")
    assert page.run("document.querySelector('[role=tab][aria-selected=true]').dataset.name") == name
    assert page.run("document.documentElement.scrollWidth") <= width, name
    assert not page.errors
    assert {r.split(":")[0] for r in page.requests} <= {"file", "data", "about"}
    assert [r for r in page.requests if r.startswith("file")] == [f"{page.address}"]


def test_tabs_by_mouse_and_keyboard(page):
  page.size(1280, 800)
  page.open(page.address)
  assert visible(page, "[role=tab]") == ["Findings", "What was run", "Curves", "Samples", "Cost"]
  assert len(visible(page, "[role=tabpanel]")) == 1
  rewards = len(visible(page, "img"))
  assert 0 < rewards <= 3  # gold, frozen proxy, used
  page.run(f"document.querySelector('{tab_of('curves')}').click()")
  assert len(visible(page, "[role=tabpanel]")) == 1 and len(visible(page, "img")) > rewards
  press(page, tab_of("curves"), "ArrowRight")
  assert page.run("document.activeElement.dataset.name") == "samples"
  assert visible(page, "#evaluations h2") == ["The same prompts at each evaluation"]
  page.press("End")
  page.press("ArrowRight")  # the first follows the last
  assert page.run("document.activeElement.dataset.name") == "findings"
  assert page.run("document.querySelectorAll('[role=tab][tabindex=\"0\"]').length") == 1


def test_the_slider_shows_another_step(page):
  page.open(f"{page.address}#samples")
  shown = "#evaluations [data-prompt] [data-at] .said"
  assert visible(page, shown) == [f"{arm} {PROMPTS[0]} 20" for arm in ARMS]
  press(page, "#at", "ArrowLeft")
  assert visible(page, shown) == [f"{arm} {PROMPTS[0]} 10" for arm in ARMS]
  press(page, "#at", "Home")
  assert visible(page, shown) == [f"{arm} {PROMPTS[0]} 0" for arm in ARMS]
  assert page.run("document.querySelector('#at').getAttribute('aria-valuetext')") == "step 0"
  assert visible(page, "output[for=at]") == ["step 0"]


def test_the_sample_browser(page):
  page.open(f"{page.address}#samples")
  section = "[data-browser]:not([data-slider])"
  prompts = f"{section} [data-prompt] > .prompt"
  assert visible(page, prompts) == [PROMPTS[0]]
  press(page, f"{section} [data-control=next]", "Enter")
  assert visible(page, prompts) == [PROMPTS[1]]
  assert visible(page, f"{section} [data-control=place]") == ["2 of 3"]
  press(page, f"{section} [data-control=all]", "Enter")
  assert visible(page, prompts) == list(PROMPTS)
  rows = f"{section} tbody tr"
  assert len(visible(page, rows)) == 3 * 5  # "before" is the same in both arms
  enter(page, f"{section} [data-control=arm]", "r2m", "change")
  assert len(visible(page, rows)) == 3 * 3
  enter(page, f"{section} [data-control=search]", "the last", "input")
  assert visible(page, prompts) == [PROMPTS[2]]


def test_light_and_dark(page):
  colour = "getComputedStyle(document.body).backgroundColor"
  seen = {}
  for scheme in ("light", "dark"):
    page.scheme(scheme)
    page.open(page.address)
    seen[scheme] = page.run(colour)
    pressed = page.run("document.querySelector('#theme').getAttribute('aria-pressed')")
    assert pressed == ("true" if scheme == "dark" else "false")
  assert seen["light"] != seen["dark"]
  press(page, "#theme", "Enter")
  assert page.run(colour) == seen["light"]
  press(page, "#theme", "Enter")
  assert page.run(colour) == seen["dark"]


def test_what_scrolls_is_reached_by_the_keyboard(page):
  page.size(1280, 800)
  page.open(f"{page.address}#samples")
  unreached = "e => e.scrollHeight > e.clientHeight && e.offsetParent && e.tabIndex < 0"
  boxes = "[...document.querySelectorAll('.tall')]"
  assert page.run(f"{boxes}.filter(e => e.tabIndex === 0 && e.offsetParent).length") > 0
  assert page.run(f"{boxes}.filter({unreached}).length") == 0


# ---- data of the page ----


def test_disagreements_against_a_loop():
  rows = [
    {"arm": "a", "when": "after", "prompt": f"p{i}", "response": "r", "reward": r, "gold": g}
    for i, (r, g) in enumerate(zip([1, 2, 3, 4, 5, 6, 7, 8, "nan"], [3, 1, 4, 1, 5, 9, 2, 6, 0]))
  ]
  kept = rows[:8]
  mean = {k: sum(row[k] for row in kept) / 8 for k in ("reward", "gold")}
  var = {k: sum((row[k] - mean[k]) ** 2 for row in kept) / 8 for k in mean}
  gaps = {
    row["prompt"]: (row["reward"] - mean["reward"]) / var["reward"] ** 0.5
    - (row["gold"] - mean["gold"]) / var["gold"] ** 0.5
    for row in kept
  }
  expected = sorted((name for name in gaps if gaps[name] > 0), key=lambda name: -gaps[name])
  found = texts.worst_disagreements(rows, "reward", "gold")
  assert [row["prompt"] for _, row in found] == expected and expected[0] == "p6"
  assert all(abs(gap - gaps[row["prompt"]]) < 1e-12 for gap, row in found)
  assert texts.worst_disagreements(rows[:7], "reward", "gold") == []  # too few for a scale
  assert texts.worst_disagreements([row | {"gold": 1} for row in kept], "reward", "gold") == []


def test_a_section_stays_below_its_limit_of_text(monkeypatch):
  rows = [
    {"arm": "a", "when": "after", "prompt": f"p{i}", "response": "x" * 10**5, "length": 3}
    for i in range(5)
  ]
  for limit, prompts in ((10, 1), (2 * texts.MAX_CHARS + 500, 2), (10**6, 5)):
    monkeypatch.setattr(texts, "MAX_TEXT", limit)
    section = texts.samples_section(rows, {})
    assert len(section["prompts"]) == prompts and section["of"] == 5
    assert len(section["prompts"][0]["rows"][0]["response"]) < texts.MAX_CHARS + 50
