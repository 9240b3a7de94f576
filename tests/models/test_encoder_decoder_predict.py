"""Decoding a patched model: caches against whole forward passes; exact match without decoding."""

import functools

from flax import linen as nn
import jax
import numpy as np
import pytest

from moe_peft import errors, methods
from moe_peft.models import decoding as decoding_lib
from moe_peft.models import encoder_decoder, losses, t5

VOCAB, LENGTH = 11, 6


@functools.cache
def model_and_params(scan_layers=False):
    """A tiny T5 with MoV, its routers and vectors far from neutral."""
    num_layers = 2 if scan_layers else 1
    config = t5.T5Config(
        vocab_size=VOCAB,
        emb_dim=8,
        num_heads=2,
        head_dim=4,
        mlp_dim=16,
        num_encoder_layers=num_layers,
        num_decoder_layers=num_layers,
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
    rng = np.random.default_rng(3)

    def draw(path, leaf):
        offset = path[-1].key == "scale"  # of norms
        return offset + 0.5 * rng.normal(size=leaf.shape).astype(np.float32)

    return model, jax.tree_util.tree_map_with_path(draw, abstract)


def inputs(rows=8):
    tokens = np.random.default_rng(5).integers(2, VOCAB, (rows, 5)).astype(np.int32)
    tokens[1::3, 3:] = 0
    return tokens


@functools.cache
def compiled(scan_layers, name, *static):
    """A jitted method of the model, compiled once for all tests."""
    model, params = model_and_params(scan_layers)
    function = jax.jit(getattr(model, name), static_argnums=static)
    return functools.partial(function, params)


def predict(batch, strategy, rng=None, scan_layers=False):
    return np.array(compiled(scan_layers, "predict", 2)(batch, strategy, rng))


def shifted(targets):
    return np.pad(targets, ((0, 0), (1, 0)))[:, :-1]


def greedy_without_cache(tokens, scan_layers):
    """The whole forward pass again for every token."""
    found = np.zeros((len(tokens), LENGTH), np.int32)
    is_done = np.zeros(len(tokens), bool)
    for t in range(LENGTH):
        batch = {
            "encoder_input_tokens": tokens,
            "decoder_input_tokens": shifted(found),
            "decoder_target_tokens": np.ones_like(found),
        }
        logits = compiled(scan_layers, "logits")(batch)
        ids = np.where(is_done, 0, np.argmax(logits[:, t], -1))
        found[:, t] = ids
        is_done |= ids == 1
    return found


@pytest.mark.parametrize(
    "scan_layers",
    [
        pytest.param(False, id="unscanned"),
        # Caches of scanned layers: beams below, and tests/models/test_t5.py.
        pytest.param(True, id="scanned", marks=pytest.mark.slow),
    ],
)
def test_greedy_equals_repeating_the_whole_forward_pass(scan_layers):
    tokens = inputs()
    want = greedy_without_cache(tokens, scan_layers)
    assert len(np.unique(want, axis=0)) > 2
    batch = {"encoder_input_tokens": tokens}
    got = predict(batch, decoding_lib.Greedy(LENGTH), scan_layers=scan_layers)
    np.testing.assert_array_equal(got, want)


def test_sampling_in_the_cold_is_greedy_and_in_the_warm_follows_its_key():
    batch = {"encoder_input_tokens": inputs()}
    greedy = predict(batch, decoding_lib.Greedy(LENGTH))
    cold = decoding_lib.Sample(LENGTH, temperature=1e-4)
    np.testing.assert_array_equal(predict(batch, cold, jax.random.key(0)), greedy)
    warm = decoding_lib.Sample(LENGTH)
    first, again, other = (predict(batch, warm, jax.random.key(i)) for i in (0, 0, 1))
    np.testing.assert_array_equal(first, again)
    assert np.any(first != other)


def test_beams_that_hold_everything_find_the_most_likely_answer():
    """Beams move cache rows around; the caches of scanned layers have them at another axis."""
    length, tokens = 3, inputs(2)
    wide = decoding_lib.BeamSearch(length, num_beams=VOCAB**2, alpha=0.0)
    got = predict({"encoder_input_tokens": tokens}, wide, scan_layers=True)

    others = [i for i in range(VOCAB) if i != 1]
    answers = [[1, 0, 0], *([i, 1, 0] for i in others)]
    answers += [[i, j, 1] for i in others for j in others]
    score = compiled(True, "score")
    for row, found in zip(tokens, got, strict=True):
        targets = np.array(answers, np.int32)
        batch = {
            "encoder_input_tokens": np.tile(row, (len(targets), 1)),
            "decoder_input_tokens": shifted(targets),
            "decoder_target_tokens": targets,
            # Id 0 is a token like any other here, up to the end mark.
            "decoder_loss_weights": np.cumsum(shifted(targets) == 1, -1) == 0,
        }
        np.testing.assert_array_equal(found, targets[np.argmax(score(batch))])


class Other(nn.Module):
    """A network with T5X's calls that does not say how it is built."""

    sizes: t5.T5Config

    def setup(self):
        self.network = t5.Transformer(self.sizes)

    def __call__(self, *args, **kwargs):
        return self.network(*args, **kwargs)

    def encode(self, *args, **kwargs):
        return self.network.encode(*args, **kwargs)

    def decode(self, *args, **kwargs):
        return self.network.decode(*args, **kwargs)


@pytest.mark.parametrize(
    "scan_layers",
    [
        pytest.param(False, id="unscanned", marks=pytest.mark.slow),
        pytest.param(True, id="scanned"),
    ],
)
def test_a_network_need_not_say_whether_it_is_scanned(scan_layers):
    model, params = model_and_params(scan_layers)
    module, base = model.module.module, model.method.split(params)[0]
    batch, beams = {"encoder_input_tokens": inputs(4)}, decoding_lib.BeamSearch(LENGTH, num_beams=3)
    predict = lambda network: jax.jit(
        encoder_decoder.EncoderDecoder(network).predict, static_argnums=2
    )
    want = predict(module)(base, batch, beams)
    assert len(np.unique(want, axis=0)) > 1
    got = predict(Other(module.config))({"network": base}, batch, beams)
    np.testing.assert_array_equal(got, want)


def test_exact_match_needs_no_decoding():
    """Every argmax right under teacher forcing is the same as greedy decoding of the target."""
    tokens = inputs()
    greedy = predict({"encoder_input_tokens": tokens}, decoding_lib.Greedy(LENGTH))
    targets = greedy.copy()
    last = np.maximum((targets > 0).sum(-1) - 1, 0)
    place = np.random.default_rng(0).integers(0, last + 1)
    for row in range(0, len(targets), 2):
        targets[row, place[row]] = 2 + (targets[row, place[row]] - 1) % (VOCAB - 2)
    batch = {
        "encoder_input_tokens": tokens,
        "decoder_input_tokens": shifted(targets),
        "decoder_target_tokens": targets,
    }
    right = np.asarray(compiled(False, "exact_match")(batch))
    np.testing.assert_array_equal(right, np.all(targets == greedy, -1))
    assert right.sum() == 4


def test_what_cannot_be_decoded_is_refused():
    model, params = model_and_params()
    batch = {"encoder_input_tokens": inputs()}
    with pytest.raises(errors.UserError, match="Sample draws tokens and needs an rng"):
        model.predict(params, batch, decoding_lib.Sample(LENGTH))
    packed = {**batch, "encoder_segment_ids": np.ones_like(inputs())}
    with pytest.raises(errors.UserError, match="not for packed rows"):
        model.predict(params, packed, decoding_lib.Greedy(LENGTH))
    with pytest.raises(errors.UserError, match="Greedy.max_decode_length is 0"):
        decoding_lib.Greedy(0)
