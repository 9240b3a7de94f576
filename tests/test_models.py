"""docs/models.md: of today, with numbers that others count too."""

import importlib.util
import pathlib

import pytest

from moe_peft.experiments import files
from moe_peft.weights import hub

ROOT = pathlib.Path(__file__).parents[1]


@pytest.fixture(scope="module")
def script():
    spec = importlib.util.spec_from_file_location("make_models", ROOT / "docs/make_models.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def models(script):
    return [(family, model) for family in script.table()["family"] for model in family["models"]]


def test_the_page_is_of_today(script):
    shown = (ROOT / "docs/models.md").read_text(encoding="utf-8")
    assert shown == script.page(), "run python docs/make_models.py"
    assert len(models(script)) >= 50
    assert len(script.table()["family"]) >= 18


def test_counts_are_those_that_others_publish(script):
    compared = [(family, model) for family, model in models(script) if "published" in model]
    assert len(compared) >= 40
    for family, model in compared:
        count = script.parameters(script.config(family, model))
        assert count == pytest.approx(script.number(model["published"]), rel=0.01), model["hf"]


def test_biases_are_counted_once_or_for_every_layer(script):
    by_name = {model["hf"]: (family, model) for family, model in models(script)}
    count = lambda name: script.parameters(script.config(*by_name[name]))
    assert count("EleutherAI/pile-t5-xl") == 2_849_804_288  # to the digit, as its authors say
    assert count("google/t5-v1_1-xl") == 2_849_804_288 - 2 * 23 * 32 * 32


def test_names_and_files_are_there(script):
    for family, model in models(script):
        assert hub.is_name(model["hf"])
        assert all((ROOT / path).is_file() for path in family["compared"])


def test_heads_name_models_of_the_page(script):
    known = {f"hf:{model['hf']}" for _, model in models(script)}
    assert set(script.papers()) < known
    for name in files.names():
        for line in files.load(name).commands:
            told = dict(binding.split("=", 1) for binding in line.bindings)
            assert told["BACKBONE"].startswith("run:results/") or told["BACKBONE"] in known, name
            assert told["VOCABULARY"] in known, name
            if not told["BACKBONE"].startswith("run:"):
                assert told["VOCABULARY"] == told["BACKBONE"], name
