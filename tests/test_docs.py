"""What the documents show is what is there."""

import doctest
import importlib.util
import pathlib

DOCS = pathlib.Path(__file__).parents[1] / "docs"


def test_the_picture_of_the_rooms_is_of_today():
    spec = importlib.util.spec_from_file_location("draw_rooms", DOCS / "draw_rooms.py")
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    shown = (DOCS / "rooms.svg").read_text()
    assert script.arrows(script.rooms()).replace(">", "&gt;") in shown, (
        "The imports between rooms changed: run python docs/draw_rooms.py"
    )
    map_of_rooms = (DOCS / "implementation.md").read_text()
    missing = [room for room in script.rooms() if f"**{room}" not in map_of_rooms]
    assert missing == ["narrow_matmul"]  # in the paragraph of errors


def test_the_loop_of_ones_own_runs():
    found = doctest.testfile(str(DOCS / "python.md"), module_relative=False)
    assert (found.failed, found.attempted > 15) == (0, True)
