"""Every gin file that comes with the package parses, is complete in its place, and plans."""

import gin
import pytest

from moe_peft import cli, gin_utils

ROOT = gin_utils.packaged_folder()


def names(folder):
    return sorted(path.relative_to(ROOT).as_posix() for path in (ROOT / folder).rglob("*.gin"))


# What a file needs beside it to be complete.
TINY = ("models/tiny.gin", "methods/ia3.gin", "data/cldr.gin")
RUN = [
    "BACKBONE=random:0",
    "BATCH_SIZE=8",
    "TRAIN_STEPS=2",
    "MODEL_DIR=/nowhere",
]
SCANNED = "T5Config.scan_layers=True"  # one layer stands for a stack: faster, same adapters

SEEN = {"models", "methods", "optimizers", "data", "runs", "samples", "monitors", "experiments"}


@pytest.fixture(autouse=True)
def _clean_gin():
    yield
    gin.clear_config()


def test_no_file_is_left_out():
    folders = {name.split("/")[0] for name in names(".")}
    assert folders <= SEEN


def test_folder_cannot_hide_the_gin_library():
    assert not list(ROOT.rglob("*.py"))


@pytest.mark.parametrize("name", names("models"))
def test_model_plans(name):
    plan = cli.configure("plan", [name, "methods/ia3.gin"], [SCANNED])()
    assert plan.base > 0
    assert plan.trainable > 0
    if plan.nominal_size is not None:
        assert 0.9 < plan.base / plan.nominal_size < 1.1


@pytest.mark.parametrize("name", names("methods"))
def test_method_plans_and_holds_no_size(name):
    plan = cli.configure("plan", ["models/tiny.gin", name])()
    assert plan.trainable + plan.frozen == plan.base + plan.adapters
    assert (plan.trainable == 0) == (name == "methods/frozen.gin")
    assert "T5Config" not in (ROOT / name).read_text()


@pytest.mark.parametrize("name", names("optimizers"))
def test_optimizer_is_complete(name):
    cli.configure("train", [*TINY, "runs/train.gin", name], RUN)
    assert gin.query_parameter("%OPTIMIZER").scoped_configurable_fn().name


@pytest.mark.parametrize("name", names("data"))
def test_data_names_a_mixture(name):
    cli.configure("plan", [*TINY, name])
    assert isinstance(gin.query_parameter("%MIXTURE"), str)
    assert set(gin.query_parameter("%FEATURE_LENGTHS")) == {"inputs", "targets"}


@pytest.mark.parametrize("name", names("monitors"))
def test_monitors_watch_training(name):
    cli.configure("train", [*TINY, "runs/train.gin", "optimizers/adamw.gin", name], RUN)
    watching = gin.query_parameter("train.monitors")
    expected = name.removeprefix("monitors/").removesuffix(".gin").split("_and_")
    assert len(watching) == len(expected)
    for monitor, word in zip(watching, expected, strict=True):
        made = monitor.scoped_configurable_fn()
        assert made.name == word
        assert made.period == 100


@pytest.mark.parametrize("name", [n for n in names("experiments") if not n.endswith("/common.gin")])
def test_experiment_is_complete_and_plans(name):
    head = (ROOT / name).read_text().split("include", 1)[0]
    for part in ("# Number:", "# Command:", "# Expected:", "# Hardware:", "# In two minutes:"):
        assert part in head
    assert name in head
    plan = cli.configure("plan", [name])()
    command = "eval" if plan.trainable == 0 else "train"
    cli.configure(command, [name], ["MODEL_DIR=/nowhere"])
