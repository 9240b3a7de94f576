"""What version 0.1 left on disk still works: a run's folder with its settings, an exported file."""

import json
import pathlib
import shutil

import gin
import pytest

from moe_peft.cli import main
from moe_peft.runtime import digest
from moe_peft.weights import saved_run

FIXTURES = pathlib.Path(__file__).parent / "fixtures" / "version_0_1"


@pytest.fixture(autouse=True)
def _clean_gin():
    yield
    gin.clear_config()


@pytest.fixture
def run(tmp_path):
    return pathlib.Path(shutil.copytree(FIXTURES / "mov_run", tmp_path / "run"))


def test_a_run_goes_on_from_its_own_settings(run, capsys):
    settings = ["--gin_file", str(run / "config.gin"), f"--gin.MODEL_DIR={run}"]
    assert "import moe_peft.training.loop" in (run / "config.gin").read_text()
    assert main.main(["train", *settings, "--gin.TRAIN_STEPS=6"]) == 0
    said = capsys.readouterr().err
    assert "going on from step 4" in said
    assert "WARNING: the checkpoint does not say which settings shaped its data" in said
    last = json.loads((run / "metrics.jsonl").read_text().splitlines()[-1])
    assert last["step"] == 6
    # As version 0.1 itself went on, to the rounding of another processor.
    assert last["loss"] == pytest.approx(0.6112799, abs=1e-5)
    assert last["grad_norm"] == pytest.approx(0.3489565, rel=1e-4)
    assert last["param_norm"] == pytest.approx(86.2635574, rel=1e-5)


def test_a_run_answers_as_it_did(run, tmp_path):
    (tmp_path / "questions.txt").write_text("cldr month de: 3\nname of a month\n")
    files = {"INPUTS": tmp_path / "questions.txt", "OUTPUTS": tmp_path / "answers.jsonl"}
    flags = [f"--gin.{name}={path}" for name, path in {**files, "MODEL_DIR": run}.items()]
    assert main.main(["infer", "--gin_file", str(run / "config.gin"), *flags]) == 0
    rows = map(json.loads, (tmp_path / "answers.jsonl").read_text().splitlines())
    assert [row["prediction"] for row in rows] == ["3. četembre", "Anaaine"]


def test_an_exported_file_is_read_and_converted(tmp_path):
    file = FIXTURES / "mhr_export.safetensors"
    saved = saved_run.load(file)
    assert (saved.step, saved.description["method"]["name"]) == (3, "mhr")
    assert (
        digest.of_tree(saved.trainable)
        == "842103714d876dc2cdc66aa20bfb36474785661a07e10df038769731097657be"
    )
    out = tmp_path / "peft"
    assert main.main(["convert", "--from", str(file), "--to", f"peft:{out}"]) == 0
    assert (out / "adapter_config.json").is_file()
