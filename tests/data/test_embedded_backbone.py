"""The backbone that ships with the suite."""

import pathlib

import gin
import jax
import numpy as np
import pytest

from moe_peft.data import pipeline
from moe_peft.models import encoder_decoder, t5
from moe_peft.tasks import cldr
from moe_peft.weights import backbone

GIN = pathlib.Path(__file__).parents[2] / "gin" / "models" / "cldr_tiny.gin"
WEIGHTS = pathlib.Path(t5.__file__).parent / "embedded" / "cldr_tiny.safetensors"


@pytest.fixture
def model():
    gin.clear_config()
    gin.parse_config_file(str(GIN))
    gin.bind_parameter("T5Config.dropout_rate", 0.0)
    yield gin.query_parameter("%MODEL").scoped_configurable_fn()
    gin.clear_config()


def test_it_is_small_and_described():
    assert WEIGHTS.stat().st_size <= 8_000_000
    card = WEIGHTS.with_suffix(".md").read_text()
    for part in ("experiments/cldr/pretrain.gin", "Licence", "Steps", "Loss", "Unicode"):
        assert part in card


def test_it_fits_the_model_and_knows_cldr(model):
    """Exact match on validation rows of the pre-training text, every argmax right."""
    network = encoder_decoder.EncoderDecoder(model, encoder_decoder.LossConfig())
    lengths = {"inputs": 72, "targets": 48}
    batch = next(pipeline.eval_examples("cldr_denoise", lengths, batch_size=64)).features
    shapes = {name: value.shape for name, value in batch.items()}
    loaded = backbone.load(
        "embedded:cldr_tiny",
        jax.eval_shape(lambda rng: network.init(rng, shapes), jax.random.key(0)),
        lambda rng: network.init(rng, shapes),
    )
    assert model.config.vocab_size == cldr.VOCABULARY.vocab_size
    targets = batch["decoder_target_tokens"]
    found = np.argmax(jax.jit(network.logits)(loaded.params, batch), axis=-1)
    right = np.all((found == targets) | (targets == 0), axis=1)
    assert right.mean() > 0.85
