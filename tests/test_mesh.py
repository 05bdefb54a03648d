"""One device against eight: the same tokens and the same metrics on every mesh."""

import jax
import numpy as np
import pytest
import small

STEPS = 3


@pytest.fixture(scope="module")
def one_device():
  return small.run(small.config(), STEPS)


@pytest.mark.parametrize("mesh", [(8, 1, 1), (1, 8, 1), (1, 1, 8), (2, 2, 2)])
def test_eight_devices_equal_one(one_device, mesh):
  outputs, state = small.run(small.config(), STEPS, mesh)
  if mesh[2] > 1:
    kernel = state.policy["layers"]["mlp"]["up"]["kernel"][...]
    assert len({str(shard.index) for shard in kernel.addressable_shards}) == mesh[1] * mesh[2]  # really sharded
  for t, (got, want) in enumerate(zip(outputs, one_device[0])):
    np.testing.assert_array_equal(got.sequences.tokens, want.sequences.tokens, err_msg=f"tokens of step {t}")
    for name, value in want.metrics.items():
      if name.endswith("_deviation"):  # maxima of rounding errors themselves
        assert abs(got.metrics[name] - value) < 2e-5, (t, name)
      else:
        np.testing.assert_allclose(got.metrics[name], value, rtol=1e-5, atol=1e-6, err_msg=f"{name} of step {t}")


def test_uneven_batch_is_refused_before_any_device_work():
  cfg = small.config(rollout__prompts=6, mesh=(4, 1, 1))
  from r2m_jax.config import ConfigError, check_config

  with pytest.raises(ConfigError, match=r"rollout\.prompts is 6.*such as 8"):
    check_config(cfg)


def test_fewer_devices_than_the_mesh_names_is_refused():
  from r2m_jax.sharding import make_mesh

  with pytest.raises(ValueError, match=r"config\.mesh is \(64, 1, 1\)"):
    make_mesh((64, 1, 1), jax.devices())
