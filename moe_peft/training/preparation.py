"""What a run starts from: frozen and trainable trees, and whether a checkpoint is of this run."""

from collections.abc import Mapping, Sequence
import dataclasses
import json
import pathlib
from typing import Any

import jax
from jaxtyping import PyTree

from moe_peft import errors, methods, patching
from moe_peft.training import backbone as backbone_lib
from moe_peft.training import optimizers

# Parts of the description that must agree with a checkpoint's, and what a person calls them.
_MUST_AGREE = {"method": "method", "backbone": "backbone", "model": "model config", "data": "data"}


@dataclasses.dataclass(frozen=True)
class Start:
    """What a run is made from; only shapes are known until `trees` is called.

    Attributes:
      model: with adapters; `init(rng, batch_shapes)` returns its params.
      base_model: the same without adapters.
      method: says what trains.
      batch_shapes: feature name to shape.
    """

    model: Any
    base_model: Any
    method: methods.Method
    batch_shapes: Mapping[str, tuple[int, ...]]

    def base_shapes(self) -> PyTree:
        """Returns the abstract params of the model without adapters."""
        return jax.eval_shape(self._init_base, jax.random.key(0))

    def trainable_shapes(self) -> PyTree:
        """Returns the abstract trainable tree.

        Raises:
          UserError: it is empty, or a rule of the method does not fit the model.
        """
        shapes = jax.eval_shape(self._init, jax.random.key(0))
        trainable = self.method.split(shapes)[1]
        if not trainable:
            raise errors.UserError(
                f"The method {self.method.name!r} trains nothing, so there is nothing to do. "
                "Evaluate it with `moe-peft eval` instead."
            )
        return trainable

    def trees(self, backbone: str, seed: int, frozen_dtype: str) -> "Trees":
        """Returns the backbone that the spec names with fresh adapters, parted by the method.

        Args:
          backbone: see `backbone.load`.
          seed: of the fresh adapters.
          frozen_dtype: how frozen leaves are stored, "float32" or "bfloat16". Trainable leaves are
            float32, also where they are the backbone's (method `full`).
        """
        loaded = backbone_lib.load(backbone, self.base_shapes(), self._init_base)
        base = patching.flatten(loaded.params)

        def fresh_adapters(rng):
            # Only these are returned, so the compiler leaves out the base's random weights.
            flat = patching.flatten(self._init(rng))
            return {path: leaf for path, leaf in flat.items() if path not in base}

        adapters = jax.jit(fresh_adapters)(jax.random.key(seed))
        frozen, trainable = self.method.split(patching.trees.unflatten({**base, **adapters}))
        return Trees(
            backbone_lib.cast(frozen, frozen_dtype),
            backbone_lib.cast(trainable, "float32"),
            loaded.fingerprint,
        )

    def _init(self, rng):
        return self.model.init(rng, self.batch_shapes)

    def _init_base(self, rng):
        return self.base_model.init(rng, self.batch_shapes)


@dataclasses.dataclass(frozen=True)
class Trees:
    """The two trees of a fresh run and what identifies the frozen weights.

    Attributes:
      frozen: never differentiated, never saved.
      trainable: what learns.
      fingerprint: of the backbone.
    """

    frozen: PyTree
    trainable: PyTree
    fingerprint: str


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
    return as_json(description)


def as_json(value: Any) -> Any:
    """Returns `value` as it comes back from a json file, so that both can be compared."""
    return json.loads(json.dumps(value, default=str))


def check_same_run(
    saved: Mapping[str, Any],
    current: Mapping[str, Any],
    model_dir: pathlib.Path | str,
    parts: Sequence[str] = tuple(_MUST_AGREE),
) -> None:
    """Refuses checkpoints of another run.

    Args:
      saved: description in the checkpoint.
      current: description of this run, at least its `parts`.
      model_dir: for the message.
      parts: what must agree: "method", "backbone", "model", "data".

    Raises:
      UserError: a part differs; the message names the difference.
    """
    for part in parts:
        difference = _first_difference(saved[part], current[part])
        if difference:
            raise errors.UserError(
                f"The checkpoints in {model_dir} are of a run with another {_MUST_AGREE[part]}: "
                f"{difference}. Choose another MODEL_DIR, or go back to the settings of that run."
            )


def optimizer_changes(saved: Mapping[str, Any], current: Mapping[str, Any]) -> str:
    """Returns what changed in the optimiser's settings, "" for nothing.

    It is no reason to refuse: to train longer, or on at a lower rate, is legitimate.
    """
    return _first_difference(saved["optimizer"], current["optimizer"])


def _first_difference(saved: Any, current: Any, path: str = "") -> str:
    """Returns "a.b is 1 in the checkpoint and 2 here", or "" where both are equal."""
    if isinstance(saved, Mapping) and isinstance(current, Mapping):
        pairs = [(key, saved.get(key), current.get(key)) for key in sorted({*saved, *current})]
    elif isinstance(saved, list) and isinstance(current, list) and len(saved) == len(current):
        pairs = [(index, *both) for index, both in enumerate(zip(saved, current, strict=True))]
    elif saved == current:
        return ""
    else:
        return f"{path} is {_short(saved)} in the checkpoint and {_short(current)} here"
    for key, old, new in pairs:
        found = _first_difference(old, new, f"{path}.{key}" if path else str(key))
        if found:
            return found
    return ""


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
