import os

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_peft import errors
from moe_peft.training import backbone

PARAMS = {
    "encoder": {"layers_0": {"kernel": np.arange(6, dtype=np.float32).reshape(2, 3)}},
    "token_embedder": {"embedding": np.ones((4, 2), np.float32)},
}
SHAPES = jax.eval_shape(lambda: PARAMS)


def _init(rng):
    return jax.tree.map(lambda leaf: jax.random.normal(rng, leaf.shape), SHAPES)


def _variant(**changes):
    """PARAMS with another embedding and with extra top-level trees."""
    return {**PARAMS, **{name: tree for name, tree in changes.items() if tree is not None}}


def test_file_round_trip(tmp_path):
    path = backbone.save(PARAMS, tmp_path / "deep" / "b.safetensors", metadata={"steps": 3})
    loaded = backbone.load(f"file:{path}", SHAPES, _init)
    jax.tree.map(np.testing.assert_array_equal, loaded.params, PARAMS)
    assert backbone.read_metadata(path) == {"steps": 3}
    assert [p.name for p in path.parent.iterdir()] == ["b.safetensors"]


def test_file_has_flat_names_and_the_wanted_dtype(tmp_path):
    path = backbone.save(PARAMS, tmp_path / "b.safetensors", dtype="bfloat16")
    kernel = backbone.read(path)["encoder"]["layers_0"]["kernel"]
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
        (_variant(adapters={"a": np.ones(1)}), "1 leaves that the model does not use.* adapters/a"),
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
    path = backbone.save(params, tmp_path / "b.safetensors")
    with pytest.raises(errors.UserError, match=words):
        backbone.load(f"file:{path}", SHAPES, _init)


@pytest.mark.parametrize(
    ("spec", "words"),
    [
        ("file:{}/nothing.safetensors", "no file .*nothing.safetensors"),
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
    with pytest.raises(errors.UserError, match="float32 or bfloat16, got 'float8'"):
        backbone.cast(PARAMS, "float8")
    (tmp_path / "file").write_text("")
    with pytest.raises(errors.UserError, match="Cannot write"):
        backbone.save(PARAMS, tmp_path / "file" / "b.safetensors")


def test_cast_leaves_integers_alone():
    tree = {"a": np.ones(2, np.float32), "b": np.ones(2, np.int32)}
    found = backbone.cast(tree, "bfloat16")
    assert found["a"].dtype == jnp.bfloat16
    assert found["b"].dtype == np.int32


@pytest.mark.parametrize(("umask", "mode"), [(0o022, 0o644), (0o077, 0o600), (0o002, 0o664)])
def test_files_have_the_mode_that_the_umask_gives(tmp_path, umask, mode):
    before = os.umask(umask)
    try:
        path = backbone.save(PARAMS, tmp_path / "b.safetensors")
    finally:
        os.umask(before)
    assert path.stat().st_mode & 0o777 == mode


def test_a_write_that_is_interrupted_leaves_the_old_file(tmp_path, monkeypatch):
    path = backbone.save(PARAMS, tmp_path / "b.safetensors")
    old = path.read_bytes()

    def interrupted(flat, partial, metadata):
        partial.write_bytes(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr("safetensors.numpy.save_file", interrupted)
    with pytest.raises(KeyboardInterrupt):
        backbone.save(_variant(extra={"a": np.ones(1)}), path)
    assert path.read_bytes() == old
    assert [p.name for p in tmp_path.iterdir()] == ["b.safetensors"]
