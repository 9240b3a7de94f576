"""Training on meshes of eight devices against one device; which arrays are split and how."""

import functools
import itertools
import json

import jax
import numpy as np
import pytest

from moe_peft import errors, methods, patching
from moe_peft.evaluation import inference
from moe_peft.models import decoding as decoding_lib
from moe_peft.models import encoder_decoder, t5
from moe_peft.partitioning import layout as layout_lib
from moe_peft.partitioning import mesh as mesh_lib
from moe_peft.runtime import progress
from moe_peft.training import loop as run_lib
from moe_peft.training import optimizers
from moe_peft.training import start as start_lib
from moe_peft.training import step as step_lib
from moe_peft.training import train as train_lib

BATCH, INPUTS, TARGETS, STEPS = 8, 12, 6, 6
CONFIG = {
    "vocab_size": 64,
    "emb_dim": 16,
    "num_heads": 8,
    "head_dim": 4,
    "mlp_dim": 32,
    "num_encoder_layers": 2,
    "num_decoder_layers": 1,
    "dropout_rate": 0.1,
}
METHODS = {
    "lora": lambda: methods.lora(rank=2),
    "molora": lambda: methods.molora(num_experts=2, rank=2),
    "mov": lambda: methods.mov(num_experts=2),
    # At few layers, for programs of eight devices take long to compile; "lora" is at all.
    "mhr": lambda: methods.mhr(
        num_tasks=3, num_skills=2, num_splits=4, rank=2, placement="encoder/.*/query|decoder/.*/wo"
    ),
    "full": methods.full,
}

OPTIMIZERS = {
    # Routers of equal experts have no gradient but rounding: a small epsilon would enlarge it.
    "adamw": optimizers.adamw(1e-2, clip_norm=1.0, epsilon=1e-3),
    "adafactor": optimizers.adafactor(1e-3),
}


def batches(start, index=0, count=1):
    """The batch of a step is a function of its number; part `index` of `count` of its rows."""
    for step in itertools.count(start):
        tokens = np.random.default_rng(step).integers(1, 64, (BATCH, INPUTS + 2 * TARGETS))
        inputs, shifted, targets = np.split(
            tokens.astype(np.int32), [INPUTS, INPUTS + TARGETS], axis=1
        )
        batch = {
            "encoder_input_tokens": inputs,
            "decoder_input_tokens": shifted,
            "decoder_target_tokens": targets,
            "task_ids": (np.arange(BATCH, dtype=np.int32) + step) % 3,
        }
        yield {name: np.split(rows, count)[index] for name, rows in batch.items()}


def mesh_of(data, fsdp, model):
    return mesh_lib.make_mesh(data, fsdp, model, devices=jax.devices()[: data * fsdp * model])


def train(
    folder, method, shape, num_steps=STEPS, scan_layers=False, num_microbatches=1, optimizer="adamw"
):
    """(losses of every step, the run's result)."""
    method = METHODS[method]()
    config = t5.T5Config(**CONFIG, scan_layers=scan_layers)
    module = t5.Transformer(config)
    network = encoder_decoder.EncoderDecoder(method.patch(module), method=method)
    base = encoder_decoder.EncoderDecoder(module)
    mesh = mesh_of(*shape)
    index, count = mesh_lib.host_shard(mesh)
    result = train_lib.fit(
        start=lambda shapes: start_lib.Start(network, base, method, shapes),
        backbone="random:1",
        open_batches=lambda start: batches(start, index, count),
        optimizer=OPTIMIZERS[optimizer],
        model_dir=folder,
        described={"model": "t5", "data": "random"},
        settings=run_lib.Settings(
            num_steps=num_steps,
            batch_size=BATCH,
            log_period=1,
            num_microbatches=num_microbatches,
        ),
        mesh=mesh,
    )
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [line["loss"] for line in lines if "loss" in line], result


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """The same run on one device, made once for every setting."""

    @functools.cache
    def run(*args, **kwargs):
        return train(tmp_path_factory.mktemp("alone") / "run", *args, (1, 1, 1), **kwargs)

    return run


def check_equal(found, wanted):
    losses, result = found
    want_losses, want = wanted
    assert len(losses) == len(want_losses) == STEPS
    np.testing.assert_allclose(losses, want_losses, rtol=2e-5)
    for path, leaf in patching.flatten(want.state.trainable).items():
        got = patching.flatten(result.state.trainable)[path]
        np.testing.assert_allclose(got, leaf, rtol=1e-3, atol=2e-4, err_msg=path)


@pytest.mark.parametrize(
    ("method", "shape", "scan_layers"),
    [
        pytest.param("molora", (2, 2, 2), False, marks=pytest.mark.slow),
        pytest.param("mhr", (1, 2, 4), True, marks=pytest.mark.slow),
        pytest.param("lora", (8, 1, 1), True, marks=pytest.mark.slow),
        pytest.param("lora", (1, 8, 1), True, marks=pytest.mark.slow),
        pytest.param("lora", (1, 1, 8), True, marks=pytest.mark.slow),
        pytest.param("mov", (4, 2, 1), True, marks=pytest.mark.slow),
        pytest.param("mov", (4, 1, 2), False, marks=pytest.mark.slow),
        pytest.param("mhr", (2, 4, 1), False, marks=pytest.mark.slow),
        pytest.param("full", (2, 1, 4), True, marks=pytest.mark.slow),
        pytest.param("full", (1, 4, 2), False, marks=pytest.mark.slow),
    ],
)
def test_every_mesh_equals_one_device(alone, tmp_path, method, shape, scan_layers):
    found = train(tmp_path, method, shape, scan_layers=scan_layers)
    check_equal(found, alone(method, scan_layers=scan_layers))


@pytest.mark.parametrize("then", [(1, 1, 1), pytest.param((1, 8, 1), marks=pytest.mark.slow)])
def test_a_run_goes_on_on_another_mesh(alone, tmp_path, then):
    """Every axis is split in the first mesh: also what every mesh must give."""
    train(tmp_path, "mhr", (2, 2, 2), num_steps=4, scan_layers=True)
    _, result = found = train(tmp_path, "mhr", then, scan_layers=True)
    check_equal(found, alone("mhr", scan_layers=True))
    assert result.state.step == STEPS


@pytest.mark.slow
def test_microbatches_on_a_mesh(alone, tmp_path):
    found = train(tmp_path, "mhr", (2, 2, 2), scan_layers=True, num_microbatches=2)
    check_equal(found, alone("mhr", scan_layers=True, num_microbatches=2))


@pytest.mark.slow
def test_moments_taken_layer_by_layer_equal_one_device(alone, tmp_path):
    settings = {"scan_layers": True, "optimizer": "adafactor"}
    found = train(tmp_path, "full", (1, 2, 4), **settings)
    check_equal(found, alone("full", **settings))


@functools.cache
def shapes_and_axes(name, scan_layers=True):
    """Abstract parameters of a method, and the names of their axes."""
    method = METHODS[name]()
    module = t5.Transformer(t5.T5Config(**CONFIG, scan_layers=scan_layers))
    model = encoder_decoder.EncoderDecoder(method.patch(module), method=method)
    batch = {name: rows.shape for name, rows in next(batches(0)).items()}
    start = start_lib.Start(model, None, method, batch)
    return start.shapes(), start.logical_axes()


def specs(layout, params, axes):
    flat = patching.flatten(layout.shardings(params, axes))
    return {path: tuple(sharding.spec) for path, sharding in flat.items()}


@pytest.mark.parametrize("name", METHODS)
def test_every_parameter_names_its_axes(name):
    params, axes = shapes_and_axes(name)
    flat = patching.flatten(params)
    assert axes.keys() == flat.keys()
    assert all(len(axes[path]) == leaf.ndim for path, leaf in flat.items())


def test_weights_are_split_and_adapters_are_not():
    params, axes = shapes_and_axes("lora")
    found = specs(layout_lib.Layout(mesh_of(2, 2, 2)), params, axes)
    assert found["token_embedder/embedding"] == ("model", "fsdp")
    assert found["encoder/encoder/attention/query/kernel"] == ("fsdp", None, "model", None)
    assert found["encoder/encoder/mlp/wo/kernel"] == ("model", None, "fsdp")
    assert {spec for path, spec in found.items() if "/adapter/" in path} == {()}


def test_unscanned_weights_are_split_and_named_too():
    """Their kernels are matrices with one joined axis of heads; adapters tell the two apart."""
    params, axes = shapes_and_axes("molora", scan_layers=False)
    mesh = mesh_of(2, 2, 2)
    found = specs(layout_lib.Layout(mesh), params, axes)
    attention = "encoder/layers_0/attention"
    assert found[f"{attention}/query/kernel"] == ("fsdp", "model")
    assert found[f"{attention}/out/kernel"] == ("model", "fsdp")
    assert axes[f"{attention}/query/adapter/lora_b"] == ("expert", "rank", "heads", "kv")
    assert axes[f"{attention}/query/adapter/router/kernel"] == ("embed", "expert")
    assert axes[f"{attention}/out/adapter/lora_a"] == ("heads", "kv", "expert", "rank")
    assert axes[f"{attention}/out/adapter/router/kernel"] == ("joined_kv", "expert")
    whole = layout_lib.Layout(mesh, first=[("mlp", None)])  # comes before the rule of "mlp"
    assert specs(whole, params, axes)["encoder/layers_0/mlp/wo/kernel"] == (None, "fsdp")


def test_adapters_are_split_like_their_layers_on_request():
    params, axes = shapes_and_axes("molora")
    mesh = mesh_of(2, 2, 2)
    found = specs(layout_lib.Layout(mesh, adapters="sharded"), params, axes)
    assert found["encoder/encoder/mlp/wo/adapter/lora_a"] == ("model", None, None, None)
    by_expert = layout_lib.Layout(mesh, first=[("expert", "model")], adapters="sharded")
    found = specs(by_expert, params, axes)
    assert found["encoder/encoder/mlp/wo/adapter/lora_b"] == ("model", None, None, "fsdp")


def test_moments_lie_beside_their_parameters():
    method = methods.full()
    params, axes = shapes_and_axes("full")
    layout = layout_lib.Layout(mesh_of(1, 2, 4))
    shardings = layout.shardings(params, axes)
    transform = optimizers.adamw(1e-2).build(params, method.learning_rate_group)
    state = jax.eval_shape(lambda tree: step_lib.create_state(tree, transform, 0), params)
    places = layout.optimizer_shardings(state, shardings, params)
    kernels = [
        sharding.spec
        for path, sharding in jax.tree_util.tree_leaves_with_path(places)
        if jax.tree_util.keystr(path, simple=True, separator="/").endswith("mlp/wo/kernel")
    ]
    assert len(kernels) == 6  # two coders, each with the parameter and two moments
    assert {tuple(spec) for spec in kernels} == {("model", None, "fsdp")}
    assert tuple(places.step.spec) == ()


def test_moments_taken_layer_by_layer_lie_beside_their_parameters():
    method = methods.full()
    params, axes = shapes_and_axes("full")
    layout = layout_lib.Layout(mesh_of(1, 2, 4))
    transform = optimizers.adafactor(1e-2).build(params, method.learning_rate_group)
    state = jax.eval_shape(lambda tree: step_lib.create_state(tree, transform, 0), params)
    places = layout.optimizer_shardings(state, layout.shardings(params, axes), params)
    moments = {
        jax.tree_util.keystr(path, simple=True, separator="/"): tuple(sharding.spec)
        for path, sharding in jax.tree_util.tree_leaves_with_path(places.opt_state)
    }
    kernels = {spec for path, spec in moments.items() if "/v/" in path and "mlp/wo" in path}
    assert kernels == {(None, "model", "fsdp")}  # of [mlp, layers, embed]


@pytest.mark.parametrize(
    ("shape", "settings", "message"),
    [
        ((1, 1, 3), {}, r"model = 3 cannot divide .*: its axis 'heads' is 8 long"),
        ((1, 3, 1), {}, r"fsdp = 3 cannot divide .* its axis 'embed' is 16 long"),
        ((1, 1, 4), {"adapters": "sharded", "first": [("rank", "model")]}, "Layout.adapters='rep"),
        ((1, 1, 1), {"adapters": "split"}, "replicated, sharded"),
        ((1, 1, 1), {"first": [("mlp", "modle")]}, "Did you mean 'model'"),
    ],
)
def test_what_a_mesh_cannot_divide(shape, settings, message):
    params, axes = shapes_and_axes("lora")
    with pytest.raises(errors.UserError, match=message):
        layout_lib.Layout(mesh_of(*shape), **settings).shardings(params, axes)


@pytest.mark.parametrize("method", [pytest.param("lora", marks=pytest.mark.slow), "mhr"])
def test_answers_do_not_depend_on_the_mesh(method):
    module = t5.Transformer(t5.T5Config(**CONFIG, scan_layers=True))
    abstract, axes = shapes_and_axes(method)
    method = METHODS[method]()
    model = encoder_decoder.EncoderDecoder(method.patch(module), method=method)
    rng = np.random.default_rng(3)
    draw = lambda leaf: rng.normal(0, 0.3, leaf.shape).astype(leaf.dtype)
    params = jax.tree.map(draw, abstract)
    inputs = next(batches(0))["encoder_input_tokens"]
    questions = [
        inference.Question(ids, choices=(ids[:3], ids[3:5]), features={"task_ids": np.int32(i % 3)})
        for i, ids in enumerate(inputs)
    ]
    found = []
    for shape in ((1, 1, 1), (2, 2, 2)):
        mesh = mesh_of(*shape)
        placed = jax.device_put(params, layout_lib.Layout(mesh).shardings(params, axes))
        answerer = inference.AnsweringModel(model, 4, {"inputs": INPUTS, "targets": TARGETS}, mesh)
        texts = answerer.generate(
            placed, questions, decoding_lib.Greedy(TARGETS), progress.Progress()
        )
        scores = answerer.score_choices(placed, questions, progress.Progress())
        found.append((texts, scores))
    (texts, scores), (other_texts, other_scores) = found
    np.testing.assert_array_equal(np.stack(texts), np.stack(other_texts))
    for one, other in zip(scores, other_scores, strict=True):
        np.testing.assert_allclose(one.log_likelihoods, other.log_likelihoods, rtol=1e-5)
