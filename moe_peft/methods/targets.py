"""Where adapters go: placements by name, and the places of (IA)3."""

from typing import Any

from moe_peft import errors, patching

PLACEMENTS = patching.paths.PLACEMENTS  # names of the layers that low-rank adapters change

ROUTER_INPUTS = {"as_released": True, "as_in_paper": False}


def choose(what: str, name: str, options: dict[str, Any]) -> Any:
    """Returns options[name], or raises UserError with near names."""
    if name not in options:
        raise errors.UserError(
            f"Unknown {what} {name!r}.{errors.near(str(name), options)} "
            f"There are: {', '.join(options)}."
        )
    return options[name]


def placement(placement: str) -> str:
    """Returns the pattern of a named placement; one on whole paths, with a slash, as it is."""
    return placement if "/" in str(placement) else choose("placement", placement, PLACEMENTS)


def scaling_rules(
    adapter_factory: patching.rules.AdapterFactory, router_input: str, family: str
) -> tuple[patching.Rule, ...]:
    """Returns the places of (IA)3: keys, values and the inside of the feed-forward block of T5."""
    released = choose("router_input", router_input, ROUTER_INPUTS)
    own, of_sibling = ("outputs", "activated") if released else ("inputs", "inputs")
    return tuple(
        patching.Rule(
            place.pattern,
            adapter_factory,
            side=place.side,
            router_input=patching.Sibling(place.sibling, of_sibling) if place.sibling else own,
            beside=place.beside,
            site=place.site,
        )
        for place in choose("family", family, patching.paths.FAMILIES).scaled
    )
