"""Task routers: laws, noise, gradients of logits."""

import functools

from hypothesis import given, settings
from hypothesis import strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_peft import errors, routing
from moe_peft.routing import task_routers

IDS = jnp.asarray([2, 0, 2, 1])


def site(**options):
    context = routing.RoutingContext(task_ids=options.pop("task_ids", IDS))
    return routing.Site(router_input=jnp.ones((4, 3, 5)), context=context, **options)


def weights(router, logits=None, rng=None):
    variables = {} if logits is None else {"params": {"logits": logits}}
    rngs = {} if rng is None else {"routing": rng}
    return np.asarray(router.apply(variables, site(has_rng=rng is not None), rngs=rngs))


def test_weights_of_learned_routers():
    logits = jnp.asarray(np.random.default_rng(0).normal(size=(3, 2, 4)) * 3)
    router = routing.TaskRouter(4, 2, num_tasks=3, relaxed=False)
    z = 1 / (1 + np.exp(-np.asarray(logits, np.float64)))[IDS]
    expected = z / z.sum(-1, keepdims=True)
    np.testing.assert_allclose(weights(router, logits), expected, rtol=1e-5)
    # Without noise an rng changes nothing; with it, evaluation (no rng) is the same as without.
    np.testing.assert_allclose(weights(router, logits, jax.random.key(0)), expected, rtol=1e-5)
    relaxed = routing.TaskRouter(4, 2, num_tasks=3, relaxed=True)
    np.testing.assert_allclose(weights(relaxed, logits), expected, rtol=1e-5)


def test_gumbel_sigmoid_noise_is_logistic_and_independent_per_example():
    """P(z > 1/2) = sigmoid(logit): the relaxed Bernoulli's median; examples differ."""
    logits = jnp.full((1, 1, 2), 1.2)
    router = routing.TaskRouter(2, num_tasks=1, relaxed=True)
    context = routing.RoutingContext()
    draw = functools.partial(router.weights, logits, context, num_rows=4)
    found = np.asarray(jax.vmap(draw)(jax.random.split(jax.random.key(0), 20_000)))
    assert found.shape == (20_000, 4, 1, 2)
    assert len(np.unique(found[0, :, 0, 0])) == 4
    # w_0 > 1/2 just when the noise of skill 0 beats that of skill 1; z itself is not visible in w.
    np.testing.assert_allclose((found[..., 0] > 0.5).mean(), 0.5, atol=0.01)
    unnormalised = found[..., 0] / found[..., 1]  # z_0 / z_1
    assert unnormalised.std() > 0.5
    # The law of z, through a second skill whose z is 1.
    logits = jnp.asarray([[[1.2, 60.0]]])
    draw = functools.partial(router.weights, logits, context, num_rows=4)
    found = np.asarray(jax.vmap(draw)(jax.random.split(jax.random.key(0), 20_000)))
    z = found[..., 0] / found[..., 1]
    np.testing.assert_allclose((z > 0.5).mean(), 1 / (1 + np.exp(-1.2)), atol=0.01)


def test_straight_through_rounds_forward_and_not_backward():
    logits = jnp.asarray(np.random.default_rng(0).normal(size=(3, 2, 4)))
    rounded = routing.TaskRouter(4, 2, num_tasks=3, relaxed=False, straight_through=True)
    found = weights(rounded, logits)
    on = np.asarray(logits)[IDS] > 0
    np.testing.assert_allclose(found, on / np.maximum(on.sum(-1, keepdims=True), 1), rtol=1e-6)

    def objective(logits):
        w = rounded.apply({"params": {"logits": logits}}, site())
        return jnp.sum(w * jnp.arange(4.0)[None, None])

    assert np.all(np.abs(jax.grad(objective)(logits)[jnp.asarray([0, 1, 2])]).max(-1) > 1e-3)


def test_logits_of_absent_tasks_have_no_gradient():
    router = routing.TaskRouter(4, 2, num_tasks=5, relaxed=False)
    logits = jnp.zeros((5, 2, 4))
    objective = lambda x: jnp.sum(router.apply({"params": {"logits": x}}, site()) ** 2 * 3)
    skewed = logits + jnp.arange(4.0)[None, None]
    grads = jax.grad(objective)(skewed)
    assert not np.any(grads[3:])
    assert np.all(np.abs(grads[:3]).max(axis=(1, 2)) > 0)


@settings(deadline=None, max_examples=20)
@given(st.integers(1, 9), st.integers(1, 4), st.integers(0, 5))
def test_random_allocations(num_skills, num_tasks, seed):
    """Exactly half of the skills, rounded up; other paths and seeds draw again."""
    router = routing.RandomTaskRouter(num_skills, num_tasks=num_tasks, seed=seed)
    table = router.allocation("a/b")
    assert table.shape == (num_tasks, num_skills)
    np.testing.assert_array_equal((table > 0).sum(-1), -(-num_skills // 2))
    np.testing.assert_allclose(table.sum(-1), 1, rtol=1e-6)
    np.testing.assert_array_equal(table, router.allocation("a/b"))
    if num_skills > 7 and num_tasks > 3:
        assert np.any(table != router.allocation("a/c"))
        other = routing.RandomTaskRouter(num_skills, num_tasks=num_tasks, seed=seed + 1)
        assert np.any(table != other.allocation("a/b"))


def test_random_examples():
    router = routing.RandomExampleRouter(8, 3)
    uniform = weights(router)
    np.testing.assert_allclose(uniform, np.full((1, 3, 8), 1 / 8))
    draw = jax.vmap(lambda key: router.apply({}, site(has_rng=True), rngs={"routing": key}))
    found = np.asarray(draw(jax.random.split(jax.random.key(0), 300))).reshape(-1, 3, 8)
    np.testing.assert_allclose(found.sum(-1), 1, rtol=1e-6)
    np.testing.assert_array_equal(found, found[:, :1].repeat(3, axis=1))
    np.testing.assert_allclose((found > 0).mean(), 0.5, atol=0.03)
    one = np.concatenate(
        [weights(routing.RandomExampleRouter(1), rng=jax.random.key(k)) for k in range(20)]
    )
    np.testing.assert_array_equal(one, 1.0)  # at least one is on


def test_private_routers():
    found = weights(routing.PrivateRouter(3, 2))
    np.testing.assert_array_equal(found, np.eye(3)[IDS][:, None].repeat(2, axis=1))


def test_mistakes():
    for router in (
        routing.TaskRouter(4, num_tasks=3),
        routing.RandomTaskRouter(4, num_tasks=3),
        routing.PrivateRouter(4),
    ):
        with pytest.raises(errors.UserError, match="no feature 'task_ids'"):
            router.init(jax.random.key(0), site(task_ids=None))
    with pytest.raises(errors.UserError, match="num_tasks is 0"):
        routing.TaskRouter(4, num_tasks=0)
    assert task_routers.EPSILON == 1e-12
