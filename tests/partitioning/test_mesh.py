import jax
import numpy as np
import pytest

from moe_peft import errors
from moe_peft.partitioning import mesh as mesh_lib


def test_all_devices_are_data_parallel_by_default():
    mesh = mesh_lib.make_mesh()
    assert dict(mesh.shape) == {"data": 8, "fsdp": 1, "model": 1}
    assert set(mesh.axis_types) == {jax.sharding.AxisType.Auto}


def test_axes_multiply_to_the_devices():
    assert dict(mesh_lib.make_mesh(fsdp=2, model=2).shape) == {"data": 2, "fsdp": 2, "model": 2}
    with pytest.raises(errors.UserError, match="data=3 x fsdp=2 x model=1 needs 6 devices.* 8"):
        mesh_lib.make_mesh(data=3, fsdp=2)
    with pytest.raises(errors.UserError, match="needs 3 devices"):
        mesh_lib.make_mesh(fsdp=3, devices=jax.devices()[:1])
    with pytest.raises(errors.UserError, match="at least 1, got data=None, fsdp=0"):
        mesh_lib.make_mesh(fsdp=0)


def test_batches_are_split_over_data_and_fsdp():
    mesh = mesh_lib.make_mesh(fsdp=2, model=2)
    rows = {"x": np.arange(8 * 3).reshape(8, 3)}
    placed = mesh_lib.put_batch(rows, mesh_lib.batch_sharding(mesh))["x"]
    np.testing.assert_array_equal(placed, rows["x"])
    assert {shard.data.shape for shard in placed.addressable_shards} == {(2, 3)}
    starts = {shard.index[0].start or 0 for shard in placed.addressable_shards}
    assert starts == {0, 2, 4, 6}


def test_replicated_is_whole_everywhere():
    mesh = mesh_lib.make_mesh()
    placed = jax.device_put(np.arange(3), mesh_lib.replicated(mesh))
    assert {shard.data.shape for shard in placed.addressable_shards} == {(3,)}


@pytest.mark.parametrize(
    ("batch_size", "num_microbatches", "words"),
    [
        (10, 1, "A batch of 10 cannot be divided evenly over 8 devices: .* multiple of 8"),
        (24, 2, "24 in 2 micro-batches .* multiple of 16, such as 32"),
        (0, 1, "at least 1, got 0 and 1"),
        (8, 0, "at least 1, got 8 and 0"),
    ],
)
def test_uneven_batches_are_refused(batch_size, num_microbatches, words):
    with pytest.raises(errors.UserError, match=words):
        mesh_lib.check_batch_size(batch_size, num_microbatches, mesh_lib.make_mesh())


def test_even_batches_pass():
    mesh_lib.check_batch_size(32, 2, mesh_lib.make_mesh())
