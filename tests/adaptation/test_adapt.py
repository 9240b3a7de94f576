"""Adapting to CLDR tasks: files, averages, refusals, going on."""

import contextlib
import functools
import io
import json
import pathlib
import shutil

import gin
import jax
import numpy as np
import pytest
import seqio

from moe_peft import errors, methods, patching
from moe_peft.adaptation import adapt as adapt_lib
from moe_peft.adaptation import data, group, programs, report
from moe_peft.adaptation import groups as groups_lib
from moe_peft.cli import main
from moe_peft.data.cldr import suite
from moe_peft.evaluation import inference, metrics
from moe_peft.methods import transfer
from moe_peft.models import decoding as decoding_lib
from moe_peft.models import few_shot, t5
from moe_peft.partitioning import mesh as mesh_lib
from moe_peft.runtime import json_files
import moe_peft.tasks.cldr  # noqa: F401  # registers the tasks
from moe_peft.training import optimizers, schedules, train
from moe_peft.weights import saved_run

pytestmark = pytest.mark.usefixtures("compiled_once")

CONFIG = t5.T5Config(
    vocab_size=272,
    emb_dim=8,
    num_heads=2,
    head_dim=4,
    mlp_dim=16,
    num_encoder_layers=1,
    num_decoder_layers=1,
    dropout_rate=0.0,  # programs compile in half the time
)
lora = functools.partial(methods.lora, placement=".*/wi_1")  # two layers: programs compile fast
LENGTHS = {"inputs": 56, "targets": 28}
TASK = "cldr_weekday_gl"


def adapt(folder, **changes):
    """Two seeds of one task, four steps."""
    settings = {
        "model": t5.Transformer(CONFIG),
        "method": lora(rank=2),
        "backbone": "random:0",
        "mixture": TASK,
        "feature_lengths": LENGTHS,
        "task_group": "cldr_([a-z]+)_[a-z]+",
        "shots": 3,
        "validation_shots": 2,
        "wordings": 4,
        "seeds": (0, 1),
        "num_steps": 4,
        "batch_size": 2,
        "eval_period": 2,
        "optimizer": optimizers.adamw(schedules.constant(1e-2)),
        "model_dir": str(folder),
        "mesh": mesh_lib.make_mesh(devices=jax.devices()[:1]),
    }
    return adapt_lib.adapt(**(settings | changes))


TWO = "weekday_and_month"


@pytest.fixture(scope="module")
def two_tasks():
    """A mixture of tasks with different numbers of shots; groups of two runs."""
    seqio.MixtureRegistry.add(TWO, [TASK, "cldr_month_gl"], default_rate=1.0)
    yield {"mixture": TWO, "shots": {TASK: 3, ".*": 5}, "group_size": 2}
    seqio.MixtureRegistry.remove(TWO)


@pytest.fixture(scope="module")
def folder(tmp_path_factory, two_tasks):
    found = tmp_path_factory.mktemp("adapted") / "run"
    adapt(found, **two_tasks)
    return found


def test_results_can_be_computed_from_predictions(folder):
    results = json.loads((folder / "results.json").read_text())
    rows = list(json_files.read_jsonl(folder / "predictions.jsonl"))
    assert len(rows) == 2 * 2 * 2 * 4  # tasks, seeds, items, wordings
    groups = {TASK: "weekday", "cldr_month_gl": "month"}
    assert {row["task"]: row["group"] for row in rows} == groups
    again = report.summarize_rows(rows)
    for part in ("overall", "groups", "tasks"):
        assert results[part] == again[part]
    assert results["trainable_parameters"] == 2 * 2 * 24
    want = [(task, seed) for task in sorted(groups) for seed in (0, 1)]
    assert [(run["task"], run["seed"]) for run in results["runs"]] == want
    for run in results["runs"]:
        assert [entry["step"] for entry in run["curve"]] == [2, 4]
        assert run["chosen_step"] in (2, 4)
        assert run["state"] == "done"
        assert run["num_shots"] == (3 if run["task"] == TASK else 5)
    assert "weekday" in (folder / "table.md").read_text()
    assert (folder / "config.gin").exists()


def test_adapters_of_every_run_are_kept(folder):
    path, other = sorted(folder.glob("groups/*/" + groups_lib.ADAPTERS))
    found = group.read_adapters(path)
    jobs = [*found, *group.read_adapters(other)]
    assert jobs == [data.Job(task, seed) for task in ("cldr_month_gl", TASK) for seed in (0, 1)]
    for tree in found.values():
        assert all("/adapter/" in name for name in patching.flatten(tree))
    assert not list(folder.glob("groups/*/progress*"))
    lines = (path.parent / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [2, 4]


def test_what_is_finished_is_not_computed_again(folder, two_tasks, tmp_path, monkeypatch):
    again = tmp_path / "again"
    shutil.copytree(folder, again)
    before = json.loads((again / "results.json").read_text())
    (again / "results.json").unlink()

    def fail(*args):
        raise AssertionError("computed again")

    monkeypatch.setattr(groups_lib.Groups, "_run_group", fail)
    assert json.loads(json.dumps(adapt(again, **two_tasks))) == before


def test_other_settings_in_the_same_folder_are_refused(folder, two_tasks):
    with pytest.raises(errors.UserError, match=r"data\.seeds\.1 is 1 .* and 2 here"):
        adapt(folder, **two_tasks, seeds=(0, 2))


def test_an_adaptation_of_version_0_1_goes_on_with_a_warning(folder, two_tasks, tmp_path, capsys):
    again = pathlib.Path(shutil.copytree(folder, tmp_path / "again"))
    plan = json.loads((again / "groups" / "plan.json").read_text())
    del plan["description"]["rows"]
    json_files.write_json(again / "groups" / "plan.json", plan)
    adapt(again, **two_tasks)
    assert "does not say which settings shaped its data" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"shots": 4}, "has 5 training examples; 4 shots and 2 for validation were asked for"),
        ({"seeds": ()}, "expected different numbers"),
        ({"seeds": (1, 1)}, "expected different numbers"),
        ({"validation_shots": 0}, "needs examples to select on"),
        ({"selection": "validaton"}, "Did you mean 'validation'"),
        ({"metric": "rouge_l"}, "needs answers in text"),
        ({"metric": "rouge"}, "Did you mean 'rouge_l'"),
        ({"task_group": "p3_(.*)"}, "does not match task_group"),
        ({"mixture": "cldr_weekday_gk"}, "Did you mean"),
        ({"group_size": 0}, "group_size is 0; expected 1 or more"),
        (
            {"source": "/nowhere/at/all"},
            "no training checkpoint in /nowhere/at/all. The folder /nowhere/at does not exist",
        ),
        ({"method": methods.poly(num_tasks=3)}, "routes by the ids of its 3 training tasks"),
        (
            {"method": transfer.transferred(methods.poly(num_tasks=3), "z")},
            "starts from a multi-task run of 'poly'",
        ),
        ({"test_split": "test"}, "has no split 'test'"),
    ],
)
def test_mistakes_are_one_line_before_anything_compiles(tmp_path, monkeypatch, changes, message):
    monkeypatch.setattr(groups_lib.Groups, "run", None)
    with pytest.raises(errors.UserError, match=message) as error:
        adapt(tmp_path, **changes)
    assert "\n" not in str(error.value)


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """A multi-task run of LoRA."""
    found = tmp_path_factory.mktemp("source")
    train.train(
        model=t5.Transformer(CONFIG),
        method=lora(rank=2),
        backbone="random:0",
        mixture="cldr_weekday_fr",
        feature_lengths=LENGTHS,
        batch_size=4,
        num_steps=2,
        optimizer=optimizers.adamw(schedules.constant(1e-2)),
        model_dir=str(found),
        mesh=mesh_lib.make_mesh(devices=jax.devices()[:1]),
    )
    return str(found)


def test_every_run_starts_where_the_source_ended(source, tmp_path, monkeypatch):
    seen = []

    def stop(self, trainables):
        seen.extend(trainables)
        raise KeyboardInterrupt

    monkeypatch.setattr(group.GroupRun, "train", stop)
    kept = transfer.transferred(lora(rank=2), "keep")
    with pytest.raises(KeyboardInterrupt):
        adapt(tmp_path, method=kept, source=source, group_size=2)
    want = saved_run.load(source).trainable
    for tree in seen:
        for path, leaf in patching.flatten(tree).items():
            np.testing.assert_array_equal(leaf, patching.flatten(want)[path])
    assert len(seen) == 2


def test_a_source_of_another_method_or_backbone_is_refused(source, tmp_path):
    other = transfer.transferred(lora(rank=3), "keep")
    with pytest.raises(errors.UserError, match=r"another method: .*rank is 2 .* and 3 here"):
        adapt(tmp_path, method=other, source=source)
    kept = transfer.transferred(lora(rank=2), "keep")
    with pytest.raises(errors.UserError, match="another backbone"):
        adapt(tmp_path, method=kept, source=source, backbone="random:1")
    with pytest.raises(errors.UserError, match="transferred"):
        adapt(tmp_path, source=source)


@pytest.fixture(scope="module")
def ranked(tmp_path_factory):
    """(folder, results, lines on standard error) of a run on choices; nobody tells the memory."""
    found, said = tmp_path_factory.mktemp("ranked"), io.StringIO()
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stderr(said):
        patch.setattr(programs, "device_memory", lambda: None)
        loss = few_shot.FewShotLoss()
        results = adapt(found, few_shot_loss=loss, rank_choices=True, seeds=(3,), num_steps=2)
    return found, results, said.getvalue().splitlines()


def test_unknown_memory_is_said_in_one_line(ranked):
    folder, _, said = ranked
    (line,) = [line for line in said if line.startswith("the memory of a device is unknown")]
    assert "so 4.3 GB are assumed" in line
    assert (folder / "results.json").exists()


def test_choices_train_and_rank(ranked):
    folder, results, _ = ranked
    rows = list(json_files.read_jsonl(folder / "predictions.jsonl"))
    choices = suite.answer_choices(suite.Task("weekday", "gl"))
    assert len(rows) == 2 * 4  # items, wordings
    assert {row["prediction"] for row in rows} <= set(choices)
    for row in rows:
        assert row["score"] == float(row["prediction"] == row["targets"])
    assert results["settings"]["loss"]["few_shot"]["unlikelihood"] == 1.0


def test_the_command_line_knows_it(capsys):
    flags = ["--gin_file", "runs/fewshot.gin", "--gin_file", "models/tiny.gin"]
    assert main.main(["adapt", *flags, "--gin.SHOTS=abc"]) == main.USER_ERROR
    assert "moe-peft adapt:" in capsys.readouterr().err
    gin.clear_config()


def test_answers_in_text_are_kept_until_the_group_is_finished(tmp_path, monkeypatch):
    """Interrupted between the reported answers of two runs, only the second run is asked again."""
    settings = {
        "decoding": decoding_lib.Greedy(),
        "metric": "rouge_l",
        "validation_shots": 1,
        "num_steps": 2,
        "feature_lengths": {"inputs": 56, "targets": 8},
        "save_seconds": 0.0,
    }
    generate, asked = inference.AnsweringModel.generate, []

    def watched(self, params, questions, strategy, progress, seed):
        is_test = len(questions) > 4  # one validation example of four wordings
        if is_test and len(asked) == 1:
            asked.append("interrupted")
            raise KeyboardInterrupt
        if is_test:
            asked.append(seed)
        return generate(self, params, questions, strategy, progress, seed)

    monkeypatch.setattr(inference.AnsweringModel, "generate", watched)
    with pytest.raises(KeyboardInterrupt):
        adapt(tmp_path, **settings)
    results = adapt(tmp_path, **settings)
    assert asked == [0, "interrupted", 1]
    rows = list(json_files.read_jsonl(tmp_path / "predictions.jsonl"))
    assert len(rows) == 2 * 2 * 4  # seeds, items, wordings
    for row in rows:
        assert row["metric"] == "rouge_l"
        assert row["score"] == metrics.rouge_l(row["prediction"], [row["targets"]])
    assert results["tasks"][TASK]["metric"] == "rouge_l"
    assert not list(tmp_path.glob("groups/*/answers*"))
