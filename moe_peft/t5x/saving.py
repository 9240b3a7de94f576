"""Adapters in files of their own, next to the checkpoints that T5X writes."""

from collections.abc import Mapping
import dataclasses
import pathlib
import tempfile
from typing import Any

from absl import logging
from etils import epath
import jax
from t5x import state_utils

from moe_peft import errors, methods, patching
from moe_peft.runtime import digest, processes
from moe_peft.weights import saved_run, t5x_files

FOLDER = "adapters"


def write(saved: saved_run.Saved, path: epath.Path) -> epath.Path:
    """Writes what `read` reads; the path may be in a bucket (gs://)."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    with tempfile.TemporaryDirectory() as folder:
        local = saved_run.save(saved, pathlib.Path(folder) / path.name)
        partial.write_bytes(local.read_bytes())
    return partial.replace(path)


def read(path: str) -> saved_run.Saved:
    """Adapters of a file, which may be in a bucket."""
    given = epath.Path(path)
    if not given.exists():
        raise errors.UserError(f"There is no file of adapters {path}.")
    with tempfile.TemporaryDirectory() as folder:
        local = pathlib.Path(folder) / given.name
        local.write_bytes(given.read_bytes())
        return saved_run.load(local)


@dataclasses.dataclass
class Adapters:
    """Writes `MODEL_DIR/adapters/step_N.safetensors` whenever T5X saves a checkpoint.

    For `utils.SaveCheckpointConfig.state_transformation_fns`. `moe-peft eval`, `merge`, `convert`
    and `adapted.model` read these files; they know the method, and by a fingerprint the backbone.
    T5X's own checkpoint stays as it is, backbone and optimiser included: T5X resumes from it.
    """

    method: methods.Method  # says what trains
    model_dir: str  # of the run
    backbone: str  # checkpoint that the run started from
    _fingerprint: str | None = dataclasses.field(default=None, init=False)

    def __call__(
        self, state: Mapping[str, Any], infos: Mapping[str, Any]
    ) -> tuple[Mapping[str, Any], Mapping[str, Any]]:
        """Called by T5X in every process with what it is about to save; changes nothing."""
        params = state_utils.flatten_state_dict(state["target"])
        step = int(processes.fetch_to_host(state["state"]["step"]))
        if not any(map(patching.is_adapter, params)):
            return state, infos  # The method trains the whole model, which T5X saves.
        trained = {
            path: processes.fetch_to_host(leaf)
            for path, leaf in params.items()
            if self.method.is_trainable(path)
        }
        description = self._description(params)
        if processes.is_first():
            saved = saved_run.Saved(
                step, patching.trees.unflatten(trained), {}, {"description": description}
            )
            path = write(saved, epath.Path(self.model_dir) / FOLDER / f"step_{step}.safetensors")
            logging.info("Saved %d leaves of adapters to %s.", len(trained), path)
        return state, infos

    def _description(self, params: Mapping[str, jax.Array]) -> dict[str, Any]:
        if self._fingerprint is None:  # Frozen, the backbone stays the same.
            base = {p: leaf for p, leaf in params.items() if not patching.is_adapter(p)}
            self._fingerprint = fingerprint(base, self.backbone)
        return {
            "method": self.method.describe(),
            "backbone": {"fingerprint": self._fingerprint, "frozen_dtype": "float32"},
            "backbone_spec": f"t5x:{self.backbone}",
            "trainer": "t5x",
        }


def fingerprint(base: Mapping[str, jax.Array], checkpoint: str) -> str:
    """Digest of the backbone as the checkpoint stores it: T5X holds bfloat16 in float32."""
    try:
        stored = t5x_files.dtypes(checkpoint)
    except errors.UserError as error:  # TensorFlow's checkpoints are float32.
        logging.warning("%s The fingerprint is of float32 weights.", error)
        stored = {}
    return digest.of_leaves(
        digest.of_leaf(path, processes.fetch_to_host(leaf).astype(stored.get(path, leaf.dtype)))
        for path, leaf in base.items()
    )
