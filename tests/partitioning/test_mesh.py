import dataclasses
import itertools

import jax
import numpy as np
import pytest

from moe_peft import errors
from moe_peft.partitioning import mesh as mesh_lib

pytestmark = pytest.mark.eight_devices


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


@dataclasses.dataclass(frozen=True)
class FakeTPU:
    id: int
    slice_index: int | None
    coords: tuple[int, ...] = (0, 0, 0)
    core_on_chip: int = 0
    platform: str = "tpu"
    device_kind: str = "of a test"
    process_index: int = 0


def test_the_data_axis_goes_over_slices():
    places = itertools.product(*[range(2)] * 3, range(2))  # neighbours are of different slices
    devices = [FakeTPU(id_, place[3], place[:3]) for id_, place in enumerate(places)]
    parts = mesh_lib.split_by_slice(devices)
    grid = mesh_lib.over_slices((4, 2, 2), parts)
    assert grid.shape == (4, 2, 2)
    slices = np.vectorize(lambda device: device.slice_index)(grid)
    np.testing.assert_array_equal(slices[:, 0, 0], [0, 0, 1, 1])
    assert (slices == slices[:, :1, :1]).all()  # fsdp and model stay inside
    assert len({device.id for device in grid.flat}) == 16
    assert len(mesh_lib.split_by_slice([FakeTPU(i, None) for i in range(4)])) == 1


def test_slices_that_do_not_suit():
    devices = [FakeTPU(number, number // 4) for number in range(8)]
    with pytest.raises(errors.UserError, match="data has to be a multiple of 2"):
        mesh_lib.over_slices((1, 2, 4), mesh_lib.split_by_slice(devices))
    with pytest.raises(errors.UserError, match="over 4 slices .* lie in slices of 4, 4"):
        mesh_lib.split_by_slice(devices, 4)
    with pytest.raises(errors.UserError, match="lie in slices of 4, 3"):
        mesh_lib.split_by_slice(devices[:-1])
    with pytest.raises(errors.UserError, match="over 3 slices"):
        mesh_lib.make_mesh(slices=3)


def test_devices_that_know_no_slice_are_cut_in_order():
    mesh = mesh_lib.make_mesh(model=2, slices=2)
    assert dict(mesh.shape) == {"data": 4, "fsdp": 1, "model": 2}
    assert set(mesh.axis_types) == {jax.sharding.AxisType.Auto}
    first = {device.id for device in mesh.devices[:2].flat}
    assert first == {device.id for device in jax.devices()[:4]}
    with pytest.raises(errors.UserError, match="since fsdp and model stay inside"):
        mesh_lib.make_mesh(model=8, slices=2)


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
