"""A run or an adaptation does not go on with other data: one line names the setting."""

import gin
import pytest

from moe_peft.cli import main
from moe_peft.data import samples

pytestmark = pytest.mark.usefixtures("compiled_once")

FILES = ("models/cldr_tiny.gin", "methods/ia3.gin", "data/superni.gin")
FLAGS = (
    "BACKBONE=random:0",
    "T5Config.num_encoder_layers=1",
    "T5Config.num_decoder_layers=1",
    "T5Config.dropout_rate=0.0",
    "BATCH_SIZE=4",
    "DROPOUT_RATE=0.0",
    "INPUT_TOKENS=64",
    "T5Config.emb_dim=32",
    "T5Config.mlp_dim=64",
)
PROMPT = "superni.configured.prompt"
SEED = "superni.configured.seed"


@pytest.fixture(autouse=True)
def _clean_gin():
    yield
    gin.clear_config()


def call(command, folder, files, *bindings):
    gin.clear_config()
    arguments = [command]
    for file in (*FILES, *files, "optimizers/adamw.gin", "samples/superni.gin"):
        arguments += ["--gin_file", file]
    return main.main(
        [*arguments, *(f"--gin.{b}" for b in (f"MODEL_DIR={folder}", *FLAGS, *bindings))]
    )


def refusal(capsys, code):
    assert code == main.USER_ERROR
    return capsys.readouterr().err.splitlines()[-1]


def test_a_run_goes_on_with_its_own_data_only(tmp_path, capsys):
    run = lambda *bindings: call("train", tmp_path / "run", ("runs/train.gin",), *bindings)
    assert run("TRAIN_STEPS=2") == 0
    line = refusal(capsys, run("TRAIN_STEPS=4", f"{PROMPT}=definition_pos2"))
    assert "are of a run with other data settings: " in line
    assert f"gin.{PROMPT} is 'mhr' in the checkpoint and 'definition_pos2' here" in line

    samples.write(tmp_path / "elsewhere")
    assert run("TRAIN_STEPS=4", f"DATA_DIR={tmp_path / 'elsewhere'}") == 0
    said = capsys.readouterr().err
    assert "going on from step 2" in said
    assert "WARNING: the optimiser was changed: learning_rates" in said  # as planned for 4 steps
    assert "version 0.1" not in said


def test_an_adaptation_goes_on_with_its_own_data_only(tmp_path, capsys):
    numbers = ("TRAIN_STEPS=1", "SEEDS=(0,)", "SHOTS=4", "VALIDATION_SHOTS=2")
    mixture = ("MIXTURE=superni_test", "adapt.test_split=test")
    run = lambda *bindings: call(
        "adapt", tmp_path / "run", ("runs/fewshot.gin",), *numbers, *mixture, *bindings
    )
    assert run() == 0
    line = refusal(capsys, run(f"{SEED}=7"))
    assert "holds an adaptation with other settings: rows.gin." in line
    assert f"{SEED} is 42 in the checkpoint and 7 here" in line
    samples.write(tmp_path / "elsewhere")
    assert run(f"DATA_DIR={tmp_path / 'elsewhere'}") == 0
