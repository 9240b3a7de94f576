"""Averages against a table worked out by hand."""

import json
import random

import pytest

from moe_peft.evaluation import aggregation

# task, group, template -> scores of its examples
TABLE = {
    ("date_fr", "date", "0"): [1, 0, 1, 0],  # 0.5
    ("date_fr", "date", "1"): [1, 1],  # 1.0
    ("date_fr", "date", "2"): [0],  # 0.0      mean 0.5, median 0.5
    ("date_de", "date", "0"): [1],  # 1.0
    ("date_de", "date", "1"): [1],  # 1.0
    ("date_de", "date", "2"): [0, 0, 0, 1],  # 0.25    mean 0.75, median 1.0
    ("unit_fr", "unit", "0"): [0.5, 0.25],  # 0.375
    ("unit_fr", "unit", "1"): [0],  # 0.0      mean 0.1875, median 0.1875
}


def rows():
    return [
        {"task": task, "group": group, "template": template, "score": score}
        for (task, group, template), scores in TABLE.items()
        for score in scores
    ]


def test_table_worked_out_by_hand():
    got = aggregation.aggregate(rows())
    assert list(got.tasks) == ["date_de", "date_fr", "unit_fr"]
    assert got.tasks["date_de"].templates == {"0": 1.0, "1": 1.0, "2": 0.25}
    assert (got.tasks["date_de"].mean, got.tasks["date_de"].median) == (0.75, 1.0)
    assert (got.tasks["date_fr"].mean, got.tasks["date_fr"].median) == (0.5, 0.5)
    assert got.groups["date"] == aggregation.Summary(0.625, 0.75, 2, 13)
    assert got.groups["unit"] == aggregation.Summary(0.1875, 0.1875, 1, 3)
    assert got.overall.mean == pytest.approx((0.75 + 0.5 + 0.1875) / 3)
    assert got.overall.median == pytest.approx((1.0 + 0.5 + 0.1875) / 3)
    assert (got.overall.num_tasks, got.overall.num_examples) == (3, 16)


def test_order_of_rows_does_not_matter_and_json_holds_everything():
    shuffled = rows()
    random.Random(0).shuffle(shuffled)
    got = aggregation.aggregate(shuffled)
    assert got == aggregation.aggregate(rows())
    assert json.loads(json.dumps(got.to_json())) == got.to_json()
    assert got.to_json()["tasks"]["unit_fr"]["templates"]["0"] == 0.375


def test_what_cannot_be_averaged_is_refused():
    with pytest.raises(ValueError, match="no predictions"):
        aggregation.aggregate([])
    with pytest.raises(ValueError, match="'date_fr' appears under 'date' and 'unit'"):
        aggregation.aggregate([*rows(), {**rows()[0], "group": "unit"}])
