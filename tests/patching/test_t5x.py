"""The same patching on T5X's own networks, unmodified, where T5X is installed."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_peft import methods, patching, routing
from moe_peft.weights import merging

TOKENS = (jnp.asarray([[5, 6, 1, 0]]), jnp.asarray([[0, 3, 4]]), jnp.asarray([[3, 4, 1]]))


@pytest.fixture(autouse=True)
def rank_promotion():
    """T5X promotes ranks in its embedding."""
    with jax.numpy_rank_promotion("allow"):
        yield


@pytest.fixture(params=["t5", "scalable_t5"])
def network(request):
    # Importing T5X takes TensorFlow and tens of seconds.
    module = pytest.importorskip(f"t5x.examples.{request.param}.network")
    config = module.T5Config(
        vocab_size=16,
        emb_dim=8,
        num_heads=3,
        head_dim=4,
        mlp_dim=16,
        num_encoder_layers=2,
        num_decoder_layers=2,
        mlp_activations=("gelu", "linear"),
    )
    return module.Transformer(config)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", ["ia3", "lora", "mov", "molora"])
def test_t5x_networks(network, name):
    method = methods.get(name)()
    patched = method.patch(network)
    base = network.init(jax.random.key(0), *TOKENS, enable_dropout=False)["params"]
    variables = jax.jit(functools.partial(patched.init, enable_dropout=False))(
        jax.random.key(0), *TOKENS
    )
    frozen, trainable = method.split(variables["params"])
    assert jax.tree.map(jnp.shape, frozen) == jax.tree.map(jnp.shape, dict(base))
    axes = patching.flatten(variables["params_axes"])
    for path, leaf in patching.flatten(trainable).items():
        assert len(axes[f"{path}_axes"].names) == leaf.ndim

    def call(model, params, method=None, args=TOKENS):
        return model.apply({"params": params}, *args, enable_dropout=False, method=method)

    merged = patching.merge(base, trainable)
    plain, fresh = call(network, base), call(patched, merged)
    np.testing.assert_allclose(fresh, plain, rtol=1e-4, atol=1e-5)
    moved = patching.merge(base, jax.tree.map(lambda leaf: leaf + 0.3, trainable))
    assert jnp.abs(call(patched, moved) - plain).max() > 1e-2
    encode = functools.partial(call, method=network.encode, args=TOKENS[:1])
    assert jnp.abs(encode(patched, moved) - encode(network, base)).max() > 1e-2


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("adapter", ["lora", "ia3"])
def test_adapters_merge_into_t5x_networks(network, adapter):
    method = methods.mhr(3, num_skills=2, num_splits=2, adapter=adapter)
    context = routing.RoutingContext(task_ids=jnp.asarray([1]))
    init = functools.partial(method.patch(network).init, enable_dropout=False, routing=context)
    params = jax.jit(init)(jax.random.key(0), *TOKENS)["params"]
    noise = lambda leaf: leaf + 0.1 * np.random.default_rng(0).normal(size=leaf.shape)
    frozen, trainable = method.split(params)
    params = patching.merge(frozen, jax.tree.map(lambda x: jnp.float32(noise(x)), trainable))
    merged = merging.merge_into_base(network, method, params, task=1)
    assert jax.tree.map(jnp.shape, merged) == jax.tree.map(jnp.shape, frozen)
    assert merging.logit_gap(network, method, params, merged, task=1).relative < 1e-5
    assert merging.logit_gap(network, method, params, frozen, task=1).relative > 1e-4
