"""What every run starts from: one frozen tree, and the trainable leaves of each job."""

from collections.abc import Callable, Sequence

import jax
from jaxtyping import Float, PyTree
import numpy as np

from moe_peft import errors, methods, patching
from moe_peft.adaptation import data
from moe_peft.methods import transfer
from moe_peft.training import start as start_lib
from moe_peft.weights import backbone as backbone_lib
from moe_peft.weights import leaves

_NO_JOB = data.Job("", 0)  # stands for any: frozen leaves are the same for all

TaskWeights = Callable[[data.Job], Float[np.ndarray, "n"]]


class Start:
    """The frozen tree, shared by all runs, and the function from a job to its trainable leaves."""

    def __init__(
        self,
        start: start_lib.Start,
        backbone: str,
        source: str | None,
        frozen_dtype: str,
        task_weights: TaskWeights | None = None,
    ):
        """Loads backbone and source; see `adapt.Settings`. Frozen adapters stay float32.

        Raises UserError: the source is of another method, backbone or model, or does not fit.
        """
        self._task_weights = task_weights
        self._method = method = start.method
        _check(method, source)
        self._source = start_lib.Source.load(method, source) if source else None
        start.check_special_ids(backbone)
        loaded = backbone_lib.load(
            backbone, start.base_shapes(), start.init_base, network=start.config()
        )
        self.fingerprint = loaded.fingerprint
        self.source_step = self._source and self._source.step
        if self._source is not None:
            self._source.check_backbone(self.fingerprint)
        self._base = patching.flatten(leaves.cast_tree(loaded.params, "float32"))
        self._shapes = start.shapes()
        self._fresh_adapters = start.fresh_adapters(self._base)
        frozen = patching.flatten(self._split(_NO_JOB)[0])
        cast = leaves.cast_tree(
            {path: leaf for path, leaf in frozen.items() if path in self._base}, frozen_dtype
        )
        self.frozen = patching.trees.unflatten({**frozen, **cast})

    def trainables(self, jobs: Sequence[data.Job]) -> list[PyTree]:
        """Initial trainable leaves of every job, float32."""
        return [leaves.cast_tree(self._split(job)[1], "float32") for job in jobs]

    @property
    def num_trainable(self) -> int:
        """Parameters that train in one run."""
        return patching.trees.num_parameters(self._method.split(self._shapes)[1])

    def _split(self, job: data.Job) -> tuple[dict, dict]:
        rng = jax.random.key(job.key_seed)
        if self._source is None:
            adapters = self._fresh_adapters(rng)
        else:
            trees = (self._source.trainable, self._shapes)
            found = transfer.initial(self._method, *trees, rng, self._weights(job))
            adapters = patching.flatten(found)
        return self._method.split(patching.trees.unflatten({**self._base, **adapters}))

    def _weights(self, job: data.Job) -> Float[np.ndarray, "n"] | None:
        """Weights of the source's tasks; equal ones where only frozen leaves matter."""
        if self._task_weights is None:
            return None
        if job is _NO_JOB:
            num_tasks = self._method.transfer.source.num_tasks
            return np.full(num_tasks, 1 / num_tasks, np.float32)
        return self._task_weights(job)


def _check(method: methods.Method, source: str | None) -> None:
    if source is None and method.transfer is not None and method.transfer.variant != "keep":
        raise errors.UserError(
            f"{method.name!r} starts from a multi-task run of {method.transfer.source.name!r}; "
            "give its folder as SOURCE."
        )
    if method.num_tasks is not None:
        raise errors.UserError(
            f"{method.name!r} routes by the ids of its {method.num_tasks} training tasks, which a "
            "new task has not. Adapt with @methods.transferred() and variant 'new_logits', 'z' or "
            "'mu'."
        )
