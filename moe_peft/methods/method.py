"""What a method is, and what is derived from it: parameter trees, groups, a description."""

from collections.abc import Callable
import dataclasses
import functools
import inspect
import re
from typing import Any

from flax import linen as nn
import gin

from moe_peft import adapters, errors, patching, routing

ADAPTER_LEAVES = rf"(.*/)?{patching.ADAPTER}/.*"
ROUTER_LEAVES = rf"(.*/)?{patching.ADAPTER}/router/.*"
ALL_LEAVES = ".*"
NO_LEAVES = "(?!)"

METHODS: dict[str, Callable[..., "Method"]] = {}
# Peaks that a method trains well with on most T5s, by AdamW with a linear rise and decay.
LEARNING_RATES: dict[str, float] = {}
ADAPTERS: dict[str, type[adapters.Adapter]] = {}


def register(
    *adapter_classes: type[adapters.Adapter], learning_rate: float = 1e-3
) -> Callable[..., Callable[..., "Method"]]:
    """Returns a decorator that makes a constructor of methods known.

    To gin as `methods.NAME`, to `METHODS` and `LEARNING_RATES`, and its adapters to `ADAPTERS`, by
    which a method is made again from a checkpoint's record.
    """

    def decorate(constructor):
        METHODS[constructor.__name__] = constructor
        LEARNING_RATES[constructor.__name__] = learning_rate
        ADAPTERS.update((each.__name__, each) for each in adapter_classes)
        return gin.register(module="methods")(constructor)

    return decorate


def arguments_of(
    *constructors: Callable[..., Any], without: tuple[str, ...] = (), **defaults: Any
) -> Callable[..., Callable[..., Any]]:
    """Returns a decorator: a function of `**options` gets the arguments of other ones.

    Args:
        *constructors: whose arguments follow the function's own, in order.
        without: names that are left out.
        **defaults: that are other ones here.
    """

    def decorate(function):
        own = dict(inspect.signature(function).parameters)
        del own["options"]
        for constructor in constructors:
            for name, each in inspect.signature(constructor).parameters.items():
                if name not in (*own, *without):
                    own[name] = each.replace(default=defaults.get(name, each.default))
        signature = inspect.Signature(list(own.values()), return_annotation=Method)

        @functools.wraps(function)
        def call(*args, **kwargs):
            bound = signature.bind(*args, **kwargs)
            bound.apply_defaults()
            return function(**bound.arguments)

        del call.__wrapped__  # gin would look there and take any name for an argument.
        call.__signature__ = signature
        call.arguments_of = constructors  # their docstrings explain the other arguments
        return call

    return decorate


@dataclasses.dataclass(frozen=True)
class Method:
    """An adapter method, complete."""

    name: str
    rules: tuple[patching.Rule, ...] = ()  # which layers get which adapter
    # regular expression on full parameter paths; what matches it trains
    trainable: str = ADAPTER_LEAVES
    # times the mean load-balancing loss of all routers, in the objective
    load_balancing_weight: float = 0.0
    z_weight: float = 0.0  # times the mean router z-loss
    # the method with one adapter that its modules become when averaged (mu); None where there is
    # nothing to average
    average: "Method | None" = None
    # how its parameters come from a run of another method; see `transfer`
    transfer: "Transfer | None" = None

    def __post_init__(self) -> None:
        for name in ("load_balancing_weight", "z_weight"):
            errors.check_at_least(name, getattr(self, name), 0)

    @functools.cached_property
    def routers(self) -> tuple[routing.AnyRouter, ...]:
        """A router of each rule whose adapter has one."""
        made = (rule.adapter_factory(parent=None) for rule in self.rules)
        found = (each.make_router(parent=None) for each in made if hasattr(each, "make_router"))
        return tuple(router for router in found if router is not None)

    @property
    def num_tasks(self) -> int | None:
        """Task ids it tells apart, 0 to num_tasks - 1; None if it needs none."""
        number = max((router.num_ids for router in self.routers), default=1)
        return number if number > 1 else None

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

    def router_loss_weights(self) -> dict[str, float]:
        """Returns what each router loss counts in the objective, by name."""
        return {
            routing.losses.LOAD_BALANCING: self.load_balancing_weight,
            routing.losses.Z: self.z_weight,
        }

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
    """Where a method's parameters come from; `transfer.initial` makes them."""

    source: Method  # the method of the multi-task run
    variant: str  # what is done with its parameters, one of `transfer.VARIANTS`


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
            value = _describe_factory(module.make_router)
        described[field.name] = value
    return described
