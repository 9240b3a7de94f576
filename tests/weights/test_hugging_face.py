"""Folders of transformers: round trips, layouts, and every way in which one can be wrong."""

import dataclasses
import json
import shutil

from etils import epath
import jax
import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy

from moe_peft import errors, patching
from moe_peft.convert import models
from moe_peft.models import special_ids
from moe_peft.partitioning import mesh as mesh_lib
from moe_peft.weights import (
    checkpoint_file,
    formats,
    hugging_face,
    leaves,
    t5_names,
    t5_sizes,
    t5x_files,
)


def assert_same(flat, params):
    params = patching.flatten(params)
    assert flat.keys() == params.keys()
    assert len(flat) > 20
    for path, leaf in flat.items():
        assert leaf.dtype == params[path].dtype
        np.testing.assert_array_equal(leaf, params[path], err_msg=path)


@pytest.fixture
def folder(cfg, flat, tmp_path):
    return hugging_face.write(tmp_path / "model", cfg, flat(cfg))


@pytest.fixture
def edit(folder):
    """A function that changes config.json."""

    def change(**values):
        settings = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(settings | values))

    return change


@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16])
@pytest.mark.parametrize("shard_bytes", [hugging_face.SHARD_BYTES, 3000])
def test_there_and_back(cfg, flat, tmp_path, dtype, shard_bytes):
    params = flat(cfg, dtype)
    folder = hugging_face.write(tmp_path / "a", cfg, params, shard_bytes=shard_bytes)
    assert (folder / "model.safetensors").exists() == (shard_bytes > 3000)
    assert formats.detect(folder) == "hf"
    config, read = hugging_face.read(folder)
    assert config == cfg
    assert_same(params, read)
    again = hugging_face.write(tmp_path / "b", config, read, shard_bytes=shard_bytes)
    old, new = (
        {path.name: path for path in place.iterdir() if path.suffix == ".safetensors"}
        for place in (folder, again)
    )
    assert old.keys() == new.keys()
    assert (folder / "config.json").read_bytes() == (again / "config.json").read_bytes()
    stored, restored = map(hugging_face.open_tensors, map(epath.Path, (folder, again)))
    assert stored.keys() == restored.keys()
    assert len(stored) == len(params)
    for key, leaf in stored.items():
        assert leaf.dtype == restored[key].dtype == dtype
        assert leaf.read().tobytes() == restored[key].read().tobytes()


def test_the_library_reads_what_is_written(cfg, flat, folder):
    stored = safetensors.numpy.load_file(folder / "model.safetensors")
    expected = flat(cfg)
    assert len(stored) == len(expected)
    for name, values in stored.items():
        wanted = expected[t5_names.path_of(name)]
        is_row_map = "layer_norm" in name or name == "shared.weight"
        np.testing.assert_array_equal(values, wanted if is_row_map else wanted.T)


def test_scanned_and_back(cfg, flat, folder, tmp_path):
    config, scanned = hugging_face.read(folder, scan_layers=True)
    assert config == dataclasses.replace(cfg, scan_layers=True)
    shapes = {path: leaf.shape for path, leaf in patching.flatten(scanned).items()}
    assert shapes == t5_sizes.shapes_of(config)
    again = hugging_face.write(tmp_path / "again", config, scanned)
    assert_same(flat(cfg), hugging_face.read(again)[1])


@pytest.mark.eight_devices
def test_onto_a_mesh_in_bfloat16(cfg, flat, folder):
    mesh = mesh_lib.make_mesh(fsdp=2, model=2)
    _, params = hugging_face.read(folder, "bfloat16", sharding=leaves.spread(mesh))
    assert patching.flatten(params).keys() == flat(cfg).keys()
    for path, leaf in patching.flatten(params).items():
        assert isinstance(leaf, jax.Array)
        assert leaf.sharding.mesh == mesh
        np.testing.assert_array_equal(leaf, flat(cfg)[path].astype(ml_dtypes.bfloat16))
    embedding = params["token_embedder"]["embedding"]
    assert {shard.data.shape for shard in embedding.addressable_shards} == {(8, 12)}
    scale = params["encoder"]["encoder_norm"]["scale"]
    assert scale.sharding.is_fully_replicated


def test_report_counts_every_leaf(cfg, folder):
    report = hugging_face.open_folder(folder).report("bfloat16")
    assert set(report.loaded) == set(t5_sizes.shapes_of(cfg))
    assert set(report.cast.values()) == {("float32", "bfloat16")}
    assert len(report.cast) == len(report.loaded)
    assert f"{len(report.loaded)} leaves loaded" in report.lines()[0]
    assert "(float32 to bfloat16), 0 missing, 0 unused" in report.lines()[0]


def rewrite(folder, change):
    stored = safetensors.numpy.load_file(folder / "model.safetensors")
    change(stored)
    safetensors.numpy.save_file(stored, folder / "model.safetensors")


def test_missing_and_unused_are_errors_unless_named(folder):
    rewrite(
        folder, lambda t: t.update(extra=np.ones(2)) or t.pop("encoder.final_layer_norm.weight")
    )
    with pytest.raises(errors.UserError, match="lacks 1 of .*: encoder/encoder_norm/scale"):
        hugging_face.read(folder)
    with pytest.raises(errors.UserError, match="has 1 leaves that .*: extra"):
        hugging_face.read(folder, allow_missing=[".*encoder_norm.*"])
    named = {"allow_missing": ["encoder/encoder_norm/scale"], "allow_unused": ["extr."]}
    _, params = hugging_face.read(folder, **named)
    assert "encoder_norm" not in params["encoder"]
    report = hugging_face.open_folder(folder).report()
    assert report.lines()[1:] == ["  missing: encoder/encoder_norm/scale", "  unused: extra"]


@pytest.mark.parametrize("name", ["encoder.embed_tokens.weight", "decoder.embed_tokens.weight"])
def test_copies_of_the_embedding_are_left_out_or_stand_for_it(folder, cfg, flat, name):
    rewrite(folder, lambda tensors: tensors.update({name: tensors["shared.weight"]}))
    report = hugging_face.open_folder(folder).report()
    assert report.known == {name: "the same as shared.weight"}
    rewrite(folder, lambda tensors: tensors.pop("shared.weight"))
    assert_same(flat(cfg), hugging_face.read(folder)[1])
    rewrite(folder, lambda tensors: tensors.update({"shared.weight": tensors[name] + 1}))
    with pytest.raises(errors.UserError, match=f"no place for, .*: {name}"):
        hugging_face.read(folder)


def test_a_bias_that_no_t5_uses_is_left_out(folder, cfg, flat):
    name = "decoder.block.0.layer.1.EncDecAttention.relative_attention_bias.weight"
    rewrite(folder, lambda tensors: tensors.update({name: np.ones((32, 3), np.float32)}))
    assert_same(flat(cfg), hugging_face.read(folder)[1])


@pytest.mark.parametrize("cfg", ["1.1"], indirect=True)
@pytest.mark.parametrize(
    "settings",
    [
        {"tie_word_embeddings": True, "scale_decoder_outputs": False},
        {"tie_word_embeddings": False},
        {"tie_word_embeddings": True, "model_type": "mt5"},
        {"tie_word_embeddings": True, "model_type": "mt5", "transformers_version": "5.0.0"},
        {"tie_word_embeddings": False, "model_type": "mt5", "transformers_version": "4.57.1"},
    ],
)
def test_a_tied_layer_that_is_not_scaled_becomes_one_of_its_own(folder, edit, settings):
    rewrite(folder, lambda tensors: tensors.pop("lm_head.weight"))
    edit(**settings)
    config, params = hugging_face.read(folder)
    assert not config.logits_via_embedding
    np.testing.assert_array_equal(
        params["decoder"]["logits_dense"]["kernel"], params["token_embedder"]["embedding"].T
    )


@pytest.mark.parametrize("cfg", ["1.0"], indirect=True)
def test_a_tied_layer_is_left_out_where_it_is_a_copy(folder, cfg, flat):
    rewrite(folder, lambda tensors: tensors.update({"lm_head.weight": tensors["shared.weight"]}))
    assert_same(flat(cfg), hugging_face.read(folder)[1])
    rewrite(
        folder, lambda tensors: tensors.update({"lm_head.weight": tensors["shared.weight"] * 2})
    )
    with pytest.raises(errors.UserError, match="no place for.*lm_head.weight"):
        hugging_face.read(folder)


@pytest.mark.parametrize("cfg", ["1.0"], indirect=True)
def test_version_4_scales_an_mt5_that_is_tied(folder, edit, cfg, tmp_path):
    edit(model_type="mt5", transformers_version="4.57.1")
    opened = hugging_face.open_folder(folder)
    assert opened.config == cfg
    again = hugging_face.write(tmp_path / "b", cfg, opened.leaves, settings=opened.settings)
    config = "config.json"  # which says the version that scales
    assert json.loads((again / config).read_text()) == json.loads((folder / config).read_text())


UMT5 = {"relpos_in_every_layer": True}


@pytest.mark.parametrize("depth", [1, 3])
def test_biases_in_every_layer(cfg, flat, depth, tmp_path):
    cfg = dataclasses.replace(cfg, num_decoder_layers=depth, num_encoder_layers=1, **UMT5)
    params = flat(cfg)
    folder = hugging_face.write(tmp_path / "a", cfg, params)
    settings = json.loads((folder / "config.json").read_text())
    assert settings["model_type"] == "umt5"
    assert settings["architectures"] == ["UMT5ForConditionalGeneration"]
    config, read = hugging_face.read(folder)
    assert config == cfg
    assert_same(params, read)
    assert "decoder/layers_0/relpos_bias/rel_embedding" in params
    again = hugging_face.write(tmp_path / "b", *hugging_face.read(folder, scan_layers=True))
    assert_same(params, hugging_face.read(again)[1])
    (folder / "config.json").unlink()
    if depth > 1:  # Else names do not tell, nor does it matter.
        assert hugging_face.read(folder)[0] == cfg
    else:
        assert not hugging_face.read(folder)[0].relpos_in_every_layer


def test_a_folder_of_another_kind_lends_its_settings_and_no_more(cfg, flat, tmp_path):
    """A T5 trained on with the settings of a UMT5, and the other way round."""
    for own, old in (({}, "umt5"), (UMT5, "t5")):
        settings = {"model_type": old, "architectures": ["Other"], "tokenizer_class": "Kept"}
        config = dataclasses.replace(cfg, **own)
        folder = hugging_face.write(tmp_path / old, config, flat(config), settings=settings)
        written = json.loads((folder / "config.json").read_text())
        assert written["model_type"] != old
        assert written["architectures"] != ["Other"]
        assert written["tokenizer_class"] == "Kept"
        assert hugging_face.read(folder)[0] == config


@pytest.mark.parametrize("said", ["float16", "float32"])
def test_float16_is_read_and_kept(cfg, flat, said, tmp_path):
    params = flat(cfg, np.float16)
    # transformers keeps a product of the feed-forward block in float32.
    params |= {path: leaf.astype(np.float32) for path, leaf in params.items() if "/wo/" in path}
    settings = {"model_type": "t5", "torch_dtype": said}
    folder = hugging_face.write(tmp_path / "a", cfg, params, settings=settings)
    assert_same(params, hugging_face.read(folder)[1])
    opened = hugging_face.open_folder(folder)
    again = hugging_face.write(tmp_path / "b", cfg, opened.leaves, settings=opened.settings)
    for name in ("model.safetensors", "config.json"):
        assert (folder / name).read_bytes() == (again / name).read_bytes()
    assert json.loads((again / "config.json").read_text())["torch_dtype"] == said
    read = hugging_face.read(folder, "float32")[1]
    assert_same({path: leaf.astype(np.float32) for path, leaf in params.items()}, read)


@pytest.mark.parametrize("scan_layers", [False, True])
def test_depths_from_1_to_48(scan_layers, cfg):
    options = {"num_encoder_layers": 48, "num_decoder_layers": 1, "head_dim": 5}
    cfg = dataclasses.replace(cfg, **options, scan_layers=scan_layers, **UMT5)
    zeros = {path: np.zeros(s, np.float32) for path, s in t5_sizes.shapes_of(cfg).items()}
    given = checkpoint_file.CheckpointFile("here", cfg, leaves.flatten(zeros))
    unscanned = given.scanned(False)
    assert unscanned.config.num_encoder_layers == 48
    assert unscanned.report().missing == unscanned.report().unused == ()
    assert "encoder/layers_47/relpos_bias/rel_embedding" in unscanned.leaves
    names = {t5_names.name_of(path) for path in unscanned.leaves}
    assert len(names) == len(unscanned.leaves)
    assert "encoder.block.47.layer.0.SelfAttention.relative_attention_bias.weight" in names


def test_what_is_not_a_size_is_kept(cfg, flat, folder, edit, tmp_path):
    edit(model_type="t5", torch_dtype="float32", tokenizer_class="ByT5Tokenizer", use_cache=False)
    (folder / "tokenizer_config.json").write_text("{}")
    opened = hugging_face.open_folder(folder)
    again = hugging_face.write(
        tmp_path / "again",
        opened.config,
        opened.leaves,
        dtype="bfloat16",
        settings=opened.settings,
        copy_from=folder,
    )
    settings = json.loads((again / "config.json").read_text())
    assert settings == dict(opened.settings) | {"torch_dtype": "bfloat16"}
    assert (again / "tokenizer_config.json").exists()
    expected = {p: v.astype(ml_dtypes.bfloat16) for p, v in flat(cfg).items()}
    assert_same(expected, hugging_face.read(again)[1])


def test_without_config_the_sizes_are_told_from_shapes(cfg, folder):
    (folder / "config.json").unlink()
    assert hugging_face.read(folder)[0] == cfg


def test_what_is_said_comes_back_bit_by_bit(folder, edit, tmp_path):
    """As a released folder has it: with other ids and dropout, and without what goes unsaid."""
    path = folder / "config.json"
    edit(pad_token_id=3, eos_token_id=2, dropout_rate=0.0, n_positions=512)
    settings = json.loads(path.read_text())
    del settings["layer_norm_epsilon"], settings["dtype"]
    path.write_text(json.dumps(settings, indent=2, sort_keys=True) + "\n")
    opened = hugging_face.open_folder(folder)
    assert special_ids.of_config(opened.config) == special_ids.SpecialIds(3, 2, 0)
    assert opened.config.dropout_rate == 0.0
    again = hugging_face.write(
        tmp_path / "again", opened.config, opened.leaves, settings=opened.settings
    )
    for name in ("config.json", "model.safetensors"):
        assert (again / name).read_bytes() == (folder / name).read_bytes()
    # By way of our own file, which has the settings too.
    models.write("ours", tmp_path / "a.safetensors", opened, None, None, opened, "legacy")
    ours = formats.open_backbone(tmp_path / "a.safetensors", "ours")
    assert (ours.config, ours.settings) == (opened.config, opened.settings)
    models.write("hf", tmp_path / "back", ours, None, None, ours, "legacy")
    for name in ("config.json", "model.safetensors"):
        assert (tmp_path / "back" / name).read_bytes() == (folder / name).read_bytes()
    with pytest.raises(errors.UserError, match="T5X's format does not hold .* has padding 3"):
        t5x_files.write(tmp_path / "t5x", opened.config, opened.leaves)
    # Without settings what the config tells is written; other ids are not kept.
    for number, old in enumerate((None, {**settings, "pad_token_id": 7})):
        where = tmp_path / f"without_{number}"
        hugging_face.write(where, opened.config, opened.leaves, settings=old)
        assert hugging_face.open_folder(where).config == opened.config


@pytest.mark.parametrize("cfg", ["1.1"], indirect=True)
def test_a_tied_layer_that_is_not_scaled_comes_back_tied(folder, edit, tmp_path):
    """As transformers 5 saves T5 1.1."""
    rewrite(folder, lambda tensors: tensors.pop("lm_head.weight"))
    edit(tie_word_embeddings=True, scale_decoder_outputs=False)
    opened = hugging_face.open_folder(folder)
    how = {"settings": opened.settings}
    again = hugging_face.write(tmp_path / "again", opened.config, opened.leaves, **how)
    assert json.loads((again / "config.json").read_text()) == opened.settings
    stored, restored = (
        safetensors.numpy.load_file(place / "model.safetensors") for place in (folder, again)
    )
    assert stored.keys() == restored.keys()
    for name, values in stored.items():
        np.testing.assert_array_equal(values, restored[name])
    # A layer that has become another one is said to be.
    flat = {path: leaf.read() for path, leaf in opened.leaves.items()}
    flat["decoder/logits_dense/kernel"] = flat["decoder/logits_dense/kernel"] + 1
    apart = hugging_face.write(tmp_path / "apart", opened.config, flat, **how)
    assert not json.loads((apart / "config.json").read_text())["tie_word_embeddings"]
    assert_same(flat, hugging_face.read(apart)[1])


def test_ids_of_generation_config_count_where_config_has_none(folder, edit):
    path = folder / "generation_config.json"
    path.write_text(json.dumps({"eos_token_id": [4]}))
    with pytest.raises(errors.UserError, match="eos_token_id is 1, and 4 in generation_config"):
        hugging_face.open_folder(folder)
    edit(eos_token_id=None, decoder_start_token_id=None, pad_token_id=2)
    found = special_ids.of_config(hugging_face.open_folder(folder).config)
    assert found == special_ids.SpecialIds(pad=2, eos=4, start=2)
    path.write_text(json.dumps({"eos_token_id": [4, 5]}))
    with pytest.raises(errors.UserError, match=r"eos_token_id is \[4, 5\]; expected one id"):
        hugging_face.open_folder(folder)


ELSEWHERE = {
    "T5EncoderModel": ("t5", "T5EncoderModel is an encoder without its decoder; expected the"),
    "MT5ForSequenceClassification": ("mt5", "is a T5 with a head for classes instead of words"),
    "T5ForTokenClassification": ("t5", "is an encoder with a head for classes of tokens"),
    "LongT5ForConditionalGeneration": ("longt5", "'longt5', an .* attention to near tokens"),
    "T5GemmaForConditionalGeneration": ("t5gemma", "'t5gemma', an .* layers of Gemma"),
    "GPT2LMHeadModel": ("gpt2", "which has no encoder and decoder"),
    "LlamaForCausalLM": ("llama", r"which has no encoder \(LlamaForCausalLM\)"),
}


@pytest.mark.parametrize("cfg", ["1.1"], indirect=True)
@pytest.mark.parametrize("name", ELSEWHERE)
def test_other_models_say_what_they_are_before_weights_are_read(folder, edit, name):
    kind, words = ELSEWHERE[name]
    edit(model_type=kind, architectures=[name], is_encoder_decoder=name.endswith("Generation"))
    (folder / "model.safetensors").unlink()
    with pytest.raises(errors.UserError, match=words) as caught:
        hugging_face.open_folder(folder)
    assert "\n" not in str(caught.value)
    assert str(folder / "config.json") in str(caught.value)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        (
            {"model_type": "llama", "is_encoder_decoder": False},
            "config.json: model_type is 'llama', which has no encoder and decoder; expected t5",
        ),
        (
            {"model_type": "bart", "is_encoder_decoder": True},
            "'bart', an .*; expected t5",
        ),
        (
            {"relative_attention_num_buckets": 16},
            r"relpos_bias.*the shape \(3, 32\).*says \(3, 16\)",
        ),
        (
            {"feed_forward_proj": "gated-mish"},
            "feed_forward_proj is 'gated-mish'; expected one of relu",
        ),
        ({"model_type": "umt5"}, "lacks .* leaves.*layers_1/relpos_bias"),
        ({"d_kv": 5}, r"model.safetensors: .*attention.*the shape \(12, 12\).*says \(12, 15\)"),
        ({"num_layers": 1}, "has no place|has .* leaves that"),
        ({"num_layers": 3}, "lacks .* leaves, the first ones: encoder/layers_2/"),
    ],
)
def test_configs_that_do_not_fit(folder, edit, settings, words):
    edit(**settings)
    with pytest.raises(errors.UserError, match=words) as caught:
        hugging_face.read(folder)
    assert str(folder) in str(caught.value)


def test_a_file_cut_short_names_the_key(folder):
    path = folder / "model.safetensors"
    whole = path.read_bytes()
    path.write_bytes(whole[:-10])
    with pytest.raises(errors.UserError, match=r"model.safetensors is cut short: [\w.]+ ends at"):
        hugging_face.read(folder)
    path.write_bytes(whole[:100])
    with pytest.raises(errors.UserError, match="its header is missing or cut short"):
        hugging_face.read(folder)
    path.write_bytes(b"no")
    with pytest.raises(errors.UserError, match="its header is missing or cut short"):
        hugging_face.read(folder)
    path.write_bytes(b"\x10" + b"\0" * 7 + b"{ not json     }")
    with pytest.raises(errors.UserError, match="cannot be read as safetensors"):
        hugging_face.read(folder)


def test_a_part_that_is_missing(cfg, flat, tmp_path):
    folder = hugging_face.write(tmp_path / "a", cfg, flat(cfg), shard_bytes=3000)
    part = sorted(folder.glob("model-*"))[1]
    moved = part.rename(tmp_path / "elsewhere")
    with pytest.raises(errors.UserError, match=rf"is in {part.name}, but there is no such file"):
        hugging_face.read(folder)
    moved.rename(part)
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    index["weight_map"]["lost.weight"] = part.name
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(errors.UserError, match=rf"{part.name} has no lost.weight"):
        hugging_face.read(folder)


@pytest.mark.parametrize("name", ["model.ckpt", "weights.pkl", "weights.pickle"])
def test_pickles_are_not_opened(folder, name):
    (folder / "model.safetensors").rename(folder / name)
    with pytest.raises(errors.UserError, match=f"{name} is a pickle.*save_pretrained"):
        hugging_face.read(folder)
    with pytest.raises(errors.UserError, match=f"{name} is a pickle"):
        formats.detect(folder / name)


def test_a_folder_that_is_not_there(folder):
    with pytest.raises(errors.UserError, match="There is no .*modle. Did you mean 'model'"):
        hugging_face.read(folder.with_name("modle"))
    shutil.rmtree(folder)
    folder.mkdir()
    with pytest.raises(errors.UserError, match="has neither model.safetensors nor"):
        hugging_face.read(folder)


def test_nothing_half_written_stays(cfg, flat, tmp_path):
    params = flat(cfg)

    def fail():
        raise KeyboardInterrupt

    broken = dict(params)
    path = "decoder/decoder_norm/scale"
    broken[path] = leaves.Leaf(params[path].shape, params[path].dtype, fail, path)
    with pytest.raises(KeyboardInterrupt):
        hugging_face.write(tmp_path / "a", cfg, broken)
    assert not list(tmp_path.iterdir())
    hugging_face.write(tmp_path / "a", cfg, params)
    with pytest.raises(errors.UserError, match="a exists"):
        hugging_face.write(tmp_path / "a", cfg, params)
    params["token_embedder/embedding"] = np.ones((3, 12), np.float32)
    with pytest.raises(errors.UserError, match=r"token_embedder/embedding.*\(3, 12\).*\(32, 12\)"):
        hugging_face.write(tmp_path / "b", cfg, params)
    with pytest.raises(errors.UserError, match="'float16'; expected one of float32, bfloat16"):
        hugging_face.write(tmp_path / "b", cfg, flat(cfg), dtype="float16")


def test_one_leaf_at_a_time_is_in_memory(cfg, flat, folder, tmp_path, monkeypatch):
    """What was read before is let go: a stream, whatever the size of the model."""
    alive, most = set(), 0
    opened = hugging_face.open_folder(folder)

    class Counted(np.ndarray):
        def __del__(self):
            alive.discard(id(self))

    def counted(leaf):
        def read():
            nonlocal most
            values = leaf.read().view(Counted)
            alive.add(id(values))
            most = max(most, len(alive))
            return values

        return dataclasses.replace(leaf, read=read)

    found = {path: counted(leaf) for path, leaf in opened.leaves.items()}
    hugging_face.write(tmp_path / "again", opened.config, found)
    assert 1 <= most <= 2
