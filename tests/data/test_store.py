import logging

import numpy as np

from moe_peft.data.cldr import store


def test_rows_are_made_once(tmp_path, monkeypatch):
    monkeypatch.setenv("MOE_PEFT_CACHE", str(tmp_path))
    calls = []

    def make():
        calls.append(1)
        return {"column": np.arange(3)}

    for _ in range(3):
        np.testing.assert_array_equal(store.cached("name", make)["column"], [0, 1, 2])
    assert len(calls) == 1
    assert [path.suffix for path in tmp_path.iterdir()] == [".npz"]


def test_a_damaged_file_is_made_again(tmp_path, monkeypatch, caplog):
    monkeypatch.setenv("MOE_PEFT_CACHE", str(tmp_path))
    store.cached("name", lambda: {"column": np.arange(3)})
    (path,) = tmp_path.iterdir()
    for damage in (b"", b"PK\x03\x04 half a file", path.read_bytes()[:100]):
        path.write_bytes(damage)
        with caplog.at_level(logging.WARNING):
            columns = store.cached("name", lambda: {"column": np.arange(3)})
        np.testing.assert_array_equal(columns["column"], [0, 1, 2])
        assert "Making" in caplog.text


def test_a_folder_that_cannot_be_written_costs_a_warning(tmp_path, monkeypatch, caplog):
    (tmp_path / "file").touch()
    monkeypatch.setenv("MOE_PEFT_CACHE", str(tmp_path / "file" / "below"))
    with caplog.at_level(logging.WARNING):
        assert store.cached("name", lambda: {"column": np.arange(3)})["column"][1] == 1
    assert "MOE_PEFT_CACHE" in caplog.text
