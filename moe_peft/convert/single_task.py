"""One task of a skilled adapter as a plain one: with the router's weights fixed, MHR is a LoRA."""

from flax import linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float
import numpy as np

from moe_peft import adapters, errors, methods, patching, routing
from moe_peft.adapters import poly
from moe_peft.convert import adapter_trees
from moe_peft.patching import granularity
from moe_peft.routing import task_routers
from moe_peft.weights import identity, merging, records, saved_run


def of_task(saved: saved_run.Saved, task: int, where: str) -> saved_run.Saved:
    """Returns the LoRA or the (IA)3 that an adapter is for one task, by its id.

    `saved` is a run, from `where`, of Poly, MHR, private, random or uniform routing; a method that
    does not tell this task apart is a UserError.
    The modules are averaged with the weights of the task, as every batch does it. Splits disappear:
    blocks of A stand along the inputs, blocks of B along the outputs, the rank is never split.
    """
    method = records.method(saved.description["method"], where)
    modules = [rule.adapter_factory(parent=None) for rule in method.rules]
    if not modules or not all(hasattr(module, "num_skills") for module in modules):
        why = f"the adapters of {method.name!r} serve all tasks at once; leave out --task"
        raise errors.UserError(f"{where}: {why}.")
    if not method.is_trainable(f"encoder/layer/{patching.ADAPTER}/lora_a"):
        why = f"{method.name!r} trained routers only, its modules lie elsewhere; --merge finds them"
        raise errors.UserError(f"{where}: {why}.")
    merging.check(method, task)
    network = records.network(saved.description, where)
    context = routing.RoutingContext(task_ids=jnp.asarray([task], jnp.int32))
    params = jax.tree.map(jnp.asarray, saved.trainable)
    shared = granularity.weights(params, method.rules, patching.ADAPTER, context, None, 1)
    layers = {}
    for layer, own in adapter_trees.by_layer(saved).items():
        rule = adapter_trees.rule_of(method, layer)
        if rule.granularity.is_shared:
            weights = shared[rule.granularity.group(layer)]
        else:
            path = adapter_trees.path_in(layer, network.config)
            weights = _weights(rule.adapter_factory(parent=None), own, path, task, context)
        layers[layer] = _mixed(own, weights)
    plain = _plain(modules[0], method)
    described = {"method": identity.as_json(plain.describe()), "task": task}
    description = {**saved.description, **described, "task_of": saved.description["method"]}
    tree = adapter_trees.assemble(layers, adapter_trees.shapes_of(plain, network))
    return saved_run.Saved(saved.step, tree, {}, {"description": description})


def _weights(
    adapter: nn.Module, own: adapter_trees.Arrays, path: str, task: int, context
) -> Float[Array, "1 p s"]:
    splits, skills = adapter.num_splits, adapter.num_skills
    router = adapter.router_factory(num_skills=skills, num_splits=splits, parent=None)
    if isinstance(router, task_routers.RandomTaskRouter):
        row = router.allocation(f"{path}/{patching.ADAPTER}/router")[task]
        return jnp.broadcast_to(jnp.asarray(row), (1, splits, skills))
    names = {name.removeprefix("router/"): name for name in own if name.startswith("router/")}
    params = {name: jnp.asarray(own[full]) for name, full in names.items()}
    return router.apply({"params": params}, routing.Site(context=context))


def _mixed(own: adapter_trees.Arrays, weights: Float[Array, "1 p s"]) -> adapter_trees.Arrays:
    if "vectors" in own:
        mixed = poly.mix_vectors(weights, jnp.asarray(own["vectors"]))
        return {"vectors": np.asarray(mixed[0])}
    a, b = poly.mix_lora(weights, jnp.asarray(own["lora_a"]), jnp.asarray(own["lora_b"]))
    return {"lora_a": np.asarray(a[0]), "lora_b": np.asarray(b[0])}


def _plain(adapter: nn.Module, method: methods.Method) -> methods.Method:
    """Returns the method with one module, in the same places."""
    if isinstance(adapter, adapters.SkilledIA3):
        return methods.ia3()
    (rule,) = method.rules
    known = {pattern: name for name, pattern in methods.PLACEMENTS.items()}
    placement = known.get(rule.pattern, rule.pattern)
    return methods.lora(adapter.rank, adapter.alpha, 0.0, placement, "uniform")
