"""What T5X feeds a model with adapters: SeqIO's features, and those that a method routes by."""

from collections.abc import Callable, Mapping
import functools
from typing import Any

import numpy as np
import seqio
from t5x import models as t5x_models
import tensorflow as tf

from moe_peft import errors, methods
from moe_peft.data import feature_converter, sentences, task_ids


def converter(
    model: t5x_models.EncoderDecoderModel, method: methods.Method
) -> Callable[..., seqio.FeatureConverter]:
    """Returns the feature converter that a model with the method's adapters needs.

    Its own, which may pack, unless the method routes by task, or `sentences.configured` names an
    encoder.
    """
    encoder = sentences.configured()
    if method.num_tasks is None and encoder is None:
        return model.FEATURE_CONVERTER_CLS
    return functools.partial(
        RoutingFeatureConverter, method=method, vocabulary=model.input_vocabulary, encoder=encoder
    )


class RoutingFeatureConverter(feature_converter.RoutingEncDecFeatureConverter):
    """Encoder-decoder features with task ids and, if there is an encoder, sentence embeddings.

    Attributes:
      method: whose task ids they are.
      vocabulary: of the inputs.
      encoder: texts -> Float[n D].
    """

    def __init__(
        self,
        pack: bool,
        method: methods.Method,
        vocabulary: seqio.Vocabulary,
        encoder: sentences.Encoder | None,
        use_custom_packing_ops: bool = False,
        **kwargs: Any,
    ):
        """Raises UserError if rows are to be packed: they have no task and no sentence then."""
        if pack or use_custom_packing_ops:
            raise errors.UserError(
                f"{method.name!r} routes by example, so rows cannot be packed: set "
                "train/utils.DatasetConfig.pack and train_eval/utils.DatasetConfig.pack to False."
            )
        self.method, self.vocabulary, self.encoder = method, vocabulary, encoder
        super().__init__(sentence_embeddings=encoder is not None, **kwargs)

    def __call__(
        self, ds: tf.data.Dataset, task_feature_lengths: Mapping[str, int]
    ) -> tf.data.Dataset:
        """Converts a dataset of examples with inputs, targets, task_ids and template_ids."""
        lengths = dict(task_feature_lengths)
        if self.encoder is not None:
            width = self.encoder([""]).shape[-1]
            lengths["sentence_embeddings"] = width
            ds = ds.map(functools.partial(self._with_embedding, width=width))
        return super().__call__(ds, lengths).map(self._with_task)

    def _with_embedding(self, example: Mapping[str, tf.Tensor], width: int):
        embed = lambda ids: np.asarray(
            self.encoder([self.vocabulary.decode(ids.tolist())])[0], np.float32
        )
        found = tf.numpy_function(embed, [example["inputs"]], tf.float32)
        return {**example, "sentence_embeddings": tf.ensure_shape(found, [width])}

    def _with_task(self, example: Mapping[str, tf.Tensor]):
        ids = tf.numpy_function(
            self._task_id, [example["task_ids"], example["template_ids"]], tf.int32
        )
        return {**example, "task_ids": tf.ensure_shape(ids, [])}

    def _task_id(self, ids: np.ndarray, template_ids: np.ndarray) -> np.ndarray:
        batch = {"task_ids": np.atleast_1d(ids), "template_ids": np.atleast_1d(template_ids)}
        found = task_ids.per_template(batch)["task_ids"]
        if self.method.num_tasks is not None:
            task_ids.check_ids(found, self.method.num_tasks, "The data")
        return np.asarray(found, np.int32)[0]
