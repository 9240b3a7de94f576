"""Names of hardware that programs are compiled for."""

import subprocess
import sys

import pytest

from moe_peft import errors
from moe_peft.preflight import hardware


@pytest.mark.parametrize(
    ("name", "chip", "count", "shape"),
    [
        ("v5e:4x4", "v5e", 16, "4x4"),
        ("v5e-256", "v5e", 256, "16x16"),
        ("v4-256", "v4", 256, "4x8x8"),
        ("v5p:2x2x4", "v5p", 16, "2x2x4"),
        ("h100:8", "h100", 8, ""),
    ],
)
def test_names(name, chip, count, shape):
    found = hardware.find_target(name)
    assert (found.chip.name, found.count, found.shape) == (chip, count, shape)


def test_several_slices():
    found = hardware.find_target("v5e:4x4", slices=2)
    assert (found.count, found.slices) == (32, 2)
    for name, slices in (("h100:8", 2), ("v5e:4x4", 0)):
        with pytest.raises(errors.UserError, match="expected a number of slices of TPUs"):
            hardware.find_target(name, slices)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("v5e", "expected a chip and its topology"),
        ("v5x:4x4", "Did you mean"),
        ("v5e-12", "slices of v5e have 1, 4, 8, 16"),
        ("h100:2x4", "expected a number"),
    ],
)
def test_names_of_nothing(name, message):
    with pytest.raises(errors.UserError, match=message):
        hardware.find_target(name)


def test_what_is_set_already_stays():
    environ = {"JAX_PLATFORMS": "tpu"}
    hardware.without_devices(environ)
    assert environ["JAX_PLATFORMS"] == "tpu"
    assert environ["TPU_SKIP_MDS_QUERY"] == "1"


def test_it_comes_before_jax():
    code = "import sys; from moe_peft.preflight import hardware; sys.exit('jax' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
