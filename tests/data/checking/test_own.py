"""What a check of a user's own rows finds, one planted mistake at a time."""

import json

import pytest

from moe_peft import errors
from moe_peft.data import bad_rows, files, vocabularies
from moe_peft.data.checking import own

BEFORE, SAME = "came before:", "trained with the same answer"


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("MOE_PEFT_CACHE", str(tmp_path / "cache"))


def write(path, *rows):
    lines = (row if isinstance(row, str) else json.dumps(row) for row in rows)
    path.write_text("".join(f"{line}\n" for line in lines))
    return str(path)


def row(inputs, targets="a", **more):
    return {"inputs": inputs, "targets": targets, **more}


def check(data, *rest, **settings):
    """(benchmark, [(rule, rows in all, message)])."""
    found = own.check(files.Files(data, eval_fraction=0, **settings), *rest)
    return found, [(f.rule, f.count, f.message) for f in found.findings]


def test_rows_that_are_as_they_should_be(tmp_path):
    path = write(tmp_path / "train.jsonl", row("a"), row("b"), row("a b"))
    found, findings = check(path, vocabularies.get("bytes"))
    assert not findings
    assert found.failures() == 0
    (group,) = found.groups.values()
    assert (group.group, group.split, group.examples, group.duplicates) == (
        "training",
        "train",
        3,
        0,
    )


def test_questions_that_come_again(tmp_path):
    path = write(
        tmp_path / "a.jsonl",
        *(row("Is it?"), row("other"), row("is  IT? ", "A"), row("Is it?", "b")),
        *(row("c", ["x", "y"]), row("c", ["Y", "x"])),
    )
    found, findings = check(path)
    assert findings == [
        ("duplicate", 2, f"{BEFORE} line 3 (as a.jsonl line 1), line 6 (as a.jsonl line 5)"),
        ("conflict", 1, f"{BEFORE} line 4 (as a.jsonl line 1)"),
    ]
    assert [group.duplicates for group in found.groups.values()] == [3]
    assert found.failures() == 0


def test_a_question_of_another_task_is_another_one(tmp_path):
    rows = (row("a", task="x"), row("a", task="y"), row("a", "b", task="y"))
    _, findings = check(write(tmp_path / "a.jsonl", *rows))
    assert findings == [("conflict", 1, f"{BEFORE} line 3 (as a.jsonl line 2)")]


def test_questions_to_evaluate_on_that_train(tmp_path):
    train = write(tmp_path / "train.jsonl", row("a"), row("b"))
    dev = write(tmp_path / "dev.jsonl", row("c"), row("B"), row("A", "other"), row("b"))
    found, findings = check({"validation": dev, "train": train})
    assert findings == [
        ("leak", 2, f"{SAME}: line 2 (as train.jsonl line 2), line 4 (as train.jsonl line 2)"),
        ("leak", 1, "trained with another answer: line 3 (as train.jsonl line 1)"),
        ("duplicate", 1, f"{BEFORE} line 4 (as dev.jsonl line 2)"),
    ]
    assert {f.where for f in found.findings} == {dev}
    assert (found.failures(), found.failures(["leak"])) == (2, 0)


def test_splits_to_evaluate_on_may_share_questions(tmp_path):
    train = write(tmp_path / "train.jsonl", row("a"))
    dev = write(tmp_path / "dev.jsonl", row("b"))
    found, findings = check({"train": train, "validation": dev, "test": dev})
    assert not findings
    assert [split for _, split in found.groups] == ["train", "validation", "test"]


def test_rows_that_cannot_be_read(tmp_path):
    train = write(tmp_path / "a.jsonl", *[row("a", "")] * 9, "{", row("b"))
    found, findings = check(train)
    assert findings == [
        ("damaged", 9, "'targets' is empty: line 1, line 2, line 3, line 4, line 5"),
        ("damaged", 1, "not JSON: line 10"),
    ]
    assert found.failures() == 2
    with pytest.raises(bad_rows.BadRow):  # outside, they stop as before
        list(files.Files(train).examples("train"))


def test_rows_that_are_cut(tmp_path):
    path = write(tmp_path / "a.jsonl", row("12345", "1234"), row("1234567", "123"))
    found, findings = check(path, vocabularies.get("bytes"), {"inputs": 7, "targets": 4})
    assert findings == [
        ("long", 1, "more than 7 tokens of inputs: line 2 (8)"),
        ("long", 1, "more than 4 tokens of targets: line 1 (5)"),
    ]
    assert found.failures() == 0
    assert not check(path, None, {"inputs": 7, "targets": 4})[1]


def test_a_file_without_the_columns_is_a_mistake(tmp_path):
    with pytest.raises(errors.UserError, match="Name the column with --targets_column"):
        check(write(tmp_path / "a.jsonl", {"inputs": "a"}))
