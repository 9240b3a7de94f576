"""Routers against NumPy: probabilities, top-k, jitter, losses, mistakes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_peft import errors, routing

B, T, D, E = 2, 5, 4, 3
X = jnp.asarray(np.random.default_rng(0).normal(size=(B, T, D)), jnp.float32)
MASK = jnp.asarray([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]], bool)
KERNEL = jnp.asarray(np.random.default_rng(1).normal(size=(D, E)), jnp.float32)
VARIABLES = {"params": {"kernel": KERNEL}}


def softmax(x):
    x = np.exp(x - x.max(-1, keepdims=True))
    return x / x.sum(-1, keepdims=True)


PROBS = softmax(np.asarray(X) @ np.asarray(KERNEL))


def site(**changes):
    return routing.Site(**({"router_input": X, "mask": MASK} | changes))


def losses_of(router, site, variables=VARIABLES):
    """Losses sowed by a router."""
    _, sowed = router.apply(variables, site, mutable=[routing.losses.COLLECTION])
    return {
        name: float(value)
        for name, value in routing.losses.means(sowed[routing.losses.COLLECTION]).items()
    }


def test_probabilities_sum_to_one_in_float32():
    router = routing.TokenRouter(E)
    weights = router.apply(VARIABLES, site(router_input=X.astype(jnp.bfloat16)))
    assert weights.dtype == jnp.float32
    np.testing.assert_allclose(weights.sum(-1), 1.0, rtol=1e-6)
    np.testing.assert_allclose(router.apply(VARIABLES, site()), PROBS, rtol=1e-5)


def test_kernel_law_and_axes():
    variables = routing.TokenRouter(200).init(
        jax.random.key(0), routing.Site(router_input=jnp.ones((1, 1, 500)), router_axis="mlp")
    )
    kernel = variables["params"]["kernel"]
    assert kernel.shape == (500, 200)
    assert kernel.dtype == jnp.float32
    assert abs(kernel.std() - 0.02) < 2e-4  # standard error 4.5e-5
    assert variables["params_axes"]["kernel_axes"].names == ("mlp", "expert")
    assert set(variables) == {"params", "params_axes"}  # no losses at initialisation


@pytest.mark.parametrize("renormalize", [True, False])
@pytest.mark.parametrize("top_k", [1, 2, 3])
def test_top_k(top_k, renormalize):
    router = routing.TokenRouter(E, top_k=top_k, renormalize=renormalize)
    weights = np.asarray(router.apply(VARIABLES, site()))
    threshold = np.sort(PROBS, axis=-1)[..., [-top_k]]
    expected = np.where(threshold <= PROBS, PROBS, 0)
    if renormalize:
        expected = expected / expected.sum(-1, keepdims=True)
    assert ((weights > 0).sum(-1) == top_k).all()
    np.testing.assert_allclose(weights, expected, rtol=1e-5)


def test_ties_keep_exactly_k():
    router = routing.TokenRouter(E, top_k=2)
    weights = router.apply({"params": {"kernel": jnp.zeros((D, E))}}, site())
    np.testing.assert_array_equal(weights, np.broadcast_to([0.5, 0.5, 0], (B, T, E)))


def test_sentence_router_decides_once_per_example():
    embeddings = jnp.asarray(np.random.default_rng(2).normal(size=(B, D)), jnp.float32)
    context = routing.RoutingContext(sentence_embeddings=embeddings)
    router = routing.SentenceRouter(E)
    weights = router.apply(VARIABLES, site(context=context))
    expected = softmax(np.asarray(embeddings) @ np.asarray(KERNEL))
    np.testing.assert_allclose(weights, expected[:, None], rtol=1e-5)
    with pytest.raises(errors.UserError, match="no feature 'sentence_embeddings'"):
        router.apply(VARIABLES, site())


def test_uniform_router():
    weights = routing.UniformRouter(E).apply({}, site())
    np.testing.assert_allclose(weights, np.full((1, 1, E), 1 / 3), rtol=1e-6)


def test_jitter_needs_an_rng_and_stays_within_its_bounds():
    router = routing.TokenRouter(E, jitter=0.1)
    apply = lambda seed: router.apply(
        VARIABLES, site(has_rng=True), rngs={"routing": jax.random.key(seed)}
    )
    np.testing.assert_array_equal(apply(0), apply(0))
    assert np.abs(apply(0) - apply(1)).max() > 1e-3
    np.testing.assert_allclose(router.apply(VARIABLES, site()), PROBS, rtol=1e-5)
    with pytest.raises(errors.UserError, match="rng 'routing' does not reach"):
        router.apply(VARIABLES, site(has_rng=True))
    # Logits of a positive input with an identity kernel show the factor itself.
    ones = jnp.ones((1, 4000, 2))
    weights = routing.TokenRouter(2, jitter=0.1).apply(
        {"params": {"kernel": jnp.array([[1.0, 0.0], [0.0, 0.0]])}},
        routing.Site(router_input=ones, has_rng=True),
        rngs={"routing": jax.random.key(0)},
    )
    factors = np.log(weights[..., 0] / weights[..., 1])
    assert factors.min() >= 0.9 - 1e-5
    assert factors.max() <= 1.1 + 1e-5
    assert factors.max() - factors.min() > 0.19


def test_losses_equal_numpy_and_ignore_padding():
    found = losses_of(routing.TokenRouter(E), site(wants_losses=True))
    real = np.asarray(MASK)
    probs = PROBS[real]
    fraction = np.eye(E)[probs.argmax(-1)].mean(0)
    logits = (np.asarray(X) @ np.asarray(KERNEL))[real]
    np.testing.assert_allclose(
        found["load_balancing"], E * (fraction * probs.mean(0)).sum(), rtol=1e-5
    )
    z = np.square(np.log(np.exp(logits).sum(-1))).mean()
    np.testing.assert_allclose(found["z"], z, rtol=1e-5)

    padding_changed = jnp.where(MASK[..., None], X, 1e3)
    changed = site(wants_losses=True, router_input=padding_changed)
    assert losses_of(routing.TokenRouter(E), changed) == found


def test_losses_of_top_k_count_every_chosen_expert():
    found = losses_of(routing.TokenRouter(E, top_k=2), site(wants_losses=True))
    probs = PROBS[np.asarray(MASK)]
    chosen = probs >= np.sort(probs, axis=-1)[:, [-2]]
    expected = E * (chosen.mean(0) / 2 * probs.mean(0)).sum()
    np.testing.assert_allclose(found["load_balancing"], expected, rtol=1e-5)


def test_losses_count_heads_and_examples():
    per_head = jnp.stack([X, 2 * X], axis=2)
    found = losses_of(routing.TokenRouter(E), site(wants_losses=True, router_input=per_head))
    logits = np.asarray(per_head)[np.asarray(MASK)].reshape(-1, D) @ np.asarray(KERNEL)
    z = np.square(np.log(np.exp(logits).sum(-1))).mean()
    np.testing.assert_allclose(found["z"], z, rtol=1e-5)

    embeddings = X[:, 0]
    sentence = site(
        wants_losses=True,
        context=routing.RoutingContext(sentence_embeddings=embeddings),
        mask=jnp.asarray([[1, 0], [0, 0]], bool),  # the second example is padding
    )
    found = losses_of(routing.SentenceRouter(E), sentence)
    logits = np.asarray(embeddings[0] @ KERNEL)
    np.testing.assert_allclose(found["z"], np.log(np.exp(logits).sum()) ** 2, rtol=1e-5)


def test_balanced_routing_costs_one_and_collapse_costs_e():
    balanced = jnp.tile(jnp.eye(E), (4, 1))
    ones = jnp.ones(12)
    loss = routing.losses.load_balancing
    assert loss(balanced, balanced, ones) == pytest.approx(1.0)
    collapsed = jnp.tile(jnp.eye(E)[:1], (12, 1))
    assert loss(collapsed, collapsed, ones) == pytest.approx(E)
    assert loss(collapsed, collapsed, 0 * ones) == 0.0  # nothing but padding


def test_load_balancing_pushes_the_crowded_expert_down():
    def objective(kernel):
        router = routing.TokenRouter(E)
        positive = site(wants_losses=True, router_input=jnp.abs(X))
        _, sowed = router.apply({"params": {"kernel": kernel}}, positive, mutable=["router_losses"])
        return routing.losses.total(sowed["router_losses"], load_balancing_weight=1.0)

    grad = jax.grad(objective)(jnp.zeros((D, E)).at[:, 1].set(1.0))
    assert (grad[:, 1] > 0).all()
    assert (grad[:, [0, 2]] < 0).all()


def test_total_weighs_means_over_routers():
    collection = {
        "a": {"router": {"load_balancing": jnp.array([1.0, 3.0]), "z": jnp.array([1.0, 1.0])}},
        "b": {"router": {"load_balancing": jnp.array(2.0), "z": jnp.array(4.0)}},
    }
    assert routing.losses.total(collection, 0.5, 0.1) == pytest.approx(0.5 * 2.0 + 0.1 * 2.0)
    assert routing.losses.total({}, 0.5, 0.1) == 0.0


def test_one_expert_has_no_losses():
    variables = {"params": {"kernel": jnp.ones((D, 1))}}
    _, sowed = routing.TokenRouter(1).apply(
        variables, site(wants_losses=True), mutable=["router_losses"]
    )
    assert not sowed


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: routing.TokenRouter(0), "num_experts is 0"),
        (lambda: routing.TokenRouter(3, top_k=4), "top_k is 4, more than num_experts, 3"),
        (lambda: routing.TokenRouter(3, top_k=0), "top_k is 0"),
        (lambda: routing.TokenRouter(3, jitter=1.0), "jitter is 1.0"),
        (
            lambda: routing.TokenRouter(3).apply(VARIABLES, site(mask=MASK[:, :2])),
            r"mask of its tokens has shape \(2, 2\)",
        ),
        (
            lambda: routing.TokenRouter(3).apply(VARIABLES, site(wants_losses=True)),
            "has to lift them",
        ),
    ],
)
def test_mistakes(make, message):
    with pytest.raises(errors.UserError, match=message):
        make()
