"""Averages of adapters of one method: AdapterSoup over files, or checkpoints of one run."""

from collections.abc import Mapping, Sequence

import numpy as np

from moe_peft import errors, patching
from moe_peft.weights import identity, saved_run


def average(
    members: Mapping[str, saved_run.Saved], weights: Sequence[float] | None = None
) -> saved_run.Saved:
    """Returns `sum_i w_i leaf_i` of every leaf, in float32.

    There are two members or more, by the names that the user gave; weights add up to one, None for
    equal ones. Raises UserError if methods, backbones or shapes differ, or weights do not fit.
    """
    weights = _checked_weights(len(members), weights)
    (first_name, first), *others = members.items()
    for name, saved in others:
        where = f"in {first_name}", f"in {name}"
        for pair in zip(_comparable(first), _comparable(saved), strict=True):
            if difference := identity.first_difference(*pair, where=where):
                raise errors.UserError(f"{first_name} and {name} cannot be averaged: {difference}.")
    flat = [patching.flatten(saved.trainable) for saved in members.values()]
    weighted = list(zip(map(np.float32, weights), flat, strict=True))
    mean_of = lambda path: sum(w * np.asarray(own[path], np.float32) for w, own in weighted)
    mean = {path: mean_of(path) for path in flat[0]}
    record = [
        {"from": name, "step": saved.step, "weight": weight}
        for weight, (name, saved) in zip(weights, members.items(), strict=True)
    ]
    description = {**first.description, "average": record}
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
        named = f"The weights {', '.join(map(str, weights))}"
        raise errors.UserError(f"{named} add up to {sum(weights):g}; expected 1.")
    return list(weights)


def _comparable(saved: saved_run.Saved) -> list[Mapping]:
    """Returns what members of an average must share, in the order in which it is compared."""
    fingerprint = (saved.description.get("backbone") or {}).get("fingerprint")
    shapes = {path: np.shape(leaf) for path, leaf in patching.flatten(saved.trainable).items()}
    method = {"method": saved.description.get("method")}
    return [method, {"backbone": {"fingerprint": fingerprint}}, shapes]
