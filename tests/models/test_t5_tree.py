"""Names, shapes and axes of all parameters are those of T5X's networks, and so are logits."""

import importlib
import re

from flax import traverse_util
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_peft.models import t5

SIZES = {
    "vocab_size": 50,
    "emb_dim": 16,
    "num_heads": 3,
    "head_dim": 4,
    "mlp_dim": 32,
    "num_encoder_layers": 2,
    "num_decoder_layers": 2,
}

# What examples/t5 has in every layer: (path in the layer, shape, axes).
QKV = ((16, 12), ("embed", "joined_kv"))
ATTENTION = {
    "query/kernel": QKV,
    "key/kernel": QKV,
    "value/kernel": QKV,
    "out/kernel": ((12, 16), ("joined_kv", "embed")),
}
# And examples/scalable_t5, before layers are stacked at axis 1.
QKV_3D = ((16, 3, 4), ("embed", "heads", "kv"))
ATTENTION_3D = {
    "query/kernel": QKV_3D,
    "key/kernel": QKV_3D,
    "value/kernel": QKV_3D,
    "out/kernel": ((3, 4, 16), ("heads", "kv", "embed")),
}
SCALE = ((16,), ("embed",))
RELPOS = {"relpos_bias/rel_embedding": ((3, 32), ("heads", "relpos_buckets"))}
WI, WO = ((16, 32), ("embed", "mlp")), ((32, 16), ("mlp", "embed"))
STACKS = {
    "encoder": (("attention",), ("pre_attention_layer_norm", "pre_mlp_layer_norm")),
    "decoder": (
        ("self_attention", "encoder_decoder_attention"),
        ("pre_self_attention_layer_norm", "pre_cross_attention_layer_norm", "pre_mlp_layer_norm"),
    ),
}
MLPS = {
    ("gelu", "linear"): {"mlp/wi_0/kernel": WI, "mlp/wi_1/kernel": WI, "mlp/wo/kernel": WO},
    ("relu",): {"mlp/wi/kernel": WI, "mlp/wo/kernel": WO},
}


def expected_tree(activations, is_tied, is_scanned):
    """{path: (shape, axes)} of the whole network."""
    tree = {"token_embedder/embedding": ((50, 16), ("vocab", "embed"))}
    if not is_tied:
        tree["decoder/logits_dense/kernel"] = ((16, 50), ("embed", "vocab"))
    for stack, (attentions, norms) in STACKS.items():
        layer = dict(MLPS[activations])
        for attention in attentions:
            kernels = ATTENTION_3D if is_scanned else ATTENTION
            layer |= {f"{attention}/{path}": leaf for path, leaf in kernels.items()}
        layer |= {f"{norm}/scale": SCALE for norm in norms}
        tree[f"{stack}/{stack}_norm/scale"] = SCALE
        if is_scanned:
            for path, (shape, axes) in (layer | RELPOS).items():
                stacked = (shape[:1] + (2,) + shape[1:], axes[:1] + ("layers",) + axes[1:])
                tree[f"{stack}/{stack}/{path}"] = stacked
        else:
            tree |= {f"{stack}/{path}": leaf for path, leaf in RELPOS.items()}
            for i in range(2):
                tree |= {f"{stack}/layers_{i}/{path}": leaf for path, leaf in layer.items()}
    return tree


def batch():
    inputs = jnp.array([[5, 6, 7, 1, 0], [3, 2, 1, 0, 0]])
    targets = jnp.array([[4, 5, 6, 1], [3, 1, 0, 0]])
    return inputs, jnp.pad(targets[:, :-1], ((0, 0), (1, 0))), targets


def abstract_variables(module):
    return jax.eval_shape(
        lambda rng: module.init(rng, *batch(), enable_dropout=False), jax.random.key(0)
    )


def tree_of(module):
    """{path: (shape, axes)} as initialised, abstractly."""
    variables = abstract_variables(module)
    shapes = traverse_util.flatten_dict(variables["params"], sep="/")
    axes = traverse_util.flatten_dict(variables["params_axes"], sep="/")
    assert set(axes) == {f"{path}_axes" for path in shapes}
    assert all(leaf.dtype == jnp.float32 for leaf in shapes.values())
    return {k: (v.shape, tuple(axes[f"{k}_axes"].names)) for k, v in shapes.items()}


def t5x_network(is_scanned, **options):
    name = f"t5x.examples.{'scalable_t5' if is_scanned else 't5'}.network"
    try:
        network = importlib.import_module(name)
    except ImportError:
        pytest.skip("live comparison needs T5X on the path (it is not on PyPI)")
    if is_scanned:
        options["scan_layers"] = True
    return network.Transformer(network.T5Config(**SIZES, **options))


@pytest.mark.parametrize("is_scanned", [False, True])
@pytest.mark.parametrize("remat_policy", ["none", "full"])
@pytest.mark.parametrize(
    ("activations", "is_tied"), [(("gelu", "linear"), False), (("relu",), True)]
)
def test_tree(is_scanned, remat_policy, activations, is_tied):
    config = t5.T5Config(
        **SIZES,
        mlp_activations=activations,
        logits_via_embedding=is_tied,
        scan_layers=is_scanned,
        remat_policy=remat_policy,
        dtype="bfloat16",
    )
    assert tree_of(t5.Transformer(config)) == expected_tree(activations, is_tied, is_scanned)


@pytest.mark.parametrize("is_scanned", [False, True])
@pytest.mark.parametrize(
    ("activations", "is_tied"), [(("gelu", "linear"), False), (("relu",), True)]
)
@pytest.mark.filterwarnings("ignore")  # T5X's own
def test_t5x(is_scanned, activations, is_tied):
    options = {"mlp_activations": activations, "logits_via_embedding": is_tied}
    theirs = t5x_network(is_scanned, **options)
    ours = t5.Transformer(t5.T5Config(**SIZES, **options, scan_layers=is_scanned))
    with jax.numpy_rank_promotion("allow"):  # T5X relies on it
        assert tree_of(ours) == tree_of(theirs)

        variables = {
            "params": theirs.init(jax.random.key(1), *batch(), enable_dropout=False)["params"]
        }
        encoder_segments = jnp.array([[1, 1, 2, 2, 0], [1, 1, 1, 0, 0]])
        decoder_segments = jnp.array([[1, 2, 2, 2], [1, 1, 0, 0]])
        for extra in ((), (encoder_segments, decoder_segments)):
            expected = theirs.apply(variables, *batch(), *extra, enable_dropout=False)
            actual = ours.apply(variables, *batch(), *extra, enable_dropout=False)
            # T5X masks padding queries as well; nothing real sees them.
            is_real = batch()[2] > 0
            np.testing.assert_allclose(actual[is_real], expected[is_real], rtol=1e-5, atol=1e-5)


def test_initial_scales():
    config = t5.T5Config(
        vocab_size=300,
        emb_dim=256,
        num_heads=8,
        head_dim=16,
        mlp_dim=512,
        num_encoder_layers=1,
        num_decoder_layers=1,
        scan_layers=True,  # 3-D kernels are drawn as matrices too
    )
    module = t5.Transformer(config)
    init = jax.jit(lambda rng: module.init(rng, *batch(), enable_dropout=False)["params"])
    flat = traverse_util.flatten_dict(init(jax.random.key(0)), sep="/")
    expected = {
        "token_embedder/embedding": 1.0,
        "query/kernel": (256 * 16) ** -0.5,
        "(key|value|wi_0|wi_1|logits_dense)/kernel": 256**-0.5,
        "out/kernel": 128**-0.5,
        "wo/kernel": 512**-0.5,
        "rel_embedding": (2 / (8 + 32)) ** 0.5,
        "scale": 0.0,
    }
    for path, leaf in flat.items():
        (std,) = [std for pattern, std in expected.items() if re.search(f"{pattern}$", path)]
        # A few hundred (relative positions) to tens of thousands of draws.
        tolerance = 0.15 if "rel_embedding" in path else 0.03
        np.testing.assert_allclose(jnp.std(leaf), std, rtol=tolerance, err_msg=path)
