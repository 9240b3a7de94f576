"""What a method would adapt and train in a network, worked out from shapes alone.

Nothing is allocated and nothing is compiled, so an 11B network is planned on a laptop in seconds.
"""

import collections
import dataclasses
import itertools
import json
import math
import re
from typing import Any

from flax import linen as nn
import jax
import rich.console

from moe_peft import methods, patching
from moe_peft.config import settings as settings_lib
from moe_peft.models import encoder_decoder, special_ids
from moe_peft.patching import rules as rules_lib
from moe_peft.runtime import tables

# Any lengths do: no parameter of an encoder-decoder depends on them.
_SHAPES = dict.fromkeys(
    ("encoder_input_tokens", "decoder_input_tokens", "decoder_target_tokens"), (1, 8)
)


@dataclasses.dataclass(frozen=True)
class RulePlan:
    """What one rule of the method does."""

    pattern: str  # regular expression over full layer paths
    adapter: str  # name of the adapter's class
    layers: tuple[str, ...]  # paths of those it matches; a scanned one stands for a stack
    num_parameters: int  # of its adapters and their routers


@dataclasses.dataclass(frozen=True)
class LeafPlan:
    """Leaves of one kind, the same in every layer of a stack."""

    path: str  # with `*` for the number of the layer
    shape: tuple[int, ...]  # of one leaf
    axes: tuple[str | None, ...]  # logical axes of one leaf, as partitioning sees them
    count: int  # number of leaves
    num_parameters: int  # of all of them together


@dataclasses.dataclass(frozen=True)
class Plan:
    """The result of `plan`; counts are numbers of parameters."""

    method: dict[str, Any]  # as the method describes itself
    rules: tuple[RulePlan, ...]  # one entry per rule that matches something
    parts: dict[str, int]  # adapter parameters by part (`vectors`, `lora_a`, `router`, ...)
    base: int  # the network's own parameters
    adapters: int  # parameters that the method adds
    trainable: int  # parameters that learn
    frozen: int  # parameters that do not
    percent: float  # trainable, in per cent of `base`
    nominal_size: int | None  # the size in the model's name ("3B"), if the model file says
    nominal_percent: float | None  # trainable, in per cent of `nominal_size`
    # float32 trainable parameters and AdamW's two moments, the most a checkpoint holds; Adafactor's
    # second moments are smaller
    checkpoint_bytes: int
    export_bytes: int  # the trainable parameters alone
    frozen_bytes: int  # the frozen parameters in bfloat16
    leaves: tuple[LeafPlan, ...]  # the adapters' leaves
    # name of what trains on a new task afterwards, if that is another method
    target_method: str | None = None
    target_trainable: int | None = None  # parameters that learn there


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings:
    """Of `plan`."""

    model: nn.Module  # an encoder-decoder with T5X's calls
    method: methods.Method  # which layers get what, and what learns
    nominal_size: int | float | None = None  # the size in the model's name; papers divide by it
    embedding_dim: int = 384  # width of sentence embeddings, if routers use them
    target_method: methods.Method | None = None  # what trains on a new task after `method`
    # If it is "hf:" or "t5x:", the headers of its files are compared with the model.
    backbone: str | None = None


@settings_lib.entry_point(Settings, "plan", module="analysis")
def plan(settings: Settings) -> Plan:
    """Returns what a method does to a model, from shapes alone.

    A rule that matches nothing, two rules that match one layer, or a backbone of another size than
    the model raise UserError.
    """
    model, method, nominal_size = settings.model, settings.method, settings.nominal_size
    found = patching.matches(model, method.rules, _SHAPES, enable_dropout=False)
    found.check()
    variables = _abstract_variables(model, method, settings.embedding_dim)
    params = patching.flatten(variables["params"])
    sizes = {path: leaf.size for path, leaf in params.items()}
    in_adapters = {path: size for path, size in sizes.items() if patching.is_adapter(path)}
    if settings.backbone is not None:
        from moe_peft.weights import backbone as backbone_lib  # imports what saves checkpoints

        own = {path: leaf for path, leaf in params.items() if path not in in_adapters}
        shapes = patching.trees.unflatten(own)
        backbone_lib.check_headers(settings.backbone, shapes, getattr(model, "config", None))
        backbone_lib.check_special_ids(settings.backbone, special_ids.of(model))
    frozen, trainable = map(patching.flatten, method.split(variables["params"]))
    num_frozen, num_trainable = (sum(map(sizes.get, paths)) for paths in (frozen, trainable))
    num_base = sum(sizes.values()) - sum(in_adapters.values())
    axes = patching.flatten(variables.get("params_axes", {}))
    return Plan(
        method=method.describe(),
        rules=_rules(found, in_adapters),
        parts=_parts(in_adapters),
        base=num_base,
        adapters=sum(in_adapters.values()),
        trainable=num_trainable,
        frozen=num_frozen,
        percent=100 * num_trainable / num_base,
        nominal_size=None if nominal_size is None else int(nominal_size),
        nominal_percent=100 * num_trainable / nominal_size if nominal_size else None,
        checkpoint_bytes=3 * 4 * num_trainable,
        export_bytes=4 * num_trainable,
        frozen_bytes=2 * num_frozen,
        leaves=_leaves({path: params[path] for path in in_adapters}, axes),
        **_target(settings),
    )


def _target(settings: Settings) -> dict[str, Any]:
    """What trains on a new task, where that is another method."""
    method = settings.target_method
    if method is None or method == settings.method:
        return {}
    variables = _abstract_variables(settings.model, method, settings.embedding_dim)
    learns = method.split(variables["params"])[1]
    trainable = patching.trees.num_parameters(learns)
    return {"target_method": method.name, "target_trainable": trainable}


def _abstract_variables(model: nn.Module, method: methods.Method, embedding_dim: int) -> Any:
    """Shapes and logical axes of what the model holds with a method's adapters."""
    network = encoder_decoder.EncoderDecoder(method.patch(model), method=method)
    extras = {"task_ids": (1,), "sentence_embeddings": (1, embedding_dim)}
    init = lambda rng: network.init_variables(rng, {**_SHAPES, **extras})
    return jax.eval_shape(init, jax.random.key(0))


def _rules(found: patching.Matches, sizes: dict[str, int]) -> tuple[RulePlan, ...]:
    plans = []
    for rule, layers in zip(found.rules, found.paths, strict=True):
        if layers:
            prefixes = tuple(f"{layer}/{patching.ADAPTER}/" for layer in layers)
            size = sum(size for path, size in sizes.items() if path.startswith(prefixes))
            adapter = type(rule.adapter_factory(parent=None)).__name__
            plans.append(RulePlan(rule.pattern, adapter, layers, size))
    return tuple(plans)


def _parts(sizes: dict[str, int]) -> dict[str, int]:
    parts = collections.Counter()
    for path, size in sizes.items():
        names = path.split("/")
        parts[names[names.index(patching.ADAPTER) + 1]] += size
    return dict(sorted(parts.items()))


def _leaves(leaves: dict[str, Any], axes: dict[str, Any]) -> tuple[LeafPlan, ...]:
    """Leaves that differ in the number of their layer only, counted once."""
    names = lambda path: tuple(axes[path].names) if path in axes else ()
    starred = lambda path: re.sub(r"(?<=layers_)\d+", "*", path)
    kind = lambda path, leaf: (starred(path), leaf.shape, names(f"{path}_axes"), leaf.size)
    kinds = collections.Counter(itertools.starmap(kind, leaves.items()))
    return tuple(LeafPlan(*kind, count, count * size) for (*kind, size), count in kinds.items())


def show(result: Plan, as_json: bool = False, console: rich.console.Console | None = None) -> None:
    """Prints a plan as tables, or as JSON with the field names of `Plan`."""
    if as_json:
        print(json.dumps(dataclasses.asdict(result), indent=2))
        return
    console = console or tables.wide_console(140)
    for table in (_rule_table(result), _leaf_table(result), _count_table(result)):
        if table.row_count:
            console.print(table)


def _grid(title: str, *columns: str):
    words = ("adapter", "rule", "matched", "leaf", "shape", "logical axes", "what")
    return tables.grid(*columns, left=words, title=title, overflow="fold")


def _rule_table(result: Plan):
    title = f"Method {result.method['name']}: what each rule matches"
    table = _grid(title, "adapter", "rule", "layers", "parameters", "matched")
    for rule in result.rules:
        count, size = str(len(rule.layers)), f"{rule.num_parameters:,}"
        table.add_row(rule.adapter, rule.pattern, count, size, rules_lib.summary(rule.layers))
    return table


def _leaf_table(result: Plan):
    table = _grid("Adapter leaves", "leaf", "shape", "logical axes", "leaves", "parameters")
    for leaf in result.leaves:
        shape, axes = " ".join(map(str, leaf.shape)), " ".join(map(str, leaf.axes))
        table.add_row(leaf.path, shape, axes, str(leaf.count), f"{leaf.num_parameters:,}")
    return table


def _count_table(result: Plan):
    table = _grid("Parameters", "what", "parameters")
    counts = {"network": result.base}
    counts |= {f"adapters: {part}": size for part, size in result.parts.items()}
    counts |= {"trainable": result.trainable, "frozen": result.frozen}
    for name, count in counts.items():
        table.add_row(name, f"{count:,}")
    table.add_row("trainable, % of the network", f"{result.percent:.4f}")
    if result.nominal_percent is not None:
        nominal = f"trainable, % of the nominal {result.nominal_size:,}"
        table.add_row(nominal, f"{result.nominal_percent:.4f}")
    if result.target_method is not None:
        name = f"trainable on a new task ({result.target_method})"
        table.add_row(name, f"{result.target_trainable:,}")
    table.add_row("checkpoint with AdamW", _bytes(result.checkpoint_bytes))
    table.add_row("exported adapters, float32", _bytes(result.export_bytes))
    table.add_row("frozen weights, bfloat16", _bytes(result.frozen_bytes))
    return table


def _bytes(count: float) -> str:
    """
    >>> _bytes(999), _bytes(31_800_000)
    ('999 B', '31.8 MB')
    """
    if count < 1000:
        return f"{count} B"
    power = min(int(math.log10(count)) // 3, 3)
    return f"{count / 1000**power:.3g} {('kB', 'MB', 'GB')[power - 1]}"
