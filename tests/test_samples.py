"""Experiments on the benchmarks, in their version on the samples: many tasks, then new ones."""

import json

import gin
import pytest

from moe_peft import cli


@pytest.fixture(autouse=True)
def _clean_gin():
    yield
    gin.clear_config()


def run(command, experiment, sample, folder, *bindings):
    flags = ["--gin_file", f"experiments/{experiment}.gin", "--gin_file", f"samples/{sample}.gin"]
    flags += [f"--gin.{binding}" for binding in (f"MODEL_DIR={folder}", *bindings)]
    assert cli.main([command, *flags]) == 0


SHORT = ("TRAIN_STEPS=2", "T5Config.num_encoder_layers=1", "T5Config.num_decoder_layers=1")
RANDOM = (*SHORT, "BACKBONE=random:0")


@pytest.mark.parametrize(
    ("experiment", "sample"),
    [
        ("mhr/superni/poly", "superni"),
        ("poly_s/crossfit/poly", "crossfit"),
        ("mhr/t0_xl/poly", "p3"),
    ],
)
def test_train_on_a_sample(tmp_path, experiment, sample):
    run("train", experiment, sample, tmp_path, *RANDOM)
    assert (tmp_path / "config.gin").is_file()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("experiment", "sample", "tasks"),
    [
        ("mhr/superni/mhr", "superni", 3),
        ("poly_s/crossfit/poly_s", "crossfit", 3),
        ("mhr/t0_3b/mhr_z", "p3", 4),
        ("mhr/t0_3b/adapter_soup", "p3", 4),
    ],
)
def test_both_phases(tmp_path, experiment, sample, tasks):
    run("train", experiment, sample, tmp_path / "source", "TRAIN_STEPS=4")
    settings = (f"SOURCE={tmp_path}/source", "TARGET_STEPS=4", "adapt.eval_period=2")
    run("adapt", experiment, sample, tmp_path / "adapted", *settings)
    results = json.loads((tmp_path / "adapted" / "results.json").read_text())
    assert len(results["runs"]) == 2 * tasks


@pytest.mark.slow
def test_zero_shot(tmp_path):
    run("train", "mhr/t0_xl/mhr", "p3", tmp_path / "source", "TRAIN_STEPS=4")
    source = f"SOURCE={tmp_path}/source"
    run("train", "mhr/zero_shot/xl_mhr_mu", "p3", tmp_path / "more", source, "TRAIN_STEPS=2")
    run("eval", "mhr/zero_shot/xl_mhr_mu", "p3", tmp_path / "more", source, "TRAIN_STEPS=2")
    results = json.loads((tmp_path / "more" / "eval" / "p3_heldout" / "results.json").read_text())
    assert len(results["tasks"]) == 4


@pytest.mark.slow
def test_mov_on_a_sample(tmp_path):
    run("train", "mov/3b/mov_2", "p3", tmp_path, "TRAIN_STEPS=2")
    run("eval", "mov/3b/mov_2", "p3", tmp_path, "TRAIN_STEPS=2")
    assert list((tmp_path / "eval").iterdir())
