"""Backbones: where a model's own weights come from, and what identifies them."""

from collections.abc import Callable, Mapping, Sequence
import dataclasses
import importlib.resources
import os
import pathlib
import re
import sys
import types

from flax import linen as nn
import gin
import jax
from jaxtyping import PyTree
import numpy as np

from moe_peft import errors, patching
from moe_peft.models import family, special_ids
from moe_peft.runtime import digest
from moe_peft.weights import (
    checkpoint_file,
    formats,
    hub,
    leaves,
    locations,
    safetensors_files,
    saved_run,
    scan_layout,
    t5_sizes,
)

KINDS = ("random:SEED", "embedded:NAME", "run:FOLDER[@STEP]")
KINDS += ("file:PATH.safetensors", "hf:FOLDER", "t5x:FOLDER")
PREFIXES = frozenset(kind.partition(":")[0] for kind in KINDS)
_CONVERTED = (formats.HUGGING_FACE, formats.T5X)


@dataclasses.dataclass(frozen=True)
class Backbone:
    """A model's own weights."""

    spec: str  # where they came from, as the user wrote it
    params: PyTree  # nested dict of arrays, without adapters
    fingerprint: str  # hexadecimal digest of names, shapes, dtypes and bytes


def load(
    spec: str,
    abstract_params: PyTree,
    init: Callable[[jax.Array], PyTree],
    stored_as: Callable[[str], str] | None = None,
    network: family.Config | None = None,
) -> Backbone:
    """Returns the backbone that `spec` names, checked against the model.

    Weights in files come in the model's layout of layers, scanned or not, whichever theirs is.
    Those of "hf:" and "t5x:" are read leaf by leaf: one leaf is in memory as it is stored, the
    others as they will be used.

    Args:
      spec: "random:SEED" (fresh weights), "embedded:NAME" (shipped with the package),
        "run:FOLDER[@STEP]" (a training run of the method `full`; default: its newest checkpoint),
        "file:PATH" (a safetensors file as `moe-peft export` writes it), "hf:FOLDER" (a T5 as
        transformers saves it) or "t5x:FOLDER" (a T5X checkpoint, also "t5x:gs://...").
      abstract_params: shapes of the model's own parameters, without adapters.
      init: rng -> fresh parameters, for random backbones and leaves that `allowed` lets be missing.
      stored_as: path -> "float32" or "bfloat16"; None leaves weights as they are. The fingerprint
        is of the weights before.
      network: the model's config; None compares what shapes tell.

    Raises UserError if the spec cannot be read, or a leaf is missing, unused or of another shape.
    """
    kind, _, rest = str(spec).partition(":")
    if kind in _CONVERTED:
        return _streamed(spec, abstract_params, init, stored_as, network)
    if kind == "embedded":
        params = safetensors_files.read_tree(embedded_path(spec, rest))
    elif kind == "file":
        params = safetensors_files.read_tree(rest)
    elif kind == "run":
        params = _from_run(spec, rest)
    else:
        params = jax.jit(init)(jax.random.key(_seed(spec, rest)))
    flat = patching.flatten(abstract_params)
    layout = scan_layout.is_scanned(flat), scan_layout.has_biases_in_layers(flat)
    if scan_layout.is_scanned(patching.flatten(params)) != layout[0]:
        params = leaves.load(scan_layout.convert(leaves.flatten(params), *layout))
    _check_shapes(params, abstract_params, spec)
    fingerprint = digest.of_tree(params)
    if stored_as is not None:
        flat = patching.flatten(params)
        flat = {path: leaves.cast(leaf, stored_as(path)) for path, leaf in flat.items()}
        params = patching.trees.unflatten(flat)
    return Backbone(str(spec), params, fingerprint)


# From which a network is scanned on an accelerator: one layer is compiled for all. On a CPU the
# loop copies weights and activations at every step: a quarter of the time of a T5-small.
_MANY_LAYERS = 6


def full_spec(spec: str) -> str:
    """The spec with an absolute path, and with its kind, told from the files where it has none."""
    kind, colon, path = spec.partition(":")
    if not colon or kind not in PREFIXES:
        found = formats.detect(spec)
        kind, path = {formats.ADAPTERS: "file"}.get(found, found), spec
    is_elsewhere = "://" in path or (kind == "hf" and hub.is_name(path))
    if is_elsewhere or kind not in ("hf", "t5x", "file", "run"):
        return spec
    return f"{kind}:{os.path.abspath(os.path.expanduser(path))}"


def network(spec: str) -> nn.Module | None:
    """The network that a backbone's files tell, scanned if it is deep; None: they do not tell.

    Raises UserError if there are no such files, or they are not of a network that is known.
    """
    kind, _, place = spec.partition(":")
    if kind == "embedded":
        config = t5_sizes.config_named(place)
    elif kind in ("file", *_CONVERTED):
        config = formats.open_backbone(place, {"file": formats.ADAPTERS}.get(kind, kind)).config
    else:
        return None
    num_layers = (getattr(config, f"num_{stack}_layers", 0) for stack in ("encoder", "decoder"))
    is_scanned = max(num_layers) >= _MANY_LAYERS and jax.default_backend() != "cpu"
    if hasattr(config, "scan_layers") and is_scanned:
        config = dataclasses.replace(config, scan_layers=True)
    return family.of(config).network(config)


def vocabulary(spec: str) -> str | None:
    """The vocabulary of a backbone, as `data.vocabularies.get` takes it; None: nothing tells."""
    kind, _, place = spec.partition(":")
    return {"embedded": "bytes", "hf": place}.get(kind)


@gin.configurable(module="backbones")
def allowed(
    missing: Sequence[str] = (), unused: Sequence[str] = ()
) -> tuple[Sequence[str], Sequence[str]]:
    """Leaves that a backbone "hf:" or "t5x:" may lack, or have too many, without an error.

    Args:
      missing: regular expressions of the model's paths; those leaves are fresh, of seed 0.
      unused: regular expressions of the checkpoint's keys.
    """
    return missing, unused


def check_headers(spec: str, abstract_params: PyTree, network: family.Config | None = None) -> None:
    """Raises UserError if a backbone is not there, or its headers do not fit; reads no weights."""
    kind, _, rest = str(spec).partition(":")
    if kind in _CONVERTED:
        _open(spec, abstract_params, network).report().check(*allowed())
    elif kind == "embedded":
        embedded_path(spec, rest)
    elif kind == "file":
        safetensors_files.open_file(rest)
    elif kind == "run":
        _run_of(spec, rest)
    else:
        _seed(spec, rest)


def check_special_ids(spec: str, ids: special_ids.SpecialIds) -> None:
    """Raises UserError if a backbone's files, as far as they tell, have other special ids."""
    own = _special_ids(spec)
    if own not in (None, ids):
        setting = ", ".join(f"T5Config.{name}_id={value}" for name, value in vars(own).items())
        raise errors.UserError(
            f"Backbone {spec!r} has the ids {own}; the model config says {ids}. Set {setting}."
        )


def _special_ids(spec: str) -> special_ids.SpecialIds | None:
    kind, _, place = str(spec).partition(":")
    if kind == formats.HUGGING_FACE:
        found = formats.open_backbone(place, kind)
        return special_ids.of_config(found.config) if found.settings else None
    if kind == "file":
        told = safetensors_files.read_metadata(locations.existing(place))
    elif kind == "run":
        told = saved_run.description_of(_run_of(spec, place)[0])
    else:
        return None
    config = (told.get("model") or {}).get("config")
    is_told = isinstance(config, Mapping)  # of another network it may be a text
    return special_ids.of_config(types.SimpleNamespace(**config)) if is_told else None


def _seed(spec: str, text: str) -> int:
    if spec.partition(":")[0] != "random":
        raise errors.UserError(f"Backbone {spec!r} is none of {', '.join(KINDS)}.")
    if not re.fullmatch(r"[+-]?\d+", text):
        raise errors.UserError(f"Backbone {spec!r} has no seed; write it as in random:0.")
    return int(text)


def _open(
    spec: str, abstract_params: PyTree, network: family.Config | None
) -> checkpoint_file.CheckpointFile:
    """Opens a checkpoint in the model's layout of layers, if it is of the model's size."""
    kind, _, folder = str(spec).partition(":")
    found = formats.open_backbone(folder, kind)
    shapes = {path: leaf.shape for path, leaf in patching.flatten(abstract_params).items()}
    model = network or t5_sizes.recognise(shapes, "The model config")
    own, asked = found.config, model
    if network is None:
        own = _as_recognised(own, model.scan_layers)
    elif found.is_recognised:  # The model's config says what shapes leave open.
        asked = _as_recognised(model, own.scan_layers)
        config = dataclasses.replace(model, scan_layers=own.scan_layers)
        found = dataclasses.replace(found, config=config)
    if differing := t5_sizes.differences(asked, own):
        sizes = (f"{n} {getattr(own, n)} (model config: {getattr(asked, n)})" for n in differing)
        fitting = t5_sizes.name_of(own)
        raise errors.UserError(
            f"Backbone {spec!r} has another size than the model: {', '.join(sizes)}. "
            + (f"Take models/{fitting}.gin." if fitting else "Set T5Config to its sizes.")
        )
    return found.scanned(model.scan_layers)


def _as_recognised(config: family.Config, scan_layers: bool) -> family.Config:
    """What shapes tell of a network."""
    config = dataclasses.replace(config, scan_layers=scan_layers)
    return t5_sizes.recognise(t5_sizes.shapes_of(config), "The model config")


def _streamed(
    spec: str,
    abstract_params: PyTree,
    init: Callable[[jax.Array], PyTree],
    stored_as: Callable[[str], str] | None,
    network: family.Config | None,
) -> Backbone:
    found = _open(spec, abstract_params, network)
    report = found.report()
    report.check(*allowed())
    for line in report.lines()[1:]:
        print(line, file=sys.stderr)
    fresh = {}
    if report.missing:
        only = lambda rng: {path: patching.flatten(init(rng))[path] for path in report.missing}
        fresh = jax.jit(only)(jax.random.key(0))
    params, digests = {}, []
    for path in patching.flatten(abstract_params):
        values = np.asarray(fresh[path] if path in fresh else found.leaves[path], order="C")
        digests.append(digest.of_leaf(path, values))
        params[path] = values if stored_as is None else leaves.cast(values, stored_as(path))
    return Backbone(str(spec), patching.trees.unflatten(params), digest.of_leaves(digests))


def _check_shapes(params: PyTree, abstract_params: PyTree, spec: str) -> None:
    """Raises UserError unless `params` has exactly the leaves and shapes of the model."""
    have = {name: np.shape(leaf) for name, leaf in patching.flatten(params).items()}
    want = {name: leaf.shape for name, leaf in patching.flatten(abstract_params).items()}
    missing, unused = sorted(want.keys() - have.keys()), sorted(have.keys() - want.keys())
    where, advice = f"Backbone {spec!r}", "Is this the right model config?"
    checkpoint_file.check_leaves(where, missing, unused, len(want), advice)
    for name in want:
        if have[name] != want[name]:
            # The embedding tells most plainly that the vocabulary is another one.
            what = "vocabulary or width" if "embedder" in name or "logits" in name else "shape"
            sizes = f"{have[name]} in the backbone and {want[name]} in the model config"
            raise errors.UserError(f"{where} has another {what} than the model: {name} is {sizes}.")


def embedded_path(spec: str, name: str) -> pathlib.Path:
    """Returns the file of a backbone that comes with the package; `spec` is for the message."""
    folder = pathlib.Path(str(importlib.resources.files("moe_peft.models") / "embedded"))
    shipped = sorted(path.stem for path in folder.glob("*.safetensors"))
    if name not in shipped:
        known = f"{', '.join(shipped) or 'none'}.{errors.near(name, shipped)}"
        raise errors.UserError(f"Backbone {spec!r} is not shipped; there is {known}")
    return folder / f"{name}.safetensors"


def _run_of(spec: str, text: str) -> tuple[str, int | None]:
    """The folder of a run, which is there, and the step of its checkpoint."""
    folder, _, step = text.partition("@")
    if step and not step.isdigit():
        raise errors.UserError(f"Backbone {spec!r}: the step {step!r} is not a number.")
    saved_run.description_of(folder)
    return folder, int(step) if step else None


def _from_run(spec: str, text: str) -> PyTree:
    saved = saved_run.load(*_run_of(spec, text))
    if (name := saved.description["method"].get("name")) != "full":
        raise errors.UserError(
            f"Backbone {spec!r} is a run of the method {name!r} and holds only its adapters; a "
            "backbone comes from a run of the method 'full'."
        )
    return saved.trainable
