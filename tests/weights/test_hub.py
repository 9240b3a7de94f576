"""Models by their name on the Hub; the library itself is not asked here."""

import fnmatch
import pathlib
import sys
import types

import pytest

from moe_peft import errors
from moe_peft.convert import targets
from moe_peft.data import vocabularies
from moe_peft.weights import backbone, hub


@pytest.fixture
def library(monkeypatch):
    """A stand-in for huggingface_hub that has one model."""
    asked = []

    def snapshot_download(name, allow_patterns):
        asked.append(name)
        if name not in made.models:
            raise OSError("offline,\nand nothing is cached")
        fits = lambda file: any(fnmatch.fnmatch(file, pattern) for pattern in allow_patterns)
        for file in filter(fits, made.files):
            (pathlib.Path(made.models[name]) / file).write_text("{}")
        return made.models[name]

    made = types.SimpleNamespace(snapshot_download=snapshot_download, models={}, asked=asked)
    made.files = []  # of every model
    monkeypatch.setitem(sys.modules, "huggingface_hub", made)
    hub.folder.cache_clear()
    yield made
    hub.folder.cache_clear()


def test_a_model_is_fetched_by_its_name(library, tmp_path):
    (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": "ByT5Tokenizer"}')
    library.models["google/byt5-tiny"] = str(tmp_path)
    assert backbone.full_spec("hf:google/byt5-tiny") == "hf:google/byt5-tiny"
    assert vocabularies.get("google/byt5-tiny").vocab_size == 384
    assert library.asked == ["google/byt5-tiny"] * 2  # once, and for files of torch
    with pytest.raises(errors.UserError, match="neither model.safetensors"):
        backbone.network("hf:google/byt5-tiny")


TORCH = ["pytorch_model.bin", "pytorch_model-00001-of-00002.bin", "pytorch_model.bin.index.json"]
TORCH += ["adapter_model.bin"]
NEVER = ["training_args.bin", "optimizer.pt", "tf_model.h5", "model.pkl", "rng_state.pth"]


@pytest.mark.parametrize("safetensors", [[], ["model.safetensors"], ["adapter_model.safetensors"]])
def test_files_of_torch_are_fetched_where_there_is_nothing_else(library, tmp_path, safetensors):
    library.models["google/old"] = str(tmp_path)
    library.files = ["config.json", "adapter_config.json", *TORCH, *NEVER, *safetensors]
    assert hub.folder("google/old") == str(tmp_path)
    found = {path.name for path in tmp_path.iterdir()}
    assert found == {"config.json", "adapter_config.json", *(safetensors or TORCH)}
    assert len(library.asked) == (1 if safetensors else 2)


def test_an_adapter_is_fetched_by_its_name(library, tmp_path):
    library.models["me/lora"] = str(tmp_path)
    library.files = ["adapter_config.json", "adapter_model.bin"]
    place = targets.source("peft:me/lora")
    assert (place.kind, str(place.path)) == ("peft", str(tmp_path))


def test_a_folder_of_that_name_comes_first(library, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "google" / "t5").mkdir(parents=True)
    assert not hub.is_name("google/t5")
    assert backbone.full_spec("hf:google/t5") == f"hf:{tmp_path}/google/t5"
    assert not library.asked


@pytest.mark.parametrize("path", ["./t5", "/models/t5", "t5", "a/b/c", "~/t5", "gs://bucket/t5"])
def test_paths_are_no_names(path):
    assert not hub.is_name(path)


def test_one_line_without_a_network(library):
    with pytest.raises(errors.UserError, match="offline, and nothing is cached.*the path of") as e:
        backbone.network("hf:google/missing")
    assert "\n" not in str(e.value)


def test_one_line_without_the_library(monkeypatch):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    hub.folder.cache_clear()
    with pytest.raises(errors.UserError, match=r"pip install 'moe-peft-jax\[hub\]'"):
        hub.folder("google/t5")
