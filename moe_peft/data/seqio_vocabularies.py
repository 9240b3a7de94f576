"""Vocabularies of this package as SeqIO's."""

from collections.abc import Callable

import numpy as np
import seqio
import tensorflow as tf

from moe_peft import errors
from moe_peft.data import vocabularies


class Wrapped(seqio.Vocabulary):
    """A vocabulary of `vocabularies` for SeqIO, whose tf.data asks Python for ids and texts."""

    def __init__(self, get: Callable[[], vocabularies.Vocabulary]):
        self._get = get

    def __eq__(self, other):
        own, its = self._get(), isinstance(other, Wrapped) and other._get()
        return own is its or (bool(its) and own.content() == its.content())

    def __hash__(self):
        return hash(Wrapped)

    extra_ids = property(lambda self: self._get().extra_ids)
    bos_id = property(lambda self: self._get().bos_id)
    eos_id = property(lambda self: self._get().eos_id)
    pad_id = property(lambda self: self._get().pad_id)
    unk_id = property(lambda self: self._get().unk_id)
    spells_all = property(lambda self: self._get().spells_all)
    vocab_size = property(lambda self: self._get().vocab_size)
    _base_vocab_size = vocab_size  # what lies beyond is unknown, sentinels are not

    _encode = lambda self, text: self._get().encode(text)
    _decode = lambda self, ids: self._get().decode(ids)

    def check_padding(self) -> None:
        """Raises UserError if texts are padded with another id than SeqIO's."""
        if (self.pad_id or 0) > 0:
            raise errors.UserError(
                f"SeqIO and T5X pad with the id 0, and this vocabulary with {self.pad_id}. Train "
                "on files of rows in the built-in trainer instead (--data, or Model.train)."
            )

    def _encode_tf(self, text: tf.Tensor) -> tf.Tensor:
        self.check_padding()
        encode = lambda content: np.array(self._encode(content.decode()), np.int32)
        ids = tf.numpy_function(encode, [text], tf.int32)
        return tf.ensure_shape(ids, [None])

    def _decode_tf(self, ids: tf.Tensor) -> tf.Tensor:
        of_row = lambda row: np.array(self._decode(row.tolist()).encode(), object)
        text = lambda row: tf.numpy_function(of_row, [row], tf.string)
        texts = (
            text(ids)
            if ids.shape.rank == 1
            else tf.map_fn(text, ids, fn_output_signature=tf.string)
        )
        return tf.ensure_shape(texts, ids.shape[:-1])


class Configured(Wrapped):
    """Stands for the vocabulary that gin sets in tasks that are registered before gin is read."""

    def __init__(self):
        super().__init__(vocabularies.get)

    def __eq__(self, other):
        return isinstance(other, Configured)

    def __hash__(self):
        return hash(Configured)
