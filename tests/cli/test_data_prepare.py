"""Caches made beforehand: once, in parallel, through kills, in little memory."""

import json
import os
import pathlib
import re
import signal
import subprocess
import sys
import time
import tracemalloc

import gin
import numpy as np
import p3_writing
import pytest

from moe_peft.cli import main
from moe_peft.data import cache, row_store, samples
from moe_peft.data.p3 import ids, records
from moe_peft.runtime import progress as progress_lib
from moe_peft.tasks import p3

NAMES = ("p3_t0", "p3_heldout_published")


@pytest.fixture(autouse=True)
def _clean(monkeypatch, tmp_path):
    monkeypatch.setenv("MOE_PEFT_CACHE", str(tmp_path / "cache"))
    ids.opened.cache_clear()
    yield
    gin.clear_config()


def settings(data):
    return [f"--gin.DATA_DIR={data}", "--gin.VOCABULARY=bytes"]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    place = tmp_path_factory.mktemp("data")
    samples.write(place)
    return place


def prepare(capsys, *arguments):
    code = main.main(["data", "prepare", *arguments])
    return code, capsys.readouterr()


def caches(folder):
    """Content of every file of a folder of caches, by name."""
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file()
    }


def test_prepared_once_and_skipping_nothing(tmp_path, data, capsys):
    code, printed = prepare(capsys, *NAMES, *settings(data), "--json")
    found = json.loads(printed.out)
    assert code == 0
    assert found["skipped"] == []
    assert {task["task"] for task in found["tasks"]} >= {"p3_cldr_month"}
    assert all(task["written"] for task in found["tasks"])
    assert re.search(r"prepare: (\d+)/\1 tasks, \d+ rows, \S+ rows/s, 0:00 left", printed.err)
    made = caches(tmp_path / "cache")
    ids.opened.cache_clear()
    _, printed = prepare(capsys, *NAMES, *settings(data), "--json")
    again = json.loads(printed.out)
    assert not any(task["written"] for task in again["tasks"])
    assert again["rows"] == found["rows"]
    assert caches(tmp_path / "cache") == made


def test_names_and_splits_come_from_settings(data, capsys):
    arguments = ["--gin_file", "samples/p3.gin", f"--gin.DATA_DIR={data}", "--gin.MIXTURE=p3_t0"]
    code, printed = prepare(capsys, *arguments, "--splits", "validation", "--json")
    tasks = json.loads(printed.out)["tasks"]
    assert code == 0
    assert {split for task in tasks for split in task["rows"]} == {"validation"}
    assert len(tasks) >= 2 * samples.TRAIN_TASKS + samples.TEST_TASKS  # EVAL_MIXTURES too


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "Nothing to prepare: name mixtures or tasks"),
        (["p3_t1"], "No task or mixture is called 'p3_t1'.*Did you mean 'p3_t0"),
        (["p3_t0", "--splits", "trian"], "No task has a split 'trian'.*Did you mean 'train'"),
        (["p3_t0", "--processes", "0"], "--processes is 0"),
    ],
)
def test_mistakes(data, capsys, arguments, message):
    code, printed = prepare(capsys, *arguments, *settings(data))
    assert code == main.USER_ERROR
    (line,) = printed.err.splitlines()
    assert re.search(message, line)


def test_bad_rows_are_told(tmp_path, capsys):
    samples.write(tmp_path)
    task = sorted(p3.names.of_folder(tmp_path / "p3").training[0].tasks)[0]
    (path,) = records.split_files(tmp_path / "p3" / task, "train")
    path.write_bytes(path.read_bytes()[:-20])
    code, printed = prepare(capsys, f"p3_{task}", *settings(tmp_path))
    assert code == main.USER_ERROR
    assert f"{path.name}, row " in printed.err
    for _ in range(2):  # when they are made, and when they are there
        ids.opened.cache_clear()
        p3.row_store.bad_rows._skipped.clear()
        code, printed = prepare(capsys, "p3_t0", *settings(tmp_path), "--gin.BAD_ROWS=skip")
        assert code == 0
        assert f"skipped 1 rows of {path}: the file is damaged from here on" in printed.out


def start(data, cache, *arguments):
    return subprocess.Popen(
        [sys.executable, "-m", "moe_peft", "data", "prepare", "p3_t0"]
        + ["--gin_file", "samples/p3.gin", *settings(data), *arguments],
        env={**os.environ, "MOE_PEFT_CACHE": str(cache), "JAX_PLATFORMS": "cpu"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def large(data, rows):
    """The samples' records with one task of many rows, in the middle of the alphabet."""
    samples.write(data)
    task = sorted(p3.names.of_folder(data / "p3").training[2].tasks)[0]
    record = next(records.read(data / "p3" / task, "train"))
    for path in (data / "p3" / task).iterdir():
        path.unlink()
    (data / "p3" / task).rmdir()
    p3_writing.write_task(data / "p3" / task, {"train": [record] * rows}, "tfrecord")
    return task


@pytest.mark.slow
@pytest.mark.parametrize("processes", ["1", "2"])
def test_a_killed_preparation_goes_on(tmp_path, processes):
    task = large(tmp_path / "data", 20_000)
    cache = tmp_path / "killed" / "p3"
    process = start(tmp_path / "data", cache.parent, "--processes", processes)
    while not any(path.stat().st_size > 100_000 for path in cache.glob("*.tmp/inputs.bin")):
        assert process.poll() is None, process.stdout.read()
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    process.stdout.close()
    deadline = time.monotonic() + 20  # those it has started end by themselves
    while processes != "1" and time.monotonic() < deadline:
        owners = {path.name.split("-")[-2] for path in cache.glob("*.tmp")}
        if not any(pathlib.Path(f"/proc/{owner}").exists() for owner in owners):
            break
        time.sleep(0.1)
    finished = {
        path.name: path.stat().st_mtime_ns for path in cache.glob("*-*") if path.suffix == ""
    }
    assert finished
    assert not any(name.startswith(task) for name in finished)
    assert list(cache.glob("*.tmp"))
    for folder in (cache.parent, tmp_path / "whole"):
        process = start(tmp_path / "data", folder, "--processes", processes)
        printed, _ = process.communicate()
        assert process.returncode == 0, printed
    assert not list(cache.glob("*.tmp"))
    assert caches(cache.parent) == caches(tmp_path / "whole")
    assert finished.items() <= {p.name: p.stat().st_mtime_ns for p in cache.iterdir()}.items()


@pytest.mark.slow
def test_a_bad_row_in_another_process_is_one_line(tmp_path):
    task = large(tmp_path / "data", 10)
    (path,) = records.split_files(tmp_path / "data" / "p3" / task, "train")
    path.write_bytes(path.read_bytes()[:-20])
    process = start(tmp_path / "data", tmp_path / "cache", "--processes", "2")
    printed, _ = process.communicate()
    assert process.returncode == main.USER_ERROR
    assert f"{path}, row 9: the file is damaged from here on" in printed.splitlines()[-1]


def test_what_a_dead_process_left_is_removed(tmp_path):
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    host = cache.owner().removesuffix(f"{os.getpid()}-")
    names = [
        f"{host}{dead.pid}-abc.tmp",
        f"{host}{os.getppid()}-abc.tmp",
        f"other-{dead.pid}-x.tmp",
    ]
    for name in names:
        (tmp_path / name).mkdir()
    row_store.stored(tmp_path, "x", (), lambda: ())
    assert {path.name for path in tmp_path.glob("*.tmp")} == set(names[1:])


def test_memory_does_not_grow_with_rows(tmp_path):
    def peak(count):
        line = row_store.Line(np.arange(50), np.arange(5), ("yes", "no"))
        tracemalloc.start()
        found = row_store.stored(tmp_path, "x", (count,), lambda: (line for _ in range(count)))
        _, most = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        assert len(found) == count
        assert found.answer_choices[count - 1] == ("yes", "no")
        return most

    few = peak(2_000)
    assert peak(20_000) < 1.2 * few


def test_time_left(monkeypatch):
    now = [100.0]
    monkeypatch.setattr(progress_lib.time, "monotonic", lambda: now[0])
    progress = progress_lib.Rows("prepare", 3, 1000)
    progress.task(200, was_there=True)
    now[0] = 110.0
    progress.rows(200)
    assert progress.text() == "prepare: 1/3 tasks, 200 rows, 20 rows/s, 0:30 left"
    progress = progress_lib.Rows("prepare", 4, 0)
    progress.task(5, was_there=True)
    progress.task(5, was_there=False)
    now[0] = 120.0
    assert progress.text() == "prepare: 2/4 tasks, 0 rows, 0:20 left"
