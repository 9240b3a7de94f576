"""Decoding against enumeration, on tables of probabilities small enough to enumerate."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_peft.models import batches, decoding, sampling

EOS = 1
VOCAB = 3
LENGTH = 4
BATCH = 2


def make_table(seed, scale=1.5):
    """Logits [batch, prefix, vocabulary]: every prefix has its own, so only a right cache wins."""
    num_prefixes = sum(VOCAB**i for i in range(LENGTH))
    return scale * np.random.default_rng(seed).normal(size=(BATCH, num_prefixes, VOCAB))


def from_table(table, rows_per_example=1):
    """`tokens_to_logits` that knows its prefix from the cache only, and the empty cache."""
    table = jnp.asarray(table, jnp.float32)
    rows = jnp.repeat(jnp.arange(BATCH), rows_per_example)
    cache = {"prefix": jnp.full(rows.shape, -1), "row": rows, "index": jnp.zeros((), jnp.int32)}

    def tokens_to_logits(ids, cache):
        # Prefixes in breadth-first order: the children of p are VOCAB * p + 1 + id.
        child = VOCAB * cache["prefix"] + 1 + ids[:, 0]
        prefix = jnp.where(cache["index"] == 0, 0, child)
        new = {"prefix": prefix, "row": cache["row"], "index": cache["index"] + 1}
        return table[cache["row"], prefix], new

    return tokens_to_logits, cache


def enumerate_sequences(table, row):
    """All (log probability, ids) that end with EOS or fill LENGTH."""
    log_probs = np.asarray(jax.nn.log_softmax(jnp.asarray(table[row])))
    found = {}
    for ids in itertools.product(range(VOCAB), repeat=LENGTH):
        total, prefix, kept = 0.0, 0, []
        for token in ids:
            total += log_probs[prefix, token]
            kept.append(token)
            prefix = VOCAB * prefix + 1 + token
            if token == EOS:
                break
        found[tuple(kept)] = total
    assert len(found) == 31  # 2^0 + 2^1 + 2^2 + 2^3 that end, 2^4 that do not
    return found


def padded(ids):
    return np.pad(np.array(ids), (0, LENGTH - len(ids)))


def beam(table, num_beams, **options):
    tokens_to_logits, cache = from_table(table, num_beams)
    return jax.jit(
        lambda cache: decoding.BeamSearch(LENGTH, EOS, num_beams, **options).search(
            tokens_to_logits, cache, BATCH
        )
    )(cache)


@pytest.mark.parametrize("alpha", [0.0, 0.6, 2.0])
@pytest.mark.parametrize("length_penalty", decoding.LENGTH_PENALTIES)
def test_wide_beam_search_is_enumeration(alpha, length_penalty):
    table = make_table(seed=0)
    num_beams = 15  # as many as there are sequences that end; at most 16 are alive
    tokens, scores = beam(table, num_beams, alpha=alpha, length_penalty=length_penalty)
    penalty = {"t5x": lambda n: ((5 + n) / 6) ** alpha, "transformers": lambda n: n**alpha}
    for row in range(BATCH):
        sequences = enumerate_sequences(table, row)
        ranked = sorted(
            (
                (log_prob / penalty[length_penalty](len(ids)), ids)
                for ids, log_prob in sequences.items()
                if ids[-1] == EOS or length_penalty == "transformers"
            ),
            reverse=True,
        )[:num_beams]
        # Beyond the first few, beams that fill the length may have been cut off: compare the top.
        for i, (score, ids) in enumerate(ranked[:8]):
            np.testing.assert_array_equal(tokens[row, i], padded(ids))
            np.testing.assert_allclose(scores[row, i], score, rtol=1e-5)


def test_narrow_beam_search_follows_its_beams():
    table = make_table(seed=1)
    for num_beams in (1, 2, 3):
        tokens, scores = beam(table, num_beams, alpha=0.0)
        for row in range(BATCH):
            sequences = enumerate_sequences(table, row)
            assert (np.diff(scores[row]) <= 0).all()
            for ids, score in zip(np.asarray(tokens[row]), scores[row], strict=True):
                if np.isfinite(score):
                    length = np.argmax(ids == EOS) + 1 if EOS in ids else LENGTH
                    expected = sequences[tuple(ids[:length].tolist())]
                    np.testing.assert_allclose(score, expected, rtol=1e-5)


def test_beams_that_never_end_are_returned():
    table = make_table(seed=2)
    table[:, :, EOS] = -np.inf
    tokens, scores = beam(table, 2, alpha=0.0)
    for row in range(BATCH):
        sequences = enumerate_sequences(table, row)
        best = max(sequences, key=sequences.get)
        np.testing.assert_array_equal(tokens[row, 0], best)
        np.testing.assert_allclose(scores[row, 0], sequences[best], rtol=1e-5)


def test_beam_search_stops_when_nothing_can_improve():
    table = np.zeros((BATCH, 40, VOCAB))
    table[:, :, EOS] = 9.0
    steps = count_steps(
        lambda f, cache: decoding.BeamSearch(LENGTH, EOS, num_beams=1).search(f, cache, BATCH),
        table,
    )
    assert steps == 1


def test_a_live_beam_may_win_late():
    """Ending at the next token it loses, at the last one it wins: longer texts count more."""
    table = np.full((BATCH, 40, VOCAB), -20.0)
    table[:, 0] = np.log([0.1, 0.6, 0.3])  # [EOS] scores log 0.6; [2] is alive.
    table[:, [3, 12], 2] = table[:, 39, EOS] = 20.0  # [2, 2, 2, EOS] is sure from there on.
    alpha, late = 3.0, np.log(0.3)
    penalty = lambda n: ((5 + n) / 6) ** alpha
    assert late / penalty(2) < np.log(0.6) < late / penalty(LENGTH)
    tokens, scores = beam(table, 1, alpha=alpha)
    np.testing.assert_array_equal(tokens[:, 0], [[2, 2, 2, EOS]] * BATCH)
    np.testing.assert_allclose(scores[:, 0], late / penalty(LENGTH), rtol=1e-5)


def count_steps(decode, table):
    calls = []
    tokens_to_logits, cache = from_table(table)

    def counted(ids, cache):
        jax.debug.callback(lambda: calls.append(1))
        return tokens_to_logits(ids, cache)

    jax.block_until_ready(decode(counted, cache))
    jax.effects_barrier()
    return len(calls)


def greedy(tokens_to_logits, cache):
    return decoding.Greedy(LENGTH, EOS)(tokens_to_logits, cache, batch_size=BATCH)


def greedy_by_hand(table, row):
    ids, prefix = [], 0
    while len(ids) < LENGTH and (not ids or ids[-1] != EOS):
        ids.append(int(np.argmax(table[row, prefix])))
        prefix = VOCAB * prefix + 1 + ids[-1]
    return ids


def test_greedy_follows_the_argmax_and_stops():
    lengths = set()
    for seed in range(4):
        table = make_table(seed)
        tokens = greedy(*from_table(table))
        by_hand = [greedy_by_hand(table, row) for row in range(BATCH)]
        np.testing.assert_array_equal(tokens, [padded(ids) for ids in by_hand])
        assert count_steps(greedy, table) == max(map(len, by_hand))
        lengths |= set(map(len, by_hand))
    assert len(lengths) > 1


def sample(table, seed, **options):
    tokens_to_logits, cache = from_table(table)
    strategy = decoding.Sample(LENGTH, EOS, **options)
    return strategy(tokens_to_logits, cache, batch_size=BATCH, rng=jax.random.key(seed))


@pytest.mark.parametrize("options", [{"top_k": 1}, {"top_p": 1e-6}, {"temperature": 1e-3}])
def test_limits_of_sampling_are_greedy(options):
    table = make_table(seed=3)
    np.testing.assert_array_equal(sample(table, 0, **options), greedy(*from_table(table)))


def test_samples_follow_the_model_and_the_key():
    table = make_table(seed=4)
    temperature = 1.7
    draw = jax.jit(jax.vmap(lambda seed: sample(table, seed, temperature=temperature)))
    tokens = np.asarray(draw(jnp.arange(4000)))
    np.testing.assert_array_equal(tokens, draw(jnp.arange(4000)))
    for row in range(BATCH):
        expected = enumerate_sequences(table / temperature, row)
        for ids, log_prob in expected.items():
            frequency = (tokens[:, row] == padded(ids)).all(axis=1).mean()
            # Five standard deviations of 4000 draws. Padding hides nothing: 0 follows EOS only.
            tolerance = 5 * np.sqrt(np.exp(log_prob) / 4000) + 1e-3
            assert abs(frequency - np.exp(log_prob)) < tolerance, ids


@pytest.mark.parametrize("top_p", [0.1, 0.5, 0.9, 0.999])
def test_top_p_keeps_the_fewest_ids_that_reach_the_mass(top_p):
    logits = jax.random.normal(jax.random.key(0), (20, 50)) * 3
    kept = np.asarray(sampling.restrict(logits, top_p=top_p) > -jnp.inf)
    probs = np.asarray(jax.nn.softmax(logits))
    mass = (probs * kept).sum(axis=1)
    least = np.where(kept, probs, 1).min(axis=1)
    assert (mass >= top_p - 1e-6).all()
    assert (mass - least < top_p).all()
    assert (np.where(kept, 0, probs).max(axis=1) <= least).all()


def test_top_k_keeps_k_and_comes_before_top_p():
    logits = jnp.log(jnp.array([[0.4, 0.3, 0.2, 0.1]]))
    kept = lambda **options: (sampling.restrict(logits, **options) > -jnp.inf)[0].tolist()
    assert kept() == [True] * 4
    assert kept(top_k=2) == [True, True, False, False]
    assert kept(top_k=9) == [True] * 4
    assert kept(top_p=0.5) == [True, True, False, False]
    # Of the two best the first has 4/7 of the mass.
    assert kept(top_k=2, top_p=0.5) == [True, False, False, False]


def test_repeat_rows():
    tree = {"keys": jnp.arange(6).reshape(2, 3), "index": jnp.array(4)}
    repeated = batches.repeat_rows(tree, 2)
    np.testing.assert_array_equal(repeated["keys"], [[0, 1, 2]] * 2 + [[3, 4, 5]] * 2)
    assert repeated["index"] == 4
    assert batches.repeat_rows(tree, 2, axis=1)["keys"].tolist()[0] == [0, 0, 1, 1, 2, 2]


def test_wrong_settings_are_explained():
    table = make_table(seed=0)
    for options, message in (
        ({"temperature": 0.0}, "temperature is 0.0; expected a number above 0"),
        ({"top_k": 0}, "top_k is 0; expected a whole number of at least 1"),
        ({"top_p": 1.5}, "top_p is 1.5; expected 0 < top_p <= 1"),
    ):
        with pytest.raises(ValueError, match=message):
            sample(table, 0, **options)
    with pytest.raises(ValueError, match="num_beams is 0"):
        beam(table, 0)
    with pytest.raises(ValueError, match="length_penalty is 't5'; expected.*Did you mean 't5x'"):
        beam(table, 1, length_penalty="t5")
    tokens_to_logits, cache = from_table(table)
    with pytest.raises(ValueError, match=r"= 6 rows at axis 0; leaf \['prefix'\] has shape \(2,\)"):
        decoding.BeamSearch(LENGTH, num_beams=3).search(tokens_to_logits, cache, BATCH)
