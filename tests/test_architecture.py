"""Every import runs down: between the rooms of `FLOORS`, and never in a circle between files.

Imports are read from the source: those inside functions and under TYPE_CHECKING count, and so do
strings that name a module.
"""

import ast
import functools
import graphlib
import pathlib
import re

import pytest

ROOT = pathlib.Path(__file__).parents[1]

NAME = r"moe_peft(\.\w+)+"  # a string of this form names a module

# From the ground up. A room may import those before it and itself.
FLOORS = (
    *("errors", "narrow_matmul"),
    *("runtime", "routing", "config", "patching", "adapters", "partitioning", "methods", "models"),
    *("weights", "data", "training", "evaluation", "t5x", "convert", "tasks"),
    *("preflight", "reports", "adaptation", "experiments", "cli", "__main__"),
)


@functools.cache
def modules() -> dict[str, pathlib.Path]:
    """All modules of the package by name; a package is its `__init__.py`."""
    found = {}
    for folder, package in (("moe_peft", "moe_peft"), ("tasks", "moe_peft.tasks")):
        for path in (ROOT / folder).rglob("*.py"):
            parts = path.relative_to(ROOT / folder).with_suffix("").parts
            if path.is_relative_to(ROOT / "moe_peft" / "tasks"):
                continue  # a link to tasks/
            found[".".join((package, *parts)).removesuffix(".__init__")] = path
    return found


def imports(name: str, source: str) -> set[str]:
    """Modules of the package that a module imports, at once or later."""
    named = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            named |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            named |= {f"{node.module}.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.Constant) and re.fullmatch(NAME, str(node.value)):
            named.add(node.value)
    return {found for each in named if (found := _module(each)) not in (None, "moe_peft", name)}


def _module(name: str) -> str | None:
    """The longest beginning of a dotted name that is a module."""
    while name and name not in modules():
        name = name.rpartition(".")[0]
    return name or None


@functools.cache
def graph() -> dict[str, set[str]]:
    """Every module with what it imports."""
    return {name: imports(name, path.read_text()) for name, path in modules().items()}


def room(name: str) -> str:
    """The top folder, or file, that a module lies in."""
    return name.split(".")[1]


def climbing(edges: dict[str, set[str]]) -> list[str]:
    """Imports between rooms that do not run down, as "importer -> imported"."""
    floor = {name: number for number, name in enumerate(FLOORS)}
    return sorted(
        f"{importer} -> {imported}"
        for importer, found in edges.items()
        for imported in found
        if importer != "moe_peft"
        and room(importer) != room(imported)
        and floor[room(importer)] <= floor[room(imported)]
    )


def circle(edges: dict[str, set[str]]) -> list[str]:
    """The modules of one circle, or none."""
    try:
        graphlib.TopologicalSorter(edges).prepare()
    except graphlib.CycleError as error:
        return error.args[1]
    return []


def test_every_room_has_a_floor():
    rooms = {room(name) for name in modules() if name != "moe_peft"}
    assert rooms == set(FLOORS) & rooms, f"rooms without a floor: {sorted(rooms - set(FLOORS))}"
    assert set(FLOORS) == rooms, f"floors without a room: {sorted(set(FLOORS) - rooms)}"


def test_imports_run_down():
    assert len(graph()) > 150
    assert sum(map(len, graph().values())) > 500
    found = climbing(graph())
    assert not found, f"{len(found)} imports climb:\n" + "\n".join(found)


def test_no_circle():
    assert not circle(graph())


@pytest.mark.parametrize(
    "line",
    [
        "from moe_peft.training import train",
        "from moe_peft.training.train import train",
        "import moe_peft.training.train",
        "def f():\n    from moe_peft.training import train",
        "LATER = 'moe_peft.training.train'",
    ],
)
def test_the_tests_above_can_fail(line):
    edges = dict(graph())
    edges["moe_peft.errors"] = imports("moe_peft.errors", line)
    assert climbing(edges) == ["moe_peft.errors -> moe_peft.training.train"]
    assert "moe_peft.errors" in circle(edges)
