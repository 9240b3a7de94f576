"""Safetensors files read tensor by tensor, without mapping them, and written as a stream.

The format: eight bytes with the length of a JSON header (little endian), the header (key to dtype,
shape, first and last byte), then the values. https://github.com/huggingface/safetensors, "Format".
Reading plain bytes keeps one tensor in memory, and a file cut short can be told by its key.
"""

from collections.abc import Callable, Iterator, Mapping
import contextlib
import json
import math
import pathlib
import struct
from typing import Any

from etils import epath
from jaxtyping import PyTree
import numpy as np

from moe_peft import errors
from moe_peft.weights import leaves, locations

_DTYPES = {
    "BF16": leaves.BFLOAT16,
    "BOOL": np.dtype("bool"),
    **{f"F{bits}": np.dtype(f"float{bits}") for bits in (16, 32, 64)},
    **{f"I{bits}": np.dtype(f"int{bits}") for bits in (8, 16, 32, 64)},
    **{f"U{bits}": np.dtype(f"uint{bits}") for bits in (8, 16, 32, 64)},
}
_NAMES = {dtype: name for name, dtype in _DTYPES.items()}
_MAX_HEADER = 100_000_000  # bytes, the format's own limit
_METADATA = "__metadata__"  # in the header, text by text
_OURS = "moe_peft"  # our part of the metadata, as JSON
INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"


def open_file(path: epath.PathLike) -> leaves.Leaves:
    """Returns the tensors of a file by key; only the header is read.

    A UserError names the file and the key if it is not a safetensors file or is cut short.
    """
    path = epath.Path(path)
    header, start, size = _read_header(path)
    header.pop(_METADATA, None)
    return {key: _leaf(path, key, entry, start, size) for key, entry in header.items()}


def read_metadata(path: epath.PathLike) -> dict[str, Any]:
    """Returns the metadata given to `save_tree`, {} where a file has none."""
    header, _, _ = _read_header(epath.Path(path))
    with explained(path, "safetensors"):
        return json.loads(header.get(_METADATA, {}).get(_OURS, "{}"))


def read_tree(path: epath.PathLike) -> PyTree:
    """Returns the tree of a file that `save_tree` wrote, as NumPy arrays."""
    return leaves.load(open_file(locations.existing(path)))


def save_tree(
    params: PyTree,
    path: pathlib.Path | str,
    dtype: str | None = None,
    metadata: Mapping[str, Any] | None = None,
) -> pathlib.Path:
    """Writes a tree with names such as "encoder/layers_0/attention/query/kernel"; returns `path`.

    One leaf is in memory at a time, and a file that is there is replaced at once. `dtype` is
    "float32", "bfloat16", or None for each leaf's own; metadata is JSON under the key "moe_peft".
    """
    found = leaves.flatten(params)
    found = {name: leaves.cast_when_read(leaf, dtype) for name, leaf in found.items()}
    with locations.created(path, replace=True) as partial:
        write_file(partial, found, {"format": "np", **encode_metadata(metadata or {})})
    return pathlib.Path(path)


def encode_metadata(metadata: Mapping[str, Any]) -> dict[str, str]:
    """Returns the part of a file's header that `read_metadata` reads."""
    return {_OURS: json.dumps(dict(metadata), sort_keys=True)}


def open_parts(index: epath.Path, open_part: Callable[..., leaves.Leaves]) -> leaves.Leaves:
    """Returns the tensors of all files that transformers' index names, next to it."""
    folder, places = index.parent, read_json(index).get("weight_map")
    is_near = lambda name: isinstance(name, str) and "/" not in name
    if not isinstance(places, dict) or not all(map(is_near, places.values())):
        raise errors.UserError(f"{index} has no 'weight_map' from keys to files next to it.")
    found, first_keys = {}, {name: key for key, name in reversed(places.items())}
    for name in dict.fromkeys(places.values()):
        if not (folder / name).exists():
            raise errors.UserError(
                f"{index} says that {first_keys[name]} is in {name}, but there is no such file "
                "next to it. Copy the missing part."
            )
        found |= open_part(folder / name)
    lost = sorted(places.keys() - found.keys())
    if lost:
        raise errors.UserError(
            f"{folder / places[lost[0]]} has no {lost[0]}, which {index} says is there."
        )
    return found


def read_json(path: epath.Path) -> dict[str, Any]:
    """Returns the object in a JSON file."""
    with explained(path, "JSON"):
        found = json.loads(path.read_text())
    if not isinstance(found, dict):
        raise errors.UserError(f"{path} holds {type(found).__name__}, expected an object.")
    return found


def write_file(
    path: pathlib.Path, tensors: Mapping[str, leaves.Leaf], metadata: Mapping[str, str]
) -> None:
    """Writes a file; one tensor is in memory at a time."""
    header, position = {_METADATA: dict(metadata)}, 0
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
    metadata, parts, size = {"format": "pt"}, [[]], 0
    for key, leaf in tensors.items():
        size += leaf.nbytes
        if parts[-1] and size > shard_bytes:
            parts.append([])
            size = leaf.nbytes
        parts[-1].append(key)
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


@contextlib.contextmanager
def explained(path: epath.PathLike, kind: str, *more: type[Exception]) -> Iterator[None]:
    """Turns a system's or a value's error, or one of `more`, into a UserError with the path."""
    try:
        yield
    except (OSError, ValueError, *more) as error:
        raise errors.UserError(f"{path} cannot be read as {kind}: {error}.") from error


def _read_header(path: epath.Path) -> tuple[dict[str, Any], int, int]:
    """Returns the header, the byte where values start, and the size of the file in bytes."""
    with explained(path, "safetensors"):
        size = path.stat().length
        with path.open("rb") as file:
            start = file.read(8)
            length = struct.unpack("<Q", start)[0] if len(start) == 8 else _MAX_HEADER + 1
            header = json.loads(file.read(length)) if length <= min(size, _MAX_HEADER) else None
    if not isinstance(header, dict):
        raise errors.UserError(
            f"{path} cannot be read as safetensors: its header is missing or cut short "
            f"({size} bytes in all). Copy it again."
        )
    return header, 8 + length, size


def _leaf(path: epath.Path, key: str, entry: Any, values: int, size: int) -> leaves.Leaf:
    try:
        shape, (first, last) = tuple(entry["shape"]), entry["data_offsets"]
        dtype = _DTYPES.get(entry["dtype"])
    except (TypeError, KeyError, ValueError) as error:
        raise errors.UserError(f"{path}: the header's entry of {key} is damaged.") from error
    problem = None
    if dtype is None:
        problem = f": {key} is stored as {entry['dtype']}; expected {', '.join(_DTYPES)}."
    elif math.prod(shape) * dtype.itemsize != last - first or first < 0:
        problem = f": {key} is {shape} of {dtype.name} but has {last - first} bytes."
    elif (end := values + last) > size:
        problem = f" is cut short: {key} ends at byte {end}, the file at {size}. Copy it again."
    if problem:
        raise errors.UserError(f"{path}{problem}")

    def read() -> np.ndarray:
        with path.open("rb") as file:
            file.seek(values + first)
            buffer = bytearray(last - first)
            file.readinto(buffer)
        return np.frombuffer(buffer, dtype).reshape(shape)

    return leaves.Leaf(shape, dtype, read, f"{path}: {key}")
