"""Adapters of other projects, with the backbone that they are for."""

import dataclasses

import jax

from moe_peft import errors, patching
from moe_peft.convert import targets, tfew
from moe_peft.convert.peft import adapters
from moe_peft.weights import backbone, formats, saved_run, t5_sizes

KINDS = (formats.PEFT, targets.TFEW)
_HOW = "with --base hf:FOLDER (in Python: backbone=)"


def read(place: targets.Place, base: str | None) -> saved_run.Saved:
    """Returns the adapter in a folder of PEFT or a file of T-Few, as a run of ours has it.

    `base` names its backbone; None: the one that the adapter names, if it does. Raises UserError:
    there is none, or the adapter cannot be expressed or is not of that backbone.
    """
    if place.kind == targets.TFEW:
        if base is None:
            what = f"does not say which weights it was trained on; name them {_HOW}"
            raise errors.UserError(f"{place} {what}.")
        return tfew.read(place.path, base_of(base))
    if base is not None or adapters.record(place.path):
        return adapters.read(place.path, base_of(base) if base else None)
    named = adapters.base_name(place.path)
    if named is None:
        return adapters.read(place.path)  # which asks for it
    try:
        found = base_of(f"{formats.HUGGING_FACE}:{named}")
    except errors.UserError as error:
        what = f"is for the model {named!r}, which is not found; name it {_HOW}"
        raise errors.UserError(f"{place} {what}. {error}") from error
    return adapters.read(place.path, found)


def base_of(base: str) -> adapters.Base:
    """Returns the model that `--base` names, with the fingerprint of its weights."""
    spec = backbone_spec(base)
    kind, _, path = spec.partition(":")
    if kind in ("file", "embedded"):
        path = backbone.embedded_path(spec, path) if kind == "embedded" else path
        kind = formats.ADAPTERS
    if kind not in (formats.ADAPTERS, formats.HUGGING_FACE, formats.T5X):
        what = f"in the format {kind!r}, which is not a whole model"
        raise errors.UserError(f"--base {base} is {what}.")
    # Layers are told apart by name in other projects.
    config = dataclasses.replace(formats.open_backbone(path, kind).config, scan_layers=False)
    shapes, abstract = t5_sizes.shapes_of(config), jax.ShapeDtypeStruct
    tree = {path: abstract(shape, "float32") for path, shape in shapes.items()}
    loaded = backbone.load(spec, patching.trees.unflatten(tree), None, network=config)
    return adapters.Base(spec, config, loaded.fingerprint)


def backbone_spec(base: str) -> str:
    """Returns `--base` as gin's BACKBONE has it: with a prefix."""
    if base.partition(":")[0] in backbone.PREFIXES:
        return backbone.full_spec(base)
    place = targets.source(base)
    kind = {formats.ADAPTERS: "file"}.get(place.kind, place.kind)
    return f"{kind}:{place}"
