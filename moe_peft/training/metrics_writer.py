"""Metrics of a run: `metrics.jsonl`, identical for an interrupted run, and TensorBoard."""

from collections.abc import Iterator, Mapping
import contextlib
import json
import pathlib
import time

from tensorboardX import event_file_writer
from tensorboardX.proto import event_pb2, summary_pb2

from moe_peft import errors

FILE_NAME = "metrics.jsonl"


class Silent(contextlib.nullcontext):
    """Writes nothing: another process does."""

    def __init__(self, model_dir: pathlib.Path | str, resumed_step: int = 0):
        del model_dir, resumed_step
        super().__init__(self)

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        """Leaves it to the first process, as `write_to_board` does."""

    write_to_board = write


class MetricsWriter:
    """Appends one json object a line: {"step": s, name: value, ...}.

    Nothing that depends on the clock goes into the file, so an interrupted and resumed run leaves
    the very bytes of an uninterrupted one. Speed goes to TensorBoard.
    """

    def __init__(self, model_dir: pathlib.Path | str, resumed_step: int = 0):
        """Opens the files and drops what was written after `resumed_step`."""
        self._model_dir = model_dir = pathlib.Path(model_dir)
        path = model_dir / FILE_NAME
        drop_after(path, resumed_step)
        self._file = path.open("a", encoding="utf-8")
        self._board = _Board(model_dir / "tensorboard", resumed_step)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        with contextlib.suppress(OSError):  # Every write was flushed and checked.
            self._file.close()
        self._board.close()

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        """Writes one line and the same scalars to TensorBoard."""
        with explained(self._model_dir):
            self._file.write(json.dumps({"step": step, **metrics}, sort_keys=True) + "\n")
            self._file.flush()
        self.write_to_board(step, metrics)

    def write_to_board(self, step: int, metrics: Mapping[str, float]) -> None:
        """Writes scalars to TensorBoard only."""
        with explained(self._model_dir):
            self._board.write(step, metrics)


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


class _Board:
    """TensorBoard's file, written in place: the library's own writer adds a thread and a queue.

    Those outlive errors, and complain at exit about a disk that was full.
    """

    def __init__(self, folder: pathlib.Path, resumed_step: int):
        folder.mkdir(exist_ok=True)
        self._events = event_file_writer.EventsWriter(str(folder / "events"))
        # Tells TensorBoard to forget what an earlier life wrote beyond this step.
        status = event_pb2.SessionLog(status=event_pb2.SessionLog.START)
        self._events.write_event(
            event_pb2.Event(wall_time=time.time(), step=resumed_step + 1, session_log=status)
        )

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        scalar = lambda name, value: summary_pb2.Summary.Value(tag=name, simple_value=value)
        summary = summary_pb2.Summary(value=[scalar(*metric) for metric in metrics.items()])
        event = event_pb2.Event(wall_time=time.time(), step=step, summary=summary)
        self._events.write_event(event)
        self._events.flush()

    def close(self) -> None:
        with contextlib.suppress(OSError):
            self._events.close()


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
