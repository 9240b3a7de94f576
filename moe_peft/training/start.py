"""What a run starts from: frozen and trainable trees, and whether a checkpoint is of this run."""

from collections.abc import Callable, Mapping
import dataclasses
import functools
from typing import Any, NamedTuple

from flax import linen as nn
import jax
from jaxtyping import Array, PyTree

from moe_peft import errors, methods, patching
from moe_peft.methods import transfer
from moe_peft.models import encoder_decoder, special_ids
from moe_peft.partitioning import layout as layout_lib
from moe_peft.runtime import digest, run_once
from moe_peft.training import optimizers
from moe_peft.weights import backbone as backbone_lib
from moe_peft.weights import identity, leaves, saved_run


@dataclasses.dataclass(frozen=True, eq=False)
class Start:
    """What a run is made from; only shapes are known until `trees` is called."""

    model: Any  # with adapters; `init(rng, batch_shapes)` returns its params
    base_model: Any  # the same without adapters
    method: methods.Method  # says what trains
    batch_shapes: Mapping[str, tuple[int, ...]]  # feature name to shape

    @classmethod
    def of_network(
        cls, network: nn.Module, method: methods.Method, batch_shapes: Mapping[str, tuple[int, ...]]
    ) -> "Start":
        """Returns what a run of the method on a network without adapters is made from."""
        model = encoder_decoder.EncoderDecoder(method.patch(network), method=method)
        return cls(model, encoder_decoder.EncoderDecoder(network), method, batch_shapes)

    @functools.cache  # noqa: B019 - a run has one, and tracing takes seconds
    def base_shapes(self) -> PyTree:
        """Returns the abstract params of the model without adapters."""
        return jax.eval_shape(self.init_base, jax.random.key(0))

    def config(self) -> Any:
        """Returns the config of the network; None: the model does not tell."""
        return getattr(getattr(self.base_model, "module", None), "config", None)

    def shapes(self) -> PyTree:
        """Returns the abstract params of the model with adapters."""
        return self._variables()["params"]

    def trainable_shapes(self) -> PyTree:
        """Returns the abstract trainable tree; UserError: it is empty, or a rule does not fit."""
        trainable = self.method.split(self.shapes())[1]
        if not trainable:
            raise errors.UserError(
                f"The method {self.method.name!r} trains nothing, so there is nothing to do. "
                "Evaluate it with `moe-peft eval` instead."
            )
        return trainable

    def logical_axes(self) -> layout_lib.Axes:
        """Returns the names of the axes of every parameter; none of a model that does not tell."""
        return layout_lib.logical_axes(self._variables())

    def check_backbone(self, backbone: str) -> None:
        """Raises UserError if a backbone is not there or does not fit; reads no weights."""
        backbone_lib.check_headers(backbone, self.base_shapes(), self.config())
        self.check_special_ids(backbone)

    def check_special_ids(self, backbone: str) -> None:
        """Raises UserError if a backbone's files tell other special ids than the model's."""
        backbone_lib.check_special_ids(backbone, special_ids.of_config(self.config()))

    def trees(
        self, backbone: str, seed: int, frozen_dtype: str, source: "Source | None" = None
    ) -> "Trees":
        """Returns the backbone that the spec names with its adapters, split by the method.

        Adapters start from `source`, or fresh by the seed. Trainable leaves are float32, also where
        they are the backbone's (method `full`); `frozen_dtype` is how the others are stored.
        """
        stored_as = lambda path: "float32" if self.method.is_trainable(path) else frozen_dtype
        self.check_special_ids(backbone)
        loaded = backbone_lib.load(
            backbone, self.base_shapes(), self.init_base, stored_as, self.config()
        )
        base = patching.flatten(loaded.params)
        if source is None:
            adapters = self.fresh_adapters(base)(jax.random.key(seed))
        else:
            adapters = patching.flatten(self.transferred(source, seed))
        frozen, trainable = self.method.split(patching.trees.unflatten({**base, **adapters}))
        return Trees(
            leaves.cast_tree(frozen, frozen_dtype),
            leaves.cast_tree(trainable, "float32"),
            loaded.fingerprint,
        )

    def transferred(self, source: "Source", seed: int, task_weights: Any = None) -> PyTree:
        """Returns what the method starts from after the run `source`; see `transfer.initial`."""
        rng = jax.random.key(seed)
        return transfer.initial(self.method, source.trainable, self.shapes(), rng, task_weights)

    def fresh_adapters(self, base: Mapping[str, Any]) -> Callable[[Array], dict[str, Array]]:
        """Returns the jitted key -> leaves by path, of all that `base`, by path too, does not hold.

        Only these are returned, so the compiler leaves out the base's random weights.
        """

        wanted = lambda flat: {path: leaf for path, leaf in flat.items() if path not in base}
        return run_once.jit(lambda rng: wanted(patching.flatten(self.init(rng))))

    @functools.cache  # noqa: B019
    def _variables(self) -> PyTree:
        if not hasattr(self.model, "init_variables"):
            return {"params": jax.eval_shape(self.init, jax.random.key(0))}
        init = lambda rng: self.model.init_variables(rng, self.batch_shapes)
        return jax.eval_shape(init, jax.random.key(0))

    def init(self, rng: Array) -> PyTree:
        """Returns fresh params of the model with adapters."""
        return self.model.init(rng, self.batch_shapes)

    def init_base(self, rng: Array) -> PyTree:
        """Returns fresh params of the model without adapters."""
        return self.base_model.init(rng, self.batch_shapes)


@dataclasses.dataclass(frozen=True)
class Source:
    """A run of another method (or of the same), whose parameters one starts from."""

    folder: str  # of that run, or the file it was exported to
    step: int  # of its checkpoint
    trainable: PyTree  # what it trained
    description: Mapping[str, Any]  # what it is, see `describe`

    @classmethod
    def load(cls, method: methods.Method, folder: str, step: int | None = None) -> "Source":
        """Reads a checkpoint, the newest by default; UserError: none, or of another method."""
        saved = saved_run.load(folder, step)
        identity.check_source(method, saved.description, folder)
        return cls(str(folder), saved.step, saved.trainable, saved.description)

    def check_backbone(self, fingerprint: str) -> None:
        """Raises UserError unless the run had the backbone with this fingerprint."""
        if self.description["backbone"]["fingerprint"] != fingerprint:
            raise errors.UserError(
                f"The run in {self.folder} was trained on another backbone "
                f"({self.description['backbone_spec']}); give BACKBONE the same weights."
            )

    def describe(self) -> dict[str, Any]:
        """Returns what identifies it, as json types."""
        return {"step": self.step, "digest": digest.of_tree(self.trainable)}


class Trees(NamedTuple):
    """The two trees of a fresh run and what identifies the frozen weights."""

    frozen: PyTree  # never differentiated, never saved
    trainable: PyTree
    fingerprint: str  # of the backbone


def describe(
    method: methods.Method,
    backbone: str,
    fingerprint: str,
    frozen_dtype: str,
    optimizer: optimizers.Optimizer,
    described: Mapping[str, Any],
) -> dict[str, Any]:
    """Returns what a run is, as json types, to be stored with every checkpoint."""
    description = {
        "method": method.describe(),
        "backbone": {"fingerprint": fingerprint, "frozen_dtype": frozen_dtype},
        "backbone_spec": backbone,
        "optimizer": optimizer.describe(),
        **described,
    }
    return identity.as_json(description)


def warnings(saved: Mapping[str, Any], current: Mapping[str, Any]) -> list[str]:
    """Returns what is worth a line, but not refused, where a run goes on."""
    found = []
    # To train longer, or on at a lower rate, is legitimate.
    if changed := identity.first_difference(saved["optimizer"], current["optimizer"]):
        found.append(f"the optimiser was changed: {changed}.")
    if "rows" in current and "rows" not in saved:
        found.append(
            "the checkpoint does not say which settings shaped its data (version 0.1 did not save "
            "them): make sure that they are the same here."
        )
    return found
