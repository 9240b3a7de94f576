"""Monitors look on: training stays what it is, and records survive interruptions."""

import dataclasses
import json
import shutil

import jax
import numpy as np
import pytest

from moe_peft import errors
from moe_peft.training import metrics_writer
from moe_peft.training.monitors import base
from moe_peft.weights import saved_run

pytestmark = pytest.mark.usefixtures("compiled_once")

STEPS = 11


@dataclasses.dataclass(frozen=True)
class Norm:
    """Records the norm of lora_b, and what it was given."""

    name: str = "norm"
    period: int = 4

    def start(self, run):
        assert run.method.name == "toy"
        assert run.trainable["first"]["adapter"]["lora_b"].shape == (2, 6)
        assert run.data == {"seed": 0}

        def watch(step, frozen, trainable):
            assert set(frozen) == {"first", "second"}
            norm = float(np.linalg.norm(trainable["first"]["adapter"]["lora_b"]))
            base.append(run.folder, self.name, step, {"squared": norm**2})
            return {"lora_b": norm}

        return watch


@pytest.fixture(scope="module")
def whole(toy, tmp_path_factory, compiled_once):
    folder = tmp_path_factory.mktemp("whole")
    return folder, toy.fit(folder, STEPS, monitors=(Norm(),))


def _files(folder):
    return {
        path.name: path.read_bytes()
        for path in (folder / metrics_writer.FILE_NAME, folder / "monitors" / "norm.jsonl")
    }


def test_scalars_and_records_every_period_and_at_the_end(whole):
    folder, result = whole
    lines = {
        line["step"]: line["norm/lora_b"]
        for line in metrics_writer.read(folder)
        if "norm/lora_b" in line
    }
    assert list(lines) == [4, 8, 11]
    last = float(np.linalg.norm(result.state.trainable["first"]["adapter"]["lora_b"]))
    assert lines[11] == last
    records = base.read(folder, "norm")
    assert [record["step"] for record in records] == [4, 8, 11]
    assert records[-1]["squared"] == last**2
    board = b"".join(path.read_bytes() for path in (folder / "tensorboard").iterdir())
    assert board.count(b"norm/lora_b") == 3


def test_training_is_the_same_without_monitors(toy, whole, tmp_path):
    folder, result = whole
    plain = toy.fit(tmp_path, STEPS)
    jax.tree.map(np.testing.assert_array_equal, plain.state, result.state)
    watched = [line for line in metrics_writer.read(folder) if "norm/lora_b" not in line]
    assert watched == metrics_writer.read(tmp_path)


def test_resumed_run_leaves_the_bytes_of_an_uninterrupted_one(toy, whole, tmp_path):
    folder = tmp_path / "stopped"
    shutil.copytree(whole[0], folder)
    shutil.rmtree(folder / saved_run.FOLDER / str(STEPS))
    with (folder / "monitors" / "norm.jsonl").open("a") as file:
        file.write('{"step": 12, "squ')  # Killed in the middle of a line.
    toy.fit(folder, STEPS, monitors=(Norm(),))
    assert _files(folder) == _files(whole[0])


def test_records_of_a_monitor_left_out_do_not_outlive_their_steps(toy, whole, tmp_path):
    folder = tmp_path / "stopped"
    shutil.copytree(whole[0], folder)
    shutil.rmtree(folder / saved_run.FOLDER / str(STEPS))
    toy.fit(folder, STEPS)
    assert [record["step"] for record in base.read(folder, "norm")] == [4, 8]


@pytest.mark.parametrize(
    ("given", "expected"),
    [((Norm(), Norm(period=2)), "more than once"), ((Norm(period=0),), "expected 1 or more")],
)
def test_wrong_monitors_are_refused_before_compiling(toy, tmp_path, given, expected):
    with pytest.raises(errors.UserError, match=expected):
        toy.fit(tmp_path, STEPS, monitors=given)
    assert not (tmp_path / metrics_writer.FILE_NAME).exists()


def test_not_finite_is_reported_as_the_steps_error(toy, tmp_path):
    def batches(start):
        yield from (toy.batch(i) | ({"y": np.full(8, np.nan, "f4")} if i else {}) for i in range(9))

    with pytest.raises(errors.UserError, match="Step 2: .* is not finite"):
        toy.fit(tmp_path, 9, open_batches=batches, monitors=(Norm(period=1),), log_period=9)
    assert [record["step"] for record in base.read(tmp_path, "norm")] == [1]


def test_a_line_that_is_being_written_is_not_read(tmp_path):
    base.append(tmp_path, "x", 1, {"a": 2})
    with (tmp_path / "monitors" / "x.jsonl").open("a") as file:
        file.write(json.dumps({"step": 2})[:-3])
    assert base.read(tmp_path, "x") == [{"step": 1, "a": 2}]
    assert base.read(tmp_path, "never") == []
    (tmp_path / "monitors" / "x.jsonl").write_text("{]\n")
    with pytest.raises(errors.UserError, match="cannot be read"):
        base.read(tmp_path, "x")
