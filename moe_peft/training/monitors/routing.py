"""The course of task routing over training: do tasks come to choose, and how sharply?"""

import dataclasses
from typing import Any

import gin
import jax
import jax.numpy as jnp
import numpy as np

from moe_peft.training.monitors import base, task_routing

NAME = "routing"

_DIGITS = 6  # of a recorded number


@gin.register(module="monitors")
@dataclasses.dataclass(frozen=True)
class RoutingCourse:
    """Records entropy and sparsity of every selector of Poly or MHR.

    Metrics: `routing/entropy`, `routing/sparsity` and `routing/max_weight`, see
    `task_routing.statistics`, as means over selectors. Records: the same for each selector.
    """

    period: int = 100  # steps between records

    name = NAME

    def start(self, run: base.Watched) -> base.Watch:
        """Finds the selectors; raises UserError if there are none."""
        selectors: list[str] = []  # Not returned: jax would sort the keys of a dict.
        jax.eval_shape(lambda tree: selectors.extend(task_routing.logits(tree)), run.trainable)
        rounds = task_routing.is_straight_through(run.method.describe())

        @jax.jit
        def statistics(trainable):
            found = [
                task_routing.statistics(task_routing.weights(logits, rounds))
                for logits in task_routing.logits(trainable).values()
            ]
            return jax.tree.map(lambda *values: jnp.stack(values), *found)

        def watch(step, frozen, trainable):
            del frozen
            found: dict[str, Any] = jax.device_get(statistics(trainable))
            rounded = {name: np.round(x.astype(float), _DIGITS) for name, x in found.items()}
            record = {name: values.tolist() for name, values in rounded.items()}
            base.append(run.folder, NAME, step, {"selectors": selectors, **record})
            return {name: float(np.mean(values)) for name, values in found.items()}

        return watch


def records(folder) -> list[dict[str, Any]]:
    """Returns the records of a run, oldest first, statistics as arrays over selectors."""
    return [
        {**record, **{name: np.array(record[name]) for name in task_routing.STATISTICS}}
        for record in base.read(folder, NAME)
    ]
