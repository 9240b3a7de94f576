import importlib.util
import pathlib

import gin
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_peft import errors
from moe_peft.cli import main
from moe_peft.training import optimizers

RNG = np.random.default_rng(0)


def _tree(**shapes):
    return {name: RNG.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}


def _one_group(path):
    del path
    return "adapters"


def _train(optimizer, params, gradients, group_of=_one_group):
    """Returns the parameters after one update per gradient."""
    transform = optimizer.build(params, group_of)
    update = jax.jit(transform.update)
    state = jax.jit(transform.init)(params)
    for grads in gradients:
        updates, state = update(grads, state, params)
        params = jax.tree.map(lambda p, u: p + np.asarray(u), params, updates)
    return params


class NumpyAdafactor:
    """Adafactor for one leaf, written from the paper (Shazeer and Stern 2018), in float64.

    Algorithms 4 (matrices) and 5 (the rest) with relative step sizes, update clipping and
    beta2_t = 1 - t^-0.8.
    """

    def __init__(self, param, lr, factored=False, scale=True, offset=0, threshold=1.0):
        self.param = param.astype(np.float64)
        self.lr, self.factored, self.scale, self.offset = lr, factored, scale, offset
        self.threshold, self.t = threshold, 0
        self.rows, self.columns, self.v = 0.0, 0.0, 0.0

    def update(self, grad):
        self.t += 1
        beta = 1.0 - float(self.t + self.offset) ** -0.8
        squares = grad.astype(np.float64) ** 2 + 1e-30
        if self.factored:
            self.rows = beta * self.rows + (1 - beta) * squares.sum(axis=1)
            self.columns = beta * self.columns + (1 - beta) * squares.sum(axis=0)
            v = np.outer(self.rows, self.columns) / self.rows.sum()
        else:
            v = self.v = beta * self.v + (1 - beta) * squares
        u = grad / np.sqrt(v)
        u /= max(1.0, _rms(u) / self.threshold)
        size = max(_rms(self.param), 1e-3) if self.scale else 1.0
        self.param = self.param - self.lr * size * u


def _rms(x):
    return np.sqrt(np.mean(np.square(x)))


@pytest.mark.parametrize("scale", [True, False])
@pytest.mark.parametrize("offset", [0, 1_100_000])
def test_adafactor_is_the_papers(scale, offset):
    params = _tree(matrix=(5, 4), vector=(7,), experts=(3, 5, 4)) | {"zeros": np.zeros((2, 3))}
    params = {name: leaf.astype(np.float32) for name, leaf in params.items()}
    gradients = [_tree(matrix=(5, 4), vector=(7,), experts=(3, 5, 4), zeros=(2, 3)) for _ in "123"]
    optimizer = optimizers.adafactor(
        0.1, resumed_step_offset=offset, multiply_by_parameter_scale=scale
    )
    found = _train(optimizer, params, gradients)
    for name, param in params.items():
        want = NumpyAdafactor(param, 0.1, scale=scale, offset=offset)
        for grads in gradients:
            want.update(grads[name])
        np.testing.assert_allclose(found[name], want.param, rtol=2e-4, atol=1e-6, err_msg=name)


def test_adafactor_factors_large_matrices_only():
    params = _tree(large=(9, 8), narrow=(9, 2))
    gradients = [_tree(large=(9, 8), narrow=(9, 2)) for _ in range(3)]
    optimizer = optimizers.adafactor(0.1, min_dim_size_to_factor=8)
    found = _train(optimizer, params, gradients)
    for name, is_factored in (("large", True), ("narrow", False)):
        want = NumpyAdafactor(params[name], 0.1, factored=is_factored)
        for grads in gradients:
            want.update(grads[name])
        np.testing.assert_allclose(found[name], want.param, rtol=1e-4, atol=1e-6, err_msg=name)


def test_resumed_offset_keeps_the_clip_at_work():
    """With the offset v is nearly a sum: u starts near 1 / sqrt(1 - beta2) = 261 and is clipped."""
    params, gradients = {"a": np.ones((4,), np.float32)}, [{"a": np.ones((4,), np.float32)}] * 2
    for threshold, step in ((1.0, 1e-3), (1e9, 0.261)):
        optimizer = optimizers.adafactor(
            1e-3, resumed_step_offset=1_100_000, clipping_threshold=threshold
        )
        found = _train(optimizer, params, gradients[:1])
        np.testing.assert_allclose(1.0 - found["a"], step, rtol=2e-3)


def test_adafactor_treats_stacked_layers_one_by_one():
    layers = [_tree(kernel=(9, 8), scale=(6,)) for _ in range(3)]
    layers[1]["kernel"] *= 100.0  # One common RMS would be dominated by this layer.
    gradients = [_tree(kernel=(9, 8), scale=(6,)) for _ in range(3)]

    def stacked(trees):
        return jax.tree.map(lambda *leaves: np.stack(leaves, axis=1), *trees)

    optimizer = optimizers.adafactor(0.1, min_dim_size_to_factor=8)
    scanned = {"encoder": {"encoder": stacked(layers)}, "head": layers[0]}
    scanned_grads = {"encoder": {"encoder": stacked(gradients)}, "head": gradients[0]}
    found = _train(optimizer, scanned, [scanned_grads, scanned_grads])
    want = [_train(optimizer, p, [g, g]) for p, g in zip(layers, gradients)]
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5),
        found,
        {"encoder": {"encoder": stacked(want)}, "head": want[0]},
    )


def test_stacks_of_different_depth_go_together():
    params = {
        "encoder": {"encoder": _tree(kernel=(3, 2, 4))},
        "decoder": {"decoder": _tree(kernel=(3, 5, 4))},
    }
    found = _train(optimizers.adafactor(0.1), params, [params])
    assert jax.tree.map(np.shape, found) == jax.tree.map(np.shape, params)


def test_adamw_decays_adapters_but_not_routers():
    params = {"a": np.full(3, 2.0, np.float32), "router": np.full(3, 2.0, np.float32)}
    grads = jax.tree.map(np.ones_like, params)
    found = _train(
        optimizers.adamw(0.1, weight_decay=0.5),
        params,
        [grads],
        lambda path: "routers" if path == "router" else "adapters",
    )
    # The first Adam step is the sign of the gradient.
    np.testing.assert_allclose(found["a"], 2.0 - 0.1 * (1.0 + 0.5 * 2.0), rtol=1e-5)
    np.testing.assert_allclose(found["router"], 2.0 - 0.1, rtol=1e-5)


def test_adamw_is_the_papers():
    params, gradients = _tree(a=(4, 3)), [_tree(a=(4, 3)) for _ in range(4)]
    found = _train(optimizers.adamw(0.1, b1=0.8, b2=0.9, epsilon=1e-3), params, gradients)
    param, m, v = params["a"].astype(np.float64), 0.0, 0.0
    for t, grads in enumerate(gradients, start=1):
        m = 0.8 * m + 0.2 * grads["a"]
        v = 0.9 * v + 0.1 * grads["a"] ** 2
        param = param - 0.1 * (m / (1 - 0.8**t)) / (np.sqrt(v / (1 - 0.9**t)) + 1e-3)
    np.testing.assert_allclose(found["a"], param, rtol=1e-5)


@pytest.mark.parametrize("router_rate", [0.5, lambda step: jnp.float32(0.05)])
def test_groups_are_multipliers_or_schedules(router_rate):
    params = {"a": np.ones(3, np.float32), "router": np.ones(3, np.float32)}
    group_of = lambda path: "routers" if path == "router" else "adapters"
    optimizer = optimizers.adamw(0.1, groups={"routers": router_rate})
    found = _train(optimizer, params, [jax.tree.map(np.ones_like, params)], group_of)
    np.testing.assert_allclose(found["a"], 0.9, rtol=1e-5)
    np.testing.assert_allclose(found["router"], 0.95, rtol=1e-5)
    rates = optimizer.learning_rates(params, group_of)(0)
    assert {name: round(float(rate), 6) for name, rate in rates.items()} == {
        "learning_rate/adapters": 0.1,
        "learning_rate/routers": 0.05,
    }


def test_unknown_group_is_refused_with_a_near_name():
    with pytest.raises(errors.UserError, match="adamw.groups is 'router'.*Did you mean 'routers'"):
        optimizers.adamw(0.1, groups={"router": 0.5})


def test_another_list_of_groups_without_decay_is_described():
    described = [
        optimizers.adamw(0.1, weight_decay=0.5, no_decay_groups=groups).describe()
        for groups in (("routers",), (), ("base", "routers"))
    ]
    assert "no_decay_groups" not in described[0]  # as version 0.1 wrote it
    assert described[1]["no_decay_groups"] == []
    assert described[2]["no_decay_groups"] == ["base", "routers"]


def test_clipping_is_over_all_leaves():
    params = {"a": np.zeros(3, np.float32), "b": np.zeros(4, np.float32)}
    grads = {"a": np.full(3, 2.0, np.float32), "b": np.full(4, 2.0, np.float32)}
    clipped = 2.0 / (2.0 * np.sqrt(7))
    # Adam's epsilon dominates, so the size of the gradient is seen: g / (|g| + 1).
    found = _train(optimizers.adamw(1.0, epsilon=1.0, clip_norm=1.0), params, [grads])
    for leaf in found.values():
        np.testing.assert_allclose(leaf, -clipped / (clipped + 1.0), rtol=1e-5)


def test_schedule_counts_from_zero():
    seen = lambda step: jnp.asarray([0.5, 0.25, 0.0])[jnp.minimum(step, 2)]
    params = {"a": np.zeros(2, np.float32)}
    found = _train(optimizers.adamw(seen), params, [jax.tree.map(np.ones_like, params)] * 2)
    np.testing.assert_allclose(found["a"], -0.75, rtol=1e-5)


GOLDEN = pathlib.Path(__file__).parents[1] / "golden"


def _check_hugging_face(arrays):
    def of(part):
        return {k.split("/")[1]: v for k, v in arrays.items() if k.startswith(f"{part}/")}

    start, gradients = of("start"), of("gradients")
    steps = [{name: g[i] for name, g in gradients.items()} for i in range(6)]
    for run in ("scaled", "unscaled"):
        optimizer = optimizers.adafactor(
            0.05, factoring="last_two", multiply_by_parameter_scale=run == "scaled"
        )
        found, want = _train(optimizer, start, steps), of(run)
        assert set(found) == set(want) == {"one", "two", "zeros", "three", "four"}
        for name in want:
            np.testing.assert_allclose(found[name], want[name], rtol=1e-5, atol=1e-6, err_msg=name)


def test_last_two_is_hugging_face_as_stored():
    _check_hugging_face(dict(np.load(GOLDEN / "adafactor.npz")))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_last_two_is_hugging_face_as_installed():
    pytest.importorskip("torch")
    pytest.importorskip("transformers")
    path = GOLDEN / "make_adafactor_golden.py"
    spec = importlib.util.spec_from_file_location("adafactor_golden", path)
    golden = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(golden)
    _check_hugging_face(golden.compute())


def test_t5x_and_hugging_face_agree_on_what_neither_factors():
    params = _tree(vector=(40,), matrix=(4, 5))
    gradients = [_tree(vector=(40,), matrix=(4, 5)) for _ in range(4)]
    t5x, hugging_face = (
        _train(optimizers.adafactor(0.1, factoring=how), params, gradients)
        for how in ("two_largest", "last_two")
    )
    np.testing.assert_allclose(t5x["vector"], hugging_face["vector"], rtol=1e-6, atol=1e-7)
    assert np.max(np.abs(t5x["matrix"] - hugging_face["matrix"])) > 1e-3  # Factored by one only.


# Our shape of a leaf, with what else its adapter holds, and the shape in the papers' code.
PUBLISHED = {
    "logits": ({"logits": (5, 2, 3)}, "logits", (5, 6)),
    "lora query": ({"lora_a": (6, 2), "lora_b": (2, 3, 4)}, "lora_b", (2, 12)),
    "lora out": ({"lora_a": (3, 4, 2), "lora_b": (2, 6)}, "lora_a", (12, 2)),
    "ia3 key": ({"vectors": (3, 4)}, "vectors", (12,)),
    "skilled": ({"lora_a": (2, 3, 4, 2), "lora_b": (2, 3, 2, 4)}, "lora_a", (2, 3, 4, 2)),
    "molora": ({"lora_a": (6, 3, 2), "lora_b": (3, 2, 4)}, "lora_b", (3, 2, 4)),
}


@pytest.mark.parametrize("is_stacked", [False, True])
def test_last_two_are_those_of_the_published_shapes(is_stacked):
    """Of all cases in one program: no layer's moments depend on another's."""
    params = {case: _tree(**shapes) for case, (shapes, _, _) in PUBLISHED.items()}
    gradients = [{case: _tree(**PUBLISHED[case][0]) for case in PUBLISHED} for _ in range(3)]

    def nest(trees):
        nested = {case: {"adapter": tree} for case, tree in trees.items()}
        if not is_stacked:
            return nested
        stacked = jax.tree.map(lambda v: np.stack([v, 2 * v], 1), nested)
        return {"encoder": {"encoder": stacked}, "adapter": {"vectors": np.ones(3, np.float32)}}

    def flat(trees):
        return {
            case: trees[case][leaf].reshape(published)
            for case, (_, leaf, published) in PUBLISHED.items()
        }

    optimizer = optimizers.adafactor(0.1, factoring="last_two")
    found = _train(optimizer, nest(params), [nest(g) for g in gradients])
    found = found["encoder"]["encoder"] if is_stacked else found
    wanted = _train(optimizer, flat(params), [flat(g) for g in gradients])
    for case, (_, leaf, published) in PUBLISHED.items():
        first = found[case]["adapter"][leaf]
        first = first[:, 0] if is_stacked else first
        np.testing.assert_allclose(first.reshape(published), wanted[case], rtol=1e-5, err_msg=case)


def test_last_two_keeps_rows_and_columns():
    params = _tree(a=(3, 40, 50))
    state = optimizers.adafactor(0.1, factoring="last_two").build(params, _one_group).init(params)
    assert sum(leaf.size for leaf in jax.tree.leaves(state)) < 3 * (40 + 50) + 10


@pytest.mark.parametrize("factoring", ["two_largest", "last_two"])
def test_epsilon_is_added_to_squared_gradients(factoring):
    options = {"factoring": factoring, "multiply_by_parameter_scale": False}
    params = {"vector": np.zeros(3, np.float32), "matrix": np.zeros((2, 3), np.float32)}
    ones, zeros = jax.tree.map(np.ones_like, params), params
    for leaf in _train(optimizers.adafactor(0.1, epsilon=3.0, **options), params, [ones]).values():
        np.testing.assert_allclose(leaf, -0.1 / np.sqrt(1 + 3), rtol=1e-5)
    # What has no gradient, such as a LoRA's A while B is 0, is not divided by 0.
    for leaf in _train(optimizers.adafactor(0.1, **options), params, [zeros]).values():
        np.testing.assert_array_equal(leaf, 0.0)


def test_unknown_factoring_is_refused():
    with pytest.raises(errors.UserError, match="is 'last'; expected one of two_largest, last_two"):
        optimizers.adafactor(0.1, factoring="last")


@pytest.mark.parametrize("name", ["adafactor_mhr", "adamw_mhr"])
def test_logits_follow_the_adapters_schedule_to_one_tenth(name):
    files = ["models/tiny.gin", "methods/ia3.gin", "data/cldr.gin", "runs/train.gin"]
    bindings = ["BACKBONE=random:0", "BATCH_SIZE=8", "TRAIN_STEPS=100", "MODEL_DIR=/nowhere"]
    try:
        main.configure("train", [*files, f"optimizers/{name}.gin"], bindings)
        optimizer = gin.query_parameter("%OPTIMIZER").scoped_configurable_fn()
    finally:
        gin.clear_config()
    for step, part in ((0, 0.0), (3, 0.5), (6, 1.0), (53, 0.5), (100, 0.0)):
        np.testing.assert_allclose(optimizer.schedule("routers")(step), 0.1 * part, rtol=1e-6)
        np.testing.assert_allclose(optimizer.schedule("adapters")(step), 1e-3 * part, rtol=1e-6)
    assert optimizer.clip_norm == {"adafactor_mhr": 1.0, "adamw_mhr": 0.1}[name]
