"""One model over all tasks of some mixtures: every example asked, answered and scored.

Examples with answer choices may be classified by rank. All others are answered by decoding or, when
only exact match is wanted, checked by one forward pass (`EncoderDecoder.exact_match`).
"""

from collections.abc import Mapping, Sequence
import dataclasses

import gin
import jax
from jaxtyping import PyTree
import numpy as np

from moe_peft import errors, methods
from moe_peft.evaluation import aggregation, inference, metrics
from moe_peft.evaluation import bootstrap as bootstrap_lib
from moe_peft.evaluation import questions as questions_lib
from moe_peft.models import decoding as decoding_lib
from moe_peft.models import encoder_decoder
from moe_peft.partitioning import mesh as mesh_lib
from moe_peft.runtime import progress as progress_lib

# Batches of answers that an interruption loses at most, but for larger tasks.
_BATCHES_OF_A_PART = 32


@gin.register(module="evaluation")
class Evaluator:
    """What is asked, how answers are found, and how they are scored.

    Called by `evaluate` and, as `train.evaluator`, by training every few steps.
    """

    def __init__(
        self,
        mixtures: str | Sequence[str] = gin.REQUIRED,
        feature_lengths: Mapping[str, int] = gin.REQUIRED,
        task_group: str | None = gin.REQUIRED,
        split: str = "validation",
        batch_size: int = 64,
        metric: str = "exact_match",
        decoding: decoding_lib.Strategy | None = None,
        rank_choices: bool = False,
        length_normalized_choices: bool = False,
        max_examples_per_task: int | None = None,
        seed: int = 0,
        average: str = "tasks",
        bootstrap: bootstrap_lib.Bootstrap | None = None,
    ):
        """Reads no data yet.

        Args:
          mixtures: names of SeqIO mixtures or tasks.
          feature_lengths: tokens of "inputs" and "targets".
          task_group: regular expression whose first parenthesis finds, in a task's name, what it is
            reported under: "cldr_([a-z]+)_.*" reports "cldr_month_fr" under "month". None for the
            benchmark's own groups (SuperNI's categories).
          split: of the tasks.
          batch_size: rows of a batch, over all devices.
          metric: of answers in free text; see `metrics`. "task" takes the one that each task's
            benchmark reports (CrossFit).
          decoding: how answers are decoded. None decodes nothing, which only exact match allows;
            the results are those of greedy decoding (up to texts that several ids spell).
          rank_choices: where an example has answer choices, take the most likely of them and score
            it by accuracy (T0, MoV, T-Few, MHR); otherwise choices are not looked at.
          length_normalized_choices: rank choices by their log-likelihood per token (T-Few, MHR),
            not by its sum (T0, MoV).
          max_examples_per_task: the first so many of each task; None for all.
          seed: of random decoding.
          average: rule of the overall number; see `aggregation`.
          bootstrap: how intervals of results are found; None for none.
        """
        errors.check_one_of("Evaluator.average", average, aggregation.AVERAGES)
        if metric != metrics.OF_TASK:
            metrics.get(metric)
        self._metric = metric
        if decoding is None and metric != "exact_match":
            raise errors.UserError(
                f"The metric {metric!r} needs answers in text: give Evaluator.decoding, such as "
                "@decoding.Greedy()."
            )
        self.mixtures = (mixtures,) if isinstance(mixtures, str) else tuple(mixtures)
        if not self.mixtures:
            raise errors.UserError("Evaluator.mixtures is empty; name at least one mixture.")
        self._group = None if task_group is None else questions_lib.compile_group(task_group)
        self._lengths, self._batch_size = dict(feature_lengths), batch_size
        self._split, self._limit, self._seed = split, max_examples_per_task, seed
        self._average, self._bootstrap = average, bootstrap
        self._decoding = decoding
        if decoding is not None and decoding.max_decode_length is None:
            length = self._lengths["targets"]
            self._decoding = dataclasses.replace(decoding, max_decode_length=length)
        self._rank_choices = rank_choices
        self._is_length_normalized = length_normalized_choices
        self.settings = {
            "split": split,
            "metric": metric,
            "decoding": repr(self._decoding) if decoding else "none (one forward pass)",
            "rank_choices": rank_choices,
            "length_normalized_choices": length_normalized_choices,
            "max_examples_per_task": max_examples_per_task,
            "feature_lengths": self._lengths,
            "seed": seed,
            "average": average,
            "bootstrap": bootstrap and dataclasses.asdict(bootstrap),
        }
        self._suites: dict[str, questions_lib.Suite] = {}
        self._answerer: tuple[object, inference.Answerer] | None = None

    def __call__(
        self, model: encoder_decoder.EncoderDecoder, step: int, params: PyTree
    ) -> dict[str, float]:
        """The overall numbers while training: shares "<mixture>/mean" and "<mixture>/median"."""
        del step
        found = {}
        for mixture in self.mixtures:
            rows = self.predict(model, params, mixture)
            overall = aggregation.aggregate(rows, self._average).overall
            found[f"{mixture}/mean"], found[f"{mixture}/median"] = overall.mean, overall.median
        return found

    def batch_shapes(self) -> dict[str, tuple[int, ...]]:
        """Shapes of a batch's features, for initialisation."""
        question = self.suite(self.mixtures[0]).questions[0]
        rows, lengths = self._batch_size, self._lengths
        return {
            "encoder_input_tokens": (rows, lengths["inputs"]),
            "decoder_input_tokens": (rows, lengths["targets"]),
            "decoder_target_tokens": (rows, lengths["targets"]),
            **{name: (rows, *np.shape(value)) for name, value in question.features.items()},
        }

    def check_devices(self, mesh: jax.sharding.Mesh) -> None:
        """Raises UserError unless a batch divides among the devices; nothing is loaded for that."""
        mesh_lib.check_batch_size(self._batch_size, 1, mesh)

    def suite(self, mixture: str) -> questions_lib.Suite:
        """The questions of a mixture, read once."""
        if mixture not in self._suites:
            self._suites[mixture] = questions_lib.read(
                mixture,
                self._lengths,
                self._group,
                split=self._split,
                max_examples_per_task=self._limit,
                with_choices=self._rank_choices,
            )
            metrics.of_tasks(self._metric, self._suites[mixture].own_metrics)
        return self._suites[mixture]

    def parts(self, mixture: str) -> list[dict[str, range]]:
        """Tasks of `suite(mixture)` that are asked together: {task: places of its questions}.

        Whole tasks, and enough of them that batches of similar length are mostly full.
        """
        return list(self.suite(mixture).parts(_BATCHES_OF_A_PART * self._batch_size))

    def results(self, rows: Sequence[questions_lib.Row]) -> aggregation.Results:
        """Averages and intervals."""
        return aggregation.aggregate(rows, self._average, self._bootstrap)

    def predict(
        self,
        model: encoder_decoder.EncoderDecoder,
        params: PyTree,
        mixture: str,
        progress: progress_lib.Progress | None = None,
        places: Sequence[int] | None = None,
    ) -> list[questions_lib.Row]:
        """Rows of `suite(mixture)` with "metric", "prediction" and "score", in order.

        "score" is in [0, 1], or None where the metric has none for one example. "prediction" is
        None where nothing was decoded. Rows with choices also get "log_likelihoods" and
        "num_tokens", a number for each choice.

        Args:
          model: patched or not.
          params: on the devices.
          mixture: of the evaluator's.
          progress: counts questions.
          places: of the questions to ask; None for all.
        """
        suite, progress = self.suite(mixture), progress or progress_lib.Silent()
        _check_task_ids(suite, model.method, mixture)
        answerer = self._answerer_of(model, params)
        places = range(len(suite.rows)) if places is None else places
        metric_of = metrics.of_tasks(self._metric, suite.own_metrics)
        found: dict[int, questions_lib.Row] = {}

        ranked = [i for i in places if suite.questions[i].choices]
        scores = answerer.score_choices(
            params,
            [suite.questions[i] for i in ranked],
            progress,
            is_length_normalized=self._is_length_normalized,
        )
        for i, score in zip(ranked, scores, strict=True):
            found[i] = _choice_row(suite.rows[i], score)

        free = [i for i in places if not suite.questions[i].choices]
        questions = [suite.questions[i] for i in free]
        if self._decoding is None:
            are_right = answerer.exact_match(params, questions, progress)
            for i, is_right in zip(free, are_right, strict=True):
                score = float(is_right and not suite.is_cut[i])
                found[i] = {"metric": self._metric, "prediction": None, "score": score}
        else:
            # Random answers: parts of a mixture draw differently, and equally when asked again.
            seed = self._seed + (places[0] if places else 0)
            answers = answerer.generate(params, questions, self._decoding, progress, seed)
            for i, ids in zip(free, answers, strict=True):
                text, row = suite.vocabulary.decode(ids.tolist()), suite.rows[i]
                metric = metric_of[row["task"]]
                score = metrics.score_example(metric, text, metrics.references_of(row))
                found[i] = {"metric": metric.name, "prediction": text, "score": score}
        return [{**suite.rows[i], **found[i]} for i in places]

    def _answerer_of(self, model, params) -> inference.Answerer:
        """The compiled functions of this model, kept from call to call."""
        mesh = jax.tree.leaves(params)[0].sharding.mesh
        if self._answerer is None or self._answerer[0] is not model:
            made = inference.Answerer(model, self._batch_size, self._lengths, mesh)
            self._answerer = model, made
        return self._answerer[1]


def _check_task_ids(
    suite: questions_lib.Suite, method: methods.Method | None, mixture: str
) -> None:
    """Raises UserError if `method` routes by task and the questions' tasks are not its own."""
    if method is None or method.num_tasks is None:
        return
    from moe_peft.data import task_ids  # Imports TensorFlow.

    if any("task_ids" not in question.features for question in suite.questions):
        raise errors.UserError(
            f"{method.name!r} routes by task, but {mixture!r} has no feature 'task_ids'."
        )
    ids = np.array([int(question.features["task_ids"]) for question in suite.questions])
    task_ids.check(ids, method.num_tasks, repr(mixture))


def _choice_row(row: questions_lib.Row, score: inference.ChoiceScore) -> questions_lib.Row:
    chosen = row["choices"][score.best]
    return {
        "metric": metrics.BY_RANK,
        "prediction": chosen,
        "score": float(chosen.strip() == row["targets"].strip()),
        "log_likelihoods": score.log_likelihoods,
        "num_tokens": score.num_tokens,
    }
