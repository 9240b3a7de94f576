"""One experiment through every command, on a network too small to learn anything."""

import json

import gin
import pytest
import safetensors.numpy

from moe_peft.cli import main

SETTINGS = """
include 'models/tiny.gin'
include 'data/cldr.gin'
include 'runs/train.gin'
include 'runs/eval.gin'
include 'runs/infer.gin'

BACKBONE = "random:0"
BATCH_SIZE = 8
EVAL_BATCH_SIZE = 64
TRAIN_STEPS = 2
EVAL_MIXTURES = ("cldr_month_de", "cldr_number_de")
Evaluator.max_examples_per_task = 5
"""


@pytest.fixture(autouse=True)
def _clean_gin():
    yield
    gin.clear_config()


@pytest.mark.slow
def test_every_command(tmp_path, capsys):
    (tmp_path / "settings.gin").write_text(SETTINGS)
    files = ("--gin_file", str(tmp_path / "settings.gin"), "--gin_file", "optimizers/adafactor.gin")

    def run(command, method, *flags):
        flags = (*files, "--gin_file", f"methods/{method}.gin", *flags)
        folder = tmp_path / method
        assert main.main([command, *flags, f"--gin.MODEL_DIR={folder}"]) == 0, capsys.readouterr()
        return folder

    frozen = run("eval", "frozen")
    mov = run("train", "mov")
    assert "cldr_train" in (mov / "config.gin").read_text()
    run("eval", "mov")
    folder = mov / "eval" / "cldr_month_de"
    rows = (folder / "predictions" / "cldr_month_de.jsonl").read_text().splitlines()
    assert len(rows) == 5
    assert json.loads(rows[0])["task"] == "cldr_month_de"

    # The resolved settings are complete: one file instead of three.
    gin.clear_config()
    resolved = ["--gin_file", str(mov / "config.gin"), "--gin.TRAIN_STEPS=3"]
    assert main.main(["train", *resolved]) == 0
    assert "going on from step 2" in capsys.readouterr().err

    (tmp_path / "questions.txt").write_text("Name the month May in German.\n")
    answers = tmp_path / "answers.jsonl"
    files_of_infer = (f"--gin.INPUTS={tmp_path}/questions.txt", f"--gin.OUTPUTS={answers}")
    run("infer", "mov", *files_of_infer)
    assert "prediction" in json.loads(answers.read_text())

    exported = tmp_path / "mov.safetensors"
    run("export", "mov", f"--gin.OUTPUTS={exported}")
    leaves = safetensors.numpy.load_file(exported)
    assert leaves["encoder/layers_0/attention/key/adapter/vectors"].shape == (10, 4, 8)

    assert main.main(["compare", str(frozen), str(mov), "--out", str(tmp_path / "out")]) == 0
    assert (tmp_path / "out" / "cldr_month_de.png").is_file()
    table = (tmp_path / "out" / "cldr_month_de.md").read_text()
    assert "frozen" in table
    assert "mov" in table


ENCODER = """
import gin
import numpy as np

@gin.register(module="mine")
def lengths():
    return lambda texts: np.array([[len(text), 1.0, -1.0] for text in texts], np.float32)
"""


@pytest.mark.slow
def test_sentence_routing_trains_evaluates_and_answers(tmp_path, monkeypatch):
    (tmp_path / "my_encoder.py").write_text(ENCODER)
    monkeypatch.syspath_prepend(tmp_path)
    method = "import my_encoder\ninclude 'methods/mov_sentence.gin'\n"
    method += "include 'data/sentence_embeddings.gin'\n"
    encoder = "sentences.configured.encoder = @mine.lengths()\n"
    optimizer = "include 'optimizers/adafactor.gin'\n"
    (tmp_path / "settings.gin").write_text(SETTINGS + method + encoder + optimizer)
    (tmp_path / "questions.txt").write_text("Name the month May in German.\nAnd June?\n")
    flags = ["--gin_file", str(tmp_path / "settings.gin"), f"--gin.MODEL_DIR={tmp_path}/run"]
    assert main.main(["train", *flags]) == 0
    assert main.main(["eval", *flags]) == 0
    answers = tmp_path / "answers.jsonl"
    files = (f"--gin.INPUTS={tmp_path}/questions.txt", f"--gin.OUTPUTS={answers}")
    assert main.main(["infer", *flags, *files]) == 0
    assert len(answers.read_text().splitlines()) == 2


@pytest.mark.slow
def test_another_method_in_the_same_folder_is_refused(tmp_path, capsys):
    (tmp_path / "settings.gin").write_text(SETTINGS)
    for method, code in (("ia3", 0), ("mov", main.USER_ERROR)):
        flags = [
            str(tmp_path / "settings.gin"),
            "optimizers/adafactor.gin",
            f"methods/{method}.gin",
        ]
        arguments = [word for flag in flags for word in ("--gin_file", flag)]
        arguments.append(f"--gin.MODEL_DIR={tmp_path}/run")
        assert main.main(["train", *arguments]) == code
    last = capsys.readouterr().err.splitlines()[-1]
    assert "method" in last
    assert "'ia3' in the checkpoint and 'mov' here" in last
    # The record of the run that was refused does not replace that of the run that is there.
    assert "ia3()" in (tmp_path / "run" / "config.gin").read_text()
