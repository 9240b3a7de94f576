"""The folder of a run: can it be written, is there room, is another process using it."""

from collections.abc import Iterator
import contextlib
import fcntl
import os
import pathlib
import shutil

from moe_peft import errors
from moe_peft.runtime import processes

_MARGIN = 1.05
_SMALL_FILES = 500_000  # bytes: some fifty files of metadata, a disk block or more each
_LOCK = ".lock"


@contextlib.contextmanager
def locked(model_dir: pathlib.Path | str) -> Iterator[pathlib.Path]:
    """Makes the folder, tries to write into it, and keeps other runs out until the end.

    Where several processes share a run, the first one holds the lock.

    Raises UserError: it is not a path of a file system, cannot be made or written, or another
    process trains in it.
    """
    if "://" in str(model_dir):
        raise errors.UserError(
            f"The folder of a run is written as plain files, and MODEL_DIR is {model_dir}. Mount "
            "the bucket (gcsfuse), and name the folder it is mounted at."
        )
    folder = pathlib.Path(model_dir).expanduser()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe = folder / f".probe-{os.getpid()}"
        probe.write_bytes(b"x" * 4096)
        probe.unlink()
        lock = (folder / _LOCK).open("w")
    except OSError as error:
        raise errors.UserError(
            f"Cannot write to the folder of the run, {folder}: {error.strerror}. Choose another "
            "one with MODEL_DIR."
        ) from error
    if not processes.is_first():
        yield folder
        return
    # The kernel releases the lock when the process ends, however it ends.
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise errors.UserError(
                f"Another process is training in {folder}. Wait for it, or choose another "
                "MODEL_DIR."
            ) from None
        yield folder


def check_space(folder: pathlib.Path, checkpoint_bytes: int, num_checkpoints: int) -> None:
    """Raises UserError unless so many more checkpoints of that size fit on the disk."""
    needed = int(checkpoint_bytes * _MARGIN + _SMALL_FILES) * num_checkpoints
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise errors.UserError(
            f"The disk of {folder} has {_size(free)} left, but {num_checkpoints} checkpoints of "
            f"{_size(checkpoint_bytes)} need {_size(needed)}. Make room, keep fewer, or choose "
            "another MODEL_DIR."
        )


def _size(num_bytes: int) -> str:
    """
    >>> _size(1_234_567)
    '1.2 MB'
    """
    for unit, factor in (("GB", 1e9), ("MB", 1e6)):
        if num_bytes >= factor:
            return f"{num_bytes / factor:.1f} {unit}"
    return f"{num_bytes / 1e3:.1f} kB"
