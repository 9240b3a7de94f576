"""Where adapters go: placements by name, and the places of (IA)3."""

import functools
from typing import Any

from moe_peft import errors, patching

# Low-rank placements: names of the adapted layers. T5 1.0 has one up-projection `wi`, which stands
# for `wi_0` or `wi_1`.
PLACEMENTS = {
    "all7": r".*/(query|key|value|out|wi(_0|_1)?|wo)",
    "qkvo": r".*/(query|key|value|out)",
    "light": r".*/(key|value|wi(_1)?)",
    "molora_released": r".*/(query|key|value|out|wi(_0)?|wo)",
}

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
    adapter_factory: patching.rules.AdapterFactory, router_input: str
) -> tuple[patching.Rule, ...]:
    """Returns the places of (IA)3: keys, values and the inside of the feed-forward block.

    In a gated block (T5 1.1) that is the output of wi_1, which equals scaling the gated product; in
    an ungated one (T5 1.0) the input of wo.
    """
    released = choose("router_input", router_input, ROUTER_INPUTS)
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
