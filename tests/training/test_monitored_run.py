"""Both monitors in a real run: it trains the same with them, resumes, and can be reported."""

import shutil

import gin
import jax
from jax.experimental.compilation_cache import compilation_cache
import numpy as np
import pytest

from moe_peft.cli import main
from moe_peft.training import metrics_writer
from moe_peft.training.monitors import alignment, routing
from moe_peft.weights import saved_run

SETTINGS = """
include 'models/tiny.gin'
include 'data/cldr.gin'
include 'runs/train.gin'
include 'optimizers/adafactor.gin'
include 'methods/mhr.gin'
BACKBONE = "random:0"
MIXTURE = "cldr_fewshot"
NUM_TASKS = 400
BATCH_SIZE = 8
TRAIN_STEPS = 5
T5Config.num_encoder_layers = 1
T5Config.num_decoder_layers = 1
T5Config.dropout_rate = 0.0  # compiles in half the time
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


@pytest.fixture(autouse=True)
def _compiled_once(tmp_path):
    """Three runs of one program."""
    settings = {
        "jax_compilation_cache_dir": str(tmp_path / "compiled"),
        "jax_persistent_cache_min_compile_time_secs": 0,
        "jax_persistent_cache_min_entry_size_bytes": -1,
    }
    before = {name: getattr(jax.config, name) for name in settings}
    for values in (settings, before):
        for name, value in values.items():
            jax.config.update(name, value)
        compilation_cache.reset_cache()
        if values is settings:
            yield


@pytest.mark.slow
def test_monitored_runs(tmp_path):
    (tmp_path / "settings.gin").write_text(SETTINGS)

    def train(name, *flags):
        files = ("--gin_file", str(tmp_path / "settings.gin"))
        assert main.main(["train", *files, f"--gin.MODEL_DIR={tmp_path / name}", *flags]) == 0
        gin.clear_config()
        return tmp_path / name

    plain, watched = train("plain"), train("watched", *MONITORS)
    trees = [saved_run.load(folder).trainable for folder in (plain, watched)]
    jax.tree.map(np.testing.assert_array_equal, *trees)
    lines = metrics_writer.read(watched)
    assert [line for line in lines if "loss" in line] == metrics_writer.read(plain)
    assert [line["step"] for line in lines if "alignment/mean_cosine" in line] == [2, 4, 5]
    assert [line["step"] for line in lines if "routing/entropy" in line] == [1, 2, 3, 4, 5]
    assert [record["step"] for record in alignment.records(watched)] == [2, 4, 5]
    assert [record["step"] for record in routing.records(watched)] == [1, 2, 3, 4, 5]

    # Killed after its last records were written, with the checkpoint of step 2 at hand.
    shutil.copytree(watched, tmp_path / "killed")
    for step in (4, 5):
        shutil.rmtree(tmp_path / "killed" / saved_run.FOLDER / str(step))
    killed = train("killed", *MONITORS)
    for name in ("monitors/alignment.jsonl", "monitors/routing.jsonl", metrics_writer.FILE_NAME):
        assert (killed / name).read_bytes() == (watched / name).read_bytes()

    assert main.main(["report", str(killed), "--out", str(tmp_path / "out")]) == 0
    assert (tmp_path / "out" / "mhr_routing_tree.png").is_file()
    gin.clear_config()
