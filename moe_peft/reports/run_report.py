"""Pictures of everything that runs have data for, from checkpoints and monitors' records alone."""

from collections.abc import Callable, Sequence
import dataclasses
import pathlib
from typing import Any

import jax
import numpy as np

from moe_peft import errors
from moe_peft.reports import compare, recorded_run
from moe_peft.training.monitors import alignment, routing, task_routing
from moe_peft.weights import saved_run


@dataclasses.dataclass(frozen=True)
class Source:
    """A run and what it has data for."""

    folder: pathlib.Path  # of the run
    label: str  # what it is called
    saved: saved_run.Saved  # its checkpoint
    weights: dict[str, np.ndarray]  # of its task routing, by selector; empty if it has none
    alignment: list[dict[str, Any]]  # records of gradient alignment
    course: list[dict[str, Any]]  # records of the course of routing


def load(folders: Sequence[pathlib.Path | str], step: int | None = None) -> list[Source]:
    """Reads runs and of each the checkpoint of a step, or the newest.

    Raises UserError if a folder has no such checkpoint, or nothing that could be drawn.
    """
    folders = [pathlib.Path(folder) for folder in folders]
    saved = [saved_run.load(folder, step) for folder in folders]
    methods = [each.description["method"]["name"] for each in saved]
    names, found = compare.labels(folders, methods), []
    for folder, label, method, each in zip(folders, names, methods, saved, strict=True):
        records = alignment.records(folder), routing.records(folder)
        found.append(Source(folder, label, each, _weights(each), *records))
        if not found[-1].weights and not any(records):
            why = f"the method {method!r} has no learned task routing, and no monitor ran"
            raise errors.UserError(
                f"There is nothing to draw of {folder}: {why}. For gradient alignment, train with "
                "--gin_file monitors/alignment.gin."
            )
    return found


def write(
    folders: Sequence[pathlib.Path | str],
    out: pathlib.Path | str,
    *,
    step: int | None = None,
    group: str | None = None,
    layers: str | None = None,
    splits: Sequence[int] | None = None,
) -> list[pathlib.Path]:
    """Draws what runs have data for into the folder `out` and returns the pictures' paths.

    Runs with a course of training share its pictures. Routing is drawn at the checkpoint `step`,
    None for the newest, and by `group`, as `Evaluator.task_group`, None for that of each run;
    `layers` and `splits` are as in `routing_pictures.choose_selectors`. Raises UserError if no run
    has them, and for what `load` refuses.
    """
    from moe_peft.reports import alignment_pictures, routing_pictures  # Import matplotlib.

    sources, out = load(folders, step), pathlib.Path(out)
    if (layers or splits) and not any(source.weights for source in sources):
        why = f"{', '.join(repr(source.label) for source in sources)} has no learned task routing"
        raise errors.UserError(f"There are no layers and splits to choose from: {why}.")
    paths: list[pathlib.Path] = []

    def path(name: str) -> pathlib.Path:
        paths.append(out / f"{name}.png")
        return paths[-1]

    for source in sources:
        if source.weights:
            _draw_routing(source, group, layers, splits, path)
        if source.alignment:
            _draw_alignment(source, group, path(f"{source.label}_alignment"))
    if courses := {source.label: source.course for source in sources if source.course}:
        title = "Task routing over training"
        routing_pictures.draw_course(courses, title, path("routing_course"))
    if aligned := {source.label: source.alignment for source in sources if source.alignment}:
        title = "Gradient alignment over training"
        alignment_pictures.draw_course(aligned, title, path("alignment_course"))
    return paths


def _draw_routing(source: Source, group, layers, splits, path: Callable) -> None:
    """Draws the weights of selectors, and the tree of tasks; `path` gives a picture its place."""
    from moe_peft.reports import routing_pictures

    at = f"{source.label}, step {source.saved.step:,}"
    chosen = routing_pictures.choose_selectors(source.weights, layers, splits)
    num_tasks = len(next(iter(chosen.values())))
    tasks = recorded_run.tasks(source.folder, source.saved, num_tasks, group)
    title = f"Weights of {num_tasks} tasks over skills: {at}"
    place = path(f"{source.label}_routing_weights")
    routing_pictures.draw_weights(chosen, tasks, title, place, splits)
    if num_tasks > 1:
        title = f"{num_tasks} tasks by routing: {at}"
        place = path(f"{source.label}_routing_tree")
        routing_pictures.draw_tree(source.weights, tasks, title, place)


def _draw_alignment(source: Source, group: str | None, path: pathlib.Path) -> None:
    """Draws the matrices of the records that have the same tasks as the last one."""
    from moe_peft.reports import alignment_pictures

    names = source.alignment[-1]["tasks"]
    records = [each for each in source.alignment if each["tasks"] == names]
    tasks = recorded_run.named(names, group or recorded_run.task_group(source.folder))
    title = f"Gradient alignment of tasks: {source.label}"
    alignment_pictures.draw_matrices(records, tasks, title, path)


def _weights(saved: saved_run.Saved) -> dict[str, np.ndarray]:
    """The weights of every selector; empty where there is no learned task routing."""
    if not task_routing.is_in(saved.trainable):
        return {}
    rounds = task_routing.is_straight_through(saved.description["method"])
    logits = task_routing.logits(saved.trainable)
    return {k: jax.device_get(task_routing.weights(each, rounds)) for k, each in logits.items()}
