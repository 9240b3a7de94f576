"""The samples: what their script makes, unpacked once."""

import make_samples
import pytest

from moe_peft.data import cache, samples
from moe_peft.data.p3 import records


@pytest.fixture(autouse=True)
def _cache(tmp_path, monkeypatch):
    monkeypatch.setenv("MOE_PEFT_CACHE", str(tmp_path / "cache"))


def files(folder):
    return {path.relative_to(folder): path for path in folder.rglob("*") if path.is_file()}


def test_unpacked_once(monkeypatch):
    place = samples.folder()
    assert [path.name for path in place.parent.iterdir()] == [place.name]
    monkeypatch.setattr(samples, "write", None)
    assert samples.folder() == place


def test_another_process_was_faster(tmp_path):
    place = tmp_path / "once"

    def write(temporary):
        (temporary / "ours").touch()
        place.mkdir()
        (place / "theirs").touch()

    cache.write_folder_once(place, write)
    assert [path.name for path in tmp_path.rglob("*") if path.is_file()] == ["theirs"]


def test_a_folder_that_cannot_be_written(tmp_path):
    def write(temporary):
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        cache.write_folder_once(tmp_path / "once", write)
    assert not list(tmp_path.iterdir())


def test_the_script_makes_the_archive(tmp_path):
    make_samples.write(tmp_path / "made")
    made, packed = files(tmp_path / "made"), files(samples.folder())
    assert made.keys() == packed.keys()
    assert len(made) == 356
    # TensorFlow may order the fields of a record otherwise: compare what is read.
    ordered = [name for name in made if ".tfrecord" not in name.name]
    assert len(ordered) == 308
    for name in ordered:
        assert made[name].read_bytes() == packed[name].read_bytes(), name
    compared = 0
    for name in made.keys() - set(ordered):
        split = name.name.split(".")[0]
        both = [list(records.read(each[name].parent, split)) for each in (made, packed)]
        assert repr(both[0]) == repr(both[1])
        compared += len(both[0])
    assert compared > 500
