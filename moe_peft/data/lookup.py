"""Tasks and mixtures, and what can be wrong with asking for one.

A mixture or task is the name of one that SeqIO knows, or `files.Files`: rows of a user's own files.
SeqIO, and TensorFlow with it, is imported when a name is looked up.
"""

from collections.abc import Mapping
from typing import Any

from moe_peft import errors
from moe_peft.data import file_tasks, files, rows
from moe_peft.models import special_ids

FEATURES = ("inputs", "targets")

Mixture = str | files.Files | file_tasks.Task
Task = Any  # a seqio.Task, or a files.Task with the attributes of one that are used here


def get(mixture: Mixture) -> Any:
    """The task or mixture of that name; a UserError with near names if there is none."""
    if not isinstance(mixture, str):
        return mixture
    import seqio

    known = {*seqio.TaskRegistry.names(), *seqio.MixtureRegistry.names()}
    if mixture not in known:
        raise errors.UserError(
            f"No task or mixture is called {mixture!r}.{errors.near(mixture, known)} "
            "Import the module that registers it (for the CLDR suite, moe_peft.tasks.cldr)."
        )
    return seqio.get_mixture_or_task(mixture)


def tasks_of(mixture: Mixture) -> list[Task]:
    """The tasks of a mixture, or the task itself, in order."""
    found = get(mixture)
    if isinstance(found, files.Files):
        return found.tasks
    if isinstance(found, file_tasks.Task):
        return [found]
    import seqio

    return list(seqio.get_subtasks(found))


def mixture_of(task: Task) -> Mixture:
    """What has the rows of one task only."""
    return task if isinstance(task, file_tasks.Task) else task.name


def reporting(task: Task) -> rows.Reporting:
    """How the benchmark of a task reports it, as far as its registration says so."""
    return getattr(task.source, "reporting", rows.NOT_REPORTED)


def vocabulary(mixture: Mixture) -> Any:
    """The vocabulary of inputs and targets, with `encode` and `decode`; they must agree."""
    features = get(mixture).output_features
    found = features["targets"].vocabulary
    if features["inputs"].vocabulary != found:
        raise errors.UserError(f"{mixture!r} uses different vocabularies for inputs and targets.")
    return found


def special_ids_of(mixture: Mixture | Task) -> special_ids.SpecialIds:
    """Those that the vocabulary tells; decoders start with padding, and what it leaves out is T5's.

    Only a network tells what its decoder starts with.
    """
    return ids_of_vocabulary(vocabulary(mixture))


def ids_of_vocabulary(found: Any) -> special_ids.SpecialIds:
    """See `special_ids_of`."""
    pad = _told(found, "pad_id", special_ids.T5.pad)
    return special_ids.SpecialIds(pad, _told(found, "eos_id", special_ids.T5.eos), pad)


def check_special_ids(found: Any, ids: special_ids.SpecialIds, where: Any) -> None:
    """Raises UserError if a vocabulary, which is that of `where`, tells other ids than `ids`."""
    theirs = ids_of_vocabulary(found)
    told = {"padding": (_told(found, "pad_id", ids.pad), ids.pad), "the end": (theirs.eos, ids.eos)}
    for what, (theirs, ours) in told.items():
        if theirs != ours:
            raise errors.UserError(
                f"The vocabulary of {where!r} has the id {theirs} for {what}, and the model "
                f"{ours} ({ids}): they are of different models. Take the tokenizer of the model's "
                "own folder, or set T5Config.pad_id, eos_id and start_id as the model was trained."
            )
    if getattr(found, "unk_id", None) == ids.pad and not getattr(found, "spells_all", False):
        raise errors.UserError(
            f"The vocabulary of {where!r} has the id {ids.pad} for what it cannot spell, and the "
            "model for padding: unknown pieces would not be seen. Is this the model's tokenizer?"
        )


def _told(found: Any, name: str, default: int) -> int:
    value = getattr(found, name, None)
    return default if value is None or value < 0 else value  # SentencePiece's -1: there is none.


def check_vocabulary(
    mixture: Mixture, vocab_size: int, ids: special_ids.SpecialIds = special_ids.T5
) -> None:
    """Refuses a mixture whose ids the model has no embedding for, or whose special ids differ."""
    found = vocabulary(mixture)
    check_special_ids(found, ids, mixture)
    check_ids(found, vocab_size, mixture)


def check_ids(ids: Any, vocab_size: int, whose: Any) -> None:
    """Refuses a vocabulary that is longer than the model's embedding; a shorter one is usual."""
    if ids.vocab_size > vocab_size:
        raise errors.UserError(
            f"{whose!r} has token ids up to {ids.vocab_size - 1}, the model's vocab_size is "
            f"{vocab_size}: the backbone was trained with another vocabulary, or tokens were added "
            "without rows for them."
        )


def check_lengths(feature_lengths: Mapping[str, int]) -> tuple[int, int]:
    """(inputs, targets) tokens of a row."""
    if set(feature_lengths) != set(FEATURES) or any(
        not isinstance(length, int) or length < 2 for length in feature_lengths.values()
    ):
        raise errors.UserError(
            f"feature_lengths is {dict(feature_lengths)}; expected whole numbers of at least 2 for "
            "'inputs' and 'targets', for example {'inputs': 56, 'targets': 28}."
        )
    return feature_lengths["inputs"], feature_lengths["targets"]


def tasks_with(mixture: Mixture, split: str) -> list[Task]:
    """Tasks of a mixture that have a split; a UserError where one is empty."""
    tasks = tasks_of(mixture)
    found = [task for task in tasks if split in task.splits]
    if not found:
        splits = sorted({split for task in tasks for split in task.splits})
        raise errors.UserError(
            f"{mixture!r} has no split {split!r}; it has {', '.join(splits) or 'none'}."
            f"{errors.near(split, splits)}"
        )
    for task in found:
        if task.num_input_examples(split) == 0:
            raise errors.UserError(f"Task {task.name!r} has no examples in its {split!r} split.")
    return found
