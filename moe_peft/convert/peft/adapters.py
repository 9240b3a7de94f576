"""Adapters in PEFT's folder format, in and out: LoRA, (IA)3, Poly and MHR.

A folder holds `adapter_config.json` and `adapter_model.safetensors`, or `adapter_model.bin`. What
we write also has our own record of the run in the tensors' header, which PEFT ignores: read again,
it gives the very same adapter of the very same run. Nothing here imports torch or peft.
"""

from collections.abc import Iterable, Mapping
import dataclasses
import json
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from moe_peft import errors, methods, patching, routing
from moe_peft.convert import adapter_trees
from moe_peft.convert.peft import config as config_lib
from moe_peft.convert.peft import methods as methods_lib
from moe_peft.convert.peft import tensors as tensors_lib
from moe_peft.models import t5
from moe_peft.weights import (
    identity,
    leaves,
    locations,
    merging,
    records,
    safetensors_files,
    saved_run,
    t5_sizes,
)


@dataclasses.dataclass(frozen=True)
class Base:
    """The model that an adapter belongs to."""

    spec: str  # as a backbone is named, "hf:FOLDER"
    config: t5.T5Config  # of the network
    fingerprint: str  # of the weights


def write(saved: saved_run.Saved, folder: pathlib.Path | str, where: str) -> pathlib.Path:
    """Writes what was trained as PEFT's folder; messages say that it is from `where`.

    Raises UserError if PEFT cannot express the method, or if the folder exists.
    """
    method = records.method(saved.description["method"], where)
    methods_lib.check_expressible(method, where)
    kind, alpha = methods_lib.kind(method), methods_lib.folded_alpha(method)
    stored, layers = {}, adapter_trees.by_layer(saved)
    scaled = [one for one in layers if adapter_trees.rule_of(method, one).side == "inputs"]
    for layer, own in sorted(layers.items()):
        for suffix, array in tensors_lib.to_peft(kind, own, alpha, layer in scaled).items():
            stored[tensors_lib.key_of(layer, suffix)] = leaves.from_array(array, "")
    config = {**methods_lib.settings(method), "target_modules": _targets(method, layers)}
    if kind == "IA3":
        config["feedforward_modules"] = _targets(method, scaled)
    prefix, _, base = saved.description.get("backbone_spec", "").partition(":")
    config |= config_lib.WHOLE | {"base_model_name_or_path": base if prefix == "hf" else None}
    record = {**saved.description, "step": saved.step}
    with locations.created(folder) as partial:
        partial.mkdir()
        text = json.dumps(config, indent=2, sort_keys=True)
        (partial / config_lib.NAME).write_text(text + "\n", encoding="utf-8")
        header = {"format": "pt", **safetensors_files.encode_metadata(record)}
        safetensors_files.write_file(partial / tensors_lib.TENSORS, stored, header)
    return pathlib.Path(folder)


def write_checked(
    saved: saved_run.Saved, folder: pathlib.Path | str, where: str, seed: int = 0
) -> list[str]:
    """Writes as `write` does, reads the folder again, and returns what the comparisons found.

    Raises UserError where an adapted layer, or a leaf, differs by more than rounding.
    """
    write(saved, folder, where)
    found = gap(saved, folder, seed)
    if not found.relative < 1e-5:
        raise errors.UserError(f"{where}: the layers differ, {found}; nothing was written.")
    # A scale that PEFT has no place for is multiplied into B: rounding.
    same = adapter_trees.check_same(saved, read(folder), rtol=1e-6)
    return [f"every adapted layer on random inputs, ours and PEFT's formula: {found}", same]


def read(folder: pathlib.Path | str, base: Base | None = None) -> saved_run.Saved:
    """Returns the adapter in a folder, as a run of ours would have saved it.

    PEFT's `save_pretrained`, or `write`, made the folder; the first needs the model `base`. A
    UserError names file and key of an option or a layer that is not supported, and of a tensor that
    is missing, left over or of another shape.
    """
    folder = pathlib.Path(folder).expanduser()
    config = config_lib.read(folder)
    tensors = tensors_lib.open_folder(folder, config["peft_type"])
    path = tensors_lib.file_of(folder)
    description = {} if path.suffix == ".bin" else safetensors_files.read_metadata(path)
    if "method" in description:
        network = _network(description, base, folder)
    elif base is not None:
        network = t5.Transformer(base.config)
        description = _describe(config, tensors, base)
    else:
        what = "does not say which weights it was trained on"
        raise errors.UserError(f"{folder} {what}; name them with --base hf:FOLDER.")
    step = description.pop("step", 0)
    method = records.method(description["method"], str(path))
    settings = map(methods_lib.method_settings, (config, methods_lib.settings(method)))
    names = f"in {config_lib.NAME}", f"in {path.name}"
    if difference := identity.first_difference(*settings, where=names):
        raise errors.UserError(f"{folder}: {difference}; they do not belong together.")
    shapes = adapter_trees.shapes_of(method, network)
    tensors = tensors_lib.aligned(tensors, adapter_trees.layers_of(shapes))
    _check_tensors(config, tensors, shapes, network.config, folder)
    kind, alpha = config["peft_type"], methods_lib.folded_alpha(method)
    layers = {layer: tensors_lib.from_peft(kind, own, alpha) for layer, own in tensors.items()}
    tree = adapter_trees.assemble(layers, shapes)
    return saved_run.Saved(step, tree, {}, {"description": description})


def gap(saved: saved_run.Saved, folder: pathlib.Path | str, seed: int = 0) -> merging.Gap:
    """Compares every adapted layer with the folder's, on random inputs and outputs of that layer.

    Ours computes what a run computes; theirs is PEFT's formula on the tensors in the file.
    """
    folder = pathlib.Path(folder).expanduser()
    config = config_lib.read(folder)
    method = records.method(saved.description["method"], str(folder))
    layers = adapter_trees.by_layer(saved)
    tensors = tensors_lib.open_folder(folder, config["peft_type"])
    tensors = tensors_lib.aligned(tensors, list(layers))
    rng = np.random.default_rng(seed)
    ours, theirs = [], []
    for layer, own in layers.items():
        x, y = (rng.normal(size=(2, 5, *s)).astype(np.float32) for s in _feature_shapes(own))
        if "vectors" in own:
            x = y  # Inputs where the adapter scales those.
        ids = rng.integers(0, config.get("n_tasks", 1), 2).astype(np.int32)
        axes = ("in",) * (x.ndim - 2), ("out",) * (y.ndim - 2)
        site = routing.Site(*axes, context=routing.RoutingContext(task_ids=ids))
        adapter = adapter_trees.rule_of(method, layer).adapter_factory(parent=None)
        params = patching.trees.unflatten(jax.tree.map(jnp.asarray, own))
        with jax.default_matmul_precision("highest"):
            found = adapter.apply({"params": params}, jnp.asarray(x), jnp.asarray(y), site)
        ours.append(np.asarray(found).reshape(-1))
        # A layer that the folder leaves alone is one that (IA)3 does not scale.
        flat = (a.reshape(2, 5, -1).astype(np.float64) for a in (x, y))
        found = tensors_lib.forward(config, tensors[layer], *flat, ids) if layer in tensors else y
        theirs.append(np.asarray(found).reshape(-1))
    return merging.gap(np.concatenate(theirs), np.concatenate(ours))


def _describe(
    config: Mapping[str, Any], tensors: tensors_lib.Tensors, base: Base
) -> dict[str, Any]:
    """Returns the description that a run of ours with this adapter would have."""
    kernels = methods_lib.kernels(base.config)
    for layer, own in tensors.items():
        if layer not in kernels:
            model = f"{base.spec} ({t5_sizes.describe(base.config)})"
            raise errors.UserError(f"{_source(own)} is not a layer of {model}.")
    method, gin_lines = methods_lib.method(config, list(tensors), base.config)
    description = {
        "method": method.describe(),
        "gin": gin_lines,
        "model": {"class": "Transformer", "config": identity.describe_config(base.config)},
        "backbone": {"fingerprint": base.fingerprint, "frozen_dtype": "float32"},
        "backbone_spec": base.spec,
    }
    return identity.as_json(description)


def _network(
    description: Mapping[str, Any], base: Base | None, folder: pathlib.Path
) -> t5.Transformer:
    """Returns the network that the record tells of, or else the base's."""
    if base is not None and not description.get("model"):
        return t5.Transformer(base.config)
    network = records.network(description, str(folder))
    if odd := base and t5_sizes.differences(network.config, base.config):
        other = f"another network than {base.spec}: {', '.join(odd)} differ"
        raise errors.UserError(f"{folder} belongs to {other}.")
    return network


def _check_tensors(
    config: Mapping[str, Any],
    tensors: tensors_lib.Tensors,
    expected: adapter_trees.Shapes,
    network: t5.T5Config,
    folder: pathlib.Path,
) -> None:
    """Refuses layers that are missing or left over, and tensors of another shape."""
    layers, kernels = adapter_trees.layers_of(expected), methods_lib.kernels(network)
    for layer, own in tensors.items():
        if layer not in layers:
            known = sorted({tensors_lib.module_of(one).rpartition(".")[2] for one in layers})
            raise errors.UserError(
                f"{_source(own)} adapts a layer that {config['peft_type']} leaves alone here; "
                f"expected only {', '.join(known)}."
            )
        for suffix, fitting in tensors_lib.shapes_of(config, layer, kernels[layer]).items():
            if (shape := own[suffix].shape) not in fitting:
                expected = " or ".join(map(str, fitting))
                message = f"{own[suffix].source} has the shape {shape}; expected {expected}."
                raise errors.UserError(message)
    missing = [layer for layer in layers if layer not in tensors]
    if missing and config["peft_type"] != "IA3":
        key = tensors_lib.key_of(missing[0], tensors_lib.SUFFIXES[config["peft_type"]][0])
        raise errors.UserError(f"{tensors_lib.file_of(folder)} has no {key}.")


def _source(own: leaves.Leaves) -> str:
    """File and key of a layer's first tensor, for messages."""
    return next(iter(own.values())).source


def _feature_shapes(own: tensors_lib.Arrays) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Returns the shapes of what a layer reads and returns, as its adapter sees them."""
    if "vectors" in own:
        return own["vectors"].shape, own["vectors"].shape
    a, b = own["lora_a"], own["lora_b"]
    if any(name.startswith("router/") for name in own):  # skills and splits
        return (a.shape[0] * a.shape[2],), (b.shape[0] * b.shape[3],)
    return a.shape[:-1], b.shape[1:]


def _targets(method: methods.Method, layers: Iterable[str]) -> list[str]:
    """Returns names of modules: short ones where a rule is one for all blocks."""
    modules = {tensors_lib.module_of(layer) for layer in layers}
    if all(rule.pattern.startswith(".*/") and "/" not in rule.pattern[3:] for rule in method.rules):
        modules = {module.rpartition(".")[2] for module in modules}
    return sorted(modules)
