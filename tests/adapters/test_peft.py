"""LoRA and (IA)3 against huggingface/peft: stored arrays, and live where torch is installed."""

import functools
import importlib.util
import pathlib

from flax import linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_peft import adapters, patching

GOLDEN = pathlib.Path(__file__).parents[1] / "golden"
RULES = {
    "lora": patching.Rule("layer", functools.partial(adapters.LoRA, rank=2, alpha=6.0)),
    "ia3": patching.Rule("layer", adapters.IA3),
    "ia3_inputs": patching.Rule("layer", adapters.IA3, side="inputs"),
}


class Model(nn.Module):
    """One frozen linear map."""

    @nn.compact
    def __call__(self, x):
        return nn.Dense(7, use_bias=False, name="layer")(x)


def check(name, arrays):
    arrays = {
        key.removeprefix(f"{name}/"): jnp.asarray(value)
        for key, value in arrays.items()
        if key.startswith(f"{name}/")
    }
    patched = patching.Patched(Model(), (RULES[name],))
    adapter = {leaf: arrays[leaf] for leaf in ("vectors", "lora_a", "lora_b") if leaf in arrays}
    assert adapter

    def run(adapter, x):
        params = {"layer": {"kernel": arrays["kernel"], "adapter": adapter}}
        return patched.apply({"params": params}, x)

    outputs, pullback = jax.vjp(run, adapter, arrays["x"])
    grads, x_grad = pullback(arrays["cotangent"])
    np.testing.assert_allclose(outputs, arrays["outputs"], rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(x_grad, arrays["x_grad"], rtol=1e-5, atol=1e-5)
    for leaf, grad in grads.items():
        np.testing.assert_allclose(grad, arrays[f"{leaf}_grad"], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", RULES)
def test_equals_stored_peft(name):
    check(name, np.load(GOLDEN / "peft.npz"))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_equals_installed_peft():
    pytest.importorskip("torch")
    pytest.importorskip("peft")
    spec = importlib.util.spec_from_file_location("golden", GOLDEN / "make_peft_golden.py")
    golden = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(golden)
    arrays = golden.compute()
    for name in RULES:
        check(name, arrays)
