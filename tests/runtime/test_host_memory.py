import ctypes
import subprocess
import sys

import jax
import pytest

from moe_peft.runtime import host_memory

KEEP = host_memory.keep  # Other tests do without: see conftest.py.

# Calls of a program with 144 MB of temporaries; prints the fewest page faults of a later call, and
# the most memory ever held, in kB.
PROGRAM = """
import resource
import jax, jax.numpy as jnp
from moe_peft.runtime import host_memory

usage = lambda: resource.getrusage(resource.RUSAGE_SELF)
if {is_kept}:
    host_memory.run_programs_inline()
program = jax.jit(lambda x: jnp.outer(x, x) @ x)
vector = jnp.arange(6_000.0)
memory = host_memory.Kept() if {is_kept} else None
faults = []
for _ in range(12):
    before = usage().ru_minflt
    jax.block_until_ready(program(vector))
    faults.append(usage().ru_minflt - before)
    if memory:
        memory.after_step()
print(min(faults[1:]), usage().ru_maxrss)
"""


def _is_glibc():
    return sys.platform.startswith("linux") and hasattr(ctypes.CDLL(None), "mallopt")


def _measured(is_kept):
    program = PROGRAM.format(is_kept=is_kept)
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return map(int, done.stdout.split())


@pytest.mark.skipif(not _is_glibc(), reason="only glibc's memory can be kept")
def test_later_steps_work_in_the_memory_of_earlier_ones_and_hold_no_more():
    faults, held = _measured(is_kept=True)
    usual_faults, usually_held = _measured(is_kept=False)
    assert faults * 20 < usual_faults
    assert held < 1.4 * usually_held


@pytest.mark.parametrize(("backend", "platform"), [("gpu", "linux"), ("cpu", "darwin")])
def test_elsewhere_nothing_changes(monkeypatch, backend, platform):
    monkeypatch.setattr(jax, "default_backend", lambda: backend)
    monkeypatch.setattr(sys, "platform", platform)
    monkeypatch.setattr(ctypes, "CDLL", None)  # Not even looked at.
    assert not KEEP()
