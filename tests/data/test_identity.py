"""What shapes a run's rows is described: other settings differ by name, other paths do not."""

import json
import pathlib
import shutil
import time

import gin
import pytest

from moe_peft.data import identity, samples, sentences
from moe_peft.tasks import cldr, crossfit, p3, superni
from moe_peft.weights import identity as run_identity

del cldr, crossfit, p3  # registered

LENGTHS = {"inputs": 128, "targets": 64}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    place = tmp_path_factory.mktemp("data")
    samples.write(place)
    return place


@pytest.fixture(autouse=True)
def _settings(folder, tmp_path, monkeypatch):
    monkeypatch.setenv("MOE_PEFT_CACHE", str(tmp_path / "cache"))
    gin.clear_config()
    gin.bind_parameter("places.configured.folder", str(folder))
    gin.bind_parameter("vocabularies.configured.vocabulary", "bytes")
    yield
    gin.clear_config()


def describe(name, **changes):
    arguments = {"feature_lengths": LENGTHS, "batch_size": 8, "seed": 0, **changes}
    found = identity.describe(name, **arguments)
    assert found == json.loads(json.dumps(found))
    return found


CHANGES = [
    ("superni_train", "superni.configured.prompt", "definition_pos2", "'mhr'"),
    ("superni_train", "superni.configured.seed", 7, "42"),
    ("superni_train", "superni.configured.train_examples", 5, "100"),
    ("crossfit_train", "crossfit.configured.with_task_name", False, "True"),
    ("crossfit_train", "crossfit.configured.seeds", (100, 13), "[100, 13, 21, 42, 87]"),
    ("p3_t0", "p3.configured.cap_rule", "t_few", "'t0'"),
    ("p3_t0", "p3.configured.task_ids", "dataset", "'template'"),
    ("p3_t0", "bad_rows.configured.action", "skip", "'stop'"),
    ("p3_t0", "task_ids.per_template.num_templates", 40, "None"),
    ("cldr_train", "task_ids.per_template.num_templates", 4, "None"),
]


@pytest.mark.parametrize(("name", "parameter", "value", "before"), CHANGES)
def test_a_difference_names_the_setting(name, parameter, value, before):
    saved = describe(name)
    gin.bind_parameter(parameter, value)
    difference = run_identity.first_difference(saved, describe(name))
    shown = json.loads(json.dumps(value))
    assert difference == f"gin.{parameter} is {before} in the checkpoint and {shown!r} here"


def test_a_macro_is_described_by_its_value():
    gin.parse_config("NUM = 40\ntask_ids.per_template.num_templates = %NUM")
    assert describe("p3_t0")["gin"]["task_ids.per_template.num_templates"] == 40


def test_sentence_embeddings_are_named_by_their_encoder():
    def encoder(texts):
        raise AssertionError("nothing is encoded")

    saved = describe("cldr_train")
    gin.bind_parameter("sentences.configured.encoder", sentences.remembering(encoder))
    difference = run_identity.first_difference(saved, describe("cldr_train"))
    assert difference.endswith("configured.encoder is None in the checkpoint and 'encoder' here")


@pytest.mark.parametrize("name", ["superni_train", "crossfit_train", "p3_t0"])
def test_the_same_contents_elsewhere_are_equal(name, folder, tmp_path):
    import seqio

    model = pathlib.Path(seqio.__file__).parent / "test_data/sentencepiece/sentencepiece.model"
    gin.bind_parameter("vocabularies.configured.vocabulary", str(model))
    if name == "p3_t0":
        gin.bind_parameter("p3.configured.retokenize", True)
    saved = describe(name)
    shutil.copytree(folder, tmp_path / "moved")
    shutil.copy(model, tmp_path / "spiece.model")
    gin.bind_parameter("places.configured.folder", str(tmp_path / "moved"))
    gin.bind_parameter("vocabularies.configured.vocabulary", str(tmp_path / "spiece.model"))
    if name == "p3_t0":
        gin.bind_parameter("p3.configured.raw", str(tmp_path / "moved" / "p3" / "raw"))
    assert describe(name) == saved
    gin.bind_parameter("vocabularies.configured.vocabulary", "bytes")
    difference = run_identity.first_difference(saved, describe(name))
    assert difference.startswith("gin.vocabularies.configured.vocabulary is '")


def test_other_contents_in_the_same_place_differ(folder, tmp_path):
    shutil.copytree(folder, tmp_path / "data")
    gin.bind_parameter("places.configured.folder", str(tmp_path / "data"))
    saved = describe("superni_train")
    path = sorted((tmp_path / "data" / "superni" / "tasks").glob("*.json"))[0]
    content = json.loads(path.read_text())
    for instance in content["Instances"]:
        instance["input"] += " Really?"
    path.write_text(json.dumps(content))
    superni._all_rows.cache_clear()  # another process
    found = describe("superni_train")
    assert found["gin"] == saved["gin"]
    assert found["seen"]["rows"] == saved["seen"]["rows"]
    assert found["seen"]["sizes"] != saved["seen"]["sizes"]


@pytest.mark.parametrize(
    "change", [{"seed": 1}, {"pack": True}, {"batch_size": 4}, {"split": "validation"}]
)
def test_arguments_are_seen_in_the_batches(change):
    saved, found = describe("superni_train"), describe("superni_train", **change)
    assert found["gin"] == saved["gin"]
    assert found["seen"]["first_batches"] != saved["seen"]["first_batches"]


def test_a_mixture_is_described_by_what_it_reads():
    assert set(describe("cldr_train")["gin"]) == {
        "sentences.configured.encoder",
        "task_ids.per_template.num_templates",
    }
    names = {name.split(".")[0] for name in describe("superni_train")["gin"]}
    assert names == {"bad_rows", "sentences", "superni", "task_ids", "vocabularies"}
    assert not {"p3.configured.raw", "p3.configured.templates"} & set(describe("p3_t0")["gin"])


def test_describing_costs_little():
    describe("cldr_train")
    start = time.process_time()
    describe("cldr_train", batch_size=256)
    assert time.process_time() - start < 2
