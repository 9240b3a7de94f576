"""CrossFit as SeqIO tasks, `crossfit_<task>`, over the official few-shot files.

Mixtures, all of equal rates per row: `crossfit_train` (120 tasks), `crossfit_dev` (20),
`crossfit_test` (20), as the random partition has them.

Splits of every task: `train` and `validation` pool the train and dev files of all sample seeds
(duplicates stay), `train_13` and `validation_13` are the files of one sample seed, `test` is the
test file. Registering reads no data. A task's id is its place in the sorted training list, then
dev, then test. Settings: `crossfit.configured`.
"""

from collections.abc import Sequence
import dataclasses
import functools
import pathlib

import gin

from moe_peft import errors
from moe_peft.data import bad_rows, registration, roots, row_store, rows, vocabularies
from moe_peft.data.crossfit import files
from moe_peft.tasks import scores

PREFIX = "crossfit"
PARTS = {"train": "train", "validation": "dev"}


@gin.configurable("configured", module=PREFIX)
@dataclasses.dataclass(frozen=True)
class Settings:
    """What gin sets for all CrossFit tasks, as `crossfit.configured`; `Settings()` is in force."""

    with_task_name: bool = True  # inputs begin with "[task_name] ", as in CrossFit and P1
    max_input_tokens: int = 512  # end mark included
    seeds: Sequence[int] = files.SEEDS  # samples to read
    seed: int = 42  # of the draw of one answer where several are accepted

    def __post_init__(self):
        # Settings are keys of caches, and gin files may give a list.
        object.__setattr__(self, "seeds", tuple(self.seeds))
        errors.check_at_least("The number of crossfit.configured.seeds", len(self.seeds), 1)
        errors.check_at_least("crossfit.configured.max_input_tokens", self.max_input_tokens, 2)


def task_ids() -> dict[str, int]:
    """Ids of the tasks of the partition, by CrossFit's names; training tasks first."""
    return _task_ids(roots.folder(PREFIX))


@functools.cache
def _task_ids(folder: pathlib.Path) -> dict[str, int]:
    groups = files.partition(folder)
    names = [name for group in files.GROUPS for name in groups[group]]
    return {name: number for number, name in enumerate(names)}


def _splits(_name: str) -> tuple[str, ...]:
    sampled = [f"{split}_{seed}" for split in PARTS for seed in Settings().seeds]
    return (*PARTS, "test", *sampled)


def _rows(name: str, split: str) -> rows.Rows:
    if split not in (known := _splits(name)):
        raise errors.UserError(
            f"{name} has no split {split!r}; it has {', '.join(known)}.{errors.near(split, known)}"
        )
    folder = roots.folder(PREFIX)
    read_with = (vocabularies.fingerprint(), bad_rows.is_skipping())
    return _read(folder, name, split, Settings(), read_with)


@functools.lru_cache(maxsize=4096)
def _read(
    folder: pathlib.Path, name: str, split: str, settings: Settings, _read_with: tuple
) -> rows.Rows:
    """Rows of a split. `_read_with` tells caches apart."""
    if name not in _task_ids(folder):
        raise errors.UserError(
            f"{name} is not in the partition of {folder}, so it has no task id."
            f"{errors.near(name, _task_ids(folder))}"
        )
    part, _, sample = split.partition("_")
    seeds = [int(sample)] if sample else settings.seeds[:1] if part == "test" else settings.seeds
    prefix = f" [{name}] " if settings.with_task_name else " "
    examples = [
        registration.TextExample(
            prefix + row.input,
            " " + row_store.draw_answer(row.outputs, row.input, settings.seed),
            references=row.outputs,
        )
        for seed in seeds
        for row in files.read(files.path_of(folder, name, seed, PARTS.get(part, part)))
    ]
    return registration.encode(examples, _task_ids(folder)[name], settings.max_input_tokens)


def _register_task(name: str, metric: str | None) -> str:
    """Registers a task of this name, reported by one of CrossFit's metrics; returns SeqIO's."""
    reporting = rows.Reporting(metric and files.METRICS[metric], name)
    shared = (_rows, _splits, Settings, scores.METRIC_FNS)
    return registration.add_task(PREFIX, name, *shared, reporting)


def _list(group: str) -> Sequence[str]:
    """Names of the tasks of a group of the user's partition, registered."""
    folder = roots.folder(PREFIX)
    metrics = files.own_metrics(folder)
    return [_register_task(name, metrics.get(name)) for name in files.partition(folder)[group]]


def register() -> None:
    """Adds the tasks of the random partition and the mixtures to SeqIO's registries."""
    for listed in files.table().values():
        _register_task(listed.name, listed.metric)
    for group in files.GROUPS:
        names = functools.partial(_list, group)
        registration.add_mixture(f"{PREFIX}_{group}", names, registration.num_rows)


register()
