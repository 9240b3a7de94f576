"""Poly, MHR and their variants: inventories of modules, combined by task."""

from collections.abc import Mapping
import dataclasses
import functools
from typing import Any

from moe_peft import adapters, errors, patching
from moe_peft import routing as routing_lib
from moe_peft.methods import method as method_lib
from moe_peft.methods import mixtures, targets

SKILL_ROUTERS = {router.option: router for router in routing_lib.SKILL_ROUTERS}

# By routing; `poly` or `mhr` where it is learned.
_POLY_NAMES = {
    "uniform": "poly_uniform",
    "random_task": "random_per_task",
    "random_example": "random_per_example",
    "private": "private",
}


@method_lib.register(adapters.SkilledLoRA, adapters.SkilledIA3)
def poly(
    num_tasks: int,
    num_skills: int = 8,
    num_splits: int = 1,
    rank: int = 1,
    alpha: float = 1.0,
    placement: str = "all7",
    adapter: str = "lora",
    routing: str = "learned",
    relaxed: bool = True,
    straight_through: bool = False,
    granularity: str = "linear",
    num_blocks: int | None = None,
    seed: int = 0,
    family: str = "t5",
) -> method_lib.Method:
    """Poly: modules combined by task (Ponti et al. 2022; Caccia et al. 2023, section 2).

    Args:
        num_tasks: training tasks; the batch's task ids are below it.
        num_skills: modules in the inventory; the papers use 8.
        num_splits: parts of the features with routing of their own; more than one is MHR.
        rank: of each LoRA: 1 on T0 and SuperNI light, 16 on CrossFit and SuperNI.
        alpha: updates are scaled by alpha / rank.
        placement: of LoRA, one of `PLACEMENTS`; (IA)3 has its own places.
        adapter: "lora" or "ia3", what a module is.
        routing: "learned", or "uniform" (1 / S), "random_task" (a fixed half of the skills per
            task), "random_example" (a fresh random subset per example) or "private" (a skill per
            task; num_skills is then num_tasks).
        relaxed: Gumbel-sigmoid in training ("learned" only). P1 and P2's SuperNI runs at rank 16:
            on; P2 on T0 and SuperNI light: off.
        straight_through: round allocations to 0 or 1 ("learned" only); the papers do not.
        granularity: what shares a router, see `patching.Granularity` ("learned" only if shared).
        num_blocks: for granularity "blocks".
        seed: of "random_task".
        family: as in `mixtures.ia3`; placements of LoRAs name their own.
    """
    level = patching.Granularity(granularity, num_blocks)
    if routing == "private":
        num_skills = num_tasks
    options = {"num_tasks": num_tasks, "seed": seed, "is_shared": level.is_shared}
    options |= {"relaxed": relaxed, "straight_through": straight_through}
    router = _skill_router(routing, level, options)
    sizes = {"num_skills": num_skills, "num_splits": num_splits}
    shared = router(**sizes, parent=None) if level.is_shared else None
    modules = {"lora": adapters.SkilledLoRA, "ia3": adapters.SkilledIA3}
    module = targets.choose("adapter", adapter, modules)
    if adapter == "lora":
        pattern = targets.placement(placement)
        factory = functools.partial(module, **sizes, rank=rank, alpha=alpha, router_factory=router)
        rules = (patching.Rule(pattern, factory),)
        average = mixtures.lora(rank, alpha, 0.0, placement, "uniform")
    else:
        factory = functools.partial(module, **sizes, router_factory=router)
        rules, average = targets.scaling_rules(factory, "as_in_paper", family), mixtures.ia3(family)
    rules = tuple(
        dataclasses.replace(rule, granularity=level, shared_router=shared) for rule in rules
    )
    name = _POLY_NAMES.get(routing) or ("poly" if num_splits == 1 else "mhr")
    return method_lib.Method(name, rules, average=average)


@method_lib.register()
@method_lib.arguments_of(
    poly, without=("routing", "straight_through", "seed"), num_splits=8, relaxed=False
)
def mhr(**options) -> method_lib.Method:
    """MHR, first called Poly-S: Poly with several splits (Caccia et al. 2023, section 3).

    Splits are 8 in P1 and with T0-3B in P2, 64 with T5-XL-LM, and divide all adapted widths. The
    runs of P2 on T0 switch `relaxed` off.

    Args:
        **options: arguments of `poly`, with these defaults.
    """
    return poly(**options)


@method_lib.register()
@method_lib.arguments_of(
    poly,
    without=(
        *("num_splits", "adapter", "routing", "relaxed"),
        *("straight_through", "granularity", "num_blocks"),
    ),
)
def random_mu(num_tasks: int, version: str = "per_task", **options) -> method_lib.Method:
    """Random-mu: random allocations while training on many tasks, the average afterwards.

    Args:
        num_tasks: as in `poly`.
        version: "per_task": each task keeps a random half of the skills (P1), "per_example": a
            random subset for each example of each batch, whatever its task (P2).
        **options: arguments of `poly`; `seed` is that of "per_task".
    """
    routing = targets.choose(
        "version", version, {"per_task": "random_task", "per_example": "random_example"}
    )
    return poly(num_tasks, routing=routing, **options)


@method_lib.register()
@method_lib.arguments_of(
    poly,
    without=(
        *("num_skills", "num_splits", "routing", "relaxed"),
        *("straight_through", "granularity", "num_blocks", "seed"),
    ),
)
def private(**options) -> method_lib.Method:
    """A module of its own for every task: Private-mu of P1, and what AdapterSoup averages.

    No task's gradient reaches another's module; they share the batch, clipping, and the steps at
    which Adam's momentum moves modules whose task is not in the batch.

    Args:
        **options: arguments of `poly`.
    """
    return poly(routing="private", **options)


def _skill_router(
    routing: str, level: patching.Granularity, options: Mapping[str, Any]
) -> routing_lib.SkillRouterFactory:
    """Returns the factory of a named task router with those options that it has."""
    router = targets.choose("routing", routing, SKILL_ROUTERS)
    if level.is_shared and not router.is_learned:
        raise errors.UserError(
            f"granularity {level.level!r} shares learned routers; routing {routing!r} has none. "
            "Leave granularity at 'linear'."
        )
    fields = {field.name for field in dataclasses.fields(router)}
    return functools.partial(router, **{k: v for k, v in options.items() if k in fields})
