"""T5X's models with adapters, against T5X's without and the built-in trainer's with them."""

import importlib.util

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_peft import errors, methods, patching
from moe_peft.models import decoding as decoding_lib

METHODS = {
    "ia3": methods.ia3,
    "lora": methods.lora,
    "mov": lambda: methods.mov(num_experts=3),
    "molora": lambda: methods.molora(num_experts=3),
    "mhr": lambda: methods.mhr(3, num_skills=2, num_splits=2),
}
pytestmark = pytest.mark.slow


@pytest.fixture
def adapted(guest):
    return guest.load("moe_peft.t5x.adapted").adapted


@pytest.mark.parametrize(
    ("network", "name"),
    [*(("t5", name) for name in METHODS), ("scalable_t5", "mov"), ("scalable_t5", "mhr")],
)
def test_logits_loss_and_gradients_are_the_built_in_trainers(guest, adapted, network, name):
    method = METHODS[name]()
    model = adapted.model(guest.base_model(network), method)
    fresh = guest.variables(model)["params"]
    base = guest.variables(guest.base_model(network))["params"]
    frozen, trainable = method.split(fresh)
    assert jax.tree.map(jnp.shape, frozen) == jax.tree.map(jnp.shape, base.unfreeze())
    params = guest.moved(fresh, method)
    other = guest.built_in(method, scan_layers=network == "scalable_t5")
    start = method.split(params)[1]

    @jax.jit
    def theirs(moved):
        whole = patching.merge(frozen, moved)
        loss = lambda moved: model.loss_fn(patching.merge(frozen, moved), guest.BATCH, None)[0]
        return model.score_batch(whole, guest.BATCH), jax.value_and_grad(loss)(moved)

    @jax.jit
    def ours(moved):
        whole = patching.merge(frozen, moved)
        loss = lambda moved: other.loss(patching.merge(frozen, moved), guest.BATCH)[0]
        return other.score(whole, guest.BATCH), jax.value_and_grad(loss)(moved)

    close = lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-3, atol=2e-5)
    found = theirs(start)
    jax.tree.map(close, found, ours(start))
    plain = jax.jit(guest.base_model(network).score_batch)(base, guest.BATCH)
    assert np.abs(found[0] - plain).max() > 1e-2


@pytest.mark.parametrize(("network", "num_decodes"), [("t5", 1), ("t5", 3), ("scalable_t5", 3)])
def test_each_answer_is_decoded_with_its_own_task(guest, adapted, network, num_decodes):
    method = METHODS["mhr"]()
    model = adapted.model(guest.base_model(network), method)
    params = guest.moved(guest.variables(model)["params"], method, by=0.8)
    predict = jax.jit(
        lambda batch: model.predict_batch_with_aux(params, batch, num_decodes=num_decodes)[0]
    )
    found = predict(guest.BATCH)
    for row in range(2):
        alone = {name: leaf[row : row + 1] for name, leaf in guest.BATCH.items()}
        np.testing.assert_array_equal(found[row], predict(alone)[0])
    assert (found != predict({**guest.BATCH, "task_ids": guest.BATCH["task_ids"][::-1]})).any()
    if num_decodes == 1:
        ours = guest.built_in(method, scan_layers=network == "scalable_t5")
        greedy = decoding_lib.Greedy(max_decode_length=3)
        want = jax.jit(lambda batch: ours.predict(params, batch, greedy))(guest.BATCH)
        np.testing.assert_array_equal(found, want)


@pytest.mark.parametrize("factor", ["NUM_REAL_TARGET_TOKENS", "AVERAGE_PER_SEQUENCE", None, 7.0])
def test_router_losses_weigh_as_in_the_built_in_trainer(guest, adapted, factor):
    method = methods.molora(num_experts=3, load_balancing_weight=0.7, z_weight=0.3)
    model = adapted.model(guest.base_model("t5", loss_normalizing_factor=factor), method)
    params = guest.moved(guest.variables(model)["params"], method)
    loss, metrics = jax.jit(lambda p: model.loss_fn(p, guest.BATCH, None))(params)
    per_sequence = factor == "AVERAGE_PER_SEQUENCE"
    normalization = "per_sequence" if per_sequence else "token_mean"
    want = guest.built_in(method, normalization=normalization)
    want, ours = jax.jit(want.loss)(params, guest.BATCH)
    num_tokens = 5.0
    scale = {None: num_tokens, 7.0: num_tokens / 7.0}.get(factor, 1.0)
    np.testing.assert_allclose(loss, scale * want, rtol=1e-5)
    np.testing.assert_allclose(
        metrics["router/load_balancing"].total, ours["router/load_balancing"], rtol=1e-5
    )


def test_a_scanned_network_says_that_it_hides_router_losses(guest, adapted):
    method = methods.molora(num_experts=3, load_balancing_weight=0.7)
    model = adapted.model(guest.base_model("scalable_t5"), method)
    params = guest.variables(model)["params"]
    with pytest.raises(errors.UserError, match="nothing carries them out"):
        jax.eval_shape(lambda p: model.loss_fn(p, guest.BATCH, None), params)


def test_dropout_makes_task_routers_draw(guest, adapted):
    method = methods.mhr(3, num_skills=2, num_splits=2, relaxed=True)
    model = adapted.model(guest.base_model("t5"), method)
    params = guest.moved(guest.variables(model)["params"], method)
    loss = jax.jit(lambda seed: model.loss_fn(params, guest.BATCH, seed)[0])
    drawn = [loss(jax.random.key(seed)) for seed in (0, 0, 1)]
    assert drawn[0] == drawn[1] != drawn[2]
    assert loss(None) != drawn[0]


def test_the_users_class_and_settings_stay(guest, adapted):
    class Mine(guest.T5X.models.EncoderDecoderModel):
        def score_batch(self, params, batch, return_intermediates=False):
            return -super().score_batch(params, batch, return_intermediates)

    base = guest.base_model("t5", z_loss=0.25)
    mine = Mine(base.module, base.input_vocabulary, base.output_vocabulary, base.optimizer_def)
    method = METHODS["ia3"]()
    model, plain = adapted.model(mine, method), adapted.model(base, method)
    assert isinstance(model, Mine)
    assert plain._z_loss == 0.25
    assert isinstance(base.module, type(guest.network("t5")))
    params = guest.variables(model)["params"]
    scores = [jax.jit(each.score_batch)(params, guest.BATCH) for each in (model, plain)]
    np.testing.assert_allclose(scores[0], -scores[1])


@pytest.mark.parametrize(
    ("name", "scan_layers"), [("lora", False), ("mov", False), ("mov", True), ("mhr", True)]
)
def test_flaxformers_t5(guest, adapted, name, scan_layers):
    if importlib.util.find_spec("flaxformer") is None:
        pytest.skip("Flaxformer is not installed; docs/t5x.md says how")
    base = guest.base_model(guest.flaxformer(scan_layers))
    method = METHODS[name]()
    model = adapted.model(base, method)
    found = guest.variables(model)
    plain = guest.variables(base)["params"]
    frozen, trainable = method.split(found["params"])
    assert jax.tree.map(jnp.shape, frozen) == jax.tree.map(jnp.shape, plain.unfreeze())
    axes = patching.flatten(found["params_axes"])
    for path, leaf in patching.flatten(trainable).items():
        names = axes[f"{path}_axes"].names
        assert len(names) == leaf.ndim
        assert "unmodeled" not in names
    score = lambda model, params: jax.jit(model.score_batch)(params, guest.BATCH)
    fresh = patching.merge(plain, trainable)
    np.testing.assert_allclose(score(model, fresh), score(base, plain), rtol=1e-4)
    moved = guest.moved(fresh, method)
    assert np.abs(score(model, moved) - score(base, plain)).max() > 1e-2
    predict = lambda model, params: jax.jit(
        lambda batch: model.predict_batch_with_aux(params, batch, num_decodes=2)
    )(guest.BATCH)
    (answers, scores), (others, _) = predict(model, moved), predict(base, plain)
    assert answers.shape == others.shape
    assert np.isfinite(scores["scores"]).all()
