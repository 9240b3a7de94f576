"""The toy model for all tests of training."""

import importlib.util
import pathlib
import sys

import jax
from jax.experimental.compilation_cache import compilation_cache
import pytest


def _load():
    path = pathlib.Path(__file__).parent / "toy.py"
    spec = importlib.util.spec_from_file_location("training_toy", path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="session")
def toy():
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
