"""SeqIO's encoder-decoder features, extended by what adapters route on.

T5X takes this converter wherever it takes `seqio.EncDecFeatureConverter`.
"""

from collections.abc import Mapping

import seqio
import tensorflow as tf

ROUTING_FEATURES = {
    "task_ids": seqio.FeatureConverter.FeatureSpec(dtype=tf.int32, rank=0),
    "template_ids": seqio.FeatureConverter.FeatureSpec(dtype=tf.int32, rank=0),
}


# Of the instruction, `[D]`.
EMBEDDING_FEATURE = {"sentence_embeddings": seqio.FeatureConverter.FeatureSpec(dtype=tf.float32)}


class RoutingEncDecFeatureConverter(seqio.EncDecFeatureConverter):
    """Encoder-decoder features plus `task_ids`, `template_ids` and `sentence_embeddings`, if asked.

    Tasks must produce the extra features. `task_feature_lengths` names inputs and targets only,
    plus the width of `sentence_embeddings`. Packed rows mix tasks, so packing and routing features
    exclude each other.
    """

    def __init__(self, sentence_embeddings: bool = False, **kwargs):
        extra = ROUTING_FEATURES | (EMBEDDING_FEATURE if sentence_embeddings else {})
        super().__init__(pack=False, passthrough_features=extra, **kwargs)

    def __call__(
        self, ds: tf.data.Dataset, task_feature_lengths: Mapping[str, int]
    ) -> tf.data.Dataset:
        """Converts; SeqIO wants a length for every feature, so scalars get a nominal one."""
        lengths = dict.fromkeys(ROUTING_FEATURES, 1)
        return super().__call__(ds, {**lengths, **task_feature_lengths})

    def _pack_or_pad(
        self, ds: tf.data.Dataset, packed_lengths: Mapping[str, int]
    ) -> tf.data.Dataset:
        dense = {k: v for k, v in packed_lengths.items() if k not in self._passthrough_features}
        return super()._pack_or_pad(ds, dense)
