"""How answers are decoded, as settings: what gin files bind and `EncoderDecoder.predict` takes.

Each class holds the options of one function of `decoding` and nothing else.
"""

import dataclasses
from typing import Protocol, runtime_checkable

import gin
from jaxtyping import Array, Int, PyTree

from moe_peft import errors
from moe_peft.models import decoding


@runtime_checkable
class Strategy(Protocol):
    """Turns a one-token decoder into whole answers.

    Attributes:
      max_decode_length: tokens of an answer at most, the end mark included. None leaves it to the
        caller of `predict`, who must set it: evaluation takes the length of targets.
      eos_id: the end mark.
      rows_per_example: rows that the decoder sees for each example.
      is_random: whether it needs an rng.
    """

    max_decode_length: int | None
    eos_id: int
    rows_per_example: int
    is_random: bool

    def __call__(
        self,
        tokens_to_logits: decoding.TokensToLogits,
        cache: PyTree,
        *,
        batch_size: int,
        cache_batch_axis: int,
        rng: Array | None,
    ) -> Int[Array, "b t"]:
        """Returns the answers' ids [b, max_decode_length], 0 after the end mark.

        Args:
          tokens_to_logits: sees batch_size * rows_per_example rows.
          cache: of that many rows.
          batch_size: examples.
          cache_batch_axis: axis of the rows in the cache.
          rng: key, if `is_random`.
        """
        ...


@gin.register(module="decoding")
@dataclasses.dataclass(frozen=True)
class Greedy:
    """The most probable token every time; see `decoding.greedy`."""

    max_decode_length: int | None = None
    eos_id: int = 1

    rows_per_example = 1
    is_random = False

    def __post_init__(self):
        _check_length(self)

    def __call__(self, tokens_to_logits, cache, *, batch_size, cache_batch_axis, rng):
        """See `Strategy`."""
        del cache_batch_axis, rng
        return decoding.greedy(
            tokens_to_logits,
            cache,
            batch_size=batch_size,
            max_decode_length=self.max_decode_length,
            eos_id=self.eos_id,
        )


@gin.register(module="decoding")
@dataclasses.dataclass(frozen=True)
class Sample:
    """Draws every token; see `decoding.sample` for the options."""

    max_decode_length: int | None = None
    eos_id: int = 1
    temperature: float = 1.0
    top_k: int | None = None
    top_p: float = 1.0

    rows_per_example = 1
    is_random = True

    def __post_init__(self):
        _check_length(self)

    def __call__(self, tokens_to_logits, cache, *, batch_size, cache_batch_axis, rng):
        """See `Strategy`."""
        del cache_batch_axis
        return decoding.sample(
            tokens_to_logits,
            cache,
            rng,
            batch_size=batch_size,
            max_decode_length=self.max_decode_length,
            eos_id=self.eos_id,
            temperature=self.temperature,
            top_k=self.top_k,
            top_p=self.top_p,
        )


@gin.register(module="decoding")
@dataclasses.dataclass(frozen=True)
class BeamSearch:
    """The best of several beams; see `decoding.beam_search` for the options."""

    max_decode_length: int | None = None
    eos_id: int = 1
    num_beams: int = 4
    alpha: float = 0.6
    length_penalty: str = "t5x"

    is_random = False

    def __post_init__(self):
        _check_length(self)

    @property
    def rows_per_example(self) -> int:
        """Beams."""
        return self.num_beams

    def __call__(self, tokens_to_logits, cache, *, batch_size, cache_batch_axis, rng):
        """See `Strategy`."""
        del rng
        tokens, _ = decoding.beam_search(
            tokens_to_logits,
            cache,
            batch_size=batch_size,
            num_beams=self.num_beams,
            max_decode_length=self.max_decode_length,
            eos_id=self.eos_id,
            alpha=self.alpha,
            length_penalty=self.length_penalty,
            cache_batch_axis=cache_batch_axis,
        )
        return tokens[:, 0]


def _check_length(strategy: Strategy) -> None:
    length = strategy.max_decode_length
    if length is not None and (not isinstance(length, int) or length < 1):
        raise errors.UserError(
            f"{type(strategy).__name__}.max_decode_length is {length!r}; expected a whole number "
            "of at least 1."
        )
