"""Paths of checkpoints: what is there, what is never opened, and writing all or nothing."""

from collections.abc import Iterator
import contextlib
import os
import pathlib
import shutil

from etils import epath

from moe_peft import errors
from moe_peft.runtime import tensorflow_logs

# Files that run code when they are opened, or that hold weights in yet another format.
_PICKLES = (".pkl", ".pickle", ".ckpt")
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
    raise errors.UserError(f"There is no {found}.{hint_at(found)}")


def hint_at(path: epath.Path | pathlib.Path) -> str:
    """Returns what to try where a path is not there, "" if it is: names near it."""
    if path.exists():
        return ""
    if not path.parent.is_dir():
        return f" The folder {path.parent} does not exist."
    return errors.near(path.name, [other.name for other in path.parent.iterdir()])


def refuse_pickle(path: epath.Path) -> None:
    """Raises UserError for a file that must not, or cannot, be read as weights; in a folder too."""
    for file in sorted(path.iterdir()) if path.is_dir() else [path]:
        if file.suffix in _PICKLES:
            why = (
                "a pickle, which can run anything when it is opened, and is not read. Where you "
                "trust it, convert it with transformers: from_pretrained(FOLDER), then "
                "save_pretrained(NEW_FOLDER)"
            )
        elif file.suffix in _OTHERS:
            why = "in a format that is not read; save the model with transformers' save_pretrained"
        else:
            continue
        raise errors.UserError(f"{file} is {why}, which writes safetensors.")


@contextlib.contextmanager
def created(path: pathlib.Path | str, *, replace: bool = False) -> Iterator[pathlib.Path]:
    """Yields a path next to `path` for a file or folder, which takes that name at the end.

    After an error what was written is gone, and what was there before is there again. Raises
    UserError if something is there that may not be replaced, or if it cannot be written.
    """
    path = pathlib.Path(path).expanduser()
    if path.exists() and not replace:
        raise errors.UserError(f"{path} exists; choose another place or remove it.")
    partial, old = (path.with_name(f".{path.name}.{w}-{os.getpid()}") for w in ("partial", "old"))
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield partial
        # Only a file takes another's name in one step; a folder has to make room first.
        if path.exists() and (path.is_dir() or partial.is_dir()):
            path.rename(old)
        partial.replace(path)
    except OSError as error:
        raise errors.UserError(f"Cannot write {path}: {error.strerror or error}.") from error
    finally:
        with contextlib.suppress(OSError):
            if old.exists() and not path.exists():
                old.rename(path)
            for left in (partial, old):
                shutil.rmtree(left) if left.is_dir() else left.unlink(missing_ok=True)
