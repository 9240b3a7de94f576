"""Settings of the whole test session: eight CPU devices, strict shapes, slow tests on request."""

import importlib.util
import os
import pathlib
import sys

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
from jax.experimental.compilation_cache import compilation_cache
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


def _load():
    path = pathlib.Path(__file__).parent / "training_toy.py"
    spec = importlib.util.spec_from_file_location("training_toy", path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="session")
def toy():
    """The toy model for all tests of training."""
    return _load()


def _configure(settings):
    for name, value in settings.items():
        jax.config.update(name, value)
    compilation_cache.reset_cache()


@pytest.fixture(scope="module")
def compiled_once(tmp_path_factory):
    """Keeps compiled programs on disk: dozens of runs of the toy compile the same three."""
    settings = {
        "jax_compilation_cache_dir": str(tmp_path_factory.mktemp("compiled")),
        "jax_persistent_cache_min_compile_time_secs": 0,
        "jax_persistent_cache_min_entry_size_bytes": -1,
    }
    before = {name: getattr(jax.config, name) for name in settings}
    _configure(settings)
    yield
    _configure(before)
