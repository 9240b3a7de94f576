"""(IA)3 of T-Few: files *.pt as its released code saves them, such as t03b_ia3_finish.pt.

A vector [outputs, 1] scales what a linear map returns, MODULE.multi_lora_b in a plain state dict.
"Few-Shot Parameter-Efficient Fine-Tuning is Better and Cheaper than In-Context Learning" (Liu et
al. 2022); https://github.com/r-three/t-few, src/models/lora.py.
"""

from etils import epath

from moe_peft import errors
from moe_peft.convert.peft import adapters
from moe_peft.models import t5
from moe_peft.weights import saved_run, t5_names, torch_files

_SUFFIX = ".multi_lora_b"
_AS_IN_PEFT = {"peft_type": "IA3", "feedforward_modules": []}  # the same vectors in the same places


def is_file(path: epath.PathLike) -> bool:
    """Whether a file of torch holds vectors of T-Few; only its description is read."""
    path = epath.Path(path)
    if path.suffix not in torch_files.SUFFIXES or not path.is_file():
        return False
    return any(key.endswith(_SUFFIX) for key in torch_files.open_file(path))


def read(path: epath.PathLike, base: adapters.Base) -> saved_run.Saved:
    """Returns the (IA)3 in a file, as a run of ours on the model `base` would have saved it.

    Raises UserError: the file holds something else than vectors of (IA)3's places in that model.
    """
    path, tensors = epath.Path(path), {}
    for key, leaf in torch_files.open_file(path).items():
        kernel = t5_names.path_of(key.removesuffix(_SUFFIX) + ".weight") or ""
        if not key.endswith(_SUFFIX) or not kernel.endswith("/kernel"):
            what = f"is not MODULE{_SUFFIX}, a vector of T-Few's (IA)3"
            raise errors.UserError(f"{path}: {key} {what}; nothing else of T-Few is read.")
        tensors[kernel.removesuffix("/kernel")] = {"ia3_l": leaf}
    if not tensors:
        raise errors.UserError(f"{path} holds no tensors.")
    description = adapters.describe(_AS_IN_PEFT, tensors, {}, base)
    network = t5.Transformer(base.config)
    return adapters.assembled(_AS_IN_PEFT, tensors, {}, description, network, path)
