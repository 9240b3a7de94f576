"""`python -m t5x.train`, `t5x.eval` and `t5x.infer` with the project's gin files."""

import importlib.util
import json
import os
import pathlib
import subprocess
import sys

import pytest

from moe_peft.config import gin_files as gin_files_lib
from moe_peft.weights import saved_run

pytestmark = pytest.mark.slow

MODEL = ("t5x/cldr_tiny.gin",)
TASK = "cldr_month_cs"


def python(*arguments, code=0):
    """Output of a Python command, which has to end well (code 0) or with an error."""
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": ""}
    run = subprocess.run(
        [sys.executable, "-m", *arguments],
        capture_output=True,
        text=True,
        check=False,
        env=environment,
        timeout=900,
    )
    assert (run.returncode == 0) == (code == 0), run.stderr[-3000:]
    return run.stdout + run.stderr


def t5x(what, files, code=0, **bindings):
    """Runs T5X with gin files and bindings."""
    gin_files = (f"--gin_file={name}" for name in (*MODEL, *files))
    values = (f"--gin.{name}={value!r}" for name, value in bindings.items())
    search = f"--gin_search_paths={gin_files_lib.packaged_folder()}"
    return python(f"t5x.{what}", search, *gin_files, *values, code=code)


def train(method, folder, num_steps, backbone, *more, code=0):
    files = ("t5x/configs/runs/finetune.gin", "t5x/cldr.gin", *method, "t5x/train_adapters.gin")
    return t5x(
        "train",
        (*files, *more),
        code,
        **{
            "MODEL_DIR": str(folder),
            "INITIAL_CHECKPOINT_PATH": str(backbone),
            "TRAIN_STEPS": num_steps,
            "BATCH_SIZE": 8,
            "RANDOM_SEED": 0,
            "train/utils.DatasetConfig.seed": 0,
            "train.train_eval_dataset_cfg": None,
            "train.infer_eval_dataset_cfg": None,
            "t5x.utils.SaveCheckpointConfig.period": 2,
            "t5x.utils.create_learning_rate_scheduler.base_learning_rate": 100.0,
        },
    )


@pytest.fixture(scope="module")
def backbone(tmp_path_factory):
    if importlib.util.find_spec("t5x") is None:
        pytest.skip("T5X is not installed; docs/t5x.md says how")
    folder = tmp_path_factory.mktemp("backbone") / "cldr_tiny"
    python("moe_peft", "convert", "--from", "embedded:cldr_tiny", "--to", f"t5x:{folder}")
    return folder / "checkpoint_0"


def test_a_task_routed_method_trains_resumes_evaluates_and_infers(backbone, tmp_path):
    run = tmp_path / "run"
    mhr = ("methods/mhr.gin", "t5x/unpacked.gin")
    packed = train(mhr[:1], tmp_path / "packed", 2, backbone, code=1)
    assert "rows cannot be packed: set train/utils.DatasetConfig.pack" in packed
    first = train(mhr, run, 2, backbone)
    assert "Restoring 60 of 60 leaves of the backbone (1233152 parameters)" in first
    assert "parameters) start fresh." in first
    second = train(mhr, run, 4, backbone)
    assert "parameters) too." in second
    saved = {p.name for p in (run / "adapters").iterdir()}
    assert saved == {f"step_{step}.safetensors" for step in (0, 2, 4)}
    trained = saved_run.load(run / "adapters" / "step_4.safetensors")
    assert trained.step == 4
    assert trained.description["method"]["name"] == "mhr"

    answers = []
    places = {
        "own": {"CHECKPOINT_PATH": str(run / "checkpoint_4")},
        "beside": {
            "CHECKPOINT_PATH": str(backbone),
            "ADAPTERS": str(run / "adapters" / "step_4.safetensors"),
        },
        "fresh": {"CHECKPOINT_PATH": str(backbone)},
    }
    for name, place in places.items():
        out = tmp_path / f"eval_{name}"
        t5x(
            "eval",
            ("t5x/configs/runs/eval.gin", "t5x/cldr.gin", mhr[0], "t5x/eval_adapters.gin"),
            **place,
            **{
                "EVAL_OUTPUT_DIR": str(out),
                "MIXTURE_OR_TASK_NAME": "cldr_month_cs",
                "t5x.utils.DatasetConfig.split": "validation",
            },
        )
        (found,) = (out / "inference_eval").glob(f"{TASK}-0*.jsonl")
        lines = found.read_text(encoding="utf-8").splitlines()
        answers.append([json.loads(line)["prediction"] for line in lines])
        metrics = json.loads((out / "inference_eval" / f"{TASK}-metrics.jsonl").read_text())
        assert {"exact_match", "rouge_l"} <= metrics.keys()
    own, beside, fresh = answers
    assert own == beside != fresh

    t5x(
        "infer",
        ("t5x/configs/runs/infer.gin", "t5x/cldr.gin", mhr[0], "t5x/infer_adapters.gin"),
        CHECKPOINT_PATH=str(run / "checkpoint_4"),
        INFER_OUTPUT_DIR=str(tmp_path / "infer"),
        MIXTURE_OR_TASK_NAME=TASK,
        **{
            "t5x.utils.DatasetConfig.split": "validation",
            "t5x.utils.RestoreCheckpointConfig.dtype": "float32",
        },
    )
    (found,) = (tmp_path / "infer").glob("*.jsonl-00000-of-00001")
    lines = pathlib.Path(found).read_text(encoding="utf-8").splitlines()
    assert [json.loads(line)["prediction"] for line in lines] == own


def test_a_checkpoint_that_lacks_leaves_is_refused(backbone, tmp_path):
    said = train(("methods/mov.gin",), tmp_path / "run", 2, backbone, str(_wider(tmp_path)), code=1)
    assert "The checkpoint lacks" in said
    assert not (tmp_path / "run" / "adapters").exists()


def _wider(folder):
    path = folder / "wider.gin"
    path.write_text(
        "from __gin__ import dynamic_registration\n"
        "from t5x.examples.t5 import network\n"
        "network.T5Config.num_encoder_layers = 4\n"
    )
    return path
