"""Averages of adapters of one method: AdapterSoup over files, or checkpoints of one run."""

from collections.abc import Mapping, Sequence

import numpy as np

from moe_peft import errors, patching
from moe_peft.weights import identity, saved_run


def average(
    members: Mapping[str, saved_run.Saved], weights: Sequence[float] | None = None
) -> saved_run.Saved:
    """Returns `sum_i w_i leaf_i` of every leaf, in float32.

    Args:
      members: by the names under which the user knows them, at least two.
      weights: adding up to one; None for equal ones.

    Raises:
      UserError: methods, backbones or shapes differ, or the weights do not fit.
    """
    weights = _checked_weights(len(members), weights)
    (first_name, first), *others = members.items()
    leaves = {name: patching.flatten(saved.trainable) for name, saved in members.items()}
    for name, saved in others:
        _check_same(first_name, first.description, name, saved.description)
        _check_shapes(first_name, leaves[first_name], name, leaves[name])
    mean = {
        path: sum(
            np.float32(weight) * np.asarray(own[path], np.float32)
            for weight, own in zip(weights, leaves.values(), strict=True)
        )
        for path in leaves[first_name]
    }
    description = {
        **first.description,
        "average": [
            {"from": name, "step": saved.step, "weight": weight}
            for weight, (name, saved) in zip(weights, members.items(), strict=True)
        ],
    }
    description.pop("member", None)
    tree = patching.trees.unflatten(mean)
    return saved_run.Saved(first.step, tree, {}, {"description": description})


def _checked_weights(number: int, weights: Sequence[float] | None) -> list[float]:
    if number < 2:
        raise errors.UserError(f"An average takes at least two adapters, got {number}.")
    if weights is None:
        return [1.0 / number] * number
    if len(weights) != number:
        raise errors.UserError(f"There are {len(weights)} weights for {number} adapters.")
    if not np.isfinite(weights).all() or abs(sum(weights) - 1.0) > 1e-6:
        raise errors.UserError(
            f"The weights {', '.join(map(str, weights))} add up to {sum(weights):g}; expected 1."
        )
    return list(weights)


def _check_same(first: str, one: Mapping, name: str, other: Mapping) -> None:
    for part, path in (("method", ()), ("backbone", ("fingerprint",))):
        values = [description.get(part) for description in (one, other)]
        for key in path:
            values = [(value or {}).get(key) for value in values]
        difference = identity.first_difference(*values, ".".join((part, *path)))
        if difference:
            difference = difference.replace("in the checkpoint", f"in {first}")
            difference = difference.replace("here", f"in {name}")
            raise errors.UserError(f"{first} and {name} cannot be averaged: {difference}.")


def _check_shapes(first: str, one: Mapping, name: str, other: Mapping) -> None:
    shapes = [{path: np.shape(leaf) for path, leaf in leaves.items()} for leaves in (one, other)]
    for path in sorted(shapes[0].keys() | shapes[1].keys()):
        found = [own.get(path) for own in shapes]
        if found[0] != found[1]:
            raise errors.UserError(
                f"{first} and {name} cannot be averaged: {path} is {found[0] or 'missing'} and "
                f"{found[1] or 'missing'}."
            )
