"""What adapts and trains a model imports without TensorFlow."""

import subprocess
import sys

import pytest

PROGRAM = """
import importlib, sys
for name in sys.argv[1:]:
    importlib.import_module(name)
loaded = sorted(m for m in ("tensorflow", "seqio", "torch", "t5x") if m in sys.modules)
sys.exit(f"imported {loaded}" if loaded else 0)
"""


def test_core_imports_without_tensorflow():
    modules = [
        "moe_peft.adapters",
        "moe_peft.routing",
        "moe_peft.patching",
        "moe_peft.methods",
        "moe_peft.models.t5",
        "moe_peft.partitioning",
        "moe_peft.training.step",
    ]
    run = subprocess.run(
        [sys.executable, "-c", PROGRAM, *modules], capture_output=True, text=True, check=False
    )
    assert run.returncode == 0, run.stderr[-2000:]


@pytest.mark.parametrize("name", ["tensorflow"])
def test_the_check_above_can_fail(name):
    run = subprocess.run(
        [sys.executable, "-c", "import sys; sys.modules['tensorflow'] = sys\n" + PROGRAM],
        capture_output=True,
        text=True,
        check=False,
    )
    assert f"imported ['{name}']" in run.stderr
