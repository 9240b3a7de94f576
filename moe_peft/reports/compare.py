"""Results of several runs side by side: a table, Markdown, JSON and a picture.

`moe-peft compare` reads the `eval/<mixture>/results.json` that `moe-peft eval` left in each run's
folder. Numbers are per cent; mean and median are over a task's templates, then over tasks.
"""

from collections.abc import Callable, Mapping, Sequence
import json
import pathlib
from typing import Any

from moe_peft import errors
from moe_peft.evaluation import table

# Settings that change what a number means, and what they were before they could be set.
_MUST_AGREE = {
    "metric": None,
    "rank_choices": False,
    "length_normalized_choices": False,
    "split": None,
    "max_examples_per_task": None,
    "average": "tasks",
}


def load(folders: Sequence[pathlib.Path | str]) -> dict[str, list[table.Run]]:
    """The evaluations in folders of runs, by mixture, in order; runs are called as `labels` says.

    Raises UserError if a folder has no results, or if they cannot be read.
    """
    found: dict[str, list[tuple[pathlib.Path, Mapping[str, Any]]]] = {}
    for folder in map(pathlib.Path, folders):
        paths = sorted(folder.glob("eval/*/results.json"))
        if not paths:
            hint = "(eval/*/results.json); make them with `moe-peft eval`"
            raise errors.UserError(f"{folder} holds no results {hint}.")
        for content in map(read, paths):
            found.setdefault(content["mixture"], []).append((folder, content))
    runs = {}
    for mixture, members in found.items():
        sources, contents = zip(*members, strict=True)
        names = labels(sources, [content["run"]["method"]["name"] for content in contents])
        runs[mixture] = list(map(table.Run, names, contents))
        check_alike(names, list(map(_facts, runs[mixture])))
    return runs


def _facts(run: table.Run) -> dict[str, Any]:
    """What runs have in common if they answered the same examples and were scored alike."""
    settings = run.content["settings"]
    counts = {group: line["num_examples"] for group, line in run.lines.items()}
    facts = {part: settings.get(part, default) for part, default in _MUST_AGREE.items()}
    return {**facts, "number of examples": counts[table.OVERALL], "examples by group": counts}


def check_alike(names: Sequence[object], facts: Sequence[Mapping[str, Any]]) -> None:
    """Raises UserError at the first fact that a run does not share with the first one."""
    for name, found in zip(names, facts, strict=True):
        for part, value in facts[0].items():
            if value != found[part]:
                difference = f"{part} is {value} and {found[part]}"
                raise errors.UserError(f"{names[0]} and {name} cannot be compared: {difference}.")


def labels(folders: Sequence[pathlib.Path], methods: Sequence[str]) -> list[str]:
    """Returns what runs are called: by method; where two share it, by folder; else by path."""
    paths = [folder.absolute() for folder in folders]
    by_path = ["-".join(path.parts[1:]) for path in paths]
    candidates = (list(methods), [path.name for path in paths], by_path)
    first = lambda i: (names[i] for names in candidates if names.count(names[i]) == 1)
    return [next(first(i), by_path[i]) for i in range(len(paths))]


def to_json(runs: Sequence[table.Run]) -> dict[str, Any]:
    """What the table shows, in numbers: shares in [0, 1]."""
    members = [{"name": run.name, "run": run.content["run"], "lines": run.lines} for run in runs]
    content = runs[0].content
    return {"mixture": content["mixture"], "settings": content["settings"], "runs": members}


def write(runs: Sequence[table.Run], folder: pathlib.Path | str) -> list[pathlib.Path]:
    """Writes <mixture>.md, .json and .png into a folder; returns their paths."""
    from moe_peft.reports import picture  # Imports matplotlib.

    stem = pathlib.Path(folder) / runs[0].content["mixture"]
    draw = lambda path: picture.draw(runs, path)
    return write_files(stem, table.markdown(runs), to_json(runs), draw)


def write_files(
    stem: pathlib.Path, text: str, content: Any, draw: Callable[[pathlib.Path], object]
) -> list[pathlib.Path]:
    """Writes a table as <stem>.md, its numbers as .json and its picture as .png; their paths."""
    from moe_peft.runtime import json_files

    paths = [stem.with_name(stem.name + suffix) for suffix in (".md", ".json", ".png")]
    json_files.write_text(paths[0], text)
    json_files.write_json(paths[1], content)
    draw(paths[2])
    return paths


def read(path: pathlib.Path) -> Mapping[str, Any]:
    """A results.json; a UserError if it cannot be read."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise errors.UserError(f"{path} cannot be read: {error}.") from error
