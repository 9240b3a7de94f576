"""Scores of stacked runs by their answers in text: decoded run by run, what is reported kept."""

from collections.abc import Callable, Mapping, Sequence
import dataclasses
import functools
import json
import pathlib
from typing import Any

import jax
from jaxtyping import PyTree

from moe_peft import patching
from moe_peft.adaptation import data, group, programs, scores
from moe_peft.evaluation import inference, metrics
from moe_peft.models import decoding as decoding_lib
from moe_peft.models import encoder_decoder
from moe_peft.partitioning import mesh as mesh_lib
from moe_peft.runtime import digest, json_files, progress

_KEPT = "answers_{}.json"


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """How answers are found and scored; see `adapt.adapt`. `metrics` are by task."""

    metrics: Mapping[str, metrics.Metric]
    decoding: decoding_lib.Strategy | None
    is_length_normalized: bool
    batch_size: int
    feature_lengths: Mapping[str, int]
    vocabulary: Any


def scorer(
    how: Evaluation,
    network: encoder_decoder.EncoderDecoder,
    fleet: programs.Fleet,
    members: Sequence[data.JobData],
    folder: pathlib.Path,
    mesh: jax.sharding.Mesh,
) -> group.Scorer:
    """Evaluates the runs of a group one after another.

    Args:
      how: with a decoding.
      network: with adapters.
      fleet: of the group; has the frozen tree.
      members: data of each run.
      folder: of the group. The newest answers to the reported examples are kept there: a group that
        goes on after an interruption does not ask for them again.
      mesh: devices.
    """
    answerer = inference.AnsweringModel(network, how.batch_size, dict(how.feature_lengths), mesh)

    def ask(trainable, part, seed):
        params = patching.merge(fleet.frozen, jax.device_put(trainable, mesh_lib.replicated(mesh)))
        inputs = part.features["encoder_input_tokens"]
        questions = [inference.Question(row[row > 0]) for row in inputs]
        answers = answerer.generate(params, questions, how.decoding, progress.Silent(), seed)
        return [how.vocabulary.decode(ids.tolist()) for ids in answers]

    def score(trainables, split):
        found = []
        for run, one in enumerate(members):
            part, trainable = getattr(one, split), programs.unstack(trainables, run)
            answer = functools.partial(ask, trainable, part, one.job.seed)
            path = folder / _KEPT.format(run)
            texts = _kept(path, trainable, answer) if split == "test" else answer()
            accepted = [example.accepted for example in part.examples]
            found.append(scores.of_answers(how.metrics[one.job.task], texts, accepted))
        return found

    return score


def forget(folder: pathlib.Path) -> None:
    """Removes what was kept, once the group's results are on disk."""
    for path in folder.glob(_KEPT.format("*")):
        path.unlink()


def _kept(path: pathlib.Path, trainable: PyTree, answer: Callable[[], list[str]]) -> list[str]:
    """Answers of a run with these parameters: what the file holds, or new ones, then kept there."""
    parameters = digest.of_tree(trainable)
    if path.exists():
        record = json.loads(path.read_text(encoding="utf-8"))
        if record["parameters"] == parameters:
            return record["answers"]
    found = answer()
    json_files.write_json(path, {"parameters": parameters, "answers": found})
    return found
