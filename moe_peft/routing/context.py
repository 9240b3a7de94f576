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

    Attributes:
        task_ids: Int[b], the task of each example.
        sentence_embeddings: Float[b D], one vector per example.
        encoder_mask: Bool[b s], true where an encoder token is not padding.
        decoder_mask: Bool[b t], true where a decoder token is not padding.
    """

    # Not annotated with shapes: jax rebuilds pytrees around placeholders of its own.
    task_ids: Any = None
    sentence_embeddings: Any = None
    encoder_mask: Any = None
    decoder_mask: Any = None


@dataclasses.dataclass(frozen=True)
class Site:
    """The place of one adapter: its axes, and what its router sees there.

    Attributes:
        in_axes: logical names of the trailing axes of the frozen layer's inputs.
        out_axes: logical names of the trailing axes of its outputs.
        router_input: [..., i], what a token router decides on; every leading entry is a decision.
        router_axis: logical name of the last axis of `router_input`.
        mask: true for real tokens of the stream this layer reads; None counts every token.
        context: the batch's context.
        num_token_axes: axes before the features, 2 for [batch, tokens].
        has_rng: the caller gave an rng named "routing".
        wants_losses: the caller collects router losses.
        routes_on_inputs: `router_input` is what the frozen layer reads.
        shared_weights: Float[b p s], the weights of a task router that several layers share.
        project: kernel [i, e] -> `router_input @ kernel`, float32, by an adapter that multiplies
            the same array with a matrix of its own, both at once; None leaves it to the router.
    """

    in_axes: tuple[str, ...] = ("embed",)
    out_axes: tuple[str, ...] = ("embed",)
    router_input: Float[Array, "..."] | None = None
    router_axis: str = "embed"
    mask: Bool[Array | np.ndarray, "b t"] | None = None
    context: RoutingContext = RoutingContext()
    num_token_axes: int = 2
    has_rng: bool = False
    wants_losses: bool = False
    routes_on_inputs: bool = False
    shared_weights: Array | None = None
    project: Callable[[Array], Array] | None = None
