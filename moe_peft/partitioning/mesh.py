"""The device mesh: axes `data`, `fsdp` and `model`; batches are split over the first two."""

from collections.abc import Mapping, Sequence

import gin
import jax
from jax.experimental import mesh_utils
import numpy as np

from moe_peft import errors

AXES = ("data", "fsdp", "model")
BATCH_AXES = ("data", "fsdp")


def all_devices() -> list[jax.Device]:
    """Returns the devices of a mesh for which nobody named any."""
    return jax.devices()


@gin.register(module="partitioning")
def make_mesh(
    data: int | None = None,
    fsdp: int = 1,
    model: int = 1,
    devices: Sequence[jax.Device] | None = None,
    slices: int | None = None,
) -> jax.sharding.Mesh:
    """Returns a mesh over `devices` (default: all) with the axes data, fsdp and model.

    Args:
      data: devices along the data axis; None takes what fsdp and model leave over.
      fsdp: devices along which batches and weights are split.
      model: devices along which the inside of layers is split; see `layout`.
      devices: the devices to use, in order.
      slices: groups of devices with a fast network inside and a slow one between them. The data
        axis goes over them, `fsdp` and `model` stay inside. None asks TPUs, which know their slice;
        of devices that do not, each slice takes as many, in order.

    Raises:
      UserError: the product of the three sizes is not the number of devices, or slices cannot have
        equal shares of the data axis.
    """
    devices = all_devices() if devices is None else list(devices)
    if min(fsdp, model) < 1 or (data is not None and data < 1):
        raise errors.UserError(
            f"Mesh axes must be at least 1, got data={data}, fsdp={fsdp}, model={model}."
        )
    if data is None:
        data = max(len(devices) // (fsdp * model), 1)
    if data * fsdp * model != len(devices):
        raise errors.UserError(
            f"A mesh of data={data} x fsdp={fsdp} x model={model} needs {data * fsdp * model} "
            f"devices, but there are {len(devices)}."
        )
    axis_types = (jax.sharding.AxisType.Auto,) * len(AXES)
    shape, parts = (data, fsdp, model), split_by_slice(devices, slices)
    if len(parts) == 1:
        return jax.make_mesh(shape, AXES, axis_types=axis_types, devices=devices)
    return jax.sharding.Mesh(over_slices(shape, parts), AXES, axis_types=axis_types)


def split_by_slice(
    devices: Sequence[jax.Device], slices: int | None = None
) -> list[list[jax.Device]]:
    """Returns the devices of every slice; see `make_mesh`.

    Raises:
      UserError: there are not so many slices, or they are not equally large.
    """
    by_slice: dict[int, list[jax.Device]] = {}
    for device in devices:
        index = getattr(device, "slice_index", None) if device.platform == "tpu" else None
        by_slice.setdefault(index or 0, []).append(device)
    parts = [by_slice[index] for index in sorted(by_slice)]
    if slices is not None and len(parts) == 1 and slices > 0 and len(devices) % slices == 0:
        size = len(devices) // slices
        parts = [list(devices[first : first + size]) for first in range(0, len(devices), size)]
    if slices not in (None, len(parts)) or len({len(part) for part in parts}) > 1:
        sizes = ", ".join(str(len(part)) for part in parts)
        raise errors.UserError(
            f"A mesh over {slices or len(parts)} slices needs as many equal ones, but the "
            f"{len(devices)} devices lie in slices of {sizes}."
        )
    return parts


def over_slices(shape: tuple[int, int, int], parts: Sequence[Sequence[jax.Device]]) -> np.ndarray:
    """Arranges the devices of several slices: each takes its share of the data axis.

    Raises:
      UserError: the data axis does not divide among the slices.
    """
    data, fsdp, model = shape
    if data % len(parts):
        raise errors.UserError(
            f"A mesh of data={data} x fsdp={fsdp} x model={model} does not divide over "
            f"{len(parts)} slices: data has to be a multiple of {len(parts)}, since fsdp and model "
            "stay inside a slice."
        )
    inside = (data // len(parts), fsdp, model)
    blocks = [mesh_utils.create_device_mesh(inside, part) for part in parts]
    return np.concatenate(blocks, axis=0)


def batch_sharding(mesh: jax.sharding.Mesh) -> jax.sharding.NamedSharding:
    """Returns the sharding that splits the leading axis of a batch over data x fsdp."""
    return jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(BATCH_AXES))


def host_shard(mesh: jax.sharding.Mesh) -> tuple[int, int]:
    """Returns (number, count) of the part of every batch that this process passes on.

    Processes whose devices hold the same rows, because the mesh splits only weights between them,
    have the same number.

    Raises:
      UserError: a process's devices hold rows that are not one connected part of the batch.
    """
    shards = mesh.devices.reshape(-1, mesh.shape["model"])
    rows_of = {}
    for row, devices in enumerate(shards):
        for device in devices:
            rows_of.setdefault(device.process_index, set()).add(row)
    own = rows_of[jax.process_index()]
    first, size = min(own), len(own)
    if own != set(range(first, first + size)) or first % size or len(shards) % size:
        raise errors.UserError(
            f"On this mesh of {dict(mesh.shape)}, process {jax.process_index()} would hold the "
            f"parts {sorted(own)} of {len(shards)} of a batch, which are not one connected part. "
            "Make model x fsdp divide the devices of a process, or the other way round."
        )
    return first // size, len(shards) // size


def replicated(mesh: jax.sharding.Mesh) -> jax.sharding.NamedSharding:
    """Returns the sharding that keeps a whole copy on every device."""
    return jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())


def check_batch_size(batch_size: int, num_microbatches: int, mesh: jax.sharding.Mesh) -> None:
    """Raises UserError unless each micro-batch can be divided evenly over the devices."""
    shards = int(np.prod([mesh.shape[axis] for axis in BATCH_AXES]))
    if num_microbatches < 1 or batch_size < 1:
        raise errors.UserError(
            f"Batch size and micro-batches must be at least 1, got {batch_size} and "
            f"{num_microbatches}."
        )
    parts = shards * num_microbatches
    if batch_size % parts:
        micro = f" in {num_microbatches} micro-batches" if num_microbatches > 1 else ""
        raise errors.UserError(
            f"A batch of {batch_size}{micro} cannot be divided evenly over {shards} devices: "
            f"use a multiple of {parts}, such as {max(round(batch_size / parts), 1) * parts}."
        )


def put_batch(
    batch: Mapping[str, np.ndarray], sharding: jax.sharding.NamedSharding
) -> dict[str, jax.Array]:
    """Returns the batch on the devices; each host passes its own rows of it."""
    if jax.process_count() == 1:
        return jax.device_put(dict(batch), sharding)  # Half the time of the general way.
    return {
        name: jax.make_array_from_process_local_data(sharding, np.asarray(rows))
        for name, rows in batch.items()
    }
