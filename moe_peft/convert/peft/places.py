"""Which modules `adapter_config.json` selects, and the rank and the scale of each.

The names of tensors say where adapters are. The config has to agree with them by the rules of PEFT
as it is today or of an older version: PEFT itself passes over tensors of a module that is not
selected, and leaves a module that has none as it is.
"""

from collections.abc import Callable, Collection, Mapping
import itertools
import math
import re
from typing import Any

from moe_peft import errors

ALL_LINEAR = "all-linear"

# The number of a module's block, "3" in "encoder.block.3.layer.1.EncDecAttention.q". Between, PEFT
# took the last number, 1 here.
_INDICES = (r".*?\.[^.]*\.(\d+)\.", r".*\.[^.]*\.(\d+)\.")


def check(
    config: Mapping[str, Any], held: Collection[str], known: Collection[str], where: str
) -> None:
    """Raises UserError unless the config selects those modules that the file holds.

    Args:
      config: of an adapter.
      held: modules with tensors, as transformers calls them.
      known: all linear maps in the network's blocks.
      where: config and tensors lie, for the message.
    """
    if not config.get("target_modules"):
        return  # PEFT chooses by the kind of model
    rules = list(itertools.product((_ends_at_dot, str.endswith), _INDICES))
    select = lambda rule: {module for module in known if _is_selected(config, module, *rule)}
    if set(held) in map(select, rules):
        return
    today = select(rules[0])
    if lost := sorted(set(held) - today):
        what = f"does not select {lost[0]}, of which there are tensors; PEFT would not load them"
    else:
        what = f"selects {min(today - set(held))}, of which there are no tensors"
    raise errors.UserError(f"{where}: target_modules {what}.")


def _is_selected(config: Mapping[str, Any], module: str, is_end: Callable, index: str) -> bool:
    targets, excluded = config["target_modules"], config.get("exclude_modules")
    if excluded and _matches(excluded, module, _ends_at_dot):
        return False
    if isinstance(targets, str):
        return targets.lower() == ALL_LINEAR or _matches(targets, module, is_end)
    layers = config.get("layers_to_transform")
    if module in targets or not _matches(targets, module, is_end) or layers in (None, []):
        return _matches(targets, module, is_end)
    patterns = config.get("layers_pattern") or []
    patterns = [patterns] if isinstance(patterns, str) else patterns
    indices = [rf"(?:^|.*?\.){pattern}\.(\d+)\." for pattern in patterns] or [index]
    found = next(filter(None, (re.match(each, module) for each in indices)), None)
    return found is not None and int(found[1]) in ([layers] if type(layers) is int else layers)


def _matches(names: str | list[str], module: str, is_end: Callable) -> bool:
    """Whether one regular expression, or one name of several, is that of a module."""
    if isinstance(names, str):
        return re.fullmatch(names, module) is not None
    return any(module == name or is_end(module, name) for name in names)


def _ends_at_dot(module: str, name: str) -> bool:
    return module.endswith(f".{name}")


def rank_and_alpha(config: Mapping[str, Any], module: str) -> tuple[int, float]:
    """Returns the rank of a module's LoRA, and its scale times that rank."""

    def own(patterns: Mapping[str, Any] | None, default: Any) -> Any:
        matching = (key for key in patterns or {} if re.match(rf"(.*\.)?({key})$", module))
        return next((patterns[key] for key in matching), default)

    rank = own(config.get("rank_pattern"), config["r"])
    alpha = own(config.get("alpha_pattern"), config["lora_alpha"])
    # The rank-stabilised scale is alpha / sqrt(rank).
    return rank, float(alpha) * (math.sqrt(rank) if config.get("use_rslora") else 1.0)


def common(config: Mapping[str, Any], modules: Collection[str]) -> tuple[int, float]:
    """Returns one rank and one alpha for all modules: the largest rank, to which zeros are added.

    Where the scales differ, that of all is 1, and each matrix B takes in its own.
    """
    each = [rank_and_alpha(config, module) for module in modules]
    rank, alpha = max(each)
    if len({alpha / rank for rank, alpha in each}) > 1:
        alpha = float(rank)
    return rank, alpha
