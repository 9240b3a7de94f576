"""Poly, MHR and their variants: inventories of modules, combined by task."""

import dataclasses
import functools

import gin

from moe_peft import adapters, errors, patching
from moe_peft import routing as routing_lib
from moe_peft.methods import method as method_lib
from moe_peft.methods import mixtures, targets

# Of skills, by task. What they need besides the number of skills and splits is in `_skill_router`.
SKILL_ROUTERS = {
    "learned": routing_lib.TaskRouter,
    "uniform": routing_lib.UniformSkillRouter,
    "random_task": routing_lib.RandomTaskRouter,
    "random_example": routing_lib.RandomExampleRouter,
    "private": routing_lib.PrivateRouter,
}

_POLY_NAMES = {
    "uniform": "poly_uniform",
    "random_task": "random_per_task",
    "random_example": "random_per_example",
    "private": "private",
}


@gin.register(module="methods")
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
    """
    level = patching.Granularity(granularity, num_blocks)
    if routing == "private":
        num_skills = num_tasks
    router = _skill_router(routing, num_tasks, relaxed, straight_through, level, seed)
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
        rules, average = targets.scaling_rules(factory, "as_in_paper"), mixtures.ia3()
    rules = tuple(
        dataclasses.replace(rule, granularity=level, shared_router=shared) for rule in rules
    )
    needs_tasks = routing in ("learned", "random_task", "private") and num_tasks > 1
    name = _POLY_NAMES.get(routing) or ("poly" if num_splits == 1 else "mhr")
    return method_lib.Method(
        name, rules, num_tasks=num_tasks if needs_tasks else None, average=average
    )


@gin.register(module="methods")
def mhr(
    num_tasks: int,
    num_skills: int = 8,
    num_splits: int = 8,
    rank: int = 1,
    alpha: float = 1.0,
    placement: str = "all7",
    adapter: str = "lora",
    relaxed: bool = False,
    granularity: str = "linear",
    num_blocks: int | None = None,
) -> method_lib.Method:
    """MHR, first called Poly-S: Poly with several splits (Caccia et al. 2023, section 3).

    Args:
        num_tasks: as in `poly`, and so on.
        num_skills: as in `poly`.
        num_splits: 8 in P1 and with T0-3B in P2, 64 with T5-XL-LM; divides all adapted widths.
        rank: as in `poly`.
        alpha: as in `poly`.
        placement: as in `poly`.
        adapter: as in `poly`.
        relaxed: as in `poly`; the runs of P2 on T0 switch it off.
        granularity: as in `poly`.
        num_blocks: as in `poly`.
    """
    return poly(
        num_tasks,
        num_skills,
        num_splits,
        rank,
        alpha,
        placement,
        adapter,
        relaxed=relaxed,
        granularity=granularity,
        num_blocks=num_blocks,
    )


@gin.register(module="methods")
def random_mu(
    num_tasks: int,
    version: str = "per_task",
    num_skills: int = 8,
    rank: int = 1,
    alpha: float = 1.0,
    placement: str = "all7",
    seed: int = 0,
) -> method_lib.Method:
    """Random-mu: random allocations while training on many tasks, the average afterwards.

    Args:
        num_tasks: as in `poly`, and so on.
        version: "per_task": each task keeps a random half of the skills (P1), "per_example": a
            random subset for each example of each batch, whatever its task (P2).
        num_skills: as in `poly`.
        rank: as in `poly`.
        alpha: as in `poly`.
        placement: as in `poly`.
        seed: of "per_task".
    """
    routing = targets.choose(
        "version", version, {"per_task": "random_task", "per_example": "random_example"}
    )
    return poly(num_tasks, num_skills, 1, rank, alpha, placement, routing=routing, seed=seed)


@gin.register(module="methods")
def private(
    num_tasks: int,
    rank: int = 1,
    alpha: float = 1.0,
    placement: str = "all7",
    adapter: str = "lora",
) -> method_lib.Method:
    """A module of its own for every task: Private-mu of P1, and what AdapterSoup averages.

    No task's gradient reaches another's module; they share the batch, clipping, and the steps at
    which Adam's momentum moves modules whose task is not in the batch.

    Args:
        num_tasks: as in `poly`, and so on.
        rank: as in `poly`.
        alpha: as in `poly`.
        placement: as in `poly`.
        adapter: as in `poly`.
    """
    return poly(
        num_tasks, rank=rank, alpha=alpha, placement=placement, adapter=adapter, routing="private"
    )


def _skill_router(
    routing: str,
    num_tasks: int,
    relaxed: bool,
    straight_through: bool,
    granularity: patching.Granularity,
    seed: int,
) -> routing_lib.SkillRouterFactory:
    """Returns the factory of a named task router with its options."""
    router = targets.choose("routing", routing, SKILL_ROUTERS)
    if router is routing_lib.TaskRouter:
        return functools.partial(
            router,
            num_tasks=num_tasks,
            relaxed=relaxed,
            straight_through=straight_through,
            is_shared=granularity.is_shared,
        )
    if granularity.is_shared:
        raise errors.UserError(
            f"granularity {granularity.level!r} shares learned routers; routing {routing!r} has "
            "none. Leave granularity at 'linear'."
        )
    if router is routing_lib.RandomTaskRouter:
        return functools.partial(router, num_tasks=num_tasks, seed=seed)
    return router
