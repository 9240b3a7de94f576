"""Files of torch, written by hand: pickles instruction by instruction, zips and serial files."""

import io
import struct
import warnings
import zipfile

MAGIC = b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."
SYSTEM = b"\x80\x02}X\r\x00\x00\x00little_endian\x88s."
REBUILD = b"ctorch._utils\n_rebuild_tensor_v2\n"
HOOKS = b"ccollections\nOrderedDict\n)R"


def text(value):
    data = value if isinstance(value, bytes) else value.encode()
    return b"X" + struct.pack("<I", len(data)) + data


def number(value):
    data = value.to_bytes(16, "little", signed=True)
    return b"\x8a" + bytes([len(data)]) + data


def counts(*values):
    return b"(" + b"".join(map(number, values)) + b"t"


def storage(key="0", size=6, kind="torch\nFloatStorage", *, last=b""):
    named = text("storage") + b"c" + kind.encode() + b"\n" + text(key) + text("cpu")
    return b"(" + named + number(size) + last + b"tQ"


def tensor(source=None, offset=0, shape=(2, 3), strides=(3, 1), *, tail=b"\x89" + HOOKS):
    given = source or storage()
    view = number(offset) + counts(*shape) + counts(*strides)
    return REBUILD + b"(" + given + view + tail + b"tR"


def state_dict(**values):
    """A pickle of the values, which are instructions."""
    items = b"".join(text(key) + value for key, value in values.items())
    return b"\x80\x02}(" + items + b"u."


def zipped(pickle, *, more=(), compression=zipfile.ZIP_STORED, root="a", **storages):
    """A zip of a pickle and of storages by key, "_0" for 0; `more` are (name, bytes)."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", compression) as archive, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of names that are there twice
        archive.writestr(f"{root}/data.pkl", pickle)
        for key, data in (storages or {"_0": bytes(range(24))}).items():
            archive.writestr(f"{root}/data/{key[1:]}", data)
        for name, data in more:
            archive.writestr(name, data)
    return buffer.getvalue()


def serial(pickle, *, keys=("0",), system=SYSTEM, version=1001, storages=None):
    """The older format; `storages` is what follows the list of keys."""
    listed = b"\x80\x02](" + b"".join(map(text, keys)) + b"e."
    values = struct.pack("<Q", 6) + bytes(range(24)) if storages is None else storages
    return MAGIC + b"\x80\x02" + number(version) + b"." + system + pickle + listed + values


_KINDS = {"float32": "FloatStorage", "float16": "HalfStorage", "bfloat16": "BFloat16Storage"}


def of_arrays(arrays, kind="zip"):
    """A file of a state dict of NumPy arrays."""
    values, data = {}, {}
    for index, (key, array) in enumerate(arrays.items()):
        named, strides = f"torch\n{_KINDS[array.dtype.name]}", [1] * array.ndim
        for axis in range(array.ndim - 2, -1, -1):
            strides[axis] = strides[axis + 1] * array.shape[axis + 1]
        last = b"" if kind == "zip" else b"N"
        source = storage(str(index), array.size, named, last=last)
        values[key] = tensor(source, 0, array.shape, strides)
        data[f"_{index}"] = array.tobytes()
    if kind == "zip":
        return zipped(state_dict(**values), **data)
    sizes = [struct.pack("<Q", array.size) for array in arrays.values()]
    stored = b"".join(size + one for size, one in zip(sizes, data.values(), strict=True))
    return serial(state_dict(**values), keys=[key[1:] for key in data], storages=stored)
