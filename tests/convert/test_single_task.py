"""One task of a task-routed adapter, taken alone, merges to the same kernels."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_peft import errors, methods, patching
from moe_peft.convert import single_task
from moe_peft.methods import transfer
from moe_peft.weights import merging, records

poly = functools.partial(methods.poly, 3, 2, 2)
CASES = {
    "mhr": (functools.partial(poly, rank=2, alpha=3.0, placement="light"), "t5_1_1"),
    "shared": (functools.partial(poly, granularity="coder", placement="light"), "scanned"),
    "random": (functools.partial(poly, routing="random_task", placement="light"), "scanned"),
    "private_ia3": (functools.partial(methods.private, 3, adapter="ia3"), "t5_1_0"),
    "uniform": (functools.partial(poly, routing="uniform", placement="light"), "t5_1_1"),
}


SLOW = ("random", "uniform", "mhr")


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=[pytest.mark.slow] * (n in SLOW)) for n in CASES]
)
def test_merges_to_the_same_kernels(toy, name):
    make, layout = CASES[name]
    saved = toy.trained(make(), layout)
    alone = single_task.of_task(saved, 2, "toy")
    plain = records.method(alone.description["method"], "toy")
    assert plain.name == ("ia3" if "ia3" in name else "lora")
    assert plain.num_tasks is None
    network = toy.network(layout)
    base = toy.base_params(network)
    params = jax.tree.map(jnp.asarray, patching.merge(base, saved.trainable))
    want = merging.merge_into_base(network, make(), params, 2)
    have = merging.merge_into_base(network, plain, patching.merge(base, alone.trainable))
    want, have = patching.flatten(want), patching.flatten(have)
    assert want.keys() == have.keys()
    assert len(want) > 20
    for path, kernel in want.items():
        np.testing.assert_allclose(have[path], kernel, rtol=0, atol=1e-5, err_msg=path)
    assert (alone.description["task"], alone.step) == (2, 7)


def test_refused_in_one_line(toy):
    with pytest.raises(errors.UserError, match="'lora' serve all tasks at once; leave out --task"):
        single_task.of_task(toy.saved(methods.lora(), {}), 0, "run")
    z = transfer.transferred(poly(), "z")
    with pytest.raises(errors.UserError, match="'mhr_z' trained routers only"):
        single_task.of_task(toy.saved(z, {}), 0, "run")
    with pytest.raises(errors.UserError, match="0 to 2; task 3 is none of them"):
        single_task.of_task(toy.saved(poly(), {}), 3, "run")
