"""T5X checkpoints in and out, in the legacy and in the orbax layout; no T5X, no pickle.

Legacy, `checkpoint_N/`: a msgpack file `checkpoint` with the tree {"optimizer": {"target": ...}}.
Its leaves are small arrays themselves or, for the others, a TensorStore description of the zarr
array in a folder next to it, such as `target.encoder.layers_0.attention.key.kernel`.

Orbax, `checkpoint_N/state/`: `_METADATA` lists the leaves, which lie in one OCDBT database; older
versions have zarr folders as above and a msgpack file of placeholders.
"""

from collections.abc import Mapping
import json
import pathlib
import re
from typing import Any

from etils import epath
from flax import serialization, traverse_util
from jaxtyping import PyTree
import numpy as np

from moe_peft import errors, patching
from moe_peft.models import special_ids, t5
from moe_peft.weights import (
    checkpoint_file,
    leaves,
    locations,
    safetensors_files,
    t5_sizes,
    zarr_files,
)

INDEX, METADATA, STATE = "checkpoint", "_METADATA", "state"
LAYOUTS = ("legacy", "orbax")

_PREFIX = "checkpoint_"
_PLACEHOLDER = "PLACEHOLDER://"
_VERSION = 3  # of the index that T5X writes
_KEY_OF_A_DICT = 2  # orbax: what kind of node a key belongs to


def read(
    path: epath.PathLike, dtype: str | None = None, **options: Any
) -> tuple[t5.T5Config, PyTree]:
    """Returns `CheckpointFile.read` of a checkpoint, or of the newest one in a run's folder."""
    return open_folder(path).read(dtype, **options)


def open_folder(path: epath.PathLike) -> checkpoint_file.CheckpointFile:
    """Reads the index and the headers of the arrays, local or in a bucket (gs://).

    Raises UserError if there is no checkpoint, it is damaged, or its leaves are not those of a T5.
    """
    folder, tensors = _open(path)
    shapes = {name: leaf.shape for name, leaf in tensors.items()}
    config = t5_sizes.recognise(shapes, str(folder))
    return checkpoint_file.CheckpointFile(str(path), config, tensors, is_recognised=True)


def dtypes(path: epath.PathLike) -> dict[str, np.dtype]:
    """How a checkpoint stores each leaf of a model, of any network."""
    return {path: np.dtype(leaf.dtype) for path, leaf in _open(path)[1].items()}


def _open(path: epath.PathLike) -> tuple[epath.Path, leaves.Leaves]:
    folder = _checkpoint(locations.existing(path))
    state = folder / STATE if (folder / STATE).exists() else folder
    specs = _orbax(state) if (state / METADATA).exists() else _legacy(state)
    if not specs:
        raise errors.UserError(f"{folder} has no leaves under 'target', where T5X keeps a model.")
    return folder, zarr_files.open_all(specs, state)


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

    Raises UserError if it exists or cannot be written, if a leaf does not fit the config, or if
    T5X's networks have no such option.

    Args:
      folder: of the run; the checkpoint must not exist in it.
      config: of `params`, scanned or not; T5X's network needs the same layout.
      params: arrays or `leaves.Leaf`, nested or by path.
      dtype: "float32", "bfloat16", or None for each leaf's own.
      step: in the folder's name and in the checkpoint.
      layout: "legacy" or "orbax".
    """
    errors.check_one_of("The layout of a T5X checkpoint", layout, LAYOUTS)
    _check_options(config)
    given = checkpoint_file.CheckpointFile(str(folder), config, leaves.flatten(params))
    given.report().check()
    if (ids := special_ids.of_config(config)) != special_ids.T5:
        raise errors.UserError(
            f"T5X's format does not hold special ids, and T5X takes {special_ids.T5}; this model "
            f"has {ids}. Write it as hf:FOLDER or FILE.safetensors."
        )
    found = {path: leaves.cast_when_read(leaf, dtype) for path, leaf in given.leaves.items()}
    target = pathlib.Path(folder).expanduser() / f"{_PREFIX}{step}"
    with locations.created(target) as partial:
        partial.mkdir()
        write_state = _write_legacy if layout == "legacy" else _write_orbax
        write_state(partial, found, step)
    return target


def _check_options(config: t5.T5Config) -> None:
    """Raises UserError for what neither `examples/t5` nor `examples/scalable_t5` can be told."""
    for name in ("relpos_buckets", "relpos_max_distance"):
        own, theirs = getattr(config, name), getattr(t5.T5Config, name)
        if own != theirs:
            raise errors.UserError(f"{name} is {own}; T5X's networks always have {theirs}.")
    if "gelu_exact" in config.mlp_activations:
        raise errors.UserError("T5X's networks have the tanh form of gelu, not gelu_exact.")
    if config.relpos_in_every_layer and not config.scan_layers:
        raise errors.UserError(
            "T5X's unscanned network has one position bias per stack, this model one in every "
            "layer; its scanned network has them too. Set scan_layers (--scan_layers)."
        )


def _checkpoint(path: epath.Path) -> epath.Path:
    """Returns the folder of the checkpoint that a path means."""
    if path.is_file():
        locations.refuse_pickle(path)
        path = path.parent
    if is_checkpoint(path):
        return path
    found = steps(path)
    if not found:
        locations.refuse_pickle(path)
        lacks = f"no {INDEX!r}, no {STATE}/{METADATA} and no {_PREFIX}N folder"
        raise errors.UserError(f"{path} is not a T5X checkpoint: it has {lacks}.")
    return path / f"{_PREFIX}{found[-1]}"


def _legacy(folder: epath.Path) -> dict[str, Any]:
    """Returns what the msgpack file has for each leaf of the model: an array, or where it is."""
    index = folder / INDEX
    try:
        tree = serialization.msgpack_restore(index.read_bytes())
    except Exception as error:  # msgpack's own kinds have no common base
        raise errors.UserError(f"{index} is damaged: not a msgpack file ({error}).") from error
    if not isinstance(tree, dict):
        raise errors.UserError(f"{index} holds {type(tree).__name__}, expected a tree.")
    model = tree.get("optimizer", tree).get("target") or {}
    # The description of an array is a dict itself.
    found = traverse_util.flatten_dict(model, sep="/", is_leaf=lambda _, node: "kvstore" in node)
    for path, value in found.items():
        if isinstance(value, str) and value.startswith(_PLACEHOLDER):
            found[path] = zarr_files.array_spec(value.removeprefix(_PLACEHOLDER))
    return found


def _orbax(state: epath.Path) -> dict[str, Any]:
    """Returns a TensorStore description of every leaf of the model that `_METADATA` lists."""
    metadata = safetensors_files.read_json(state / METADATA)
    if not isinstance(tree := metadata.get("tree_metadata"), dict):
        raise errors.UserError(f"{state / METADATA} has no 'tree_metadata'.")
    driver = "zarr3" if metadata.get("use_zarr3") else "zarr"
    found, kind = {}, {"is_database": metadata.get("use_ocdbt", True)}
    for entry in tree.values():
        first, *keys = (str(key["key"]) for key in entry["key_metadata"])
        if first == "target" and not entry["value_metadata"].get("skip_deserialize"):
            found["/".join(keys)] = zarr_files.array_spec(".".join((first, *keys)), driver, **kind)
    return found


def _write_legacy(folder: pathlib.Path, found: leaves.Leaves, step: int) -> None:
    target = {}
    for path, leaf in found.items():
        spec = zarr_files.array_spec(f"target.{path.replace('/', '.')}")
        target[path] = zarr_files.write(spec, epath.Path(folder), leaf)
    state = {"step": np.int32(step), "param_states": {}}
    tree = {"state": state, "target": patching.trees.unflatten(target)}
    index = serialization.msgpack_serialize({"version": _VERSION, "optimizer": tree})
    (folder / INDEX).write_bytes(index)


def _write_orbax(folder: pathlib.Path, found: leaves.Leaves, step: int) -> None:
    state = folder / STATE
    state.mkdir()
    named = {f"target/{path}": leaf for path, leaf in found.items()}
    named["state/step"] = leaves.from_array(np.int32(step), "step")
    tree = {}
    for path, leaf in named.items():
        keys = path.split("/")
        spec = zarr_files.array_spec(".".join(keys), is_database=True)
        zarr_files.write(spec, epath.Path(state), leaf)
        tree[str(tuple(keys))] = {
            "key_metadata": [{"key": key, "key_type": _KEY_OF_A_DICT} for key in keys],
            "value_metadata": {"value_type": "np.ndarray", "skip_deserialize": False},
        }
    metadata = {"tree_metadata": tree, "use_ocdbt": True, "use_zarr3": False}
    (state / METADATA).write_text(json.dumps(metadata))
