"""P3 as SeqIO tasks, from published records or raw data sets: T0's mixtures and held-out sets.

* `p3_<task>`: the (data set, template) tasks of T0's mixtures; mixtures `p3_t0` (38 data sets, 313
  tasks), `p3_t0p` (392), `p3_t0pp` (464).
* `p3_<set>`: the eleven held-out sets, each with all its templates and its answer choices. Rows
  are examples, the wordings of one in a row; `template_ids` number the templates by name.
  Mixtures: `p3_heldout` (all eleven), `p3_heldout_published` (without StoryCloze, which is on
  request only and is worded from one's own files). Split "t_few" is what T-Few and
  MHR report: ANLI's and StoryCloze's test split, the validation split of all others; StoryCloze's
  train split is its validation split, as they have it.

Task ids count T0's templates (0 to 312, further mixtures after them) or its data sets (0 to 37);
held-out sets follow after all of them. Registering reads no data. Token ids are kept on disk after
the first reading (`row_store`, some 10 GB for `p3_t0`). Settings: `p3.configured`.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
import dataclasses
import functools
import pathlib
from typing import Any, Literal

import gin
import numpy as np

from moe_peft import errors
from moe_peft.data import registration, roots, row_store, rows
from moe_peft.data.p3 import held_out, ids, names, sources
from moe_peft.tasks import scores

PREFIX = "p3"
T_FEW_SPLIT = "t_few"
(STORYCLOZE,) = names.NOT_PUBLISHED
MIXTURES = {"p3_t0": "t0", "p3_t0p": "t0+", "p3_t0pp": "t0++"}


@gin.configurable("configured", module=PREFIX)
@dataclasses.dataclass(frozen=True)
class Settings:
    """What gin sets for all P3 tasks, as `p3.configured`; `Settings()` is what is in force."""

    # "t0" (T0, MoV): all rows are used, a task's rate is its data set's cap. "t_few" (T-Few, MHR):
    # only the first rows, up to the cap, are used, each equally often.
    cap_rule: Literal["t0", "t_few"] = "t0"
    task_ids: Literal["template", "dataset"] = "template"  # what is one task to a router
    # Of each training task, set apart from its rows; "t_few" only, "t0" has P3's own split.
    validation_examples: int = 100
    retokenize: bool = False  # make ids from the texts: for any other vocabulary than T5's
    # Leave out held-out templates that apply to some items only (T-Few and MHR: the first eight of
    # COPA's twelve). Training splits always do.
    common_templates_only: bool = False
    # "published" records; "raw" rows worded by templates; "either": records where there are some.
    source: Literal["either", "published", "raw"] = "either"
    # Folders of raw data sets and of promptsource's templates; `raw/` and `templates/` in P3's.
    raw: str | None = dataclasses.field(default=None, metadata=rows.PATH)
    templates: str | None = dataclasses.field(default=None, metadata=rows.PATH)


@dataclasses.dataclass(frozen=True)
class Place:
    """Where a training task stands in its table: its data set, and numbers that count from 0."""

    dataset: names.Dataset
    dataset_id: int
    template_id: int  # in the data set
    task_id: int  # among all


def _table() -> names.Table:
    return names.of_folder(roots.folder(PREFIX))


@functools.cache
def _places(table: names.Table) -> dict[str, Place]:
    """By P3's name of the task."""
    found: dict[str, Place] = {}
    for dataset_id, dataset in enumerate(table.training):
        for template_id, task in enumerate(dataset.tasks):
            found[task] = Place(dataset, dataset_id, template_id, len(found))
    return found


def _known(name: str, known: Mapping[str, Any], what: str) -> Any:
    if name not in known:
        where = roots.folder(PREFIX)
        raise errors.UserError(f"{name!r} is not {what} of {where}.{errors.near(name, known)}")
    return known[name]


def _place(task: str) -> Place:
    return _known(task, _places(_table()), "in any mixture")


def _source(task: str) -> sources.Source:
    settings = Settings()
    own = [name and pathlib.Path(name).expanduser() for name in (settings.raw, settings.templates)]
    return sources.find(roots.folder(PREFIX), _table().prompts[task], settings.source, *own)


def _stored(task: str, split: str, limit: int | None = None) -> row_store.Stored:
    return ids.stored(_source(task), split, limit, Settings().retokenize)


def _training_rows(task: str, split: str) -> rows.Rows:
    place, settings = _place(task), Settings()
    task_id = place.task_id if settings.task_ids == "template" else place.dataset_id
    ids_of = functools.partial(registration.as_rows, task_id=task_id, template_id=place.template_id)
    if settings.cap_rule == "t0":
        return ids_of(_stored(task, split))
    found = _stored(task, "train", place.dataset.cap("t_few"))
    held_back = min(settings.validation_examples, len(found) // 2)  # of a few rows, half stay
    bounds = {"end": held_back} if split == "validation" else {"start": held_back}
    return ids_of(found, **bounds)


def _training_splits(task: str) -> tuple[str, ...]:
    if Settings().cap_rule == "t_few":
        return ("train", "validation") if Settings().validation_examples else ("train",)
    _place(task)
    return _source(task).splits()


def _held_out(name: str) -> tuple[names.HeldOut, int]:
    """An evaluation set and its task id."""
    table, settings = _table(), Settings()
    known = {found.name: (found, i) for i, found in enumerate(table.held_out)}
    found, number = _known(name, known, "an evaluation set")
    is_template = settings.task_ids == "template"
    return found, number + (len(_places(table)) if is_template else len(table.training))


def _source_split(name: str, split: str) -> str:
    """The published split behind one of a held-out set's own."""
    tests_on_test = name.startswith("anli_") or name == STORYCLOZE
    if split == T_FEW_SPLIT:
        return "test" if tests_on_test else "validation"
    return "validation" if split == "train" and name == STORYCLOZE else split


def _held_out_rows(name: str, split: str) -> rows.Rows:
    found, task_id = _held_out(name)
    published = _source_split(name, split)
    parts = [_stored(task, published) for task in found.tasks]
    numbers = np.arange(len(parts), dtype=np.int32)
    most = max(map(len, parts))
    is_whole = not any(part.skipped for part in parts)
    if split == "train" or Settings().common_templates_only:
        if not is_whole:
            raise errors.UserError(
                f"{PREFIX}_{name}: rows of its {published!r} files were skipped, so the wordings "
                "of an item cannot be brought together; repair the files (`moe-peft data check`)."
            )
        numbers = numbers[[len(part) == most for part in parts]]
        parts = [part for part in parts if len(part) == most]
    if is_whole and all(len(part) == most for part in parts):
        join, template_ids = held_out.Woven, np.tile(numbers, most)
    else:
        join, template_ids = held_out.Joined, np.repeat(numbers, [len(part) for part in parts])
    return rows.Rows(
        join([part.inputs for part in parts]),
        join([part.targets for part in parts]),
        {"task_ids": np.full(len(template_ids), task_id, np.int32), "template_ids": template_ids},
        join([part.answer_choices for part in parts]),
    )


def _held_out_splits(name: str) -> tuple[str, ...]:
    found, _ = _held_out(name)
    published = _source(found.tasks[0]).splits()
    own = [s for s in ("train", T_FEW_SPLIT) if _source_split(name, s) in published]
    return tuple(dict.fromkeys((*published, *own)))


def published_rows(registered: str) -> int:
    """Published rows of a task, over its splits and templates; 0 where the table does not say."""
    table, name = _table(), registered.removeprefix(f"{PREFIX}_")
    sets = {found.name: found.tasks for found in table.held_out}
    prompts = [table.prompts[task] for task in sets.get(name, (name,)) if task in table.prompts]
    return sum(rows for prompt in prompts for rows in prompt.of.published.rows.values())


def _rate(registered: str) -> float:
    if Settings().cap_rule == "t0":
        return float(_place(registered.removeprefix(f"{PREFIX}_")).dataset.cap("t0"))
    return registration.num_rows(registered)


def _register(
    tasks: Iterable[str],
    read_rows: Callable[[str, str], rows.Rows],
    list_splits: Callable[[str], Sequence[str]],
) -> list[str]:
    """Registers tasks by P3's names; returns SeqIO's."""
    shared = (read_rows, list_splits, Settings, scores.METRIC_FNS)
    return [registration.add_task(PREFIX, task, *shared) for task in tasks]


def _register_training(table: names.Table, mixture: str) -> list[str]:
    tasks = (task for dataset in table.mixture(mixture) for task in dataset.tasks)
    return _register(tasks, _training_rows, _training_splits)


def _register_held_out(table: names.Table, left_out: Sequence[str] = ()) -> list[str]:
    tasks = (found.name for found in table.held_out if found.name not in left_out)
    return _register(tasks, _held_out_rows, _held_out_splits)


def register() -> None:
    """Adds all official tasks and the mixtures to SeqIO's registries."""
    _register_training(names.official(), names.MIXTURES[-1])
    _register_held_out(names.official())
    for mixture, kind in MIXTURES.items():
        registration.add_mixture(mixture, lambda k=kind: _register_training(_table(), k), _rate)
    registration.add_mixture(f"{PREFIX}_heldout", lambda: _register_held_out(_table()))
    published = lambda: _register_held_out(_table(), names.NOT_PUBLISHED)
    registration.add_mixture(f"{PREFIX}_heldout_published", published)


register()
