"""Meshes and one table that says how every parameter is laid out over them.

Axes: `data` splits the batch, `fsdp` splits the batch and the parameters, `tensor` splits the parameters' other side.
One device is a 1 x 1 x 1 mesh; the same code runs on a pod.
"""

import re

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec as P

AXES = ("data", "fsdp", "tensor")
BATCH = P(("data", "fsdp"))
LARGE = 2**20  # elements; a parameter this large must match a rule

# (path pattern, spec of the trailing axes). Leading axes that a spec does not name (the layer axis) stay whole.
RULES = (
  (r"embed/embedding$", P("tensor", "fsdp")),
  (r"(attn/(q|k|v)|mlp/(gate|up))/kernel$", P("fsdp", "tensor")),
  (r"(attn/o|mlp/down)/kernel$", P("tensor", "fsdp")),
  (r"(attn/(q|k|v)|mlp/(gate|up))/kernel_lora_a$", P("fsdp", None)),
  (r"(attn/(q|k|v)|mlp/(gate|up))/kernel_lora_b$", P(None, "tensor")),
  (r"(attn/o|mlp/down)/kernel_lora_a$", P("tensor", None)),
  (r"(attn/o|mlp/down)/kernel_lora_b$", P(None, "fsdp")),
  (r"lm_head/kernel$", P("fsdp", "tensor")),
  (r"(wq|wk|wv)/kernel$", P("fsdp", "tensor")),
  (r"wo/kernel$", P("tensor", "fsdp")),
)


def mesh_shape(sizes: tuple[int, ...], num_devices: int) -> tuple[int, int, int]:
  """Fills in a single -1. Raises ValueError where the sizes cannot cover the devices."""
  if len(sizes) != 3 or sum(s == -1 for s in sizes) > 1 or any(s < 1 and s != -1 for s in sizes):
    raise ValueError(f"config.mesh is {sizes}; give three sizes for {AXES}, at most one of them -1, such as (-1, 1, 1)")
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
  # Auto axes: under Explicit ones an ordinary gather raises
  return jax.make_mesh(shape, AXES, devices=devices[: int(np.prod(shape))], axis_types=(AxisType.Auto,) * 3)


def path_name(path) -> str:
  """A pytree path as `layers/attn/q/kernel`, without NNX's trailing `.value`."""
  keys = [str(getattr(k, "key", getattr(k, "name", getattr(k, "idx", k)))) for k in path]
  return "/".join(k for k in keys if k != "value")


def spec_for(name: str, shape: tuple[int, ...], mesh: Mesh) -> P:
  """The PartitionSpec of one parameter. An axis that does not divide its dimension is left whole.

  Raises ValueError for a parameter of at least 2**20 elements that no rule matches.
  """
  for pattern, spec in RULES:
    if re.search(pattern, name) and len(shape) >= len(spec):
      spec = (None,) * (len(shape) - len(spec)) + tuple(spec)
      return P(*(a if a and n % mesh.shape[a] == 0 else None for a, n in zip(spec, shape)))
  if int(np.prod(shape)) >= LARGE and mesh.size > 1:
    raise ValueError(f"no sharding rule matches the parameter {name} of shape {shape}; add one to sharding.RULES")
  return P()


def shardings(tree, mesh: Mesh):
  """A tree of NamedShardings for a tree of arrays (or of jax.ShapeDtypeStruct)."""
  return jax.tree_util.tree_map_with_path(
    lambda path, x: NamedSharding(mesh, spec_for(path_name(path), x.shape, mesh)), tree
  )


def constrain_batch(mesh: Mesh):
  """A function that lays the leading axis of an array over data and fsdp; one device has nothing to lay out."""
  if mesh.size == 1:
    return lambda x: x
  return lambda x: jax.lax.with_sharding_constraint(x, NamedSharding(mesh, BATCH))


def place_batch(batch, layout: NamedSharding):
  """Host arrays on the devices of `layout`. With several processes each gives its own rows of the whole batch."""
  if jax.process_count() == 1:
    return jax.device_put(batch, layout)
  return jax.tree.map(lambda x: jax.make_array_from_process_local_data(layout, x), batch)
