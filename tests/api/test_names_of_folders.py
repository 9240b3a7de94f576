"""Folders may be called like the kinds of backbones."""

import numpy as np
import pytest

import moe_peft
from moe_peft.api import loading
from moe_peft.models import t5
from moe_peft.weights import backbone, hugging_face, t5_sizes

TINY = t5.T5Config(272, 8, 2, 4, 12, 1, 1)


@pytest.mark.parametrize("name", sorted(backbone.PREFIXES))
def test_a_model_in_a_folder_of_that_name(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    leaves = {path: np.ones(s, np.float32) for path, s in t5_sizes.shapes_of(TINY).items()}
    hugging_face.write(tmp_path / name, TINY, leaves)
    assert moe_peft.load(name, vocabulary="bytes").backbone == f"hf:{tmp_path / name}"


def test_a_run_in_a_folder_called_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "run").mkdir()
    with pytest.raises(moe_peft.errors.UserError, match="run"):
        moe_peft.load("run")
    assert not loading._is_backbone("run")
    assert loading._is_backbone("run:run")
