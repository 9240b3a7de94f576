"""Tasks and mixtures by name, and what can be wrong with asking for one."""

from collections.abc import Mapping

import seqio

from moe_peft import errors
from moe_peft.data import registration

FEATURES = ("inputs", "targets")


def get(name: str) -> seqio.Task | seqio.Mixture:
    """The task or mixture of that name; a UserError with near names if there is none."""
    known = {*seqio.TaskRegistry.names(), *seqio.MixtureRegistry.names()}
    if name not in known:
        raise errors.UserError(
            f"No task or mixture is called {name!r}.{errors.near(name, known)} "
            "Import the module that registers it (for the CLDR suite, moe_peft.tasks.cldr)."
        )
    return seqio.get_mixture_or_task(name)


def tasks_of(name: str) -> list[seqio.Task]:
    """The tasks of a mixture, or the task itself, in order."""
    return list(seqio.get_subtasks(get(name)))


def reporting(task: seqio.Task) -> registration.Reporting:
    """How the benchmark of a task reports it, as far as its registration says so."""
    return getattr(task.source, "reporting", registration.Reporting())


def vocabulary(name: str) -> seqio.Vocabulary:
    """The vocabulary of inputs and targets; they must agree."""
    features = get(name).output_features
    found = features["targets"].vocabulary
    if features["inputs"].vocabulary != found:
        raise errors.UserError(f"{name!r} uses different vocabularies for inputs and targets.")
    return found


def check_vocabulary(name: str, vocab_size: int) -> None:
    """Refuses a mixture whose ids the model has no embedding for."""
    needed = vocabulary(name).vocab_size
    if needed > vocab_size:
        raise errors.UserError(
            f"{name!r} has token ids up to {needed - 1}, the model's vocab_size is {vocab_size}: "
            f"the backbone was trained with another vocabulary than the tasks."
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


def tasks_with(mixture_or_task: str, split: str) -> list[seqio.Task]:
    """Tasks of a mixture that have a split; a UserError where one is empty."""
    tasks = tasks_of(mixture_or_task)
    found = [task for task in tasks if split in task.splits]
    if not found:
        splits = sorted({split for task in tasks for split in task.splits})
        raise errors.UserError(
            f"{mixture_or_task!r} has no split {split!r}; it has {', '.join(splits) or 'none'}."
            f"{errors.near(split, splits)}"
        )
    for task in found:
        if task.num_input_examples(split) == 0:
            raise errors.UserError(f"Task {task.name!r} has no examples in its {split!r} split.")
    return found
