"""Many seeds in one program: functions of one seed, vmapped over a leading axis that is split over
devices.

An array of all seeds has the seeds as its first axis; `stack` and `pick` convert between trees of
one seed and of all seeds.
"""

import functools
from collections.abc import Callable, Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from r2m_jax.run.build import Build
from r2m_jax.run.fit import Job, fit


def stack(trees: Sequence):
  """Stacks trees of NumPy or jax arrays into one tree with a leading axis, on the host or on the
  device.
  """
  on_host = isinstance(jax.tree.leaves(trees[0])[0], np.ndarray)
  return jax.tree.map(lambda *x: (np if on_host else jnp).stack(x), *trees)


def pick(tree, index):
  """The entry `index` along the leading axis of every array; a list of indices gives several."""
  return jax.tree.map(lambda x: x[index], tree)


def seeds_mesh(count: int) -> Mesh:
  """A mesh with one axis and as many devices as divide `count` seeds evenly."""
  devices = jax.devices()
  used = max(n for n in range(1, len(devices) + 1) if count % n == 0)
  return jax.make_mesh((used,), ("seeds",), devices=devices[:used], axis_types=(AxisType.Auto,))


def together(f: Callable, mesh: Mesh, *, donate: tuple[int, ...] = ()):
  """`f` of one seed's arrays, applied to all seeds: each device vmaps over its share, and devices
  never wait for each other.

  Args:
    donate: positions of arguments whose memory the results may reuse.
  """
  share = jax.shard_map(
    jax.vmap(f), mesh=mesh, in_specs=P("seeds"), out_specs=P("seeds"), check_vma=False
  )
  return jax.jit(share, donate_argnums=donate)


def spread(tree, mesh: Mesh):
  """Puts arrays of all seeds on the devices of the mesh."""
  return jax.device_put(tree, NamedSharding(mesh, P("seeds")))


def fit_together(jobs: Sequence[Job], built: Build, workdir: Path) -> list:
  """The results of `fit.do` for all jobs, with the updates of all jobs in one program on one
  device.

  The jobs differ only in data, start and frozen weights. Clipping and the optimizer treat each seed
  separately; an update with a non-finite number is skipped for all of them. Logs means over the
  seeds.
  """
  first = jobs[0]

  def loss(state, batch, *frozen):
    losses, aux = jax.vmap(first.loss)(state, batch, *frozen)
    total = losses.sum()  # the gradient of each seed's own loss, with the mean as the value
    return total + jax.lax.stop_gradient(losses.mean() - total), jax.tree.map(jnp.mean, aux)

  tx = optax.GradientTransformation(jax.vmap(first.tx.init), jax.vmap(first.tx.update))
  on_device = NamedSharding(built.mesh, P())
  start = stack([job.start for job in jobs])
  state = fit(
    loss,
    jax.device_put(start, on_device),
    tx,
    map(stack, zip(*(job.batches for job in jobs))),
    total=first.total,
    stage=first.stage,
    workdir=workdir,
    state_shardings=jax.tree.map(lambda _: on_device, start),
    batch_sharding=on_device,
    frozen=None if first.frozen is None else stack([job.frozen for job in jobs]),
  )
  return list(map(functools.partial(pick, state), range(len(jobs))))
