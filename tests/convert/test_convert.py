"""`moe-peft convert`: what it writes, what it prints, what it refuses, what it leaves behind."""

import dataclasses
import importlib.util
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy

from moe_peft import methods, patching
from moe_peft.cli import main
from moe_peft.convert.peft import adapters, tensors
from moe_peft.runtime import digest
from moe_peft.weights import hugging_face, merging, safetensors_files, saved_run


@pytest.fixture(scope="session")
def toy():
    path = pathlib.Path(__file__).parents[1] / "convert" / "toy_adapters.py"
    spec = importlib.util.spec_from_file_location("toy_adapters", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def files(toy, tmp_path_factory):
    """A backbone and, on it, adapters of several methods, as files."""
    root = tmp_path_factory.mktemp("files")
    base = toy.base_params(toy.network("t5_1_1"))
    path = safetensors_files.save_tree(base, root / "base.safetensors")
    safetensors_files.save_tree(
        toy.base_params(toy.network("t5_1_1"), seed=6), root / "other.safetensors"
    )
    described = {
        "backbone": {"fingerprint": digest.of_tree(base), "frozen_dtype": "float32"},
        "backbone_spec": f"file:{path}",
    }
    made = {
        "lora": toy.METHODS["lora"](),
        "mhr": toy.poly(num_splits=2, placement="light"),
        "mov": methods.mov(2),
    }
    for name, method in made.items():
        for seed in (0, 1):
            tree = toy.trained(method, seed=seed).trainable
            saved = toy.saved(method, tree, **described)
            saved_run.save(saved, root / f"{name}{seed}.safetensors")
    return root


def run(capsys, *arguments):
    """Runs the command; returns what it printed."""
    code = main.main(["convert", *map(str, arguments)])
    captured = capsys.readouterr()
    assert code == 0, captured.err
    return captured.out


def refused(capsys, *arguments):
    assert main.main(["convert", *map(str, arguments)]) == main.USER_ERROR
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    return error


def test_models_go_round_bit_by_bit(toy, files, tmp_path, capsys):
    out = run(capsys, "--from", files / "base.safetensors", "--to", f"hf:{tmp_path / 'hf'}")
    assert "logits before and after on a random batch: largest difference 0" in out
    run(capsys, "--from", tmp_path / "hf", "--to", tmp_path / "t5x")
    back = tmp_path / "back.safetensors"
    run(capsys, "--from", tmp_path / "t5x", "--to", back)
    assert toy.same(
        safetensors_files.read_tree(back), safetensors_files.read_tree(files / "base.safetensors")
    )
    assert sorted(path.name for path in tmp_path.iterdir()) == ["back.safetensors", "hf", "t5x"]
    out = run(capsys, "--from", back, "--to", f"hf:{tmp_path / 'small'}", "--dtype", "bfloat16")
    assert "largest difference 0," not in out


def test_adapters_go_to_peft_and_back(toy, files, tmp_path, capsys):
    source, back = files / "mhr0.safetensors", tmp_path / "back.safetensors"
    out = run(capsys, "--from", source, "--to", tmp_path / "peft")
    assert "ours and PEFT's formula: largest difference" in out
    run(capsys, "--from", tmp_path / "peft", "--to", back)
    assert toy.same(saved_run.load(back).trainable, saved_run.load(source).trainable)
    assert saved_run.load(back).description == saved_run.load(source).description
    run(capsys, "--from", source, "--task", 1, "--to", tmp_path / "task")
    assert '"peft_type": "LORA"' in (tmp_path / "task" / "adapter_config.json").read_text()


def test_a_folder_of_peft_belongs_to_the_base(files, tmp_path, capsys):
    run(capsys, "--from", files / "lora0.safetensors", "--to", tmp_path / "a")
    path = tmp_path / "a" / tensors.TENSORS
    safetensors.numpy.save_file(safetensors.numpy.load_file(path), path)
    assert "--base" in refused(capsys, "--from", tmp_path / "a", "--to", tmp_path / "b.safetensors")
    base, back = files / "base.safetensors", tmp_path / "b.safetensors"
    run(capsys, "--from", tmp_path / "a", "--base", base, "--to", back)
    assert saved_run.load(back).description["backbone"]["fingerprint"] == digest.of_tree(
        safetensors_files.read_tree(base)
    )


def test_merged_models_answer_as_the_adapter_does(toy, files, tmp_path, capsys):
    source = files / "mhr1.safetensors"
    out = run(capsys, "--from", source, "--merge", "--task", 2, "--to", f"hf:{tmp_path / 'm'}")
    assert "adapted and merged network on a random batch: largest difference" in out
    _, params = hugging_face.read(tmp_path / "m")
    network, method = toy.network("t5_1_1"), toy.poly(num_splits=2, placement="light")
    base = safetensors_files.read_tree(files / "base.safetensors")
    adapted = patching.merge(base, saved_run.load(source).trainable)
    adapted = jax.tree.map(jnp.asarray, adapted)
    assert toy.same(params, merging.merge_into_base(network, method, adapted, 2))
    assert not toy.same(params, base)


def test_averages(toy, files, tmp_path, capsys):
    members = [files / "mov0.safetensors", files / "mov1.safetensors"]
    weights = ["--weights", "0.25,0.75"]
    run(capsys, "--average", *members, "--to", tmp_path / "a.safetensors", *weights)
    first, second, mean = (
        patching.flatten(saved_run.load(path).trainable)
        for path in (*members, tmp_path / "a.safetensors")
    )
    assert mean.keys() == first.keys() == second.keys()
    assert len(mean) > 10
    for path, leaf in mean.items():
        np.testing.assert_allclose(leaf, 0.25 * first[path] + 0.75 * second[path], rtol=1e-5)


def test_what_is_there_stays_unless_it_is_the_same_kind(files, tmp_path, capsys):
    source, target = files / "mov0.safetensors", tmp_path / "a.safetensors"
    run(capsys, "--from", source, "--to", target)
    before = target.stat().st_mtime_ns
    assert "exists; --overwrite" in refused(capsys, "--from", source, "--to", target)
    assert target.stat().st_mtime_ns == before
    run(capsys, "--from", source, "--to", target, "--overwrite")
    assert target.stat().st_mtime_ns > before
    precious = tmp_path / "precious"
    precious.mkdir()
    (precious / "thesis.txt").write_text("x")
    source = files / "lora0.safetensors"
    error = refused(capsys, "--from", source, "--to", precious, "--overwrite")
    assert "is not replaced" in error
    assert (precious / "thesis.txt").exists()


@pytest.mark.parametrize(("change", "what"), [("lost", "lora_b"), ("added", "lora_c")])
def test_leaves_that_differ_when_read_again_are_one_line(
    files, tmp_path, capsys, monkeypatch, change, what
):
    read, layer = adapters.read, "encoder/layers_1/attention/query/adapter"

    def spoiled(folder):
        saved = read(folder)
        flat = patching.flatten(saved.trainable)
        if change == "lost":
            del flat[f"{layer}/{what}"]
        else:
            flat[f"{layer}/{what}"] = np.ones(2, np.float32)
        return dataclasses.replace(saved, trainable=patching.trees.unflatten(flat))

    monkeypatch.setattr(adapters, "read", spoiled)
    error = refused(capsys, "--from", files / "lora0.safetensors", "--to", tmp_path / "a")
    assert f"{layer}/{what} was {change} on the way; nothing was kept" in error
    assert not list(tmp_path.iterdir())


def test_a_failure_leaves_nothing_behind(files, tmp_path, capsys, monkeypatch):
    far = merging.Gap(1.0, 1.0, 1.0)
    monkeypatch.setattr(adapters, "gap", lambda *args: far)
    error = refused(capsys, "--from", files / "lora0.safetensors", "--to", tmp_path / "a")
    assert "nothing was written" in error
    assert not list(tmp_path.iterdir())


REFUSED = {
    "There is no": ["--from", "FILES/nothing", "--to", "OUT/a"],
    "PEFT has no MoV": ["--from", "FILES/mov0.safetensors", "--to", "OUT/a"],
    "decides for every token": ["--from", "FILES/mov0.safetensors", "--merge", "--to", "hf:OUT/a"],
    "name the task": ["--from", "FILES/mhr0.safetensors", "--merge", "--to", "hf:OUT/a"],
    "--merge folds it": ["--from", "FILES/mov0.safetensors", "--to", "hf:OUT/a"],
    "does not say in which format": ["--from", "FILES/base.safetensors", "--to", "OUT/a"],
    "whole model; --merge is for": [
        "--from",
        "FILES/base.safetensors",
        "--merge",
        "--to",
        "hf:OUT/a",
    ],
    "whole model; --task is for": [
        *("--from", "FILES/base.safetensors", "--task", "0"),
        *("--to", "hf:OUT/a"),
    ],
    "not a folder of runs": ["--from", "FILES/mov0.safetensors", "--step", "3", "--to", "OUT/a"],
    "at least two adapters": ["--average", "FILES/mov0.safetensors", "--to", "OUT/a.safetensors"],
    "'lora' in": [
        *("--average", "FILES/mov0.safetensors", "FILES/lora0.safetensors"),
        *("--to", "OUT/a.safetensors"),
    ],
    "is not an adapter": [
        *("--average", "FILES/mov0.safetensors", "FILES/base.safetensors"),
        *("--to", "OUT/a.safetensors"),
    ],
    "expected numbers": [
        *("--average", "FILES/mov0.safetensors", "FILES/mov1.safetensors"),
        *("--to", "OUT/a.safetensors", "--weights", "half"),
    ],
    "another backbone": [
        *("--from", "FILES/lora0.safetensors", "--base", "FILES/other.safetensors", "--merge"),
        *("--to", "hf:OUT/a"),
    ],
}


@pytest.mark.parametrize("words", REFUSED)
def test_mistakes_are_one_line(files, words, tmp_path, capsys):
    arguments = [
        text.replace("FILES", str(files)).replace("OUT", str(tmp_path)) for text in REFUSED[words]
    ]
    assert words in refused(capsys, *arguments)
    assert not list(tmp_path.iterdir())
