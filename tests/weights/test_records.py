"""A method made again from its description is the same method."""

import copy
import functools

import pytest

from moe_peft import errors, methods
from moe_peft.methods import transfer
from moe_peft.weights import identity, records

poly = functools.partial(methods.poly, 5, 3, 2)
METHODS = {
    "ia3": methods.ia3,
    "lora_big": methods.lora_big,
    "mov": functools.partial(methods.mov, top_k=2, jitter=0.1),
    "molora": functools.partial(methods.molora, routing="sentence", z_weight=0.1),
    "poly": poly,
    "private": functools.partial(methods.private, 5),
    "random": functools.partial(poly, routing="random_task"),
    "uniform": functools.partial(poly, routing="uniform"),
    "blocks": functools.partial(poly, adapter="ia3", granularity="blocks", num_blocks=2),
    "full": methods.full,
    "z": lambda: transfer.transferred(poly(), "z"),
    "kept": lambda: transfer.transferred(methods.lora(), "keep"),
}


@pytest.mark.parametrize("name", METHODS)
def test_made_again(name):
    method = METHODS[name]()
    described = identity.as_json(method.describe())
    again = records.method(described, "file")
    assert identity.as_json(again.describe()) == described
    assert again.num_tasks == method.num_tasks
    shared = [rule.shared_router is not None for rule in method.rules]
    assert [rule.shared_router is not None for rule in again.rules] == shared


def test_what_is_not_known_is_one_line():
    described = identity.as_json(methods.lora().describe())
    unknown = copy.deepcopy(described)
    unknown["rules"][0]["adapter"]["class"] = "DoRA"
    with pytest.raises(errors.UserError, match="run.safetensors: .*'DoRA'"):
        records.method(unknown, "run.safetensors")
    with pytest.raises(errors.UserError, match="cannot make its method again: method.speed"):
        records.method({**described, "speed": 2}, "run.safetensors")
    with pytest.raises(errors.UserError, match="does not say which network"):
        records.network({}, "run.safetensors")
