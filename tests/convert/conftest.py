"""Tiny networks with trained adapters."""

import importlib.util
import pathlib

import pytest


def load(path):
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="session")
def toy():
    """The module of tiny networks with trained adapters."""
    return load(pathlib.Path(__file__).with_name("toy_adapters.py"))


@pytest.fixture(scope="session")
def writing():
    """The module that writes files of torch by hand."""
    return load(pathlib.Path(__file__).parents[1] / "weights" / "torch_writing.py")
