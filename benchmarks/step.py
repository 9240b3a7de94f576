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

import candidates
import jax
import jax.numpy as jnp
import measure
import peft_step

from moe_peft import methods
from moe_peft.models import encoder_decoder, t5
from moe_peft.training import optimizers

SMALL = {
    "vocab_size": 32128,
    "emb_dim": 512,
    "num_heads": 6,
    "head_dim": 64,
    "mlp_dim": 1024,
    "num_encoder_layers": 8,
    "num_decoder_layers": 8,
}
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
    batch = candidates.make_batch(
        options.batch, options.inputs, options.targets, peft_step.NUM_TASKS
    )
    device_batch = jax.tree.map(jnp.asarray, batch)
    shapes = jax.tree.map(jnp.shape, batch)
    backbone = encoder_decoder.EncoderDecoder(module).init(jax.random.key(0), shapes)

    adamw = optimizers.adamw(learning_rate=1e-3)
    found = {candidates.FROZEN: candidates.frozen_call(module, backbone, device_batch)}
    for name in options.methods:
        own = jax.tree.map(jnp.copy, backbone) if name == "full" else backbone
        method = methods.get(name)(**METHODS[name])
        found[name] = candidates.method_call(method, module, own, device_batch, adamw)
    calls = {name: call.run for name, call in found.items()}
    reason = "not asked" if options.no_torch else peft_step.available()
    if reason:
        print(reason)
    else:
        sizes = {**SMALL, "num_layers": SMALL["num_encoder_layers"]}
        for name in PEFT_METHODS:
            if name in options.methods:
                calls[f"{name}, PEFT"] = peft_step.make_step(name, sizes, batch)

    timings = measure.paired(calls, candidates.FROZEN, options.rounds)
    rows = []
    for name, timing in timings.items():
        low, median, high = timing.ratio
        other = timings.get(f"{name}, PEFT")
        rows.append(
            [
                name,
                f"{found[name].num_trainable:,}" if name in options.methods else "",
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
