import ctypes
import subprocess
import sys

import jax
import pytest

from moe_peft import host_memory

# Three calls of a program with 400 MB of temporaries; prints the page faults of the last one.
PROGRAM = """
import resource
import jax, jax.numpy as jnp
from moe_peft import host_memory

if {inline}:
    host_memory.run_programs_inline()
program = jax.jit(lambda x: jnp.outer(x, x) @ x)
vector = jnp.arange(10_000.0)
if {keep}:
    assert host_memory.keep()
for _ in range(3):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    jax.block_until_ready(program(vector))
    faults = resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
print(faults)
"""


def _is_glibc():
    return sys.platform.startswith("linux") and hasattr(ctypes.CDLL(None), "mallopt")


def _faults(*, inline, keep):
    program = PROGRAM.format(inline=inline, keep=keep)
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return int(done.stdout)


@pytest.mark.skipif(not _is_glibc(), reason="only glibc's memory can be kept")
def test_later_calls_work_in_the_memory_of_the_first():
    assert _faults(inline=True, keep=True) * 20 < _faults(inline=False, keep=False)


@pytest.mark.parametrize(("backend", "platform"), [("gpu", "linux"), ("cpu", "darwin")])
def test_elsewhere_nothing_changes(monkeypatch, backend, platform):
    monkeypatch.setattr(jax, "default_backend", lambda: backend)
    monkeypatch.setattr(sys, "platform", platform)
    monkeypatch.setattr(ctypes, "CDLL", None)  # Not even looked at.
    assert not host_memory.keep()
