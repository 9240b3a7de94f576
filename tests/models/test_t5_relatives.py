"""Relatives of T5 open from their config.json and compute what transformers does."""

import dataclasses
import functools
import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy

from moe_peft import errors, patching
from moe_peft.models import decoding, encoder_decoder, t5
from moe_peft.weights import hugging_face, identity, t5_sizes

GOLDEN = pathlib.Path(__file__).parents[1] / "golden"
TINY = t5.T5Config(24, 8, 2, 4, 12, 2, 2)
# What each differs in from T5 1.1 of two layers.
VARIANTS = {
    "ul2": {"mlp_activations": ("silu", "linear"), "head_dim": 3},
    "ankh": {"relpos_buckets": 64, "num_encoder_layers": 3},
    "umt5": {"relpos_in_every_layer": True, "num_decoder_layers": 3},
    "deep_encoder": {
        "mlp_activations": ("relu",),
        "logits_via_embedding": True,
        "num_encoder_layers": 7,
        "num_decoder_layers": 1,
    },
}
# float32 in two libraries that sum in different orders.
TOLERANCE = {"atol": 1e-4, "rtol": 1e-4}
# Compiling costs more here than running.
jit = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})


@pytest.fixture(params=VARIANTS)
def name(request):
    return request.param


@functools.cache
def golden(name):
    with np.load(GOLDEN / f"{name}.npz") as arrays:
        return dict(arrays)


def folder(name, prefix, place):
    """Weights, or their gradients, as transformers saves them."""
    arrays = golden(name)
    place.mkdir()
    found = {k.removeprefix(prefix): v for k, v in arrays.items() if k.startswith(prefix)}
    safetensors.numpy.save_file(found, place / "model.safetensors")
    (place / "config.json").write_text(str(arrays["config"]))
    return place


def batch_of(arrays):
    names = ("encoder_input_tokens", "decoder_input_tokens", "decoder_target_tokens")
    return dict(zip(names, map(arrays.get, ("inputs", "decoder_inputs", "targets")), strict=True))


@pytest.mark.parametrize(
    "name",  # Of "deep_encoder" logits and answers are below, gradients are those of "t5_1_0".
    [pytest.param(n, marks=pytest.mark.slow) if n == "deep_encoder" else n for n in VARIANTS],
    indirect=True,
)
def test_numbers_are_those_of_transformers(name, tmp_path):
    config, params = hugging_face.read(folder(name, "weight/", tmp_path / "weights"))
    assert config == dataclasses.replace(TINY, dropout_rate=0.0, **VARIANTS[name])
    arrays = golden(name)
    model, batch = encoder_decoder.EncoderDecoder(t5.Transformer(config)), batch_of(arrays)
    is_real = arrays["targets"] > 0
    greedy = decoding.Greedy(arrays["greedy"].shape[1])

    @jit
    def compute(params):
        def loss_and_logits(params):
            logits = model.logits(params, batch)
            log_probs = jax.nn.log_softmax(logits)
            nll = -jnp.take_along_axis(log_probs, batch["decoder_target_tokens"][..., None], -1)
            return jnp.sum(jnp.where(is_real, nll[..., 0], 0.0)) / is_real.sum(), logits

        found = jax.value_and_grad(loss_and_logits, has_aux=True)(params)
        return *found, model.predict(params, batch, greedy)

    (loss, logits), gradients, answers = compute(params)
    np.testing.assert_allclose(logits[is_real], arrays["logits"][is_real], **TOLERANCE)
    np.testing.assert_allclose(loss, arrays["loss"], **TOLERANCE)
    assert len(set(arrays["greedy"].flat)) > 3
    np.testing.assert_array_equal(answers, arrays["greedy"])
    expected = hugging_face.read(folder(name, "gradient/", tmp_path / "gradients"))[1]
    expected, gradients = map(patching.flatten, (expected, gradients))
    assert expected.keys() == gradients.keys()
    for path, desired in expected.items():
        # Entries of one gradient are sums of the same terms: errors scale with the largest.
        assert np.abs(gradients[path] - desired).max() < 1e-4 * np.abs(desired).max(), path


@pytest.mark.parametrize("name", ["umt5", "deep_encoder"], indirect=True)
def test_scanned(name, tmp_path):
    place = folder(name, "weight/", tmp_path / "weights")
    config, params = hugging_face.read(place, scan_layers=True)
    model, arrays = encoder_decoder.EncoderDecoder(t5.Transformer(config)), golden(name)
    batch, greedy = batch_of(arrays), decoding.Greedy(arrays["greedy"].shape[1])
    compute = jit(lambda p: (model.logits(p, batch), model.predict(p, batch, greedy)))
    logits, answers = compute(params)
    is_real = arrays["targets"] > 0
    np.testing.assert_allclose(logits[is_real], arrays["logits"][is_real], **TOLERANCE)
    np.testing.assert_array_equal(answers, arrays["greedy"])


def test_there_and_back(name, tmp_path):
    place = folder(name, "weight/", tmp_path / "a")
    opened = hugging_face.open_folder(place)
    for number, scanned in enumerate((False, True)):
        found = opened.scanned(scanned)
        again = hugging_face.write(
            tmp_path / str(number), found.config, found.leaves, settings=opened.settings
        )
        old, new = (
            safetensors.numpy.load_file(path / "model.safetensors") for path in (place, again)
        )
        assert old.keys() == new.keys()
        assert len(old) > 20
        assert all(old[key].tobytes() == new[key].tobytes() for key in old)
        settings = json.loads((again / "config.json").read_text())
        # transformers 5 ties always, and says whether it scales; version 4 scales where it ties.
        is_scaled = opened.settings["scale_decoder_outputs"]
        tied = {"tie_word_embeddings": is_scaled}
        # Where nothing is to be said anew, the settings come back as they were.
        assert (
            settings == opened.settings
            if is_scaled
            else settings
            == {
                "architectures": [f"{'UMT5' if name == 'umt5' else 'T5'}ForConditionalGeneration"],
                "dtype": "float32",
                **opened.settings,
                **tied,
            }
        )


def test_sizes_are_told_from_shapes_and_described(name):
    config = dataclasses.replace(TINY, **VARIANTS[name])
    found = t5_sizes.recognise(t5_sizes.shapes_of(config), "here")
    if name == "ul2":  # Gates look alike.
        config = dataclasses.replace(config, mlp_activations=("gelu", "linear"))
    assert found == config
    said = {"ankh": "own output layer, 64 buckets of distances", "ul2": "12 (silu, linear)"}
    said |= {"umt5": "own output layer, position biases in every layer", "deep_encoder": "7 + 1"}
    assert said[name] in t5_sizes.describe(dataclasses.replace(TINY, **VARIANTS[name]))


def test_what_runs_say_of_todays_networks_stays():
    """Runs and files of earlier versions are compared with these; so not a byte may change."""
    said = (
        '{"vocab_size": 24, "emb_dim": 8, "num_heads": 2, "head_dim": 4, "mlp_dim": 12, '
        '"num_encoder_layers": 2, "num_decoder_layers": 2, "mlp_activations": ["gelu", "linear"], '
        '"dropout_rate": 0.1, "logits_via_embedding": false, "float32_attention_logits": false, '
        '"dtype": "float32", "scan_layers": false, "remat_policy": "none"}'
    )
    assert json.dumps(identity.describe_config(TINY)) == said
    read = json.loads(said)  # JSON has lists only
    assert t5.T5Config(**read | {"mlp_activations": tuple(read["mlp_activations"])}) == TINY
    for name, options in VARIANTS.items():
        config = dataclasses.replace(TINY, **options)
        described = identity.describe_config(config)
        assert t5.T5Config(**described) == config
        assert ("relpos_buckets" in described) == (name == "ankh")
        assert ("relpos_in_every_layer" in described) == (name == "umt5")


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"relpos_buckets": 33}, "relpos_buckets is 33; expected an even number from 4 on"),
        ({"relpos_buckets": 0}, "relpos_buckets is 0; expected a whole number"),
        ({"relpos_max_distance": 16}, "relpos_max_distance is 16; expected more than half of the"),
    ],
)
def test_buckets_that_cannot_be(options, words):
    with pytest.raises(errors.UserError, match=words):
        dataclasses.replace(TINY, **options)
