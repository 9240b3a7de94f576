"""The proxy through which every call of a patched model goes."""

from collections.abc import Callable, Mapping, Sequence
import dataclasses
import functools
from typing import Any

from flax import linen as nn
import flax.core
import jax
import jax.numpy as jnp

from moe_peft import routing as routing_lib
from moe_peft.patching import granularity, interceptor, trees
from moe_peft.patching import rules as rules_lib

Shapes = Mapping[str, Any] | Sequence[Any]
Rngs = jax.Array | Mapping[str, jax.Array]
Method = Callable[..., Any] | str | None

# Entry points of a linen module that would run or copy it without its adapters.
_BYPASSES = ("bind", "copy", "lazy_init", "tabulate", "module_paths")


@dataclasses.dataclass(frozen=True)
class Patched:
    """A linen module whose every `init` and `apply` runs with adapters.

    A plain object around an unchanged module: no copy, no subclass. Base parameters keep names,
    shapes and axes; an adapter's parameters lie next to the frozen `kernel` under "adapter". All
    other attributes are the module's own, so that `method=patched.encode` works.

    Example:
        patched = Patched(module, (Rule(".*/(key|value)", IA3),))
        variables = patched.init(jax.random.key(0), tokens, tokens, tokens, enable_dropout=False)
        encoded = patched.apply(variables, tokens, method=patched.encode)
    """

    module: nn.Module  # the model, unbound
    rules: tuple[rules_lib.Rule, ...] = ()  # at most one of them may match a layer

    def init(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """Returns the variables of model and adapters; see `init_with_output`."""
        return self.init_with_output(*args, **kwargs)[1]

    def init_with_output(
        self,
        rngs: Rngs,
        *args: Any,
        routing: routing_lib.RoutingContext | None = None,
        method: Method = None,
        **kwargs: Any,
    ) -> tuple[Any, dict[str, Any]]:
        """Returns (outputs, variables); see `nn.Module.init_with_output`.

        Raises UserError if a rule matches nothing, or two match one layer.
        """
        shared, shared_axes = self._init_shared(rngs, args, method, kwargs)
        variables = {"params": shared}
        rows = num_rows(args, kwargs)
        routing = routing or routing_lib.RoutingContext()
        if routing.task_ids is None and rows is not None:  # Shapes do not depend on them.
            routing = routing.replace(task_ids=jnp.zeros(rows, jnp.int32))
        intercept = _interceptor(self.rules, routing, rngs, False, variables, rows)
        with nn.intercept_methods(intercept):
            result = self.module.init_with_output(rngs, *args, method=method, **kwargs)
        rules_lib.match(self.rules, intercept.calls).check()
        if not shared:
            return result
        outputs, variables = result
        for name, tree in (("params", shared), ("params_axes", shared_axes)):
            variables = {**variables, name: {**variables.get(name, {}), **tree}}
        return outputs, variables

    def _init_shared(self, rngs, args, method, kwargs):
        """Fresh (params, params_axes) of routers that several layers share; empty without."""
        if all(rule.shared_router is None for rule in self.rules):
            return {}, {}
        init = functools.partial(self.module.init, rngs, *args, method=method, **kwargs)
        found = rules_lib.match(self.rules, _dense_calls(init))
        found.check()
        rng = rngs["params"] if isinstance(rngs, Mapping) else rngs
        routers = granularity.shared_routers(self.rules, found.paths)
        return granularity.init(rng, routers, trees.ADAPTER)

    def apply(
        self,
        variables: Mapping[str, Any],
        *args: Any,
        routing: routing_lib.RoutingContext | None = None,
        method: Method = None,
        rngs: Rngs | None = None,
        mutable: flax.core.scope.CollectionFilter = False,
        **kwargs: Any,
    ) -> Any:
        """Runs the model with its adapters; see `nn.Module.apply`.

        Args:
            variables: {"params": ...} and what else the model wants.
            routing: the batch's `routing.RoutingContext`, if routers need one.
            method: another method than `__call__`, such as `patched.encode`.
            rngs: "dropout" also drops adapters' inputs, "routing" makes routers stochastic.
            mutable: name "router_losses" to collect `routing.losses`.
        """
        rows = num_rows(args, kwargs)
        intercept = _interceptor(self.rules, routing, rngs, mutable, variables, rows)
        with nn.intercept_methods(intercept):
            return self.module.apply(
                variables, *args, rngs=rngs, method=method, mutable=mutable, **kwargs
            )

    def clone(self, **fields: Any) -> "Patched":
        """Returns the patched clone of the module; see `nn.Module.clone`."""
        return dataclasses.replace(self, module=self.module.clone(**fields))

    def __getattr__(self, name: str) -> Any:
        if name in _BYPASSES:
            raise AttributeError(f"{name!r} of a patched module would leave out its adapters.")
        if name.startswith("__"):  # copying and pickling probe for these before fields exist
            raise AttributeError(name)
        return getattr(self.module, name)


def _interceptor(rules, context, rngs, mutable, variables, rows):
    """Returns the interceptor of one call."""
    context = context or routing_lib.RoutingContext()
    rng = rngs.get(routing_lib.RNG) if isinstance(rngs, Mapping) else None
    params = variables.get("params", {})
    return interceptor.Interceptor(
        rules,
        context,
        has_rng=rng is not None,
        wants_losses=flax.core.scope.in_filter(mutable, routing_lib.losses.COLLECTION),
        shared_weights=granularity.weights(params, rules, trees.ADAPTER, context, rng, rows),
    )


def num_rows(args: Sequence[Any], kwargs: Mapping[str, Any]) -> int | None:
    """Examples of a call: the leading axis of its first array."""
    arrays = (value for value in (*args, *kwargs.values()) if getattr(value, "ndim", 0))
    return next((array.shape[0] for array in arrays), None)


def matches(
    module: "nn.Module | Patched",
    rules: Sequence[rules_lib.Rule],
    example_shapes: Shapes,
    **kwargs: Any,
) -> rules_lib.Matches:
    """Returns which layers each rule matches, by running the bare module abstractly.

    Neither weights nor adapters are made. Call `.check()` on the result for the errors of `init`.

    Args:
        module: linen module, or a Patched, whose module is taken.
        rules: of a method.
        example_shapes: positional or named arguments of the module, as arrays, abstract arrays, or
            shapes of int32 tokens: {"encoder_input_tokens": (1, 8), ...}.
        **kwargs: further arguments that are no arrays, such as `enable_dropout=False`.
    """
    module = module.module if isinstance(module, Patched) else module
    named = isinstance(example_shapes, Mapping)
    args = [] if named else [_abstract(shape) for shape in example_shapes]
    arrays = {k: _abstract(shape) for k, shape in example_shapes.items()} if named else {}
    init = functools.partial(module.init, **kwargs)
    return rules_lib.match(rules, _dense_calls(init, jax.random.key(0), *args, **arrays))


def _dense_calls(init, *args, **kwargs):
    """Runs the bare module abstractly: {path of a dense layer: siblings called before}."""
    recorder = interceptor.Interceptor((), routing_lib.RoutingContext())
    with nn.intercept_methods(recorder):
        jax.eval_shape(init, *args, **kwargs)
    return recorder.calls


def _abstract(shape: Any) -> jax.ShapeDtypeStruct:
    if hasattr(shape, "dtype"):
        return jax.ShapeDtypeStruct(shape.shape, shape.dtype)
    return jax.ShapeDtypeStruct(tuple(shape), jnp.int32)
