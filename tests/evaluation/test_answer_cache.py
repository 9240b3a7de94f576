"""Answers on disk: which are kept for which model, settings and questions."""

import dataclasses

import numpy as np
import pytest

from moe_peft import errors
from moe_peft.evaluation import answer_cache, inference, questions

RUN = {"parameters_sha256": "abc", "model_dir": "/somewhere"}
SETTINGS = {"metric": "exact_match", "seed": 0, "average": "tasks", "bootstrap": None}
ROWS = {"a": [{"task": "a", "score": 1.0}], "b": [{"task": "b", "prediction": "\u2028 é"}]}


def opened(folder, run=RUN, settings=SETTINGS):
    return answer_cache.Answers(folder, "mix", 3, run, settings)


@pytest.fixture
def folder(tmp_path):
    opened(tmp_path).write({task: (f"q-{task}", rows) for task, rows in ROWS.items()}, 1.5)
    return tmp_path


def test_the_same_model_with_the_same_settings_is_not_asked_again(folder):
    again = opened(folder, {**RUN, "model_dir": "/moved"}, {**SETTINGS, "average": "groups"})
    assert {task: again.read(task, f"q-{task}") for task in "abc"} == {**ROWS, "c": None}
    again.write({"c": ("q-c", [])}, 0.25)
    record = answer_cache.read_record(folder)
    assert set(record["tasks"]) == {"a", "b", "c"}
    assert record["num_tasks"] == 3
    assert record["settings"]["average"] == "groups"
    assert record["seconds"] == again.seconds == pytest.approx(1.8)
    assert list(answer_cache.read_all(folder, ["b", "a"])) == [*ROWS["b"], *ROWS["a"]]


@pytest.mark.parametrize(
    "other",
    [
        {"run": {**RUN, "parameters_sha256": "abd"}},
        {"settings": {**SETTINGS, "metric": "accuracy"}},
        {"settings": {**SETTINGS, "split": "test"}},
    ],
)
def test_another_model_or_setting_begins_anew(folder, other):
    new = opened(folder, **other)
    assert new.read("a", "q-a") is None
    assert answer_cache.read_record(folder)["seconds"] == 1.5  # still there
    new.write({"a": ("q-a", ROWS["a"])}, 1)
    assert set(answer_cache.read_record(folder)["tasks"]) == {"a"}


def test_other_questions_and_changed_files_do_not_count(folder):
    assert opened(folder).read("a", "q-other") is None
    path = folder / answer_cache.FOLDER / "a.jsonl"
    path.write_text(path.read_text().replace("1.0", "0.0"))
    assert opened(folder).read("a", "q-a") is None
    with pytest.raises(errors.UserError, match=r"a.jsonl is missing or was changed .* eval` again"):
        list(answer_cache.read_all(folder, ["a"]))
    path.unlink()
    assert opened(folder).read("a", "q-a") is None
    (folder / answer_cache.RECORD).write_text("{")
    with pytest.raises(errors.UserError, match=r"evaluation.json cannot be used: .*Remove it"):
        opened(folder)


def test_what_a_mixture_asks_in_parts():
    question = inference.Question(np.array([3, 1]), np.array([4, 1]), (np.array([5]),))
    names = ["a"] * 3 + ["b"] + ["c"] * 2
    rows = [{"task": n, "group": "g", "index": i, "targets": "x"} for i, n in enumerate(names)]
    asked = questions.MixtureQuestions([question] * 6, rows, [False] * 6, None, {})
    assert asked.tasks() == {"a": range(3), "b": range(3, 4), "c": range(4, 6)}
    tasks = asked.tasks()
    of = lambda size: [list(part) for part in asked.parts(size)]
    assert (of(1), of(4), of(5), of(100)) == (
        [["a"], ["b"], ["c"]],
        [["a", "b"], ["c"]],
        [["a", "b", "c"]],
        [["a", "b", "c"]],
    )

    digest = asked.digest([0])
    assert digest == asked.digest([1])  # the place does not count
    assert digest != asked.digest(tasks["a"])
    for changed in (
        {"inputs": np.array([3, 3, 1])},
        {"targets": np.array([1])},
        {"choices": ()},
        {"features": {"task_ids": np.int32(1)}},
    ):
        other = dataclasses.replace(asked, questions=[dataclasses.replace(question, **changed)])
        assert digest != other.digest([0]), changed
    regrouped = dataclasses.replace(asked, rows=[{**rows[0], "group": "h"}])
    assert digest == regrouped.digest([0])
    for field in ({"targets": "y"}, {"references": ["x", "y"]}):
        assert digest != dataclasses.replace(asked, rows=[{**rows[0], **field}]).digest([0])
    for field in ({"is_cut": [True]}, {"own_metrics": {"a": "qa_f1"}}):
        assert digest != dataclasses.replace(asked, **field).digest([0])
