"""Train step and peak memory of a large T5 on one accelerator, method by method.

T5 1.1 with random weights, frozen ones in bfloat16, bfloat16 activations, scanned layers that are
rematerialised, Adafactor, no dropout. Full fine-tuning keeps float32 weights. Every candidate has a
process of its own, so that its peak of memory is its own. Steps are compared with the frozen
network's forward and backward pass; "less time" is the reduction over full fine-tuning that Zadouri
et al. 2023, table 6, report for 3B.

    python benchmarks/large_step.py [--size xl] [--batch 32] [--methods ia3 mov_10] [--output F]
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time

os.environ.setdefault("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.95")

import candidates
import jax
import jax.numpy as jnp
import measure

from moe_peft import methods
from moe_peft.models import encoder_decoder, t5
from moe_peft.partitioning import hlo_cost
from moe_peft.training import optimizers

# emb_dim, num_heads, head_dim, mlp_dim, layers of the encoder and of the decoder.
SIZES = {
    "small": (512, 6, 64, 1024, 8),
    "base": (768, 12, 64, 2048, 12),
    "large": (1024, 16, 64, 2816, 24),
    "xl": (2048, 32, 64, 5120, 24),
    "xxl": (4096, 64, 64, 10240, 24),
}
NUM_TASKS = 313  # of T0
FROZEN, FULL = "frozen", "full"
METHODS = {
    FULL: methods.full,
    "ia3": methods.ia3,
    "lora": methods.lora,
    "mov_10": lambda: methods.mov(num_experts=10),
    "mov_30": lambda: methods.mov(num_experts=30),
    "molora_10": lambda: methods.molora(num_experts=10),
    "mhr_64": lambda: methods.mhr(num_tasks=NUM_TASKS, num_splits=64),
}
PUBLISHED = {"ia3": 38, "mov_10": 31, "mov_30": 27}  # per cent less time than full fine-tuning


def config(options: argparse.Namespace) -> t5.T5Config:
    """The network."""
    emb_dim, num_heads, head_dim, mlp_dim, layers = SIZES[options.size]
    return t5.T5Config(
        vocab_size=32128,
        emb_dim=emb_dim,
        num_heads=num_heads,
        head_dim=head_dim,
        mlp_dim=mlp_dim,
        num_encoder_layers=layers,
        num_decoder_layers=layers,
        dropout_rate=0.0,
        dtype="bfloat16",
        scan_layers=True,
        remat_policy=options.remat,
    )


def measure_one(name: str, options: argparse.Namespace) -> dict[str, object]:
    """Figures of one candidate, in this process."""
    module = t5.Transformer(config(options))
    batch = candidates.make_batch(options.batch, options.inputs, options.targets, NUM_TASKS)
    batch = jax.tree.map(jnp.asarray, batch)
    dtype = jnp.float32 if name == FULL else jnp.bfloat16
    bare = encoder_decoder.EncoderDecoder(module)
    shapes = jax.tree.map(jnp.shape, batch)
    init = lambda key: jax.tree.map(lambda leaf: leaf.astype(dtype), bare.init(key, shapes))
    backbone = jax.block_until_ready(jax.jit(init)(jax.random.key(0)))
    before = peak_bytes()
    started = time.perf_counter()
    if name == FROZEN:
        call = candidates.frozen_call(module, backbone, batch)
    else:
        optimizer = optimizers.adafactor(3e-4)
        call = candidates.method_call(METHODS[name](), module, backbone, batch, optimizer)
    del backbone
    compile_seconds = time.perf_counter() - started
    seconds = []
    for _ in range(options.rounds + 2):
        started = time.perf_counter()
        jax.block_until_ready(call.run())
        seconds.append(time.perf_counter() - started)
    return {
        "trainable": call.num_trainable,
        "compile_seconds": compile_seconds,
        "seconds": seconds[2:],
        "peak_bytes": peak_bytes(),
        "peak_bytes_before": before,
        "planned_bytes": hlo_cost.memory(call.compiled).peak,
        "hardware": measure.hardware(),
    }


def peak_bytes() -> int | None:
    """Most bytes of the device that were in use so far; None where it does not say."""
    return (jax.devices()[0].memory_stats() or {}).get("peak_bytes_in_use")


def in_process(name: str) -> dict[str, object]:
    """`measure_one` in a fresh process with this one's arguments; {"error": ...} if it fails."""
    with tempfile.NamedTemporaryFile(suffix=".json") as file:
        command = [sys.executable, __file__, *sys.argv[1:], "--only", name, "--output", file.name]
        done = subprocess.run(command, stderr=subprocess.PIPE, text=True)
        if done.returncode:
            return {"error": done.stderr.strip().splitlines()[-1][:300]}
        return json.load(file)


def main() -> None:
    """Measures, prints, saves."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", choices=SIZES, default="xl")
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=METHODS)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--inputs", type=int, default=1024, help="tokens")
    parser.add_argument("--targets", type=int, default=256, help="tokens")
    parser.add_argument("--remat", choices=t5.REMAT_POLICIES, default="full")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--only", choices=(FROZEN, *METHODS), help=argparse.SUPPRESS)
    parser.add_argument("--output", help="JSON file for the figures")
    options = parser.parse_args()
    if options.only:
        with open(options.output, "w", encoding="utf-8") as file:
            json.dump(measure_one(options.only, options), file)
        return

    found = {}
    for name in (FROZEN, *options.methods):
        found[name] = in_process(name)
        print(f"{name}: {found[name].get('error', 'measured')}", flush=True)
    good = {name: one for name, one in found.items() if "error" not in one}
    median = {name: statistics.median(one["seconds"]) for name, one in good.items()}
    rows = []
    for name, one in good.items():
        spread = f"{min(one['seconds']) * 1e3:.0f}-{max(one['seconds']) * 1e3:.0f}"
        less = f"{100 * (1 - median[name] / median[FULL]):.0f} %" if FULL in good else ""
        rows.append(
            [
                name,
                f"{one['trainable']:,}",
                f"{median[name] * 1e3:.0f} ({spread})",
                f"{median[name] / median[FROZEN]:.2f}" if FROZEN in good else "",
                less,
                f"{PUBLISHED[name]} %" if name in PUBLISHED else "",
                f"{(one['peak_bytes'] or 0) / 1e9:.1f}",
                f"{one['planned_bytes'] / 1e9:.1f}",
                f"{one['compile_seconds']:.0f}",
            ]
        )
    shape = f"{options.batch} x {options.inputs}/{options.targets}"
    hardware = next(iter(good.values()))["hardware"] if good else "nothing ran"
    columns = ["", "trainable", "ms (range)", "over frozen", "less time", "published"]
    columns += ["peak GB", "compiled GB", "compile s"]
    title = f"T5 1.1 {options.size}, {shape} tokens, remat {options.remat} ({hardware})"
    measure.show(title, columns, rows)
    if options.output:
        record = {"benchmark": "large_step", "hardware": hardware, "size": options.size}
        record |= {"batch": shape, "remat": options.remat, "steps": found}
        with open(options.output, "w", encoding="utf-8") as file:
            json.dump(record, file, indent=2)
            file.write("\n")


if __name__ == "__main__":
    main()
