"""Averages and spreads against plain NumPy, each under its own name."""

import numpy as np
import pytest

from moe_peft.adaptation import report
from moe_peft.adaptation import scores as scores_lib
from moe_peft.evaluation import bootstrap, metrics

GROUPS = {"a_x": "a", "a_y": "a", "b_x": "b"}


@pytest.fixture
def table():
    """Scores [task, seed], uneven on purpose."""
    return np.array([[0.1, 0.4, 0.3], [0.9, 0.2, 0.5], [0.6, 0.7, 0.1]])


@pytest.fixture
def results(table):
    scores = {
        (task, seed): float(table[i, j])
        for i, task in enumerate(GROUPS)
        for j, seed in enumerate((13, 42, 58))
    }
    return report.summarize(scores, GROUPS)


def test_spread_is_over_seeds_of_the_mean_over_tasks(table, results):
    by_seed = table.mean(axis=0)
    over = results["overall"]["over_seeds"]
    np.testing.assert_allclose(list(results["overall"]["by_seed"].values()), by_seed)
    np.testing.assert_allclose(over["mean"], by_seed.mean())
    np.testing.assert_allclose(over["median"], np.median(by_seed))
    np.testing.assert_allclose(over["iqr"], np.subtract(*np.percentile(by_seed, [75, 25])))
    np.testing.assert_allclose(over["std"], by_seed.std(ddof=1))
    # Not the spread across tasks, which the papers' released script takes.
    assert abs(over["std"] - np.median(table, axis=1).std(ddof=1)) > 0.01


def test_medians_of_tasks_are_another_number(table, results):
    found = results["overall"]["mean_of_task_medians"]
    np.testing.assert_allclose(found, np.median(table, axis=1).mean())
    assert abs(found - results["overall"]["over_seeds"]["median"]) > 0.001


def test_groups_and_tasks(table, results):
    group = results["groups"]["a"]
    assert group["num_tasks"] == 2
    np.testing.assert_allclose(group["over_seeds"]["mean"], table[:2].mean())
    np.testing.assert_allclose(results["tasks"]["b_x"]["over_seeds"]["std"], table[2].std(ddof=1))


def test_one_seed_has_no_spread():
    found = report.summarize({("t", 0): 0.5}, {"t": "g"})["overall"]["over_seeds"]
    assert found == {"mean": 0.5, "median": 0.5, "iqr": None, "std": None}


def test_a_missing_run_is_our_mistake():
    with pytest.raises(ValueError, match="1 runs are missing"):
        report.summarize({("t", 0): 0.5, ("u", 1): 0.5, ("t", 1): 0.1}, {"t": "g"})


def test_scores_come_from_rows():
    rows = [{"task": "t", "seed": 1, "score": s} for s in (0, 1, 1)]
    assert report.run_scores(rows) == {("t", 1): 2 / 3}


def test_the_table_names_what_it_shows(results):
    text = report.markdown(results)
    assert "| mean | median | IQR | std | seed 13 | seed 42 | seed 58 |" in text
    assert "over 3 seeds" in text
    assert "sample (n - 1)" in text
    assert "| **all tasks** | 3 | 42.2 |" in text


def answered(task, seed, answers, metric="exact_match"):
    scores = [None if metric == "macro_f1" else float(a == "x") for a in answers]
    common = {"task": task, "seed": seed, "group": task[0], "metric": metric, "targets": "x"}
    return [
        {**common, "prediction": answer, "score": score}
        for answer, score in zip(answers, scores, strict=True)
    ]


def test_rows_are_scored_by_their_metric_with_intervals():
    rows = [
        *(row for seed in (1, 2) for row in answered("a_t", seed, ["x", "y", "x", "x"][seed:])),
        *(row for seed in (1, 2) for row in answered("b_t", seed, ["x", "y"], "macro_f1")),
    ]
    found = report.summarize_rows(rows, bootstrap.Bootstrap(resamples=200))
    assert found["tasks"]["a_t"]["by_seed"] == {"1": 2 / 3, "2": 1.0}
    one_class = (2 / 3 + 0) / 2  # "y" is a class of its own
    assert found["tasks"]["b_t"]["by_seed"] == pytest.approx({"1": one_class, "2": one_class})
    assert found["overall"]["metric"] is None
    assert [found["groups"][g]["metric"] for g in "ab"] == ["exact_match", "macro_f1"]
    low, high = found["overall"]["mean_interval"]
    assert low < found["overall"]["over_seeds"]["mean"] < high
    assert report.summarize_rows(rows)["tasks"]["a_t"]["mean_interval"] is None
    how = {"over": "templates", "resamples": 200, "level": 0.95}
    text = report.markdown({**found, "bootstrap": how})
    assert "| seed 1 | seed 2 | interval | metric |" in text
    assert "macro f1 |" in text
    assert "95 % of 200 bootstrap resamples over seeds" in text


def test_answers_of_a_run_are_scored_together_or_one_by_one():
    references = [["x", "z"], ["y"]]
    run = scores_lib.score_answers(metrics.get("accuracy"), ["Z", "n"], references)
    assert (run.scores, run.score, run.metric) == ([1.0, 0.0], 0.5, "accuracy")
    run = scores_lib.score_answers(metrics.get("macro_f1"), ["x", "x"], references)
    assert run.scores == [None, None]
    assert run.score == pytest.approx((2 / 3 + 0) / 2)
