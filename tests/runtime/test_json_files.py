"""Predictions survive a round trip, and a broken write leaves the old file alone."""

import os

import pytest

from moe_peft import errors
from moe_peft.runtime import json_files

ROWS = [
    {"prediction": "naïve 日本 \u2028 \x85 \n tab\t", "score": 1.0, "choices": ["a", "b"]},
    {"prediction": "", "score": 0.0, "choices": None},
    {"prediction": "lone \ud800 surrogate", "score": 0.1 + 0.2},
]


def test_round_trip(tmp_path):
    path = tmp_path / "deep" / "er" / "predictions.jsonl"
    assert json_files.write_jsonl(path, iter(ROWS)) == 3
    assert list(json_files.read_jsonl(path)) == ROWS
    assert "日本" in path.read_text(encoding="utf-8")
    assert os.listdir(path.parent) == ["predictions.jsonl"]


def test_a_write_that_fails_half_way_leaves_what_was_there(tmp_path):
    path = tmp_path / "predictions.jsonl"
    json_files.write_jsonl(path, ROWS[:1])

    def broken():
        yield ROWS[1]
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        json_files.write_jsonl(path, broken())
    with pytest.raises(ValueError, match="not JSON compliant"):
        json_files.write_jsonl(path, [{"score": float("nan")}])
    assert list(json_files.read_jsonl(path)) == ROWS[:1]
    assert os.listdir(tmp_path) == ["predictions.jsonl"]


def test_unreadable_files_name_the_line(tmp_path):
    path = tmp_path / "p.jsonl"
    path.write_text('{"a": 1}\n\n{"a": \n')
    with pytest.raises(errors.UserError, match=r"p.jsonl:3 is not JSON"):
        list(json_files.read_jsonl(path))
    path.write_text("[1]\n")
    with pytest.raises(errors.UserError, match="is not a JSON object but list"):
        list(json_files.read_jsonl(path))
    with pytest.raises(errors.UserError, match="cannot be read"):
        list(json_files.read_jsonl(tmp_path / "missing.jsonl"))
    folder = tmp_path / "file"
    folder.write_text("")
    with pytest.raises(errors.UserError, match="cannot be written"):
        json_files.write_jsonl(folder / "p.jsonl", ROWS)
    with pytest.raises(errors.UserError, match="Cannot write to .*file/eval: Not a directory"):
        json_files.check_writable(folder / "eval")
    json_files.check_writable(tmp_path / "new")
    assert os.listdir(tmp_path / "new") == []
