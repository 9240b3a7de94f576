"""Train step of the built-in trainer against T5X's, of the same method, weights, batch, optimiser.

T5X (google-research/t5x, on PYTHONPATH) runs `examples/t5` unchanged, with the method's adapters
patched in (moe_peft/t5x), through its own Trainer and partitioner. Adafactor, no dropout. T5X keeps
frozen weights in float32; the built-in trainer in what --frozen_dtype says. Both work in memory
that stays from step to step (`moe_peft.runtime.host_memory`), which T5X's own commands would not.

    PYTHONPATH=... python benchmarks/against_t5x.py [--methods mov lora] [--rounds 7] [--output F]
"""

import argparse
import importlib.util
import os
import sys

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import candidates
import flax.core
import jax
import jax.numpy as jnp
import measure
import step as step_benchmark

from moe_peft import methods, patching
from moe_peft.models import encoder_decoder, t5
from moe_peft.training import optimizers
from moe_peft.training import step as step_lib
from moe_peft.weights import leaves

RATE = 3e-4


def t5x_call(method: methods.Method, params, batch, dtype: str) -> candidates.Call:
    """One step of T5X's own trainer.

    Args:
      method: what is adapted and trains.
      params: of the backbone; copied.
      batch: on the device.
      dtype: of activations.
    """
    import seqio
    from t5x import adafactor, models, partitioning, trainer, utils
    from t5x.examples.t5 import network

    from moe_peft.t5x import adapted, axes

    config = network.T5Config(
        **step_benchmark.SMALL,
        mlp_activations=("gelu", "linear"),
        dropout_rate=0.0,
        dtype=dtype,
    )
    optimizer = adafactor.Adafactor(
        decay_rate=0.8, logical_factor_rules=adafactor.standard_logical_factor_rules()
    )
    vocabulary = seqio.ByteVocabulary()
    model = adapted.model(
        models.EncoderDecoderModel(
            network.Transformer(config),
            vocabulary,
            vocabulary,
            optimizer,
            loss_normalizing_factor="NUM_REAL_TARGET_TOKENS",
        ),
        method,
    )
    partitioner = partitioning.PjitPartitioner(
        num_partitions=1, logical_axis_rules=axes.rules(method)
    )
    initializer = utils.TrainStateInitializer(
        model.optimizer_def,
        model.get_initial_variables,
        jax.tree.map(jnp.shape, batch),
        partitioner,
        {name: leaf.dtype for name, leaf in batch.items()},
    )
    state = initializer.from_scratch(jax.random.key(0))
    flat = patching.flatten(state.params) | jax.tree.map(jnp.copy, patching.flatten(params))
    state = state.replace_params(flax.core.freeze(patching.trees.unflatten(flat)))
    run_by = trainer.Trainer(
        model=model,
        train_state=state,
        partitioner=partitioner,
        eval_names=(),
        summary_dir=None,
        train_state_axes=initializer.train_state_axes,
        rng=jax.random.key(0),
        learning_rate_fn=lambda step: jnp.asarray(RATE),
        num_microbatches=None,
    )
    run_by.compile_train(batch)
    step, holder = run_by._compiled_train_step, {"state": state}
    num_bytes = step_lib.num_bytes(state)
    trains = [leaf for path, leaf in flat.items() if method.is_trainable(path)]

    def run():
        holder["state"], metrics = step(holder["state"], batch)
        return holder["state"].params, metrics

    return candidates.Call(run, sum(leaf.size for leaf in trains), step, num_bytes)


def main() -> None:
    """Measures, prints, saves."""
    if importlib.util.find_spec("t5x") is None:
        sys.exit("T5X is not installed: put it on PYTHONPATH, as docs/t5x.md says.")
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    names = [name for name in step_benchmark.METHODS if name != "full"]
    parser.add_argument(
        "--methods", nargs="+", default=["ia3", "lora", "mov", "mhr"], choices=names
    )
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--inputs", type=int, default=128, help="tokens")
    parser.add_argument("--targets", type=int, default=32, help="tokens")
    parser.add_argument("--frozen_dtype", default="bfloat16", choices=("bfloat16", "float32"))
    parser.add_argument("--dtype", default="float32", choices=("bfloat16", "float32"))
    parser.add_argument("--output", help="JSON file for the figures")
    options = parser.parse_args()

    module = t5.Transformer(t5.T5Config(**step_benchmark.SMALL, dtype=options.dtype))
    batch = candidates.make_batch(options.batch, options.inputs, options.targets, num_tasks=100)
    batch = jax.tree.map(jnp.asarray, batch)
    shapes = jax.tree.map(jnp.shape, batch)
    backbone = encoder_decoder.EncoderDecoder(module).init(jax.random.key(0), shapes)
    frozen = leaves.cast_tree(backbone, options.frozen_dtype)
    rows, figures = [], {}
    for name in options.methods:
        method = methods.get(name)(**step_benchmark.METHODS[name])
        ours = candidates.method_call(method, module, frozen, batch, optimizers.adafactor(RATE))
        theirs = t5x_call(method, backbone, batch, options.dtype)
        if ours.num_trainable != theirs.num_trainable:
            sys.exit(f"{name}: {ours.num_trainable} and {theirs.num_trainable} parameters train.")
        timings = measure.paired({"ours": ours.run, "T5X": theirs.run}, "ours", options.rounds)
        times = timings["T5X"].ratio
        memory = ours.num_bytes / theirs.num_bytes
        figures[name] = {
            "seconds": {who: timing.seconds for who, timing in timings.items()},
            "times_faster": times,
            "bytes": {"ours": ours.num_bytes, "T5X": theirs.num_bytes},
        }
        rows.append(
            [
                name,
                f"{ours.num_trainable:,}",
                *(f"{timings[who].seconds[1] * 1e3:.0f}" for who in ("ours", "T5X")),
                f"{times[1]:.2f} ({times[0]:.2f}-{times[2]:.2f})",
                *(f"{each.num_bytes / 1e6:.0f}" for each in (ours, theirs)),
                f"{memory:.2f}",
            ]
        )
    size = f"{options.batch} x {options.inputs}/{options.targets}"
    measure.show(
        f"T5 1.1 small, {size} tokens, {options.dtype} activations, Adafactor, frozen weights "
        f"{options.frozen_dtype} here, float32 in T5X ({measure.hardware()})",
        ["step", "trainable", "ms", "T5X ms", "times faster", "MB", "T5X MB", "of T5X's"],
        rows,
    )
    measure.save(
        options.output,
        {
            "benchmark": "against_t5x",
            "batch": size,
            "dtype": options.dtype,
            "frozen_dtype": options.frozen_dtype,
            "steps": figures,
        },
    )


if __name__ == "__main__":
    main()
