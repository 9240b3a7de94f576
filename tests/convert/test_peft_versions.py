"""Adapters of many versions of PEFT, made by hand: what is read is what PEFT computes."""

import importlib.util
import math
import pathlib
import re

import jax
import ml_dtypes
import numpy as np
import pytest

import moe_peft
from moe_peft import methods, patching
from moe_peft.convert import adapter_trees
from moe_peft.convert.peft import adapters
from moe_peft.models import encoder_decoder
from moe_peft.weights import hugging_face, records

_path = pathlib.Path(__file__).with_name("peft_by_hand.py")
_spec = importlib.util.spec_from_file_location(_path.stem, _path)
by_hand = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(by_hand)
OLD, NEW, MODULES, BLOCKS = by_hand.OLD, by_hand.NEW, by_hand.MODULES, by_hand.BLOCKS
of, tensors, write = by_hand.of, by_hand.tensors, by_hand.write
OURS = {"q": "query", "k": "key", "v": "value", "o": "out"}


def read(toy, folder, layout="t5_1_1"):
    base = adapters.Base("hf:somewhere", toy.network(layout).config, "of the toy")
    return adapters.read(folder, base)


def layer_of(module):
    """Our path of a module, written down here a second time."""
    stack, _, block, _, number, parent, name = module.split(".")
    if parent == "DenseReluDense":
        parent = "mlp"
    elif parent == "EncDecAttention":
        parent = "encoder_decoder_attention"
    else:
        parent = "attention" if stack == "encoder" else "self_attention"
    return f"{stack}/layers_{block}/{parent}/{OURS.get(name, name)}"


def deltas(saved):
    """What our adapters add to each kernel, [inputs, outputs]."""
    method, found = records.method(saved.description["method"], "toy"), {}
    for layer, own in adapter_trees.by_layer(saved).items():
        a, b = own["lora_a"], own["lora_b"]
        scale = adapter_trees.rule_of(method, layer).adapter_factory(parent=None).scale
        found[layer] = scale * a.reshape(-1, a.shape[-1]) @ b.reshape(len(b), -1)
    return found


def expected(arrays, scale):
    """The same by PEFT's formula: scale * (B A) transposed; `scale` is a function of the module."""
    found = {}
    for key, a in arrays.items():
        if key.endswith("lora_A.weight"):
            module, b = key.split(".", 2)[2].removesuffix(".lora_A.weight"), key.replace("_A", "_B")
            b = arrays[b].astype(np.float64)
            found[layer_of(module)] = scale(module) * (b @ a.astype(np.float64)).T
    return found


def by_name(table, default):
    return lambda module: table.get(module.rpartition(".")[2], default)


EVERY = (*by_hand.ATTENTION, *by_hand.FEED_FORWARD)
RANKS = {"rank_pattern": {"q": 4, r"block\.0\.layer\.0\.SelfAttention\.v": 1}}
ranks = lambda module: (
    4 if module.endswith(".q") else 1 if re.search(r"block\.0\.layer\.0.*\.v$", module) else 2
)
# Options, the modules with tensors, their ranks and scales.
READ = {
    "0.3": ({"fan_in_fan_out": True}, of("q", "v")),
    "0.2": ({"merge_weights": True, "enable_lora": None}, of("q", "v")),
    "0.21": (NEW, of("q", "v")),
    "no kind of task": ({**NEW, "task_type": None}, of("q", "v")),
    "every linear map": ({"target_modules": list(EVERY)}, MODULES),
    "all-linear": ({**NEW, "target_modules": "all-linear"}, MODULES),
    "feed-forward": ({"target_modules": list(by_hand.FEED_FORWARD)}, of(*by_hand.FEED_FORWARD)),
    "by whole names": ({"target_modules": MODULES[3:7]}, MODULES[3:7]),
    "by names with dots": (
        {"target_modules": ["SelfAttention.q", "EncDecAttention.k"]},
        [m for m in MODULES if m.endswith(("SelfAttention.q", "EncDecAttention.k"))],
    ),
    "by a pattern": (
        {"target_modules": r".*decoder.*(SelfAttention|EncDecAttention).*(q|v)$"},
        [m for m in of("q", "v") if m.startswith("decoder")],
    ),
    "without some": (
        {**NEW, "exclude_modules": ["EncDecAttention.q", BLOCKS[0] + ".v"]},
        [m for m in of("q", "v") if not m.endswith("EncDecAttention.q") and m != MODULES[2]],
    ),
    "without a pattern": (
        {**NEW, "exclude_modules": "encoder.*"},
        [m for m in of("q", "v") if m.startswith("decoder")],
    ),
    "some blocks": (
        {"target_modules": ["q"], "layers_to_transform": [1]},
        [m for m in of("q") if ".block.1." in m],
    ),
    "one block by its pattern": (
        {"target_modules": ["q"], "layers_to_transform": 0, "layers_pattern": "block"},
        [m for m in of("q") if ".block.0." in m],
    ),
    "the last number, as PEFT once took it": (
        {"target_modules": ["q"], "layers_to_transform": [1]},
        [m for m in of("q") if ".layer.1." in m],
    ),
    "o was also the end of wo": ({"target_modules": ["o"]}, of("o", "wo")),
    "not chosen by name": ({"target_modules": None}, of("q", "v")),
    "biases, which a T5 has not": ({"bias": "all"}, of("q", "v")),
    "rank-stabilised": ({"use_rslora": True}, of("q", "v"), None, lambda m: 6 / math.sqrt(2)),
    "ranks": (RANKS, of("q", "v"), ranks, lambda m: 6 / ranks(m)),
    "alphas": (
        {"alpha_pattern": {"SelfAttention.q": 3, "v": 5.0}},
        of("q", "v"),
        None,
        lambda m: (3 if m.endswith("SelfAttention.q") else 5 if m.endswith("v") else 6) / 2,
    ),
    "ranks and alphas with the same scale": (
        {"rank_pattern": {"q": 4}, "alpha_pattern": {"q": 12}},
        of("q", "v"),
        by_name({"q": 4}, 2),
        lambda m: 3.0,
    ),
    "all of them": (
        {**NEW, **RANKS, "alpha_pattern": {"v": 5, "w.*": 1}, "use_rslora": True}
        | {"target_modules": list(EVERY)},
        MODULES,
        ranks,
        lambda m: (5 if m.endswith(".v") else 1 if ".w" in m else 6) / math.sqrt(ranks(m)),
    ),
    "the first of two patterns counts": (
        {"alpha_pattern": {".*q": 1, "q": 9}},
        of("q", "v"),
        None,
        lambda m: 0.5 if m.endswith("q") else 3.0,
    ),
    "EVA": (
        {**NEW, "init_lora_weights": "eva", "eva_config": {"rho": 2.0}, "rank_pattern": {"q": 1}},
        of("q", "v"),
        by_name({"q": 1}, 2),
        by_name({"q": 6.0}, 3.0),
    ),
}


@pytest.mark.parametrize("name", READ)
def test_what_versions_of_peft_wrote_is_read(toy, tmp_path, name):
    options, modules, own_ranks, scale = (*READ[name], None, None)[:4]
    arrays = tensors(modules, own_ranks or (lambda module: 2))
    saved = read(toy, write(tmp_path / "a", {**OLD, **options}, arrays))
    ours, theirs = deltas(saved), expected(arrays, scale or (lambda module: 3.0))
    assert ours.keys() == theirs.keys()
    for layer, delta in theirs.items():
        np.testing.assert_allclose(ours[layer], delta, rtol=2e-5, atol=2e-6, err_msg=layer)
    assert adapters.gap(saved, tmp_path / "a").relative < 1e-6
    # Equal scales stay an alpha: no bit of B changes.
    if scale is None:
        (rule,) = records.method(saved.description["method"], "toy").rules
        assert (rule.adapter_factory().rank, rule.adapter_factory().alpha) == (2, 6.0)


def named(change):
    return lambda arrays: {change(key): array for key, array in arrays.items()}


short = named(lambda key: key.removeprefix("base_model.model."))
KEYS = {
    "without a prefix": short,
    "with the adapter's name": named(lambda key: key.replace(".weight", ".default.weight")),
    "both": lambda arrays: named(lambda k: k.replace(".weight", ".mine.weight"))(short(arrays)),
    "float16": lambda arrays: {k: a.astype(np.float16) for k, a in arrays.items()},
    "bfloat16": lambda arrays: {k: a.astype(ml_dtypes.bfloat16) for k, a in arrays.items()},
}


@pytest.mark.parametrize("is_pickled", [False, True])
@pytest.mark.parametrize("name", KEYS)
def test_keys_and_dtypes(toy, writing, tmp_path, name, is_pickled):
    arrays = tensors(of("q", "v"))
    changed = KEYS[name](arrays)
    folder = write(tmp_path / "a", OLD, changed, writing if is_pickled else None)
    values = dict(zip(arrays, changed.values(), strict=True))
    ours, theirs = deltas(read(toy, folder)), expected(values, lambda module: 3.0)
    assert ours.keys() == theirs.keys()
    for layer, delta in theirs.items():
        np.testing.assert_allclose(ours[layer], delta, rtol=2e-5, atol=2e-6)


def test_logits_with_everything_and_a_trained_head(toy, tmp_path):
    options, modules, own_ranks, scale = READ["all of them"]
    arrays = tensors(modules, own_ranks)
    head = np.random.default_rng(9).normal(size=(32, 16)).astype(np.float32)
    config = {**OLD, **options, "modules_to_save": ["lm_head"]}
    key = "base_model.model.lm_head"
    saved = read(toy, write(tmp_path / "a", config, {**arrays, f"{key}.weight": head}))
    key = f"{key}.modules_to_save.default"
    named_so = read(toy, write(tmp_path / "b", config, {**arrays, f"{key}.weight": head}))
    assert toy.same(named_so.trainable, saved.trainable)
    method = records.method(saved.description["method"], "toy")
    network = toy.network("t5_1_1")
    plain = toy.base_params(network)
    frozen, replaced = method.split(plain)
    assert list(patching.flatten(replaced)) == ["decoder/logits_dense/kernel"]
    found = toy.logits(method, network, frozen, saved.trainable, toy.batch())

    flat = patching.flatten(plain)
    for layer, delta in expected(arrays, scale).items():
        kernel = flat[f"{layer}/kernel"]
        flat[f"{layer}/kernel"] = (kernel + delta.reshape(kernel.shape)).astype(np.float32)
    flat["decoder/logits_dense/kernel"] = head.T
    merged = patching.trees.unflatten(flat)
    logits = jax.jit(encoder_decoder.EncoderDecoder(network).logits)
    want = np.asarray(logits(merged, toy.batch()))
    assert np.abs(want - logits(plain, toy.batch())).max() > 0.1 * np.abs(want).max()
    assert np.abs(found - want).max() < 1e-5 * np.abs(want).max()
    # PEFT's folder has no place for it in what we write.
    assert "more than those" in adapters.methods_lib.why_not(method)
    assert method.name == methods.lora().name
    assert saved.description["gin"] == []


@pytest.mark.parametrize("has_head", [False, True])
def test_load_and_save(toy, tmp_path, monkeypatch, has_head):
    monkeypatch.chdir(tmp_path)
    network = toy.network("t5_1_1")
    hugging_face.write(tmp_path / "t5", network.config, toy.base_params(network))
    arrays, config = tensors(of("q", "v")), {**OLD, "base_model_name_or_path": "t5"}
    if has_head:
        arrays["base_model.model.lm_head.weight"] = np.ones((32, 16), np.float32)
        config["modules_to_save"] = ["lm_head"]
    write(tmp_path / "a", config, arrays)
    model = moe_peft.load("a", vocabulary="bytes")
    assert model.backbone == f"hf:{tmp_path / 't5'}"
    _, trained = model.method.split(model.params)
    read_too = moe_peft.load("peft:a", backbone="t5", vocabulary="bytes")
    assert toy.same(trained, read_too.method.split(read_too.params)[1])
    assert ("decoder/logits_dense/kernel" in patching.flatten(trained)) == has_head
    model.save("b")
    # PEFT has a place for the adapter alone.
    assert (tmp_path / "b" / "adapter_model.safetensors").exists() != has_head
    again = moe_peft.load("b", vocabulary="bytes")
    assert toy.same(trained, again.method.split(again.params)[1])
