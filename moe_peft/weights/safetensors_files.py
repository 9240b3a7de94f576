"""Safetensors files read tensor by tensor, without mapping them, and written as a stream.

The format: eight bytes with the length of a JSON header (little endian), the header (key to dtype,
shape, first and last byte), then the values. https://github.com/huggingface/safetensors, "Format".
Reading plain bytes keeps one tensor in memory, and a file cut short can be told by its key.
"""

from collections.abc import Iterator, Mapping, Sequence
import json
import math
import pathlib
import struct
from typing import Any

from etils import epath
import numpy as np

from moe_peft import errors
from moe_peft.weights import leaves

_DTYPES = {
    "F64": np.dtype("float64"),
    "F32": np.dtype("float32"),
    "F16": np.dtype("float16"),
    "BF16": leaves.BFLOAT16,
    "I64": np.dtype("int64"),
    "I32": np.dtype("int32"),
    "U8": np.dtype("uint8"),
    "BOOL": np.dtype("bool"),
}
_NAMES = {dtype: name for name, dtype in _DTYPES.items()}
_MAX_HEADER = 100_000_000  # bytes, the format's own limit
INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"


def open_file(path: epath.PathLike) -> leaves.Leaves:
    """Returns the tensors of a file by key; only the header is read.

    Raises:
      UserError: it is no safetensors file or is cut short; names the file and the key.
    """
    path = epath.Path(path)
    try:
        size = path.stat().length
        with path.open("rb") as file:
            start = file.read(8)
            length = struct.unpack("<Q", start)[0] if len(start) == 8 else _MAX_HEADER + 1
            header = json.loads(file.read(length)) if length <= min(size, _MAX_HEADER) else None
    except (OSError, ValueError) as error:
        raise errors.UserError(f"{path} cannot be read as safetensors: {error}.") from error
    if not isinstance(header, dict):
        raise errors.UserError(
            f"{path} cannot be read as safetensors: its header is missing or cut short "
            f"({size} bytes in all). Copy it again."
        )
    header.pop("__metadata__", None)
    return {key: _leaf(path, key, entry, 8 + length, size) for key, entry in header.items()}


def open_folder(folder: epath.Path) -> leaves.Leaves:
    """Returns the tensors of `model.safetensors`, or of all files that its index names."""
    if not (folder / INDEX).exists():
        return open_file(folder / SINGLE)
    index = read_json(folder / INDEX)
    places = index.get("weight_map")
    if not isinstance(places, dict):
        raise errors.UserError(f"{folder / INDEX} has no 'weight_map' from keys to files.")
    found = {}
    for name in dict.fromkeys(places.values()):
        if not (folder / name).exists():
            key = next(key for key, place in places.items() if place == name)
            raise errors.UserError(
                f"{folder / INDEX} says that {key} is in {name}, but there is no such file beside "
                "it. Copy the missing part."
            )
        found |= open_file(folder / name)
    lost = sorted(places.keys() - found.keys())
    if lost:
        raise errors.UserError(
            f"{folder / places[lost[0]]} has no {lost[0]}, which {folder / INDEX} says is there."
        )
    return found


def read_json(path: epath.Path) -> dict[str, Any]:
    """Returns the object in a JSON file."""
    try:
        found = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise errors.UserError(f"{path} cannot be read as JSON: {error}.") from error
    if not isinstance(found, dict):
        raise errors.UserError(f"{path} holds {type(found).__name__}, expected an object.")
    return found


def write_file(
    path: pathlib.Path, tensors: Mapping[str, leaves.Leaf], metadata: Mapping[str, str]
) -> None:
    """Writes a file; one tensor is in memory at a time."""
    header, position = {"__metadata__": dict(metadata)}, 0
    for key, leaf in tensors.items():
        header[key] = {
            "dtype": _NAMES[leaf.dtype],
            "shape": list(leaf.shape),
            "data_offsets": [position, position + leaf.nbytes],
        }
        position += leaf.nbytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # values start at a multiple of eight
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for leaf in tensors.values():
            file.write(np.ascontiguousarray(leaf.read()).reshape(-1).view(np.uint8).data)


def write_folder(
    folder: pathlib.Path, tensors: Mapping[str, leaves.Leaf], shard_bytes: int
) -> None:
    """Writes `model.safetensors`, or numbered parts of at most so many bytes and their index."""
    metadata = {"format": "pt"}
    parts = list(_parts(tensors, shard_bytes))
    if len(parts) == 1:
        write_file(folder / SINGLE, tensors, metadata)
        return
    weight_map = {}
    for number, keys in enumerate(parts, 1):
        name = f"model-{number:05d}-of-{len(parts):05d}.safetensors"
        write_file(folder / name, {key: tensors[key] for key in keys}, metadata)
        weight_map |= dict.fromkeys(keys, name)
    total = sum(leaf.nbytes for leaf in tensors.values())
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / INDEX).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n")


def _parts(tensors: Mapping[str, leaves.Leaf], shard_bytes: int) -> Iterator[Sequence[str]]:
    keys, size = [], 0
    for key, leaf in tensors.items():
        if keys and size + leaf.nbytes > shard_bytes:
            yield keys
            keys, size = [], 0
        keys.append(key)
        size += leaf.nbytes
    yield keys


def _leaf(path: epath.Path, key: str, entry: Any, values: int, size: int) -> leaves.Leaf:
    try:
        shape, (first, last) = tuple(entry["shape"]), entry["data_offsets"]
        dtype = _DTYPES.get(entry["dtype"])
    except (TypeError, KeyError, ValueError) as error:
        raise errors.UserError(f"{path}: the header's entry of {key} is damaged.") from error
    if dtype is None:
        raise errors.UserError(
            f"{path}: {key} is stored as {entry['dtype']}; expected {', '.join(_DTYPES)}."
        )
    if math.prod(shape) * dtype.itemsize != last - first or first < 0:
        raise errors.UserError(
            f"{path}: {key} is {shape} of {dtype.name} but has {last - first} bytes."
        )
    if values + last > size:
        raise errors.UserError(
            f"{path} is cut short: {key} ends at byte {values + last}, the file at {size}. Copy it "
            "again."
        )

    def read() -> np.ndarray:
        with path.open("rb") as file:
            file.seek(values + first)
            buffer = bytearray(last - first)
            file.readinto(buffer)
        return np.frombuffer(buffer, dtype).reshape(shape)

    return leaves.Leaf(shape, dtype, read, f"{path}: {key}")
