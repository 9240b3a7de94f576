"""Places of checkpoints: what is there, what is never opened, and writing all or nothing."""

from collections.abc import Iterator
import contextlib
import os
import pathlib
import shutil

from etils import epath

from moe_peft import errors
from moe_peft.runtime import tensorflow_logs

# Files that run code when they are opened, or that hold weights in yet another format.
_PICKLES = (".bin", ".pkl", ".pickle", ".pt", ".pth", ".ckpt")
_OTHERS = (".h5", ".msgpack", ".gguf", ".onnx")


def existing(path: epath.PathLike) -> epath.Path:
    """Returns the path of a file or folder, local or in a bucket; UserError if it is not there."""
    found = epath.Path(os.path.expanduser(os.fspath(path)))
    # A bucket's library is TensorFlow's, where that is installed.
    is_remote = "://" in os.fspath(path)
    try:
        with tensorflow_logs.silenced() if is_remote else contextlib.nullcontext():
            if found.exists():
                return found
    except Exception as error:  # of the bucket's library, whichever that is
        first = (str(error).splitlines() or [type(error).__name__])[0]
        raise errors.UserError(f"{found} cannot be reached: {first}.") from error
    parent = found.parent
    near = errors.near(found.name, [p.name for p in parent.iterdir()]) if parent.exists() else ""
    raise errors.UserError(f"There is no {found}.{near}")


def refuse_pickle(path: epath.Path) -> None:
    """Raises UserError for a file that must not, or cannot, be read as weights."""
    if path.suffix in _PICKLES:
        raise errors.UserError(
            f"{path} is a pickle, which can run anything when it is opened, and is not read. Where "
            "you trust it, convert it with transformers: from_pretrained(FOLDER), then "
            "save_pretrained(NEW_FOLDER), which writes safetensors."
        )
    if path.suffix in _OTHERS:
        raise errors.UserError(
            f"{path} is in a format that is not read; save the model with transformers' "
            "save_pretrained, which writes safetensors."
        )


@contextlib.contextmanager
def created(folder: pathlib.Path | str) -> Iterator[pathlib.Path]:
    """Yields a folder to write into, which takes its name at the end; after an error it is gone.

    Raises:
      UserError: the folder exists, or it cannot be written.
    """
    folder = pathlib.Path(folder).expanduser()
    if folder.exists():
        raise errors.UserError(f"{folder} exists; choose another place or remove it.")
    partial = folder.with_name(f".{folder.name}.partial-{os.getpid()}")
    try:
        partial.mkdir(parents=True)
        yield partial
        partial.rename(folder)
    except OSError as error:
        raise errors.UserError(f"Cannot write {folder}: {error.strerror or error}.") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
