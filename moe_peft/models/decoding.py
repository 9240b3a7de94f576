"""Greedy search, sampling and beam search over any function that continues sequences by one token.

That function is `tokens_to_logits(ids, cache) -> (logits, cache)`: the last ids [n, 1] of n
sequences and the decoding cache (any pytree) give the logits [n, vocabulary] of the next ids and
the extended cache. Decoding starts from id 0, T5's start token, stops a sequence at `eos_id`, and
stops altogether as soon as all are stopped. Results hold `max_decode_length` ids, the end-of-text
id included, 0 after it.

    def tokens_to_logits(ids, cache):
        logits, new = module.apply({"params": params, **cache}, encoded, encoder_tokens, ids, ids,
                                   enable_dropout=False, decode=True, max_decode_length=32,
                                   method=module.decode, mutable=["cache"])
        return logits[:, 0], new
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, PyTree

from moe_peft import errors

START_ID = 0
LENGTH_PENALTIES = ("t5x", "transformers")

Ids = Int[Array, "n 1"]
Logits = Float[Array, "n v"]
TokensToLogits = Callable[[Ids, Any], tuple[Logits, Any]]


class _State(NamedTuple):
    index: Array  # tokens made so far
    tokens: Int[Array, "n t"]
    last: Int[Array, "n 1"]
    is_done: Bool[Array, "n"]
    cache: PyTree
    rng: Array | None


def greedy(
    tokens_to_logits: TokensToLogits,
    cache: PyTree,
    *,
    batch_size: int,
    max_decode_length: int,
    eos_id: int = 1,
) -> Int[Array, "n t"]:
    """Takes the most probable id every time."""
    choose = lambda logits, rng: jnp.argmax(logits, axis=-1)
    return _generate(tokens_to_logits, cache, choose, batch_size, max_decode_length, eos_id, None)


def sample(
    tokens_to_logits: TokensToLogits,
    cache: PyTree,
    rng: Array,
    *,
    batch_size: int,
    max_decode_length: int,
    eos_id: int = 1,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float = 1.0,
) -> Int[Array, "n t"]:
    """Draws every id from the distribution that `restrict` leaves.

    Args:
        rng: split once per token; the same key gives the same sequences.
        temperature: above 0; below 1 sharpens. `greedy` is its limit at 0.
        top_k: draw among the k most probable ids only; None for all.
        top_p: in (0, 1]; draw among the fewest ids whose probabilities reach this sum.
    """
    _check(temperature > 0, "temperature", temperature, "a number above 0 (or use greedy decoding)")
    _check(top_k is None or top_k >= 1, "top_k", top_k, "a whole number of at least 1, or None")
    _check(0 < top_p <= 1, "top_p", top_p, "0 < top_p <= 1")
    choose = lambda logits, key: jax.random.categorical(
        key, restrict(logits / temperature, top_k=top_k, top_p=top_p)
    )
    return _generate(tokens_to_logits, cache, choose, batch_size, max_decode_length, eos_id, rng)


def restrict(logits: Logits, *, top_k: int | None = None, top_p: float = 1.0) -> Logits:
    """Sets logits outside the k best, then outside the mass p, to -inf; equals of the last stay."""
    logits = logits.astype(jnp.float32)
    if top_k is not None and top_k < logits.shape[-1]:
        kth_best = jax.lax.top_k(logits, top_k)[0][:, -1:]
        logits = jnp.where(logits < kth_best, -jnp.inf, logits)
    if top_p < 1:
        descending = jnp.flip(jnp.sort(logits, axis=-1), axis=-1)
        probs = jax.nn.softmax(descending, axis=-1)
        mass_before = jnp.cumsum(probs, axis=-1) - probs
        # The best id has no mass before it, so at least one stays.
        last_kept = jnp.min(jnp.where(mass_before < top_p, descending, jnp.inf), -1, keepdims=True)
        logits = jnp.where(logits < last_kept, -jnp.inf, logits)
    return logits


def _generate(tokens_to_logits, cache, choose, batch_size, max_decode_length, eos_id, rng):
    """Appends `choose(logits, rng)` until every row has `eos_id` or is full."""

    def step(state: _State) -> _State:
        logits, cache = tokens_to_logits(state.last, state.cache)
        key, rng = (None, None) if state.rng is None else jax.random.split(state.rng)
        ids = jnp.where(state.is_done, 0, choose(logits, key).astype(jnp.int32))
        return _State(
            index=state.index + 1,
            tokens=jax.lax.dynamic_update_slice(state.tokens, ids[:, None], (0, state.index)),
            last=ids[:, None],
            is_done=state.is_done | (ids == eos_id),
            cache=cache,
            rng=rng,
        )

    start = _State(
        index=jnp.zeros((), jnp.int32),
        tokens=jnp.zeros((batch_size, max_decode_length), jnp.int32),
        last=jnp.full((batch_size, 1), START_ID, jnp.int32),
        is_done=jnp.zeros((batch_size,), bool),
        cache=cache,
        rng=rng,
    )
    goes_on = lambda state: (state.index < max_decode_length) & ~jnp.all(state.is_done)
    return jax.lax.while_loop(goes_on, step, start).tokens


class _BeamState(NamedTuple):
    index: Array  # tokens made so far
    live_tokens: Int[Array, "b k t"]
    live_log_probs: Float[Array, "b k"]  # best first
    finished_tokens: Int[Array, "b k t"]
    finished_scores: Float[Array, "b k"]  # best first, -inf where there is none
    last: Int[Array, "n 1"]
    cache: PyTree


def beam_search(
    tokens_to_logits: TokensToLogits,
    cache: PyTree,
    *,
    batch_size: int,
    num_beams: int,
    max_decode_length: int,
    eos_id: int = 1,
    alpha: float = 0.6,
    length_penalty: str = "t5x",
    cache_batch_axis: int = 0,
) -> tuple[Int[Array, "b k t"], Float[Array, "b k"]]:
    """Returns the best finished sequences and their scores, best first.

    The score of a sequence with n ids, end-of-text included, is `log p / penalty(n)`. The search
    ends when no live beam can still beat the worst of `num_beams` finished ones. Where a row has
    fewer finished sequences, the rest are zeros with score -inf; where it has none, its live beams
    are returned, scored at full length.

    Args:
        tokens_to_logits: sees `batch_size * num_beams` rows, beams of one example next to each
            other; `repeat_rows` prepares encoded text and caches.
        cache: of that many rows.
        num_beams: at least 1.
        alpha: exponent of the penalty; 0 compares log probabilities, larger favours longer ones.
        length_penalty: "t5x": the penalty is ((5 + n) / 6) ** alpha, and only sequences with an
            end-of-text id count. "transformers": n ** alpha; sequences that fill all of
            `max_decode_length` count as finished too, and end-of-text must be among the best
            `num_beams` candidates instead of twice that (`generate` with early_stopping="never").
        cache_batch_axis: axis of the rows in cache leaves: 0, or 1 when layers are scanned. Leaves
            without that axis (positions) belong to all rows.
    """
    _check(num_beams >= 1, "num_beams", num_beams, "a whole number of at least 1")
    if length_penalty not in LENGTH_PENALTIES:
        raise errors.UserError(
            f"length_penalty is {length_penalty!r}; expected one of {', '.join(LENGTH_PENALTIES)}."
            f"{errors.near(str(length_penalty), LENGTH_PENALTIES)}"
        )
    num_candidates = 2 * num_beams

    def penalty(length):
        base = (5.0 + length) / 6.0 if length_penalty == "t5x" else length
        return jnp.asarray(base, jnp.float32) ** alpha

    def step(state: _BeamState) -> _BeamState:
        logits, cache = tokens_to_logits(state.last, state.cache)
        log_probs = jax.nn.log_softmax(logits.astype(jnp.float32))
        vocab_size = log_probs.shape[-1]
        log_probs = log_probs.reshape(batch_size, num_beams, vocab_size)
        log_probs = log_probs + state.live_log_probs[:, :, None]
        # At most one end-of-text per beam: twice the beams always leave enough live candidates.
        flat = log_probs.reshape(batch_size, -1)
        candidate_log_probs, candidates = jax.lax.top_k(flat, num_candidates)
        parents, ids = candidates // vocab_size, candidates % vocab_size
        tokens = jnp.take_along_axis(state.live_tokens, parents[:, :, None], axis=1)
        tokens = jax.lax.dynamic_update_slice(tokens, ids[:, :, None], (0, 0, state.index))
        is_eos = ids == eos_id

        live = jnp.where(is_eos, -jnp.inf, candidate_log_probs)
        live_log_probs, kept = jax.lax.top_k(live, num_beams)
        rows = jnp.take_along_axis(parents, kept, axis=1)
        rows = (rows + num_beams * jnp.arange(batch_size)[:, None]).reshape(-1)

        scores = candidate_log_probs / penalty(state.index + 1)
        counts = is_eos
        if length_penalty == "transformers":
            is_full = state.index + 1 == max_decode_length
            counts = (is_eos | is_full) & (jnp.arange(num_candidates) < num_beams)[None]
        scores = jnp.where(counts, scores, -jnp.inf)
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
            cache=_take_rows(cache, rows, cache_batch_axis),
        )

    def goes_on(state: _BeamState) -> Bool[Array, ""]:
        best_live = state.live_log_probs[:, 0]
        attainable = jnp.maximum(
            best_live / penalty(state.index + 1), best_live / penalty(max_decode_length)
        )
        can_improve = attainable > state.finished_scores[:, -1]
        return (state.index < max_decode_length) & jnp.any(can_improve)

    _check_rows(cache, batch_size * num_beams, cache_batch_axis)
    no_tokens = jnp.zeros((batch_size, num_beams, max_decode_length), jnp.int32)
    # One live beam at first: equal beams would only find the same continuations.
    first_beam = jnp.where(jnp.arange(num_beams) == 0, 0.0, -jnp.inf)
    end = jax.lax.while_loop(
        goes_on,
        step,
        _BeamState(
            index=jnp.zeros((), jnp.int32),
            live_tokens=no_tokens,
            live_log_probs=jnp.tile(first_beam[None], (batch_size, 1)),
            finished_tokens=no_tokens,
            finished_scores=jnp.full((batch_size, num_beams), -jnp.inf),
            last=jnp.full((batch_size * num_beams, 1), START_ID, jnp.int32),
            cache=cache,
        ),
    )
    any_finished = end.finished_scores[:, :1] > -jnp.inf
    tokens = jnp.where(any_finished[:, :, None], end.finished_tokens, end.live_tokens)
    live_scores = end.live_log_probs / penalty(max_decode_length)
    return tokens, jnp.where(any_finished, end.finished_scores, live_scores)


def repeat_rows(tree: PyTree, times: int, axis: int = 0) -> PyTree:
    """Repeats every row `times` times in place ([a, b] becomes [a, a, b, b]).

    Leaves without that axis, such as positions in a cache, stay as they are.
    """
    return jax.tree.map(lambda x: jnp.repeat(x, times, axis) if x.ndim > axis else x, tree)


def _take_rows(cache: PyTree, rows: Int[Array, "n"], axis: int) -> PyTree:
    return jax.tree.map(lambda x: jnp.take(x, rows, axis) if x.ndim > axis else x, cache)


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
