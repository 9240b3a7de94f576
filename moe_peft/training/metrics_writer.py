"""Metrics of a run: `metrics.jsonl`, identical for an interrupted run, and the boards."""

from collections.abc import Callable, Iterator, Mapping
import contextlib
import json
import pathlib
import types
from typing import Any

from moe_peft import errors
from moe_peft.training import boards

FILE_NAME = "metrics.jsonl"


class Silent(contextlib.nullcontext):
    """Writes nothing: another process does."""

    def __init__(self, *_: Any):
        super().__init__(self)

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        """Leaves it to the first process, as `write_to_boards` does."""

    write_to_boards = write

    def close(self, is_complete: bool) -> list[str]:
        """Has nothing to say."""
        return []


class MetricsWriter:
    """Appends one json object a line: {"step": s, name: value, ...}.

    Nothing that depends on the clock goes into the file, so an interrupted and resumed run leaves
    the very bytes of an uninterrupted one. Speed goes to the boards.

    A board that fails is left out from then on, with one line: it does not end a run of days.
    """

    def __init__(
        self,
        model_dir: pathlib.Path | str,
        resumed_step: int = 0,
        log_to: tuple[str, ...] | str = ("tensorboard",),
        description: Mapping[str, Any] = types.MappingProxyType({}),
        say: Callable[[str], None] = print,
    ):
        """Opens the file, without what was written after `resumed_step`, and the boards `log_to`.

        `description` is what the run is, json types; `say` gets warnings.
        """
        self._model_dir = model_dir = pathlib.Path(model_dir)
        path = model_dir / FILE_NAME
        drop_after(path, resumed_step)
        self._file = path.open("a", encoding="utf-8")
        self._say, self._boards = say, {}
        for name in boards.chosen(log_to):
            arguments = (model_dir, resumed_step, dict(description))
            if board := self._attempt(name, boards.BOARDS[name], *arguments):
                self._boards[name] = board

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close(is_complete=False)

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        """Writes one line and the same scalars to the boards."""
        with explained(self._model_dir):
            self._file.write(json.dumps({"step": step, **metrics}, sort_keys=True) + "\n")
            self._file.flush()
        self.write_to_boards(step, metrics)

    def write_to_boards(self, step: int, metrics: Mapping[str, float]) -> None:
        """Writes scalars to the boards only."""
        for name, board in list(self._boards.items()):
            self._attempt(name, board.write, step, metrics)

    def close(self, is_complete: bool) -> list[str]:
        """Returns how to look at each board; `is_complete`: all steps of the run were made."""
        with contextlib.suppress(OSError):  # Every write was flushed and checked.
            self._file.close()
        closing, self._boards = self._boards, {}
        found = [self._attempt(name, each.close, is_complete) for name, each in closing.items()]
        return [line for line in found if line]

    def _attempt(self, name, call, *arguments):
        try:
            return call(*arguments)
        except Exception as error:
            self._boards.pop(name, None)
            why = " ".join(f"{type(error).__name__}: {error}".split())[:300]
            self._say(f"WARNING: {name} failed, and the run goes on without it ({why}).")
            return None


@contextlib.contextmanager
def explained(folder: pathlib.Path | str) -> Iterator[None]:
    """Turns what a full or broken disk raises while metrics are written into one line."""
    try:
        yield
    except OSError as error:
        raise errors.UserError(
            f"Cannot write metrics to {folder}: {error.strerror}. Checkpoints are intact. Make "
            "room or repair the folder, then run the same command to go on."
        ) from error


def read(model_dir: pathlib.Path | str) -> list[dict[str, float]]:
    """Returns the lines of a run's metrics.jsonl."""
    text = (pathlib.Path(model_dir) / FILE_NAME).read_text(encoding="utf-8")
    return [json.loads(line) for line in text.splitlines()]


def drop_after(path: pathlib.Path, step: int) -> None:
    """Keeps a file's whole lines up to and including `step`; a half-written last line goes too."""
    if not path.exists():
        return
    kept = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            if json.loads(line)["step"] <= step:
                kept.append(line + "\n")
        except json.JSONDecodeError:
            break
    partial = path.with_suffix(".partial")
    partial.write_text("".join(kept), encoding="utf-8")
    partial.replace(path)
