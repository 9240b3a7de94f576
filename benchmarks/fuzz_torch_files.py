"""Opens damaged and hostile files of torch, as many as you like, and counts what comes of them.

    python benchmarks/fuzz_torch_files.py --inputs 1000000

Every input is one of the golden files with damage of one of three kinds: bytes of the file; bytes
of its pickle, in a zip or a serial file that is sound otherwise; or another pickle of random
instructions in its place. All tensors are read. An input passes if it is refused with a UserError
of one line, or read; from damaged bytes of a zip only the very same tensors may be read. Anything
else ends the run with the number of the input: another exception, an import, a program that is run,
another file that is opened, more than a second, or a gigabyte of memory. An input depends on its
number alone.
"""

import argparse
import collections
import io
import pathlib
import pickletools
import random
import resource
import sys
import tempfile
import time
import zipfile

from etils import epath

from moe_peft import errors
from moe_peft.weights import torch_files

GOLDEN = pathlib.Path(__file__).parents[1] / "tests" / "golden"
ZIP = (GOLDEN / "torch_zip.bin").read_bytes()
SERIAL = (GOLDEN / "torch_serial.bin").read_bytes()
MEMBERS = {
    name: zipfile.ZipFile(io.BytesIO(ZIP)).read(name)
    for name in zipfile.ZipFile(io.BytesIO(ZIP)).namelist()
}
PICKLED = next(name for name in MEMBERS if name.endswith("/data.pkl"))
NAMES = (
    *(b"os\nsystem", b"builtins\neval", b"torch._utils\nx.y", b"collections\nOrderedDict"),
    *(b"torch._utils\n_rebuild_tensor_v2", b"torch._utils\n_rebuild_tensor_v3"),
    *(b"torch._utils\n_rebuild_parameter", b"torch\nFloatStorage", b"torch\nuint16"),
    *(b"torch.storage\nUntypedStorage", b"\\x6fs\nsystem", b"\\z\n\\z"),
)
NUMBERS = (0, 1, 2, 3, 4, 7, 8, 255, 2**16, 2**31 - 1, 2**31, 2**32 - 1, 2**62, 2**63, 2**64 - 1)
EVENTS = ("import", "exec", "compile", "os.", "subprocess.", "pickle.", "socket.", "marshal.")
SECONDS, BYTES = 1.0, 1e9

_watched = []  # the file that may be opened, while one is
_events = []


def _hook(event, arguments):
    if not _watched:
        return
    if event.startswith(EVENTS) and event not in ("os.listdir", "os.scandir"):
        _events.append((event, str(arguments)[:200]))
    if event == "open" and str(arguments[0]) != _watched[0]:
        _events.append((event, str(arguments)[:200]))


def serial_pickle():
    """Returns where the tensors' pickle starts and ends in the serial file."""
    file, ends = io.BytesIO(SERIAL), []
    for _ in range(4):
        collections.deque(pickletools.genops(file), maxlen=0)
        ends.append(file.tell())
    return ends[2:]


START, END = serial_pickle()


def damaged(rng, data):
    """Returns the bytes with one to four places changed, cut, doubled or filled."""
    data = bytearray(data)
    for _ in range(rng.randint(1, 4)):
        at, length = rng.randrange(len(data) + 1), rng.choice((1, 1, 2, 4, 8, 40))
        kind = rng.randrange(7)
        if kind == 0:
            data[at : at + 1] = bytes([rng.randrange(256)])
        elif kind == 1 and at < len(data):
            data[at] ^= 1 << rng.randrange(8)
        elif kind == 2:
            del data[at : at + length]
        elif kind == 3:
            data[at:at] = data[at : at + length] * rng.choice((1, 2, 100))
        elif kind == 4:
            number = rng.choice(NUMBERS).to_bytes(8, "little")[: rng.choice((1, 2, 4, 8))]
            data[at : at + len(number)] = number
        elif kind == 5:
            data[at:at] = instruction(rng)
        elif rng.random() < 0.3:
            del data[at:]
    return bytes(data)


def instruction(rng):
    """Returns one instruction of a pickle, often one that means something to the reader."""
    number = rng.choice(NUMBERS).to_bytes(8, "little")
    kind = rng.randrange(10)
    if kind == 0:
        return b"c" + rng.choice(NAMES) + b"\n"
    if kind == 1:
        text = rng.choice((b"0", b"storage", b"cpu", b"a", b"_metadata", b"\xed\xa0\x80", b"\n"))
        return b"X" + len(text).to_bytes(4, "little") + text
    if kind == 2:
        return rng.choice((b"K", b"q", b"h")) + bytes([rng.randrange(12)])
    if kind == 3:
        return b"\x8a\x08" + number
    if kind == 4:
        return rng.choice((b"J", b"j", b"r", b"X", b"T", b"B", b"\x8b")) + number[:4]
    if kind == 5:
        return rng.choice((b"\x8d", b"\x8e", b"\x95", b"\x96", b"G")) + number
    if kind == 6:
        return bytes([rng.randrange(256)])
    return bytes([rng.choice(b"()]}tuesRQb\x85\x86\x87\x88\x89N\x93\x942.0o\x81i")])


def around(rng, pickled):
    """Returns a file with another pickle in place of the tensors'."""
    if rng.random() < 0.5:
        return SERIAL[:START] + pickled + SERIAL[END:]
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name, data in (MEMBERS | {PICKLED: pickled}).items():
            archive.writestr(name, data)
    return buffer.getvalue()


def make(number):
    """Returns the kind of an input and its bytes."""
    rng = random.Random(number)
    kind = ("zip", "serial", "pickle", "program")[number % 4]
    if kind in ("zip", "serial"):
        return kind, damaged(rng, ZIP if kind == "zip" else SERIAL)
    if kind == "pickle":
        return kind, around(rng, damaged(rng, MEMBERS[PICKLED]))
    body = b"".join(instruction(rng) for _ in range(rng.randint(1, 40)))
    return kind, around(rng, b"\x80\x02" + body + b".")


def read(path):
    """Returns the bytes, shapes and dtypes of all tensors of a file."""
    found = torch_files.open_file(path)
    return {key: (one.shape, one.dtype, one.read().tobytes()) for key, one in found.items()}


def main():
    """Opens every input; exits with 1 at the first that does not pass."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--inputs", type=int, default=100_000)
    parser.add_argument("--first", type=int, default=0, help="number of the first input")
    args = parser.parse_args()
    counts, slowest, begun = collections.Counter(), 0.0, time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        path = epath.Path(folder) / "model.bin"
        path.write_bytes(ZIP)
        good = read(path)
        for codec in ("cp437", "raw_unicode_escape", "unicode_escape"):
            "".encode(codec)  # zipfile's and pickletools', imported at their first use
        sys.addaudithook(_hook)
        memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        for number in range(args.first, args.first + args.inputs):
            kind, data = make(number)
            with open(path, "wb") as file:
                file.write(data)
            start, problem = time.perf_counter(), None
            _watched.append(str(path))
            try:
                found = read(path)
                outcome = "read, the same" if found == good else "read, another"
                if found != good and kind == "zip":
                    problem = "other tensors were read from a damaged zip"
            except errors.UserError as error:
                outcome = "refused"
                if "\n" in str(error) or not str(error).startswith(str(path)):
                    problem = f"the message is not one line that begins with the file: {error}"
            except BaseException as error:
                problem = f"{type(error).__name__}: {error}"
            _watched.clear()
            seconds = time.perf_counter() - start
            slowest = max(slowest, seconds)
            grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - memory
            if _events or seconds > SECONDS or grown * 1024 > BYTES:
                problem = problem or f"{_events}, {seconds:.2f} s, {grown / 1e6:.2f} GB more"
            if problem:
                sys.exit(f"Input {number} ({kind}, {len(data)} bytes): {problem}")
            counts[kind, outcome] += 1
    seconds = time.perf_counter() - begun
    for (kind, outcome), count in sorted(counts.items()):
        print(f"{kind:8} {outcome:15} {count:9,}")
    print(f"{args.inputs:,} inputs in {seconds:.0f} s, {args.inputs / seconds:.0f} a second;")
    print(f"slowest {slowest * 1000:.0f} ms, {grown / 1e3:.0f} MB more memory than before.")


if __name__ == "__main__":
    main()
