"""What a method would adapt and train in a network, worked out from shapes alone.

Nothing is allocated and nothing is compiled, so an 11B network is planned on a laptop in seconds.
"""

import dataclasses
import json
import re
from typing import Any

from flax import linen as nn
import gin
import jax
import rich.box
import rich.console
import rich.table

from moe_peft import methods, patching
from moe_peft.models import encoder_decoder
from moe_peft.patching import rules as rules_lib

# Any lengths do: no parameter of an encoder-decoder depends on them.
_TOKENS = (1, 8)
_TOKEN_FEATURES = ("encoder_input_tokens", "decoder_input_tokens", "decoder_target_tokens")


@dataclasses.dataclass(frozen=True)
class RulePlan:
    """What one rule of the method does.

    Attributes:
      pattern: regular expression over full layer paths.
      adapter: name of the adapter's class.
      layers: paths of the layers it matches; a scanned path stands for a whole stack.
      num_parameters: of its adapters and their routers.
    """

    pattern: str
    adapter: str
    layers: tuple[str, ...]
    num_parameters: int


@dataclasses.dataclass(frozen=True)
class LeafPlan:
    """Leaves of one kind, the same in every layer of a stack.

    Attributes:
      path: with `*` for the number of the layer.
      shape: of one leaf.
      axes: logical axes of one leaf, as partitioning sees them.
      count: number of leaves.
      num_parameters: of all of them together.
    """

    path: str
    shape: tuple[int, ...]
    axes: tuple[str | None, ...]
    count: int
    num_parameters: int


@dataclasses.dataclass(frozen=True)
class Plan:
    """The result of `plan`; counts are numbers of parameters.

    Attributes:
      method: as the method describes itself.
      rules: one entry per rule that matches something.
      parts: adapter parameters by the part of the adapter they belong to (`vectors`, `lora_a`,
        `router`, ...).
      base: the network's own parameters.
      adapters: parameters that the method adds.
      trainable: parameters that learn.
      frozen: parameters that do not.
      percent: trainable, in per cent of `base`.
      nominal_size: the size in the model's name ("3B"), if the model file says.
      nominal_percent: trainable, in per cent of `nominal_size`.
      checkpoint_bytes: float32 trainable parameters and AdamW's two moments, the most a checkpoint
        holds; Adafactor's second moments are smaller.
      export_bytes: the trainable parameters alone.
      frozen_bytes: the frozen parameters in bfloat16.
      leaves: the adapters' leaves.
      target_method: name of what trains on a new task afterwards, if that is another method.
      target_trainable: parameters that learn there.
    """

    method: dict[str, Any]
    rules: tuple[RulePlan, ...]
    parts: dict[str, int]
    base: int
    adapters: int
    trainable: int
    frozen: int
    percent: float
    nominal_size: int | None
    nominal_percent: float | None
    checkpoint_bytes: int
    export_bytes: int
    frozen_bytes: int
    leaves: tuple[LeafPlan, ...]
    target_method: str | None = None
    target_trainable: int | None = None


@gin.configurable(module="analysis")
def plan(
    model: nn.Module = gin.REQUIRED,
    method: methods.Method = gin.REQUIRED,
    nominal_size: int | float | None = None,
    embedding_dim: int = 384,
    target_method: methods.Method | None = None,
    backbone: str | None = None,
) -> Plan:
    """Returns what `method` does to `model`.

    Args:
      model: an encoder-decoder with T5X's calls.
      method: which layers get what, and what learns.
      nominal_size: the size in the model's name, which papers divide by.
      embedding_dim: width of sentence embeddings, if routers use them.
      target_method: what trains on a new task after a multi-task run of `method`.
      backbone: if it is "hf:" or "t5x:", the headers of its files are compared with the model.

    Raises:
      UserError: a rule matches nothing, two rules match one layer, or the backbone is of another
        size than the model.
    """
    shapes = dict.fromkeys(_TOKEN_FEATURES, _TOKENS)
    found = patching.matches(model, method.rules, shapes, enable_dropout=False)
    found.check()

    extras = {"task_ids": (1,), "sentence_embeddings": (1, embedding_dim)}

    def abstract(method):
        network = encoder_decoder.EncoderDecoder(method.patch(model), method=method)
        init = lambda rng: network.init_variables(rng, {**shapes, **extras})
        return jax.eval_shape(init, jax.random.key(0))

    variables = abstract(method)
    if backbone is not None:
        from moe_peft.weights import backbone as backbone_lib  # imports what saves checkpoints

        flat = patching.flatten(variables["params"])
        own = {path: leaf for path, leaf in flat.items() if not patching.is_adapter(path)}
        backbone_lib.check_headers(backbone, patching.trees.unflatten(own))
    target = {}
    if target_method is not None and target_method != method:
        learns = target_method.split(abstract(target_method)["params"])[1]
        target["target_method"] = target_method.name
        target["target_trainable"] = sum(leaf.size for leaf in jax.tree.leaves(learns))
    params = patching.flatten(variables["params"])
    axes = _axes(variables)
    sizes = {path: leaf.size for path, leaf in params.items()}
    in_adapters = {path: size for path, size in sizes.items() if patching.is_adapter(path)}
    frozen, trainable = map(patching.flatten, method.split(variables["params"]))

    num_trainable = sum(sizes[path] for path in trainable)
    num_base = sum(sizes.values()) - sum(in_adapters.values())
    num_frozen = sum(sizes[path] for path in frozen)
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
        **target,
    )


def _axes(variables: Any) -> dict[str, tuple[str | None, ...]]:
    """Logical axes by parameter path."""
    flat = patching.flatten(variables.get("params_axes", {}))
    return {path.removesuffix("_axes"): tuple(meta.names) for path, meta in flat.items()}


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
    parts: dict[str, int] = {}
    for path, size in sizes.items():
        names = path.split("/")
        part = names[names.index(patching.ADAPTER) + 1]
        parts[part] = parts.get(part, 0) + size
    return dict(sorted(parts.items()))


def _leaves(leaves: dict[str, Any], axes: dict[str, Any]) -> tuple[LeafPlan, ...]:
    """Leaves that differ in the number of their layer only, counted once."""
    groups: dict[Any, list[int]] = {}
    for path, leaf in leaves.items():
        kind = (re.sub(r"(?<=layers_)\d+", "*", path), leaf.shape, axes.get(path, ()))
        groups.setdefault(kind, []).append(leaf.size)
    return tuple(LeafPlan(*kind, len(sizes), sum(sizes)) for kind, sizes in groups.items())


def show(result: Plan, as_json: bool = False, console: rich.console.Console | None = None) -> None:
    """Prints a plan as tables, or as JSON with the field names of `Plan`."""
    if as_json:
        print(json.dumps(dataclasses.asdict(result), indent=2))
        return
    console = console or rich.console.Console()
    # Without a terminal rich assumes 80 columns and would break paths.
    if not console.is_terminal:
        console.width = max(console.width, 140)
    for table in (_rule_table(result), _leaf_table(result), _count_table(result)):
        if table.row_count:
            console.print(table)


def _table(title: str, *columns: str) -> rich.table.Table:
    table = rich.table.Table(title=title, title_justify="left", box=rich.box.SIMPLE_HEAD)
    for column in columns:
        is_number = column in ("layers", "leaves", "parameters", "size")
        table.add_column(column, justify="right" if is_number else "left", overflow="fold")
    return table


def _rule_table(result: Plan) -> rich.table.Table:
    title = f"Method {result.method['name']}: what each rule matches"
    table = _table(title, "adapter", "rule", "layers", "parameters", "matched")
    for rule in result.rules:
        count = str(len(rule.layers))
        matched = rules_lib.summary(rule.layers)
        table.add_row(rule.adapter, rule.pattern, count, f"{rule.num_parameters:,}", matched)
    return table


def _leaf_table(result: Plan) -> rich.table.Table:
    table = _table("Adapter leaves", "leaf", "shape", "logical axes", "leaves", "parameters")
    for leaf in result.leaves:
        shape, axes = " ".join(map(str, leaf.shape)), " ".join(map(str, leaf.axes))
        table.add_row(leaf.path, shape, axes, str(leaf.count), f"{leaf.num_parameters:,}")
    return table


def _count_table(result: Plan) -> rich.table.Table:
    table = _table("Parameters", "what", "parameters")
    table.add_row("network", f"{result.base:,}")
    for part, size in result.parts.items():
        table.add_row(f"adapters: {part}", f"{size:,}")
    table.add_row("trainable", f"{result.trainable:,}")
    table.add_row("frozen", f"{result.frozen:,}")
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


def _bytes(count: int) -> str:
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000 or unit == "GB":
            return f"{count:.3g} {unit}" if unit != "B" else f"{count} B"
        count /= 1000
    raise AssertionError("unreachable")
