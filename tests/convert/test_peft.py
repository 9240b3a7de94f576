"""PEFT folders without torch: round trips, formulas, and what is refused."""

import json
import shutil

import gin
import numpy as np
import pytest
import safetensors.numpy

from moe_peft import errors, methods
from moe_peft.convert.peft import adapters
from moe_peft.convert.peft import config as config_lib
from moe_peft.convert.peft import tensors as tensors_lib
from moe_peft.weights import formats, identity, records

NAMES = ("lora", "qv", "ia3", "mhr8")
CASES = [(name, "t5_1_1") for name in NAMES]
CASES += [("ia3", "t5_1_0"), ("mhr4", "scanned"), ("ia3", "scanned")]


@pytest.mark.parametrize(("name", "layout"), CASES)
def test_round_trip_is_bit_exact(toy, name, layout, tmp_path):
    saved = toy.trained(toy.METHODS[name](), layout)
    adapters.write(saved, tmp_path / "a", "toy")
    back = adapters.read(tmp_path / "a")
    assert toy.same(back.trainable, saved.trainable)
    assert (back.step, back.description) == (saved.step, saved.description)
    gap = adapters.gap(saved, tmp_path / "a")
    assert gap.largest < 1e-5 * gap.scale
    other = toy.trained(toy.METHODS[name](), layout, seed=1)
    assert adapters.gap(other, tmp_path / "a").largest > 1e-2


@pytest.fixture(autouse=True)
def _clean_gin():
    yield
    gin.clear_config()


@pytest.fixture(scope="module")
def folders(toy, tmp_path_factory):
    """Folders as PEFT itself writes them: without our record."""
    root = tmp_path_factory.mktemp("peft")
    for name in ("lora", "qv", "ia3", "mhr4"):
        adapters.write(toy.trained(toy.METHODS[name]()), root / name, "toy")
        change(root / name, lambda tensors: tensors)
    return root


def change(folder, edit, record=None):
    """Edits the tensors in place; the header keeps `record` only."""
    path = folder / tensors_lib.TENSORS
    tensors = edit(safetensors.numpy.load_file(path))
    header = {"format": "pt"} | ({} if record is None else {"moe_peft": json.dumps(record)})
    safetensors.numpy.save_file(tensors, path, header)


def set_option(folder, **options):
    path = folder / config_lib.NAME
    config = json.loads(path.read_text())
    path.write_text(json.dumps({**config, **options}))


def base(toy, layout="t5_1_1"):
    return adapters.Base("hf:somewhere", toy.network(layout).config, "of the toy")


IMPORTS = {
    "lora": lambda: methods.lora(2, 6.0, 0.1, "all7"),
    "qv": lambda: methods.lora(2, 3.0, 0.0, ".*/(query|value)"),
    "mhr4": lambda: methods.poly(3, 2, 4, 2, placement="light", relaxed=True),
}


@pytest.mark.parametrize("name", IMPORTS)
def test_a_foreign_folder_is_a_method_of_ours(toy, folders, name):
    saved = adapters.read(folders / name, base(toy))
    assert saved.description["method"] == identity.as_json(IMPORTS[name]().describe())
    assert saved.description["backbone"]["fingerprint"] == "of the toy"
    gin.parse_config(["import moe_peft.methods", *saved.description["gin"]])
    described = gin.query_parameter("%METHOD").scoped_configurable_fn().describe()
    assert identity.as_json(described) == saved.description["method"]
    assert adapters.gap(saved, folders / name).relative < 1e-6


def test_scaled_inputs_of_wo_are_outputs_of_wi_1(toy, folders, tmp_path):
    folder = copy(folders, "ia3", tmp_path)
    change(
        folder, lambda t: {k.replace("wi_1", "wo"): v.T if "wi_1" in k else v for k, v in t.items()}
    )
    set_option(folder, target_modules=["k", "v", "wo"], feedforward_modules=["wo"])
    moved, kept = adapters.read(folder, base(toy)), adapters.read(folders / "ia3", base(toy))
    assert toy.same(moved.trainable, kept.trainable)
    assert adapters.gap(kept, folder).relative < 1e-6


def test_vectors_that_are_missing_are_ones(toy, folders, tmp_path):
    folder = copy(folders, "ia3", tmp_path)
    change(folder, lambda t: {k: v for k, v in t.items() if "wi_1" not in k})
    set_option(folder, target_modules=["k", "v"])
    saved = adapters.read(folder, base(toy))
    mlp = saved.trainable["encoder"]["layers_0"]["mlp"]["wi_1"]["adapter"]["vectors"]
    np.testing.assert_array_equal(mlp, np.ones(24, np.float32))


def test_rank_stabilised_scale_is_an_alpha(toy, folders, tmp_path):
    folder = copy(folders, "qv", tmp_path)
    set_option(folder, use_rslora=True)
    saved = adapters.read(folder, base(toy))
    adapter = records.method(saved.description["method"], "toy").rules[0].adapter_factory()
    assert adapter.alpha == pytest.approx(3.0 * np.sqrt(2))
    assert adapters.gap(saved, folder).relative < 1e-6


@pytest.mark.parametrize("kind", ["zip", "serial"])
@pytest.mark.parametrize("name", ["lora", "ia3", "mhr4"])
def test_adapters_of_older_peft_are_pickled(toy, folders, writing, name, kind, tmp_path):
    folder = copy(folders, name, tmp_path)
    tensors = safetensors.numpy.load_file(folder / tensors_lib.TENSORS)
    (folder / tensors_lib.TENSORS).unlink()
    (folder / tensors_lib.PICKLED).write_bytes(writing.of_arrays(tensors, kind))
    assert formats.detect(folder) == "peft"
    saved, kept = adapters.read(folder, base(toy)), adapters.read(folders / name, base(toy))
    assert toy.same(saved.trainable, kept.trainable)
    assert saved.description == kept.description
    assert adapters.gap(saved, folder).relative < 1e-6
    with pytest.raises(errors.UserError, match="name them with --base"):
        adapters.read(folder)


def copy(folders, name, tmp_path):
    return shutil.copytree(folders / name, tmp_path / name)


def check_refused(toy, folder, words, file):
    with pytest.raises(errors.UserError) as error:
        adapters.read(folder, base(toy))
    text = str(error.value)
    assert words in text
    assert file in text
    assert "\n" not in text


def test_damaged_files_are_named(toy, folders, tmp_path):
    folder = copy(folders, "qv", tmp_path)
    path = folder / tensors_lib.TENSORS
    path.write_bytes(path.read_bytes()[:-100])
    check_refused(toy, folder, "is cut short: base_model.model.", tensors_lib.TENSORS)
    path.rename(folder / "adapter_model.bin")
    check_refused(toy, folder, "cannot be read as torch's", "adapter_model.bin")
    (folder / "adapter_model.bin").rename(folder / "adapter_model.pkl")
    check_refused(toy, folder, "is a pickle", "adapter_model.pkl")
    (folder / config_lib.NAME).write_text("{")
    check_refused(toy, folder, "cannot be read as JSON", config_lib.NAME)


def test_settings_that_are_not_the_records_are_refused(toy, tmp_path):
    adapters.write(toy.trained(toy.METHODS["qv"]()), tmp_path / "a", "toy")
    set_option(tmp_path / "a", lora_alpha=7)
    check_refused(
        toy, tmp_path / "a", f"lora_alpha is 7.0 in {config_lib.NAME} and 3.0 in", config_lib.NAME
    )
    small = adapters.Base("hf:other", toy.network("t5_1_1", num_heads=4).config, "other")
    with pytest.raises(errors.UserError, match="num_heads differ"):
        adapters.read(tmp_path / "a", small)


def test_without_record_and_base_the_weights_are_asked_for(folders):
    with pytest.raises(errors.UserError, match="name them with --base hf:FOLDER"):
        adapters.read(folders / "qv")


REFUSED = {
    "PEFT has no MoV": lambda toy: methods.mov(2),
    "PEFT has no MoLoRA": lambda toy: methods.molora(2),
    "PEFT has no SkilledIA3": lambda toy: toy.poly(adapter="ia3"),
    "not PrivateRouter": lambda toy: methods.private(3),
    "not one per coder": lambda toy: toy.poly(granularity="coder"),
    "does not round": lambda toy: toy.poly(straight_through=True),
    "it has no adapters": lambda toy: methods.full(),
}


@pytest.mark.parametrize("words", REFUSED)
def test_methods_that_peft_has_not_are_refused_by_name(toy, words, tmp_path):
    method = REFUSED[words](toy)
    saved = toy.saved(method, {})
    with pytest.raises(errors.UserError) as error:
        adapters.write(saved, tmp_path / "a", "results/run")
    text = str(error.value)
    assert words in text
    assert text.startswith(f"results/run: the method {method.name!r} cannot be written for PEFT")
    assert not list(tmp_path.iterdir())
