"""Asks a model many questions: batches of similar length, over all local devices, in order.

Three kinds of question: would greedy decoding give this target (`exact_match`), what is the answer
(`generate`), which of these choices is the most likely (`score_choices`). No TensorFlow here.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
import dataclasses
from typing import Any

import jax
from jaxtyping import PyTree
import numpy as np

from moe_peft import errors
from moe_peft.models import batches, encoder_decoder, scoring
from moe_peft.models import decoding as decoding_lib
from moe_peft.partitioning import layout as layout_lib
from moe_peft.partitioning import mesh as mesh_lib
from moe_peft.runtime import progress as progress_lib

Batch = dict[str, np.ndarray]

# Inputs shorter than this share one length: a shorter batch saves less than its compilation costs.
_SHORTEST = 16


@dataclasses.dataclass(frozen=True)
class Question:
    """One input and what is to be found out about it; ids as the model reads them."""

    inputs: np.ndarray
    # Ids of the answer, end mark included; empty where nobody knows it.
    targets: np.ndarray = dataclasses.field(default_factory=lambda: np.zeros(0, np.int32))
    choices: tuple[np.ndarray, ...] = ()  # ids of each, end mark included; empty for free text
    # Further arrays of this row, such as task_ids.
    features: Mapping[str, np.ndarray] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class ChoiceScore:
    """What the model thinks of the choices of one question."""

    best: int  # number of the most likely choice, the first of equal ones
    log_likelihoods: list[float]  # of each choice, summed over its tokens
    num_tokens: list[int]  # of each choice

    def as_fields(self) -> dict[str, list]:
        """What a row of answers says of the choices."""
        return {"log_likelihoods": self.log_likelihoods, "num_tokens": self.num_tokens}


@dataclasses.dataclass(frozen=True)
class Programs:
    """What is compiled for a model on a mesh; each takes parameters and a batch first."""

    exact_match: Callable[..., Any]  # as `EncoderDecoder.exact_match`
    # Takes the number of choices and whether likelihoods are per token, both static; best choices,
    # log-likelihoods and numbers of tokens.
    rank_choices: Callable[..., Any]
    predict: Callable[..., Any]  # as `EncoderDecoder.predict`


def programs(model: encoder_decoder.EncoderDecoder, mesh: jax.sharding.Mesh) -> Programs:
    """Returns the jitted functions of an `AnsweringModel`; nothing is compiled yet."""
    split = layout_lib.Layout(mesh).with_axis_rules

    def rank_choices(params, batch, num_choices, is_length_normalized):
        scores = model.score_choices(params, batch, num_choices)
        best = scores.best(is_length_normalized=is_length_normalized)
        return best, scores.log_likelihood, scores.num_tokens

    return Programs(
        jax.jit(split(model.exact_match)),
        jax.jit(split(rank_choices), static_argnums=(2, 3)),
        jax.jit(split(model.predict), static_argnums=2),
    )


class AnsweringModel:
    """A model with its compiled functions; parameters come with every call.

    Batches have `batch_size` rows, the last ones filled up with empty rows. Inputs are padded to a
    few lengths only (the limit, its half, its quarter, ...), each compiled once.
    """

    def __init__(
        self,
        model: encoder_decoder.EncoderDecoder,
        batch_size: int,
        feature_lengths: Mapping[str, int],
        mesh: jax.sharding.Mesh,
    ):
        """Compiles nothing yet; `feature_lengths` are tokens of "inputs" and "targets" at most.

        Raises UserError where the batch size does not divide among the devices of the mesh.
        """
        mesh_lib.check_batch_size(batch_size, 1, mesh)
        if jax.process_count() > 1:
            raise errors.UserError(
                f"Evaluation runs on one host, this is one of {jax.process_count()} processes."
            )
        self._batch_size, self._lengths = batch_size, dict(feature_lengths)
        self._sharding = mesh_lib.batch_sharding(mesh)
        self._programs, self._ids = programs(model, mesh), model.ids

    def answer(
        self,
        params: PyTree,
        questions: Sequence[Question],
        strategy: decoding_lib.Strategy | None,
        progress: progress_lib.Progress,
        *,
        seed: int,
        is_length_normalized: bool,
    ) -> list[ChoiceScore | np.ndarray | bool]:
        """In order: scores where a question has choices; else ids of the answer or, without
        strategy, whether greedy decoding would give the target.
        """
        ranked = [i for i, question in enumerate(questions) if question.choices]
        free = [i for i, question in enumerate(questions) if not question.choices]
        some = [questions[i] for i in ranked]
        scores = self.score_choices(
            params, some, progress, is_length_normalized=is_length_normalized
        )
        some = [questions[i] for i in free]
        if strategy is None:
            texts = self.exact_match(params, some, progress)
        else:
            texts = self.generate(params, some, strategy, progress, seed)
        found = dict(zip((*ranked, *free), (*scores, *texts), strict=True))
        return [found[i] for i in range(len(questions))]

    def exact_match(
        self, params: PyTree, questions: Sequence[Question], progress: progress_lib.Progress
    ) -> list[bool]:
        """Whether greedy decoding would give each target, by one forward pass instead."""
        length = self._lengths["targets"]

        def decoder(members: Sequence[Question]) -> Batch:
            targets = [question.targets for question in members]
            return {
                "decoder_input_tokens": self._pad([self._shifted(ids) for ids in targets], length),
                "decoder_target_tokens": self._pad(targets, length),
            }

        ask_batch = lambda batch, number: self._programs.exact_match(params, batch)
        return self._ask_batches(questions, decoder, ask_batch, progress)

    def generate(
        self,
        params: PyTree,
        questions: Sequence[Question],
        strategy: decoding_lib.Strategy,
        progress: progress_lib.Progress,
        seed: int = 0,
    ) -> list[np.ndarray]:
        """Ids of each answer, without end mark and padding.

        Random strategies draw by seed and place of the batch: equal questions in equal order give
        equal answers.
        """

        def ask_batch(batch, number):
            rng = jax.random.fold_in(jax.random.key(seed), number) if strategy.is_random else None
            return self._programs.predict(params, batch, strategy, rng)

        answers = self._ask_batches(questions, lambda members: {}, ask_batch, progress)
        return [_until_end(ids, strategy.end_of(self._ids)) for ids in answers]

    def score_choices(
        self,
        params: PyTree,
        questions: Sequence[Question],
        progress: progress_lib.Progress,
        *,
        is_length_normalized: bool = False,
    ) -> list[ChoiceScore]:
        """Scores of every choice of every question, each input encoded once."""
        most = max((len(question.choices) for question in questions), default=1)

        def decoder(members: Sequence[Question]) -> Batch:
            choices = [question.choices for question in members]
            needed = max(sum(map(len, texts)) for texts in choices)
            # Powers of two, so that few lengths are compiled.
            length = 1 << (needed - 1).bit_length()
            return self._fill_up(scoring.pack_choices(choices, length, self._ids))

        ask_batch = lambda batch, number: self._programs.rank_choices(
            params, batch, most, is_length_normalized
        )
        found = []
        rows = self._ask_batches(questions, decoder, ask_batch, progress)
        for question, (best, *numbers) in zip(questions, rows, strict=True):
            likelihoods, num_tokens = (values[: len(question.choices)] for values in numbers)
            found.append(
                ChoiceScore(int(best), likelihoods.tolist(), num_tokens.astype(int).tolist())
            )
        return found

    def _ask_batches(
        self,
        questions: Sequence[Question],
        decoder: Callable[[Sequence[Question]], Batch],
        ask_batch: Callable[[Any, int], Any],
        progress: progress_lib.Progress,
    ) -> list[Any]:
        """Asks batch by batch; returns row i's part of the answers at place i."""
        answers: list[Any] = [None] * len(questions)
        with jax.set_mesh(self._sharding.mesh):
            for number, (length, places) in enumerate(self._places(questions)):
                members = [questions[place] for place in places]
                batch = {**self._encoder(members, length), **decoder(members)}
                found = ask_batch(mesh_lib.put_batch(batch, self._sharding), number)
                found = jax.tree.map(np.asarray, found)
                for row, place in enumerate(places):
                    answers[place] = jax.tree.map(lambda rows: rows[row], found)  # noqa: B023
                progress.advance(len(places))
        return answers

    def _places(self, questions: Sequence[Question]) -> Iterator[tuple[int, list[int]]]:
        """(input length, places of the questions) of each batch."""
        # Questions of similar length share a batch, so that little of it is padding.
        by_length: dict[int, list[int]] = {}
        order = sorted(range(len(questions)), key=lambda place: len(questions[place].inputs))
        for place in order:
            length = padded_length(len(questions[place].inputs), self._lengths["inputs"])
            by_length.setdefault(length, []).append(place)
        for length, places in by_length.items():
            for start in range(0, len(places), self._batch_size):
                yield length, places[start : start + self._batch_size]

    def _encoder(self, members: Sequence[Question], length: int) -> Batch:
        batch = {"encoder_input_tokens": self._pad([q.inputs for q in members], length)}
        for name in members[0].features:
            batch[name] = np.stack([question.features[name] for question in members])
        return self._fill_up(batch)

    def _shifted(self, ids: np.ndarray) -> list[int]:
        return [self._ids.start, *ids[:-1]]

    def _pad(self, rows: Sequence[Sequence[int]], length: int) -> np.ndarray:
        """[batch_size, length], padding where there is nothing."""
        padded = np.full((self._batch_size, length), self._ids.pad, np.int32)
        for i, row in enumerate(rows):
            padded[i, : len(row)] = row
        return padded

    def _fill_up(self, batch: Batch) -> Batch:
        """Adds empty rows up to the batch size."""
        return batches.filled_up(batch, self._batch_size, self._ids.pad)


def batch_shapes(
    batch_size: int, lengths: Mapping[str, int], question: Question
) -> dict[str, tuple[int, ...]]:
    """Shapes of the features of a batch of such questions, for initialisation."""
    return {
        "encoder_input_tokens": (batch_size, lengths["inputs"]),
        "decoder_input_tokens": (batch_size, lengths["targets"]),
        "decoder_target_tokens": (batch_size, lengths["targets"]),
        **{name: (batch_size, *np.shape(value)) for name, value in question.features.items()},
    }


def limited(strategy: decoding_lib.Strategy, length: int) -> decoding_lib.Strategy:
    """The strategy, for answers of `length` tokens at most where it does not say how many."""
    if strategy.max_decode_length is not None:
        return strategy
    return dataclasses.replace(strategy, max_decode_length=length)


def padded_length(length: int, limit: int) -> int:
    """The shortest of limit, limit / 2, limit / 4, ... that holds `length`, but not under 16."""
    if length > limit:
        raise ValueError(f"An input of {length} tokens is longer than the limit of {limit}.")
    padded = limit
    while padded // 2 >= max(length, _SHORTEST):
        padded //= 2
    return padded


def _until_end(ids: np.ndarray, eos_id: int) -> np.ndarray:
    ends = np.flatnonzero(ids == eos_id)
    return ids[: ends[0]] if len(ends) else ids
