"""A small T5 with random weights, in both layouts."""

import importlib.util
import pathlib

import numpy as np
import pytest

from moe_peft.models import t5
from moe_peft.weights import t5_sizes


def make_config(version="1.1", **options):
    is_gated = version == "1.1"
    return t5.T5Config(
        vocab_size=32,
        emb_dim=12,
        num_heads=3,
        head_dim=4,
        mlp_dim=20,
        num_encoder_layers=2,
        num_decoder_layers=3,
        mlp_activations=("gelu", "linear") if is_gated else ("relu",),
        logits_via_embedding=not is_gated,
        **options,
    )


@pytest.fixture(params=["1.0", "1.1"])
def cfg(request):
    return make_config(request.param)


@pytest.fixture
def cfg_1_1():
    return make_config("1.1")


@pytest.fixture
def flat():
    """A function from a config to its parameters by path."""

    def make(cfg, dtype=np.float32):
        rng = np.random.default_rng(0)
        draw = lambda shape: rng.normal(size=shape).astype(np.float32).astype(dtype)
        return {path: draw(shape) for path, shape in t5_sizes.shapes_of(cfg).items()}

    return make


@pytest.fixture(scope="session")
def writing():
    """The module that writes files of torch by hand."""
    path = pathlib.Path(__file__).with_name("torch_writing.py")
    spec = importlib.util.spec_from_file_location("torch_writing", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
