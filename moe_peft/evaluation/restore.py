"""The model of a finished run: its backbone with the leaves it trained."""

from collections.abc import Mapping
import dataclasses
import functools
from typing import Any

from flax import linen as nn
import jax
from jaxtyping import PyTree

from moe_peft import errors, methods, patching
from moe_peft.models import encoder_decoder
from moe_peft.partitioning import mesh as mesh_lib
from moe_peft.training import backbone as backbone_lib
from moe_peft.training import checkpoints


@dataclasses.dataclass(frozen=True)
class Restored:
    """A model ready to be asked.

    Attributes:
      model: patched.
      params: on all devices of the mesh.
      run: what a report says about it, as JSON types.
    """

    model: encoder_decoder.EncoderDecoder
    params: PyTree
    run: Mapping[str, Any]


def restore(
    module: nn.Module,
    method: methods.Method,
    backbone: str,
    model_dir: str,
    batch_shapes: Mapping[str, Any],
    mesh: jax.sharding.Mesh,
    *,
    step: int | None = None,
    frozen_dtype: str = "float32",
) -> Restored:
    """Returns the model that a run of `method` left in `model_dir`.

    Args:
      module: the network without adapters.
      method: as trained; one that trains nothing needs no checkpoint.
      backbone: as trained; see `training.backbone.load`.
      model_dir: folder of the run.
      batch_shapes: feature name to shape, as the model will see them.
      mesh: devices that get a copy.
      step: which checkpoint; None for the newest.
      frozen_dtype: "float32" or "bfloat16", how frozen weights are stored.

    Raises:
      UserError: the checkpoint is missing or damaged, or is of another method, backbone or model.
    """
    loss = encoder_decoder.LossConfig()
    base = encoder_decoder.EncoderDecoder(module, loss)
    model = encoder_decoder.EncoderDecoder(method.patch(module), loss, method)
    init_base = functools.partial(base.init, batch_shapes=batch_shapes)
    init = functools.partial(model.init, batch_shapes=batch_shapes)
    loaded = backbone_lib.load(backbone, jax.eval_shape(init_base, jax.random.key(0)), init_base)
    frozen, trainable = method.split(jax.eval_shape(init, jax.random.key(0)))
    names = patching.flatten(frozen).keys()
    base_leaves = patching.flatten(loaded.params)
    frozen = patching.trees.unflatten({name: base_leaves[name] for name in names})

    run = {
        "method": method.describe(),
        "backbone": {"spec": loaded.spec, "fingerprint": loaded.fingerprint},
        "model_dir": str(model_dir),
        "step": 0,
        "trainable_parameters": _count(trainable),
        "total_parameters": _count(trainable) + _count(frozen),
    }
    learned: PyTree = {}
    if trainable:
        saved = checkpoints.load_trainable(model_dir, step)
        _check(saved, run, trainable, model_dir)
        learned, run["step"] = saved.trainable, saved.step
    params = patching.merge(backbone_lib.cast(frozen, frozen_dtype), learned)
    return Restored(model, jax.device_put(params, mesh_lib.replicated(mesh)), run)


def _count(tree: PyTree) -> int:
    return sum(leaf.size for leaf in jax.tree.leaves(tree))


def _check(
    saved: checkpoints.Saved, run: Mapping[str, Any], trainable: PyTree, model_dir: str
) -> None:
    """Refuses a checkpoint of another method, backbone or model, naming what differs."""
    was, now = saved.description["method"], run["method"]
    if was != now:
        parts = [part for part in now if was.get(part) != now[part]] or sorted(was.keys() - now)
        raise errors.UserError(
            f"{model_dir} was trained with another method: {parts[0]} is {was.get(parts[0])} there "
            f"and {now.get(parts[0])} here."
        )
    was, now = saved.description["backbone"]["fingerprint"], run["backbone"]["fingerprint"]
    if was != now:
        raise errors.UserError(
            f"{model_dir} was trained on another backbone: {saved.description['backbone_spec']!r} "
            f"(fingerprint {was[:12]}) there, {run['backbone']['spec']!r} ({now[:12]}) here."
        )
    want = {name: leaf.shape for name, leaf in patching.flatten(trainable).items()}
    have = {name: leaf.shape for name, leaf in patching.flatten(saved.trainable).items()}
    differing = sorted(n for n in want.keys() | have.keys() if want.get(n) != have.get(n))
    if differing:
        name = differing[0]
        raise errors.UserError(
            f"The checkpoint in {model_dir} does not fit the model: {len(differing)} leaves "
            f"differ, the first is {name} ({have.get(name)} saved, {want.get(name)} in the model)."
        )
