"""What a network is told of a batch: its features in order, and the context of its routers."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, PyTree
import numpy as np

from moe_peft import errors, methods, routing
from moe_peft.models import losses

TOKENS = ("encoder_input_tokens", "decoder_input_tokens", "decoder_target_tokens")
_PACKING = ("encoder_segment_ids", "decoder_segment_ids", "encoder_positions", "decoder_positions")
FLOAT_FEATURES = ("decoder_loss_weights", "sentence_embeddings")


def ones(batch_shapes: Mapping[str, Any]) -> losses.Batch:
    """A batch of ones to make parameters with; `batch_shapes` as in `init_variables`."""
    return {
        name: jnp.ones(
            getattr(value, "shape", value), jnp.float32 if name in FLOAT_FEATURES else jnp.int32
        )
        for name, value in batch_shapes.items()
    }


def filled_up(batch: Mapping[str, np.ndarray], num_rows: int, pad_id: int) -> dict[str, np.ndarray]:
    """The batch with rows of padding, tokens `pad_id` and all else 0, up to `num_rows`."""

    def fill(name: str, rows: np.ndarray) -> np.ndarray:
        missing = [(0, num_rows - len(rows))] + [(0, 0)] * (rows.ndim - 1)
        return np.pad(rows, missing, constant_values=pad_id if name in TOKENS else 0)

    return {name: fill(name, rows) for name, rows in batch.items()}


def context(
    batch: losses.Batch, method: methods.Method | None, pad_id: int = 0
) -> routing.RoutingContext:
    """What adapters may know of a batch.

    Args:
      batch: encoder_input_tokens, and what else there is of targets, task ids and embeddings.
      method: of the adapters.
      pad_id: padding.

    Raises:
      UserError: the method combines modules for each example's task, and rows hold several.
    """
    if "encoder_segment_ids" in batch and method and method.num_tasks is not None:
        raise errors.UserError(
            f"{method.name!r} combines its modules for each example's task; this batch "
            "packs several examples into a row (it has encoder_segment_ids)."
        )
    targets = batch.get("decoder_target_tokens")  # Not there while decoding.
    return routing.RoutingContext(
        task_ids=batch.get("task_ids"),
        sentence_embeddings=batch.get("sentence_embeddings"),
        encoder_mask=jnp.not_equal(batch["encoder_input_tokens"], pad_id),
        decoder_mask=None if targets is None else jnp.not_equal(targets, pad_id),
    )


def rngs(dropout_rng: Array) -> dict[str, Array]:
    """The keys of dropout and of stochastic routing, from one."""
    return dict(zip(("dropout", "routing"), jax.random.split(dropout_rng), strict=True))


def repeat_rows(tree: PyTree, times: int, axis: int = 0) -> PyTree:
    """Repeats every row `times` times in place ([a, b] becomes [a, a, b, b]).

    Leaves without that axis, such as positions in a cache, stay as they are.
    """
    return jax.tree.map(lambda x: jnp.repeat(x, times, axis) if x.ndim > axis else x, tree)


def features(batch: losses.Batch) -> tuple[list[losses.AnyArray], dict[str, losses.AnyArray]]:
    """(the three token arrays in calling order, packing features by keyword)."""
    missing = [name for name in TOKENS if name not in batch]
    if missing:
        raise errors.UserError(
            f"The batch lacks {', '.join(missing)}; it has {', '.join(sorted(batch)) or 'nothing'}."
        )
    packing = {name: batch[name] for name in _PACKING if name in batch}
    return [batch[name] for name in TOKENS], packing
