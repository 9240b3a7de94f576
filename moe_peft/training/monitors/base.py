"""Monitors: what is looked at during training, besides the metrics of the steps.

A monitor sees the trees between two steps and changes nothing. Its scalars go to metrics.jsonl and
TensorBoard under its name; what is more than a scalar it appends to `monitors/<name>.jsonl` in the
run's folder. A resumed run drops the records of steps it makes again.
"""

from collections.abc import Callable, Mapping, Sequence
import dataclasses
import json
import pathlib
from typing import Any, NamedTuple, Protocol

import jax
from jaxtyping import PyTree

from moe_peft import errors, methods
from moe_peft.training import metrics_writer
from moe_peft.training import step as step_lib

FOLDER = "monitors"

Watch = Callable[[int, PyTree, PyTree], Mapping[str, float]]


@dataclasses.dataclass(frozen=True)
class Watched:
    """The run that a monitor is to look at."""

    model: step_lib.Model  # computes the loss, adapters included
    method: methods.Method  # says what trains
    trainable: PyTree  # abstract trainable tree
    # What the run's description says of its data: mixture, feature_lengths, ...
    data: Mapping[str, Any]
    folder: pathlib.Path  # of the run
    mesh: jax.sharding.Mesh  # the devices


class Monitor(Protocol):
    """A gin-configurable object in `train.monitors`."""

    name: str  # prefix of its metrics and name of its file
    period: int  # steps between calls; there is always one at the last step

    def start(self, run: Watched) -> Watch:
        """Returns (step, frozen, trainable) -> scalars, to be called between steps.

        Raises UserError if there is nothing to watch in this run; nothing is compiled yet.
        """
        ...


class Active(NamedTuple):
    """A monitor that has been started."""

    name: str
    period: int
    watch: Watch


def start(monitors: Sequence[Monitor], run: Watched) -> list[Active]:
    """Starts all; UserError: two share a name, a period is below 1, one has nothing to watch."""
    names = [monitor.name for monitor in monitors]
    for monitor in monitors:
        if names.count(monitor.name) > 1:
            raise errors.UserError(f"train.monitors holds {monitor.name!r} more than once.")
        errors.check_at_least(f"The period of the monitor {monitor.name!r}", monitor.period, 1)
    return [Active(each.name, each.period, each.start(run)) for each in monitors]


def drop_after(folder: pathlib.Path, step: int) -> None:
    """Drops what any monitor, past ones too, recorded after `step`."""
    if jax.process_index() == 0:
        for path in (folder / FOLDER).glob("*.jsonl"):
            metrics_writer.drop_after(path, step)


def append(folder: pathlib.Path, name: str, step: int, record: Mapping[str, Any]) -> None:
    """Adds a line to a monitor's file, on the first host; UserError: it cannot be written."""
    if jax.process_index() != 0:
        return
    path = folder / FOLDER / f"{name}.jsonl"
    with metrics_writer.explained(path.parent):
        path.parent.mkdir(exist_ok=True)
        with path.open("a", encoding="utf-8") as file:
            file.write(json.dumps({"step": step, **record}, allow_nan=False) + "\n")


def read(folder: pathlib.Path | str, name: str) -> list[dict[str, Any]]:
    """Returns the records of a monitor in order, whole lines only; none if it never ran."""
    path = pathlib.Path(folder) / FOLDER / f"{name}.jsonl"
    if not path.exists():
        return []
    lines = path.read_text(encoding="utf-8").split("\n")
    try:
        return [json.loads(line) for line in lines[:-1]]
    except ValueError as error:
        raise errors.UserError(f"{path} cannot be read: {error}.") from error
