"""Experiments on the benchmarks train on samples. Rows of all three: cli/test_data_show.py."""

import gin
import pytest

from moe_peft.cli import main


@pytest.fixture(autouse=True)
def _clean_gin():
    yield
    gin.clear_config()


def run(command, experiment, sample, folder, *bindings):
    flags = ["--gin_file", f"experiments/{experiment}.gin", "--gin_file", f"samples/{sample}.gin"]
    flags += [f"--gin.{binding}" for binding in (f"MODEL_DIR={folder}", *bindings)]
    assert main.main([command, *flags]) == 0


LAYERS = ("T5Config.num_encoder_layers=1", "T5Config.num_decoder_layers=1")
SHORT = ("TRAIN_STEPS=2", "DROPOUT_RATE=0.0", "BACKBONE=random:0", *LAYERS)


@pytest.mark.parametrize(
    ("experiment", "sample"),
    [
        ("mhr/superni/poly", "superni"),
        pytest.param("poly_s/crossfit/poly", "crossfit", marks=pytest.mark.slow),
        pytest.param("mhr/t0_xl/poly", "p3", marks=pytest.mark.slow),
    ],
)
def test_train_on_a_sample(tmp_path, experiment, sample):
    run("train", experiment, sample, tmp_path, *SHORT)
    assert (tmp_path / "config.gin").is_file()
