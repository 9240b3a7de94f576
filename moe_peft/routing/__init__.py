"""Who gets which weight: routers over experts, the context they see, and losses on them."""

from moe_peft.routing import losses
from moe_peft.routing.context import RoutingContext, Site
from moe_peft.routing.routers import (
    PRECISION,
    RNG,
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

__all__ = [
    "PRECISION",
    "RNG",
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
    "SkillRouter",
    "SkillRouterFactory",
    "TaskRouter",
    "UniformSkillRouter",
    "losses",
]
