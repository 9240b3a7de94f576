"""Adafactor and AdamW with the papers' settings, learning-rate groups and clipping."""

from collections.abc import Callable, Mapping
import dataclasses
import functools
from typing import Any, Literal

import gin
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, PyTree
import optax

from moe_peft import errors, patching
from moe_peft.training import last_two_rms
from moe_peft.training import schedules as schedules_lib

LearningRate = float | schedules_lib.Schedule
GroupOf = Callable[[str], str]

# What `Method.learning_rate_group` returns.
GROUPS = ("adapters", "routers", "base")

# What `adafactor.factoring` names, with the size from which dimensions are factored by default.
_FACTORINGS = {
    "two_largest": (functools.partial(optax.scale_by_factored_rms, True), 128),
    "last_two": (last_two_rms.scale_by_last_two_rms, 1),
}
_NO_DECAY = ("routers",)
# Steps at which a schedule is sampled to tell whether it is the one a checkpoint was trained with.
_SAMPLED_STEPS = (0, 1, 10, 100, 1_000, 10_000, 100_000)

_SHARES = (0, 0.01, 0.03, 0.06, 0.1, 0.25, 0.5, 1)  # of a run, where its rates are looked at


@dataclasses.dataclass(frozen=True)
class Optimizer:
    """An optimiser before it has seen the tree it is to train."""

    name: str  # as users write it
    settings: Mapping[str, Any]  # plain numbers, stored in checkpoints
    # (trainable tree, group of every path) -> the transformation from gradients to steps of
    # learning rate 1, sign not yet flipped.
    precondition: Callable[[PyTree, GroupOf], optax.GradientTransformation]
    learning_rate: LearningRate  # rate of every group that `groups` does not name
    # Group name -> a multiplier of `learning_rate`, or a schedule of its own.
    groups: Mapping[str, LearningRate] = dataclasses.field(default_factory=dict)
    # Global norm over all gradients above which they are scaled down; None for never.
    clip_norm: float | None = None

    def __post_init__(self):
        for name in self.groups:
            errors.check_one_of(f"A name in {self.name}.groups", name, GROUPS)

    def build(self, trainable: PyTree, group_of: GroupOf) -> optax.GradientTransformation:
        """Returns the transformation for one tree; `group_of` names the group of a path."""
        names = {group_of(path) for path in patching.flatten(trainable)}
        clip = [] if self.clip_norm is None else [optax.clip_by_global_norm(self.clip_norm)]
        return optax.chain(
            *clip,
            self.precondition(trainable, group_of),
            _scale_by_group({name: self.schedule(name) for name in names}, group_of),
        )

    def schedule(self, group: str) -> schedules_lib.Schedule:
        """Returns the learning rate of a group as a function of the step."""
        rate, own = self.learning_rate, self.groups.get(group, 1.0)
        default = rate if callable(rate) else schedules_lib.constant(rate)
        return own if callable(own) else lambda step: own * default(step)

    def peak(self, num_steps: int, group: str = "") -> float:
        """Returns the highest learning rate of a group, as far as a few steps tell."""
        steps = {int(share * num_steps) for share in _SHARES}
        return max(float(self.schedule(group)(step)) for step in steps)

    def scaled(self, factor: float) -> "Optimizer":
        """Returns the same with another factor on the rates that have no schedule of their own."""
        rate = self.learning_rate
        if factor == 1.0:
            return self
        scaled = (lambda step: factor * rate(step)) if callable(rate) else factor * rate
        return dataclasses.replace(self, learning_rate=scaled)

    def learning_rates(
        self, trainable: PyTree, group_of: GroupOf
    ) -> Callable[[Int[Array, ""]], dict[str, Float[Array, ""]]]:
        """Returns step -> {"learning_rate/<group>": value} for the groups of this tree."""
        names = sorted({group_of(path) for path in patching.flatten(trainable)})
        return lambda step: {f"learning_rate/{name}": self.schedule(name)(step) for name in names}

    def describe(self) -> dict[str, Any]:
        """Returns name, settings and sampled learning rates, as json can hold them."""
        groups = ("", *sorted(self.groups))
        rates = {name: [float(self.schedule(name)(s)) for s in _SAMPLED_STEPS] for name in groups}
        found = {"name": self.name, **self.settings}
        return {**found, "clip_norm": self.clip_norm, "learning_rates": rates}


@gin.register(module="optimizers")
def adafactor(
    learning_rate: LearningRate,
    decay_rate: float = 0.8,
    clipping_threshold: float | None = 1.0,
    epsilon: float = 1e-30,
    multiply_by_parameter_scale: bool = True,
    factoring: Literal["two_largest", "last_two"] = "two_largest",
    min_dim_size_to_factor: int | None = None,
    resumed_step_offset: int = 0,
    groups: Mapping[str, LearningRate] | None = None,
    clip_norm: float | None = None,
) -> Optimizer:
    """Returns Adafactor (Shazeer and Stern 2018) as T5X or as Hugging Face sets it up.

    The defaults are T5X's, with which MoV and MoLoRA train; `factoring="last_two"` is Hugging
    Face's, with which Poly and MHR train on T0 (optimizers/adafactor_mhr.gin).

    At update number t = step + 1 + resumed_step_offset, with beta = 1 - t^-decay_rate:
    v = beta v + (1 - beta) (g^2 + epsilon), u = g / sqrt(v), u /= max(1, RMS(u) /
    clipping_threshold), and the step is learning_rate * max(RMS(p), 1e-3) * u (without the RMS
    factor where multiply_by_parameter_scale is False).

    RMS values are over one whole parameter, all experts together. Where layers are scanned, a leaf
    holds all layers of a stack; statistics, factoring and both RMS values are then taken layer by
    layer, so that scanned and unscanned models train alike.

    Args:
      learning_rate: a number or a schedule. MoV and MoLoRA: 3e-4, constant.
      clipping_threshold: RMS above which a leaf's update is scaled down; None for never.
      multiply_by_parameter_scale: scale steps by the RMS of the parameter, at least 1e-3.
      factoring: the dimensions of a leaf for which v is kept as a row and a column. "two_largest",
        as T5X does. "last_two", as Hugging Face does: dimensions before them are a batch of
        matrices, and features are joined into the papers' matrices, see `last_two_rms`.
      min_dim_size_to_factor: factor only where both dimensions reach this size. By default 128
        with "two_largest", which leaves every adapter leaf unfactored, and 1 with "last_two".
      resumed_step_offset: steps the optimiser is told it has already made while v is still zero.
        The released MoV code continues the step count of the backbone's checkpoint (1,100,000),
        so v acts like a running sum and the RMS clip stays active for some 68,000 steps. 0 is the
        textbook optimiser.
      groups, clip_norm: see `Optimizer`. MHR on T0 has clip_norm 1.0.
    """
    errors.check_one_of("adafactor.factoring", factoring, _FACTORINGS)
    scale_by_factored_rms, default_size = _FACTORINGS[factoring]
    min_size = default_size if min_dim_size_to_factor is None else min_dim_size_to_factor
    settings = {
        "decay_rate": decay_rate,
        "clipping_threshold": clipping_threshold,
        "epsilon": epsilon,
        "multiply_by_parameter_scale": multiply_by_parameter_scale,
        "factoring": factoring,
        "min_dim_size_to_factor": min_size,
        "resumed_step_offset": resumed_step_offset,
    }
    parts = [scale_by_factored_rms(decay_rate, -resumed_step_offset, min_size, epsilon)]
    if clipping_threshold is not None:
        parts.append(optax.clip_by_block_rms(clipping_threshold))
    if multiply_by_parameter_scale:
        parts.append(optax.scale_by_param_block_rms())
    steps = lambda trainable, group_of: _per_layer(optax.chain(*parts), trainable)
    return Optimizer("adafactor", settings, steps, learning_rate, groups or {}, clip_norm)


@gin.register(module="optimizers")
def adamw(
    learning_rate: LearningRate,
    b1: float = 0.9,
    b2: float = 0.999,
    epsilon: float = 1e-8,
    weight_decay: float = 0.0,
    groups: Mapping[str, LearningRate] | None = None,
    no_decay_groups: tuple[str, ...] = _NO_DECAY,
    clip_norm: float | None = None,
) -> Optimizer:
    """Returns AdamW (Loshchilov and Hutter 2019): decay is decoupled and times the learning rate.

    Args:
      learning_rate: a number or a schedule.
      b1, b2: decay of the means of gradients and of squared gradients.
      epsilon: added to the root of the second moment.
      weight_decay: MHR on SuperNI and CrossFit: 0.01.
      no_decay_groups: groups without weight decay. Routers by default: at their learning rate of
        0.1 even a small decay would pull task logits to 0 (the papers' code has that slip).
      groups, clip_norm: see `Optimizer`. MHR on SuperNI and CrossFit has clip_norm 0.1.
    """

    def precondition(trainable, group_of):
        parts = [optax.scale_by_adam(b1=b1, b2=b2, eps=epsilon)]
        if weight_decay:
            paths = patching.flatten(trainable)
            decays = {path: group_of(path) not in no_decay_groups for path in paths}
            mask = patching.trees.unflatten(decays)
            parts.append(optax.add_decayed_weights(weight_decay, mask=mask))
        return optax.chain(*parts)

    settings = {"b1": b1, "b2": b2, "epsilon": epsilon, "weight_decay": weight_decay}
    if tuple(no_decay_groups) != _NO_DECAY:
        # The default is left out: runs of version 0.1 do not have it in their descriptions.
        settings["no_decay_groups"] = sorted(no_decay_groups)
    return Optimizer("adamw", settings, precondition, learning_rate, groups or {}, clip_norm)


def _scale_by_group(
    schedules: Mapping[str, schedules_lib.Schedule], group_of: GroupOf
) -> optax.GradientTransformation:
    """Multiplies every leaf's step by minus the learning rate of its group."""

    def init(params):
        del params
        return optax.ScaleByScheduleState(count=jnp.zeros((), jnp.int32))

    def update(updates, state, params=None):
        del params
        rates = {name: schedule(state.count) for name, schedule in schedules.items()}
        flat = patching.flatten(updates)
        scaled = {path: -rates[group_of(path)] * leaf for path, leaf in flat.items()}
        return patching.trees.unflatten(scaled), optax.ScaleByScheduleState(count=state.count + 1)

    return optax.GradientTransformation(init, update)


def _per_layer(
    inner: optax.GradientTransformation, trainable: PyTree
) -> optax.GradientTransformation:
    """Applies `inner` to each layer of stacked leaves on its own, and to other leaves as it is."""

    labels = {path: patching.trees.stack(path) or "single" for path in patching.flatten(trainable)}
    if set(labels.values()) <= {"single"}:
        return inner
    axes = (patching.trees.LAYER_AXIS, 0, patching.trees.LAYER_AXIS)
    over_layers = optax.GradientTransformation(
        jax.vmap(inner.init, in_axes=axes[0]),
        jax.vmap(inner.update, in_axes=axes, out_axes=axes[:2]),
    )
    pick = lambda label: inner if label == "single" else over_layers
    transforms = {label: pick(label) for label in labels.values()}
    return optax.multi_transform(transforms, patching.trees.unflatten(labels))
