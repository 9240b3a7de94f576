"""The official files: `tasks/<name>.json` and `splits/default/{train,test}_tasks.txt`.

Format: allenai/natural-instructions, tasks/README.md. `Definition` is a list of texts (a plain text
in old versions), `Positive Examples` and `Negative Examples` hold one answer each, `Instances` hold
a list of accepted answers.
"""

from collections.abc import Mapping
import dataclasses
import functools
import importlib.resources
import json
import pathlib
from typing import Any

from moe_peft import errors
from moe_peft.data import bad_rows, cells


@dataclasses.dataclass(frozen=True)
class Demonstration:
    """An example that a prompt may show, with one answer."""

    input: str
    output: str
    explanation: str


@dataclasses.dataclass(frozen=True)
class Instance:
    """A question with every accepted answer, at least one."""

    input: str
    outputs: tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class TaskFile:
    """What a task file says, as far as prompts need it."""

    name: str
    definition: str
    positive: tuple[Demonstration, ...]
    negative: tuple[Demonstration, ...]
    instances: tuple[Instance, ...]


@dataclasses.dataclass(frozen=True)
class Listed:
    """A line of our table of the official lists (756 training tasks, 119 test tasks)."""

    name: str  # without `.json`
    sets: frozenset[str]  # "train" or "test", and "mhr" or "poly_s" for test tasks of those papers
    category: str  # one of SuperNI's
    num_instances: int  # as published


@functools.cache
def table() -> Mapping[str, Listed]:
    """The official training and test tasks by name."""
    text = (importlib.resources.files(__package__) / "tasks.tsv").read_text(encoding="utf-8")
    lines = [line.split("\t") for line in text.splitlines()]
    return {
        name: Listed(name, frozenset(sets.split(",")), category, int(count))
        for name, sets, category, count in lines
    }


def split_list(folder: pathlib.Path, split: str) -> tuple[str, ...]:
    """Names of the tasks of "train" or "test" in the user's folder.

    They are sorted, so that a task's id, its place, does not depend on the file's version.
    """
    path = folder / "splits" / "default" / f"{split}_tasks.txt"
    try:
        lines = path.read_text(encoding="utf-8").split()
    except (OSError, UnicodeDecodeError) as problem:
        raise errors.UserError(
            f"{path} cannot be read ({problem}); expected one task name per line."
        ) from problem
    if not lines:
        raise errors.UserError(f"{path} names no task; expected one task name per line.")
    names = [name.removesuffix(".json") for name in lines]
    if twice := errors.twice(names):
        first, second = [row for row, name in enumerate(names, 1) if name == twice][:2]
        raise errors.UserError(f"{path} names {twice!r} twice, in rows {first} and {second}.")
    return tuple(sorted(names))


def all_names(folder: pathlib.Path) -> tuple[str, ...]:
    """Names of the training tasks, then of the test tasks; a UserError where one is both."""
    train, test = split_list(folder, "train"), split_list(folder, "test")
    if both := errors.twice((*train, *test)):
        raise errors.UserError(
            f"{folder / 'splits' / 'default'}: train_tasks.txt and test_tasks.txt both name "
            f"{both!r}."
        )
    return (*train, *test)


def path_of(folder: pathlib.Path, name: str) -> pathlib.Path:
    """The file of a task; a UserError with near names if there is none."""
    path = folder / "tasks" / f"{name}.json"
    if not path.is_file():
        known = [other.stem for other in path.parent.glob("*.json")]
        raise errors.UserError(f"There is no task file {path}.{errors.near(name, known)}")
    return path


def read(folder: pathlib.Path, name: str) -> TaskFile:
    """A task file; a UserError names the file and the field that is wrong.

    Only instances may be skipped (`bad_rows`): what prompts are made of must be right.
    """
    path = path_of(folder, name)
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as problem:
        raise errors.UserError(f"{path} is not JSON (cut off?): {problem}.") from problem
    fields = _Fields(path, "", content)
    return TaskFile(
        name,
        fields.first("Definition", "Definition"),
        tuple(map(_demonstration, fields.items("Positive Examples"))),
        tuple(map(_demonstration, fields.items("Negative Examples"))),
        tuple(bad_rows.parsed(_instance, fields.items("Instances"))),
    )


@dataclasses.dataclass(frozen=True)
class _Fields:
    """A JSON object and where it stands, for messages."""

    path: pathlib.Path
    place: str
    content: Any

    def get(self, name: str | int, *kinds: type) -> Any:
        """The value of a field; a UserError where it is missing or of another type."""
        wanted = " or ".join({str: "text", list: "a list"}[kind] for kind in kinds)
        if not isinstance(self.content, dict):
            raise self.problem(f"is a {type(self.content).__name__}, expected an object")
        if name not in self.content:
            raise self.problem(f"{name!r} is missing; expected {wanted}")
        value = self.content[name]
        if not isinstance(value, kinds):
            raise self.problem(f"{name!r} is a {type(value).__name__}; expected {wanted}")
        if isinstance(value, str) and (half := cells.half_character(value)):
            raise self.problem(f"{name!r} has half a character", half)
        return value

    def first(self, name: str, place: str) -> str:
        """A text, or the first of a list of texts, which `place` names in messages."""
        value = self.get(name, str, list)
        if isinstance(value, str):
            return value
        return _Fields(self.path, place, dict(enumerate(value))).get(0, str)

    def problem(self, reason: str, seen: str = "") -> errors.UserError:
        """What is wrong with this object."""
        return bad_rows.BadRow(self.path, self.place or "the whole file", reason, seen)

    def items(self, name: str) -> list["_Fields"]:
        """The objects of a list."""
        found = self.get(name, list)
        return [_Fields(self.path, f"{name}[{i}]", item) for i, item in enumerate(found)]


def _demonstration(fields: _Fields) -> Demonstration:
    output = fields.first("output", f"{fields.place}['output']")
    reason = fields.content.get("explanation")
    return Demonstration(fields.get("input", str), output, reason if type(reason) is str else "")


def _instance(fields: _Fields) -> Instance:
    outputs = fields.get("output", list, str)
    outputs = [outputs] if isinstance(outputs, str) else outputs
    if not outputs or not all(isinstance(output, str) for output in outputs):
        reason = "'output' needs at least one text and nothing else"
        raise fields.problem(reason, repr(outputs)[:60])
    if half := next(filter(None, map(cells.half_character, outputs)), None):
        raise fields.problem("'output' has half a character", half)
    return Instance(fields.get("input", str), tuple(outputs))
