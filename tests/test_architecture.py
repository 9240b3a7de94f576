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
    *("preflight", "reports", "adaptation", "experiments", "api", "cli", "__main__"),
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


# Size

# Of the package and its tasks: 26,500 before own data, the Python API, adapter folders, boards, the
# reader of pickled weights, relatives of T5, their special ids, tokenizers, and adapters of PEFT.
MOST_LINES = 31_800
MOST_LINES_OF_A_FILE = 300
MOST_LINES_OF_A_FUNCTION = 60
LONG: dict[str, str] = {}  # a file, or "file: function", and the reason why it is longer


def functions(source: str) -> dict[str, int]:
    """Lines of every function of a source, decorators, signature and docstring included."""
    kinds = (ast.FunctionDef, ast.AsyncFunctionDef)
    found = [node for node in ast.walk(ast.parse(source)) if isinstance(node, kinds)]
    return {node.name: node.end_lineno - node.lineno + 1 for node in found}


def too_long(files: dict[str, str]) -> list[str]:
    """Files and functions over their limits, "name: lines"."""
    lines = {name: text.count("\n") for name, text in files.items()}
    found = [(name, n) for name, n in lines.items() if n > MOST_LINES_OF_A_FILE]
    for name, text in files.items():
        for function, n in functions(text).items():
            if n > MOST_LINES_OF_A_FUNCTION:
                found.append((f"{name}: {function}", n))
    return sorted(f"{name} has {n} lines" for name, n in found if name not in LONG)


def sources() -> dict[str, str]:
    """The text of every module, by path."""
    return {str(path.relative_to(ROOT)): path.read_text() for path in modules().values()}


def test_files_and_functions_are_short():
    assert len(sources()) > 150
    assert not too_long(sources())
    assert all(name.partition(":")[0] in sources() for name in LONG), "an exception for nothing"


def test_the_package_stays_small():
    assert 20_000 < sum(text.count("\n") for text in sources().values()) <= MOST_LINES


def test_a_long_function_and_a_long_file_are_found():
    body = "def f():\n" + "    x = 1\n" * 60
    assert too_long({"a.py": body}) == ["a.py: f has 61 lines"]
    assert too_long({"a.py": "x = 1\n" * 301}) == ["a.py has 301 lines"]
