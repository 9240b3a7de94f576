"""Which of our methods PEFT can express, with which settings, and the way back."""

from collections.abc import Mapping, Sequence
import dataclasses
import re
from typing import Any

from moe_peft import adapters, errors, methods, patching
from moe_peft.convert.peft import places, tensors
from moe_peft.models import t5
from moe_peft.routing import task_routers
from moe_peft.weights import t5_names, t5_sizes

_KINDS = {adapters.LoRA: "LORA", adapters.IA3: "IA3", adapters.SkilledLoRA: "POLY"}
# Settings that change numbers: what our methods and PEFT call them.
_NAMES = {
    "LORA": {"rank": "r", "alpha": "lora_alpha", "dropout_rate": "lora_dropout"},
    "IA3": {},
    "POLY": {"rank": "r", **{f"num_{it}": f"n_{it}" for it in ("tasks", "skills", "splits")}},
}
_SAME_FOR_ALL = {
    "LORA": {
        "bias": "none",
        "init_lora_weights": True,
        **dict.fromkeys(("fan_in_fan_out", "use_rslora", "use_dora"), False),
    },
    "IA3": {"fan_in_fan_out": False, "init_ia3_weights": True},
    "POLY": {"poly_type": "poly", "init_weights": True},
}


def check_expressible(method: methods.Method, where: str) -> None:
    """Raises UserError, with the reason, if PEFT cannot express the method."""
    if reason := why_not(method):
        raise errors.UserError(
            f"{where}: the method {method.name!r} cannot be written for PEFT: {reason}. Write it "
            "to FILE.safetensors, our own format (docs/interop.md)."
        )


def why_not(method: methods.Method) -> str | None:
    """Returns the reason why PEFT cannot express the method; None if it can."""
    if not method.rules:
        return "it has no adapters"
    for rule in method.rules:
        adapter = rule.adapter_factory(parent=None)
        if type(adapter) not in _KINDS:
            return f"PEFT has no {type(adapter).__name__}"
        if not isinstance(adapter, adapters.SkilledLoRA):
            continue
        router = _router(adapter)
        if not isinstance(router, task_routers.TaskRouter):
            return f"its Poly has learned task routers only, not {type(router).__name__}"
        if router.straight_through:
            return "its Poly does not round allocations (straight_through)"
        if rule.granularity.is_shared:
            return (
                f"its Poly has a router for every layer, not one per {rule.granularity.level} "
                "(one task of it is a LoRA: --task)"
            )
    layer = f"encoder/layer/{patching.ADAPTER}"
    frozen = "encoder/layer/kernel", t5_names.path_of("lm_head.weight")
    leaves = f"{layer}/lora_a", f"{layer}/router/logits", *frozen
    if [method.is_trainable(path) for path in leaves] != [True, True, False, False]:
        return "what it trains is not all of its adapters, or more than those"
    return None


def kind(method: methods.Method) -> str:
    """Returns "LORA", "IA3" or "POLY"."""
    return _KINDS[type(_adapter(method))]


def folded_alpha(method: methods.Method) -> float:
    """Returns what B takes in: PEFT's Poly has a scale of 1 / r and no alpha."""
    adapter = _adapter(method)
    return adapter.alpha if isinstance(adapter, adapters.SkilledLoRA) else 1.0


def settings(method: methods.Method) -> dict[str, Any]:
    """Returns what `adapter_config.json` says of the method; where its layers are is separate."""
    own, adapter = kind(method), _adapter(method)
    found = {
        theirs: _router(adapter).num_tasks if ours == "num_tasks" else getattr(adapter, ours)
        for ours, theirs in _NAMES[own].items()
    }
    if own == "LORA" and found["lora_alpha"] == int(found["lora_alpha"]):
        found["lora_alpha"] = int(found["lora_alpha"])  # as PEFT writes it
    return {"peft_type": own, **found, **_SAME_FOR_ALL[own]}


def method_settings(config: Mapping[str, Any], layers: Sequence[str]) -> dict[str, Any]:
    """Returns the settings that change the adapters' numbers in these layers, to be compared."""
    names = {"peft_type", *_NAMES[config["peft_type"]].values()} - {"lora_dropout"}
    found = {name: config[name] for name in names}
    if config["peft_type"] == "LORA":
        found["r"], found["lora_alpha"] = places.common(config, map(tensors.module_of, layers))
    return found


def method(
    config: Mapping[str, Any], layers: Sequence[str], whole: Sequence[str], network: t5.T5Config
) -> tuple[methods.Method, list[str]]:
    """Returns our method with the settings of a PEFT folder, and the gin lines that make it.

    `layers` are those with an adapter, as paths of the unscanned network, and `whole` the leaves
    that train besides; with those, no gin lines make it.
    """
    own = config["peft_type"]
    name, settings = own.lower(), {ours: config[theirs] for ours, theirs in _NAMES[own].items()}
    if own != "IA3":
        settings["placement"] = _placement(layers, network)
    if own == "LORA":
        found = method_settings(config, layers)
        settings["rank"], settings["alpha"] = found["r"], found["lora_alpha"]
        settings["dropout_rate"] = float(config["lora_dropout"])
    elif own == "POLY":
        settings["relaxed"] = True
    made, lines = methods.get(name)(**settings), [f"METHOD = @methods.{name}()"]
    if whole:
        return dataclasses.replace(made, trainable="|".join([made.trainable, *whole])), []
    return made, [*lines, *(f"{name}.{key} = {value!r}" for key, value in settings.items())]


def kernels(network: t5.T5Config) -> dict[str, tuple[int, int]]:
    """Returns {layer: (inputs, outputs)} of the linear maps of the unscanned network's blocks."""
    shapes = t5_sizes.shapes_of(dataclasses.replace(network, scan_layers=False))
    return {
        path.removesuffix("/kernel"): shape
        for path, shape in shapes.items()
        if path.endswith("/kernel") and "/layers_" in path
    }


def _placement(layers: Sequence[str], network: t5.T5Config) -> str:
    """Returns the placement, by its name or as a regular expression, of exactly these layers."""
    last = sorted({layer.rpartition("/")[2] for layer in layers})
    shared = f".*/({'|'.join(last)})"
    known = {**{pattern: name for name, pattern in methods.PLACEMENTS.items()}, shared: shared}
    for pattern, name in known.items():
        if {path for path in kernels(network) if re.fullmatch(pattern, path)} == set(layers):
            return name
    return "|".join(sorted(layers))


def _adapter(method: methods.Method) -> adapters.LoRA | adapters.IA3 | adapters.SkilledLoRA:
    return method.rules[0].adapter_factory(parent=None)


def _router(adapter: adapters.SkilledLoRA) -> task_routers.SkillRouter:
    return adapter.router_factory(
        num_skills=adapter.num_skills, num_splits=adapter.num_splits, parent=None
    )
