"""Reading parts of checkpoints, as an export does."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import struct

from r2m_jax.run import checkpoint


def test_what_is_left_out_is_not_read_and_the_rest_is_what_was_saved(tmp_path):
  saved = {"policy": {"w": jnp.arange(6.0).reshape(2, 3)}, "moments": (jnp.ones(4), jnp.zeros(4))}
  checkpoints = checkpoint.open_checkpoints(tmp_path, last=1)
  checkpoint.save(checkpoints, 3, saved)
  checkpoint.wait(checkpoints)
  where = jax.sharding.SingleDeviceSharding(jax.devices()[0])
  like = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where), saved)
  part = like | {"moments": checkpoint.left_out(like["moments"])}
  got = checkpoint.restore(checkpoint.open_checkpoints(tmp_path, last=1), part)
  np.testing.assert_array_equal(got["policy"]["w"], saved["policy"]["w"])
  assert got["moments"] == (..., ...)
  wrong = jax.ShapeDtypeStruct((5, 5), jnp.float32, sharding=where)
  with pytest.raises(checkpoint.CheckpointError, match="does not fit this run"):
    checkpoint.restore(checkpoints, part | {"policy": {"v": wrong}})
  # the manifest also covers files of the part that is not read
  (file,) = list((tmp_path / "3" / "default").glob("_METADATA"))
  file.write_bytes(file.read_bytes() + b" ")
  with pytest.raises(checkpoint.CheckpointError, match="_METADATA is not what was written"):
    checkpoint.restore(checkpoint.open_checkpoints(tmp_path, last=1), part, 3)


@pytest.mark.parametrize(
  "error, fix", [(TimeoutError("1200 s"), "was suspended"), (OSError("no space"), "free space")]
)
def test_a_save_that_takes_too_long_is_not_taken_for_a_full_disk(error, fix):
  with pytest.raises(checkpoint.CheckpointError, match=f"{error}; .*{fix}.*the same command"):
    with checkpoint.told("could not take a checkpoint"):
      raise error


@struct.dataclass
class Earlier:
  weights: jax.Array
  average: jax.Array | None = None


@struct.dataclass
class Later:
  weights: jax.Array
  average: jax.Array | None = None
  added: jax.Array | None = None


@pytest.mark.parametrize("left_out", [False, True])
def test_a_checkpoint_from_before_a_field_existed_is_read(tmp_path, left_out):
  checkpoints = checkpoint.open_checkpoints(tmp_path, last=1)
  checkpoint.save(checkpoints, 1, Earlier(jnp.arange(3.0), jnp.ones(2)))
  checkpoint.wait(checkpoints)
  where = jax.sharding.SingleDeviceSharding(jax.devices()[0])

  def leaf(size):
    return jax.ShapeDtypeStruct((size,), jnp.float32, sharding=where)

  like = Later(leaf(3), ... if left_out else leaf(2))
  found = checkpoint.restore(checkpoint.open_checkpoints(tmp_path, last=1), like)
  assert isinstance(found, Later) and found.added is None
  np.testing.assert_array_equal(found.weights, np.arange(3.0))
  assert found.average is ... if left_out else found.average.tolist() == [1, 1]
  # a field that is used is missed
  with pytest.raises(checkpoint.CheckpointError, match="does not fit this run"):
    checkpoint.restore(checkpoints, dataclasses.replace(like, added=leaf(2)))
