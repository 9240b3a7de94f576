"""What routers may look at besides activations: the batch's context, and the site they sit at."""

from collections.abc import Callable
import dataclasses
from typing import Any

import flax.struct
from jaxtyping import Array, Bool, Float
import numpy as np


@flax.struct.dataclass
class RoutingContext:
    """Facts about the batch, handed to every adapter through `Patched.apply(..., routing=...)`.

    A pytree, so it passes jit; each field may be missing.
    """

    # Not annotated with shapes: jax rebuilds pytrees around placeholders of its own.
    task_ids: Any = None  # Int[b], the task of each example
    sentence_embeddings: Any = None  # Float[b D], one vector per example
    encoder_mask: Any = None  # Bool[b s], true where an encoder token is not padding
    decoder_mask: Any = None  # Bool[b t], true where a decoder token is not padding


@dataclasses.dataclass(frozen=True)
class Site:
    """The place of one adapter: its axes, and what its router sees there."""

    # logical names of the trailing axes of the frozen layer's inputs
    in_axes: tuple[str, ...] = ("embed",)
    out_axes: tuple[str, ...] = ("embed",)  # logical names of the trailing axes of its outputs
    # [..., i], what a token router decides on; every leading entry is a decision
    router_input: Float[Array, "..."] | None = None
    router_axis: str = "embed"  # logical name of the last axis of `router_input`
    # true for real tokens of the stream this layer reads; None counts every token
    mask: Bool[Array | np.ndarray, "b t"] | None = None
    context: RoutingContext = RoutingContext()  # the batch's context
    num_token_axes: int = 2  # axes before the features, 2 for [batch, tokens]
    has_rng: bool = False  # the caller gave an rng named "routing"
    wants_losses: bool = False  # the caller collects router losses
    routes_on_inputs: bool = False  # `router_input` is what the frozen layer reads
    # Float[b p s], the weights of a task router that several layers share
    shared_weights: Array | None = None
    # kernel [i, e] -> `router_input @ kernel`, float32, by an adapter that multiplies the same
    # array with a matrix of its own, both at once; None leaves it to the router
    project: Callable[[Array], Array] | None = None
