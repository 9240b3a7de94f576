import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from moe_peft import methods, patching
from moe_peft.models import encoder_decoder, t5
from moe_peft.partitioning import mesh as mesh_lib
from moe_peft.training import step as step_lib

SGD = optax.sgd(1.0)
GOLDEN = {"loss": 3.449805, "grad_norm": 0.63245}


@functools.cache
def _trees(toy):
    """On the host: a step gives away what is on a device."""
    params = toy.MODEL.init(jax.random.key(0), {"x": (toy.ROWS, toy.WIDTH)})
    return toy.ADAPTED.split(jax.tree.map(np.asarray, params))


def _norm(tree):
    return np.sqrt(sum(np.sum(np.square(leaf)) for leaf in jax.tree.leaves(tree)))


def _step(toy, optimizer=SGD, **kwargs):
    return step_lib.make_train_step(toy.MODEL, optimizer, patching.merge, **kwargs)


def _run(toy, step, batch, rows=None):
    frozen, trainable = _trees(toy)
    state = step_lib.create_state(trainable, SGD, seed=3)
    return step(state, frozen, {name: value[:rows] for name, value in batch.items()})


def test_update_is_minus_the_gradient_of_the_objective(toy):
    frozen, trainable = _trees(toy)
    batch = toy.batch(0)

    def objective(trainable):
        loss_sum, total, _ = toy.MODEL.loss_sums(patching.merge(frozen, trainable), batch)
        return loss_sum / total

    loss, grads = jax.value_and_grad(objective)(trainable)
    want = jax.tree.map(lambda p, g: np.asarray(p - g), trainable, grads)
    state, metrics = _run(toy, _step(toy, use_dropout=False), batch)

    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), want, state.trainable)
    np.testing.assert_allclose(metrics["loss_sum"] / metrics["normalizer"], loss, rtol=1e-6)
    np.testing.assert_allclose(metrics["grad_norm"], _norm(grads), rtol=1e-6)
    np.testing.assert_allclose(metrics["param_norm"], _norm(want), rtol=1e-6)
    assert int(state.step) == 1
    assert int(metrics["bad_leaf"]) == step_lib.ALL_FINITE


@pytest.mark.parametrize("num_microbatches", [2, 4, 8])
def test_micro_batches_are_one_batch(toy, num_microbatches):
    # Weights differ from row to row: averaging the parts' means would miss by some per cent.
    batch = toy.batch(1)
    whole, whole_metrics = _run(toy, _step(toy, use_dropout=False), batch)
    parts, metrics = _run(
        toy, _step(toy, use_dropout=False, num_microbatches=num_microbatches), batch
    )
    leaves = [jax.tree.leaves(state.trainable) for state in (whole, parts)]
    assert len(leaves[0]) == 2
    for a, b in zip(*leaves, strict=True):
        np.testing.assert_allclose(a, b, atol=1e-6, rtol=0)
    assert set(whole_metrics) == set(metrics) >= {"loss_sum", "normalizer", "grad_norm"}
    for name in whole_metrics:
        np.testing.assert_allclose(whole_metrics[name], metrics[name], rtol=1e-5, err_msg=name)


def test_micro_batches_draw_from_different_keys(toy):
    class Drawing(toy.Model):
        """Reports which of 4096 numbers it draws from its key."""

        def loss_sums(self, params, batch, dropout_rng=None):
            loss_sum, total, sums = super().loss_sums(params, batch, dropout_rng)
            drawn = jax.nn.one_hot(jax.random.randint(dropout_rng, (), 0, 4096), 4096)
            return loss_sum, total, {**sums, "drawn": drawn}

    step = step_lib.make_train_step(Drawing(toy.Net(True)), SGD, patching.merge, num_microbatches=4)
    drawn = np.asarray(_run(toy, step, toy.batch(0))[1]["sums/drawn"])
    assert drawn.sum() == 4
    assert drawn.max() == 1


def test_dropout_depends_on_step_and_seed_only(toy):
    step, batch = _step(toy), toy.batch(0)
    losses = [float(_run(toy, step, batch)[1]["loss_sum"]) for _ in range(2)]
    frozen, trainable = _trees(toy)
    later = step_lib.create_state(trainable, SGD, seed=3).replace(step=jnp.int32(1))
    other_seed = step_lib.create_state(_trees(toy)[1], SGD, seed=4)
    assert losses[0] == losses[1]
    assert float(step(later, frozen, batch)[1]["loss_sum"]) != losses[0]
    assert float(step(other_seed, frozen, batch)[1]["loss_sum"]) != losses[0]


def test_frozen_tree_is_neither_changed_nor_in_the_state(toy):
    frozen, trainable = _trees(toy)
    before = jax.tree.map(lambda leaf: np.array(leaf, copy=True), frozen)
    optimizer = optax.adam(0.1)
    state = step_lib.create_state(trainable, optimizer, seed=0)
    step = _step(toy, optimizer)
    for index in range(3):
        state, _ = step(state, frozen, toy.batch(index))
    jax.tree.map(np.testing.assert_array_equal, before, frozen)
    names = step_lib.leaf_names(state)
    assert len(names) == 2 + 1 + 2 * 3  # step and rng, Adam's count, parameter and two moments
    assert not [name for name in names if "kernel" in name]


def test_bad_leaf_is_the_first_gradient_that_is_not_finite(toy):
    class OneBad(toy.Model):
        def loss_sums(self, params, batch, dropout_rng=None):
            loss_sum, total, sums = super().loss_sums(params, batch, dropout_rng)
            lora_b = params["first"]["adapter"]["lora_b"]
            # Adds 0, with an infinite derivative.
            return loss_sum + jnp.sum(jnp.sqrt(lora_b - jax.lax.stop_gradient(lora_b))), total, sums

    step = step_lib.make_train_step(OneBad(toy.Net(True)), SGD, patching.merge)
    metrics = _run(toy, step, toy.batch(0))[1]
    assert np.isfinite(metrics["loss_sum"])
    names = step_lib.leaf_names(_trees(toy)[1])
    assert names[int(metrics["bad_leaf"])] == "first/adapter/lora_b"


def test_bad_loss_with_finite_gradients_is_told_apart(toy):
    class Shifted(toy.Model):
        def loss_sums(self, params, batch, dropout_rng=None):
            loss_sum, total, sums = super().loss_sums(params, batch, dropout_rng)
            return loss_sum + jnp.inf, total, sums

    step = step_lib.make_train_step(Shifted(toy.Net(True)), SGD, patching.merge)
    assert int(_run(toy, step, toy.batch(0))[1]["bad_leaf"]) == step_lib.LOSS_IS_BAD


def test_eight_devices_compute_what_one_computes(toy):
    batch = toy.batch(0, rows=16)
    results = []
    for devices in (jax.devices()[:1], jax.devices()):
        mesh = mesh_lib.make_mesh(devices=devices)
        everywhere = mesh_lib.replicated(mesh)
        frozen, trainable = jax.device_put(_trees(toy), everywhere)
        state = jax.device_put(step_lib.create_state(trainable, SGD, 3), everywhere)
        placed = mesh_lib.put_batch(batch, mesh_lib.batch_sharding(mesh))
        step = _step(toy, num_microbatches=2, out_shardings=everywhere)
        with jax.set_mesh(mesh):
            results.append(step(state, frozen, placed))
    (one, one_metrics), (eight, eight_metrics) = results
    assert len(jax.tree.leaves(eight.trainable)[0].sharding.device_set) == 8
    leaves = [jax.tree.leaves(state.trainable) for state in (one, eight)]
    assert len(leaves[0]) == 2
    for a, b in zip(*leaves, strict=True):
        np.testing.assert_allclose(a, b, atol=1e-6, rtol=0)
    assert set(one_metrics) == set(eight_metrics) >= {"loss_sum", "normalizer", "grad_norm"}
    for name in one_metrics:
        np.testing.assert_allclose(one_metrics[name], eight_metrics[name], rtol=1e-5, err_msg=name)


def test_golden_step_of_a_tiny_t5():
    """Loss and gradient norm of the first step, as they were when this test was written.

    A change here means that network, loss or adapter changed for everybody. If that was
    intended, say so in CHANGELOG.md and put the new numbers in.
    """
    config = t5.T5Config(
        vocab_size=32, emb_dim=8, num_heads=2, head_dim=4, mlp_dim=16,
        num_encoder_layers=1, num_decoder_layers=1,
    )  # fmt: skip
    method = methods.get("lora")()
    model = encoder_decoder.EncoderDecoder(
        method.patch(t5.Transformer(config)), encoder_decoder.LossConfig(z_loss=1e-4), method
    )
    tokens = np.arange(24, dtype=np.int32).reshape(2, 12) % 31 + 1
    batch = {
        "encoder_input_tokens": tokens,
        "decoder_input_tokens": np.pad(tokens[:, :5], ((0, 0), (1, 0))),
        "decoder_target_tokens": tokens[:, :6],
    }
    shapes = {name: rows.shape for name, rows in batch.items()}
    params = jax.eval_shape(lambda: model.init(jax.random.key(0), shapes))
    rng = np.random.default_rng(0)
    params = jax.tree.map(lambda leaf: 0.3 * rng.normal(size=leaf.shape).astype("f4"), params)
    frozen, trainable = method.split(params)
    step = step_lib.make_train_step(model, SGD, patching.merge, use_dropout=False)
    _, metrics = step(step_lib.create_state(trainable, SGD, 0), frozen, batch)
    loss = metrics["loss_sum"] / metrics["normalizer"]
    np.testing.assert_allclose(loss, GOLDEN["loss"], rtol=1e-4)
    np.testing.assert_allclose(metrics["grad_norm"], GOLDEN["grad_norm"], rtol=1e-4)
