"""T5X's optimisers on what a method trains: one step is the built-in trainer's."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from moe_peft import errors, methods, patching
from moe_peft.training import optimizers, step

METHODS = {
    "mov": lambda: methods.mov(num_experts=3),
    "molora": lambda: methods.molora(num_experts=3),
    "mhr": lambda: methods.mhr(3, num_skills=2, num_splits=2),
}
RATE = 3e-2

pytestmark = pytest.mark.slow


@pytest.fixture
def t5x(guest):
    return guest.load("moe_peft.t5x.adapted", "moe_peft.t5x.trainable")


def steps(guest, model, params, axes, count, rate=RATE):
    """T5X's own train step, `count` times."""
    created = guest.T5X.train_state.FlaxOptimTrainState.create(
        model.optimizer_def, {"params": params, "params_axes": axes}
    )
    update = jax.jit(
        lambda found: guest.T5X.trainer.train_with_lr(
            found, guest.BATCH, jnp.asarray(rate), None, model, num_microbatches=None
        )[0]
    )
    for _ in range(count):
        created = update(created)
    return created


@pytest.mark.parametrize(
    ("network", "name"), [("t5", "mov"), ("t5", "molora"), ("t5", "mhr"), ("scalable_t5", "molora")]
)
def test_steps_are_the_built_in_trainers(guest, t5x, network, name):
    method = METHODS[name]()
    # Without it, steps are signs of gradients, however small those are.
    adafactor = guest.adafactor(epsilon1=1e-6)
    model = t5x.adapted.model(guest.base_model(network, adafactor), method)
    variables = guest.variables(model)
    params = guest.moved(variables["params"], method)
    axes = variables["params_axes"]
    found = [steps(guest, model, params, axes, count) for count in (1, 2)]

    frozen, trainable = method.split(params)
    optimizer = optimizers.adafactor(RATE, epsilon=1e-6).build(
        trainable, method.learning_rate_group
    )
    ours = guest.built_in(method, scan_layers=network == "scalable_t5")
    update = step.make_train_step(ours, optimizer, patching.merge)
    want, by_step = step.create_state(jax.tree.map(jnp.copy, trainable), optimizer, seed=0), {}
    for count in (1, 2):
        want, _ = update(want, frozen, guest.BATCH)
        by_step[count] = jax.tree.map(np.asarray, want.trainable)
    # Rounding grows some twenty-fold with every step of these large steps.
    for there, count, error in zip(found, (1, 2), (1e-4, 1e-3), strict=True):
        after, moved = method.split(there.params)
        jax.tree.map(np.testing.assert_array_equal, after, frozen)
        close = lambda x, y, error=error: np.testing.assert_allclose(x, y, rtol=1e-4, atol=error)
        jax.tree.map(close, moved, by_step[count])
        change = jax.tree.map(lambda x, y: jnp.abs(x - y).max(), moved, trainable)
        assert min(jax.tree.leaves(change)) > 1e-4


def test_only_what_trains_has_a_state(guest, t5x):
    method = METHODS["molora"]()
    model = t5x.adapted.model(guest.base_model("t5"), method)
    variables = guest.variables(model)
    created = guest.T5X.train_state.FlaxOptimTrainState.create(model.optimizer_def, variables)
    paths = {
        path.rsplit("/", 1)[0]
        for path in patching.flatten(created.state_dict()["state"]["param_states"])
    }
    assert paths == {p for p in patching.flatten(variables["params"]) if method.is_trainable(p)}
    second_moments = [
        leaf.v.shape
        for leaf in jax.tree.leaves(created.param_states, is_leaf=lambda x: hasattr(x, "v_row"))
    ]
    assert all(shape != (1,) for shape in second_moments)  # none is factored
    axes = created.as_logical_axes()
    assert jax.tree.structure(axes.state_dict()["target"]) == jax.tree.structure(
        created.state_dict()["target"]
    )


def test_groups_multiply_the_learning_rate(guest, t5x):
    method = METHODS["mhr"]()
    variables = None
    changes = []
    for groups in ({"routers": 1.0}, {"routers": 0.5, "adapters": 2.0}):
        model = t5x.adapted.model(guest.base_model("t5"), method, groups=groups)
        variables = variables or guest.variables(model)
        params = guest.moved(variables["params"], method)
        found = steps(guest, model, params, variables["params_axes"], 1)
        flat = patching.flatten(params)
        changes.append(
            {p: np.abs(x - flat[p]).max() for p, x in patching.flatten(found.params).items()}
        )
    for path, change in changes[0].items():
        factor = {"routers": 0.5, "adapters": 2.0, "base": 0.0}[method.learning_rate_group(path)]
        np.testing.assert_allclose(changes[1][path], factor * change, rtol=1e-3, atol=1e-6)
    assert any("router" in path and change for path, change in changes[0].items())


def test_optax_moves_nothing_frozen(guest, t5x):
    method = METHODS["mov"]()
    wrapped = guest.T5X.optimizers.OptaxWrapper(optax.adam(RATE))
    model = t5x.adapted.model(guest.base_model("t5", wrapped), method)
    variables = guest.variables(model)
    params = guest.moved(variables["params"], method)
    found = steps(guest, model, params, variables["params_axes"], 1)
    before, after = patching.flatten(params), patching.flatten(found.params)
    moved = {path for path in before if (before[path] != after[path]).any()}
    assert moved == {path for path in before if method.is_trainable(path)}


def test_errors(guest, t5x):
    method = METHODS["mov"]()
    only, adafactor = t5x.trainable.only, guest.adafactor
    with pytest.raises(
        errors.UserError, match="'router'; expected one of .* Did you mean 'routers'"
    ):
        only(adafactor(), method, {"router": 0.1})
    wrapped = guest.T5X.optimizers.OptaxWrapper(optax.adam(RATE))
    with pytest.raises(errors.UserError, match="hold their own learning rates"):
        only(wrapped, method, {"routers": 0.1})
    with pytest.raises(errors.UserError, match="global_norm_clip_threshold"):
        only(adafactor(global_norm_clip_threshold=1.0), method, {"routers": 0.1})
    whole = adafactor()
    assert only(whole, methods.full()) is whole
