"""SeqIO's evaluator, on tasks that say of each example which task and template it is."""

from collections.abc import Sequence
from typing import Any

import gin
import seqio

_TEXT = ("inputs", "targets")


def evaluator(mixture_or_task_name: str, **kwargs: Any) -> seqio.Evaluator:
    """Returns `@seqio.Evaluator` for the tasks of a mixture.

    SeqIO's measures every feature that a task declares along its first axis, and scalars have none.
    Here the tasks declare their texts only; examples keep everything.

    Args:
      mixture_or_task_name: registered name.
      **kwargs: as T5X passes them, besides what gin binds for `seqio.Evaluator`.
    """
    name = f"{mixture_or_task_name}_texts"
    if name not in seqio.MixtureRegistry.names():
        tasks = seqio.get_subtasks(seqio.get_mixture_or_task(mixture_or_task_name))
        seqio.MixtureRegistry.add_provider(name, _Texts(name, tasks))
    return gin.get_configurable(seqio.Evaluator)(name, **kwargs)


class _Texts(seqio.Mixture):
    """Tasks by one name, which is all that the evaluator asks of a mixture."""

    def __init__(self, name: str, tasks: Sequence[seqio.Task]):
        # Not SeqIO's own constructor, which wants registered tasks.
        self._name = name
        self._of_texts = [
            task.replace(output_features={key: task.output_features[key] for key in _TEXT})
            for task in tasks
        ]

    @property
    def tasks(self) -> Sequence[seqio.Task]:
        """The tasks, by the names they had."""
        return self._of_texts
