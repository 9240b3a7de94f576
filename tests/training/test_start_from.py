"""Going on from a multi-task run: `train.start_from` and `evaluate.start_from`, by command line."""

import json

import gin
import jax
import numpy as np
import pytest

from moe_peft import methods, patching
from moe_peft.cli import main
from moe_peft.methods import transfer
from moe_peft.weights import saved_run

COMMON = """
include 'models/tiny.gin'
include 'data/cldr.gin'
include 'runs/zeroshot_extra.gin'
include 'methods/mhr.gin'
import moe_peft.training.optimizers

T5Config.num_encoder_layers = 1
T5Config.num_decoder_layers = 1
T5Config.dropout_rate = 0.0  # compiles in half the time
mhr.num_splits = 4
mhr.num_skills = 2
mhr.placement = "encoder/.*/(query|wo)"
VARIANT = "mu"
BACKBONE = "random:0"
DROPOUT_RATE = 0.0
BATCH_SIZE = 8
TRAIN_STEPS = 2
OPTIMIZER = @optimizers.adamw()
adamw.learning_rate = 1e-2
Evaluator.max_examples_per_task = 1
EVAL_MIXTURES = ("cldr_month_fi",)
"""


@pytest.fixture(autouse=True)
def _clean_gin():
    yield
    gin.clear_config()


@pytest.fixture(scope="module")
def settings(tmp_path_factory):
    path = tmp_path_factory.mktemp("settings") / "extra.gin"
    path.write_text(COMMON)
    return path


def run(verb, settings, folder, *flags):
    return main.main([verb, "--gin_file", str(settings), f"--gin.MODEL_DIR={folder}", *flags])


MULTITASK = ("--gin.train.method=%METHOD", "--gin.train.start_from=None")


@pytest.fixture(scope="module")
def source(settings, tmp_path_factory):
    folder = tmp_path_factory.mktemp("source")
    assert run("train", settings, folder, *MULTITASK) == 0
    gin.clear_config()
    return folder


def test_extra_steps_start_at_the_average(settings, source, tmp_path, capsys):
    flags = [f"--gin.SOURCE={source}", "--gin.adamw.learning_rate=0.0"]
    assert run("train", settings, tmp_path / "extra", *flags) == 0
    saved = saved_run.load(tmp_path / "extra")
    multitask = saved_run.load(source)
    multi = methods.mhr(
        num_tasks=249, num_splits=4, num_skills=2, placement="encoder/.*/(query|wo)"
    )
    method = transfer.transferred(multi, "mu")
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), saved.trainable)
    start = transfer.initial(method, multitask.trainable, shapes, jax.random.key(0))
    moved = 0
    for path, leaf in patching.flatten(start).items():  # a learning rate of 0 leaves all in place
        np.testing.assert_array_equal(leaf, patching.flatten(saved.trainable)[path])
        moved += np.abs(leaf).max() > 0
    assert moved == len(patching.flatten(saved.trainable))  # B too: the source has trained
    assert saved.description["source"]["step"] == 2


def evaluated(settings, folder, *flags):
    assert run("eval", settings, folder, *flags) == 0
    return json.loads((folder / "eval/cldr_month_fi/results.json").read_text())


def before(settings, source, folder):
    """What the start of the extra steps answers."""
    start_from = "--gin.evaluate.start_from=%SOURCE"
    return evaluated(settings, folder, f"--gin.SOURCE={source}", start_from)


def test_the_start_can_be_evaluated(settings, source, tmp_path):
    made = before(settings, source, tmp_path)["run"]
    assert (made["step"], made["method"]["name"]) == (0, "mhr_mu")


@pytest.mark.slow  # the leaves themselves are compared above
def test_steps_that_change_nothing_leave_the_answers(settings, source, tmp_path):
    flags = [f"--gin.SOURCE={source}", "--gin.adamw.learning_rate=0.0"]
    assert run("train", settings, tmp_path / "extra", *flags) == 0
    gin.clear_config()
    after = evaluated(settings, tmp_path / "extra", *flags[:1])
    gin.clear_config()
    assert after["results"] == before(settings, source, tmp_path / "before")["results"]
    assert after["run"]["step"] == 2


def test_sources_that_do_not_fit(settings, source, tmp_path, capsys):
    cases = {
        "--gin.mhr.num_skills=3": "another method: rules.0.adapter.num_skills is 2",
        "--gin.BACKBONE=random:1": "was trained on another backbone (random:0)",
        f"--gin.SOURCE={tmp_path}": "no training checkpoint",
    }
    for number, (flag, message) in enumerate(cases.items()):
        folder = tmp_path / str(number)
        assert run("train", settings, folder, f"--gin.SOURCE={source}", flag) == 2
        (line,) = capsys.readouterr().err.splitlines()[-1:]
        assert message.lower() in line.lower(), line
        gin.clear_config()
