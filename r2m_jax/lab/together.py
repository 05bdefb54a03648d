"""Many seeds in one program: what is written for one seed, vmapped over a leading axis that the
devices share.

An array of all seeds has the seeds as its first axis; `stack` and `pick` go from trees of one seed
to such and back.
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
  """Trees of NumPy or of jax arrays as one tree with a leading axis, on the host or on the
  device accordingly.
  """
  on_host = isinstance(jax.tree.leaves(trees[0])[0], np.ndarray)
  return jax.tree.map(lambda *x: (np if on_host else jnp).stack(x), *trees)


def pick(tree, index):
  """The entry `index` along the leading axis of every array; several as a list of indices."""
  return jax.tree.map(lambda x: x[index], tree)


def seeds_mesh(count: int) -> Mesh:
  """As many devices as `count` seeds can be shared out to evenly, along one axis."""
  devices = jax.devices()
  used = max(n for n in range(1, len(devices) + 1) if count % n == 0)
  return jax.make_mesh((used,), ("seeds",), devices=devices[:used], axis_types=(AxisType.Auto,))


def together(f: Callable, mesh: Mesh, *, donate: tuple[int, ...] = ()):
  """`f` of one seed's arrays, for all seeds: each device vmaps over its share, and devices never
  wait for each other.

  Args:
    donate: positions of arguments whose memory may become the results'.
  """
  share = jax.shard_map(
    jax.vmap(f), mesh=mesh, in_specs=P("seeds"), out_specs=P("seeds"), check_vma=False
  )
  return jax.jit(share, donate_argnums=donate)


def spread(tree, mesh: Mesh):
  """Arrays of all seeds, on the devices of the mesh."""
  return jax.device_put(tree, NamedSharding(mesh, P("seeds")))


def fit_together(jobs: Sequence[Job], built: Build, workdir: Path) -> list:
  """What `fit.do` makes of each job, with the updates of all jobs in one program on one device.

  The jobs differ in data, start and frozen weights alone. Clipping and the optimizer see each seed
  by itself; an update with a number that is not finite is left out for all of them. Logs means over
  the seeds.
  """
  first = jobs[0]

  def loss(state, batch, *frozen):
    losses, aux = jax.vmap(first.loss)(state, batch, *frozen)
    total = losses.sum()  # the gradient of each seed's own loss, under the mean as a value
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
