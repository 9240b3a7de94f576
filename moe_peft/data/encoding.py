"""Rows of ids to the arrays a model reads."""

from collections.abc import Sequence
import logging

import numpy as np

from moe_peft.data import packing, rows
from moe_peft.models import special_ids

Batch = dict[str, np.ndarray]
FEATURES = ("inputs", "targets")


def with_end(sequence: np.ndarray, limit: int, eos_id: int) -> np.ndarray:
    """The ids with the end mark, cut to the limit as SeqIO cuts: the mark survives."""
    return np.append(sequence[: limit - 1], eos_id)


def warn_if_cut(name: str, source: rows.Rows, lengths: tuple[int, int]) -> None:
    """Logs how many examples are longer than a row; they are cut from the right."""
    for feature, limit in zip(FEATURES, lengths):
        needed = getattr(source, feature).lengths + 1
        if np.any(needed > limit):
            logging.warning(
                "%s: %d of %d examples have more than %d tokens of %s and are cut; the longest has "
                "%d. Raise feature_lengths.",
                *(name, np.sum(needed > limit), len(needed), limit, feature, needed.max()),
            )


def encode(
    examples: Sequence[tuple[rows.Rows, int]],
    lengths: tuple[int, int],
    places: Sequence[int] | None = None,
    num_rows: int | None = None,
    ids: special_ids.SpecialIds = special_ids.T5,
) -> Batch:
    """T5X's encoder-decoder features of some examples, given as (rows, index).

    `lengths` are tokens of a row, (inputs, targets). With `places`, the packed row of each example
    among `num_rows`, features have segment ids and positions, otherwise what scalars there are.
    `ids` are the network's.
    """
    is_packed = places is not None
    places = places if is_packed else range(len(examples))
    encoder, decoder = (
        packing.fill_rows(
            [with_end(getattr(source, name)[index], limit, ids.eos) for source, index in examples],
            places,
            (num_rows if is_packed else len(examples), limit),
            ids.pad,
        )
        for name, limit in zip(FEATURES, lengths)
    )
    # As SeqIO has it: unpacked rows are shifted as a whole, end mark included.
    segments = decoder["segment_ids"] if is_packed else np.ones_like(decoder["tokens"])
    batch = {
        "encoder_input_tokens": encoder["tokens"],
        "decoder_target_tokens": decoder["tokens"],
        "decoder_input_tokens": packing.shift_right(decoder["tokens"], segments, ids),
        "decoder_loss_weights": (decoder["segment_ids"] > 0).astype(np.int32),
    }
    if is_packed:
        for side, features in (("encoder", encoder), ("decoder", decoder)):
            batch[f"{side}_segment_ids"] = features["segment_ids"]
            batch[f"{side}_positions"] = features["positions"]
        return batch
    for name in examples[0][0].scalars if examples else ():
        batch[name] = np.array([source.scalars[name][i] for source, i in examples], np.int32)
    return batch
