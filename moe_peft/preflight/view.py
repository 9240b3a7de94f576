"""What people see of a compiled program: tables, one line, and what would help."""

from collections.abc import Sequence

from moe_peft.preflight import compiled, hardware
from moe_peft.runtime import tables


def summary(made: compiled.CompiledProgram) -> str:
    """One line: memory and the bound on the time of a step."""
    peak, capacity = made.needed / 1e9, made.capacity / 1e9
    if made.fits:
        bound = f"at least {made.seconds * 1e3:.0f} ms a step"
        return f"{peak:.2f} of {capacity:.1f} GB a chip, {bound}"
    if not made.needed:
        return f"refused by the compiler: {made.refused}"
    return f"does not fit: {peak:.2f} GB a chip, {peak - capacity:.2f} more than there are"


def advice(made: compiled.CompiledProgram, program: str = "train") -> str:
    """What would help a program that does not fit."""
    tried = []
    if made.memory is not None and made.memory.arguments > 0.5 * made.capacity:
        tried.append("a mesh with more fsdp or model, which splits the weights")
    if program != "train":
        tried.append("--gin.EVAL_BATCH_SIZE with fewer rows")
    else:
        tried += ["--remat full"] if made.choice.remat_policy != "full" else []
        tried.append(f"--microbatches {2 * made.choice.num_microbatches}")
    return f"Try {', or '.join(tried)}; --search tries them all."


def show(
    made: compiled.CompiledProgram, program: str, price: float | None, target: hardware.Target
) -> None:
    """Prints a compiled program as a table."""
    first = "a chip and step" if program == "train" else "a chip and batch"
    table = tables.grid(first, "", left=(first,))
    if made.memory is not None:
        for name in ("arguments", "temporaries", "peak"):
            table.add_row(f"memory, {name}", f"{getattr(made.memory, name) / 1e9:.2f} GB")
        table.add_row("memory there is", f"{made.capacity / 1e9:.2f} GB")
    table.add_row("operations", f"{made.operations / 1e12:.2f} TFLOP")
    if made.bytes_accessed:  # GPU compilers do not say.
        table.add_row("bytes accessed, loops once", f"{made.bytes_accessed / 1e9:.2f} GB")
    for kind, each in made.collectives.items():
        table.add_row(f"{kind}, {each.count} times", f"{each.num_bytes / 1e6:.1f} MB")
    for name, seconds in made.bounds.items():
        table.add_row(f"time, {name} at least", f"{seconds * 1e3:.1f} ms")
    if price is not None:
        cost = price * target.count * made.seconds / 3600 * 1000
        table.add_row(f"1,000 steps at {price:g} a chip and hour", f"at least {cost:.2f}")
    table.add_row("compiled in", f"{made.compile_seconds:.0f} s")
    print(f"{program} on {target.count} x {target.chip.name}, {made.choice}")
    tables.wide_console(120).print(table)
    print(summary(made))
    if not made.fits:
        print(advice(made, program))


def show_ranked(tried: Sequence[compiled.CompiledProgram]) -> None:
    """Prints what a search found, the best first."""
    first = "mesh, micro-batches, remat"
    table = tables.grid(first, "peak GB", "of", "ms at least", "bound by", left=(first,))
    for made in tried:
        peak = f"{made.needed / 1e9:.2f}" if made.needed else "refused"
        peak = peak if made.fits else f"[red]{peak}[/red]"
        milliseconds, bound = f"{made.seconds * 1e3:.0f}", max(made.bounds, key=made.bounds.get)
        table.add_row(str(made.choice), peak, f"{made.capacity / 1e9:.1f}", milliseconds, bound)
    tables.wide_console(120).print(table)
