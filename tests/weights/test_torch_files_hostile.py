"""Files of torch that want harm, or are damaged: one line each, and nothing is run."""

import contextlib
import importlib.util
import io
import pathlib
import struct
import sys
import time
import tracemalloc
import zipfile

from etils import epath
import hypothesis
from hypothesis import strategies
import numpy as np
import pytest

from moe_peft import errors
from moe_peft.weights import formats, torch_files

GOLDEN = pathlib.Path(__file__).parents[1] / "golden"

_spec = importlib.util.spec_from_file_location(
    "torch_writing", pathlib.Path(__file__).with_name("torch_writing.py")
)
w = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(w)

_open = []  # while a hostile file is
_heard = []
_HARM = ("import", "exec", "os.system", "subprocess.Popen", "pickle.find_class", "socket.")


@pytest.fixture(scope="module", autouse=True)
def _listening():
    """What Python itself says it imports, runs or starts while a file is open."""
    for codec in ("cp437", "raw_unicode_escape", "unicode_escape"):
        "".encode(codec)  # zipfile's and pickletools', imported at their first use
    hear = lambda event, given: _open and event.startswith(_HARM) and _heard.append((event, given))
    sys.addaudithook(hear)


def read(path, data):
    """Opens the bytes as a file and reads all of its tensors."""
    path.write_bytes(data)
    _heard.clear()
    _open.append(path)
    try:
        found = torch_files.open_file(path)
        return {key: (one.shape, one.dtype, one.read().tobytes()) for key, one in found.items()}
    finally:
        _open.clear()
        assert not _heard


def refused(path, data, words):
    with pytest.raises(errors.UserError, match=words) as caught:
        read(path, data)
    assert str(caught.value).startswith(str(path))
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < len(str(path)) + 500


@pytest.fixture
def path(tmp_path):
    return epath.Path(tmp_path) / "model.bin"


def test_the_writer_by_hand(path):
    good = w.state_dict(a=w.tensor())
    expected = ((2, 3), np.dtype("float32"), bytes(range(24)))
    assert read(path, w.zipped(good)) == {"a": expected}
    assert read(path, w.serial(good)) == {"a": expected}


def short(value):
    return b"\x8c" + bytes([len(value)]) + value.encode()


A = w.text("a")
INNER = b"}" + A + w.tensor() + b"s"
# A part of the message, and what stands for the value of the key "a".
VALUES = [
    ("asks for 'os.system'", b"cos\nsystem\n(" + w.text("true") + b"tR"),
    (
        "asks for 'builtins.eval'",
        short("builtins") + short("eval") + b"\x93(" + w.text("1") + b"tR",
    ),
    ("asks for 'torch._utils.x.y'", b"ctorch._utils\nx.y\n)R"),
    (
        "asks for 'torch._utils._rebuild_tensor_v2.__globals__'",
        (short("torch._utils") + short("_rebuild_tensor_v2.__globals__") + b"\x93"),
    ),
    ("asks for 'torch.load'", b"ctorch\nload\n(" + w.text("x") + b"tR"),
    (
        "asks for 'torch._utils._rebuild_parameter_with_state'",
        (b"ctorch._utils\n_rebuild_parameter_with_state\n)R"),
    ),
    ("asks for 'torch.FloatStorage.'", short("torch FloatStorage") + short("") + b"\x93"),
    ("a key or a name is no printable text", short("torch") + b"K\x01\x93"),
    ("cannot be read as torch's.*escape", b"c\\z\n\\z\n"),
    ("the opcode INST", b"(" + w.text("true") + b"ios\nsystem\n"),
    ("the opcode OBJ,", b"(" + w.text("os.system") + b"o"),
    ("asks for 'os.system'", b"(cos\nsystem\n"),
    ("the opcode NEWOBJ,", b"ccollections\nOrderedDict\n)\x81"),
    ("the opcode NEWOBJ_EX,", b"ccollections\nOrderedDict\n)}\x92"),
    ("the opcode EXT1", b"\x82\x01"),
    ("the opcode EXT2", b"\x83\x01\x00"),
    ("the opcode EXT4", b"\x84\x01\x00\x00\x00"),
    ("the opcode PERSID", b"Pstorage\n"),
    ("the opcode DUP", b"]22"),
    ("the opcode POP", b"N0N"),
    ("the opcode NEXT_BUFFER", b"\x97"),
    ("the opcode EMPTY_SET", b"\x8f"),
    ("the opcode LONG4", b"\x8b\x01\x00\x00\x00\x01"),
    ("the opcode BINBYTES,", b"B\x01\x00\x00\x00a"),
    ("expected 2147483647 bytes", b"X\xff\xff\xff\x7f"),
    ("expected 4611686018427387904 bytes", b"\x8e" + struct.pack("<Q", 2**62)),
    ("not enough data", b"\x8b\xff\xff\xff\x7f"),
    ("calls collections OrderedDict", b"ccollections\nOrderedDict\n(]tR"),
    ("calls torch FloatStorage", b"ctorch\nFloatStorage\n)R"),
    ("calls no function for", w.text("os.system") + b")R"),
    (
        "calls torch._utils _rebuild_parameter for",
        (b"ctorch._utils\n_rebuild_parameter\n(" + w.text("x") + b"\x88" + w.HOOKS + b"tR"),
    ),
    ("BUILD for more than a state dict", b"}}" + A + b"Nsb"),
    ("the opcode BUILD", w.tensor() + b"}" + w.text("_metadata") + b"Nsb"),
    ("BUILD for more than a state dict", b"}}" + w.text("_metadata") + b"Ns" + A + b"Nsb"),
    ("the opcode APPEND", b"}Na"),
    ("the opcode SETITEM", b"]" + A + b"Ns"),
    ("a is there twice", b"N" + A + b"N"),
    ("a is a dict; expected tensors", b"}"),
    ("a is a dict; expected tensors", b"}K\x00" + w.tensor() + b"s"),
    ("a is a dict; expected tensors", b"}" + A + INNER + b"s"),
    ("2 dictionaries of tensors, a, b; save the one", INNER + w.text("b") + INNER),
    ("a is a str; expected tensors", w.text("cos\nsystem\n(S'true'\ntR.")),
    ("a is a Storage; expected tensors", w.storage()),
    ("before it is there", b"h\x07"),
    ("pop from empty list", b"Nuuu"),
    ("persistent id", b"NQ"),
    ("persistent id", b"(" + w.text("module") + w.storage()[1:]),
    ("persistent id", b"(" + w.text("storage") + w.text("F") + w.text("0") * 2 + b"K\x01tQ"),
    ("has two types or sizes", w.tensor() + w.text("b") + w.tensor(w.storage(size=7))),
    ("hooks or settings", w.tensor(tail=b"\x89}" + A + b"Ns")),
    ("hooks or settings", w.tensor(tail=b"\x89}}" + w.text("conj") + b"\x88s")),
    ("the storage ../data.pkl of 24 bytes has no member", w.tensor(w.storage("../data.pkl"))),
    ("the storage 1 of 24 bytes has no member", w.tensor(w.storage("1"))),
    ("the storage 0 of 28 bytes has 24", w.tensor(w.storage(size=7))),
    ("no known dtype", w.REBUILD + b"(" + w.storage() + b"tR"),
    ("no known dtype", w.REBUILD + b"(" + w.storage() + b"N" * 9 + b"tR"),
    ("no known dtype", w.tensor().replace(b"_v2", b"_v3")),
    ("no known dtype", w.tensor(tail=b"\x89N]").replace(b"_v2", b"_v3")),
    ("no known dtype", w.tensor(tail=b"\x89Nctorch\nFloatStorage\n").replace(b"_v2", b"_v3")),
    ("negative, too large", w.tensor(w.storage(size=-1))),
    ("negative, too large", w.tensor(strides=(3, -1))),
    ("negative, too large", w.tensor(offset=-1)),
    ("negative, too large", w.tensor(shape=(2, -3))),
    ("negative, too large", w.tensor(shape=(2**62, 1))),
    ("negative, too large", w.tensor(shape=(1,) * 33, strides=(0,) * 33)),
    ("one stride for each axis", w.tensor(strides=(1,))),
    ("larger than any file", w.tensor(shape=(2**31, 2**31, 4), strides=(0, 0, 0))),
    ("larger than any file", w.tensor(shape=(0, 2**61, 2**61), strides=(0, 0, 0))),
    ("1000000000000 values, the last one number 1, but", w.tensor(shape=(10**12,), strides=(0,))),
    ("but its storage 0 has 6", w.tensor(offset=1)),
    ("the last one number 8, but", w.tensor(shape=(2, 2), strides=(6, 1))),
]


@pytest.mark.parametrize(("words", "value"), VALUES)
def test_pickles_that_are_refused(path, words, value):
    refused(path, w.zipped(w.state_dict(a=value)), words)
    # A serial file is compared with its storages before its values are looked at.
    words = f"{words}|its storages are not those|the storage 0 has another size"
    refused(path, w.serial(w.state_dict(a=value)), words)


WHOLE = [
    ("it is a list; expected tensors", b"\x80\x02]."),
    ("it is a Tensor; expected tensors", b"\x80\x02" + w.tensor() + b"."),
    ("stops in the middle", b"\x80\x02}}."),
    ("stops in the middle", b"\x80\x02(}."),
    ("exhausted before seeing STOP", b"\x80\x02}"),
    ("no printable text", b"\x80\x02}(" + w.text("a\nb") + w.tensor() + b"u."),
    ("no printable text of at most", b"\x80\x02}(" + w.text("a" * 501) + w.tensor() + b"u."),
    ("a key is no text; expected tensors", b"\x80\x02}(K\x01" + w.tensor() + b"u."),
    ("no printable text", b"\x80\x02}(N" + w.tensor() + b"u."),
    ("argument 2 is shorter", b"\x80\x02}(" + A + w.tensor() + A + b"u."),
    ("opcode b'.xff' unknown", b"\x80\x02\xff."),
]


@pytest.mark.parametrize(("words", "pickle"), WHOLE)
def test_whole_pickles_that_are_refused(path, words, pickle):
    refused(path, w.zipped(pickle), words)


GOOD = w.state_dict(a=w.tensor())


def edited(data, name, offset, values):
    """The zip with a field of a member's entry in the directory changed."""
    at = data.rindex(b"PK\x01\x02", 0, data.rindex(name.encode())) + offset
    return data[:at] + values + data[at + len(values) :]


def bomb():
    buffer = io.BytesIO(w.zipped(GOOD))
    with zipfile.ZipFile(buffer, "a", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("a/x", bytes(10_000_000))
    return buffer.getvalue()


def deep():
    return b"\x80\x02" + b"]" * 100_000 + b"a" * 99_999 + b"."


CONTAINERS = [
    ("is no zip and has not torch's magic number", b""),
    ("is no zip and has not torch's magic number", b"\x80\x02}."),
    ("compressed or encrypted", w.zipped(GOOD, compression=zipfile.ZIP_DEFLATED)),
    ("'a/data/0' is compressed or encrypted", edited(w.zipped(GOOD), "a/data/0", 8, b"\x01\x00")),
    ("'a/x' is compressed", bomb()),
    ("it has 0 members FOLDER/data.pkl", w.zipped(GOOD).replace(b"data.pkl", b"data.pkk")),
    ("it has 2 members FOLDER/data.pkl", w.zipped(GOOD, more=[("b/data.pkl", GOOD)])),
    ("'a/data/0' is there twice", w.zipped(GOOD, more=[("a/data/0", bytes(24))])),
    ("'../../x' is there twice, or leads out", w.zipped(GOOD, more=[("../../x", b"x")])),
    ("'/etc/passwd' is there twice, or leads out", w.zipped(GOOD, more=[("/etc/passwd", b"x")])),
    ("byte order", w.zipped(GOOD, more=[("a/byteorder", b"big")])),
    ("another checksum", w.zipped(GOOD).replace(bytes(range(24)), bytes(24))),
    ("'a/data.pkl' has more than", w.zipped(GOOD + bytes(2_000_000))),
    (
        "directory has more than",
        w.zipped(GOOD, more=[(f"{'x' * 60000}{i}", b"") for i in range(40)]),
    ),
    (
        "'a/data/0' lies over another",
        edited(w.zipped(GOOD), "a/data/0", 20, struct.pack("<II", 99, 99)),
    ),
    ("is not where the directory says", edited(w.zipped(GOOD), "a/data/0", 42, b"\x00" * 4)),
    ("as torch's.*expected tensors by name", w.zipped(deep())),
    ("its version is not 1001", w.serial(GOOD, version=1000)),
    ("its byte order not little", w.serial(GOOD, system=w.SYSTEM.replace(b"\x88", b"\x89"))),
    ("byte order not little", w.serial(GOOD, system=b"\x80\x02N.")),
    ("not those that the tensors need", w.serial(GOOD, keys=())),
    ("not those that the tensors need", w.serial(GOOD, keys=("0", "0"))),
    ("not those that the tensors need", w.serial(GOOD, keys=("0", "1"))),
    ("the storage 0 has another size", w.serial(GOOD, storages=struct.pack("<Q", 5) + bytes(24))),
    ("or is cut short at", w.serial(GOOD, storages=struct.pack("<Q", 6) + bytes(23))),
    ("unpack requires a buffer", w.serial(GOOD, storages=b"")),
]


@pytest.mark.parametrize(("words", "data"), CONTAINERS)
def test_containers_that_are_refused(path, words, data):
    refused(path, data, words)


def test_a_zip_in_a_zip(path):
    inner = w.zipped(GOOD, root="b")
    data = w.zipped(GOOD, _0=bytes(range(24)), _1=inner)
    assert read(path, data).keys() == {"a"}
    # The directory says that the second storage lies where the inner zip has its own.
    local = data.rindex(b"PK\x03\x04", 0, data.index(b"b/data/0"))
    moved = edited(data, "a/data/1", 42, struct.pack("<I", local))
    refused(path, moved, "not where the directory")
    name = b"a/data/1"
    moved = moved[: local + 30] + name + moved[local + 30 + len(name) :]
    refused(path, moved, "lies over another")


# Programs of a tenth of the length that is allowed at most.
PROGRAMS = {
    "lists in lists": b"]q\x00"
    + b"".join(b"]q%c(" % (n + 1) + b"h%c" % n * 100 + b"e" for n in range(250)),
    "dictionaries": b"(" + b"}" * 190_000 + b"t",
    "tensors": b"("
    + w.tensor()[:-1]
    + b"q\x00R"
    + w.REBUILD
    + b"q\x01"
    + b"h\x01h\x00R" * 38_000
    + b"t",
    "marks": b"(" * 190_000,
    "one name": b"ctorch\nFloatStorage\nq\x00(" + b"h\x00" * 90_000 + b"t",
    "long texts": w.text("a" * 100_000) + b"q\x00(" + b"h\x00" * 50_000 + b"t",
}


@pytest.mark.parametrize("name", PROGRAMS)
def test_bombs_take_little_memory_and_time(path, name):
    data = w.zipped(b"\x80\x02" + PROGRAMS[name] + b".")
    assert len(data) < 220_000
    start = time.process_time()
    tracemalloc.start()
    try:
        refused(path, data, "cannot be read as torch's")
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 40e6
    assert time.process_time() - start < 10


def golden(kind):
    return (GOLDEN / f"torch_{kind}.bin").read_bytes()


@pytest.mark.parametrize("kind", ["zip", "serial"])
def test_cut_at_every_byte(path, kind):
    whole = golden(kind)
    for size in range(0, len(whole), 3):
        with pytest.raises(errors.UserError):
            read(path, whole[:size])


@strategies.composite
def damaged(draw, data):
    """Bytes with a few places changed, taken out or put in."""
    data = bytearray(data)
    for _ in range(draw(strategies.integers(1, 3))):
        at = draw(strategies.integers(0, len(data)))
        length = draw(strategies.integers(0, 9))
        data[at : at + length] = draw(strategies.binary(max_size=9))
    return bytes(data)


PATIENT = hypothesis.settings(
    max_examples=150,
    deadline=2000,
    suppress_health_check=[hypothesis.HealthCheck.function_scoped_fixture],
    derandomize=True,
)


@PATIENT
@hypothesis.given(data=damaged(golden("zip")))
def test_a_damaged_zip_gives_the_same_tensors_or_one_line(path, data):
    good = read(path, golden("zip"))
    with contextlib.suppress(errors.UserError):
        assert read(path, data) == good


@PATIENT
@hypothesis.given(data=damaged(golden("serial")))
def test_a_damaged_serial_file_gives_tensors_or_one_line(path, data):
    with contextlib.suppress(errors.UserError):
        for shape, dtype, values in read(path, data).values():
            assert len(values) == np.prod(shape) * dtype.itemsize <= len(data)


@PATIENT
@hypothesis.given(pickle=damaged(GOOD), write=strategies.sampled_from([w.zipped, w.serial]))
def test_a_damaged_pickle_gives_tensors_or_one_line(path, pickle, write):
    with contextlib.suppress(errors.UserError):
        for shape, dtype, values in read(path, write(pickle)).values():
            assert len(values) == np.prod(shape) * dtype.itemsize <= 24


def test_other_pickles_are_not_opened(tmp_path):
    for name in ("weights.pkl", "weights.pickle", "weights.ckpt"):
        (tmp_path / name).write_bytes(w.zipped(GOOD))
        with pytest.raises(errors.UserError, match=f"{name} is a pickle"):
            formats.detect(tmp_path / name)
