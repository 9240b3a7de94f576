import errno
import functools
import os
import pathlib
import shutil

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest

from moe_peft import errors
from moe_peft.runtime import digest
from moe_peft.training import checkpoints
from moe_peft.training import step as step_lib
from moe_peft.weights import saved_run


@functools.cache
def _state(toy, step):
    frozen, trainable = toy.ADAPTED.split(
        toy.MODEL.init(jax.random.key(step), {"x": (toy.ROWS, toy.WIDTH)})
    )
    del frozen
    transform = toy.adamw().build(trainable, toy.ADAPTED.learning_rate_group)
    state = step_lib.create_state(trainable, transform, seed=step)
    return state.replace(step=np.int32(step))


def _save(toy, folder, steps, keep=3):
    with checkpoints.Checkpoints(folder, keep) as writer:
        for step in steps:
            record = {"step": step, "description": {"method": {"name": "toy"}}}
            writer.save(_state(toy, step), record)


@pytest.fixture(scope="module")
def two_saved(toy, tmp_path_factory):
    folder = tmp_path_factory.mktemp("two")
    _save(toy, folder, [1, 2])
    return folder


def _assert_same(a, b):
    jax.tree.map(np.testing.assert_array_equal, a, b)


def test_restores_every_leaf(toy, two_saved):
    saved = checkpoints.load_newest(two_saved)
    assert saved.step == 2
    like = jax.device_put(_state(toy, 9))
    _assert_same(checkpoints.restore(saved, like), _state(toy, 2))


def test_keeps_the_newest_few(toy, tmp_path):
    _save(toy, tmp_path, [1, 2, 3, 4], keep=2)
    assert saved_run.steps(tmp_path) == [3, 4]


def test_nothing_saved_is_none(tmp_path):
    assert checkpoints.load_newest(tmp_path) is None


def _files(folder):
    step = folder / saved_run.FOLDER / "2"
    return sorted(str(path.relative_to(step)) for path in step.rglob("*") if path.is_file())


def _cut(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def _flip(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 0xFF
    path.write_bytes(bytes(data))


# A read that fails leaves tasks in orbax's event loop; Python reports them when it collects them.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("damage", [_cut, pathlib.Path.unlink, _flip])
def test_any_damaged_file_is_either_harmless_or_falls_back(
    toy, two_saved, tmp_path, damage, capsys
):
    num_fallbacks = 0
    for number, name in enumerate(_files(two_saved)):
        folder = tmp_path / str(number)
        shutil.copytree(two_saved, folder)
        damage(folder / saved_run.FOLDER / "2" / name)
        saved = checkpoints.load_newest(folder)
        restored = checkpoints.restore(saved, jax.device_put(_state(toy, 9)))
        _assert_same(restored, _state(toy, saved.step))
        warning = capsys.readouterr().err
        assert ("WARNING: the checkpoint of step 2 is damaged" in warning) == (saved.step == 1)
        assert (folder / checkpoints.DAMAGED_FOLDER / "2-0").exists() == (saved.step == 1)
        num_fallbacks += saved.step == 1
    # At least the json record and the two trees' data: it must not have been harmless throughout.
    assert num_fallbacks >= 5


def test_readable_but_wrong_values_are_damage(two_saved, tmp_path, capsys):
    folder = tmp_path / "run"
    shutil.copytree(two_saved, folder)
    old, new = (folder / saved_run.FOLDER / step / "trainable" for step in ("1", "2"))
    shutil.rmtree(new)
    shutil.copytree(old, new)
    assert checkpoints.load_newest(folder).step == 1
    assert "the values of trainable are not those that were saved" in capsys.readouterr().err


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_all_damaged_is_an_error_and_leaves_them_in_place(two_saved, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(two_saved, folder)
    for step in ("1", "2"):
        shutil.rmtree(folder / saved_run.FOLDER / step / "trainable")
    with pytest.raises(errors.UserError, match="All 2 checkpoints .* are damaged"):
        checkpoints.load_newest(folder)
    assert saved_run.steps(folder) == [1, 2]


def test_another_optimizer_is_refused_by_leaf(toy, two_saved):
    saved = checkpoints.load_newest(two_saved)
    other = jax.device_put(_state(toy, 2)).replace(opt_state=(np.zeros(3, np.float32),))
    with pytest.raises(errors.UserError, match="opt_state/0000.*another optimiser"):
        checkpoints.restore(saved, other)


def test_load_names_what_exists(two_saved, tmp_path):
    assert saved_run.load(two_saved).step == 2
    assert saved_run.load(two_saved, 1).step == 1
    with pytest.raises(errors.UserError, match="no checkpoint of step 7; it has steps 1, 2"):
        saved_run.load(two_saved, 7)
    with pytest.raises(errors.UserError, match="no training checkpoint"):
        saved_run.load(tmp_path)


def test_failed_save_is_one_line_and_leaves_earlier_checkpoints(toy, tmp_path, monkeypatch):
    _save(toy, tmp_path, [1])

    def fail(*args, **kwargs):
        del args, kwargs
        (tmp_path / "checkpoints" / "2.orbax-checkpoint-tmp").mkdir()
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(ocp.CheckpointManager, "save", fail)
    with pytest.raises(errors.UserError, match="No space left on device. .* steps 1") as caught:
        with checkpoints.Checkpoints(tmp_path, 3) as writer:
            writer.save(_state(toy, 2), {"step": 2, "description": {}})
    assert "\n" not in str(caught.value)
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["1"]


def test_digest_sees_names_values_shapes_and_dtypes():
    tree = {"a": {"b": np.arange(6, dtype=np.float32)}, "c": np.zeros(2, np.float32)}
    variants = [
        {"a": {"b": np.arange(6, dtype=np.float32)}, "d": np.zeros(2, np.float32)},
        {"a": {"b": np.arange(6, dtype=np.float32)}, "c": np.array([0, -0.0], np.float32)},
        {"a": {"b": np.arange(6, dtype=np.float32).reshape(2, 3)}, "c": tree["c"]},
        {"a": {"b": np.arange(6, dtype=np.float32)}, "c": np.zeros(2, np.int32)},
    ]
    digests = {digest.of_tree(variant) for variant in variants}
    assert len(digests | {digest.of_tree(tree)}) == 5
    assert digest.of_tree(jax.tree.map(jax.numpy.asarray, tree)) == digest.of_tree(tree)
