"""Gradient alignment against plain autodiff and NumPy."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_peft import errors, methods, patching
from moe_peft.models import encoder_decoder, t5
from moe_peft.partitioning import mesh as mesh_lib
from moe_peft.training import start as start_lib
from moe_peft.training.monitors import alignment
from moe_peft.training.monitors import base as base_lib

CONFIG = t5.T5Config(
    vocab_size=24,
    emb_dim=8,
    num_heads=2,
    head_dim=4,
    mlp_dim=16,
    num_encoder_layers=1,
    num_decoder_layers=1,
    mlp_activations=("gelu", "linear"),
    dropout_rate=0.3,
)
TASKS, ROWS = 3, 8
DATA = {"mixture": "cldr_fewshot", "feature_lengths": {"inputs": 24, "targets": 12}}


def batch(task, rows=ROWS):
    rng = np.random.default_rng(task)
    tokens = rng.integers(1, 24, (3, rows, 5)).astype(np.int32)
    return {
        "encoder_input_tokens": tokens[0],
        "decoder_input_tokens": tokens[1],
        "decoder_target_tokens": tokens[2],
        "decoder_loss_weights": np.ones((rows, 5), np.int32),
        "task_ids": np.full(rows, task, np.int32),
    }


def method_named(name):
    has_tasks = name in ("poly", "mhr")
    options = {"num_tasks": TASKS, "num_skills": 2, "placement": "light"} if has_tasks else {}
    if name == "mhr":
        options["num_splits"] = 2
    return methods.get(name)(**options)


def made(method):
    """(model, frozen, trainable), adapters far from their initial zeros."""
    model = encoder_decoder.EncoderDecoder(
        method.patch(t5.Transformer(CONFIG)), encoder_decoder.LossConfig(), method
    )
    shapes = jax.tree.map(np.shape, batch(0))
    abstract = jax.eval_shape(lambda: model.init(jax.random.key(0), shapes))
    rng = np.random.default_rng(1)
    moved = {
        path: jnp.float32(path.endswith(("/scale", "/vectors")))
        + jnp.asarray(0.3 * rng.normal(size=leaf.shape), jnp.float32)
        for path, leaf in patching.flatten(abstract).items()
    }
    return model, *method.split(patching.trees.unflatten(moved))


def plain_cosines(gradients, wanted):
    """Cosines leaf by leaf, in float64, of nested gradients."""
    flat = [
        {k: np.float64(v) for k, v in patching.flatten(tree).items() if re.search(wanted, k)}
        for tree in gradients
    ]
    assert flat[0]

    def dot(a, b):
        return sum(np.sum(a[path] * b[path]) for path in a)

    return np.array([[dot(a, b) / np.sqrt(dot(a, a) * dot(b, b)) for b in flat] for a in flat])


@pytest.mark.parametrize(
    ("name", "wanted"),
    [
        ("mhr", "lora_(a|b)$"),
        pytest.param("lora", "lora_(a|b)$", marks=pytest.mark.slow),
        pytest.param("ia3", "vectors$", marks=pytest.mark.slow),
        pytest.param("poly", "lora_(a|b)$", marks=pytest.mark.slow),
        pytest.param("full", ".", marks=pytest.mark.slow),
    ],
)
def test_cosines_are_those_of_plain_gradients(name, wanted):
    method = method_named(name)
    model, frozen, trainable = made(method)
    gradient = alignment.task_gradient(model, method)

    def loss(tree, rows):
        return model.loss(patching.merge(frozen, tree), rows)[0]

    # In one program, which the compiler halves.
    both = jax.jit(
        lambda rows: (gradient(trainable, frozen, rows), jax.grad(loss)(trainable, rows))
    )
    found = [both(batch(task)) for task in range(TASKS)]
    gradients = np.stack([vector for vector, _ in found])
    paths, leaves = alignment.select(trainable, method), patching.flatten(trainable)
    assert gradients.shape == (TASKS, sum(leaves[path].size for path in paths))
    expected = plain_cosines([tree for _, tree in found], wanted)
    matrix = alignment.cosines(gradients)
    np.testing.assert_allclose(matrix, expected, atol=2e-6)
    off = expected[np.triu_indices(TASKS, 1)]
    assert np.ptp(off) > 1e-3
    summary = alignment.summarize(matrix)
    np.testing.assert_allclose(summary["mean_cosine"], np.mean(off), atol=2e-6)
    assert summary["conflicting"] == np.mean(off < 0)
    # The same examples twice: one direction.
    twice = np.stack([gradients[0], both(batch(0))[0]])
    np.testing.assert_allclose(alignment.cosines(twice), np.ones((2, 2)), atol=1e-6)


def test_known_cosines_and_gradients_without_direction():
    gradients = np.array([[3.0, 0.0], [-2.0, 0.0], [0.0, 5.0], [0.0, 0.0]], np.float32)
    matrix = alignment.cosines(gradients)
    nan = np.nan
    expected = [[1, -1, 0, nan], [-1, 1, 0, nan], [0, 0, 1, nan], [nan] * 4]
    np.testing.assert_allclose(matrix, expected, atol=1e-7)
    assert alignment.summarize(matrix) == {
        "mean_cosine": pytest.approx(-1 / 3),
        "conflicting": pytest.approx(1 / 3),
    }
    assert alignment.summarize(matrix[2:, 2:]) == {}


def watched(tmp_path, method, model=None, trainable=None, data=DATA):
    if trainable is None:
        trainable = {"query": {"adapter": {"router": {"logits": jnp.zeros((3, 1, 2))}}}}
    mesh = mesh_lib.make_mesh()
    return base_lib.Watched(model, method, trainable, data, tmp_path, mesh)


def test_only_routers_train(tmp_path):
    routers = methods.Method("mhr_z", trainable=".*/router/.*")
    with pytest.raises(errors.UserError, match="trains routers only"):
        alignment.GradientAlignment().start(watched(tmp_path, routers))


@pytest.fixture(scope="module")
def started(tmp_path_factory):
    """The monitor on a method with CLDR's tasks: (folder, model, frozen, trainable, watch)."""
    import moe_peft.tasks.cldr  # noqa: F401

    folder, method = (
        tmp_path_factory.mktemp("run"),
        methods.lora(placement="encoder/.*/(query|wi_1)"),
    )
    base = t5.Transformer(t5.T5Config(**{**vars(CONFIG), "vocab_size": 272}))
    model = encoder_decoder.EncoderDecoder(method.patch(base), encoder_decoder.LossConfig(), method)
    shapes = {
        "encoder_input_tokens": (8, 24),
        "decoder_input_tokens": (8, 12),
        "decoder_target_tokens": (8, 12),
    }
    start = start_lib.Start(model, encoder_decoder.EncoderDecoder(base), method, shapes)
    trees = start.trees("random:0", 0, "float32")
    monitor = alignment.GradientAlignment(num_tasks=4, batch_size=8)
    watch = monitor.start(watched(folder, method, model, trees.trainable))
    return folder, model, trees, watch


def test_monitor_records_matrix_tasks_and_norms(started):
    folder, model, trees, watch = started
    scalars = watch(5, trees.frozen, trees.trainable)
    again = watch(10, trees.frozen, trees.trainable)
    assert scalars == again
    first, second = alignment.records(folder)
    assert (first["step"], second["step"]) == (5, 10)
    assert first["tasks"] == second["tasks"]
    assert len(set(first["tasks"])) == 4
    assert all(task.startswith("cldr_") for task in first["tasks"])
    batches = alignment.task_batches(DATA, 4, 8, 0)
    assert list(batches) == first["tasks"]

    def loss(tree, rows):
        return model.loss(patching.merge(trees.frozen, tree), rows)[0]

    plain = jax.jit(jax.grad(loss))
    gradients = [plain(trees.trainable, rows) for rows in batches.values()]
    cosines = plain_cosines(gradients, "lora")
    np.testing.assert_allclose(first["cosines"], cosines, atol=1e-5)
    norms = [np.linalg.norm([np.linalg.norm(x) for x in jax.tree.leaves(g)]) for g in gradients]
    np.testing.assert_allclose(first["norms"], norms, rtol=1e-4)
    off = cosines[np.triu_indices(4, 1)]
    assert scalars["mean_cosine"] == pytest.approx(np.mean(off), abs=1e-5)


def test_tasks_are_drawn_by_seed_with_examples_of_their_own(started):
    drawn = alignment.task_batches(DATA, 3, 4, seed=1)
    assert list(drawn) == list(alignment.task_batches(DATA, 3, 4, seed=1))
    assert list(drawn) != list(alignment.task_batches(DATA, 3, 4, seed=2))
    ids = [np.unique(rows["task_ids"]) for rows in drawn.values()]
    assert all(len(found) == 1 for found in ids)
    assert len({int(found[0]) for found in ids}) == 3


@pytest.mark.parametrize(
    ("mixture", "num_tasks", "expected"),
    [("cldr_month_sq", 16, "has 1, and"), ("cldr_fewshot", 1, "num_tasks is 1")],
)
def test_one_task_is_too_few(started, mixture, num_tasks, expected):
    with pytest.raises(errors.UserError, match=expected):
        alignment.task_batches(DATA | {"mixture": mixture}, num_tasks, 4, 0)
