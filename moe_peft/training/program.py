"""What a run compiles, and where its arrays lie on the devices."""

from typing import Any

import jax
from jaxtyping import PyTree

from moe_peft import patching
from moe_peft.partitioning import layout as layout_lib
from moe_peft.runtime import processes
from moe_peft.training import start as start_lib
from moe_peft.training import step as step_lib
from moe_peft.weights import identity


class Program:
    """The step of a run, and where its arrays lie on the devices."""

    def __init__(self, begin, optimizer, settings, mesh, rate_factor=1.0):
        self.begin, self.optimizer, self.settings = begin, optimizer, settings
        self._mesh, self._rate_factor = mesh, rate_factor
        self._group_of = begin.method.learning_rate_group
        self.trainable = begin.trainable_shapes()  # what trains
        self._transform = optimizer.build(self.trainable, self._group_of)
        self.state = jax.eval_shape(self._create_state, self.trainable)  # shapes, too
        self._layout, self._axes = layout_lib.Layout(mesh), begin.logical_axes()
        places = self._layout.shardings(self.trainable, self._axes)
        self._places = self._layout.optimizer_shardings(self.state, places, self.trainable)

    def scaled(self, factor: float) -> "Program":
        """Returns the same with another factor on the learning rate."""
        return Program(self.begin, self.optimizer.scaled(factor), self.settings, self._mesh, factor)

    def describe_rate(self) -> dict[str, Any]:
        """Returns what a description says of a rate that was found."""
        described = identity.as_json(self.optimizer.describe())
        return {"optimizer": described, "rate_factor": self._rate_factor}

    def load(self, backbone, start_from, described) -> tuple[PyTree, step_lib.TrainState, dict]:
        """Returns (frozen tree, state before the first step, what the run is)."""
        begin, dtype = self.begin, self.settings.frozen_dtype
        source = start_lib.Source.load(begin.method, start_from) if start_from else None
        trees = begin.trees(backbone, self.settings.seed, dtype, source)
        if source is not None:
            source.check_backbone(trees.fingerprint)
            described = {**described, "source": source.describe()}
        weights = (backbone, trees.fingerprint, dtype)
        description = start_lib.describe(begin.method, *weights, self.optimizer, described)
        places = self._layout.shardings(trees.frozen, self._axes)
        frozen = processes.put_on_devices(trees.frozen, places)
        state = processes.put_on_devices(self._create_state(trees.trainable), self._places)
        return frozen, state, description

    def make_step(self) -> step_lib.TrainStep:
        """Returns the step, jitted; it compiles at its first call."""
        rates = self.optimizer.learning_rates(self.trainable, self._group_of)
        return step_lib.make_train_step(
            *(self.begin.model, self._transform, patching.merge),
            *(self.settings.num_microbatches, rates),
            layout=self._layout,
            out_shardings=(self._places, self._layout.replicated),
            compiler_options=step_lib.compiler_options(),
        )

    def _create_state(self, trainable: PyTree) -> step_lib.TrainState:
        return step_lib.create_state(trainable, self._transform, self.settings.seed)
