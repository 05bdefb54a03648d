"""One process of a run with several processes: `python tests/support/hosts_worker.py units FOLDER |
main [its arguments]`.

R2M_TEST_RECORD names a folder for the samples of every step and the digests of the restored state.
"""

import dataclasses
import hashlib
import json
import os
import pathlib
import sys

import jax
import numpy as np


def digests(state):
  """SHA-256 of every array of a state, by path. Whole arrays, on any mesh."""
  from r2m_jax.parallel import hosts

  def plain(x):
    return jax.random.key_data(x) if jax.dtypes.issubdtype(x.dtype, jax.dtypes.prng_key) else x

  leaves = jax.tree_util.tree_leaves_with_path(jax.tree.map(plain, state))
  return {
    jax.tree_util.keystr(path): hashlib.sha256(np.asarray(x).tobytes()).hexdigest()
    for path, x in zip([path for path, _ in leaves], hosts.fetch([x for _, x in leaves]))
  }


def record(folder):
  """Writes the tokens of each step and the restored state of a checkpoint."""
  from r2m_jax.parallel import hosts
  from r2m_jax.run import loop
  from r2m_jax.tasks import folders, gold

  train, resume = gold.train, loop.resume

  def recording(run, workdir):
    def steps(state):
      made = run.steps(state)

      def measure(t, state, out, *seen):
        if hosts.first():
          np.savez(
            folder / f"step{t}.npz",
            tokens=out.sequences.tokens,
            mask=out.sequences.token_mask,
            scores=out.judged.scores,
          )
        return made.measure(t, state, out, *seen)

      return made._replace(measure=measure)

    state = train(dataclasses.replace(run, steps=steps), workdir)
    whole = hosts.fetch(jax.tree.leaves(state.policy) + jax.tree.leaves(state.reward_head))
    if hosts.first():
      np.savez(folder / "end.npz", *whole)
    return state

  def resuming(config, checkpoints, state, **kwargs):
    state, start = resume(config, checkpoints, state, **kwargs)
    found = digests(state)
    if hosts.first() and start:
      (folder / f"restored{start}.json").write_text(json.dumps(found))
    return state, start

  gold.train = folders.train = recording
  loop.resume = resuming


def units(folder):
  """The documented behaviour of `hosts`, checked in two processes with four devices each."""
  from r2m_jax.configs import default
  from r2m_jax.parallel import hosts, sharding

  mine = jax.process_index
  settings = default.get_config().hosts
  settings.end_timeout = 10
  with hosts.together(settings):
    me = mine()
    print("only the first process prints")
    print(f"stderr of {me}", file=sys.stderr)
    assert jax.process_count() == 2 and jax.device_count() == 8 and hosts.first() == (me == 0)
    assert hosts.from_first({"who": me, "text": "ü" * 400}) == {"who": 0, "text": "ü" * 400}
    assert hosts.any_of(me == 1) and not hosts.any_of(False) and hosts.largest(7 * me) == 7
    ran = []
    assert hosts.on_first(lambda: [ran.append(1), "done"][1]) == "done" and len(ran) == (me == 0)

    def with_error():
      return [][1]

    try:
      hosts.on_first(with_error)
      raise AssertionError("no error")
    except (IndexError, hosts.Elsewhere) as error:
      assert isinstance(error, IndexError) == (me == 0)
    hosts.require_same({"a": 1}, "nothing")
    try:
      hosts.require_same(me, "their numbers")
      raise AssertionError("no error")
    except hosts.HostsError as error:
      assert str(error) == "process 1 and process 0 differ in their numbers", error
    hosts.PATIENCE = 0.5
    hosts.require_shared(folder)
    try:
      hosts.require_shared(folder / str(me))
      raise AssertionError("no error")
    except hosts.HostsError as error:
      assert "process 1 does not see what process 0 wrote there" in str(error), error

    whole = np.arange(16 * 3, dtype=np.float32).reshape(16, 3)
    turned = (
      np.asarray(jax.devices()).reshape(2, 4).T
    )  # a mesh on which a process has every second row
    for sizes, devices in (
      ((8, 1, 1), None),
      ((1, 1, 8), None),
      ((2, 2, 2), None),
      ((1, 2, 4), None),
      ((4, 2, 1), turned),
      ((4, 1, 2), turned),
      ((2, 4, 1), turned),
    ):
      mesh = sharding.make_mesh(sizes)
      if devices is not None:
        mesh = jax.sharding.Mesh(devices.reshape(sizes), sharding.AXES)
      layout = jax.NamedSharding(mesh, sharding.BATCH)
      rows = hosts.rows_of(layout, 16)
      batch = hosts.place(hosts.take({"x": whole, "n": whole[:, 0]}, layout), layout)
      assert batch["x"].shape == (16, 3) and batch["x"].sharding.is_equivalent_to(layout, 2)
      np.testing.assert_array_equal(hosts.fetch(batch)["x"], whole)
      np.testing.assert_array_equal(hosts.local(batch)["x"], whole[rows])
      np.testing.assert_array_equal(
        hosts.fetch(jax.jit(lambda x: x[::-1])(batch["n"])), whole[::-1, 0]
      )
      held = hosts.fetch(hosts.put(whole, jax.NamedSharding(mesh, jax.P("tensor"))))
      np.testing.assert_array_equal(held, whole)
      if devices is None:
        share = 16 if sizes[0] * sizes[1] == 1 else 8
        assert len(rows) == share and rows[0] == (8 * me if share == 8 else 0), (sizes, rows)
    try:
      sharding.make_mesh((4, 1, 1))
      raise AssertionError("no error")
    except ValueError as error:
      assert "with 2 processes it must cover all 8 devices, such as (-1, 1, 1)" in str(error), error
  (folder / f"passed{me}").write_text("")


def main():
  what, *arguments = sys.argv[1:]
  if what == "units":
    units(pathlib.Path(arguments[0]))
    return
  if folder := os.environ.get("R2M_TEST_RECORD"):
    record(pathlib.Path(folder))
  from absl import app

  from r2m_jax import main as program

  app.run(program.main, argv=["main", *arguments], flags_parser=program.parse_flags)


if __name__ == "__main__":
  main()
