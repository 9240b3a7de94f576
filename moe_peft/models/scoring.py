"""Rank classification: which of several given answers is the most likely one.

All choices of an example stand in one decoder row as packed segments that see the whole input and
only themselves, so an input is encoded once. T5 knows positions by differences only, which a shift
of a whole segment leaves alone: each choice scores as it would in a row of its own.
"""

from collections.abc import Sequence

import flax.struct
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int
import numpy as np

from moe_peft import errors
from moe_peft.models import losses, special_ids


@flax.struct.dataclass
class ChoiceScores:
    """Log-likelihoods of answer choices, natural logarithm."""

    # Not annotated with shapes: jax rebuilds pytrees around placeholders of its own.
    # Float[b c], log p(tokens of the choice | input), summed over its tokens, the end-of-sequence
    # token included if the data has one
    log_likelihood: Array
    num_tokens: Array  # Float[b c], 0 where an example has fewer choices than the batch

    def best(self, *, is_length_normalized: bool) -> Int[Array, "b"]:
        """The most likely choice of each example; of equal ones the first.

        Normalised by length, the mean per token decides (T-Few, MHR), else the sum (T0, MoV).
        """
        scores = self.log_likelihood
        if is_length_normalized:
            scores = scores / jnp.maximum(self.num_tokens, 1)
        return jnp.argmax(jnp.where(self.num_tokens > 0, scores, -jnp.inf), axis=-1)


def pack_choices(
    choices: Sequence[Sequence[Sequence[int | np.integer] | np.ndarray]],
    length: int | None = None,
    ids: special_ids.SpecialIds = special_ids.T5,
) -> dict[str, np.ndarray]:
    """Decoder features of a batch of examples, the choices of one packed into one row.

    Args:
      choices: token ids of choice c of example b at [b][c], ragged in every direction.
      length: of the rows; by default as long as the longest needs.
      ids: of the network.

    Returns:
      decoder_input_tokens, decoder_target_tokens and decoder_segment_ids, int32 [b, length]; the
      segment id is the number of the choice plus one.
    """
    lengths = [sum(map(len, example)) for example in choices]
    length = length or max(lengths, default=1)
    fill = {"decoder_input_tokens": ids.pad, "decoder_target_tokens": ids.pad}
    fill["decoder_segment_ids"] = 0
    rows = {n: np.full((len(choices), length), value, np.int32) for n, value in fill.items()}
    for i, example in enumerate(choices):
        if lengths[i] > length:
            raise errors.UserError(
                f"The {len(example)} choices of example {i} have {lengths[i]} tokens together, the "
                f"row has room for {length}."
            )
        start = 0
        for number, tokens in enumerate(example):
            if not len(tokens):
                raise errors.UserError(f"Choice {number} of example {i} has no tokens.")
            stop = start + len(tokens)
            rows["decoder_input_tokens"][i, start:stop] = [ids.start, *tokens[:-1]]
            rows["decoder_target_tokens"][i, start:stop] = tokens
            rows["decoder_segment_ids"][i, start:stop] = number + 1
            start = stop
    return rows


def sum_by_choice(
    values: Float[Array, "b t"], segment_ids: Int[losses.AnyArray, "b t"], num_choices: int
) -> Float[Array, "b c"]:
    """Sums of `values` over each segment 1..num_choices; padding (segment 0) is left out."""
    of_choice: Bool[Array, "b t c"] = jax.nn.one_hot(segment_ids - 1, num_choices, dtype=jnp.bool_)
    return jnp.sum(jnp.where(of_choice, values[:, :, None], 0.0), axis=1)
