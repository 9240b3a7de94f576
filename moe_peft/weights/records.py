"""A method and a network from what a checkpoint or an exported file says about its run."""

from collections.abc import Mapping
import functools
from typing import Any

from flax import linen as nn
import gin

from moe_peft import errors, methods, patching, routing
from moe_peft.models import family
from moe_peft.weights import identity, saved_run

_ROUTERS = {cls.__name__: cls for cls in (*routing.ROUTERS, *routing.SKILL_ROUTERS)}


def method(described: Mapping[str, Any], where: str) -> methods.Method:
    """Returns the method of which `Method.describe` says that; the variant mu of it is not known.

    Args:
      described: as JSON types.
      where: it was found, for messages.

    Raises:
      UserError: it holds something that this version does not know.
    """
    try:
        made = _method(described, where)
        same = identity.as_json(made.describe()) == described
    except (KeyError, TypeError, AttributeError) as error:
        raise errors.UserError(
            f"{where}: the record of the method lacks or has too much of {error}."
        ) from error
    if not same:
        difference = identity.first_difference(
            described, identity.as_json(made.describe()), "method"
        )
        raise errors.UserError(f"{where}: this version cannot make its method again: {difference}.")
    return made


def network(description: Mapping[str, Any], where: str) -> nn.Module:
    """Returns the network without adapters that a run's description tells of.

    Raises:
      UserError: it tells of none, or of another kind.
    """
    found = description.get("model") or {}
    own = family.of_network(found.get("class"))
    if own is None:
        raise errors.UserError(
            f"{where} does not say which network it belongs to; name a folder with --base."
        )
    # JSON has lists only.
    tuples = {k: tuple(v) if isinstance(v, list) else v for k, v in found["config"].items()}
    return own.network(own.config(**tuples))


@gin.register("method", module="saved")
def saved_method(source: str) -> methods.Method:
    """Returns the method that a run's folder, an adapter folder or an exported file tells of."""
    return method(saved_run.description_of(source)["method"], source)


@gin.register("network", module="saved")
def saved_network(source: str) -> nn.Module:
    """Returns the network, without adapters, that it was trained on."""
    return network(saved_run.description_of(source), source)


def _method(described: Mapping[str, Any], where: str) -> methods.Method:
    rules = tuple(_rule(rule) for rule in described["rules"])
    transfer = described.get("transfer")
    if transfer is not None:
        transfer = methods.Transfer(method(transfer["source"], where), transfer["variant"])
    return methods.Method(
        described["name"],
        rules,
        described["trainable"],
        described["load_balancing_weight"],
        described["z_weight"],
        transfer=transfer,
    )


def _rule(described: Mapping[str, Any]) -> patching.Rule:
    fields = dict(described)
    level = patching.Granularity(**fields.pop("granularity", {"level": "linear"}))
    adapter = dict(fields.pop("adapter"))
    cls = methods.ADAPTERS[adapter.pop("class")]
    sizes = {name: adapter[name] for name in cls.router_sizes}
    router = _router(adapter.pop("router_factory", None), sizes)
    if isinstance(fields["router_input"], Mapping):
        fields["router_input"] = patching.Sibling(**fields["router_input"])
    return patching.Rule(
        **fields,
        adapter_factory=functools.partial(cls, **adapter, router_factory=router),
        granularity=level,
        shared_router=router(**sizes, parent=None) if level.is_shared else None,
    )


def _router(
    described: Mapping[str, Any] | None, sizes: Mapping[str, int]
) -> routing.RouterFactory | None:
    if described is None:
        return None
    fields = {name: value for name, value in described.items() if name not in sizes}
    return functools.partial(_ROUTERS[fields.pop("class")], **fields)
