"""`infer`: answers to questions in a file, one a line."""

from collections.abc import Mapping, Sequence
import dataclasses
import pathlib
import sys
from typing import Any

import numpy as np

from moe_peft import errors
from moe_peft.config import settings as settings_lib
from moe_peft.data import encoding, lookup, sentences
from moe_peft.evaluation import inference
from moe_peft.models import decoding as decoding_lib
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

    A line is a question in plain text. In a file that ends in .jsonl it is an object with the
    question under "inputs" and, for a choice among given answers, a list of texts under "choices";
    whatever else it holds is copied. Blank lines are skipped. Each output line holds the input's
    fields and "prediction"; with choices also "log_likelihoods" and "num_tokens" of each.

    Raises UserError: a file, a line of it, the run or a setting is wrong.
    """
    lookup.check_lengths(settings.feature_lengths)
    limits = dict(settings.feature_lengths)
    lookup.check_vocabulary(settings.mixture, settings.model.config.vocab_size)
    vocabulary = lookup.vocabulary(settings.mixture)
    rows = _read(pathlib.Path(settings.inputs))
    questions = _questions(rows, vocabulary, limits)
    mesh = mesh_lib.make_mesh() if settings.mesh is None else settings.mesh
    shapes = inference.batch_shapes(settings.batch_size, limits, questions[0])
    restored = restore.model(settings, shapes, mesh)
    model = inference.AnsweringModel(restored.model, settings.batch_size, limits, mesh)
    with progress_lib.shown("infer", len(rows)) as progress:
        decoding = inference.limited(settings.decoding, limits["targets"])
        how = {"is_length_normalized": settings.length_normalized_choices, "seed": settings.seed}
        answers = model.answer(restored.params, questions, decoding, progress, **how)
    for row, answer in zip(rows, answers, strict=True):
        if isinstance(answer, inference.ChoiceScore):
            row["prediction"] = row["choices"][answer.best]
            row |= answer.as_fields()
        else:
            row["prediction"] = vocabulary.decode(answer.tolist())
    json_files.write_jsonl(settings.outputs, rows)
    print(f"Written to {settings.outputs}.", file=sys.stderr)
    return rows


def _read(path: pathlib.Path) -> list[_Row]:
    """Objects with "inputs", from a .jsonl file or a plain text."""
    if path.suffix == ".jsonl":
        rows = list(json_files.read_jsonl(path))
    else:
        try:
            text = path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise errors.UserError(f"{path} cannot be read: {error}.") from error
        rows = [{"inputs": line} for line in text.split("\n") if line.strip()]
    for number, row in enumerate(rows, 1):
        if not isinstance(row.get("inputs"), str):
            raise errors.UserError(
                f'{path}: object {number} has no text under "inputs"; it has '
                f"{', '.join(row) or 'nothing'}."
            )
        choices = row.get("choices") or []
        if not isinstance(choices, list) or not all(isinstance(c, str) for c in choices):
            raise errors.UserError(f'{path}: "choices" of object {number} is not a list of texts.')
    if not rows:
        raise errors.UserError(f"{path} holds no questions.")
    return rows


def _questions(
    rows: Sequence[_Row], vocabulary: Any, limits: Mapping[str, int]
) -> list[inference.Question]:
    """The rows as the model reads them; says how many are cut."""
    encode = lambda text: np.array(vocabulary.encode(text), np.int32)
    encoded = [encode(row["inputs"]) for row in rows]
    num_cut = sum(len(ids) >= limits["inputs"] for ids in encoded)
    if num_cut:
        print(
            f"WARNING: {num_cut} of {len(rows)} questions are longer than {limits['inputs']} "
            "tokens, end mark included, and were cut.",
            file=sys.stderr,
        )
    inputs = [encoding.with_end(ids, limits["inputs"]) for ids in encoded]
    sentence_encoder, features = sentences.configured(), [{} for _ in rows]
    if sentence_encoder is not None:
        # Of what the model reads: a question that is cut has the embedding of its beginning.
        embeddings = sentence_encoder([vocabulary.decode(ids.tolist()) for ids in inputs])
        features = [{"sentence_embeddings": embedding} for embedding in embeddings]
    choice = lambda text: encoding.with_end(encode(text), limits["targets"])
    choices = [tuple(map(choice, row.get("choices") or ())) for row in rows]
    return [
        inference.Question(ids, choices=texts, features=own)
        for ids, texts, own in zip(inputs, choices, features, strict=True)
    ]
