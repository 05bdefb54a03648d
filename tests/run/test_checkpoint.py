"""Reading parts of checkpoints, as an export does."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

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
