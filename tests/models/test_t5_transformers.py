"""Logits, gradients and generated ids equal those of transformers' T5 with the same weights."""

import functools
import importlib.util
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_peft.models import batches, decoding, t5

GOLDEN = pathlib.Path(__file__).parents[1] / "golden"
VARIANTS = ("t5_1_1", "t5_1_0")
# float32 in two libraries that sum in different orders.
TOLERANCE = {"atol": 1e-4, "rtol": 1e-4}


def golden(name):
    with np.load(GOLDEN / f"{name}.npz") as arrays:
        return dict(arrays)


def fresh(name):
    """What the golden script computes now, with another seed."""
    pytest.importorskip("torch", reason="live comparison needs torch")
    pytest.importorskip("transformers", reason="live comparison needs transformers")
    path = GOLDEN / "make_t5_golden.py"
    spec = importlib.util.spec_from_file_location("make_t5_golden", path)
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    feed_forward, seed = script.VARIANTS[name]
    return script.compute(script.make_model(feed_forward, seed + 100))


def network(name, **options):
    is_1_1 = name == "t5_1_1"
    return t5.Transformer(
        t5.T5Config(
            vocab_size=32,
            emb_dim=12,
            num_heads=3,
            head_dim=4,
            mlp_dim=20,
            num_encoder_layers=2,
            num_decoder_layers=2,
            mlp_activations=("gelu", "linear") if is_1_1 else ("relu",),
            logits_via_embedding=not is_1_1,
            **options,
        )
    )


def subtree(arrays, prefix):
    return {k.removeprefix(prefix): v for k, v in arrays.items() if k.startswith(prefix)}


def check_logits_and_gradients(name, arrays, from_transformers):
    module, targets = network(name), arrays["targets"]
    params = from_transformers(subtree(arrays, "weight/"))
    is_real = targets > 0

    def loss_and_logits(params):
        batch = (arrays["inputs"], arrays["decoder_inputs"], targets)
        logits = module.apply({"params": params}, *batch, enable_dropout=False)
        nll = -jnp.take_along_axis(jax.nn.log_softmax(logits), targets[..., None], -1)[..., 0]
        return jnp.sum(jnp.where(is_real, nll, 0.0)) / is_real.sum(), logits

    grad = jax.jit(jax.value_and_grad(loss_and_logits, has_aux=True))
    (loss, logits), gradients = grad(params)
    np.testing.assert_allclose(logits[is_real], arrays["logits"][is_real], **TOLERANCE)
    np.testing.assert_allclose(loss, arrays["loss"], **TOLERANCE)
    expected = from_transformers(subtree(arrays, "gradient/"))
    assert jax.tree.structure(expected) == jax.tree.structure(gradients)
    for (path, actual), desired in zip(
        jax.tree_util.tree_leaves_with_path(gradients), jax.tree.leaves(expected), strict=True
    ):
        # Entries of one gradient are sums of the same terms: errors scale with the largest.
        difference = np.abs(actual - desired).max() / np.abs(desired).max()
        assert difference < 1e-4, jax.tree_util.keystr(path)


def continuation(module, params, inputs, length):
    """`tokens_to_logits` and an empty cache for padded inputs, to be called under jit."""
    variables = {"params": params}
    encoded = module.apply(variables, inputs, enable_dropout=False, method=module.encode)
    step = functools.partial(
        module.apply,
        enable_dropout=False,
        decode=True,
        max_decode_length=length,
        method=module.decode,
    )
    start = jnp.zeros((inputs.shape[0], 1), jnp.int32)
    collections = ["cache", "cross_cache"]
    _, made = step(variables, encoded, inputs, start, start, mutable=collections)
    fixed = {**variables, "cross_cache": made["cross_cache"]}

    def tokens_to_logits(ids, cache):
        logits, new = step({**fixed, "cache": cache}, encoded, inputs, ids, ids, mutable=["cache"])
        return logits[:, 0], new["cache"]

    return tokens_to_logits, made["cache"]


def check_greedy(name, arrays, from_transformers):
    expected = arrays["greedy"]
    params = from_transformers(subtree(arrays, "weight/"))
    greedy = decoding.Greedy(expected.shape[1])

    @jax.jit
    def generate(params, inputs):
        tokens_to_logits, cache = continuation(network(name), params, inputs, expected.shape[1])
        return greedy(tokens_to_logits, cache, batch_size=len(expected))

    np.testing.assert_array_equal(generate(params, arrays["inputs"]), expected)


@pytest.mark.parametrize("name", VARIANTS)
def test_logits_and_gradients(name, from_transformers):
    check_logits_and_gradients(name, golden(name), from_transformers)


@pytest.mark.parametrize("name", VARIANTS)
def test_greedy_equals_generate(name, from_transformers):
    arrays = golden(name)
    ends = (arrays["greedy"] == 1).any(axis=1)
    assert ends.any(), "some of the stored rows should end early, and some should not"
    assert not ends.all()
    check_greedy(name, arrays, from_transformers)


@pytest.mark.parametrize("name", VARIANTS)
def test_beam_search_equals_generate(name, from_transformers):
    arrays = golden(name)
    expected, num_beams = arrays["beam"], 4
    params = from_transformers(subtree(arrays, "weight/"))
    inputs = batches.repeat_rows(jnp.asarray(arrays["inputs"]), num_beams)
    strategy = decoding.BeamSearch(
        expected.shape[1], num_beams=num_beams, alpha=1.0, length_penalty="transformers"
    )

    @jax.jit
    def search(params, inputs):
        tokens_to_logits, cache = continuation(network(name), params, inputs, expected.shape[1])
        return strategy.search(tokens_to_logits, cache, len(expected))

    ids, scores = search(params, inputs)
    np.testing.assert_array_equal(ids[:, 0], expected)
    np.testing.assert_allclose(scores[:, 0], arrays["beam_scores"], **TOLERANCE)


@pytest.mark.slow
@pytest.mark.parametrize("name", VARIANTS)
@pytest.mark.filterwarnings("ignore")  # torch's and transformers' own
def test_live(name, from_transformers):
    arrays = fresh(name)
    check_logits_and_gradients(name, arrays, from_transformers)
    check_greedy(name, arrays, from_transformers)
