"""Tables and pictures of made-up runs."""

import io
import json

import pytest
import rich.console

from moe_peft import errors
from moe_peft.evaluation import aggregation, table
from moe_peft.reports import compare, picture
from moe_peft.runtime import json_files


def content(method, trainable, right, groups=("date", "unit"), **settings):
    """A results.json in which `right` of 4 examples per template are right, less in template 1."""
    rows = [
        {
            "task": f"{group}_{locale}",
            "group": group,
            "template": template,
            "score": float(i < right - template),
        }
        for group in groups
        for locale in ("de", "fr")
        for template in (0, 1, 2)
        for i in range(4)
    ]
    return {
        "mixture": "suite",
        "run": {
            "method": {"name": method},
            "trainable_parameters": trainable,
            "total_parameters": 1_000_000 + trainable,
        },
        "settings": {
            "metric": "exact_match",
            "split": "validation",
            "max_examples_per_task": None,
            "rank_choices": False,
            "length_normalized_choices": False,
            **settings,
        },
        "results": aggregation.aggregate(rows).to_json(),
    }


def save(tmp_path, name, *args, **kwargs):
    path = tmp_path / name / "eval" / "suite" / "results.json"
    json_files.write_json(path, content(*args, **kwargs))
    return tmp_path / name


@pytest.fixture
def folders(tmp_path):
    return [
        save(tmp_path, "a", "frozen", 0, 1),
        save(tmp_path, "b", "mov", 74_880, 4),
    ]


def test_table_shows_mean_and_median_of_every_group_and_all(folders):
    (runs,) = compare.load(folders).values()
    # frozen: templates 1/4, 0, 0; mov: 4/4, 3/4, 2/4.
    assert table.rows(runs) == [
        ["date", "2", "8.3 / 0.0", "75.0 / 75.0"],
        ["unit", "2", "8.3 / 0.0", "75.0 / 75.0"],
        ["all tasks", "4", "8.3 / 0.0", "75.0 / 75.0"],
    ]
    out = io.StringIO()
    table.show(runs, rich.console.Console(file=out, width=100))
    shown = out.getvalue()
    for text in ("suite: exact match", "48 examples", "mov", "75.0/75.0", "74,880"):
        assert text in shown
    lines = table.markdown(runs).splitlines()
    assert "| date | 2 | 8.3 / 0.0 | 75.0 / 75.0 |" in lines
    assert len({line.count("|") for line in lines if line.startswith("|")}) == 1


def test_written_files_hold_the_same_numbers(folders, tmp_path):
    (runs,) = compare.load(folders).values()
    names = [path.name for path in compare.write(runs, tmp_path / "out")]
    assert names == ["suite.md", "suite.json", "suite.png"]
    written = json.loads((tmp_path / "out" / "suite.json").read_text())
    assert [run["name"] for run in written["runs"]] == ["frozen", "mov"]
    assert written["runs"][1]["lines"]["all tasks"]["mean"] == pytest.approx(0.75)
    assert (tmp_path / "out" / "suite.png").read_bytes()[:4] == b"\x89PNG"
    assert (tmp_path / "out" / "suite.md").read_text().startswith("### suite")


def test_runs_of_one_method_go_by_their_folders(tmp_path):
    folders = [save(tmp_path, name, "mov", 5, 2) for name in ("seed0", "seed1")]
    (runs,) = compare.load(folders).values()
    assert [run.name for run in runs] == ["seed0", "seed1"]
    picture.draw(runs, tmp_path / "picture.svg")
    assert "seed1" in (tmp_path / "picture.svg").read_text()


@pytest.mark.parametrize(
    ("other", "words"),
    [
        ({"metric": "rouge_l"}, "metric is exact_match and rouge_l"),
        ({"groups": ("date",)}, "number of examples is 48 and 24"),
    ],
)
def test_what_cannot_be_compared_is_refused(tmp_path, other, words):
    folders = [save(tmp_path, "a", "ia3", 5, 2), save(tmp_path, "b", "mov", 5, 2, **other)]
    with pytest.raises(errors.UserError, match=words):
        compare.load(folders)


def test_a_folder_without_results_says_what_to_do(tmp_path):
    with pytest.raises(errors.UserError, match="holds no results .* `moe-peft eval`"):
        compare.load([tmp_path])
    folder = save(tmp_path, "a", "ia3", 5, 2)
    (folder / "eval" / "suite" / "results.json").write_text("{")
    with pytest.raises(errors.UserError, match="cannot be read"):
        compare.load([folder])
