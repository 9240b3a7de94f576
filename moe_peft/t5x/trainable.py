"""T5X's optimisers on what a method trains, and on nothing else."""

from collections.abc import Mapping
import copy
from typing import Any

from flax import traverse_util
import flax.core
import jax
from jaxtyping import PyTree
import optax
from t5x import adafactor
from t5x import optimizers as t5x_optimizers

from moe_peft import errors, methods, patching
from moe_peft.training import optimizers

_LAYERS = {"layers": adafactor.FactorDim.BATCH}


def only(
    optimizer: t5x_optimizers.OptimizerDef,
    method: methods.Method,
    groups: Mapping[str, float] | None = None,
) -> t5x_optimizers.OptimizerDef:
    """Returns an optimiser of the leaves that the method trains; the others have no state.

    Args:
      optimizer: as T5X's gin files build it: Adafactor, or one of optax in T5X's wrapper.
      method: says what trains; one that trains everything gets the optimiser as it is.
      groups: multipliers of the learning rate for "adapters", "routers" or "base", see
        `Method.learning_rate_group`; 1 for those left out. Not with optax, whose optimisers hold
        their own rates.

    Raises:
      UserError: there is no such group, or the optimiser knows no learning rate to multiply.
    """
    groups = dict(groups or {})
    for name in groups:
        errors.check_one_of("A learning-rate group", name, optimizers.GROUPS)
    if method.trainable == methods.method.ALL_LEAVES and not groups:
        return optimizer
    if isinstance(optimizer, t5x_optimizers.OptaxWrapper):
        if groups:
            raise errors.UserError(
                "Optimisers of optax hold their own learning rates: set groups to None, or take "
                "adafactor.Adafactor."
            )
        return _masked(optimizer, method)
    if not groups:
        return Trainable(method, {None: optimizer}, {None: 1.0})
    if getattr(optimizer.hyper_params, "global_norm_clip_threshold", None):
        raise errors.UserError(
            "Adafactor.global_norm_clip_threshold would clip each learning-rate group by its own "
            "norm; set groups or the threshold to None."
        )
    return Trainable(
        method,
        {name: copy.deepcopy(optimizer) for name in optimizers.GROUPS},
        {name: groups.get(name, 1.0) for name in optimizers.GROUPS},
    )


def _masked(optimizer: t5x_optimizers.OptaxWrapper, method: methods.Method):
    trains = lambda keys: method.is_trainable(
        jax.tree_util.keystr(keys, simple=True, separator="/")
    )
    mask = lambda wanted: (
        lambda params: jax.tree_util.tree_map_with_path(
            lambda keys, _: trains(keys) == wanted, params
        )
    )
    return t5x_optimizers.OptaxWrapper(
        optax.chain(
            optax.masked(optimizer.optax_optimizer, mask(True)),
            optax.masked(optax.set_to_zero(), mask(False)),  # Masked leaves pass as they come.
        )
    )


class Trainable(t5x_optimizers.MultiOptimizer):
    """T5X's MultiOptimizer over what a method trains.

    T5X keeps None as the state of other leaves, which orbax then does not find when a run is
    resumed; here they are not in the state at all.

    Attributes:
      factors: of the learning rate, one for each of its optimisers.
    """

    def __init__(
        self,
        method: methods.Method,
        by_group: Mapping[str | None, t5x_optimizers.OptimizerDef],
        factors: Mapping[str | None, float],
    ):
        """`by_group`: an optimiser for each learning-rate group, or one for all under None."""
        pairs = [(_leaves(method, group), optimizer) for group, optimizer in by_group.items()]
        super().__init__(pairs)
        self.factors = [factors[group] for group in by_group]

    def init_state(self, params: PyTree) -> t5x_optimizers.OptimizerState:
        """As T5X's, for the leaves that train."""
        return _without_frozen(super().init_state(params))

    def apply_gradient(
        self, hyper_params: Any, params: PyTree, state: t5x_optimizers.OptimizerState, grads: PyTree
    ) -> tuple[PyTree, t5x_optimizers.OptimizerState]:
        """As T5X's; frozen leaves come back as they are."""
        params, state = super().apply_gradient(hyper_params, params, state, grads)
        return params, _without_frozen(state)

    def set_param_axes(self, param_logical_axes: PyTree) -> None:
        """Gives Adafactor rules for the axes that only adapters have: they are not factored.

        So second moments of adapters are kept one by one, as the built-in trainer keeps them; the
        axis of scanned layers stays a batch of its own.
        """
        flat = patching.flatten(param_logical_axes)
        own = {axis for path, axes in flat.items() if patching.is_adapter(path) for axis in axes}
        for optimizer in self.sub_optimizers:
            if isinstance(optimizer, adafactor.Adafactor):
                rules = optimizer.hyper_params.logical_factor_rules or {}
                new = dict.fromkeys(own, adafactor.FactorDim.NONE) | _LAYERS | dict(rules)
                optimizer.hyper_params = optimizer.hyper_params.replace(logical_factor_rules=new)
        super().set_param_axes(param_logical_axes)

    def update_hyper_params(self, **overrides: Any) -> list[Any]:
        """As T5X's, each learning rate times its group's factor."""
        found = super().update_hyper_params(**overrides)
        return [
            each.replace(learning_rate=each.learning_rate * factor)
            for each, factor in zip(found, self.factors, strict=True)
        ]


def _without_frozen(state: t5x_optimizers.OptimizerState) -> t5x_optimizers.OptimizerState:
    flat = traverse_util.flatten_dict(flax.core.unfreeze(state.param_states))
    kept = traverse_util.unflatten_dict({k: v for k, v in flat.items() if v is not None})
    is_frozen = isinstance(state.param_states, flax.core.FrozenDict)
    return state.replace(param_states=flax.core.freeze(kept) if is_frozen else kept)


def _leaves(method: methods.Method, group: str | None) -> traverse_util.ModelParamTraversal:
    """The leaves of a group that train; all that train for None."""

    def is_meant(path: str, _: Any) -> bool:
        path = path.removeprefix("/")
        fits = group is None or method.learning_rate_group(path) == group
        return fits and method.is_trainable(path)

    return traverse_util.ModelParamTraversal(is_meant)
