"""Operations by count, against the compiler's own count."""

import jax
import jax.numpy as jnp
import pytest

from moe_peft.models import t5
from moe_peft.preflight import operations

CONFIG = t5.T5Config(
    vocab_size=512,
    emb_dim=256,
    num_heads=4,
    head_dim=32,
    mlp_dim=512,
    num_encoder_layers=2,
    num_decoder_layers=3,
)


def compiled_operations(config, inputs, targets):
    model = t5.Transformer(config)
    tokens = (
        jnp.ones((1, inputs), jnp.int32),
        jnp.ones((1, targets), jnp.int32),
        jnp.ones((1, targets), jnp.int32),
    )
    params = jax.eval_shape(lambda: model.init(jax.random.key(0), *tokens, enable_dropout=False))
    forward = jax.jit(lambda params: model.apply(params, *tokens, enable_dropout=False))
    return forward.lower(params).cost_analysis()["flops"]


@pytest.mark.parametrize(("inputs", "targets"), [(64, 32), (512, 64), (16, 512)])
def test_forward_equals_the_compilers_count(inputs, targets):
    counted = operations.forward(CONFIG, inputs, targets)
    # The compiler also counts what is not a product: norms, softmax, masks.
    assert 0.98 < counted / compiled_operations(CONFIG, inputs, targets) <= 1


def test_training_with_a_frozen_network_is_two_passes_and_three_with_all_weights():
    forward = operations.forward(CONFIG, 64, 32)
    assert operations.training(CONFIG, 10, 64, 32) == 20 * forward
    assert operations.training(CONFIG, 10, 64, 32, is_full=True) == 30 * forward
