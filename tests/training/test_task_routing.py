"""Routing weights and their statistics against plain NumPy, from the trees of real models."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_peft import errors, methods, patching
from moe_peft.models import encoder_decoder, t5
from moe_peft.partitioning import mesh as mesh_lib
from moe_peft.training.monitors import base, routing, task_routing

TASKS, SPLITS, SKILLS = 5, 2, 4
SHAPES = {
    "encoder_input_tokens": (2, 3),
    "decoder_input_tokens": (2, 3),
    "decoder_target_tokens": (2, 3),
    "task_ids": (2,),
}


def trainable(scan_layers=False, num_layers=12, **options):
    """(method, abstract trainable tree) of Poly-S."""
    config = t5.T5Config(
        vocab_size=24,
        emb_dim=8,
        num_heads=2,
        head_dim=4,
        mlp_dim=16,
        num_encoder_layers=num_layers,
        num_decoder_layers=2,
        mlp_activations=("gelu", "linear"),
        scan_layers=scan_layers,
    )
    method = methods.poly(
        num_tasks=TASKS, num_skills=SKILLS, num_splits=SPLITS, placement="light", **options
    )
    model = encoder_decoder.EncoderDecoder(method.patch(t5.Transformer(config)), method=method)
    shapes = jax.eval_shape(lambda: model.init(jax.random.key(0), SHAPES))
    return method, method.split(shapes)[1]


def filled(tree, scale=3.0):
    """The tree with random numbers in place of shapes."""
    rng = np.random.default_rng(0)
    return jax.tree.map(
        lambda leaf: (scale * rng.standard_normal(leaf.shape)).astype(np.float32), tree
    )


def plain_weights(logits):
    z = 1 / (1 + np.exp(-np.float64(logits)))
    return z / (z.sum(-1, keepdims=True) + 1e-12)


def deep(tree):
    """An unscanned tree with its first encoder layer twelve times; to trace so many takes long."""
    return patching.trees.unflatten(
        {
            path.replace("encoder/layers_0", f"encoder/layers_{i}"): leaf
            for path, leaf in patching.flatten(tree).items()
            for i in range(12)
        }
    )


def test_scanned_selectors_are_named_and_ordered_as_unscanned_ones():
    plain = task_routing.logits(filled(deep(trainable(num_layers=1)[1])))
    tree = filled(trainable(scan_layers=True)[1])
    scanned = task_routing.logits(tree)
    assert list(plain) == list(scanned)
    assert len(plain) == 12 * 3 + 2 * 5
    assert {leaf.shape for leaf in scanned.values()} == {(TASKS, SPLITS, SKILLS)}
    layers = [name.split("/")[1] for name in plain if name.startswith("encoder")]
    assert layers == [f"layers_{i}" for i in range(12) for _ in range(3)]
    stacked = patching.flatten(tree)["encoder/encoder/mlp/wi_1/adapter/router/logits"]
    np.testing.assert_array_equal(scanned["encoder/layers_7/mlp/wi_1"], stacked[:, 7])


def test_shared_selectors_are_named_by_their_group():
    _, tree = trainable(num_layers=2, granularity="coder")
    assert list(task_routing.logits(tree)) == ["encoder", "decoder"]
    _, tree = trainable(num_layers=2, granularity="model")
    assert list(task_routing.logits(tree)) == ["model"]


def test_no_task_routing_is_said():
    with pytest.raises(errors.UserError, match="no learned task-routing logits"):
        task_routing.logits({"query": {"adapter": {"lora_a": np.zeros(2)}}})


@pytest.mark.parametrize("num_tasks", [1, TASKS])
def test_weights_are_the_normalised_sigmoid(num_tasks):
    logits = np.random.default_rng(0).normal(0, 4, (num_tasks, SPLITS, SKILLS)).astype(np.float32)
    np.testing.assert_allclose(
        task_routing.weights(logits), plain_weights(logits), rtol=2e-5, atol=1e-7
    )
    rounded = (logits > 0) / ((logits > 0).sum(-1, keepdims=True) + 1e-12)
    np.testing.assert_allclose(
        task_routing.weights(logits, straight_through=True), rounded, atol=1e-6
    )


def test_statistics_of_known_weights():
    one_hot, equal = np.eye(4)[None, :2], np.full((1, 2, 4), 0.25)
    half = np.array([[[0.5, 0.5, 0, 0], [0.7, 0.1, 0.1, 0.1]]])
    found = [
        {name: float(x) for name, x in task_routing.statistics(jnp.float32(w)).items()}
        for w in (one_hot, equal, half)
    ]
    close = lambda **values: pytest.approx(values, abs=1e-6)
    assert found[0] == close(entropy=0, sparsity=0.75, max_weight=1)
    assert found[1] == close(entropy=1, sparsity=0, max_weight=0.25)
    uneven = -(0.7 * np.log(0.7) + 0.3 * np.log(0.1)) / np.log(4)
    assert found[2] == close(entropy=(0.5 + uneven) / 2, sparsity=5 / 8, max_weight=0.6)
    single = task_routing.statistics(jnp.ones((2, 1, 1)))
    assert {name: float(x) for name, x in single.items()} == {
        "entropy": 0,
        "sparsity": 0,
        "max_weight": 1,
    }


def watched(tmp_path, method, tree):
    return base.Watched(None, method, tree, {}, tmp_path, mesh_lib.make_mesh())


@pytest.mark.parametrize("straight_through", [False, True])
def test_monitor_records_every_selector(tmp_path, straight_through):
    method, shapes = trainable(num_layers=1, straight_through=straight_through)
    watch = routing.RoutingCourse().start(watched(tmp_path, method, shapes))
    tree = filled(shapes)
    scalars = watch(3, {}, tree)
    (record,) = routing.records(tmp_path)
    logits = task_routing.logits(tree)
    assert record["step"] == 3
    assert record["selectors"] == list(logits)
    for i, leaf in enumerate(logits.values()):
        if straight_through:
            w = (leaf > 0) / ((leaf > 0).sum(-1, keepdims=True) + 1e-12)
        else:
            w = plain_weights(leaf)
        entropy = -(w * np.log(np.maximum(w, 1e-30))).sum(-1).mean() / np.log(SKILLS)
        assert record["entropy"][i] == pytest.approx(entropy, abs=2e-6)
        assert record["sparsity"][i] == pytest.approx(np.mean(w < 1 / (2 * SKILLS)), abs=1e-6)
        assert record["max_weight"][i] == pytest.approx(w.max(-1).mean(), abs=2e-6)
    for name in task_routing.STATISTICS:
        assert scalars[name] == pytest.approx(record[name].mean(), abs=1e-6)


def test_monitor_without_task_routing_is_refused(tmp_path):
    with pytest.raises(errors.UserError, match="poly and mhr"):
        routing.RoutingCourse().start(
            watched(tmp_path, methods.lora(), {"query": {"adapter": {"lora_a": jnp.zeros(3)}}})
        )
