"""PEFT folders without torch: round trips, formulas, and what is refused."""

import pytest

from moe_peft.convert import peft

NAMES = ("lora", "qv", "ia3", "poly", "mhr4", "mhr8")
CASES = [(name, "t5_1_1") for name in NAMES]
CASES += [("ia3", "t5_1_0"), ("poly", "t5_1_0"), ("lora", "scanned"), ("mhr4", "scanned")]
CASES += [("ia3", "scanned")]


@pytest.mark.parametrize(("name", "layout"), CASES)
def test_round_trip_is_bit_exact(toy, name, layout, tmp_path):
    saved = toy.trained(toy.METHODS[name](), layout)
    peft.write(saved, tmp_path / "a", "toy")
    back = peft.read(tmp_path / "a")
    assert toy.same(back.trainable, saved.trainable)
    assert (back.step, back.description) == (saved.step, saved.description)
    gap = peft.gap(saved, tmp_path / "a")
    assert gap.largest < 1e-5 * gap.scale
    other = toy.trained(toy.METHODS[name](), layout, seed=1)
    assert peft.gap(other, tmp_path / "a").largest > 1e-2
