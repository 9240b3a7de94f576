"""T5X, where it is installed."""

import importlib.util
import pathlib
import warnings

import jax
import pytest


@pytest.fixture(scope="session")
def guest():
    """The module guest.py beside this file."""
    if importlib.util.find_spec("t5x") is None:
        pytest.skip("T5X is not installed; docs/t5x.md says how")
    path = pathlib.Path(__file__).parent / "guest.py"
    spec = importlib.util.spec_from_file_location("guest", path)
    module = importlib.util.module_from_spec(spec)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        spec.loader.exec_module(module)
    return module


@pytest.fixture(autouse=True)
def as_t5x_is():
    """T5X promotes ranks in its embedding, and so do its optimisers."""
    with jax.numpy_rank_promotion("allow"), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
