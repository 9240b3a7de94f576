"""What a picture needs to know of a run: what its tasks are called, and their groups."""

from collections.abc import Mapping, Sequence
import dataclasses
import os
import pathlib
import re

import numpy as np

from moe_peft import errors
from moe_peft.weights import saved_run

CONFIG = "config.gin"
OTHER = "other"  # group of tasks that the expression does not match


@dataclasses.dataclass(frozen=True)
class Tasks:
    """The tasks of a run in the order of their ids."""

    names: tuple[str, ...]  # as short as they stay different
    groups: tuple[str, ...]  # what each is reported under

    def by_group(self) -> np.ndarray:
        """Places that put tasks of a group together, by name within each."""
        keys = list(zip(self.groups, self.names, strict=True))
        return np.array(sorted(range(len(keys)), key=keys.__getitem__), int)

    def spans(self) -> list[tuple[str, int, int]]:
        """(group, first place, place after the last) of each group in the order `by_group`."""
        groups = [self.groups[place] for place in self.by_group()]
        starts = {group: groups.index(group) for group in groups}
        return [(group, start, start + groups.count(group)) for group, start in starts.items()]


def tasks(
    folder: pathlib.Path, saved: saved_run.Saved, num_tasks: int, group: str | None = None
) -> Tasks:
    """Returns the tasks of a run, of as many as its logits have rows.

    Their names come from the mixture, and config.gin says how to find it. If that cannot be read
    any more (a module is gone, files were moved), tasks are called by their numbers. `group` is as
    `Evaluator.task_group`; None takes that of the run, if it has one.
    """
    configured = task_group(folder)  # Registers what the run's settings import, too.
    own = saved.description.get("files", {}).get("task_names")
    found = dict(enumerate(own)) if own else _task_names(folder, saved.description["data"])
    names = [found.get(number, f"task {number}") for number in range(num_tasks)]
    return named(names, group or configured)


def named(names: Sequence[str], group: str | None = None) -> Tasks:
    """Returns the tasks of some names, grouped by the first parenthesis of `group`."""
    from moe_peft.evaluation import questions

    pattern = questions.compile_group(group) if group else None
    matches = [pattern.fullmatch(name) if pattern else None for name in names]
    groups = [match[1] if match else OTHER for match in matches]
    # Names of tasks begin alike: "cldr_".
    common = re.match(r"(?:.*_)?", os.path.commonprefix(list(names)))[0] if len(names) > 1 else ""
    return Tasks(tuple(name.removeprefix(common) for name in names), tuple(groups))


def task_group(folder: pathlib.Path) -> str | None:
    """Returns the expression that a run reports its tasks under; None if it cannot be found.

    The run's settings are in force from here on.
    """
    from moe_peft.config import gin_files

    try:
        config = gin_files.load([str((folder / CONFIG).absolute())])
    except (errors.UserError, ImportError) as error:
        print(f"{folder}: its settings cannot be read ({gin_files.one_line(error)})")
        return None
    group = config.macro("TASK_GROUP")
    return group.value if group else None


def _task_names(folder: pathlib.Path, data: Mapping[str, object]) -> dict[int, str]:
    """{id: name of a task, with the template where each has an id of its own}."""
    from moe_peft.data import evaluation_data, lookup, task_ids  # Imports TensorFlow.

    names: dict[int, str] = {}
    try:
        lengths = lookup.check_lengths(data["feature_lengths"])
        for task in lookup.tasks_with(data["mixture"], "train"):
            scalars = evaluation_data.task_rows(task, "train", lengths, limit=1).scalars
            ids = np.asarray(scalars["task_ids"])
            templates = np.asarray(scalars.get("template_ids", np.zeros_like(ids)))
            new_ids = task_ids.per_template(scalars)["task_ids"]
            is_per_template = not np.array_equal(new_ids, ids)
            for number, template in zip(new_ids.tolist(), templates.tolist(), strict=True):
                names[number] = f"{task.name}_t{template}" if is_per_template else task.name
    except (errors.UserError, KeyError) as error:
        print(f"{folder}: tasks are called by their numbers ({error})")
        return {}
    return names
