"""Averages against a table worked out by hand."""

import itertools
import json
import random

import numpy as np
import pytest
from scipy import stats

from moe_peft import errors
from moe_peft.evaluation import aggregation, bootstrap

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


def test_rules_of_the_overall_number():
    of = lambda average: aggregation.aggregate(rows(), average)
    lines = lambda average: (of(average).overall.mean, of(average).overall.median)
    assert lines("tasks") == pytest.approx(((0.5 + 0.75 + 0.1875) / 3, (0.5 + 1 + 0.1875) / 3))
    # ANLI's rounds as one data set: the mean of its rounds' medians, or the median of all.
    assert lines("groups") == pytest.approx(((0.625 + 0.1875) / 2, (0.75 + 0.1875) / 2))
    pooled = np.median([0.5, 1.0, 0.0, 1.0, 1.0, 0.25])
    assert lines("pooled_groups") == pytest.approx(((0.625 + 0.1875) / 2, (pooled + 0.1875) / 2))
    weights = np.array([7, 6, 3]) / 16  # examples of date_fr, date_de, unit_fr
    assert lines("examples") == pytest.approx(
        (weights @ [0.5, 0.75, 0.1875], weights @ [0.5, 1, 0.1875])
    )
    assert of("examples").groups["date"].mean == pytest.approx((7 * 0.5 + 6 * 0.75) / 13)
    with pytest.raises(errors.UserError, match="average is 'group'.*Did you mean 'groups'"):
        of("group")


def test_metrics_of_all_examples_are_computed_from_predictions():
    answers = [("a", "a"), ("b", "a"), ("b", "b"), ("c", "c"), ("a", "c")]
    found = [
        {
            "task": "t",
            "group": "g",
            "template": 0,
            "metric": "macro_f1",
            "prediction": prediction,
            "targets": "not looked at",
            "references": [right, "nor this"],
            "score": None,
        }
        for prediction, right in answers
    ]
    by_hand = (2 / 4 + 2 / 3 + 2 / 3) / 3
    got = aggregation.aggregate(found, bootstrap=bootstrap.Bootstrap(resamples=50))
    assert got.overall.mean == pytest.approx(by_hand)
    assert got.tasks["t"].metric == got.overall.metric == "macro_f1"
    low, high = got.overall.mean_interval
    assert 0 <= low < by_hand < high <= 1
    other = [{**row, "task": "u", "metric": "exact_match", "score": 1.0} for row in found]
    assert aggregation.aggregate([*found, *other]).overall.metric is None


def test_a_template_with_several_metrics_is_refused_or_says_so():
    row = {"task": "t", "group": "g", "template": 0, "targets": "a", "prediction": "a"}
    ranked = {**row, "metric": "rank_accuracy", "score": 1.0}
    exact = {**row, "metric": "exact_match", "score": 0.0}
    f1 = {**row, "metric": "macro_f1", "score": None}
    for rows in ([ranked, f1], [f1, ranked]):  # whichever comes first
        with pytest.raises(errors.UserError, match="macro_f1 needs all rows of a template"):
            aggregation.aggregate(rows)
    for rows in ([ranked, exact], [exact, ranked]):
        found = aggregation.aggregate(rows)
        assert (found.overall.mean, found.tasks["t"].metric, found.overall.metric) == (
            0.5,
            None,
            None,
        )


@pytest.fixture(scope="module")
def noisy():
    """Four tasks, three templates, 60 examples: some are hard in every wording."""
    rng = np.random.default_rng(0)
    hardness = rng.random((4, 1, 60))
    return (hardness + 0.2 * rng.random((4, 3, 60)) < [[[0.3]], [[0.5]], [[0.7]], [[0.9]]]) * 1.0


def as_rows(scores):
    return [
        {"task": f"t{task}", "group": "g", "template": template, "score": scores[task][template][i]}
        for task in range(len(scores))
        for template in range(len(scores[task]))
        for i in range(len(scores[task][template]))
    ]


def test_intervals_over_examples_draw_an_example_with_all_its_wordings(noisy):
    how = bootstrap.Bootstrap(resamples=4000)
    got = aggregation.aggregate(as_rows(noisy), bootstrap=how)
    for task in range(4):
        want = stats.bootstrap(
            (noisy[task].mean(axis=0),), np.mean, n_resamples=4000, method="percentile", rng=1
        ).confidence_interval
        found = got.tasks[f"t{task}"].mean_interval
        np.testing.assert_allclose(found, want, atol=0.015)
    # Tasks are drawn independently of each other: their variances add.
    spread = noisy.mean(axis=1).std(axis=1) / np.sqrt(60)
    half = stats.norm.ppf(0.975) * np.sqrt(np.sum(spread**2)) / 4
    low, high = got.overall.mean_interval
    assert (high - low) / 2 == pytest.approx(half, rel=0.08)
    # Templates that ask about other examples are drawn apart, which is surer of their mean.
    uneven = [[template[: 60 - i] for i, template in enumerate(task)] for task in noisy]
    apart = aggregation.aggregate(as_rows(uneven), bootstrap=how).tasks["t1"].mean_interval
    together = got.tasks["t1"].mean_interval
    assert apart[1] - apart[0] < 0.75 * (together[1] - together[0])


def test_intervals_over_templates_and_tasks(noisy):
    of = lambda **kwargs: aggregation.aggregate(
        as_rows(noisy), bootstrap=bootstrap.Bootstrap(resamples=4000, **kwargs)
    )
    templates = noisy.mean(axis=2)
    got = of(over="templates")
    every = np.sort(  # of three templates there are 27 draws
        [np.mean(draw) for draw in itertools.product(templates[2], repeat=3)]
    )
    low, high = got.tasks["t2"].mean_interval
    assert np.isclose(every, low).any()
    assert np.isclose(every, high).any()
    assert every[0] <= low <= every[1]  # 1 of 27 is more than 2.5 %, so the lowest or the next
    got = of(over="tasks", level=0.8)
    want = stats.bootstrap(
        (templates.mean(axis=1),),
        np.mean,
        n_resamples=4000,
        method="percentile",
        confidence_level=0.8,
        rng=1,
    ).confidence_interval
    np.testing.assert_allclose(got.overall.mean_interval, want, atol=0.02)
    assert got.tasks["t0"].mean_interval is None
    # Half of the resamples of two tasks hold both, and the middle is their mean: weights go with
    # the tasks.
    uneven = as_rows([noisy[0][:, :15], noisy[3]])
    how = bootstrap.Bootstrap("tasks", resamples=4000, level=0.4)
    overall = aggregation.aggregate(uneven, "examples", how).overall
    means = noisy[0][:, :15].mean(), noisy[3].mean()
    assert overall.mean == pytest.approx(0.2 * means[0] + 0.8 * means[1])
    assert overall.mean_interval == pytest.approx([overall.mean, overall.mean], abs=1e-9)


def test_intervals_depend_on_the_seed_alone(noisy):
    of = lambda rows, seed: aggregation.aggregate(rows, bootstrap=bootstrap.Bootstrap(seed=seed))
    one, again = of(as_rows(noisy), 0), of(as_rows(noisy), 0)
    assert one == again
    assert json.loads(json.dumps(one.to_json())) == one.to_json()
    assert of(as_rows(noisy[:2]), 0).tasks["t1"] == one.tasks["t1"]
    assert of(as_rows(noisy), 1).tasks["t1"] != one.tasks["t1"]
    assert one.tasks["t1"].mean == aggregation.aggregate(as_rows(noisy)).tasks["t1"].mean


def test_settings_of_the_bootstrap_are_checked():
    with pytest.raises(errors.UserError, match="Bootstrap.over is 'task'.*Did you mean 'tasks'"):
        bootstrap.Bootstrap(over="task")
    with pytest.raises(errors.UserError, match="1 resamples and level 0.95"):
        bootstrap.Bootstrap(resamples=1)
    with pytest.raises(errors.UserError, match="level 95"):
        bootstrap.Bootstrap(level=95)
