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

_FIRST_STEPS = 8


def run_programs_inline() -> None:
    """Lets the calling thread run programs on a CPU; has to come before jax looks for devices.

    Otherwise jax's own threads run them, and glibc cannot keep their memory: the arena of a thread
    holds 64 MB. Work overlaps as before, because batches come from a thread (`runtime.prefetch`).
    Accelerators are not affected.
    """
    jax.config.update("jax_cpu_enable_async_dispatch", False)


def keep() -> bool:
    """Stops glibc, on Linux, from returning memory if jax computes on a CPU; says whether.

    Call it after loading the weights, so that the memory of loading is still returned.
    """
    if jax.default_backend() != "cpu" or not sys.platform.startswith("linux"):
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)  # musl has none.
    return mallopt is not None and bool(mallopt(_MMAP_MAX, 0) and mallopt(_TRIM_THRESHOLD, -1))


class Kept:
    """Keeps the memory of a loop's steps, and returns what they do not use.

    The first steps each find another block, until one fits for good: glibc asks for a little more
    than it needs to align one, and what it cuts off goes to others. So memory is returned after
    every one of these, and later after as many steps again: never two blocks for long.
    """

    def __init__(self):
        self._is_on = keep()
        self._num_steps = 0

    def after_step(self) -> None:
        """To be called when a step's program has ended."""
        self._num_steps += 1
        is_power_of_2 = self._num_steps & (self._num_steps - 1) == 0
        if self._is_on and (self._num_steps <= _FIRST_STEPS or is_power_of_2):
            ctypes.CDLL(None).malloc_trim(0)
