"""Examples to evaluate on, in order, each once, with what a report wants to know about them."""

from collections.abc import Iterator, Mapping
import dataclasses
import itertools

import numpy as np

from moe_peft import errors
from moe_peft.data import encoding, lookup, rows, sentences, task_ids
from moe_peft.models import batches as batches_lib
from moe_peft.models import special_ids


@dataclasses.dataclass(frozen=True)
class Example:
    """What one row of a batch is, as text."""

    task: str  # name of its SeqIO task
    template_id: int  # which wording, 0 if the task has one
    inputs: str
    targets: str
    answer_choices: tuple[str, ...] = ()  # empty where the answer is free text
    references: tuple[str, ...] = ()  # every accepted answer; empty where it is `targets` alone

    @property
    def accepted(self) -> tuple[str, ...]:
        """Every accepted answer."""
        return self.references or (self.targets,)


@dataclasses.dataclass(frozen=True)
class EvalBatch:
    """Model features and the examples they come from."""

    # Arrays of `batch_size` rows; those after the last example are padding.
    features: encoding.Batch
    examples: list[Example]  # one per real row


def eval_examples(
    mixture_or_task: lookup.Mixture,
    feature_lengths: Mapping[str, int],
    split: str = "validation",
    batch_size: int = 64,
    max_examples_per_task: int | None = None,
    sentence_encoder: sentences.Encoder | None = None,
    ids: special_ids.SpecialIds | None = None,
) -> Iterator[EvalBatch]:
    """Every example of a split once, task after task.

    Args:
      mixture_or_task: a registered name, or `files.Files`.
      feature_lengths: {"inputs": tokens, "targets": tokens}, end mark included.
      split: of the tasks; tasks without it are left out.
      batch_size: rows of a batch.
      max_examples_per_task: only the first of each task; None for all. CLDR tasks hold an item's
        four wordings together, so a multiple of four keeps templates balanced.
      sentence_encoder: adds `sentence_embeddings`; by default `sentences.configured`.
      ids: of the network; None: as the vocabulary tells.
    """
    lengths = lookup.check_lengths(feature_lengths)
    errors.check_at_least("batch_size", batch_size, 1)
    tasks = lookup.tasks_with(mixture_or_task, split)
    ids = lookup.special_ids_of(mixture_or_task) if ids is None else ids
    batches = _batches(tasks, lengths, split, batch_size, max_examples_per_task, ids)
    sentence_encoder = sentence_encoder or sentences.configured()
    if sentence_encoder is None:
        return batches
    vocabulary = lookup.vocabulary(mixture_or_task)
    embedded = lambda features: sentences.add_embeddings(features, vocabulary, sentence_encoder)
    return (EvalBatch(embedded(batch.features), batch.examples) for batch in batches)


def _batches(tasks, lengths, split, batch_size, limit, ids) -> Iterator[EvalBatch]:
    pairs = (
        (task, source, index)
        for task in tasks
        for source in [task_rows(task, split, lengths, limit)]
        for index in range(len(source) if limit is None else min(limit, len(source)))
    )
    while chosen := list(itertools.islice(pairs, batch_size)):
        pairs_of = [(source, index) for _, source, index in chosen]
        found = encoding.encode(pairs_of, lengths, ids=ids)
        features = batches_lib.filled_up(found, batch_size, ids.pad)
        if "template_ids" in features:
            features = task_ids.per_template(features)
        yield EvalBatch(features, [example(*place) for place in chosen])


def example(task: lookup.Task, source: rows.Rows, index: int) -> Example:
    """What one row of a task is, as text."""

    def text(name: str) -> str:
        ids = getattr(source, name)[index]
        return task.output_features[name].vocabulary.decode(ids.tolist())

    templates = source.scalars.get("template_ids")
    targets = text("targets")
    references = source.references[index] if source.references else ()
    choices = source.answer_choices[index] if source.answer_choices else ()
    if references and targets not in (choices or references):  # the vocabulary spells it otherwise
        targets = references[0]
    return Example(
        task=task.name,
        template_id=0 if templates is None else int(templates[index]),
        inputs=text("inputs"),
        targets=targets,
        answer_choices=choices,
        references=references,
    )


def task_rows(
    task: lookup.Task, split: str, lengths: tuple[int, int], limit: int | None = None
) -> rows.Rows:
    """The rows of a task, from memory or, the first `limit` of them, through SeqIO."""
    if hasattr(task.source, "rows"):
        encoding.warn_if_cut(task.name, task.source.rows(split), lengths)
        return task.source.rows(split)
    dataset = task.get_dataset(None, split, shuffle=False)
    found = list(dataset.take(-1 if limit is None else limit).as_numpy_iterator())
    if not found:
        raise errors.UserError(f"Task {task.name!r} has no examples in its {split!r} split.")
    scalars = {
        name: np.array([row[name] for row in found], np.int32)
        for name in ("task_ids", "template_ids")
        if name in found[0]
    }
    end = lookup.special_ids_of(task).eos
    without_end = lambda ids: ids[:-1] if ids[-1:] == [end] else ids
    ragged = {
        name: rows.Ragged.from_sequences([without_end(row[name]) for row in found])
        for name in encoding.FEATURES
    }
    listed = [row["answer_choices"] for row in found if "answer_choices" in row]
    choices = [tuple(choice.decode() for choice in texts) for texts in listed]
    return rows.Rows(**ragged, scalars=scalars, answer_choices=choices)
