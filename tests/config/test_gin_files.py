"""gin files are found, read and checked; a mistake is one line saying where and what to try."""

from collections.abc import Sequence
import dataclasses

import gin
import pytest

from moe_peft import errors
from moe_peft.cli import main
from moe_peft.config import checks, gin_files


@gin.configurable(module="toys")
@dataclasses.dataclass(frozen=True)
class Wheel:
    spokes: int
    radius: float = 0.5
    kind: str | None = None
    sizes: tuple[int, ...] = ()
    lengths: dict[str, int] | None = None
    names: Sequence[str] = ()


@gin.configurable(module="toys")
def cart(wheel: Wheel, load=gin.REQUIRED, hitch=None):
    return wheel, load, hitch


@gin.configurable(module="toys")
def horse(legs: int = 4):
    return legs


@gin.configurable(module="toys")
def unused_ride(speed: int = 1):
    return speed


@pytest.fixture(autouse=True)
def _clean_gin():
    yield
    gin.clear_config()


def read(tmp_path, text, bindings=(), root="toys.cart", **kwargs):
    (tmp_path / "a.gin").write_text(text)
    config = gin_files.load([str(tmp_path / "a.gin")], bindings, **kwargs)
    checks.check(config, root, ["toys.unused_ride"])
    return config


GOOD = """
LOAD = 3
SPOKES = 12
toys.cart:
  wheel = @toys.Wheel()
  load = %LOAD
toys.Wheel.spokes = %SPOKES
toys.Wheel.radius = 1
"""


def test_good_file_runs(tmp_path):
    read(tmp_path, GOOD)
    wheel, load, hitch = cart()
    assert (wheel.spokes, wheel.radius, load, hitch) == (12, 1, 3, None)


def test_binding_wins_over_file_and_bare_words_are_strings(tmp_path):
    read(tmp_path, GOOD, ["LOAD=/some/where-1.txt", "Wheel.kind=oak", "SPOKES=14"])
    wheel, load, _ = cart()
    assert (load, wheel.kind, wheel.spokes) == ("/some/where-1.txt", "oak", 14)


def test_later_file_replaces_a_method_without_leftover_complaints(tmp_path):
    (tmp_path / "b.gin").write_text("toys.cart.hitch = @toys.unused_ride")
    (tmp_path / "a.gin").write_text(GOOD + "toys.cart.hitch = @toys.horse()\nhorse.legs = 3")
    config = gin_files.load([str(tmp_path / "a.gin"), str(tmp_path / "b.gin")])
    checks.check(config, "toys.cart")


def test_include_and_resolved_text_can_be_read_again(tmp_path):
    (tmp_path / "base.gin").write_text(GOOD)
    read(tmp_path, "include 'base.gin'\nLOAD = 4", search_paths=[str(tmp_path)])
    text = gin_files.resolved_text()
    read(tmp_path, text)
    assert cart()[1] == 4


MISTAKES = {
    "macro misspelt on the command line": (GOOD, "LOD=3", "LOD.*Did you mean 'LOAD'"),
    "macro undefined": (
        GOOD.replace("LOAD = 3", ""),
        None,
        "LOAD has no value, and cart.load needs one",
    ),
    "macro left to be set": (GOOD, "LOAD=%gin.REQUIRED", "LOAD has no value, and cart.load"),
    "parameter left to be set": (GOOD, "cart.load=%gin.REQUIRED", "cart.load is required"),
    "macro of a macro": (GOOD + "SPOKES = %HUB", None, "HUB has no value, and SPOKES needs one"),
    "macro that is itself": (GOOD + "SPOKES = %SPOKES", None, "SPOKES refers to itself"),
    "configurable misspelt": (
        GOOD + "toys.Weel.spokes = 1",
        None,
        r"a.gin:9: .*Did you mean.*Wheel",
    ),
    "parameter misspelt": (
        GOOD + "Wheel.spoke = 1",
        None,
        "a.gin:9: .*'spoke'.*Did you mean 'spokes'",
    ),
    "reference misspelt": (
        GOOD + "toys.cart.hitch = @toys.hors()",
        None,
        "a.gin:9: .*'toys.hors'.*Did you mean.*horse",
    ),
    "required by gin.REQUIRED": (
        GOOD.replace("  load = %LOAD\n", ""),
        None,
        "cart.load is required",
    ),
    "required by signature": (
        "cart.load = 1\ncart.wheel = @toys.Wheel()",
        None,
        "Wheel.spokes is required",
    ),
    "string for an int": (
        GOOD,
        "SPOKES=ten",
        r"--gin.SPOKES=ten: Wheel.spokes takes int, got 'ten'",
    ),
    "bool for an int": (GOOD, "SPOKES=True", "takes int, got True"),
    "float for an int": (GOOD, "SPOKES=1e3", "takes int, got 1000.0"),
    "string for a float": (GOOD, "Wheel.radius=wide", "takes float, got 'wide'"),
    "str for a sequence": (GOOD, "Wheel.names=oak", r"takes Sequence\[str\], got 'oak'"),
    "last item of many": (GOOD, "Wheel.sizes=(1, 2, 3, 4, 5, 6, 7, 8, 9, 'b')", "takes tuple"),
    "bool for a float": (GOOD, "Wheel.radius=True", "takes float, got True"),
    "int for a string": (GOOD, "Wheel.kind=3", "takes str or None, got 3"),
    "wrong item of a tuple": (GOOD, "Wheel.sizes=(1, 'b')", r"takes tuple\[int, \.\.\.\]"),
    "wrong item of a dict": (GOOD, "Wheel.lengths={'a': 'b'}", "takes dict"),
    "name instead of a reference": (
        GOOD,
        "cart.wheel='Wheel'",
        r"as in @Wheel\(\), without quotes",
    ),
    "unused binding": (GOOD + "horse.legs = 3", None, r"nothing in this run reads it: horse.legs"),
    "unused macro": (GOOD + "NOTHING = 3", None, r"NOTHING \(.*a.gin:9\)"),
    "not gin": (GOOD + "this is not gin", None, "a.gin:9: not gin syntax"),
    "binding without value": (GOOD, "LOAD", "expected --gin.NAME=VALUE"),
    "binding that is not gin": (GOOD, "LOAD=a b", "Strings need quotes"),
    "missing include": ("include 'modls/x.gin'", None, "no gin file 'modls/x.gin'"),
    "missing module": (
        "import moe_peft.nowhere",
        None,
        "a.gin:1: cannot import moe_peft.nowhere: there is no module 'moe_peft.nowhere'.",
    ),
}


def test_references_and_whole_numbers_pass_for_what_they_may_become(tmp_path):
    text = GOOD + "toys.Wheel.sizes = (1, @toys.horse())\ntoys.Wheel.names = ('a', %SPOKES)"
    read(tmp_path, text.replace("SPOKES = 12", "SPOKES = @toys.horse()"))
    assert cart()[0].sizes == (1, 4)
    assert cart()[0].radius == 1


@pytest.mark.parametrize("name", MISTAKES)
def test_mistake_is_one_clear_line(name, tmp_path):
    text, binding, message = MISTAKES[name]
    with pytest.raises(errors.UserError, match=message) as caught:
        read(tmp_path, text, [binding] if binding else [])
    assert "\n" not in str(caught.value)


def test_missing_file_offers_near_names():
    (tmp := gin_files.packaged_folder() / "methods").is_dir() or pytest.skip("no methods yet")
    name = next(tmp.glob("*.gin")).name
    with pytest.raises(errors.UserError, match=f"Did you mean .*'methods/{name}'"):
        gin_files.load([f"method/{name}"])


def test_agreed_macro_may_be_set_in_a_file_but_not_in_vain_by_hand(tmp_path):
    read(tmp_path, GOOD + "BATCH_SIZE = 3")
    with pytest.raises(errors.UserError, match="reads it: BATCH_SIZE"):
        read(tmp_path, GOOD + "BATCH_SIZE = 3", ["BATCH_SIZE=3"])


def test_what_only_another_command_needs_may_be_missing(tmp_path):
    read(tmp_path, GOOD + "toys.unused_ride.speed = %SPEED")
    with pytest.raises(errors.UserError, match="SPEED has no value"):
        read(tmp_path, GOOD + "toys.unused_ride.speed = %SPEED", root="toys.unused_ride")


def test_include_cycle_is_an_error(tmp_path):
    (tmp_path / "a.gin").write_text(f"include '{tmp_path}/a.gin'")
    with pytest.raises(errors.UserError, match="includes itself"):
        gin_files.load([str(tmp_path / "a.gin")])


def test_resolved_scopes_are_followed(tmp_path):
    text = GOOD + "toys.cart.hitch = @big/toys.Wheel()\nbig/toys.Wheel.spokes = 20"
    read(tmp_path, text)
    assert cart()[2].spokes == 20
    with pytest.raises(errors.UserError, match="reads it: bigg/Wheel.spokes"):
        read(tmp_path, text + "\nbigg/toys.Wheel.spokes = 20")


def test_resolved_text_runs_again_after_a_method_was_replaced(tmp_path):
    """What a later file made obsolete is not written: by itself nothing would read it."""
    files = ["experiments/cldr/mov.gin", "methods/poly.gin", "optimizers/adafactor_mhr.gin"]
    main.configure("train", files, ["MODEL_DIR='x'"])
    text = gin_files.resolved_text()
    assert "mov.num_experts" not in text
    assert "adamw." not in text
    assert "poly.num_skills = 8" in text
    again = tmp_path / "config.gin"
    again.write_text(text)
    gin.clear_config()
    main.configure("train", [str(again)])
    assert gin_files.resolved_text() == text
