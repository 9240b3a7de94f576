"""Super-NaturalInstructions as SeqIO tasks, `superni_<task>`, over the official files.

Mixtures, all of equal rates:

* `superni_train`: the training list (756 tasks); splits train, validation.
* `superni_test`: the test list (119 tasks); splits train, test.
* `superni_mhr`, `superni_poly_s`: the 20 and the 16 test tasks of the MHR papers.

Registering reads no data. Which tasks exist is what `DATA_DIR/superni/splits/default` lists; their
ids are their places in the sorted training list, then in the sorted test list. Token ids are kept
on disk after the first reading (`row_store`). Settings: `superni.configured`.
"""

from collections.abc import Iterable, Mapping, Sequence
import dataclasses
import functools
import pathlib
from typing import Literal

import gin

from moe_peft import errors
from moe_peft.data import bad_rows, cache, registration, roots, row_store, rows, vocabularies
from moe_peft.data.superni import files, prompts, sampling
from moe_peft.tasks import scores

PREFIX = "superni"
# Categories that the official scorer reports by exact match; all others by Rouge-L.
EXACT_MATCH = {
    "Answerability Classification",
    "Cause Effect Classification",
    "Coreference Resolution",
    "Dialogue Act Recognition",
    "Textual Entailment",
    "Word Analogy",
}
_WRITING = 1  # another number where the same files and settings give other rows


@gin.configurable("configured", module=PREFIX)
@dataclasses.dataclass(frozen=True)
class Settings:
    """What gin sets for all SuperNI tasks, as `superni.configured`; `Settings()` is in force."""

    # "mhr" (definition only, as MHR's code writes it), "poly_s" (task name and definition), or one
    # of Tk-Instruct's: definition, definition_pos2, definition_pos2_neg2,
    # definition_pos2_explanation, pos2.
    prompt: str = prompts.MHR
    max_input_tokens: int = 1024  # end mark included; demonstrations beyond it are left out
    train_examples: int = 100  # of each training task
    validation_examples: int = 100  # of each training task
    test_examples: int = 100  # the first of a test task; never trained on
    seed: int = 42  # of the draws
    # "all" accepted answers count as right; or "one" of them, drawn at random, as in MHR's code.
    references: Literal["all", "one"] = "all"

    def __post_init__(self):
        prompts.check_name(self.prompt)
        errors.check_at_least("superni.configured.max_input_tokens", self.max_input_tokens, 2)
        for split, count in dataclasses.asdict(self.amounts).items():
            errors.check_at_least(f"superni.configured.{split}_examples", count, 0)

    @property
    def amounts(self) -> sampling.Amounts:
        """Instances of each split."""
        return sampling.Amounts(self.train_examples, self.validation_examples, self.test_examples)


def task_ids() -> dict[str, int]:
    """Ids of the tasks of the user's folder, by SuperNI's names; training tasks first."""
    return _task_ids(roots.folder(PREFIX))


@functools.cache
def _task_ids(folder: pathlib.Path) -> dict[str, int]:
    return {name: number for number, name in enumerate(files.all_names(folder))}


def _rows(name: str, split: str) -> rows.Rows:
    found = _rows_by_split(name)
    if split not in found:
        raise errors.UserError(
            f"{name} has no instances for its split {split!r}; it has {', '.join(found)}."
        )
    return found[split]


def _rows_by_split(name: str) -> dict[str, rows.Rows]:
    read_with = (vocabularies.fingerprint(), bad_rows.is_skipping())
    return _all_rows(roots.folder(PREFIX), name, Settings(), read_with)


@functools.lru_cache(maxsize=4096)
def _all_rows(
    folder: pathlib.Path, name: str, settings: Settings, read_with: tuple
) -> dict[str, rows.Rows]:
    """Rows of each split that has some, from the cache of ids. `read_with` tells caches apart."""
    if name not in _task_ids(folder):
        raise errors.UserError(
            f"{name} is in neither list of {folder / 'splits' / 'default'}; so it has no task id."
            f"{errors.near(name, _task_ids(folder))}"
        )
    path = files.path_of(folder, name)
    is_test_task = name in files.split_list(folder, "test")
    stamp = (path.absolute(), path.stat().st_size, path.stat().st_mtime_ns)
    key = (_WRITING, settings, is_test_task, read_with, stamp)
    chosen = functools.cache(lambda: _chosen(folder, name, settings, is_test_task))
    lines = lambda split: registration.lines(chosen().get(split, ()), settings.max_input_tokens)
    found = {}
    for split in ("train", "test" if is_test_task else "validation"):
        make = functools.partial(lines, split)
        stored = row_store.stored(cache.folder() / PREFIX, f"{name}-{split}", key, make)
        if len(stored):
            split_rows = registration.as_rows(stored, _task_ids(folder)[name])
            found[split] = dataclasses.replace(split_rows, references=stored.references)
    if not found:
        raise errors.UserError(f"{path} has no instances.")
    return found


def _chosen(
    folder: pathlib.Path, name: str, settings: Settings, is_test_task: bool
) -> Mapping[str, Iterable[registration.TextExample]]:
    """The examples of every split."""
    task = files.read(folder, name)
    encode = vocabularies.get().encode

    def example(instance: files.Instance) -> registration.TextExample:
        num_tokens = lambda text: len(encode(text))
        inputs, ending = prompts.write_prompt(
            settings.prompt, task, instance, num_tokens, settings.max_input_tokens
        )
        question = f"{task.name}\n{instance.input}"
        targets = row_store.draw_answer(instance.outputs, question, settings.seed)
        accepted = instance.outputs if settings.references == "all" else (targets,)
        return registration.TextExample(inputs, targets, ending=ending, references=accepted)

    found = sampling.split(task, is_test_task, settings.amounts, settings.seed)
    return {split: map(example, instances) for split, instances in found.items()}


def _register_task(name: str) -> str:
    """Registers a task, reported by its category where the lists tell it; returns SeqIO's name."""
    category = getattr(files.table().get(name), "category", None)
    metric = "exact_match_normalized" if category in EXACT_MATCH else "rouge_l"
    shared = (_rows, lambda own: tuple(_rows_by_split(own)), Settings, scores.METRIC_FNS)
    return registration.add_task(PREFIX, name, *shared, rows.Reporting(metric, category))


def _list(split: str) -> Sequence[str]:
    """Names of the tasks of the user's list, registered."""
    return [_register_task(name) for name in files.split_list(roots.folder(PREFIX), split)]


def register() -> None:
    """Adds the tasks of the official lists and the mixtures to SeqIO's registries."""
    registered = {_register_task(listed.name): listed for listed in files.table().values()}
    for split in ("train", "test"):
        registration.add_mixture(f"{PREFIX}_{split}", functools.partial(_list, split))
    for paper in ("mhr", "poly_s"):
        names = [name for name, listed in registered.items() if paper in listed.sets]
        registration.add_mixture(f"{PREFIX}_{paper}", functools.partial(tuple, names))


register()
