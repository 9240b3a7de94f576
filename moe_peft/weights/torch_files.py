"""Files of torch.save that hold a dictionary of tensors, read tensor by tensor without torch.

Two formats: a zip of stored members (ROOT/data.pkl, and ROOT/data/KEY with the values of a
storage), and the older serial one (pickles of a magic number, a version, the system, the tensors
and the storages' keys, then every storage after its size). The pickles are read and never run.
"""

import io
import struct
import types
from typing import Any, BinaryIO, NamedTuple
import zipfile
import zlib

from etils import epath
import numpy as np

from moe_peft.weights import leaves, safetensors_files, torch_pickles

SUFFIXES = (".bin", ".pt", ".pth")

_ZIP = b"PK\x03\x04"
_SERIAL = b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."  # the pickled magic number
_LOCAL = struct.Struct("<4s22xHH")  # a member's signature, lengths of its name and of the rest
_MAX_HEADER = 2_000_000  # bytes of the pickles, and of a zip's directory; T5 11B has 110,000
_KIND = "torch's (its pickle is read and never run)"
# What struct, zipfile and pickletools raise of damaged files; the last of a name with "\\".
_DAMAGE = (struct.error, zipfile.BadZipFile, LookupError, OverflowError, NotImplementedError)
_DAMAGE += (DeprecationWarning,)


class _Part(NamedTuple):
    first: int  # byte of the file
    size: int  # bytes
    checksum: int | None


def open_file(path: epath.PathLike) -> leaves.Leaves:
    """Returns the tensors of a file by key; only the description is read.

    A state dict may lie inside of another dictionary, next to anything that is no tensors by name.
    A UserError says what is wrong if it is damaged, or holds more than a dictionary of tensors.
    """
    path = epath.Path(path)
    with safetensors_files.explained(path, _KIND, *_DAMAGE), path.open("rb") as file:
        start = file.read(len(_SERIAL))
        if start != _SERIAL and not start.startswith(_ZIP):
            raise ValueError("it is no zip and has not torch's magic number")
        found, parts = (_open_serial if start == _SERIAL else _open_zip)(file)
        within, tensors = _tensors(found)
    return {key: _leaf(path, within + key, one, parts[one.storage.key]) for key, one in tensors}


def _tensors(found: Any) -> tuple[str, list[tuple[str, torch_pickles.Tensor]]]:
    """Returns where in a file its only dictionary of tensors is, "" or "KEY/", and its items."""
    if _is_tensors(found):
        return "", list(found.items())
    values = found if type(found) is dict else {"it": found}
    inner = [key for key, value in values.items() if value and _is_tensors(value)]
    if len(inner) == 1 and isinstance(inner[0], str):
        return f"{inner[0]}/", list(found[inner[0]].items())
    expected = "expected tensors by name, as in a state dict"
    if inner:
        which = f"{len(inner)} dictionaries of tensors, {', '.join(map(str, inner))}"
        raise ValueError(f"it has {which}; save the one by itself ({expected})")
    for key, value in values.items():
        if type(found) is not dict or not isinstance(value, torch_pickles.Tensor):
            raise ValueError(f"{key} is a {type(value).__name__.strip('_')}; {expected}")
    raise ValueError(f"a key is no text; {expected}")


def _is_tensors(value: Any) -> bool:
    is_each = lambda key, one: isinstance(key, str) and isinstance(one, torch_pickles.Tensor)
    return type(value) is dict and all(is_each(*item) for item in value.items())


def _open_zip(file: BinaryIO) -> tuple[Any, dict[str, _Part]]:
    """Returns what the pickle describes, and where the storages are."""
    members = _members(file)
    roots = [name.split("/")[0] for name in members if name.endswith("/data.pkl")]
    if len(roots) != 1:
        raise ValueError(f"it has {len(roots)} members FOLDER/data.pkl, expected one")
    root, order = roots[0], members.get(f"{roots[0]}/byteorder")
    if order and _read(file, order) != b"little":
        raise ValueError("its byte order is not little")
    found, storages = torch_pickles.load(io.BytesIO(_read(file, members[f"{root}/data.pkl"])))
    parts = {key: members.get(f"{root}/data/{key}") for key in storages}
    for key, part in parts.items():
        if part is None or part.size != storages[key].nbytes:
            there = f"{part.size} bytes" if part else "no member of the zip"
            raise ValueError(f"the storage {key} of {storages[key].nbytes} bytes has {there}")
    return found, parts


def _members(file: BinaryIO) -> dict[str, _Part]:
    """Returns where the members of a zip are, which must lie one after the other."""

    def read(size: int = -1) -> bytes:  # for zipfile, which would read a directory of any length
        values = file.read(size if 0 <= size <= _MAX_HEADER else _MAX_HEADER + 1)
        if len(values) > _MAX_HEADER:
            raise ValueError(f"its directory has more than {_MAX_HEADER} bytes")
        return values

    file_of_zip = types.SimpleNamespace(seek=file.seek, tell=file.tell, read=read)
    archive, end, found = zipfile.ZipFile(file_of_zip), 0, {}
    is_checked = any(info.CRC for info in archive.filelist)  # torch can save without
    for info in sorted(archive.filelist, key=lambda info: info.header_offset):
        name = info.orig_filename
        file.seek(info.header_offset)
        signature, length, rest = _LOCAL.unpack(file.read(_LOCAL.size))
        first = info.header_offset + _LOCAL.size + length + rest
        problem = None
        if name in found or not {"", "..", "."}.isdisjoint(name.split("/")):
            problem = "is there twice, or leads out of the zip"
        elif info.compress_type or info.flag_bits & 1 or info.compress_size != info.file_size:
            problem = "is compressed or encrypted"
        elif signature != _ZIP or file.read(length) != name.encode(errors="replace"):
            problem = "is not where the directory says"
        elif info.header_offset < end or first + info.file_size > archive.start_dir:
            problem = "lies over another"
        elif not name.split("/", 1)[-1].startswith("data/") and info.file_size > _MAX_HEADER:
            problem = f"has more than {_MAX_HEADER} bytes"
        if problem:
            raise ValueError(f"its member {name[:100]!r} {problem}")
        end = first + info.file_size
        found[name] = _Part(first, info.file_size, info.CRC if is_checked else None)
    return found


def _open_serial(file: BinaryIO) -> tuple[Any, dict[str, _Part]]:
    """Returns what the pickle describes, and where the storages are."""
    file.seek(len(_SERIAL))
    head = io.BytesIO(file.read(_MAX_HEADER))
    (version, _), (system, _) = torch_pickles.load(head), torch_pickles.load(head)
    (found, storages), (keys, _) = torch_pickles.load(head), torch_pickles.load(head)
    if version != 1001 or type(system) is not dict or system.get("little_endian") is not True:
        raise ValueError("its version is not 1001, or its byte order not little")
    is_text = type(keys) is list and all(isinstance(key, str) for key in keys)
    if not is_text or sorted(keys) != sorted(storages):
        raise ValueError("its storages are not those that the tensors need")
    parts, end, size = {}, len(_SERIAL) + head.tell(), file.seek(0, io.SEEK_END)
    for key in keys:
        file.seek(end)
        (there,) = struct.unpack("<Q", file.read(8))
        parts[key] = part = _Part(end + 8, storages[key].nbytes, None)
        end = part.first + part.size
        if there * storages[key].dtype.itemsize != part.size or end > size:
            raise ValueError(f"the storage {key} has another size, or is cut short at {size}")
    return found, parts


def _read(file: BinaryIO, part: _Part) -> bytearray:
    buffer = bytearray(part.size)
    file.seek(part.first)
    if file.readinto(buffer) != part.size:
        raise ValueError("it is cut short")
    if part.checksum is not None and zlib.crc32(buffer) != part.checksum:
        raise ValueError("values have another checksum than when they were written; copy it again")
    return buffer


def _leaf(path: epath.Path, key: str, tensor: torch_pickles.Tensor, part: _Part) -> leaves.Leaf:
    dtype, first = tensor.dtype, part.first + tensor.offset * tensor.dtype.itemsize
    if (size := tensor.span * dtype.itemsize) != part.size:
        part = _Part(first, size, None)  # the checksum is of the whole storage

    def read() -> np.ndarray:
        with safetensors_files.explained(path, _KIND, *_DAMAGE), path.open("rb") as file:
            values = np.frombuffer(_read(file, part), dtype)
        steps = [step * dtype.itemsize for step in tensor.strides]
        view = np.lib.stride_tricks.as_strided(values, tensor.shape, steps)
        return view if view.size == tensor.span else view.copy()

    return leaves.Leaf(tensor.shape, dtype, read, f"{path}: {key}")
