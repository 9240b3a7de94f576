"""One model over all tasks of some mixtures: every example asked, answered and scored.

Examples with answer choices may be classified by rank. All others are answered by decoding or, when
only exact match is wanted, checked by one forward pass (`EncoderDecoder.exact_match`).
"""

from collections.abc import Mapping, Sequence
import dataclasses
from typing import Any

import gin
import jax
from jaxtyping import PyTree
import numpy as np

from moe_peft import errors, methods
from moe_peft.data import files, lookup, task_ids
from moe_peft.evaluation import aggregation, inference, metrics
from moe_peft.evaluation import bootstrap as bootstrap_lib
from moe_peft.evaluation import questions as questions_lib
from moe_peft.models import decoding as decoding_lib
from moe_peft.models import encoder_decoder
from moe_peft.runtime import progress as progress_lib


@gin.register(module="evaluation")
@dataclasses.dataclass(eq=False)
class Evaluator:
    """What is asked, how answers are found, and how they are scored.

    Called by `evaluate` and, as `train.evaluator`, by training every few steps. Reads no data until
    it is asked for.
    """

    # Names of SeqIO mixtures or tasks, or `files.Files`.
    mixtures: lookup.Mixture | Sequence[lookup.Mixture]
    feature_lengths: Mapping[str, int]  # tokens of "inputs" and "targets"
    # Regular expression whose first parenthesis finds, in a task's name, what it is reported under:
    # "cldr_([a-z]+)_.*" reports "cldr_month_fr" under "month". None for the benchmark's own groups
    # (SuperNI's categories).
    task_group: str | None
    split: str = "validation"  # of the tasks
    batch_size: int = 64  # rows of a batch, over all devices
    # Of answers in free text; see `metrics`. "task" takes the one that each task's benchmark
    # reports (CrossFit).
    metric: str = "exact_match"
    # How answers are decoded. None decodes nothing, which only exact match allows; the results are
    # those of greedy decoding (up to texts that several ids spell).
    decoding: decoding_lib.Strategy | None = None
    # Where an example has answer choices, take the most likely of them and score it by accuracy
    # (T0, MoV, T-Few, MHR); otherwise choices are not looked at.
    rank_choices: bool = False
    # Rank choices by their log-likelihood per token (T-Few, MHR), not by its sum (T0, MoV).
    length_normalized_choices: bool = False
    max_examples_per_task: int | None = None  # the first so many of each task; None for all
    seed: int = 0  # of random decoding
    average: str = "tasks"  # rule of the overall number; see `aggregation`
    bootstrap: bootstrap_lib.Bootstrap | None = None  # how intervals are found; None for none

    def __post_init__(self):
        errors.check_one_of("Evaluator.average", self.average, aggregation.AVERAGES)
        if self.metric != metrics.OF_TASK:
            metrics.get(self.metric)
        if self.decoding is not None:
            self.decoding = inference.limited(self.decoding, self.feature_lengths["targets"])
        elif self.metric != "exact_match":
            raise errors.UserError(
                f"The metric {self.metric!r} needs answers in text: give Evaluator.decoding, such "
                "as @decoding.Greedy()."
            )
        is_one = isinstance(self.mixtures, str | files.Files)
        self.mixtures = (self.mixtures,) if is_one else (*self.mixtures,)
        if not self.mixtures:
            raise errors.UserError("Evaluator.mixtures is empty; name at least one mixture.")
        is_own = self.task_group is None  # then each benchmark says what it reports under
        self._group = None if is_own else questions_lib.compile_group(self.task_group)
        self._questions: dict[lookup.Mixture, questions_lib.MixtureQuestions] = {}
        self._answering: tuple[object, inference.AnsweringModel] | None = None

    @property
    def settings(self) -> dict[str, Any]:
        """What answers and averages depend on, as JSON types."""
        choices = ("rank_choices", "length_normalized_choices", "max_examples_per_task")
        return {
            "split": self.split,
            "metric": self.metric,
            "decoding": repr(self.decoding) if self.decoding else "none (one forward pass)",
            **{name: getattr(self, name) for name in choices},
            "feature_lengths": dict(self.feature_lengths),
            "seed": self.seed,
            "average": self.average,
            "bootstrap": self.bootstrap and dataclasses.asdict(self.bootstrap),
        }

    def __call__(
        self, model: encoder_decoder.EncoderDecoder, step: int, params: PyTree
    ) -> dict[str, float]:
        """The overall numbers while training: shares "<mixture>/mean" and "<mixture>/median"."""
        del step
        found = {}
        for mixture in self.mixtures:
            rows = self.predict(model, params, mixture)
            overall = aggregation.aggregate(rows, self.average).overall
            found[f"{mixture}/mean"], found[f"{mixture}/median"] = overall.mean, overall.median
        return found

    def batch_shapes(self) -> dict[str, tuple[int, ...]]:
        """Shapes of a batch's features, for initialisation."""
        question = self.questions_of(self.mixtures[0]).questions[0]
        return inference.batch_shapes(self.batch_size, self.feature_lengths, question)

    def questions_of(self, mixture: lookup.Mixture) -> questions_lib.MixtureQuestions:
        """The questions of a mixture, read once."""
        if mixture not in self._questions:
            names = (mixture, self.feature_lengths, self._group, self.split)
            limit, with_choices = self.max_examples_per_task, self.rank_choices
            self._questions[mixture] = questions_lib.read(*names, limit, with_choices)
            metrics.of_tasks(self.metric, self._questions[mixture].own_metrics)
        return self._questions[mixture]

    def predict(
        self,
        model: encoder_decoder.EncoderDecoder,
        params: PyTree,
        mixture: lookup.Mixture,
        progress: progress_lib.Progress | None = None,
        places: Sequence[int] | None = None,
    ) -> list[questions_lib.Row]:
        """Rows of `questions_of(mixture)` with "metric", "prediction" and "score", in order.

        "score" is in [0, 1], or None where the metric has none for one example. "prediction" is
        None where nothing was decoded. Rows with choices also get "log_likelihoods" and
        "num_tokens", a number for each choice. `places` are of the questions to ask; None for all.
        """
        asked, progress = self.questions_of(mixture), progress or progress_lib.Progress()
        _check_task_ids(asked, model.method, mixture)
        lookup.check_special_ids(asked.vocabulary, model.ids, mixture)
        places = range(len(asked.rows)) if places is None else places
        answers = self._answering_model(model, params).answer(
            params,
            [asked.questions[i] for i in places],
            self.decoding,
            progress,
            # Random answers: parts of a mixture draw differently, and equally when asked again.
            seed=self.seed + (places[0] if places else 0),
            is_length_normalized=self.length_normalized_choices,
        )
        metric_of = metrics.of_tasks(self.metric, asked.own_metrics)
        return [
            {**asked.rows[i], **self._score(asked, i, answer, metric_of)}
            for i, answer in zip(places, answers, strict=True)
        ]

    def _score(self, asked, place: int, answer: Any, metric_of) -> questions_lib.Row:
        """What an answer adds to the row of its question."""
        row = asked.rows[place]
        if isinstance(answer, inference.ChoiceScore):
            text = row["choices"][answer.best]
            score = float(text.strip() == row["targets"].strip())
            found = {"metric": metrics.BY_RANK, "prediction": text, "score": score}
            return {**found, **answer.as_fields()}
        if self.decoding is None:
            # What is left of a target that was cut may all be right; the target is not.
            score = float(answer and not asked.is_cut[place])
            return {"metric": self.metric, "prediction": None, "score": score}
        text, metric = asked.vocabulary.decode(answer.tolist()), metric_of[row["task"]]
        score = metrics.score_example(metric, text, metrics.references_of(row))
        return {"metric": metric.name, "prediction": text, "score": score}

    def _answering_model(self, model, params) -> inference.AnsweringModel:
        """The compiled functions of this model, kept from call to call."""
        mesh = jax.tree.leaves(params)[0].sharding.mesh
        if self._answering is None or self._answering[0] is not model:
            made = inference.AnsweringModel(model, self.batch_size, self.feature_lengths, mesh)
            self._answering = model, made
        return self._answering[1]


def _check_task_ids(
    asked: questions_lib.MixtureQuestions, method: methods.Method | None, mixture: lookup.Mixture
) -> None:
    """Raises UserError if `method` routes by task and the questions' tasks are not its own."""
    if method is not None and method.num_tasks is not None:
        ids = [question.features.get("task_ids") for question in asked.questions]
        has_ids = all(each is not None for each in ids)
        batch = {"task_ids": np.array(ids, int)} if has_ids else {}
        next(task_ids.checked_batches(iter([batch]), method, mixture))
