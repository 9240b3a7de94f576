"""`merge`: a run's adapters folded into the network's own weights, checked on logits."""

import dataclasses
import math
import pathlib

from flax import linen as nn
import jax.numpy as jnp
from jaxtyping import PyTree

from moe_peft import errors, methods
from moe_peft.config import settings as settings_lib
from moe_peft.convert import adapter_trees
from moe_peft.training import restore
from moe_peft.training import start as start_lib
from moe_peft.weights import identity, leaves, merging, safetensors_files, saved_run

# Of the largest logit: rounding of float32, and of activations in bfloat16.
_ALLOWED = {"float32": 1e-3, "bfloat16": 0.1}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings:
    """Of `merge`."""

    model: nn.Module  # the network without adapters
    method: methods.Method  # as trained
    backbone: str  # as trained
    model_dir: str  # folder of the run or of the adaptation, or an exported file
    path: str  # the file to write, ending in .safetensors
    task: int | None = None  # id of the task to merge for, where the method tells tasks apart
    step: int | None = None  # which checkpoint; None takes the newest
    dtype: str = "float32"  # of the file, or "bfloat16"
    # As trained: a run on rounded weights is merged into rounded weights.
    frozen_dtype: str = "float32"
    seed: int = 0  # of the batch on which logits are compared
    member: str | None = None  # which run of an adaptation, "TASK:SEED"


@settings_lib.entry_point(Settings, "merge", module="commands")
def merge(settings: Settings) -> pathlib.Path:
    """Writes the merged weights of a run as safetensors and returns the file's path.

    The file is a backbone, `BACKBONE = "file:PATH"`, for `METHOD = @methods.frozen()` or as the
    start of another adaptation; `moe-peft convert` writes it, or the run itself, for Hugging Face
    and T5X. Before it is written, the logits of both networks on a random batch are compared; the
    largest and the mean difference are printed. A method that cannot be merged, a wrong run or
    file, or logits that differ raise UserError.
    """
    if not settings.path.endswith(".safetensors"):
        raise errors.UserError(
            f"The merged file is called {settings.path!r}; expected *.safetensors."
        )
    leaves.check_dtype(settings.dtype)
    check_method(settings.method, settings.task)
    params, gap, record = merge_saved(
        settings.model,
        settings.method,
        settings.backbone,
        saved_run.load(settings.model_dir, settings.step, settings.member),
        str(settings.model_dir),
        task=settings.task,
        frozen_dtype=settings.frozen_dtype,
        seed=settings.seed,
    )
    print(f"logits before and after on a random batch: {gap}")
    metadata = identity.as_json({**record, "model": identity.describe_model(settings.model)})
    return safetensors_files.save_tree(params, settings.path, settings.dtype, metadata)


def check_method(method: methods.Method, task: int | None) -> None:
    """Raises UserError unless the method can be merged for that task."""
    if not method.rules:
        raise errors.UserError(f"The method {method.name!r} has no adapters to merge.")
    merging.check(method, task)


def merge_saved(
    network: nn.Module,
    method: methods.Method,
    backbone: str,
    saved: saved_run.Saved,
    where: str,
    *,
    task: int | None = None,
    frozen_dtype: str = "float32",
    seed: int = 0,
) -> tuple[PyTree, merging.Gap, dict]:
    """Merges what a run has trained into a network without adapters; arguments are as of `merge`.

    Returns the merged weights, float32; the gap between logits on a random batch; and what was
    merged, as JSON types. Raises UserError if the method cannot be merged, the run, which messages
    call `where`, does not fit, or the logits differ.
    """
    check_method(method, task)
    start = start_lib.Start.of_network(network, method, adapter_trees.BATCH_SHAPES)
    params = restore.params_of(start, backbone, saved, where, frozen_dtype)
    merged = merging.merge_into_base(network, method, params, task)
    gap = merging.logit_gap(network, method, params, merged, task, seed)
    allowed = _ALLOWED[jnp.dtype(network.config.dtype).name]
    if not gap.relative < allowed or not math.isfinite(gap.relative):
        raise errors.UserError(
            f"Merged logits differ by {gap.relative:.2g} of the largest logit, more than "
            f"{allowed:g}; nothing was written. Are the run's weights finite?"
        )
    record = {"merged": identity.as_json(method.describe()), "task": task, "step": saved.step}
    return merged, gap, {**record, "model_dir": where, "backbone_spec": backbone}
