"""Half of a surrogate pair: a bad row, or one line, before a tokenizer sees it."""

import json

import gin
import pytest

from moe_peft import errors
from moe_peft.api import model
from moe_peft.data import bad_rows, cells, samples
from moe_peft.data.superni import files

HALF = "a\ud800"


@pytest.fixture(autouse=True)
def _clean_gin():
    yield
    gin.clear_config()


@pytest.mark.parametrize("field", ["input", "output"])
def test_superni(tmp_path, field):
    samples.write(tmp_path)
    (path, *_) = sorted((tmp_path / "superni" / "tasks").glob("*.json"))
    content = json.loads(path.read_text())
    whole = len(content["Instances"])
    content["Instances"][1][field] = HALF if field == "input" else ["b", HALF]
    path.write_text(json.dumps(content))
    read = lambda: files.read(tmp_path / "superni", path.stem)
    with pytest.raises(errors.UserError) as said:
        read()
    where = f"{path}, Instances[1]: {field!r} has half a character"
    assert str(said.value) == f"{where}: '\\ud800'."
    gin.bind_parameter("bad_rows.configured.action", "skip")
    with bad_rows.counting() as skipped:
        assert len(read().instances) == whole - 1
    assert list(skipped.values()) == [1]


def test_python():
    with pytest.raises(errors.UserError, match=r"Text 2 has half a character: '\\ud800'\."):
        model._listed(["b", HALF])


def test_whole_characters():
    assert cells.half_character("\U0001f600 ä") == ""
