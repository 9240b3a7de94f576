"""T-Few's losses against plain NumPy, and what must not change them."""

import functools

import jax
import numpy as np
import pytest

from moe_peft import errors
from moe_peft.models import encoder_decoder, few_shot, losses, scoring, t5

VOCAB, EOS = 11, 1


def example_batch(seed=0, num_choices=(3, 2, 1, 4), length=None):
    """Choices of some examples in packed rows, and logits for them."""
    rng = np.random.default_rng(seed)
    choices = [
        [[*rng.integers(2, VOCAB, rng.integers(0, 4)), EOS] for _ in range(count)]
        for count in num_choices
    ]
    batch = scoring.pack_choices(choices, length)
    batch[few_shot.GOLD] = np.array([rng.integers(count) for count in num_choices], np.int32)
    logits = rng.normal(size=(*batch["decoder_target_tokens"].shape, VOCAB)).astype(np.float32)
    return choices, batch, logits


def plain(choices, batch, logits, loss, config):
    """The objective, example by example and token by token, in float64."""
    logits = np.asarray(logits, np.float64)
    log_probs = logits - np.log(np.sum(np.exp(logits), axis=-1, keepdims=True))
    lm, lm_tokens, lm_examples, mc, unlikely = 0.0, 0, 0, [], []
    for i, example in enumerate(choices):
        start, scores, gold = 0, [], int(batch[few_shot.GOLD][i])
        for c, tokens in enumerate(example):
            places = range(start, start + len(tokens))
            found = [log_probs[i, place, token] for place, token in zip(places, tokens)]
            scores.append(-np.mean(found))
            if c == gold:
                eps = config.label_smoothing
                uniform = [-np.mean(log_probs[i, place]) for place in places]
                lm += -(1 - eps) * np.sum(found) + eps * np.sum(uniform)
                lm_tokens += len(tokens)
                lm_examples += 1
            else:
                unlikely += [-np.log(1 - np.exp(x) + 0.01) for x in found]
            start += len(tokens)
        if len(example) > 1:
            weights = np.exp(-np.array(scores))
            mc.append(-np.log(weights[gold] / np.sum(weights)))
    divisor = lm_tokens if config.normalization == "token_mean" else lm_examples
    return (
        loss.language_modelling * lm / divisor
        + loss.choices * np.mean(mc)
        + loss.unlikelihood * np.mean(unlikely)
    )


TOKEN_MEAN = losses.LossConfig()


@functools.partial(jax.jit, static_argnames=("loss", "config"))
def objective(logits, batch, loss, config=TOKEN_MEAN):
    loss_sum, normalizer, _ = few_shot.loss_sums(loss, 5, config, logits, batch)
    return loss_sum / normalizer


LOSSES = [
    few_shot.FewShotLoss(),
    few_shot.FewShotLoss(0.0, 1.0, 0.0),
    few_shot.FewShotLoss(0.0, 0.0, 1.0),
    few_shot.FewShotLoss(0.7, 2.0, 0.3),
]
SMOOTHED = losses.LossConfig("per_example", label_smoothing=0.1)


@pytest.mark.parametrize("loss", LOSSES, ids=["all", "choices", "unlikelihood", "weighed"])
@pytest.mark.parametrize("config", [TOKEN_MEAN, SMOOTHED], ids=["mean", "smoothed"])
def test_values_are_those_of_numpy(loss, config):
    choices, batch, logits = example_batch()
    want = plain(choices, batch, logits, loss, config)
    np.testing.assert_allclose(objective(logits, batch, loss, config), want, rtol=2e-6)


@pytest.mark.parametrize("loss", LOSSES, ids=["all", "choices", "unlikelihood", "weighed"])
def test_gradients_are_finite_differences(loss):
    choices, batch, logits = example_batch(seed=1)
    grads = jax.grad(objective)(logits, batch, loss)
    rng, step = np.random.default_rng(2), 1e-5
    for _ in range(6):
        direction = rng.normal(size=logits.shape)
        ahead, behind = (
            plain(choices, batch, logits + sign * step * direction, loss, TOKEN_MEAN)
            for sign in (1, -1)
        )
        # Differences of float64 sums over 2e-5: some 1e-9 of error; the gradient is float32.
        np.testing.assert_allclose(
            np.sum(grads * direction), (ahead - behind) / (2 * step), rtol=2e-5, atol=2e-6
        )


def test_choice_loss_ignores_a_constant_added_to_all_scores():
    rng = np.random.default_rng(0)
    num_tokens = np.array([[2.0, 3.0, 1.0], [4.0, 2.0, 0.0]], np.float32)
    scores = rng.normal(size=(2, 3)).astype(np.float32)
    gold = np.array([1, 0], np.int32)
    want = few_shot.choice_loss(scores * num_tokens, num_tokens, gold)
    got = few_shot.choice_loss((scores + 3.0) * num_tokens, num_tokens, gold)
    np.testing.assert_allclose(got, want, rtol=2e-6)
    # A longer choice with the same tokens on average scores the same.
    longer = few_shot.choice_loss(scores * 2 * num_tokens, 2 * num_tokens, gold)
    np.testing.assert_allclose(longer, want, rtol=1e-6)


def test_padding_counts_nowhere():
    _, batch, logits = example_batch(length=16)
    garbage = np.where(batch["decoder_segment_ids"][..., None] > 0, logits, 50.0)
    garbage[..., 0] += 30.0
    real = batch["decoder_segment_ids"][..., None] > 0
    garbage = np.where(real, logits, garbage)
    loss = few_shot.FewShotLoss()
    value, grads = jax.value_and_grad(objective)(logits, batch, loss)
    other, other_grads = jax.value_and_grad(objective)(garbage, batch, loss)
    np.testing.assert_array_equal(value, other)
    assert not np.any(np.where(real, 0, other_grads))
    np.testing.assert_array_equal(np.where(real, grads, 0), np.where(real, other_grads, 0))

    # Whole rows of padding, as in a batch of fewer shots than it has room for.
    padded = {k: np.pad(v, [(0, 2)] + [(0, 0)] * (v.ndim - 1)) for k, v in batch.items()}
    more = np.pad(logits, [(0, 2), (0, 0), (0, 0)])
    value_more, grads_more = jax.value_and_grad(objective)(more, padded, loss)
    np.testing.assert_allclose(value_more, value, rtol=1e-6)
    assert np.all(np.isfinite(grads_more))
    assert not np.any(grads_more[4:])


def test_examples_without_choices_have_language_modelling_only():
    _, batch, logits = example_batch(num_choices=(1, 1))
    lm = objective(logits, batch, few_shot.FewShotLoss(1.0, 0.0, 0.0))
    np.testing.assert_array_equal(objective(logits, batch, few_shot.FewShotLoss()), lm)


def test_a_token_the_model_is_sure_of_costs_a_finite_amount():
    _, batch, logits = example_batch()
    sure = logits + 200.0 * np.eye(VOCAB, dtype=np.float32)[batch["decoder_target_tokens"]]
    value, grads = jax.value_and_grad(objective)(sure, batch, few_shot.FewShotLoss(0.0, 0.0, 1.0))
    np.testing.assert_allclose(value, -np.log(0.01), rtol=1e-4)
    assert np.all(np.isfinite(grads))


def test_a_model_trains_on_packed_choices():
    config = t5.T5Config(
        vocab_size=VOCAB,
        emb_dim=8,
        num_heads=2,
        head_dim=4,
        mlp_dim=16,
        num_encoder_layers=1,
        num_decoder_layers=1,
    )
    inner = encoder_decoder.EncoderDecoder(t5.Transformer(config))
    model = few_shot.FewShotModel(inner, num_choices=4)
    _, batch, _ = example_batch()
    batch["encoder_input_tokens"] = np.full((4, 3), 5, np.int32)
    shapes = {k: v.shape for k, v in batch.items() if k != few_shot.GOLD}
    rng = np.random.default_rng(3)
    params = jax.tree.map(  # nothing is compiled for them
        lambda leaf: rng.normal(size=leaf.shape, scale=0.4).astype(leaf.dtype),
        jax.eval_shape(lambda key: inner.init(key, shapes), jax.random.key(0)),
    )
    loss_sum, normalizer, sums = jax.jit(model.loss_sums)(params, batch)
    assert set(sums) >= {"few_shot/choices", "few_shot/unlikelihood", "nll"}
    # Language modelling is the ordinary loss of a batch of right answers.
    right = {k: v for k, v in batch.items() if k != few_shot.GOLD}
    right["decoder_loss_weights"] = (
        batch["decoder_segment_ids"] == batch[few_shot.GOLD][:, None] + 1
    )
    right["decoder_loss_weights"] &= batch["decoder_target_tokens"] > 0
    lm_sum, lm_normalizer, _ = jax.jit(inner.loss_sums)(params, right)
    assert normalizer == lm_normalizer
    extra = sums["few_shot/choices"] + sums["few_shot/unlikelihood"]
    np.testing.assert_allclose(loss_sum, lm_sum + extra, rtol=1e-6)


def test_weights_must_make_sense():
    with pytest.raises(errors.UserError, match="at least 0"):
        few_shot.FewShotLoss(-1.0)
    with pytest.raises(errors.UserError, match="one of them above"):
        few_shot.FewShotLoss(0.0, 0.0, 0.0)
