"""How good many adapters are at once: by one forward pass, by rank, or by their answers in text."""

from collections.abc import Callable, Mapping, Sequence
import dataclasses
import functools
import json
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, PyTree
import numpy as np

from moe_peft import patching
from moe_peft.adaptation import data, programs
from moe_peft.evaluation import inference, metrics
from moe_peft.models import decoding as decoding_lib
from moe_peft.models import encoder_decoder, few_shot, losses
from moe_peft.partitioning import mesh as mesh_lib
from moe_peft.runtime import digest, json_files, progress

_KEPT = "answers_{}.json"

# (score in [0, 1], loss of the right answer per token, number of the chosen answer or -1)
RowScores = tuple[Float[Array, "b"], Float[Array, "b"], Int[Array, "b"]]


def score_rows(
    model: encoder_decoder.EncoderDecoder, num_choices: int, is_length_normalized: bool
) -> Callable[[PyTree, PyTree, Mapping[str, Any]], RowScores]:
    """Returns `(frozen, trainable, batch) -> RowScores`, a pure function.

    Without choices (`num_choices` 0) a row scores 1 if greedy decoding would give its target, with
    choices if the right one ranks first, by the mean over tokens or by the sum. Rows of padding
    score and lose 0.
    """

    def by_exact_match(frozen, trainable, batch):
        targets = batch["decoder_target_tokens"]
        logits = model.logits(patching.merge(frozen, trainable), batch)
        is_real = targets != model.ids.pad
        is_right = jnp.all((jnp.argmax(logits, axis=-1) == targets) | ~is_real, axis=-1)
        log_probs = jnp.where(is_real, losses.token_log_probs(logits, targets)[0], 0.0)
        num_tokens = jnp.sum(is_real, axis=-1)
        loss = -jnp.sum(log_probs, axis=-1) / jnp.maximum(num_tokens, 1)
        score = jnp.where(num_tokens > 0, is_right, False).astype(jnp.float32)
        return score, loss, jnp.full(score.shape, -1)

    def by_rank(frozen, trainable, batch):
        gold = batch[few_shot.GOLD]
        scores = model.score_choices(patching.merge(frozen, trainable), batch, num_choices)
        best = scores.best(is_length_normalized=is_length_normalized)
        is_there = jnp.any(scores.num_tokens > 0, axis=-1)
        is_gold = jax.nn.one_hot(gold, num_choices, dtype=jnp.bool_)
        mean = scores.log_likelihood / jnp.maximum(scores.num_tokens, 1.0)
        loss = -jnp.sum(jnp.where(is_gold, mean, 0.0), axis=-1)
        return ((best == gold) & is_there).astype(jnp.float32), loss, best

    return by_rank if num_choices else by_exact_match


@dataclasses.dataclass(frozen=True)
class Scored:
    """Scores of one run's examples."""

    # In [0, 1], one an example; None where the metric has none for one example.
    scores: Sequence[float | None]
    # Mean over examples of the right answer's loss per token; 0 where nobody computed it.
    loss: float
    predictions: Sequence[str | None]  # answers in text, None where there is none
    metric: str = "exact_match"  # name
    of_all: float | None = None  # score of all examples together; None: the mean

    @property
    def score(self) -> float:
        """Of the run."""
        if self.of_all is not None:
            return self.of_all
        return float(np.mean(np.asarray(self.scores, np.float64)))


# (stacked trainables on the devices, "validation" or "test") -> one result a run.
Scorer = Callable[[PyTree, str], Sequence[Scored]]


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """How answers are found and scored; see `adapt.Settings`."""

    metrics: Mapping[str, metrics.Metric]  # by task
    decoding: decoding_lib.Strategy | None
    is_length_normalized: bool
    batch_size: int
    feature_lengths: Mapping[str, int]
    vocabulary: Any


def score_one_run(
    rows: tuple[np.ndarray, ...], is_cut: np.ndarray, choices: Sequence[Sequence[str]]
) -> Scored:
    """Results of one run from its `RowScores`, without padding; a target that was cut scores 0."""
    count = len(is_cut)
    scores, row_losses, best = (values[:count] for values in rows)
    answers = [c[int(b)] if c and b >= 0 else None for c, b in zip(choices, best, strict=True)]
    right = np.where(is_cut & (best < 0), 0.0, scores)
    metric = metrics.BY_RANK if any(map(len, choices)) else "exact_match"
    return Scored(right.tolist(), float(np.mean(row_losses, dtype=np.float64)), answers, metric)


def score_answers(
    metric: metrics.Metric, answers: Sequence[str], references: Sequence[Sequence[str]]
) -> Scored:
    """Results of one run from its answers in text; `references` are the accepted ones."""
    pairs = zip(answers, references, strict=True)
    scores = [metrics.score_example(metric, answer, accepted) for answer, accepted in pairs]
    of_all = None if None not in scores else metrics.of_predictions(metric, answers, references)
    return Scored(scores, 0.0, answers, metric.name, of_all)


def scorer(
    how: Evaluation,
    network: encoder_decoder.EncoderDecoder,
    mapped: programs.MappedRuns,
    members: Sequence[data.JobData],
    folder: pathlib.Path,
    mesh: jax.sharding.Mesh,
) -> Scorer:
    """Returns what evaluates a group: all runs in one pass, or one by one if answers are decoded.

    The newest decoded answers to the reported examples are kept in `folder`, the group's: a group
    that goes on after an interruption does not decode them again.
    """
    shape = members[0].eval_shape
    if how.decoding is not None and not shape.num_choices:
        return _answer_scorer(how, network, mapped.frozen, members, folder, mesh)
    chunks_of = lambda parts: data.chunks(parts, shape, how.batch_size)
    kept = {"validation": list(chunks_of([one.validation for one in members]))}

    def score(trainables, split):
        parts = [getattr(one, split) for one in members]
        chunks = kept.get(split) or chunks_of(parts)
        rows = mapped.score(trainables, chunks, len(members))
        choices = [[example.answer_choices for example in part.examples] for part in parts]
        by_run = zip(zip(*rows), parts, choices, strict=True)
        return [score_one_run(own, part.is_cut, texts) for own, part, texts in by_run]

    return score


def _answer_scorer(how, network, frozen, members, folder, mesh) -> Scorer:
    answerer = inference.AnsweringModel(network, how.batch_size, dict(how.feature_lengths), mesh)

    def decode_answers(trainable, part, seed):
        params = patching.merge(frozen, jax.device_put(trainable, mesh_lib.replicated(mesh)))
        inputs = part.features["encoder_input_tokens"]
        questions = [inference.Question(row[row != network.ids.pad]) for row in inputs]
        answers = answerer.generate(params, questions, how.decoding, progress.Progress(), seed)
        return [how.vocabulary.decode(ids.tolist()) for ids in answers]

    def score(trainables, split):
        found = []
        for run, one in enumerate(members):
            part, trainable = getattr(one, split), programs.unstack(trainables, run)
            decode = functools.partial(decode_answers, trainable, part, one.job.seed)
            path = folder / _KEPT.format(run)
            texts = _kept_answers(path, trainable, decode) if split == "test" else decode()
            accepted = [example.accepted for example in part.examples]
            found.append(score_answers(how.metrics[one.job.task], texts, accepted))
        return found

    return score


def forget_answers(folder: pathlib.Path) -> None:
    """Removes what was kept, once the group's results are on disk."""
    for path in folder.glob(_KEPT.format("*")):
        path.unlink()


def _kept_answers(
    path: pathlib.Path, trainable: PyTree, decode: Callable[[], list[str]]
) -> list[str]:
    """Answers of a run with these parameters: what the file holds, or new ones, then kept there."""
    parameters = digest.of_tree(trainable)
    if path.exists():
        record = json.loads(path.read_text(encoding="utf-8"))
        if record["parameters"] == parameters:
            return record["answers"]
    found = decode()
    json_files.write_json(path, {"parameters": parameters, "answers": found})
    return found
