"""Meshes, and one table of how every parameter is distributed over them.

Axes: `data` splits the batch, `fsdp` splits the batch and the parameters, `tensor` splits the
  parameters along another axis. One device is a 1 x 1 x 1 mesh; the same code runs on a pod.
"""

import functools
import re
from collections.abc import Callable

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

AXES = ("data", "fsdp", "tensor")
ROWS = ("data", "fsdp")  # the mesh axes over which rows are split
BATCH = P(ROWS)
LARGE = 2**20  # elements; a parameter this large must match a rule

# (path pattern, spec of the trailing axes). Leading axes that a spec does not name (the layer axis)
# are not split.
RULES = (
  (r"embed/embedding$", P("tensor", "fsdp")),
  (r"(attn/(q|k|v)|mlp/(gate|up))/kernel$", P("fsdp", "tensor")),
  (r"(attn/o|mlp/down)/kernel$", P("tensor", "fsdp")),
  (r"(attn/(q|k|v)|mlp/(gate|up))/kernel_lora_a$", P("fsdp", None)),
  (r"(attn/(q|k|v)|mlp/(gate|up))/kernel_lora_b$", P(None, "tensor")),
  (r"(attn/o|mlp/down)/kernel_lora_a$", P("tensor", None)),
  (r"(attn/o|mlp/down)/kernel_lora_b$", P(None, "fsdp")),
  (r"(lm_head|score_first)/kernel$", P("fsdp", "tensor")),
  (r"(wq|wk|wv)/kernel$", P("fsdp", "tensor")),
  (r"wo/kernel$", P("tensor", "fsdp")),
)


def mesh_shape(sizes: tuple[int, ...], num_devices: int) -> tuple[int, int, int]:
  """Fills in a single -1. Raises ValueError if the sizes cannot cover the devices."""
  if len(sizes) != 3 or sum(s == -1 for s in sizes) > 1 or any(s < 1 and s != -1 for s in sizes):
    raise ValueError(
      f"config.mesh is {sizes}; give three sizes for {AXES}, at most one of them -1, such as (-1, "
      "1, 1)"
    )
  known = int(np.prod([s for s in sizes if s != -1]))
  if -1 in sizes and num_devices % known == 0:
    return tuple(num_devices // known if s == -1 else s for s in sizes)
  if -1 in sizes or known > num_devices:
    raise ValueError(
      f"config.mesh is {sizes}, which does not fit {num_devices} device(s); "
      f"make the product of its sizes divide {num_devices}, such as (-1, 1, 1)"
    )
  return tuple(sizes)


def make_mesh(sizes: tuple[int, ...], devices=None) -> Mesh:
  """A (data, fsdp, tensor) mesh over the first devices that it needs."""
  devices = jax.devices() if devices is None else devices
  shape = mesh_shape(sizes, len(devices))
  if jax.process_count() > 1 and np.prod(shape) < len(devices):
    raise ValueError(
      f"config.mesh is {shape}: with {jax.process_count()} processes it must cover all "
      f"{len(devices)} devices, such as "
      "(-1, 1, 1)"
    )
  # Auto axes: under Explicit ones an ordinary gather raises
  kwargs = dict(axis_types=(AxisType.Auto,) * 3)
  devices = devices[: int(np.prod(shape))]
  try:
    return jax.make_mesh(shape, AXES, devices=devices, **kwargs)
  except (
    NotImplementedError
  ):  # such as (1, 8, 2) on a 4 x 4 torus: an axis of the mesh covers part of an axis of the torus
    split = mesh_utils.create_device_mesh(shape, devices, allow_split_physical_axes=True)
    return Mesh(split, AXES, **kwargs)


def path_name(path) -> str:
  """A pytree path as `layers/attn/q/kernel`, without NNX's trailing `.value`."""
  keys = [str(getattr(k, "key", getattr(k, "name", getattr(k, "idx", k)))) for k in path]
  return "/".join(k for k in keys if k != "value")


def fitted(shape: tuple[int, ...], spec, mesh) -> P:
  """The spec without mesh axes that do not divide their dimension; those dimensions are not
  split.
  """

  def size(axes):
    return int(np.prod([mesh.shape[a] for a in (axes if isinstance(axes, tuple) else (axes,))]))

  return P(*(axes if axes and n % size(axes) == 0 else None for axes, n in zip(spec, shape)))


def spec_for(name: str, shape: tuple[int, ...], mesh: Mesh) -> P:
  """The PartitionSpec of one parameter. A mesh axis that does not divide its dimension does not
  split it.

  Raises ValueError for a parameter of at least 2**20 elements that no rule matches.
  """
  for pattern, spec in RULES:
    if re.search(pattern, name) and len(shape) >= len(spec):
      return fitted(shape, (None,) * (len(shape) - len(spec)) + tuple(spec), mesh)
  if int(np.prod(shape)) >= LARGE and mesh.size > 1:
    raise ValueError(
      f"no sharding rule matches the parameter {name} of shape {shape}; add one to sharding.RULES"
    )
  return P()


def shardings(tree, mesh: Mesh):
  """A tree of NamedShardings for a tree of arrays (or of jax.ShapeDtypeStruct)."""
  return jax.tree_util.tree_map_with_path(
    lambda path, x: NamedSharding(mesh, spec_for(path_name(path), x.shape, mesh)), tree
  )


def on_mesh(mesh: Mesh, f: Callable) -> Callable:
  """f, traced inside `mesh`, to which `lay`, `lay_rows` and `lay_parameters` in f refer. A single
  device needs no mesh, so f can then be mapped over another kind of mesh.
  """
  if mesh.size == 1:
    return f

  @functools.wraps(f)
  def traced(*args, **kwargs):
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
      return f(*args, **kwargs)

  return traced


def jit_on(mesh: Mesh) -> Callable[[Callable], Callable]:
  """`jax.jit` of `on_mesh`, as a decorator, for functions that run a model."""
  return lambda f: jax.jit(on_mesh(mesh, f))


def mesh_around():
  """The mesh of `on_mesh`; None if there is none, or if it has a single device."""
  mesh = jax.sharding.get_abstract_mesh()
  return None if mesh.size == 1 or "data" not in mesh.shape else mesh


def row_shards() -> int:
  """The number of devices over which `lay_rows` splits rows."""
  mesh = mesh_around()
  return 1 if mesh is None else mesh.shape["data"] * mesh.shape["fsdp"]


def lay(x: jax.Array, *spec) -> jax.Array:
  """x with its leading axes split over the mesh's axes in `spec`, and the others not split. Without
  a mesh: x.
  """
  mesh = mesh_around()
  return x if mesh is None else jax.lax.with_sharding_constraint(x, fitted(x.shape, spec, mesh))


def lay_rows(x: jax.Array) -> jax.Array:
  """x with its leading axis, the rows, split over data and fsdp."""
  return lay(x, ROWS)


def lay_leading(x: jax.Array) -> jax.Array:
  """Like `lay_rows`, without constraints on the other axes."""
  mesh = mesh_around()
  if mesh is None:
    return x
  rows = fitted(x.shape[:1], (ROWS,), mesh)
  return jax.lax.with_sharding_constraint(x, P(*rows, *[P.UNCONSTRAINED] * (x.ndim - 1)))


def lay_parameters(tree):
  """A tree of parameters, or of their gradients or moments, with the shardings of the table
  above.
  """
  mesh = mesh_around()
  if mesh is None:
    return tree
  return jax.tree_util.tree_map_with_path(
    lambda path, x: lay(x, *spec_for(path_name(path), x.shape, mesh)), tree
  )
