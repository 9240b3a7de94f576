"""Skilled LoRA and (IA)3 against plain NumPy, and the identities between Poly, MHR and LoRA."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_peft import adapters, errors, routing

B, T, IN, OUT, TASKS = 3, 4, 12, 24, 5
TABLE = {
    "poly": functools.partial(adapters.SkilledLoRA, num_skills=4, rank=2),
    "mhr": functools.partial(adapters.SkilledLoRA, num_skills=4, num_splits=3, rank=2, alpha=3.0),
    "poly_ia3": functools.partial(adapters.SkilledIA3, num_skills=4),
    "mhr_ia3": functools.partial(adapters.SkilledIA3, num_skills=4, num_splits=6),
}
IDS = np.array([4, 0, 4])

task_router = functools.partial(routing.TaskRouter, num_tasks=TASKS)


def arrays(dtype=jnp.float32, task_ids=IDS, **site):
    """Inputs [b, t, i], outputs [b, t, h, k] of a projection to heads, and the site."""
    rng = np.random.default_rng(0)
    inputs = jnp.asarray(rng.normal(size=(B, T, IN)), dtype)
    outputs = jnp.asarray(rng.normal(size=(B, T, 4, OUT // 4)), dtype)
    context = routing.RoutingContext(task_ids=task_ids)
    site = {"router_input": inputs, "context": context, "out_axes": ("heads", "kv"), **site}
    return inputs, outputs, routing.Site(**site)


def trained(adapter, seed=1):
    """Parameters far from their initial values."""
    inputs, outputs, site = arrays()
    init = lambda key: adapter.init(key, inputs, outputs, site)["params"]
    params = jax.eval_shape(init, jax.random.key(0))
    leaves, treedef = jax.tree.flatten(params)
    rng = np.random.default_rng(seed)
    return treedef.unflatten([jnp.asarray(rng.normal(size=x.shape), x.dtype) for x in leaves])


def apply(adapter, params, inputs, outputs, site):
    """The adapter as one program."""
    run = lambda params: adapter.apply({"params": params}, inputs, outputs, site)
    return jax.jit(run)(params)


def numpy_weights(logits, noise=0.0):
    """[n, p, s] -> [b, p, s] as the papers write it."""
    z = 1 / (1 + np.exp(-(np.asarray(logits, np.float64)[IDS] + noise)))
    return z / (z.sum(-1, keepdims=True) + 1e-12)


def numpy_adapter(params, inputs, outputs, weights, alpha=1.0):
    """Example by example, split by split, in float64."""
    params = {name: np.asarray(value, np.float64) for name, value in params.items()}
    y = np.asarray(outputs, np.float64).reshape(B, T, OUT).copy()
    for b in range(B):
        if "vectors" in params:
            skills, splits, _ = params["vectors"].shape
            parts = [weights[b, p] @ params["vectors"][:, p] for p in range(splits)]
            y[b] *= np.concatenate(parts)
            continue
        splits, skills, _, rank = params["lora_a"].shape
        blocks = {
            name: [
                sum(weights[b, p, s] * params[name][p, s] for s in range(skills))
                for p in range(splits)
            ]
            for name in ("lora_a", "lora_b")
        }
        a = np.concatenate(blocks["lora_a"], axis=0)
        up = np.concatenate(blocks["lora_b"], axis=1)
        y[b] += alpha / rank * np.asarray(inputs[b], np.float64) @ a @ up
    return y.reshape(outputs.shape)


def without_router(params):
    return {name: value for name, value in params.items() if name != "router"}


@pytest.mark.parametrize("name", TABLE)
def test_values_equal_numpy_and_fresh_is_identity(name):
    inputs, outputs, site = arrays()
    adapter = TABLE[name](router_factory=task_router)
    run = jax.jit(lambda variables: adapter.apply(variables, inputs, outputs, site))
    fresh = jax.jit(lambda key: adapter.init(key, inputs, outputs, site))(jax.random.key(0))
    # (IA)3: weights sum to one within float32 rounding.
    np.testing.assert_allclose(run(fresh), outputs, rtol=1e-6)
    params = trained(adapter)
    result = run({"params": params})
    weights = numpy_weights(params["router"]["logits"])
    alpha = getattr(adapter, "alpha", 1.0)
    expected = numpy_adapter(without_router(params), inputs, outputs, weights, alpha)
    assert np.abs(expected - outputs).max() > 0.1
    np.testing.assert_allclose(result, expected, rtol=2e-5, atol=2e-5)


def test_gradients_equal_finite_differences():
    """Of every leaf, in float64 NumPy along one random direction."""
    inputs, outputs, site = arrays()
    adapter = TABLE["mhr"](router_factory=task_router)
    params = trained(adapter)
    probe = np.random.default_rng(5).normal(size=outputs.shape)
    objective = lambda p: jnp.vdot(adapter.apply({"params": p}, inputs, outputs, site), probe)
    grads = jax.jit(jax.grad(objective))(params)
    flat, treedef = jax.tree.flatten(params)
    for index, grad in enumerate(jax.tree.leaves(grads)):
        direction = np.random.default_rng(index).normal(size=grad.shape)

        def value(step, index=index, direction=direction):
            moved = [np.asarray(leaf, np.float64) for leaf in flat]
            moved[index] = moved[index] + step * direction
            moved = treedef.unflatten(moved)
            weights = numpy_weights(moved["router"]["logits"])
            return np.vdot(
                numpy_adapter(without_router(moved), inputs, outputs, weights, 3.0), probe
            )

        slope = (value(1e-5) - value(-1e-5)) / 2e-5
        np.testing.assert_allclose(np.vdot(grad, direction), slope, rtol=1e-4)


def test_initial_laws():
    """A within 1/sqrt(3 in) with the full width also when split, B zero, logits within 1e-3."""
    adapter = adapters.SkilledLoRA(num_skills=64, num_splits=3, rank=4, router_factory=task_router)
    params = adapter.init(jax.random.key(0), *arrays())["params"]
    bound = 1 / np.sqrt(3 * IN)
    a = np.asarray(params["lora_a"])
    assert a.shape == (3, 64, IN // 3, 4)
    assert params["lora_b"].shape == (3, 64, 4, OUT // 3)
    assert np.abs(a).max() <= bound
    np.testing.assert_allclose(a.std(), bound / np.sqrt(3), rtol=0.05)
    assert not np.any(params["lora_b"])
    logits = np.asarray(params["router"]["logits"])
    assert logits.shape == (TASKS, 3, 64)
    assert 5e-4 < np.abs(logits).max() <= 1e-3


def test_only_b_has_gradient_at_the_first_step():
    """B = 0 makes A and the logits wait; equal (IA)3 vectors make the logits wait."""
    inputs, outputs, site = arrays()
    for name in TABLE:
        adapter = TABLE[name](router_factory=task_router)

        def gradients(key, a=adapter):
            params = a.init(key, inputs, outputs, site)["params"]
            return jax.grad(
                lambda p: jnp.sum(jnp.sin(a.apply({"params": p}, inputs, outputs, site)))
            )(params)

        grads = jax.jit(gradients)(jax.random.key(0))
        moving = "vectors" if "ia3" in name else "lora_b"
        assert jnp.abs(grads[moving]).max() > 1e-2
        # Rounding of weights that cancel: sum_s dw_s = 0 in exact arithmetic.
        assert jnp.abs(grads["router"]["logits"]).max() < 1e-5
        if "ia3" not in name:
            assert not np.any(grads["lora_a"])


def test_one_split_of_equal_modules_is_any_number_of_splits():
    """MHR with the same weights in every split is Poly."""
    inputs, outputs, site = arrays()
    poly, mhr = (
        TABLE["poly"](router_factory=task_router),
        TABLE["mhr"](router_factory=task_router, alpha=1.0),
    )
    params = trained(poly)
    a, b = params["lora_a"][0], params["lora_b"][0]  # [s, i, r], [s, r, o]
    split = {
        "lora_a": jnp.stack(jnp.split(a, 3, axis=1)),
        "lora_b": jnp.stack(jnp.split(b, 3, axis=2)),
        "router": {"logits": jnp.repeat(params["router"]["logits"], 3, axis=1)},
    }
    np.testing.assert_allclose(
        apply(mhr, split, inputs, outputs, site),
        apply(poly, params, inputs, outputs, site),
        rtol=1e-5,
        atol=1e-5,
    )


def test_one_skill_is_lora():
    inputs, outputs, site = arrays()
    adapter = adapters.SkilledLoRA(
        num_skills=1, num_splits=3, rank=2, alpha=3.0, router_factory=task_router
    )
    params = trained(adapter)
    lora = adapters.LoRA(rank=2, alpha=3.0)
    single = {
        "lora_a": params["lora_a"][:, 0].reshape(IN, 2),
        "lora_b": jnp.moveaxis(params["lora_b"][:, 0], 0, 1).reshape(2, 4, OUT // 4),
    }
    np.testing.assert_allclose(
        apply(adapter, params, inputs, outputs, site),
        apply(lora, single, inputs, outputs, site),
        rtol=1e-5,
        atol=1e-5,
    )


def test_uniform_weights_are_the_mean_adapter_and_one_hot_weights_one_module():
    inputs, outputs, site = arrays()
    uniform = TABLE["mhr"](router_factory=routing.UniformSkillRouter)
    params = trained(uniform)
    mean = {name: leaf.mean(axis=1, keepdims=True) for name, leaf in params.items()}
    one = adapters.SkilledLoRA(
        num_skills=1, num_splits=3, rank=2, alpha=3.0, router_factory=routing.UniformSkillRouter
    )
    np.testing.assert_allclose(
        apply(uniform, params, inputs, outputs, site),
        apply(one, mean, inputs, outputs, site),
        rtol=1e-5,
        atol=1e-5,
    )
    private = TABLE["mhr"](router_factory=routing.PrivateRouter)
    inputs, outputs, site = arrays(task_ids=np.array([2, 2, 2]))
    module = {name: leaf[:, 2:3] for name, leaf in params.items()}
    np.testing.assert_allclose(
        apply(private, params, inputs, outputs, site),
        apply(one, module, inputs, outputs, site),
        rtol=1e-5,
        atol=1e-5,
    )


def test_weights_of_a_split_move_its_block_only():
    """Rows p of A and columns p of B belong to split p; the rank is not split."""
    params = trained(TABLE["mhr"](router_factory=task_router))
    weights = jnp.full((1, 3, 4), 0.25)
    other = weights.at[0, 1].set(jnp.asarray([0.7, 0.1, 0.1, 0.1]))
    a, b = adapters.poly.mix_lora(weights, params["lora_a"], params["lora_b"])
    changed_a, changed_b = adapters.poly.mix_lora(other, params["lora_a"], params["lora_b"])
    rows = np.flatnonzero(np.any(np.asarray(a != changed_a)[0], axis=1))
    columns = np.flatnonzero(np.any(np.asarray(b != changed_b)[0], axis=0))
    assert rows.tolist() == list(range(4, 8))
    assert columns.tolist() == list(range(8, 16))


@pytest.mark.parametrize("name", TABLE)
def test_one_row_of_logits_serves_every_example(name):
    """As many copies of the row, looked up by task id, give the same numbers and gradients."""
    inputs, outputs, site = arrays()
    many = TABLE[name](router_factory=task_router)
    one = TABLE[name](router_factory=functools.partial(routing.TaskRouter, num_tasks=1))
    params = trained(one)
    row = params["router"]["logits"]
    copies = {**params, "router": {"logits": jnp.repeat(row, TASKS, axis=0)}}
    run = lambda adapter, p: jnp.sin(adapter.apply({"params": p}, inputs, outputs, site)).sum()
    value, grads = jax.jit(jax.value_and_grad(functools.partial(run, one)))(params)
    expected, wanted = jax.jit(jax.value_and_grad(functools.partial(run, many)))(copies)
    np.testing.assert_allclose(value, expected, rtol=1e-5)
    wanted["router"]["logits"] = wanted["router"]["logits"].sum(0, keepdims=True)
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=2e-4, atol=2e-4), grads, wanted)


def test_dtype_of_outputs_is_kept():
    inputs, outputs, site = arrays(jnp.bfloat16)
    for name in TABLE:
        adapter = TABLE[name](router_factory=task_router)
        init = lambda a=adapter: a.init_with_output(jax.random.key(0), inputs, outputs, site)
        result, variables = jax.eval_shape(init)
        assert {leaf.dtype for leaf in jax.tree.leaves(variables["params"])} == {jnp.float32.dtype}
        assert result.dtype == jnp.bfloat16


def test_mistakes():
    with pytest.raises(errors.UserError, match="5 splits do not divide the inputs, 12 wide"):
        adapters.SkilledLoRA(num_splits=5).init(jax.random.key(0), *arrays())
    with pytest.raises(errors.UserError, match="num_skills is 0"):
        adapters.SkilledIA3(num_skills=0)
    adapter = TABLE["poly"](router_factory=task_router)
    params = trained(adapter)
    with pytest.raises(errors.UserError, match="no feature 'task_ids'"):
        adapter.apply({"params": params}, *arrays(task_ids=None))
    with pytest.raises(errors.UserError, match="3 examples, but the batch has 2 task ids"):
        adapter.apply({"params": params}, *arrays(task_ids=np.array([0, 1])))
