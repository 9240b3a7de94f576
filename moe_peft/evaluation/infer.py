"""`infer`: answers to questions in a file, one a line."""

from collections.abc import Mapping
import dataclasses
import pathlib
import sys
from typing import Any

from flax import linen as nn
import gin
import jax
import numpy as np

from moe_peft import errors, methods
from moe_peft.evaluation import inference, restore
from moe_peft.models import decoding as decoding_lib
from moe_peft.partitioning import mesh as mesh_lib
from moe_peft.runtime import json_files
from moe_peft.runtime import progress as progress_lib


@gin.register(module="evaluation")
def infer(
    model: nn.Module = gin.REQUIRED,
    method: methods.Method = gin.REQUIRED,
    backbone: str = gin.REQUIRED,
    model_dir: str = gin.REQUIRED,
    mixture: str = gin.REQUIRED,
    feature_lengths: Mapping[str, int] = gin.REQUIRED,
    inputs: str = gin.REQUIRED,
    outputs: str = gin.REQUIRED,
    decoding: decoding_lib.Strategy = gin.REQUIRED,
    batch_size: int = 64,
    length_normalized_choices: bool = False,
    step: int | None = None,
    frozen_dtype: str = "float32",
    seed: int = 0,
    mesh: jax.sharding.Mesh | None = None,
) -> list[dict[str, Any]]:
    """Writes an answer for each line of `inputs` to the JSON-lines file `outputs`, in order.

    A line is a question in plain text. In a file that ends in .jsonl it is an object with the
    question under "inputs" and, for a choice among given answers, a list of texts under "choices";
    whatever else it holds is copied. Blank lines are skipped. Each output line holds the input's
    fields and "prediction"; with choices also "log_likelihoods" and "num_tokens" of each.

    Args:
      model: the network without adapters.
      method: as trained; `frozen` asks the backbone itself and needs no checkpoint.
      backbone: as trained.
      model_dir: folder of the run.
      mixture: whose vocabulary is used.
      feature_lengths: tokens of "inputs" (longer questions are cut, with a warning) and "targets".
      inputs: the file to read.
      outputs: the file to write; appears when it is complete.
      decoding: how answers in free text are found, such as `Greedy()`.
      batch_size: rows of a batch, over all devices.
      length_normalized_choices: rank choices by log-likelihood per token, not by its sum.
      step: which checkpoint; None for the newest.
      frozen_dtype: "float32", or "bfloat16" for half the memory.
      seed: of random decoding.
      mesh: devices; default: all, data-parallel.

    Raises:
      UserError: a file, a line of it, the run or a setting is wrong.
    """
    from moe_peft.data import encoding, lookup, sentences  # Imports TensorFlow.

    limits = dict(zip(("inputs", "targets"), lookup.check_lengths(feature_lengths), strict=True))
    lookup.check_vocabulary(mixture, model.config.vocab_size)
    vocabulary = lookup.vocabulary(mixture)
    rows = _read(pathlib.Path(inputs))
    encode = lambda text: np.array(vocabulary.encode(text), np.int32)
    encoded = [encode(row["inputs"]) for row in rows]
    questions = [
        inference.Question(
            inputs=encoding.with_end(ids, limits["inputs"]),
            choices=tuple(
                encoding.with_end(encode(choice), limits["targets"])
                for choice in row.get("choices") or ()
            ),
        )
        for ids, row in zip(encoded, rows, strict=True)
    ]
    sentence_encoder = sentences.configured()
    if sentence_encoder is not None:
        texts = [vocabulary.decode(question.inputs.tolist()) for question in questions]
        questions = [
            dataclasses.replace(question, features={"sentence_embeddings": embedding})
            for question, embedding in zip(questions, sentence_encoder(texts), strict=True)
        ]
    num_cut = sum(len(ids) >= limits["inputs"] for ids in encoded)
    if num_cut:
        print(
            f"WARNING: {num_cut} of {len(rows)} questions are longer than {limits['inputs']} "
            "tokens, end mark included, and were cut.",
            file=sys.stderr,
        )
    if decoding.max_decode_length is None:
        decoding = dataclasses.replace(decoding, max_decode_length=limits["targets"])

    mesh = mesh_lib.make_mesh() if mesh is None else mesh
    shapes = {
        "encoder_input_tokens": (batch_size, limits["inputs"]),
        "decoder_input_tokens": (batch_size, limits["targets"]),
        "decoder_target_tokens": (batch_size, limits["targets"]),
        **{name: (batch_size, *np.shape(v)) for name, v in questions[0].features.items()},
    }
    restored = restore.restore(
        model, method, backbone, model_dir, shapes, mesh, step=step, frozen_dtype=frozen_dtype
    )
    answerer = inference.Answerer(restored.model, batch_size, limits, mesh)
    with progress_lib.shown("infer", len(rows)) as progress:
        free = [i for i, question in enumerate(questions) if not question.choices]
        answers = answerer.generate(
            restored.params, [questions[i] for i in free], decoding, progress, seed
        )
        for i, ids in zip(free, answers, strict=True):
            rows[i]["prediction"] = vocabulary.decode(ids.tolist())
        ranked = [i for i, question in enumerate(questions) if question.choices]
        scores = answerer.score_choices(
            restored.params,
            [questions[i] for i in ranked],
            progress,
            is_length_normalized=length_normalized_choices,
        )
        for i, score in zip(ranked, scores, strict=True):
            rows[i]["prediction"] = rows[i]["choices"][score.best]
            rows[i]["log_likelihoods"] = score.log_likelihoods
            rows[i]["num_tokens"] = score.num_tokens
    json_files.write_jsonl(outputs, rows)
    print(f"Written to {outputs}.", file=sys.stderr)
    return rows


def _read(path: pathlib.Path) -> list[dict[str, Any]]:
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
            raise errors.UserError(f'{path}: "choices" of object {number} is no list of texts.')
    if not rows:
        raise errors.UserError(f"{path} holds no questions.")
    return rows
