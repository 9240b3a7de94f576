"""Every method on a whole network, from one table: unscanned, rematerialised, scanned."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_peft import methods, patching, routing
from moe_peft.models import t5

SIZES = {"vocab_size": 32, "emb_dim": 8, "num_heads": 3, "head_dim": 4, "mlp_dim": 16}
LAYOUTS = {
    "unscanned": {},
    "remat": {"remat_policy": "full"},
    "scanned": {"scan_layers": True, "remat_policy": "minimal"},
}
# Compiling costs more here than running.
jit = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})
METHODS = {
    "ia3": methods.ia3,
    "lora": functools.partial(methods.lora, rank=2),
    "mov": functools.partial(methods.mov, num_experts=3),
    "mov_in_paper_top2": functools.partial(
        methods.mov, num_experts=3, router_input="as_in_paper", top_k=2
    ),
    "mov_sentence": functools.partial(methods.mov, num_experts=3, routing="sentence"),
    "molora": functools.partial(methods.molora, num_experts=3, rank=2),
    # "mhr_coder" has the layers that are missing here, which "lora" tells of too.
    "poly": functools.partial(methods.poly, num_tasks=4, num_skills=3, placement="light"),
    "mhr_coder": functools.partial(
        methods.mhr, num_tasks=4, num_skills=3, num_splits=4, rank=2, granularity="coder"
    ),
    "poly_ia3": functools.partial(
        methods.poly, num_tasks=4, num_skills=3, num_splits=2, adapter="ia3"
    ),
}
ENCODER_TOKENS = jnp.asarray([[5, 6, 7, 1, 0], [8, 9, 1, 0, 0]])
DECODER_TOKENS = jnp.asarray([[0, 3, 4, 0], [0, 5, 0, 0]])
TARGETS = jnp.asarray([[3, 4, 1, 0], [5, 1, 0, 0]])
TOKENS = (ENCODER_TOKENS, DECODER_TOKENS, TARGETS)
CONTEXT = routing.RoutingContext(
    task_ids=jnp.asarray([1, 3]),
    sentence_embeddings=jnp.asarray(np.random.default_rng(3).normal(size=(2, 5)), jnp.float32),
    encoder_mask=ENCODER_TOKENS > 0,
    decoder_mask=TARGETS > 0,
)
LOSSES = routing.losses.COLLECTION


def network(num_layers=1, **options):
    return t5.Transformer(
        t5.T5Config(
            **SIZES, num_encoder_layers=num_layers, num_decoder_layers=num_layers, **options
        )
    )


def call(model, params, *args, method=None, rngs=None, mutable=False, **kwargs):
    context = {"routing": CONTEXT} if isinstance(model, patching.Patched) else {}
    return model.apply(
        {"params": params},
        *(args or TOKENS),
        enable_dropout=False,
        method=method,
        rngs=rngs,
        mutable=mutable,
        **context,
        **kwargs,
    )


def shapes_of(tree):
    return {path: leaf.shape for path, leaf in patching.flatten(tree).items()}


def numbers(shapes, fresh=False):
    """Parameters for those shapes; `fresh` ones as adapters start."""
    rng = np.random.default_rng(1)
    start = {"vectors": 1.0, "scale": 1.0}

    def draw(path, shape):
        last = path.split("/")[-1]
        size = 0.0 if fresh and last in ("vectors", "lora_b") else 0.3
        return jnp.asarray(start.get(last, 0.0) + size * rng.normal(size=shape), jnp.float32)

    return patching.trees.unflatten({path: draw(path, shape) for path, shape in shapes.items()})


def abstract(model, **kwargs):
    init = functools.partial(model.init, enable_dropout=False, **kwargs)
    return jax.eval_shape(init, jax.random.key(0), *TOKENS)


@functools.cache
def base_params(layout):
    return numbers(shapes_of(abstract(network(**LAYOUTS[layout]))["params"]))


@functools.cache
def adapted(name, layout):
    """Method, patched model, abstract variables, fresh adapters, trained adapters."""
    method = METHODS[name]()
    patched = method.patch(network(**LAYOUTS[layout]))
    variables = abstract(patched, routing=CONTEXT)
    shapes = shapes_of(method.split(variables["params"])[1])
    return method, patched, variables, numbers(shapes, fresh=True), numbers(shapes)


@functools.cache
def plain_outputs(layout):
    model = network(**LAYOUTS[layout])
    outputs = jit(lambda params: halves(model, params) | {"call": call(model, params)})
    return outputs(base_params(layout))


# These methods belong to the proxy, which is the same for all adapters.
WITH_HALVES = {("ia3", "unscanned"), ("mhr_coder", "unscanned"), ("mov", "scanned")}


def halves(model, params):
    """Outputs of the two other methods of the network."""
    encoded = jnp.asarray(np.random.default_rng(2).normal(size=(2, 5, 8)), jnp.float32)
    return {
        "encode": call(model, params, ENCODER_TOKENS, method=model.encode),
        "decode": call(model, params, encoded, *TOKENS, method=model.decode),
    }


def test_every_adapter_has_a_row():
    rules = [rule for make in METHODS.values() for rule in make().rules]
    made = {type(rule.adapter_factory(parent=None)).__name__ for rule in rules}
    assert made == set(methods.ADAPTERS)


CASES = [(name, "unscanned") for name in METHODS] + [
    (name, layout) for name in ("mov", "molora", "poly") for layout in ("remat", "scanned")
]
# Equality of scanned and unscanned is tested for "molora" too, and nothing of remat is in a method.
LATER = {("mov", "remat"), ("molora", "remat"), ("poly", "remat"), ("molora", "scanned")}


@pytest.mark.parametrize(("name", "layout"), CASES)
def test_base_tree_is_untouched_and_adapters_have_axes(name, layout):
    method, _, variables, *_ = adapted(name, layout)
    frozen, trainable = method.split(variables["params"])
    assert shapes_of(frozen) == shapes_of(base_params(layout))
    merged = patching.merge(frozen, trainable)
    assert jax.tree.structure(merged) == jax.tree.structure(dict(variables["params"]))
    axes = patching.flatten(variables["params_axes"])
    assert trainable
    for path, leaf in patching.flatten(trainable).items():
        assert "adapter" in path.split("/")
        names = axes[f"{path}_axes"].names
        assert len(names) == leaf.ndim, path
        assert ("layers" in names) == (layout == "scanned")
        assert "unmodeled" not in names or name == "mov_sentence"


@pytest.mark.parametrize(
    ("name", "layout"),
    [pytest.param(*case, marks=pytest.mark.slow) if case in LATER else case for case in CASES],
)
def test_outputs_gradients_and_entry_points(name, layout):
    _, patched, _, fresh, trained = adapted(name, layout)
    base = base_params(layout)
    # Remat changes nothing: tests/models/test_t5.py.
    plain = plain_outputs("unscanned" if layout == "remat" else layout)
    has_halves = (name, layout) in WITH_HALVES

    def objective(adapter):
        logits = call(patched, patching.merge(base, adapter))
        return jnp.sum(jnp.sin(logits)), logits

    @jit  # one program for all: what is slow here is tracing and compiling
    def run(adapter):
        grads, logits = jax.grad(objective, has_aux=True)(adapter)
        outputs = halves(patched, patching.merge(base, adapter)) if has_halves else {}
        return outputs | {"call": logits}, grads

    neutral = run(fresh)[0]
    assert len(neutral) == (3 if has_halves else 1)
    for entry, output in neutral.items():
        np.testing.assert_allclose(output, plain[entry], rtol=1e-4, atol=1e-5)
    outputs, grads = run(trained)
    for entry, output in outputs.items():
        assert jnp.abs(output - plain[entry]).max() > 1e-2, entry
    assert shapes_of(grads) == shapes_of(trained)
    for path, grad in patching.flatten(grads).items():
        assert jnp.abs(grad).max() > 0, path
    if (name, layout) == ("ia3", "unscanned"):
        params = patching.merge(base, trained)
        eager = call(patched, params, ENCODER_TOKENS, method=patched.encode)
        np.testing.assert_allclose(eager, outputs["encode"], rtol=1e-4, atol=1e-5)


def later(names):
    """The table's names, some of which are tested with `--slow` only."""
    return [pytest.param(n, marks=pytest.mark.slow) if n in names else n for n in METHODS]


# Rules and routers of the others are the same: "mov", "mhr_coder".
@pytest.mark.parametrize("name", later({"mov_sentence", "mov_in_paper_top2", "poly", "poly_ia3"}))
def test_the_same_tree_eagerly_and_under_remat(name):
    method, patched, variables, *_ = adapted(name, "unscanned")
    expected = shapes_of(variables["params"])
    remat = method.patch(network(**LAYOUTS["remat"]))
    assert shapes_of(abstract(remat, routing=CONTEXT)["params"]) == expected
    if name == "ia3":
        init = functools.partial(patched.init, method=patched.encode, enable_dropout=False)
        eager = init(jax.random.key(0), ENCODER_TOKENS)["params"]
        encoder = {path: shape for path, shape in expected.items() if path.startswith("enc")}
        embedder = {"token_embedder/embedding": (32, 8)}
        assert shapes_of(eager) == encoder | embedder
        assert all(
            (leaf == 1).all() for path, leaf in patching.flatten(eager).items() if "vectors" in path
        )


# Places of the others: "ia3" and "lora".
@pytest.mark.parametrize("name", later({"mov", "mov_sentence", "poly", "poly_ia3"}))
def test_relatives_of_t5_are_adapted_alike(name):
    """Another gate, more buckets and biases in layers change no adapter, and stay frozen."""
    options = {"mlp_activations": ("silu", "linear"), "relpos_buckets": 64}
    model = network(relpos_in_every_layer=True, **options)
    method, *_, plain = adapted(name, "unscanned")
    variables = abstract(method.patch(model), routing=CONTEXT)
    frozen, trainable = map(shapes_of, method.split(variables["params"]))
    assert trainable == shapes_of(plain)
    biases = {path: shape for path, shape in frozen.items() if "relpos_bias" in path}
    paths = [f"{stack}/layers_0/relpos_bias/rel_embedding" for stack in ("encoder", "decoder")]
    assert biases == dict.fromkeys(paths, (3, 64))


# Of "mov" the routers and losses are those of "molora", and both layouts are tested above.
@pytest.mark.parametrize("name", [pytest.param("mov", marks=pytest.mark.slow), "molora"])
def test_scanned_equals_unscanned(name):
    """Same numbers, stacked: trees correspond, and so do outputs and router losses."""
    # Keys, values and hidden units tell what scanning does to adapters; that of others is above.
    placed = {"placement": "light"} if name == "molora" else {}
    method = METHODS[name](**placed)
    scanned = method.patch(network(2, **LAYOUTS["scanned"]))
    unscanned = method.patch(network(2))
    stacked = patching.flatten(numbers(shapes_of(abstract(scanned)["params"])))
    for path, leaf in stacked.items():  # unscanned stacks share one position bias
        if "relpos_bias" in path:
            stacked[path] = jnp.repeat(leaf[:, :1], 2, axis=1)

    def unstacked(path, shape):
        stack, *rest = path.split("/")
        if rest[0].startswith("layers_"):
            layer = stacked["/".join((stack, stack, *rest[1:]))]
            return layer[:, int(rest[0][-1])].reshape(shape)
        if rest[0] == "relpos_bias":
            return stacked["/".join((stack, *path.split("/")))][:, 0]
        return stacked[path]

    shapes = shapes_of(abstract(unscanned)["params"])
    flat = {path: unstacked(path, shape) for path, shape in shapes.items()}
    logits, sowed = jit(lambda p: call(scanned, p, mutable=[LOSSES]))(
        patching.trees.unflatten(stacked)
    )
    expected, expected_sowed = jit(lambda p: call(unscanned, p, mutable=[LOSSES]))(
        patching.trees.unflatten(flat)
    )
    np.testing.assert_allclose(logits, expected, rtol=1e-4, atol=1e-4)
    found, wanted = (routing.losses.means(s[LOSSES]) for s in (sowed, expected_sowed))
    assert set(found) == {"load_balancing", "z"}
    for loss, value in found.items():
        np.testing.assert_allclose(value, wanted[loss], rtol=1e-5)


@pytest.mark.parametrize("name", ["mov", "mov_in_paper_top2", "molora"])
def test_padding_does_not_reach_the_losses(name):
    _, patched, _, _, trained = adapted(name, "unscanned")
    params = patching.merge(base_params("unscanned"), trained)

    @jit
    def losses(decoder_tokens, context):
        _, sowed = patched.apply(
            {"params": params},
            ENCODER_TOKENS,
            decoder_tokens,
            TARGETS,
            enable_dropout=False,
            mutable=[LOSSES],
            routing=context,
        )
        return patching.flatten(sowed[LOSSES])

    # A padded decoder position is seen by nothing but itself, and its decisions do not count.
    changed = DECODER_TOKENS.at[0, 3].set(9).at[1, 2:].set(9)
    before, after = losses(DECODER_TOKENS, CONTEXT), losses(changed, CONTEXT)
    assert len(before) == {"mov": 16, "mov_in_paper_top2": 16, "molora": 32}[name]
    for path, value in after.items():
        np.testing.assert_allclose(value, before[path], rtol=1e-5, err_msg=path)
    # The same program: nothing is masked.
    masks = {"encoder_mask": ENCODER_TOKENS >= 0, "decoder_mask": TARGETS >= 0}
    no_masks = dataclasses.replace(CONTEXT, **masks)
    before, after = losses(DECODER_TOKENS, no_masks), losses(changed, no_masks)
    assert max(abs(after[path] - before[path]) for path in before) > 1e-3


def test_jitter_reaches_scanned_layers():
    method = methods.mov(num_experts=3, jitter=0.3)
    patched = method.patch(network(**LAYOUTS["scanned"]))
    params = patching.merge(base_params("scanned"), adapted("mov", "scanned")[-1])
    run = jit(lambda key: call(patched, params, rngs={"routing": key}))
    one, two = run(jax.random.key(1)), run(jax.random.key(2))
    assert jnp.abs(one - two).max() > 1e-3
    np.testing.assert_array_equal(one, run(jax.random.key(1)))


@pytest.mark.parametrize("name", METHODS)
def test_bfloat16_activations_stay_bfloat16(name):
    method, _, variables, *_ = adapted(name, "unscanned")
    seen = {}

    class Spy(patching.interceptor.Interceptor):
        def _adapt(self, rule, module, parent, call):
            result = super()._adapt(rule, module, parent, call)
            seen["/".join(module.path)] = (call.outputs.dtype, result.dtype)
            return result

    def run(params):
        shared = patching.granularity.weights(
            params, method.rules, patching.ADAPTER, CONTEXT, None, len(TARGETS)
        )
        spy = Spy(method.rules, CONTEXT, shared_weights=shared)
        with patching.proxy.nn.intercept_methods(spy):
            return network(dtype="bfloat16").apply(
                {"params": params}, *TOKENS, enable_dropout=False
            )

    jax.eval_shape(run, variables["params"])
    counts = {"lora": 18, "molora": 16, "mhr_coder": 18}
    assert len(seen) == counts.get(name, 8)
    assert set(seen.values()) == {(jnp.dtype("bfloat16"), jnp.dtype("bfloat16"))}


def test_cached_decoding_equals_teacher_forcing():
    _, patched, _, _, trained = adapted("molora", "unscanned")
    params = patching.merge(base_params("unscanned"), trained)
    encoded = jnp.asarray(np.random.default_rng(2).normal(size=(2, 5, 8)), jnp.float32)
    expected = jit(lambda p: call(patched, p, encoded, *TOKENS, method=patched.decode))(params)

    def step(variables, tokens):
        return patched.apply(
            variables,
            encoded,
            ENCODER_TOKENS,
            tokens,
            tokens,
            enable_dropout=False,
            decode=True,
            max_decode_length=4,
            method=patched.decode,
            mutable=["cache"],
        )

    first = jax.eval_shape(step, {"params": params}, DECODER_TOKENS[:, :1])[1]
    cache = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), first)
    step = jit(step)
    for t in range(4):
        logits, cache = step({"params": params, **cache}, DECODER_TOKENS[:, t : t + 1])
        real = TARGETS[:, t] > 0  # only a whole sequence knows which of its keys are padding
        np.testing.assert_allclose(logits[real, 0], expected[real, t], rtol=1e-4, atol=1e-4)
