"""Mapped runs against the same runs one by one; stopping, selection, going on after a kill."""

import dataclasses
import functools
import os
import pathlib
import signal
import subprocess
import sys
import time

import jax
import numpy as np
import pytest

from moe_peft import errors, patching
from moe_peft.adaptation import data, programs
from moe_peft.adaptation import group as group_lib
from moe_peft.adaptation import scores as scores_lib
from moe_peft.partitioning import mesh as mesh_lib
from moe_peft.runtime import progress
from moe_peft.training import optimizers, schedules
from moe_peft.training import step as step_lib

NUM_RUNS, NUM_ROWS, BATCH, PERIOD, STEPS = 5, 12, 4, 3, 12
JOBS = [data.Job(f"task_{run // 2}", run % 2) for run in range(NUM_RUNS)]


pytestmark = pytest.mark.usefixtures("compiled_once")


class Quiet:
    """A progress that keeps what it was told."""

    def __init__(self):
        self.said, self.updates = [], 0

    def update(self, jobs, runs, losses=None):
        self.updates += 1

    def say(self, text):
        self.said.append(text)

    def close(self):
        pass


def optimizer_of(toy, trainable):
    made = optimizers.adamw(schedules.linear_warmup_linear_decay(3e-2, STEPS), clip_norm=0.5)
    return made.build(trainable, toy.ADAPTED.learning_rate_group)


@functools.cache
def trees(toy, run):
    """(frozen, trainable) of one run: the same backbone, adapters of its own."""
    params = toy.MODEL.init(jax.random.key(0), {"x": (1, toy.WIDTH)})
    own = toy.MODEL.init(jax.random.key(100 + run), {"x": (1, toy.WIDTH)})
    frozen, _ = toy.ADAPTED.split(params)
    _, trainable = toy.ADAPTED.split(own)
    return frozen, jax.tree.map(np.asarray, trainable)


def table(toy, run):
    """Rows of one run, the last one padding; gradients of very different size between runs."""
    rows = toy.batch(run, NUM_ROWS)
    rows["y"] = rows["y"] * 10.0**run
    return {k: np.pad(v, [(0, 1)] + [(0, 0)] * (v.ndim - 1)) for k, v in rows.items()}


def schedule(run, steps):
    """Some rows; every third batch of run 1 is incomplete."""
    chosen = np.stack(
        [np.random.default_rng((run, s)).permutation(NUM_ROWS)[:BATCH] for s in steps]
    )
    if run == 1:
        chosen[::3, -2:] = -1
    return chosen.astype(np.int32)


def update_of(toy, trainable):
    return step_lib.make_update(toy.MODEL, optimizer_of(toy, trainable), patching.merge)


@functools.cache
def step_of(toy):
    """The trainer's own step: one program, for no run differs in shapes."""
    _, trainable = trees(toy, 0)
    return step_lib.make_train_step(toy.MODEL, optimizer_of(toy, trainable), patching.merge)


def one_by_one(toy, run, num_steps):
    """(losses, state) of a run on its own, by the trainer's own step."""
    frozen, trainable = trees(toy, run)
    optimizer, step = optimizer_of(toy, trainable), step_of(toy)
    state = step_lib.create_state(trainable, optimizer, JOBS[run].key_seed)
    rows, losses = table(toy, run), []
    for chosen in schedule(run, range(num_steps)):
        batch = {name: values[chosen] for name, values in rows.items()}
        state, metrics = step(state, frozen, batch)
        losses.append(float(metrics["loss_sum"] / metrics["normalizer"]))
    return losses, state


@functools.cache  # the same programs for every test that asks for the same
def make_mapped(toy, width=NUM_RUNS, devices=1, map_runs=None):
    frozen, trainable = trees(toy, 0)
    mesh = mesh_lib.make_mesh(devices=jax.devices()[:devices])

    def score(frozen, trainable, batch):
        """A row is right if it is wrong by less than half the target's scale."""
        params = patching.merge(frozen, trainable)
        wrong = toy.MODEL.net.apply({"params": params}, batch["x"]) - batch["y"]
        return (abs(wrong) < batch["scale"]).astype("float32"), wrong**2

    return programs.MappedRuns(update_of(toy, trainable), score, frozen, width, mesh, map_runs)


def runs_of(toy, members):
    tables = [table(toy, run) for run in members]
    return group_lib.GroupData(
        [JOBS[run] for run in members],
        {name: np.stack([one[name] for one in tables]) for name in tables[0]},
        lambda steps: np.stack([schedule(run, steps) for run in members]),
    )


def check_chunk(toy, members):
    rows = [{**toy.batch(run, 6, seed=9), "scale": np.full(6, 10.0**run)} for run in members]
    for run, one in zip(members, rows, strict=True):
        one["y"] = one["y"] * 10.0**run
    return {name: np.stack([one[name] for one in rows]).astype(np.float32) for name in rows[0]}


def group(toy, folder, members=range(NUM_RUNS), mapped=None, scorer=None, **settings):
    mapped = mapped or make_mapped(toy)
    folder.mkdir(parents=True, exist_ok=True)

    def scores(trainables, split):
        found = mapped.score(trainables, [check_chunk(toy, members)], len(members))
        return [scores_lib.Scored(s, float(np.mean(x)), ()) for s, x in zip(*found, strict=True)]

    defaults = {"num_steps": STEPS, "batch_size": BATCH, "eval_period": PERIOD}
    return group_lib.GroupRun(
        mapped,
        optimizer_of(toy, trees(toy, 0)[1]),
        runs_of(toy, members),
        scorer(scores) if scorer else scores,
        group_lib.Settings(**(defaults | settings)),
        folder,
        Quiet(),
    )


def go(toy, folder, members=range(NUM_RUNS), **kwargs):
    made = group(toy, folder, members, **kwargs)
    best, reached = made.train([trees(toy, run)[1] for run in members])
    return made._mapped.to_host(best, len(members)), reached


def assert_trees_equal(got, want, **tolerance):
    for (path, a), b in zip(
        jax.tree_util.tree_leaves_with_path(got), jax.tree.leaves(want), strict=True
    ):
        np.testing.assert_allclose(a, b, err_msg=jax.tree_util.keystr(path), **tolerance)


# Eight steps of Adam whose early steps divide by small second moments: a rounding of 1e-7 grows.
TOLERANCE = {"rtol": 2e-5, "atol": 2e-6}


EVERY_WAY = pytest.mark.parametrize(
    "map_runs", [jax.vmap, programs.one_after_another], ids=["together", "one after another"]
)


@pytest.mark.parametrize("devices", [1, 2], ids=["one device", "two devices"])
@EVERY_WAY
def test_mapped_runs_are_the_runs_one_by_one(toy, map_runs, devices):
    mapped = make_mapped(toy, devices=devices, map_runs=map_runs)
    optimizer = optimizer_of(toy, trees(toy, 0)[1])
    trainables = [trees(toy, run)[1] for run in range(NUM_RUNS)]
    states = mapped.create_states(trainables, optimizer, [job.key_seed for job in JOBS])
    runs = runs_of(toy, range(NUM_RUNS))
    tables, active = mapped.to_devices(runs.tables), np.ones(NUM_RUNS, bool)
    losses = np.zeros((NUM_RUNS, 0))
    for start, first, count in ((0, 0, 3), (3, 0, 1), (3, 1, 2), (6, 0, 2)):  # in pieces
        rows = mapped.to_devices(runs.schedule(range(start, start + PERIOD)))
        states, still, found = mapped.advance(states, active, tables, rows, first, count)
        assert np.all(still)
        losses = np.concatenate([losses, found.losses], axis=1)
    states = mapped.to_host(states, NUM_RUNS)
    for run in range(NUM_RUNS):
        want_losses, want = one_by_one(toy, run, 8)
        np.testing.assert_allclose(losses[run], want_losses, rtol=2e-5)
        assert_trees_equal(programs.unstack(states.trainable, run), want.trainable, **TOLERANCE)
        assert states.step[run] == 8
        np.testing.assert_array_equal(states.rng[run], want.rng)


@EVERY_WAY
def test_a_stopped_run_keeps_its_state_and_disturbs_nobody(toy, map_runs):
    mapped = make_mapped(toy, map_runs=map_runs)
    optimizer = optimizer_of(toy, trees(toy, 0)[1])
    trainables = [trees(toy, run)[1] for run in range(3)]
    states = mapped.create_states(trainables, optimizer, [1, 2, 3])
    before = mapped.to_host(states, 3)
    runs = runs_of(toy, range(3))
    tables, rows = mapped.to_devices(runs.tables), mapped.to_devices(runs.schedule(range(3)))
    states, still, found = mapped.advance(states, np.array([1, 0, 1], bool), tables, rows, 0, 3)
    after = mapped.to_host(states, 3)
    same = jax.tree.map(lambda a, b: np.all(a[1] == b[1]), after, before)
    assert all(jax.tree.leaves(same))
    assert list(found.steps) == [3, 0, 3]
    assert list(still) == [True, False, True]
    assert not np.array_equal(
        after.trainable["first"]["adapter"]["lora_b"][0],
        before.trainable["first"]["adapter"]["lora_b"][0],
    )


@EVERY_WAY
def test_a_run_that_diverges_stops_before_that_step(toy, map_runs):
    members = range(3)
    mapped = make_mapped(toy, map_runs=map_runs)
    optimizer = optimizer_of(toy, trees(toy, 0)[1])
    states = mapped.create_states([trees(toy, run)[1] for run in members], optimizer, [1, 2, 3])
    runs = runs_of(toy, members)
    tables = {name: values.copy() for name, values in runs.tables.items()}
    rows = runs.schedule(range(3))
    rows[1] = [[0, 1, 2, 3], [4, 5, 6, 7], [0, 1, 2, 3]]
    tables["y"][1, 4] = np.inf  # seen at the second step
    states, still, found = mapped.advance(
        states, np.ones(3, bool), mapped.to_devices(tables), mapped.to_devices(rows), 0, 3
    )
    assert list(found.steps) == [3, 1, 3]
    assert list(still) == [True, False, True]
    got = mapped.to_host(states, 3)
    assert all(np.all(np.isfinite(leaf)) for leaf in jax.tree.leaves(got.trainable))
    assert list(got.step) == [3, 1, 3]


def test_groups_do_not_matter(toy, tmp_path):
    together, reached = go(toy, tmp_path / "all")
    for run in (1, 4):
        alone, (own,) = go(toy, tmp_path / str(run), [run])
        got = programs.unstack(together, run)
        assert_trees_equal(got, programs.unstack(alone, 0), **TOLERANCE)
        assert own.best_step == reached[run].best_step
        for ours, theirs in zip(own.curve, reached[run].curve, strict=True):
            assert ours["score"] == theirs["score"]
            np.testing.assert_allclose(ours["train_loss"], theirs["train_loss"], rtol=2e-5)


class Scripted:
    """Replaces scores by a script, one number an evaluation and run."""

    def __init__(self, script, losses=None):
        self.script, self.losses, self.calls = script, losses or script, []

    def __call__(self, scorer):
        def scores(trainables, split):
            index = len(self.calls)
            self.calls.append((split, jax.tree.map(np.asarray, trainables)))
            return [
                scores_lib.Scored([score[index]], -loss[index], ())
                for score, loss in zip(self.script, self.losses, strict=True)
            ]

        return scores


def test_each_run_stops_and_selects_on_its_own(toy, tmp_path):
    script = Scripted([[0.1, 0.5, 0.4, 0.3], [0.1, 0.2, 0.3, 0.4]])
    best, reached = go(toy, tmp_path, range(2), scorer=script, patience=1)
    first, second = reached
    assert (first.state, first.steps, first.best_step) == ("stopped early", 9, 6)
    assert (second.state, second.steps, second.best_step) == ("done", 12, 12)
    assert [entry["score"] for entry in first.curve] == [0.1, 0.5, 0.4]
    kept = programs.unstack(script.calls[1][1], 0)
    assert_trees_equal(programs.unstack(best, 0), kept, rtol=0)
    # Nothing moved after the run had stopped.
    third, fourth = (programs.unstack(call[1], 0) for call in script.calls[2:4])
    assert_trees_equal(third, fourth, rtol=0)


def test_a_group_ends_when_all_runs_have_stopped(toy, tmp_path):
    script = Scripted([[0.5, 0.4, 0.3, 0.2]] * 2)
    _, reached = go(toy, tmp_path, range(2), scorer=script, patience=1)
    assert [run.steps for run in reached] == [6, 6]
    assert len(script.calls) == 2


def test_of_equal_scores_the_lower_loss_then_the_earlier_step_decides(toy, tmp_path):
    script = Scripted([[0.5] * 4, [0.5] * 4], losses=[[1, 3, 3, 2], [1, 1, 1, 1]])
    _, reached = go(toy, tmp_path, range(2), scorer=script)
    assert [run.best_step for run in reached] == [6, 3]


@pytest.mark.parametrize("selection", ["reported_split", "validation"])
def test_which_split_selects(toy, tmp_path, selection):
    script = Scripted([[0.1, 0.2, 0.3, 0.4]] * 2)
    go(toy, tmp_path, range(2), scorer=script, selection=selection)
    split = "test" if selection == "reported_split" else "validation"
    assert [call[0] for call in script.calls] == [split] * 4


def test_the_last_parameters_need_no_evaluation(toy, tmp_path):
    script = Scripted([[]] * 2)
    best, reached = go(toy, tmp_path, range(2), scorer=script, selection="last")
    assert script.calls == []
    assert [run.best_step for run in reached] == [STEPS, STEPS]
    _, want = one_by_one(toy, 1, STEPS)
    assert_trees_equal(programs.unstack(best, 1), want.trainable, **TOLERANCE)


def test_a_score_that_is_no_number_is_the_worst(toy, tmp_path):
    script = Scripted([[np.nan, 0.0, 0.0, 0.0]], losses=[[np.nan, 1, 1, 1]])
    _, (only,) = go(toy, tmp_path, range(1), scorer=script)
    assert only.best_step == 6
    assert only.curve[0]["score"] == 0.0


class Killed(Exception):
    pass


def test_a_group_goes_on_where_it_was_saved(toy, tmp_path):
    want, want_reached = go(toy, tmp_path / "whole")

    def dying(scorer):
        calls = []

        def scores(trainables, split):
            calls.append(split)
            if len(calls) == 3:
                raise Killed
            return scorer(trainables, split)

        return scores

    with pytest.raises(Killed):
        go(toy, tmp_path / "killed", scorer=dying, save_seconds=0.0)
    got, reached = go(toy, tmp_path / "killed", save_seconds=0.0)
    assert_trees_equal(got, want, rtol=0)
    assert reached == want_reached
    lines = [(tmp_path / name / "metrics.jsonl").read_text() for name in ("whole", "killed")]
    assert lines[0] == lines[1]


def test_what_was_saved_by_other_runs_is_refused(toy, tmp_path):
    made = group(toy, tmp_path, range(2), save_seconds=0.0)
    made.train([trees(toy, run)[1] for run in range(2)])
    with pytest.raises(errors.UserError, match="other runs"):
        go(toy, tmp_path, range(1, 3))
    made.forget_saved()
    go(toy, tmp_path, range(1, 3))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"num_steps": 0}, "num_steps is 0; expected 1 or more"),
        ({"selection": "validaton"}, "Did you mean 'validation'"),
        ({"patience": 0}, "patience is 0; expected 1 or more"),
        ({"selection": "last", "patience": 2}, "makes none"),
    ],
)
def test_settings_that_cannot_work(settings, message):
    defaults = {"num_steps": 1, "batch_size": 1, "eval_period": 1}
    with pytest.raises(errors.UserError, match=message):
        group_lib.Settings(**(defaults | settings))


def test_groups_fit_memory():
    assert programs.group_sizes(33, 12) == [11, 11, 11]
    assert programs.group_sizes(33, 16) == [11, 11, 11]
    assert programs.group_sizes(5, 3) == [3, 2]
    assert programs.group_sizes(3, 100) == [3]
    assert programs.largest_group(32, needed=1_000, shared=200, available=600) == 16
    assert programs.largest_group(32, needed=1_000, shared=200, available=100) == 0
    assert programs.device_memory() > 0


@pytest.fixture
def no_meminfo(monkeypatch):
    def refuse(path, *args, **kwargs):
        raise FileNotFoundError(path)

    monkeypatch.setattr(programs, "open", refuse, raising=False)
    programs.device_memory.cache_clear()
    yield
    programs.device_memory.cache_clear()


def test_memory_is_found_where_there_is_no_meminfo(no_meminfo):
    assert programs.device_memory() > 2**20


def test_memory_that_nobody_tells_is_unknown(no_meminfo, monkeypatch):
    def refuse(name):
        raise ValueError(f"unrecognized configuration name {name}")

    monkeypatch.setattr(os, "sysconf", refuse)
    assert programs.device_memory() is None


def test_memory_grows_with_the_number_of_runs(toy):
    needed = []
    for width in (2, 8):
        mapped = make_mapped(toy, width, map_runs=jax.vmap)
        optimizer = optimizer_of(toy, trees(toy, 0)[1])
        states = mapped.create_states([trees(toy, 0)[1]], optimizer, [0])
        runs = runs_of(toy, [0])
        memory = mapped.compile(
            states, mapped.to_devices(runs.tables), mapped.to_devices(runs.schedule(range(4)))
        )
        needed.append(memory.peak)
    assert 2 < needed[1] / needed[0] < 5


def test_adapters_are_kept_by_run(toy, tmp_path):
    stacked = programs.stack([trees(toy, run)[1] for run in range(3)])
    path = tmp_path / "adapters.safetensors"
    group_lib.write_adapters(path, stacked, JOBS[:3])
    found = group_lib.read_adapters(path)
    assert list(found) == JOBS[:3]
    assert_trees_equal(found[JOBS[2]], trees(toy, 2)[1], rtol=0)


def test_jobs_have_seeds_of_their_own():
    jobs = [data.Job(f"task_{i}", seed) for i in range(50) for seed in range(5)]
    assert len({job.key_seed for job in jobs}) == len(jobs)


def run_progress(**kwargs):
    return group_lib.RunProgress(**kwargs)


def test_lines_name_every_run_once(capsys):
    shown = progress.Runs(10, 2)
    reached = [run_progress(steps=5), run_progress(steps=5)]
    shown.update(JOBS[:2], reached)
    assert capsys.readouterr().err == ""
    for one in reached:
        one.curve.append({"step": 5, "train_loss": 1.25, "score": 0.5, "loss": 1.0})
        one.best_score = 0.5
    shown.update(JOBS[:2], reached)
    shown.update(JOBS[:2], reached)
    lines = capsys.readouterr().err.splitlines()
    assert lines == [
        "task_0  seed 0  step 5/10  loss 1.2500  best 50.0  running",
        "task_0  seed 1  step 5/10  loss 1.2500  best 50.0  running",
    ]


def test_the_table_shows_every_run():
    import io

    import rich.console

    console = rich.console.Console(file=io.StringIO(), force_terminal=True, width=100, height=40)
    shown = progress.Runs(10, 2, console=console)
    ended = run_progress(steps=4, state="stopped early", best_score=0.25)
    shown.update(JOBS[:2], [run_progress(steps=7), ended], [0.5, None])
    shown.say("a word")
    shown.close()
    text = console.file.getvalue()
    for word in ("task_0", "7/10", "0.5000", "25.0", "stopped early", "1 of 2 runs", "a word"):
        assert word in text


def train_until_killed(folder):
    """What the subprocess does."""
    toy = sys.modules["training_toy"]
    slow = lambda scorer: lambda *args: (time.sleep(0.05), scorer(*args))[1]
    best, reached = go(toy, folder, scorer=slow, save_seconds=0.0, num_steps=60)
    group_lib.write_adapters(folder / "best.safetensors", best, JOBS)
    return [dataclasses.asdict(run) for run in reached]


def test_a_killed_group_leaves_no_trace(toy, tmp_path):
    want, want_reached = go(toy, tmp_path / "whole", num_steps=60)
    folder = tmp_path / "killed"
    here = pathlib.Path(__file__).parents[1]
    code = (
        "import os, sys; os.environ['JAX_PLATFORMS'] = 'cpu'\n"
        f"os.environ['XLA_FLAGS'] = {os.environ['XLA_FLAGS']!r}\n"
        "import importlib.util, pathlib\n"
        "def load(name, path):\n"
        "    spec = importlib.util.spec_from_file_location(name, path)\n"
        "    module = importlib.util.module_from_spec(spec); sys.modules[name] = module\n"
        "    spec.loader.exec_module(module); return module\n"
        f"load('training_toy', {str(here / 'training_toy.py')!r})\n"
        f"load('test_adaptation', {__file__!r}).train_until_killed(pathlib.Path({str(folder)!r}))\n"
    )
    saved = folder / "progress.safetensors"
    process = subprocess.Popen([sys.executable, "-c", code])
    deadline = time.monotonic() + 120
    while not saved.exists() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.02)
    time.sleep(0.1)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    assert saved.exists()
    assert not (folder / "best.safetensors").exists()
    got, reached = go(toy, folder, num_steps=60)
    assert_trees_equal(got, want, rtol=0)
    assert reached == want_reached
