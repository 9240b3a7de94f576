"""Exported files hold what the run trained, and say what the run was."""

import gin
import numpy as np
import pytest

from moe_peft.cli import main
from moe_peft.weights import safetensors_files, saved_run


@pytest.fixture(autouse=True)
def _clean_gin():
    yield
    gin.clear_config()


@pytest.fixture
def run_folder(monkeypatch):
    saved = saved_run.Saved(
        step=7,
        trainable={"encoder": {"adapter": {"vectors": np.arange(3, dtype=np.float32)}}},
        position={},
        record={"description": {"method": {"name": "mov"}}},
    )

    def load(folder, step, member):
        assert (folder, step, member) == ("/some/run", None, None)
        return saved

    monkeypatch.setattr(saved_run, "load", load)
    return "/some/run"


def test_export_writes_trained_leaves_and_metadata(run_folder, tmp_path, capsys):
    path = tmp_path / "mov.safetensors"
    assert main.main(["export", f"--gin.MODEL_DIR={run_folder}", f"--gin.OUTPUTS={path}"]) == 0
    np.testing.assert_array_equal(
        safetensors_files.read_tree(path)["encoder"]["adapter"]["vectors"], [0, 1, 2]
    )
    assert safetensors_files.read_metadata(path) == {"method": {"name": "mov"}, "step": 7}
    assert str(path) in capsys.readouterr().out


def test_a_missing_run_is_one_line(tmp_path, capsys):
    flags = [f"--gin.MODEL_DIR={tmp_path}/nowhere", f"--gin.OUTPUTS={tmp_path}/a.safetensors"]
    assert main.main(["export", *flags]) == main.USER_ERROR
    assert "nowhere" in capsys.readouterr().err
