"""MoLoRA in rank space against the paper's listing: time and temporary memory.

Both compute the same adapter (router, A, B; E experts of rank 4) on the inputs of one feed-forward
projection, its value and the gradients of inputs and parameters. Time is measured here; memory is
what XLA plans for this CPU and, where libtpu is installed, for one TPU v5e, without having one.

    python benchmarks/molora.py [--rounds 7] [--tokens 1024] [--output molora.json] [--no_tpu]
"""

import argparse
import os
import subprocess
import sys

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax
import jax.numpy as jnp
import measure
import numpy as np

from moe_peft import adapters

# T5 1.1 wi_0 (inputs, outputs) and the experts of the paper's table at that size.
WIDTHS = {"T5-large": (1024, 2816, 10), "T5-XL": (2048, 5120, 15)}
RANK = 4
TPU_TOKENS = 8 * 1024


def make_call(form):
    """Value and gradients of a MoLoRA adapter whose update is computed by `form`."""

    def update(x, router, lora_a, lora_b, cotangent):
        logits = (x @ router.astype(x.dtype)).astype(jnp.float32)
        delta = form(
            x, lora_a.astype(x.dtype), lora_b.astype(x.dtype), 16 / RANK, jax.nn.softmax(logits)
        )
        # Not a sum: its cotangent would be constant, and half of the backward pass would fold away.
        return jnp.vdot(delta.astype(jnp.float32), cotangent.astype(jnp.float32))

    return jax.value_and_grad(update, argnums=(0, 1, 2, 3))


FORMS = {
    "listing": make_call(adapters.molora_listing),
    "rank space": make_call(adapters.low_rank_delta),
}


def shapes(size: str, tokens: int, dtype) -> tuple[jax.ShapeDtypeStruct, ...]:
    """x, router, A, B and a cotangent."""
    width, outputs, experts = WIDTHS[size]
    struct = jax.ShapeDtypeStruct
    batch = 8
    return (
        struct((batch, tokens // batch, width), dtype),
        struct((width, experts), jnp.float32),
        struct((width, experts, RANK), jnp.float32),
        struct((experts, RANK, outputs), jnp.float32),
        struct((batch, tokens // batch, outputs), dtype),
    )


def measure_here(size: str, tokens: int, rounds: int) -> dict[str, object]:
    """Seconds and planned temporary bytes on this machine, float32."""
    rng = np.random.default_rng(0)
    arguments = [
        jnp.asarray(rng.normal(size=s.shape) * 0.02, s.dtype)
        for s in shapes(size, tokens, jnp.float32)
    ]
    compiled = {name: jax.jit(form).lower(*arguments).compile() for name, form in FORMS.items()}
    values = [jax.tree.leaves(call(*arguments)) for call in compiled.values()]
    gap = max(
        float(jnp.max(jnp.abs(a - b)) / (jnp.max(jnp.abs(a)) + 1e-30)) for a, b in zip(*values)
    )
    timings = measure.paired(
        {name: (lambda call=call: call(*arguments)) for name, call in compiled.items()},
        reference="rank space",
        rounds=rounds,
    )
    return {
        "tokens": tokens,
        "relative_gap": gap,
        "seconds": {name: timing.seconds for name, timing in timings.items()},
        "listing_over_rank_space": timings["listing"].ratio,
        "temporary_bytes": {
            name: call.memory_analysis().temp_size_in_bytes for name, call in compiled.items()
        },
    }


def plan_tpu(size: str) -> dict[str, int]:
    """Temporary bytes that XLA plans for one TPU v5e core, bfloat16 activations."""
    from jax.experimental import topologies

    topology = topologies.get_topology_desc(platform="tpu", topology_name="v5e:2x2")
    sharding = jax.sharding.SingleDeviceSharding(topology.devices[0])
    arguments = [
        jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=sharding)
        for s in shapes(size, TPU_TOKENS, jnp.bfloat16)
    ]
    return {
        name: jax.jit(form).lower(*arguments).compile().memory_analysis().temp_size_in_bytes
        for name, form in FORMS.items()
    }


def tpu_in_subprocess(size: str) -> dict[str, int] | str:
    """`plan_tpu` in a process of its own: libtpu reads its environment when it is loaded."""
    environment = {
        **os.environ,
        "TPU_SKIP_MDS_QUERY": "1",
        "TPU_WORKER_HOSTNAMES": "localhost",
        "TPU_ACCELERATOR_TYPE": "v5litepod-4",
        "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",  # nothing is run on a TPU, so nothing needs its lock
    }
    command = [sys.executable, __file__, "--plan_tpu", size]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        return "not planned: " + done.stderr.strip().splitlines()[-1]
    listing, fast = (int(part) for part in done.stdout.split()[-2:])
    return {"listing": listing, "rank space": fast}


def megabytes(planned: dict[str, int]) -> str:
    """Temporary memory of the two forms."""
    return f"{planned['listing'] / 1e6:.1f} / {planned['rank space'] / 1e6:.1f}"


def main() -> None:
    """Measures, prints, saves."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--tokens", type=int, default=1024, help="tokens of the measured batch")
    parser.add_argument("--output", help="JSON file for the figures")
    parser.add_argument("--no_tpu", action="store_true")
    parser.add_argument("--plan_tpu", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.plan_tpu:
        planned = plan_tpu(options.plan_tpu)
        print(planned["listing"], planned["rank space"])
        return
    record, rows = {}, []
    for size, (_, _, experts) in WIDTHS.items():
        found = measure_here(size, options.tokens, options.rounds)
        found["tpu_temporary_bytes"] = "not asked" if options.no_tpu else tpu_in_subprocess(size)
        record[size] = found
        low, median, high = found["listing_over_rank_space"]
        if isinstance(found["tpu_temporary_bytes"], str):
            print(f"{size}, TPU memory {found['tpu_temporary_bytes']}")
        memory, tpu = found["temporary_bytes"], found["tpu_temporary_bytes"]
        rows.append(
            [
                f"{size}, E={experts}",
                f"{found['seconds']['listing'][1] * 1e3:.0f}",
                f"{found['seconds']['rank space'][1] * 1e3:.0f}",
                f"{median:.1f} ({low:.1f}-{high:.1f})",
                megabytes(memory),
                "-" if isinstance(tpu, str) else megabytes(tpu),
                f"{found['relative_gap']:.0e}",
            ]
        )
    measure.show(
        f"MoLoRA, value and gradient, {options.tokens} tokens ({measure.hardware()})",
        ["layer", "listing, ms", "fast, ms", "faster", "MB, CPU", "MB, v5e", "gap"],
        rows,
    )
    measure.save(options.output, {"benchmark": "molora", "sizes": record})


if __name__ == "__main__":
    main()
