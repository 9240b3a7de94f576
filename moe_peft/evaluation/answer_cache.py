"""Answers of an evaluation on disk: one file a task, kept when the process ends, however it ends.

    <folder>/predictions/<task>.jsonl   a line per example
    <folder>/evaluation.json            what the run is, settings, and which tasks are finished

A task counts as finished once `evaluation.json` says so, with the SHA-256 of its file and of the
questions it answers. The next evaluation of the same model and settings asks only the rest.
"""

from collections.abc import Iterator, Mapping, Sequence
import hashlib
import json
import pathlib
from typing import Any

import moe_peft
from moe_peft import errors
from moe_peft.runtime import json_files

RECORD = "evaluation.json"
FOLDER = "predictions"

# How averages are made does not change the answers.
_NOT_IN_ANSWERS = ("average", "bootstrap")


class Answers:
    """The answers of one mixture."""

    def __init__(
        self,
        folder: pathlib.Path,
        mixture: str,
        num_tasks: int,
        run: Mapping[str, Any],
        settings: Mapping[str, Any],
    ):
        """Reads what is there; `run` says what the model is, its parameters' digest included."""
        self.folder = folder
        self._record = {
            "moe_peft_version": moe_peft.__version__,
            "mixture": mixture,
            "num_tasks": num_tasks,
            "run": dict(run),
            "settings": dict(settings),
            "seconds": 0.0,
            "tasks": {},
        }
        earlier = read_record(folder)
        if earlier and _identity(earlier) == _identity(self._record):
            self._record |= {name: earlier[name] for name in ("seconds", "tasks")}

    @property
    def seconds(self) -> float:
        """Spent on asking, by all processes together."""
        return self._record["seconds"]

    def read(self, task: str, questions: str) -> list[dict[str, Any]] | None:
        """Rows of a finished task; None if it must be asked: `questions` is their digest."""
        record = self._record["tasks"].get(task)
        if record is None or record["questions"] != questions:
            return None
        path = _path(self.folder, task)
        if not path.is_file() or _digest(path) != record["answers"]:
            return None
        return list(json_files.read_jsonl(path))

    def write(
        self, rows: Mapping[str, tuple[str, Sequence[Mapping[str, Any]]]], seconds: float
    ) -> None:
        """Keeps some tasks: {name: (digest of the questions, rows)}, and what they took."""
        for task, (questions, found) in rows.items():
            path = _path(self.folder, task)
            json_files.write_jsonl(path, found)
            self._record["tasks"][task] = {"questions": questions, "answers": _digest(path)}
        self._record["seconds"] = round(self.seconds + seconds, 1)
        json_files.write_json(self.folder / RECORD, self._record)


def read_record(folder: pathlib.Path) -> dict[str, Any] | None:
    """The content of `evaluation.json`, None if there is none; UserError: it cannot be used."""
    path = folder / RECORD
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as problem:
        raise errors.UserError(f"{path} cannot be used: {problem}. Remove it.") from problem


def read_all(folder: pathlib.Path, tasks: Sequence[str]) -> Iterator[dict[str, Any]]:
    """Rows of these tasks; UserError where a file is missing or was changed."""
    record = read_record(folder)["tasks"]
    for task in tasks:
        path = _path(folder, task)
        if not path.is_file() or _digest(path) != record[task]["answers"]:
            raise errors.UserError(
                f"{path} is missing or was changed after it was written; run `moe-peft eval` again."
            )
        yield from json_files.read_jsonl(path)


def _identity(record: Mapping[str, Any]) -> str:
    """What answers depend on, but for the questions."""
    settings = {k: v for k, v in record["settings"].items() if k not in _NOT_IN_ANSWERS}
    parts = [record[part] for part in ("moe_peft_version", "mixture")]
    return json.dumps([*parts, record["run"]["parameters_sha256"], settings], sort_keys=True)


def _path(folder: pathlib.Path, task: str) -> pathlib.Path:
    return folder / FOLDER / f"{task}.jsonl"


def _digest(path: pathlib.Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
