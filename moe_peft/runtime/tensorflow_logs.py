"""Keeps start-up notes of TensorFlow and libtpu off the terminal: one line stays one line."""

from collections.abc import Iterator, MutableMapping
import contextlib
import os
import re
import sys
import tempfile

# Written by C++ code straight to file descriptor 2, whatever the log level in the environment.
_NOISE = re.compile(
    r"WARNING: All log messages before absl::InitializeLog\(\)|"
    r"[IW]\d{4} .*\b(port|cudart_stub|cuda_executor|cpu_feature_guard|computation_placer)\.cc:\d+\]"
    r"|To enable the following instructions: .* in other operations, rebuild TensorFlow"
)


@contextlib.contextmanager
def silenced() -> Iterator[None]:
    """Drops TensorFlow's start-up lines from standard error; every other line comes out after."""
    sys.stderr.flush()
    try:
        saved = os.dup(2)
    except OSError:  # there is no standard error
        yield
        return
    with tempfile.TemporaryFile() as file:
        os.dup2(file.fileno(), 2)
        try:
            yield
        finally:
            sys.stderr.flush()
            os.dup2(saved, 2)
            os.close(saved)
            file.seek(0)
            for line in file.read().decode(errors="replace").splitlines():
                if not _NOISE.match(line):
                    os.write(2, line.encode() + b"\n")


def answer_libtpu(environ: MutableMapping[str, str]) -> None:
    """Tells libtpu, where there is no TPU, what it would ask a TPU's machine for and complain."""
    environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")
    environ.setdefault("TPU_ACCELERATOR_TYPE", "v5litepod-16")
