"""Which layers share a task router: names, counts beside the published ones, noise, refusals."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_peft import errors, methods, patching, routing
from moe_peft.models import t5

# Compiling costs more here than running.
jit = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})
TOKENS = [jax.ShapeDtypeStruct((2, 4), jnp.int32)] * 3
poly = functools.cache(methods.poly)  # the same object, which `logits_of` has traced


def network(layers=2, **options):
    return t5.Transformer(
        t5.T5Config(
            vocab_size=32,
            emb_dim=8,
            num_heads=4,
            head_dim=2,
            mlp_dim=16,
            num_encoder_layers=layers,
            num_decoder_layers=layers,
            **options,
        )
    )


@functools.cache
def logits_of(method, module):
    init = functools.partial(method.patch(module).init, enable_dropout=False)
    variables = jax.eval_shape(init, jax.random.key(0), *TOKENS)
    axes = patching.flatten(variables["params_axes"])
    found = {}
    for path, leaf in patching.flatten(variables["params"]).items():
        if path.endswith("/logits"):
            names = axes[f"{path}_axes"].names
            assert [name for name in names if name != "layers"] == ["task", "split", "skill"]
            found[path] = leaf
    return found


@functools.cache
def adapted_paths():
    """Paths of the layers with a router of their own in a network of two layers each."""
    paths = logits_of(poly(num_tasks=3), network(2))
    return [path.removesuffix("/adapter/router/logits") for path in paths]


def groups(level, num_blocks, num_layers):
    """Routers of a network of `num_layers` in encoder and decoder each, told from paths alone."""
    first = [path for path in adapted_paths() if "/layers_0/" in path]
    paths = [
        path.replace("/layers_0/", f"/layers_{layer}/")
        for path in first
        for layer in range(num_layers)
    ]
    granularity = patching.Granularity(level, num_blocks)
    return set(map(granularity.group, paths)) if granularity.is_shared else set(paths)


@pytest.mark.parametrize(
    ("granularity", "num_blocks", "counts"),
    [  # routers of a network of 8, 12, 24 layers in encoder and decoder each: facts of the papers
        ("linear", None, (144, 216, 432)),
        ("sublayer", None, (40, 60, 120)),
        ("block", None, (16, 24, 48)),
        ("blocks", 8, (2, 4, 6)),
        ("coder", None, (2, 2, 2)),
        ("model", None, (1, 1, 1)),
    ],
)
def test_number_of_routers(granularity, num_blocks, counts):
    assert tuple(len(groups(granularity, num_blocks, n)) for n in (8, 12, 24)) == counts
    # A network has the routers that its paths tell.
    num_blocks = num_blocks and 2
    options = {}
    if granularity != "linear":  # some layers of each block tell its groups
        options = {"granularity": granularity, "num_blocks": num_blocks, "placement": "light"}
    found = logits_of(poly(num_tasks=3, **options), network(2))
    told = groups(granularity, num_blocks, 2)
    if granularity == "linear":
        assert found.keys() == {f"{path}/adapter/router/logits" for path in told}
    else:
        assert found.keys() == {f"adapter/router/{group}/logits" for group in told}
    assert {leaf.shape for leaf in found.values()} == {(3, 1, 8)}


def test_names_of_groups():
    path = "decoder/layers_11/encoder_decoder_attention/query"
    names = {
        level: patching.Granularity(level, 8 if level == "blocks" else None).group(path)
        for level in ("sublayer", "block", "blocks", "coder", "model")
    }
    assert names == {
        "sublayer": "decoder/layers_11/encoder_decoder_attention",
        "block": "decoder/layers_11",
        "blocks": "decoder/blocks_1",
        "coder": "decoder",
        "model": "model",
    }
    assert patching.Granularity("coder").group("encoder/encoder/mlp/wi_0") == "encoder"


def run(method, module, params, rngs=None):
    ids = jnp.asarray([[3, 4, 1, 0], [5, 6, 7, 1]])
    context = routing.RoutingContext(task_ids=jnp.asarray([0, 2]))
    return method.patch(module).apply(
        {"params": params}, ids, ids, ids, enable_dropout=False, routing=context, rngs=rngs
    )


def randomised(params, seed=0):
    leaves, treedef = jax.tree.flatten(params)
    rng = np.random.default_rng(seed)
    return treedef.unflatten(
        [jnp.asarray(0.5 * rng.normal(size=leaf.shape), jnp.float32) for leaf in leaves]
    )


@pytest.mark.parametrize(
    ("granularity", "scan_layers"),
    [
        ("coder", True),
        ("model", False),
        pytest.param("coder", False, marks=pytest.mark.slow),
        pytest.param("model", True, marks=pytest.mark.slow),
    ],
)
def test_a_shared_router_is_the_same_logits_everywhere(granularity, scan_layers):
    """One set at the root equals copies of it at every layer, in value."""
    module = network(layers=2 if scan_layers else 1, scan_layers=scan_layers)
    mhr = functools.partial(methods.mhr, num_tasks=3, num_splits=4, placement="light")
    shared, single = mhr(granularity=granularity), mhr()
    init = lambda method: jax.eval_shape(
        functools.partial(method.patch(module).init, enable_dropout=False),
        jax.random.key(0),
        *TOKENS,
    )["params"]
    params = randomised(init(shared))
    flat = patching.flatten(params)
    copies = {}
    for path, leaf in patching.flatten(init(single)).items():
        copies[path] = flat.get(path)
        if path.endswith("/logits"):
            group = patching.Granularity(granularity).group(path)
            root = flat[f"adapter/router/{group}/logits"]
            copies[path] = jnp.repeat(root[:, None], 2, axis=1) if leaf.ndim == 4 else root
    expected = jit(functools.partial(run, single, module))(patching.trees.unflatten(copies))

    def objective(params):
        logits = run(shared, module, params)
        return jnp.sum(jnp.sin(logits)), logits

    grads, found = jit(jax.grad(objective, has_aux=True))(params)
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)
    for path, grad in patching.flatten(grads["adapter"]).items():
        assert np.abs(grad[jnp.asarray([0, 2])]).max() > 1e-4, path
        assert not np.any(grad[1]), path


def test_a_shared_router_draws_once():
    """With one router for the model, noise is one draw: layers do not differ."""
    method = methods.poly(
        num_tasks=3, num_skills=2, granularity="model", relaxed=True, placement="light"
    )
    module = network(1)
    init = functools.partial(method.patch(module).init, enable_dropout=False)
    params = randomised(jax.eval_shape(init, jax.random.key(0), *TOKENS)["params"])
    weights = patching.granularity.weights(
        params,
        method.rules,
        patching.ADAPTER,
        routing.RoutingContext(task_ids=jnp.asarray([0, 2])),
        jax.random.key(1),
        2,
    )
    assert list(weights) == ["model"]
    assert weights["model"].shape == (2, 1, 2)
    call = jit(lambda key: run(method, module, params, {"routing": key}))
    one, again, other = (call(jax.random.key(seed)) for seed in (1, 1, 2))
    np.testing.assert_array_equal(one, again)
    assert np.abs(one - other).max() > 1e-3


def test_shared_routers_start_and_draw_each_for_itself():
    method = methods.poly(num_tasks=1, num_skills=2, granularity="coder")
    router = method.rules[0].shared_router
    params, axes = patching.granularity.init(
        jax.random.key(0), {"encoder": router, "decoder": router}, patching.ADAPTER
    )
    logits = patching.flatten(params)
    assert logits.keys() == {f"adapter/router/{coder}/logits" for coder in ("encoder", "decoder")}
    assert {path.removesuffix("_axes") for path in patching.flatten(axes)} == logits.keys()
    assert len({leaf.tobytes() for leaf in map(np.asarray, logits.values())}) == 2

    weights = functools.partial(
        patching.granularity.weights, params, method.rules, patching.ADAPTER
    )
    noisy = weights(routing.RoutingContext(), jax.random.key(1), 3)
    plain = weights(routing.RoutingContext(), None, 3)
    assert noisy.keys() == plain.keys() == {"encoder", "decoder"}
    assert {leaf.shape for leaf in plain.values()} == {(1, 1, 2)}
    for leaf in noisy.values():  # one task, and still noise for every example
        assert leaf.shape == (3, 1, 2)
        assert np.abs(np.diff(leaf, axis=0)).min() > 1e-3
    assert np.abs(noisy["encoder"] - noisy["decoder"]).min() > 1e-3


def test_refusals():
    with pytest.raises(errors.UserError, match="Granularity 'block' cannot tell .* scan_layers"):
        logits_of(methods.poly(num_tasks=3, granularity="block"), network(scan_layers=True))
    with pytest.raises(errors.UserError, match="granularity is 'layer'; expected one of"):
        methods.poly(num_tasks=3, granularity="layer")
    with pytest.raises(errors.UserError, match="'blocks' and num_blocks go together"):
        methods.poly(num_tasks=3, granularity="blocks")
    with pytest.raises(errors.UserError, match="routing 'private' has none"):
        methods.poly(num_tasks=3, granularity="model", routing="private")
    with pytest.raises(errors.UserError, match="Unknown routing 'privat'.*'private'"):
        methods.poly(num_tasks=3, routing="privat")
