"""Orbax checkpoints of the whole run: atomic, asynchronous, sharded."""

from pathlib import Path

import jax
import orbax.checkpoint as ocp


def open_checkpoints(folder, keep: int = 2) -> ocp.CheckpointManager:
  """A manager of the checkpoints in `folder`, one sub-folder a step; the newest `keep` stay."""
  options = ocp.CheckpointManagerOptions(max_to_keep=keep, create=True, enable_async_checkpointing=True)
  return ocp.CheckpointManager(Path(folder).absolute(), options=options)


def save(manager: ocp.CheckpointManager, step: int, tree) -> None:
  """Starts an asynchronous save. The tree may be donated to the next step at once: it is copied first."""
  manager.save(step, args=ocp.args.StandardSave(tree))


def restore(manager: ocp.CheckpointManager, like, step: int | None = None):
  """Restores the newest checkpoint (or `step`) into the shapes, dtypes and shardings of `like`.

  Args:
    like: a tree of arrays or of jax.ShapeDtypeStruct with shardings; it may lie on another mesh than the one saved.
  """
  step = manager.latest_step() if step is None else step
  abstract = jax.tree.map(ocp.utils.to_shape_dtype_struct, like)
  return manager.restore(step, args=ocp.args.StandardRestore(abstract))
