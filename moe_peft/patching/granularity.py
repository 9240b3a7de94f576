"""Granularity: which layers share one task router, and routers that lie at the root of a model."""

from collections.abc import Mapping, Sequence
import dataclasses
from typing import Any
import zlib

from flax.linen import partitioning
import jax
from jaxtyping import Array, Float

from moe_peft import errors, routing
from moe_peft.patching import paths as paths_lib
from moe_peft.patching import trees
from moe_peft.routing import task_routers

LEVELS = ("linear", "sublayer", "block", "blocks", "coder", "model")


@dataclasses.dataclass(frozen=True)
class Granularity:
    """One router per ... (Caccia et al. 2023, section 5; in brackets the released code's names)."""

    # "linear": adapted layer (finegrained; the papers' tables), "sublayer": attention or
    # feed-forward block (layerwise), "block": transformer block (blockwise), "blocks": every
    # `num_blocks` of them, "coder": encoder or decoder (coderwise), "model": whole model
    # (coarsegrained)
    level: str = "linear"
    num_blocks: int | None = None  # for "blocks", counted within encoder and decoder

    def __post_init__(self) -> None:
        errors.check_one_of("granularity", self.level, LEVELS)
        if (self.level == "blocks") != (self.num_blocks is not None):
            raise errors.UserError(
                f"granularity 'blocks' and num_blocks go together; got {self.level!r} and "
                f"{self.num_blocks}."
            )
        if self.num_blocks is not None:
            routing.check_positive("num_blocks", self.num_blocks)

    @property
    def is_shared(self) -> bool:
        """Whether routers lie at the root."""
        return self.level != "linear"

    def group(self, path: str) -> str:
        """Returns the name of the router that the layer at `path` uses.

        Raises UserError where the path does not tell: in a stack that is scanned all blocks have
        one path.
        """
        if self.level == "model":
            return "model"
        found = (paths_lib.part if self.level == "coder" else paths_lib.block)(path)
        if not found:
            raise errors.UserError(
                f"Granularity {self.level!r} cannot tell which block {path} belongs to. In scanned "
                "networks, whose blocks share one path, choose 'linear', 'coder' or 'model', or "
                "set scan_layers to False."
            )
        if self.level == "coder":
            return found
        if self.level == "blocks":
            return f"{found.part}/blocks_{found.number // self.num_blocks}"
        if self.level == "block":
            return found.path
        return path.rpartition("/")[0]


Routers = Mapping[str, task_routers.TaskRouter]


def shared_routers(rules: Sequence[Any], paths: Sequence[Sequence[str]]) -> dict[str, Any]:
    """Returns {group: its router} for the layers `paths[i]` of each rule i."""
    found = {}
    for rule, matched in zip(rules, paths, strict=True):
        if rule.shared_router is not None:
            for path in matched:
                found[rule.granularity.group(path)] = rule.shared_router
    return found


def init(rng: Array, routers: Routers, root: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """Returns fresh (params, params_axes) of shared routers, nested, below the name `root`."""
    params, axes = {}, {}
    for group, router in routers.items():
        key = jax.random.fold_in(rng, zlib.crc32(group.encode()))
        path = f"{root}/router/{group}/{task_routers.LOGITS}"
        params[path] = task_routers.init_logits(key, router.logits_shape)
        axes[f"{path}_axes"] = partitioning.AxisMetadata(names=task_routers.LOGITS_AXES)
    return trees.unflatten(params), trees.unflatten(axes)


def weights(
    params: Mapping[str, Any],
    rules: Sequence[Any],
    root: str,
    context: routing.RoutingContext,
    rng: Array | None,
    num_rows: int | None,
) -> dict[str, Float[Array, "b p s"]]:
    """Returns {group: weights} of the shared routers in `params`; one draw of noise for each."""
    router = next((rule.shared_router for rule in rules if rule.shared_router is not None), None)
    logits = params.get(root, {}).get("router") if router is not None else None
    if logits is None:
        return {}
    found = {}
    for path, leaf in trees.flatten(logits).items():
        group = path.rpartition("/")[0]
        key = None if rng is None else jax.random.fold_in(rng, zlib.crc32(group.encode()))
        found[group] = router.weights(leaf, context, key, f"{root}/router/{group}", num_rows)
    return found
