"""From a multi-task run to a new task: which parameters go over, and what trains then.

The variants of "Multi-Head Adapter Routing" (Caccia et al. 2023) and of its first version:

* keep: the same parameters go on training (LoRA, (IA)3, full fine-tuning: "type A").
* new_logits: modules go over, a fresh row of logits for the one new task; both train (Poly, MHR).
* z: the same, but only the logits train (Poly-z, MHR-z).
* mu: modules are averaged into one adapter, which trains (Poly-mu, MHR-mu, Random-mu, Private-mu).
* soup: private modules of chosen tasks are averaged into one adapter (AdapterSoup).
"""

from collections.abc import Callable
import dataclasses
import functools
import re
from typing import Any
import zlib

import gin
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PyTree
import numpy as np

from moe_peft import errors, methods, patching, routing
from moe_peft.methods import targets
from moe_peft.routing import task_routers


@gin.register(module="methods")
def transferred(method: methods.Method, variant: str) -> methods.Method:
    """Returns the method that trains after a multi-task run of `method`; see the module.

    Args:
        method: of the multi-task run.
        variant: one of `VARIANTS`.

    Raises UserError where the variant does not fit the method.
    """
    made = targets.choose("variant", variant, _MAKERS)(method)
    name = method.name if variant in ("keep", "new_logits") else f"{method.name}_{variant}"
    return dataclasses.replace(made, name=name, transfer=methods.Transfer(method, variant))


def _kept(method: methods.Method) -> methods.Method:
    if method.num_tasks is not None:
        raise errors.UserError(
            f"Variant 'keep' keeps one adapter for all tasks; {method.name!r} routes by task. "
            "Choose 'new_logits', 'z' or 'mu'."
        )
    return method


def _with_new_logits(method: methods.Method, trainable: str) -> methods.Method:
    if not any(router.is_learned for router in method.routers):
        raise errors.UserError(
            f"{method.name!r} has no learned task routers; choose 'mu', 'soup' or 'keep'."
        )
    rules = tuple(_for_one_task(rule) for rule in method.rules)
    return dataclasses.replace(method, rules=rules, trainable=trainable)


def _averaged(method: methods.Method, variant: str) -> methods.Method:
    if method.average is None:
        raise errors.UserError(
            f"Variant {variant!r} averages modules; {method.name!r} has none. Choose 'keep'."
        )
    is_private = all(isinstance(router, routing.PrivateRouter) for router in method.routers)
    if variant == "soup" and not is_private:
        raise errors.UserError(
            f"Variant 'soup' averages modules of single tasks; those of {method.name!r} serve "
            "many. Train `methods.private` first."
        )
    return method.average


_MAKERS: dict[str, Callable[[methods.Method], methods.Method]] = {
    "keep": _kept,
    "new_logits": lambda method: _with_new_logits(method, methods.ADAPTER_LEAVES),
    "z": lambda method: _with_new_logits(method, methods.ROUTER_LEAVES),
    "mu": lambda method: _averaged(method, "mu"),
    "soup": lambda method: _averaged(method, "soup"),
}
VARIANTS = tuple(_MAKERS)


def _for_one_task(rule: patching.Rule) -> patching.Rule:
    """The rule with one row of logits."""
    module = rule.adapter_factory(parent=None)
    router = functools.partial(module.router_factory, num_tasks=1)
    shared = rule.shared_router
    return dataclasses.replace(
        rule,
        adapter_factory=functools.partial(rule.adapter_factory, router_factory=router),
        shared_router=None if shared is None else shared.clone(num_tasks=1, parent=None),
    )


def initial(
    method: methods.Method,
    source: PyTree,
    shapes: PyTree,
    rng: Array,
    task_weights: Float[Array | np.ndarray, "n"] | None = None,
) -> dict[str, Any]:
    """Returns what `method` starts from: every adapter leaf (every leaf, if all train), nested.

    Args:
        method: made by `transferred`.
        source: trainable tree of the source run.
        shapes: abstract params of the patched model under `method`.
        rng: of new logits.
        task_weights: of the source's tasks, adding up to one; for "soup".

    Raises UserError where `source` lacks a leaf or has another shape than expected.
    """
    variant = method.transfer.variant
    if (variant == "soup") != (task_weights is not None):
        raise errors.UserError("task_weights and the variant 'soup' go together.")
    have = patching.flatten(source)
    found = {}
    for path, want in patching.flatten(shapes).items():
        group = method.learning_rate_group(path)
        if group == "base" and not method.is_trainable(path):
            continue
        if group == "routers" and variant in ("new_logits", "z"):
            key = jax.random.fold_in(rng, zlib.crc32(path.encode()))
            found[path] = task_routers.init_logits(key, want.shape)
            continue
        if path not in have:
            raise errors.UserError(
                f"The source run has no parameter {path!r}, which {method.name!r} starts from."
                f"{errors.near(path, have)}"
            )
        leaf = jnp.asarray(have[path])
        if variant in ("mu", "soup"):
            leaf = _averaged_leaf(method.transfer.source, path, leaf, want.shape, task_weights)
        if leaf.shape != want.shape:
            raise errors.UserError(
                f"{path!r} has the shape {leaf.shape} in the source run, {method.name!r} expects "
                f"{want.shape}."
            )
        found[path] = leaf
    return patching.trees.unflatten(found)


def _averaged_leaf(
    source: methods.Method,
    path: str,
    modules: Float[Array, "..."],
    shape: tuple[int, ...],
    weights: Float[Array | np.ndarray, "n"] | None,
) -> Float[Array, "..."]:
    """The modules of one leaf averaged, in the shape of the single adapter's leaf."""
    layer, _, name = path.partition(f"/{patching.ADAPTER}/")
    rule = next(rule for rule in source.rules if re.fullmatch(rule.pattern, layer))
    adapter = rule.adapter_factory(parent=None)
    if weights is None:
        weights = np.full(adapter.num_skills, 1.0 / adapter.num_skills, np.float32)
    if len(weights) != adapter.num_skills:
        raise errors.UserError(
            f"There are {len(weights)} task weights for {adapter.num_skills} modules of the source "
            "run."
        )
    average = functools.partial(adapter.average, name, weights=jnp.asarray(weights, jnp.float32))
    if not patching.trees.stack(path):
        return average(modules).reshape(shape)
    axis = patching.trees.LAYER_AXIS
    one_shape = shape[:axis] + shape[axis + 1 :]
    each = lambda one: average(one).reshape(one_shape)
    return jax.vmap(each, in_axes=axis, out_axes=axis)(modules)
