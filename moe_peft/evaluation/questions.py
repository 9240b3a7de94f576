"""What is asked: the examples of a mixture as questions to a model and rows of a report."""

from collections.abc import Iterator, Mapping, Sequence
import dataclasses
import hashlib
import json
import re
from typing import Any

import numpy as np

from moe_peft import errors
from moe_peft.data import encoding, evaluation_data, lookup
from moe_peft.evaluation import inference

Row = dict[str, Any]

_ROUTING_FEATURES = ("task_ids", "sentence_embeddings")


@dataclasses.dataclass(frozen=True)
class MixtureQuestions:
    """A mixture, ready to be asked."""

    questions: list[inference.Question]  # as the model reads them
    # What is known about each: task, group, template, index, inputs, targets, and choices and
    # references (accepted answers) where it has some.
    rows: list[Row]
    is_cut: list[bool]  # whether the question's target did not fit and was cut
    vocabulary: Any  # turns ids into text
    own_metrics: Mapping[str, str | None]  # task to the metric of its benchmark, None if unknown

    def tasks(self) -> dict[str, range]:
        """Places of each task's questions."""
        found: dict[str, range] = {}
        for i, row in enumerate(self.rows):
            start = found[row["task"]].start if row["task"] in found else i
            found[row["task"]] = range(start, i + 1)
        return found

    def parts(self, size: int) -> Iterator[dict[str, range]]:
        """Tasks in order, so many together that they have at least `size` questions."""
        part: dict[str, range] = {}
        for task, places in self.tasks().items():
            part[task] = places
            if sum(map(len, part.values())) >= size:
                yield part
                part = {}
        if part:
            yield part

    def digest(self, places: Sequence[int]) -> str:
        """SHA-256 of some questions and of what is known about them.

        Where they stand in the mixture and what they are reported under do not count.
        """
        found = hashlib.sha256()
        for place in places:
            question = self.questions[place]
            arrays = [question.inputs, question.targets, *question.choices]
            arrays += [question.features[name] for name in sorted(question.features)]
            for array in map(np.ascontiguousarray, arrays):
                found.update(f"{array.dtype} {array.shape}".encode() + array.tobytes())
            known = {k: v for k, v in self.rows[place].items() if k not in ("index", "group")}
            metric = self.own_metrics.get(known["task"])
            found.update(json.dumps([known, self.is_cut[place], metric]).encode())
        return found.hexdigest()


def read(
    mixture: lookup.Mixture,
    feature_lengths: Mapping[str, int],
    group: re.Pattern | None,
    split: str,
    max_examples_per_task: int | None = None,
    with_choices: bool = False,
) -> MixtureQuestions:
    """Returns every example of a split, task after task, or the first so many of each task.

    `group` is as from `compile_group`; None for the groups of the task's benchmark. Answer choices
    are kept `with_choices` only.

    Raises UserError: no such mixture or split, a task without group, a target that is not among
    the choices.
    """
    vocabulary, limit = lookup.vocabulary(mixture), feature_lengths["targets"]
    reporting = {task.name: lookup.reporting(task) for task in lookup.tasks_with(mixture, split)}
    own_group = lambda task: reporting[task].group or task
    groups = {t: own_group(t) if group is None else group_of(t, group) for t in reporting}
    own_metrics = {task: own.metric for task, own in reporting.items()}
    asked = MixtureQuestions([], [], [], vocabulary, own_metrics)
    encode = lambda text: np.array(vocabulary.encode(text), np.int32)
    ids = lookup.special_ids_of(mixture)
    choice_ids = lambda text: encoding.with_end(encode(text), limit, ids.eos)
    batches = evaluation_data.eval_examples(
        mixture, feature_lengths, split, max_examples_per_task=max_examples_per_task, ids=ids
    )
    for batch in batches:
        for i, example in enumerate(batch.examples):
            features = {name: value[i] for name, value in batch.features.items()}
            choices = example.answer_choices if with_choices else ()
            question = inference.Question(
                inputs=_unpad(features["encoder_input_tokens"], ids.pad),
                targets=_unpad(features["decoder_target_tokens"], ids.pad),
                choices=tuple(map(choice_ids, choices)),
                features={k: v for k, v in features.items() if k in _ROUTING_FEATURES},
            )
            is_full = len(question.targets) == limit
            asked.questions.append(question)
            group_name = groups[example.task]
            asked.rows.append(_row(example, len(asked.rows), group_name, list(choices)))
            asked.is_cut.append(is_full and len(encode(example.targets)) >= limit)
    return asked


def compile_group(task_group: str) -> re.Pattern:
    """The pattern whose first parenthesis finds a task's group in its name."""
    try:
        pattern = re.compile(task_group)
    except re.error as error:
        raise errors.UserError(
            f"task_group {task_group!r} is not a regular expression: {error}."
        ) from error
    if pattern.groups < 1:
        raise errors.UserError(
            f"task_group {task_group!r} has no parenthesis that says what to report under."
        )
    return pattern


def group_of(task: str, group: re.Pattern) -> str:
    """What a task is reported under: what the first parenthesis finds in its name."""
    match = group.fullmatch(task)
    if match is None:
        raise errors.UserError(
            f"The task {task!r} does not match task_group {group.pattern!r}, so it has nothing to "
            "be reported under."
        )
    return match[1]


def _row(example: Any, index: int, group: str, choices: list[str]) -> Row:
    row = {"task": example.task, "group": group, "template": example.template_id, "index": index}
    row |= {"inputs": example.inputs, "targets": example.targets}
    if example.references:
        row["references"] = list(example.references)
    if not choices:
        return row
    if example.targets.strip() not in [choice.strip() for choice in choices]:
        raise errors.UserError(
            f"Example {index} of {example.task!r} cannot be answered: its target "
            f"{example.targets!r} is none of its choices {choices}."
        )
    return {**row, "choices": choices}


def _unpad(ids: np.ndarray, pad_id: int) -> np.ndarray:
    return ids[: np.max(np.flatnonzero(ids != pad_id), initial=-1) + 1]
