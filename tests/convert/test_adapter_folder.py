"""The adapter folder: what is in it, who opens it, what its card says, what it never replaces."""

import dataclasses
import json
import shutil

import gin
import numpy as np
import pytest
import yaml

from moe_peft import errors, methods, patching
from moe_peft.cli import main
from moe_peft.convert import adapter_folder, export, targets
from moe_peft.convert.peft import adapters
from moe_peft.runtime import digest
from moe_peft.training import optimizers
from moe_peft.weights import formats, safetensors_files, saved_run


@pytest.fixture(autouse=True)
def _clean_gin():
    yield
    gin.clear_config()


def made(toy, name, layout="t5_1_1", **description):
    """What a run of a method would have saved."""
    method = methods.mov(2) if name == "mov" else toy.METHODS[name]()
    return toy.saved(method, toy.trained(method, layout).trainable, layout, **description)


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def opened(folder):
    """The lines of the card's front matter that the Hub reads, and the rest."""
    _, head, body = (folder / "README.md").read_text(encoding="utf-8").split("---\n", 2)
    return yaml.safe_load(head), body


OF_PEFT = {"lora": "LORA", "ia3": "IA3", "poly": "POLY", "mhr8": "POLY"}


@pytest.mark.parametrize(
    ("name", "layout"), [*((name, "t5_1_1") for name in OF_PEFT), ("mhr8", "scanned")]
)
def test_peft_opens_the_same_folder_where_it_can(toy, name, layout, tmp_path):
    saved = made(toy, name, layout)
    folder = adapter_folder.write(saved, tmp_path / "a")
    assert names(folder) == sorted(adapter_folder.FILES)
    again = saved_run.load(folder)
    assert toy.same(again.trainable, saved.trainable)
    assert (again.step, again.description) == (saved.step, saved.description)
    config = json.loads((folder / "adapter_config.json").read_text())
    assert config["peft_type"] == OF_PEFT[name]
    np.testing.assert_allclose(*leaves_of(adapters.read(folder), saved), rtol=1e-6)
    assert opened(folder)[0]["library_name"] == "peft"
    assert (formats.detect(folder), targets.source(str(folder)).kind) == ("ours", "ours")
    (folder / "adapter.safetensors").unlink()
    assert formats.detect(folder) == "peft"


def leaves_of(*saved):
    """All values of each, in the same order."""
    flat = [patching.flatten(one.trainable) for one in saved]
    assert flat[0].keys() == flat[1].keys()
    return [np.concatenate([one[path].ravel() for path in sorted(flat[0])]) for one in flat]


def test_nobody_takes_another_method_for_pefts(toy, tmp_path):
    saved = made(toy, "mov", backbone_spec="hf:google/t5-base")
    folder = adapter_folder.write(saved, tmp_path / "a")
    assert names(folder) == ["README.md", "adapter.safetensors", "adapter_config.json"]
    config = json.loads((folder / "adapter_config.json").read_text())
    assert "peft_type" not in config
    assert config["not_for_peft_because"] == "PEFT has no MoV"
    assert config["method"] == saved.description["method"]
    assert config["base_model_name_or_path"] == "google/t5-base"
    head, body = opened(folder)
    assert head == {
        "base_model": "google/t5-base",
        "library_name": "moe-peft",
        "tags": ["moe-peft", "adapter", "mov"],
    }
    assert "import peft" not in body


def test_a_run_of_t5x_does_not_say_its_network(toy, tmp_path):
    saved = made(toy, "lora")
    del saved.description["model"]
    folder = adapter_folder.write(saved, tmp_path / "a")
    assert toy.same(saved_run.load(folder).trainable, saved.trainable)
    assert "% of" not in opened(folder)[1]
    assert "does not say which T5" in (folder / "adapter_config.json").read_text()


def test_the_card_says_what_it_is_and_how_it_was_trained(toy, tmp_path):
    described = {
        "data": {"mixture": "cldr", "batch_size": 8, "feature_lengths": {"inputs": 64}},
        "optimizer": optimizers.adafactor(0.25, groups={"routers": 0.5}).describe(),
        "backbone_spec": "hf:/home/somebody/t0_3b",
    }
    saved = made(toy, "mov", **described)
    head, body = opened(adapter_folder.write(saved, tmp_path / "a", license="apache-2.0"))
    assert (head["license"], "base_model" in head) == ("apache-2.0", False)
    num = sum(leaf.size for leaf in patching.flatten(saved.trainable).values())
    base = toy.base_params(toy.network("t5_1_1"))
    num_base = sum(leaf.size for leaf in patching.flatten(base).values())
    for words in (
        "- Base model: `t0_3b`",
        "weights: `of the toy`",
        f"parameters: {num:,}, {100 * num / num_base:.2g} % of the base model's {num_base:,}",
        "outputs of `.*/(key|value)`: `MoV(num_experts=2, router_factory=TokenRouter(",
        "- Steps: 7",
        "- Mixture: cldr",
        "- Batch size: 8",
        "- Feature lengths: inputs 64",
        "- Optimiser: `adafactor(",
        "- Learning rate: 0.25",
        "- Learning rate of routers: 0.125",
        "moe-peft infer a --inputs questions.jsonl --outputs answers.jsonl",
        'moe_peft.load("a", backbone="hf:FOLDER")',
    ):
        assert words in body
    assert "somebody" not in body
    assert "# license: " in (adapter_folder.write(saved, tmp_path / "b") / "README.md").read_text()


def test_the_card_shows_the_scores_of_this_step(toy, tmp_path):
    saved = made(toy, "lora")
    run = {"method": saved.description["method"], "step": 7}
    results = {"overall": {"mean": 0.5, "median": 0.625, "num_tasks": 3, "num_examples": 1200}}
    settings = {"split": "validation", "metric": "exact_match"}
    content = {"mixture": "heldout", "run": run, "settings": settings, "results": results}
    others = [{**content, "run": {**run, "step": 6}}, {**content, "run": {**run, "method": {}}}]
    for number, one in enumerate([content, *others]):
        path = tmp_path / "run" / "eval" / str(number) / "results.json"
        path.parent.mkdir(parents=True)
        path.write_text(json.dumps(one))
    _, body = opened(adapter_folder.write(saved, tmp_path / "a", run_folder=tmp_path / "run"))
    assert body.count("| heldout | validation | exact_match | 50.0 | 62.5 | 3 | 1,200 |") == 1
    assert body.count("heldout") == 1


def test_bfloat16(toy, tmp_path):
    saved = made(toy, "lora")
    folder = adapter_folder.write(saved, tmp_path / "a", dtype="bfloat16")
    ours, theirs = saved_run.load(folder), adapters.read(folder)
    flat = patching.flatten(ours.trainable)
    assert {leaf.dtype.name for leaf in flat.values()} == {"bfloat16"}
    np.testing.assert_array_equal(*leaves_of(theirs, ours))
    assert not np.array_equal(*leaves_of(saved, ours))


def test_a_whole_model_is_a_file(toy, tmp_path):
    saved = made(toy, "lora")
    saved.description["method"]["name"] = "full"
    with pytest.raises(errors.UserError, match="whole model; export it to a file"):
        adapter_folder.write(saved, tmp_path / "a")
    assert not names(tmp_path)


def test_only_an_adapter_folder_is_replaced_and_only_on_request(toy, tmp_path):
    old, new = made(toy, "lora"), made(toy, "mov")
    folder = adapter_folder.write(old, tmp_path / "a")
    with pytest.raises(errors.UserError, match="a exists; --overwrite"):
        adapter_folder.write(new, folder)
    adapter_folder.write(new, folder, overwrite=True)
    assert "adapter_model.safetensors" not in names(folder)
    (folder / "thesis.txt").write_text("x")
    with pytest.raises(errors.UserError, match="also holds thesis.txt"):
        adapter_folder.write(old, folder, overwrite=True)
    (tmp_path / "b" / "checkpoints" / "5").mkdir(parents=True)
    shutil.copy(folder / "adapter.safetensors", tmp_path / "b")  # of a run
    with pytest.raises(errors.UserError, match="b exists and is not an adapter folder"):
        adapter_folder.write(old, tmp_path / "b", overwrite=True)
    assert (saved_run.load(folder).description, names(tmp_path)) == (new.description, ["a", "b"])


@pytest.mark.parametrize("spoiled", ["ours", "peft"])
def test_what_is_not_the_same_when_read_again_is_not_kept(toy, spoiled, tmp_path, monkeypatch):
    saved = made(toy, "lora")
    folder = adapter_folder.write(saved, tmp_path / "a")
    place, name = {"ours": (saved_run, "load"), "peft": (adapters, "read")}[spoiled]
    read, factor = getattr(place, name), np.float32(1 + 1e-5)

    def other(path):
        found = read(path)
        flat = patching.flatten(found.trainable)
        path = "encoder/layers_1/attention/query/adapter/lora_b"
        tree = patching.trees.unflatten({**flat, path: flat[path] * factor})
        return dataclasses.replace(found, trainable=tree)

    monkeypatch.setattr(place, name, other)
    with pytest.raises(errors.UserError, match="lora_b is not what was to be written"):
        adapter_folder.write(made(toy, "qv"), folder, overwrite=True)
    monkeypatch.undo()
    assert toy.same(saved_run.load(folder).trainable, saved.trainable)
    assert names(tmp_path) == ["a"]


def test_export_writes_a_file_or_a_folder(toy, tmp_path, monkeypatch, capsys):
    saved = made(toy, "mov")
    monkeypatch.setattr(saved_run, "load", lambda *_, load=saved_run.load: saved)
    flags = ["--gin.MODEL_DIR=/a/run", f"--gin.OUTPUTS={tmp_path / 'a'}"]
    assert main.main(["export", *flags, "--gin.export.license='mit'"]) == 0
    assert f"wrote {tmp_path / 'a'}" in capsys.readouterr().out
    assert opened(tmp_path / "a")[0]["license"] == "mit"
    assert main.main(["export", *flags]) == main.USER_ERROR
    assert "--gin.export.overwrite=True replaces it" in capsys.readouterr().err
    assert main.main(["export", *flags, "--gin.export.overwrite=True"]) == 0
    file = str(tmp_path / "a.safetensors")
    assert export.export(model_dir="/a/run", path=file).is_file()
    with pytest.raises(errors.UserError, match="model card of an adapter folder"):
        export.export(model_dir="/a/run", path=file, license="mit")


@pytest.fixture(scope="module")
def folders(toy, tmp_path_factory):
    """A backbone, a run's worth of LoRA on it twice, and MoV, as adapter folders."""
    root = tmp_path_factory.mktemp("folders")
    base = toy.base_params(toy.network("t5_1_1"))
    path = safetensors_files.save_tree(base, root / "base.safetensors")
    described = {
        "backbone": {"fingerprint": digest.of_tree(base), "frozen_dtype": "float32"},
        "backbone_spec": f"file:{path}",
    }
    for name in ("lora", "mov"):
        adapter_folder.write(made(toy, name, **described), root / name)
    other = toy.trained(toy.METHODS["lora"](), seed=1).trainable
    saved = toy.saved(toy.METHODS["lora"](), other, **described)
    adapter_folder.write(saved, root / "lora1")
    return root


def convert(*arguments):
    return main.main(["convert", *map(str, arguments)])


def test_convert_takes_the_folder_like_the_file_in_it(toy, folders, tmp_path):
    source = saved_run.load(folders / "mov")
    assert convert("--from", folders / "mov", "--to", tmp_path / "a.safetensors") == 0
    assert convert("--from", tmp_path / "a.safetensors", "--to", f"ours:{tmp_path / 'b'}") == 0
    assert convert("--from", f"ours:{tmp_path / 'b'}", "--to", f"ours:{tmp_path / 'c'}") == 0
    for name in ("a.safetensors", "b", "c"):
        found = saved_run.load(tmp_path / name)
        assert toy.same(found.trainable, source.trainable)
        assert found.description == source.description
    assert names(tmp_path / "c") == names(folders / "mov")
    assert convert("--from", folders / "lora", "--to", f"peft:{tmp_path / 'd'}") == 0
    assert names(tmp_path / "d") == ["adapter_config.json", "adapter_model.safetensors"]


def test_convert_averages_and_merges_folders(folders, tmp_path):
    two = folders / "lora", folders / "lora1"
    assert convert("--average", *two, "--to", f"ours:{tmp_path / 'a'}") == 0
    mean, first, second = leaves_of(*map(saved_run.load, (tmp_path / "a", *two)))
    np.testing.assert_allclose(mean, (first + second) / 2, rtol=1e-5)
    base = folders / "base.safetensors"
    place = f"hf:{tmp_path / 'b'}"
    assert convert("--from", two[0], "--base", base, "--merge", "--to", place) == 0
    assert "model.safetensors" in names(tmp_path / "b")


@pytest.mark.parametrize(
    ("words", "source", "arguments"),
    [
        ("which is a file *.safetensors in", "base.safetensors", ["--to", "ours:OUT/a"]),
        ("not a folder of runs", "mov", ["--step", "7", "--to", "OUT/a.safetensors"]),
        ("our own format is *.safetensors or ours:", "mov", ["--to", "hf:OUT/a.safetensors"]),
        ("PEFT has no MoV", "mov", ["--to", "OUT/a"]),
    ],
)
def test_mistakes_are_one_line(folders, words, source, arguments, tmp_path, capsys):
    arguments = [text.replace("OUT", str(tmp_path)) for text in arguments]
    assert convert("--from", folders / source, *arguments) == main.USER_ERROR
    error = capsys.readouterr().err
    assert words in error
    assert error.count("\n") == 1
    assert not names(tmp_path)


def test_a_damaged_folder_is_one_line(folders, tmp_path):
    folder = shutil.copytree(folders / "mov", tmp_path / "a")
    content = (folder / "adapter.safetensors").read_bytes()
    (folder / "adapter.safetensors").write_bytes(content[:-100])
    with pytest.raises(errors.UserError, match="is cut short"):
        saved_run.load(folder)
