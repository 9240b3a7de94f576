"""Merging: adapters folded into the frozen weights of one task, for inference without adapters.

An adapter whose weights do not depend on the tokens is, together with its frozen layer, a linear
map. Its kernel is found by asking the adapter itself: row i of the merged kernel is what the
adapter makes of the i-th unit vector and the frozen layer's answer to it, kernel[i]. So there is no
formula per adapter here that could differ from the adapter.
"""

from collections.abc import Callable
import dataclasses
import functools
import math
from typing import Any

from flax import linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, PyTree
import numpy as np

from moe_peft import errors, methods, patching, routing
from moe_peft.models import encoder_decoder
from moe_peft.patching import granularity

Leaves = dict[str, np.ndarray]

_ROWS = 2048  # unit vectors asked about at a time
TOKENS = ("encoder_input_tokens", "decoder_input_tokens", "decoder_target_tokens")


def merge_into_base(
    module: nn.Module, method: methods.Method, params: PyTree, task: int | None = None
) -> dict:
    """Returns the parameters of the network `module`, without adapters, that answer as `params` do.

    They are NumPy arrays in float32, even where frozen weights are not. `params` has frozen
    and trained leaves, nested, with layers stacked by a scan or not. Dropout of adapters is left
    out, as in any evaluation. Raises what `check` raises for the method and the id of a task.
    """
    check(method, task)
    ids = jnp.asarray([0 if method.num_tasks is None else task], jnp.int32)
    context = routing.RoutingContext(task_ids=ids)
    shared = granularity.weights(params, method.rules, patching.ADAPTER, context, None, 1)
    flat = patching.flatten(jax.device_get(params))
    merged = {path: leaf for path, leaf in flat.items() if not patching.is_adapter(path)}
    for layer in _layers(module, method.rules):
        own = {p: leaf for p, leaf in flat.items() if p.startswith(f"{layer.path}/")}
        site = layer.site(context, shared)
        with jax.default_matmul_precision("highest"):
            merged |= _over_stack(functools.partial(_merge_layer, layer, site), own, layer)
    return patching.trees.unflatten(merged)


def check(method: methods.Method, task: int | None) -> None:
    """Raises UserError unless the method can be merged for that task.

    It cannot if weights of an adapter depend on more than the task, or if the method tells tasks
    apart and the task is missing or out of range.
    """
    for router in method.routers:
        if router.why_not_merged is not None:
            raise errors.UserError(
                f"The method {method.name!r} cannot be merged: its {type(router).__name__} "
                f"{router.why_not_merged}, so no fixed kernel does the same."
            )
    if method.num_tasks is None:
        return
    known = f"{method.name!r} tells {method.num_tasks} tasks apart, 0 to {method.num_tasks - 1}"
    if task is None:
        raise errors.UserError(f"{known}; name the task to merge it for, such as TASK=0.")
    if isinstance(task, bool) or not isinstance(task, int) or not 0 <= task < method.num_tasks:
        raise errors.UserError(f"{known}; task {task!r} is none of them.")


@dataclasses.dataclass(frozen=True)
class Gap:
    """How far logits before and after differ."""

    largest: float  # difference, over all examples, places and words
    mean: float  # of the absolute differences
    scale: float  # the largest logit, absolute

    @property
    def relative(self) -> float:
        """The largest difference over the largest logit; NaN if a logit is."""
        return self.largest / self.scale

    def __str__(self) -> str:
        return (
            f"largest difference {self.largest:.2g}, mean {self.mean:.2g}, largest value "
            f"{self.scale:.3g}"
        )


def gap(before: Float[Array, "..."], after: Float[Array, "..."]) -> Gap:
    """Returns how far two arrays differ."""
    before, after = np.asarray(before), np.asarray(after)
    difference = np.abs(before - after)
    return Gap(float(difference.max()), float(difference.mean()), float(np.abs(before).max()))


def logit_gap(
    module: nn.Module,
    method: methods.Method,
    params: PyTree,
    merged: PyTree,
    task: int | None = None,
    seed: int = 0,
) -> Gap:
    """Compares the logits of adapted and merged network on a random batch of two examples."""
    batch = random_batch(module.config.vocab_size, seed)
    before = encoder_decoder.EncoderDecoder(method.patch(module), method=method)
    ids = jnp.full((2,), 0 if method.num_tasks is None else task, jnp.int32)
    old = jax.jit(before.logits)(params, {**batch, "task_ids": ids})
    return gap(old, plain_logits(module)(merged, batch))


@functools.lru_cache(maxsize=4)  # what is merged is compared again when it is written
def plain_logits(module: nn.Module) -> Callable[..., Any]:
    """Returns the compiled logits of a network without adapters, from parameters and a batch."""
    return jax.jit(encoder_decoder.EncoderDecoder(module).logits)


def random_batch(vocab_size: int, seed: int) -> dict[str, Int[np.ndarray, "b t"]]:
    """Returns two rows of random tokens, of as many words as the network knows."""
    rng = np.random.default_rng(seed)
    draw = lambda length: rng.integers(2, vocab_size, (2, length)).astype(np.int32)
    targets = draw(6)
    arrays = draw(12), np.pad(targets[:, :-1], ((0, 0), (1, 0))), targets
    return dict(zip(TOKENS, arrays, strict=True))


@dataclasses.dataclass(frozen=True)
class _Layer:
    """An adapted layer of the network."""

    path: str  # of the frozen layer
    rule: patching.Rule  # that matches it
    in_shape: tuple[int, ...]  # features that the adapter reads
    out_shape: tuple[int, ...]  # features that it changes; the same for an adapter of inputs
    in_axes: tuple[str, ...]  # logical names of the features
    out_axes: tuple[str, ...]
    stack_axis: int | None = None  # axis of a scanned stack's leaves over its layers

    def site(self, context, shared) -> routing.Site:
        """What the adapter is told: a task, and the weights of a shared router, if it has one."""
        is_shared = self.rule.shared_router is not None
        weights = shared[self.rule.granularity.group(self.path)] if is_shared else None
        return routing.Site(self.in_axes, self.out_axes, context=context, shared_weights=weights)


class _Probe(nn.Module):
    """Stands in the place of an adapter and reports where it is."""

    note: Callable[..., None]

    def __call__(self, inputs, outputs, site):
        tokens = site.num_token_axes
        shapes = inputs.shape[tokens:], outputs.shape[tokens:]
        self.note("/".join(self.path[:-1]), *shapes, site.in_axes, site.out_axes)
        return outputs


class _At(nn.Module):
    """Runs an adapter at a place of a network: a random allocation depends on where it is."""

    place: tuple[str, ...]
    adapter_factory: patching.rules.AdapterFactory

    @nn.compact
    def __call__(self, inputs, outputs, site):
        name, *rest = self.place
        if rest:
            return _At(tuple(rest), self.adapter_factory, name=name)(inputs, outputs, site)
        return self.adapter_factory(name=name)(inputs, outputs, site)


def _layers(module: nn.Module, rules: tuple[patching.Rule, ...]) -> list[_Layer]:
    """Returns every adapted layer, found by running the network abstractly."""
    found = {}

    def note(rule, path, *seen):
        found[path] = _Layer(path, rule, *seen)

    probe = lambda rule: functools.partial(_Probe, note=functools.partial(note, rule))
    plain = {"router_input": "inputs", "shared_router": None}  # a probe has no router
    probes = tuple(
        dataclasses.replace(rule, adapter_factory=probe(rule), **plain) for rule in rules
    )
    model = encoder_decoder.EncoderDecoder(patching.Patched(module, probes))
    shapes = dict.fromkeys(TOKENS, (1, 2))
    variables = jax.eval_shape(lambda rng: model.init_variables(rng, shapes), jax.random.key(0))
    axes = patching.flatten(variables["params_axes"])

    def stack_axis(path):
        names = axes[f"{path}/kernel_axes"].names
        return names.index("layers") if "layers" in names else None

    return [dataclasses.replace(each, stack_axis=stack_axis(path)) for path, each in found.items()]


def _over_stack(merge: Callable[[Leaves], Leaves], leaves: Leaves, layer: _Layer) -> Leaves:
    """Merges each layer of a stack on its own."""
    axis = layer.stack_axis
    if axis is None:
        return merge(leaves)
    take = lambda index: {path: np.take(leaf, index, axis) for path, leaf in leaves.items()}
    each = [merge(take(index)) for index in range(leaves[f"{layer.path}/kernel"].shape[axis])]
    return {path: np.stack([one[path] for one in each], axis) for path in each[0]}


def _merge_layer(layer: _Layer, site: routing.Site, leaves: Leaves) -> Leaves:
    """Returns the merged kernel of one layer, by its path, in the shape in which it is stored."""
    path = f"{layer.path}/kernel"
    own = {name: jnp.asarray(leaf) for name, leaf in leaves.items() if patching.is_adapter(name)}
    params = patching.trees.unflatten(own)
    adapter = _At((*layer.path.split("/"), patching.ADAPTER), layer.rule.adapter_factory)

    def ask(inputs, outputs):
        inputs = jnp.asarray(inputs).reshape(1, -1, *layer.in_shape)
        outputs = jnp.asarray(outputs).reshape(1, -1, *layer.out_shape)
        answer = adapter.apply({"params": params}, inputs, outputs, site)
        return np.asarray(answer).reshape(answer.shape[1], -1)

    width = math.prod(layer.in_shape)
    kernel = np.asarray(leaves[path], np.float32).reshape(width, -1)
    if layer.rule.side == "inputs":
        if not layer.rule.adapter_factory(parent=None).only_scales:
            raise errors.UserError(f"The adapter at {layer.path} reads inputs but scales nothing.")
        ones = np.ones((1, width), np.float32)
        merged = ask(ones, ones).T * kernel
    else:
        starts = range(0, width, _ROWS)
        units = lambda start: np.eye(min(_ROWS, width - start), width, start, np.float32)
        rows = [ask(units(start), kernel[start : start + _ROWS]) for start in starts]
        merged = np.concatenate(rows)
    return {path: merged.reshape(leaves[path].shape)}
