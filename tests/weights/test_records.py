"""A method made again from its description is the same method."""

import copy
import functools
import inspect

import pytest

from moe_peft import errors, methods, routing
from moe_peft.methods import transfer
from moe_peft.weights import identity, records

poly = functools.partial(methods.poly, 5, 3, 2)


def defaults(constructor):
    """The method with its defaults; those that route by task with five tasks."""
    needs_tasks = "num_tasks" in inspect.signature(constructor).parameters
    return functools.partial(constructor, 5) if needs_tasks else constructor


# Every method and every router that is registered, and then what else has options of its own.
METHODS = {
    **{name: defaults(constructor) for name, constructor in methods.METHODS.items()},
    **{f"mov {each}": functools.partial(methods.mov, routing=each) for each in methods.ROUTERS},
    **{f"poly {each}": functools.partial(poly, routing=each) for each in methods.SKILL_ROUTERS},
    "mov": functools.partial(methods.mov, top_k=2, jitter=0.1),
    "molora": functools.partial(methods.molora, routing="sentence", z_weight=0.1),
    "poly": poly,
    "blocks": functools.partial(poly, adapter="ia3", granularity="blocks", num_blocks=2),
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


def test_every_adapter_and_router_is_made_again():
    made = [METHODS[name]() for name in METHODS]
    assert len(made) > len(methods.METHODS) >= 11
    rules = [rule for method in made for rule in method.rules]
    assert {type(rule.adapter_factory(parent=None)) for rule in rules} == {
        *methods.ADAPTERS.values()
    }
    routers = {type(router) for method in made for router in method.routers}
    assert routers == {*routing.ROUTERS, *routing.SKILL_ROUTERS}


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
