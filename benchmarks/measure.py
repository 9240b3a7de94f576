"""Paired measurements: every round runs all candidates, so drift hits them alike."""

from collections.abc import Callable, Mapping
import dataclasses
import json
import os
import pathlib
import statistics
import time

import jax
import rich.box
import rich.console
import rich.table

from moe_peft.runtime import host_memory

host_memory.run_programs_inline()  # As the commands do.


@dataclasses.dataclass(frozen=True)
class Timing:
    """Seconds per call and the ratio to a reference, each as (quartile, median, quartile)."""

    seconds: tuple[float, float, float]
    ratio: tuple[float, float, float]


def _quartiles(values: list[float]) -> tuple[float, float, float]:
    return tuple(statistics.quantiles(values, n=4, method="inclusive"))


def paired(
    calls: Mapping[str, Callable[[], object]], reference: str, rounds: int
) -> dict[str, Timing]:
    """Times `calls` in turn, `rounds` times after a warm-up; ratios are taken round by round.

    A call returns its outputs; they are waited for inside the timed region.
    """
    host_memory.keep()
    for call in calls.values():
        jax.block_until_ready(call())
    seconds = {name: [] for name in calls}
    for _ in range(rounds):
        for name, call in calls.items():
            start = time.perf_counter()
            jax.block_until_ready(call())
            seconds[name].append(time.perf_counter() - start)
    return {
        name: Timing(
            _quartiles(values),
            _quartiles([a / b for a, b in zip(values, seconds[reference])]),
        )
        for name, values in seconds.items()
    }


def hardware() -> str:
    """Names the device and the number of processor cores in use."""
    device = jax.devices()[0]
    cores = len(os.sched_getaffinity(0))
    return f"{device.platform}:{device.device_kind}, {cores} CPU cores, jax {jax.__version__}"


def show(title: str, columns: list[str], rows: list[list[str]]) -> None:
    """Prints a table."""
    table = rich.table.Table(title=title, box=rich.box.SIMPLE_HEAD, title_justify="left")
    for index, column in enumerate(columns):
        table.add_column(column, justify="left" if index == 0 else "right")
    for row in rows:
        table.add_row(*row)
    console = rich.console.Console()
    # A log is not a terminal: there rich would squeeze the columns into eighty characters.
    (console if console.is_terminal else rich.console.Console(width=120)).print(table)


def save(path: str | None, record: Mapping[str, object]) -> None:
    """Writes `record` with the hardware's name as JSON to `path`, if one is given."""
    if path:
        text = json.dumps({"hardware": hardware(), **record}, indent=2)
        pathlib.Path(path).write_text(text + "\n")
