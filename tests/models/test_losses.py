"""Losses against plain numpy, packed against unpacked, and micro-batches against one batch."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_peft import errors
from moe_peft.models import losses

VOCAB = 7


def _reference(logits, batch, config):
    """The objective by loops over targets: (row, segment id) with any weight."""
    targets, weights = batch["decoder_target_tokens"], batch["decoder_loss_weights"]
    segments = batch.get("decoder_segment_ids", np.ones_like(targets))
    per_target = {}
    for row, position in zip(*np.nonzero(weights), strict=True):
        x = np.asarray(logits[row, position], np.float64)
        log_z = np.log(np.sum(np.exp(x)))
        nll = log_z - x[targets[row, position]]
        smooth = np.mean(log_z - x)
        eps = config.label_smoothing
        value = (1 - eps) * nll + eps * smooth + config.z_loss * log_z**2
        per_target.setdefault((row, segments[row, position]), []).append(
            (value, weights[row, position])
        )
    sums = [sum(v * w for v, w in pairs) for pairs in per_target.values()]
    totals = [sum(w for _, w in pairs) for pairs in per_target.values()]
    if config.normalization == "token_mean":
        return sum(sums) / sum(totals)
    if config.normalization == "per_example":
        return sum(sums) / len(sums)
    return np.mean([s / t for s, t in zip(sums, totals, strict=True)])


@functools.partial(jax.jit, static_argnums=0)
def _objective(config, logits, batch):
    loss_sum, normalizer, _ = losses.loss_sums(config, logits, batch)
    return loss_sum / normalizer


def _unpacked(rng, lengths=(3, 1, 5, 4), length=6):
    """Rows of different lengths and a row without any target."""
    rows = len(lengths) + 1
    targets = np.zeros((rows, length), np.int32)
    for row, n in enumerate(lengths):
        targets[row, :n] = rng.integers(1, VOCAB, n)
    logits = rng.normal(size=(rows, length, VOCAB)).astype(np.float32) * 3
    return logits, {
        "decoder_target_tokens": targets,
        "decoder_loss_weights": (targets > 0).astype(np.float32),
    }


def _packed(logits, batch):
    """The same targets, with the same logits at each of their tokens, two and two in a row."""
    targets = batch["decoder_target_tokens"]
    lengths = (targets > 0).sum(1)
    out = {k: np.zeros((2, 12), np.int32) for k in ("tokens", "segments")}
    packed_logits = np.zeros((2, 12, VOCAB), np.float32)
    for row, members in enumerate([(0, 2), (3, 1)]):
        start = 0
        for segment, member in enumerate(members, 1):
            n = lengths[member]
            out["tokens"][row, start : start + n] = targets[member, :n]
            out["segments"][row, start : start + n] = segment
            packed_logits[row, start : start + n] = logits[member, :n]
            start += n
    return packed_logits, {
        "decoder_target_tokens": out["tokens"],
        "decoder_loss_weights": (out["tokens"] > 0).astype(np.float32),
        "decoder_segment_ids": out["segments"],
    }


CONFIGS = [
    losses.LossConfig(normalization, z_loss, label_smoothing)
    for normalization in losses.NORMALIZATIONS
    for z_loss, label_smoothing in [(0.0, 0.0), (0.01, 0.3)]
]


@pytest.mark.parametrize("config", CONFIGS, ids=str)
def test_equals_loops_packed_and_unpacked(config):
    logits, batch = _unpacked(np.random.default_rng(0))
    want = _reference(logits, batch, config)
    np.testing.assert_allclose(_objective(config, logits, batch), want, rtol=1e-6)
    packed_logits, packed = _packed(logits, batch)
    np.testing.assert_allclose(_reference(packed_logits, packed, config), want, rtol=1e-6)
    np.testing.assert_allclose(_objective(config, packed_logits, packed), want, rtol=1e-6)


@pytest.mark.parametrize("config", CONFIGS, ids=str)
def test_microbatches_add_up_in_value_and_gradient(config):
    logits, batch = _unpacked(np.random.default_rng(1), lengths=(3, 1, 5, 4, 2))

    def micro(logits):
        parts = []
        for i in range(0, 6, 2):
            rows = {k: v[i : i + 2] for k, v in batch.items()}
            parts.append(losses.loss_sums(config, logits[i : i + 2], rows)[:2])
        return sum(p[0] for p in parts) / sum(p[1] for p in parts)

    one, one_grad = jax.value_and_grad(lambda x: _objective(config, x, batch))(jnp.array(logits))
    many, many_grad = jax.value_and_grad(micro)(jnp.array(logits))
    np.testing.assert_allclose(one, many, rtol=1e-6)
    np.testing.assert_allclose(one_grad, many_grad, atol=1e-7)
    assert np.all(np.asarray(one_grad)[batch["decoder_loss_weights"] == 0] == 0)


def test_per_sequence_weighs_a_short_target_as_much_as_a_long_one():
    rng = np.random.default_rng(2)
    logits, batch = _unpacked(rng, lengths=(1, 6))
    nll = -np.asarray(losses.token_log_probs(logits, batch["decoder_target_tokens"])[0])
    want = (nll[0, 0] + nll[1].mean()) / 2
    got = _objective(losses.LossConfig("per_sequence"), logits, batch)
    np.testing.assert_allclose(got, want, rtol=1e-6)


def test_fractional_weights_and_missing_weights():
    logits, batch = _unpacked(np.random.default_rng(3))
    for config in CONFIGS:
        half = dict(batch, decoder_loss_weights=batch["decoder_loss_weights"] * 0.5)
        half["decoder_loss_weights"][0, 1] = 0.125
        np.testing.assert_allclose(
            _objective(config, logits, half), _reference(logits, half, config), rtol=1e-6
        )
        without = {"decoder_target_tokens": batch["decoder_target_tokens"]}
        np.testing.assert_allclose(
            _objective(config, logits, without), _objective(config, logits, batch), rtol=0
        )


def test_t5x_label_smoothing_has_equal_gradients_after_conversion():
    """T5X's eps over the V - 1 other classes is ours times V / (V - 1)."""
    logits, batch = _unpacked(np.random.default_rng(4), lengths=(3,))
    eps, targets = 0.2, batch["decoder_target_tokens"]

    def t5x(x):
        soft = jnp.where(jax.nn.one_hot(targets, VOCAB) > 0, 1 - eps, eps / (VOCAB - 1))
        nll = -jnp.sum(soft * jax.nn.log_softmax(x), -1)
        return jnp.sum(nll * batch["decoder_loss_weights"]) / 3

    config = losses.LossConfig(label_smoothing=eps * VOCAB / (VOCAB - 1))
    ours = jax.grad(lambda x: _objective(config, x, batch))(jnp.array(logits))
    np.testing.assert_allclose(ours, jax.grad(t5x)(jnp.array(logits)), atol=1e-6)


def test_bfloat16_logits_are_summed_in_float32():
    logits = np.full((1, 1, 4096), 1.0, np.float32)
    batch = {"decoder_target_tokens": np.ones((1, 1), np.int32)}
    got = _objective(losses.LossConfig(), jnp.array(logits, jnp.bfloat16), batch)
    np.testing.assert_allclose(got, np.log(4096), rtol=1e-6)
    assert got.dtype == jnp.float32


def test_metrics_count_tokens_and_whole_targets_packed_or_not():
    logits, batch = _unpacked(np.random.default_rng(5))
    targets = batch["decoder_target_tokens"]
    right = np.eye(VOCAB, dtype=np.float32)[targets]
    right[2, 1] = np.eye(VOCAB)[(targets[2, 1] + 1) % VOCAB]  # one wrong token of row 2
    right[0, 4] = np.eye(VOCAB)[3]  # a wrong padding position does not count
    for x, b in [(right, batch), _packed(right, batch)]:
        _, normalizer, sums = losses.loss_sums(losses.LossConfig(), x, b)
        means = losses.summarize(sums, normalizer)
        assert means["tokens"] == 13
        assert means["targets"] == 4
        np.testing.assert_allclose(means["accuracy"], 12 / 13, rtol=1e-6)
        np.testing.assert_allclose(means["exact_match"], 3 / 4, rtol=1e-6)


def test_empty_batch_gives_zero_and_no_nan():
    logits = jnp.zeros((2, 3, VOCAB))
    batch = {"decoder_target_tokens": np.zeros((2, 3), np.int32)}
    for config in CONFIGS:
        loss_sum, normalizer, sums = losses.loss_sums(config, logits, batch)
        assert loss_sum == 0
        assert normalizer == 0
        assert all(np.isfinite(v) for v in losses.summarize(sums, normalizer).values())


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"normalization": "per_sequnce"}, "Did you mean 'per_sequence'"),
        ({"label_smoothing": 1.0}, "expected 0 <= value < 1"),
        ({"z_loss": -1.0}, "expected 0 or more"),
    ],
)
def test_bad_settings_say_what_was_expected(change, words):
    with pytest.raises(errors.UserError, match=words):
        dataclasses.replace(losses.LossConfig(), **change)
