import dataclasses
import json
import os

import gin
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_peft import errors, methods, patching
from moe_peft.models import special_ids, t5
from moe_peft.runtime import digest
from moe_peft.training import start
from moe_peft.weights import (
    backbone,
    hugging_face,
    identity,
    leaves,
    records,
    safetensors_files,
    t5_sizes,
    t5x_files,
)

PARAMS = {
    "encoder": {"layers_0": {"kernel": np.arange(6, dtype=np.float32).reshape(2, 3)}},
    "token_embedder": {"embedding": np.ones((4, 2), np.float32)},
}
SHAPES = jax.eval_shape(lambda: PARAMS)
TOKENS = ("encoder_input_tokens", "decoder_input_tokens", "decoder_target_tokens")
BATCH_SHAPES = dict.fromkeys(TOKENS, (1, 2))


def _init(rng):
    return jax.tree.map(lambda leaf: jax.random.normal(rng, leaf.shape), SHAPES)


def _variant(**changes):
    """PARAMS with another embedding and with extra top-level trees."""
    return {**PARAMS, **{name: tree for name, tree in changes.items() if tree is not None}}


def test_file_round_trip(tmp_path):
    path = safetensors_files.save_tree(
        PARAMS, tmp_path / "deep" / "b.safetensors", metadata={"steps": 3}
    )
    loaded = backbone.load(f"file:{path}", SHAPES, _init)
    jax.tree.map(np.testing.assert_array_equal, loaded.params, PARAMS)
    assert safetensors_files.read_metadata(path) == {"steps": 3}
    assert [p.name for p in path.parent.iterdir()] == ["b.safetensors"]


def test_file_has_flat_names_and_the_wanted_dtype(tmp_path):
    path = safetensors_files.save_tree(PARAMS, tmp_path / "b.safetensors", dtype="bfloat16")
    kernel = safetensors_files.read_tree(path)["encoder"]["layers_0"]["kernel"]
    assert kernel.dtype == jnp.bfloat16
    np.testing.assert_array_equal(kernel.astype(np.float32), np.arange(6).reshape(2, 3))
    assert b'"encoder/layers_0/kernel"' in path.read_bytes()


def test_random_backbones_are_named_by_their_seed():
    one, again, other = (backbone.load(f"random:{s}", SHAPES, _init) for s in (1, 1, 2))
    assert one.fingerprint == again.fingerprint != other.fingerprint
    jax.tree.map(np.testing.assert_array_equal, one.params, again.params)


@pytest.mark.parametrize(
    ("params", "words"),
    [
        (
            {"encoder": PARAMS["encoder"]},
            "lacks 1 of the model's 2 leaves.* token_embedder/embedding",
        ),
        (
            _variant(adapters={"a": np.ones(1)}),
            "1 leaves that the model has no place for.* adapters/a",
        ),
        (
            _variant(token_embedder={"embedding": np.ones((5, 2), np.float32)}),
            r"another vocabulary.*token_embedder/embedding is \(5, 2\) .* and \(4, 2\) in",
        ),
        (
            _variant(encoder={"layers_0": {"kernel": np.ones((3, 2), np.float32)}}),
            r"another shape than .*encoder/layers_0/kernel is \(3, 2\) .* and \(2, 3\) in",
        ),
        (
            _variant(encoder={"layer_0": {"kernel": np.ones((2, 3), np.float32)}}),
            "lacks 1 .*encoder/layers_0/kernel.*Did you mean 'encoder/layer_0/kernel'",
        ),
    ],
)
def test_misfits_name_the_leaf(tmp_path, params, words):
    path = safetensors_files.save_tree(params, tmp_path / "b.safetensors")
    with pytest.raises(errors.UserError, match=words):
        backbone.load(f"file:{path}", SHAPES, _init)


@pytest.mark.parametrize(
    ("spec", "words"),
    [
        ("file:{}/nothing.safetensors", "There is no .*nothing.safetensors"),
        ("file:{}/no/folder.safetensors", "folder .*no does not exist"),
        ("file:{}/bad.safetensors", "cannot be read as safetensors"),
        ("file:{}/bud.safetensors", "Did you mean 'bad.safetensors'"),
        ("run:{}", "no training checkpoint in"),
        ("run:{}@x", "step 'x' is not a number"),
        ("random:", "has no seed"),
        ("embedded:nothing", "is not shipped; there is"),
        ("cldr_tiny", "is none of random:SEED, embedded:NAME"),
    ],
)
def test_specs_that_lead_nowhere(tmp_path, spec, words):
    (tmp_path / "bad.safetensors").write_bytes(b"no header")
    with pytest.raises(errors.UserError, match=words):
        backbone.load(spec.format(tmp_path), SHAPES, _init)


def test_run_of_adapters_is_no_backbone(toy, tmp_path):
    toy.fit(tmp_path, 1)
    with pytest.raises(errors.UserError, match="method 'toy' and holds only its adapters"):
        backbone.load(f"run:{tmp_path}", SHAPES, _init)


def test_unknown_dtype_and_unwritable_file(tmp_path):
    with pytest.raises(errors.UserError, match="'float8'; expected one of float32, bfloat16"):
        leaves.cast_tree(PARAMS, "float8")
    (tmp_path / "file").write_text("")
    with pytest.raises(errors.UserError, match="Cannot write"):
        safetensors_files.save_tree(PARAMS, tmp_path / "file" / "b.safetensors")


def test_cast_leaves_integers_alone():
    tree = {"a": np.ones(2, np.float32), "b": np.ones(2, np.int32)}
    found = leaves.cast_tree(tree, "bfloat16")
    assert found["a"].dtype == jnp.bfloat16
    assert found["b"].dtype == np.int32


@pytest.mark.parametrize(("umask", "mode"), [(0o022, 0o644), (0o077, 0o600), (0o002, 0o664)])
def test_files_have_the_mode_that_the_umask_gives(tmp_path, umask, mode):
    before = os.umask(umask)
    try:
        path = safetensors_files.save_tree(PARAMS, tmp_path / "b.safetensors")
    finally:
        os.umask(before)
    assert path.stat().st_mode & 0o777 == mode


def test_a_write_that_is_interrupted_leaves_the_old_file(tmp_path, monkeypatch):
    path = safetensors_files.save_tree(PARAMS, tmp_path / "b.safetensors")
    old = path.read_bytes()

    def interrupted(partial, tensors, metadata):
        partial.write_bytes(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr(safetensors_files, "write_file", interrupted)
    with pytest.raises(KeyboardInterrupt):
        safetensors_files.save_tree(_variant(extra={"a": np.ones(1)}), path)
    assert path.read_bytes() == old
    assert [p.name for p in tmp_path.iterdir()] == ["b.safetensors"]


# Backbones of other projects


CONFIG = t5.T5Config(16, 8, 2, 4, 12, 2, 1)


def _flat(config=CONFIG):
    rng = np.random.default_rng(0)
    shapes = t5_sizes.shapes_of(config)
    return {path: rng.normal(size=shape).astype(np.float32) for path, shape in shapes.items()}


def _shapes(config):
    flat = t5_sizes.shapes_of(config)
    of = lambda shape: jax.ShapeDtypeStruct(shape, np.float32)
    return patching.trees.unflatten({path: of(shape) for path, shape in flat.items()})


def _write(kind, folder):
    writers = {"hf": hugging_face.write, "t5x": t5x_files.write}
    writers[kind](folder, CONFIG, _flat())
    return f"{kind}:{folder}"


@pytest.fixture(params=["hf", "t5x"])
def spec(request, tmp_path):
    return _write(request.param, tmp_path / "model")


@pytest.fixture
def clean_gin():
    yield
    gin.clear_config()


def test_backbones_of_other_projects(spec):
    loaded = backbone.load(spec, _shapes(CONFIG), None)
    flat = patching.flatten(loaded.params)
    assert flat.keys() == _flat().keys()
    for path, values in _flat().items():
        np.testing.assert_array_equal(flat[path], values)
        assert flat[path].flags["C_CONTIGUOUS"]
    # The fingerprint is that of the same weights from anywhere else.
    assert loaded.fingerprint == digest.of_tree(patching.trees.unflatten(_flat()))


def test_each_leaf_is_stored_as_it_will_be_used(spec):
    stored_as = lambda path: "float32" if "norm" in path else "bfloat16"
    loaded = backbone.load(spec, _shapes(CONFIG), None, stored_as)
    assert patching.flatten(loaded.params).keys() == _flat().keys()
    for path, leaf in patching.flatten(loaded.params).items():
        assert leaf.dtype == stored_as(path)
    assert loaded.fingerprint == backbone.load(spec, _shapes(CONFIG), None).fingerprint


@pytest.mark.parametrize("kind", ["hf", "t5x", "file"])
def test_backbones_come_in_the_layout_of_the_model(kind, tmp_path):
    scanned = dataclasses.replace(CONFIG, scan_layers=True)
    if kind == "file":
        spec = (
            f"file:{safetensors_files.save_tree(patching.trees.unflatten(_flat()), tmp_path / 'b')}"
        )
    else:
        spec = _write(kind, tmp_path / "model")
    loaded = backbone.load(spec, _shapes(scanned), None)
    key = loaded.params["encoder"]["encoder"]["attention"]["key"]["kernel"]
    np.testing.assert_array_equal(
        key[:, 1], _flat()["encoder/layers_1/attention/key/kernel"].reshape(8, 2, 4)
    )


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"vocab_size": 20}, r"another size than the model: vocab_size 16 \(model config: 20\)\."),
        ({"num_decoder_layers": 3}, r"num_decoder_layers 1 \(model config: 3\)\. Set T5Config to"),
        ({"logits_via_embedding": True}, r"logits_via_embedding False \(model config: True\)"),
    ],
)
@pytest.mark.parametrize("check", [backbone.load, backbone.check_headers])
def test_another_size_is_told_before_anything_is_read(spec, change, words, check, monkeypatch):
    monkeypatch.setattr(leaves.Leaf, "__array__", lambda *_: pytest.fail("read"))
    shapes = _shapes(dataclasses.replace(CONFIG, **change))
    arguments = (None,) if check is backbone.load else ()
    with pytest.raises(errors.UserError, match=words):
        check(spec, shapes, *arguments)


SILU = dataclasses.replace(CONFIG, mlp_activations=("silu", "linear"), relpos_max_distance=64)


def test_what_shapes_do_not_tell_is_compared_where_files_tell_it(tmp_path):
    hugging_face.write(tmp_path / "m", SILU, _flat())
    spec = f"hf:{tmp_path / 'm'}"
    backbone.check_headers(spec, _shapes(CONFIG), SILU)
    differing = r"mlp_activations \('silu', 'linear'\) .*relpos_max_distance 64 \(model config: 128"
    with pytest.raises(errors.UserError, match=differing):
        backbone.check_headers(spec, _shapes(CONFIG), CONFIG)
    (tmp_path / "m" / "config.json").unlink()
    backbone.check_headers(spec, _shapes(CONFIG), SILU)
    assert backbone.load(spec, _shapes(CONFIG), None, network=SILU).fingerprint


def test_biases_in_every_layer_come_in_the_layout_of_the_model(tmp_path):
    """Also from where shapes alone tell the network: scanned, all look alike."""
    umt5 = dataclasses.replace(CONFIG, relpos_in_every_layer=True)
    scanned = dataclasses.replace(umt5, scan_layers=True)
    stacked = patching.trees.unflatten(_flat(scanned))
    t5x_files.write(tmp_path / "t5x", scanned, stacked)
    safetensors_files.save_tree(stacked, tmp_path / "b.safetensors")
    for spec in (f"t5x:{tmp_path / 't5x'}", f"file:{tmp_path / 'b.safetensors'}"):
        biases = _flat(scanned)["encoder/encoder/relpos_bias/rel_embedding"]
        loaded = backbone.load(spec, _shapes(umt5), None, network=umt5)
        for number in range(2):
            bias = loaded.params["encoder"][f"layers_{number}"]["relpos_bias"]["rel_embedding"]
            np.testing.assert_array_equal(bias, biases[:, number])
        with pytest.raises(errors.UserError, match="relpos_in_every_layer = True"):
            backbone.load(spec, _shapes(CONFIG), None, network=CONFIG)


def test_a_size_with_a_name_says_which_file_fits(tmp_path):
    config = t5_sizes.config_named("tiny")
    hugging_face.write(tmp_path / "m", config, _flat(config))
    with pytest.raises(errors.UserError, match=r"emb_dim 32 .* Take models/tiny.gin."):
        backbone.check_headers(f"hf:{tmp_path / 'm'}", _shapes(CONFIG))


def test_missing_and_unused_leaves_are_errors_unless_named(tmp_path, clean_gin, capsys):
    flat = _flat()
    del flat["decoder/decoder_norm/scale"]
    flat["decoder/more/kernel"] = np.ones((2, 2), np.float32)
    found = leaves.flatten(flat)
    target = tmp_path / "m" / "checkpoint_0"
    target.mkdir(parents=True)
    t5x_files._write_legacy(target, found, 0)
    spec = f"t5x:{tmp_path / 'm'}"
    fresh = lambda rng: jax.tree.map(lambda x: jnp.full(x.shape, 7.0), _shapes(CONFIG))
    with pytest.raises(errors.UserError, match="lacks 1 of .*decoder/decoder_norm/scale"):
        backbone.load(spec, _shapes(CONFIG), fresh)
    gin.bind_parameter("backbones.allowed.missing", ("decoder/decoder_norm/.*",))
    with pytest.raises(errors.UserError, match="has 1 leaves .*target.decoder.more.kernel"):
        backbone.load(spec, _shapes(CONFIG), fresh)
    gin.bind_parameter("backbones.allowed.unused", (".*more.kernel",))
    loaded = backbone.load(spec, _shapes(CONFIG), fresh)
    np.testing.assert_array_equal(loaded.params["decoder"]["decoder_norm"]["scale"], np.full(8, 7))
    assert "more" not in loaded.params["decoder"]
    printed = capsys.readouterr().err
    assert "missing: decoder/decoder_norm/scale" in printed
    assert "unused: " in printed


def test_kinds_that_hold_no_model(tmp_path):
    with pytest.raises(errors.UserError, match="is none of random:SEED.*hf:FOLDER, t5x:FOLDER"):
        backbone.load("hg:/tmp", SHAPES, _init)
    with pytest.raises(errors.UserError, match="There is no .*nowhere"):
        backbone.load(f"t5x:{tmp_path / 'nowhere'}", SHAPES, _init)
    backbone.check_headers("random:0", SHAPES)


@pytest.mark.parametrize(("device", "is_scanned"), [("cpu", False), ("gpu", True)])
def test_deep_networks_are_scanned_on_accelerators(monkeypatch, device, is_scanned):
    monkeypatch.setattr(backbone, "_MANY_LAYERS", 1)
    monkeypatch.setattr(jax, "default_backend", lambda: device)
    assert backbone.network("embedded:cldr_tiny").config.scan_layers == is_scanned


def test_a_description_says_other_ids_only():
    sizes = {"vocab_size": 8, "emb_dim": 4, "num_heads": 1, "head_dim": 4, "mlp_dim": 4}
    sizes |= {"num_encoder_layers": 1, "num_decoder_layers": 1}
    described = identity.describe_model(t5.Transformer(t5.T5Config(**sizes)))
    # What version 0.1 wrote with every checkpoint, in its order.
    options = {
        "mlp_activations": ("gelu", "linear"),
        "dropout_rate": 0.1,
        "logits_via_embedding": False,
        "float32_attention_logits": False,
        "dtype": "float32",
        "scan_layers": False,
        "remat_policy": "none",
    }
    expected = {"class": "Transformer", "config": {**sizes, **options}}
    assert json.dumps(described) == json.dumps(expected)
    other = t5.Transformer(t5.T5Config(**sizes, pad_id=1, eos_id=2))
    described = identity.as_json(identity.describe_model(other))
    assert described["config"] == identity.as_json(expected)["config"] | {"pad_id": 1, "eos_id": 2}
    assert records.network({"model": described}, "here") == other


@pytest.mark.parametrize("kind", ["hf", "file"])
def test_a_backbone_with_other_ids_than_the_model_is_refused(tmp_path, cfg_1_1, flat, kind):
    config, ids = dataclasses.replace(cfg_1_1, pad_id=1, eos_id=2), special_ids.SpecialIds(1, 2, 0)
    if kind == "hf":
        place = hugging_face.write(tmp_path / "t5", config, flat(config))
    else:
        described = {"model": identity.describe_model(t5.Transformer(config))}
        tree = patching.trees.unflatten(flat(config))
        place = safetensors_files.save_tree(tree, tmp_path / "a.safetensors", None, described)
    backbone.check_special_ids(f"{kind}:{place}", ids)
    assert special_ids.of(backbone.network(f"{kind}:{place}")) == ids
    begin = start.Start.of_network(t5.Transformer(cfg_1_1), methods.frozen(), BATCH_SHAPES)
    for call in (begin.check_backbone, lambda spec: begin.trees(spec, 0, "float32")):
        with pytest.raises(errors.UserError, match="has the ids padding 1, end 2, start 0; the mo"):
            call(f"{kind}:{place}")


def test_files_that_tell_no_ids_fit_every_model(tmp_path, cfg_1_1, flat):
    folder = hugging_face.write(tmp_path / "t5", cfg_1_1, flat(cfg_1_1))
    (folder / "config.json").unlink()
    t5x_files.write(tmp_path / "t5x", cfg_1_1, flat(cfg_1_1))
    path = safetensors_files.save_tree(flat(cfg_1_1), tmp_path / "a.safetensors")
    for spec in (f"hf:{folder}", f"t5x:{tmp_path / 't5x'}", f"file:{path}", "random:0"):
        backbone.check_special_ids(spec, special_ids.SpecialIds(1, 2, 0))
