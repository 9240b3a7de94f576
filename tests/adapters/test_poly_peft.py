"""Skilled LoRA against huggingface/peft: stored arrays, and live where torch is installed."""

import functools
import importlib.util
import pathlib

from flax import linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_peft import adapters, patching, routing

GOLDEN = pathlib.Path(__file__).parents[1] / "golden"
RUNS = ("poly_1_eval", "poly_1_train", "poly_4_eval", "poly_4_train")


class Model(nn.Module):
    """One frozen linear map."""

    @nn.compact
    def __call__(self, x):
        return nn.Dense(12, use_bias=False, name="layer")(x)


def patched(num_splits):
    factory = functools.partial(
        adapters.SkilledLoRA,
        num_skills=3,
        num_splits=num_splits,
        rank=2,
        router_factory=functools.partial(routing.TaskRouter, num_tasks=5, relaxed=True),
    )
    return patching.Patched(Model(), (patching.Rule("layer", factory),))


def check(name, arrays, monkeypatch):
    arrays = {
        key.removeprefix(f"{name}/"): jnp.asarray(value)
        for key, value in arrays.items()
        if key.startswith(f"{name}/")
    }
    draw, drawn = jax.random.uniform, []

    def uniform(key, shape, *args):
        if shape != arrays["uniform"].shape:  # Initialisers are asked for their shapes.
            return draw(key, shape, *args)
        drawn.append(shape)
        return arrays["uniform"]

    monkeypatch.setattr(jax.random, "uniform", uniform)
    leaves = {leaf: arrays[leaf] for leaf in ("lora_a", "lora_b", "logits")}
    model = patched(leaves["lora_a"].shape[0])
    is_training = name.endswith("train")

    def run(leaves, x):
        adapter = {**leaves, "router": {"logits": leaves["logits"]}}
        del adapter["logits"]
        params = {"layer": {"kernel": arrays["kernel"], "adapter": adapter}}
        context = routing.RoutingContext(task_ids=arrays["task_ids"])
        rngs = {"routing": jax.random.key(0)} if is_training else None
        return model.apply({"params": params}, x, routing=context, rngs=rngs)

    outputs, pullback = jax.vjp(run, leaves, arrays["x"])
    assert bool(drawn) == is_training
    grads, x_grad = pullback(arrays["cotangent"])
    np.testing.assert_allclose(outputs, arrays["outputs"], rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(x_grad, arrays["x_grad"], rtol=1e-5, atol=1e-5)
    for leaf, grad in grads.items():
        np.testing.assert_allclose(grad, arrays[f"{leaf}_grad"], rtol=1e-5, atol=1e-5, err_msg=leaf)


@pytest.mark.parametrize("name", RUNS)
def test_equals_stored_peft(name, monkeypatch):
    check(name, np.load(GOLDEN / "peft.npz"), monkeypatch)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_equals_installed_peft(monkeypatch):
    pytest.importorskip("torch")
    pytest.importorskip("peft")
    spec = importlib.util.spec_from_file_location("golden", GOLDEN / "make_peft_golden.py")
    golden = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(golden)
    arrays = golden.compute_poly()
    for name in RUNS:
        with monkeypatch.context() as patch:
            check(name, arrays, patch)
