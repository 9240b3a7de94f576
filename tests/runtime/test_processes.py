"""Which processes belong together, from flags and environments; which rows each passes on."""

import types

import numpy as np
import pytest

from moe_peft import errors
from moe_peft.cli import main
from moe_peft.partitioning import mesh as mesh_lib
from moe_peft.runtime import processes

SLURM = {"SLURM_STEP_NUM_TASKS": "4", "SLURM_PROCID": "1"}
KUBERNETES = {
    "JOB_COMPLETION_INDEX": "3",
    "MOE_PEFT_COORDINATOR": "job-0.job:1234",
    "MOE_PEFT_NUM_PROCESSES": "8",
}


@pytest.mark.parametrize(
    ("flag", "environ", "wanted"),
    [
        (None, {}, None),
        ("h:1,2,0", {}, ("--distributed", "h:1", 2, 0)),
        ("off", SLURM, None),
        (None, {processes.VARIABLE: "off", **SLURM}, None),
        (None, {processes.VARIABLE: "h:1,2,1"}, ("MOE_PEFT_DISTRIBUTED", "h:1", 2, 1)),
        ("auto", {}, ("--distributed", None, None, None)),
        (None, SLURM, ("the Slurm step", None, None, None)),
        (None, {"SLURM_STEP_NUM_TASKS": "1", "SLURM_PROCID": "0"}, None),
        (None, {"TPU_WORKER_HOSTNAMES": "a,b"}, ("TPU_WORKER_HOSTNAMES", None, None, None)),
        (None, {"TPU_WORKER_HOSTNAMES": "localhost"}, None),
        (None, KUBERNETES, ("the Kubernetes job", "job-0.job:1234", 8, 3)),
        (None, {"JOB_COMPLETION_INDEX": "3"}, None),
    ],
)
def test_what_is_found(flag, environ, wanted):
    found = processes.find(flag, environ)
    assert found == (wanted and processes.Cluster(*wanted))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("host,2,0", "expected HOST:PORT,COUNT,INDEX"),
        ("host:1,2", "expected HOST:PORT,COUNT,INDEX"),
        ("host:1,2,2", "the index of 2 processes is 0 to 1"),
    ],
)
def test_flags_of_another_form(text, message):
    with pytest.raises(errors.UserError, match=message):
        processes.find(text, {})
    with pytest.raises(errors.UserError, match="the Kubernetes job is"):
        processes.find(None, KUBERNETES | {"MOE_PEFT_NUM_PROCESSES": ""})


def test_commands_for_one_process_refuse_several(monkeypatch, capsys):
    monkeypatch.setenv(processes.VARIABLE, "h:1,2,0")
    code = main.main(["eval", "--gin_file", "experiments/cldr/mov.gin"])
    assert code == main.USER_ERROR
    assert "eval works in one process, and MOE_PEFT_DISTRIBUTED" in capsys.readouterr().err


def test_alone():
    assert processes.is_first()
    assert [processes.anywhere(truth) for truth in (True, False)] == [True, False]
    assert processes.in_turn(lambda: 5, "five") == 5


def mesh_of(data, fsdp, model, num_processes):
    """A mesh whose devices belong to processes, as many to each, in order."""
    count = data * fsdp * model
    devices = [
        types.SimpleNamespace(process_index=i * num_processes // count) for i in range(count)
    ]
    grid = np.array(devices, object).reshape(data, fsdp, model)
    shape = {"data": data, "fsdp": fsdp, "model": model}
    return types.SimpleNamespace(devices=grid, shape=shape)


@pytest.mark.parametrize(
    ("shape", "num_processes", "wanted"),
    [
        ((4, 1, 2), 2, [(0, 2), (1, 2)]),
        ((1, 4, 2), 4, [(0, 4), (1, 4), (2, 4), (3, 4)]),
        ((2, 1, 4), 4, [(0, 2), (0, 2), (1, 2), (1, 2)]),  # Two processes hold the same rows.
        ((1, 1, 8), 2, [(0, 1), (0, 1)]),
        ((8, 1, 1), 1, [(0, 1)]),
    ],
)
def test_rows_of_a_process(monkeypatch, shape, num_processes, wanted):
    mesh = mesh_of(*shape, num_processes)
    found = []
    for index in range(num_processes):
        monkeypatch.setattr(mesh_lib.jax, "process_index", lambda index=index: index)
        found.append(mesh_lib.host_shard(mesh))
    assert found == wanted


def test_rows_that_are_no_share():
    mesh = mesh_of(3, 1, 1, 3)
    mesh.devices[1, 0, 0].process_index = 2
    mesh.devices[2, 0, 0].process_index = 0
    with pytest.raises(errors.UserError, match=r"would hold the parts \[0, 2\] of 3"):
        mesh_lib.host_shard(mesh)
