"""Who gets which weight: routers over experts, the context they see, and losses on them."""

from moe_peft.routing import losses
from moe_peft.routing.context import RoutingContext, Site
from moe_peft.routing.routers import (
    PRECISION,
    RNG,
    AnyRouter,
    Router,
    RouterFactory,
    SentenceRouter,
    SoftmaxRouter,
    TokenRouter,
    UniformRouter,
    check_positive,
)
from moe_peft.routing.task_routers import (
    PrivateRouter,
    RandomExampleRouter,
    RandomTaskRouter,
    SkillRouter,
    SkillRouterFactory,
    TaskRouter,
    UniformSkillRouter,
)

# Every router; what their classes say of themselves makes them known to methods and records.
ROUTERS = (TokenRouter, SentenceRouter, UniformRouter)
SKILL_ROUTERS = (
    *(TaskRouter, UniformSkillRouter),
    *(RandomTaskRouter, RandomExampleRouter, PrivateRouter),
)

__all__ = [
    "AnyRouter",
    "PRECISION",
    "RNG",
    "ROUTERS",
    "Router",
    "RouterFactory",
    "RoutingContext",
    "SentenceRouter",
    "Site",
    "SoftmaxRouter",
    "TokenRouter",
    "UniformRouter",
    "check_positive",
    "PrivateRouter",
    "RandomExampleRouter",
    "RandomTaskRouter",
    "SKILL_ROUTERS",
    "SkillRouter",
    "SkillRouterFactory",
    "TaskRouter",
    "UniformSkillRouter",
    "losses",
]
