"""Arrays of T5X checkpoints: zarr by TensorStore, on a disk or in a bucket."""

from collections.abc import Iterator, Mapping
import contextlib
import math
import os
import re
from typing import Any

from etils import epath
import numpy as np
import tensorstore as ts

from moe_peft import errors
from moe_peft.weights import leaves

Spec = dict[str, Any]

_CHUNK_BYTES = 64 * 1024 * 1024
# A folder gets its name when all is written, so no single file has to be on the disk before.
_QUICK = ts.Context({"file_io_sync": False})


def array_spec(name: str, driver: str = "zarr", *, is_database: bool = False) -> Spec:
    """Returns the description of an array in the folder `name`, or in the OCDBT database."""
    store = {"driver": "file", "path": f"{name}/"}
    if is_database:
        store = {"driver": "ocdbt", "path": f"{name}/", "base": {"driver": "file", "path": ""}}
    return {"driver": driver, "kvstore": store}


def open_all(specs: Mapping[str, Any], folder: epath.Path) -> leaves.Leaves:
    """Opens arrays, all at once; only their headers are read.

    `specs` has by path an array, or its description with a place relative to `folder`, the
    checkpoint's, wherever that was written. A UserError names an array that is missing or damaged.
    """
    described = {path: spec for path, spec in specs.items() if isinstance(spec, Mapping)}
    begin = lambda spec: ts.open(_located(spec, folder), open=True, read=True)
    stores = {path: begin(spec) for path, spec in described.items()}
    found = {}
    for path, value in specs.items():
        source = f"{folder}: target.{path.replace('/', '.')}"
        if path in stores:
            with _explained(f"{source} cannot be opened"):
                found[path] = _leaf(stores[path].result(), source)
        elif isinstance(value, np.ndarray):
            found[path] = leaves.from_array(value, source)
        else:
            raise errors.UserError(f"{source} is {value!r}, expected an array.")
    return found


def write(spec: Spec, folder: epath.Path, leaf: leaves.Leaf) -> Spec:
    """Writes a leaf as a zarr array and returns the description that T5X's index has for it."""
    metadata = {
        "chunks": chunks(leaf.shape, leaf.dtype.itemsize),
        "compressor": None,  # would take most of the time and hardly make weights smaller
        "shape": list(leaf.shape),
    }
    described = {**spec, "dtype": leaf.dtype.name, "metadata": metadata}
    store = ts.open(_located(described, folder), create=True, open=True, context=_QUICK).result()
    store.write(np.asarray(leaf.read(), order="C")).result()
    return described


def chunks(shape: tuple[int, ...], itemsize: int) -> list[int]:
    """Returns the largest chunk of at most 64 MB that divides the shape, widest axis first."""
    result = list(shape)
    while math.prod(result) * itemsize > _CHUNK_BYTES:
        axis = int(np.argmax(result))
        smaller = (size for size in range(result[axis] - 1, 0, -1) if shape[axis] % size == 0)
        result[axis] = next(smaller)
    return result


def _located(spec: Mapping[str, Any], folder: epath.Path) -> Spec:
    """Returns the description with the place of the checkpoint as it is now.

    T5X stores paths relative to the checkpoint, and a driver that need not be today's: a
    checkpoint written to a bucket may have been copied to a disk.
    """
    bucket = re.fullmatch(r"gs://([^/]+)/(.*)", os.fspath(folder))
    place = {"driver": "gcs", "bucket": bucket[1]} if bucket else {"driver": "file"}
    top = f"{bucket[2] if bucket else os.path.abspath(folder)}/"
    name = spec["kvstore"].get("path", spec.get("path", ""))
    if spec["kvstore"]["driver"] == "ocdbt":
        store = {"driver": "ocdbt", "base": {**place, "path": top}, "path": name}
    else:
        store = {**place, "path": top + name}
    return {**{key: spec[key] for key in spec if key not in ("path", "kvstore")}, "kvstore": store}


def _leaf(store: ts.TensorStore, source: str) -> leaves.Leaf:
    def read() -> np.ndarray:
        with _explained(f"{source} cannot be read"):
            return store.read().result()

    return leaves.Leaf(tuple(store.shape), np.dtype(store.dtype.numpy_dtype), read, source)


@contextlib.contextmanager
def _explained(what: str) -> Iterator[None]:
    try:
        yield
    except (ValueError, OSError, RuntimeError) as error:
        raise errors.UserError(f"{what}: {str(error).splitlines()[0]}") from error
