"""Runs side by side: what is written agrees with what was evaluated."""

import json

import pytest

from moe_peft import cli, errors
from moe_peft.analysis import compare
from moe_peft.evaluation import aggregation


def evaluated(folder, shift):
    """Writes results of two tasks with two templates each."""
    rows = [
        {"task": task, "group": group, "template": template, "score": score + shift}
        for task, group, template, score in [
            ("month_de", "month", 0, 0.25),
            ("month_de", "month", 1, 0.75),
            ("unit_fr", "unit", 0, 0.0),
            ("unit_fr", "unit", 1, 0.5),
        ]
    ]
    folder.mkdir()
    results = aggregation.aggregate(rows).to_json()
    (folder / compare.RESULTS).write_text(json.dumps(results))
    return folder


def test_table_files_and_picture(tmp_path, capsys):
    folders = [str(evaluated(tmp_path / name, shift)) for name, shift in (("mov", 0.1), ("ia3", 0))]
    assert cli.main(["compare", *folders, "--out", str(tmp_path / "out")]) == 0
    shown = capsys.readouterr().out
    assert "60.0 /  60.0" in shown  # month, mov
    assert "overall" in shown

    text = (tmp_path / "out" / "comparison.md").read_text()
    assert "|  | mov mean | mov median | ia3 mean | ia3 median |" in text
    assert "| unit | 35.0 | 35.0 | 25.0 | 25.0 |" in text
    assert "| overall | 47.5 | 47.5 | 37.5 | 37.5 |" in text
    numbers = json.loads((tmp_path / "out" / "comparison.json").read_text())
    assert numbers["ia3"]["overall"]["mean"] == 0.375
    assert (tmp_path / "out" / "comparison.png").read_bytes()[:4] == b"\x89PNG"


def test_missing_and_unequal_results_are_refused(tmp_path):
    first = evaluated(tmp_path / "a", 0)
    with pytest.raises(errors.UserError, match="Evaluate the run first"):
        compare.compare([first, tmp_path / "nothing"], tmp_path / "out")
    second = evaluated(tmp_path / "b", 0)
    changed = json.loads((second / compare.RESULTS).read_text())
    changed["overall"]["num_tasks"] = 3
    (second / compare.RESULTS).write_text(json.dumps(changed))
    with pytest.raises(errors.UserError, match="different tasks"):
        compare.compare([first, second], tmp_path / "out")
    (second / compare.RESULTS).write_text("[]")
    with pytest.raises(errors.UserError, match="holds no results"):
        compare.compare([first, second], tmp_path / "out")
