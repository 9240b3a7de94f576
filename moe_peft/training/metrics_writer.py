"""Metrics of a run: `metrics.jsonl`, identical for an interrupted run, and TensorBoard."""

from collections.abc import Mapping
import json
import pathlib

import tensorboardX

FILE_NAME = "metrics.jsonl"


class MetricsWriter:
    """Appends one json object a line: {"step": s, name: value, ...}.

    Nothing that depends on the clock goes into the file, so an interrupted and resumed run leaves
    the very bytes of an uninterrupted one. Speed goes to TensorBoard.
    """

    def __init__(self, model_dir: pathlib.Path | str, resumed_step: int = 0):
        """Opens the files and drops what was written after `resumed_step`."""
        model_dir = pathlib.Path(model_dir)
        path = model_dir / FILE_NAME
        _drop_after(path, resumed_step)
        self._file = path.open("a", encoding="utf-8")
        self._board = tensorboardX.SummaryWriter(
            str(model_dir / "tensorboard"), purge_step=resumed_step + 1 if resumed_step else None
        )

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        """Writes one line and the same scalars to TensorBoard."""
        self._file.write(json.dumps({"step": step, **metrics}, sort_keys=True) + "\n")
        self._file.flush()
        self.write_to_board(step, metrics)

    def write_to_board(self, step: int, metrics: Mapping[str, float]) -> None:
        """Writes scalars to TensorBoard only."""
        for name, value in metrics.items():
            self._board.add_scalar(name, value, step)

    def close(self) -> None:
        """Flushes and closes both."""
        self._file.close()
        self._board.close()


def read(model_dir: pathlib.Path | str) -> list[dict[str, float]]:
    """Returns the lines of a run's metrics.jsonl."""
    text = (pathlib.Path(model_dir) / FILE_NAME).read_text(encoding="utf-8")
    return [json.loads(line) for line in text.splitlines()]


def _drop_after(path: pathlib.Path, step: int) -> None:
    """Keeps whole lines up to and including `step`; a half-written last line goes too."""
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
