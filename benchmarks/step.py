"""Train step of every method over the frozen network's own forward and backward pass.

T5 1.1 small, random weights, float32, AdamW, no dropout, one run for all candidates. The reference
is the network without adapters: its loss and the gradient of what the embedding gives out, that is
a whole backward pass without any weight's gradient. Where torch is installed, transformers with
PEFT's adapters runs the same step in the same rounds.

    python benchmarks/step.py [--methods lora mov] [--rounds 9] [--no_torch] [--output step.json]
"""

import argparse
import os

os.environ.setdefault("JAX_PLATFORMS", "cpu")

from flax import linen as nn
import jax
import jax.numpy as jnp
import measure
import numpy as np
import peft_step

from moe_peft import methods, patching
from moe_peft.models import encoder_decoder, t5
from moe_peft.training import optimizers
from moe_peft.training import state as state_lib
from moe_peft.training import step as step_lib

SMALL = {
    "vocab_size": 32128,
    "emb_dim": 512,
    "num_heads": 6,
    "head_dim": 64,
    "mlp_dim": 1024,
    "num_encoder_layers": 8,
    "num_decoder_layers": 8,
}
REFERENCE = "frozen, forward and backward"
# Arguments of each method's constructor, where defaults are not meant.
METHODS = {
    "ia3": {},
    "lora": {},
    "lora_big": {},
    "mov": {},
    "molora": {},
    "poly": {"num_tasks": peft_step.NUM_TASKS},
    "mhr": {"num_tasks": peft_step.NUM_TASKS, "num_splits": peft_step.NUM_SPLITS},
    "full": {},
}
# PEFT's methods and ours with the same adapted matrices.
PEFT_METHODS = ("ia3", "lora", "poly", "mhr", "full")


def make_batch(batch: int, inputs: int, targets: int) -> dict[str, np.ndarray]:
    """Random tokens without padding."""
    rng = np.random.default_rng(0)
    tokens = lambda length: rng.integers(2, 32000, (batch, length)).astype(np.int32)
    target = tokens(targets)
    return {
        "encoder_input_tokens": tokens(inputs),
        "decoder_target_tokens": target,
        "decoder_input_tokens": np.pad(target[:, :-1], ((0, 0), (1, 0))),
        "decoder_loss_weights": np.ones_like(target, np.float32),
        "task_ids": np.arange(batch, dtype=np.int32) % peft_step.NUM_TASKS,
    }


def frozen_call(module: nn.Module, params, batch):
    """Loss of the bare network and the gradient with respect to all embedded tokens."""

    def loss(offset, params, batch):
        def add_offset(next_fun, args, kwargs, context):
            outputs = next_fun(*args, **kwargs)
            if context.module.name == "token_embedder" and context.method_name == "__call__":
                outputs = outputs + offset
            return outputs

        with nn.intercept_methods(add_offset):
            return encoder_decoder.EncoderDecoder(module).loss(params, batch)[0]

    step = jax.jit(jax.value_and_grad(loss))
    offset = jnp.zeros((1, 1, module.config.emb_dim))
    return lambda: step(offset, params, batch)


def method_call(name: str, module: nn.Module, backbone, batch):
    """One AdamW step of a method through the project's own train step."""
    method = methods.get(name)(**METHODS[name])
    network = encoder_decoder.EncoderDecoder(
        method.patch(module), encoder_decoder.LossConfig(), method
    )
    fresh = network.init(jax.random.key(0), jax.tree.map(jnp.shape, batch))
    frozen, trainable = method.split(fresh)
    if name == "full":
        trainable = jax.tree.map(jnp.copy, backbone)
    else:
        frozen = backbone
    optimizer = optimizers.adamw(learning_rate=1e-3).build(trainable, method.learning_rate_group)
    step = step_lib.make_train_step(network, optimizer, patching.merge, use_dropout=False)
    holder = {"state": state_lib.create(trainable, optimizer, seed=0)}

    def call():
        holder["state"], metrics = step(holder["state"], frozen, batch)
        return holder["state"], metrics

    count = sum(leaf.size for leaf in jax.tree.leaves(trainable))
    return call, count


def main() -> None:
    """Measures, prints, saves."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=METHODS)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--inputs", type=int, default=128, help="tokens")
    parser.add_argument("--targets", type=int, default=32, help="tokens")
    parser.add_argument("--no_torch", action="store_true")
    parser.add_argument("--output", help="JSON file for the figures")
    options = parser.parse_args()

    module = t5.Transformer(t5.T5Config(**SMALL))
    batch = make_batch(options.batch, options.inputs, options.targets)
    device_batch = jax.tree.map(jnp.asarray, batch)
    shapes = jax.tree.map(jnp.shape, batch)
    backbone = encoder_decoder.EncoderDecoder(module).init(jax.random.key(0), shapes)

    calls = {REFERENCE: frozen_call(module, backbone, device_batch)}
    counts = {}
    for name in options.methods:
        calls[name], counts[name] = method_call(name, module, backbone, device_batch)
    reason = "not asked" if options.no_torch else peft_step.available()
    if reason:
        print(reason)
    else:
        sizes = {**SMALL, "num_layers": SMALL["num_encoder_layers"]}
        for name in PEFT_METHODS:
            if name in options.methods:
                calls[f"{name}, PEFT"] = peft_step.make_step(name, sizes, batch)

    timings = measure.paired(calls, REFERENCE, options.rounds)
    rows = []
    for name, timing in timings.items():
        low, median, high = timing.ratio
        other = timings.get(f"{name}, PEFT")
        rows.append(
            [
                name,
                f"{counts[name]:,}" if name in counts else "",
                f"{timing.seconds[1] * 1e3:.0f}",
                f"{median:.2f} ({low:.2f}-{high:.2f})",
                f"{other.seconds[1] / timing.seconds[1]:.2f}" if other else "",
            ]
        )
    size = f"{options.batch} x {options.inputs}/{options.targets}"
    measure.show(
        f"T5 1.1 small, {size} tokens, AdamW ({measure.hardware()})",
        ["step", "trainable", "ms", "over frozen (quartiles)", "times faster than PEFT"],
        rows,
    )
    figures = {
        name: {"seconds": timing.seconds, "over_frozen": timing.ratio}
        for name, timing in timings.items()
    }
    measure.save(options.output, {"benchmark": "step", "batch": size, "steps": figures})


if __name__ == "__main__":
    main()
