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
from moe_peft.data import bad_rows, registration, roots, row_store, rows, vocabularies
from moe_peft.data.cldr import store
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


@dataclasses.dataclass(frozen=True)
class Settings:
    """How examples are chosen and written; see `configured`."""

    prompt: str
    max_input_tokens: int
    amounts: sampling.Amounts
    seed: int
    references: str


@gin.configurable(module="superni")
def configured(
    prompt: str = prompts.MHR,
    max_input_tokens: int = 1024,
    train_examples: int = 100,
    validation_examples: int = 100,
    test_examples: int = 100,
    seed: int = 42,
    references: Literal["all", "one"] = "all",
) -> Settings:
    """What gin sets for all SuperNI tasks.

    Args:
      prompt: "mhr" (definition only, as MHR's code writes it), "poly_s" (task name and definition),
        or one of Tk-Instruct's settings: definition, definition_pos2, definition_pos2_neg2,
        definition_pos2_explanation, pos2.
      max_input_tokens: longest prompt, end mark included; demonstrations beyond it are left out.
      train_examples: of each training task.
      validation_examples: of each training task.
      test_examples: the first so many of a test task; they are nobody's training examples.
      seed: of the draws.
      references: "all" accepted answers count as right; or "one" of them, drawn at random, as in
        MHR's code.
    """
    prompts.check(prompt)
    amounts = sampling.Amounts(train_examples, validation_examples, test_examples)
    if min(train_examples, validation_examples, test_examples) < 0 or max_input_tokens < 2:
        raise errors.UserError(
            f"superni.configured: {amounts} with max_input_tokens {max_input_tokens}; expected "
            "numbers of examples from 0 and at least 2 tokens."
        )
    return Settings(prompt, max_input_tokens, amounts, seed, references)


def task_ids() -> dict[str, int]:
    """Ids of the tasks of the user's folder, by SuperNI's names; training tasks first."""
    return _task_ids(roots.folder(PREFIX))


@functools.cache
def _task_ids(folder: pathlib.Path) -> dict[str, int]:
    return {name: number for number, name in enumerate(files.all_names(folder))}


def _rows(name: str, split: str) -> rows.Rows:
    found = _all_rows(roots.folder(PREFIX), name, configured(), _read_with())
    if split not in found:
        raise errors.UserError(
            f"{name} has no instances for its split {split!r}; it has {', '.join(found)}."
        )
    return found[split]


def _splits(name: str) -> tuple[str, ...]:
    return tuple(_all_rows(roots.folder(PREFIX), name, configured(), _read_with()))


def _read_with() -> tuple:
    return vocabularies.fingerprint(), bad_rows.is_skipping()


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
    found = {}
    for split in ("train", "test" if is_test_task else "validation"):
        lines = lambda split=split: registration.lines(
            chosen().get(split, ()), settings.max_input_tokens
        )
        stored = row_store.stored(store.folder() / PREFIX, f"{name}-{split}", key, lines)
        if len(stored):
            found[split] = registration.as_rows(stored, _task_ids(folder)[name])
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
        inputs, ending = prompts.write(
            settings.prompt,
            task,
            instance,
            lambda text: len(encode(text)),
            settings.max_input_tokens,
        )
        targets = sampling.reference(task, instance, settings.seed)
        accepted = instance.outputs if settings.references == "all" else (targets,)
        return registration.TextExample(inputs, targets, ending=ending, references=accepted)

    found = sampling.split(task, is_test_task, settings.amounts, settings.seed)
    return {split: map(example, instances) for split, instances in found.items()}


def _reporting(listed: files.Listed | None) -> registration.Reporting:
    """By its category, where the official scorer tells it, and that category's metric."""
    is_exact = listed is not None and listed.category in EXACT_MATCH
    metric = "exact_match_normalized" if is_exact else "rouge_l"
    return registration.Reporting(metric, listed and listed.category)


def _register_task(name: str) -> str:
    """Registers a task of this name; returns SeqIO's."""
    registered = registration.task_name(PREFIX, name)
    registration.add_task(
        registered,
        functools.partial(_rows, name),
        functools.partial(_splits, name),
        _reporting(files.table().get(name)),
        scores.METRIC_FNS,
    )
    return registered


def _list(split: str) -> Sequence[str]:
    """Names of the tasks of the user's list, registered."""
    return [_register_task(name) for name in files.split_list(roots.folder(PREFIX), split)]


def register() -> None:
    """Adds the tasks of the official lists and the mixtures to SeqIO's registries."""
    chosen: dict[str, list[str]] = {"mhr": [], "poly_s": []}
    for listed in files.table().values():
        registered = _register_task(listed.name)
        for paper in chosen:
            if paper in listed.sets:
                chosen[paper].append(registered)
    for split in ("train", "test"):
        registration.add_mixture(f"{PREFIX}_{split}", functools.partial(_list, split))
    for paper, names in chosen.items():
        registration.add_mixture(f"{PREFIX}_{paper}", functools.partial(tuple, names))


register()
