"""Several short examples in one row, told apart by segment ids."""

from collections.abc import Iterator, Sequence

from jaxtyping import Int
import numpy as np

from moe_peft.models import special_ids


class Packer:
    """Fills a batch of rows, first fit, in the order examples come.

    Only lengths are needed, so the place of every example can be replayed without reading it.
    `limits` is the capacity of a row in tokens, (inputs, targets).
    """

    def __init__(self, batch_size: int, limits: tuple[int, int]):
        self.batch_size = batch_size
        self.limits = np.array(limits)

    def batches(self, lengths: Iterator[tuple[int, int]]) -> Iterator[list[int]]:
        """For each batch, the row of each of its examples; the first that fits nowhere ends it.

        `lengths` are (inputs, targets) tokens of each example, none above the limits.
        """
        used = np.zeros((self.batch_size, 2), int)
        rows: list[int] = []
        for pair in lengths:
            fits = np.flatnonzero(np.all(used + pair <= self.limits, axis=1))
            if not fits.size:
                yield rows
                used[:], rows, fits = 0, [], [0]
            used[fits[0]] += pair
            rows.append(int(fits[0]))


def fill_rows(
    sequences: Sequence[np.ndarray], rows: Sequence[int], shape: tuple[int, int], pad_id: int = 0
) -> dict[str, Int[np.ndarray, "b t"]]:
    """Tokens, segment ids (from 1; 0 is padding) and positions (restarting) of packed rows."""
    tokens, segments, positions = (np.full(shape, fill, np.int32) for fill in (pad_id, 0, 0))
    used, counts = np.zeros((2, shape[0]), int)
    for sequence, row in zip(sequences, rows):
        start, end = used[row], used[row] + len(sequence)
        counts[row] += 1
        tokens[row, start:end] = sequence
        segments[row, start:end] = counts[row]
        positions[row, start:end] = np.arange(len(sequence))
        used[row] = end
    return {"tokens": tokens, "segment_ids": segments, "positions": positions}


def shift_right(
    tokens: Int[np.ndarray, "b t"],
    segment_ids: Int[np.ndarray, "b t"],
    ids: special_ids.SpecialIds = special_ids.T5,
) -> Int[np.ndarray, "b t"]:
    """Decoder inputs: each segment has the start id and its own tokens but the last; then padding.

    Segment 0 is padding.
    """
    shifted = np.where(segment_ids > 0, ids.start, ids.pad).astype(tokens.dtype)
    goes_on = segment_ids[:, 1:] == segment_ids[:, :-1]
    shifted[:, 1:] = np.where(goes_on, tokens[:, :-1], shifted[:, 1:])
    return shifted
