"""Small files in exactly the official formats, so that everything runs without a download.

`samples.tar.xz` holds them; tests/golden/make_samples.py made it. Contents come from Unicode CLDR
(the suite of `moe_peft.data.cldr`): no row of any benchmark is in them, and tasks have names of
their own. As readers want files, the archive is unpacked once into the cache folder, to 0.7 MB.
"""

import functools
import hashlib
import importlib.resources
import io
import pathlib
import tarfile

from moe_peft.data import cache

TRAIN_TASKS = 6
TEST_TASKS = 3
CHOICES = 4  # of an example in rank classification


@functools.cache
def _archive() -> bytes:
    return (importlib.resources.files(__package__) / "samples.tar.xz").read_bytes()


def folder() -> pathlib.Path:
    """The folder of the samples: superni/, crossfit/ and p3/; written if it is not there."""
    place = cache.folder() / f"samples-{hashlib.sha256(_archive()).hexdigest()[:12]}"
    cache.write_folder_once(place, write)
    return place


def write(place: pathlib.Path) -> None:
    """Writes all samples under a folder."""
    with tarfile.open(fileobj=io.BytesIO(_archive())) as archive:
        # Not `extractall`: Python 3.11.0 to 3.11.3 lack its safe filter, newer ones want it.
        for member in archive:
            path = place / member.name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(archive.extractfile(member).read())
