"""`moe-peft report` on folders of runs: what it draws, how tasks are called, what it refuses."""

import json

import gin
import jax
import numpy as np
import pytest

from moe_peft import errors, patching
from moe_peft.cli import main
from moe_peft.reports import recorded_run, routing_pictures, run_report
from moe_peft.training import checkpoints
from moe_peft.training import step as step_lib
from moe_peft.training.monitors import base
from moe_peft.weights import saved_run

TASKS, SPLITS, SKILLS = 5, 2, 3
MIXTURE = "cldr_fewshot"
CONFIG = """
import moe_peft.tasks.cldr
TASK_GROUP = "cldr_([a-z]+)_[a-z]+"
"""
PATH = "encoder/layers_0/mlp/wo/adapter"


@pytest.fixture(autouse=True)
def _clean_gin():
    yield
    gin.clear_config()


def description(name):
    adapter = {"class": "SkilledLoRA", "router_factory": {"straight_through": False}}
    return {
        "method": {"name": name, "rules": [{"adapter": adapter}]},
        "data": {"mixture": MIXTURE, "feature_lengths": {"inputs": 24, "targets": 12}},
    }


def save(folder, name, leaves, step=7, config=CONFIG):
    """A run's folder with one checkpoint of some leaves."""
    folder.mkdir(parents=True)
    (folder / "config.gin").write_text(config)
    tree = patching.trees.unflatten(leaves)
    state = step_lib.TrainState(
        step=np.int32(step),
        trainable=tree,
        opt_state=(),
        rng=jax.random.key_data(jax.random.key(0)),
    )
    with checkpoints.Checkpoints(folder, keep=2) as saver:
        saver.save(state, {"step": step, "description": description(name)})
    return folder


def logits(num_tasks=TASKS, seed=0):
    shape = (num_tasks, SPLITS, SKILLS)
    return np.random.default_rng(seed).normal(0, 2, shape).astype(np.float32)


@pytest.fixture
def mhr(tmp_path):
    folder = save(tmp_path / "mhr", "mhr", {f"{PATH}/router/logits": logits()})
    for step in (5, 7):
        values = {name: [0.5] for name in ("entropy", "sparsity", "max_weight")}
        base.append(folder, "routing", step, {"selectors": ["encoder/layers_0/mlp/wo"], **values})
    return folder


@pytest.fixture
def lora(tmp_path):
    folder = save(tmp_path / "lora", "lora", {f"{PATH}/lora_a": np.ones((2, 2), np.float32)})
    cosines = [[1.0, 0.25, None], [0.25, 1.0, None], [None, None, None]]
    tasks = ["cldr_month_sq", "cldr_day_gl", "cldr_day_sq"]
    base.append(folder, "alignment", 5, {"tasks": tasks, "cosines": cosines})
    return folder


def test_everything_there_is_data_for_is_drawn(mhr, lora, tmp_path, capsys):
    assert main.main(["report", str(mhr), str(lora), "--out", str(tmp_path / "out")]) == 0
    written = sorted(path.name for path in (tmp_path / "out").iterdir())
    assert written == [
        "alignment_course.png",
        "lora_alignment.png",
        "mhr_routing_tree.png",
        "mhr_routing_weights.png",
        "routing_course.png",
    ]
    assert all((tmp_path / "out" / name).read_bytes()[:4] == b"\x89PNG" for name in written)
    assert capsys.readouterr().out.count("wrote ") == 5


def test_weights_and_records_are_those_of_the_folder(mhr, lora):
    routed, plain = run_report.load([mhr, lora])
    (weights,) = routed.weights.values()
    z = 1 / (1 + np.exp(-np.float64(logits())))
    np.testing.assert_allclose(weights, z / z.sum(-1, keepdims=True), rtol=1e-5)
    assert list(routed.weights) == ["encoder/layers_0/mlp/wo"]
    assert [record["step"] for record in routed.course] == [5, 7]
    assert plain.weights == {}
    assert plain.alignment[0]["cosines"][0, 1] == 0.25
    assert np.isnan(plain.alignment[0]["cosines"][2, 2])
    assert (routed.label, plain.label) == ("mhr", "lora")


def test_tasks_are_called_and_grouped_as_in_the_mixture(mhr):
    from moe_peft.tasks import cldr

    saved = saved_run.load(mhr)
    ids = {task.name: number for task, number in cldr.task_ids().items()}
    first = min(ids[task.name] for task in cldr.suite.tasks("fewshot"))
    tasks = recorded_run.tasks(mhr, saved, first + 3)
    by_id = {number: name for name, number in ids.items()}
    assert tasks.names[0] == "task 0"  # Of another mixture.
    assert tasks.names[first:] == tuple(by_id[first + i] for i in range(3))
    assert tasks.groups[first] == by_id[first].split("_")[1]
    by_locale = recorded_run.tasks(mhr, saved, first + 3, "cldr_[a-z]+_([a-z]+)")
    assert by_locale.groups[first] == by_id[first].split("_")[2]


def test_templates_with_ids_of_their_own_are_told_apart(mhr):
    from moe_peft.tasks import cldr

    (mhr / "config.gin").write_text(
        CONFIG + "import moe_peft.data.task_ids\nper_template.num_templates = 10\n"
    )
    ids = {task.name: number for task, number in cldr.task_ids().items()}
    task = cldr.suite.tasks("fewshot")[0]
    tasks = recorded_run.tasks(mhr, saved_run.load(mhr), 10 * ids[task.name] + 2)
    assert tasks.names[-2:] == (f"{task.name}_t0", f"{task.name}_t1")
    assert tasks.names[-3].startswith("task ")


def test_settings_that_are_gone_leave_numbers(mhr, capsys):
    (mhr / "config.gin").write_text("import nowhere.to_be_found\n")
    tasks = recorded_run.tasks(mhr, saved_run.load(mhr), 2)
    assert tasks.names == ("task 0", "task 1")
    assert tasks.groups == (recorded_run.OTHER,) * 2
    assert "cannot be read" in capsys.readouterr().out


def test_runs_with_one_method_are_told_apart(tmp_path):
    leaves = {f"{PATH}/router/logits": logits()}
    folders = [
        save(tmp_path / path, name, leaves)
        for path, name in (("a", "mhr"), ("x/b", "mhr"), ("y/b", "mhr"), ("c", "poly"))
    ]
    first, second, third, fourth = (source.label for source in run_report.load(folders))
    assert (first, fourth) == ("a", "poly")
    assert second.endswith("x-b")
    assert third.endswith("y-b")


def test_options_reach_the_pictures(mhr, tmp_path, monkeypatch):
    seen = {}

    def draw_weights(chosen, tasks, title, path, splits):
        seen.update(chosen=chosen, tasks=tasks, title=title, splits=splits)

    monkeypatch.setattr(routing_pictures, "draw_weights", draw_weights)
    flags = ["--layers", "mlp", "--splits", "1", "--step", "7", "--group", "task ([0-9]).*"]
    assert main.main(["report", str(mhr), "--out", str(tmp_path / "out"), *flags]) == 0
    assert seen["splits"] == [1]
    assert seen["tasks"].groups == ("0", "1", "2", "3", "4")
    assert next(iter(seen["chosen"].values())).shape == (TASKS, 1, SKILLS)
    assert seen["title"].endswith("mhr, step 7")


@pytest.mark.parametrize(
    ("run", "flags", "expected"),
    [
        ("nowhere", [], "no training checkpoint"),
        ("mhr", ["--step", "6"], "no checkpoint of step 6; it has steps 7"),
        ("mhr", ["--splits", "one"], "expected numbers with commas between them"),
        ("mhr", ["--layers", "encoder/layers_1"], "Did you mean 'encoder/layers_0/mlp/wo'"),
        ("lora", ["--layers", "mlp"], "'lora' has no learned task routing"),
        ("lora", ["--splits", "0"], "'lora' has no learned task routing"),
    ],
)
def test_mistakes_are_one_line(mhr, lora, tmp_path, capsys, run, flags, expected):
    out = ["--out", str(tmp_path / "out")]
    assert main.main(["report", str(tmp_path / run), *out, *flags]) == main.USER_ERROR
    message = capsys.readouterr().err
    assert expected in message
    assert message.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_a_run_without_anything_to_draw_is_refused(tmp_path):
    folder = save(tmp_path / "ia3", "ia3", {f"{PATH}/vectors": np.ones(3, np.float32)})
    with pytest.raises(errors.UserError, match="nothing to draw of .*'ia3' has no learned"):
        run_report.load([folder])


def test_records_are_plain_json(lora):
    (line,) = (lora / "monitors" / "alignment.jsonl").read_text().splitlines()
    assert json.loads(line)["tasks"][0] == "cldr_month_sq"
