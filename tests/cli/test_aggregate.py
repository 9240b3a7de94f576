"""Averages of answers on disk, without a model."""

import json
import re

import pytest

from moe_peft.adaptation import report as report_lib
from moe_peft.cli import main
from moe_peft.evaluation import aggregation, answer_cache, table
from moe_peft.reports import compare
from moe_peft.runtime import json_files

SETTINGS = {
    "split": "test",
    "metric": "exact_match",
    "rank_choices": False,
    "length_normalized_choices": False,
    "max_examples_per_task": None,
    "average": "tasks",
    "bootstrap": None,
}
RUN = {
    "method": {"name": "mov"},
    "trainable_parameters": 10,
    "total_parameters": 100,
    "parameters_sha256": "abc",
}
TASKS = {"anli_r1": 0.25, "anli_r2": 0.75, "cb": 1.0}


def rows(task, right, **more):
    """Four examples in each of two wordings; in the second all are right, letter case aside."""
    return [
        {
            "task": task,
            "group": task,
            "template": template,
            "targets": "Yes",
            "metric": "exact_match",
            "prediction": "Yes" if i < 4 * right else "yes" if template else "no",
            "score": float(i < 4 * right),
            **more,
        }
        for template in range(2)
        for i in range(4)
    ]


@pytest.fixture
def folder(tmp_path):
    kept = answer_cache.Answers(tmp_path / "run" / "eval" / "p3", "p3", 3, RUN, SETTINGS)
    kept.write({task: ("q", rows(task, right)) for task, right in TASKS.items()}, 1)
    return tmp_path / "run"


def aggregate(capsys, *args):
    code = main.main(["aggregate", *map(str, args)])
    out = capsys.readouterr()
    assert code == 0, out
    return out


def results(folder):
    return json.loads((folder / "results.json").read_text())["results"]


def test_nothing_changes_unless_asked(folder, capsys, tmp_path):
    out = aggregate(capsys, folder, "--out", tmp_path / "out")
    assert "| anli_r2 | 1 | 75.0 / 75.0 |" in out.out
    assert "**66.7 / 66.7**" in out.out
    assert "WARNING" not in out.err
    assert not (folder / "eval" / "p3" / "results.json").exists()
    (runs,) = compare.load([tmp_path / "out"]).values()
    assert table.markdown(runs) + "\n" == (tmp_path / "out/eval/p3/table.md").read_text() == out.out


def test_groups_rules_and_intervals(folder, capsys, tmp_path):
    changes = ["--group", "(.*?)(?:_r[12])?", "--average", "groups", "--bootstrap", "tasks"]
    out = aggregate(capsys, folder, *changes, "--resamples", "50", "--out", tmp_path)
    found = results(tmp_path / "eval" / "p3")
    assert found["groups"]["anli"]["mean"] == 0.5
    assert found["overall"]["mean"] == 0.75  # of two groups
    assert found["overall"]["mean_interval"] == [0.5, 1.0]
    assert "95 % of 50 bootstrap resamples over tasks" in out.out


def test_another_metric(folder, capsys, tmp_path):
    aggregate(capsys, folder, "--metric", "accuracy", "--out", tmp_path)
    found = results(tmp_path / "eval" / "p3")["tasks"]["anli_r1"]
    assert (found["metric"], found["templates"]) == ("accuracy", {"0": 0.25, "1": 1.0})
    aggregate(capsys, folder, "--metric", "macro_f1", "--out", tmp_path)
    found = results(tmp_path / "eval" / "p3")["tasks"]["anli_r1"]
    assert found["templates"]["0"] == pytest.approx((2 * 1 / 5 + 0) / 2)


def test_an_evaluation_that_is_not_finished(tmp_path, capsys):
    kept = answer_cache.Answers(tmp_path / "eval" / "p3", "p3", 3, RUN, SETTINGS)
    kept.write({"cb": ("q", rows("cb", 1.0))}, 1)
    out = aggregate(capsys, tmp_path)
    assert "WARNING: 2 of 3 tasks of p3 are not answered yet" in out.err
    assert "| **all tasks** | **1** |" in out.out


def test_an_adaptation(tmp_path, capsys):
    found = [
        {**row, "seed": seed}
        for task, right in TASKS.items()
        for seed in (13, 42)
        for row in rows(task, right)
    ]
    content = {"settings": {"evaluation": {"metric": "exact_match"}}, "trainable_parameters": 5}
    json_files.write_json(tmp_path / "results.json", content | report_lib.summarize_rows(found))
    json_files.write_jsonl(tmp_path / "predictions.jsonl", found)
    again = aggregate(capsys, tmp_path, "--out", tmp_path / "same").out
    assert "| **all tasks** | 3 | 66.7 | 66.7 |" in again
    same = json.loads((tmp_path / "same" / "results.json").read_text())
    assert same["overall"] == report_lib.summarize_rows(found)["overall"]
    changes = ["--metric", "accuracy", "--bootstrap", "templates", "--group", "([a-z]+).*"]
    out = aggregate(capsys, tmp_path, *changes).out
    assert "| anli | 2 | 75.0 |" in out
    assert "resamples over seeds" in out
    assert main.main(["aggregate", str(tmp_path), "--average", "groups"]) == main.USER_ERROR
    assert "there, tasks count equally" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["--average", "task"], "--average is 'task'; expected one of tasks,.*Did you mean"),
        (["--metric", "rouge"], "no metric 'rouge'.*Did you mean 'rouge_l'"),
        (["--group", "p3_.*"], "has no parenthesis"),
        (["--group", "p3_(.*)"], "'anli_r1' does not match task_group"),
        (["--bootstrap", "seeds"], "Bootstrap.over is 'seeds'"),
    ],
)
def test_mistakes(folder, capsys, args, words):
    assert main.main(["aggregate", str(folder), *args]) == main.USER_ERROR
    (line,) = capsys.readouterr().err.splitlines()
    assert re.search(words, line), line


def test_answers_that_cannot_be_scored_anew(tmp_path, capsys):
    kept = answer_cache.Answers(tmp_path / "eval" / "p3", "p3", 2, RUN, SETTINGS)
    kept.write({"cb": ("q", rows("cb", 1.0, prediction=None))}, 1)
    assert main.main(["aggregate", str(tmp_path), "--metric", "accuracy"]) == main.USER_ERROR
    assert "'cb' was answered by one forward pass" in capsys.readouterr().err
    assert main.main(["aggregate", str(tmp_path / "none")]) == main.USER_ERROR
    assert "holds no answers" in capsys.readouterr().err


def test_rules_are_named_in_the_table(folder, capsys):
    assert len(aggregation.AVERAGES) == 4
    for rule, words in aggregation.AVERAGES.items():
        assert f"all tasks: {words}." in aggregate(capsys, folder, "--average", rule).out
