"""From raw files and templates to a report, as a user runs it."""

import json

import gin
import pytest

from moe_peft.cli import main

SETTINGS = {
    "p3.configured.source": "raw",
    "TRAIN_STEPS": 2,
    "T5Config.num_encoder_layers": 1,
    "T5Config.num_decoder_layers": 1,
    "BACKBONE": "random:0",
}


@pytest.fixture(autouse=True)
def _clean_gin():
    yield
    gin.clear_config()


@pytest.mark.slow
def test_train_and_zero_shot_from_raw_files(tmp_path):
    flags = ["--gin_file", "experiments/mov/3b/mov_2.gin", "--gin_file", "samples/p3.gin"]
    flags += [f"--gin.{name}={value}" for name, value in SETTINGS.items()]
    flags += [f"--gin.MODEL_DIR={tmp_path}"]
    for command in ("train", "eval"):
        assert main.main([command, *flags]) == 0
        gin.clear_config()
    (answers,) = (tmp_path / "eval").glob("*/predictions/p3_storycloze.jsonl")
    stories = [json.loads(line) for line in answers.read_text(encoding="utf-8").splitlines()]
    assert len(stories) == 16
    assert {row["template"] for row in stories} == {0, 1}
    assert all(row["targets"] in row["choices"] and len(row["choices"]) == 2 for row in stories)
    assert {row["metric"] for row in stories} == {"rank_accuracy"}
