"""What people see of a compiled program: tables, one line, and what would help."""

from collections.abc import Sequence

import rich.box
import rich.console
import rich.table

from moe_peft.preflight import compiled, hardware


def summary(flight: compiled.Flight) -> str:
    """One line: memory and the bound on the time of a step."""
    peak, capacity = flight.needed / 1e9, flight.capacity / 1e9
    if flight.fits:
        bound = f"at least {flight.seconds * 1e3:.0f} ms a step"
        return f"{peak:.2f} of {capacity:.1f} GB a chip, {bound}"
    if not flight.needed:
        return f"refused by the compiler: {flight.refused}"
    return f"does not fit: {peak:.2f} GB a chip, {peak - capacity:.2f} more than there are"


def advice(flight: compiled.Flight, program: str = "train") -> str:
    """What would help a program that does not fit."""
    setting, tried = flight.setting, []
    if program != "train":
        tried.append("--gin.EVAL_BATCH_SIZE with fewer rows")
    else:
        if setting.remat_policy != "full":
            tried.append("--remat full")
        tried.append(f"--microbatches {2 * setting.num_microbatches}")
    if flight.memory is not None and flight.memory.arguments > 0.5 * flight.capacity:
        tried.insert(0, "a mesh with more fsdp or model, which splits the weights")
    return f"Try {', or '.join(tried)}; --search tries them all."


def show(
    flight: compiled.Flight, program: str, price: float | None, target: hardware.Target
) -> None:
    """Prints a flight as a table."""
    console = rich.console.Console()
    if not console.is_terminal:
        console = rich.console.Console(width=120)
    table = rich.table.Table(box=rich.box.SIMPLE_HEAD)
    table.add_column("a chip and step" if program == "train" else "a chip and batch")
    table.add_column("", justify="right")
    if flight.memory is not None:
        for name in ("arguments", "temporaries", "peak"):
            table.add_row(f"memory, {name}", f"{getattr(flight.memory, name) / 1e9:.2f} GB")
        table.add_row("memory there is", f"{flight.capacity / 1e9:.2f} GB")
    table.add_row("operations", f"{flight.operations / 1e12:.2f} TFLOP")
    if flight.bytes_accessed:  # GPU compilers do not say.
        table.add_row("bytes accessed, loops once", f"{flight.bytes_accessed / 1e9:.2f} GB")
    for kind, each in flight.collectives.items():
        table.add_row(f"{kind}, {each.count} times", f"{each.num_bytes / 1e6:.1f} MB")
    for name, seconds in flight.bounds.items():
        table.add_row(f"time, {name} at least", f"{seconds * 1e3:.1f} ms")
    if price is not None:
        cost = price * target.count * flight.seconds / 3600 * 1000
        table.add_row(f"1,000 steps at {price:g} a chip and hour", f"at least {cost:.2f}")
    table.add_row("compiled in", f"{flight.compile_seconds:.0f} s")
    print(f"{program} on {target.count} x {target.chip.name}, {flight.setting}")
    console.print(table)
    print(summary(flight))
    if not flight.fits:
        print(advice(flight, program))


def show_ranked(flights: Sequence[compiled.Flight]) -> None:
    """Prints what a search found, the best first."""
    console = rich.console.Console()
    if not console.is_terminal:
        console = rich.console.Console(width=120)
    table = rich.table.Table(box=rich.box.SIMPLE_HEAD)
    for column in ("mesh, micro-batches, remat", "peak GB", "of", "ms at least", "bound by"):
        table.add_column(column, justify="left" if "mesh" in column else "right")
    for flight in flights:
        peak = f"{flight.needed / 1e9:.2f}" if flight.needed else "refused"
        bound = max(flight.bounds, key=flight.bounds.get)
        table.add_row(
            str(flight.setting),
            peak if flight.fits else f"[red]{peak}[/red]",
            f"{flight.capacity / 1e9:.1f}",
            f"{flight.seconds * 1e3:.0f}",
            bound,
        )
    console.print(table)
