"""Two processes of two devices each, joined by jax.distributed, against one process."""

import importlib.util
import os
import pathlib
import signal
import socket
import subprocess
import sys
import time

import numpy as np
import pytest

RUN = pathlib.Path(__file__).parent / "distributed_run.py"


def free_port():
    with socket.socket() as found:
        found.bind(("localhost", 0))
        return found.getsockname()[1]


def start(folder, method, shape, num_steps, *more):
    environ = {**os.environ, "JAX_PLATFORMS": "cpu"}
    command = [sys.executable, str(RUN), str(folder), method, shape, str(num_steps), *more]
    return subprocess.Popen(
        command, env=environ, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


def start_two(*args):
    address = f"localhost:{free_port()}"
    return [start(*args, f"{address},2,{index}") for index in range(2)]


def end(processes, code=0):
    outputs = [process.communicate(timeout=300)[0] for process in processes]
    assert [process.returncode for process in processes] == [code] * len(processes), outputs
    return outputs


def run_here(folder, method, num_steps):
    """The same run in the process of the tests, on one device."""
    module = importlib.util.spec_from_file_location("distributed_run", RUN)
    runs = importlib.util.module_from_spec(module)
    module.loader.exec_module(runs)
    runs.run(folder, method, "1,1,1", num_steps)


def assert_equal(one, other):
    one, other = (dict(np.load(folder / "trained.npz")) for folder in (one, other))
    assert one.keys() == other.keys()
    for path, values in one.items():
        np.testing.assert_allclose(other[path], values, rtol=1e-3, atol=2e-4, err_msg=path)


@pytest.mark.parametrize("last", [4, pytest.param(6, marks=pytest.mark.slow)])
def test_two_processes_equal_one_and_hand_over_to_another_number(tmp_path, last):
    alone, together = tmp_path / "alone", tmp_path / "together"
    started = start_two(together, "mhr", "2,1,2", 3)
    run_here(alone, "mhr", last)
    outputs = end(started)
    assert "step 3/3" in outputs[0]
    assert "step" not in outputs[1]  # Only the first one talks.
    # Another number of processes, another mesh, the same data: one goes on, then two again.
    run_here(together, "mhr", 4)
    if last > 4:
        end(start_two(together, "mhr", "1,2,2", last))
    assert_equal(alone, together)
    lines = (together / "metrics.jsonl").read_text().splitlines()
    assert len(lines) == last


@pytest.mark.slow
def test_weights_and_moments_split_between_processes(tmp_path):
    single = start(tmp_path / "alone", "full", "1,1,1", 10)
    end(start_two(tmp_path / "together", "full", "1,2,2", 5))
    end(start_two(tmp_path / "together", "full", "1,1,4", 10))
    end([single])
    assert_equal(tmp_path / "alone", tmp_path / "together")


@pytest.mark.slow
def test_a_signal_to_one_process_stops_both_at_one_step(tmp_path):
    processes = start_two(tmp_path, "mhr", "4,1,1", 100_000)
    metrics = tmp_path / "metrics.jsonl"
    while not (metrics.exists() and metrics.stat().st_size):
        assert all(process.poll() is None for process in processes)
        time.sleep(0.2)
    processes[1].send_signal(signal.SIGTERM)
    outputs = end(processes, 128 + signal.SIGTERM)
    assert "the same command goes on from there" in outputs[0]
    assert len(list((tmp_path / "checkpoints").iterdir())) == 1


@pytest.mark.parametrize("index", [0, 1])
def test_a_process_that_stays_away_is_said_in_one_line(tmp_path, index):
    spec = f"localhost:{free_port()},2,{index}"
    process = start(tmp_path, "mhr", "2,1,2", 1, spec, "2")
    output = process.communicate(timeout=120)[0]
    assert process.returncode == 2
    assert f"By --distributed, process {index} of 2 at localhost" in output
    assert "could not join the others within 2 s" in output
