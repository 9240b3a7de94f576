"""T5X's layouts without T5X: the format written by hand, and every way in which one is wrong."""

import dataclasses
import json

from etils import epath
from flax import serialization
import ml_dtypes
import numpy as np
import pytest
import tensorstore as ts

from moe_peft import errors, patching
from moe_peft.weights import (
    checkpoint_file,
    formats,
    hugging_face,
    leaves,
    t5x_files,
    zarr_files,
)

LAYOUTS = ("legacy", "orbax")
QUICK = ts.Context({"file_io_sync": False})
SCALE = "target.encoder.encoder_norm.scale"


@pytest.fixture
def cfg(cfg_1_1):
    """The other version has a leaf less; tests of transformers' folders have both."""
    return cfg_1_1


def assert_same(flat, params):
    params = patching.flatten(params)
    assert flat.keys() == params.keys()
    assert len(flat) > 20
    for path, leaf in flat.items():
        assert leaf.dtype == params[path].dtype
        np.testing.assert_array_equal(leaf, params[path], err_msg=path)


def written_by_hand(folder, flat, driver="gfile", old_path=False):
    """The legacy layout as T5X leaves it: gzip, an optimiser's state, small leaves in the index."""
    target = {}
    for path, values in flat.items():
        if path.endswith("scale"):
            target[path] = values
            continue
        name = "target." + path.replace("/", ".")
        metadata = {
            "chunks": [max(size // 2, 1) for size in values.shape],
            "compressor": {"id": "gzip", "level": 1},
            "shape": list(values.shape),
        }
        spec = {"driver": "zarr", "dtype": values.dtype.name, "metadata": metadata}
        store = {"driver": "file", "path": f"{folder}/{name}/"}
        array = ts.open({**spec, "kvstore": store}, create=True, context=QUICK).result()
        array.write(values).result()
        place = {"bucket": "t5x-dummy-bucket"} if driver == "gcs" else {}
        if old_path:
            target[path] = {**spec, "kvstore": {"driver": driver, **place}, "path": name}
        else:
            target[path] = {**spec, "kvstore": {"driver": driver, "path": f"{name}/", **place}}
    moments = {"v": np.zeros(3, np.float32), "m": None}
    tree = {
        "target": patching.trees.unflatten(target),
        "state": {"step": np.int32(5), "param_states": {"x": moments}},
    }
    index = serialization.msgpack_serialize({"version": 3, "optimizer": tree})
    (folder / "checkpoint").write_bytes(index)


@pytest.fixture
def folder(tmp_path):
    folder = tmp_path / "run" / "checkpoint_5"
    folder.mkdir(parents=True)
    return folder


@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16])
@pytest.mark.parametrize(
    "options", [{}, {"driver": "file"}, {"driver": "gcs"}, {"driver": "gcs", "old_path": True}]
)
def test_legacy_layout_as_t5x_writes_it(cfg, flat, folder, dtype, options):
    params = flat(cfg, dtype)
    written_by_hand(folder, params, **options)
    for path in (folder, folder.parent, folder / "checkpoint"):
        assert formats.detect(path) == "t5x"
        config, read = t5x_files.read(path)
        assert config == cfg
        assert_same(params, read)


def test_scanned_layout_as_t5x_writes_it(cfg, flat, folder):
    scanned = dataclasses.replace(cfg, scan_layers=True)
    params = flat(scanned)
    for stack in ("encoder", "decoder"):  # the same in every layer, as released ones are
        path = f"{stack}/{stack}/relpos_bias/rel_embedding"
        params[path] = np.repeat(params[path][:, :1], params[path].shape[1], 1)
    written_by_hand(folder, params)
    assert_same(params, t5x_files.read(folder, scan_layers=True)[1])
    config, unscanned = t5x_files.read(folder)
    assert config == cfg
    kernel = unscanned["decoder"]["layers_2"]["self_attention"]["query"]["kernel"]
    stacked = params["decoder/decoder/self_attention/query/kernel"]
    np.testing.assert_array_equal(kernel, stacked[:, 2].reshape(12, 12))
    again = folder.parent / "again"
    t5x_files.write(again, config, unscanned)
    assert_same(params, t5x_files.read(again, scan_layers=True)[1])


def test_biases_that_differ_between_layers_stay_scanned(cfg, flat, folder):
    written_by_hand(folder, flat(dataclasses.replace(cfg, scan_layers=True)))
    t5x_files.read(folder, scan_layers=True)
    with pytest.raises(errors.UserError, match="rel_embedding differs from layer to layer"):
        t5x_files.read(folder)


def test_biases_in_every_layer_are_those_of_scanned_layers(cfg, flat, tmp_path):
    umt5 = dataclasses.replace(cfg, relpos_in_every_layer=True)
    params = flat(umt5)
    given = checkpoint_file.CheckpointFile("here", umt5, leaves.flatten(params)).scanned(True)
    path = t5x_files.write(tmp_path / "run", given.config, given.leaves)
    # T5X has no config in its checkpoints; the model's says that the unscanned has them too.
    opened = t5x_files.open_folder(path)
    assert opened.is_recognised
    told = dataclasses.replace(opened, config=given.config)
    assert_same(params, told.read()[1])


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"relpos_buckets": 64}, "relpos_buckets is 64; T5X's networks always have 32"),
        ({"relpos_max_distance": 64}, "relpos_max_distance is 64; T5X's .* always have 128"),
        ({"mlp_activations": ("gelu_exact", "linear")}, "the tanh form of gelu, not gelu_exact"),
        ({"relpos_in_every_layer": True}, "one position bias per stack.*Set scan_layers"),
    ],
)
def test_what_t5x_cannot_be_told(cfg, flat, tmp_path, options, words):
    config = dataclasses.replace(cfg, **options)
    with pytest.raises(errors.UserError, match=words):
        t5x_files.write(tmp_path / "run", config, flat(config))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("scan_layers", [False, True])
def test_there_and_back(cfg, flat, tmp_path, layout, scan_layers):
    cfg = dataclasses.replace(cfg, scan_layers=scan_layers)
    params = flat(cfg)
    path = t5x_files.write(tmp_path / "run", cfg, params, step=3, layout=layout)
    assert path == tmp_path / "run" / "checkpoint_3"
    assert formats.detect(tmp_path / "run") == "t5x"
    config, read = t5x_files.read(tmp_path / "run", scan_layers=scan_layers)
    assert config == cfg
    assert_same(params, read)
    rounded = t5x_files.read(path, "bfloat16", scan_layers=scan_layers)[1]
    assert_same({p: v.astype(ml_dtypes.bfloat16) for p, v in params.items()}, rounded)
    with pytest.raises(errors.UserError, match="checkpoint_3 exists"):
        t5x_files.write(tmp_path / "run", cfg, params, step=3)


def test_orbax_without_a_database(cfg, flat, tmp_path):
    """As older versions wrote it: a folder per array and an index of placeholders."""
    params = flat(cfg)
    state = tmp_path / "checkpoint_1" / "state"
    state.mkdir(parents=True)
    tree = {}
    for path, values in params.items():
        name = "target." + path.replace("/", ".")
        zarr_files.write(
            zarr_files.array_spec(name), epath.Path(state), leaves.from_array(values, path)
        )
        tree[path] = f"PLACEHOLDER://{name}"
    index = {"target": patching.trees.unflatten(tree), "state": {"step": 1}}
    (state / "checkpoint").write_bytes(serialization.msgpack_serialize(index))
    assert_same(params, t5x_files.read(tmp_path)[1])


def test_newest_checkpoint_of_a_run(cfg, flat, tmp_path):
    one, other = flat(cfg), {p: v + 1 for p, v in flat(cfg).items()}
    t5x_files.write(tmp_path, cfg, other, step=20)
    t5x_files.write(tmp_path, cfg, one, step=9)
    assert_same(other, t5x_files.read(tmp_path)[1])
    assert_same(one, t5x_files.read(tmp_path / "checkpoint_9")[1])


def test_to_hugging_face_and_back(cfg, flat, tmp_path):
    t5x_files.write(tmp_path / "t5x", cfg, flat(cfg))
    opened = t5x_files.open_folder(tmp_path / "t5x")
    hugging_face.write(tmp_path / "hf", opened.config, opened.leaves)
    again = hugging_face.open_folder(tmp_path / "hf")
    t5x_files.write(tmp_path / "again", again.config, again.leaves)
    assert_same(flat(cfg), t5x_files.read(tmp_path / "again")[1])


def test_buckets_are_addressed_by_their_own_driver():
    spec = zarr_files._located(
        zarr_files.array_spec("target.a"), epath.Path("gs://bucket/t5x/base")
    )
    assert spec["kvstore"] == {"driver": "gcs", "bucket": "bucket", "path": "t5x/base/target.a/"}
    spec = zarr_files._located(
        zarr_files.array_spec("target.a", is_database=True), epath.Path("gs://bucket/t5x")
    )
    assert spec["kvstore"]["base"] == {"driver": "gcs", "bucket": "bucket", "path": "t5x/"}


def test_a_bucket_that_does_not_answer(monkeypatch):
    class Path:
        def __init__(self, path):
            self.path = path

        def __str__(self):
            return self.path

        def exists(self):
            raise RuntimeError("Could not resolve host\nmore")

    monkeypatch.setattr("etils.epath.Path", Path)
    with pytest.raises(errors.UserError) as caught:
        t5x_files.open_folder("gs://bucket/run")
    assert str(caught.value) == "gs://bucket/run cannot be reached: Could not resolve host."


def test_chunks_divide_the_shape():
    assert zarr_files.chunks((12, 4), 4) == [12, 4]
    rows, columns = zarr_files.chunks((32128, 4096), 4)
    assert 32128 % rows == 4096 % columns == 0
    assert rows * columns * 4 <= 64 * 1024 * 1024 < 2 * 32128 * columns * 4


# What can be wrong


def drop_array(folder, name):
    for file in sorted((folder / name).iterdir()):
        file.unlink()
    (folder / name).rmdir()


def test_missing_and_unused_leaves(cfg, flat, folder):
    params = flat(cfg)
    del params["encoder/encoder_norm/scale"]
    written_by_hand(folder, {**params, "encoder/extra/kernel": np.ones((2, 2), np.float32)})
    with pytest.raises(errors.UserError, match="lacks 1 of .*encoder/encoder_norm/scale"):
        t5x_files.read(folder)
    with pytest.raises(errors.UserError, match="has 1 leaves.*target.encoder.extra.kernel"):
        t5x_files.read(folder, allow_missing=[".*scale"])
    named = {"allow_missing": [".*encoder_norm.*"], "allow_unused": [".*extra.kernel"]}
    assert_same(params, t5x_files.read(folder, **named)[1])


def test_an_array_that_is_not_there(cfg, flat, folder):
    written_by_hand(folder, flat(cfg))
    drop_array(folder, "target.token_embedder.embedding")
    with pytest.raises(errors.UserError, match="target.token_embedder.embedding cannot be opened"):
        t5x_files.read(folder)


def test_a_chunk_cut_short(cfg, flat, folder):
    written_by_hand(folder, flat(cfg))
    chunk = folder / "target.token_embedder.embedding" / "0.0"
    chunk.write_bytes(chunk.read_bytes()[:20])
    with pytest.raises(errors.UserError, match="target.token_embedder.embedding cannot be read"):
        t5x_files.read(folder)


def test_leaves_of_another_shape(cfg, flat, folder):
    params = flat(cfg)
    params["encoder/layers_1/mlp/wo/kernel"] = np.ones((20, 5), np.float32)
    written_by_hand(folder, params)
    words = r"target.encoder.layers_1.mlp.wo.kernel.*shape \(20, 5\).*\(20, 12\)"
    with pytest.raises(errors.UserError, match=words):
        t5x_files.read(folder)


def test_a_decoder_only_model(cfg, flat, folder):
    written_by_hand(folder, {p: v for p, v in flat(cfg).items() if not p.startswith("encoder")})
    with pytest.raises(errors.UserError, match="is not a T5 encoder-decoder: it has no encoder/"):
        t5x_files.read(folder)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"\xc1\xc1", "checkpoint is damaged: not a msgpack file"),
        (serialization.msgpack_serialize([1]), "holds list, expected a tree"),
        (serialization.msgpack_serialize({"optimizer": {"state": {}}}), "no leaves under 'target'"),
        (
            serialization.msgpack_serialize({"target": {"token_embedder": {"embedding": "x"}}}),
            "target.token_embedder.embedding is 'x', expected an array",
        ),
    ],
)
def test_damaged_indexes(folder, content, words):
    (folder / "checkpoint").write_bytes(content)
    with pytest.raises(errors.UserError, match=words):
        t5x_files.read(folder)


def test_damaged_metadata(cfg, flat, tmp_path):
    path = t5x_files.write(tmp_path, cfg, flat(cfg), layout="orbax") / "state" / "_METADATA"
    metadata = json.loads(path.read_text())
    path.write_text(path.read_text()[:50])
    with pytest.raises(errors.UserError, match="_METADATA cannot be read as JSON"):
        t5x_files.read(tmp_path)
    path.write_text(json.dumps({"use_ocdbt": True}))
    with pytest.raises(errors.UserError, match="_METADATA has no 'tree_metadata'"):
        t5x_files.read(tmp_path)
    keys = ["target", "encoder", "more"]
    metadata["tree_metadata"]["more"] = {
        "key_metadata": [{"key": key, "key_type": 2} for key in keys],
        "value_metadata": {"value_type": "np.ndarray"},
    }
    path.write_text(json.dumps(metadata))
    with pytest.raises(errors.UserError, match="target.encoder.more cannot be opened"):
        t5x_files.read(tmp_path)


def test_what_is_no_checkpoint(tmp_path):
    with pytest.raises(errors.UserError, match="is not a T5X checkpoint: it has no 'checkpoint'"):
        t5x_files.read(tmp_path)
    (tmp_path / "model.pkl").write_bytes(b"")
    with pytest.raises(errors.UserError, match="model.pkl is a pickle"):
        t5x_files.read(tmp_path)
    with pytest.raises(errors.UserError, match="model.pkl is a pickle"):
        formats.detect(tmp_path)
    with pytest.raises(errors.UserError, match="There is no .*nowhere"):
        t5x_files.read(tmp_path / "nowhere")


def test_unknown_layout(cfg, flat, tmp_path):
    with pytest.raises(
        errors.UserError, match="is 'orbit'; expected one of legacy, orbax. Did you mean 'orbax"
    ):
        t5x_files.write(tmp_path, cfg, flat(cfg), layout="orbit")
    assert not list(tmp_path.iterdir())
