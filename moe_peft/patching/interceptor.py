"""The interceptor: what happens at every module call while a patched model runs."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from flax import linen as nn
import jax

from moe_peft import errors, routing
from moe_peft.patching import paths, trees
from moe_peft.patching import rules as rules_lib


class _Call(NamedTuple):
    """One call of a dense layer, for the siblings that route on it."""

    inputs: jax.Array
    outputs: jax.Array
    in_axes: tuple[str, ...]
    out_axes: tuple[str, ...]


def is_dense(module: nn.Module) -> bool:
    """Whether a module is a linear map: it declares output features and a kernel initialiser."""
    return hasattr(module, "features") and hasattr(module, "kernel_init")


def feature_axes(module: nn.Module) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Returns the logical axes of a dense layer's input and output features.

    Taken from the layer's own names of its kernel's axes. Where those name one joined axis for two
    features, the two are heads and their width.
    """
    size = lambda value: len(value) if isinstance(value, Sequence) else 1
    num_out = size(module.features)
    num_in = getattr(module, "num_input_axes", None) or size(getattr(module, "axis", -1))
    # T5X's networks call them kernel_axes, Flaxformer kernel_axis_names.
    names = getattr(module, "kernel_axes", None) or getattr(module, "kernel_axis_names", None)
    names = tuple(names or ())
    if len(names) == num_in + num_out:
        return names[:num_in], names[num_in:]
    first, last = (names[0], names[-1]) if names else ("unmodeled", "unmodeled")
    return _expand(first, num_in), _expand(last, num_out)


def _expand(name: str, num_axes: int) -> tuple[str, ...]:
    known = {1: (name,), 2: ("heads", "kv")}
    return known.get(num_axes, ("unmodeled",) * num_axes)


class Interceptor:
    """Runs the adapters of `rules` next to the layers they match, for one call of a model.

    Everything it remembers lives as long as that call: the layers seen (`calls`: path -> siblings
    called before), and one frame per module on the call stack.
    """

    def __init__(
        self,
        rules: Sequence[rules_lib.Rule],
        context: routing.RoutingContext,
        *,
        has_rng: bool = False,
        wants_losses: bool = False,
        shared_weights: Mapping[str, jax.Array] | None = None,
    ):
        self.rules = rules
        self.context = context
        self.has_rng = has_rng
        self.wants_losses = wants_losses
        self.shared_weights = shared_weights or {}
        self.calls: dict[str, tuple[str, ...]] = {}
        self._frames: list[dict[str, _Call]] = [{}]  # what a parent called, by name

    def __call__(
        self,
        next_fun: Callable[..., Any],
        args: tuple,
        kwargs: dict[str, Any],
        context: nn.module.InterceptorContext,
    ) -> Any:
        """Called by flax in the place of every module's method."""
        if context.method_name != "__call__":
            return next_fun(*args, **kwargs)
        parent = self._frames[-1]
        self._frames.append({})
        try:
            if is_dense(context.module):
                return self._dense(next_fun, args, kwargs, context.module, parent)
            return next_fun(*args, **kwargs)
        finally:
            self._frames.pop()

    def _dense(self, next_fun, args, kwargs, module, parent):
        path = "/".join(module.path)
        siblings = tuple(parent)
        self.calls[path] = siblings
        found = [rule for rule in self.rules if rule.matches(path, siblings)]
        rules_lib.check_single(path, found)
        if len(args) != 1 or kwargs:
            if found:
                raise errors.UserError(
                    f"{path} is called with {len(args)} arguments and {sorted(kwargs)}; adapters "
                    "need layers that take their inputs as the one argument."
                )
            return next_fun(*args, **kwargs)
        (inputs,) = args
        in_axes, out_axes = feature_axes(module)
        if not found:
            outputs = next_fun(inputs)
        elif found[0].side == "inputs":
            call = _Call(inputs, inputs, in_axes, in_axes)
            outputs = next_fun(self._adapt(found[0], module, parent, call))
        else:
            call = _Call(inputs, next_fun(inputs), in_axes, out_axes)
            outputs = self._adapt(found[0], module, parent, call)
        parent[module.name] = _Call(inputs, outputs, in_axes, out_axes)
        return outputs

    def _adapt(self, rule, module, parent, call):
        """Runs the rule's adapter in the frozen layer's scope, on what `call` read and gave."""
        path = "/".join(module.path)
        num_token_axes = call.inputs.ndim - len(call.in_axes)
        router_input, router_axis = _router_input(rule, module, parent, call)
        site = routing.Site(
            in_axes=call.in_axes,
            out_axes=call.out_axes,
            router_input=router_input,
            router_axis=router_axis,
            mask=self.context.encoder_mask
            if paths.reads_encoder(path)
            else self.context.decoder_mask,
            context=self.context,
            num_token_axes=num_token_axes,
            has_rng=self.has_rng,
            wants_losses=self.wants_losses,
            shared_weights=self._shared_weights(rule, path),
            routes_on_inputs=rule.router_input == "inputs" and rule.side == "outputs",
        )
        return rule.adapter_factory(name=trees.ADAPTER)(call.inputs, call.outputs, site)

    def _shared_weights(self, rule, path):
        """The weights of the router that the layer at `path` shares with others, if it does."""
        if rule.shared_router is None:
            return None
        group = rule.granularity.group(path)
        if group not in self.shared_weights:
            raise errors.UserError(
                f"The layer {path} shares the router '{trees.ADAPTER}/router/{group}', which is "
                f"not among the parameters; there are {', '.join(self.shared_weights) or 'none'}."
            )
        return self.shared_weights[group]


def _router_input(rule, module, parent, call):
    """Returns what the rule's router decides on, and the logical name of its last axis."""
    source = rule.router_input
    if source == "outputs":
        return call.outputs, call.out_axes[-1]
    if isinstance(source, rules_lib.Sibling):
        if source.name not in parent:
            raise errors.UserError(
                f"The adapter at {'/'.join(module.path)} routes on {source.name!r}, but its parent "
                f"called {', '.join(parent) or 'no dense layer'} before."
            )
        if source.array == "activated":
            return _activated(source.name, module, parent)
        call = parent[source.name]
    num_token_axes = call.inputs.ndim - len(call.in_axes)
    joined = call.inputs.reshape(*call.inputs.shape[:num_token_axes], -1)
    return joined, call.in_axes[0] if len(call.in_axes) == 1 else "joined_kv"


def _activated(name, module, parent):
    """Returns the activated output of the sibling `name`, and the logical name of its last axis."""
    activations = getattr(module.parent, "activations", ())
    index = list(parent).index(name)
    if index >= len(activations):
        raise errors.UserError(
            f"The adapter at {'/'.join(module.path)} routes on the activated output of {name!r}, "
            f"but {type(module.parent).__name__} does not list that layer in `activations`."
        )
    activation, call = activations[index], parent[name]
    if not callable(activation):
        activation = (lambda x: x) if activation == "linear" else getattr(nn, activation)
    return activation(call.outputs), call.out_axes[-1]
