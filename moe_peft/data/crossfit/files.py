"""The official few-shot files, `<task>/<task>_<k>_<seed>_{train,dev,test}.tsv`, and the partition.

UTF-8, no header, tab-separated: input, output, further accepted outputs. Five sample seeds a task;
k = 16 rows a label, or 32 rows where answers are free text. The test file is the same for all
seeds.
"""

from collections.abc import Mapping
import dataclasses
import functools
import importlib.resources
import json
import pathlib

from moe_peft import errors
from moe_peft.data import bad_rows

SEEDS = (100, 13, 21, 42, 87)
GROUPS = ("train", "dev", "test")
PARTITION_FILE = "random.json"
# CrossFit's metrics by the names of `evaluation.metrics`.
METRICS = {
    "ACC": "accuracy",
    "Classification-F1": "macro_f1",
    "EM": "exact_match_squad",
    "Matthew-Correlation": "matthews",
    "Pearson-Correlation": "pearson",
    "QA-F1": "qa_f1",
    "Rouge-L": "rouge_l_crossfit",
}


@dataclasses.dataclass(frozen=True)
class Row:
    """An input with every accepted output, at least one."""

    input: str
    outputs: tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class Listed:
    """A line of our table of the random partition."""

    name: str
    group: str  # train (120 tasks), dev (20) or test (20)
    metric: str  # what CrossFit reports for it
    shots: int  # k in the names of its files
    test_md5: str  # of its test file as published in 2022; several sources have changed since


@functools.cache
def table() -> Mapping[str, Listed]:
    """CrossFit's 160 tasks by name."""
    text = (importlib.resources.files(__package__) / "tasks.tsv").read_text(encoding="utf-8")
    lines = [line.split("\t") for line in text.splitlines()]
    return {name: Listed(name, group, metric, int(k), md5) for name, group, metric, k, md5 in lines}


@functools.cache
def partition(folder: pathlib.Path) -> Mapping[str, tuple[str, ...]]:
    """Sorted task names by group: the official partition, or that of the folder's `random.json`."""
    path = folder / PARTITION_FILE
    if not path.is_file():
        names_of = lambda group: (line.name for line in table().values() if line.group == group)
        return {group: tuple(sorted(names_of(group))) for group in GROUPS}
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        groups = {group: tuple(sorted(map(str, content[group]))) for group in GROUPS}
    except (OSError, ValueError, TypeError, KeyError) as problem:
        raise errors.UserError(
            f"{path} cannot be used ({type(problem).__name__}: {problem}); expected JSON with the "
            f"lists {', '.join(GROUPS)} of task names."
        ) from problem
    if twice := errors.twice(name for group in GROUPS for name in groups[group]):
        where = [group for group in GROUPS if twice in groups[group]]
        raise errors.UserError(f"{path} names {twice!r} twice ({' and '.join(where)}).")
    return groups


def own_metrics(folder: pathlib.Path) -> Mapping[str, str]:
    """Each task's metric, of `METRICS`; `random.json` has those of own tasks under "metrics"."""
    path = folder / PARTITION_FILE
    own = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    for task, metric in own.get("metrics", {}).items():
        errors.check_one_of(f"{path}: the metric of {task!r}", metric, METRICS)
    return own.get("metrics", {}) | {listed.name: listed.metric for listed in table().values()}


def path_of(folder: pathlib.Path, task: str, seed: int, part: str) -> pathlib.Path:
    """The file of a task, sample seed and part (train, dev, test)."""
    place = folder / task
    found = sorted(place.glob(f"{task}_*_{seed}_{part}.tsv"))
    # A longer name may begin with a shorter one: only digits may stand in between.
    found = [p for p in found if p.name[len(task) + 1 :].split("_")[0].isdigit()]
    if len(found) == 1:
        return found[0]
    shots = table()[task].shots if task in table() else "K"
    expected = place / f"{task}_{shots}_{seed}_{part}.tsv"
    if found:
        raise errors.UserError(
            f"{place} has {found[0].name} and {found[1].name}; expected one file for sample {seed}."
        )
    known = [path.name for path in folder.iterdir() if path.is_dir()]
    hint = "" if place.is_dir() else errors.near(task, known)
    raise errors.UserError(f"There is no file {expected}.{hint}")


def read(path: pathlib.Path) -> list[Row]:
    """The rows of a file; all have an input and an output column."""
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as problem:
        raise errors.UserError(f"{path} cannot be read: {problem}.") from problem
    lines = enumerate(text.removesuffix("\n").split("\n"), start=1)
    return list(bad_rows.parsed(functools.partial(_row, path), lines))


def _row(path: pathlib.Path, numbered: tuple[int, str]) -> Row:
    number, line = numbered
    # Only the line end goes: an output may be empty (CrossFit's own reader shifts columns then).
    columns = line.removesuffix("\r").split("\t")
    if len(columns) < 2:
        reason = "1 column, expected an input, a tab and an output (does a line break split a row?)"
        raise bad_rows.BadRow(path, f"row {number}", reason, repr(line[:60]))
    return Row(columns[0], tuple(columns[1:]))
