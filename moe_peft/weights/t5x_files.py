"""T5X checkpoints in and out, in the legacy and in the orbax layout; no T5X, no pickle.

Legacy, `checkpoint_N/`: a msgpack file `checkpoint` with the tree {"optimizer": {"target": ...}}.
Its leaves are small arrays themselves or, for the others, a TensorStore description of the zarr
array in a folder beside it, such as `target.encoder.layers_0.attention.key.kernel`.

Orbax, `checkpoint_N/state/`: `_METADATA` lists the leaves, which lie in one OCDBT database; older
versions have zarr folders as above and a msgpack file of placeholders.
"""

from collections.abc import Mapping, Sequence
import json
import pathlib
import re
from typing import Any

from etils import epath
from flax import serialization
from jaxtyping import PyTree
import numpy as np

from moe_peft import errors, patching
from moe_peft.models import t5
from moe_peft.weights import (
    checkpoint_file,
    leaves,
    locations,
    safetensors_files,
    t5_sizes,
    zarr_files,
)

INDEX = "checkpoint"
METADATA = "_METADATA"
STATE = "state"
LAYOUTS = ("legacy", "orbax")

_PREFIX = "checkpoint_"
_TARGET = "target."
_PLACEHOLDER = "PLACEHOLDER://"
_VERSION = 3  # of the index that T5X writes
_KEY_OF_A_DICT = 2  # orbax: what kind of node a key belongs to


def read(
    path: epath.PathLike,
    dtype: str | None = None,
    *,
    scan_layers: bool = False,
    sharding: leaves.Sharding | leaves.ShardingOf | None = None,
    allow_missing: Sequence[str] = (),
    allow_unused: Sequence[str] = (),
) -> tuple[t5.T5Config, PyTree]:
    """Returns the config, told from shapes, and the parameters of a T5X checkpoint.

    Args:
      path: folder of a checkpoint, or of a run (its newest checkpoint is taken); local or gs://.
      dtype: "float32", "bfloat16", or None for that of the checkpoint.
      scan_layers: the layout of the tree, whatever that of the checkpoint.
      sharding: where leaves go, such as `leaves.spread(mesh)`; None gives NumPy arrays.
      allow_missing: regular expressions of paths that may be missing; they are left out.
      allow_unused: regular expressions of keys that may have no place.

    Raises:
      UserError: there is no checkpoint, it is damaged, or its leaves are not those of a T5.
    """
    found = open_folder(path).scanned(scan_layers)
    params, _ = found.load(dtype, sharding, allow_missing, allow_unused)
    return found.config, params


def open_folder(path: epath.PathLike) -> checkpoint_file.Opened:
    """Reads the index and the headers of the arrays; raises UserError as `read` does."""
    folder, tensors = _open(path)
    shapes = {path: leaf.shape for path, leaf in tensors.items()}
    return checkpoint_file.Opened(str(path), t5_sizes.recognise(shapes, str(folder)), tensors)


def dtypes(path: epath.PathLike) -> dict[str, np.dtype]:
    """How a checkpoint stores each leaf of a model, whatever network that is."""
    return {path: np.dtype(leaf.dtype) for path, leaf in _open(path)[1].items()}


def _open(path: epath.PathLike) -> tuple[epath.Path, leaves.Leaves]:
    folder = _checkpoint(locations.existing(path))
    state = folder / STATE if (folder / STATE).exists() else folder
    specs = _orbax(state) if (state / METADATA).exists() else _legacy(state)
    found = {
        name.removeprefix(_TARGET).replace(".", "/"): spec
        for name, spec in specs.items()
        if name.startswith(_TARGET)
    }
    if not found:
        raise errors.UserError(f"{folder} has no leaves under 'target', where T5X keeps a model.")
    return folder, zarr_files.open_all(found, state)


def is_checkpoint(folder: epath.Path) -> bool:
    """Whether the folder is one checkpoint."""
    places = (folder / INDEX, folder / METADATA, folder / STATE / METADATA, folder / STATE / INDEX)
    return any(place.exists() and not place.is_dir() for place in places)


def steps(folder: epath.Path) -> list[int]:
    """Returns the steps of the checkpoints in a run's folder, the newest last."""
    found = (re.fullmatch(rf"{_PREFIX}(\d+)", path.name) for path in folder.iterdir())
    return sorted(int(match[1]) for match in found if match)


def write(
    folder: pathlib.Path | str,
    config: t5.T5Config,
    params: PyTree | Mapping[str, leaves.Leaf],
    *,
    dtype: str | None = None,
    step: int = 0,
    layout: str = "legacy",
) -> pathlib.Path:
    """Writes `folder/checkpoint_STEP`, which T5X restores, and returns its path.

    Args:
      folder: of the run; the checkpoint must not exist in it.
      config: of `params`, scanned or not; T5X's network needs the same layout.
      params: arrays or `leaves.Leaf`, nested or by path.
      dtype: "float32", "bfloat16", or None for each leaf's own.
      step: in the folder's name and in the checkpoint.
      layout: "legacy" or "orbax".

    Raises:
      UserError: the checkpoint exists or cannot be written, or a leaf does not fit the config.
    """
    if layout not in LAYOUTS:
        raise errors.UserError(
            f"T5X checkpoints are written as {' or '.join(LAYOUTS)}, got {layout!r}."
            f"{errors.near(str(layout), LAYOUTS)}"
        )
    leaves.check_dtype(dtype)
    given = checkpoint_file.Opened(str(folder), config, leaves.flatten(params))
    given.report().check()
    found = {path: leaves.stored_as(leaf, dtype) for path, leaf in given.leaves.items()}
    target = pathlib.Path(folder).expanduser() / f"{_PREFIX}{step}"
    with locations.created(target) as partial:
        write_state = _write_legacy if layout == "legacy" else _write_orbax
        write_state(partial, found, step)
    return target


def _checkpoint(path: epath.Path) -> epath.Path:
    """Returns the folder of the checkpoint that a path means."""
    if path.is_file():
        locations.refuse_pickle(path)
        path = path.parent
    if is_checkpoint(path):
        return path
    found = steps(path)
    if not found:
        for file in sorted(path.iterdir()):
            locations.refuse_pickle(file)
        raise errors.UserError(
            f"{path} is no T5X checkpoint: it has no {INDEX!r}, no {STATE}/{METADATA} and no "
            f"{_PREFIX}N folder."
        )
    return path / f"{_PREFIX}{found[-1]}"


def _legacy(folder: epath.Path) -> dict[str, Any]:
    """Returns what the msgpack file has for each leaf: an array, or where it is."""
    index = folder / INDEX
    try:
        tree = serialization.msgpack_restore(index.read_bytes())
    except Exception as error:  # msgpack's own kinds have no common base
        raise errors.UserError(f"{index} is damaged: it is no msgpack file ({error}).") from error
    if not isinstance(tree, dict):
        raise errors.UserError(f"{index} holds {type(tree).__name__}, expected a tree.")
    tree = tree.get("optimizer", tree)
    found = _flat(tree)
    for name, value in found.items():
        if isinstance(value, str) and value.startswith(_PLACEHOLDER):
            found[name] = zarr_files.zarr_spec(value.removeprefix(_PLACEHOLDER))
    return found


def _flat(tree: Any, prefix: str = "") -> dict[str, Any]:
    """Returns {"target.encoder...": array or description}; a description is a dict itself."""
    if not isinstance(tree, dict) or "kvstore" in tree:
        return {prefix: tree}
    found = {}
    for key, value in tree.items():
        found |= _flat(value, f"{prefix}.{key}" if prefix else str(key))
    return found


def _orbax(state: epath.Path) -> dict[str, Any]:
    """Returns a TensorStore description of every leaf that `_METADATA` lists."""
    metadata = safetensors_files.read_json(state / METADATA)
    tree = metadata.get("tree_metadata")
    if not isinstance(tree, dict):
        raise errors.UserError(f"{state / METADATA} has no 'tree_metadata'.")
    driver = "zarr3" if metadata.get("use_zarr3") else "zarr"
    is_database = metadata.get("use_ocdbt", True)
    names = [
        ".".join(str(key["key"]) for key in entry["key_metadata"])
        for entry in tree.values()
        if not entry["value_metadata"].get("skip_deserialize")
    ]
    make = zarr_files.database_spec if is_database else zarr_files.zarr_spec
    return {name: make(name, driver) for name in names}


def _write_legacy(folder: pathlib.Path, found: leaves.Leaves, step: int) -> None:
    target = {}
    for path, leaf in found.items():
        spec = zarr_files.zarr_spec(_TARGET + path.replace("/", "."))
        target[path] = zarr_files.write(spec, epath.Path(folder), leaf)
    state = {"step": np.int32(step), "param_states": {}}
    tree = {"state": state, "target": patching.trees.unflatten(target)}
    index = serialization.msgpack_serialize({"version": _VERSION, "optimizer": tree})
    (folder / INDEX).write_bytes(index)


def _write_orbax(folder: pathlib.Path, found: leaves.Leaves, step: int) -> None:
    state = folder / STATE
    state.mkdir()
    named = {f"target/{path}": leaf for path, leaf in found.items()}
    named["state/step"] = leaves.of(np.int32(step), "step")
    tree = {}
    for path, leaf in named.items():
        keys = path.split("/")
        zarr_files.write(zarr_files.database_spec(".".join(keys)), epath.Path(state), leaf)
        tree[str(tuple(keys))] = {
            "key_metadata": [{"key": key, "key_type": _KEY_OF_A_DICT} for key in keys],
            "value_metadata": {"value_type": "np.ndarray", "skip_deserialize": False},
        }
    metadata = {"tree_metadata": tree, "use_ocdbt": True, "use_zarr3": False}
    (state / METADATA).write_text(json.dumps(metadata))
