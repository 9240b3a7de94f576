"""A run of `test_layout` in a process of its own: FOLDER METHOD DATA,FSDP,MODEL STEPS [SPEC]."""

import importlib.util
import pathlib
import sys

import jax
import numpy as np

from moe_peft import errors, patching
from moe_peft.runtime import processes


def run(folder, method, shape, num_steps):
    """Trains, and writes what was trained into trained.npz."""
    path = pathlib.Path(__file__).parent / "test_layout.py"
    module = importlib.util.spec_from_file_location("layout_runs", path)
    runs = importlib.util.module_from_spec(module)
    module.loader.exec_module(runs)
    shape = tuple(map(int, shape.split(",")))
    _, result = runs.train(pathlib.Path(folder), method, shape, int(num_steps), scan_layers=True)
    flat = patching.flatten(result.state.trainable)
    values = {path: processes.fetch_to_host(leaf) for path, leaf in flat.items()}
    if processes.is_first():
        np.savez(pathlib.Path(folder) / "trained.npz", **values)


def main(folder, method, shape, num_steps, spec=None, timeout="60"):
    jax.config.update("jax_num_cpu_devices", 2 if spec else 1)
    if spec:
        processes.join(processes.find(spec, {}), int(timeout))
    run(folder, method, shape, num_steps)


if __name__ == "__main__":
    try:
        main(*sys.argv[1:])
    except errors.UserError as error:
        sys.exit(str(error))
