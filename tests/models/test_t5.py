"""Forms of the network that must agree: scanned, rematerialised, packed, bfloat16, cached."""

import dataclasses
import functools

from flax import linen as nn
from flax.linen import partitioning
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_peft.models import t5

CONFIG = t5.T5Config(
    vocab_size=40,
    emb_dim=16,
    num_heads=2,
    head_dim=6,
    mlp_dim=24,
    num_encoder_layers=2,
    num_decoder_layers=2,
)
INPUTS = jnp.array([[5, 6, 7, 8, 9, 1], [3, 2, 1, 0, 0, 0]])
TARGETS = jnp.array([[4, 5, 6, 7, 1], [13, 1, 0, 0, 0]])


def shift(targets):
    return jnp.pad(targets[:, :-1], ((0, 0), (1, 0)))


def network(**changes):
    return t5.Transformer(dataclasses.replace(CONFIG, **changes))


@functools.cache
def unscanned_params():
    init = functools.partial(network().init, enable_dropout=False)
    shapes = jax.eval_shape(init, jax.random.key(0), INPUTS, shift(TARGETS), TARGETS)["params"]
    rng = np.random.default_rng(0)

    def draw(path, leaf):
        # Sizes like those of a start, without a program that makes them.
        last = path[-1].key
        if last == "scale":
            return jnp.ones(leaf.shape)
        size = 1.0 if last in ("embedding", "rel_embedding") else leaf.shape[0] ** -0.5
        return jnp.asarray(size * rng.normal(size=leaf.shape), jnp.float32)

    return jax.tree_util.tree_map_with_path(draw, shapes)


@pytest.fixture
def params_for(to_scanned):
    """The same weights for any form of the network."""

    def params(module):
        if module.config.scan_layers:
            return to_scanned(unscanned_params())
        return unscanned_params()

    return params


STATIC = ("module", "method", "enable_dropout", "decode", "max_decode_length", "mutable")


@functools.partial(jax.jit, static_argnames=STATIC)
def run(module, variables, *args, method="__call__", **options):
    """`module.apply`, compiled once per form of the network and shapes."""
    options = {"enable_dropout": False} | options
    return module.apply(variables, *args, method=method, **options)


def logits_of(module, params, inputs=INPUTS, targets=TARGETS, **options):
    return run(module, {"params": params}, inputs, shift(targets), targets, **options)


def loss_of(module, params):
    log_probs = jax.nn.log_softmax(logits_of(module, params))
    return -jnp.sum(jnp.where(TARGETS[..., None] > 0, log_probs, 0.0)) / 40


@functools.cache
def value_and_gradient(module):
    return jax.jit(jax.value_and_grad(functools.partial(loss_of, module)))


def assert_trees_close(actual, expected, tolerance=1e-5):
    assert jax.tree.structure(actual) == jax.tree.structure(expected)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=tolerance, atol=tolerance),
        actual,
        expected,
    )


def test_scanned_equals_unscanned(params_for, to_scanned):
    plain, scanned = network(), network(scan_layers=True)
    value, gradient = jax.device_get(value_and_gradient(plain)(params_for(plain)))
    scanned_value, scanned_gradient = jax.device_get(
        value_and_gradient(scanned)(params_for(scanned))
    )
    np.testing.assert_allclose(scanned_value, value, rtol=1e-6)
    # One position bias per layer instead of one per stack: their gradients add up.
    for stack in ("encoder", "decoder"):
        total = scanned_gradient[stack][stack]["relpos_bias"]["rel_embedding"].sum(axis=1)
        shared = gradient[stack]["relpos_bias"]["rel_embedding"]
        np.testing.assert_allclose(total, shared, rtol=1e-4, atol=1e-6)
        for tree in (gradient[stack], scanned_gradient[stack][stack]):
            tree["relpos_bias"]["rel_embedding"] = np.zeros((2, 32))
    for stack in ("encoder", "decoder"):
        scanned_gradient[stack][stack]["relpos_bias"]["rel_embedding"] = np.zeros((2, 2, 32))
    assert_trees_close(scanned_gradient, to_scanned(gradient))


@pytest.mark.parametrize(("scan_layers", "remat_policy"), [(False, "minimal"), (True, "full")])
def test_remat_changes_nothing(params_for, scan_layers, remat_policy):
    plain = network(scan_layers=scan_layers)
    remat = network(scan_layers=scan_layers, remat_policy=remat_policy)
    params = params_for(plain)
    assert_trees_close(value_and_gradient(remat)(params), value_and_gradient(plain)(params))


def test_remat_recomputes():
    params = unscanned_params()
    count = {}
    for policy in t5.REMAT_POLICIES:
        module = network(remat_policy=policy)
        jaxpr = jax.make_jaxpr(jax.grad(functools.partial(loss_of, module)))(params)
        count[policy] = str(jaxpr).count("dot_general")
    assert count["none"] < count["minimal"] < count["full"]


@pytest.mark.parametrize("scan_layers", [False, True])
def test_packed_equals_unpacked(params_for, scan_layers):
    module = network(scan_layers=scan_layers)
    params = params_for(module)
    packed_inputs = jnp.array([[5, 6, 7, 8, 9, 1, 3, 2, 1, 0]])
    packed_targets = jnp.array([[4, 5, 6, 7, 1, 13, 1, 0]])
    packed = run(
        module,
        {"params": params},
        packed_inputs,
        jnp.array([[0, 4, 5, 6, 7, 0, 13, 0]]),
        packed_targets,
        jnp.array([[1, 1, 1, 1, 1, 1, 2, 2, 2, 0]]),
        jnp.array([[1, 1, 1, 1, 1, 2, 2, 0]]),
        jnp.array([[0, 1, 2, 3, 4, 5, 0, 1, 2, 0]]),
        jnp.array([[0, 1, 2, 3, 4, 0, 1, 0]]),
    )[0]
    plain = logits_of(module, params)
    np.testing.assert_allclose(packed[:5], plain[0], rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(packed[5:7], plain[1, :2], rtol=1e-5, atol=1e-5)


def test_several_targets_share_one_encoded_text():
    module, params = network(), unscanned_params()
    choices = jnp.array([[4, 5, 1, 13, 1]])
    shared = run(
        module,
        {"params": params},
        INPUTS[:1],
        jnp.array([[0, 4, 5, 0, 13]]),
        choices,
        decoder_segment_ids=jnp.array([[1, 1, 1, 2, 2]]),
    )[0]
    for rows in (slice(0, 3), slice(3, 5)):
        targets = jnp.pad(choices[:, rows], ((0, 1), (0, 5 - (rows.stop - rows.start))))
        alone = logits_of(module, params, INPUTS, targets)[0, : rows.stop - rows.start]
        np.testing.assert_allclose(shared[rows], alone, rtol=1e-5, atol=1e-5)


def test_padding_does_not_leak():
    module, params = network(), unscanned_params()
    wide = lambda x, n: jnp.pad(x, ((0, 0), (0, n)))
    padded = logits_of(module, params, wide(INPUTS, 3), wide(TARGETS, 2))[:, :-2]
    is_real = TARGETS > 0
    expected = logits_of(module, params)[is_real]
    np.testing.assert_allclose(padded[is_real], expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("scan_layers", "weights_dtype"),
    [  # Each layout and each dtype of weights is in one of the two that always run.
        (False, jnp.float32),
        (True, jnp.bfloat16),
        pytest.param(False, jnp.bfloat16, marks=pytest.mark.slow),
        pytest.param(True, jnp.float32, marks=pytest.mark.slow),
    ],
)
def test_bfloat16_is_close(params_for, scan_layers, weights_dtype):
    exact = network(scan_layers=scan_layers)
    params = params_for(exact)
    expected = logits_of(exact, params)
    weights = jax.tree.map(lambda x: x.astype(weights_dtype), params)
    logits = logits_of(network(scan_layers=scan_layers, dtype="bfloat16"), weights)
    assert logits.dtype == jnp.float32
    # Eight bits of mantissa through some thirty operations.
    error = jnp.abs(logits - expected).max() / jnp.abs(expected).max()
    assert 1e-4 < error < 0.05


def test_dropout_is_one_mask_for_all_tokens():
    # One layer that adds nothing: what remains of the embedding shows the masks.
    module = network(num_encoder_layers=1, dropout_rate=0.5)
    params = jax.tree.map(jnp.copy, unscanned_params())
    for block, name in (("attention", "out"), ("mlp", "wo")):
        params["encoder"]["layers_0"][block][name]["kernel"] *= 0.0
    encoded = run(
        module,
        {"params": params},
        INPUTS[:1],
        method="encode",
        enable_dropout=True,
        rngs={"dropout": jax.random.key(1)},
    )[0]
    is_dropped = encoded == 0
    assert 0 < is_dropped.mean() < 1
    np.testing.assert_array_equal(is_dropped, jnp.tile(is_dropped[:1], (INPUTS.shape[1], 1)))


def test_dropout_needs_its_rng_and_follows_it():
    module = network(num_encoder_layers=1, num_decoder_layers=1, dropout_rate=0.3)
    params = unscanned_params()
    apply = lambda seed: logits_of(
        module, params, enable_dropout=True, rngs={"dropout": jax.random.key(seed)}
    )
    np.testing.assert_array_equal(apply(1), apply(1))
    assert jnp.abs(apply(1) - apply(2)).max() > 0.1
    with pytest.raises(Exception, match="dropout"):
        logits_of(module, params, enable_dropout=True)


@pytest.mark.parametrize(
    ("scan_layers", "collections", "num_tokens"),
    [
        pytest.param(False, ("cache",), 1, marks=pytest.mark.slow),
        (False, ("cache", "cross_cache"), 2),
        (True, ("cache",), 2),
        pytest.param(True, ("cache", "cross_cache"), 1, marks=pytest.mark.slow),
    ],
)
def test_cached_decoding_equals_the_full_forward(params_for, scan_layers, collections, num_tokens):
    module = network(scan_layers=scan_layers)
    variables = {"params": params_for(module)}
    full = logits_of(module, variables["params"])
    encoded = run(module, variables, INPUTS, method="encode")

    def step(caches, tokens, mutable):
        return run(
            module,
            {**variables, **caches},
            encoded,
            INPUTS,
            tokens,
            tokens,
            decode=True,
            max_decode_length=6,
            method="decode",
            mutable=mutable,
        )

    tokens = shift(TARGETS)
    _, caches = step({}, tokens[:, :1], collections)
    assert sorted(caches) == list(collections)
    for i in range(0, 4, num_tokens):
        logits, new = step(caches, tokens[:, i : i + num_tokens], ("cache",))
        caches = {**caches, **new}
        is_real = TARGETS[:, i : i + num_tokens] > 0
        expected = full[:, i : i + num_tokens][is_real]
        np.testing.assert_allclose(logits[is_real], expected, rtol=1e-5, atol=1e-5)


def test_cross_cache_saves_the_projection_of_the_encoded_text():
    module, params = network(), unscanned_params()
    ones = jnp.ones((2, 1), jnp.int32)
    first = (jnp.ones((2, 6, 16)), INPUTS, ones, ones)
    decode = lambda variables, mutable: module.apply(
        variables,
        *first,
        enable_dropout=False,
        decode=True,
        max_decode_length=6,
        method=module.decode,
        mutable=mutable,
    )
    make = lambda params: decode({"params": params}, ["cache", "cross_cache"])[1]
    caches = jax.eval_shape(make, params)
    count = {}
    for name in ("cache", "cross_cache"):
        given = {"params": params, "cache": caches["cache"], name: caches[name]}
        jaxpr = jax.make_jaxpr(lambda variables: decode(variables, ["cache"]))(given)
        count[name] = str(jaxpr).count("dot_general")
    assert count["cache"] - count["cross_cache"] == 2 * CONFIG.num_decoder_layers


def test_a_cache_of_another_length_is_refused():
    module, params = network(), unscanned_params()
    ones = jnp.ones((2, 1), jnp.int32)

    def decode_twice(params):
        decode = functools.partial(
            module.apply,
            enable_dropout=False,
            decode=True,
            method=module.decode,
            mutable=["cache"],
        )
        batch = (jnp.ones((2, 6, 16)), INPUTS, ones, ones)
        _, cache = decode({"params": params}, *batch, max_decode_length=6)
        decode({"params": params, **cache}, *batch, max_decode_length=5)

    with pytest.raises(ValueError, match=r"has shape \(2, 6, 2, 6\).*should be \(2, 5, 2, 6\)"):
        jax.eval_shape(decode_twice, params)


def test_packed_rows_cannot_be_decoded():
    module, params = network(), unscanned_params()
    segments = jnp.ones_like(INPUTS)
    with pytest.raises(ValueError, match="Packed rows"):
        logits_of(module, params, encoder_segment_ids=segments, decode=True, mutable=("cache",))
    with pytest.raises(ValueError, match="encoder_segment_ids came without decoder_segment_ids"):
        logits_of(module, params, encoder_segment_ids=segments)


class _Guest(nn.Module):
    """What an interceptor may add to a dense map."""

    @nn.compact
    def __call__(self, outputs):
        features = outputs.shape[-1]
        scale = partitioning.param_with_axes(
            "scale", nn.initializers.ones, (features,), jnp.float32, axes=("guest",)
        )
        self.sow("router_losses", "mean", jnp.mean(outputs))
        if self.has_rng("routing"):
            outputs = outputs + jax.random.normal(self.make_rng("routing"), outputs.shape)
        return outputs * scale.reshape((1,) * (outputs.ndim - 1) + (-1,))


@pytest.mark.parametrize(("scan_layers", "remat_policy"), [(False, "none"), (True, "full")])
def test_intercepted_maps_may_hold_parameters_and_report(params_for, scan_layers, remat_policy):
    module = network(scan_layers=scan_layers, remat_policy=remat_policy)
    seen = []

    def interceptor(next_function, args, kwargs, context):
        outputs = next_function(*args, **kwargs)
        name = context.module.name
        if name in ("query", "key", "value", "wi_0", "wi_1", "wo", "out"):
            seen.append(name)
        if name != "key" or context.method_name != "__call__":
            return outputs
        (inputs,) = args
        assert inputs.shape == (2, inputs.shape[1], CONFIG.emb_dim)
        assert outputs.shape == (2, inputs.shape[1], CONFIG.num_heads, CONFIG.head_dim)
        return _Guest(parent=context.module, name="adapter")(outputs)

    batch = (INPUTS, shift(TARGETS), TARGETS)
    with nn.intercept_methods(interceptor):
        init = lambda rng: module.init(rng, *batch, enable_dropout=False)
        variables = jax.eval_shape(init, jax.random.key(0))
        rng = np.random.default_rng(0)
        draw = lambda leaf: jnp.asarray(0.3 * rng.normal(size=leaf.shape), leaf.dtype)
        params = jax.tree.map(draw, variables["params"])
        seen.clear()
        apply = jax.jit(
            lambda rngs: module.apply(
                {"params": params},
                *batch,
                enable_dropout=False,
                mutable=["router_losses"],
                rngs=rngs,
            )
        )
        # Without a key there is no noise: `init` ran so.
        logits, sown = apply({"routing": jax.random.key(0)})
        noisy, _ = apply({"routing": jax.random.key(1)})
    assert seen[:7] == ["query", "key", "value", "out", "wi_0", "wi_1", "wo"]
    decoder_layer = ["query", "key", "value", "out"] * 2 + ["wi_0", "wi_1", "wo"]
    assert seen[-11:] == decoder_layer

    layers_of = lambda tree: tree["decoder"]["decoder" if scan_layers else "layers_1"]
    adapter = layers_of(variables["params"])["self_attention"]["key"]["adapter"]
    axes = layers_of(variables["params_axes"])["self_attention"]["key"]["adapter"]["scale_axes"]
    assert adapter["scale"].shape == ((6, 2) if scan_layers else (6,))
    assert tuple(axes.names) == (("guest", "layers") if scan_layers else ("guest",))
    losses = jax.tree.leaves(sown["router_losses"])
    assert sum(leaf.size for leaf in losses) == 2 + 2 * 2, "one value per intercepted key map"
    assert jnp.abs(noisy - logits).max() > 0.01

    bare = jax.eval_shape(
        lambda rng: module.init(rng, *batch, enable_dropout=False), jax.random.key(0)
    )
    paths = lambda tree: {
        jax.tree_util.keystr(k) for k, _ in jax.tree_util.tree_leaves_with_path(tree)
    }
    assert {p for p in paths(variables["params"]) if "adapter" not in p} == paths(bare["params"])
