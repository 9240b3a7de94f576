"""The adapter folder: our own file, a config for PEFT or for people, and a model card.

    adapter.safetensors          what was trained, in our own format
    adapter_config.json          PEFT's own, if it can express the method; else what the adapter is
    adapter_model.safetensors    the same adapter in PEFT's names, if it can express the method
    README.md                    a model card

What opens here is the first; the second and third are for PEFT.
"""

from collections.abc import Mapping
import dataclasses
import json
import pathlib
from typing import Any

import moe_peft
from moe_peft import errors
from moe_peft.convert import adapter_trees, model_card
from moe_peft.convert.peft import adapters, config, methods, tensors
from moe_peft.models import family, t5
from moe_peft.weights import leaves, locations, records, saved_run

CARD = "README.md"
FILES = (saved_run.ADAPTER, config.NAME, tensors.TENSORS, CARD)


def write(
    saved: saved_run.Saved,
    folder: pathlib.Path | str,
    *,
    run_folder: pathlib.Path | None = None,
    license: str | None = None,
    overwrite: bool = False,
    dtype: str = "float32",
) -> pathlib.Path:
    """Writes an adapter folder, whole or not at all, and returns its path.

    What was written is read again and compared before it gets its name: our own file bit by bit,
    PEFT's layer by layer.

    Args:
      saved: what was trained.
      folder: where to write; UserError if something is there that may not be replaced.
      run_folder: the card shows the scores that `moe-peft eval` left there for this very step.
      license: its name in the card, such as "apache-2.0".
      overwrite: replace an adapter folder, unless it holds anything else.
      dtype: "float32" or "bfloat16", of our own file. PEFT's is float32 and has the same values.

    Raises UserError: the method trains the whole model, or there is no room or no right to write.
    """
    folder = pathlib.Path(folder).expanduser()
    _check_free(folder, overwrite)
    described = saved.description["method"]
    if described["name"] == "full":
        what = "is a whole model; export it to a file *.safetensors, which BACKBONE=file: takes"
        raise errors.UserError(f"A run of the method 'full' {what}.")
    saved = dataclasses.replace(saved, trainable=leaves.cast_tree(saved.trainable, dtype))
    network = _network(saved.description)
    no_peft = _why_not_peft(saved.description, network)
    facts = model_card.Facts.of(saved, network, folder.name, license, run_folder, not no_peft)
    with locations.created(folder, replace=True) as partial:
        if no_peft:
            partial.mkdir()
            text = json.dumps(_config(saved, facts, no_peft), indent=2)
            (partial / config.NAME).write_text(text + "\n", encoding="utf-8")
        else:
            adapters.write_checked(saved, partial, str(folder))
        saved_run.save(saved, partial / saved_run.ADAPTER, dtype)
        adapter_trees.check_same(saved, saved_run.load(partial), dtype)
        (partial / CARD).write_text(model_card.text(facts), encoding="utf-8")
    return folder


def _check_free(folder: pathlib.Path, overwrite: bool) -> None:
    """Raises UserError if something is there that may not be replaced."""
    if not folder.exists():
        return
    if not saved_run.is_adapter_folder(folder):
        what = "is not an adapter folder; choose another path or remove it"
        raise errors.UserError(f"{folder} exists and {what}.")
    if others := sorted({path.name for path in folder.iterdir()} - set(FILES)):
        what = f"also holds {others[0]}, so it is not replaced; choose another path or move that"
        raise errors.UserError(f"{folder} exists and {what}.")
    if not overwrite:
        how = "--overwrite (of `convert`) or --gin.export.overwrite=True replaces it"
        raise errors.UserError(f"{folder} exists; {how}.")


def _network(description: Mapping[str, Any]) -> Any | None:
    """Returns the network that the run adapts, None if the description does not say."""
    name = (description.get("model") or {}).get("class")
    return records.network(description, "the run") if family.of_network(name) else None


def _why_not_peft(description: Mapping[str, Any], network: Any | None) -> str | None:
    """Returns the reason why PEFT cannot open it; None if it can."""
    if not isinstance(network, t5.Transformer):
        return "the run does not say which T5 it adapts"
    return methods.why_not(records.method(description["method"], "the run"))


def _config(saved: saved_run.Saved, facts: model_card.Facts, no_peft: str) -> dict[str, Any]:
    """Returns `adapter_config.json` of what PEFT cannot open: PEFT would need a "peft_type"."""
    described = saved.description
    return {
        "library_name": model_card.LIBRARY,
        "moe_peft_version": moe_peft.__version__,
        "not_for_peft_because": no_peft,
        "weights": saved_run.ADAPTER,
        "base_model_name_or_path": facts.base_path,
        "base_model_fingerprint": described["backbone"]["fingerprint"],
        "step": saved.step,
        "trainable_parameters": facts.num_trainable,
        "method": described["method"],
    }
