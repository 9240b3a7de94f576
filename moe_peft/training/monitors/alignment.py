"""Gradient alignment: do the tasks pull the adapters in the same direction?

The cosine between two tasks' gradients of the adapter parameters, averaged over pairs of tasks and
followed through multi-task training (Caccia et al. 2023, gradient alignment). The paper does not
say which parameters, how many tasks or how often. Here: everything that trains but the routers,
whose logits have a row per task and would only add orthogonal parts; dropout and routing noise off;
the same batch of each task every time.
"""

from collections.abc import Callable, Mapping, Sequence
import dataclasses

import gin
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PyTree
import numpy as np

from moe_peft import errors, methods, patching
from moe_peft.data import lookup, pipeline
from moe_peft.partitioning import mesh as mesh_lib
from moe_peft.runtime import processes
from moe_peft.training import step as step_lib
from moe_peft.training.monitors import base

NAME = "alignment"

_DIGITS = 6  # of a recorded cosine


@gin.register(module="monitors")
@dataclasses.dataclass(frozen=True)
class GradientAlignment:
    """Records the cosines between the gradients of some tasks.

    One backward pass per task and record: with the defaults, about as much as 5 training steps of
    batch 48 every 100 steps. Metrics: `alignment/mean_cosine` over pairs of different tasks, and
    `alignment/conflicting`, the share of pairs with a negative cosine. Records: task names, the
    matrix, and the norm of each task's gradient.
    """

    period: int = 100  # steps between records
    num_tasks: int = 16  # how many tasks of the mixture, drawn once; all of them if there are fewer
    batch_size: int = 16  # examples of each task, over all devices
    seed: int = 0  # of the draw of tasks and of their batches

    name = NAME

    def start(self, run: base.Watched) -> base.Watch:
        """Draws tasks and batches; UserError: only routers train, or there are under two tasks."""
        select(run.trainable, run.method)
        mesh_lib.check_batch_size(self.batch_size, 1, run.mesh)
        found = task_batches(
            run.data, self.num_tasks, self.batch_size, self.seed, getattr(run.model, "ids", None)
        )
        sharding = mesh_lib.batch_sharding(run.mesh)
        place = lambda batch: processes.put_on_devices(dict(batch), sharding)
        batches = {task: place(batch) for task, batch in found.items()}
        gradient = task_gradient(run.model, run.method)

        def watch(step, frozen, trainable):
            gradients = [gradient(trainable, frozen, batch) for batch in batches.values()]
            gradients = np.stack(jax.device_get(gradients))
            matrix = cosines(gradients)
            record = {
                "tasks": list(batches),
                "cosines": _as_json(matrix),
                "norms": np.linalg.norm(gradients, axis=1).tolist(),
            }
            base.append(run.folder, NAME, step, record)
            return summarize(matrix)

        return watch


def select(trainable: PyTree, method: methods.Method) -> list[str]:
    """Returns the paths of the leaves to compare, all but the routers'; UserError: none."""
    group_of = method.learning_rate_group
    paths = [path for path in patching.flatten(trainable) if group_of(path) != "routers"]
    if not paths:
        raise errors.UserError(
            f"Gradient alignment compares gradients of adapters, but the method {method.name!r} "
            "trains routers only, whose rows no two tasks share. Leave the monitor out."
        )
    return paths


def task_gradient(
    model: step_lib.Model, method: methods.Method
) -> Callable[[PyTree, PyTree, step_lib.Batch], Float[Array, "w"]]:
    """Returns the jitted (trainable, frozen, batch) -> gradient of the batch's mean loss.

    The gradient is that of the selected leaves, one after another in the order of their paths, in
    float32. Neither dropout nor routing noise.
    """

    def gradient(trainable, frozen, batch):
        flat = patching.flatten(trainable)
        chosen = {path: flat[path] for path in select(trainable, method)}

        def mean_loss(chosen):
            params = patching.merge(frozen, patching.trees.unflatten(flat | chosen))
            loss_sum, normalizer, _ = model.loss_sums(params, batch, None)
            return loss_sum / jnp.maximum(normalizer, 1e-9)

        leaves = jax.grad(mean_loss)(chosen)
        parts = [leaves[path].astype(jnp.float32).ravel() for path in sorted(leaves)]
        return jnp.concatenate(parts)

    return jax.jit(gradient)


def cosines(gradients: Float[np.ndarray, "n w"]) -> Float[np.ndarray, "n n"]:
    """Returns the cosine of every pair; NaN for a gradient that is zero, which has no direction."""
    norms = np.linalg.norm(gradients, axis=1, keepdims=True)
    with np.errstate(invalid="ignore", divide="ignore"):
        directions = gradients / norms
    return np.clip(directions @ directions.T, -1.0, 1.0)


def summarize(matrix: Float[np.ndarray, "n n"]) -> dict[str, float]:
    """Returns the mean cosine and the share of negative ones over pairs of different tasks.

    Pairs without a cosine do not count; nothing is returned where no pair has one.
    """
    pairs = matrix[np.triu_indices(len(matrix), 1)]
    pairs = pairs[~np.isnan(pairs)]
    if not pairs.size:
        return {}
    return {"mean_cosine": float(np.mean(pairs)), "conflicting": float(np.mean(pairs < 0))}


def task_batches(
    data: Mapping[str, object], num_tasks: int, batch_size: int, seed: int, ids=None
) -> dict[str, Mapping[str, np.ndarray]]:
    """Returns one unpacked batch of each of `num_tasks` drawn tasks, in the mixture's order.

    `data` is of a run: mixture and feature_lengths count. Examples are of the train
    split; a smaller task repeats some. Raises UserError below two tasks.
    """
    mixture, lengths = data["mixture"], data["feature_lengths"]
    tasks = lookup.tasks_with(mixture, "train")
    if min(len(tasks), num_tasks) < 2:
        raise errors.UserError(
            f"Gradient alignment compares tasks: {mixture!r} has {len(tasks)}, and num_tasks is "
            f"{num_tasks}; it takes at least 2."
        )
    draw = np.random.default_rng(seed).permutation(len(tasks))[:num_tasks]
    first = lambda task: next(pipeline.train_batches(task, batch_size, lengths, seed, ids=ids))
    chosen = [tasks[index] for index in sorted(draw)]
    return {task.name: first(lookup.mixture_of(task)) for task in chosen}


def records(folder) -> list[dict]:
    """Returns the records of a run, oldest first, with `cosines` as an array [n, n]."""
    found = base.read(folder, NAME)
    return [{**record, "cosines": np.array(record["cosines"], float)} for record in found]


def _as_json(matrix: Float[np.ndarray, "n n"]) -> Sequence[Sequence[float | None]]:
    return [[None if np.isnan(x) else round(float(x), _DIGITS) for x in row] for row in matrix]
