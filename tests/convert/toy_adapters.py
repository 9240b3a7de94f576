"""Tiny networks with trained adapters, as `saved_run.Saved`."""

import functools

import jax
import numpy as np

from moe_peft import methods, patching
from moe_peft.convert import adapter_trees
from moe_peft.models import encoder_decoder, t5
from moe_peft.weights import identity, merging, saved_run, t5_sizes

SIZES = {"vocab_size": 32, "emb_dim": 16, "num_heads": 2, "head_dim": 8, "mlp_dim": 24}
LAYOUTS = {
    "t5_1_1": {},
    "t5_1_0": {"mlp_activations": ("relu",), "logits_via_embedding": True},
    "scanned": {"scan_layers": True},
}
poly = functools.partial(methods.poly, 3, 2)
METHODS = {
    "lora": functools.partial(methods.lora, 2, 6.0, 0.1),
    "qv": functools.partial(methods.lora, 2, 3.0, placement=".*/(query|value)"),
    "ia3": methods.ia3,
    "poly": functools.partial(poly, rank=2),
    "mhr4": functools.partial(poly, num_splits=4, rank=2, alpha=16.0, placement="light"),
    "mhr8": functools.partial(poly, num_splits=8),
}


def network(layout, **sizes):
    sizes = {**SIZES, **sizes}
    return t5.Transformer(
        t5.T5Config(**sizes, num_encoder_layers=2, num_decoder_layers=1, **LAYOUTS[layout])
    )


def saved(method, tree, layout="t5_1_1", **description):
    """A tree as what a run of the method would have saved."""
    described = {
        "method": method.describe(),
        "model": identity.describe_model(network(layout)),
        "backbone": {"fingerprint": "of the toy", "frozen_dtype": "float32"},
        "backbone_spec": "random:0",
        **description,
    }
    return saved_run.Saved(7, tree, {}, {"description": identity.as_json(described)})


def trained(method, layout="t5_1_1", seed=0):
    """What a run of the method would have saved, far from fresh."""
    rng = np.random.default_rng(seed)

    def draw(path, shape):
        start, size = (1.0, 0.3) if path.endswith("vectors") else (0.0, 0.3)
        size = 2.0 if path.endswith("logits") else size
        return (start + size * rng.normal(size=shape)).astype(np.float32)

    shapes = adapter_trees.shapes_of(method, network(layout))
    tree = patching.trees.unflatten({path: draw(path, shape) for path, shape in shapes.items()})
    return saved(method, tree, layout)


def logits(method, module, base, trainable, batch):
    model = encoder_decoder.EncoderDecoder(method.patch(module), method=method)
    return np.asarray(jax.jit(model.logits)(patching.merge(base, trainable), batch))


def batch(task_ids=(2, 0)):
    made = merging.random_batch(SIZES["vocab_size"], seed=3)
    return {**made, "task_ids": np.array(task_ids, np.int32)}


def same(one, other):
    """Whether two trees have the same leaves, bit by bit."""
    one, other = patching.flatten(one), patching.flatten(other)
    assert len(one) > 1
    return one.keys() == other.keys() and all(
        one[path].dtype == other[path].dtype and one[path].tobytes() == other[path].tobytes()
        for path in one
    )


def base_params(network, seed=5):
    """Random weights of a network without adapters."""
    rng = np.random.default_rng(seed)
    draw = lambda shape: (0.3 * rng.normal(size=shape)).astype(np.float32)
    shapes = t5_sizes.shapes_of(network.config)
    return patching.trees.unflatten({path: draw(shape) for path, shape in shapes.items()})
