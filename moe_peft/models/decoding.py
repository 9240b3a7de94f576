"""Greedy decoding, sampling and beam search over any function that continues texts by one token.

The function is `tokens_to_logits(ids, cache) -> (logits, cache)`: the last ids [n, 1] of n
sequences and the decoding cache (any pytree) give the logits [n, vocabulary] of the next ids and
the extended cache. Decoding starts from the network's start id, and stops when all have its end.
"""

import abc
from collections.abc import Callable
import dataclasses
import functools
from typing import Any, NamedTuple

import gin
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, PyTree

from moe_peft import errors
from moe_peft.models import sampling, special_ids

_T5 = special_ids.T5
LENGTH_PENALTIES = ("t5x", "transformers")
_WHOLE = "a whole number of at least 1"

Logits = sampling.Logits
TokensToLogits = Callable[[Int[Array, "n 1"], Any], tuple[Logits, Any]]


@dataclasses.dataclass(frozen=True)
class Strategy(abc.ABC):
    """Turns a one-token decoder into whole answers.

    Attributes:
      max_decode_length: tokens of an answer at most, the end mark included. None leaves it to the
        caller of `predict`, who must set it: evaluation takes the length of targets.
      eos_id: the end mark; 1, T5's own, stands for that of the network.
      is_random: whether it needs an rng.
      rows_per_example: rows that the decoder sees for each example.
    """

    max_decode_length: int | None = None
    eos_id: int = 1

    is_random = False
    rows_per_example = 1

    def __post_init__(self):
        length, name = self.max_decode_length, f"{type(self).__name__}.max_decode_length"
        _check(length is None or (isinstance(length, int) and length >= 1), name, length, _WHOLE)

    @abc.abstractmethod
    def __call__(
        self,
        tokens_to_logits: TokensToLogits,
        cache: PyTree,
        *,
        batch_size: int,
        cache_batch_axis: int = 0,
        rng: Array | None = None,
        ids: special_ids.SpecialIds = _T5,
    ) -> Int[Array, "b t"]:
        """Returns the answers' ids [b, max_decode_length], padding after the end mark.

        Args:
          tokens_to_logits: sees batch_size * rows_per_example rows.
          cache: of that many rows.
          batch_size: examples.
          cache_batch_axis: axis of the rows in cache leaves: 0, or 1 when layers are scanned.
            Leaves without that axis (positions) belong to all rows.
          rng: key, if `is_random`.
          ids: of the network.
        """

    def end_of(self, ids: special_ids.SpecialIds) -> int:
        """The end mark of answers of a network with these ids."""
        return ids.eos if self.eos_id == _T5.eos else self.eos_id


class _State(NamedTuple):
    index: Array  # tokens made so far
    tokens: Int[Array, "n t"]
    last: Int[Array, "n 1"]
    is_done: Bool[Array, "n"]
    cache: PyTree
    rng: Array | None


@gin.register(module="decoding")
@dataclasses.dataclass(frozen=True)
class Greedy(Strategy):
    """The most probable token every time."""

    def __call__(
        self, tokens_to_logits, cache, *, batch_size, cache_batch_axis=0, rng=None, ids=_T5
    ):
        """See `Strategy`. The key is split once per token."""
        length, end = self.max_decode_length, self.end_of(ids)

        def step(state: _State) -> _State:
            logits, cache = tokens_to_logits(state.last, state.cache)
            key, rng = (None, None) if state.rng is None else jax.random.split(state.rng)
            new = jnp.where(state.is_done, ids.pad, self._chosen(logits, key).astype(jnp.int32))
            return _State(
                index=state.index + 1,
                tokens=jax.lax.dynamic_update_slice(state.tokens, new[:, None], (0, state.index)),
                last=new[:, None],
                is_done=state.is_done | (new == end),
                cache=cache,
                rng=rng,
            )

        start = _State(
            index=jnp.zeros((), jnp.int32),
            tokens=jnp.full((batch_size, length), ids.pad, jnp.int32),
            last=jnp.full((batch_size, 1), ids.start, jnp.int32),
            is_done=jnp.zeros((batch_size,), bool),
            cache=cache,
            rng=rng if self.is_random else None,
        )
        goes_on = lambda state: (state.index < length) & ~jnp.all(state.is_done)
        return jax.lax.while_loop(goes_on, step, start).tokens

    def _chosen(self, logits: Logits, key: Array | None) -> Int[Array, "n"]:
        return jnp.argmax(logits, axis=-1)


@gin.register(module="decoding")
@dataclasses.dataclass(frozen=True)
class Sample(Greedy):
    """Draws every token from what `restrict` leaves; the same key gives the same sequences."""

    temperature: float = 1.0  # above 0; below 1 sharpens. `Greedy` is its limit at 0.
    top_k: int | None = None  # draw among the k most probable ids only; None for all
    top_p: float = 1.0  # in (0, 1]; draw among the fewest ids whose probabilities reach this sum

    is_random = True

    def __post_init__(self):
        super().__post_init__()
        _check(
            self.temperature > 0, "temperature", self.temperature, "a number above 0 (or Greedy)"
        )
        _check(self.top_k is None or self.top_k >= 1, "top_k", self.top_k, f"{_WHOLE}, or None")
        _check(0 < self.top_p <= 1, "top_p", self.top_p, "0 < top_p <= 1")

    def _chosen(self, logits, key):
        logits = sampling.restrict(logits / self.temperature, top_k=self.top_k, top_p=self.top_p)
        return jax.random.categorical(key, logits)


class _BeamState(NamedTuple):
    index: Array  # tokens made so far
    live_tokens: Int[Array, "b k t"]
    live_log_probs: Float[Array, "b k"]  # best first
    finished_tokens: Int[Array, "b k t"]
    finished_scores: Float[Array, "b k"]  # best first, -inf where there is none
    last: Int[Array, "n 1"]
    cache: PyTree


@gin.register(module="decoding")
@dataclasses.dataclass(frozen=True)
class BeamSearch(Strategy):
    """The best of several beams.

    The score of a sequence with n ids, end-of-text included, is `log p / penalty(n)`. The search
    ends when no live beam can still beat the worst of `num_beams` finished ones.
    """

    num_beams: int = 4  # at least 1
    # exponent of the penalty; 0 compares log probabilities, larger favours longer ones
    alpha: float = 0.6
    # "t5x": the penalty is ((5 + n) / 6) ** alpha, and only sequences with an end-of-text id count.
    # "transformers": n ** alpha; sequences that fill all of `max_decode_length` count as finished
    # too, and end-of-text must be among the best `num_beams` candidates instead of twice that
    # (`generate` with early_stopping="never").
    length_penalty: str = "t5x"

    def __post_init__(self):
        super().__post_init__()
        _check(self.num_beams >= 1, "num_beams", self.num_beams, _WHOLE)
        errors.check_one_of("length_penalty", self.length_penalty, LENGTH_PENALTIES)

    rows_per_example = property(lambda self: self.num_beams)

    def __call__(
        self, tokens_to_logits, cache, *, batch_size, cache_batch_axis=0, rng=None, ids=_T5
    ):
        """See `Strategy`."""
        return self.search(tokens_to_logits, cache, batch_size, cache_batch_axis, ids)[0][:, 0]

    def search(
        self,
        tokens_to_logits: TokensToLogits,
        cache: PyTree,
        batch_size: int,
        axis: int = 0,
        ids: special_ids.SpecialIds = _T5,
    ) -> tuple[Int[Array, "b k t"], Float[Array, "b k"]]:
        """Returns the best finished sequences and their scores, best first.

        Where a row has fewer than `num_beams` finished sequences, the rest are padding with score
        -inf; where it has none, its live beams are returned, scored at full length. The beams of an
        example are rows next to each other, see `batches.repeat_rows`; `axis` is that of the rows
        in cache leaves.
        """
        beams, length = self.num_beams, self.max_decode_length
        _check_rows(cache, batch_size * beams, axis)
        no_tokens = jnp.full((batch_size, beams, length), ids.pad, jnp.int32)
        # One live beam at first: equal beams would only find the same continuations.
        first_beam = jnp.where(jnp.arange(beams) == 0, 0.0, -jnp.inf)
        start = _BeamState(
            index=jnp.zeros((), jnp.int32),
            live_tokens=no_tokens,
            live_log_probs=jnp.tile(first_beam[None], (batch_size, 1)),
            finished_tokens=no_tokens,
            finished_scores=jnp.full((batch_size, beams), -jnp.inf),
            last=jnp.full((batch_size * beams, 1), ids.start, jnp.int32),
            cache=cache,
        )
        step = functools.partial(self._step, tokens_to_logits, axis, self.end_of(ids))
        end = jax.lax.while_loop(self._goes_on, step, start)
        any_finished, live = end.finished_scores[:, :1] > -jnp.inf, end.live_log_probs
        tokens = jnp.where(any_finished[:, :, None], end.finished_tokens, end.live_tokens)
        return tokens, jnp.where(any_finished, end.finished_scores, live / self._penalty(length))

    def _penalty(self, length):
        base = (5.0 + length) / 6.0 if self.length_penalty == "t5x" else length
        return jnp.asarray(base, jnp.float32) ** self.alpha

    def _goes_on(self, state: _BeamState) -> Bool[Array, ""]:
        # A live beam that goes on loses probability, but its penalty may grow faster: what it can
        # still reach is the better of ending at the next token and ending at the largest length.
        best_live = state.live_log_probs[:, 0]
        ends = (state.index + 1, self.max_decode_length)
        attainable = jnp.maximum(*(best_live / self._penalty(end) for end in ends))
        can_improve = attainable > state.finished_scores[:, -1]
        return (state.index < self.max_decode_length) & jnp.any(can_improve)

    def _step(self, tokens_to_logits, axis, end: int, state: _BeamState) -> _BeamState:
        logits, cache = tokens_to_logits(state.last, state.cache)
        batch_size, num_beams = state.live_log_probs.shape
        log_probs = jax.nn.log_softmax(logits.astype(jnp.float32))
        vocab_size = log_probs.shape[-1]
        log_probs = log_probs.reshape(batch_size, num_beams, vocab_size)
        log_probs = log_probs + state.live_log_probs[:, :, None]
        # At most one end-of-text per beam: twice the beams always leave enough live candidates.
        flat = log_probs.reshape(batch_size, -1)
        candidate_log_probs, candidates = jax.lax.top_k(flat, 2 * num_beams)
        parents, ids = candidates // vocab_size, candidates % vocab_size
        tokens = jnp.take_along_axis(state.live_tokens, parents[:, :, None], axis=1)
        tokens = jax.lax.dynamic_update_slice(tokens, ids[:, :, None], (0, 0, state.index))

        live = jnp.where(ids == end, -jnp.inf, candidate_log_probs)
        live_log_probs, kept = jax.lax.top_k(live, num_beams)
        rows = jnp.take_along_axis(parents, kept, axis=1)
        rows = (rows + num_beams * jnp.arange(batch_size)[:, None]).reshape(-1)

        scores = candidate_log_probs / self._penalty(state.index + 1)
        are_finished = ids == end
        if self.length_penalty == "transformers":
            is_full = state.index + 1 == self.max_decode_length
            are_finished = (are_finished | is_full) & (jnp.arange(2 * num_beams) < num_beams)[None]
        scores = jnp.where(are_finished, scores, -jnp.inf)
        scores = jnp.concatenate([state.finished_scores, scores], axis=1)
        finished_scores, best = jax.lax.top_k(scores, num_beams)
        finished = jnp.concatenate([state.finished_tokens, tokens], axis=1)
        return _BeamState(
            index=state.index + 1,
            live_tokens=jnp.take_along_axis(tokens, kept[:, :, None], axis=1),
            live_log_probs=live_log_probs,
            finished_tokens=jnp.take_along_axis(finished, best[:, :, None], axis=1),
            finished_scores=finished_scores,
            last=jnp.take_along_axis(ids, kept, axis=1).reshape(-1, 1),
            cache=jax.tree.map(lambda x: jnp.take(x, rows, axis) if x.ndim > axis else x, cache),
        )


def _check_rows(cache: PyTree, num_rows: int, axis: int) -> None:
    for path, leaf in jax.tree_util.tree_leaves_with_path(cache):
        if leaf.ndim > axis and leaf.shape[axis] != num_rows:
            raise ValueError(
                f"Beam search needs a cache of batch_size * num_beams = {num_rows} rows at axis "
                f"{axis}; leaf {jax.tree_util.keystr(path)} has shape {leaf.shape}."
            )


def _check(is_right: bool, name: str, value: object, expected: str) -> None:
    if not is_right:
        raise errors.UserError(f"{name} is {value!r}; expected {expected}.")
