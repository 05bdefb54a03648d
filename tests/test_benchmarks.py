"""The arithmetic of the benchmarks, against numbers worked by hand. No time is measured here."""

import math
import re
from pathlib import Path

import numpy as np
import pytest

from benchmarks import compile as compiling
from benchmarks import (
  fair,
  findings,
  gold_second,
  gpu_kernels,
  holds,
  machine,
  notes,
  notes_rows,
  workload,
)
from benchmarks.machine import Ticks
from r2m_jax.configs import fair as configs_fair
from r2m_jax.configs import holds as configs_holds
from r2m_jax.lab import contrasts

TINY, WIDTH = workload.POLICIES["tiny"], 4


def tiny(**settings):
  config = workload.get_config(
    "tiny", settings=[f"{name}={value}" for name, value in settings.items()]
  )
  return config, workload.sizes_of(config, TINY, TINY)


# a loop of three turns over one row of a table [8, 4] each, which is written to a row of a result
HLO = """HloModule m

%read (table: f32[8,4], row: s32[]) -> f32[1,4] {
  %table = f32[8,4]{1,0} parameter(0)
  %row = s32[] parameter(1)
  %zero = s32[] constant(0)
  ROOT %slice = f32[1,4]{1,0} dynamic-slice(%table, %row, %zero), dynamic_slice_sizes={1,4}
}

%write (into: f32[8,4], new: f32[1,4], at: s32[]) -> f32[8,4] {
  %into = f32[8,4]{1,0} parameter(0)
  %new = f32[1,4]{1,0} parameter(1)
  %at = s32[] parameter(2)
  %none = s32[] constant(0)
  ROOT %put = f32[8,4]{1,0} dynamic-update-slice(%into, %new, %at, %none)
}

%body (state: (s32[], f32[8,4], f32[8,4])) -> (s32[], f32[8,4], f32[8,4]) {
  %state = (s32[], f32[8,4]{1,0}, f32[8,4]{1,0}) parameter(0)
  %i = s32[] get-tuple-element(%state), index=0
  %x = f32[8,4]{1,0} get-tuple-element(%state), index=1
  %y = f32[8,4]{1,0} get-tuple-element(%state), index=2
  %one = s32[] constant(1)
  %next = s32[] add(%i, %one)
  %taken = f32[1,4]{1,0} fusion(%x, %i), kind=kLoop, calls=%read
  %put.1 = f32[8,4]{1,0} fusion(%y, %taken, %i), kind=kLoop, calls=%write
  ROOT %out = (s32[], f32[8,4]{1,0}, f32[8,4]{1,0}) tuple(%next, %x, %put.1)
}

%less (state.1: (s32[], f32[8,4], f32[8,4])) -> pred[] {
  %state.1 = (s32[], f32[8,4]{1,0}, f32[8,4]{1,0}) parameter(0)
  %j = s32[] get-tuple-element(%state.1), index=0
  %three = s32[] constant(3)
  ROOT %lt = pred[] compare(%j, %three), direction=LT
}

ENTRY %main (a: f32[8,4]) -> f32[8,4] {
  %a = f32[8,4]{1,0} parameter(0)
  %start = s32[] constant(0)
  %b = f32[8,4]{1,0} copy(%a)
  %first = (s32[], f32[8,4]{1,0}, f32[8,4]{1,0}) tuple(%start, %a, %b)
  %loop = (s32[], f32[8,4]{1,0}, f32[8,4]{1,0}) while(%first), condition=%less, body=%body
  ROOT %result = f32[8,4]{1,0} get-tuple-element(%loop), index=2
}
"""


def test_kernels_and_bytes_of_a_compiled_program():
  """Counted by hand: one copy, and in each of three turns a sum of numbers, a comparison, a read and
  a write of a row.
  """
  kernels, moved = gpu_kernels.launched(HLO)
  assert kernels == 1 + 3 * 4
  number, row, table = 4, 16, 128
  turn = 3 * number + (2 * number + 1) + (row + number + row) + (row + row + number)
  assert moved == 2 * table + 3 * turn


def test_share_of_the_others():
  # 10 s on 2 cores; of 13 s in all, this process had 8
  assert machine.others_share(
    Ticks(5.0, 100.0, 50.0), Ticks(15.0, 113.0, 58.0), cores=2
  ) == pytest.approx(0.25)
  # the two clocks may disagree: the result stays between 0 and 1
  assert machine.others_share(Ticks(0.0, 0.0, 0.0), Ticks(1.0, 1.9, 2.0), cores=2) == 0
  assert machine.others_share(Ticks(0.0, 0.0, 0.0), Ticks(1.0, 5.0, 0.0), cores=2) == 1


def test_busy_ticks_leave_idling_out():
  assert machine.busy_ticks("cpu  1 2 4 1000 2000 8 16 32 500 500") == 1 + 2 + 4 + 8 + 16 + 32


def test_quiet_rounds_are_kept_and_else_the_quietest():
  assert machine.quietest([0.5, 0.0, 0.1, 0.3], 2, 0.1) == ([1, 2], True)
  assert machine.quietest([0.5, 0.0, 0.2, 0.3], 2, 0.1) == ([1, 2], False)


def test_turns_are_taken_in_rounds():
  calls = []
  times = machine.take_turns(
    {name: lambda name=name: calls.append(name) for name in "ab"}, 2, quiet=1.0
  )
  assert calls == ["a", "b", "a", "b"]
  assert [len(found.seconds) for found in times.values()] == [2, 2]


def test_exponent_matches_numpy():
  sizes, values = [1, 2, 4, 8, 16], [3.0, 5.0, 11.0, 19.0, 42.0]
  slope, half = machine.exponent(sizes, values)
  fit, covariance = np.polyfit(np.log(sizes), np.log(values), 1, cov=True)
  assert slope == pytest.approx(fit[0])
  assert half == pytest.approx(3.182 * math.sqrt(covariance[0, 0]))
  exact, nothing = machine.exponent([1, 2, 4], [5, 20, 80])
  assert exact == pytest.approx(2) and nothing == pytest.approx(0, abs=1e-6)


def test_decoding_counted_by_hand():
  _, sizes = tiny(**{"rollout.max_new_tokens": 3, "plan.prompt_length": 5, "rollout.prompts": 2})
  # q and o 128 x 128, k and v 128 x 64, three matrices 128 x 512; 4 layers; 512 x 128 for the
  # logits
  weights = 4 * (2 * 128 * 128 + 2 * 128 * 64 + 3 * 128 * 512) + 512 * 128
  flops = moved = 0
  for there in (
    6,
    7,
  ):  # tokens that the queries of tokens 2 and 3 see: the prompt and the first one or two tokens
    flops += 16 * (
      2 * weights + 4 * (4 * there * 4 * 32)
    )  # 16 rows; q k' and p v in 4 layers of 4 heads of 32
    moved += weights + (2 * 4 * 2 * 32) * (
      2 * 5 + 16 * (there - 5)
    )  # 2 prompts with 5 slots, and the slots of 16 rows
  assert workload.decode_flops(sizes) == flops
  assert workload.decode_bytes(sizes, WIDTH) == WIDTH * moved


def test_flops_leave_out_what_is_computed_again():
  plain, sizes = tiny()
  again, _ = tiny(logits_chunk=512)
  again.remat = "full"
  assert workload.counts(plain, sizes, "cpu") == workload.counts(again, sizes, "cpu")
  assert again.remat == "full"


def test_programs_share_out_the_phases():
  config, sizes = tiny()
  phases, _ = workload.counts(config, sizes, "cpu")
  found = workload.by_program(phases)
  assert found["step"] == found["rollout"] + found["learn"] == sum(phases.values())
  assert found["updates"] == pytest.approx(phases["policy update"] + phases["reward head"])


def test_no_token_can_end_a_row():
  for size, arch in workload.POLICIES.items():
    assert workload.REWARDS[size].vocab_size == arch.vocab_size
  work = workload.of_size(
    "tiny",
    settings=[
      "rollout.prompts=1",
      "rollout.group_size=2",
      "rollout.max_new_tokens=4",
      "plan.prompt_length=4",
    ],
  )
  work.rollout()
  assert np.all(work.sequences.response_mask) and not np.any(work.sequences.has_eos)


def test_settings_keep_the_type_of_the_field():
  config, _ = tiny(**{"kl.beta": 0, "ppo.epochs": 3, "kl.estimator": "k3"})
  assert (config.kl.beta, type(config.kl.beta), config.ppo.epochs, config.kl.estimator) == (
    0.0,
    float,
    3,
    "k3",
  )


def test_union_counts_what_happens_together_once():
  assert compiling.union([(0, 2), (1, 3), (5, 6), (5.2, 5.8)]) == pytest.approx(4)


# ---- the numbers of docs/findings.md ----


def test_every_number_of_the_findings_has_its_row_or_its_source():
  of_rows, named, wrong = findings.differences()
  assert of_rows > 150 and named > 50 and not wrong, wrong


@pytest.mark.parametrize(
  "page, old, new, expected",
  [
    ("findings", "-0.034 [-0.070, -0.009]", "-0.034 [-0.070, -0.008]", "has no row and no source"),
    ("findings", "0.84 at weight", "0.85 at weight", "0.84 (r2m, 0.005, gold_at_kl_2) is not in"),
    ("findings", "is 30.4 nats", "is 30.4 nats, or 17.3", "17.3 has no row and no source"),
    ("findings", "| 9.5 [6.8, 12.3] |", "| 9.5 [6.8, 12.4] |", "the row has"),
    ("findings", "| (n 4) |", "| 0.02 [-0.08, 0.12] (n 4) |", "4 seeds are too few"),
    ("findings_text", "| 19.4 |", "| 19.5 |", "the row has"),
  ],
)
def test_a_number_that_is_not_its_rows_is_found(tmp_path, monkeypatch, page, old, new, expected):
  for file in findings.DOCS.glob("*"):
    if file.suffix in (".csv", ".md"):
      (tmp_path / file.name).write_bytes(file.read_bytes())
  text = findings.read(page)
  if old not in text:  # a separate sentence
    old, new = "\n## ", f"\nIts KL {new}.\n\n## "
  (tmp_path / f"{page}.md").write_text(text.replace(old, new, 1))
  monkeypatch.setattr(findings, "DOCS", tmp_path)
  wrong = findings.differences()[2]
  assert wrong and any(expected in line for line in wrong), wrong


def test_a_number_is_compared_as_it_is_rounded():
  row = dict(value="-0.034", low="-0.07049", high="0.2604")
  assert findings.matches("-0.03 [-0.07, 0.26]", row) and findings.matches("-3% [-7%, 26%]", row)
  assert not findings.matches("-0.04 [-0.07, 0.26]", row)
  assert not findings.matches("-0.03 [-0.07, 0.27]", row)
  assert not findings.matches("-0.03 [-0.07, 0.26]", row | {"value": "nan"})


def test_the_readme_gives_the_numbers_of_the_findings():
  """Each interval in its paragraph on the laboratory is also in the verdict, or in the registered
  test.
  """
  readme = (findings.DOCS.parent / "README.md").read_text(encoding="utf-8")
  paragraph = next(part for part in readme.split("\n\n") if "docs/findings.md" in part)
  numbers = re.findall(r"-?\d+\.\d+ \[[^\]]*\]", " ".join(paragraph.split()))
  registered = " ".join((findings.DOCS / "fair.md").read_text(encoding="utf-8").split())
  pages = findings.read("findings") + registered
  assert len(numbers) == 4 and all(number in pages for number in numbers)


@pytest.mark.parametrize(
  "rows, size",
  [
    ("lab_holds.parquet", ""),
    ("lab_certified.parquet", "certified"),
    ("lab_second.parquet", "placebos"),
  ],
)
def test_the_page_on_what_holds_shows_its_rows(rows, size):
  """docs/holds.md quotes the output of `python -m benchmarks.holds` for each file of rows."""
  docs = Path(__file__).parents[1] / "docs"
  curves = fair.curves_by_arm(fair.read_table(docs / rows)[0])
  config = configs_holds.get_config(size)
  printed = f"{contrasts.text(config, curves)}\n\n{holds.bars(config, curves)}"
  tried = configs_holds.TRIED[size][0]
  assert printed.startswith("Registered contrasts") and f"vanilla.{tried}.kl4" in printed
  assert printed in (docs / "holds.md").read_text(encoding="utf-8")


@pytest.mark.parametrize(
  "response, ended, value",
  [
    ("ant bear", True, 3 * 2 / 3 + 1.5 + 1),
    ("bear ant", True, 3 * 2 / 3 + 1.5),  # against the order of the note
    ("ant bear fox", True, 3 + 1.5 + 1),
    ("ant rice um bear", True, 3 * 2 / 3 + 1.5 / 2 + 1),  # two words are wasted
    ("ant bear bear", True, 3 * 2 / 3 + 1.5 * 2 / 3 + 1),  # and one is said twice
    ("ant cat", True, 3 / 3 + 1.5 / 2 - 0.5),  # a cat is not in the note
    ("ant bear", False, 3 * 2 / 3 + 1.5 + 1 - 1),
    ("", True, 0.0),
  ],
)
def test_the_second_gold_reward_by_hand(response, ended, value):
  assert gold_second.gold("rice ant tea bear cake fox", response, ended) == pytest.approx(value)


def test_the_page_of_the_registered_test_shows_its_rows():
  """docs/fair.md quotes the output of `python -m benchmarks.fair` for docs/lab_fair.parquet."""
  docs = Path(__file__).parents[1] / "docs"
  columns, _ = fair.read_table(docs / "lab_fair.parquet")
  curves = fair.curves_by_arm(columns)
  printed = contrasts.text(configs_fair.get_config(), curves).strip()
  page = (docs / "fair.md").read_text(encoding="utf-8")
  quoted = [part.split("```")[0].strip() for part in page.split("```text\n")[1:]]
  assert quoted[0].startswith("Registered contrasts") and quoted[0] == printed
  assert quoted[1:] == [fair.at_equal_steps(curves, of) for of in ("E2", "E3")]


def test_the_page_of_the_notes_task_shows_its_rows():
  """docs/notes.md quotes the output of `python -m benchmarks.notes docs/lab_notes`."""
  docs = Path(__file__).parents[1] / "docs"
  printed = notes.text(notes_rows.read(docs / "lab_notes"))
  page = (docs / "notes.md").read_text(encoding="utf-8")
  assert page.split("```text\n")[1].split("```")[0].strip() == printed
  for arm, seeds in notes_rows.runs_of(notes_rows.read(docs / "lab_notes")).items():
    assert sorted(seeds) == [0, 1, 2], arm
