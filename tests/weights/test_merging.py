"""Logits before and after merging are the same, whatever is merged where."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_peft import adapters, errors, methods, patching
from moe_peft.models import encoder_decoder, t5
from moe_peft.weights import merging

SIZES = {"vocab_size": 32, "emb_dim": 8, "num_heads": 3, "head_dim": 4, "mlp_dim": 16}
LAYOUTS = {
    "t5_1_1": {},
    "t5_1_0": {"mlp_activations": ("relu",), "logits_via_embedding": True},
    "scanned": {"scan_layers": True},
    "t5_1_0_scanned": {"mlp_activations": ("relu",), "scan_layers": True},
}
N = 5
poly = functools.partial(methods.poly, num_tasks=N, num_skills=3, num_splits=2)
METHODS = {
    "lora": functools.partial(methods.lora, rank=2, alpha=3.0, dropout_rate=0.5),
    "ia3": methods.ia3,
    "mov": functools.partial(methods.mov, num_experts=3, routing="uniform"),
    "molora": functools.partial(
        methods.molora, num_experts=3, rank=2, alpha=3.0, routing="uniform"
    ),
    "poly": functools.partial(poly, rank=2, alpha=3.0),
    "poly_ia3": functools.partial(poly, adapter="ia3"),
    # "lora" and "poly" are at all layers; where these are does not matter to their routers.
    "private": functools.partial(methods.private, N, placement="light"),
    "uniform": functools.partial(poly, routing="uniform", placement="light"),
    "random_task": functools.partial(poly, routing="random_task", placement="light"),
    "model": functools.partial(poly, granularity="model", placement="light"),
    "coder_ia3": functools.partial(poly, granularity="coder", adapter="ia3"),
    "blocks": functools.partial(poly, granularity="blocks", num_blocks=1, placement="light"),
}
TOKENS = ("encoder_input_tokens", "decoder_input_tokens", "decoder_target_tokens")
SHAPES = {**dict.fromkeys(TOKENS, (2, 4)), "task_ids": (2,)}


@functools.cache
def network(layout):
    config = t5.T5Config(
        **SIZES,
        num_encoder_layers=1 + ("scanned" in layout),
        num_decoder_layers=1,
        **LAYOUTS[layout],
    )
    return t5.Transformer(config)


@functools.cache
def trained(name, layout):
    """The method and parameters far from fresh."""
    method = METHODS[name]()
    model = encoder_decoder.EncoderDecoder(method.patch(network(layout)), method=method)
    shapes = jax.eval_shape(lambda rng: model.init(rng, SHAPES), jax.random.key(0))
    rng = np.random.default_rng(1)
    start = {"vectors": 1.0, "scale": 1.0}

    def draw(path, leaf):
        last = path.split("/")[-1]
        size = 2.0 if last == "logits" else 0.3
        values = start.get(last, 0.0) + size * rng.normal(size=leaf.shape)
        return jnp.asarray(values, jnp.float32)

    flat = {path: draw(path, leaf) for path, leaf in patching.flatten(shapes).items()}
    return method, patching.trees.unflatten(flat)


def shapes_of(tree):
    return {path: leaf.shape for path, leaf in patching.flatten(tree).items()}


CASES = [(name, "t5_1_1") for name in METHODS]
CASES += [(name, "scanned") for name in ("lora", "poly", "random_task", "model", "coder_ia3")]
CASES += [("ia3", "t5_1_0"), ("poly_ia3", "t5_1_0_scanned")]
# Each of them has a neighbour in the other layout that is always tested.
LATER = {(name, "t5_1_1") for name in ("model", "coder_ia3", "poly_ia3")}
LATER |= {(name, "scanned") for name in ("lora", "random_task")}
# Of one router for all: "coder_ia3" and "blocks". Of all layers: "lora", and "poly" scanned.
LATER |= {("model", "scanned"), ("poly", "t5_1_1")}
CASES = [pytest.param(*case, marks=pytest.mark.slow) if case in LATER else case for case in CASES]


# Compiling costs more here than running.
jit = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})


@functools.cache
def base_logits(layout):
    return jit(encoder_decoder.EncoderDecoder(network(layout)).logits)


@pytest.mark.parametrize(("name", "layout"), CASES)
def test_logits_stay(name, layout, monkeypatch):
    if name in ("lora", "private"):
        monkeypatch.setattr(merging, "_ROWS", 5)  # several blocks of rows, the last one cut
    method, params = trained(name, layout)
    module = network(layout)
    batch = merging.random_batch(SIZES["vocab_size"], seed=0)
    tasks = (None,) if method.num_tasks is None else (3, 2)
    model = encoder_decoder.EncoderDecoder(method.patch(module), method=method)
    want = jit(model.logits)(params, {**batch, "task_ids": jnp.full((2,), tasks[0] or 0)})
    merged = [merging.merge_into_base(module, method, params, task) for task in tasks]
    bare, _ = patching.split(params, lambda path: "/adapter/" in f"/{path}")
    assert shapes_of(merged[0]) == shapes_of(bare)
    # Bare weights and another task's differ: the comparison sees what merging does.
    right, *wrong = (base_logits(layout)(weights, batch) for weights in (*merged, bare))
    scale = np.abs(want).max()
    assert scale > 0.1
    np.testing.assert_allclose(right, want, rtol=0, atol=1e-5 * scale)
    for other in wrong:
        assert np.abs(other - want).max() > 1e-3 * scale


def test_gap_is_what_it_says():
    method, params = trained("ia3", "t5_1_1")
    module = network("t5_1_1")
    merged = merging.merge_into_base(module, method, params)
    gap = merging.logit_gap(module, method, params, merged)
    assert (
        0
        <= gap.mean
        <= gap.largest
        < 1e-5 * gap.scale
        == pytest.approx(gap.largest * 1e-5 / gap.relative)
    )
    last = merged["decoder"]["decoder_norm"]  # Logits are linear in it.
    last["scale"] = last["scale"] * 1.5
    assert merging.logit_gap(module, method, params, merged).relative == pytest.approx(
        0.5, rel=1e-3
    )


def test_bfloat16_weights_are_merged_in_float32():
    method, params = trained("lora", "t5_1_1")
    low = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), params)
    merged = merging.merge_into_base(network("t5_1_1"), method, low)
    path = ("encoder", "layers_0", "attention", "query")
    layer = functools.reduce(lambda tree, name: tree[name], path, merged)
    assert layer["kernel"].dtype == jnp.float32
    raw = functools.reduce(lambda tree, name: tree[name], path, low)
    up = lambda leaf: np.asarray(leaf, np.float64)
    delta = up(raw["adapter"]["lora_a"]) @ up(raw["adapter"]["lora_b"]).reshape(2, -1)
    want = up(raw["kernel"]) + 3.0 / 2 * delta
    np.testing.assert_allclose(layer["kernel"], want, rtol=1e-5, atol=1e-5)


REFUSED = {
    "TokenRouter decides for every token": methods.mov,
    "TokenRouter decides for every token,": methods.molora,
    "SentenceRouter decides for every input text": functools.partial(
        methods.mov, routing="sentence"
    ),
    "draws skills for every example .*variant mu": functools.partial(
        methods.random_mu, N, "per_example"
    ),
}


@pytest.mark.parametrize("words", REFUSED)
def test_what_sees_the_input_is_refused(words):
    with pytest.raises(errors.UserError, match=f"cannot be merged: .*{words}") as caught:
        merging.check(REFUSED[words](), 0)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("task", [None, 5, -1, True, 1.0, "de"])
def test_a_task_must_be_named_and_exist(task):
    with pytest.raises(errors.UserError, match="'mhr' tells 5 tasks apart, 0 to 4; ") as caught:
        merging.check(poly(), task)
    assert repr(task) in str(caught.value) or "TASK=0" in str(caught.value)


def test_adapters_of_inputs_that_do_not_scale_are_refused():
    rule = patching.Rule(".*/wo", functools.partial(adapters.LoRA, rank=1), side="inputs")
    method = methods.Method("odd", (rule,))
    _, params = trained("lora", "t5_1_1")
    with pytest.raises(errors.UserError, match="mlp/wo reads inputs but scales nothing"):
        merging.merge_into_base(network("t5_1_1"), method, params)
