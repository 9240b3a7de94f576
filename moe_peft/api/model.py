"""A T5 with adapters in Python: what the model that `moe_peft.load` returns can do."""

from collections.abc import Mapping, Sequence
import os
import pathlib
import tempfile
from typing import Any

from flax import linen as nn
import jax
from jaxtyping import PyTree

from moe_peft import errors, methods, patching
from moe_peft.api import rows as rows_lib
from moe_peft.config import gin_files
from moe_peft.convert import adapter_folder, adapter_trees
from moe_peft.data import cells, lookup, vocabularies
from moe_peft.data import files as files_lib
from moe_peft.evaluation import aggregation, infer, inference
from moe_peft.evaluation import evaluator as evaluator_lib
from moe_peft.models import decoding as decoding_lib
from moe_peft.partitioning import layout as layout_lib
from moe_peft.partitioning import mesh as mesh_lib
from moe_peft.runtime import progress as progress_lib
from moe_peft.training import optimizers, restore, schedules, train
from moe_peft.training import start as start_lib
from moe_peft.weights import saved_run


class Model:
    """A network with adapters, its weights and its vocabulary. Weights are read when needed."""

    def __init__(
        self,
        network: nn.Module,
        method: methods.Method,
        backbone: str,
        vocabulary: str | None,
        frozen_dtype: str = "float32",
        saved: saved_run.Saved | None = None,
    ):
        """Takes what `load` has found out; `saved` is what a run has trained."""
        if vocabulary is None:
            raise errors.UserError(
                f"The backbone {backbone!r} does not tell its vocabulary; give `vocabulary`, the "
                "path of its SentencePiece model or of a folder with its tokenizer, or 'bytes'."
            )
        self.network, self.method, self.backbone = network, method, backbone
        self.vocabulary = vocabulary
        self._frozen_dtype, self._saved = frozen_dtype, saved
        shapes = adapter_trees.BATCH_SHAPES
        self._start = start_lib.Start.of_network(network, method, shapes)
        self._mesh = mesh_lib.make_mesh()
        self._params: PyTree | None = None
        self._answering: dict[Any, inference.AnsweringModel] = {}

    def __repr__(self) -> str:
        count = patching.trees.num_parameters
        trainable = count(self.method.split(self._start.shapes())[1])
        own = count(self._start.base_shapes())
        step = f", trained {self._saved.step:,} steps" if self._saved else ""
        return (
            f"<{self.method.name} on {self.backbone}: {trainable:,} trainable parameters, "
            f"{100 * trainable / own:.3g} % of the network's {own:,}{step}>"
        )

    @property
    def params(self) -> PyTree:
        """Nested dict of arrays: the backbone's leaves, and the adapters' below "adapter"."""
        if self._params is None:
            where = (self._start, self.backbone)
            if self._saved is None:
                found, _ = restore.params(*where, None, frozen_dtype=self._frozen_dtype)
            else:
                where += (self._saved, "the run", self._frozen_dtype)
                found = restore.params_of(*where)
            axes = self._start.logical_axes()
            shardings = layout_lib.Layout(self._mesh).shardings(found, axes)
            self._params = jax.device_put(found, shardings)
        return self._params

    def train(
        self,
        data: Any,
        *,
        steps: int = 1000,
        batch_size: int = 32,
        out: str | os.PathLike | None = None,
        eval_data: Any = None,
        learning_rate: float | str | schedules.Schedule | None = None,
        optimizer: optimizers.Optimizer | None = None,
        feature_lengths: Mapping[str, int] | None = None,
        seed: int = 0,
        columns: Mapping[str, Any] | None = None,
        **settings: Any,
    ) -> dict[str, float]:
        """Trains the method's parameters; returns the metrics of the last steps.

        Started again with the same `out`, it goes on where it stopped.

        Args:
          data: a file (.jsonl, .csv, .tsv, .parquet), files, a folder, {split: file}; or rows:
            dictionaries, (inputs, targets) pairs, or a `datasets.Dataset`, which are written to
            `out`; or the name of a SeqIO mixture.
          steps: updates in all.
          batch_size: rows of a batch, over all devices.
          out: folder of the run, with checkpoints and metrics; None keeps none.
          eval_data: kept for `evaluate`, as `data`; None: 5 % of the rows are kept apart.
          learning_rate: a peak, a schedule or "auto" (a few are tried); default: by method.
          optimizer: instead of AdamW with `learning_rate`.
          feature_lengths: {"inputs": tokens, "targets": tokens}; default: as the longest rows need,
            up to 512 and 128.
          seed: of fresh adapters, dropout and the order of the data.
          columns: other fields of `data.files.Files`, such as {"targets_column": "label"}.
          **settings: others of `training.train`, such as `log_period`, `pack`, `mesh`.

        Raises UserError before anything compiles: data, a setting or the folder is wrong.
        """
        with tempfile.TemporaryDirectory() as temporary:
            folder = pathlib.Path(temporary if out is None else out).expanduser().absolute()
            mixture = self._mixture(data, eval_data, folder, columns or {})
            lengths = feature_lengths or files_lib.lengths_of(mixture)
            with gin_files.set_aside():
                result = train.train(
                    model=self.network,
                    method=self.method,
                    backbone=self.backbone,
                    mixture=mixture,
                    feature_lengths=dict(lengths),
                    optimizer=optimizer or self._optimizer(learning_rate, steps),
                    model_dir=str(folder),
                    num_steps=steps,
                    batch_size=batch_size,
                    seed=seed,
                    frozen_dtype=self._frozen_dtype,
                    searches_rate=learning_rate == "auto",
                    **settings,
                )
            self._saved = saved_run.load(folder)
        self._params = patching.merge(result.frozen, result.state.trainable)
        return dict(result.metrics)

    def generate(
        self,
        inputs: str | Sequence[str],
        max_tokens: int = 128,
        *,
        task: int | None = None,
        decoding: decoding_lib.Strategy | None = None,
        batch_size: int = 64,
        seed: int = 0,
    ) -> Any:
        """Returns the answer to one text, or a list of answers to several.

        Args:
          inputs: what is asked; over 512 tokens, or the length of training, it is cut.
          max_tokens: of an answer.
          task: id of the task, for methods that route by task.
          decoding: such as `models.decoding.BeamSearch()`; default: greedily.
          batch_size: rows of a batch.
          seed: of random decoding.
        """
        decoding = decoding or decoding_lib.Greedy()
        asked = [files_lib.Question(text, (), task) for text in _listed(inputs)]
        answers = self._answer(asked, max_tokens, decoding, batch_size, seed)
        vocabulary = vocabularies.get(self.vocabulary)
        found = [infer.text_of(*each, vocabulary) for each in zip(answers, asked, strict=True)]
        return found[0] if isinstance(inputs, str) else found

    def score(
        self,
        inputs: str | Sequence[str],
        choices: Sequence[str],
        *,
        task: int | None = None,
        batch_size: int = 64,
    ) -> Any:
        """Returns {choice: log-likelihood, summed over its tokens}, or a list for several texts."""
        asked = [files_lib.Question(text, tuple(choices), task) for text in _listed(inputs)]
        encode = vocabularies.get(self.vocabulary).encode
        longest = 1 + max(len(encode(choice)) for choice in choices)
        answers = self._answer(asked, longest, None, batch_size, 0)
        found = [dict(zip(choices, each.log_likelihoods, strict=True)) for each in answers]
        return found[0] if isinstance(inputs, str) else found

    def evaluate(
        self,
        data: Any,
        *,
        metric: str = "exact_match",
        split: str = "validation",
        batch_size: int = 64,
        max_tokens: int | None = None,
        columns: Mapping[str, Any] | None = None,
    ) -> dict[str, Any]:
        """Answers every row and scores the answers; returns numbers in [0, 1].

        Args:
          data: as in `train`; of files with splits, `split` is asked.
          metric: of answers in text, see `evaluation.metrics`; rows with choices are ranked.
          split: of a SeqIO mixture, or of {split: file}.
          batch_size: rows of a batch.
          max_tokens: of an answer; default: as long as the longest target.
          columns: as in `train`.

        Returns {"mean", "median", "num_examples", "tasks": {name: mean}}.
        """
        with tempfile.TemporaryDirectory() as temporary:
            folder = pathlib.Path(temporary)
            if isinstance(data, str) and not pathlib.Path(data).expanduser().exists():
                mixture = data  # of SeqIO, or a file that is missing
            else:
                mixture = self._mixture(None, data, folder, columns or {})
            longest = files_lib.lengths_of(mixture)
            lengths = self._lengths(longest["inputs"], max_tokens or longest["targets"])
            evaluator = evaluator_lib.Evaluator(
                mixture,
                lengths,
                task_group=None,
                split=split,
                batch_size=batch_size,
                metric=metric,
                decoding=decoding_lib.Greedy(),
                rank_choices=True,
            )
            rows = evaluator.predict(self._start.model, self.params, evaluator.mixtures[0])
        results = aggregation.aggregate(rows).to_json()
        overall = results["overall"]
        groups = {name: line["mean"] for name, line in results["groups"].items()}
        return {**{k: overall[k] for k in ("mean", "median", "num_examples")}, "tasks": groups}

    def save(
        self, folder: str | os.PathLike, *, license: str | None = None, overwrite: bool = False
    ) -> pathlib.Path:
        """Writes an adapter folder: adapter.safetensors, adapter_config.json, a model card.

        `load`, the command line and, for LoRA, (IA)3, Poly and MHR, PEFT open it. Raises UserError
        if nothing was trained, or the folder is there and `overwrite` is not set.
        """
        if self._saved is None:
            raise errors.UserError("Nothing was trained, so there is nothing to save.")
        return adapter_folder.write(
            self._saved, pathlib.Path(folder), license=license, overwrite=overwrite
        )

    def _mixture(self, data, eval_data, folder: pathlib.Path, columns: Mapping[str, Any]) -> Any:
        """The user's data as `files.Files`; a SeqIO mixture by its name."""
        is_file = isinstance(data, str) and (
            pathlib.Path(data).suffix or pathlib.Path(data).expanduser().exists()
        )
        if isinstance(data, str) and not is_file:
            return data
        place = lambda given, name: (
            given if given is None else rows_lib.on_disk(given, folder, name)
        )
        given = {"data": place(data, "train"), "eval_data": place(eval_data, "validation")}
        known = {} if self._saved is None else self._saved.description.get("files", {})
        known = {name: value for name, value in known.items() if name != "vocabulary"}
        return files_lib.Files(**given, vocabulary=self.vocabulary, **{**known, **columns})

    def _optimizer(self, learning_rate, steps: int) -> optimizers.Optimizer:
        rate = learning_rate
        if rate in (None, "auto"):
            rate = methods.LEARNING_RATES.get(self.method.name, 1e-3)
        if not callable(rate):
            rate = schedules.linear_warmup_linear_decay(rate, steps)
        groups = {"routers": 100.0} if self.method.num_tasks else None
        return optimizers.adamw(rate, groups=groups, clip_norm=1.0)

    def _lengths(self, inputs: int, targets: int) -> dict[str, int]:
        known = {} if self._saved is None else self._saved.description.get("data", {})
        limit = known.get("feature_lengths", files_lib.LONGEST)["inputs"]
        return {"inputs": min(files_lib.rounded(inputs), limit), "targets": max(targets, 2)}

    def _answer(self, asked, max_tokens, decoding, batch_size, seed) -> list[Any]:
        vocabulary = vocabularies.get(self.vocabulary)
        lookup.check_ids(vocabulary, self.network.config.vocab_size, self.vocabulary)
        lookup.check_special_ids(vocabulary, self._start.model.ids, self.vocabulary)
        longest = 1 + max(len(vocabulary.encode(question.inputs)) for question in asked)
        lengths = self._lengths(longest, max_tokens)
        key = (batch_size, *lengths.values())
        if key not in self._answering:
            made = inference.AnsweringModel(self._start.model, batch_size, lengths, self._mesh)
            self._answering[key] = made
        questions = infer.questions_of(asked, vocabulary, lengths, self.method)
        decoding = decoding and inference.limited(decoding, max_tokens)
        how = {"seed": seed, "is_length_normalized": False}
        progress = progress_lib.Progress()
        return self._answering[key].answer(self.params, questions, decoding, progress, **how)


def _listed(inputs: str | Sequence[str]) -> list[str]:
    found = [inputs] if isinstance(inputs, str) else list(inputs)
    if not found or not all(isinstance(text, str) for text in found):
        raise errors.UserError("Expected a text, or a list of at least one text.")
    for number, text in enumerate(found, 1):
        if half := cells.half_character(text):
            raise errors.UserError(f"Text {number} has half a character: {half}.")
    return found
