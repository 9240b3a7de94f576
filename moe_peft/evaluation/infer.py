"""`infer`: answers to questions in a file, one a line."""

from collections.abc import Mapping, Sequence
import dataclasses
import pathlib
import sys
from typing import Any

import numpy as np

from moe_peft import errors, methods
from moe_peft.config import settings as settings_lib
from moe_peft.data import encoding, files, lookup, plain_files, sentences, task_ids
from moe_peft.evaluation import inference
from moe_peft.models import decoding as decoding_lib
from moe_peft.models import special_ids
from moe_peft.partitioning import mesh as mesh_lib
from moe_peft.runtime import json_files
from moe_peft.runtime import progress as progress_lib
from moe_peft.training import restore

_Row = dict[str, Any]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings(restore.Settings):
    """Of `infer`."""

    mixture: lookup.Mixture  # whose vocabulary is used
    # Tokens of "inputs" (longer questions are cut, with a warning) and "targets".
    feature_lengths: Mapping[str, int]
    inputs: str  # the file to read
    outputs: str  # the file to write; appears when it is complete
    decoding: decoding_lib.Strategy  # how answers in free text are found, such as `Greedy()`
    batch_size: int = 64  # rows of a batch, over all devices
    length_normalized_choices: bool = False  # rank by log-likelihood per token, not by its sum
    seed: int = 0  # of random decoding


@settings_lib.entry_point(Settings, "infer", module="evaluation")
def infer(settings: Settings) -> list[_Row]:
    """Writes an answer for each line of `inputs` to the JSON-lines file `outputs`, in order.

    A line is a question in plain text. A row of a .jsonl, .csv, .tsv or .parquet file has the
    question under "inputs", or in the columns that the run's own data has it in; for a choice among
    given answers, a list of texts under "choices"; for a method that routes by task, the name of a
    task that was trained. Whatever else it holds is copied. Blank lines are skipped. Each output
    line holds the input's fields and "prediction"; with choices also "log_likelihoods" and
    "num_tokens" of each.

    Raises UserError: a file, a line of it, the run or a setting is wrong.
    """
    limits = dict(zip(lookup.FEATURES, lookup.check_lengths(settings.feature_lengths)))
    ids = special_ids.of(settings.model)
    lookup.check_vocabulary(settings.mixture, settings.model.config.vocab_size, ids)
    json_files.check_writable(pathlib.Path(settings.outputs).parent)
    asked, rows = read(pathlib.Path(settings.inputs), settings.mixture)
    vocabulary = lookup.vocabulary(settings.mixture)
    questions = questions_of(asked, vocabulary, limits, settings.method)
    mesh = mesh_lib.make_mesh() if settings.mesh is None else settings.mesh
    shapes = inference.batch_shapes(settings.batch_size, limits, questions[0])
    restored = restore.model(settings, shapes, mesh)
    model = inference.AnsweringModel(restored.model, settings.batch_size, limits, mesh)
    with progress_lib.shown("infer", len(rows)) as progress:
        decoding = inference.limited(settings.decoding, limits["targets"])
        how = {"is_length_normalized": settings.length_normalized_choices, "seed": settings.seed}
        answers = model.answer(restored.params, questions, decoding, progress, **how)
    for row, question, answer in zip(rows, asked, answers, strict=True):
        row["prediction"] = text_of(answer, question, vocabulary)
        if isinstance(answer, inference.ChoiceScore):
            row |= answer.as_fields()
    json_files.write_jsonl(settings.outputs, rows)
    print(f"Written to {settings.outputs}.", file=sys.stderr)
    return rows


def read(path: pathlib.Path, mixture: lookup.Mixture) -> tuple[list[files.Question], list[_Row]]:
    """Returns the questions of a file, in the columns of the user's own data, and its rows."""
    columns = mixture if isinstance(mixture, files.Files) else files.Files()
    if path.suffix in plain_files.SUFFIXES:
        found = list(plain_files.read(path))
        asked = [columns.question(path, place, row) for place, row in found]
        rows = [row for _, row in found]
    else:
        try:
            text = path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise errors.UserError(f"{path} cannot be read: {error}.") from error
        asked = [files.Question(line) for line in text.split("\n") if line.strip()]
        rows = [{"inputs": question.inputs} for question in asked]
    if not rows:
        raise errors.UserError(f"{path} holds no questions.")
    return asked, rows


def text_of(answer: Any, question: files.Question, vocabulary: Any) -> str:
    """Returns the answer that a model gave, or chose."""
    if isinstance(answer, inference.ChoiceScore):
        return question.choices[answer.best]
    return vocabulary.decode(answer.tolist())


def questions_of(
    asked: Sequence[files.Question],
    vocabulary: Any,
    limits: Mapping[str, int],
    method: methods.Method,
) -> list[inference.Question]:
    """Returns the questions as the model reads them; says how many are cut.

    Raises UserError where the method routes by task and a question names none that it knows.
    """
    encode = lambda text: np.array(vocabulary.encode(text), np.int32)
    encoded = [encode(question.inputs) for question in asked]
    num_cut = sum(len(ids) >= limits["inputs"] for ids in encoded)
    if num_cut:
        print(
            f"WARNING: {num_cut} of {len(asked)} questions are longer than {limits['inputs']} "
            "tokens, end mark included, and were cut.",
            file=sys.stderr,
        )
    end = lookup.ids_of_vocabulary(vocabulary).eos
    inputs = [encoding.with_end(ids, limits["inputs"], end) for ids in encoded]
    sentence_encoder, features = sentences.configured(), [{} for _ in asked]
    if sentence_encoder is not None:
        # Of what the model reads: a question that is cut has the embedding of its beginning.
        embeddings = sentence_encoder([vocabulary.decode(ids.tolist()) for ids in inputs])
        features = [{"sentence_embeddings": embedding} for embedding in embeddings]
    if method.num_tasks is not None:
        for number, (question, own) in enumerate(zip(asked, features, strict=True), 1):
            if question.task is None:
                raise errors.UserError(
                    f"{method.name!r} routes by task, and question {number} does not say which "
                    "task it is of; expected the name of a trained task in the column of tasks."
                )
            own["task_ids"] = np.int32(question.task)
            task_ids.check_ids(own["task_ids"][None], method.num_tasks, f"question {number}")
    choice = lambda text: encoding.with_end(encode(text), limits["targets"], end)
    return [
        inference.Question(ids, choices=tuple(map(choice, question.choices)), features=own)
        for ids, question, own in zip(inputs, asked, features, strict=True)
    ]
