"""The cache folder, `$MOE_PEFT_CACHE` or `~/.cache/moe_peft`: what can always be made again."""

from collections.abc import Callable
import os
import pathlib
import shutil
import socket
import tempfile


def folder() -> pathlib.Path:
    """Where generated files live."""
    root = os.environ.get("MOE_PEFT_CACHE")
    return pathlib.Path(root) if root else pathlib.Path.home() / ".cache" / "moe_peft"


def write_folder_once(place: pathlib.Path, write: Callable[[pathlib.Path], None]) -> None:
    """Makes the folder `place` unless it is there; `write` fills an empty one.

    It is written next to its place and renamed, so that half of it is never read, and processes
    that start together do not disturb each other.
    """
    if place.is_dir():
        return
    place.parent.mkdir(parents=True, exist_ok=True)
    _remove_unfinished(place.parent)
    temporary = pathlib.Path(tempfile.mkdtemp(dir=place.parent, prefix=owner(), suffix=".tmp"))
    try:
        write(temporary)
        os.replace(temporary, place)
    except OSError:
        if not place.is_dir():  # otherwise another process was faster
            raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def owner() -> str:
    """What the names of this process's unfinished folders begin with."""
    return f"{socket.gethostname()}-{os.getpid()}-"


def _remove_unfinished(folder: pathlib.Path) -> None:
    """Removes what dead processes of this machine left; others may be on a shared disk."""
    for path in folder.glob(f"{socket.gethostname()}-*.tmp"):
        process = path.name.removeprefix(f"{socket.gethostname()}-").split("-")[0]
        if process.isdigit() and not _is_alive(int(process)):
            shutil.rmtree(path, ignore_errors=True)


def _is_alive(process: int) -> bool:
    try:
        os.kill(process, 0)  # asks, and does nothing
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return True
