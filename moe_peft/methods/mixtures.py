"""(IA)3, LoRA, and their mixtures whose router sees tokens or sentences: MoV, MoLoRA."""

import dataclasses
import functools

from moe_peft import adapters, errors, patching
from moe_peft import routing as routing_lib
from moe_peft.methods import method as method_lib
from moe_peft.methods import targets

ROUTERS = {router.option: router for router in routing_lib.ROUTERS}


@method_lib.register(adapters.IA3, learning_rate=1e-2)
def ia3(family: str = "t5") -> method_lib.Method:
    """(IA)3: one vector on keys, values and the feed-forward block's inside (Liu et al. 2022).

    Args:
        family: of networks, whose places are scaled.
    """
    return method_lib.Method("ia3", targets.scaling_rules(adapters.IA3, "as_in_paper", family))


@method_lib.register(adapters.LoRA)
def lora(
    rank: int = 4,
    alpha: float = 16.0,
    dropout_rate: float = 0.0,
    placement: str = "all7",
    a_init: str = "normal",
) -> method_lib.Method:
    """LoRA, with the scale and initialisation of MoV's baselines.

    Poly's LoRA baseline is `lora(rank=1, alpha=1.0, a_init="uniform")`.

    Args:
        rank: at least 1.
        alpha: the update is scaled by alpha / rank.
        dropout_rate: of the adapter's inputs in training.
        placement: one of `PLACEMENTS`, or a regular expression on the paths of layers, such as
            ".*/(query|value)".
        a_init: "normal" or "uniform", see `adapters.LoRA`.
    """
    pattern = targets.placement(placement)
    factory = functools.partial(
        adapters.LoRA, rank=rank, alpha=alpha, dropout_rate=dropout_rate, a_init=a_init
    )
    return method_lib.Method("lora", (patching.Rule(pattern, factory),))


@method_lib.register()
@method_lib.arguments_of(lora, rank=16, alpha=1.0, a_init="uniform")
def lora_big(**options) -> method_lib.Method:
    """LoRA-big: the large single LoRA next to MHR (Caccia et al. 2023), 35M parameters at T5-XL."""
    return dataclasses.replace(lora(**options), name="lora_big")


@method_lib.register(adapters.MoV, learning_rate=1e-2)
def mov(
    num_experts: int = 10,
    router_input: str = "as_released",
    top_k: int | None = None,
    renormalize: bool = True,
    jitter: float = 0.0,
    routing: str = "token",
    load_balancing_weight: float = 0.0,
    z_weight: float = 0.0,
    family: str = "t5",
) -> method_lib.Method:
    """MoV: mixtures of (IA)3 vectors.

    Args:
        num_experts: vectors per place; the paper reports 2 to 60.
        router_input: what a token router sees. "as_released": what is scaled, each head's key or
            value by itself, and the activated wi_0 in the feed-forward block. "as_in_paper": what
            the frozen layer reads.
        top_k: keep the k most probable experts; None merges all.
        renormalize: divide kept weights by their sum. The released code does not.
        jitter: noise on the router's input in training, a fraction in [0, 1).
        routing: "token", "sentence" (needs `sentence_embeddings` in the batch) or "uniform".
        load_balancing_weight: of the load-balancing loss; the papers train without.
        z_weight: of the router z-loss; the papers train without.
        family: as in `ia3`.
    """
    options = {"top_k": top_k, "renormalize": renormalize, "jitter": jitter}
    factory = functools.partial(
        adapters.MoV, num_experts=num_experts, router_factory=_router_factory(routing, **options)
    )
    rules = targets.scaling_rules(factory, router_input, family)
    return method_lib.Method(
        "mov", rules, load_balancing_weight=load_balancing_weight, z_weight=z_weight
    )


@method_lib.register(adapters.MoLoRA)
@method_lib.arguments_of(lora, mov, without=("router_input", "family"), placement="molora_released")
def molora(num_experts: int = 10, **options) -> method_lib.Method:
    """MoLoRA: mixtures of LoRAs; a token router sees what the frozen layer reads, undropped.

    Args:
        num_experts: LoRAs per layer; the paper reports 2 to 15.
        **options: arguments of `lora`, of each LoRA, then those of `mov`.
    """
    take = lambda *names: {name: options.pop(name) for name in names}
    weights = take("load_balancing_weight", "z_weight")
    router_factory = _router_factory(**take("routing", "top_k", "renormalize", "jitter"))
    pattern = targets.placement(options.pop("placement"))
    factory = functools.partial(
        adapters.MoLoRA, num_experts=num_experts, router_factory=router_factory, **options
    )
    return method_lib.Method("molora", (patching.Rule(pattern, factory),), **weights)


def _router_factory(
    routing: str, top_k: int | None, renormalize: bool, jitter: float
) -> routing_lib.RouterFactory:
    """Returns the factory of a named router with its options."""
    router = targets.choose("routing", routing, ROUTERS)
    if router is routing_lib.UniformRouter:
        if top_k is not None or jitter:
            raise errors.UserError("Uniform routing has no top_k and no jitter.")
        return router
    return functools.partial(router, top_k=top_k, renormalize=renormalize, jitter=jitter)
