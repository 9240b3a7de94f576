"""What the pictures of routing and alignment show: which numbers, in which order, named how."""

from matplotlib import colors as colors_lib
import numpy as np
import pytest

from moe_peft import errors
from moe_peft.reports import alignment_pictures, recorded_run, routing_pictures, style
from moe_peft.training.monitors import task_routing

GROUP = "t_([a-z]+)_[a-z]+"
NAMES = ["t_unit_fr", "t_date_de", "t_unit_de", "t_date_fr", "t_unit_el"]
TASKS = recorded_run.named(NAMES, GROUP)
SPLITS, SKILLS = 2, 4
SELECTORS = [f"{stack}/layers_{i}/mlp/wo" for stack in ("encoder", "decoder") for i in range(6)]


@pytest.fixture
def drawn(monkeypatch):
    """Figures instead of files: {path: figure}."""
    figures = {}
    monkeypatch.setattr(style, "save", lambda fig, path: figures.__setitem__(path, fig))
    return figures


@pytest.fixture
def weights():
    """Tasks of a group use the same skills, nearly."""
    rng = np.random.default_rng(0)
    found = {}
    for name in SELECTORS:
        of_group = {group: rng.random((SPLITS, SKILLS)) ** 3 for group in set(TASKS.groups)}
        w = np.stack([of_group[group] for group in TASKS.groups])
        w = w + 0.05 * rng.random(w.shape)
        found[name] = w / w.sum(-1, keepdims=True)
    return found


def test_tasks_are_named_shortly_and_grouped():
    assert TASKS.names == ("unit_fr", "date_de", "unit_de", "date_fr", "unit_el")
    assert TASKS.groups == ("unit", "date", "unit", "date", "unit")
    assert TASKS.by_group().tolist() == [1, 3, 2, 4, 0]
    assert TASKS.spans() == [("date", 0, 2), ("unit", 2, 5)]
    assert recorded_run.named(["task 0", "task 1"]).names == ("task 0", "task 1")
    assert recorded_run.named(["only_one"], "x_(.)").groups == (recorded_run.OTHER,)
    assert recorded_run.named(["ab_c", "abd_c"]).names == ("ab_c", "abd_c")
    with pytest.raises(errors.UserError, match="no parenthesis"):
        recorded_run.named(NAMES, "t_.*")


def test_selectors_are_chosen_evenly_or_by_name(weights):
    chosen = list(routing_pictures.choose_selectors(weights))
    assert len(chosen) == routing_pictures.NUM_SELECTORS
    assert (chosen[0], chosen[-1]) == (SELECTORS[0], SELECTORS[-1])
    assert chosen == [name for name in SELECTORS if name in chosen]
    (found,) = routing_pictures.choose_selectors(weights, "decoder/layers_3", [1]).items()
    assert found[0] == "decoder/layers_3/mlp/wo"
    np.testing.assert_array_equal(found[1], weights[found[0]][:, 1:])


@pytest.mark.parametrize(
    ("layers", "splits", "expected"),
    [
        ("decodr/layers_0/mlp/wo", None, "Did you mean 'decoder/layers_0/mlp/wo'"),
        ("(", None, "not a regular expression"),
        (None, [0, 2], r"splits 0 to 1; got \[0, 2\]"),
        (None, [-1], "splits 0 to 1"),
    ],
)
def test_what_is_not_there_is_said(weights, layers, splits, expected):
    with pytest.raises(errors.UserError, match=expected):
        routing_pictures.choose_selectors(weights, layers, splits)


def test_heatmaps_show_weights_with_tasks_by_group(weights, drawn):
    chosen = {name: weights[name][:, [1, 0]] for name in SELECTORS[:5]}
    routing_pictures.draw_weights(chosen, TASKS, "title", "a.png", [1, 0])
    fig = drawn["a.png"]
    strips = [axes for axes in _axes(fig) if axes.get_images()]
    assert len(strips) == 5 * SPLITS
    order = [1, 3, 2, 4, 0]
    for number, axes in enumerate(strips):
        name, split = SELECTORS[number // SPLITS], 1 - number % SPLITS
        shown = axes.get_images()[0].get_array()
        np.testing.assert_array_equal(shown, weights[name][order][:, split])
        assert axes.get_xlabel() == str(split)
    labels = [label.get_text() for label in strips[0].get_yticklabels()]
    assert labels == ["date_de", "date_fr", "unit_de", "unit_el", "unit_fr"]
    scales = {axes.get_images()[0].get_clim() for axes in strips}
    assert scales == {(0.0, max(float(w.max()) for w in chosen.values()))}


def _axes(fig):
    """All axes of nested figures in order of drawing."""
    subfigures = [axes for sub in fig.subfigs for axes in _axes(sub)]
    return [*subfigures, *[axes for axes in fig.axes if axes.figure is fig]]


def test_many_tasks_are_named_by_group(drawn):
    names = [f"t_{group}_{i:02d}" for group in ("date", "unit") for i in range(30)]
    names = [name.translate(str.maketrans("0123456789", "abcdefghij")) for name in names]
    w = {"model": np.full((60, 1, 8), 1 / 8)}
    routing_pictures.draw_weights(w, recorded_run.named(names, GROUP), "title", "a.png")
    strip = next(axes for axes in _axes(drawn["a.png"]) if axes.get_images())
    labels = [label.get_text() for label in strip.get_yticklabels()]
    assert labels == ["date (30)", "unit (30)"]
    assert strip.get_images()[0].get_clim() == (0.0, 2 / 8)


def test_distance_is_the_share_of_weight_on_other_skills():
    one = np.array([[[1, 0, 0, 0]], [[0, 1, 0, 0]], [[0.5, 0.5, 0, 0]]], float)
    same = np.tile([[[0.25] * 4]], (3, 1, 1))
    np.testing.assert_allclose(routing_pictures.distances({"a": one}), [1, 0.5, 0.5])
    both = {"a": one, "b": same}
    np.testing.assert_allclose(routing_pictures.distances(both), [0.5, 0.25, 0.25])
    two_splits = {"a": np.concatenate([one, same], axis=1)}
    np.testing.assert_allclose(routing_pictures.distances(two_splits), [0.5, 0.25, 0.25])


def test_tree_puts_tasks_that_route_alike_together(weights, drawn):
    leaves = routing_pictures.draw_tree(weights, TASKS, "title", "t.png")
    assert sorted(leaves) == sorted(TASKS.names)
    groups = [leaf.split("_")[0] for leaf in leaves]
    assert groups in (["date"] * 2 + ["unit"] * 3, ["unit"] * 3 + ["date"] * 2)
    (axes,) = drawn["t.png"].axes
    shown = [label.get_text() for label in axes.get_yticklabels()]
    assert shown == leaves[::-1]
    colors = style.by_name(["date", "unit"])
    (squares,) = [each for each in axes.collections if len(each.get_offsets()) == len(leaves)]
    found = [colors_lib.to_hex(color) for color in squares.get_facecolors()]
    assert found == [colors[name.split("_")[0]] for name in shown]
    single = {"a": np.ones((1, 1, 2)) / 2}
    with pytest.raises(errors.UserError, match="at least two"):
        routing_pictures.draw_tree(single, recorded_run.named(["one"]), "title", "u.png")


def test_course_shows_means_and_percentiles_over_selectors(drawn):
    records = [
        {"step": step, **{name: np.linspace(0, 1, 11) / step for name in task_routing.STATISTICS}}
        for step in (1, 2)
    ]
    routing_pictures.draw_course({"mhr": records, "poly": records[:1]}, "title", "c.png")
    all_axes = drawn["c.png"].axes
    assert len(all_axes) == 3
    for axes in all_axes:
        line, single = axes.get_lines()
        np.testing.assert_allclose(line.get_xydata(), [(1, 0.5), (2, 0.25)])
        np.testing.assert_allclose(single.get_xydata(), [(1, 0.5)])
        band = axes.collections[0].get_paths()[0].vertices
        assert {(1.0, 0.1), (1.0, 0.9), (2.0, 0.05), (2.0, 0.45)} <= {
            (float(x), round(float(y), 6)) for x, y in band
        }


@pytest.mark.parametrize(
    ("limits", "expected"),
    [((0.2, 0.8), (0.2, 0.8)), ((0.9999, 1.0), (0.9, 1.0)), ((0.0, 0.001), (0.0, 0.1))],
)
def test_small_differences_are_not_blown_up(limits, expected):
    found = routing_pictures._readable(*limits)
    np.testing.assert_allclose(found, (expected[0] - 0.002, expected[1] + 0.002), atol=1e-3)


def alignment_record(step, tasks, scale):
    rng = np.random.default_rng(step)
    half = scale * rng.uniform(-1, 1, (len(tasks), len(tasks)))
    matrix = (half + half.T) / 2
    np.fill_diagonal(matrix, 1.0)
    return {"step": step, "tasks": tasks, "cosines": matrix}


def test_matrices_are_ordered_by_group_without_diagonal(drawn):
    records = [alignment_record(step, NAMES, 0.3) for step in (10, 20, 30, 40)]
    alignment_pictures.draw_matrices(records, TASKS, "title", "m.png")
    shown = [axes for axes in drawn["m.png"].axes if axes.get_images()]
    assert [axes.get_title().split(":")[0] for axes in shown] == ["step 10", "step 20", "step 40"]
    order = [1, 3, 2, 4, 0]
    for axes, record in zip(shown, (records[0], records[1], records[3]), strict=True):
        expected = record["cosines"][np.ix_(order, order)].copy()
        np.fill_diagonal(expected, np.nan)
        np.testing.assert_array_equal(axes.get_images()[0].get_array().filled(np.nan), expected)
        pairs = record["cosines"][np.triu_indices(5, 1)]
        assert f"mean {pairs.mean():+.3f}" in axes.get_title()
    labels = [label.get_text() for label in shown[0].get_yticklabels()]
    assert labels == ["date_de", "date_fr", "unit_de", "unit_el", "unit_fr"]


def test_a_single_record_and_gradients_without_direction(drawn):
    record = alignment_record(10, NAMES, 0.3)
    record["cosines"][2] = record["cosines"][:, 2] = np.nan
    alignment_pictures.draw_matrices([record], TASKS, "title", "m.png")
    (shown,) = [axes for axes in drawn["m.png"].axes if axes.get_images()]
    assert np.isnan(shown.get_images()[0].get_array().filled(np.nan)).sum() == 5 + 2 * 4


def test_course_of_alignment_shows_mean_cosines(drawn):
    lora = [alignment_record(step, NAMES, 0.3) for step in (10, 20)]
    mhr = [alignment_record(step, NAMES[:4], 0.6) for step in (10, 30)]
    alignment_pictures.draw_course({"lora": lora, "mhr": mhr}, "title", "c.png")
    (axes,) = drawn["c.png"].axes
    for line, records in zip(axes.get_lines(), (lora, mhr), strict=False):
        size = len(records[0]["tasks"])
        means = [r["cosines"][np.triu_indices(size, 1)].mean() for r in records]
        np.testing.assert_allclose(line.get_ydata(), means)
    legend = drawn["c.png"].legends[0]
    assert "NOT the same" in legend.get_title().get_text()
    alignment_pictures.draw_course({"lora": lora}, "title", "d.png")
    assert "5 tasks" in drawn["d.png"].legends[0].get_title().get_text()
    assert "NOT" not in drawn["d.png"].legends[0].get_title().get_text()
