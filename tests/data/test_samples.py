"""The folder of the samples: written once, by one version of the code."""

import pathlib

import pytest

from moe_peft.data import samples


@pytest.fixture(autouse=True)
def written(tmp_path, monkeypatch):
    """Samples of one empty file, in a cache folder of their own; what was written, in a list."""
    found = []

    def write(place):
        found.append(place)
        (place / "written").touch()

    monkeypatch.setenv("MOE_PEFT_CACHE", str(tmp_path))
    monkeypatch.setattr(samples, "write", write)
    samples._version.cache_clear()
    yield found
    samples._version.cache_clear()


def test_written_once(written, tmp_path):
    assert samples.folder() == samples.folder()
    assert len(written) == 1
    assert [path.name for path in tmp_path.iterdir()] == [samples.folder().name]


def test_a_process_stays_with_its_folder_when_the_source_is_edited(monkeypatch):
    first = samples.folder()
    monkeypatch.setattr(pathlib.Path, "read_bytes", lambda path: b"edited")
    assert samples.folder() == first


def test_another_process_was_faster(monkeypatch, tmp_path):
    place = samples.folder()
    (place / "written").unlink()
    place.rmdir()

    def write(temporary):
        (temporary / "written").touch()
        place.mkdir()
        (place / "theirs").touch()

    monkeypatch.setattr(samples, "write", write)
    assert (samples.folder() / "theirs").exists()
    assert len(list(tmp_path.iterdir())) == 1
