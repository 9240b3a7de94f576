"""`moe-peft experiments`: filters, shards, what is recorded, and two-minute versions."""

import dataclasses
import json

import gin
import pytest

from moe_peft import errors
from moe_peft.cli import main
from moe_peft.experiments import checks, files, listing
from moe_peft.experiments import record as record_lib

ROW = "poly_s/superni/shared"


@pytest.fixture(autouse=True)
def _clean_gin():
    yield
    gin.clear_config()


@pytest.fixture
def record(tmp_path):
    return tmp_path / "record.json"


def check(level, record, *names, **settings):
    found = [files.load(name) for name in names or (ROW,)]
    rows = checks.check(
        found, level, record, record.parent / "runs", configure=main.configure, **settings
    )
    return [row.state for row in rows]


def state(record):
    (row,) = record_lib.rows([files.load(ROW)], record)
    return row.state


@pytest.fixture
def done(monkeypatch):
    """Replaces every check; returns the list of those that were asked for."""
    asked = []

    def instead(level):
        return lambda found, *_: asked.append((level, found.name))

    monkeypatch.setattr(checks, "parse", instead("parse"))
    monkeypatch.setattr(checks, "plan", instead("plan"))
    monkeypatch.setattr(checks, "settings_on_samples", lambda found, _: found.name)
    monkeypatch.setattr(checks, "run_on_samples", lambda found, folder: None)
    return asked


@pytest.mark.parametrize(
    ("filters", "count"),
    [
        ({}, len(files.names())),
        ({"papers": ["poly_s"]}, 15),
        ({"names": ["mhr/t0_3b"]}, 8),
        ({"names": ["mhr/t0_xl/poly", "mov/770m"]}, 10),
        ({"papers": ["mhr"], "tables": ["4"]}, 11),
        ({"tables": ["zero_shot"], "sizes": ["11b"]}, 4),
    ],
)
def test_filters(filters, count):
    assert len(listing.select(**filters)) == count


def test_wrong_filter_names_what_there_is():
    with pytest.raises(errors.UserError, match="No experiment fits --paper moe.* 'mov'"):
        listing.select(papers=["moe"])
    with pytest.raises(errors.UserError, match="--size 7B. Known: 11B, 3B, 770M"):
        listing.select(sizes=["7b"])


def test_shards_are_all_and_keep_shared_runs_together():
    found = listing.select()
    parts = [listing.shard(found, f"{i}/4") for i in (1, 2, 3, 4)]
    assert sorted(each.name for part in parts for each in part) == sorted(files.names())
    assert max(map(len, parts)) < 40
    for part in parts:
        names = {each.name for each in part}
        assert all(each.after in names for each in part if each.after)


@pytest.mark.parametrize("which", ["0/4", "5/4", "1", "a/b", "1/0"])
def test_wrong_shard(which):
    with pytest.raises(errors.UserError, match="expected I/N"):
        listing.shard(listing.select(), which)


def test_levels_build_on_each_other_and_are_not_repeated(record, done):
    assert [row.state for row in record_lib.rows([files.load(ROW)], record)] == ["not checked"]
    assert check("parse", record) == ["parses"]
    assert check("run", record) == ["ran on samples"]
    assert done == [("parse", ROW), ("plan", ROW)]
    assert check("plan", record) == ["ran on samples"]
    assert len(done) == 2
    check("plan", record, is_again=True)
    assert len(done) == 4


def test_failure_is_recorded_stops_there_and_is_tried_again(record, done, monkeypatch):
    def fails(found, configure):
        raise errors.UserError("no such thing")

    with monkeypatch.context() as broken:
        broken.setattr(checks, "plan", fails)
        assert check("run", record) == ["plan fails: no such thing"]
    assert "run" not in json.loads(record.read_text())[ROW]
    assert check("run", record) == ["ran on samples"]
    assert done == [("parse", ROW), ("plan", ROW)]


def test_record_of_other_settings_does_not_count(record, done):
    check("run", record)
    content = json.loads(record.read_text())
    content[ROW]["settings"] = "changed"
    record.write_text(json.dumps(content))
    assert [row.state for row in record_lib.rows([files.load(ROW)], record)] == ["not checked"]
    assert check("parse", record) == ["parses"]
    assert "run" not in json.loads(record.read_text())[ROW]


def test_processes_that_die_fail_or_leave_nothing_are_one_line(record, monkeypatch):
    python = record.parent / "python"
    python.write_text(
        "#!/bin/sh\n"
        f'case "$*" in *{ROW}*) kill -9 $$ ;; esac\n'
        'case "$*" in *mov/3b/full*) echo traceback; echo moe-peft train: wrong; exit 2 ;; esac\n'
        'case "$*" in *mov/3b/lora_r4*) exit 0 ;; esac\n'
        "for each; do case $each in --gin.MODEL_DIR=*) made=${each#*=} ;; esac; done\n"
        'mkdir -p $made; echo "$JAX_COMPILATION_CACHE_DIR"; echo {} > $made/results.json\n'
    )
    python.chmod(0o755)
    monkeypatch.setattr(checks.sys, "executable", str(python))
    monkeypatch.delenv("JAX_COMPILATION_CACHE_DIR", raising=False)
    runs = record.parent / "runs"
    run = lambda name: checks.run_on_samples(files.load(name), runs)
    assert "train: SIGKILL ended the process; see " in run(ROW)
    assert run("mov/3b/full") == "train: moe-peft train: wrong"
    assert "eval left no results in " in run("mov/3b/lora_r4")
    assert run("mov/3b/ia3") is None
    (log,) = runs.glob("mov/3b/ia3-*/log.txt")
    assert log.read_text().count(f"{runs}/compiled\n") == 2


def test_same_settings_on_the_samples_run_once(record, done, monkeypatch):
    monkeypatch.setattr(checks, "settings_on_samples", lambda found, _: found.paper)
    names = (ROW, "poly_s/superni/poly", "poly_s/superni/full_ft", "mov/3b/ia3")
    assert check("run", record, *names) == ["ran on samples"] * 4
    content = json.loads(record.read_text())
    assert [content[name].get("ran_as") for name in names] == [None, ROW, ROW, None]
    assert ["seconds" in content[name] for name in names] == [True, False, False, True]


def test_settings_on_samples_leave_out_size_and_folders():
    digest = lambda name: checks.settings_on_samples(files.load(name), main.configure)
    assert digest("mov/3b/mov_10") == digest("mov/11b/mov_10")
    assert digest("mov/3b/mov_10") != digest("mov/3b/mov_20")


def test_broken_record_is_one_line(record, capsys):
    record.write_text("{")
    assert main.main(["experiments", ROW, "--record", str(record)]) == main.USER_ERROR
    assert "is not a record of checks" in capsys.readouterr().err


def test_parse_and_plan(record):
    assert check("plan", record) == ["plans"]


def test_count_that_is_not_in_the_head():
    found = dataclasses.replace(files.load(ROW), trainable=(9_437_185, 9_437_184))
    with pytest.raises(errors.UserError, match="says 9,437,185 .* counted are 9,437,184"):
        checks.plan(found, main.configure)


def test_listing(record, capsys):
    assert main.main(["experiments", "--table", "zero_shot", "--record", str(record)]) == 0
    shown = capsys.readouterr().out
    assert "mhr/zero_shot/xl_mhr_mu" in shown
    assert "8 experiments: 8 not checked" in shown


def test_json(record, capsys):
    arguments = ["experiments", ROW, "--json", "--record", str(record)]
    assert main.main(arguments) == 0
    (row,) = json.loads(capsys.readouterr().out)
    assert row["name"] == ROW
    assert row["expected"] == "64.9 ± 0.5"
    assert row["trainable"] == 9_437_184
    assert row["training_operations"] == pytest.approx(3.8e17)
    assert row["state"] == "not checked"


def test_failed_check_is_the_exit_code(record, done, monkeypatch, capsys):
    arguments = ["experiments", ROW, "--check", "run", "--record", str(record)]
    monkeypatch.setattr(checks, "run_on_samples", lambda found, folder: "broken")
    assert main.main(arguments) == 1
    assert "run fails: broken" in capsys.readouterr().err
    monkeypatch.setattr(checks, "run_on_samples", lambda found, folder: None)
    assert main.main(arguments) == 0


def group(median):
    return {"median": median, "mean": 0.0}


@pytest.mark.parametrize(
    ("name", "file", "content", "state"),
    [
        (
            "mhr/t0_xl/poly",
            "poly/adapted/results.json",
            {"overall": {"mean_of_task_medians": 0.6705}},
            "reproduced: 67.05",  # 68.0 ± 1.0
        ),
        (
            "poly_s/superni/shared",
            "shared/adapted/results.json",
            {"overall": {"mean_of_task_medians": 0.0, "over_seeds": {"mean": 0.643}}},
            "measured: 64.30",  # 64.9 ± 0.5
        ),
        (
            "poly_s/t0/shared",
            "shared/adapted/results.json",
            {"overall": {"mean_of_task_medians": 0.675}},
            "reproduced: 67.50",  # 66.9 (0.7)
        ),
        (
            "mov/3b/mov_10",
            "mov_10/eval/p3_heldout_published/results.json",
            {"results": {"groups": {"anli": group(0.1), "cb": group(0.4)}}},
            "measured: 25.00",
        ),
        (
            "mov/sentence/token_3b",
            "../3b/mov_10/eval/p3_heldout_published/results.json",
            {"results": {"groups": {"anli": group(0.1), "cb": group(0.4)}}},
            "measured: 40.00",
        ),
        (
            "mhr/zero_shot/xl_backbone",
            "xl_backbone/eval/p3_heldout/results.json",
            {"results": {"overall": {"mean": 0.432}}},
            "measured: 43.20",
        ),
    ],
)
def test_scores_at_full_size(name, file, content, state, tmp_path):
    path = tmp_path / name.rpartition("/")[0] / file
    path.parent.mkdir(parents=True)
    path.write_text(json.dumps(content))
    found = [files.load(name)]
    (row,) = record_lib.rows(found, tmp_path / "record.json", tmp_path)
    assert row.state == state


def test_scores_on_samples_do_not_count(tmp_path):
    folder = tmp_path / "mhr/t0_xl/poly/adapted"
    folder.mkdir(parents=True)
    (folder / "results.json").write_text('{"overall": {"mean_of_task_medians": 0.68}}')
    (folder / "config.gin").write_text("DATA_DIR = 'embedded:samples'\n")
    assert record_lib.measured(files.load("mhr/t0_xl/poly"), tmp_path) is None


def test_tables_of_the_docs_are_those_of_the_files():
    shown = listing.markdown(listing.select())
    docs = record_lib.default_record().parents[1] / "experiments.md"
    assert shown in docs.read_text(encoding="utf-8"), (
        "docs/experiments.md differs from the files; write its tables with "
        "`moe-peft experiments --markdown`."
    )


def test_recorded_experiments_exist():
    assert set(record_lib.read(record_lib.default_record())) <= set(files.names())


@pytest.mark.slow
@pytest.mark.parametrize("name", files.names())
def test_plans_as_its_head_says(name):
    assert checks.plan(files.load(name), main.configure).base > 0


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "results"),
    [
        ("mhr/superni/mhr", 6),  # of three tasks, two seeds each
        ("mhr/t0_3b/adapter_soup", 8),
        ("mhr/zero_shot/xl_mhr_mu", 4),
        ("poly_s/crossfit/poly_s", 6),
        ("poly_s/t0/poly_mu", 8),
        ("mov/3b/mov_2", 4),
    ],
)
def test_two_minute_version(name, results, record, monkeypatch):
    # In a process of its own with two devices. On a busy machine a program for eight may not get
    # all of its threads going within the minute that XLA waits for them, and is then ended.
    monkeypatch.setenv("XLA_FLAGS", "--xla_force_host_platform_device_count=2")
    assert check("run", record, name) == ["ran on samples"]
    (written,) = (record.parent / "runs").glob(f"{name}-*/**/results.json")
    content = json.loads(written.read_text())
    found = content["runs"] if "runs" in content else content["results"]["tasks"]
    assert len(found) == results
