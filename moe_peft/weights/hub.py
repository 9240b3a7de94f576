"""Models and adapters of the Hugging Face Hub by name, through huggingface_hub (extra `hub`)."""

import functools
import os
import pathlib
import re

from moe_peft import errors

_NAME = re.compile(r"[\w-][\w.-]*/[\w.-]+")  # OWNER/MODEL
TOKENIZER_FILES = (
    *("spiece.model", "tokenizer.json", "vocab.json", "merges.txt"),
    *("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"),
)
# Weights in safetensors, and what tells their sizes and their vocabulary;
_FILES = ("config.json", "adapter_config.json", "*.safetensors", "*.safetensors.index.json")
_FILES += ("generation_config.json", *TOKENIZER_FILES)
# weights of torch, read and never run, only where there are none in safetensors.
_PICKLED = ("pytorch_model*.bin", "pytorch_model.bin.index.json", "adapter_model.bin")


def is_name(path: str) -> bool:
    """Whether a path looks like OWNER/MODEL and is not that of a folder in one that is here."""
    return bool(_NAME.fullmatch(path)) and not os.path.isdir(path.partition("/")[0])


def local(path: str) -> str:
    """The path, or the folder of what the Hub has by that name."""
    return folder(path) if is_name(path) else path


@functools.cache
def folder(name: str) -> str:
    """The folder of the Hub's cache that holds a model, fetched if it is not there yet.

    Raises UserError: huggingface_hub is not installed, or the model cannot be fetched.
    """
    try:
        import huggingface_hub
    except ImportError as error:
        raise errors.UserError(
            f"There is no folder {name}. To fetch it from the Hugging Face Hub, pip install "
            "'moe-peft-jax[hub]'."
        ) from error
    try:
        found = huggingface_hub.snapshot_download(name, allow_patterns=list(_FILES))
        if not list(pathlib.Path(found).glob("*.safetensors")):
            found = huggingface_hub.snapshot_download(name, allow_patterns=list(_FILES + _PICKLED))
        return found
    except Exception as error:  # of the network, of the Hub, or of its library
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise errors.UserError(
            f"There is no folder {name}, and the Hugging Face Hub does not give it: {reason}. Give "
            "the path of a folder with config.json, weights and a tokenizer."
        ) from error
