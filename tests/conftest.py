"""Settings of the whole test session: eight CPU devices, strict shapes, slow tests on request."""

import os

# Before jax is imported anywhere.
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
if "xla_force_host_platform_device_count" not in os.environ.get("XLA_FLAGS", ""):
    # XLA ends the process when one of the devices' threads is a minute late at a collective
    # operation, as happens on a busy machine.
    os.environ["XLA_FLAGS"] = (
        os.environ.get("XLA_FLAGS", "")
        + " --xla_force_host_platform_device_count=8"
        + " --xla_cpu_collective_call_terminate_timeout_seconds=600"
    )

import jaxtyping

# Shapes in annotations are checked while the tests run.
jaxtyping.install_import_hook(
    ["moe_peft.adapters", "moe_peft.routing", "moe_peft.models"], "beartype.beartype"
)

import jax
import pytest

from moe_peft.runtime import host_memory

jax.config.update("jax_numpy_rank_promotion", "raise")


@pytest.fixture(autouse=True, scope="session")
def memory_goes_back():
    """A test process runs hundreds of programs: it would hold the most of each."""
    host_memory.keep = lambda: False


def pytest_addoption(parser):
    parser.addoption("--slow", action="store_true", help="run the slow tests too")


def pytest_collection_modifyitems(config, items):
    if config.getoption("--slow"):
        return
    skip = pytest.mark.skip(reason="slow; run with --slow")
    for item in items:
        if "slow" in item.keywords:
            item.add_marker(skip)
