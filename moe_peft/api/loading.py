"""`moe_peft.load`, and a user's files for SeqIO."""

import os
import pathlib
from typing import Any

from flax import linen as nn

from moe_peft import errors, methods
from moe_peft.api import model as model_lib
from moe_peft.convert import foreign, targets, tfew
from moe_peft.data import files as files_lib
from moe_peft.weights import backbone as backbone_lib
from moe_peft.weights import records, saved_run


def load(
    source: str | os.PathLike,
    method: methods.Method | None = None,
    *,
    backbone: str | None = None,
    network: nn.Module | None = None,
    vocabulary: str | None = None,
    frozen_dtype: str = "float32",
) -> model_lib.Model:
    """Returns a backbone with fresh adapters, or what a run has trained.

    Args:
      source: a backbone, such as "hf:./flan-t5-base" or "embedded:cldr_tiny" (all kinds:
        `weights.backbone.KINDS`); or the folder of a run, an adapter folder or an exported file;
        or a folder of PEFT, "peft:OWNER/NAME" on the Hub, or a file *.pt of T-Few's (IA)3.
      method: what is adapted and what trains, such as `methods.molora(num_experts=8)`, for a
        backbone; None leaves it as it is. A run tells its own.
      backbone: of a run, where its weights have moved; default: where the run had them. Of other
        projects' adapters: what they are for (read once for its fingerprint); default: as PEFT's
        `base_model_name_or_path` says.
      network: the network without adapters; default: as the backbone's files tell.
      vocabulary: path of a SentencePiece model or a folder with a tokenizer, or "bytes"; default:
        the backbone's.
      frozen_dtype: how frozen weights are stored, "float32" or "bfloat16".

    Raises UserError: something is not there, is not a T5, or does not fit together.
    """
    spec = os.fspath(source)
    if _is_backbone(spec):
        spec = backbone_lib.full_spec(spec)
        network = network or backbone_lib.network(spec)
        vocabulary = vocabulary or backbone_lib.vocabulary(spec)
        return model_lib.Model(network, method or methods.frozen(), spec, vocabulary, frozen_dtype)
    is_foreign = _is_foreign(spec)
    saved = foreign.read(targets.source(spec), backbone) if is_foreign else saved_run.load(spec)
    if method is not None:
        raise errors.UserError(f"{spec} tells its own method; leave `method` out.")
    description = saved.description
    backbone = backbone_lib.full_spec(backbone or description.get("backbone_spec", ""))
    made = records.method(description["method"], spec)
    network = network or records.network(description, spec)
    vocabulary = vocabulary or description.get("files", {}).get("vocabulary")
    vocabulary = vocabulary or backbone_lib.vocabulary(backbone)
    return model_lib.Model(network, made, backbone, vocabulary, frozen_dtype, saved)


def _is_backbone(spec: str) -> bool:
    kind, colon, _ = spec.partition(":")
    if colon and kind in backbone_lib.PREFIXES:  # A folder may be called "run".
        return True
    folder = pathlib.Path(spec).expanduser()
    return (folder / "config.json").is_file() and not (folder / "adapter_config.json").is_file()


def _is_foreign(spec: str) -> bool:
    """Whether another project wrote the adapter."""
    kind, colon, _ = spec.partition(":")
    folder = pathlib.Path(spec).expanduser()
    is_peft = (folder / "adapter_config.json").is_file() and not saved_run.is_adapter_folder(folder)
    return is_peft or tfew.is_file(folder) or (bool(colon) and kind in foreign.KINDS)


def as_seqio_task(data: Any, name: str | None = None, *, vocabulary: str, **columns: Any) -> str:
    """Registers a user's files as a SeqIO task, for T5X; returns its name.

    The rows are those that `train` reads. Args as of `data.files.Files`; files with a column of
    tasks become one task each, and a mixture of that name.
    """
    from moe_peft.data import registration

    return registration.add_files(files_lib.Files(data, vocabulary, **columns), name)
