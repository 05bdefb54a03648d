"""metrics.py, summary.py and report.py on synthetic runs. Oracles: numbers worked by hand and NumPy
loops.
"""

import html
import io
import json
import math
import re
import struct
import warnings

import numpy as np
import pytest

from r2m_jax.report import page as report_page
from r2m_jax.report import summary
from r2m_jax.run import files, metrics, progress


def rl_rows(arm, gold=None, frozen=None, kl=None, **others):
  """RL rows of one arm from equally long columns."""
  columns = {"reward/gold": gold, "reward/frozen": frozen, "kl": kl} | others
  columns = {name: values for name, values in columns.items() if values is not None}
  length = len(next(iter(columns.values())))
  head = {"stage": "rl", "arm": arm}
  return [
    head | {"step": i, "seconds": float(i)} | {k: float(v[i]) for k, v in columns.items()}
    for i in range(length)
  ]


def rise_and_fall(arm, end=-0.05, steps=120, noise=0.1, seed=0):
  rng = np.random.default_rng(seed)
  gold = np.interp(np.arange(steps), [0, 30, steps - 1], [0.3, 1.1, end]) + noise * rng.normal(
    size=steps
  )
  frozen = np.linspace(0.1, 0.85, steps) + 0.02 * rng.normal(size=steps)
  return rl_rows(arm, gold, frozen, np.linspace(0.1, 11, steps), length=np.linspace(8, 5, steps))


def write_rows(workdir, rows):
  workdir.mkdir(parents=True, exist_ok=True)
  (workdir / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


# ---- metrics.jsonl ----


def test_rows_are_valid_json_with_nonfinite_values(tmp_path):
  with metrics.Metrics(tmp_path, "rl", "r2m", from_step=0) as log:
    log.log(0, {"kl": np.float32(0.1), "bad": math.nan, "worse": -math.inf, "absent": None})

  def reject(name):
    return pytest.fail(f"{name} is not JSON")

  row = json.loads((tmp_path / "metrics.jsonl").read_text(), parse_constant=reject)
  assert (row["stage"], row["arm"], row["step"]) == ("rl", "r2m", 0) and row["seconds"] >= 0
  assert (row["bad"], row["worse"]) == ("nan", "-inf") and "absent" not in row
  assert np.float32(row["kl"]) == np.float32(0.1)
  (back,) = metrics.read_metrics(tmp_path)
  assert math.isnan(back["bad"]) and back["worse"] == -math.inf


def test_scalars_may_not_take_the_names_of_the_row(tmp_path):
  with (
    metrics.Metrics(tmp_path, "sft", from_step=0) as log,
    pytest.raises(ValueError, match="step"),
  ):
    log.log(0, {"step": 3})


def test_a_cut_last_line_is_left_out_and_the_file_goes_on(tmp_path):
  write_rows(tmp_path, rl_rows("a", gold=[1, 2]))
  path = tmp_path / "metrics.jsonl"
  path.write_bytes(path.read_bytes() + '{"stage": "rl", "arm": "ä'.encode()[:-1])
  assert [row["step"] for row in files.read_jsonl(path)] == [0, 1]
  with metrics.Metrics(tmp_path, "rl", "a", from_step=2) as log:
    log.log(2, {"reward/gold": 3})
  assert [row["reward/gold"] for row in files.read_jsonl(path)] == [1, 2, 3]


def test_a_broken_line_in_the_middle_is_an_error(tmp_path):
  (tmp_path / "x.jsonl").write_text('{"a": 1}\n{"a"\n{"a": 2}\n')
  with pytest.raises(ValueError, match="x.jsonl:2"):
    files.read_jsonl(tmp_path / "x.jsonl")


def test_resuming_drops_only_this_arms_later_rows(tmp_path):
  other = [row | {"stage": "sft"} for row in rl_rows("a", gold=[7, 8, 9])]
  write_rows(tmp_path, rl_rows("a", gold=range(5)) + rl_rows("b", gold=range(5)) + other)
  with metrics.Metrics(tmp_path, "rl", "a", from_step=3) as log:
    for step in (3, 4):
      log.log(step, {"reward/gold": 10 * step})
  rows = metrics.read_metrics(tmp_path)
  mine = [row for row in rows if (row["stage"], row["arm"]) == ("rl", "a")]
  assert [row["reward/gold"] for row in mine] == [0, 1, 2, 30, 40]
  assert mine[3]["seconds"] >= 2.0  # continues after the last row that was kept
  assert len(rows) == 5 + 5 + 3
  metrics.Metrics(tmp_path, "rl", "a", from_step=0).close()  # a fresh start
  assert not [
    row for row in metrics.read_metrics(tmp_path) if (row["stage"], row["arm"]) == ("rl", "a")
  ]
  assert not list(tmp_path.glob(".*tmp"))


def test_metrics_of_other_processes_touch_nothing(tmp_path, monkeypatch):
  monkeypatch.setattr(metrics.hosts, "first", lambda: False)
  with metrics.Metrics(tmp_path / "run", "rl", from_step=0) as log:
    log.log(0, {"kl": 1.0})
  assert not (tmp_path / "run").exists()


def read_events(path):
  from tensorboardX.proto.event_pb2 import Event

  data, at = path.read_bytes(), 0
  while at < len(data):
    (length,) = struct.unpack_from("<Q", data, at)
    yield Event.FromString(data[at + 12 : at + 12 + length])
    at += 12 + length + 4


def test_tensorboard_gets_the_same_scalars(tmp_path):
  with metrics.Metrics(tmp_path, "rl", "r2m", from_step=4) as log:
    log.log(4, {"kl": 2.5, "policy/loss": math.nan})
  (path,) = (tmp_path / "tensorboard" / "rl-r2m").iterdir()
  _, start, event = read_events(path)
  assert start.step == 4 and start.session_log.status == start.session_log.START
  values = {value.tag: value.simple_value for value in event.summary.value}
  assert event.step == 4 and values["kl"] == 2.5 and math.isnan(values["policy/loss"])


def test_a_failing_tensorboard_warns_once_and_training_goes_on(tmp_path, monkeypatch):
  with metrics.Metrics(tmp_path, "rl", from_step=0) as log:

    def full(_):
      raise OSError("no space left on device")

    monkeypatch.setattr(log._trackers["tensorboard"].events, "write_event", full)
    with pytest.warns(UserWarning, match="no space left"):
      log.log(0, {"kl": 1})
    with warnings.catch_warnings():
      warnings.simplefilter("error")
      log.log(1, {"kl": 2})
  assert [row["kl"] for row in metrics.read_metrics(tmp_path)] == [1, 2]


def test_samples_of_a_rerun_replace_the_first(tmp_path):
  row = {
    "arm": "a",
    "when": "after",
    "prompt": "p",
    "response": "one",
    "reward": np.float32(1),
    "gold": math.nan,
  }
  metrics.append_samples(tmp_path, [row, row | {"response": "two"}, row | {"when": "before"}])
  metrics.append_samples(tmp_path, [row | {"response": "three"}])
  got = [(r["when"], r["response"]) for r in files.read_jsonl(tmp_path / "samples.jsonl")]
  assert got == [("before", "one"), ("after", "three")]


def test_progress_prints_a_line_a_tenth_without_a_terminal():
  out = io.StringIO()
  with progress.Progress(100, "vanilla", out=out) as bar:
    for step in range(100):
      bar.update(gold=step / 100)
  lines = out.getvalue().splitlines()
  assert len(lines) == 10 and "\r" not in out.getvalue() and "\x1b" not in out.getvalue()
  assert re.match(r"vanilla   10/100  .*left  gold 0.09$", lines[0]) and "100/100" in lines[-1]


# ---- numbers ----


def test_summary_matches_loops():
  rng = np.random.default_rng(1)
  gold, frozen = rng.normal(size=57).cumsum() / 4, rng.normal(size=57)
  (entry,) = summary.summary_table(rl_rows("a", gold, frozen, np.linspace(0, 3, 57)))
  width = 6  # round(5.7)
  means = [sum(gold[i : i + width]) / width for i in range(57 - width + 1)]
  top = means.index(max(means))
  noise = sum((b - a) ** 2 for a, b in zip(gold, gold[1:])) / 56 / 2
  expected = dict(
    start=means[0],
    peak=means[top],
    last=means[-1],
    gain=means[top] - means[0],
    loss=means[top] - means[-1],
    peak_step=top + (width - 1) / 2,
    se=math.sqrt(noise / width),
    frozen_peak=sum(frozen[top : top + width]) / width,
    frozen_last=sum(frozen[-width:]) / width,
    kl_last=sum(np.linspace(0, 3, 57)[-width:]) / width,
  )
  for name, value in expected.items():
    np.testing.assert_allclose(entry[name], value, rtol=1e-9, err_msg=name)
  assert entry["matched_kl"] is None  # a single arm has no other arm to be matched to


def test_lost_share_by_hand():
  # Straight lines 0 -> 2 -> 0.5 of 40 steps each and a window of 8, whose first mean lies 3.5 steps
  # in.
  gold = np.concatenate([np.linspace(0, 2, 41), np.linspace(2, 0.5, 41)[1:]])
  (entry,) = summary.summary_table(rl_rows("a", gold))
  start, peak, last = 0.05 * 3.5, max(gold[i : i + 8].mean() for i in range(74)), 0.5 + 0.0375 * 3.5
  np.testing.assert_allclose(entry["lost_share"], (peak - last) / (peak - start), rtol=1e-9)
  (flat,) = summary.summary_table(rl_rows("a", np.random.default_rng(0).normal(size=100)))
  assert flat["lost_share"] is None  # no gain beyond the noise, so no share


def test_gold_at_matched_kl_by_hand():
  a = rl_rows("a", gold=[0, 1, 2, 3], kl=[0, 1, 2, 3])
  b = rl_rows("b", gold=[0, 4, 8, 6, 4], kl=[0, 2, 4, 6, 8])
  c = rl_rows("c", gold=[5, 6], kl=[3.5, 9])  # is above the matched KL from its first step
  table = {entry["arm"]: entry for entry in summary.summary_table(a + b + c)}
  assert {entry["matched_kl"] for entry in table.values()} == {3.0}
  assert table["a"]["gold_at_kl"] == 3.0
  assert table["b"]["gold_at_kl"] == 6.0  # between 4 at KL 2 and 8 at KL 4
  assert table["c"]["gold_at_kl"] is None


def test_verdicts():
  falling = rise_and_fall("falls")
  rising = rl_rows("rises", np.linspace(0, 1, 50), np.linspace(0, 1, 50))
  other = [row | {"arm": "proxy falls", "reward/frozen": -row["reward/frozen"]} for row in falling]
  unmeasured = rl_rows("real", frozen=np.linspace(0, 1, 50))
  short = rl_rows("short", gold=[0, 1, 0])
  noise = rl_rows("noise", np.random.default_rng(3).normal(size=120), np.linspace(0, 1, 120))
  table = summary.summary_table(falling + rising + other + unmeasured + short + noise)
  assert [summary.verdict(entry) for entry in table] == [
    summary.OVER,
    summary.NONE_SEEN,
    summary.OTHER,
    summary.NO_GOLD,
    summary.TOO_FEW,
    summary.NONE_SEEN,
  ]
  text = summary.finding(table[0])
  for part in (
    f"{table[0]['peak']:.2f}",
    f"{table[0]['last']:.2f}",
    f"{table[0]['frozen_last']:.2f}",
  ):
    assert part in text
  assert text.endswith(": over-optimisation.") and "is not over-optimisation" in summary.finding(
    table[2]
  )
  assert "One seed" in summary.cautions(table)[0]


@pytest.mark.parametrize(
  "r2m_end, kl_scale, expected",
  [
    (0.7, 1.0, "does not beat scaled"),
    (-0.5, 1.0, "ends below scaled"),
    (1.0, 1.0, "r2m beats scaled (+"),
    (-0.5, 3.0, "above scaled at equal KL, not at the end"),
  ],
)
def test_the_control_decides(r2m_end, kl_scale, expected):
  r2m = [row | {"kl": row["kl"] * kl_scale} for row in rise_and_fall("r2m", r2m_end, seed=1)]
  table = summary.summary_table(rise_and_fall("scaled", 0.7) + r2m)
  ((short, sentence),) = summary.control_case(table)
  assert expected in short and f"{table[1]['last']:.2f}" in sentence
  assert ("not due to the policy feedback" in sentence) == (kl_scale == 1.0 and r2m_end < 1.0)


def test_without_the_control_nothing_is_claimed():
  ((_, sentence),) = summary.control_case(
    summary.summary_table(rise_and_fall("vanilla") + rise_and_fall("r2m", 1.0))
  )
  assert "No scaled arm" in sentence


def test_terminal_summary_is_aligned_and_short():
  rows = rise_and_fall("vanilla") + rise_and_fall("scaled", 0.7) + rise_and_fall("r2m", 0.7)
  lines = report_page.format_summary(summary.summary_table(rows)).splitlines()
  assert len(lines) == 5 and len({len(line) for line in lines[:4]}) == 1
  many = summary.summary_table([row for i in range(12) for row in rise_and_fall(f"arm{i}")])
  assert len(
    report_page.format_summary(many).splitlines()
  ) <= 6 and "8 more" in report_page.format_summary(many)
  assert report_page.format_summary([]) == "no RL steps were logged"


# ---- the page ----


def test_report_is_self_contained_and_escapes_text(tmp_path):
  evil = '<script>alert("x")</script>'
  write_rows(tmp_path, rise_and_fall("vanilla") + rise_and_fall(evil, 0.5))
  metrics.append_samples(
    tmp_path,
    [
      {
        "arm": arm,
        "when": when,
        "prompt": f"p {evil}",
        "response": f"r {evil}",
        "reward": 1.0,
        "frozen": math.nan,
        "gold": 0.25,
        "length": 3,
        "truncated": True,
      }
      for arm in ("vanilla", evil)
      for when in ("before", 60, "after")
    ],
  )
  path = report_page.write_report(tmp_path, title=evil, notes=[evil], config={"key": evil})
  page = path.read_text(encoding="utf-8")
  assert evil not in page and "&lt;script&gt;alert" in page
  assert page.count("<script") == 1 and not re.search(r"https?://|<link|src=\"(?!data:)", page)
  assert (
    "step 60" in page and "3 (cut)" in page and ">before</td>" in page
  )  # samples before RL that are equal are shown once
  names = sorted(file.name for file in (tmp_path / "figures").iterdir())
  assert names == ["1_rewards.png", "2_frontier.png", "3_behaviour.png"]
  assert not list(tmp_path.rglob(".*tmp"))


def test_report_without_gold(tmp_path):
  rows = [{k: v for k, v in row.items() if k != "reward/gold"} for row in rise_and_fall("r2m")]
  write_rows(tmp_path, rows)
  metrics.append_samples(
    tmp_path, [{"arm": "r2m", "when": "after", "prompt": "p", "response": "r", "reward": 1.0}]
  )
  page = report_page.write_report(tmp_path, title="real").read_text(encoding="utf-8")
  assert (
    "No gold reward was measured" in page and "Gold start" not in page and ">gold</th>" not in page
  )


def test_report_of_stages_before_rl_and_of_nothing(tmp_path):
  page = report_page.write_report(tmp_path / "empty", title="empty").read_text(encoding="utf-8")
  assert "Nothing was logged yet" in page and "<img" not in page
  with metrics.Metrics(tmp_path, "sft", from_step=0) as log:
    log.log(0, {"loss": 4.0})
    log.log(1, {"loss": math.nan})
  (tmp_path / "config.json").write_text('{"seed": 3}')
  page = report_page.write_report(tmp_path, title="sft").read_text(encoding="utf-8")
  assert (
    "No RL steps were logged" in page
    and page.count("<img") == 1
    and '"seed": 3' in html.unescape(page)
  )


def test_report_of_twelve_short_arms(tmp_path):
  write_rows(
    tmp_path, [row for i in range(12) for row in rl_rows(f"arm{i}", [0, 1], [0, 1], [1, 1])]
  )
  page = report_page.write_report(tmp_path, title="twelve").read_text(encoding="utf-8")
  assert "Too few steps in 12 of 12 arms" in page
  styles = report_page.style_of(["vanilla", "scaled", "r2m"] + [f"arm{i}" for i in range(9)])
  assert len(set(styles.values())) == 12


# ---- evaluations ----


def evaluation_rows(golds, proxies):
  names = ("kl", "length", "truncated", "repetition")
  rows = []
  for i, (gold, proxy) in enumerate(zip(golds, proxies)):
    means = {"gold": gold, "frozen": proxy} | dict.fromkeys(names, 0.5)
    ends = {name + end: value for name, value in means.items() for end in ("_low", "_high")}
    rows.append(
      {"stage": "eval", "arm": "a", "step": 10 * i, "seconds": 1.0, "gold_low": -9.0} | means | ends
    )
  return rows


def test_the_alarm_against_the_rule_at_every_evaluation():
  """It is raised at the first evaluation at which the rule holds for all evaluations so far."""
  rng = np.random.default_rng(3)
  for fall in (0.0, 1.0):
    golds = [1 - fall * abs(i - 8) / 4 + rng.normal() / 50 for i in range(20)]
    proxies = [i / 5 + rng.normal() / 50 for i in range(20)]
    rows = evaluation_rows(golds, proxies)
    at = np.arange(20) * 10.0
    holds = [
      summary.over_optimised(
        summary.rise_and_fall((at[:n], np.array(golds[:n])), (at[:n], np.array(proxies[:n])))
      )
      for n in range(21)[10:]
    ]
    raised = summary.first_alarm(rows)
    if fall:
      assert raised[0] == 10 * (holds.index(True) + 9) and abs(raised[1] - 80) <= 10
    else:
      assert not any(holds) and raised is None


def test_evaluations_of_a_fork_that_adds_gold(tmp_path):
  def row(step, **values):
    values = dict(frozen=1.0, kl=0.1, length=5.0, truncated=0.0, repetition=0.0) | values
    ends = {name + end: value for name, value in values.items() for end in ("", "_low", "_high")}
    return {"stage": "eval", "arm": "r2m", "step": step, "seconds": 1.0} | ends

  write_rows(tmp_path, [row(0), row(1, gold=3.0), row(2, gold=2.0), *rl_rows("r2m", kl=[0.1, 0.2])])
  page = report_page.write_report(tmp_path, title="fork").read_text()
  cells = re.findall(
    r"<td role=\"cell\" data-name=\"(?:Evaluation \(step\)|Gold)\">(.*?)</td>", page
  )
  assert cells[:6] == ["first (0)", "–", "best (1)", "3.00 [3.00, 3.00]"] + [
    "last (2)",
    "2.00 [2.00, 2.00]",
  ]


def test_the_report_shows_evaluations_with_a_slider(tmp_path):
  rows = evaluation_rows([1 - abs(i - 8) / 4 for i in range(20)], [i / 5 for i in range(20)])
  steps = [
    {"stage": "rl", "arm": "a", "step": t, "seconds": 1.0, "reward/frozen": t, "kl": t / 9}
    for t in range(190)
  ]
  (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in steps + rows))
  answers = [
    {"arm": "a", "step": 10 * i, "prompt": p, "response": f"<i>{p} {i}</i>", "frozen": "nan"}
    | {"gold": 0.25, "kl": 1.5, "length": 7, "truncated": i == 1}
    for i in range(3)
    for p in ("p", "q")
  ]
  lines = [json.dumps(row) + "\n" for row in answers]
  (tmp_path / "eval_samples.jsonl").write_text("".join(lines))
  text = report_page.write_report(tmp_path, title="t").read_text()
  assert "ALARM: a: proxy up, gold down since step 80" in text and "over-optimisation" in text
  cells = re.findall(r'<div data-at="(\d)"( hidden)?>', text)
  assert cells == [("0", " hidden"), ("1", " hidden"), ("2", "")] * 2  # without a script: the last
  assert '<input id="at" type="range" min="0" max="2"' in text and 'data-steps="0 10 20"' in text
  assert text.count("&lt;i&gt;q 2&lt;/i&gt;") == 1 and "<i>q" not in text
  assert "gold 0.25, frozen –, kl 1.50, 7 tokens (cut)" in text
  assert (tmp_path / "figures/7_evaluations.png").exists()
