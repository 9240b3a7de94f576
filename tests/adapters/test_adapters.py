"""Every adapter beside one layer, from one table: values, experts, dtypes, mistakes."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_peft import adapters, errors, routing

# Inputs [b, t, d], outputs of a projection to heads [b, t, h, k], and the way back.
INPUTS = {"one": ((6,), ("embed",)), "two": ((2, 3), ("heads", "kv"))}
B, T, E = 2, 3, 4

top2 = functools.partial(routing.TokenRouter, top_k=2)

TABLE = {
    "ia3": adapters.IA3,
    "mov": functools.partial(adapters.MoV, num_experts=E),
    "mov_top2": functools.partial(adapters.MoV, num_experts=E, router_factory=top2),
    "lora": functools.partial(adapters.LoRA, rank=2),
    "molora": functools.partial(adapters.MoLoRA, rank=2, num_experts=E),
    "molora_top2": functools.partial(adapters.MoLoRA, rank=2, num_experts=E, router_factory=top2),
    "molora_sentence": functools.partial(
        adapters.MoLoRA, rank=2, num_experts=E, router_factory=routing.SentenceRouter
    ),
}


def arrays(shapes, dtype=jnp.float32, per_head=False):
    """Inputs, outputs and site of a layer with those input and output axes."""
    rng = np.random.default_rng(0)
    (in_shape, in_axes), (out_shape, out_axes) = (INPUTS[name] for name in shapes)
    inputs = jnp.asarray(rng.normal(size=(B, T, *in_shape)), dtype)
    outputs = jnp.asarray(rng.normal(size=(B, T, *out_shape)), dtype)
    site = routing.Site(
        in_axes=in_axes,
        out_axes=out_axes,
        router_input=outputs if per_head else inputs.reshape(B, T, -1),
        context=routing.RoutingContext(
            sentence_embeddings=jnp.asarray(rng.normal(size=(B, 5)), jnp.float32)
        ),
    )
    return inputs, outputs, site


def perturbed(variables, seed=1, scale=0.5):
    """All parameters moved away from their initial values."""
    leaves, treedef = jax.tree.flatten(variables["params"])
    rng = np.random.default_rng(seed)
    noise = [jnp.asarray(rng.normal(size=leaf.shape) * scale, leaf.dtype) for leaf in leaves]
    return {"params": treedef.unflatten([a + b for a, b in zip(leaves, noise, strict=True)])}


def softmax(x):
    x = np.exp(x - x.max(-1, keepdims=True))
    return x / x.sum(-1, keepdims=True)


def numpy_weights(params, site, name):
    x = site.context.sentence_embeddings[:, None] if "sentence" in name else site.router_input
    probs = softmax(np.asarray(x, np.float64) @ np.asarray(params["router"]["kernel"], np.float64))
    if "top2" in name:
        threshold = np.sort(probs, axis=-1)[..., [-2]]
        probs = np.where(probs >= threshold, probs, 0)
        probs = probs / probs.sum(-1, keepdims=True)
    return probs


def numpy_adapter(name, params, inputs, outputs, site):
    """What each adapter should compute, slowly, in float64."""
    weights = numpy_weights(params, site, name) if "router" in params else np.ones((1, 1, 1))
    result = np.asarray(outputs, np.float64).copy()
    inputs = np.asarray(inputs, np.float64).reshape(B, T, -1)
    for b, t in np.ndindex(B, T):
        if "vectors" in params:
            vectors = np.asarray(params["vectors"], np.float64)
            vectors = vectors if "router" in params else vectors[None]
            if weights.ndim == 4:  # a decision per head
                for h in range(result.shape[2]):
                    result[b, t, h] *= weights[b, t, h] @ vectors[:, h]
            else:
                w = np.broadcast_to(weights, (B, T, weights.shape[-1]))[b, t]
                result[b, t] *= np.tensordot(w, vectors, axes=1)
            continue
        rank = 2
        lora_a = np.asarray(params["lora_a"], np.float64).reshape(inputs.shape[-1], -1, rank)
        lora_b = np.asarray(params["lora_b"], np.float64).reshape(lora_a.shape[1], rank, -1)
        w = np.broadcast_to(weights, (B, T, weights.shape[-1]))[b, t]
        for e in range(lora_a.shape[1]):
            delta = w[e] * 16.0 / rank * (inputs[b, t] @ lora_a[:, e] @ lora_b[e])
            result[b, t] += delta.reshape(result[b, t].shape)
    return result


@pytest.mark.parametrize(
    ("name", "shapes"),
    [(name, ("one", "two")) for name in TABLE]
    + [(name, shapes) for name in ("mov", "molora") for shapes in (("one", "one"), ("two", "one"))],
)
def test_values_equal_numpy_and_fresh_is_identity(name, shapes):
    inputs, outputs, site = arrays(shapes)
    adapter = TABLE[name]()
    variables = adapter.init(jax.random.key(0), inputs, outputs, site)
    fresh = adapter.apply(variables, inputs, outputs, site)
    # Probabilities sum to one within float32 rounding.
    np.testing.assert_allclose(fresh, outputs, rtol=1e-6)

    variables = perturbed(variables)
    result = adapter.apply(variables, inputs, outputs, site)
    expected = numpy_adapter(name, variables["params"], inputs, outputs, site)
    assert np.abs(expected - outputs).max() > 0.1
    np.testing.assert_allclose(result, expected, rtol=2e-5, atol=2e-5)


def test_a_decision_per_head():
    inputs, outputs, site = arrays(("one", "two"), per_head=True)
    adapter = TABLE["mov"]()
    variables = adapter.init(jax.random.key(0), inputs, outputs, site)
    assert variables["params"]["router"]["kernel"].shape == (3, E)  # kv, shared over the heads
    assert variables["params"]["vectors"].shape == (E, 2, 3)
    variables = perturbed(variables)
    result = adapter.apply(variables, inputs, outputs, site)
    expected = numpy_adapter("mov", variables["params"], inputs, outputs, site)
    np.testing.assert_allclose(result, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", TABLE)
def test_parameters_are_float32_with_axes_and_results_keep_their_dtype(name):
    inputs, outputs, site = arrays(("one", "two"), jnp.bfloat16)
    adapter = TABLE[name]()
    variables = adapter.init(jax.random.key(0), inputs, outputs, site)
    leaves = jax.tree.leaves_with_path(variables["params"])
    assert leaves
    for path, leaf in leaves:
        assert leaf.dtype == jnp.float32
        *parents, last = [key.key for key in path]
        axes = variables["params_axes"]
        for parent in parents:
            axes = axes[parent]
        assert len(axes[f"{last}_axes"].names) == leaf.ndim
    result = adapter.apply(variables, inputs, outputs, site)
    assert result.dtype == jnp.bfloat16
    np.testing.assert_array_equal(result, outputs)


# Leaves of each adapter, router included.
NUM_LEAVES = {"ia3": 1, "mov": 2, "lora": 2, "molora": 3}


@pytest.mark.parametrize("shapes", [("one", "one"), ("one", "two")])
@pytest.mark.parametrize("name", ["ia3", "mov", "poly_ia3"])
def test_small_scales_count_in_bfloat16(name, shapes):
    """A scale of 1.003 is 1.0 in bfloat16: the product is taken in float32 and rounded once."""
    inputs, outputs, site = arrays(shapes, jnp.bfloat16)
    table = TABLE | {"poly_ia3": functools.partial(adapters.SkilledIA3, num_skills=3)}
    adapter = table[name]()
    params = adapter.init(jax.random.key(0), inputs, outputs, site)["params"]
    params = {**params, "vectors": jnp.full_like(params["vectors"], 1.003)}
    result = adapter.apply({"params": params}, inputs, outputs, site)
    expected = (np.asarray(outputs, np.float32) * np.float32(1.003)).astype(jnp.bfloat16)
    moved = np.asarray(expected != outputs)
    assert 0.1 < moved.mean() < 1
    # A mean of the scales may lie a float32 rounding off, and so the tie of a few numbers.
    assert np.mean(np.asarray(result != expected)) < 0.05


@pytest.mark.parametrize("name", TABLE)
def test_gradients_reach_every_leaf_of_a_trained_adapter(name):
    inputs, outputs, site = arrays(("one", "two"))
    adapter = TABLE[name]()
    variables = perturbed(adapter.init(jax.random.key(0), inputs, outputs, site))

    def objective(params):
        return jnp.sum(jnp.sin(adapter.apply({"params": params}, inputs, outputs, site)))

    grads = jax.tree.leaves_with_path(jax.grad(objective)(variables["params"]))
    assert len(grads) == NUM_LEAVES[name.partition("_")[0]]
    for path, grad in grads:
        assert jnp.abs(grad).max() > 1e-3, path


@pytest.mark.parametrize(("mixture", "plain"), [("mov", "ia3"), ("molora", "lora")])
def test_one_expert_is_the_plain_method(mixture, plain):
    inputs, outputs, site = arrays(("one", "two"))
    mixture, plain = TABLE[mixture](num_experts=1), TABLE[plain]()
    variables = perturbed(mixture.init(jax.random.key(0), inputs, outputs, site))
    like = plain.init(jax.random.key(0), inputs, outputs, site)["params"]
    params = {name: variables["params"][name].reshape(leaf.shape) for name, leaf in like.items()}
    np.testing.assert_allclose(
        mixture.apply(variables, inputs, outputs, site),
        plain.apply({"params": params}, inputs, outputs, site),
        rtol=1e-6,
    )


def expert_axis(name):
    return {"vectors": 0, "lora_a": -2, "lora_b": 0, "kernel": -1}[name]


@pytest.mark.parametrize("name", ["mov", "mov_top2", "molora", "molora_top2"])
def test_experts_can_be_permuted(name):
    inputs, outputs, site = arrays(("one", "two"))
    adapter = TABLE[name]()
    variables = perturbed(adapter.init(jax.random.key(0), inputs, outputs, site))
    order = jnp.array([2, 0, 3, 1])
    permuted = jax.tree.map_with_path(
        lambda path, leaf: jnp.take(leaf, order, axis=expert_axis(path[-1].key)), variables
    )
    np.testing.assert_allclose(
        adapter.apply(permuted, inputs, outputs, site),
        adapter.apply(variables, inputs, outputs, site),
        rtol=1e-5,
        atol=1e-5,
    )


@pytest.mark.parametrize("name", ["mov_top2", "molora_top2"])
def test_experts_not_selected_get_exactly_no_gradient(name):
    inputs, outputs, site = arrays(("one", "two"))
    adapter = TABLE[name]()
    variables = perturbed(adapter.init(jax.random.key(0), inputs, outputs, site))
    kernel = variables["params"]["router"]["kernel"]
    # One decision alone: all tokens look alike.
    site = routing.Site(**{**vars(site), "router_input": jnp.ones_like(site.router_input)})
    probs = softmax(np.asarray(kernel).sum(0))
    unused = np.argsort(probs)[: E - 2]

    def objective(params):
        return jnp.sum(jnp.sin(adapter.apply({"params": params}, inputs, outputs, site)))

    grads = jax.grad(objective)(variables["params"])
    grads.pop("router")
    for leaf_name, grad in grads.items():
        by_expert = np.moveaxis(np.asarray(grad), expert_axis(leaf_name), 0)
        assert not by_expert[unused].any()
        assert by_expert[np.argsort(probs)[E - 2 :]].any()


def test_top_k_without_renormalising_starts_at_the_kept_mass():
    inputs, outputs, site = arrays(("one", "one"))
    router = functools.partial(routing.TokenRouter, top_k=2, renormalize=False)
    adapter = adapters.MoV(num_experts=E, router_factory=router)
    variables = adapter.init(jax.random.key(0), inputs, outputs, site)
    probs = numpy_weights(variables["params"], site, "soft")
    mass = np.sort(probs, axis=-1)[..., -2:].sum(-1, keepdims=True)
    assert (mass < 0.7).all()
    result = adapter.apply(variables, inputs, outputs, site)
    np.testing.assert_allclose(result, mass * np.asarray(outputs), rtol=1e-5)


def test_dropout_acts_on_the_adapter_when_an_rng_is_given():
    inputs, outputs, site = arrays(("one", "one"))
    adapter = adapters.LoRA(rank=2, dropout_rate=0.5)
    variables = perturbed(adapter.init(jax.random.key(0), inputs, outputs, site))
    plain = adapter.apply(variables, inputs, outputs, site)
    apply = lambda seed: adapter.apply(
        variables, inputs, outputs, site, rngs={"dropout": jax.random.key(seed)}
    )
    one, two = apply(1), apply(2)
    np.testing.assert_array_equal(one, apply(1))
    assert np.abs(one - two).max() > 0.01
    assert np.abs(one - plain).max() > 0.01


def test_uniform_law_of_poly():
    draw = adapters.mttl_uniform(jax.random.key(0), (2048, 4), jnp.float32)
    assert abs(float(jnp.abs(draw).max()) - 0.012758) < 1e-4
    assert abs(float(jnp.sqrt(jnp.mean(draw**2))) - 0.007366) < 1e-4
    # An adapter for two input axes draws within the bound of both together.
    inputs, outputs, site = arrays(("two", "one"))
    adapter = adapters.MoLoRA(rank=2, num_experts=E, a_init="uniform")
    lora_a = adapter.init(jax.random.key(0), inputs, outputs, site)["params"]["lora_a"]
    assert lora_a.shape == (2, 3, E, 2)
    assert 0.5 < jnp.abs(lora_a).max() * np.sqrt(3 * 6) <= 1


@pytest.mark.parametrize(
    ("factory", "message"),
    [
        (functools.partial(adapters.LoRA, rank=0), "rank is 0"),
        (functools.partial(adapters.LoRA, rank=2, dropout_rate=1.0), "dropout_rate is 1.0"),
        (functools.partial(adapters.LoRA, rank=2, a_init="nrmal"), "a_init is 'nrmal'"),
        (functools.partial(adapters.LoRA, rank=2, num_experts=2), "no router"),
        (functools.partial(adapters.MoLoRA, rank=2, num_experts=0), "num_experts is 0"),
        (functools.partial(adapters.MoV, num_experts=0), "num_experts is 0"),
        (functools.partial(adapters.MoV, num_experts=1, router_factory=top2), "top_k is 2, more"),
    ],
)
def test_mistakes_are_told_at_once(factory, message):
    with pytest.raises(errors.UserError, match=message):
        factory()
