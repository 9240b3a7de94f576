"""Boards next to metrics.jsonl: with stand-ins of their libraries, and with the real ones."""

import json
import pathlib
import struct
import sys
import time

import pytest

from moe_peft import errors
from moe_peft.training import boards, loop, metrics_writer

STAND_IN = '''
"""Stands in for {name}: notes every call in calls.jsonl."""
import json, os, pathlib, types

def note(*call):
    with (pathlib.Path(__file__).parent / "calls.jsonl").open("a") as file:
        file.write(json.dumps(call) + "\\n")
    if call[0] == os.environ.get("STAND_IN_FAILS"):
        raise RuntimeError("no route\\nto host")
'''

WANDB = (
    STAND_IN.format(name="wandb")
    + """
class Settings:
    def __init__(self, quiet, finish_timeout, finish_timeout_raises):
        pass

def init(id, name, dir, config, project, resume, allow_val_change, reinit, settings):
    note("init", id, name, dir, config, project)
    return Run(id or "new-id")

class Run:
    url, offline = "https://wandb.test/run", False

    def __init__(self, id):
        self.id = id

    def log(self, metrics, step):
        note("log", step, metrics)

    def finish(self, exit_code):
        note("finish", exit_code)
"""
)


@pytest.fixture(autouse=True)
def no_settings_of_the_caller(monkeypatch):
    for name in ("WANDB_PROJECT", "MLFLOW_TRACKING_URI", "MLFLOW_EXPERIMENT_NAME"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def wandb_calls(tmp_path_factory, monkeypatch):
    """Puts a stand-in for wandb in the way; returns a function that empties its list of calls."""
    folder = tmp_path_factory.mktemp("library")
    (folder / "wandb.py").write_text(WANDB)
    monkeypatch.delitem(sys.modules, "wandb", raising=False)
    monkeypatch.syspath_prepend(folder)

    def calls():
        lines = (folder / "calls.jsonl").read_text().splitlines()
        (folder / "calls.jsonl").unlink()
        return [json.loads(line) for line in lines]

    yield calls
    sys.modules.pop("wandb", None)


def write(folder, steps, resumed_step=0, log_to=("wandb",), is_complete=True, say=print):
    """Writes a loss of each step; returns how to look."""
    description = {"method": {"name": "mov", "rules": [{"side": "inputs"}]}, "seed": 0}
    with metrics_writer.MetricsWriter(folder, resumed_step, log_to, description, say) as writer:
        for step in steps:
            writer.write(step, {"loss": 1.0 / step})
            writer.write_to_boards(step, {"steps_per_second": 2.0})
        return writer.close(is_complete) if is_complete else None


def test_a_run_is_named_by_its_folder_and_described(wandb_calls, tmp_path):
    assert write(tmp_path, [1, 2]) == ["look at: https://wandb.test/run"]
    config = {"method.name": "mov", "method.rules.0.side": "inputs", "seed": 0}
    assert wandb_calls() == [
        ["init", None, tmp_path.name, str(tmp_path), config, "moe_peft"],
        ["log", 1, {"loss": 1.0}],
        ["log", 1, {"steps_per_second": 2.0}],
        ["log", 2, {"loss": 0.5}],
        ["log", 2, {"steps_per_second": 2.0}],
        ["finish", 0],
    ]
    assert metrics_writer.read(tmp_path) == [{"step": 1, "loss": 1.0}, {"step": 2, "loss": 0.5}]


def test_a_resumed_run_goes_on_in_its_run_and_writes_no_step_twice(wandb_calls, tmp_path):
    write(tmp_path, [1, 2, 3], is_complete=False)
    assert wandb_calls()[-1] == ["finish", 1]
    for stop in (2, 5):  # The second life ends before it gets as far as the first.
        write(tmp_path, range(2, stop + 1), resumed_step=1, is_complete=False)
        opened, *logged, _ = wandb_calls()
        assert opened[1] == "new-id"
        assert [step for _, step, _ in logged] == ([] if stop == 2 else [4, 4, 5, 5])
    write(tmp_path, [1])  # From the beginning: another run.
    assert wandb_calls()[0][1] is None


@pytest.mark.parametrize(("call", "num_calls"), [("init", 1), ("log", 2), ("finish", 6)])
def test_a_board_that_fails_is_left_out(wandb_calls, tmp_path, monkeypatch, call, num_calls):
    monkeypatch.setenv("STAND_IN_FAILS", call)
    said = []
    found = write(tmp_path, [1, 2], log_to=("wandb", "tensorboard"), say=said.append)
    why = "(RuntimeError: no route to host)"
    assert said == [f"WARNING: wandb failed, and the run goes on without it {why}."]
    assert found == [f"look with: tensorboard --logdir {tmp_path}/tensorboard"]
    assert len(wandb_calls()) == num_calls
    assert len(metrics_writer.read(tmp_path)) == 2
    (events,) = (tmp_path / "tensorboard").iterdir()
    assert events.read_bytes().count(b"steps_per_second") == 2


def test_no_board(tmp_path):
    assert write(tmp_path, [1], log_to=()) == []
    assert [path.name for path in tmp_path.iterdir()] == [metrics_writer.FILE_NAME]


def test_other_processes_write_nothing(tmp_path):
    with metrics_writer.Silent(tmp_path, 0, ("tensorboard",), {}, print) as writer:
        writer.write(1, {"loss": 1.0})
        writer.write_to_boards(1, {"loss": 1.0})
        assert writer.close(is_complete=True) == []
    assert list(tmp_path.iterdir()) == []


def test_a_text_names_boards_too(wandb_calls):
    assert boards.chosen("wandb") == ("wandb",)
    assert boards.chosen("tensorboard, wandb,tensorboard") == ("tensorboard", "wandb")
    assert boards.chosen("") == ()


def test_an_unknown_board_is_refused():
    with pytest.raises(errors.UserError, match="log_to is 'wandbb'.*Did you mean 'wandb'"):
        loop.Settings(num_steps=1, batch_size=1, log_to=("wandbb",))


@pytest.mark.parametrize("has_folder", [False, True])
def test_a_library_that_is_missing_is_refused(tmp_path, monkeypatch, has_folder):
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    monkeypatch.delitem(sys.modules, "wandb", raising=False)
    if has_folder:  # W&B itself makes such a folder.
        (tmp_path / "wandb").mkdir()
    words = 'log_to is .*, and wandb is not installed.*`pip install "moe-peft-jax\\[wandb\\]"`'
    with pytest.raises(errors.UserError, match=words):
        loop.Settings(num_steps=1, batch_size=1, log_to="tensorboard,wandb")


def test_a_run_with_other_boards_leaves_the_same_metrics(toy, wandb_calls, tmp_path, capsys):
    for name, log_to in (("plain", ()), ("logged", "tensorboard,wandb")):
        toy.fit(tmp_path / name, 3, log_to=log_to)
        said = capsys.readouterr().err
    path = pathlib.Path(metrics_writer.FILE_NAME)
    assert (tmp_path / "logged" / path).read_bytes() == (tmp_path / "plain" / path).read_bytes()
    assert said.splitlines()[-2:] == [
        f"look with: tensorboard --logdir {tmp_path}/logged/tensorboard",
        "look at: https://wandb.test/run",
    ]
    opened, line, rate, _ = wandb_calls()
    assert opened[4]["model.width"] == toy.WIDTH
    assert opened[4]["method.name"] == "toy"
    (expected,) = metrics_writer.read(tmp_path / "plain")
    assert line == ["log", expected.pop("step"), expected]
    assert rate[2].keys() == {"steps_per_second"}


# With the libraries themselves: pip install "moe-peft-jax[wandb,mlflow]"


@pytest.mark.filterwarnings("ignore")
def test_wandb_offline(tmp_path, monkeypatch):
    pytest.importorskip("wandb", reason='needs pip install "moe-peft-jax[wandb]"')
    monkeypatch.setenv("WANDB_MODE", "offline")
    said = []
    write(tmp_path, [1, 2, 3], is_complete=False, say=said.append)
    assert write(tmp_path, [2, 3, 4], resumed_step=1, say=said.append) == [
        f"upload with: wandb sync {tmp_path}/wandb"
    ]
    assert said == []
    identity = json.loads((tmp_path / "wandb.json").read_text())
    first, second = sorted((tmp_path / "wandb").glob(f"offline-run-*/run-{identity['id']}.wandb"))
    assert _logged_to_wandb(first) == [(1, 1.0), (2, 0.5), (3, 1 / 3)]
    until = time.monotonic() + 20.0  # W&B's own process may write a moment after `finish`.
    while not (found := _logged_to_wandb(second)) and time.monotonic() < until:
        time.sleep(0.1)
    assert found == [(4, 0.25)]


def _logged_to_wandb(path):
    """The steps and losses of a W&B file: behind 7 bytes, records with their lengths."""
    from wandb.proto import wandb_internal_pb2

    content, start, found = path.read_bytes(), 7, []
    assert len(content) < 32_768  # one block
    while start < len(content):
        _, size, _ = struct.unpack_from("<IHB", content, start)
        start += 7 + size
        record = wandb_internal_pb2.Record.FromString(content[start - size : start])
        if record.HasField("history"):
            items = record.history.item
            values = {item.nested_key[0]: json.loads(item.value_json) for item in items}
            found.append((values["_step"], values["loss"]))
            assert values["steps_per_second"] == 2.0
        if record.HasField("run"):
            keys = {update.key for update in record.run.config.update}
            assert {"method.name", "method.rules.0.side", "seed"} < keys
            assert record.run.project == "moe_peft"
    return found


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("is_elsewhere", [False, True])
def test_mlflow_in_a_file(tmp_path, monkeypatch, is_elsewhere):
    mlflow = pytest.importorskip("mlflow", reason='needs pip install "moe-peft-jax[mlflow]"')
    pytest.importorskip("sqlalchemy", reason='needs pip install "moe-peft-jax[mlflow]"')
    folder, place = tmp_path / "run", tmp_path / "run" / "mlflow.db"
    folder.mkdir()
    if is_elsewhere:
        place = tmp_path / "other.db"
        monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{place}")
    said = []
    write(folder, [1, 2, 3], log_to="mlflow", is_complete=False, say=said.append)
    client = mlflow.MlflowClient(f"sqlite:///{place}")
    (experiment,) = client.search_experiments(filter_string="name = 'moe_peft'")
    (run,) = client.search_runs([experiment.experiment_id])
    assert (run.info.run_name, run.info.status) == ("run", "FAILED")
    assert run.data.params == {"method.name": "mov", "method.rules.0.side": "inputs", "seed": "0"}
    assert write(folder, [2, 3, 4], 1, "mlflow", say=said.append) == [
        f"look with: mlflow ui --backend-store-uri sqlite:///{place}"
    ]
    assert said == []
    (again,) = client.search_runs([experiment.experiment_id])
    assert (again.info.run_id, again.info.status) == (run.info.run_id, "FINISHED")
    points = client.get_metric_history(run.info.run_id, "loss")
    assert [(point.step, point.value) for point in points] == [(s, 1 / s) for s in (1, 2, 3, 4)]
    assert (folder / "mlflow.db").exists() is not is_elsewhere


def test_tensorboard_does_without_torch(tmp_path, monkeypatch):
    (tmp_path / "torch.py").write_text("raise RuntimeError('torch is imported')")
    monkeypatch.syspath_prepend(tmp_path)
    for name in [name for name in sys.modules if name.split(".")[0] in ("torch", "tensorboardX")]:
        monkeypatch.delitem(sys.modules, name)
    boards.BOARDS["tensorboard"](tmp_path, 0, {}).close(True)
    assert "torch" not in sys.modules
