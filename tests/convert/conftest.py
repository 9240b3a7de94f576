"""Tiny networks with trained adapters."""

import importlib.util
import pathlib

import pytest


@pytest.fixture(scope="session")
def toy():
    """The module of tiny networks with trained adapters."""
    path = pathlib.Path(__file__).with_name("toy_adapters.py")
    spec = importlib.util.spec_from_file_location("toy_adapters", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
