"""Rank classification: all choices in one row against one row per choice."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_peft import errors, methods
from moe_peft.models import encoder_decoder, losses, scoring, t5

VOCAB, EOS = 19, 1


@functools.cache
def model_and_params(scan_layers=False):
    """A tiny T5 with MoV, its routers and vectors far from neutral."""
    config = t5.T5Config(
        vocab_size=VOCAB,
        emb_dim=8,
        num_heads=2,
        head_dim=4,
        mlp_dim=16,
        num_encoder_layers=1,
        num_decoder_layers=2 if scan_layers else 1,
        scan_layers=scan_layers,
    )
    method = methods.mov(num_experts=3)
    model = encoder_decoder.EncoderDecoder(
        method.patch(t5.Transformer(config)), losses.LossConfig(), method
    )
    shapes = dict.fromkeys(
        ("encoder_input_tokens", "decoder_input_tokens", "decoder_target_tokens"), (1, 4)
    )
    abstract = jax.eval_shape(functools.partial(model.init, batch_shapes=shapes), jax.random.key(1))
    rng = np.random.default_rng(0)

    def draw(path, leaf):
        offset = path[-1].key == "scale"  # of norms
        return offset + 0.4 * rng.normal(size=leaf.shape).astype(np.float32)

    return model, jax.tree_util.tree_map_with_path(draw, abstract)


def questions(seed=0, num_choices=(3, 1, 5, 2)):
    """(encoder tokens [b, s] with padding, choices [b][c] of ragged token lists ending in EOS)."""
    rng = np.random.default_rng(seed)
    inputs = np.zeros((len(num_choices), 6), np.int32)
    choices = []
    for i, count in enumerate(num_choices):
        inputs[i, : 3 + i % 4] = rng.integers(2, VOCAB, 3 + i % 4)
        choices.append([[*rng.integers(2, VOCAB, rng.integers(0, 5)), EOS] for _ in range(count)])
    return inputs, choices


def one_by_one(model, params, inputs, choices):
    """[b][c] log-likelihoods, every choice in a row of its own, in one ordinary batch."""
    pairs = [(i, c) for i, example in enumerate(choices) for c in range(len(example))]
    rows = scoring.pack_choices([[choices[i][c]] for i, c in pairs], length=7)
    del rows["decoder_segment_ids"]
    batch = {"encoder_input_tokens": inputs[[i for i, _ in pairs]], **rows}
    scores = jax.jit(model.score)(params, batch)
    found = [[0.0] * len(example) for example in choices]
    for (i, c), score in zip(pairs, scores, strict=True):
        found[i][c] = float(score)
    return found


@pytest.mark.parametrize(
    "scan_layers",
    [
        pytest.param(False, id="unscanned"),
        pytest.param(True, id="scanned", marks=pytest.mark.slow),
    ],
)
def test_sharing_the_encoder_equals_scoring_one_by_one(scan_layers):
    model, params = model_and_params(scan_layers)
    inputs, choices = questions()
    want = one_by_one(model, params, inputs, choices)
    batch = {"encoder_input_tokens": inputs, **scoring.pack_choices(choices, length=24)}
    got = jax.jit(model.score_choices, static_argnums=2)(params, batch, 6)
    assert got.log_likelihood.shape == (4, 6)
    for i, example in enumerate(choices):
        np.testing.assert_allclose(got.log_likelihood[i, : len(example)], want[i], rtol=2e-5)
        lengths = [len(tokens) for tokens in example] + [0] * (6 - len(example))
        np.testing.assert_array_equal(got.num_tokens[i], lengths)
    best = got.best(is_length_normalized=False)
    assert [int(b) for b in best] == [int(np.argmax(scores)) for scores in want]
    by_length = [
        int(np.argmax([s / len(t) for s, t in zip(scores, example, strict=True)]))
        for scores, example in zip(want, choices, strict=True)
    ]
    assert [int(b) for b in got.best(is_length_normalized=True)] == by_length


def test_score_counts_eos_and_leaves_out_padding():
    model, params = model_and_params()
    inputs, choices = questions()
    rows = scoring.pack_choices([example[:1] for example in choices])
    del rows["decoder_segment_ids"]
    batch = {"encoder_input_tokens": inputs, **rows}
    logits = np.asarray(jax.jit(model.logits)(params, batch), np.float64)
    want = []
    for i, example in enumerate(choices):
        log_probs = logits[i] - np.log(np.sum(np.exp(logits[i]), -1, keepdims=True))
        want.append(sum(log_probs[t, token] for t, token in enumerate(example[0])))
    np.testing.assert_allclose(jax.jit(model.score)(params, batch), want, rtol=1e-5)
    longer = {k: np.pad(v, ((0, 0), (0, 3))) for k, v in batch.items()}
    np.testing.assert_allclose(jax.jit(model.score)(params, longer), want, rtol=1e-5)


def test_order_of_choices_and_rows_does_not_matter():
    model, params = model_and_params()
    inputs, choices = questions(3)
    scores = jax.jit(model.score_choices, static_argnums=2)
    batch = {"encoder_input_tokens": inputs, **scoring.pack_choices(choices, length=24)}
    forward = scores(params, batch, 5).log_likelihood
    turned = [example[::-1] for example in choices[::-1]]
    batch = {"encoder_input_tokens": inputs[::-1], **scoring.pack_choices(turned, length=24)}
    backward = scores(params, batch, 5).log_likelihood[::-1]
    for i, example in enumerate(choices):
        n = len(example)
        np.testing.assert_allclose(forward[i, :n], backward[i, :n][::-1], rtol=2e-5)


def test_sum_and_mean_can_disagree_ties_take_the_first_and_padding_never_wins():
    scores = scoring.ChoiceScores(
        log_likelihood=jnp.array([[-3.0, -4.0, 0.0], [-2.0, -2.0, -2.0], [-5.0, 0.0, 0.0]]),
        num_tokens=jnp.array([[1.0, 4.0, 0.0], [2.0, 2.0, 2.0], [3.0, 0.0, 0.0]]),
    )
    np.testing.assert_array_equal(scores.best(is_length_normalized=False), [0, 0, 0])
    np.testing.assert_array_equal(scores.best(is_length_normalized=True), [1, 0, 0])


def test_packing_shifts_within_each_choice():
    rows = scoring.pack_choices([[[5, 6, 1], [7, 1]], [[1]]], length=6)
    np.testing.assert_array_equal(rows["decoder_target_tokens"][0], [5, 6, 1, 7, 1, 0])
    np.testing.assert_array_equal(rows["decoder_input_tokens"][0], [0, 5, 6, 0, 7, 0])
    np.testing.assert_array_equal(rows["decoder_segment_ids"][0], [1, 1, 1, 2, 2, 0])
    np.testing.assert_array_equal(rows["decoder_segment_ids"][1], [1, 0, 0, 0, 0, 0])


def test_what_cannot_be_scored_is_refused():
    with pytest.raises(errors.UserError, match="have 5 tokens together, the row has room for 4"):
        scoring.pack_choices([[[5, 6, 1], [7, 1]]], length=4)
    with pytest.raises(errors.UserError, match="Choice 1 of example 0 has no tokens"):
        scoring.pack_choices([[[5], []]])
    model, params = model_and_params()
    inputs, choices = questions()
    batch = {
        "encoder_input_tokens": inputs,
        "encoder_segment_ids": np.ones_like(inputs),
        **scoring.pack_choices(choices),
    }
    with pytest.raises(errors.UserError, match="packs several inputs"):
        model.score_choices(params, batch, 5)
