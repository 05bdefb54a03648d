"""The conclusions of a comparison with the peers from its numbers. No peer runs here and no time is
measured.
"""

import json

import pytest

from benchmarks import machine, peer_figures, peer_task
from benchmarks.machine import Ticks
from benchmarks.peer_figures import PEERS, Run


def run(seconds, busy=0.0, peak=1):
  return Run("1.0", [seconds] * 5, [busy] * 5, peak)


def test_ratio_against_the_bound_of_the_processor():
  ours, trl = run(20.0, peak=9), PEERS["trl"]
  for wide, times in ((True, (69.0, 71.0)), (False, (55.0, 57.0))):
    missed, held = (peer_figures.judge("small", ours, trl, run(x, peak=9), wide) for x in times)
    assert (missed.held, held.held) == (False, True) and not held.void and held.memory
    assert held.ratio == pytest.approx(times[1] / 20)
    assert [peer_figures.status([held, other]) for other in (held, missed)] == [0, 1]


@pytest.mark.parametrize("flags, shown", [("", "AVX-512"), ("--xla_cpu_max_isa=AVX2", "AVX2")])
def test_instructions_are_those_that_xla_may_use(monkeypatch, flags, shown):
  listed = "flags : fpu sse4_2 avx avx2 avx512f"
  monkeypatch.setattr(machine.pathlib.Path, "exists", lambda path: True)
  monkeypatch.setattr(machine.pathlib.Path, "read_text", lambda path: listed)
  monkeypatch.setenv("XLA_FLAGS", flags)
  assert machine.instructions() == shown
  monkeypatch.setattr(machine.pathlib.Path, "read_text", lambda path: "flags : fpu sse4_2")
  assert machine.instructions() == "SSE4.2"


def test_a_busy_machine_voids_the_ratio():
  for ours, its in ((0.3, 0.0), (0.0, 0.3)):
    verdict = peer_figures.judge("tiny", run(0.5, ours), PEERS["trl"], run(1.8, its), True)
    assert "30% of the cores" in verdict.void
  assert not peer_figures.judge(
    "tiny", run(0.5, machine.QUIET), PEERS["trl"], run(1.8, machine.QUIET), True
  ).void


def test_a_higher_peak_is_a_miss():
  verdict = peer_figures.judge("tiny", run(0.5, peak=11), PEERS["trl"], run(1.8, peak=10), True)
  assert verdict.held and not verdict.memory and peer_figures.status([verdict]) == 1


def test_runs_of_one_program_are_joined():
  halves = [
    dict(seconds=[1.0, 2.0], busy=[0.0, 0.1], peak=5),
    dict(seconds=[3.0], busy=[0.2], peak=4, version="2"),
  ]
  joined = Run.of(halves)
  assert (
    joined == Run("", [1.0, 2.0, 3.0], [0.0, 0.1, 0.2], 5)
    and joined.median == 2.0
    and not joined.quiet
  )


def test_floor_is_that_of_the_reference_figures():
  # peers.md: 421 GFLOP/s
  assert peer_figures.floor_flops("tiny") / 421e9 == pytest.approx(0.39, abs=0.005)
  assert peer_figures.floor_flops("small") / 421e9 == pytest.approx(15.1, abs=0.05)


def test_the_work_is_that_of_workload():
  from benchmarks import workload

  for size, shape in peer_task.SIZES.items():
    on_gpu = peer_task.ON_GPU.get(size)
    config, arch = workload.get_config(size), workload.POLICIES[size]
    assert shape == dict(
      vocab_size=arch.vocab_size,
      hidden_size=arch.hidden_size,
      layers=arch.num_layers,
      heads=arch.num_heads,
      kv_heads=arch.num_kv_heads,
      intermediate_size=arch.intermediate_size,
    )
    assert (
      arch.untied_head == (on_gpu is None)
      and arch.qkv_bias
      and arch.rope_theta == peer_task.ROPE_THETA
    )
    rollout = config.rollout
    work = on_gpu or dict(prompts=peer_task.PROMPTS, response=peer_task.RESPONSE, parts=1)
    assert (rollout.prompts, rollout.group_size) == (work["prompts"], peer_task.GROUP)
    assert (config.plan.prompt_length, rollout.max_new_tokens) == (
      peer_task.LENGTH,
      work["response"],
    )
    assert config.ppo.accumulation == work["parts"]
    assert (rollout.temperature, config.ppo.epochs) == (peer_task.TEMPERATURE, peer_task.EPOCHS)
    assert (config.kl.beta, config.policy.lr) == (peer_task.BETA, peer_task.LEARNING_RATE)


def test_prompts_have_their_length_as_text():
  texts = peer_task.prompts(32000, 3)
  assert len(texts) == peer_task.PROMPTS and {len(text) for text in texts} == {
    peer_task.LENGTH * peer_task.WIDTH
  }
  assert texts == peer_task.prompts(32000, 3) != peer_task.prompts(32000, 4)


def test_a_row_that_ends_early_ends_the_process():
  peer_task.check_length("a response", [64, 64], 64)
  with pytest.raises(SystemExit, match=r"\[3, 70\] tokens, not 64"):
    peer_task.check_length("a response", [64, 3, 70], 64)


@pytest.fixture
def clock(monkeypatch):
  """Ticks of a machine with 2 cores. Rollout i takes i seconds, and other processes use `busy[i]`
  of it.
  """

  def start(busy):
    now, others = iter(range(len(busy) + 1)), iter([0.0, *busy])
    wall = used = 0.0

    def ticks():
      nonlocal wall, used
      passed = next(now)
      wall, used = wall + passed, used + 2 * passed * next(others)
      return Ticks(wall, used, 0.0)

    monkeypatch.setattr(machine.Ticks, "now", ticks)
    monkeypatch.setattr(machine.os, "cpu_count", lambda: 2)

  return start


def laps(watch):
  watch.lap()
  while not watch.done:
    watch.lap()
  return json.loads(watch.result("peer", "1.0", extra=3))


def test_watch_drops_the_warm_and_the_busy_rollouts(clock):
  clock([0.0, 0.5, 0.0, 0.05])
  result = laps(peer_task.Watch(2, 3))
  assert (
    result["warm"] == [1.0]
    and result["seconds"] == [3.0, 4.0]
    and result["busy"] == pytest.approx([0.0, 0.05])
  )
  assert (result["dropped"], result["quiet"], result["extra"]) == (1, True, 3)


def test_watch_gives_up_on_a_busy_machine_and_says_so(clock):
  clock([0.0, 0.5, 0.3, 0.6, 0.4])
  result = laps(peer_task.Watch(2, 2))
  assert result["seconds"] == [3.0, 5.0] and (result["dropped"], result["quiet"]) == (2, False)
