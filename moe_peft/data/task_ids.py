"""Task ids: what a task is (a data set, or one of its templates), and whether a method knows it."""

from collections.abc import Iterator, Mapping

import gin
import numpy as np

from moe_peft import errors, methods
from moe_peft.data import lookup
from moe_peft.data.encoding import Batch


@gin.configurable(module="task_ids")
def per_template(batch: Mapping[str, np.ndarray], num_templates: int | None = None) -> Batch:
    """Returns the batch with one task id per (task, template), if gin sets `num_templates`.

    The papers route T0 by (data set, template): the new id is
    `task_id * num_templates + template_id`. Without it a task id names a whole task, in all its
    wordings. `num_templates` is at least the largest template id plus one; training and evaluation
    both read it.
    """
    if num_templates is None:
        return dict(batch)
    if absent := [name for name in ("task_ids", "template_ids") if name not in batch]:
        raise errors.UserError(
            f"per_template.num_templates needs the feature {absent[0]!r}; the batch has "
            f"{', '.join(sorted(batch))}."
        )
    template_ids = np.asarray(batch["template_ids"])
    if template_ids.size and template_ids.max() >= num_templates:
        raise errors.UserError(
            f"Template id {template_ids.max()} is not below per_template.num_templates, "
            f"{num_templates}."
        )
    ids = np.asarray(batch["task_ids"]) * num_templates + template_ids
    return {**batch, "task_ids": ids.astype(np.int32)}


def check_ids(ids: np.ndarray, num_tasks: int, where: str) -> None:
    """Raises UserError for an id that is not in 0 .. num_tasks - 1."""
    outside = ids[(ids < 0) | (ids >= num_tasks)]
    if outside.size:
        raise errors.UserError(
            f"{where} has the task id {outside[0]}, but the method tells {num_tasks} tasks apart "
            f"(0 to {num_tasks - 1}). A task that was not trained needs logits of its own "
            "(`moe-peft adapt`) or averaged modules (variant 'mu')."
        )


def check_declared(method: methods.Method, mixture_or_task: lookup.Mixture) -> None:
    """Raises UserError where a method routes by task and the tasks, not yet read, have no ids."""
    tasks = lookup.tasks_of(mixture_or_task)
    if method.num_tasks is not None and any("task_ids" not in t.output_features for t in tasks):
        raise errors.UserError(_no_feature(method, mixture_or_task))


def _no_feature(method: methods.Method, where: str) -> str:
    return f"{method.name!r} routes by task, but {where!r} has no feature 'task_ids'."


def checked_batches(
    batches: Iterator[Batch], method: methods.Method, where: str
) -> Iterator[Batch]:
    """The batches, each of them checked for the task ids that `method` routes by."""
    if method.num_tasks is None:
        yield from batches
        return
    for batch in batches:
        if "task_ids" not in batch:
            raise errors.UserError(_no_feature(method, where))
        check_ids(np.asarray(batch["task_ids"]), method.num_tasks, repr(where))
        yield batch
