"""Both monitors in a real run: it trains the same with them, resumes, and can be reported."""

import gin
import jax
import numpy as np
import pytest

from moe_peft import cli
from moe_peft.analysis import alignment, routing_course
from moe_peft.training import checkpoints, metrics_writer

SETTINGS = """
include 'models/tiny.gin'
include 'data/cldr.gin'
include 'runs/train.gin'
include 'optimizers/adafactor.gin'
include 'methods/mhr.gin'
BACKBONE = "random:0"
MIXTURE = "cldr_fewshot"
FEATURE_LENGTHS = {"inputs": 24, "targets": 12}
NUM_TASKS = 400
BATCH_SIZE = 8
T5Config.num_encoder_layers = 1
T5Config.num_decoder_layers = 1
mhr.num_skills = 2
mhr.num_splits = 2
mhr.placement = "light"
train.checkpoint_period = 2
"""
MONITORS = (
    "--gin_file",
    "monitors/alignment_and_routing.gin",
    "--gin.GradientAlignment.period=2",
    "--gin.GradientAlignment.num_tasks=3",
    "--gin.GradientAlignment.batch_size=8",
    "--gin.RoutingCourse.period=1",
)


@pytest.mark.slow
def test_monitored_runs(tmp_path):
    (tmp_path / "settings.gin").write_text(SETTINGS)

    def train(name, num_steps, *flags):
        files = ("--gin_file", str(tmp_path / "settings.gin"))
        flags = (f"--gin.MODEL_DIR={tmp_path / name}", f"--gin.TRAIN_STEPS={num_steps}", *flags)
        assert cli.main(["train", *files, *flags]) == 0
        gin.clear_config()
        return tmp_path / name

    plain = train("plain", 3)
    watched = train("watched", 3, *MONITORS)
    trees = [checkpoints.load_trainable(folder).trainable for folder in (plain, watched)]
    jax.tree.map(np.testing.assert_array_equal, *trees)
    lines = metrics_writer.read(watched)
    assert [line for line in lines if "loss" in line] == metrics_writer.read(plain)
    assert [line["step"] for line in lines if "alignment/mean_cosine" in line] == [2, 3]
    assert [line["step"] for line in lines if "routing/entropy" in line] == [1, 2, 3]
    assert [record["step"] for record in alignment.records(watched)] == [2, 3]
    assert [record["step"] for record in routing_course.records(watched)] == [1, 2, 3]

    # Killed after step 3 of 5, whose records were written, with the checkpoint of step 2 at hand.
    whole = train("whole", 5, *MONITORS)
    killed = train("killed", 3, *MONITORS)
    for step in checkpoints.steps(killed)[1:]:
        (killed / checkpoints.FOLDER / str(step)).rename(tmp_path / f"gone-{step}")
    train("killed", 5, *MONITORS)
    for name in ("alignment", "routing"):
        files = [folder / "monitors" / f"{name}.jsonl" for folder in (whole, killed)]
        assert files[0].read_bytes() == files[1].read_bytes()

    assert cli.main(["report", str(whole), "--out", str(tmp_path / "out")]) == 0
    assert (tmp_path / "out" / "mhr_routing_tree.png").is_file()
    gin.clear_config()
