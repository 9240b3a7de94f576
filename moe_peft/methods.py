"""The papers' methods by name: which adapter, on which layers, routed how, and what trains.

Everything else is derived from a `Method`: the trainable tree, learning-rate groups, what is saved,
parameter counts. `docs/methods.md` explains every option and where the papers differ.
"""

from collections.abc import Callable
import dataclasses
import functools
import re
from typing import Any

from flax import linen as nn
import gin

from moe_peft import adapters, errors, patching
from moe_peft import routing as routing_lib

ADAPTER_LEAVES = rf"(.*/)?{patching.ADAPTER}/.*"
ROUTER_LEAVES = rf"(.*/)?{patching.ADAPTER}/router/.*"
ALL_LEAVES = ".*"
NO_LEAVES = "(?!)"

# Low-rank placements: names of the adapted layers. T5 1.0 has one up-projection `wi`, which stands
# for `wi_0` or `wi_1`.
PLACEMENTS = {
    "all7": r".*/(query|key|value|out|wi(_0|_1)?|wo)",
    "qkvo": r".*/(query|key|value|out)",
    "light": r".*/(key|value|wi(_1)?)",
    "molora_released": r".*/(query|key|value|out|wi(_0)?|wo)",
}

ROUTERS = {
    "token": routing_lib.TokenRouter,
    "sentence": routing_lib.SentenceRouter,
    "uniform": routing_lib.UniformRouter,
}

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

ROUTER_INPUTS = {"as_released": True, "as_in_paper": False}


@dataclasses.dataclass(frozen=True)
class Method:
    """An adapter method, complete.

    Attributes:
        name: of the method.
        rules: which layers get which adapter.
        trainable: regular expression on full parameter paths; what matches it trains.
        load_balancing_weight: times the mean load-balancing loss of all routers, in the objective.
        z_weight: times the mean router z-loss.
        num_tasks: task ids it tells apart, 0 to num_tasks - 1; None if it needs none.
        average: the method with one adapter that its modules become when averaged (mu); None where
            there is nothing to average.
        transfer: how its parameters come from a run of another method; see `transfer`.
    """

    name: str
    rules: tuple[patching.Rule, ...] = ()
    trainable: str = ADAPTER_LEAVES
    load_balancing_weight: float = 0.0
    z_weight: float = 0.0
    num_tasks: int | None = None
    average: "Method | None" = None
    transfer: "Transfer | None" = None

    def __post_init__(self) -> None:
        """Refuses negative loss weights."""
        for name in ("load_balancing_weight", "z_weight"):
            if getattr(self, name) < 0:
                raise errors.UserError(f"{name} is {getattr(self, name)}; expected at least 0.")

    def patch(self, module: nn.Module) -> patching.Patched:
        """Returns the model with this method's adapters; the model itself is not touched."""
        return patching.Patched(module, self.rules)

    def is_trainable(self, path: str) -> bool:
        """Whether the parameter at 'encoder/layers_0/.../adapter/lora_a' trains."""
        return re.fullmatch(self.trainable, path) is not None

    def split(self, params: patching.trees.Params) -> tuple[dict, dict]:
        """Returns (frozen, trainable), nested dicts; `patching.merge` is the inverse."""
        return patching.split(params, self.is_trainable)

    def trainable_mask(self, params: patching.trees.Params) -> dict:
        """Returns the tree of `params` with True for trainable leaves and False for frozen ones."""
        flat = {path: self.is_trainable(path) for path in patching.flatten(params)}
        return patching.trees.unflatten(flat)

    def learning_rate_group(self, path: str) -> str:
        """Returns "routers", "adapters" or "base" for a parameter path."""
        if re.fullmatch(ROUTER_LEAVES, path):
            return "routers"
        return "adapters" if re.fullmatch(ADAPTER_LEAVES, path) else "base"

    def describe(self) -> dict[str, Any]:
        """Returns what defines the method, as JSON types: stored in checkpoints and compared."""
        described = {
            "name": self.name,
            "rules": [_describe_rule(rule) for rule in self.rules],
            "trainable": self.trainable,
            "load_balancing_weight": self.load_balancing_weight,
            "z_weight": self.z_weight,
        }
        if self.transfer is not None:
            described["transfer"] = {
                "variant": self.transfer.variant,
                "source": self.transfer.source.describe(),
            }
        return described


@dataclasses.dataclass(frozen=True)
class Transfer:
    """Where a method's parameters come from; `transfer.initial` makes them.

    Attributes:
        source: the method of the multi-task run.
        variant: what is done with its parameters, one of `transfer.VARIANTS`.
    """

    source: Method
    variant: str


def _describe_rule(rule: patching.Rule) -> dict[str, Any]:
    """Returns a rule as JSON types."""
    fields = {field.name: getattr(rule, field.name) for field in dataclasses.fields(rule)}
    factory = fields.pop("adapter_factory")
    if isinstance(rule.router_input, patching.Sibling):
        fields["router_input"] = dataclasses.asdict(rule.router_input)
    del fields["shared_router"]  # The adapter's own router says the same.
    granularity = dataclasses.asdict(fields.pop("granularity"))
    if rule.granularity.is_shared:
        fields["granularity"] = granularity
    return fields | {"adapter": _describe_factory(factory)}


def _describe_factory(factory: Callable[..., nn.Module]) -> dict[str, Any]:
    """Returns the settings of the module that a factory makes, defaults included."""
    module = factory(parent=None)
    described = {"class": type(module).__name__}
    for field in dataclasses.fields(module):
        value = getattr(module, field.name)
        if field.name in ("parent", "name"):
            continue
        if field.name == "router_factory" and value is not None:
            sizes = ("num_experts", "num_skills", "num_splits")
            sizes = {name: getattr(module, name) for name in sizes if hasattr(module, name)}
            value = _describe_factory(functools.partial(value, **sizes))
        described[field.name] = value
    return described


def _choose(what: str, name: str, options: dict[str, Any]) -> Any:
    """Returns options[name], or raises UserError with near names."""
    if name not in options:
        raise errors.UserError(
            f"Unknown {what} {name!r}.{errors.near(str(name), options)} "
            f"There are: {', '.join(options)}."
        )
    return options[name]


def _placement(placement: str) -> str:
    """Returns the pattern of a named placement; one on whole paths, with a slash, as it is."""
    return placement if "/" in str(placement) else _choose("placement", placement, PLACEMENTS)


def _router_factory(
    routing: str, top_k: int | None, renormalize: bool, jitter: float
) -> routing_lib.RouterFactory:
    """Returns the factory of a named router with its options."""
    router = _choose("routing", routing, ROUTERS)
    if router is routing_lib.UniformRouter:
        if top_k is not None or jitter:
            raise errors.UserError("Uniform routing has no top_k and no jitter.")
        return router
    return functools.partial(router, top_k=top_k, renormalize=renormalize, jitter=jitter)


def _scaling_rules(
    adapter_factory: patching.rules.AdapterFactory, router_input: str
) -> tuple[patching.Rule, ...]:
    """Returns the places of (IA)3: keys, values and the inside of the feed-forward block.

    In a gated block (T5 1.1) that is the output of wi_1, which equals scaling the gated product; in
    an ungated one (T5 1.0) the input of wo.
    """
    released = _choose("router_input", router_input, ROUTER_INPUTS)
    rule = functools.partial(patching.Rule, adapter_factory=adapter_factory)
    array = "activated" if released else "inputs"
    return (
        rule(".*/(key|value)", router_input="outputs" if released else "inputs"),
        rule(".*/wi_1", router_input=patching.Sibling("wi_0", array), site="feed-forward"),
        rule(
            ".*/wo",
            side="inputs",
            beside="wi",
            router_input=patching.Sibling("wi", array),
            site="feed-forward",
        ),
    )


@gin.register(module="methods")
def ia3() -> Method:
    """(IA)3: one vector on keys, values and the feed-forward block's inside (Liu et al. 2022)."""
    return Method("ia3", _scaling_rules(adapters.IA3, "as_in_paper"))


@gin.register(module="methods")
def mov(
    num_experts: int = 10,
    router_input: str = "as_released",
    top_k: int | None = None,
    renormalize: bool = True,
    jitter: float = 0.0,
    routing: str = "token",
    load_balancing_weight: float = 0.0,
    z_weight: float = 0.0,
) -> Method:
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
        z_weight: of the router z-loss; likewise.
    """
    router_factory = _router_factory(routing, top_k, renormalize, jitter)
    factory = functools.partial(
        adapters.MoV, num_experts=num_experts, router_factory=router_factory
    )
    rules = _scaling_rules(factory, router_input)
    return Method("mov", rules, ADAPTER_LEAVES, load_balancing_weight, z_weight)


@gin.register(module="methods")
def lora(
    rank: int = 4,
    alpha: float = 16.0,
    dropout_rate: float = 0.0,
    placement: str = "all7",
    a_init: str = "normal",
) -> Method:
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
    pattern = _placement(placement)
    factory = functools.partial(
        adapters.LoRA, rank=rank, alpha=alpha, dropout_rate=dropout_rate, a_init=a_init
    )
    return Method("lora", (patching.Rule(pattern, factory),))


@gin.register(module="methods")
def lora_big(
    rank: int = 16,
    alpha: float = 1.0,
    dropout_rate: float = 0.0,
    placement: str = "all7",
    a_init: str = "uniform",
) -> Method:
    """LoRA-big: the large single LoRA beside MHR (Caccia et al. 2023), 35M parameters at T5-XL."""
    method = lora(rank, alpha, dropout_rate, placement, a_init)
    return dataclasses.replace(method, name="lora_big")


@gin.register(module="methods")
def molora(
    num_experts: int = 10,
    rank: int = 4,
    alpha: float = 16.0,
    dropout_rate: float = 0.0,
    placement: str = "molora_released",
    a_init: str = "normal",
    top_k: int | None = None,
    renormalize: bool = True,
    jitter: float = 0.0,
    routing: str = "token",
    load_balancing_weight: float = 0.0,
    z_weight: float = 0.0,
) -> Method:
    """MoLoRA: mixtures of LoRAs; a token router sees what the frozen layer reads.

    Args:
        num_experts: LoRAs per layer; the paper reports 2 to 15.
        rank: of each.
        alpha: updates are scaled by alpha / rank.
        dropout_rate: of the adapter's inputs in training; the router sees them undropped.
        placement: one of `PLACEMENTS`.
        a_init: as in `lora`.
        top_k: as in `mov`, and so on.
        renormalize: as in `mov`.
        jitter: as in `mov`.
        routing: as in `mov`.
        load_balancing_weight: as in `mov`.
        z_weight: as in `mov`.
    """
    pattern = _placement(placement)
    factory = functools.partial(
        adapters.MoLoRA,
        num_experts=num_experts,
        rank=rank,
        alpha=alpha,
        dropout_rate=dropout_rate,
        a_init=a_init,
        router_factory=_router_factory(routing, top_k, renormalize, jitter),
    )
    rules = (patching.Rule(pattern, factory),)
    return Method("molora", rules, ADAPTER_LEAVES, load_balancing_weight, z_weight)


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
) -> Method:
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
    module = _choose("adapter", adapter, modules)
    if adapter == "lora":
        pattern = _placement(placement)
        factory = functools.partial(module, **sizes, rank=rank, alpha=alpha, router_factory=router)
        rules = (patching.Rule(pattern, factory),)
        average = lora(rank, alpha, 0.0, placement, "uniform")
    else:
        factory = functools.partial(module, **sizes, router_factory=router)
        rules, average = _scaling_rules(factory, "as_in_paper"), ia3()
    rules = tuple(
        dataclasses.replace(rule, granularity=level, shared_router=shared) for rule in rules
    )
    needs_tasks = routing in ("learned", "random_task", "private") and num_tasks > 1
    name = _POLY_NAMES.get(routing) or ("poly" if num_splits == 1 else "mhr")
    return Method(name, rules, num_tasks=num_tasks if needs_tasks else None, average=average)


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
) -> Method:
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
) -> Method:
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
    routing = _choose(
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
) -> Method:
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
    router = _choose("routing", routing, SKILL_ROUTERS)
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


@gin.register(module="methods")
def full() -> Method:
    """Full fine-tuning: no adapter, every weight trains."""
    return Method("full", trainable=ALL_LEAVES)


@gin.register(module="methods")
def frozen() -> Method:
    """The backbone as it is: no adapter, nothing trains."""
    return Method("frozen", trainable=NO_LEAVES)


METHODS: dict[str, Callable[..., Method]] = {
    constructor.__name__: constructor
    for constructor in (
        *(ia3, lora, lora_big, mov, molora),
        *(poly, mhr, random_mu, private),
        *(full, frozen),
    )
}


def get(name: str) -> Callable[..., Method]:
    """Returns the constructor of a method by its name, or raises UserError with near names."""
    return _choose("method", name, METHODS)
