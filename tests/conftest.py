"""Settings of the test session: little effort for compiling, strict shapes, slow tests on request.

Eight virtual CPU devices are there for the tests of meshes. Everything else runs on the first one.
"""

import gc
import importlib.metadata
import importlib.util
import os
import pathlib
import shutil
import sys
import tempfile

# Before jax is imported anywhere.
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
_GIVEN_FLAGS = os.environ.get("XLA_FLAGS", "")
# Toy programs run for milliseconds and compile for seconds; cut in parts, they compile for longer.
_FLAGS = (
    f"{_GIVEN_FLAGS} --xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"
    " --xla_cpu_parallel_codegen_split_count=1"
)
if importlib.metadata.version("jaxlib").startswith("0.10."):  # a later XLA ends at its name
    _FLAGS += " --xla_cpu_use_fusion_emitters=false"
# Tracing makes millions of objects that live on: looking through them so often takes a tenth of it.
gc.set_threshold(20_000, 20, 20)
if "MOE_PEFT_TEST_CACHE" not in os.environ:  # the first process of the session; workers inherit it
    os.environ["MOE_PEFT_TEST_CACHE"] = tempfile.mkdtemp(prefix="moe_peft_compiled_")
    _IS_OWNER = True
else:
    _IS_OWNER = False
# What one test, worker or started process compiled, the others read.
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", os.environ["MOE_PEFT_TEST_CACHE"])
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.2")
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES", "-1")
if "xla_force_host_platform_device_count" not in _GIVEN_FLAGS:
    # XLA ends the process when one of the devices' threads is a minute late at a collective
    # operation, as happens on a busy machine.
    os.environ["XLA_FLAGS"] = (
        f"{_FLAGS} --xla_force_host_platform_device_count=8"
        " --xla_cpu_collective_call_terminate_timeout_seconds=600"
    )

# Scripts that make golden files write files for tests too.
sys.path.append(str(pathlib.Path(__file__).parent / "golden"))

import jaxtyping

# Shapes in annotations are checked while the tests run: those of whole networks, which have most
# calls, with the slow tests only. Workers inherit what the first process was asked.
if "--slow" in sys.argv:
    os.environ["MOE_PEFT_CHECK_NETWORKS"] = "1"
_CHECKED = ["moe_peft.adapters", "moe_peft.routing"]
_CHECKED += ["moe_peft.models"] if "MOE_PEFT_CHECK_NETWORKS" in os.environ else []
jaxtyping.install_import_hook(_CHECKED, "beartype.beartype")

import jax
from jax.experimental.compilation_cache import compilation_cache
import pytest

from moe_peft.partitioning import mesh as mesh_lib
from moe_peft.runtime import host_memory

jax.config.update("jax_numpy_rank_promotion", "raise")
jax.devices()  # reads XLA_FLAGS; processes that tests start get one device
os.environ["XLA_FLAGS"] = _FLAGS


@pytest.fixture(autouse=True, scope="session")
def memory_goes_back():
    """A test process runs hundreds of programs: it would hold the most of each."""
    host_memory.keep = lambda: False


@pytest.fixture(autouse=True)
def one_device(request, monkeypatch):
    """Meshes that nobody specified have one device, unless a test is marked `eight_devices`.

    What a command adds to the search path of modules goes with the test: the working directory.
    """
    monkeypatch.setattr(sys, "path", [*sys.path])
    if "eight_devices" not in request.keywords:
        monkeypatch.setattr(mesh_lib, "all_devices", lambda: jax.devices()[:1])


def pytest_unconfigure(config):
    if _IS_OWNER:
        shutil.rmtree(os.environ["MOE_PEFT_TEST_CACHE"], ignore_errors=True)


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
def compiled_once():
    """Keeps small programs on disk too: dozens of runs of the toy compile the same three."""
    settings = {
        "jax_compilation_cache_dir": str(pathlib.Path(os.environ["MOE_PEFT_TEST_CACHE"], "toy")),
        "jax_persistent_cache_min_compile_time_secs": 0,
        "jax_persistent_cache_min_entry_size_bytes": -1,
    }
    before = {name: getattr(jax.config, name) for name in settings}
    _configure(settings)
    yield
    _configure(before)
