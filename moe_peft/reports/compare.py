"""Results of several runs side by side: a table, Markdown, JSON and a picture.

    moe-peft compare results/frozen results/ia3 results/mov --out results

reads the `eval/<mixture>/results.json` that `moe-peft eval` left in each run's folder. Numbers are
per cent; mean and median are over the templates of a task, then averaged over tasks.
"""

from collections.abc import Mapping, Sequence
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
    """The evaluations found in folders of runs, by mixture, in the order of the folders.

    A run is called by its method; where two runs of a mixture share it, by their folders.

    Raises UserError for a folder without results, or results that cannot be read.
    """
    found: dict[str, list[tuple[pathlib.Path, Mapping[str, Any]]]] = {}
    for folder in map(pathlib.Path, folders):
        paths = sorted(folder.glob("eval/*/results.json"))
        if not paths:
            raise errors.UserError(
                f"{folder} holds no results (eval/*/results.json); make them with `moe-peft eval`."
            )
        for path in paths:
            content = _read(path)
            found.setdefault(content["mixture"], []).append((folder, content))
    runs = {}
    for mixture, members in found.items():
        names = [content["run"]["method"]["name"] for _, content in members]
        runs[mixture] = [
            table.Run(name if names.count(name) == 1 else folder.name, content)
            for name, (folder, content) in zip(names, members, strict=True)
        ]
        check_comparable(runs[mixture])
    return runs


def check_comparable(runs: Sequence[table.Run]) -> None:
    """Raises UserError unless all runs answered the same examples and were scored alike."""
    first = runs[0]
    for run in runs[1:]:
        for part, default in _MUST_AGREE.items():
            was, now = (r.content["settings"].get(part, default) for r in (first, run))
            if was != now:
                raise errors.UserError(
                    f"{first.name} and {run.name} cannot be compared: {part} is {was} and {now}."
                )
        counts = [{k: v["num_examples"] for k, v in r.lines.items()} for r in (first, run)]
        if counts[0] != counts[1]:
            raise errors.UserError(
                f"{first.name} and {run.name} cannot be compared: they answered "
                f"{counts[0][table.OVERALL]} and {counts[1][table.OVERALL]} examples, or other "
                "tasks."
            )


def to_json(runs: Sequence[table.Run]) -> dict[str, Any]:
    """What the table shows, in numbers: shares in [0, 1]."""
    return {
        "mixture": runs[0].content["mixture"],
        "settings": runs[0].content["settings"],
        "runs": [
            {
                "name": run.name,
                "run": run.content["run"],
                "lines": run.lines,
            }
            for run in runs
        ],
    }


def write(runs: Sequence[table.Run], folder: pathlib.Path | str) -> list[pathlib.Path]:
    """Writes <mixture>.md, .json and .png into a folder; returns their paths."""
    from moe_peft.reports import picture  # Imports matplotlib.
    from moe_peft.runtime import json_files

    stem = pathlib.Path(folder) / runs[0].content["mixture"]
    paths = [stem.with_name(stem.name + suffix) for suffix in (".md", ".json", ".png")]
    json_files.write_text(paths[0], table.markdown(runs))
    json_files.write_json(paths[1], to_json(runs))
    picture.draw(runs, paths[2])
    return paths


def _read(path: pathlib.Path) -> Mapping[str, Any]:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise errors.UserError(f"{path} cannot be read: {error}.") from error
