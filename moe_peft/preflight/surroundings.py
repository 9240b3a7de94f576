"""What has to be set before jax is imported."""

from collections.abc import MutableMapping


def without_devices(environ: MutableMapping[str, str]) -> None:
    """Keeps jax on the CPU, and tells libtpu what it would otherwise ask a TPU's machine for."""
    environ.setdefault("JAX_PLATFORMS", "cpu")
    environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")  # It compiles, beside whoever trains.
    environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
    environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")
    environ.setdefault("TPU_ACCELERATOR_TYPE", "v5litepod-16")
