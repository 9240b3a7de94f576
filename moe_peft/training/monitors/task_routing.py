"""Task routing as found in parameters: which skills each task uses, at every selector.

A selector is one table of logits [n, p, s]: n tasks, p splits (the heads of MHR), s skills. Its
weights, in evaluation, are `sigmoid(logits)` divided by their sum over skills.
"""

from collections.abc import Mapping
import re
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Float, PyTree

from moe_peft import errors, patching, routing
from moe_peft.routing import task_routers

# Beside the layer, "encoder/layers_0/mlp/wo/adapter/router/logits", or at the root of the model for
# all layers of a group, "adapter/router/encoder/logits".
_LOGITS = re.compile(
    rf"(?:(?P<layer>.+)/)?{patching.ADAPTER}/router/(?:(?P<group>.+)/)?{task_routers.LOGITS}"
)
_SCANNED = re.compile(r"(encoder|decoder)/\1/(.*)")

STATISTICS = ("entropy", "sparsity", "max_weight")


def is_in(trainable: PyTree) -> bool:
    """Whether a tree holds logits of task routing."""
    return any(_LOGITS.fullmatch(path) for path in patching.flatten(trainable))


def logits(trainable: PyTree) -> dict[str, Float[Array, "n p s"]]:
    """Returns the logits of every selector by its layer or group of layers, in the model's order.

    The selectors of a scanned stack, [n, layers, p, s], come one by one, named as in an unscanned
    one: "encoder/layers_0/...".

    Raises UserError: there is no task routing in the tree.
    """
    found = {}
    for path, leaf in patching.flatten(trainable).items():
        match = _LOGITS.fullmatch(path)
        if match is None:
            continue
        name = match["layer"] or match["group"] or "model"
        if leaf.ndim == 3:
            found[name] = leaf
            continue
        for layer in range(leaf.shape[1]):
            found[_SCANNED.sub(rf"\1/layers_{layer}/\2", name)] = leaf[:, layer]
    if not found:
        raise errors.UserError(
            "There are no learned task-routing logits among the trainable parameters: methods with "
            "learned task routing are poly and mhr."
        )
    return {name: found[name] for name in sorted(found, key=_natural_order)}


def weights(logits: Float[Array, "n p s"], straight_through: bool = False) -> Float[Array, "n p s"]:
    """Returns the weights of all tasks in evaluation, see `routing.TaskRouter`."""
    sizes = dict(zip(("num_tasks", "num_splits", "num_skills"), logits.shape, strict=True))
    router = task_routers.TaskRouter(**sizes, straight_through=straight_through, parent=None)
    one_of_each = routing.RoutingContext(task_ids=jnp.arange(len(logits)))
    return router.weights(jnp.asarray(logits), one_of_each)


def statistics(weights: Float[Array, "n p s"]) -> dict[str, Float[Array, ""]]:
    """Returns how decided a selector is, as means over tasks and splits.

    `entropy`: `-sum_s w log w / log s`, 1 where all skills weigh the same, 0 for a single one.
    `sparsity`: the share of weights below half of an equal share, `1 / (2 s)`.
    `max_weight`: the largest weight.
    With one skill there is nothing to decide: entropy and sparsity are 0.
    """
    num_skills = weights.shape[-1]
    logs = jnp.log(jnp.maximum(weights, jnp.finfo(jnp.float32).tiny))
    entropy = -jnp.sum(weights * logs, axis=-1) / jnp.log(max(num_skills, 2))
    return {
        "entropy": jnp.mean(entropy),
        "sparsity": jnp.mean((weights < 0.5 / num_skills).astype(jnp.float32)),
        "max_weight": jnp.mean(jnp.max(weights, axis=-1)),
    }


def is_straight_through(description: Mapping[str, Any]) -> bool:
    """Whether a method, as `Method.describe` puts it, rounds its weights."""
    adapters = [rule["adapter"] for rule in description["rules"]]
    return any((each.get("router_factory") or {}).get("straight_through") for each in adapters)


def _natural_order(name: str) -> tuple[bool, str]:
    """Encoder before decoder, layer 2 before layer 10."""
    parts = re.split(r"(\d+)", name)
    padded = "".join(part.zfill(6) if part.isdigit() else part for part in parts)
    return name.startswith("decoder"), padded
