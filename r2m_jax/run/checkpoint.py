"""Orbax checkpoints of the whole run: atomic, in the background, sharded, and checked before they
are read.

A checkpoint is a folder named by its step. Orbax writes it under another name and renames it when
it is complete. Before that, a manifest with the SHA-256 of every file is written into it. If a
folder has no manifest, or if its files differ from the manifest, it is damaged. It is then reported
and moved to `damaged/`, and the checkpoint before it is used.
"""

import contextlib
import dataclasses
import hashlib
import json
import math
import os
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp
from orbax.checkpoint import checkpoint_managers as keep

from r2m_jax.parallel import hosts
from r2m_jax.parallel.errors import UserError
from r2m_jax.run.files import read_json, sha256_of, write_atomic

MANIFEST = "manifest.json"
# orbax writes the last two at the very end
UNSIGNED = (MANIFEST, "_CHECKPOINT_METADATA", "commit_success.txt")
UNFINISHED = ".orbax-checkpoint-tmp"


class CheckpointError(UserError, RuntimeError):
  """A checkpoint cannot be written or read; the message names the checkpoint, the reason and the
  fix.
  """

  status = 1


class Checkpoints(ocp.CheckpointManager):
  """Orbax's manager of the checkpoints in one folder, each with a manifest."""

  def __init__(
    self,
    folder,
    *,
    last: int,
    every: int = 0,
    best: int = 0,
    mode: str = "max",
    background: bool = True,
  ):
    self.folder, self.background = Path(folder).absolute(), background
    self.facts = {}  # of the save in progress
    self.sound = set()  # steps whose files match their manifest
    rules = [keep.LatestN(last)]
    if every:
      rules.append(keep.EveryNSteps(every))
    if best:
      lowest = mode == "min"

      def value(metrics):
        return metrics["value"]

      rules.append(
        keep.BestN(
          get_metric_fn=value, reverse=lowest, n=best, keep_checkpoints_without_metrics=False
        )
      )
    options = ocp.CheckpointManagerOptions(
      preservation_policy=keep.AnyPreservationPolicy(rules),
      best_fn=(lambda metrics: metrics["value"]) if best else None,
      best_mode=mode,
      async_options=ocp.options.AsyncOptions(post_finalization_callback=self._sign),
    )
    with told(f"{self.folder} cannot be opened"):
      super().__init__(self.folder, options=options)

  def _sign(self) -> None:
    """Writes the manifest when all files are written and not yet at their final place."""
    if hosts.first():
      folder = self.folder / f"{self.facts['step']}{UNFINISHED}"
      write_atomic(folder / MANIFEST, json.dumps(self.facts | {"files": digests(folder)}, indent=1))


def open_checkpoints(folder, settings=None, *, last: int = 2) -> Checkpoints:
  """The checkpoints in `folder`, which is created if it does not exist. settings:
  config.checkpoint; None: keep the `last` ones.
  """
  if settings is None:
    return Checkpoints(folder, last=last)
  return Checkpoints(
    folder,
    last=settings.keep_last,
    every=settings.keep_every,
    best=settings.keep_best,
    mode=settings.best_mode,
    background=settings.background,
  )


def save(
  checkpoints: Checkpoints,
  step: int,
  tree,
  *,
  value: float | None = None,
  facts: dict | None = None,
) -> None:
  """Starts a save, or completes it if saves are not in the background.

  The tree is copied first, so it may be donated to the next step at once. An error of the previous
  save is raised here.

  Args:
    value: the value that `keep_best` compares.
    facts: JSON written into the manifest: fingerprints of config and data, "cursor" of a data
      pipeline.
  """
  wait(checkpoints)
  checkpoints.facts = {"step": step, **(facts or {})}
  checkpoints.sound.add(step)
  with told(f"{checkpoints.folder} could not take a checkpoint of step {step}"):
    known = value is not None and math.isfinite(value)
    checkpoints.save(
      step, args=ocp.args.StandardSave(tree), metrics={"value": float(value)} if known else None
    )
  if not checkpoints.background:
    wait(checkpoints)


def wait(checkpoints: Checkpoints) -> None:
  """Returns when the last save is complete; raises CheckpointError if it failed."""
  with told(f"{checkpoints.folder} could not take a checkpoint"):
    checkpoints.wait_until_finished()


def newest(checkpoints: Checkpoints) -> int | None:
  """Step of the newest intact checkpoint; None if there is none. Damaged ones are reported and set
  aside.
  """
  wait(checkpoints)
  if hosts.first():
    for left in checkpoints.folder.glob(f"*{UNFINISHED}"):
      print(f"resume   {left} was never finished: removed")
      shutil.rmtree(left, ignore_errors=True)
    for step in sorted(checkpoints.all_steps(), reverse=True):
      problem = None if step in checkpoints.sound else damage(checkpoints.folder / str(step))
      if problem is None:
        break
      print(
        f"resume   checkpoint {checkpoints.folder / str(step)} is damaged: {problem}; the one "
        "before is used"
      )
      set_aside(checkpoints.folder / str(step))
  hosts.meet()  # the others wait until the first process has checked
  checkpoints.reload()
  step = checkpoints.latest_step()
  if step is not None:
    checkpoints.sound.add(step)
  return step


def newest_to_read(checkpoints: Checkpoints) -> int | None:
  """As `newest`, of a run that is only read and may still be training: no unfinished save is
  removed, and no damaged checkpoint is moved.
  """

  def found() -> int | None:
    for step in sorted(checkpoints.all_steps(), reverse=True):
      problem = damage(checkpoints.folder / str(step))
      if problem is None:
        return step
      print(f"damaged  {checkpoints.folder / str(step)}: {problem}; the one before is read")
    return None

  step = hosts.on_first(found)
  if step is not None:
    checkpoints.sound.add(step)
  return step


def restore(checkpoints: Checkpoints, like, step: int | None = None):
  """Restores the newest intact checkpoint (or `step`) into the shapes, dtypes and shardings of
  `like`.

  Args:
    like: a tree of arrays or of jax.ShapeDtypeStruct with shardings; its mesh may differ from the
      saved one. A leaf `...` (`left_out`) is not read and is returned as `...`.
  """
  step = newest(checkpoints) if step is None else step
  folder = checkpoints.folder / str(step)
  if step not in checkpoints.sound and (problem := damage(folder)):
    raise CheckpointError(
      f"{folder} is damaged: {problem}; choose one of steps {checkpoints.all_steps()}"
    )
  if newer := fields_added_since(like, folder):
    parts = {f.name: getattr(like, f.name) for f in dataclasses.fields(like)}
    known = {name: part for name, part in parts.items() if name not in newer}
    return dataclasses.replace(like, **restore(checkpoints, known, step))
  partial = any(x is ... for x in jax.tree.leaves(like))
  abstract = jax.tree.map(lambda x: x if x is ... else ocp.utils.to_shape_dtype_struct(x), like)
  with told(f"{folder} does not fit this run", "give it the config and the version that wrote it"):
    if not partial:
      return checkpoints.restore(step, args=ocp.args.StandardRestore(abstract))
    reader = ocp.PyTreeCheckpointer()  # the manager itself can only read whole checkpoints
    args = ocp.checkpoint_utils.construct_restore_args(abstract)
    return reader.restore(folder / "default", ocp.args.PyTreeRestore(abstract, args))


def fields_added_since(like, folder: Path) -> set[str]:
  """The fields of a dataclass `like` that are None and that the checkpoint lacks, because an earlier
  version without them wrote it.
  """
  if not dataclasses.is_dataclass(like):
    return set()
  empty = {f.name for f in dataclasses.fields(like) if getattr(like, f.name) is None}
  with told(f"{folder} does not fit this run", "give it the config and the version that wrote it"):
    saved = ocp.PyTreeCheckpointer().metadata(folder / "default").item_metadata.tree
  return empty - set(saved)


def left_out(tree):
  """The tree with every leaf replaced by `...`: a part that `restore` does not read."""
  return jax.tree.map(lambda _: ..., tree)


def facts_of(checkpoints: Checkpoints, step: int) -> dict:
  """The facts that were passed to `save`."""
  return read_json(checkpoints.folder / str(step) / MANIFEST)


def require(checkpoints: Checkpoints, step: int, **facts: str) -> None:
  """Raises CheckpointError if `save` was given other facts, such as another fingerprint models=."""
  saved = facts_of(checkpoints, step)
  for what, here in facts.items():
    if saved.get(what, here) != here:
      raise CheckpointError(
        f"{checkpoints.folder / str(step)} is of other {what} than this run's; give it what wrote "
        "the checkpoint, or "
        "fork: --workdir=NEW --config.checkpoint.fork_from=OLD"
      )


@contextlib.contextmanager
def finished(checkpoints: Checkpoints):
  """Completes the last save, however the block ends; an error of the block takes precedence."""
  try:
    yield
  except BaseException:
    with contextlib.suppress(CheckpointError):
      wait(checkpoints)
    raise
  wait(checkpoints)


# ---- manifests ----


def fingerprint(tree) -> str:
  """SHA-256 over a checksum of every array: the same on every mesh, without gathering anything. It
  does not protect against forgery.
  """
  found = [
    (jax.tree_util.keystr(path), x.shape, str(x.dtype), _checksum(x))
    for path, x in jax.tree_util.tree_leaves_with_path(tree)
  ]
  return hashlib.sha256(repr([(*what, int(sum_)) for *what, sum_ in found]).encode()).hexdigest()


@jax.jit
def _checksum(x: jax.Array) -> jax.Array:
  """u32[]: sums of integers do not depend on their order. Each element's bits are mixed with its
  position.
  """
  bits = jax.lax.bitcast_convert_type(
    x, {1: jnp.uint8, 2: jnp.uint16}.get(x.dtype.itemsize, jnp.uint32)
  )
  bits = bits.astype(jnp.uint32)
  place = jnp.zeros((), jnp.uint32)
  stride = 1
  for axis in reversed(range(bits.ndim)):
    place = place + jax.lax.broadcasted_iota(jnp.uint32, bits.shape, axis) * jnp.uint32(
      stride % 2**32
    )
    stride *= bits.shape[axis]
  mixed = (bits ^ place * jnp.uint32(0x9E3779B1)) * jnp.uint32(0x85EBCA6B)
  mixed = (mixed ^ mixed >> 15) * jnp.uint32(0xC2B2AE35)
  return (mixed ^ mixed >> 13).sum(dtype=jnp.uint32)


def digests(folder: Path) -> dict[str, str]:
  """SHA-256 of every file in a checkpoint, by path in it."""
  found = {}
  for path in sorted(folder.rglob("*")):
    name = path.relative_to(folder).as_posix()
    if name in UNSIGNED or path.is_dir() and not path.is_symlink():
      continue
    if path.is_symlink():
      found[name] = "a link"  # never written by us, never followed
      continue
    found[name] = sha256_of(path)
  return found


def damage(folder: Path) -> str | None:
  """What is wrong with a checkpoint's files; None if they match the manifest."""
  try:
    want = read_json(folder / MANIFEST)["files"]
    got = digests(folder)
  except FileNotFoundError:
    return f"it has no {MANIFEST}"
  except (OSError, ValueError, KeyError) as error:
    return f"it cannot be read: {error}"
  if not isinstance(want, dict):
    return f"its {MANIFEST} lists no files"
  # hidden files, which file managers and network disks leave, are not read
  added = {name for name in got.keys() - want.keys() if not Path(name).name.startswith(".")}
  for what, names in (("is missing", want.keys() - got.keys()), ("was added", added)):
    if names:
      return f"{min(names)} {what}"
  changed = [name for name in want if want[name] != got[name]]
  return f"{changed[0]} is not what was written" if changed else None


def set_aside(folder: Path) -> None:
  """Moves a damaged checkpoint out of the way, for inspection."""
  place = folder.parent / "damaged"
  place.mkdir(exist_ok=True)
  number = sum(path.name.split(".")[0] == folder.name for path in place.iterdir())
  os.replace(folder, place / f"{folder.name}.{number}")


AGAIN = "run the same command: it resumes from the last checkpoint"


@contextlib.contextmanager
def told(what: str, fix: str = f"free space or repair the disk, then {AGAIN}"):
  """Turns an error of orbax or of the disk into one line with the fix."""
  try:
    yield
  except Exception as error:  # noqa: BLE001  a full disk raises several kinds
    reason = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
    if isinstance(error, KeyError):  # its text is only the key
      reason = f"KeyError: {reason}"
    if isinstance(error, TimeoutError):
      fix = f"the disk is too slow, or the program was suspended meanwhile; {AGAIN}"
    raise CheckpointError(f"{what}: {reason[:400]}; {fix}") from error
