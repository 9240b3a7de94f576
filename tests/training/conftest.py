"""The toy model for all tests of training."""

import importlib.util
import pathlib
import sys

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
