"""On a CPU, the memory that a step works in stays for the next step.

XLA takes the temporaries of a program from the C library at every call. glibc gives blocks of that
size back to the kernel as soon as they are free, and the next step waits until the kernel has
cleared fresh pages: nearly a gigabyte, and a third of the time, for a T5-small on two cores.
"""

import ctypes
import sys

import jax

# Parameters of glibc's mallopt (man 3 mallopt).
_TRIM_THRESHOLD, _MMAP_MAX = -1, -4


def run_programs_inline() -> None:
    """Lets the calling thread run programs on a CPU; has to come before jax looks for devices.

    Otherwise threads of jax's own do, and what those get of glibc cannot be kept: their arenas hold
    64 MB. Nothing overlaps less, as batches come from a thread (`training.prefetch`). Accelerators
    are started as ever.
    """
    jax.config.update("jax_cpu_enable_async_dispatch", False)


def keep() -> bool:
    """Stops glibc from returning memory, for good, if jax computes on a CPU; says whether.

    Called when the weights are loaded, so that what loading took still goes back. A process then
    holds the most that it ever needed at a time. Only glibc, on Linux, can be told so.
    """
    if jax.default_backend() != "cpu" or not sys.platform.startswith("linux"):
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)  # musl has none.
    return mallopt is not None and bool(mallopt(_MMAP_MAX, 0) and mallopt(_TRIM_THRESHOLD, -1))
