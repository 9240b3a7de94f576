import contextlib
import os
import shutil
import signal
import subprocess

import jax
import numpy as np
import pytest

from moe_peft import errors, methods
from moe_peft.runtime import host_memory, run_folder
from moe_peft.training import checkpoints, logbook, loop, metrics_writer, optimizers, restore
from moe_peft.training import start as start_lib
from moe_peft.weights import backbone, identity, saved_run

pytestmark = pytest.mark.usefixtures("compiled_once")

STEPS = 11  # Not a multiple of any period.


def _assert_same(a, b):
    jax.tree.map(np.testing.assert_array_equal, a, b)


def _metrics(folder):
    return (folder / metrics_writer.FILE_NAME).read_bytes()


@pytest.fixture(scope="module")
def whole(toy, tmp_path_factory, compiled_once):
    """A run that was never interrupted: (folder, result)."""
    folder = tmp_path_factory.mktemp("whole")
    return folder, toy.fit(folder, STEPS, eval_hook=_hook)


def _hook(step, params):
    return {"step_plus_norm": step + float(np.linalg.norm(params["first"]["adapter"]["lora_a"]))}


@pytest.fixture
def stopped(whole, tmp_path):
    """A copy of the run as it was after step 8, four lines of metrics too far."""
    folder = tmp_path / "stopped"
    shutil.copytree(whole[0], folder)
    shutil.rmtree(folder / saved_run.FOLDER / str(STEPS))
    return folder


def test_resumed_run_is_bit_identical(toy, whole, stopped):
    folder, result = whole
    resumed = toy.fit(stopped, STEPS, eval_hook=_hook)
    _assert_same(result.state, resumed.state)
    assert _metrics(folder) == _metrics(stopped)
    assert saved_run.steps(stopped) == saved_run.steps(folder) == [4, 8, 11]


def test_damaged_newest_checkpoint_falls_back_loudly(toy, whole, stopped, capfd):
    (stopped / saved_run.FOLDER / "8" / "record" / "metadata").write_text("{")
    resumed = toy.fit(stopped, STEPS, eval_hook=_hook)
    _assert_same(whole[1].state, resumed.state)
    assert _metrics(whole[0]) == _metrics(stopped)
    said = capfd.readouterr().err
    assert "WARNING: the checkpoint of step 8 is damaged" in said
    assert "going on from step 4" in said


def test_finished_run_makes_no_further_step(toy, whole, tmp_path):
    shutil.copytree(whole[0], tmp_path / "again")
    again = toy.fit(tmp_path / "again", STEPS, eval_hook=_hook)
    _assert_same(whole[1].state, again.state)
    assert _metrics(whole[0]) == _metrics(tmp_path / "again")


def test_metrics_lines(whole):
    lines = metrics_writer.read(whole[0])
    train_steps = [line["step"] for line in lines if "loss" in line]
    eval_steps = [line["step"] for line in lines if "eval/step_plus_norm" in line]
    assert train_steps == [3, 6, 9, 11]
    assert eval_steps == [5, 10, 11]
    names = {"loss", "nll", "z_loss", "accuracy", "exact_match", "tokens", "targets", "examples"}
    names |= {"grad_norm", "param_norm", "learning_rate/adapters", "step"}
    assert set(lines[0]) == names
    assert lines[0]["examples"] == 3 * 8
    assert lines[-2]["examples"] == 2 * 8
    assert next((whole[0] / "tensorboard").glob("events*")).stat().st_size > 0


def test_checkpoint_holds_no_frozen_leaf(whole, toy):
    saved = checkpoints.load_newest(whole[0])
    assert set(saved.trainable["first"]) == {"adapter"}
    assert set(saved.trainable) == {"first"}
    assert len(saved.position["opt_state"]) == 2 * 2 + 2  # Adam's moments and two counts
    assert saved.record["batches_consumed"] == STEPS
    assert saved.record["moe_peft_version"]
    assert saved.description["method"] == identity.as_json(toy.ADAPTED.describe())


def test_lines_when_not_a_terminal(toy, tmp_path, capfd):
    toy.fit(tmp_path, 3)
    lines = capfd.readouterr().err.splitlines()
    assert lines[0].startswith("compiled and made the first step in ")
    assert lines[-1] == f"look with: tensorboard --logdir {tmp_path}/tensorboard"
    assert lines[-2].startswith("step 3/3  loss ")
    assert "steps/s" in lines[-2]
    assert "\x1b" not in "".join(lines)


def test_full_trains_everything_and_becomes_a_backbone(toy, tmp_path):
    result = toy.fit(tmp_path, 2, method=methods.full())
    assert result.frozen == {}
    base_shapes = jax.eval_shape(lambda: result.state.trainable)
    loaded = backbone.load(f"run:{tmp_path}@2", base_shapes, None)
    _assert_same(loaded.params, result.state.trainable)


def test_bfloat16_frozen_weights_leave_trainable_ones_float32(toy, tmp_path):
    result = toy.fit(tmp_path, 1, frozen_dtype="bfloat16")
    assert {leaf.dtype.name for leaf in jax.tree.leaves(result.frozen)} == {"bfloat16"}
    assert {leaf.dtype.name for leaf in jax.tree.leaves(result.state.trainable)} == {"float32"}


OTHER_METHOD = methods.Method("other", trainable=".*/lora_a")


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        ({"method": OTHER_METHOD}, "another method: name is 'toy' in the checkpoint and 'other'"),
        ({"backbone": "random:8"}, "another backbone: fingerprint is"),
        ({"frozen_dtype": "bfloat16"}, "another backbone: frozen_dtype is 'float32'"),
        (
            {"described": {"model": {"width": 7}, "data": {"seed": 0}}},
            "another model config: width is 6 in the checkpoint and 7 here",
        ),
        (
            {"described": {"model": {"width": 6}, "data": {"seed": 1}}},
            "other data: seed is 0 in the checkpoint and 1 here",
        ),
    ],
)
def test_checkpoints_of_another_run_are_refused(toy, stopped, overrides, words):
    with pytest.raises(errors.UserError, match=words):
        toy.fit(stopped, STEPS, **overrides)
    assert saved_run.steps(stopped) == [4, 8]


def test_another_optimizer_is_refused_and_another_rate_is_said(toy, stopped, capfd):
    with pytest.raises(errors.UserError, match="does not fit this run.*another optimiser"):
        toy.fit(stopped, STEPS, optimizer=optimizers.adafactor(1e-2))
    toy.fit(stopped, 9, optimizer=optimizers.adamw(1e-3))
    assert "WARNING: the optimiser was changed: learning_rates" in capfd.readouterr().err


def test_other_groups_without_decay_are_said(toy, stopped, capfd):
    toy.fit(stopped, 9, optimizer=toy.adamw(no_decay_groups=()))
    said = capfd.readouterr().err
    assert (
        "WARNING: the optimiser was changed: no_decay_groups is None in the checkpoint and [] here"
        in said
    )


def test_trained_parameters_load_for_evaluation(toy, whole):
    shapes = {"x": (1, toy.WIDTH)}
    start = start_lib.Start(toy.MODEL, toy.BASE_MODEL, toy.ADAPTED, shapes)
    params, step = restore.params(start, "random:7", whole[0])
    assert step == STEPS
    _assert_same(params["first"]["adapter"], whole[1].state.trainable["first"]["adapter"])
    _assert_same(params["second"], whole[1].frozen["second"])
    with pytest.raises(errors.UserError, match="another backbone"):
        restore.params(start, "random:8", whole[0])
    fresh, step = restore.params(start, "random:7", None)
    assert step == 0
    _assert_same(fresh["second"], params["second"])


def test_nan_stops_with_step_and_leaf_and_keeps_the_last_checkpoint(toy, tmp_path):
    def batches(start):
        for index, batch in enumerate(toy.open_batches(start), start=start):
            bad = np.full_like(batch["y"], np.nan)
            yield {**batch, "y": bad} if index == 6 else batch

    with pytest.raises(logbook.NonFiniteError) as caught:
        toy.fit(tmp_path, STEPS, open_batches=batches, log_period=100)
    message = str(caught.value)
    assert message.startswith("Step 7: the gradient of first/adapter/lora_a is not finite")
    assert "last good checkpoint is that of step 4" in message
    assert "\n" not in message
    assert checkpoints.load_newest(tmp_path).step == 4


def test_nothing_to_train_is_refused(toy, tmp_path):
    with pytest.raises(errors.UserError, match="'frozen' trains nothing"):
        toy.fit(tmp_path, 1, method=methods.frozen())


def test_memory_of_a_step_is_kept_for_the_next(toy, tmp_path, monkeypatch):
    steps = []
    monkeypatch.setattr(host_memory.Kept, "after_step", lambda memory: steps.append(memory))
    toy.fit(tmp_path, 3)
    assert len(steps) == 3


def test_empty_data_is_refused(toy, tmp_path):
    with pytest.raises(errors.UserError, match="ended before step 1.*empty"):
        toy.fit(tmp_path, 1, open_batches=lambda start: iter(()))


def test_error_of_the_data_arrives(toy, tmp_path):
    def broken(start):
        del start
        raise errors.UserError("no such task")
        yield

    with pytest.raises(errors.UserError, match="no such task"):
        toy.fit(tmp_path, 1, open_batches=broken)


@pytest.mark.parametrize("name", ["num_steps", "keep", "log_period", "checkpoint_period"])
def test_zero_is_refused(name):
    with pytest.raises(errors.UserError, match=f"{name} is 0; expected 1 or more"):
        loop.Settings(**({"num_steps": 1, "batch_size": 1} | {name: 0}))


def _never(*args):
    raise AssertionError("this must not be reached")


def test_folder_that_cannot_be_made(toy, tmp_path):
    file = tmp_path / "file"
    file.write_text("")
    with pytest.raises(errors.UserError, match="Cannot write to the folder .*MODEL_DIR"):
        toy.fit(file / "run", 1, open_batches=_never)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_read_only_folder(toy, tmp_path):
    tmp_path.chmod(0o500)
    with pytest.raises(errors.UserError, match="Permission denied"):
        toy.fit(tmp_path / "run", 1, open_batches=_never)


def test_full_disk_is_seen_before_anything_is_loaded(toy, tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)._replace(free=100)
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: usage)
    monkeypatch.setattr(backbone, "load", _never)
    with pytest.raises(errors.UserError, match="has 0.1 kB left, but 4 checkpoints"):
        toy.fit(tmp_path, STEPS)


@pytest.fixture
def small_disk(tmp_path):
    """A file system of three megabytes."""
    command = ["mount", "-t", "tmpfs", "-o", "size=3m", "tmpfs", str(tmp_path)]
    if os.geteuid() or subprocess.run(command, check=False, capture_output=True).returncode:
        pytest.skip("needs the right to mount")
    yield tmp_path
    subprocess.run(["umount", "--lazy", str(tmp_path)], check=True)


# A save that fails leaves tasks in orbax's event loop; Python reports them when it collects them.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_disk_that_fills_up_while_saving(toy, small_disk, capfd):
    def batches(start):
        for index, batch in enumerate(toy.open_batches(start), start=start):
            if index == 14:
                with contextlib.suppress(OSError), (small_disk / "filler").open("wb") as file:
                    while True:
                        file.write(bytes(4096))
                        file.flush()
            yield batch

    with pytest.raises(errors.UserError, match="No space left on device") as caught:
        toy.fit(small_disk / "run", 30, open_batches=batches, log_period=100, keep=1)
    assert "\n" not in str(caught.value)
    assert "Traceback" not in capfd.readouterr().err
    (small_disk / "filler").unlink()
    left = saved_run.steps(small_disk / "run")
    assert left
    assert checkpoints.load_newest(small_disk / "run").step == left[-1]


def test_one_process_at_a_time(tmp_path):
    with run_folder.locked(tmp_path), pytest.raises(errors.UserError, match="Another process"):
        with run_folder.locked(tmp_path):
            pass
    with run_folder.locked(tmp_path):
        pass


def test_sigterm_saves_and_exits(toy, tmp_path, whole, capfd):
    def batches(start):
        for index, batch in enumerate(toy.open_batches(start), start=start):
            if index == 6:
                os.kill(os.getpid(), signal.SIGTERM)
            yield batch

    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(SystemExit) as caught:
        toy.fit(tmp_path, STEPS, open_batches=batches, eval_hook=_hook, checkpoint_period=100)
    assert caught.value.code == 128 + signal.SIGTERM
    assert signal.getsignal(signal.SIGTERM) is before
    (step,) = saved_run.steps(tmp_path)
    assert f"SIGTERM: saved step {step}; the same command goes on" in capfd.readouterr().err

    resumed = toy.fit(tmp_path, STEPS, eval_hook=_hook)
    _assert_same(whole[1].state, resumed.state)
    assert _metrics(whole[0]) == _metrics(tmp_path)
