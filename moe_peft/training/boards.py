"""Boards that show a run's metrics: TensorBoard, Weights & Biases, MLflow.

A board is opened with the run's folder, the step it goes on from and what it is (json types).
`write` takes a step and its scalars; `close` takes whether all steps were made, and returns how to
look at them. Each may raise whatever its library does.
"""

import functools
import importlib.util
import json
import os
import re
import shlex
import sys
import time

import jax

from moe_peft import errors
from moe_peft.runtime import json_files

_PROJECT = "moe_peft"  # of W&B, and experiment of MLflow, where the environment names none
# W&B uploads for two minutes at most at the end, and never into a run that the caller has open.
_SETTINGS = {"quiet": True, "finish_timeout": 120.0, "finish_timeout_raises": True}
_RESUME = {"resume": "allow", "allow_val_change": True, "reinit": "create_new"}
_allowed = functools.partial(re.sub, r"[^\w\-. :/]", "_")  # MLflow refuses other characters.


class _TensorBoard:
    """TensorBoard's file, written in place: the library's own thread complains late of errors."""

    library = "tensorboardX"

    def __init__(self, folder, resumed_step, _):
        self._folder = folder / "tensorboard"
        self._folder.mkdir(exist_ok=True)
        writer, self._messages = _tensorboard()
        self._events = writer.EventsWriter(str(self._folder / "events"))
        # Tells TensorBoard to forget what an earlier life wrote beyond this step.
        start = self._messages.SessionLog.START
        self._write(resumed_step + 1, session_log={"status": start})

    def write(self, step, metrics):
        values = [{"tag": name, "simple_value": value} for name, value in metrics.items()]
        self._write(step, summary={"value": values})
        self._events.flush()

    def _write(self, step, **what):
        event = self._messages.Event(wall_time=time.time(), step=step, **what)
        self._events.write_event(event)

    def close(self, _):
        self._events.close()
        return f"look with: tensorboard --logdir {shlex.quote(str(self._folder))}"


def _tensorboard():
    """tensorboardX without torch, which it would import where there is one: 2 s and 170 MB."""
    is_absent = "torch" not in sys.modules
    if is_absent:
        sys.modules["torch"] = None  # `import torch` is an ImportError then, and is expected.
    try:
        from tensorboardX import event_file_writer
        from tensorboardX.proto import event_pb2
    finally:
        if is_absent:
            del sys.modules["torch"]
    return event_file_writer, event_pb2


class _Service:
    """A board that never forgets a point: a file in the run's folder keeps its id and last step.

    Steps that a resumed run makes again, to the same numbers, are left out.
    """

    def __init__(self, folder, resumed_step, description):
        self._file, self._id, self._written = folder / f"{self.library}.json", None, 0
        if resumed_step and self._file.exists():
            kept = json.loads(self._file.read_text(encoding="utf-8"))
            self._id, self._written = kept["id"], kept["step"]
        leaves = jax.tree_util.tree_leaves_with_path(description, is_leaf=lambda x: x is None)
        name = lambda path: jax.tree_util.keystr(path, simple=True, separator=".")
        self._open(folder.resolve(), {name(path): value for path, value in leaves})
        self._keep(self._written)

    def write(self, step, metrics):
        if step > self._written:
            self._log(step, metrics)
            self._keep(step)

    def _keep(self, step):
        json_files.write_json(self._file, {"id": self._id, "step": step})


class _WeightsAndBiases(_Service):
    """A run of W&B, where WANDB_MODE, WANDB_PROJECT and its other variables say."""

    library = "wandb"

    def _open(self, folder, config):
        import wandb

        what = {"name": folder.name, "dir": str(folder), "config": config, **_RESUME}
        what["project"] = os.environ.get("WANDB_PROJECT", _PROJECT)
        self._run = wandb.init(id=self._id, settings=wandb.Settings(**_SETTINGS), **what)
        self._id, self._folder = self._run.id, folder / "wandb"

    def _log(self, step, metrics):
        self._run.log(dict(metrics), step=step)

    def close(self, is_complete):
        self._run.finish(exit_code=int(not is_complete))
        if self._run.offline:
            return f"upload with: wandb sync {shlex.quote(str(self._folder))}"
        return f"look at: {self._run.url}"


class _MLflow(_Service):
    """A run of MLflow, at MLFLOW_TRACKING_URI or in a file in the run's folder."""

    library = "mlflow"

    def _open(self, folder, config):
        import mlflow

        self._uri = os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{folder}/mlflow.db"
        self._client, self._point = mlflow.MlflowClient(self._uri), mlflow.entities.Metric
        if self._id is None:
            project = os.environ.get("MLFLOW_EXPERIMENT_NAME", _PROJECT)
            found = self._client.get_experiment_by_name(project)
            number = found.experiment_id if found else self._client.create_experiment(project)
            self._id = self._client.create_run(number, run_name=folder.name).info.run_id
            for name, value in config.items():
                self._client.log_param(self._id, _allowed(name), value)
        self._client.update_run(self._id, status="RUNNING")

    def _log(self, step, metrics):
        when = (int(1000 * time.time()), step)
        points = [self._point(_allowed(name), value, *when) for name, value in metrics.items()]
        self._client.log_batch(self._id, metrics=points)

    def close(self, is_complete):
        self._client.set_terminated(self._id, "FINISHED" if is_complete else "FAILED")
        how = "at:" if self._uri.startswith("http") else "with: mlflow ui --backend-store-uri"
        return f"look {how} {shlex.quote(self._uri)}"


BOARDS = {"tensorboard": _TensorBoard, "wandb": _WeightsAndBiases, "mlflow": _MLflow}


def chosen(log_to: tuple[str, ...] | str) -> tuple[str, ...]:
    """Returns keys of `BOARDS`, also of a text such as "tensorboard,wandb".

    Raises UserError: a board is unknown, or its library is not installed.
    """
    texts = log_to.split(",") if isinstance(log_to, str) else log_to
    names = tuple(dict.fromkeys(text.strip() for text in texts if text.strip()))
    for name in names:
        errors.check_one_of("log_to", name, BOARDS)
        found = importlib.util.find_spec(BOARDS[name].library)
        if found is None or found.origin is None:  # A folder that W&B left looks like a package.
            command = f'`pip install "moe-peft-jax[{name}]"`'
            raise errors.UserError(f"log_to is {log_to!r}, and {name} is not installed: {command}.")
    return names
