"""Numbers, front and labels of the comparison of adaptations."""

import io
import itertools
import json

from matplotlib import figure
import numpy as np
import pytest
import rich.console

from moe_peft import errors
from moe_peft.adaptation import report
from moe_peft.cli import main
from moe_peft.reports import compare_adapted, labels, pareto, pareto_picture

ROWS = [
    pareto.Row("lora", 100, (0.1, 0.2, 0.6), 12.0),
    pareto.Row("mhr", 900, (0.5, 0.5, 0.5)),
    pareto.Row("mhr_z", 10, (0.2,)),
    pareto.Row("mhr_mu", 100, (0.4, 0.4)),
    pareto.Row("big", 1000, (0.3, 0.5)),
]


def test_statistics_over_seeds():
    lora = ROWS[0]
    assert lora.mean == pytest.approx(0.3)
    assert lora.std == pytest.approx(np.sqrt((0.04 + 0.01 + 0.09) / 2))
    assert lora.median == pytest.approx(0.2)
    assert lora.iqr == pytest.approx(0.4 - 0.15)
    assert (ROWS[2].std, ROWS[2].iqr) == (None, None)
    assert compare_adapted.cells(lora) == ["lora", "100", "30.0", "26.5", "20.0", "25.0", "3", "12"]
    assert compare_adapted.cells(ROWS[2]) == ["mhr_z", "10", "20.0", "-", "20.0", "-", "1", "-"]


def test_front_holds_what_nothing_beats():
    assert [row.name for row in pareto.front(ROWS)] == ["mhr_z", "mhr_mu", "mhr"]
    twins = [
        pareto.Row("a", 5, (0.5,)),
        pareto.Row("b", 5, (0.5,)),
        pareto.Row("c", 6, (0.5,)),
    ]
    assert [row.name for row in pareto.front(twins)] == ["a", "b"]
    rng = np.random.default_rng(0)
    rows = [pareto.Row(str(i), int(n), (s,)) for i, (n, s) in enumerate(rng.random((40, 2)) * 50)]
    best = pareto.front(rows)
    assert all(a.trainable < b.trainable and a.mean < b.mean for a, b in itertools.pairwise(best))
    for row in rows:
        assert any(b.trainable <= row.trainable and b.mean >= row.mean for b in best)


def test_table_is_sorted_and_marks_the_front():
    lines = compare_adapted.markdown(ROWS, "title").splitlines()
    names = [line.split("|")[1].strip() for line in lines if line.startswith("| ")]
    assert names == ["variant", "**mhr**", "**mhr_mu**", "big", "lora", "**mhr_z**"]
    assert "| lora | 100 | 30.0 | 26.5 | 20.0 | 25.0 | 3 | 12 |" in lines
    out = io.StringIO()
    compare_adapted.show(ROWS, "title", rich.console.Console(file=out, width=100))
    shown = out.getvalue().splitlines()
    assert shown[0].startswith("title")
    assert [line.split()[0] for line in shown[4:9]] == ["mhr", "mhr_mu", "big", "lora", "mhr_z"]
    found = {row["name"]: row for row in compare_adapted.to_json(ROWS, "title")["rows"]}
    assert found["lora"]["std"] == ROWS[0].std
    assert [name for name, row in found.items() if row["front"]] == ["mhr", "mhr_z", "mhr_mu"]


def test_corners_of_the_front():
    corners = pareto_picture._stairs(pareto.front(ROWS))
    expected = [(10, 20), (100, 20), (100, 40), (900, 40), (900, 50)]
    np.testing.assert_allclose(corners, expected)


def test_points_do_not_hide_each_other_and_stay_near_their_number():
    rows = [pareto.Row(str(i), 1000, (0.3, 0.3 + 0.001 * i)) for i in range(6)]
    rows.append(pareto.Row("far", 10, (0.9, 0.9)))
    places = pareto_picture._side_by_side(rows)
    assert places[0] == 1000
    assert places[-1] == 10
    gaps = np.diff(np.sort(np.log10(places[:6])))
    assert np.min(gaps) > 0.02
    assert np.ptp(np.log10(places[:6])) < 0.25


@pytest.mark.parametrize("seed", range(3))
def test_labels_cover_neither_points_nor_each_other(seed):
    fig = figure.Figure(figsize=(7, 5))
    axes = fig.add_subplot(xlim=(0, 1), ylim=(0, 1))
    points = np.random.default_rng(seed).uniform(0.1, 0.9, (18, 2))
    names = [f"variant-{i}" for i in range(len(points))]
    boxes = labels.place(axes, points, names)
    assert sorted(text.get_text() for text in axes.texts) == sorted(names)
    for a, b in itertools.combinations(boxes, 2):
        assert not a.overlaps(b)
    frame = axes.get_window_extent()
    for center in axes.transData.transform(points):
        assert not any(box.contains(*center) for box in boxes)
    for box in boxes:
        assert frame.x0 <= box.x0
        assert box.x1 <= frame.x1


def content(name, trainable, scores, tasks=("t_de", "t_fr"), **changed):
    """What `moe-peft adapt` writes, the parts that are read; scores by seed of each task."""
    runs = {(t, seed): score for t in tasks for seed, score in enumerate(scores)}
    settings = {
        "method": {"name": name},
        "data": {
            "mixture": "few",
            "shots": 16,
            "validation_shots": 4,
            "test_split": "validation",
            "seeds": list(range(len(scores))),
        },
        "training": {"selection": "validation"},
        "evaluation": {
            "metric": "exact_match",
            "rank_choices": False,
            "length_normalized_choices": False,
        },
    }
    for part in settings.values():
        part.update({k: v for k, v in changed.items() if k in part})
    summary = report.summarize(runs, dict.fromkeys(tasks, "group"))
    return {"settings": settings, "trainable_parameters": trainable, "seconds": 3.5, **summary}


def save(folder, *args, **kwargs):
    folder.mkdir()
    (folder / "results.json").write_text(json.dumps(content(*args, **kwargs)))
    return str(folder)


def test_folders_of_adaptations_are_compared(tmp_path, capsys):
    folders = [
        save(tmp_path / "lora", "lora", 100, (0.1, 0.3)),
        save(tmp_path / "one", "mhr", 900, (0.5, 0.7)),
        save(tmp_path / "two", "mhr", 800, (0.4, 0.4)),
    ]
    assert main.main(["compare", *folders, "--out", str(tmp_path / "out")]) == 0
    assert "one" in capsys.readouterr().out
    found = json.loads((tmp_path / "out" / "few_adapted.json").read_text())
    assert found["title"] == "few: exact match after adaptation, 16 shots, 2 tasks"
    rows = {row["name"]: row for row in found["rows"]}
    assert list(rows) == ["lora", "one", "two"]
    assert rows["one"]["mean"] == pytest.approx(0.6)
    assert rows["one"]["std"] == pytest.approx(np.std([0.5, 0.7], ddof=1))
    assert rows["one"]["seconds"] == 3.5
    assert "| **lora** | 100 | 20.0 |" in (tmp_path / "out" / "few_adapted.md").read_text()
    assert (tmp_path / "out" / "few_adapted.png").stat().st_size > 10_000


@pytest.mark.parametrize(
    ("changed", "expected"),
    [
        ({"shots": 32}, "shots is 16 and 32"),
        ({"selection": "reported_split"}, "selection is validation and reported_split"),
        ({"metric": "rouge_l"}, "metric is exact_match and rouge_l"),
        ({"tasks": ("t_de",)}, "number of tasks is 2 and 1"),
    ],
)
def test_what_was_not_made_alike_is_refused(tmp_path, changed, expected):
    folders = [
        save(tmp_path / "a", "lora", 1, (0.1,)),
        save(tmp_path / "b", "mhr", 2, (0.2,), **changed),
    ]
    with pytest.raises(errors.UserError, match=expected):
        compare_adapted.load(folders)


def test_unreadable_results_are_one_line(tmp_path):
    (tmp_path / "results.json").write_text("{")
    with pytest.raises(errors.UserError, match="cannot be read"):
        compare_adapted.load([tmp_path])
