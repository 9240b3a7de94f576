"""Metrics file, prefetching, progress, signals and folders, one by one."""

import json
import shutil
import threading
import time

import pytest
import rich.console

from moe_peft import errors
from moe_peft.runtime import prefetch, progress, run_folder
from moe_peft.training import metrics_writer


def test_metrics_after_the_resumed_step_and_half_lines_are_dropped(tmp_path):
    path = tmp_path / metrics_writer.FILE_NAME
    lines = [json.dumps({"loss": float(step), "step": step}) for step in (1, 2, 3)]
    path.write_text("\n".join(lines) + '\n{"loss": 4.0, "st')
    with metrics_writer.MetricsWriter(tmp_path, resumed_step=2) as writer:
        writer.write(3, {"loss": 7.0})
    assert [line["loss"] for line in metrics_writer.read(tmp_path)] == [1.0, 2.0, 7.0]
    # No line lost its bytes: what was kept is as it was.
    assert path.read_text().startswith("\n".join(lines[:2]) + "\n")


def test_fresh_run_drops_everything(tmp_path):
    (tmp_path / metrics_writer.FILE_NAME).write_text('{"step": 1}\n')
    with metrics_writer.MetricsWriter(tmp_path):
        pass
    assert metrics_writer.read(tmp_path) == []


def test_prefetch_keeps_order_and_ends():
    with prefetch.Prefetch(iter(range(7)), lambda x: 2 * x) as batches:
        assert list(batches) == [0, 2, 4, 6, 8, 10, 12]


def test_prefetch_stays_few_batches_ahead():
    taken = []

    def source():
        for index in range(100):
            taken.append(index)
            yield index

    with prefetch.Prefetch(source(), lambda x: x, depth=2) as batches:
        next(batches)
        time.sleep(0.3)
        assert len(taken) <= 4
    threads = [thread for thread in threading.enumerate() if "_fill" in thread.name]
    assert not threads


def test_prefetch_raises_in_its_turn():
    def source():
        yield 1
        raise errors.UserError("row 2 is empty")

    with prefetch.Prefetch(source(), lambda x: x) as batches:
        assert next(batches) == 1
        with pytest.raises(errors.UserError, match="row 2"):
            next(batches)


def test_bar_shows_step_rate_time_left_and_loss():
    console = rich.console.Console(force_terminal=True, width=120, record=True)
    bar = progress.Steps(100, console=console)
    bar.update(11)
    bar.report(40, 1.25, 2.0)
    bar.say("half way [not markup]")
    bar.close()
    shown = console.export_text()
    for words in ("40/100", "2.00 steps/s", "0:30 left", "loss 1.2500", "half way [not markup]"):
        assert words in shown


def test_lines_show_the_same(capsys):
    lines = progress.Steps(100)
    lines.update(39)
    lines.report(40, 1.25, 2.0)
    lines.report(1, 1.25, 0.0)
    assert capsys.readouterr().err.splitlines() == [
        "step 40/100  loss 1.2500  2.00 steps/s  0:30 left",
        "step 1/100  loss 1.2500",
    ]


def test_space_is_checked_against_what_is_free(tmp_path):
    free = shutil.disk_usage(tmp_path).free
    run_folder.check_space(tmp_path, 1_000, 3)
    with pytest.raises(errors.UserError, match="2 checkpoints of .*GB need .*GB. Make room"):
        run_folder.check_space(tmp_path, free, 2)


def test_probe_leaves_only_the_lock(tmp_path):
    with run_folder.locked(tmp_path / "new" / "run") as folder:
        assert [path.name for path in folder.iterdir()] == [".lock"]


def test_other_processes_show_nothing(capsys):
    lines = progress.Steps(100, is_silent=True)
    lines.report(40, 1.25, 2.0)
    lines.say("a word")
    lines.close()
    assert capsys.readouterr().err == ""


def test_a_counter_that_fails_does_not_say_that_it_is_done(capsys):
    with pytest.raises(ZeroDivisionError), progress.shown("toy", 3) as counter:
        counter.advance(1 / 0)
    assert capsys.readouterr().err == ""


def test_a_terminal_shows_rows_and_time_left(monkeypatch):
    now = [100.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    console = rich.console.Console(force_terminal=True, width=120, record=True)
    with progress.Rows("prepare", 2, 1_000, console=console) as rows:
        now[0] = 110.0
        rows.rows(200)
        rows.task(200, was_there=False)
    assert "prepare: 1/2 tasks, 200 rows, 20 rows/s, 0:40 left" in console.export_text()
